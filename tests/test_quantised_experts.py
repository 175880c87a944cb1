"""Experts whose weights are quantised: as units, in layer images, and refused."""

import json

import pytest
import torch
from engines import PROMPT, all_logits, engine_for, generate, reference_model
from expert_models import make_mixture
from quantised import CASES, write_gpt_oss, write_twins
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from offload_rt.config import Exact, HomeKind
from offload_rt.costs.sizes import experts_of as images_of
from offload_rt.costs.workload import parts_of
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.kinds import CPU, Packing
from offload_rt.errors import CheckpointError
from offload_rt.kernels import products
from offload_rt.kernels import stored as stored_kernels
from offload_rt.kernels.registers import problem as registers_problem
from offload_rt.model import exact
from offload_rt.model import experts as experts_module
from offload_rt.model import network as network_module
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.expert_layout import plan_units
from offload_rt.model.network import experts_of
from offload_rt.model.outline import outline_checkpoint

KEPT = ("gate", "router", "shared_expert_gate")
# What is quantised in which way: experts, and here all linears of layers besides.
TWINS = {
    "gpt_oss MXFP4": ("gpt_oss", None),
    "qwen3_moe W4": ("qwen3_moe", "W4 g32"),
    "mixtral AWQ": ("mixtral", "AWQ g32"),
    "qwen2_moe GPTQ": ("qwen2_moe", "GPTQ 8 g32 act-order v2"),
    "qwen3_moe fp8": ("qwen3_moe", "fp8 blocks bf16 scales"),
    "olmoe NVFP4": ("olmoe", "NVFP4"),
}


@pytest.fixture(scope="module")
def twins_of(make_tiny, tmp_path_factory):
    """A mixture in a quantised format, and the plain one of the same numbers."""
    made = {}

    def make(name, dtype="float32"):
        if (name, dtype) not in made:
            family, case = TWINS[name]
            size = {"num_hidden_layers": 2}
            size |= {"intermediate_size": 64} if family == "gpt_oss" else {}
            source = make_mixture(make_tiny, family, dtype=dtype, **size)
            folder, number = tmp_path_factory.mktemp("twins"), getattr(torch, dtype)
            made[name, dtype] = (
                write_gpt_oss(source, folder, number)
                if case is None
                else write_twins(source, folder, *CASES[case], dtype=number, kept=KEPT)
            )
        return made[name, dtype]

    return make


# Each size of a pool and each home for two formats; for each other one of them, in turn.
PLACES = (3, HomeKind.DISK), (5, HomeKind.HOST), (7, HomeKind.DISK)


@pytest.mark.parametrize("name", ["gpt_oss MXFP4", "qwen3_moe W4"])
def test_any_number_of_slots_gives_the_same_bits_as_all_in_memory(twins_of, name):
    folder = twins_of(name, "bfloat16").folder
    with engine_for(folder) as engine:
        assert not engine.placement.streams
        logits = all_logits(engine)
        engine.forget()
        answer = generate(engine, tokens=4)
    for slots, home in PLACES:
        with engine_for(folder, expert_slots=slots, home=home) as engine:
            assert engine.placement.expert_slots == slots
            assert generate(engine, tokens=4) == answer
            engine.forget()
            assert torch.equal(all_logits(engine), logits)


@pytest.mark.parametrize("name", TWINS)
def test_logits_have_the_bits_of_all_in_memory_and_are_those_of_dequantised_weights(twins_of, name):
    """In fp32; the latter as transformers computes them."""
    twins, (slots, home) = twins_of(name), PLACES[list(TWINS).index(name) % 2]
    with engine_for(twins.folder) as engine:
        assert not engine.placement.streams
        resident = all_logits(engine)
    with engine_for(twins.folder, expert_slots=slots, home=home) as engine, torch.no_grad():
        ours = all_logits(engine)
        theirs = reference_model(twins.plain)(torch.tensor([PROMPT + PROMPT[:3]])).logits[0]
    assert torch.equal(ours, resident)
    theirs = theirs[len(PROMPT) - 1 :]
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpt_oss_has_the_numbers_that_transformers_reads_from_its_files(twins_of, dtype):
    """L1 with the library that defines the format: the twin's numbers are its own, bit for bit."""
    twins = twins_of("gpt_oss MXFP4", dtype)
    stored = load_file(twins.folder / "model.safetensors")
    plain = load_file(twins.plain / "model.safetensors")
    for name in plain.keys() - stored.keys():
        parts = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        theirs = convert_moe_packed_tensors(*parts, dtype=getattr(torch, dtype))
        assert torch.equal(theirs, plain[name]), name
    with engine_for(twins.folder, expert_slots=5) as engine:
        ours = all_logits(engine)
    if dtype == "bfloat16":
        with engine_for(twins.plain, expert_slots=5) as engine:
            assert torch.equal(all_logits(engine), ours)
        return
    with torch.no_grad():  # fp32 kernels sum by alignment, and attention is theirs
        theirs = reference_model(twins.folder)(torch.tensor([PROMPT + PROMPT[:3]])).logits[0]
    theirs = theirs[len(PROMPT) - 1 :]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", ["gpt_oss MXFP4", "qwen3_moe W4"])
