"""Sizes of quantised models from config.json alone, and the refusals of what is not read."""

import json
import shutil
from dataclasses import replace

import pytest
from quantised import CASES, mixed, write_twins

from offload_rt.costs.sizes import stored_sizes
from offload_rt.costs.workload import parts_of
from offload_rt.device import compiled
from offload_rt.device.kinds import CPU, CUDA, Processor
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.config import QuantisedError
from offload_rt.model.formats.methods import Method, read_method
from offload_rt.model.formats.stated import is_kept
from offload_rt.model.outline import open_or_outline, outline_checkpoint
from offload_rt.profiling import decoding
from offload_rt.profiling.decoding import SHARES, decoded_per_s
from offload_rt.profiling.profile import Decoder, Obtained
from offload_rt.profiling.store import find_profile, load_profile
from offload_rt.session import means

# As the tools write scales; others of `quantised.py` have them in other formats for the laws.
AS_WRITTEN = [
    "W4 g32",
    "W4 g32 asymmetric",
    "W3 g32",
    "W8 g16 asymmetric",
    "AWQ g32",
    "GPTQ 4 g32",
    "GPTQ 3 g16 act-order",
    "FP8 channel bf16 scales",
    "MXFP8",
    "W8 channel bytes asymmetric",
    "NVFP4",
    "MXFP4",
    "fp8 blocks",
    "fp8 one scale",
    "fbgemm_fp8",
    "ModelOpt FP8",
    "ModelOpt NVFP4",
    "nf4",
    "nf4 nested",
    "int8",
]


def alone(folder, target):
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    return target


@pytest.mark.parametrize("case", AS_WRITTEN)
def test_config_json_alone_has_the_bytes_of_the_files(make_tiny, tmp_path, case):
    source = make_tiny("qwen2", dtype="bfloat16", num_hidden_layers=2)
    folder = write_twins(source, tmp_path / "made", *CASES[case]).folder
    real = open_checkpoint(folder)
    made, from_files = open_or_outline(alone(folder, tmp_path / "alone"))
    assert not from_files
    for ours, theirs in zip((*made.layers, made.others), (*real.layers, real.others), strict=True):
        assert sorted(e.nbytes for e in ours) == sorted(e.nbytes for e in theirs)
    weights = {each.module: each for each in made.stored.values()}
    for each in real.stored.values():
        one = weights[each.module]
        facts = (one.form, one.outputs, one.inputs, one.bits, one.nbytes)
        assert facts == (each.form, each.outputs, each.inputs, each.bits, each.nbytes)


def test_families_whose_sizes_are_transformers_own(make_tiny, tmp_path):
    """Its modules would compute with what is outlined."""
    source = make_tiny("helium", dtype="bfloat16", num_hidden_layers=2)
    folder = write_twins(source, tmp_path / "made", *CASES["AWQ g32"]).folder
    made = outline_checkpoint(alone(folder, tmp_path / "alone"))
    assert made.layer_bytes(1) == open_checkpoint(folder).layer_bytes(1)


AWQ_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128},
}


def test_plan_and_simulate_of_a_quantised_config_say_three_sizes(tmp_path, offload_run):
    (tmp_path / "config.json").write_text(json.dumps(AWQ_70B))
    where = ("--device", "cuda", "--device-memory", "23GiB", "--profile", "rtx4090-pcie4x16")
    simulated = offload_run("simulate", tmp_path, *where, "--json")
    assert simulated.code == 0, simulated.err
    facts = json.loads(simulated.out)
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    sizes = facts["quantised"]
    assert sizes["weights"] == 80 * layer
    # 4 bits, and for each 128 of them a scale of 16 and a zero point of 4
    assert sizes["file_bytes"] == 80 * layer * (4 + 20 / 128) / 8
    assert sizes["computed_bytes"] == 80 * layer * 2
    norms = 2 * 8192 * 2
    each = facts["bytes_per_pass"] / facts["streamed_layers"]
    assert each == pytest.approx(sizes["file_bytes"] / 80 + norms, rel=1e-3)
    planned = offload_run("plan", tmp_path, *where, "--draft", "none", "--json")
    assert json.loads(planned.out)["quantised"] == sizes
    shown = " ".join(offload_run("simulate", tmp_path, *where).out.split())
    assert "quantised: AWQ, 4-bit, 33.1 GiB in the files and on the way, 128 GiB as they" in shown


