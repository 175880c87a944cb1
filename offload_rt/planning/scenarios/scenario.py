"""A run on a machine not at hand, as a JSON file: model, placement, drafting, published seconds.

The dataclasses below are the schema: a field is a key, its unit is in its name, a field with a
default may be left out. `offload-run simulate --scenario-help` prints it. What can be checked
without a profile is checked here: counts that exceed the model's, keys that exclude each other.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from offload_rt.costs.workload import LayerParts, ModelParts
from offload_rt.device.kinds import KINDS, Processor
from offload_rt.errors import ConfigError
from offload_rt.kv.sizes import KV_SLOTS
from offload_rt.profiling.profile import LayerShape, LayerWork, Obtained
from offload_rt.profiling.records import (
    MalformedError,
    RecordReader,
    check_version,
    parse_object,
)
from offload_rt.reading import without_mark

SCENARIO_VERSION = 1
_LARGEST_BYTES = 2**20
_COUNT, _BYTES, _SECONDS = 2**24, 2**50, 1e6
_LAYERS, _DEVICES, _HEAD_BYTES = 1000, 64, 2
_HIDDEN_BYTES = 2  # of a number of the hidden state that hops
_EXPERTS = 4096
_SLOTS, _DRAFTED = 4096, 4096  # four times what the engine takes


def _up_to(most: float, least: float = 1) -> dict[str, float]:
    """Bounds of a number that is read; what is no whole number must only be above 0."""
    return {"least": least, "most": most, "zero": least == 0}


class Split(StrEnum):
    """How several devices share a model: whole layers in turn, or a share of the heads of each."""

    LAYERS = "layers"
    HEADS = "heads"


class Order(StrEnum):
    """Which layers stay on the device: evenly between the others, or the first ones."""

    SPREAD = "spread"
    FIRST = "first"


class Home(StrEnum):
    """Where what is streamed comes from: pinned host memory, or the disk."""

    HOST = "host"
    DISK = "disk"


class DraftKind(StrEnum):
    """Who drafts: nobody; a chain or a tree from anything; TriForce's two levels."""

    NONE = "none"
    CHAIN = "chain"
    TREE = "tree"
    TRIFORCE = "triforce"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder of equal layers: four attention projections, a gated MLP of three, experts or none.

    Attributes:
        intermediate: of the MLP that each token goes through; 0: there is none beside experts.
        bytes_per_weight: of the layers, scales of quantised formats included; the head has 2.
        kv_number_bytes: of a number in the KV cache.
        experts: of a layer, each a gated MLP of three.
        experts_per_token: that a token is sent to.
        expert_intermediate: of an expert.
        expert_bytes_per_weight: of experts.
    """

    layers: int = field(metadata=_up_to(_LAYERS))
    hidden: int = field(metadata=_up_to(_COUNT))
    intermediate: int = field(metadata=_up_to(_COUNT, least=0))
    heads: int = field(metadata=_up_to(_COUNT))
    kv_heads: int = field(metadata=_up_to(_COUNT))
    head_dim: int = field(metadata=_up_to(_COUNT))
    vocab: int = field(metadata=_up_to(_COUNT))
    bytes_per_weight: float = field(default=2.0, metadata=_up_to(8))
    kv_number_bytes: float = field(default=2.0, metadata=_up_to(8))
    experts: int = field(default=0, metadata=_up_to(_EXPERTS, least=0))
    experts_per_token: int = field(default=0, metadata=_up_to(_EXPERTS, least=0))
    expert_intermediate: int = field(default=0, metadata=_up_to(_COUNT, least=0))
    expert_bytes_per_weight: float = field(default=2.0, metadata=_up_to(8))

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return round(self._expert_weights * self.expert_bytes_per_weight)

    @property
    def _expert_weights(self) -> int:
        return 3 * self.hidden * self.expert_intermediate

    def layer_work(self, share: int = 1) -> LayerWork:
        """What a layer costs, on each of `share` devices that have it together; all its experts."""
        shape = LayerShape(
            hidden=self.hidden,
            intermediate=self.intermediate,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype="",
            weight_bytes=1,
        )
        flops = shape.work.flops_per_token
        nbytes = round(flops / 2 * self.bytes_per_weight) + self.experts * self.expert_bytes
        flops += 2 * self.experts_per_token * self._expert_weights
        return LayerWork(weight_bytes=nbytes // share, flops_per_token=flops // share)

    @property
    def head_work(self) -> LayerWork:
        """What the head costs."""
        weights = self.vocab * self.hidden
        return LayerWork(weight_bytes=_HEAD_BYTES * weights, flops_per_token=2 * weights)

    def parts(self, share: int = 1) -> ModelParts:
        """What passes over it are made of, on each of `share` devices that have it together."""
        work = self.layer_work(share)
        layer = LayerParts(
            image_bytes=work.weight_bytes,
            file_bytes=work.weight_bytes,
            flops_per_token=work.flops_per_token,
            kv_row_bytes=self.kv_row_bytes // share,
            expert_bytes=self.experts * self.expert_bytes // share,
            sent=self.experts_per_token / self.experts if self.experts else 1.0,
        )
        return ModelParts(
            layers=(layer,) * self.layers,
            head=self.head_work,
            hidden_bytes=_HIDDEN_BYTES * self.hidden,
        )

    @property
    def kv_row_bytes(self) -> int:
        """Keys and values of a token in one layer."""
        return round(2 * self.kv_heads * self.head_dim * self.kv_number_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementShape:
    """What lives where.

    Attributes:
        processor: who computes.
        devices: GPUs that share the model.
        split: how they share it.
        resident_layers: whose weights stay on the devices, together; left out: as many as fit.
        device_memory_bytes: of each device, for resident_layers; left out: all the GPU has.
        reserved_bytes: of it that other things take: a drafter, activations.
        order: which layers are resident, weights and KV.
        slots: device buffers for streamed layers, on each device.
        home: of streamed weights and KV.
        reads: in flight, if the home is the disk.
        kv_home_layers: whose KV is streamed.
        kv_slots: device buffers for blocks of KV.
        kv_block_tokens: of such a block; left out: what the engine takes.
        expert_slots: device buffers for experts, of all layers together; then layers stay without
            theirs. Left out: experts are in their layers.
        expert_hit_rate: of a token's experts that are in slots; left out: what is expected of so
            many slots before any run of a model.
        expert_host_share: of experts that are not, those in host memory, where the home is the
            disk.
        expert_host_s: of the host for each layer, to learn which experts a token is sent to and to
            start their kernels; left out: what this program takes.
        recorded: passes are replayed (CUDA graphs), not launched.
    """

    processor: Processor = Processor.CUDA
    devices: int = field(default=1, metadata=_up_to(_DEVICES))
    split: Split = Split.LAYERS
    resident_layers: int | None = field(default=None, metadata=_up_to(_LAYERS, least=0))
    device_memory_bytes: int | None = field(default=None, metadata=_up_to(_BYTES))
    reserved_bytes: int = field(default=0, metadata=_up_to(_BYTES, least=0))
    order: Order = Order.SPREAD
    slots: int = field(default=2, metadata=_up_to(_SLOTS))
    home: Home = Home.HOST
    reads: int = field(default=4, metadata=_up_to(_COUNT))
    kv_home_layers: int = field(default=0, metadata=_up_to(_LAYERS, least=0))
    kv_slots: int = field(default=KV_SLOTS, metadata=_up_to(_SLOTS))
    kv_block_tokens: int | None = field(default=None, metadata=_up_to(_COUNT))
    expert_slots: int | None = field(default=None, metadata=_up_to(_LAYERS * _EXPERTS))
    expert_hit_rate: float | None = field(default=None, metadata=_up_to(1, least=0))
    expert_host_share: float = field(default=0.0, metadata=_up_to(1, least=0))
    expert_host_s: float | None = field(default=None, metadata=_up_to(_SECONDS, least=0))
    recorded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterShape:
    """Who drafts, how much, how fast, and how often it is right.

    A step is what is done once for each token of a chain, each level of a tree, or, with triforce,
    each pass over the retrieval cache. It takes `step_s`, or what the profile says of `model`; a
    step of triforce without either is a pass of the target over `retrieval_tokens`.

    Attributes:
        kind: see `DraftKind`.
        gamma: tokens drafted per pass: of a chain, or nodes of a tree.
        depth: levels of a tree; left out: those of the best tree of gamma nodes.
        step_s: seconds of a step.
        model: that drafts, on the first device.
        width: tokens that go through the draft model in a step.
        context_tokens: it attends to; left out: those of the run.
        acceptance: share of tokens accepted at each depth if those before are; the last goes on.
        accepted_share: accepted of drafted tokens, instead: one rate is computed from it.
        ranks: for a tree, by depth the rate of each rank; the last row goes on down to `depth`.
        tokens_per_pass: emitted per pass, instead of all these.
        retrieval_tokens: in the retrieval cache.
        inner_gamma: tokens drafted for each pass over the retrieval cache.
        inner_acceptance: as `acceptance`, before that pass.
        inner_step_s: seconds of each of those tokens.
    """

    kind: DraftKind = DraftKind.NONE
    gamma: int = field(default=0, metadata=_up_to(_DRAFTED, least=0))
    depth: int | None = field(default=None, metadata=_up_to(_DRAFTED))
    step_s: float | None = field(default=None, metadata=_up_to(_SECONDS, least=0))
    model: ModelShape | None = None
    width: int = field(default=1, metadata=_up_to(_COUNT))
    context_tokens: int | None = field(default=None, metadata=_up_to(_COUNT, least=0))
    acceptance: tuple[float, ...] = field(default=(), metadata=_up_to(1, least=0))
    accepted_share: float | None = field(default=None, metadata=_up_to(1, least=0))
    ranks: tuple[tuple[float, ...], ...] = field(default=(), metadata=_up_to(1, least=0))
    tokens_per_pass: float | None = field(default=None, metadata=_up_to(_COUNT))
    retrieval_tokens: int = field(default=0, metadata=_up_to(_COUNT, least=0))
    inner_gamma: int = field(default=0, metadata=_up_to(_DRAFTED, least=0))
    inner_acceptance: tuple[float, ...] = field(default=(), metadata=_up_to(1, least=0))
    inner_step_s: float = field(default=0.0, metadata=_up_to(_SECONDS, least=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was measured, to compare with.

    Attributes:
        s_per_token: seconds per emitted token.
        s_per_pass: seconds of a pass over the target, drafting included.
        source: who published it, where.
    """

    s_per_token: float | None = field(default=None, metadata=_up_to(_SECONDS))
    s_per_pass: float | None = field(default=None, metadata=_up_to(_SECONDS))
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """How one or more of the numbers above are known.

    Attributes:
        keys: places in the file, as `placement.slots`; a section means all it holds.
        obtained: `published` or `assumed`.
        source: where from, or why it is reasonable.
    """

    keys: tuple[str, ...]
    obtained: Obtained
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run.

    Attributes:
        profile: the machine's, by name or path.
        set: changes to the profile, as `--profile-set` takes them.
        context_tokens: already in the KV cache.
        found: what was measured.
        inputs: how the numbers are known.
    """

    schema_version: int = field(metadata=_up_to(_COUNT))
    name: str
    profile: str
    set: tuple[str, ...] = ()
    model: ModelShape
    context_tokens: int = field(default=0, metadata=_up_to(_COUNT, least=0))
    placement: PlacementShape = PlacementShape()
    draft: DrafterShape = DrafterShape()
    found: Found | None = None
    inputs: tuple[Input, ...] = ()


def load_scenario(path: Path) -> Scenario:
    """Read a scenario file.

    Raises:
        ConfigError: it cannot be read, or is no scenario; the message names the key.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"scenario {path} cannot be read ({reason}): give a JSON file") from error
    try:
        if len(data) > _LARGEST_BYTES:
            raise MalformedError(f"it has more than {_LARGEST_BYTES} bytes")
        return read_scenario(without_mark(data).decode())
    except (MalformedError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is no usable scenario: {error}; `offload-run simulate --scenario-help` "
            "explains the keys"
        ) from error