def test_whole_layers_give_the_same_bits(twins_of, name):
    folder = twins_of(name).folder
    with engine_for(folder, expert_slots=5) as engine:
        logits = all_logits(engine)
    with engine_for(folder, resident_layers=0) as engine:
        assert len(engine.placement.streamed) == 2 and not engine.placement.expert_slots
        assert torch.equal(all_logits(engine), logits)


def test_an_expert_is_a_unit_of_the_bytes_of_the_files(twins_of):
    """Codes and scales of gpt-oss are slices: an expert has four runs, and nothing is converted."""
    checkpoint = open_checkpoint(twins_of("gpt_oss MXFP4").folder)
    units = plan_units(experts_of(checkpoint, "bfloat16"), "bfloat16", Packing.FILE)
    of_one = 64 * 2 * (32 + 2) + 64 * (32 + 2)  # [2I, H / 2] and [2I, H / 32], then down
    for unit in (unit for own in units.values() for unit in own):
        assert len(unit.runs) == 4 and unit.file_bytes == of_one
        assert not any(run.convert for run in unit.runs)


def test_swapped_scales_are_seen(twins_of, monkeypatch):
    folder = twins_of("gpt_oss MXFP4").folder
    with engine_for(folder, expert_slots=7) as engine:
        logits = all_logits(engine)
    with engine_for(folder, expert_slots=7) as engine:
        pool = engine.runner.experts
        source = pool._source
        pool._source = lambda layer, expert: source(layer, {0: 1, 1: 0}.get(expert, expert))
        assert not torch.equal(all_logits(engine), logits)


@pytest.mark.parametrize("name", ["gpt_oss MXFP4", "qwen3_moe W4", "mixtral AWQ"])
def test_config_json_alone_says_the_sizes(twins_of, tmp_path, name):
    folder = twins_of(name, "bfloat16").folder
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    stated, real = outline_checkpoint(tmp_path), open_checkpoint(folder)
    assert stated.total_bytes == real.total_bytes
    ours, theirs = (images_of(one, "auto", CPU) for one in (stated, real))
    assert ours.file_bytes == theirs.file_bytes and ours.per_token == theirs.per_token
    for one in (stated, real):
        layer = parts_of(one, "auto", CPU).layers[0]
        per_expert = 3 * 64 * (64 if name == "gpt_oss MXFP4" else 32 if "W4" in name else 128)
        experts = real.config.setting("num_local_experts") or real.config.setting("num_experts")
        assert layer.sent == 2 / experts  # biases of gpt-oss are counted as experts' too
        assert layer.expert_bytes == pytest.approx(2 * experts * per_expert, rel=0.02)
        assert sum(each.numbers for each in layer.experts_decoded) == experts * per_expert


# ---- bad files ----

BLOCKS = "model.layers.1.mlp.experts.gate_up_proj_blocks"
SCALES = "model.layers.1.mlp.experts.gate_up_proj_scales"
EXPERT = "model.layers.1.mlp.experts.1.down_proj"


def half(name):
    return lambda tensors: tensors.update({name: tensors[name][:2].contiguous()})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt_oss MXFP4", lambda t: t.pop(SCALES), "has blocks but no scales"),
        (
            "gpt_oss MXFP4",
            half(SCALES),
            r"blocks that are U8 \[4, 128, 2, 16\] and scales that are",
        ),
        (
            "gpt_oss MXFP4",
            half(BLOCKS),
            r"blocks that are U8 \[2, 128, 2, 16\] and scales that are",
        ),
        (
            "gpt_oss MXFP4",
            lambda t: (half(BLOCKS)(t), half(SCALES)(t)),
            r"expert 2 has .*down_proj:weight_packed.*expert 0 has .*gate_up_proj:weight_packed",
        ),
        (
            "qwen3_moe W4",
            lambda t: t.pop(f"{EXPERT}.weight_scale"),
            "experts.1.down_proj' has .* but no weight_scale",
        ),
        (
            "qwen3_moe W4",
            lambda t: [t.pop(f"{EXPERT}.weight_{w}") for w in ("packed", "scale", "shape")],
            "expert 1 has .*expert 0 has .*down_proj:weight_packed",
        ),
        (
            "qwen3_moe W4",
            lambda t: t.update(
                {
                    f"{EXPERT}.weight_packed": t[f"{EXPERT}.weight_packed"][:32].contiguous(),
                    f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:32].contiguous(),
                    f"{EXPERT}.weight_shape": torch.tensor([32, 32]),
                }
            ),
            r"expert 1 has .*down_proj:weight_packed' \[32, 4\].*expert 0 has",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_allocated(
    twins_of, tmp_path, monkeypatch, name, change, message
):
    monkeypatch.setattr(CpuDevice, "allocate", None)
    folder = bad(twins_of, tmp_path, name, change)
    with pytest.raises(CheckpointError, match=message), engine_for(folder):
        pass


