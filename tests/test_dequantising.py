"""Who dequantises integers makes no difference: torch in one thread or several, or kernels.

Nor does it whether a weight is dequantised into memory or while it is multiplied.

Kernels are compiled for this processor, and for ones without its wide instructions.
"""

import os
import sys
from dataclasses import replace

import forks
import pytest
import torch
from engines import PROMPT, engine_for
from quantised import compressed_tensors, gptq, write_twins

from offload_rt.config import Exact, GenerationConfig, SamplingConfig
from offload_rt.device import compiled
from offload_rt.engine import Run
from offload_rt.kernels import assembling, products, registers
from offload_rt.kernels import stored as stored_kernels
from offload_rt.kernels.tiles import in_tiles
from offload_rt.model.formats import brought, direct, integers
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import BLOCK_NUMBERS, Stored
from offload_rt.model.formats.wired import wired_linears

with_numba = pytest.mark.skipif(bool(compiled.problem()), reason=f"numba: {compiled.problem()}")
CPU = torch.device("cpu")
TORCH = {
    Form.PACKED: integers.bring_packed,
    Form.AWQ: integers.bring_awq,
    Form.GPTQ: integers.bring_gptq,
    Form.GPTQ_V2: integers.bring_gptq,
}
# Form, outputs, inputs, bits, group, zero points are given, inputs are in any order.
CASES = [
    (Form.PACKED, 7, 96, 4, 32, False, False),
    (Form.PACKED, 70, 128, 4, 64, True, False),
    (Form.PACKED, 9, 256, 8, 256, True, False),
    (Form.PACKED, 9, 128, 4, 32, True, True),
    (Form.PACKED, 5, 64, 8, 32, False, True),
    (Form.AWQ, 24, 64, 4, 32, True, False),
    (Form.AWQ, 136, 192, 4, 192, True, False),
    (Form.GPTQ, 40, 128, 4, 64, True, False),
    (Form.GPTQ, 24, 64, 8, 32, True, True),
    (Form.GPTQ_V2, 80, 96, 4, 32, True, True),
]


