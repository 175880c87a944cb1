"""Sizes from config.json alone: those of the files, for every family that has them."""

import json
import shutil

import pytest
from test_families import FAMILIES, with_two_layers
from tiny import SHAPE

from offload_rt.device.kinds import Packing
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.layout import plan_layout
from offload_rt.model.outline import _FAMILIES, open_or_outline, outline_checkpoint

KNOWN = [name for name, (family, _) in FAMILIES.items() if family in _FAMILIES]
BIASES = {"attention_bias": True, "mlp_bias": True}
BIASED = ["llama", "qwen3", "granite", "olmo2", "smollm3", "gemma2", "seed_oss"]
LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def alone(folder, target):
    """A folder with nothing but the configuration."""
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    return target


def rows(extents):
    return {(e.name, e.dtype, e.shape, e.nbytes) for e in extents}


@pytest.mark.parametrize(
    ("name", "biases"), [(name, {}) for name in FAMILIES] + [(name, BIASES) for name in BIASED]
)
def test_an_outline_has_the_tensors_of_the_files(make_tiny, tmp_path, name, biases):
    family, config = FAMILIES[name]
    folder = make_tiny(family, **(with_two_layers(config) | biases))
    real, made = open_checkpoint(folder), outline_checkpoint(alone(folder, tmp_path / "alone"))
    assert made.config == real.config
    assert rows(made.tensors.values()) == rows(real.tensors.values())
    assert [rows(layer) for layer in made.layers] == [rows(layer) for layer in real.layers]
    assert rows(made.others) == rows(real.others)
    assert made.embedding.shape == real.embedding.shape
    assert (made.head is None) == (real.head is None) and not made.files


def test_every_family_of_the_table_is_tried():
    assert {FAMILIES[name][0] for name in KNOWN} == set(_FAMILIES)


def test_llama_2_70b_has_the_bytes_that_are_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    made, from_files = open_or_outline(tmp_path)
    assert not from_files
    assert made.total_bytes == 137_953_296_384  # 68,976,648,192 weights (model card)
    layouts = [plan_layout(layer, "float16", Packing.DEVICE) for layer in made.layers]
    assert {layout.nbytes for layout in layouts} == {made.layer_bytes(0)}


def test_weights_are_read_where_there_are_some(tiny_model):
    made, from_files = open_or_outline(tiny_model)
    assert from_files and made.files


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "stablelm"}, "do not pass keywords on to their attention"),
        ({"model_type": "mamba"}, "cannot"),
        ({"model_type": "llama", "num_hidden_layers": -1}, "num_hidden_layers is -1"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "awq"}},
            "as config.json says .AWQ",
        ),
    ],
)
def test_what_the_configuration_does_not_tell_is_refused(tmp_path, config, says):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | config))
    with pytest.raises(CheckpointError, match=says.replace("'", "['\"]")):
        open_or_outline(tmp_path)


def test_other_folders_are_refused_as_ever(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_or_outline(tmp_path / "none")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(CheckpointError, match="GGUF"):
        open_or_outline(tmp_path)
