"""F-09 and its kind: the text part of a model of several networks answers as the whole does.

Tokens are compared with those of transformers' own class of the whole, for prompts of text alone.
"""

import json
import re

import pytest
import torch
from engines import PROMPT, engine_for, generate
from folders import rewritten
from tiny import DEEP, SHAPE, write_tokenizer

from offload_rt.config import DraftConfig, GenerationConfig, SamplingConfig
from offload_rt.costs.sizes import image_bytes
from offload_rt.device.kinds import CPU, Packing
from offload_rt.engine import Run
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.config import load_model_config
from offload_rt.model.network import Network

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = SHAPE | DEEP | IDS | {"head_dim": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
} | DEEP  # as many layers as the text has
QWEN_VISION = {
    "hidden_size": 32,
    "out_hidden_size": 64,
    "depth": 2,
    "num_heads": 2,
    "intermediate_size": 48,
    "fullatt_block_indexes": [1],
}
SIGLIP, PIXTRAL = {"model_type": "siglip_vision_model"}, {"model_type": "pixtral"}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
SLIDING = ["sliding_attention"]
WHOLES = {
    "gemma3": {
        "text_config": {"sliding_window": 6, "layer_types": [*SLIDING * 3, "full_attention"]},
        "vision_config": VISION | SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", "sliding_window": None},
        "vision_config": VISION | PIXTRAL,
        "tie_word_embeddings": False,
    },
    "qwen2_5_vl": {"text_config": {"rope_parameters": ROPE}, "vision_config": QWEN_VISION},
}


@pytest.fixture(scope="module", params=WHOLES)
def whole(request, tmp_path_factory):
    """A folder with a random model of several networks, and the model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    made = WHOLES[request.param]
    made = made | {"text_config": TEXT | made["text_config"]}
    config = AutoConfig.for_model(request.param, **(made | IDS))
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif "embed_tokens" in name and config.tie_word_embeddings:  # else a token repeats itself
            torch.nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder, AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def expected(whole):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    made = whole[1].generate(torch.tensor([PROMPT]), **options)
    return made[0, len(PROMPT) :].tolist()


def test_tokens_are_those_of_the_whole(whole, expected):
    assert len(set(expected)) > 3
    with engine_for(whole[0], resident_layers=1, slots=2) as engine:
        assert engine.placement.streamed == (0, 1, 3)
        assert generate(engine, tokens=12) == [expected]
        network = engine.network
        images = image_bytes(open_checkpoint(whole[0]), "auto", CPU)
        assert images == [*(layout.nbytes for layout in network.layouts), network.base.nbytes]


def test_what_is_not_text_is_left_out_and_said_once(whole, offload_run):
    folder, model = whole
    text = sum(
        tensor.numel()
        for name, tensor in dict(model.named_parameters()).items()
        if "language_model" in name or name == "lm_head.weight"
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.total_bytes == 4 * text
    for verb in (["plan", folder], ["generate", folder, "-p", "the quick", "--raw", "-n", 1]):
        done = offload_run(*verb, "--draft", "none")
        assert done.code == 0
        family = re.escape(repr(checkpoint.config.part_of))
        assert len(re.findall(f"only the text part of a {family} model is used", done.err)) == 1
        assert len(re.findall(rf": {len(checkpoint.left_out)} tensors \(", done.err)) == 1


def test_it_drafts_for_a_text_model(whole):
    folder, _ = whole
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=3)
    with engine_for(folder, draft=draft) as engine:
        run = Run.start(engine, [PROMPT], SamplingConfig(), GenerationConfig(max_tokens=16))
        run.prefill()
        while run.active:
            run.step()
        acceptance = run.report().speculation.acceptance_rate
    assert acceptance is not None and acceptance > 0.6


def test_a_missing_tensor_stays_an_error(whole, tmp_path):
    def without(tensors):
        (name,) = [n for n in tensors if n.endswith("model.layers.1.mlp.up_proj.weight")]
        return {key: tensor for key, tensor in tensors.items() if key != name}

    folder = rewritten(whole[0], tmp_path / "m", without)
    with pytest.raises(CheckpointError, match="text part of .*lacks 1 tensors"):
        Network(open_checkpoint(folder), "auto", Packing.FILE)


@pytest.mark.parametrize("whole", ["gemma3"], indirect=True)
def test_a_tied_pair_may_be_stored_under_the_heads_name(whole, expected, tmp_path):
    def under_the_head(tensors):
        tied = tensors.pop("language_model.model.embed_tokens.weight")
        return tensors | {"language_model.lm_head.weight": tied}

    folder = rewritten(whole[0], tmp_path / "m", under_the_head)
    with engine_for(folder) as engine:
        assert generate(engine, tokens=12) == [expected]


def test_names_of_newer_files_are_read(whole, expected, tmp_path):
    """`save_pretrained` writes the names of the first files; these are the modules' own."""
    folder, model = whole
    head = {} if model.config.tie_word_embeddings else {"lm_head.weight"}
    kept = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight" or head}
    newer = rewritten(folder, tmp_path / "m", lambda _: kept)
    assert any(name.startswith("model.language_model.") for name in open_checkpoint(newer).tensors)
    with engine_for(newer) as engine:
        assert generate(engine, tokens=12) == [expected]


def test_a_text_part_that_cannot_be_streamed_is_refused_by_name(tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = TEXT | {"num_local_experts": 2, "intermediate_size_mlp": 64}
    vision = VISION | {
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    }
    config = AutoConfig.for_model("llama4", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="llama4 models cannot be streamed: .*chunked"):
        Network(open_checkpoint(tmp_path), "auto", Packing.FILE)


def test_config_json_alone_tells_its_sizes(whole, tmp_path, offload_run):
    folder, _ = whole
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    done = offload_run("plan", tmp_path, "--device-memory", "512MiB", "--json")
    assert json.loads(done.out)["weights_bytes"] == open_checkpoint(folder).total_bytes


def test_the_number_format_of_the_whole_counts_for_the_part(tmp_path):
    config = {"model_type": "mistral3", "text_config": TEXT | {"dtype": "float32"}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    assert load_model_config(tmp_path).dtype == "bfloat16"


def test_files_of_a_plain_text_model_are_not_its(make_tiny, tmp_path):
    plain = make_tiny("llama")
    (tmp_path / "model.safetensors").symlink_to(plain / "model.safetensors")
    text = json.loads((plain / "config.json").read_text())
    config = {"model_type": "llava", "text_config": text, "vision_config": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="of a 'llava' model with a text part, but the files"):
        open_checkpoint(tmp_path)
