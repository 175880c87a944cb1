"""`config.json` as untrusted input: numbers in range, nothing that asks for code."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_rt.errors import CheckpointError
from offload_rt.model.config import ModelConfig, load_model_config

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "rope_scaling": None,
    "rope_theta": 100000.0,
}


ORIGINAL_HALF = {"original_max_position_embeddings": 0.5}


def load(folder: Path, config: object) -> ModelConfig:
    (folder / "config.json").write_text(
        config if isinstance(config, str) else json.dumps(config), encoding="utf-8"
    )
    return load_model_config(folder)


def error_of(folder: Path, config: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder, config)
    message = str(caught.value)
    assert "config.json" in message
    assert "\n" not in message
    return message


def test_llama(tmp_path):
    config = load(tmp_path, LLAMA)
    assert config == ModelConfig(
        model_type="llama",
        num_layers=30,
        hidden_size=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_positions=8192,
        tie_word_embeddings=True,
        intermediate_size=1536,
        dtype="bfloat16",
        sliding_window=None,
        raw=LLAMA,
    )
    with pytest.raises(TypeError):
        config.raw["x"] = 1  # type: ignore[index]


def test_gpt2_names(tmp_path):
    gpt2 = {
        "model_type": "gpt2",
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "n_positions": 1024,
        "n_ctx": 1024,
        "n_inner": None,
        "vocab_size": 50257,
    }
    config = load(tmp_path, gpt2)
    assert (config.num_layers, config.hidden_size, config.num_heads) == (12, 768, 12)
    assert (config.num_kv_heads, config.head_dim, config.max_positions) == (12, 64, 1024)
    assert (config.intermediate_size, config.tie_word_embeddings, config.dtype) == (
        3072,
        True,  # the class's default
        None,
    )


def test_of_two_names_the_one_counts_that_the_class_sets_last(tmp_path):
    transformers = pytest.importorskip("transformers")
    both = {"model_type": "gpt2", "n_layer": 12, "num_hidden_layers": 6, "n_head": 12}
    made = transformers.AutoConfig.for_model(**both)
    assert load(tmp_path, both).num_layers == made.num_hidden_layers == 6


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128}, 6144),
        ({"moe_intermediate_size": 100, "num_experts_per_tok": 8}, 1536),
        ({"num_experts_per_tok": 2, "num_local_experts": 8}, 1536),
        ({"moe_intermediate_size": 768}, 1536),
        (
            {"moe_intermediate_size": [768, 100] * 15, "moe_topk": [8, 2] * 15, "num_experts": 64},
            6144,
        ),
    ],
)
def test_widest_mlp(tmp_path, fields, expected):
    assert load(tmp_path, LLAMA | fields).intermediate_size == expected


@pytest.mark.parametrize(
    ("model_type", "fields", "experts", "sent"),
    [
        ("ernie4_5_moe", {"moe_num_experts": 32, "moe_k": 3}, 32, 3),
        ("ernie4_5_moe", {"num_experts": 32, "num_experts_per_tok": 3}, 32, 3),
        ("ernie4_5_moe", {}, 64, 6),
        ("aria_text", {"moe_num_experts": 16, "moe_topk": 4}, 16, 4),
        ("hunyuan_v1_moe", {"num_experts": 16, "moe_topk": 8}, 16, 8),
        ("hunyuan_v1_moe", {"num_experts": 16, "moe_topk": [8, 2, 8] * 10}, 16, 8),
        ("kimi_linear", {"num_experts": 32, "num_experts_per_token": 4}, 32, 4),
        ("gemma4_text", {"num_experts": 16, "top_k_experts": 3}, 16, 3),
        ("deepseek_v2", {"n_routed_experts": 16, "num_experts_per_tok": 3}, 16, 3),
        ("qwen3_next", {"num_experts": 0}, 0, 10),
        ("llama", {}, 0, 0),
    ],
)
def test_experts_by_the_names_of_their_family(tmp_path, model_type, fields, experts, sent):
    found = load(tmp_path, LLAMA | {"model_type": model_type} | fields)
    assert (found.experts, found.experts_per_token) == (experts, sent)
    assert found.has_experts == (experts > 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_num_experts": 8, "moe_k": 9}, "sent to 9 experts of a layer, which has 8"),
        (
            {"moe_num_experts": 8, "moe_k": [2, "two"]},
            "moe_k is a list of 2, accepted is a whole number",
        ),
    ],
)
def test_experts_a_token_that_cannot_be(tmp_path, fields, message):
    assert message in error_of(tmp_path, LLAMA | {"model_type": "ernie4_5_moe"} | fields)


def test_optional_fields(tmp_path):
    fields = {"head_dim": 128, "sliding_window": 4096, "dtype": "float16", "torch_dtype": None}
    config = load(tmp_path, LLAMA | fields)
    assert (config.head_dim, config.sliding_window, config.dtype) == (128, 4096, "float16")
    assert load(tmp_path, LLAMA | fields | {"use_sliding_window": False}).sliding_window is None
    assert load(tmp_path, LLAMA | fields | {"sliding_window": 0}).sliding_window is None
    part = {"attn_config": {"model_type": "", "alibi": True}}  # settings, no network
    assert load(tmp_path, LLAMA | part).num_layers == 30


NUMBERS = {
    "num_hidden_layers": "1 to 1000",
    "hidden_size": "1 to 131072",
    "num_attention_heads": "1 to 4096",
    "num_key_value_heads": "1 to 4096",
    "head_dim": "1 to 4096",
    "vocab_size": "1 to 4194304",
    "max_position_embeddings": "1 to 268435456",
    "intermediate_size": "1 to 1048576",
    "sliding_window": "0 to 268435456",
    "num_experts": "0 to 4096",
}


@pytest.mark.parametrize(
    "value", [-1, 10**9, 2**63, 1.5, 8.0, "8", True, [8], [8] * 29 + ["8"], {"a": 8}]
)
@pytest.mark.parametrize("key", NUMBERS)
def test_numbers(tmp_path, key, value):
    message = error_of(tmp_path, LLAMA | {key: value})
    assert f"{key} is " in message
    assert f"accepted is a whole number from {NUMBERS[key]}" in message
    if isinstance(value, int | float | str):
        assert f"{key} is {value!r}," in message


def test_a_token_is_sent_to_no_more_experts_than_there_are(tmp_path):
    """In a dense model of such a family it is sent to none, whatever the family's number."""
    config = LLAMA | {"num_experts": 4, "num_experts_per_tok": 5}
    assert "sent to 5 experts of a layer, which has 4 experts" in error_of(tmp_path, config)
    load(tmp_path, config | {"num_experts_per_tok": 4})
    load(tmp_path, config | {"num_experts": 0})


