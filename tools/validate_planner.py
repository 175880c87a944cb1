"""Predicted against measured seconds per token, over a grid of plans on this machine.

    python tools/validate_planner.py --small SMOLLM2 --target QWEN15 --drafter QWEN05 \
        --large BENCH3B --prompts mt_bench.jsonl --output results/

Each plan fixes the device memory, who drafts and how much, so nothing is corrected while it runs.
How many drafted tokens stand is counted first, once per drafter and number of tokens, with
everything on the device, on the same prompts: what is judged is the prediction of time, not of
text. The profile is this machine's (`offload-run profile`) unless --profile names others: then each
predicts every plan. --make-profiles makes them first, beside a changing number of busy processes,
and says whether their layer curves rise. Plans are measured in rounds, one after the other; the
least time of a plan counts, as a prediction is of a machine that nobody disturbs.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload_rt.cli.prompt_set import read_prompt_set, spread
from offload_rt.config import (
    DraftConfig,
    GenerationConfig,
    HomeKind,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.machine import FreeMemory
from offload_rt.device.kinds import CPU, DeviceKind
from offload_rt.device.system import (
    free_memory_bytes,
    settle_math,
    thread_times,
    users_environment,
)
from offload_rt.engine import Engine, Run
from offload_rt.errors import OffloadError
from offload_rt.model.checkpoint import Checkpoint, open_checkpoint, resolve_model
from offload_rt.planning.fit import RunLoad
from offload_rt.planning.planner import Means, plan_wires
from offload_rt.planning.yields import NOTHING_SEEN, Seen, Yield, expected_yield
from offload_rt.profiling.store import find_profile, load_profile
from offload_rt.report import RunReport
from offload_rt.session.means import speeds_for
from offload_rt.speculative.draft_model.pair import open_draft_checkpoint
from offload_rt.text import build_prompt, load_tokenizer
from offload_rt.units import parse_size

_GREEDY = SamplingConfig()
_BURN = (sys.executable, "-c", "while True: sum(range(10**6))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One plan to predict and to measure.

    Attributes:
        model: which of the models given.
        memory: device memory, or None for what is free.
        draft: `none`, `ngram` or `model`.
        tokens: of a draft.
        link_gb_per_s: of an emulated link to host memory; None streams from disk.
    """

    model: str
    memory: str | None
    draft: str = "none"
    tokens: int | None = None
    link_gb_per_s: float | None = None

    @property
    def label(self) -> str:
        """In a table."""
        link = f", link {self.link_gb_per_s:g} GB/s" if self.link_gb_per_s else ""
        return f"{self.model}, {self.memory or 'all resident'}{link}"

    @property
    def drafting(self) -> str:
        """In a table."""
        return f"{self.draft} {self.tokens}" if self.tokens else self.draft


def cases(models: Mapping[str, Path], target_memory: Sequence[str]) -> Iterator[Case]:
    """The grid: small, middle and large model; streamed from disk, over a paced link, resident."""
    pairs: list[tuple[str, int | None]] = [("none", None), ("ngram", 8)]
    for memory, link in ((None, None), ("220MiB", None), ("220MiB", 0.4)):
        for draft, tokens in pairs:
            yield Case(model="small", memory=memory, draft=draft, tokens=tokens, link_gb_per_s=link)
    drafted = [("model", tokens) for tokens in (4, 16, 64)] if "drafter" in models else []
    for memory in (*target_memory, None):
        for draft, tokens in [*pairs, *drafted]:
            yield Case(model="target", memory=memory, draft=draft, tokens=tokens)
    for draft, tokens in [pairs[0], *drafted[1:2]]:
        memory = target_memory[-2]
        yield Case(model="target", memory=memory, draft=draft, tokens=tokens, link_gb_per_s=1.0)
    for memory, (draft, tokens) in (("2GiB", pairs[0]), ("4GiB", pairs[0]), ("2GiB", pairs[1])):
        yield Case(model="large", memory=memory, draft=draft, tokens=tokens)


