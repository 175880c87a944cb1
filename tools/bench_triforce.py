"""Long prompts, and how often the target over a retrieval cache says what the target says.

Usage:
  bench_triforce.py prompts TEXT --tokenizer MODEL --tokens 6000 > long6k.jsonl
  bench_triforce.py speed MODEL --prompts long16k.jsonl [--draft triforce]
      [--draft-tokens 4,8,16,auto] [--device-memory 4GiB] [--link-gb-per-s X] [--rounds 3]
      [--answer 96] [--weights int8]
  bench_triforce.py acceptance MODEL --prompts long6k.jsonl [--budgets 256,512,1024,2048]
      [--chunks 8,32,64] [--shares 0.25,auto] [--rebuild 16] [--answer 256] [--weights int8]
      [--json]

`prompts` makes three prompts from a part of a text: summarise it, continue it, and repeat a code
hidden in its middle; `offload-run bench --prompts` reads them too.

`acceptance` lets the model answer greedily with all of its context. Then every retrieval cache in
question follows the same passes over the full cache, eight tokens at a time, and before each the
model predicts those tokens from that cache alone, given the right ones before them. What is printed
is the share it predicted right, to the end of the answer, and in brackets that of its second half:
the acceptance per token of level 2 with gamma 8. A budget of which everything is recent is a sink
cache: the first chunk and newest rows; one whose share is auto tries that and the default share,
and keeps to the better. With `--weights` rounded copies of the weights predict instead of the
model's own.

`speed` reads each prompt once, then answers without drafting and with drafts of each size in turns
(A B C A B C ...), on one engine whose KV cache is on disk, or in host memory behind a link of the
given bandwidth. With `auto` among the sizes the engine is planned with this machine's profile, and
that one is corrected by a controller of its own in each answer.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch

from offload_rt.cli.prompt_set import PromptItem, read_prompt_set
from offload_rt.config import (
    RECENT_SHARES,
    DraftConfig,
    DraftWeights,
    GenerationConfig,
    KVPlace,
    RetrievalConfig,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.device.kinds import DeviceKind
from offload_rt.engine import Engine, Run
from offload_rt.errors import OffloadError
from offload_rt.kv.followed import FollowedKV, WatchedCache
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.retrieval import RetrievalKV
from offload_rt.kv.sizes import RetrievalSizes
from offload_rt.model.checkpoint import Checkpoint, open_checkpoint, resolve_model
from offload_rt.planning.controller import Controller
from offload_rt.planning.planner import Means
from offload_rt.runner.runner import Rows
from offload_rt.runner.tree import TokenTree
from offload_rt.session.means import means_for, speeds_for
from offload_rt.text import Message, build_prompt, end_token_ids, load_tokenizer
from offload_rt.units import parse_size

GAMMA = 8
CODE = "The secret code is 7391-KESTREL-0482-MARLOW."
SINK_CHUNK = 16  # sink tokens of StreamingLLM as TriForce uses it


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one retrieval cache predicted of one answer.

    Attributes:
        prompt: name of the prompt.
        prompt_tokens: its length.
        predicted: tokens of the answer that were predicted.
        right: of them, how many were the target's.
        later_right: of the second half of them, how many; staleness would show there.
    """

    prompt: str
    prompt_tokens: int
    retrieval: RetrievalConfig
    predicted: int
    right: int
    later_right: int

    @property
    def right_share(self) -> float:
        """Acceptance per token."""
        return self.right / self.predicted

    @property
    def later_share(self) -> float:
        """The same in the second half."""
        return self.later_right / (self.predicted - self.predicted // 2)


def make_prompts(text: str, tokenizer_folder: Path, tokens: int, skip: int) -> list[dict[str, str]]:
    """Three prompts around `tokens` tokens of a text, from token `skip` on."""
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer.encode(text, add_special_tokens=False)[skip : skip + tokens]
    if len(ids) < tokens:
        raise SystemExit(f"the text has {len(ids)} tokens from {skip} on, {tokens} are wanted")
    body, half = tokenizer.decode(ids), tokens // 2
    hidden = f"{tokenizer.decode(ids[:half])}\n\n{CODE}\n\n{tokenizer.decode(ids[half:])}"
    asks = {
        "summarise": (body, "Summarise the text above in a few paragraphs."),
        "continue": (body, "Continue the story from where the text above ends, in its style."),
        "code": (hidden, "What is the secret code mentioned in the text above? Repeat it exactly."),
    }
    return [
        {"task_id": name, "prompt": f"{context}\n\n{ask}"} for name, (context, ask) in asks.items()
    ]


def follow(
    engine: Engine, full: WatchedCache, configs: Sequence[RetrievalConfig]
) -> tuple[WatchedCache, list[FollowedKV]]:
    """Put a retrieval cache of each kind behind a full one."""
    shapes, dtype = engine.network.kv_shapes, engine.network.dtype
    row_bytes = tuple(shape.numbers_per_token * dtype.itemsize for shape in shapes)
    followed = []
    for config in configs:
        sizes = RetrievalSizes(
            row_bytes=row_bytes, config=config, capacity=full.capacity, scratch_tokens=GAMMA + 1
        )
        full = FollowedKV(full, RetrievalKV(engine.device, shapes, dtype, sizes))
        followed.append(full)
    return full, followed


def answer_of(engine: Engine, cache: WatchedCache, first: int, count: int) -> list[int]:
    """The greedy answer behind a prompt whose rows are in `cache`; they alone are left there."""
    start, answer, ends = cache.length, [first], engine_ends(engine)
    while len(answer) < count and answer[-1] not in ends:
        logits = engine.draft_pass(cache, answer[-1], TokenTree())
        cache.commit([0])
        answer.append(int(logits[0].argmax()))
    cache.truncate(start)
    return answer


def engine_ends(engine: Engine) -> frozenset[int]:
    """Tokens that end an answer."""
    return end_token_ids(load_tokenizer(engine.checkpoint.folder), engine.checkpoint.folder)


def measure(
    engine: Engine,
    item: PromptItem,
    ids: Sequence[int],
    configs: Sequence[RetrievalConfig],
    answer_tokens: int,
) -> list[Row]:
    """Predict one prompt's answer from each kind of retrieval cache."""
    full = own = engine._caches[0]  # the engine's own stays; the followers are this tool's
    if isinstance(full, FollowedKV):
        full = full.full
    assert isinstance(full, ResidentKV)  # there is room, or the run ends before
    outermost, caches = follow(engine, full, configs)
    copies, engine._rounded_copy = engine._rounded_copy, None  # the answer is the model's own
    guesser = copies or engine.runner
    engine._caches[0] = outermost
    try:
        logits = engine.forward([(0, ids)], reuse=False)
        answer = answer_of(engine, full, int(logits[0].argmax()), answer_tokens)
        hits: list[list[bool]] = [[] for _ in caches]
        for at in range(0, len(answer) - 1, GAMMA):
            given = answer[at : min(at + GAMMA, len(answer) - 1)]
            truth = torch.tensor(answer[at + 1 : at + 1 + len(given)])
            tree = TokenTree.chain(given[1:])
            for cache, mine in zip(caches, hits, strict=True):
                retrieval = cache.retrieval
                rows = Rows.draft(retrieval, given[0], tree)
                guesses = guesser.logits([rows]).argmax(dim=-1)
                found = (guesses == truth).tolist()
                accepted = [*found, False].index(False)
                judged = min(accepted + 1, len(found))
                cache.choice.note(cache.choice.current, accepted=accepted, judged=judged)
                mine += found
                retrieval.truncate(retrieval.length)
            engine.check([(0, given[0], tree)])
            engine.commit(0, given, range(len(given)))
    finally:
        engine._caches[0], engine._rounded_copy = own, copies
        engine.truncate(0, 0)
    return [
        Row(
            prompt=item.name,
            prompt_tokens=len(ids),
            retrieval=config,
            predicted=len(found),
            right=sum(found),
            later_right=sum(found[len(found) // 2 :]),
        )
        for config, found in zip(configs, hits, strict=True)
    ]


def run(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Row]:
    """Measure every prompt with every kind of retrieval cache."""
    tokenizer = load_tokenizer(checkpoint.folder)
    items = read_prompt_set(options.prompts)
    prompts = [build_prompt(tokenizer, [Message(role="user", content=item.text)]) for item in items]
    budgets, chunks = numbers(options.budgets), numbers(options.chunks)
    shares = [None if s == "auto" else float(s) for s in options.shares.split(",")]
    configs = []
    for budget in budgets:
        configs.append(
            RetrievalConfig(
                budget_tokens=budget,
                chunk_tokens=SINK_CHUNK,
                recent_share=1.0,
                rebuild_tokens=options.rebuild,
            )
        )
        configs += [
            RetrievalConfig(
                budget_tokens=budget,
                chunk_tokens=chunk,
                recent_share=share,
                rebuild_tokens=options.rebuild,
            )
            for chunk, share in product(chunks, shares)
            if 4 * chunk <= budget
        ]
    longest = max(map(len, prompts))
    rows = []
    with Engine(
        checkpoint,
        RuntimeConfig(device=options.device, kv=KVPlace.DEVICE),
        capacities=[longest + options.answer + 2 * GAMMA],
        prompt_tokens=longest,
        draft=_copies(options.weights),
    ) as engine:
        for item, ids in zip(items, prompts, strict=True):
            rows += measure(engine, item, ids, configs, options.answer)
            print(f"{item.name}: {rows[-1].predicted} tokens predicted", file=sys.stderr)
    return rows


def _means(checkpoint: Checkpoint, draft: DraftConfig, device: DeviceKind) -> Means:
    """What a run on this machine is planned with."""
    return means_for(checkpoint, SamplingConfig(), speeds_for(None, device), draft)


def _copies(weights: str) -> DraftConfig:
    """What makes an engine have rounded copies of its weights; nothing for its own."""
    if DraftWeights(weights) is DraftWeights.SAME:
        return DraftConfig()
    kept = RetrievalConfig(retrieval_weights=DraftWeights(weights))
    return DraftConfig(draft="triforce", draft_tokens=1, inner_tokens=1, retrieval=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One answer.

    Attributes:
        draft_tokens: how many were drafted, `none` or `auto`.
        s_per_token: time after the first token, per token after it.
        pass_s: time per pass over the full cache without what drafting took.
        draft_s: time drafting took per pass.
        draft_passes: over the retrieval cache, per pass over the full one.
        level_1: tokens drafted for those and accepted, in all; None without triforce.
    """

    prompt: str
    draft_tokens: str
    tokens: tuple[int, ...]
    s_per_token: float
    pass_s: float
    draft_s: float
    tokens_per_pass: float
    acceptance: float | None
    draft_passes: float = 0.0
    level_1: tuple[int, int] | None = None


class Fixed:
    """Has the same number of tokens drafted in each step."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes

    def observe(self, *_: object, **__: object) -> None:
        """Nothing changes it."""


def timed_answer(
    engine: Engine, item: PromptItem, ids: Sequence[int], count: int, draft_tokens: str
) -> Timed:
    """Answer a prompt whose rows are in the cache already, but for the last."""
    followed = engine._caches[0]
    assert isinstance(followed, FollowedKV)
    ends = engine_ends(engine)
    run = Run.start(engine, [ids], SamplingConfig(), GenerationConfig(max_tokens=count), ends)
    if draft_tokens == "auto":
        engine.controller = Controller(engine.plan.outlooks, engine.plan.first_nodes)
    elif draft_tokens != "none":
        engine.controller = Fixed(int(draft_tokens))  # type: ignore[assignment]
    else:
        run.sequences[0].drafter = None
        engine._caches[0] = followed.full  # nothing is chosen for a drafter that is not there
    try:
        run.prefill()
        while run.active:
            run.step()
    finally:
        engine._caches[0] = followed
    report = run.report()
    steps, below = max(1, report.speculation.passes - 1), report.speculation.retrieval
    assert report.timings.s_per_token is not None
    return Timed(
        prompt=item.name,
        draft_tokens=draft_tokens,
        tokens=tuple(run.sequences[0].emitted),
        s_per_token=report.timings.s_per_token,
        pass_s=(report.timings.decode_s - report.speculation.draft_s) / steps,
        draft_s=report.speculation.draft_s / steps,
        tokens_per_pass=(len(run.sequences[0].emitted) - 1) / steps,
        acceptance=report.speculation.acceptance_rate,
        draft_passes=0.0 if below is None else below.passes / steps,
        level_1=None if below is None else (below.drafted, below.accepted),
    )


def run_speed(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Timed]:
    """Time every prompt with and without drafting, in turns."""
    tokenizer = load_tokenizer(checkpoint.folder)
    items = read_prompt_set(options.prompts)
    prompts = [build_prompt(tokenizer, [Message(role="user", content=i.text)]) for i in items]
    longest, link = max(map(len, prompts)), options.link_gb_per_s
    timed = []
    runtime = RuntimeConfig(
        device="cpu",
        device_limit_bytes=parse_size(options.device_memory),
        kv=KVPlace.DISK if link is None else KVPlace.HOST,
        link_bytes_per_s=None if link is None else link * 1e9,
    )
    retrieval = RetrievalConfig(
        budget_tokens=numbers(options.budgets)[0],
        chunk_tokens=numbers(options.chunks)[0],
        rebuild_tokens=options.rebuild,
        retrieval_weights=DraftWeights(options.weights),
    )
    sizes = options.draft_tokens.split(",")
    planned = "auto" in sizes
    draft = DraftConfig(
        draft=options.draft,
        draft_tokens=None if planned else max(map(int, sizes)),
        inner_tokens=options.inner_gamma,
        retrieval=retrieval,
    )
    with Engine(
        checkpoint,
        runtime,
        capacities=[longest + options.answer],
        prompt_tokens=longest,
        draft=draft,
        means=partial(_means, checkpoint, draft) if planned else None,
    ) as engine:
        if too_large := [s for s in sizes if s != "auto" and int(s) > engine.draft.nodes]:
            print(f"the plan has room for {engine.draft.nodes} tokens, left out: {too_large}")
            sizes = [size for size in sizes if size not in too_large]
        print(engine.draft, engine.plan.first_nodes, engine.plan.prediction, file=sys.stderr)
        for item, ids in zip(items, prompts, strict=True):
            start = time.perf_counter()
            engine.forward([(0, ids)], reuse=False)
            print(f"{item.name}: read in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            for _ in range(options.rounds):
                for size in ("none", *sizes):
                    plain = options.plain_answer if size == "none" else None
                    count = plain or options.answer
                    timed.append(timed_answer(engine, item, ids, count, size))
                    print(replace(timed[-1], tokens=()), file=sys.stderr)
            engine.truncate(0, 0)
        print(engine.memory(), file=sys.stderr)
    return timed


def speed_table(timed: Sequence[Timed]) -> str:
    """A Markdown table of medians, a line per prompt and number of drafted tokens."""
    lines = [
        "| prompt | drafted | s/token without | with | ratio (min-max) | s/pass without | with | "
        "drafting s/pass | tokens/pass | accepted | same tokens |",
        "|---" * 11 + "|",
    ]
    for name, size in dict.fromkeys((t.prompt, t.draft_tokens) for t in timed):
        if size == "none":
            continue
        plain, drafted = (
            [t for t in timed if t.prompt == name and t.draft_tokens == d] for d in ("none", size)
        )
        ratios = [p.s_per_token / d.s_per_token for p, d in zip(plain, drafted, strict=True)]
        pairs = zip(plain[0].tokens, drafted[0].tokens, strict=False)
        alike = all(one == other for one, other in pairs)  # as far as both go
        cells = [
            name,
            size,
            f"{median(t.s_per_token for t in plain):.3f}",
            f"{median(t.s_per_token for t in drafted):.3f}",
            f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{median(t.pass_s for t in plain):.3f}",
            f"{median(t.pass_s for t in drafted):.3f}",
            f"{median(t.draft_s for t in drafted):.3f}",
            f"{drafted[0].tokens_per_pass:.2f}",
            f"{drafted[0].acceptance or 0:.0%}",
            "yes" if alike else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    """Whole numbers, separated by commas."""
    return [int(part) for part in text.split(",")]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: a line per retrieval cache, a column per prompt, its second half beside."""
    names = list(dict.fromkeys(row.prompt for row in rows))
    tokens = {row.prompt: (row.prompt_tokens, row.predicted) for row in rows}
    head = [f"{name} ({tokens[name][0]} in, {tokens[name][1]} predicted)" for name in names]
    lines = [f"| budget | chunk | recent | {' | '.join(head)} |", "|---" * (3 + len(names)) + "|"]
    for config in dict.fromkeys(row.retrieval for row in rows):
        own = {row.prompt: row for row in rows if row.retrieval == config}
        shares = [f"{own[n].right_share:.3f} ({own[n].later_share:.3f})" for n in names]
        kind = "sink" if config.recent_share == 1.0 else str(config.chunk_tokens)
        recent = "auto" if config.recent_share is None else f"{config.recent_share:g}"
        lines.append(f"| {config.budget_tokens} | {kind} | {recent} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    prompts = verbs.add_parser("prompts")
    prompts.add_argument("text", type=Path)
    prompts.add_argument("--tokenizer", required=True)
    prompts.add_argument("--tokens", type=int, default=6000)
    prompts.add_argument("--skip", type=int, default=3000, help="tokens of the text left out")
    acceptance = verbs.add_parser("acceptance")
    acceptance.add_argument("model")
    acceptance.add_argument("--prompts", required=True)
    acceptance.add_argument("--budgets", default="256,512,1024,2048")
    acceptance.add_argument("--chunks", default="8,32,64")
    acceptance.add_argument("--shares", default=f"{RECENT_SHARES[0]},auto")
    acceptance.add_argument("--rebuild", type=int, default=RetrievalConfig().rebuild_tokens)
    acceptance.add_argument("--answer", type=int, default=256, help="tokens of an answer at most")
    acceptance.add_argument("--device", default="auto")
    acceptance.add_argument("--weights", default="same", choices=["same", "int8", "int4"])
    acceptance.add_argument("--json", action="store_true")
    speed = verbs.add_parser("speed")
    speed.add_argument("model")
    speed.add_argument("--prompts", required=True)
    speed.add_argument("--draft", default="triforce")
    speed.add_argument("--draft-tokens", default="16", help="sizes, separated by commas, or auto")
    speed.add_argument("--inner-gamma", type=int)
    speed.add_argument("--budgets", default=str(RetrievalConfig().budget_tokens))
    speed.add_argument("--chunks", default=str(RetrievalConfig().chunk_tokens))
    speed.add_argument("--rebuild", type=int, default=RetrievalConfig().rebuild_tokens)
    speed.add_argument("--weights", default="same", choices=["same", "int8", "int4", "auto"])
    speed.add_argument("--device-memory", default="4GiB")
    speed.add_argument("--link-gb-per-s", type=float, help="emulate a link to host memory")
    speed.add_argument("--rounds", type=int, default=3)
    speed.add_argument("--answer", type=int, default=96)
    speed.add_argument("--plain-answer", type=int, help="tokens of the answers without drafting")
    speed.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        if options.verb == "prompts":
            text = options.text.read_text(encoding="utf-8")
            folder = resolve_model(options.tokenizer)
            made = make_prompts(text, folder, options.tokens, options.skip)
            try:
                print("\n".join(map(json.dumps, made)), flush=True)
            except BrokenPipeError:  # `| head -1` wants no more
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        checkpoint = open_checkpoint(resolve_model(options.model))
        if options.verb == "speed":
            timed = run_speed(checkpoint, options)
            shown = [asdict(t) for t in timed]
            text = speed_table(timed)
        else:
            rows = run(checkpoint, options)
            shown, text = [asdict(row) for row in rows], table(rows)
    except OffloadError as error:
        raise SystemExit(f"error: {error}") from error
    print(json.dumps(shown, indent=1) if options.json else text)


if __name__ == "__main__":
    main()