@pytest.mark.parametrize("key", sorted(NUMBERS.keys() - {"num_experts", "sliding_window"}))
def test_zero(tmp_path, key):
    assert f"{key} is 0, accepted is" in error_of(tmp_path, LLAMA | {key: 0})


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "tie_word_embeddings"])
def test_null_is_taken_where_the_family_takes_it(tmp_path, key):
    assert f"{key} is null: leave it out for llama's" in error_of(tmp_path, LLAMA | {key: None})
    taken = load(tmp_path, LLAMA | {"num_key_value_heads": None, "head_dim": None})
    assert (taken.num_kv_heads, taken.head_dim) == (9, 64)


def test_what_neither_file_nor_family_says_is_missing(tmp_path):
    config = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4}
    assert "max_position_embeddings is missing" in error_of(tmp_path, config)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_key_value_heads": 2}, "num_attention_heads is 9, which num_key_value_heads 2 does"),
        ({"num_key_value_heads": 18}, "is 9, which num_key_value_heads 18 does not divide"),
        ({"num_attention_heads": 10, "num_key_value_heads": 5}, "hidden_size is 576, which num_"),
        ({"layer_types": ["full_attention"] * 29}, "layer_types lists 29 layers, num_hidden_la"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', accepted is true or fal"),
        ({"torch_dtype": "float64"}, "torch_dtype is 'float64', accepted is bfloat16, float16,"),
        ({"dtype": 16}, "dtype is 16, accepted is bfloat16"),
        ({"rope_theta": 0}, "rope_theta is 0, accepted is a number above 0"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_parameters": {"full": {"rope_theta": -1.0}}}, "rope_theta is -1.0"),
        ({"rope_scaling": {"factor": 1e300}}, "factor is 1e+300, accepted is a number above 0"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ""}, "model_type is ''"),
        ({"model_type": 7}, "model_type is 7"),
        ({"per_layer_config": {"3": {"num_attention_heads": 3}}}, "per_layer_config gives layers"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e9}}, "factor 1e+09 x 8192 positions is abo"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, **ORIGINAL_HALF}}, "accepted is a whole"),
        ({"is_encoder_decoder": True}, "'llama' is an encoder-decoder model"),
        ({"text_config": {}}, "made of several networks ('text_config')"),
        ({"vision_config": {"model_type": "vit"}}, "several networks ('vision_config')"),
    ],
)
def test_refused(tmp_path, fields, expected):
    assert expected in error_of(tmp_path, LLAMA | fields)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty (0 bytes)"),
        (" \n", "is empty (2 bytes)"),
        ("[]", "holds a list of 0 instead"),
        ("7", "holds 7 instead"),
        ('{"model_type": "llama", "vocab_size": NaN}', "vocab_size is nan, accepted is"),
        ('{"model_type": "llama", "vocab_size": -Infinity}', "vocab_size is -inf, accepted is"),
        ('{"model_type": "llama", "rope_theta": 1e400}', "rope_theta is inf, accepted is"),
        ('{"a": 1', "is not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("<html>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1", "run `git lfs pull`"),
    ],
)
def test_bad_json(tmp_path, text, expected):
    assert expected in error_of(tmp_path, text)


