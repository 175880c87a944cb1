"""The experts of a layer, computed with transformers' own modules and weights that are lent.

transformers looks the function that computes a layer's experts up by its name in the config. Ours
has one way for every expert, whether its weights stay, were there or had to come, and for one row
as for many: each expert writes its rows to places of their own, [row, place in top-k, E], which are
summed in the order of places at the end. So what comes first changes no bit. What a family does
between the products (`_apply_gate`), and how its weights lie, are the module's own flags.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from offload_rt.errors import CheckpointError
from offload_rt.kernels.assembling import traced
from offload_rt.kernels.stored import Task, multiply_all
from offload_rt.model.attention_function import Apart, PassContext
from offload_rt.model.formats import together
from offload_rt.model.formats.direct import Multiplies, plain_for
from offload_rt.model.formats.stored import (
    AT_ONCE_EXPERTS,
    AT_ONCE_ROWS,
    HOST_ROWS,
    TOGETHER_ROWS,
    Stored,
)
from offload_rt.model.formats.wired import StoredMatrix, WiredExpert
from offload_rt.model.modelling import ALL_EXPERTS_FUNCTIONS
from offload_rt.streaming.experts import Asked

EXPERTS_NAME = "offload_rt"
PROBE_NAME = "offload_rt_probe"
MATRICES = frozenset({"gate_up_proj", "up_proj", "down_proj"})  # [experts, ., .] each
WIRED = "wired"  # modules of experts whose quantised weights are in the image of their layer
_LENDER, _HOST = "_lent_experts", "_host_of_experts"
_NEXT, _LISTENS = "_next_router", "_listens_to_router"
_TOGETHER, _APART, _AT_ONCE = "_multiplies_together", "_made_apart", "_multiplies_at_once"

# A matrix, or what dequantises it [O, I] into a scratch that the next one takes.
Matrix = torch.Tensor | Callable[[], torch.Tensor]
ExpertWeights = Mapping[str, Matrix]


class Host(Protocol):
    """Whoever brings integers to where a module computes, and back."""

    def upload(self, values: Sequence[int], /) -> torch.Tensor:
        """[len(values)] int64 there."""

    def download(self, values: torch.Tensor, /) -> list[int]:
        """The values of an integer tensor; the host waits for them."""

    def address(self, tensor: torch.Tensor, /) -> int:
        """Where a tensor there lies, as kernels see it."""

    def fetch(self, data: torch.Tensor, /) -> torch.Tensor:
        """Bytes [n] in memory of the host, which waits for them."""

    def put(self, rows: torch.Tensor, /) -> torch.Tensor:
        """Rows of the host there; it may change them at once."""


class ExpertLender(Protocol):
    """Whoever has the weights of a layer's experts."""

    @property
    def foresees(self) -> bool:
        """Whether it wants to know what the next layer will ask for."""

    @property
    def stored(self) -> Mapping[str, Stored]:
        """The quantised matrices of an expert, as each has them."""

    @property
    def computes(self) -> bool:
        """Whether the host may compute experts where they lie."""

    def begin(self, parts: int, /) -> None:
        """Rows begin to go through the layer, in so many parts."""

    def on_host(self, needed: Sequence[int], /) -> list[int]:
        """Which of these the host is to compute."""

    def at_home(self, expert: int, /) -> ExpertWeights:
        """The weights of one of those, in host memory."""

    def lend(self, asked: Asked, /) -> Iterator[Sequence[tuple[int, ExpertWeights]]]:
        """Lend the weights of what is asked for, in any order, until the next ones are."""


class _ChosenError(Exception):
    """A router has chosen experts, and they are not to be computed."""

    def __init__(self, index: torch.Tensor) -> None:
        super().__init__()
        self.index = index


