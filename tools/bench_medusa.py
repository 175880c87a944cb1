"""Prompts to train Medusa heads on, and what trained heads are worth.

Usage:
  bench_medusa.py chat MODEL --count 300 [--seed 0] > chat.jsonl
  bench_medusa.py code --count 300 [--seed 0] > code.jsonl
  bench_medusa.py split PROMPTS --share 0.67 --train TRAIN --test TEST [--seed 0]
  bench_medusa.py trees MODEL HEADS --prompts TEST [--measure 64] [--replay 16,32,64,128,256]
      [--limit N] [--answer 128] [--together 8] [--device-memory 2GiB] [--json]
  bench_medusa.py widen HEADS MODEL --output WIDE

`chat` has an instruction-tuned model make up what users ask: it is given the chat template up to
where the user speaks, and goes on from there (as in Magpie, arXiv:2406.08464). `code` takes heads
and docstrings of functions of Python's standard library. `split` divides a set of prompts by chance
into one to train on and one that stays unseen. With `offload-run train-medusa --self-distill` this
is all that training heads needs.

`trees` answers unseen prompts greedily, drafting with trees of one size, and prints the tokens per
pass: emitted tokens / passes a sequence took part in, the prompt's pass and the token it emits left
out. From the hidden states that made the answers it then replays the same answers with trees of
other sizes: a greedy answer is the same whoever drafts, so which tokens each pass would have
accepted is known. Beside it stands what the calibration of the heads predicts; they differ by what
the prompts differ from those it was made on. Speed is `offload-run bench ... --draft medusa:HEADS
--against-none`.

`widen` pads heads of a small model with zeros for a large one that computes the same function
(`make_bench_model.py`): its hidden state is the small one's and zeros. So heads that took minutes
to train draft for gigabytes of streamed weights.
"""

import argparse
import ast
import json
import random
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from offload_rt.cli.prompt_set import read_lines, read_prompt_set, spread
from offload_rt.config import DraftConfig, GenerationConfig, RuntimeConfig, SamplingConfig
from offload_rt.engine import Engine, Run
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.model.checkpoint import open_checkpoint, resolve_model
from offload_rt.speculative.medusa.calibration import (
    CALIBRATION_FILE,
    RANKS,
    best_trees,
    read_calibration,
)
from offload_rt.speculative.medusa.checkpoint import open_heads
from offload_rt.speculative.medusa.names import LmHead
from offload_rt.speculative.medusa.storage import Heads, Layout, read_heads, write_heads
from offload_rt.speculative.medusa.trees import Choice
from offload_rt.text import build_prompt, end_token_ids, load_tokenizer
from offload_rt.units import parse_size

MARK = "\u2603"  # stands for what the user says; no chat template holds it
QUESTION_TOKENS = 96
TOGETHER = 16
LONGEST_CODE_LINES = 30
MISSED = -1  # a rank no tree has


@dataclass(frozen=True, slots=True)
class Written:
    """An answer, and what the heads thought of it.

    Attributes:
        tokens: of the answer.
        ranks: for each of its tokens and each head, the rank at which the head guessed the token it
            should have from the state that made this one; `MISSED` if at none.
    """

    tokens: list[int]
    ranks: list[list[int]]


@dataclass(slots=True)
class Measured:
    """Passes that were made.

    Attributes:
        tokens: emitted after the prompts' passes.
        passes: that sequences took part in, those over prompts left out.
        answers: what was written.
    """

    tokens: int = 0
    passes: int = 0
    answers: list[Written] = field(default_factory=list)


def make_questions(model: str, count: int, seed: int) -> Iterator[str]:
    """What a model thinks users ask, no question twice."""
    checkpoint = open_checkpoint(resolve_model(model))
    tokenizer = load_tokenizer(checkpoint.folder)
    template = tokenizer.render([{"role": "user", "content": MARK}], len(MARK))
    before, _, _ = template.partition(MARK)
    prompt = tokenizer.encode(before, add_special_tokens=False)
    ends = end_token_ids(tokenizer, checkpoint.folder)
    seen: set[str] = set()
    with Engine(
        checkpoint,
        RuntimeConfig(),
        capacities=[len(prompt) + QUESTION_TOKENS] * TOGETHER,
        prompt_tokens=len(prompt) * TOGETHER,
    ) as engine:
        while len(seen) < count:
            sampling = SamplingConfig(temperature=1.0, top_p=0.95, seed=seed)
            seed += TOGETHER
            run = Run.start(
                engine,
                [prompt] * TOGETHER,
                sampling,
                GenerationConfig(max_tokens=QUESTION_TOKENS),
                ends,
            )
            run.prefill()
            while run.active:
                run.step()
            for sequence in run.sequences:
                text = tokenizer.decode(sequence.emitted, skip_special_tokens=True).strip()
                whole = sequence.emitted[-1] in ends and len(text.split()) >= 3
                if whole and text not in seen and len(seen) < count:
                    seen.add(text)
                    yield text