def read_scenario(text: str) -> Scenario:
    """Read a scenario from JSON text.

    Raises:
        MalformedError: it is none, or says what cannot be.
    """
    tree = parse_object(text)
    check_version(tree, SCENARIO_VERSION)
    scenario: Scenario = RecordReader("a scenario").read(Scenario, tree)
    _check_model(scenario.model, "model")
    _check_placement(scenario)
    _check_draft(scenario.draft)
    for index, entry in enumerate(scenario.inputs):
        for key in entry.keys:
            if not _exists(scenario, key):
                raise MalformedError(f"inputs[{index}].keys names {key!r}, which is not there")
    return scenario


def given_keys(record: object, prefix: str = "") -> list[str]:
    """Places of all numbers and choices of a record that are not their defaults."""
    keys = []
    assert dataclasses.is_dataclass(record)
    for entry in dataclasses.fields(record):
        value = getattr(record, entry.name)
        if dataclasses.is_dataclass(value):
            keys += given_keys(value, f"{prefix}{entry.name}.")
        elif value != entry.default:
            keys.append(prefix + entry.name)
    return keys


def _exists(scenario: Scenario, key: str) -> bool:
    here: object = scenario
    for name in key.split("."):
        if not dataclasses.is_dataclass(here) or name not in _names(here):
            return False
        here = getattr(here, name)
    return True


