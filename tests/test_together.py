"""Few rows times experts as they are stored, in Triton's interpreter and on a double of a GPU."""

import ctypes
import importlib
import os

import pytest
import torch
from engines import PROMPT, all_logits, engine_for
from expert_models import make_mixture
from flash_double import flash_of_a_gpu
from quantised import write_gpt_oss
from test_cuda_numbers import ROOM
from test_launches import Launches
from value_double import open_double

from offload_rt.config import HomeKind
from offload_rt.model.formats import together, triton_kernels
from offload_rt.model.formats.fours import DECODERS
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import Stored

pytest.importorskip("triton")
FORMATS = (torch.bfloat16, torch.float16, torch.float32)
DTYPE = torch.float32


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The kernels as Triton's interpreter runs them, on memory of the host."""
    from offload_rt.model.formats import triton_rows

    def again():
        importlib.reload(triton_kernels)
        importlib.reload(triton_rows)
        together._launch.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        again()
        standard = importlib.import_module("triton.language.standard")
        patch.setattr(triton_rows, "_add", standard._sum_combine)  # else it adds one by one
        yield
    again()


def stored_of(outputs, inputs):
    sizes = {"outputs": outputs, "inputs": inputs, "groups": inputs // 32, "block": (1, 32)}
    return Stored(module="m", form=Form.MXFP4, bits=4, parts={}, **sizes)


def experts(count, outputs, inputs, seed=0):
    """Parts of MXFP4 weights, and the numbers [O, I] that torch makes of them."""
    torch.manual_seed(seed)
    groups, stored = inputs // 32, stored_of(outputs, inputs)
    found = []
    for _ in range(count):
        parts = {
            "weight_packed": torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8),
            "weight_scale": torch.randint(124, 131, (outputs, groups), dtype=torch.uint8),
        }
        numbers = torch.empty(outputs, inputs)
        DECODERS[Form.MXFP4](stored, parts, numbers)
        found.append((parts, numbers))
    return found


def multiplied(found, given, sent, biases, out):
    """Rows of `given` to rows of `out`, by way of an expert each."""
    entries = [
        [source, target, e, *together.places_of(found[e][0], torch.Tensor.data_ptr)]
        for source, target, e in sent
    ]
    stored = [tensor for parts, _ in found for tensor in parts.values()]
    together.multiply_together(given, torch.tensor(entries), stored, biases, out)
    return out


@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_are_multiplied_with_the_weights_of_their_experts(dtype):
    """Whole numbers, whose sums are exact: the bits of the product with the dequantised weight."""
    outputs, inputs = 20, 160  # fill no block
    found = experts(3, outputs, inputs)
    given = torch.randint(-8, 9, (4, inputs)).to(dtype)
    biases = torch.randint(-8, 9, (3, outputs)).to(dtype)
    sent = [(0, 5, 2), (3, 0, 0), (3, 2, 1), (1, 1, 2)]
    for bias in (biases, None):
        out = multiplied(found, given, sent, bias, torch.full((6, outputs), 7.0, dtype=dtype))
        assert (out[3:5] == 7.0).all()  # nobody's rows
        for source, target, e in sent:
            exact = found[e][1].double() @ given[source].double()
            exact += 0.0 if bias is None else bias[e].double()
            assert torch.equal(out[target], exact.float().to(dtype))
    random = torch.randn(1, inputs).to(dtype)
    alone = multiplied(found, random, [(0, 0, 1)], None, torch.empty(1, outputs, dtype=dtype))
    given = torch.cat([given[:2], random])
    among = multiplied(
        found, given, [(0, 1, 0), (2, 2, 1), (1, 0, 1)], None,
        torch.empty(3, outputs, dtype=dtype),
    )  # fmt: skip
    assert torch.equal(among[2], alone[0])
    exact = found[1][1].double() @ random[0].double()
    scale = (found[1][1].double().abs() @ random[0].double().abs()).max()
    assert (alone[0].double() - exact).abs().max() <= scale * max(torch.finfo(dtype).eps, 2e-6)


def test_extreme_scales_are_those_of_the_law():
    parts, numbers = experts(1, 8, 32)[0]
    parts["weight_scale"][:, 0] = torch.tensor([0, 1, 250, 255, 127, 2, 251, 128])
    DECODERS[Form.MXFP4](stored_of(8, 32), parts, numbers)
    given = torch.zeros(1, 32)
    given[0, 3] = 0.25
    out = multiplied([(parts, numbers)], given, [(0, 0, 0)], None, torch.empty(1, 8))
    expected = torch.where(numbers.isnan().any(1), torch.nan, numbers[:, 3] * 0.25)
    assert torch.equal(out[0].nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*(("whole", dtype) for dtype in FORMATS), ("halves", FORMATS[0]), ("transposed", FORMATS[0])],
)
def test_rows_are_multiplied_with_experts_that_are_not_quantised(form, dtype):
    """Whole numbers, whose sums are exact; sizes that fill no block, weights at odd places."""
    outputs, inputs = 42, 150
    given = torch.randint(-8, 9, (4, inputs)).to(dtype)
    biases = torch.randint(-8, 9, (3, outputs)).to(dtype)
    memory = torch.randint(-8, 9, (3, outputs * inputs + 1)).to(dtype)
    whole = [one[1:].view(outputs, inputs) for one in memory]
    numbers = whole
    if form == "transposed":
        whole = [one[1:].view(inputs, outputs) for one in memory]
        numbers = [one.T for one in whole]
    halves = [one.chunk(2) if form == "halves" else (one, one) for one in whole]
    sent = [(0, 5, 2), (3, 0, 0), (3, 2, 1), (1, 1, 2)]
    entries = [[s, t, e, *(half.data_ptr() for half in halves[e])] for s, t, e in sent]
    half = outputs // 2 if form == "halves" else outputs
    for bias in (biases, None):
        out = torch.full((6, outputs), 7.0, dtype=dtype)
        table, flat = torch.tensor(entries), [part for pair in halves for part in pair]
        together.multiply_plain(given, table, flat, bias, out, half, form == "transposed")
        assert (out[3:5] == 7.0).all()  # nobody's rows
        for source, target, e in sent:
            exact = numbers[e].double() @ given[source].double()
            exact += 0.0 if bias is None else bias[e].double()
            assert torch.equal(out[target], exact.float().to(dtype))


