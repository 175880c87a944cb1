"""F-07, F-08, F-11: names by transformers' rules.

A prefix that is missing or one too many is no obstacle; what the network has no place for is left
out and said once, with number and names; what it lacks, or would read as other numbers, is refused.
"""

import re

import pytest
import torch
from engines import PROMPT, engine_for
from folders import loaded, rewritten

from offload_rt.config import DraftConfig
from offload_rt.costs.sizes import image_bytes
from offload_rt.device.kinds import CPU, CUDA
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import open_checkpoint

LAYERS = 2
FLAT = {"model.": ""}
MULTIMODAL = {"model.": "model.language_model."}
OLD_MULTIMODAL = {"model.": "language_model.model.", "lm_head": "language_model.lm_head"}


def renamed(tensors, prefixes):
    def name(old):
        start = next((start for start in prefixes if old.startswith(start)), "")
        return prefixes.get(start, "") + old.removeprefix(start)

    return {name(old): tensor for old, tensor in tensors.items()}


def logits_of(folder):
    with engine_for(folder, resident_layers=0, slots=1) as engine:
        return engine.forward([(0, PROMPT)], reuse=True).clone()


@pytest.fixture(scope="module")
def llama(make_tiny):
    return make_tiny("llama", num_hidden_layers=LAYERS, tokenizer=True)


@pytest.fixture(scope="module")
def expected(llama):
    with torch.no_grad():
        return loaded(llama)[0](torch.tensor([PROMPT])).logits[:, -1]


def agrees(folder, expected):
    return (logits_of(folder) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("prefixes", [FLAT, MULTIMODAL, OLD_MULTIMODAL])
@pytest.mark.parametrize("prefix_of_ours", ["", "x.y."])
def test_prefixes(llama, tmp_path, expected, prefixes, prefix_of_ours):
    if prefix_of_ours:
        prefixes = {old: prefix_of_ours + new for old, new in prefixes.items()}
    folder = rewritten(llama, tmp_path / "m", lambda tensors: renamed(tensors, prefixes))
    assert agrees(folder, expected)


def strays_of(kind):
    numbers = torch.ones(3)
    per_layer = {
        "scales of a KV cache": ["self_attn.k_scale", "self_attn.v_scale"],
        "scales of weights that are none": ["self_attn.q_proj.weight_scale"],
        "a bias the family leaves out": ["mlp.up_proj.bias"],
        "adapters": ["self_attn.q_proj.lora_A.weight"],
    }
    if kind in per_layer:
        return {
            f"model.layers.{i}.{name}": numbers for i in range(LAYERS) for name in per_layer[kind]
        }
    return {
        "a value head": {"v_head.summary.weight": numbers, "v_head.summary.bias": numbers},
        "a classifier": {"score.weight": numbers},
        "heads for several tokens": {"mtp.fc.weight": numbers, "mtp.layers.0.norm.weight": numbers},
        "the same below model": {"model.mtp.layers.0.a.weight": numbers, "model.mtp.x": numbers},
        "a layer too many": {f"model.layers.{LAYERS}.eh_proj.weight": numbers},
        "another tower": {
            f"vision_tower.encoder.layers.{i}.layer_norm1.weight": numbers for i in range(LAYERS)
        },
        "a counter": {"model.steps": torch.tensor(3)},
        "a hostile name": {"model.\x1b]0;title\x07": numbers},
    }[kind]


STRAYS = {
    "scales of a KV cache": 4,
    "scales of weights that are none": 2,
    "a bias the family leaves out": 2,
    "adapters": 2,
    "a value head": 2,
    "a classifier": 1,
    "heads for several tokens": 2,
    "the same below model": 2,
    "a layer too many": 1,
    "another tower": 2,
    "a counter": 1,
    "a hostile name": 1,
}


@pytest.mark.parametrize("kind", STRAYS)
def test_what_has_no_place_is_left_out_and_said_once(llama, tmp_path, expected, offload_run, kind):
    strays = strays_of(kind)
    folder = rewritten(llama, tmp_path / "m", lambda tensors: tensors | strays)
    options = ["-p", "the quick", "-n", 2, "--draft", "none", "--raw"]
    done = offload_run("generate", folder, *options)
    assert done.out == offload_run("generate", llama, *options).out
    notes = re.findall(r"'m': (\d+) tensors (?:\(|are not used).*'", done.err)
    assert notes == [str(STRAYS[kind])]
    assert any(repr(name) in done.err for name in strays)
    assert "\x1b" not in done.err


def test_what_every_family_computes_itself_is_left_out_in_silence(
    llama, tmp_path, expected, caplog
):
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(LAYERS)]
    computed = dict.fromkeys([*names, "model.rotary_emb.inv_freq"], torch.ones(8))
    folder = rewritten(llama, tmp_path / "m", lambda tensors: tensors | computed)
    assert agrees(folder, expected)
    assert not caplog.text