class NextRouter:
    """The router of the next layer, asked with rows of this one: they change little in a layer.

    The part of the layer that has router and experts is called, as far as to the experts.
    """

    def __init__(self, block: torch.nn.Module, experts: torch.nn.Module) -> None:
        self._block, self._experts = block, experts

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the experts [T, k] that rows [T, E] would be sent to; raises what the part does.

        Raises:
            CheckpointError: it comes to its end without its experts.
        """
        self._experts.__dict__[_LISTENS] = True
        try:
            self._block(hidden[None])
        except _ChosenError as found:
            return found.index
        finally:
            del self._experts.__dict__[_LISTENS]
        raise CheckpointError("a router was asked, and did not choose experts")


def follow(module: torch.nn.Module, router: NextRouter) -> None:
    """Let a module of experts know the router of the next layer."""
    module.__dict__[_NEXT] = router


def lend_experts(module: torch.nn.Module, lender: ExpertLender) -> None:
    """Let a module of experts have its weights from there, not from its parameters."""
    module.__dict__[_LENDER] = lender


def lend_host(module: torch.nn.Module, host: Host) -> None:
    """Let a module of experts ask there which experts rows are sent to."""
    module.__dict__[_HOST] = host


@contextmanager
def experts_apart(modules: Iterable[torch.nn.Module], apart: Apart | None) -> Iterator[None]:
    """Let modules of experts compute as a step of a pass meanwhile (`runner/pieces.py`)."""
    mine = [] if apart is None else [*modules]
    for module in mine:
        module.__dict__[_APART] = apart
    try:
        yield
    finally:
        for module in mine:
            del module.__dict__[_APART]


def multiply_together(module: torch.nn.Module) -> bool:
    """Let a module of experts multiply few rows with all that are there in one launch, if it can.

    Each of its experts has quantised matrices that `formats/together.py` takes, or none that are
    quantised; the host is lent.
    """
    lender: ExpertLender | None = module.__dict__.get(_LENDER)
    wired = module._modules.get(WIRED)
    stored: Mapping[str, Stored] = {} if lender is None else lender.stored
    if isinstance(wired, torch.nn.ModuleList):
        one = wired[0]
        assert isinstance(one, WiredExpert)
        stored = {name: bringer.stored for name, bringer in one.bringers.items()}
    names = {_first_of(module), "down_proj"}
    able = stored.keys() == names and all(map(together.suits, stored.values()))
    if (able or not stored) and not module.has_post_expert_norm:
        module.__dict__[_TOGETHER] = True
    return _TOGETHER in module.__dict__


def multiply_at_once(module: torch.nn.Module, most_rows: int = sys.maxsize) -> None:
    """Let a module of experts take few calls of a kernel, where one has so many rows at most.

    That is the mean of those a pass needs, by which plans price it, too.

    That is for a CPU, where kernels of ours multiply (`kernels/stored.py`): rows of all experts
    that are there go through each matrix in one call, and all of them through what is between two.
    Their bits are those of one expert after the other, as a row's never depend on others. Where no
    such kernel takes a matrix, experts are computed one by one.
    """
    if not module.has_post_expert_norm and not module.is_transposed:
        module.__dict__[_AT_ONCE] = most_rows


def wire_experts(
    module: torch.nn.Module, experts: Sequence[Mapping[str, Stored]], dtype: torch.dtype
) -> None:
    """Let a module of experts have quantised weights of each, instead of parameters of all."""
    module.add_module(WIRED, torch.nn.ModuleList(WiredExpert(each, dtype) for each in experts))
    for name in {name.partition(".")[0] for each in experts for name in each}:
        module._parameters[name] = None


def compute_experts(
    module: Any,  # noqa: ANN401 - a family's class
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What a layer's experts make of rows; registered with transformers.

    Args:
        module: one decorated with `use_experts_implementation`.
        hidden: [T, E].
        top_k_index: [T, k] int64, the experts of each row.
        top_k_weights: [T, k], maybe of a wider format than `hidden`.

    Returns:
        [T, E].
    """
    if _LISTENS in module.__dict__:
        raise _ChosenError(top_k_index)
    apart: Apart | None = module.__dict__.get(_APART)
    if apart is not None:
        return apart(partial(_in_turn, module), (hidden, top_k_index, top_k_weights))
    return _computed(module, hidden, top_k_index, top_k_weights)