def as_torch(table, given, biases, out, has_bias, kind, half=0, transposed=False):
    """What the kernels do, of fp32, from what lies at the addresses of the table."""
    assert kind == FORMATS.index(torch.float32)
    outputs, inputs = out.shape[1], given.shape[1]
    for source, target, e, *places in table.tolist():
        if half:
            parts = [
                torch.frombuffer((ctypes.c_float * (half * inputs)).from_address(at), dtype=DTYPE)
                for at in places[: outputs // half]
            ]
            weight = torch.cat(parts).view((inputs, outputs) if transposed else (outputs, inputs))
            made = ((weight.T if transposed else weight).double() @ given[source].double()).float()
            out[target] = made + biases[e] if has_bias else made
            continue
        sizes = outputs * inputs // 2, outputs * inputs // 32
        codes, scales = (
            torch.frombuffer((ctypes.c_uint8 * n).from_address(at), dtype=torch.uint8)
            for n, at in zip(sizes, places, strict=True)
        )
        parts = {"weight_packed": codes.view(outputs, -1), "weight_scale": scales.view(outputs, -1)}
        weight = torch.empty(outputs, inputs)
        DECODERS[Form.MXFP4](stored_of(outputs, inputs), parts, weight)
        made = (weight.double() @ given[source].double()).float()
        out[target] = made + biases[e] if has_bias else made


@pytest.fixture
def flash(monkeypatch):
    """What attends on a GPU, in fp32 too."""
    with flash_of_a_gpu(torch.float32):
        yield
        monkeypatch.undo()  # kinds it put in meanwhile are to go before those that were


@pytest.fixture
def gpt_oss(make_tiny, tmp_path, monkeypatch, flash):
    """A tiny gpt-oss in MXFP4 on a double of a GPU that multiplies stored weights, or does not."""
    folder = write_gpt_oss(
        make_mixture(make_tiny, "gpt_oss", intermediate_size=64, num_hidden_layers=2), tmp_path
    ).folder

    def run(*, there, work=all_logits, **config):
        monkeypatch.setattr(together, "is_there", lambda device: there)
        monkeypatch.setattr(together, "_launch", lambda: as_torch)
        open_double(monkeypatch)
        with engine_for(folder, **ROOM, **config) as engine:
            return work(engine)

    return run


def test_experts_that_come_have_the_bits_of_those_that_stay(gpt_oss):
    resident = gpt_oss(there=True, resident_layers=2)
    assert torch.equal(gpt_oss(there=True, expert_slots=3, home=HomeKind.HOST), resident)
    assert torch.equal(gpt_oss(there=True, expert_slots=3, home=HomeKind.DISK), resident)
    other = gpt_oss(there=False, resident_layers=2)  # dequantised, another rounding
    assert not torch.equal(other, resident)
    assert (other - resident).abs().max() <= 1e-4 * other.abs().max()


def test_a_layer_launches_two_products_whatever_its_experts(gpt_oss):
    """Where all are in slots: two products and one upload, instead of some twenty kernels each."""

    def launches(engine):
        engine.forward([(0, PROMPT)], reuse=True)
        engine.forward([(0, [3])], reuse=False)
        with Launches() as counted:
            engine.forward([(0, [3])], reuse=False)
        return counted.names

    names = gpt_oss(there=True, work=launches, expert_slots=8, home=HomeKind.HOST)
    apart = gpt_oss(there=False, work=launches, expert_slots=8, home=HomeKind.HOST)
    assert names.count("offload_rt::multiply_together") == 2 * 2
    assert len(apart) - len(names) >= 2 * 20


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe"])
def test_plain_experts_are_multiplied_in_one(make_tiny, monkeypatch, flash, name):
    """Gate and up in one tensor or two, transposed with biases, rows of one tensor of all."""
    folder = make_mixture(make_tiny, name, num_hidden_layers=2)
    asked = []

    def run(*, there, slots, work=all_logits):
        monkeypatch.setattr(together, "is_there", lambda device: there)
        monkeypatch.setattr(together, "_launch", lambda: as_torch)
        open_double(monkeypatch)
        config = {"expert_slots": slots, "home": HomeKind.HOST}
        with engine_for(folder, **ROOM, **config) as engine:
            return work(engine)

    def names(engine):
        engine.forward([(0, PROMPT)], reuse=True)
        with Launches() as counted:
            engine.forward([(0, [3])], reuse=False)
        asked.append(counted.names.count("offload_rt::multiply_plain_together"))

    few, many = run(there=True, slots=3), run(there=True, slots=8)
    assert torch.equal(few, many)
    other = run(there=False, slots=8)
    assert (few - other).abs().max() <= 1e-4 * other.abs().max()
    run(there=True, slots=8, work=names)
    assert asked[0] >= 2 * 2
