"""Linear layers and embeddings with weights of 8 or 4 bits, for models that only draft.

A drafter may be wrong, so its weights may be rounded: that changes which tokens are proposed, never
which are emitted. Fewer bytes make a draft pass faster and leave the target more memory.

`int8`: a scale per output, activations rounded to 8 bits on the fly (a scale per call), products in
integers. For the CPU, whose integer instructions are several times as fast as others. Where LLVM
can be had, bf16 models use kernels of our own, with a scale per row (`kernels/rounded.py`).
`int4`: a scale and an offset per `GROUP` inputs, for CPU and CUDA. Activations stay as they are;
kernels of our own (`kernels/fours.py`) round them to 8 bits.

Measured on two cores with AVX-512 VNNI, linears and head of Qwen2.5-0.5B, ms for 1 / 8 / 16 rows:
bf16 93 / 308 / 402, FBGEMM's int8 37 / 44 / 56, torch's int4 23 / 69 / 145; what our kernels take
is in docs/RESULTS.md, "A pass of few rows". On 9 answers of its 1.5B sibling the
share of its likeliest tokens that were right was 0.80 and 0.88 (chat, code) in bf16, 0.78 and 0.87
in int8.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from offload_rt.config import DraftWeights
from offload_rt.device.system import processor_flags
from offload_rt.kernels import fours
from offload_rt.kernels.assembling import traced
from offload_rt.kernels.rounded import EIGHT, RoundedProduct, fill, rows_of, suits
from offload_rt.model.formats.base import GROUP, takes
from offload_rt.model.formats.lookup import looked_up, stripped

_LEVELS = 15  # of 4 bits, from 0
_MIDDLE = 8  # the kernels take (number - 8) * scale + offset
_BLOCK_NUMBERS = 2**20  # of a weight that are rounded at once
_BLOCK_ROWS = 64  # what is packed in one go is a multiple of that, as kernels tile outputs
_FBGEMM = "fbgemm"
_CUDA_TILES = (8, 4, 2)  # by how many 16 inputs CUDA's kernel may tile


class Int8Linear(torch.nn.Module):
    """Computes what the given linear does, nearly, from 8-bit weights; on the CPU.

    Args:
        linear: weight [O, I], bias [O] or None; both are copied.

    Attributes:
        inputs: I.
        outputs: O.
        product: kernels of our own with its weights (`kernels/rounded.py`); None: FBGEMM has them.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach()
        self.outputs, self.inputs = weight.shape
        self.product: RoundedProduct | None = None
        if weight.dtype is torch.bfloat16 and suits(self.inputs, self.outputs):
            bias = None if bias is None else bias.clone()
            self.product = RoundedProduct(EIGHT, self.inputs, self.outputs, bias)
            for part in _blocks(weight):
                rounded, scale = _rounded_rows(weight[part])
                fill(self.product, part.start, rounded.to(torch.int8), scale[:, 0])
            return
        scales = weight.new_empty(weight.shape[0], dtype=torch.float32)
        rounded = torch.empty(weight.shape, dtype=torch.int8)
        for part in _blocks(weight):
            rounded[part], scale = _rounded_rows(weight[part])
            scales[part] = scale[:, 0]
        # Without VNNI products are added up in 16 bits, which activations of 8 bits overflow.
        self._narrow = "avx512_vnni" not in processor_flags()
        zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        with warnings.catch_warnings(), _lean_kernels():
            warnings.simplefilter("ignore")  # torch tells where its quantisation tools went
            made = torch._make_per_channel_quantized_tensor(rounded, scales.double(), zeros, 0)
            wide = None if bias is None else bias.float()
            self._packed = torch.ops.quantized.linear_prepack(made, wide)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., I] gives [..., O]."""
        if self.product is not None:
            return self.product.by_formula(rows) if traced() else self.product(rows)
        narrow = self._narrow
        out: torch.Tensor = torch.ops.quantized.linear_dynamic(rows.float(), self._packed, narrow)
        return out.to(rows.dtype)


class RoundedEmbedding(torch.nn.Module):
    """Looks up what the given embedding does, nearly, from rows of 8 bits with a scale each, or 4.

    Args:
        embedding: weight [V, E]; it computes what its class does with a row (families scale them),
            but keeps no weight.
        head: the rounded output head; where that has the very rows, and kernels of our own multiply
            with them, they are looked up there. None: they are kept here.
    """

    def __init__(self, embedding: torch.nn.Embedding, head: torch.nn.Module | None = None) -> None:
        super().__init__()
        weight = embedding.weight.detach()
        self._dtype, self._product = weight.dtype, None
        if isinstance(head, Int8Linear | Int4Linear) and head.product is not None:
            self._product = head.product
        else:
            self._rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
            self._scales = weight.new_empty(weight.shape[0], 1, dtype=torch.float32)
            for part in _blocks(weight):
                self._rounded[part], self._scales[part] = _rounded_rows(weight[part])
        self._embedding = stripped(embedding)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] ids give [..., E]."""
        return looked_up(self._embedding, self._wide, ids)

    def _wide(self, ids: torch.Tensor) -> torch.Tensor:
        if self._product is None:
            wide = self._rounded[ids] * self._scales[ids]
        elif self._product.form is fours.FOUR:
            wide = fours.rows_of(self._product, ids)
        else:
            wide = torch.mul(*rows_of(self._product, ids))
        return wide.to(self._dtype)


