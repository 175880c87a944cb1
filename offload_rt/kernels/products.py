"""Products of few rows with a bf16 matrix, at the rate memory is read.

oneDNN's kernels read 18 to 28 GB/s for one row here, where these read 30 to 55
(docs/RESULTS.md, "A pass of few rows").

The matrix lies as oneDNN's kernels for this processor have it, so it is there once: panels of
`PANEL` outputs, in a panel pairs of inputs, of a pair the outputs one after the other: [O / 64,
I / 2, 64, 2]. Whether it does is looked at (`lies_in_panels`).

The results are oneDNN's, bit for bit: `vdpbf16ps` adds pair after pair to a sum per output; after
every `block` inputs that sum is added to the total and starts at zero, as oneDNN's blocks of inputs
make it. How long its blocks are depends on the sizes and on whether there is more than one row. It
is found out, with numbers that nearly cancel out (`block_of`): there another order of additions
shows in nearly every output. Where no length fits, oneDNN computes.
"""

import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product as pairs_of

import torch

from offload_rt.device.system import processor_flags
from offload_rt.kernels import assembling
from offload_rt.kernels.rows import MOST_ROWS, PANEL

_VECTOR = 16  # outputs in a register
_INPUTS_TILE = 16  # oneDNN fills inputs up to a multiple
AHEAD = 2048  # bytes that are fetched ahead
BLOCKS = (512, 1024, 256, 2048, 4096, 2**40)  # inputs, likeliest first; the last: no blocks
_COMPARED_NUMBERS = 2**22  # of a matrix whose product is compared

HEAD = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
declare void @GOMP_barrier()
declare i64 @llvm.umin.i64(i64, i64)
declare float @llvm.sqrt.f32(float)
attributes #0 = { nounwind "prefer-vector-width"="512" }
"""


@cache
def problem() -> str:
    """Why there are no such kernels; empty where there are."""
    if "avx512_bf16" not in processor_flags():
        return "the processor has no AVX-512 BF16"
    return assembling.problem() or assembling.trouble(_kernel)


class Product:
    """The product of one matrix with few rows.

    Args:
        address: of the matrix, in panels.
        inputs: I.
        outputs: O.
        bias: [O] in bf16, or None; it must live as long as this.
        blocks: inputs of a block for one row, and for more.

    Attributes:
        address, bias, blocks: the same.
    """

    def __init__(
        self,
        address: int,
        inputs: int,
        outputs: int,
        bias: torch.Tensor | None,
        blocks: tuple[int, int],
    ) -> None:
        self._sizes = inputs, outputs
        self.address, self.bias, self.blocks = address, bias, blocks
        start = 0 if bias is None else bias.data_ptr()
        self._record = (ctypes.c_int64 * 8)(
            0, address, start, 0, inputs // 2, outputs // PANEL, 0, 0
        )

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., I] in bf16 gives [..., O]; not from two threads at once."""
        inputs, outputs = self._sizes
        rows = rows.contiguous()
        out = rows.new_empty(*rows.shape[:-1], outputs)
        record, count = self._record, rows.numel() // inputs
        record[0], record[3], record[6] = rows.data_ptr(), out.data_ptr(), count
        record[7] = self.blocks[count > 1] // 2
        assembling.together(self._code(), record)
        return out

    def _code(self) -> int:
        return _kernel()


def prepare() -> None:
    """Assemble the kernels now, where there are any: LLVM takes memory for a moment."""
    problem()


@cache
def _kernel() -> int:
    return assembling.assemble(HEAD + panels() + _all_panels(), ["product"])["product"]


def panels() -> str:
    """Functions `panel1` and so on: the product of so many rows with one panel."""
    return "".join(_panel(count) for count in range(1, MOST_ROWS + 1))


