"""Weights of a kind that is not read are recognised by every verb; the refusal says what then."""

import json
import re

import pytest

from offload_rt.cli.original import original_outlook
from offload_rt.errors import CheckpointError
from offload_rt.model.config import QuantisedError, load_model_config
from offload_rt.model.formats.methods import READ_METHODS

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "float16",
}
# As the tools of each kind write it.
KINDS = {
    "AWQ, 4-bit": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
    "GPTQ, 8-bit": {"quant_method": "gptq", "bits": 8, "dynamic": {"a": {}}},
    "FP8": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e5m2"},
    "compressed-tensors, 4-bit": {
        "quant_method": "compressed-tensors",
        "format": "marlin-24",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
    },
    "bitsandbytes, 4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
    "EXL3, 3-bit": {"quant_method": "exl3", "version": "0.0.1", "bits": 3.0},
    "ModelOpt": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
    "'something new'": {"quant_method": "something new"},
    "of an unknown method": {},
}


def refusal(folder, config, **files):
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    with pytest.raises(QuantisedError) as caught:
        load_model_config(folder)
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_by_config_json(tmp_path, kind):
    message = str(refusal(tmp_path, {"quantization_config": KINDS[kind]}))
    assert f"its weights are quantised ({kind}, says quantization_config in config.json)" in message
    assert "bf16, fp16 and fp32 weights in safetensors files are read, and " in message
    assert f"{READ_METHODS}, take" in message
    assert ("take a bf16 copy" in message) == (kind == "FP8")  # may be the original


def test_mlx(tmp_path):
    keys = {"group_size": 64, "bits": 4}
    for config in ({"quantization": keys}, {"quantization": keys, "quantization_config": keys}):
        assert "(MLX, 4-bit, says quantization in config.json)" in str(refusal(tmp_path, config))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("quantize_config", "GPTQ"), ("quant_config", "AWQ"), ("hf_quant_config", "ModelOpt")],
)
def test_kinds_by_a_file_beside_it(tmp_path, name, kind):
    message = str(refusal(tmp_path, {}, **{f"{name}__json": "{}"}))
    assert f"({kind}, says {name}.json)" in message


def test_bytes_of_the_files_are_said(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    assert ", 3.00 MiB here: " in str(refusal(tmp_path, {"quantization_config": KINDS["FP8"]}))


def test_a_part_of_a_model_is_quantised_as_the_whole_is(tmp_path):
    whole = {"model_type": "mistral3", "text_config": LLAMA | {"model_type": "mistral"}}
    config = whole | {"quantization_config": KINDS["FP8"]}
    assert "quantised (FP8" in str(refusal(tmp_path, config))


def test_nothing_is_quantised_where_all_switches_are_off(tmp_path):
    off = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    for config in ({"quantization_config": off}, {"quantization_config": None}):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | config))
        assert load_model_config(tmp_path).num_layers == 16


@pytest.mark.parametrize("verb", ["plan", "simulate", "generate"])
def test_the_refusal_says_what_the_original_would_do_here(tmp_path, offload_run, verb):
    keys = {"group_size": 64, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization": keys}))
    (tmp_path / "model.safetensors").touch()
    done = offload_run(verb, tmp_path)
    assert done.code == 4 and "quantised (MLX, 4-bit" in done.err and done.out == ""
    size, seconds = re.search(
        r"with 16-bit weights it has (\S+ GiB) and should need (\S+) s/token here", done.err
    ).groups()
    assert size == "2.79 GiB"  # 1.5e9 weights
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").unlink()
    planned = json.loads(offload_run("plan", tmp_path, "--draft", "none", "--json").out)
    seconds_planned = 1 / planned["predicted"]["tokens_per_s"]
    assert float(seconds) == pytest.approx(seconds_planned, rel=0.1)  # what is free changes


def test_no_number_that_nobody_computed(tmp_path):
    """What cannot be told without torch is not told, and a broken file is only refused."""
    error = refusal(tmp_path, {"model_type": "mixtral", "quantization_config": KINDS["FP8"]})
    assert original_outlook(error.original) == ""
    deep = refusal(tmp_path, {"num_hidden_layers": 1000, "quantization_config": KINDS["FP8"]})
    assert original_outlook(deep.original).endswith(" GiB")  # planning it would take 20 s
    broken = refusal(tmp_path, {"num_hidden_layers": -1, "quantization_config": KINDS["FP8"]})
    assert broken.original is None
    assert isinstance(broken, CheckpointError)
