"""What a kind of drafter says of itself, so that nothing else asks which kind it is. No torch here.

How it is asked for is in `config.DRAFTERS`; `kinds.py` finds the record in the folder named there.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload_rt.config import DraftConfig, RuntimeConfig, SamplingConfig
from offload_rt.costs.drafters import Drafting, DraftPart, Expected
from offload_rt.costs.sizes import PassShape
from offload_rt.costs.workload import PlacedModel
from offload_rt.device.kinds import DeviceKind
from offload_rt.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from offload_rt.device.base import Device
    from offload_rt.kv.base import KVCache
    from offload_rt.runner.runner import Runner
    from offload_rt.speculative.base import Drafter
    from offload_rt.speculative.hidden_drafter import HiddenModule, ModulePlace
    from offload_rt.speculative.medusa.drafter import Medusa
    from offload_rt.speculative.triforce.drafter import TargetPass

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # nodes of a draft that are looked at

Points = tuple[tuple[int, float], ...]  # nodes, and tokens accepted per draft that was found


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftedRun:
    """What a drafter's memory depends on besides itself.

    Attributes:
        target: headers of the model it drafts for.
        dtype: that this computes in.
        device: what computes.
        capacities: tokens of each sequence.
        shape: the largest pass.
        below: it drafts for another drafter, for each sequence by itself.
    """

    target: Checkpoint
    dtype: str
    device: DeviceKind
    capacities: Sequence[int]
    shape: PassShape
    below: bool = False

    def drawn_nodes(self, draft: DraftConfig) -> int:
        """Nodes of chains, which are drawn, of all sequences that are drafted for at once."""
        return 0 if draft.as_tree else draft.nodes * (1 if self.below else len(self.capacities))

    def behind(self, nodes: int) -> "DraftedRun":
        """The same for a drafter that goes on behind drafts of so many nodes."""
        capacities = [capacity + nodes for capacity in self.capacities]
        return replace(self, capacities=capacities, below=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftMemory:
    """Device memory of a drafter.

    Attributes:
        kept_bytes: all the time.
        beside_bytes: of these, what lies beside each layer of the target; empty: nothing does.
        building_bytes: on each device, while what lies there is made from the target's cache.
        streamed_bytes: besides, what lies beside each layer of the target that is streamed; empty:
            nothing does.
        copies_all: where none is streamed, that lies beside all.
        copied_bytes: of these, small copies of weights, at most.
        recorded_bytes: of these, what recorded passes keep.
        pass_bytes: in one of its passes, when the target makes none.
        loading_bytes: while it is loaded, before the target's weights are.
        head_bytes: while an output head is copied, before the target's layers are loaded.
        drawn_nodes: nodes whose probabilities are kept until they are verified.
    """

    kept_bytes: int = 0
    beside_bytes: tuple[int, ...] = ()
    streamed_bytes: tuple[int, ...] = ()
    copies_all: bool = False
    building_bytes: int = 0
    copied_bytes: int = 0
    recorded_bytes: int = 0
    pass_bytes: int = 0
    loading_bytes: int = 0
    head_bytes: int = 0
    drawn_nodes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterSeat:
    """A sequence of an engine, for which a drafter is made; everything is loaded.

    Attributes:
        device: where the target computes.
        index: of the sequence.
        capacity: its tokens, and those of drafts that it goes on behind.
        cache: of the target.
        sampling: how the answer's tokens are drawn.
        generator: source of the drafts' randomness.
        kept: by sequence, drafters that go on from answer to answer.
        draft_model: where one drafts.
        medusa: where heads draft.
        module: where a layer does that reads hidden states of the target.
        draft_pass: a pass of the target, or of its rounded copy, over another cache.
        rounded_copy: of the target, or of its streamed layers, where one drafts.
        pass_share: predicted seconds of a draft pass by those of a token; 0 where none are.
        below: it drafts for passes over a retrieval cache.
    """

    device: "Device"
    index: int
    capacity: int
    cache: "KVCache"
    sampling: SamplingConfig
    generator: "torch.Generator"
    kept: "list[Drafter | None]"
    draft_model: "Runner | None"
    medusa: "Medusa | None"
    draft_pass: "TargetPass"
    rounded_copy: "Runner | None" = None
    module: "HiddenModule | None" = None
    pass_share: float = 0.0
    below: bool = False

    def behind(self, nodes: int) -> "DrafterSeat":
        """The same for a drafter below another, whose drafts have so many nodes."""
        return replace(self, capacity=self.capacity + nodes, below=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterKind:
    """A kind of drafter.

    Attributes:
        label: in the table of a plan.
        most_tokens: of a draft that the planner looks at.
        most_free_tokens: the same where more rows take next to no time; None: no more.
        make: the drafter of a sequence, ready for a new answer.
        parts: what it does for the drafts of one step.
        memory: its device memory.
        prior: tokens accepted by nodes, until something was seen on this machine.
        prior_hits: share of the steps in which it finds a draft, likewise.
        first_tokens: it begins with no more until something was seen; None: with what is best.
        below: acceptance rate of what it drafts for passes over a retrieval cache; assumed.
        automatic: whether --draft auto looks at it, by the format the target computes in and the
            prompt's tokens.
        variants: the configurations that the planner compares, the usual one first.
        inner_rates: acceptance rates of the drafter below it, if it has one.
        tree_depth: how deep its trees get, by nodes and depths of which rates are known; None: it
            drafts chains.
        size: what comes before the number of its tokens in a report.
        seen_as: what was seen of it is kept under that name; empty: its own.
        history: and under these words.
        in_memory: what its device memory holds, in words.
        inside: headers of what drafts, of a kind that the target's own files hold.
        load: brings a layer that reads hidden states of the target, of a kind that has one.
        watches: it looks at what the target's passes compute.
        looks_up: it finds drafts in memory of the host, so that those nobody checks cost next to
            nothing.
    """

    label: str
    most_tokens: int
    make: Callable[[DrafterSeat, DraftConfig], "Drafter"]
    parts: Callable[[Drafting, PlacedModel, Expected], tuple[DraftPart, ...]]
    prior: Points
    most_free_tokens: int | None = None
    memory: Callable[[Drafting, DraftedRun], DraftMemory] = lambda drafting, run: DraftMemory()
    prior_hits: float = 1.0
    first_tokens: int | None = None
    below: float | None = None
    automatic: Callable[[DraftConfig, RuntimeConfig, str, int], bool] = (
        lambda draft, runtime, dtype, prompt_tokens: False
    )
    variants: Callable[[DraftConfig, Checkpoint, str, DeviceKind], Sequence[DraftConfig]] = (
        lambda draft, target, dtype, device: (draft,)
    )
    inner_rates: Callable[[DraftConfig], tuple[float, ...]] = lambda draft: ()
    tree_depth: Callable[[DraftConfig, int], int | None] = lambda draft, known: None
    size: Callable[[DraftConfig], str] = lambda draft: "up to"
    seen_as: str = ""
    history: Callable[[DraftConfig], Iterable[str]] = lambda draft: ()
    in_memory: Callable[[DraftConfig], Iterable[str]] = lambda draft: ()
    inside: Callable[[Checkpoint], Checkpoint | None] | None = None
    load: "Callable[[ModulePlace], HiddenModule] | None" = None
    watches: bool = False
    looks_up: bool = False

    def most_on(self, device: DeviceKind) -> int:
        """Tokens of the largest draft that the planner looks at."""
        return (device.rows_are_free and self.most_free_tokens) or self.most_tokens
