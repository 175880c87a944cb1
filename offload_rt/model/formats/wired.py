"""Linear layers whose weights lie as they are stored, and are dequantised when they compute.

The weight is brought into a scratch that all on a device share, then the product is the one that
an unquantised weight would have. So where it was dequantised makes no difference: streamed,
resident and unquantised weights of equal numbers compute the same bits.

On a GPU the scratch is used in the order of its compute stream, so that nothing else need wait.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from offload_rt.errors import CheckpointError
from offload_rt.kernels.assembling import traced
from offload_rt.kernels.tiles import FEW_OUTPUTS, in_tiles
from offload_rt.model.files import shown
from offload_rt.model.formats import coded, fours, ggml, grids, integers
from offload_rt.model.formats.brought import bring_for
from offload_rt.model.formats.checked import INDICES
from offload_rt.model.formats.direct import Direct, Plain, direct_for, plain_for
from offload_rt.model.formats.lookup import looked_up, stripped
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import Stored
from offload_rt.model.layout import torch_name

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

BRING: Mapping[Form, integers.Bring] = {
    **integers.BRING,
    **grids.DECODERS,
    **fours.DECODERS,
    **coded.DECODERS,
    **ggml.DECODERS,
}


def dequantise(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """Bring a weight from its parts, as they are stored, into `out` [O, I]."""
    BRING[stored.form](stored, parts, out)


class Bringer:
    """Dequantises a weight of an expert into the scratch that all on a device share.

    Args:
        stored: the weight.
        dtype: it computes in.

    Attributes:
        scratch: bytes for the one weight that computes, lent before a pass runs.
        in_order: inputs of a group follow each other, so that an index of groups says nothing.
        direct: multiplies rows with the parts as they are stored; None: they are dequantised.
    """

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        self.stored, self.dtype = stored, dtype
        self.scratch, self.in_order = torch.empty(0, dtype=torch.uint8), False
        self.direct: Direct | None = None
        self._bring = BRING[stored.form]

    def lend(self, scratch: torch.Tensor, *, in_order: bool) -> None:
        """Give it room, where it computes; what it dequantises with is ready by then."""
        self.scratch, self.in_order = scratch, in_order
        made = bring_for(self.stored, self.dtype, scratch.device)
        self._bring = made or BRING[self.stored.form]

    def bring(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight [O, I] of its parts, in the scratch until another is brought."""
        stored = self.stored
        data = self.scratch[: stored.numbers * self.dtype.itemsize]
        out = data.view(self.dtype).view(stored.outputs, stored.inputs)
        unused = INDICES if self.in_order else ()
        used = {w: t for w, t in parts.items() if w not in unused}
        self._bring(stored, used, out)
        return out


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A weight of an expert as it is stored, where it computes; called, it is dequantised."""

    bringer: Bringer
    parts: dict[str, torch.Tensor]

    def __call__(self) -> torch.Tensor:
        """The weight [O, I], in the scratch until another is brought."""
        return self.bringer.bring(self.parts)

    def multiplied(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """[n, O] of rows [n, I] times it, where that needs no dequantised weight."""
        direct = self.bringer.direct
        return None if direct is None or traced() else direct(rows, self.parts, bias)


class WiredLinear(torch.nn.Module):
    """Computes what a linear with the dequantised weight does.

    Its buffers have the names and number formats of the files.

    Attributes:
        scratch: bytes for the one weight that computes, lent before a pass runs; no buffer of it.
        in_order: inputs of a group follow each other, so that an index of groups says nothing.
        exact: a row has the bits of one in a tile of rows, however many there are.
    """

    def __init__(self, stored: Stored, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.stored, self.dtype = stored, linear.weight.dtype
        self.scratch, self.in_order = torch.empty(0, dtype=torch.uint8), False
        self.exact = False
        self._direct: Direct | None = None
        self._plain: Plain | None = None
        self._bring = BRING[stored.form]
        self.product: Product = torch.nn.functional.linear
        self.bias = linear.bias
        for word in stored.parts:
            self.register_buffer(word, _on_meta(stored, word))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., I] gives [..., O]."""
        if rows.is_meta:
            return rows.new_empty(*rows.shape[:-1], self.stored.outputs)
        if not traced():  # what is traced are torch's kernels
            if self._direct is not None:
                made = self._direct(rows, self._parts(), self.bias)
                if made is not None:
                    return made
            if self._plain is not None and not self.stored.at_once:
                return self._plain(rows, self.brought(), self.bias)
        return self._by_parts(rows) if self.stored.at_once else self._product(rows, self.brought())

    def _product(
        self, rows: torch.Tensor, weight: torch.Tensor, part: slice = slice(None)
    ) -> torch.Tensor:
        """[..., I] times some outputs."""
        bias = None if self.bias is None else self.bias[part]
        if not self.exact:
            return self.product(rows, weight, bias)
        outputs, plain = weight.shape[0], self.product is torch.nn.functional.linear
        own = None
        if plain and not traced():  # a part has the bits that all outputs at once have
            own = plain_for(weight.shape[1], outputs, self.dtype, rows.device, exact=True)
        if own is not None:
            return own(rows, weight, bias)
        return in_tiles(
            lambda tiles: self.product(tiles, weight, bias),
            rows,
            outputs=outputs if plain else 0,
            apart=outputs < FEW_OUTPUTS,
        )

    def _by_parts(self, rows: torch.Tensor) -> torch.Tensor:
        """The same, some outputs after the other: all would need too large a scratch."""
        made = rows.new_empty(*rows.shape[:-1], self.stored.outputs)
        for part, stored, parts in _cut(self.stored, self._parts()):
            made[..., part] = self._product(rows, self._brought(stored, parts), part)
        return made

    def compute_by(self, product: Product) -> None:
        """Multiply so, whatever else could."""
        self.product, self._direct, self._plain = product, None, None

    def lend(self, scratch: torch.Tensor, *, in_order: bool, exact: bool = False) -> None:
        """Give it room, where it computes; what it dequantises with is ready by then."""
        self.scratch, self.in_order, self.exact = scratch, in_order, exact
        self._direct = direct_for(
            self.stored, self.dtype, scratch.device, exact=exact, in_order=in_order
        )
        sizes = self.stored.inputs, self.stored.outputs
        self._plain = plain_for(*sizes, self.dtype, scratch.device, exact=exact)
        made = bring_for(self.stored, self.dtype, scratch.device)
        self._bring = made or BRING[self.stored.form]

    def brought(self) -> torch.Tensor:
        """The weight [O, I], in the scratch until another is brought."""
        return self._brought(self.stored, self._parts())

    def _brought(self, stored: Stored, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        data = self.scratch[: stored.numbers * self.dtype.itemsize]
        out = data.view(self.dtype).view(stored.outputs, stored.inputs)
        self._bring(stored, parts, out)
        return out

    def _parts(self) -> dict[str, torch.Tensor]:
        unused = INDICES if self.in_order else ()
        parts = {w: tensor for w, tensor in self._buffers.items() if tensor is not None}
        return {w: tensor for w, tensor in parts.items() if w not in unused}

    def as_linear(self) -> torch.nn.Linear:
        """A linear with the weight in the scratch."""
        linear = torch.nn.Linear(self.stored.inputs, self.stored.outputs, False, device="meta")
        linear.weight = torch.nn.Parameter(self.brought(), False)
        linear.bias = self.bias
        return linear


class RowEmbedding(torch.nn.Module):
    """Looks up rows of a matrix that are brought when they are asked for.

    Args:
        embedding: that it replaces; it computes what its class does with a row, and has no weight.
        stored: the matrix as it lies in a buffer of its own; None: plain numbers.

    Attributes:
        rows: reads rows [N, ...] by their numbers [N]; None: they are in the buffer.
    """

    def __init__(self, embedding: torch.nn.Embedding, stored: Stored | None = None) -> None:
        super().__init__()
        self.stored, self.dtype = stored, embedding.weight.dtype
        self.rows: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._bring = None if stored is None else BRING[stored.form]
        self._embedding = stripped(embedding)
        self._embedding._parameters["weight"] = None  # no parameter of the network
        if stored is not None:
            self.register_buffer(ggml.PART, _on_meta(stored, ggml.PART))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] ids to [..., E]."""
        return looked_up(self._embedding, self._brought, ids)

    def _brought(self, ids: torch.Tensor) -> torch.Tensor:
        found = self._found(ids) if self.rows is None else self.rows(ids)
        if self.stored is None or self._bring is None:
            return found.to(self.dtype)
        wide = found.new_empty(len(ids), self.stored.inputs, dtype=self.dtype)
        if not found.is_meta:
            few = replace(self.stored, outputs=len(ids))
            self._bring(few, {ggml.PART: found}, wide)
        return wide

    def lend(self, device: torch.device) -> None:
        """Say where it computes."""
        if self.stored is not None:
            made = bring_for(self.stored, self.dtype, device)
            self._bring = made or BRING[self.stored.form]

    def _found(self, ids: torch.Tensor) -> torch.Tensor:
        data = self._buffers[ggml.PART]
        assert data is not None  # it was registered
        if data.is_meta:
            return data.new_empty(len(ids), *data.shape[1:])
        return data.index_select(0, ids)


def _cut(
    stored: Stored, parts: Mapping[str, torch.Tensor]
) -> Iterator[tuple[slice, Stored, dict[str, torch.Tensor]]]:
    """A weight of GGUF's blocks, some outputs after the other."""
    for part in stored.cuts():
        few = replace(stored, outputs=part.stop - part.start)
        yield part, few, {ggml.PART: parts[ggml.PART][part]}