def test_models_quantised_in_several_ways_are_sized_by_their_files(make_tiny, tmp_path):
    source = make_tiny("llama", dtype="bfloat16", num_hidden_layers=2)
    modules = {"self_attn": "W4 g32", "mlp": "FP8 channel"}
    folder = write_twins(source, tmp_path / "made", *mixed(modules)).folder
    sizes = stored_sizes(open_checkpoint(folder), "auto", CPU)
    assert sizes.method == "compressed-tensors, 4- and 8-bit (fp8, packed)"
    with pytest.raises(QuantisedError, match="in several ways, and their sizes are read from w"):
        outline_checkpoint(alone(folder, tmp_path / "alone"))


@pytest.mark.parametrize("name", ["cpu-2core-avx512", "cpu-2core-avx512bf16", None])
def test_forms_that_no_profile_timed_are_counted_by_their_share(name):
    """Of the profile's own integers; of nothing as the slowest that was timed."""
    made = load_profile(find_profile(name or "cpu-2core-avx512"))
    made = made if name else replace(made, dequantising=())

    def rate(form, bits=8, decoder=Decoder.TORCH):
        found = decoded_per_s(made, Processor.CPU, decoder, form, bits)
        assert found.obtained is Obtained.MEASURED or "RESULTS.md" in found.source
        return found.value

    integers = rate("packed", 4)
    for (form, bits), share in SHARES.items():
        if form not in ("packed", "awq", "gptq"):  # which were timed
            assert rate(form, bits) == pytest.approx(share * integers), form
    assert rate("fp8") > 0.4 * integers > 1.5 * rate("awq", 4) > rate("packed", 3)
    assert rate("gptq_v2", 4) == rate("gptq", 4) and rate("nvfp4_product", 4) == rate("nvfp4", 4)
    assert rate("awq", 4, Decoder.COMPILED) < rate("packed", 4, Decoder.COMPILED) / 3
    coded = [rate("coded", 12, decoder) for decoder in Decoder]
    assert coded == [2.3e9, 6.5e9]


@pytest.mark.parametrize("kernels", [True, False])
def test_a_stand_in_has_the_kernels_that_are_here(monkeypatch, kernels):
    """Not so a profile that was asked for: it is of its own machine."""
    monkeypatch.setattr(means, "list_profiles", dict)
    monkeypatch.setattr(compiled, "problem", lambda: "" if kernels else "not installed")
    monkeypatch.setattr(decoding, "kernels_multiply", lambda **_: kernels)
    found, own = means.profile_for(None, CPU)
    assert not own
    assert decoding.compiles(found) is decoding.multiplies(found) is kernels
    monkeypatch.setattr(decoding, "processor", lambda: ("another", ""))
    for name, multiplies in (("cpu-2core-avx512bf16", True), ("cpu-2core-avx512", False)):
        asked, _ = means.profile_for(name, CPU)
        assert decoding.compiles(asked) and decoding.multiplies(asked) is multiplies


def test_what_no_kernel_dequantises_on_a_gpu_is_counted_as_torchs(make_tiny, tmp_path):
    made = load_profile(find_profile("rtx4090-pcie4x16"))
    per_s = {}
    for case in ("W4 g32", "W3 g32", "FP8 channel", "nf4", "int8"):
        twins = write_twins(make_tiny("llama", dtype="bfloat16"), tmp_path / case, *CASES[case])
        parts = parts_of(open_checkpoint(twins.folder), "auto", CUDA)
        ((d,),) = {layer.decoded for layer in parts.layers}
        number = decoded_per_s(made, Processor.CUDA, d.decoder, d.form, d.bits)
        assert number.obtained is Obtained.ASSUMED and "4090" in number.source
        per_s[case] = number.value
    assert per_s["W4 g32"] == per_s["FP8 channel"] == 175e9
    assert per_s["nf4"] == pytest.approx(806.4e9 / 19) and per_s["int8"] < per_s["nf4"]
    assert per_s["W3 g32"] < per_s["nf4"] / 5