def weight(form, outputs, inputs, bits, group, zeros, shuffled, scale_dtype=torch.bfloat16):
    """A random weight; scales reach from subnormal products to ones that overflow in fp16."""
    generator = torch.Generator().manual_seed(outputs)
    groups = inputs // group

    def words(*shape):
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    scales = torch.randn(outputs, groups, generator=generator)
    scales *= 2.0 ** torch.randint(-20, 13, scales.shape, generator=generator)
    if scale_dtype is torch.bfloat16:
        scales[0, 0] = 2.0**-133  # products are subnormal in bf16
    scales = scales.to(scale_dtype)
    index = torch.arange(inputs, dtype=torch.int32) // group
    index = index[torch.randperm(inputs, generator=generator)] if shuffled else None
    if form is Form.PACKED:
        parts = {"weight_packed": words(outputs, inputs * bits // 32), "weight_scale": scales}
        if zeros:
            parts["weight_zero_point"] = words(-(-outputs * bits // 32), groups)
        word = "weight_g_idx"
    else:
        shape = (inputs, outputs // 8) if form is Form.AWQ else (inputs * bits // 32, outputs)
        parts = {"qweight": words(*shape), "scales": scales.t().contiguous()}
        parts["qzeros"] = words(groups, outputs * bits // 32)
        word = "g_idx"
    if index is not None:
        parts[word] = index
    sizes = {"outputs": outputs, "inputs": inputs, "bits": bits, "groups": groups}
    return Stored(module="m", form=form, parts={}, **sizes), parts


# As above; several of oneDNN's blocks of inputs, the last one shorter.
MULTIPLIED = [
    (Form.PACKED, 128, 1152, 4, 128, False, False),
    (Form.PACKED, 64, 2304, 4, 32, True, False),
    (Form.PACKED, 64, 1088, 8, 64, True, False),
    (Form.AWQ, 192, 1056, 4, 32, True, False),
    (Form.GPTQ, 128, 1088, 4, 64, True, False),
    (Form.GPTQ, 64, 96, 8, 32, True, True),
    (Form.GPTQ_V2, 128, 2080, 4, 32, True, True),
]
REGISTERS = registers.problem()
needs_products = pytest.mark.skipif(
    bool(products.problem()), reason=f"no kernels: {products.problem()}"
)


def bits_of(bring, stored, parts, dtype):
    out = torch.full((stored.outputs, stored.inputs), 7.0).to(dtype)
    bring(stored, parts, out)
    return out.view(torch.int16).tolist()


def check_kernels():
    """All cases by kernels and by torch, in both formats of 16 bits."""
    for case in CASES:
        for scale_dtype in (torch.bfloat16, torch.float16, torch.float32):
            stored, parts = weight(*case, scale_dtype=scale_dtype)
            for dtype in (torch.bfloat16, torch.float16):
                kernel = brought.bring_for(stored, dtype, CPU)
                if kernel is None:
                    assert dtype is torch.float16 and "f16c" not in features()
                    continue
                expected = bits_of(TORCH[stored.form], stored, parts, dtype)
                assert bits_of(kernel, stored, parts, dtype) == expected, (case, dtype)


def features():
    from offload_rt.model.formats.compiled_integers import features as found

    return found()


@pytest.mark.skipif(not integers._has_rows(), reason="torch has no embeddings of 4 bits here")
def test_rows_of_an_embedding_have_the_bits_of_shifts(monkeypatch):
    """Of 4 bits with fp16 scales above 0 in bf16; with others nothing is made so."""
    taken, made = [], integers._as_rows
    for case in CASES:
        stored, parts = weight(*case, scale_dtype=torch.float16)
        name = "weight_scale" if stored.form is Form.PACKED else "scales"
        parts[name] = parts[name].abs()
        asked = {"stored": stored, "parts": parts, "dtype": torch.bfloat16}
        with monkeypatch.context() as patch:
            patch.setattr(integers, "_as_rows", lambda *all: taken.append(made(*all)) or taken[-1])
            found = bits_of(TORCH[stored.form], **asked)
        monkeypatch.setattr(integers, "_as_rows", lambda *_: False)
        assert found == bits_of(TORCH[stored.form], **asked), case
    assert any(taken)


@with_numba
def test_kernels_compute_what_torch_does():
    brought.prepare()
    check_kernels()


@with_numba
@pytest.mark.parametrize(
    ("cpu", "can", "has", "lacks"),
    [("x86-64-v3", "+ssse3,+f16c,+avx2", "f16c", "avx512f"), ("x86-64", "+sse2", "sse2", "ssse3")],
)
def test_so_do_kernels_for_other_processors(cpu, can, has, lacks):
    if "x86" not in os.uname().machine:
        pytest.skip("processors of another kind")
    import llvmlite.binding as llvm

    if has not in [name for name, here in llvm.get_host_cpu_features().items() if here]:
        pytest.skip(f"this processor has no {has}")
    script = (
        "import test_dequantising as t\n"
        f"found = t.features()\nassert {has!r} in found and {lacks!r} not in found, found\n"
        "t.brought.prepare()\nt.check_kernels()\nprint('equal')\n"
    )
    variables = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": can}
    if folder := compiled.kept_in():  # where each kernel is kept by the processor
        variables["NUMBA_CACHE_DIR"] = str(folder)
    command, environment = [sys.executable, "-c", script], os.environ | variables
    done = forks.run(command, env=environment)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


def multiplied(case):
    """A weight, what torch dequantises, and rows to multiply."""
    stored, parts = weight(*case)
    stored = replace(stored, parts=dict.fromkeys(parts))
    out = torch.empty(stored.outputs, stored.inputs, dtype=torch.bfloat16)
    TORCH[stored.form](stored, parts, out)
    assert out.isfinite().all()
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(40, stored.inputs, generator=generator).to(torch.bfloat16)
    return stored, parts, out, rows


@needs_products
@pytest.mark.parametrize("case", MULTIPLIED, ids=lambda case: f"{case[0]} {case[3]} {case[6]}")
def test_products_with_what_is_stored_are_those_of_what_it_means(case):
    stored, parts, out, rows = multiplied(case)
    bias = torch.linspace(-1, 1, stored.outputs).to(torch.bfloat16)
    for exact in (False, True):
        in_order = not case[6]
        made = direct.direct_for(stored, torch.bfloat16, CPU, exact=exact, in_order=in_order)
        assert made is not None
        for count in (1, 2, 7, 40):
            for added in (bias, None):

                def plain(given, added=added):
                    return torch.nn.functional.linear(given, out, added)

                some = rows[:count]
                expected = in_tiles(plain, some) if exact else plain(some)
                assert torch.equal(made(some, parts, added), expected)
    if stored.form is Form.PACKED:
        parts["weight_packed"][0] ^= 1  # the lowest bit of every word of an output
    else:
        parts["qweight"][:, 0] ^= 1
    changed = made(rows, parts, None) != in_tiles(plain, rows)
    assert changed.any(dim=0).nonzero().tolist() == [[0]]


@needs_products
@pytest.mark.skipif(bool(REGISTERS), reason=REGISTERS)
@pytest.mark.parametrize("case", MULTIPLIED, ids=lambda case: f"{case[0]} {case[3]} {case[6]}")
def test_in_matrix_registers_too(case, monkeypatch):
    monkeypatch.setattr(stored_kernels, "multiplies_in_registers", lambda *_: True)
    stored, parts, out, rows = multiplied(case)
    in_order = not case[6]
    made = direct.direct_for(stored, torch.bfloat16, CPU, exact=True, in_order=in_order)
    plain = direct.plain_for(stored.inputs, stored.outputs, torch.bfloat16, CPU, exact=True)
    bias = torch.linspace(-1, 1, stored.outputs).to(torch.bfloat16)
    assert torch.equal(made(rows, parts, bias), plain(rows, out, bias))


@needs_products
def test_where_no_kernel_gives_the_bits_a_weight_is_dequantised(monkeypatch):
    options = {"exact": True, "in_order": True}
    for case in (
        (Form.PACKED, 128, 192, 4, 32, False, False),  # no 16 words
        (Form.PACKED, 96, 256, 4, 32, False, False),  # no panel of outputs
        (Form.PACKED, 128, 256, 4, 16, False, False),
    ):
        stored, _ = weight(*case)
        assert direct.direct_for(stored, torch.bfloat16, CPU, **options) is None
    stored, parts = weight(*MULTIPLIED[0])
    assert direct.direct_for(stored, torch.bfloat16, CPU, **options) is not None
    assert direct.direct_for(stored, torch.float16, CPU, **options) is None
    monkeypatch.setattr(direct, "product_for", lambda *_, **__: None)
    assert direct.direct_for(stored, torch.bfloat16, CPU, **options) is None


@needs_products
def test_a_model_is_the_same_whether_its_weights_are_written_out(make_tiny, tmp_path, monkeypatch):
    sizes = {"hidden_size": 128, "intermediate_size": 1152, "num_hidden_layers": 2}
    source = make_tiny("llama", **sizes, dtype="bfloat16", pad_token_id=0)
    convert = compressed_tensors(4, 64, symmetric=False)
    twins = write_twins(source, tmp_path / "model", *convert, dtype=torch.bfloat16)
    found = {}
    for who in (assembling.who(), compiled.who()):
        for config in ({"exact": Exact.ON, "resident_layers": 0}, {"exact": Exact.ON}):
            with engine_for(twins.folder, **config) as engine:
                report = Run.start(engine, [PROMPT], SamplingConfig(), GenerationConfig()).report()
                assert report.dequantising.decoder == who
                assert report.exact.on
                together = engine.forward([(0, PROMPT)], reuse=True).clone()
                engine.truncate(0, 0)
                alone = [engine.forward([(0, [t])], reuse=False).clone() for t in PROMPT]
                assert torch.equal(alone[-1], together)
                found[who, len(config)] = together
        monkeypatch.setattr(direct, "multiplies", lambda *_, **__: False)
    (first, *others) = found.values()
    assert all(torch.equal(first, other) for other in others)
    with engine_for(twins.plain, exact=Exact.ON) as engine:
        assert torch.equal(engine.forward([(0, PROMPT)], reuse=True), first)


@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[9]], ids=lambda case: case[0])
def test_threads_of_torch_change_nothing_and_stay_as_many(case, monkeypatch):
    monkeypatch.setitem(BLOCK_NUMBERS, "cpu", 1024)
    stored, parts = weight(*case)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = bits_of(TORCH[stored.form], stored, parts, torch.bfloat16)
        torch.set_num_threads(3)
        assert bits_of(TORCH[stored.form], stored, parts, torch.bfloat16) == alone
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_index_in_order_is_left_alone_and_the_decoder_is_reported(
    make_tiny, tmp_path, dtype, monkeypatch
):
    source = make_tiny("llama", dtype=dtype, pad_token_id=0)
    monkeypatch.setattr(direct, "multiplies", lambda *_, **__: False)
    compiles = dtype == "bfloat16" and not compiled.problem()
    for shuffled in (False, True):
        convert = gptq(4, 32, shuffled=shuffled)
        twins = write_twins(source, tmp_path / f"{shuffled}", *convert, dtype=getattr(torch, dtype))
        with engine_for(twins.folder) as engine:
            linears = wired_linears(engine.network._model)
            assert {linear.in_order for linear in linears} == {not shuffled}
            options = GenerationConfig(max_tokens=1)
            report = Run.start(engine, [PROMPT], SamplingConfig(), options).report()
        expected = compiled.who() if compiles else "torch"
        assert report.dequantising.decoder == expected
