"""Runs a comparison: one process after the other, in rounds, each row on the disk at once.

Rounds are interleaved: in each, every engine answers every prompt once (A B C A B C ...), so a
machine that slows down does so for all. Imports no torch; workers do.
"""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import offload_rt
from offload_rt.baselines import pagecache
from offload_rt.baselines.cap import CapKind
from offload_rt.baselines.engines import DRAFTED, OURS, EngineSpec
from offload_rt.baselines.process import Worker, WorkerFailedError
from offload_rt.baselines.rows import (
    Answered,
    Failed,
    Gap,
    Loaded,
    MalformedError,
    RawRows,
    Run,
    checked,
    runs_done,
    same_tokens,
)
from offload_rt.device.system import users_environment
from offload_rt.writing import make_folder, writing

_SCRATCH = ".offload-run-scratch"  # in the output folder, where users have files of their own
_WEIGHTS, _PACKAGES = "weights", "packages"  # in the scratch folder
_WARM_UP_TOKENS = 3  # DeepSpeed records the order of modules in its second pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What all engines are given.

    Attributes:
        model: the model's folder.
        files: its weight files.
        prompts: token ids.
        max_tokens: of an answer.
        end_tokens: that end one.
        load: what every `load` request says: sizes, limits, dtype, device.
        runtime: our own configuration as JSON.
        draft: our drafter as JSON, for the engine that drafts.
        no_draft: the same for the one that does not.
        draft_model: folder of the model that assists transformers, or None.
        decode: token ids to text.
        timeout_s: for one request.
    """

    model: Path
    files: Sequence[Path]
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    end_tokens: Sequence[int]
    load: Mapping[str, Any]
    kv_bytes_per_token: int
    runtime: Mapping[str, Any]
    draft: Mapping[str, Any]
    no_draft: Mapping[str, Any]
    draft_model: str | None
    decode: Callable[[Sequence[int]], str]
    timeout_s: float


@dataclass(slots=True)
class Comparison:
    """A comparison in the making.

    Attributes:
        pythons: who runs each engine, or why nobody can.
        folder: for logs and scratch files.
        say: called with a sentence when something begins or fails.
    """

    conditions: Conditions
    raw: RawRows
    engines: Sequence[EngineSpec]
    pythons: Mapping[str, Path | str]
    cap: CapKind
    folder: Path
    say: Callable[[str], None]

    def run(self, rounds: int) -> None:
        """Run what is missing of all rounds, then ask how near differing tokens were."""
        for number in range(rounds):
            for batch in self.raw.setup.batches:
                for spec in self.engines:
                    self._run_one(spec, Run(round=number, engine=spec.name, batch=batch), rounds)
        self._measure_gaps()

    def _run_one(self, spec: EngineSpec, run: Run, rounds: int) -> None:
        """One engine, one batch size, one round: what of it has no row yet."""
        failed = {(row.run.engine, row.run.batch) for row in self.raw.failures()}
        done = {group for other, group in runs_done(self.raw.rows) if other == run}
        missing = [g for g in enumerate(self.groups(run.batch)) if g[0] not in done]
        if (run.engine, run.batch) in failed or not missing:
            return
        self.say(f"round {run.round + 1} of {rounds}: {run.engine}, batch {run.batch}")
        stage = "start"
        try:
            with self._started(spec, run) as worker:
                stage = "load"
                self.raw.append(self._load(worker, spec, run))
                stage = "warm-up"
                self._ask(worker, missing[0][1], min(_WARM_UP_TOKENS, self.conditions.max_tokens))
                for number, prompts in missing:
                    stage = f"prompt {', '.join(str(p + 1) for p in prompts)}"
                    reply = self._ask(worker, prompts, self.conditions.max_tokens)
                    self.raw.append(self._answered(run, number, prompts, reply))
        except (WorkerFailedError, MalformedError) as error:
            self.raw.append(Failed(run=run, stage=stage, reason=str(error)))
            self.say(f"{run.engine}, batch {run.batch}: not run ({stage}: {error})")

    def groups(self, batch: int) -> list[list[int]]:
        """Prompts that run at once; the last group is filled up from the first prompts."""
        count = len(self.conditions.prompts)
        return [[i % count for i in range(at, at + batch)] for at in range(0, count, batch)]

    @contextmanager
    def _started(self, spec: EngineSpec, run: Run) -> Iterator[Worker]:
        """A worker, with the page cache cleared of weights and an empty scratch folder."""
        python = self.pythons[spec.name]
        if isinstance(python, str):
            raise WorkerFailedError(python)
        if spec.largest_batch is not None and run.batch > spec.largest_batch:
            raise WorkerFailedError(f"it answers {spec.largest_batch} sequence at once")
        logs, scratch = self.folder / "logs", self.folder / _SCRATCH
        make_folder(logs)
        shutil.rmtree(scratch, ignore_errors=True)
        with writing(scratch):
            for folder in (scratch, scratch / _WEIGHTS, scratch / _PACKAGES):
                folder.mkdir(mode=0o700)
            (scratch / _PACKAGES / "offload_rt").symlink_to(Path(offload_rt.__file__).parent)
        pagecache.drop(self.conditions.files)
        log = logs / f"{run.engine}-batch{run.batch}-round{run.round + 1}.log"
        command = [str(python), *spec.arguments]
        environment = _environment(spec, python, scratch / _PACKAGES)
        try:
            with Worker(command, environment, self.cap.open(), log) as worker:
                yield worker
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _load(self, worker: Worker, spec: EngineSpec, run: Run) -> Loaded:
        given, batch = self.conditions, run.batch
        longest = max(map(len, given.prompts)) + given.max_tokens
        groups = [sum(len(given.prompts[i]) for i in g) for g in self.groups(batch)]
        drafts = spec.name == DRAFTED
        request = {
            "do": "load",
            "model": str(given.model),
            "scratch": str(self.folder / _SCRATCH / _WEIGHTS),
            "batch": batch,
            "longest_tokens": longest,
            "prompt_tokens": max(groups),
            "kv_bytes": given.kv_bytes_per_token * longest * batch,
            "runtime": given.runtime,
            "draft": given.draft if drafts else given.no_draft,
            "draft_model": given.draft_model if spec.name == "transformers-assisted" else None,
            **given.load,
            **spec.options,
        }
        cached = pagecache.cached_bytes(given.files)
        reply = worker.request(request, given.timeout_s)
        return checked(Loaded, _row("loaded", run, reply) | {"cached_bytes": cached})

    def _ask(self, worker: Worker, prompts: Sequence[int], max_tokens: int) -> dict[str, Any]:
        given = self.conditions
        message = {
            "do": "answer",
            "prompts": [list(given.prompts[i]) for i in prompts],
            "max_tokens": max_tokens,
            "end_tokens": list(given.end_tokens),
        }
        return worker.request(message, given.timeout_s)

    def _answered(
        self, run: Run, group: int, prompts: list[int], reply: Mapping[str, Any]
    ) -> Answered:
        more = {"group": group, "prompts": prompts, "texts": []}
        row = checked(Answered, _row("answered", run, reply) | more)
        if len(row.token_ids) != len(prompts) or not all(row.token_ids):
            raise MalformedError(f"{len(prompts)} answers were asked for, not all of them came")
        row.texts.extend(self.conditions.decode(ids) for ids in row.token_ids)
        return row

    def _measure_gaps(self) -> None:
        """Where texts part from ours, ask our engine how near the two tokens were."""
        wanted = list(self._unjudged())
        if not wanted:
            return
        self.say(f"judging {len(wanted)} differences from {OURS}")
        spec = next(spec for spec in self.engines if spec.name == OURS)
        run = Run(round=0, engine=OURS, batch=1)
        try:
            with self._started(spec, run) as worker:
                self._load(worker, spec, run)
                for gap, ids in wanted:
                    message = {"do": "gap", "ids": ids, "tokens": gap["tokens"]}
                    reply = worker.request(message, self.conditions.timeout_s)
                    found = {name: reply.get(name) for name in ("logits", "best")}
                    self.raw.append(checked(Gap, gap | found))
        except (WorkerFailedError, MalformedError) as error:
            self.say(f"the differences cannot be judged: {error}")

    def _unjudged(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Differences of first rounds that have no row, and the tokens in front of them."""
        known = {(gap.engine, gap.batch, gap.prompt) for gap in self.raw.gaps()}
        for ours, theirs in differing(self.raw.answers()):
            for prompt, one, other in zip(
                theirs.prompts, ours.token_ids, theirs.token_ids, strict=True
            ):
                index = same_tokens(one, other)
                key = (theirs.run.engine, theirs.run.batch, prompt)
                if index is None or index >= min(len(one), len(other)) or key in known:
                    continue
                known.add(key)
                values = dict(zip(("engine", "batch", "prompt"), key, strict=True))
                values |= {"index": index, "tokens": [one[index], other[index]]}
                yield values, [*self.conditions.prompts[prompt], *one[:index]]


def differing(answers: Sequence[Answered]) -> Iterator[tuple[Answered, Answered]]:
    """Our answer and another engine's to the same prompts, of the first round that has them."""
    first: dict[tuple[str, int, int], Answered] = {}
    for row in answers:
        first.setdefault((row.run.engine, row.run.batch, row.group), row)
    for (engine, batch, group), theirs in first.items():
        ours = first.get((OURS, batch, group))
        if engine != OURS and ours is not None and ours.token_ids != theirs.token_ids:
            yield ours, theirs


def _row(kind: str, run: Run, reply: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in reply.items() if name != "ok"}
    return values | {"kind": kind, "run": dataclasses.asdict(run)}


def _environment(spec: EngineSpec, python: Path, packages: Path) -> dict[str, str]:
    """Variables of a worker: another one gets the bare package and the user's own variables."""
    settled = users_environment() if spec.environment else dict(os.environ)
    values = settled | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(packages)}
    if python != Path(sys.executable):
        for name in ("PYTHONHOME", "VIRTUAL_ENV"):
            values.pop(name, None)
    elif before := os.environ.get("PYTHONPATH"):
        values["PYTHONPATH"] += os.pathsep + before
    return values
