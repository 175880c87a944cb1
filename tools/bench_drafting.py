"""What the drafts of a small model would have been worth, replayed over answers that are known.

Usage:
  bench_drafting.py MODEL SMALL --prompts PROMPTS --answers BENCH.json [--nodes 4,64,256]
      [--weights auto] [--windows full] [--limit N] [--json]

A greedy answer is the same whoever drafts, so which tokens of a draft would have been accepted is
known from the answer alone: no pass over MODEL is made. `offload-run bench MODEL --prompts PROMPTS
--output FOLDER` writes such answers (FOLDER/bench.json), drafting or not. Each size (chains up to
8 nodes, trees from 9 on), format of SMALL's weights and window (tokens of the sequence it sees:
`full`, or the first 16 and the newest) replays all answers. Printed is what they would have taken:
tokens per pass over MODEL (the prompt's pass and the token it emits left out), the lowest and the
highest of an answer, and passes and seconds of SMALL per draft.

MODEL gives the chat template. Its passes would round other sums when they check drafts, so a run
may part from a replay where two tokens are nearly as likely.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch

from offload_rt.cli.prompt_set import read_prompt_set, spread
from offload_rt.config import AcceptRule, DraftConfig, DraftWeights, RuntimeConfig, SamplingConfig
from offload_rt.device.opening import open_device
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.model.checkpoint import Checkpoint, open_checkpoint, resolve_model
from offload_rt.runner.loading import load_drafting
from offload_rt.runner.runner import Rows, Runner
from offload_rt.runner.tree import TokenTree
from offload_rt.speculative.base import Draft, Drafter
from offload_rt.speculative.draft_model.drafter import DraftModelDrafter
from offload_rt.speculative.draft_model.kind import draft_weights_of
from offload_rt.speculative.draft_model.pair import check_sizes
from offload_rt.speculative.verifier import walk
from offload_rt.text import Message, build_prompt, load_tokenizer


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt and its answer.

    Attributes:
        most: tokens the answer might have had.
    """

    prompt: list[int]
    answer: list[int]
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one kind of draft would have done.

    Attributes:
        tokens_per_pass: over all answers, first tokens left out.
        lowest: of the answers.
        highest: of the answers.
        draft_passes: that the draft model made, per draft.
        draft_s: per draft.
    """

    nodes: int
    weights: str
    window: int | None
    answers: int
    tokens_per_pass: float
    lowest: float
    highest: float
    draft_passes: float
    draft_s: float


def known_answers(options: argparse.Namespace) -> Iterator[Known]:
    """Prompts with the first answer that was measured."""
    try:
        with open(options.answers, encoding="utf-8") as file:
            record = json.load(file)
        found = {row["id"]: row["runs"][0] for row in record["rows"]}
        most, sampled = record["generation"]["max_tokens"], record["sampling"]["temperature"] > 0
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{options.answers} is not what `offload-run bench` writes") from error
    if sampled:
        raise ConfigError(f"{options.answers} was sampled: only greedy answers can be replayed")
    tokenizer = load_tokenizer(resolve_model(options.model))
    items = [item for item in read_prompt_set(options.prompts) if item.name in found]
    for item in spread(items, options.limit):
        run = found[item.name]
        ids = build_prompt(tokenizer, [Message(role="user", content=item.text)])
        yield Known(ids, run["token_ids"], most)


def accepted(tree: TokenTree, truth: Sequence[int]) -> tuple[int, ...]:
    """The nodes of a draft that a greedy answer goes along with."""
    after = [truth[depth] if depth < len(truth) else -1 for depth in (0, *tree.depths)]
    return walk(Draft(tree), after, SamplingConfig(), AcceptRule.LOSSLESS).path


def replay(drafter: Drafter, known: Known, nodes: int) -> tuple[int, float]:
    """Passes after the prompt's that an answer would take, and seconds spent drafting."""
    done, passes, drafting = 1, 0, 0.0
    while done < len(known.answer):
        ids, truth = known.prompt + known.answer[:done], known.answer[done:]
        room = known.most - done - 1  # a pass adds a token of its own
        start = time.perf_counter()
        tree = drafter.propose(ids, room, nodes).tree if room else TokenTree()
        drafting += time.perf_counter() - start
        done, passes = done + len(accepted(tree, truth)) + 1, passes + 1
    return passes, drafting


def measure(model: Runner, config: DraftConfig, answers: Sequence[Known]) -> Row:
    """Replay all answers with drafts of one kind."""
    made, real = 0, model.logits

    def counted(parts: Sequence[Rows]) -> torch.Tensor:
        nonlocal made
        made += 1
        return real(parts)

    model.logits = counted  # type: ignore[method-assign]
    passes, tokens, drafting = [], [], 0.0
    try:
        for known in answers:
            capacity = len(known.prompt) + len(known.answer) + config.nodes
            drafter = DraftModelDrafter(model, config, capacity)
            drafter.begin(SamplingConfig(), torch.Generator())
            steps, seconds = replay(drafter, known, config.nodes)
            passes.append(steps)
            tokens.append(len(known.answer) - 1)
            drafting += seconds
    finally:
        model.logits = real  # type: ignore[method-assign]
    each = [count / steps for count, steps in zip(tokens, passes, strict=True)]
    return Row(
        nodes=config.nodes,
        weights=str(config.draft_weights),
        window=config.window_tokens,
        answers=len(answers),
        tokens_per_pass=sum(tokens) / sum(passes),
        lowest=min(each),
        highest=max(each),
        draft_passes=made / sum(passes),
        draft_s=drafting / sum(passes),
    )


def run(options: argparse.Namespace, target: Checkpoint, small: Checkpoint) -> Iterator[Row]:
    """Replay with every kind of draft asked for."""
    answers = [known for known in known_answers(options) if len(known.answer) > 1]
    if not answers:
        raise ConfigError(f"{options.answers} has no answer to a prompt of {options.prompts}")
    windows = [0 if window == "full" else int(window) for window in options.windows.split(",")]
    for name in options.weights.split(","):
        device = open_device(RuntimeConfig(device=options.device))
        base = DraftConfig(draft=f"model:{options.small}", draft_weights=DraftWeights(name))
        weights = draft_weights_of(small, base, device.kind)
        model = load_drafting(
            small,
            device,
            chunk_tokens=RuntimeConfig().prefill_chunk_tokens,
            target_ids=(target.head or target.embedding).shape[0],
            weights=weights,
        )
        for nodes, window in product(map(int, options.nodes.split(",")), windows):
            config = DraftConfig(
                draft=base.draft, draft_tokens=nodes, draft_window=window, draft_weights=weights
            )
            yield measure(model, config, answers)
        del model
        device.close()


def main() -> None:
    """Read the arguments, replay, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("small")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--answers", required=True)
    parser.add_argument("--nodes", default="4,64,256")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--windows", default="full")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        target, small = (open_checkpoint(resolve_model(m)) for m in (options.model, options.small))
        check_sizes(target, small)
        if options.json:
            print(json.dumps([asdict(row) for row in run(options, target, small)], indent=1))
            return
        print("| nodes | weights | window | tokens/pass | of an answer | passes/draft | s/draft |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for row in run(options, target, small):
            print(
                f"| {row.nodes} | {row.weights} | {row.window or 'full'} "
                f"| {row.tokens_per_pass:.2f} | {row.lowest:.2f}-{row.highest:.2f} "
                f"| {row.draft_passes:.1f} | {row.draft_s:.3f} |",
                flush=True,
            )
    except (OffloadError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
