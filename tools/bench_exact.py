"""Bits of rows in passes that verify drafts, against decoding token by token.

    python tools/bench_exact.py MODEL --prompts mt_bench.jsonl --limit 20 --tokens 200

Each answer is decoded greedily, one row a pass, and its logits are kept. Then its tokens are
checked again as drafts of random sizes, chains and trees in turn, with wrong tokens among those of
trees. One JSON line: rows compared, and rows with the same bits. `--exact off` shows the contrast.

    python tools/bench_exact.py MODEL --time-passes 5 --cached 300 --device-memory 2GiB

Seconds, and processor seconds, of passes of one row and of a tree of 64: medians, `--exact off` and
on in turns, each in an engine of its own.
"""

from offload_rt.device.system import settle_math

settle_math()

import argparse  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from offload_rt.cli.prompt_set import read_prompt_set, spread  # noqa: E402
from offload_rt.config import Exact, RuntimeConfig  # noqa: E402
from offload_rt.engine import Engine  # noqa: E402
from offload_rt.model.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from offload_rt.runner.tree import ROOT, TokenTree  # noqa: E402
from offload_rt.text import Tokenizer, build_prompt  # noqa: E402
from offload_rt.units import parse_size  # noqa: E402

MOST_ROWS = 64
TURNS = 2


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--device-memory", type=parse_size)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--exact", choices=["on", "off"])
    parser.add_argument("--time-passes", type=int, metavar="N")
    parser.add_argument("--cached", type=int)
    given = parser.parse_args()
    timed = given.time_passes is not None
    if (given.prompts is not None) == timed:
        parser.error("give --prompts to compare bits, or --time-passes to time passes")
    names = ("limit", "tokens", "exact") if timed else ("cached",)
    if vain := [f"--{name}" for name in names if getattr(given, name) is not None]:
        parser.error(f"{vain[0]} has no effect {'with' if timed else 'without'} --time-passes")
    if timed and given.time_passes < 1:
        parser.error("--time-passes is at least 1")
    checkpoint = open_checkpoint(Path(given.model))
    config = RuntimeConfig(
        device="cpu",
        device_limit_bytes=given.device_memory,
        dtype=given.dtype,
        threads=given.threads,
        exact=Exact(given.exact or "on"),
    )
    if timed:
        time_passes(checkpoint, config, given.cached or 300, given.time_passes)
        return
    tokens = given.tokens or 200
    chosen = spread(read_prompt_set(given.prompts), given.limit or 20)
    tokenizer = Tokenizer(checkpoint.folder, checkpoint.embedding.shape[0])
    prompts = [build_prompt(tokenizer, item.text, system=None, raw=False) for item in chosen]
    longest = max(map(len, prompts))
    capacity = longest + tokens + MOST_ROWS
    with Engine(checkpoint, config, capacities=[capacity], prompt_tokens=longest) as engine:
        found = [Found(engine, ids, tokens) for ids in prompts]
        placed = len(engine.placement.streamed)
    rows, same = sum(f.rows for f in found), sum(f.same for f in found)
    record = {"model": checkpoint.name, "exact": str(config.exact), "streamed_layers": placed}
    record |= {"prompts": len(prompts), "rows": rows, "same": same, "share": same / rows}
    record |= {"same_choice": sum(f.same_choice for f in found) / rows}
    sys.stdout.write(json.dumps(record) + "\n")


def time_passes(checkpoint: Checkpoint, config: RuntimeConfig, cached: int, passes: int) -> None:
    """Print what passes take behind so many cached rows, a JSON line for each engine."""
    chance = random.Random(0)
    parents = [chance.randrange(max(ROOT, node - 9), node) for node in range(MOST_ROWS - 1)]
    trees = {1: TokenTree(), MOST_ROWS: TokenTree((5,) * len(parents), tuple(parents))}
    for exact in [Exact.OFF, Exact.ON] * TURNS:
        room = [cached + MOST_ROWS]
        own = replace(config, exact=exact)
        with Engine(checkpoint, own, capacities=room, prompt_tokens=cached) as engine:
            ids = [chance.randrange(5, 1000) for _ in range(cached)]
            engine.forward([(0, ids)], reuse=True)
            record = {"exact": str(exact), "streamed_layers": len(engine.placement.streamed)}
            for rows, tree in trees.items():
                taken = []
                for _ in range(1 + passes):  # the first one is not counted
                    begin = time.perf_counter(), time.process_time()
                    engine.check([(0, 5, tree)])
                    end = time.perf_counter(), time.process_time()
                    taken.append([b - a for a, b in zip(begin, end, strict=True)])
                    engine.truncate(0, cached)
                for name, times in zip(("s", "cpu_s"), zip(*taken[1:], strict=True), strict=True):
                    record[f"rows_{rows}_{name}"] = statistics.median(times)
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()


class Found:
    """What came of one prompt.

    Attributes:
        rows: that were compared.
        same: of them, with the same bits.
        same_choice: of them, with the same likeliest token.
    """

    def __init__(self, engine: Engine, prompt: Sequence[int], tokens: int) -> None:
        self.rows = self.same = self.same_choice = 0
        engine.forget()
        logits = [engine.forward([(0, prompt)], reuse=True)[0].clone()]
        answer = []
        for _ in range(tokens):
            answer.append(int(logits[-1].argmax()))
            logits.append(engine.forward([(0, answer[-1:])], reuse=False)[0].clone())
        engine.truncate(0, len(prompt))
        for start, tree, own in drafts(answer, engine.checkpoint.config.vocab_size):
            (found,) = engine.check([(0, answer[start], tree)])
            for place, row in enumerate(own):
                expected = logits[start + place + 1]
                self.rows += 1
                self.same += torch.equal(found[row], expected)
                self.same_choice += bool(found[row].argmax() == expected.argmax())
            engine.commit(0, answer[start : start + len(own)], own)


def drafts(answer: Sequence[int], vocab: int) -> Iterator[tuple[int, TokenTree, list[int]]]:
    """Cuts of an answer: the root's place, the tree behind it, rows that are the answer's."""
    chance, start, number = random.Random(0), 0, 0
    while start < len(answer):
        right = list(answer[start + 1 : start + chance.randint(1, MOST_ROWS)])
        tokens, parents, own = list[int](), list[int](), [0]
        for depth, token in enumerate(right):
            last = own[-1] - 1 if depth else ROOT
            for _ in range(chance.randint(0, 2) if number % 2 else 0):
                wrong = len(tokens) - 1  # beside the right one, or behind a wrong one
                parents.append(chance.choice([last, wrong]) if tokens else last)
                tokens.append(chance.randrange(vocab // 2))
            parents.append(last)
            tokens.append(token)
            own.append(len(tokens))
        yield start, TokenTree(tuple(tokens), tuple(parents)), own
        start, number = start + len(own), number + 1


if __name__ == "__main__":
    main()