def test_masks_that_a_family_ignores_are_left_out(make_tiny, tmp_path):
    tiny = make_tiny("gpt_neox", num_hidden_layers=LAYERS, num_key_value_heads=4)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    masks = {f"gpt_neox.layers.{i}.attention.bias": mask for i in range(LAYERS)}

    def older(tensors):
        return {name.replace("lm_head", "embed_out"): t for name, t in tensors.items()} | masks

    folder = rewritten(tiny, tmp_path / "m", older)
    with torch.no_grad():
        assert agrees(folder, loaded(folder)[0](torch.tensor([PROMPT])).logits[:, -1])


@pytest.mark.parametrize("kind", ["heads for several tokens", "a layer too many", "adapters"])
def test_plans_count_only_what_is_used(llama, tmp_path, offload_run, kind):
    folder = rewritten(llama, tmp_path / "m", lambda tensors: tensors | strays_of(kind))
    checkpoint, plain = open_checkpoint(folder), open_checkpoint(llama)
    assert checkpoint.total_bytes == plain.total_bytes
    assert len(checkpoint.left_out) == STRAYS[kind]
    assert image_bytes(checkpoint, "auto", CUDA) == image_bytes(plain, "auto", CUDA)
    assert f"'m': {STRAYS[kind]} tensors" in offload_run("plan", folder).err


@pytest.mark.parametrize("prefixes", [FLAT, MULTIMODAL])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_what_is_missing_stays_an_error(llama, tmp_path, prefixes, name):
    def without(tensors):
        return renamed({key: t for key, t in tensors.items() if key != name}, prefixes)

    folder = rewritten(llama, tmp_path / "m", without)
    with pytest.raises(CheckpointError, match=name.replace("model.", "") + "|no head"):
        logits_of(folder)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "model.layers.0.mlp.up_proj.weight"),
        (torch.float8_e4m3fn, "model.layers.0.mlp.up_proj.weight"),
        (torch.int32, "model.layers.0.mlp.up_proj.qweight"),
        (torch.uint8, "model.layers.0.mlp.up_proj.weight_packed"),
    ],
)
def test_scales_that_belong_to_weights_are_refused(llama, tmp_path, dtype, name):
    def quantised(tensors):
        weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
        scale = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(len(weight))}
        return tensors | {name: weight.to(dtype)} | scale

    folder = rewritten(llama, tmp_path / "m", quantised)
    with pytest.raises(CheckpointError, match=r"up_proj.* is (I8|F8_E4M3|I32|U8)"):
        image_bytes(open_checkpoint(folder), "auto", CPU)


def test_two_networks_of_one_size_are_refused(llama, tmp_path):
    folder = rewritten(llama, tmp_path / "m", lambda t: t | renamed(t, {"model.": "other."}))
    with pytest.raises(CheckpointError, match="'model.layers', 'other.layers'"):
        open_checkpoint(folder)


def test_a_draft_model_goes_through_the_same_door(llama, tmp_path):
    small = rewritten(llama, tmp_path / "m", lambda t: renamed(t, FLAT) | strays_of("a value head"))
    draft = DraftConfig(draft=f"model:{small}", draft_tokens=3)
    with engine_for(llama, draft=draft) as engine:
        assert engine.network.head_rows == 300
