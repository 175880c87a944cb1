"""config.json means what the family's own class makes of it, whatever the file leaves out."""

import dataclasses
import json
import shutil

import pytest
import torch
from engines import PROMPT, engine_for, generate, reference_model

from offload_rt.model.config import load_model_config
from offload_rt.model.config_class import _pairs, find_config_class

UNUSED = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
OWN_CODE = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}


def edited(folder, target, drop=(), **changes):
    """A copy of a model folder with another config.json."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(config | changes))
    return target


def answers(folder, prompt=PROMPT, tokens=5):
    """What we answer, and what transformers does."""
    with engine_for(folder, prompts=[prompt], resident_layers=0, slots=1) as engine:
        ours = generate(engine, [prompt], tokens=tokens)
    with torch.no_grad():
        made = reference_model(folder).generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
    return ours, [made[0, len(prompt) :].tolist()]


@pytest.mark.parametrize(
    ("family", "config", "drop"),
    [
        # the class's head_dim is 128, not hidden_size / heads
        ("qwen3", {"head_dim": 128}, ["head_dim", "tie_word_embeddings"]),
        ("llama", {"num_key_value_heads": 4}, ["num_key_value_heads", "rope_parameters"]),
        ("llama", {"num_key_value_heads": 4}, ["max_position_embeddings", "dtype"]),
        # soft caps and ties by default
        ("gemma2", {"head_dim": 16}, ["attn_logit_softcapping", "tie_word_embeddings"]),
    ],
)
def test_what_a_file_leaves_out_is_the_familys(make_tiny, tmp_path, family, config, drop):
    folder = edited(make_tiny(family, **config), tmp_path / "edited", drop)
    ours, theirs = answers(folder)
    assert ours == theirs


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": OWN_CODE},
        {"_attn_implementation_internal": "somebody/kernel", "trust_remote_code": True},
        {"quantization_config": None, "rope_theta": None, "head_dim": None},
        {"quantization_config": UNUSED},
        {"n_layer": 12, "n_embd": "wide"},  # not of a Llama: they mean nothing
        {"eos_token_id": -1, "bos_token_id": None},
        {"some_limit": float("inf")},
    ],
)
def test_what_transformers_takes_is_taken(make_tiny, tmp_path, changes):
    ours, theirs = answers(edited(make_tiny("llama"), tmp_path / "edited", **changes))
    assert ours == theirs


def test_the_last_of_two_values_counts(make_tiny, tmp_path):
    folder = edited(make_tiny("llama"), tmp_path / "edited")
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"vocab_size": 77, "rms_norm_eps": 3, ', 1))
    ours, theirs = answers(folder)
    assert ours == theirs


@pytest.mark.parametrize(
    ("spelled", "read"),
    [
        ({"dtype": "torch.float32"}, "float32"),
        ({"dtype": None, "torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "half"}, "float16"),
        ({"dtype": "auto"}, None),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
    ],
)
def test_number_formats_however_they_are_spelled(make_tiny, tmp_path, spelled, read):
    folder = edited(make_tiny("llama"), tmp_path / "edited", ["dtype"], **spelled)
    assert load_model_config(folder).dtype == read
    with engine_for(folder, dtype="float32") as engine:
        assert len(generate(engine, tokens=2)[0]) == 2


def scaling(kind, factor, **more):
    return {"rope_scaling": {"type": kind, "factor": factor, **more}, "max_position_embeddings": 64}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
WAS = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("changes", "longest", "note"),
    [
        (scaling("yarn", 4.0, **{WAS: 64}), 256, "yarn factor 4 x 64"),
        (scaling("yarn", 4.0), 256, "yarn factor 4 x 64"),  # the original is the file's number
        (scaling("yarn", 4.0, **{WAS: 16}), 64, ""),  # the product is there already
        (scaling("yarn", 8.0, **{WAS: 16}), 128, "yarn factor 8 x 16"),
        (scaling("linear", 2), 128, "linear factor 2 x 64"),
        (scaling("llama3", 8.0, **LLAMA3, **{WAS: 16}), 64, ""),  # part of the number already
        (scaling("default", 8.0), 64, ""),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            1024,
            "x 512",
        ),
    ],
)
def test_rotary_scaling_makes_room(make_tiny, tmp_path, changes, longest, note):
    folder = edited(make_tiny("llama"), tmp_path / "edited", ["rope_parameters"], **changes)
    config = load_model_config(folder)
    assert config.max_positions == longest
    assert note in config.longest and (note != "") == ("(" in config.longest)


def test_the_number_of_gemma_3_has_its_factor_in_it(tmp_path):
    rope = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34} | rope
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    config = load_model_config(tmp_path)  # as gemma-3-4b-it has it: all else is left out
    assert (config.max_positions, config.num_heads, config.head_dim) == (131072, 8, 256)


def test_a_prompt_beyond_what_the_file_says_is_answered_as_transformers_does(make_tiny, tmp_path):
    changes = scaling("yarn", 4.0, **{WAS: 16}) | {"max_position_embeddings": 16}
    folder = edited(make_tiny("llama"), tmp_path / "edited", ["rope_parameters"], **changes)
    ours, theirs = answers(folder, PROMPT * 2, tokens=12)
    assert ours == theirs


def test_errors_say_where_the_limit_comes_from(make_tiny, tmp_path, offload_run):
    folder = make_tiny("llama", tokenizer=True)
    changes = scaling("yarn", 4.0) | {"max_position_embeddings": 4}
    folder = edited(folder, tmp_path / "edited", ["rope_parameters"], **changes)
    done = offload_run("plan", folder, "--context", 17)
    assert "made for up to 16 (yarn factor 4 x 4) tokens" in done.err
    assert offload_run("plan", folder, "--context", 16).code == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer_types": ["x"] * 2}, "`layer_types` entries must be"),
        ({"hidden_act": 7}, "'hidden_act' expected str, got int"),
        ({"rope_scaling": {"type": "yarn"}}, "Missing required keys"),
    ],
)
def test_a_value_that_the_class_refuses_is_named_with_the_file(make_tiny, tmp_path, changes, says):
    folder = edited(make_tiny("llama", tokenizer=True), tmp_path / "edited", **changes)
    with pytest.raises(Exception, match="config.json") as caught, engine_for(folder):
        pass
    assert says in str(caught.value) and "validator" not in str(caught.value)


def test_what_is_read_of_the_classes_is_what_they_are():
    """The source read as data against the classes: every family that generates text."""
    from transformers.models.auto import configuration_auto, modeling_auto

    assert _pairs("CONFIG_MAPPING_NAMES") == configuration_auto.CONFIG_MAPPING_NAMES
    generating = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert _pairs("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES") == generating
    compared = 0
    for model_type in generating:
        theirs = configuration_auto.CONFIG_MAPPING[model_type]
        fields = {field.name: field.default for field in dataclasses.fields(theirs)}
        ours = find_config_class(model_type)
        for name, value in ours.defaults.items():
            if name in fields and isinstance(value, int | float | str):
                assert fields[name] == value, (model_type, name)
                compared += 1
        assert theirs.attribute_map == ours.renamed, model_type
    assert compared > 2000


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    ],
)
def test_plan_takes_a_folder_with_config_json_alone(
    make_tiny, tmp_path, offload_run, family, config
):
    folder = make_tiny(family, head_dim=16, **config)
    (tmp_path / "alone").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "alone")
    options = ("--device", "cpu", "--device-memory", "512MiB", "--json")
    whole, alone = (
        json.loads(offload_run("plan", place, *options).out)
        for place in (folder, tmp_path / "alone")
    )
    assert (whole["weights_read"], alone["weights_read"]) == (True, False)
    same = ["weights_bytes", "kv_bytes", "streamed", "resident", "dtype"]
    assert {key: whole[key] for key in same} == {key: alone[key] for key in same}
    table = offload_run("plan", tmp_path / "alone", "--device-memory", "512MiB").out
    assert "(from config.json alone)" in table


def test_a_draft_model_may_be_a_config_json_too(make_tiny, tmp_path, offload_run):
    shutil.copy(make_tiny("llama") / "config.json", tmp_path)
    done = offload_run(
        "plan", tmp_path, "--draft", f"model:{tmp_path}", "--device-memory", "512MiB"
    )
    assert done.code == 0 and "draft model" in done.out


@pytest.mark.parametrize("name", ["x.gguf", "pytorch_model.bin"])
def test_weights_that_are_not_read_are_not_overlooked(make_tiny, tmp_path, offload_run, name):
    shutil.copy(make_tiny("llama") / "config.json", tmp_path)
    (tmp_path / name).touch()
    for verb in ("plan", "simulate"):
        done = offload_run(verb, tmp_path)
        assert done.code == 4 and name in done.err