def functions(folder: Path) -> Iterator[tuple[str, str]]:
    """Names of functions below a folder, and their source from `def` to the docstring's end."""
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
                continue
            end = node.body[0].end_lineno
            if end is None or len(node.body) < 2 or end - node.lineno > LONGEST_CODE_LINES:
                continue
            head = lines[node.lineno - 1 : end]
            indent = len(head[0]) - len(head[0].lstrip())
            text = "\n".join(line[indent:] if not line[:indent].strip() else line for line in head)
            yield f"{path.stem}.{node.name}", text + "\n"


def split(prompts: str, share: float, seed: int) -> tuple[list[bytes], list[bytes]]:
    """Lines of a set of prompts: those to train on, and those to test with."""
    read_prompt_set(prompts)  # refuses what is none
    lines = [line for _, line in read_lines(prompts)]
    order = list(range(len(lines)))
    random.Random(seed).shuffle(order)
    chosen = set(order[: round(share * len(lines))])
    train = [line for n, line in enumerate(lines) if n in chosen]
    return train, [line for n, line in enumerate(lines) if n not in chosen]


def measure(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    answer: int,
    ends: frozenset[int],
    into: Measured,
) -> None:
    """Answer prompts together, with the heads drafting, and add what came of it."""
    heads = engine.medusa
    assert heads is not None  # the engine was made with heads
    states: list[list[torch.Tensor]] = [[] for _ in prompts]
    heads.on_kept = lambda index, kept: states[index].extend(kept)
    run = Run.start(engine, prompts, SamplingConfig(), GenerationConfig(max_tokens=answer), ends)
    run.prefill()
    while run.active:
        into.passes += len(run.active)
        into.tokens += sum(len(emitted.token_ids) for emitted in run.step())
    for sequence, hidden in zip(run.sequences, states, strict=True):
        tokens = sequence.emitted
        ranks = []
        for place, state in enumerate(hidden[: len(tokens)]):
            guesses = heads.ranked(state[None], RANKS)[0].tolist()
            following = zip(guesses, tokens[place + 1 :], strict=False)
            ranks.append([g.index(t) if t in g else MISSED for g, t in following])
        into.answers.append(Written(tokens, ranks))


def replay(answer: Written, choices: frozenset[Choice]) -> int:
    """Passes an answer takes when drafts are that tree, the prompt's left out."""
    last, passes, end = 0, 0, len(answer.tokens) - 1
    while last < end:
        path: Choice = ()
        for rank in answer.ranks[last][: end - last - 1]:  # a pass adds a token of its own
            if (*path, rank) not in choices:
                break
            path = (*path, rank)
        last += len(path) + 1
        passes += 1
    return passes


def accuracy(answers: Sequence[Written], ranks: int) -> list[float]:
    """Per head, share of places where one of its likeliest tokens was the one that came."""
    by_head: dict[int, list[bool]] = {}
    for answer in answers:
        for row in answer.ranks:
            for head, rank in enumerate(row):
                by_head.setdefault(head, []).append(0 <= rank < ranks)
    return [sum(right) / len(right) for _, right in sorted(by_head.items())]


def answer_all(options: argparse.Namespace, prompts: Sequence[list[int]]) -> Measured:
    """Answer prompts with trees of `--measure` nodes."""
    checkpoint = open_checkpoint(resolve_model(options.model))
    ends = end_token_ids(load_tokenizer(checkpoint.folder), checkpoint.folder)
    together, found = min(options.together, len(prompts)), Measured()
    with Engine(
        checkpoint,
        RuntimeConfig(device_limit_bytes=options.device_memory),
        capacities=[max(map(len, prompts)) + options.answer] * together,
        prompt_tokens=sum(sorted(map(len, prompts))[-together:]),
        draft=DraftConfig(draft=f"medusa:{options.heads}", draft_tokens=options.measure),
    ) as engine:
        for start in range(0, len(prompts), together):
            measure(engine, prompts[start : start + together], options.answer, ends, found)
    return found