def test_size_is_bounded(tmp_path):
    text = json.dumps(LLAMA)
    assert load(tmp_path, text + " " * 2**20).num_layers == 30
    assert "accepted is up to 4.00 MiB" in error_of(tmp_path, text + " " * 2**22)


# --- D06: code ---------------------------------------------------------------------------------

AUTO_MAP = {"AutoModelForCausalLM": "modeling.Model"}


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": AUTO_MAP},
        {"auto_map": "modeling.Model"},
        {"x": [{"auto_map": AUTO_MAP}]},
        {"_attn_implementation_internal": "org/kernel"},
        {"x": {"_attn_implementation_internal": "a"}},
        {"trust_remote_code": True},
        {"x": {"y": {"trust_remote_code": True}}},
    ],
)
def test_code_is_neither_run_nor_passed_on(tmp_path, monkeypatch, fields):
    transformers = pytest.importorskip("transformers")
    marker = tmp_path / "marker"
    for name in ("modeling.py", "__init__.py", "configuration.py"):
        (tmp_path / name).write_text(f"open({str(marker)!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    config = load(tmp_path, LLAMA | fields)
    assert not any(word in str(dict(config.raw)) for word in ("auto_map", "_attn", "trust_remote"))
    made = transformers.AutoConfig.for_model(**config.raw)
    assert type(made).__name__ == "LlamaConfig"
    assert not marker.exists()
    assert "modeling" not in set(sys.modules) - before


@pytest.mark.parametrize("own", [{}, {"auto_map": AUTO_MAP}])
def test_a_family_that_transformers_lacks_is_refused_by_name(tmp_path, own):
    message = error_of(tmp_path, LLAMA | {"model_type": "llama9"} | own)
    assert "transformers has no family 'llama9'" in message
    assert ("own code (auto_map) is never run" in message) == bool(own)


def test_raw_has_nothing_transformers_acts_on(tmp_path):
    unwanted = {
        "_attn_implementation": "org/kernel",
        "attn_implementation": "org/kernel",
        "_experts_implementation": "x",
        "experts_implementation": "x",
        "auto_map": {},
        "_attn_implementation_internal": None,
        "trust_remote_code": False,
        "custom_pipelines": {"x": {"impl": "x.y"}},
        "_commit_hash": "0",
        "_name_or_path": "org/name",
    }
    assert dict(load(tmp_path, LLAMA | unwanted).raw) == LLAMA


def test_transformers_accepts_raw(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = load(tmp_path, LLAMA | {"_attn_implementation": "org/kernel"})
    made = transformers.AutoConfig.for_model(**config.raw)
    assert made.num_hidden_layers == 30
    assert made._attn_implementation is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KEYS = [*LLAMA, "head_dim", "auto_map", "quantization_config", "text_config", "layer_types"]


@settings(
    derandomize=True,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(fields=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_fuzz(tmp_path, fields):
    try:
        config = load(tmp_path, LLAMA | fields)
    except CheckpointError:
        return
    assert config.num_heads % config.num_kv_heads == 0
    assert 1 <= config.num_layers <= 1000


@settings(derandomize=True, deadline=None, max_examples=100)
@given(data=st.binary(max_size=100))
def test_fuzz_bytes(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError):
        load_model_config(folder)
