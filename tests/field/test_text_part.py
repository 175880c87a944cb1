"""The text model of a vision-language model answers as the whole does without a picture."""

import json

import pytest
import torch
from engines import PROMPT, engine_for, generate
from tiny import SHAPE

from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.config import load_model_config

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
WINDOW = {"sliding_window": 6}
# family: its text model, its vision model, what else the whole says
WHOLES = {
    "gemma3": ({"model_type": "gemma3_text"} | WINDOW, "siglip_vision_model", {}),
    "mistral3": ({"model_type": "mistral"} | WINDOW, "pixtral", {"tie_word_embeddings": False}),
    "llava": ({"model_type": "llama"}, "clip_vision_model", {}),
}


@pytest.fixture(params=WHOLES, scope="module")
def whole(request, tmp_path_factory):
    """A folder with a tiny vision-language model, and the model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, vision, more = WHOLES[request.param]
    config = AutoConfig.for_model(
        request.param,
        text_config=SHAPE | IDS | text,
        vision_config=VISION | {"model_type": vision},
        image_token_index=290,
        **more,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model.eval()


def test_the_text_part_answers_as_the_whole(whole, caplog):
    folder, model = whole
    with engine_for(folder, resident_layers=1, slots=2) as engine:
        ours = generate(engine, tokens=8)
    with torch.no_grad():
        made = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
        )
    assert ours == [made[0, len(PROMPT) :].tolist()]
    assert f"only the text part of a '{model.config.model_type}' model is used" in caplog.text


def test_config_json_alone_tells_its_sizes(whole, tmp_path, offload_run):
    folder, _ = whole
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    done = offload_run("plan", tmp_path, "--device-memory", "512MiB", "--json")
    assert json.loads(done.out)["weights_bytes"] == open_checkpoint(folder).total_bytes


def test_what_the_whole_says_counts_for_the_part(tmp_path):
    text = SHAPE | {"model_type": "mistral", "dtype": "float32", "tie_word_embeddings": True}
    config = {"model_type": "mistral3", "text_config": text, "torch_dtype": "bfloat16"}

    def read(**more):
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        return load_model_config(tmp_path)

    assert (read().dtype, read().tie_word_embeddings) == ("bfloat16", True)
    assert read(tie_word_embeddings=False).tie_word_embeddings is False
    del text["tie_word_embeddings"]
    assert read().tie_word_embeddings is True  # as mistral3 has it


def test_files_of_a_plain_text_model_are_not_its(make_tiny, tmp_path):
    plain = make_tiny("llama")
    (tmp_path / "model.safetensors").symlink_to(plain / "model.safetensors")
    text = json.loads((plain / "config.json").read_text())
    config = {"model_type": "llava", "text_config": text, "vision_config": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="of a 'llava' model with a text part, but no tensor"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}},
        {"model_type": "llava", "text_config": {"model_type": 7}},
        {"model_type": "llava", "text_config": None, "vision_config": {"model_type": "x"}},
    ],
)
def test_a_text_part_that_does_not_stand_alone_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | config))
    with pytest.raises(CheckpointError, match="is made of several networks"):
        load_model_config(tmp_path)
