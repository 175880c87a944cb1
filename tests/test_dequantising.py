"""Who dequantises integers makes no difference: torch in one thread or several, or kernels.

Kernels are compiled for this processor, and for ones without its wide instructions.
"""

import os
import subprocess
import sys

import pytest
import torch
from engines import PROMPT, engine_for
from quantised import gptq, write_twins

from offload_rt.config import GenerationConfig, SamplingConfig
from offload_rt.device import compiled
from offload_rt.engine import Run
from offload_rt.model.formats import brought, integers
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


@with_numba
def test_kernels_compute_what_torch_does():
    brought.prepare()
    check_kernels()


@with_numba
@pytest.mark.parametrize(
    ("cpu", "can", "has", "lacks"),
    [("x86-64-v3", "+ssse3,+f16c,+avx2", "f16c", "avx512f"), ("x86-64", "+sse2", "sse2", "ssse3")],
)
def test_so_do_kernels_for_other_processors(cpu, can, has, lacks, tmp_path):
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
    variables = {
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": can,
        "OFFLOAD_RT_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    command, environment = [sys.executable, "-c", script], os.environ | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


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
def test_an_index_in_order_is_left_alone_and_the_decoder_is_reported(make_tiny, tmp_path, dtype):
    source = make_tiny("llama", dtype=dtype, pad_token_id=0)
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