class WiredExpert(torch.nn.Module):
    """The quantised weights of one expert of a layer whose experts are in its image.

    Args:
        matrices: by the names that the expert computes with (`model/experts.py`).
        dtype: it computes in.

    Attributes:
        bringers: of each.
    """

    def __init__(self, matrices: Mapping[str, Stored], dtype: torch.dtype) -> None:
        super().__init__()
        self.bringers = {name: Bringer(stored, dtype) for name, stored in matrices.items()}
        for name, stored in matrices.items():
            for word in stored.parts:
                self.register_buffer(self.buffer_of(name, word), _on_meta(stored, word))

    @staticmethod
    def buffer_of(matrix: str, word: str) -> str:
        """What the buffer of a part is called."""
        return f"{matrix.replace('.', '_')}_{word}"

    def weights(self) -> dict[str, StoredMatrix]:
        """What brings each matrix."""
        found: dict[str, StoredMatrix] = {}
        for name, bringer in self.bringers.items():
            buffers = {w: self._buffers[self.buffer_of(name, w)] for w in bringer.stored.parts}
            parts = {word: tensor for word, tensor in buffers.items() if tensor is not None}
            found[name] = StoredMatrix(bringer, parts)
        return found


def _on_meta(stored: Stored, word: str) -> torch.Tensor:
    extent = stored.parts[word]
    return torch.empty(extent.shape, dtype=getattr(torch, torch_name(extent.dtype)), device="meta")