def test_groups_that_divide_no_weight_are_refused(tmp_path):
    stated = AWQ_70B["quantization_config"] | {"group_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(AWQ_70B | {"quantization_config": stated}))
    with pytest.raises(CheckpointError, match="cannot be quantised as config.json says"):
        outline_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kept", "module", "says"),
    [
        ("lm_head", "lm_head", True),
        ("re:.*lm_head", "lm_head", True),
        ("re:.*self_attn.*", "model.layers.0.self_attn.q_proj", True),
        (r"re:model\.layers\.\d+\.mlp\.gate_proj$", "model.layers.3.mlp.gate_proj", True),
        (r"re:.*mlp.gate$", "model.layers.3.mlp.gate_proj", False),
        ("model.layers.0", "model.layers.0.mlp.up_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("model.layers.0*", "model.layers.0.mlp.up_proj", True),
        ("up_proj", "model.layers.0.mlp.up_proj", True),
        ("self_attn", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("re:(a+)+$", "a" * 60 + "b", False),  # would take a regular expression years
        ("re:" + ".*a" * 30, "a" * 900, True),  # and this one hours, if it did not match
    ],
)
def test_what_stays_as_it_was_is_told_by_names(kept, module, says):
    stated = AWQ_70B["quantization_config"] | {"modules_to_not_convert": [kept]}
    method = read_method("AWQ", stated)
    assert isinstance(method, Method)
    assert is_kept(method, module) is says


def test_modules_that_config_json_keeps_have_their_16_bits(tmp_path, caplog):
    stated = AWQ_70B["quantization_config"]
    config = AWQ_70B | {"num_hidden_layers": 2}
    sizes = {}
    for name, kept in (("none", None), ("some", ["self_attn"]), ("odd", ["re:(self|mlp)_attn"])):
        (tmp_path / name).mkdir()
        full = config | {"quantization_config": stated | {"modules_to_not_convert": kept}}
        (tmp_path / name / "config.json").write_text(json.dumps(full))
        sizes[name] = outline_checkpoint(tmp_path / name).layer_bytes(0)
    attention = 2 * 8192 * 8192 + 2 * 8192 * 1024
    assert sizes["some"] - sizes["none"] == attention * (2 - (4 + 20 / 128) / 8)
    assert sizes["odd"] == sizes["none"]
    assert "the pattern 're:(self|mlp)_attn' of modules that are not quantised" in caplog.text


METHODS = {
    "AQLM": {"quant_method": "aqlm"},
    "HQQ": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
    "EETQ": {"quant_method": "eetq"},
    "VPTQ": {"quant_method": "vptq"},
    "SpQR": {"quant_method": "spqr", "bits": 3},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {}}},
    "Quanto": {"quant_method": "quanto", "weights": "int4"},
    "EXL2": {"quant_method": "exl2", "bits": 4.5},
    "EXL3": {"quant_method": "exl3", "bits": 3.0},
    "Quark": {"quant_method": "quark"},
    "AutoRound": {"quant_method": "auto-round", "bits": 4},
    "BitNet": {"quant_method": "bitnet"},
    "MXFP8": {"quant_method": "mxfp8"},
    "GGUF": {"quant_method": "gguf"},
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_are_not_read_are_named_with_what_is(tmp_path, offload_run, name):
    config = AWQ_70B | {"num_hidden_layers": 2, "quantization_config": METHODS[name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(bytes(2**20))
    done = offload_run("generate", tmp_path, "--prompt", "a")
    assert done.code == 4 and done.out == ""
    assert f"its weights are quantised ({name}" in done.err
    assert "1.00 MiB here: " in done.err and "compressed-tensors (integers, FP8" in done.err
    assert len(done.err.strip().splitlines()) <= 1 or "Traceback" not in done.err


def test_a_folder_with_gguf_files_alone_is_named(tmp_path, offload_run):
    (tmp_path / "model-q4_k_m.gguf").write_bytes(b"GGUF" + bytes(3 * 2**20 - 4))
    (tmp_path / "config.json").write_text(json.dumps(AWQ_70B | {"quantization_config": None}))
    done = offload_run("plan", tmp_path)
    assert done.code == 4 and "model-q4_k_m.gguf is of version 0" in done.err