def bad(twins_of, target, name, change):
    """The model with other tensors."""
    folder = twins_of(name).folder
    for path in folder.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_such_files_end_with_code_4(twins_of, tmp_path, offload_run):
    for part, change in (("a", half(BLOCKS)), ("b", lambda t: (half(BLOCKS)(t), half(SCALES)(t)))):
        (tmp_path / part).mkdir()
        folder = bad(twins_of, tmp_path / part, "gpt_oss MXFP4", change)
        done = offload_run("plan", folder, "--context", 64)
        assert done.code == 4 and "download" in done.err.splitlines()[-1]


def test_a_dense_model_has_no_experts_in_mxfp4(make_tiny, tmp_path, offload_run):
    config = json.loads((make_tiny("llama") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = offload_run("plan", tmp_path, "--context", 64)
    assert done.code == 4 and "none that could be" in done.err


@pytest.mark.parametrize("name", ["gpt_oss MXFP4", "qwen3_moe W4"])
def test_a_row_has_the_same_bits_in_any_pass(twins_of, name):
    """Row-invariant passes: a prompt at once, and token by token, in slots."""
    with engine_for(
        twins_of(name, "bfloat16").folder, exact=Exact.ON, expert_slots=5, prefill_chunk_tokens=64
    ) as engine:
        rows = [engine.forward([(0, [token])], reuse=False).clone() for token in PROMPT]
        engine.forget()
        assert torch.equal(engine.forward([(0, PROMPT)], reuse=True)[-1], rows[-1][-1])


def registers_fit(inputs, outputs):
    return outputs % 64 == 0 and inputs % 32 == 0


@pytest.mark.skipif(bool(products.problem()), reason=f"no kernels: {products.problem()}")
@pytest.mark.parametrize(
    ("case", "registers"), [(None, False), ("W4 g32", False), ("MXFP4", False), ("W4 g32", True)]
)
def test_experts_at_once_have_the_bits_of_one_after_the_other(
    make_tiny, tmp_path, monkeypatch, case, registers
):
    """Whatever was there, and where a form has no kernel (MXFP4)."""
    if registers and registers_problem():
        pytest.skip(registers_problem())
    fits = registers_fit if registers else lambda *_: False
    monkeypatch.setattr(stored_kernels, "multiplies_in_registers", fits)
    monkeypatch.setattr(exact, "multiplies_in_registers", fits)
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2}
    source = make_mixture(make_tiny, "qwen3_moe", dtype="bfloat16", **sizes)
    folder = source
    if case is not None:
        folder = write_twins(source, tmp_path, *CASES[case], dtype=torch.bfloat16, kept=KEPT).folder
    calls = []
    together = experts_module.multiply_all
    monkeypatch.setattr(
        experts_module, "multiply_all", lambda tasks: (calls.append(len(tasks)), together(tasks))
    )
    found = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(network_module, "multiply_at_once", lambda module: None)
        for slots in (None, 5):
            calls.clear()
            with engine_for(folder, exact=Exact.ON, expert_slots=slots) as engine:
                found.append(all_logits(engine))
            assert (max(calls, default=0) > 2) == (at_once and case != "MXFP4"), (at_once, slots)
    assert [torch.equal(one, found[0]) for one in found] == [True] * 4


@pytest.mark.skipif(bool(products.problem()), reason=f"no kernels: {products.problem()}")
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_few_rows_take_experts_at_once_where_passes_need_not_be_row_invariant_too(
    make_tiny, monkeypatch, name, registers
):
    """Any slots have the same bits; not where more than an activation is between two products."""
    if registers and registers_problem():
        pytest.skip(registers_problem())
    fits = registers_fit if registers else lambda *_: False
    monkeypatch.setattr(stored_kernels, "multiplies_in_registers", fits)
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}
    folder = make_mixture(make_tiny, name, dtype="bfloat16", **sizes, num_hidden_layers=2)
    calls, together = [], experts_module.multiply_all
    monkeypatch.setattr(
        experts_module, "multiply_all", lambda tasks: (calls.append(len(tasks)), together(tasks))
    )
    few, many, found = PROMPT[:1], [token % 60 for token in range(200)], []
    for slots in (None, 5):
        with engine_for(
            folder, exact=Exact.OFF, expert_slots=slots, prefill_chunk_tokens=256, tokens=210
        ) as engine:
            made = []
            for rows in (few, PROMPT, many):
                calls.clear()
                made.append(engine.forward([(0, rows)], reuse=False).clone())
                assert bool(calls) == (name == "qwen3_moe" and len(rows) < 200)
            found.append(torch.cat(made))
    assert [torch.equal(one, found[0]) for one in found] == [True] * 2
