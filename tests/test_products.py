"""Products of few rows: oneDNN's bits, in every thread count and for every number of rows."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import engine_for

from offload_rt.config import Exact
from offload_rt.device import compiled
from offload_rt.device.system import _mapped_areas
from offload_rt.errors import CheckpointError
from offload_rt.kernels import assembling, products
from offload_rt.kernels.products import BLOCKS, MOST_ROWS, Product, blocks_of, lies_in_panels
from offload_rt.kernels.registers import problem as registers_problem
from offload_rt.kernels.stored import (
    ROWS_AT_ONCE,
    How,
    StoredProduct,
    Task,
    multiply_all,
)
from offload_rt.kernels.stored import blocks_of as plain_blocks
from offload_rt.kernels.tiles import goes_by_count, in_tiles
from offload_rt.model.formats import packed, planes
from offload_rt.model.formats.left_plain import left_plain
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.packed import PackedLinear, can_pack, unlike_when_packed
from offload_rt.model.formats.stored import Stored
from offload_rt.model.formats.wired import WiredLinear
from offload_rt.model.header import TensorExtent
from offload_rt.model.layout import CODED_PART

# With matrix registers the library adds up otherwise, and has matrices in another order.
OTHERWISE = goes_by_count(torch.bfloat16)
needs_kernels = pytest.mark.skipif(
    bool(products.problem()) or OTHERWISE, reason=f"none that compare: {products.problem()}"
)
needs_decoder = pytest.mark.skipif(
    bool(products.problem() or compiled.problem()) or OTHERWISE, reason="no kernels, or no numba"
)
REGISTERS = registers_problem()
needs_registers = pytest.mark.skipif(bool(REGISTERS), reason=REGISTERS)
# The last two have more inputs than one of oneDNN's blocks, and rows that are no power of two.
SIZES = [(256, 128), (576, 192), (896, 128), (1536, 256), (4864, 64)]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def onednn(packed, rows):
    return torch.ops.mkldnn._linear_pointwise(rows, packed.weight, packed.bias, "none", [], "")


def coded(weight, each):
    """The bytes of a weight in 12 bits, and where its pieces begin."""
    words = weight.view(torch.int16).numpy().view(np.uint16).ravel()
    made = [planes.encode(words[start : start + each]) for start in range(0, words.size, each)]
    return np.concatenate(made), np.cumsum([0, *(piece.size for piece in made)]).tolist()


def cancelling(inputs, outputs):
    """A linear and rows whose sums nearly cancel: an order of additions shows in the result."""
    torch.manual_seed(1)
    half = inputs // 2
    weight, rows = torch.randn(outputs, half), torch.randn(40, half)
    linear = torch.nn.Linear(inputs, outputs, dtype=torch.bfloat16)
    linear.weight.data = torch.cat([weight, -weight.flip(1)], 1).to(torch.bfloat16)
    linear.bias.data *= 1e-6
    return linear, torch.cat([rows, rows.flip(1)], 1).to(torch.bfloat16)


@needs_kernels
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_the_bits_are_those_of_the_library(inputs, outputs, threads):
    linear, rows = cancelling(inputs, outputs)
    packed = PackedLinear(linear)
    assert packed.product is not None
    for count in (*range(1, MOST_ROWS + 1), 13, 40):
        expected = onednn(packed, rows[:count])
        assert torch.equal(packed.product(rows[:count]), expected) or count > MOST_ROWS
        assert torch.equal(packed(rows[None, :count])[0], expected)
        assert torch.equal(linear(rows[:count]), expected)
    spread = torch.randn(2, 2 * inputs, dtype=torch.bfloat16)[:, ::2]  # not one after the other
    assert torch.equal(packed(spread), linear(spread))


@needs_kernels
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_a_matrix_as_it_lies_gives_the_bits_of_the_library(inputs, outputs, threads):
    linear, rows = cancelling(inputs, outputs)
    for tiles in (False, True):
        product = StoredProduct(
            How.PLAIN, inputs, outputs, plain_blocks(inputs, outputs, tiles=tiles)
        )
        for count in (1, 2, 5, 6, 7, 13, 40):
            some = rows[:count]
            expected = in_tiles(linear, some) if tiles else linear(some)
            assert torch.equal(product(some, linear.weight, linear.bias), expected)
    many = rows.repeat(ROWS_AT_ONCE // len(rows) + 1, 1)  # the last block of rows has another size
    expected = in_tiles(linear, rows).repeat(ROWS_AT_ONCE // len(rows) + 1, 1)
    assert torch.equal(product(many[None], linear.weight, linear.bias)[0], expected)
    without = torch.nn.functional.linear(rows, linear.weight)
    assert torch.equal(product(rows, linear.weight, None), without)


@needs_registers
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_matrix_registers_give_a_row_the_same_bits_in_any_pass(inputs, outputs, threads):
    linear, rows = cancelling(inputs, outputs)
    product, many = StoredProduct(How.PLAIN, inputs, outputs, None), rows.repeat(5, 1)
    whole = product(many[None], linear.weight, linear.bias)[0]
    for first, count in ((0, 1), (3, 2), (39, 15), (40, 16), (7, 17), (130, 33), (1, ROWS_AT_ONCE)):
        made = product(many[first : first + count], linear.weight, linear.bias)
        assert torch.equal(made, whole[first : first + count]), (first, count)
    weight, given = linear.weight.double(), rows.double()
    error = (whole[: len(rows)].double() - linear.bias.double() - given @ weight.t()).abs()
    assert bool(
        (error <= 2.0**-16 * (given.abs() @ weight.abs().t()) + 2.0**-8 * error.max()).all()
    )
    alone = torch.eye(inputs, dtype=torch.bfloat16)[: 3 * inputs // 4]  # each weight, by itself
    assert torch.equal(product(alone, linear.weight, None), linear.weight[:, : len(alone)].t())


@needs_registers
@pytest.mark.parametrize("registers", [False, True])
def test_products_at_once_have_the_bits_of_each(registers, threads):
    """Of unlike sizes, which need unlike rooms, into columns of one tensor, too."""
    tasks, expected = [], []
    for number, (inputs, outputs) in enumerate([*SIZES, *SIZES[:2]]):
        linear, rows = cancelling(inputs, outputs)
        blocks = None if registers else plain_blocks(inputs, outputs, tiles=True)
        product = StoredProduct(How.PLAIN, inputs, outputs, blocks or (inputs, inputs))
        if registers:
            product = StoredProduct(How.PLAIN, inputs, outputs, None)
        some = rows[: (1, 40, 7, 16, 3, 17, 2)[number]]
        bias = linear.bias if number % 2 else None
        wide = torch.full((len(some), 3 * outputs), 7.0, dtype=torch.bfloat16)
        out = wide[:, outputs : 2 * outputs]
        tasks.append((Task(product, some, out, linear.weight, bias), wide))
        expected.append(product(some, linear.weight, bias))
    for order in (tasks, tasks[::-1]):
        multiply_all([task for task, _ in order])
        for (task, wide), alone in zip(tasks, expected, strict=True):
            assert torch.equal(task.out, alone)
            outputs = alone.shape[1]
            assert bool((wide[:, :outputs] == 7).all() and (wide[:, 2 * outputs :] == 7).all())
            task.out.zero_()


@needs_registers
def test_two_threads_may_multiply_with_one_matrix():
    linear, rows = cancelling(576, 192)
    product = StoredProduct(How.PLAIN, 576, 192, None)
    expected = [product(rows[:count], linear.weight, None) for count in range(1, 33)]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda n: product(rows[: 1 + n % 32], linear.weight, None), range(320))
        assert all(torch.equal(one, expected[n % 32]) for n, one in enumerate(made))


@needs_decoder
@pytest.mark.parametrize(
    ("inputs", "outputs", "each"), [(576, 192, 448), (1536, 256, 70400), (4864, 64, 2**17)]
)
def test_a_matrix_in_12_bits_gives_the_bits_of_the_library(inputs, outputs, each, threads):
    """Pieces end within lines and panels, and have escapes, exact zeros and several groups."""
    linear, rows = cancelling(inputs, outputs)
    weight = linear.weight.data
    weight[:, ::97] *= 2.0**-40
    weight[5::7, 3:20] = 0
    weight[-1, -1], weight[0, 0] = 2.0**60, -(2.0**-50)
    words, begins = coded(weight, each)
    described = planes.Described(begins, each, weight.numel())
    blocks = plain_blocks(inputs, outputs, tiles=True)
    product = StoredProduct(How.CODED, inputs, outputs, blocks, group=each)
    assert described.describe(words)
    for count in (1, 2, 7, 40):
        made = product(rows[:count], torch.from_numpy(described.records), linear.bias)
        assert torch.equal(made, in_tiles(linear, rows[:count])), count
    assert not described.misplaced
    if not REGISTERS:
        one, other = (
            StoredProduct(how, inputs, outputs, None, group=each) for how in (How.CODED, How.PLAIN)
        )
        expected = other(rows, weight, linear.bias)
        assert torch.equal(one(rows, torch.from_numpy(described.records), linear.bias), expected)


@needs_decoder
def test_pieces_that_are_damaged_or_not_coded_are_told():
    outputs, inputs = 64, 1472  # one piece of two groups
    weight = (torch.randn(outputs, inputs) / 50).to(torch.bfloat16)
    weight[::5, ::50] *= 2.0**30
    weight[-1, -1] = 2.0**70
    words, begins = coded(weight, weight.numel())
    described = planes.Described(begins, weight.numel(), weight.numel())
    part = TensorExtent(
        name="w", dtype="U8", shape=(words.size,), path=Path("f"), offset=0, nbytes=words.size
    )
    stored = Stored(
        module="w",
        form=Form.CODED,
        outputs=outputs,
        inputs=inputs,
        bits=12,
        groups=1,
        parts={CODED_PART: part},
        pieces=tuple(begins),
    )
    linear = torch.nn.Linear(inputs, outputs, False, "meta", torch.bfloat16)
    module = WiredLinear(stored, linear)
    rows = torch.randn(3, inputs).to(torch.bfloat16)
    module.lend(torch.empty(2 * weight.numel(), dtype=torch.uint8), in_order=True)
    counts = 64 + weight.numel() * 3 // 2
    escapes = int(words[8:12].view(np.uint32)[0])
    damages = {
        "kind 2": (0, 2),
        "base 122": (1, 122),
        "94210 weights": (4, words[4] + 2),
        "a piece counts": (counts, words[counts] ^ 1),
        "an escape is weight 13": (counts + 2 * 4 + 2 * escapes - 1, 255),
    }
    for what, (place, byte) in damages.items():
        damaged = words.copy()
        damaged[place] = byte
        assert described.describe(damaged) == ("is weight" in what), what
        setattr(module, CODED_PART, torch.from_numpy(damaged))
        with pytest.raises(CheckpointError, match=what):
            module(rows)
    setattr(module, CODED_PART, torch.from_numpy(words))
    module.brought = None  # what decodes first is not asked
    assert torch.equal(module(rows), torch.nn.functional.linear(rows, weight))
    as_is, _ = coded(torch.arange(2**16).to(torch.int16).view(torch.bfloat16).view(64, -1), 2**16)
    assert not planes.Described([0, as_is.size], 2**16, 2**16).describe(as_is)


@needs_kernels
def test_blocks_of_another_length_are_noticed():
    linear, rows = cancelling(1536, 256)
    blocks = plain_blocks(1536, 256, tiles=True)
    expected = in_tiles(linear, rows)
    for length in (256, 512, 1024):
        product = StoredProduct(How.PLAIN, 1536, 256, (length, length))
        same = torch.equal(product(rows, linear.weight, linear.bias), expected)
        assert same == (length == blocks[1])
    assert plain_blocks(1536, 250, tiles=True) is None
    assert plain_blocks(1528, 256, tiles=True) is None


@needs_kernels
def test_another_order_of_additions_is_noticed():
    inputs, outputs = 1536, 256
    linear, rows = cancelling(inputs, outputs)
    packed = PackedLinear(linear)
    start = torch.ops.mkldnn.data_ptr(packed.weight)
    right = blocks_of(inputs, outputs)
    for block in BLOCKS:
        made = Product(start, inputs, outputs, packed.bias, (block, block))
        one = torch.equal(made(rows[:1]), onednn(packed, rows[:1]))
        more = torch.equal(made(rows[:4]), onednn(packed, rows[:4]))
        assert (one, more) == (block == right[0], block == right[1])


@needs_kernels
def test_numbers_that_are_none_stay_so():
    linear, rows = cancelling(256, 128)
    rows[1, 3], rows[2, 5] = float("nan"), float("inf")
    packed = PackedLinear(linear)
    got, expected = packed(rows[:4]), onednn(packed, rows[:4])
    assert torch.equal(got.isnan(), expected.isnan()) and got[1].isnan().all()
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@needs_kernels
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (72, 64), (40, 7)])
def test_sizes_that_do_not_suit_are_left_to_the_library(inputs, outputs):
    linear = torch.nn.Linear(inputs, outputs, dtype=torch.bfloat16)
    rows = torch.randn(3, inputs).to(torch.bfloat16)
    assert blocks_of(inputs, outputs) is None
    assert torch.equal(PackedLinear(linear)(rows), linear(rows))


@needs_kernels
def test_a_matrix_that_lies_otherwise_is_noticed():
    weight = torch.randn(128, 64).to(torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    assert lies_in_panels(packed, weight)
    assert not lies_in_panels(packed, weight.flip(0))
    weight[64, 0] += 1
    assert not lies_in_panels(packed, weight)


@needs_kernels
def test_what_is_traced_are_kernels_that_a_trace_knows():
    from torch.fx.experimental.proxy_tensor import make_fx

    linear, rows = cancelling(256, 128)
    packed = PackedLinear(linear)
    traced = make_fx(packed)(rows[:2])
    assert any("_linear_pointwise" in str(node.target) for node in traced.graph.nodes)
    assert torch.equal(traced(rows[4:6]), linear(rows[4:6]))


def test_without_llvm_the_library_computes(monkeypatch):
    monkeypatch.setattr(assembling.importlib.util, "find_spec", lambda name: None)
    for function in (assembling.problem, products.problem, blocks_of):
        function.cache_clear()
    try:
        assert assembling.problem() == "llvmlite is not installed"
        assert blocks_of(64, 64) is None
        linear = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            assert PackedLinear(linear).product is None
    finally:
        for function in (assembling.problem, products.problem, blocks_of):
            function.cache_clear()


@needs_kernels
def test_llvm_leaves_memory_each_time_it_has_assembled():
    for number in range(2):
        name = f"nothing{number}"
        assembling.assemble(f"define void @{name}(ptr %record) {{ ret void }}", [name])
        sizes = [area for area in _mapped_areas() if assembling.CODE.search(area.path)]
        kept = sum(area.resident_bytes - area.changed_bytes for area in sizes)
        assert sizes and kept < 8 * 2**20


@needs_kernels
def test_machine_code_is_kept_and_what_is_damaged_is_made_again(tmp_path, monkeypatch):
    """By its text; LLVM's language is read once, and code that lacks a byte is not run."""
    import llvmlite.binding as llvm

    monkeypatch.setattr(assembling, "kept_in", lambda: tmp_path)
    read, parse = [], llvm.parse_assembly
    monkeypatch.setattr(llvm, "parse_assembly", lambda text: (read.append(text), parse(text))[1])

    def stored(number):
        text = f"define void @put(ptr %record) {{ store i64 {number}, ptr %record\n ret void }}"
        record = (ctypes.c_int64 * 1)()
        assembling.together(assembling.assemble(text, ["put"])["put"], record)
        return record[0], len([one for one in read if one])

    assert [stored(7), stored(7), stored(8)] == [(7, 1), (7, 1), (8, 2)]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert [stored(8), stored(8)] == [(8, 3), (8, 3)] and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(assembling, "_MOST_KEPT", 1)
    assert [stored(9), stored(9)] == [(9, 4), (9, 4)] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(
    not can_pack(torch.bfloat16, torch.device("cpu")), reason="no bf16 instructions"
)
@pytest.mark.parametrize("exact", [Exact.OFF, Exact.ON])
def test_a_shape_that_stays_plain_is_said_and_kept_for_plans(
    exact, make_tiny, tmp_path, monkeypatch, caplog
):
    """But not where passes are row-invariant: there plain weights have kernels of their own."""
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path))
    caplog.set_level("INFO", "offload_rt")
    compared, differ, others = packed.packed_exactly, (64, 128), []

    def other_bits(linear, *given, **more):
        shape = linear.out_features, linear.in_features
        unlike = shape == differ and not others
        return None if unlike else compared(linear, *given, **more) or linear

    monkeypatch.setattr(packed, "packed_exactly", other_bits)
    folder = make_tiny("llama", dtype="bfloat16", num_hidden_layers=2)
    for _ in range(2):
        with engine_for(folder, exact=exact) as engine:
            kept = {type(engine.network._layers[0].mlp.down_proj), torch.nn.Linear}
        assert kept == {torch.nn.Linear}
    said = "weights of 64 by 128 stay as they are: reordered, products have other bits"
    off = exact is Exact.OFF
    assert left_plain() == ({differ} if off else set())
    assert caplog.text.count(said) == (2 if off else 0)
    others.append("found alike later")
    with engine_for(folder, exact=exact):
        assert not left_plain()


@pytest.mark.skipif(
    not can_pack(torch.bfloat16, torch.device("cpu")), reason="no bf16 instructions"
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_shape_that_is_packed_has_the_plain_bits_of_any_weights(bias):
    """Of sums that cancel out, too, whose last bits show the order of additions."""
    generator, compared = torch.Generator().manual_seed(5), 0
    for outputs, inputs in [(32, 64), (16, 64), (48, 128), (64, 96), (128, 1056), (24, 2048)]:
        linear = torch.nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
        if (outputs, inputs) in unlike_when_packed(torch.nn.Sequential(linear)):
            continue
        compared += 1
        for _ in range(8):
            order = torch.randperm(inputs // 2, generator=generator)
            half = torch.randn(outputs, inputs // 2, generator=generator)
            linear.weight.data.copy_(torch.cat([half, -half[:, order]], 1))
            for count in (1, 1, 1, 2, 5, 16, 40):
                rows = torch.randn(count, inputs // 2, generator=generator)
                rows = torch.cat([rows, rows[:, order]], 1).to(torch.bfloat16)
                with torch.inference_mode():
                    same = torch.equal(PackedLinear(linear)(rows), linear(rows))
                assert same, (outputs, inputs, count)
    assert compared