@dataclass(slots=True)
class Bench:
    """Models, prompts and what was counted."""

    models: Mapping[str, Path]
    prompts: Mapping[str, Sequence[Sequence[int]]]
    answer: int
    profiles: Sequence[str | None]

    def seen(self, model: str, draft: str, tokens: int | None) -> Seen:
        """Count accepted tokens of a drafter, with everything on the device.

        All steps count, those at the end of an answer too, as they do in what is measured.
        """
        case = Case(model=model, memory=None, draft=draft, tokens=tokens)
        with self._engine(case, NOTHING_SEEN) as engine:
            reports = [self._run(engine, prompt) for prompt in self.prompts[model]]
            seen = engine.tally.seen()
            hits = seen.hits
        steps = sum(report.speculation.passes - 1 for report, _ in reports)
        accepted = sum(report.speculation.accepted for report, _ in reports)
        drafts = steps * (hits[1] if hits[0] else 1.0)
        nodes = tokens or 0
        accepted_per_step = {nodes: (steps, accepted / max(drafts, 1.0))}
        return Seen(accepted=accepted_per_step, hits=hits, made=seen.made)

    def measure(self, case: Case, seen: Seen) -> dict[str, object]:
        """Predict and measure one plan."""
        with self._engine(case, seen) as engine:
            prediction = engine.plan.prediction
            assert prediction is not None
            others = {str(p): self._predicted_s(p, case, seen) for p in self.profiles}
            ran_s, waited_s = _times_s()
            reports = [self._run(engine, prompt) for prompt in self.prompts[case.model]]
            tokens = sum(later for _, later in reports)
            steps = sum(report.speculation.passes - 1 for report, _ in reports)
            decode_s = sum(report.timings.decode_s for report, _ in reports)
            draft_s = sum(report.speculation.draft_s for report, _ in reports)
            stall_s = engine.device.compute.stalled_s()
            ran_s, waited_s = (
                now - then for now, then in zip(_times_s(), (ran_s, waited_s), strict=True)
            )
            return {
                "predicted_by": others,
                "waited_share": waited_s / max(ran_s + waited_s, 1e-9),
                "case": case.label,
                "drafting": case.drafting,
                "predicted_s_per_token": prediction.s_per_token,
                "measured_s_per_token": decode_s / tokens,
                "predicted_tokens_per_pass": prediction.tokens_per_pass,
                "measured_tokens_per_pass": tokens / steps,
                "predicted_pass_s": prediction.pass_s,
                "measured_pass_s": (decode_s - draft_s) / steps,
                "predicted_draft_s": prediction.draft_s,
                "measured_draft_s": draft_s / steps,
                "streamed_layers": len(engine.placement.streamed),
                "slots": engine.placement.slots,
                "stalled_s": stall_s,
            }

    def _predicted_s(self, profile: str | None, case: Case, seen: Seen) -> float:
        """Seconds per token by a profile; nothing is loaded."""
        runtime, draft, longest = self._asked(case)
        checkpoint = _opened(self.models[case.model])
        drafting = Drafting(draft, open_draft_checkpoint(checkpoint, draft))
        free = FreeMemory(device_bytes=free_memory_bytes(), host_bytes=free_memory_bytes())
        load = RunLoad(capacities=[longest + self.answer], prompt_tokens=longest, drafting=drafting)
        means = self._means(profile, CPU, seen)
        _, plan = plan_wires(checkpoint, runtime, CPU, load=load, free=free, means=means)
        assert plan.prediction is not None
        return plan.prediction.s_per_token

    def _means(self, profile: str | None, device: DeviceKind, seen: Seen) -> Means:
        def yields(config: DraftConfig) -> Yield:
            return _counted(seen) or expected_yield(config.kind)

        return Means(speeds=speeds_for(profile, device), yields=yields)

    def _asked(self, case: Case) -> tuple[RuntimeConfig, DraftConfig, int]:
        """Where a plan runs, who drafts, and the longest prompt."""
        longest = max(map(len, self.prompts[case.model]))
        draft = case.draft
        if draft == "model":
            draft = f"model:{self.models['drafter']}"
        runtime = RuntimeConfig(
            device="cpu",
            device_limit_bytes=parse_size(case.memory) if case.memory else None,
            home=HomeKind.HOST if case.link_gb_per_s else HomeKind.AUTO,
            link_bytes_per_s=case.link_gb_per_s * 1e9 if case.link_gb_per_s else None,
        )

        return runtime, DraftConfig(draft=draft, draft_tokens=case.tokens), longest

    def _engine(self, case: Case, seen: Seen) -> Engine:
        runtime, draft, longest = self._asked(case)
        return Engine(
            _opened(self.models[case.model]),
            runtime,
            capacities=[longest + self.answer],
            prompt_tokens=longest,
            draft=draft,
            means=lambda device: self._means(self.profiles[0], device, seen),
        )

    def _run(self, engine: Engine, prompt: Sequence[int]) -> tuple[RunReport, int]:
        """What a run measured, and its tokens after the first."""
        engine.forget()
        generation = GenerationConfig(max_tokens=self.answer, ignore_eos=True)
        run = Run.start(engine, [prompt], _GREEDY, generation)
        run.prefill()
        while run.active:
            run.step()
        return run.report(), len(run.sequences[0].emitted) - 1