def wire_linears(
    model: torch.nn.Module,
    stored: Iterable[Stored],
    key_of: Callable[[str], str | None],
    *,
    tied: bool,
) -> None:
    """Put such modules in place of the linears of a network whose weights are stored so.

    Args:
        model: transformers' modules.
        stored: the weights.
        key_of: the network's name of a tensor of the files.
        tied: an embedding among them is the output head, too.

    Raises:
        CheckpointError: a module is none that is read so, or of another shape.
    """
    for each in stored:
        key = key_of(f"{each.module}.weight")
        path = "" if key is None else key.rpartition(".")[0]
        linear: Any = model.get_submodule(path) if path else None
        looks_up = isinstance(linear, torch.nn.Embedding) and each.at_once > 0
        if type(linear) is not torch.nn.Linear and not looks_up:
            raise CheckpointError(
                f"{shown(each.module)} is quantised, but is no linear layer of this network: take "
                "the model it was made from"
            )
        if tuple(linear.weight.shape) != (each.outputs, each.inputs):
            raise CheckpointError(
                f"{shown(each.module)} is a quantised weight of {[each.outputs, each.inputs]}, "
                f"config.json makes it {list(linear.weight.shape)}"
            )
        if looks_up and tied:
            whole: Any = model
            whole.set_output_embeddings(WiredLinear(each, whole.get_output_embeddings()))
        made = RowEmbedding(linear, each) if looks_up else WiredLinear(each, linear)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made)


def wired_linears(module: torch.nn.Module) -> list[WiredLinear]:
    """Those below a module."""
    return [child for child in module.modules() if isinstance(child, WiredLinear)]


def bringers_below(module: torch.nn.Module) -> Iterator[Bringer]:
    """Of the quantised weights of experts below a module."""
    for child in module.modules():
        if isinstance(child, WiredExpert):
            yield from child.bringers.values()