def trees(options: argparse.Namespace) -> None:
    """Measure trees of one size, replay others, and print a line for each."""
    calibration = read_calibration(resolve_model(options.heads))
    if calibration is None:
        raise ConfigError(f"{options.heads} is not calibrated: `offload-run medusa calibrate` it")
    sizes = sorted({options.measure, *map(int, options.replay.split(","))})
    best = best_trees(calibration.accuracy, max(sizes))
    tokenizer = load_tokenizer(open_checkpoint(resolve_model(options.model)).folder)
    items = spread(read_prompt_set(options.prompts), options.limit)
    found = answer_all(options, [build_prompt(tokenizer, item.text) for item in items])
    rows = []
    for nodes in sizes:
        choices = frozenset(best.choices[:nodes])
        passes = sum(replay(answer, choices) for answer in found.answers)
        row = {
            "nodes": nodes,
            "replayed": found.tokens / passes,
            "predicted": best.tokens_per_pass(nodes),
            "measured": found.tokens / found.passes if nodes == options.measure else None,
        }
        rows.append(row)
    tops = {f"top{ranks}": accuracy(found.answers, ranks) for ranks in (1, 5)}
    if options.json:
        counts = {"tokens": found.tokens, "passes": found.passes}
        print(json.dumps(counts | {"trees": rows, "heads": tops}))
        return
    for head, (once, among) in enumerate(zip(*tops.values(), strict=True), start=1):
        print(f"head {head}  right {once:.1%} at once, {among:.1%} among 5")
    print(f"{len(items)} answers, {found.tokens} tokens; tokens/pass:")
    for row in rows:
        measured = "" if row["measured"] is None else f", {row['measured']:.2f} measured"
        print(
            f"{row['nodes']:>4} nodes  {row['replayed']:.2f} replayed, "
            f"{row['predicted']:.2f} predicted{measured}"
        )


def widen(folder: str, model: str, output: str) -> None:
    """Write heads padded with zeros to the width of a model's hidden state."""
    source = open_heads(Path(folder))
    heads, hidden = read_heads(source), open_checkpoint(resolve_model(model)).config.hidden_size
    shape = replace(heads.shape, hidden_size=hidden)
    tensors = dict(heads.tensors)
    for name, size in shape.tensors().items():
        corner = heads.tensors[name]
        if any(small > large for small, large in zip(corner.shape, size, strict=True)):
            raise ConfigError(f"{model} has a hidden state of {hidden} numbers, the heads a wider")
        tensors[name] = corner.new_zeros(size)
        tensors[name][tuple(slice(count) for count in corner.shape)] = corner
    layout = Layout.SHARED if shape.lm_head is LmHead.MODEL else Layout.TGI
    wide = Heads(shape=shape, tensors=tensors, base=None)
    write_heads(wide, Path(output), Layout.VLLM if shape.truncated else layout)
    if (source.folder / CALIBRATION_FILE).exists():
        shutil.copyfile(source.folder / CALIBRATION_FILE, Path(output) / CALIBRATION_FILE)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    verbs = parser.add_subparsers(dest="verb", required=True)
    chat, code = verbs.add_parser("chat"), verbs.add_parser("code")
    chat.add_argument("model")
    divide = verbs.add_parser("split")
    divide.add_argument("prompts")
    divide.add_argument("--share", type=float, default=0.67)
    divide.add_argument("--train", required=True)
    divide.add_argument("--test", required=True)
    for verb in (chat, code, divide):
        verb.add_argument("--seed", type=int, default=0)
    for verb in (chat, code):
        verb.add_argument("--count", type=int, default=300)
    measured = verbs.add_parser("trees")
    measured.add_argument("model")
    measured.add_argument("heads")
    measured.add_argument("--prompts", required=True)
    measured.add_argument("--measure", type=int, default=64)
    measured.add_argument("--replay", default="16,32,64,128,256")
    measured.add_argument("--limit", type=int)
    measured.add_argument("--answer", type=int, default=128)
    measured.add_argument("--together", type=int, default=8)
    measured.add_argument("--device-memory", type=parse_size)
    measured.add_argument("--json", action="store_true")
    wider = verbs.add_parser("widen")
    wider.add_argument("heads")
    wider.add_argument("model")
    wider.add_argument("--output", required=True)
    return parser.parse_args()


def main() -> None:
    """Do what the command line says."""
    options = parse()
    if options.verb == "trees":
        trees(options)
    elif options.verb == "widen":
        widen(options.heads, options.model, options.output)
    elif options.verb == "chat":
        for n, text in enumerate(make_questions(options.model, options.count, options.seed)):
            print(json.dumps({"task_id": f"chat/{n}", "prompt": text}), flush=True)
    elif options.verb == "code":
        found = list(functions(Path(sysconfig.get_path("stdlib"))))
        random.Random(options.seed).shuffle(found)
        for name, text in found[: options.count]:
            print(json.dumps({"task_id": f"code/{name}", "prompt": text}))
    else:
        for path, lines in zip(
            (options.train, options.test),
            split(options.prompts, options.share, options.seed),
            strict=True,
        ):
            Path(path).write_bytes(b"\n".join(lines) + b"\n")


if __name__ == "__main__":
    try:
        main()
    except OffloadError as error:
        sys.exit(f"bench_medusa: {error}")