def _counted(seen: Seen) -> Yield | None:
    """What was counted and nothing else; None if nothing was."""
    if not seen.accepted:
        return None
    points = sorted((nodes, accepted) for nodes, (_, accepted) in seen.accepted.items())
    return Yield(tuple(points), seen.hits[1])


def _times_s() -> tuple[float, float]:
    """Seconds that this process's threads ran, and that other work kept them from a core."""
    ran, waited = zip(*thread_times().values(), strict=True)
    return sum(ran) / 1e9, sum(waited) / 1e9


def _opened(folder: Path) -> Checkpoint:
    return open_checkpoint(resolve_model(str(folder)))


def summarise(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """One row per plan: medians over the rounds, the least time, the errors of predictions."""
    plans: dict[tuple[object, object], list[Mapping[str, object]]] = {}
    for row in rows:
        plans.setdefault((row["case"], row["drafting"]), []).append(row)
    made = []
    for group in plans.values():
        keys = [key for key, value in group[0].items() if isinstance(value, int | float)]
        merged: dict[str, object] = dict(group[0])
        merged |= {key: statistics.median(row[key] for row in group) for key in keys}  # type: ignore[type-var]
        merged["rounds"] = len(group)
        measured = merged["measured_s_per_token"] = min(
            float(row["measured_s_per_token"])  # type: ignore[arg-type]
            for row in group
        )
        by: Mapping[str, float] = merged["predicted_by"]  # type: ignore[assignment]
        merged["errors"] = {name: predicted / measured - 1.0 for name, predicted in by.items()}
        merged["error"] = merged["predicted_s_per_token"] / measured - 1.0  # type: ignore[operator]
        made.append(merged)
    return made


def as_table(plans: Sequence[Mapping[str, object]]) -> str:
    """Markdown, and the errors' quantiles."""
    lines = [
        "| plan | drafting | streamed | predicted s/token | measured | error |"
        " pass predicted / measured | drafting predicted / measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in plans:
        lines.append(
            f"| {p['case']} | {p['drafting']} | {p['streamed_layers']} |"
            f" {p['predicted_s_per_token']:.4f} | {p['measured_s_per_token']:.4f} |"
            f" {p['error']:+.0%} | {p['predicted_pass_s']:.3f} / {p['measured_pass_s']:.3f} |"
            f" {p['predicted_draft_s']:.3f} / {p['measured_draft_s']:.3f} |"
        )
    by_profile: dict[str, list[float]] = {}
    for p in plans:
        for name, error in p["errors"].items():  # type: ignore[attr-defined]
            by_profile.setdefault(name, []).append(error)
    lines.append("")
    lines += [f"{Path(name).stem}: {_spread(errors)}" for name, errors in by_profile.items()]
    if len(by_profile) > 1:
        lines.append(f"all: {_spread([e for errors in by_profile.values() for e in errors])}")
    return "\n".join(lines)


def _spread(errors: Sequence[float]) -> str:
    sizes = sorted(map(abs, errors))
    at90 = sizes[min(len(sizes) - 1, round(0.9 * (len(sizes) - 1)))]
    return (
        f"{len(sizes)} predictions, median error {statistics.median(sizes):.1%}, 90th percentile "
        f"{at90:.1%}, largest {sizes[-1]:.1%}"
    )


@contextmanager
def busy(most: int, seed: int) -> Iterator[None]:
    """Keep up to `most` processes busy, a changing number of them, while the body runs."""
    stop, dice = threading.Event(), random.Random(seed)

    def change() -> None:
        while not stop.is_set():
            running = [subprocess.Popen(_BURN) for _ in range(dice.randint(0, most))]
            stop.wait(dice.uniform(1.0, 6.0))
            for process in running:
                process.kill()
                process.wait()

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def make_profiles(count: int, most: int, folder: Path, disk: Path | None) -> list[str]:
    """Measure this machine so many times beside other work; returns the files.

    Args:
        count: of profiles.
        most: busy processes beside each.
        folder: for the profiles.
        disk: folder of a model, whose files tell the disk's speed; None: as `offload-run profile`.
    """
    made = []
    for number in range(count):
        path = folder / f"profile-{number}.json"
        command = [sys.executable, "-m", "offload_rt", "profile", "--device", "cpu"]
        command += ["--output", str(path), *(["--folder", str(disk)] if disk else [])]
        with busy(most, number):
            subprocess.run(command, check=True, env=users_environment(), stdout=subprocess.DEVNULL)
        made.append(str(path))
    return made


def describe(name: str) -> str:
    """Whether a profile's layer curves rise with tokens and size, and what it notes."""
    profile = load_profile(find_profile(name))
    wrong = sum(
        other.layer_s.value < one.layer_s.value
        for a in profile.layers
        for b in profile.layers
        if (a.processor, a.weights) == (b.processor, b.weights)
        and a.shape.weight_bytes <= b.shape.weight_bytes
        for one in a.times
        for other in b.times
        if one.tokens <= other.tokens
    )
    return f"{profile.name}: {wrong} pairs of layer times fall; {' | '.join(profile.notes)}"


def plot(plans: Sequence[Mapping[str, object]], path: Path) -> None:
    """Scatter plot of predicted against measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    for kind, marker in (("none", "o"), ("ngram", "^"), ("model", "s")):
        points = [p for p in plans if str(p["drafting"]).startswith(kind)]
        axes.scatter(
            [p["measured_s_per_token"] for p in points],
            [p["predicted_s_per_token"] for p in points],
            marker=marker,
            label={"none": "no drafting"}.get(kind, f"{kind} drafts"),
        )
    values = [float(p[k]) for p in plans for k in ("measured_s_per_token", "predicted_s_per_token")]  # type: ignore[arg-type]
    low, high = 0.8 * min(values), 1.25 * max(values)
    axes.plot([low, high], [low, high], color="0.5", linewidth=1)
    for factor in (0.9, 1.1):
        axes.plot([low, high], [factor * low, factor * high], color="0.8", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(low, high),
        xlabel="measured s/token",
        ylabel="predicted s/token",
        title="Plans on this machine (grey: equal, and 10 % off)",
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, or only remake the table from the rows."""
    if "GOMP_SPINCOUNT" not in os.environ:  # torch is here already: begin again as offload-run does
        settle_math()
        os.environ.setdefault("GOMP_SPINCOUNT", "")
        os.execv(sys.executable, [sys.executable, *sys.argv])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("small", "target", "drafter", "large"):
        parser.add_argument(f"--{name}", type=Path, help="model folder")
    parser.add_argument("--prompts", type=Path, help="prompt set, as for `offload-run bench`")
    parser.add_argument("--limit", type=int, default=2, help="prompts")
    parser.add_argument("--answer", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="plans whose name has this regular expression")
    parser.add_argument("--profile", action="append", help="may be repeated; default: own")
    parser.add_argument("--make-profiles", type=int, default=0, metavar="N", help="measure N first")
    parser.add_argument("--load", type=int, default=4, help="busy processes beside them, at most")
    parser.add_argument("--disk", type=Path, help="model folder whose files profiles read")
    parser.add_argument(
        "--target-memory", default="1800MiB,2GiB,3GiB", help="device memory for the target"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for rows, table, plot")
    parser.add_argument("--report-only", action="store_true")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    given.profile = given.profile or []
    given.profile += make_profiles(given.make_profiles, given.load, given.output, given.disk)
    for name in given.profile:
        print(describe(name))
    rows_path = given.output / "rows.jsonl"
    if not given.report_only:
        measure(given, rows_path)
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    plans = summarise(rows)
    table = as_table(plans)
    (given.output / "table.md").write_text(table + "\n")
    print(table)
    plot(plans, given.output / "predicted.png")
    return 0


def measure(given: argparse.Namespace, rows_path: Path) -> None:
    """Run all plans, round after round; each row is written as it is known."""
    names = ("small", "target", "drafter", "large")
    models = {name: getattr(given, name) for name in names if getattr(given, name)}
    items = spread(read_prompt_set(str(given.prompts)), given.limit)
    prompts = {}
    for name in models:
        if name != "drafter":
            tokenizer = load_tokenizer(_opened(models[name]).folder)
            prompts[name] = [build_prompt(tokenizer, item.text) for item in items]
    bench = Bench(models, prompts, given.answer, given.profile or [None])
    grid = [
        case
        for case in cases(models, given.target_memory.split(","))
        if case.model in models and re.search(given.only, f"{case.label}, {case.drafting}")
    ]
    counted: dict[tuple[str, str, int | None], Seen] = {}
    with rows_path.open("a") as file:
        for number in range(given.rounds):
            for case in grid:
                key = (case.model, case.draft, case.tokens)
                if case.draft != "none" and key not in counted:
                    counted[key] = bench.seen(*key)
                try:
                    row = bench.measure(case, counted.get(key, NOTHING_SEEN))
                except OffloadError as error:
                    print(f"{case.label}, {case.drafting}: {error}", file=sys.stderr)
                    continue
                file.write(json.dumps(row | {"round": number}) + "\n")
                file.flush()
                print(
                    f"{case.label:<40} {case.drafting:<10} {row['predicted_s_per_token']:.4f}"
                    f" {row['measured_s_per_token']:.4f}",
                    file=sys.stderr,
                )


if __name__ == "__main__":
    sys.exit(main())