def _names(record: Any) -> set[str]:  # noqa: ANN401
    return {entry.name for entry in dataclasses.fields(record)}


def _check_model(model: ModelShape, key: str) -> None:
    if model.heads % model.kv_heads:
        raise MalformedError(
            f"{key}.kv_heads is {model.kv_heads}, which does not divide {key}.heads {model.heads}"
        )
    if model.experts_per_token > model.experts:
        raise MalformedError(
            f"{key}.experts_per_token is {model.experts_per_token}, {key}.experts {model.experts}"
        )
    if bool(model.experts) != bool(model.experts_per_token and model.expert_intermediate):
        raise MalformedError(
            f"{key}.experts, {key}.experts_per_token and {key}.expert_intermediate go together"
        )
    if not model.experts and not model.intermediate:
        raise MalformedError(f"{key}.intermediate is 0, and {key}.experts is, too")


def _check_placement(scenario: Scenario) -> None:
    model, place = scenario.model, scenario.placement
    for name in ("resident_layers", "kv_home_layers"):
        count = getattr(place, name) or 0
        if count > model.layers:
            raise MalformedError(
                f"placement.{name} is {count}, but the model has {model.layers} layers"
            )
    _check_expert_slots(model, place)
    kind = KINDS[place.processor]
    if place.devices > 1 and not kind.numbered:
        raise MalformedError(
            f"placement.devices is {place.devices}, but the processor is {kind.called}"
        )
    if not kind.own_memory and place.home is Home.HOST:
        raise MalformedError(
            f"placement.home is host, but the processor is {kind.called}, whose memory that is: "
            "set disk"
        )
    if place.split is Split.HEADS and model.kv_heads % place.devices:
        raise MalformedError(
            f"placement.devices is {place.devices}, which does not divide model.kv_heads "
            f"{model.kv_heads}"
        )


