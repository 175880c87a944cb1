"""Host time and launches of a step beside its passes, over CPU tensors, by nodes of the draft.

    python tools/bench_steps.py

One JSON line a size: milliseconds of making what tree rows see, of growing a draft model's tree
beside its passes, of an n-gram draft and of learning from its verification; kernels and uploads of
a verification as a GPU would launch them (bf16, every filter). Medians, one thread.
"""

from offload_rt.device.system import settle_math

settle_math()

import json  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from offload_rt.config import AcceptRule, DraftConfig, DraftShape, SamplingConfig  # noqa: E402
from offload_rt.device.base import upload_together  # noqa: E402
from offload_rt.device.kinds import CUDA  # noqa: E402
from offload_rt.runner.runner import Rows  # noqa: E402
from offload_rt.runner.tree import TokenTree, looks_back, pending_tree  # noqa: E402
from offload_rt.sampling import Dice, make_generator  # noqa: E402
from offload_rt.speculative.base import Draft  # noqa: E402
from offload_rt.speculative.draft_model import drafter as draft_model  # noqa: E402
from offload_rt.speculative.ngram.drafter import NgramDrafter  # noqa: E402
from offload_rt.speculative.ngram.followers import Likely, pack_likely  # noqa: E402
from offload_rt.speculative.verifier import draw  # noqa: E402

SIZES = 64, 256, 512, 1024  # nodes of a draft
VOCAB, QUOTED_VOCAB, ROUNDS = 512, 120, 25
FILTERS = SamplingConfig(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=0)


class Cache:
    """A cache that only counts."""

    def __init__(self, *_: object) -> None:
        """Begin behind a prompt."""
        self.length = 100

    def truncate(self, length: int) -> None:
        """Go back."""
        self.length = length

    def commit(self, keep: Sequence[int]) -> None:
        """Go on."""
        self.length += len(keep)


class Launches(TorchDispatchMode):
    """Counts operators that are no views."""

    count = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Count one, and call it."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def upload(values: Sequence[int]) -> torch.Tensor:
    """Return [len(values)] int64, as a device does."""
    return torch.tensor(list(values), dtype=torch.int64)


def median_ms(work: Callable[[], object]) -> float:
    """Median time of some calls, after one."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(times[1:]), 2)


def grown(nodes: int) -> tuple[float, TokenTree]:
    """Time of growing a tree, without passes and what is done with their logits; and the tree."""
    generator = torch.Generator().manual_seed(1)
    table = [3 * torch.randn(64, VOCAB, generator=generator) for _ in range(8)]
    passes, spent, trees = [0], [0.0], []

    def logits(part: Rows, *, recorded: bool = True) -> torch.Tensor:
        passes[0] += 1
        return table[passes[0] % 8][: len(part.wanted)]

    network = SimpleNamespace(kv_shapes=(), dtype=torch.float32)
    model: Any = SimpleNamespace(
        device=None, network=network, target_ids=VOCAB, known_ids=VOCAB, draft_logits=logits
    )
    config = DraftConfig(draft="model:x", draft_tokens=nodes, shape=DraftShape.TREE)
    with mock.patch.object(draft_model, "ResidentKV", Cache):
        drafter = draft_model.DraftModelDrafter(model, config, 4000)
    drafter.begin(SamplingConfig(), torch.Generator())
    children = drafter._grower._children

    def timed(logits: torch.Tensor) -> list[tuple[list[int], list[float]]]:
        began = time.perf_counter()
        found = children(logits)
        spent[0] += time.perf_counter() - began
        return found

    ids = [random.Random(place).randrange(VOCAB) for place in range(300)]
    times = []
    with mock.patch.object(drafter._grower, "_children", timed):
        for _ in range(9):
            passes[0], spent[0], began = 0, 0.0, time.perf_counter()
            trees.append(drafter.propose(ids, 64).tree)
            times.append(time.perf_counter() - began - spent[0])
    return round(1e3 * statistics.median(times), 2), trees[-1]


def ngrams(nodes: int) -> dict[str, float]:
    """Times of drafts from a text of 1,000 tokens, and of learning; how many nodes they had."""
    numbers = random.Random(3)
    text = [numbers.randrange(QUOTED_VOCAB) for _ in range(1500)]
    drafter = NgramDrafter(nodes, 16384, explores=True)
    drafted, learned, size = [], [], 0
    for step in range(60):
        ids = text[: 1000 + 2 * step]
        began = time.perf_counter()
        tree = drafter.propose(ids, 64).tree
        drafted.append(time.perf_counter() - began)
        size, generator = len(tree), torch.Generator().manual_seed(step)
        flat = pack_likely(2 * torch.randn(size + 1, QUOTED_VOCAB, generator=generator)).tolist()
        began = time.perf_counter()
        drafter.learn(ids, tree, Likely.read(flat, [0] * (size + 1)))
        learned.append(time.perf_counter() - began)
    propose, learn = (round(1e3 * statistics.median(t[15:]), 2) for t in (drafted, learned))
    return {"ngram_nodes": size, "ngram_propose_ms": propose, "ngram_learn_ms": learn}


def launches(tree: TokenTree, sampling: SamplingConfig, rule: AcceptRule, *, drawn: bool) -> int:
    """Kernels and uploads of a verification; of a chain that was drawn where asked."""
    nodes, uploads = len(tree), mock.Mock(side_effect=upload)
    device: Any = SimpleNamespace(kind=CUDA, upload=uploads, torch_device=torch.device("cpu"))
    probs = torch.full((nodes, 250), 1 / 250) if drawn else None
    tokens = tuple(token % 250 for token in tree.tokens)
    shape = TokenTree.chain(tokens) if drawn else TokenTree(tokens, tree.parents)
    draft, logits = Draft(shape, probs), torch.randn(nodes + 1, 250).bfloat16()
    with Launches() as counted:
        draw(draft, logits, sampling, rule, Dice(make_generator(0, "cpu")), device)
    return counted.count + uploads.call_count


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    host: Any = SimpleNamespace(upload=upload)
    cache: Any = SimpleNamespace(length=300)
    for nodes in SIZES:
        growth_ms, tree = grown(nodes)

        def see(tree: TokenTree = tree) -> None:
            rows = Rows.draft(cache, 5, tree)
            assert rows.parents is not None
            back, places = upload_together(host, [looks_back(rows.parents), rows.places])
            pending_tree(rows.parents, back, places, len(rows.tokens))

        lossless, greedy = AcceptRule.LOSSLESS, SamplingConfig()
        found = {
            "nodes": nodes,
            "see_ms": median_ms(see),
            "grow_ms": growth_ms,
            **ngrams(nodes),
            "greedy_launches": launches(tree, greedy, lossless, drawn=False),
            "sampling_launches": launches(tree, FILTERS, lossless, drawn=False),
            "drawn_launches": launches(tree, FILTERS, lossless, drawn=True),
            "typical_launches": launches(tree, FILTERS, AcceptRule.TYPICAL, drawn=False),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