def _in_turn(
    module: torch.nn.Module, _: PassContext, given: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The experts of a layer that rows go through at once."""
    lender: ExpertLender | None = module.__dict__.get(_LENDER)
    if lender is not None:
        lender.begin(1)
    return _computed(module, *given)


def _computed(
    module: Any,  # noqa: ANN401 - a family's class
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What `compute_experts` returns."""
    rows, k = top_k_index.shape
    host: Host | None = module.__dict__.get(_HOST)
    flat = top_k_index.flatten()
    lender: ExpertLender | None = module.__dict__.get(_LENDER)
    router: NextRouter | None = module.__dict__.get(_NEXT)
    foresee: Callable[[], Sequence[int]] | None = None
    there: _OnHost | None = None
    # A norm of what an expert makes has its weight where the module computes.
    few = rows <= HOST_ROWS and not module.has_post_expert_norm
    if host is not None and lender is not None and lender.computes and few:
        sent, there = _OnHost.fetched(module, host, flat, hidden)
    elif router is None or lender is None or not lender.foresees:
        sent = flat.tolist() if host is None else host.download(flat)  # host sync, once a layer
    elif host is None:  # later, while what is needed is on its way
        sent, foresee = flat.tolist(), partial(_foreseen, router, hidden)
    else:
        both = torch.cat([flat, router(hidden).T.flatten()])
        both_there = host.download(both)  # host sync, once a layer
        sent, foreseen = both_there[: len(flat)], both_there[len(flat) :]
        foresee = partial(list, dict.fromkeys(foreseen))
    places = _places(sent, module.num_experts)
    parts = hidden.new_empty(rows * k, hidden.shape[1])
    needed, away = list(places), list[int]()
    meanwhile: Callable[[], None] | None = None
    if there is not None and lender is not None:
        away = lender.on_host(needed)
        mine = {expert: places[expert] for expert in away}
        meanwhile = partial(there.compute, lender, mine, parts)
    asked = Asked(needed, rows, foresee, frozenset(away), meanwhile)
    if host is not None and rows <= TOGETHER_ROWS and _TOGETHER in module.__dict__:
        all_of_them = replace(asked, there=len(needed), coming=len(needed))
        for group in _lent(module, lender, all_of_them):
            _rows_together(module, host, group, places, hidden, parts)
    elif _at_once(module, len(flat) / max(1, len(needed)), hidden):
        for group in _lent(module, lender, replace(asked, there=AT_ONCE_EXPERTS)):
            _compute_at_once(module, group, places, hidden, parts)
    else:
        order = [place for own in places.values() for place in own]
        index = torch.tensor(order) if host is None else host.upload(order)
        counts = [len(own) for own in places.values()]
        rows_of = zip(index.split(counts), (index // k).split(counts), strict=True)
        each = dict(zip(places, rows_of, strict=True))
        for expert, weights in chain.from_iterable(_lent(module, lender, asked)):
            at, sent_there = each[expert]
            parts[at] = expert_rows(module, expert, weights, hidden[sent_there])
    return _summed(parts, top_k_weights, hidden.dtype)


def _at_once(module: Any, rows_each: float, hidden: torch.Tensor) -> bool:  # noqa: ANN401
    few = rows_each <= module.__dict__.get(_AT_ONCE, 0)
    return few and hidden.device.type == "cpu" and not traced()


def _lent(
    module: Any,  # noqa: ANN401
    lender: ExpertLender | None,
    asked: Asked,
) -> Iterator[Sequence[tuple[int, ExpertWeights]]]:
    """The experts that are asked for, from whoever has them."""
    if lender is not None:
        yield from lender.lend(asked)
        return
    own = iter(_own(module, asked.needed))
    while group := list(islice(own, asked.there)):
        yield group


def _cut(
    lent: Sequence[tuple[int, ExpertWeights]], places: Mapping[int, Sequence[int]], most: int
) -> Iterator[Sequence[tuple[int, ExpertWeights]]]:
    """Groups of experts, one after the other, of so many rows at most; one may have more alone."""
    group, count = list[tuple[int, ExpertWeights]](), 0
    for one in lent:
        rows = len(places[one[0]])
        if group and count + rows > most:
            yield group
            group, count = [], 0
        group.append(one)
        count += rows
    yield group


@dataclass(frozen=True, slots=True)
class _OnHost:
    """Rows of a layer in host memory, which may compute some of its experts there.

    Attributes:
        module: of the experts.
        host: whoever brought them.
        hidden: [T, E].
        biases: of the expert in each place, [T * k, O], by the names of its matrices.
    """

    module: Any
    host: Host
    hidden: torch.Tensor
    biases: Mapping[str, torch.Tensor]

    @classmethod
    def fetched(
        cls,
        module: Any,  # noqa: ANN401 - a family's class
        host: Host,
        sent: torch.Tensor,
        hidden: torch.Tensor,
    ) -> "tuple[list[int], _OnHost]":
        """What the router has chosen, with the rows: in one download."""
        own, within = module._parameters, sent.clamp(0, module.num_experts - 1)  # checked later
        names = [n for n in (_first_of(module), "down_proj") if own.get(f"{n}_bias") is not None]
        biases = [own[f"{name}_bias"].index_select(0, within) for name in names]
        given = [sent, hidden, *biases]
        data = [each.contiguous().view(torch.uint8).flatten() for each in given]
        found = host.fetch(torch.cat(data)).split([len(each) for each in data])  # host sync
        made = [
            each.clone().view(like.dtype).view(like.shape)
            for each, like in zip(found, given, strict=True)
        ]
        chosen = made.pop(0).tolist()
        rows = made.pop(0)
        return chosen, cls(module, host, rows, dict(zip(names, made, strict=True)))

    def compute(
        self, lender: ExpertLender, places: Mapping[int, Sequence[int]], parts: torch.Tensor
    ) -> None:
        """Have experts compute their rows, which go to their places in [T * k, E] there."""
        if not places:
            return
        k, made = len(parts) // len(self.hidden), []
        for expert, own in places.items():
            rows = self.hidden[[place // k for place in own]]
            biases = {name: each[own[0]] for name, each in self.biases.items()}
            weights = lender.at_home(expert)
            made.append(expert_rows(self.module, expert, weights, rows, biases))
        order = [place for own in places.values() for place in own]
        parts[self.host.upload(order)] = self.host.put(torch.cat(made))


def _summed(parts: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, E] of what is in the places [T * k, E] of rows."""
    return (parts.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1).to(dtype)


def _first_of(module: Any) -> str:  # noqa: ANN401
    """The matrix that rows are multiplied with first."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _rows_together(
    module: Any,  # noqa: ANN401 - a family's class
    host: Host,
    group: Sequence[tuple[int, ExpertWeights]],
    places: Mapping[int, Sequence[int]],
    hidden: torch.Tensor,
    parts: torch.Tensor,
) -> None:
    """All rows of some experts, [T, E] to their places in [T * k, E], in two launches."""
    names, k = (_first_of(module), "down_proj"), len(parts) // len(hidden)
    tables: tuple[list[int], list[int]] = [], []
    tensors: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    count = 0
    for expert, weights in group:
        lies = []
        for name, there in zip(names, tensors, strict=True):
            own, places_of = _lying(weights, name, host)
            lies.append(places_of)
            there += own
        for place in places[expert]:
            tables[0].extend([place // k, count, expert, *lies[0]])
            tables[1].extend([count, place, expert, *lies[1]])
            count += 1
    one = group[0][1]
    first, second = host.upload(tables[0] + tables[1]).view(2, count, -1)
    made = hidden.new_empty(count, _outputs(module, one, names[0]))
    _multiply_in_one(module, names[0], one, hidden, first, tensors[0], made)
    made = module._apply_gate(made) if module.has_gate else module.act_fn(made)
    _multiply_in_one(module, names[1], one, made, second, tensors[1], parts)


def _compute_at_once(
    module: Any,  # noqa: ANN401
    group: Sequence[tuple[int, ExpertWeights]],
    places: Mapping[int, Sequence[int]],
    hidden: torch.Tensor,
    parts: torch.Tensor,
) -> None:
    """All rows of some experts, [T, E] to their places in [T * k, E], a bounded number at once."""
    k = len(parts) // len(hidden)
    for some in _cut(group, places, max(len(hidden), AT_ONCE_ROWS)):
        at = torch.tensor([place for expert, _ in some for place in places[expert]])
        rows = hidden[at // k].split([len(places[expert]) for expert, _ in some])
        parts[at] = _rows_at_once(module, some, rows)


def _rows_at_once(
    module: Any,  # noqa: ANN401
    group: Sequence[tuple[int, ExpertWeights]],
    rows: Sequence[torch.Tensor],
) -> torch.Tensor:
    """[N, E] of the rows [n, E] of each expert, one expert after the other."""
    made = _products_at_once(module, _first_of(module), group, rows)
    made = module._apply_gate(made) if module.has_gate else module.act_fn(made)
    return _products_at_once(module, "down_proj", group, made.split([*map(len, rows)]))


def _products_at_once(
    module: Any,  # noqa: ANN401
    name: str,
    group: Sequence[tuple[int, ExpertWeights]],
    rows: Sequence[torch.Tensor],
) -> torch.Tensor:
    """[N, O] of each expert's rows [n, I] times its matrix."""
    biases = module._parameters.get(f"{name}_bias") if module.has_bias else None
    each = [None if biases is None else biases[expert] for expert, _ in group]
    counts = [len(own) for own in rows]
    out = rows[0].new_empty(sum(counts), _outputs(module, group[0][1], name))
    tasks = list[Task | None]()
    parts = zip(group, rows, out.split(counts), each, strict=True)
    for (_, weights), own, into, bias in parts:
        halves = _halves_of(module, name, weights)
        for half, part in zip(halves, into.chunk(len(halves), 1), strict=True):
            # The bias of two halves is added to what is rounded.
            tasks.append(_task(half, own, part, bias) if len(halves) == 1 or bias is None else None)
    known = [task for task in tasks if task is not None]
    if len(known) == len(tasks) and len({task.product.kernel for task in known}) == 1:
        multiply_all(known)
        return out
    alone = zip(group, rows, each, strict=True)
    return torch.cat([_product(module, name, one[1], own, bias) for one, own, bias in alone])


def _task(
    matrix: Matrix, rows: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
) -> Task | None:
    """Rows [n, I] times a matrix, as a kernel of ours takes it."""
    if isinstance(matrix, StoredMatrix):
        direct = matrix.bringer.direct
        if not isinstance(direct, Multiplies):
            return None
        return Task(direct.product, rows, out, *direct.operands(matrix.parts, bias))
    if not isinstance(matrix, torch.Tensor) or not matrix.is_contiguous():
        return None
    product = plain_for(matrix.shape[1], len(matrix), matrix.dtype, matrix.device, exact=True)
    return None if product is None else Task(product, rows, out, matrix, bias)


def _lying(
    weights: ExpertWeights, name: str, host: Host
) -> tuple[Sequence[torch.Tensor], list[int]]:
    """The tensors that a matrix of an expert is, and where they lie: two places."""
    if isinstance(matrix := weights.get(name), StoredMatrix):
        return [*matrix.parts.values()], together.places_of(matrix.parts, host.address)
    halves = [weights[f"{name}.0"], weights[f"{name}.1"]] if matrix is None else [matrix]
    tensors = [half for half in halves if isinstance(half, torch.Tensor)]
    where = [host.address(tensor) for tensor in tensors]
    return tensors, [where[0], where[-1]]


def _outputs(module: Any, weights: ExpertWeights, name: str) -> int:  # noqa: ANN401
    """Of a matrix of an expert."""
    found = 0
    for half in _halves_of(module, name, weights):
        if isinstance(half, StoredMatrix):
            found += half.bringer.stored.outputs
        elif isinstance(half, torch.Tensor):
            found += int(half.shape[1 if module.is_transposed else 0])
    return found


def _multiply_in_one(  # noqa: PLR0913 - as the kernels
    module: Any,  # noqa: ANN401
    name: str,
    like: ExpertWeights,
    given: torch.Tensor,
    table: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
) -> None:
    """Rows times a matrix of the experts of a table, which all have it in the form of one."""
    biases = module._parameters.get(f"{name}_bias") if module.has_bias else None
    if isinstance(like.get(name), StoredMatrix):
        together.multiply_together(given, table, tensors, biases, out)
        return
    halves = 1 if name in like else 2
    half = out.shape[1] // halves
    together.multiply_plain(given, table, tensors, biases, out, half, module.is_transposed)


def _foreseen(router: NextRouter, hidden: torch.Tensor) -> list[int]:
    """Experts of the next layer that rows should ask for: the first choice of each comes first."""
    return list(dict.fromkeys(router(hidden).T.flatten().tolist()))


def expert_rows(
    module: Any,  # noqa: ANN401 - a family's class
    expert: int,
    weights: ExpertWeights,
    rows: torch.Tensor,
    own: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """One expert's rows, [n, E] to [n, E]; the only place that multiplies with its weights.

    Its biases are the module's, or its `own`, where it computes in other memory.
    """

    def product(name: str, rows: torch.Tensor) -> torch.Tensor:
        if own is not None:
            return _product(module, name, weights, rows, own.get(name))
        biases = module._parameters.get(f"{name}_bias") if module.has_bias else None
        return _product(module, name, weights, rows, None if biases is None else biases[expert])

    if module.has_gate:
        made = module._apply_gate(product("gate_up_proj", rows))
    else:
        made = module.act_fn(product("up_proj", rows))
    made = product("down_proj", made)
    return module.post_expert_norm(made) if module.has_post_expert_norm else made


def _product(
    module: Any,  # noqa: ANN401
    name: str,
    weights: ExpertWeights,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Rows times a matrix; one of two halves always as two, as files may have them apart."""
    if module.is_transposed and isinstance(whole := weights.get(name), torch.Tensor):
        return linear(rows, whole.t(), bias)
    halves = _halves_of(module, name, weights)
    if len(halves) == 1:
        return _times(halves[0], rows, bias)
    made = torch.cat([_times(half, rows) for half in halves], -1)
    return made if bias is None else made + bias


def _halves_of(module: Any, name: str, weights: ExpertWeights) -> Sequence[Matrix]:  # noqa: ANN401
    """A matrix; one of two halves always as two, as files may have them apart."""
    if f"{name}.0" in weights:
        return weights[f"{name}.0"], weights[f"{name}.1"]
    whole = weights[name]
    if not isinstance(whole, torch.Tensor) or name != "gate_up_proj" or module.is_transposed:
        return (whole,)
    return whole.chunk(2) if module.is_concatenated else (whole,)


def _times(matrix: Matrix, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Rows times a matrix as it is stored, where something multiplies so."""
    if isinstance(matrix, torch.Tensor):
        return linear(rows, matrix, bias)
    made = matrix.multiplied(rows, bias) if isinstance(matrix, StoredMatrix) else None
    return linear(rows, matrix(), bias) if made is None else made


def _places(sent: Sequence[int], count: int) -> dict[int, list[int]]:
    """Where the rows of each expert go, in [T * k]; last come experts of the last rows.

    Raises:
        CheckpointError: a row is sent to an expert that is not there.
    """
    found: dict[int, list[int]] = {}
    for place, expert in enumerate(sent):
        places = found.pop(expert, [])
        places.append(place)
        found[expert] = places
    if found and not 0 <= min(found) <= max(found) < count:
        raise CheckpointError(
            f"a row is sent to expert {max(found)} of {count}: the router does not fit the experts"
        )
    return found


def _own(module: Any, needed: Iterable[int]) -> Iterator[tuple[int, ExpertWeights]]:  # noqa: ANN401
    """The weights of experts that stay, as views of the module's parameters, or quantised."""
    found = {name: module._parameters.get(name) for name in MATRICES}
    own = {name: tensor for name, tensor in found.items() if tensor is not None}
    wired = module._modules.get(WIRED)
    for expert in needed:
        weights: dict[str, Matrix] = {name: tensor[expert] for name, tensor in own.items()}
        yield expert, weights if wired is None else weights | wired[expert].weights()


class Calls:
    """Notes which modules call the experts function in a pass over shapes, and with how many.

    Attributes:
        per_token: experts of a row, by module.
    """

    def __init__(self) -> None:
        self.per_token: dict[torch.nn.Module, int] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return something of the right shape."""
        self.per_token[module] = top_k_index.shape[1]
        return torch.empty_like(hidden)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, compute_experts)