class Int4Linear(torch.nn.Module):
    """Computes what the given linear does, nearly, from 4-bit weights.

    Args:
        linear: weight [O, I], bias [O] or None; both are copied.

    Attributes:
        inputs: I.
        outputs: O.
        product: kernels of our own with its weights (`kernels/fours.py`); None: torch's have them.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.outputs, self.inputs = outputs, inputs = weight.shape
        self._on_cpu = weight.device.type == "cpu"
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        self.product: RoundedProduct | None = None
        own = self._on_cpu and weight.dtype is torch.bfloat16 and fours.takes(inputs, outputs)
        if own:
            self.product = RoundedProduct(fours.FOUR, inputs, outputs, self.bias)
        else:
            self.affine = weight.new_empty(inputs // GROUP, outputs, 2)  # scale and offset
        packed = []
        for part in _blocks(weight):
            groups = weight[part].float().unflatten(1, (-1, GROUP))
            low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
            scale = (high - low).clamp(min=1e-12) / _LEVELS
            numbers = ((groups - low) / scale).round().to(torch.int32).flatten(1)
            if self.product is not None:
                pair = torch.cat([scale, low], dim=2).to(weight.dtype)
                fours.fill(self.product, part.start, numbers, pair)
                continue
            packed.append(self._pack(numbers))
            pair = torch.cat([scale, low + _MIDDLE * scale], dim=2)
            self.affine[:, part] = pair.transpose(0, 1).to(weight.dtype)
        if packed:
            self.weight = torch.cat(packed)

    def _pack(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers [rows, I] of 0 to 15 in the order the kernel reads; rows are outermost."""
        if self._on_cpu:
            return torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
        pairs = (numbers[:, ::2] << 4 | numbers[:, 1::2]).to(torch.uint8)
        tiles = next(tiles for tiles in _CUDA_TILES if numbers.shape[1] % (16 * tiles) == 0)
        return torch._convert_weight_to_int4pack(pairs, tiles)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., I] gives [..., O]."""
        if self.product is not None:
            return self.product.by_formula(rows) if traced() else self.product(rows)
        product = torch._weight_int4pack_mm
        if self._on_cpu:
            product = torch._weight_int4pack_mm_for_cpu
        out = product(rows.reshape(-1, rows.shape[-1]), self.weight, GROUP, self.affine)
        out = out.view(*rows.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


_KINDS = {DraftWeights.INT8: Int8Linear, DraftWeights.INT4: Int4Linear}


def rounded_linear(linear: torch.nn.Linear, weights: DraftWeights) -> torch.nn.Module | None:
    """A rounded copy of a linear; None where its sizes do not suit the kernels."""
    return _KINDS[weights](linear) if takes(weights, *linear.weight.shape) else None


def _rounded_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, I] as whole numbers of -127 to 127, and the scale [N, 1] of each row."""
    wide = rows.float()
    low, high = wide.aminmax(dim=1, keepdim=True)
    scale = torch.maximum(-low, high).clamp(min=1e-12) / 127
    return (wide / scale).round_(), scale  # `wide` may be the rows themselves


@contextmanager
def _lean_kernels() -> Iterator[None]:
    """Pack weights for FBGEMM where it is there: oneDNN keeps what it packed beside the result."""
    engine = torch.backends.quantized.engine
    if _FBGEMM in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = _FBGEMM
    try:
        yield
    finally:
        torch.backends.quantized.engine = engine


def _blocks(weight: torch.Tensor) -> Iterator[slice]:
    outputs, inputs = weight.shape
    step = max(_BLOCK_ROWS, _BLOCK_NUMBERS // inputs // _BLOCK_ROWS * _BLOCK_ROWS)
    return (slice(start, start + step) for start in range(0, outputs, step))