@cache
def blocks_of(inputs: int, outputs: int, tile: int = 1) -> tuple[int, int] | None:
    """Inputs of the blocks in which oneDNN adds up, for one row and for 2 to `MOST_ROWS`.

    None where there are no kernels, or none that give its numbers.

    Args:
        inputs: I.
        outputs: O.
        tile: rows that oneDNN is given are filled up to a multiple of it.
    """
    if problem() or outputs % PANEL or inputs % _INPUTS_TILE:
        return None
    outputs = min(outputs, max(PANEL, _COMPARED_NUMBERS // inputs // PANEL * PANEL))
    weight, rows = cancelling(inputs, outputs)
    bias = torch.linspace(-1e-4, 1e-4, outputs).to(torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    if not lies_in_panels(packed, weight):
        return None
    start, found = torch.ops.mkldnn.data_ptr(packed), []
    for counts in ((1,), range(2, MOST_ROWS + 1)):
        for block in BLOCKS:
            made = Product(start, inputs, outputs, bias, (block, block))
            if all(
                torch.equal(made(rows[:count]), _by_onednn(rows[:count], packed, bias, tile))
                for count in counts
            ):
                found.append(block)
                break
    return (found[0], found[1]) if len(found) == 2 else None


def _by_onednn(
    rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, tile: int = 1
) -> torch.Tensor:
    count = rows.shape[0]
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -count % tile))
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return out[:count]


def cancelling(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [O, I] and `MOST_ROWS` rows whose products are all rounding: sums come to zero."""
    generator = torch.Generator().manual_seed(0)
    half, panels = inputs // 2, outputs // PANEL
    weight = torch.randn(PANEL, half, generator=generator).to(torch.bfloat16)
    rows = torch.randn(MOST_ROWS, half, generator=generator).to(torch.bfloat16)
    order = torch.randperm(half, generator=generator)
    weight, rows = (torch.cat([w, s * w[:, order]], 1) for w, s in ((weight, -1), (rows, 1)))
    return weight.repeat(panels, 1), rows


def lies_in_panels(packed: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a matrix [O, I] that oneDNN reordered lies as the kernels read it."""
    outputs, inputs = weight.shape
    start = torch.ops.mkldnn.data_ptr(packed)
    last = outputs // PANEL - 1
    for panel in (0, last // 2, last):
        numbers = (ctypes.c_int16 * (PANEL * inputs)).from_address(
            start + panel * PANEL * inputs * weight.itemsize
        )
        there = torch.frombuffer(numbers, dtype=torch.int16).view(inputs // 2, PANEL, 2)
        mine = weight[panel * PANEL : (panel + 1) * PANEL].view(torch.int16)
        if not torch.equal(there, mine.view(PANEL, inputs // 2, 2).transpose(0, 1)):
            return False
    return True


def _panel(count: int) -> str:
    """The product of `count` rows with one panel."""
    return "\n".join(_panel_lines(count))


Lines = Iterator[str]


def _panel_lines(count: int) -> Lines:
    places = list(pairs_of(range(count), range(PANEL // _VECTOR)))
    parts = range(PANEL // _VECTOR)

    def each(line: Callable[[int, int], str]) -> Lines:
        return (line(row, part) for row, part in places)

    yield (
        f"define internal void @panel{count}(ptr noalias %rows, ptr noalias %weight, "
        "ptr noalias %bias, ptr noalias %out, i64 %pairs, i64 %outputs, i64 %block) #0 {"
    )
    yield "entry:\n br label %blocks"
    yield "blocks:\n %start = phi i64 [0, %entry], [%stop, %added]"
    yield from each(
        lambda r, p: (
            f" %total{r}.{p} = phi <16 x float> [zeroinitializer, %entry], [%more{r}.{p}, %added]"
        )
    )
    yield " %full = add i64 %start, %block\n %stop = call i64 @llvm.umin.i64(i64 %full, i64 %pairs)"
    yield " br label %inputs"
    yield "inputs:\n %pair = phi i64 [%start, %blocks], [%next, %inputs]"
    yield from each(
        lambda r, p: (
            f" %sum{r}.{p} = phi <16 x float> [zeroinitializer, %blocks], [%new{r}.{p}, %inputs]"
        )
    )
    yield f" %read = getelementptr [{PANEL} x i32], ptr %weight, i64 %pair"
    for part in parts:
        at = part * _VECTOR * 4
        yield f" %ahead{part} = getelementptr i8, ptr %read, i64 {at + AHEAD}"
        yield f" call void @llvm.prefetch.p0(ptr %ahead{part}, i32 0, i32 3, i32 1)"
        yield f" %read{part} = getelementptr i8, ptr %read, i64 {at}"
        yield f" %weight{part} = load <32 x bfloat>, ptr %read{part}, align 64"
    for row in range(count):
        yield f" %before{row} = mul i64 %pairs, {row}\n %place{row} = add i64 %before{row}, %pair"
        yield f" %given{row} = getelementptr i32, ptr %rows, i64 %place{row}"
        yield f" %number{row} = load i32, ptr %given{row}, align 4"
        yield from _broadcast(f"spread{row}", f"number{row}")
        yield f" %row{row} = bitcast <16 x i32> %spread{row} to <32 x bfloat>"
    yield from each(
        lambda r, p: (
            f" %new{r}.{p} = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512("
            f"<16 x float> %sum{r}.{p}, <32 x bfloat> %row{r}, <32 x bfloat> %weight{p})"
        )
    )
    yield " %next = add i64 %pair, 1\n %inside = icmp ult i64 %next, %stop"
    yield " br i1 %inside, label %inputs, label %added"
    yield "added:"
    yield from each(lambda r, p: f" %more{r}.{p} = fadd <16 x float> %total{r}.{p}, %new{r}.{p}")
    yield " %further = icmp ult i64 %stop, %pairs\n br i1 %further, label %blocks, label %all"
    yield "all:\n %plain = icmp eq ptr %bias, null\n br i1 %plain, label %store, label %biased"
    yield "biased:"
    for part in parts:
        yield f" %of{part} = getelementptr i16, ptr %bias, i64 {part * _VECTOR}"
        yield f" %narrow{part} = load <16 x i16>, ptr %of{part}, align 2"
        yield f" %wide{part} = zext <16 x i16> %narrow{part} to <16 x i32>"
        yield f" %high{part} = shl <16 x i32> %wide{part}, splat (i32 16)"
        yield f" %bias{part} = bitcast <16 x i32> %high{part} to <16 x float>"
    yield from each(lambda r, p: f" %with{r}.{p} = fadd <16 x float> %more{r}.{p}, %bias{p}")
    yield " br label %store\nstore:"
    yield from each(
        lambda r, p: (
            f" %done{r}.{p} = phi <16 x float> [%more{r}.{p}, %all], [%with{r}.{p}, %biased]"
        )
    )
    for row, part in places:
        name = f"{row}.{part}"
        yield f" %rounded{name} = fptrunc <16 x float> %done{name} to <16 x bfloat>"
        yield f" %line{name} = mul i64 %outputs, {row}"
        yield f" %spot{name} = add i64 %line{name}, {part * _VECTOR}"
        yield f" %to{name} = getelementptr i16, ptr %out, i64 %spot{name}"
        yield f" store <16 x bfloat> %rounded{name}, ptr %to{name}, align 2"
    yield " ret void\n}\n"


def _broadcast(name: str, number: str) -> Lines:
    """A register with one 32-bit number in all places."""
    yield f" %{name}.0 = insertelement <16 x i32> poison, i32 %{number}, i32 0"
    yield (
        f" %{name} = shufflevector <16 x i32> %{name}.0, <16 x i32> poison, "
        "<16 x i32> zeroinitializer"
    )


def _all_panels() -> str:
    """A thread's share of the panels, for all rows, `MOST_ROWS` at a time."""
    fields = ("rows", "weight", "bias", "out", "pairs", "panels", "count", "block")
    loads = "\n".join(
        f" %at{i} = getelementptr i64, ptr %record, i64 {i}\n"
        f" %{name} = load {'ptr' if i < fields.index('pairs') else 'i64'}, ptr %at{i}"
        for i, name in enumerate(fields)
    )
    cases = " ".join(f"i64 {count}, label %take{count}" for count in range(1, MOST_ROWS + 1))
    calls = "\n".join(
        f"take{count}:\n call void @panel{count}(ptr %given, ptr %read, ptr %added, ptr %to, "
        f"i64 %pairs, i64 %outputs, i64 %block)\n br label %taken"
        for count in range(1, MOST_ROWS + 1)
    )
    return f"""
define void @product(ptr %record) #0 {{
entry:
{loads}
 %thread = call i32 @omp_get_thread_num()
 %threads = call i32 @omp_get_num_threads()
 %me = sext i32 %thread to i64
 %all = sext i32 %threads to i64
 %after = add i64 %me, 1
 %low = mul i64 %me, %panels
 %first = udiv i64 %low, %all
 %high = mul i64 %after, %panels
 %last = udiv i64 %high, %all
 %outputs = mul i64 %panels, {PANEL}
 %bytes = mul i64 %pairs, {PANEL * 4}
 %biased = icmp ne ptr %bias, null
 %some = icmp ult i64 %first, %last
 br i1 %some, label %panel, label %end
panel:
 %number = phi i64 [%first, %entry], [%following, %done]
 %skipped = mul i64 %number, %bytes
 %read = getelementptr i8, ptr %weight, i64 %skipped
 %output = mul i64 %number, {PANEL}
 %here = getelementptr i16, ptr %bias, i64 %output
 %added = select i1 %biased, ptr %here, ptr null
 br label %group
group:
 %row = phi i64 [0, %panel], [%beyond, %taken]
 %left = sub i64 %count, %row
 %taking = call i64 @llvm.umin.i64(i64 %left, i64 {MOST_ROWS})
 %before = mul i64 %row, %pairs
 %given = getelementptr i32, ptr %rows, i64 %before
 %line = mul i64 %row, %outputs
 %spot = add i64 %line, %output
 %to = getelementptr i16, ptr %out, i64 %spot
 switch i64 %taking, label %taken [{cases}]
{calls}
taken:
 %beyond = add i64 %row, %taking
 %rest = icmp ult i64 %beyond, %count
 br i1 %rest, label %group, label %done
done:
 %following = add i64 %number, 1
 %more = icmp ult i64 %following, %last
 br i1 %more, label %panel, label %end
end:
 ret void
}}
"""