def _check_expert_slots(model: ModelShape, place: PlacementShape) -> None:
    most, slots = model.layers * model.experts, place.expert_slots
    if slots is None:
        given = [name for name in given_keys(place) if name.startswith("expert_")]
        if given:
            raise MalformedError(f"placement.{given[0]} is given, but no placement.expert_slots")
        return
    if not model.experts_per_token <= slots <= most:
        raise MalformedError(
            f"placement.expert_slots is {slots}, must be from {model.experts_per_token} (those of "
            f"a token) to {most} (all there are)"
        )
    if place.resident_layers is not None or place.devices > 1:
        raise MalformedError("placement.expert_slots is of one device that has all layers")
    if place.expert_host_share and place.home is not Home.DISK:
        raise MalformedError("placement.expert_host_share is given, but placement.home is host")


def _check_draft(draft: DrafterShape) -> None:
    kind = draft.kind
    if kind is DraftKind.NONE:
        given = given_keys(draft)
        if given:
            raise MalformedError(f"draft.{given[0]} is given, but draft.kind is none")
        return
    if draft.gamma < 1:
        raise MalformedError(f"draft.gamma is {draft.gamma}, must be at least 1 to draft")
    _check_rates(draft)
    own = {DraftKind.TREE: {"depth", "ranks"}}
    own[DraftKind.TRIFORCE] = {name for name in _names(draft) if name.startswith("inner_")}
    own[DraftKind.TRIFORCE].add("retrieval_tokens")
    for other, names in own.items():
        wrong = sorted(names & set(given_keys(draft)))
        if wrong and other is not kind:
            raise MalformedError(f"draft.{wrong[0]} is of kind {other}, but draft.kind is {kind}")
    if draft.step_s is not None and draft.model is not None:
        raise MalformedError("draft.step_s and draft.model both say how long a step is: keep one")
    if draft.model is not None:
        _check_model(draft.model, "draft.model")
    if kind is DraftKind.TRIFORCE:
        _check_triforce(draft)
    elif draft.step_s is None and draft.model is None:
        raise MalformedError("draft.step_s is missing: give it, or draft.model")


def _check_rates(draft: DrafterShape) -> None:
    names = ("acceptance", "accepted_share", "ranks", "tokens_per_pass")
    given = [name for name in names if getattr(draft, name) not in ((), None)]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise MalformedError(f"draft needs one of {', '.join(names)}, it has {found}")
    if draft.kind is DraftKind.TREE and given[0] in ("acceptance", "accepted_share"):
        raise MalformedError(f"draft.{given[0]} is of chains: a tree takes ranks")
    if draft.kind is DraftKind.TREE and given[0] == "tokens_per_pass" and draft.depth is None:
        raise MalformedError("draft.depth is missing: a tree without ranks does not tell it")


def _check_triforce(draft: DrafterShape) -> None:
    if draft.inner_gamma and not draft.inner_acceptance:
        raise MalformedError("draft.inner_acceptance is missing: inner_gamma is given")
    if draft.model is not None:
        raise MalformedError("draft.model is given, but with triforce the target drafts for itself")
    if draft.step_s is None and not draft.retrieval_tokens:
        raise MalformedError("draft.step_s is missing: give it, or draft.retrieval_tokens")
