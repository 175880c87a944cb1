"""The padded benchmark model computes what its source computes, whatever its shape."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tool_runs import loaded
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, LAYERS = 97, 32, 2


@pytest.fixture(scope="module")
def tool():
    with loaded("make_bench_model") as module:
        yield module


def write_source(folder, *, tied=True, dtype=torch.float32):
    """A random Llama whose norm weights and epsilon are far from neutral, so that both matter."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-2,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.3, 1.7)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"stub": true}')
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


def options(**changed):
    sizes = {"hidden": 48, "layers": LAYERS, "intermediate": 56, "heads": 6} | changed
    return [text for name, value in sizes.items() for text in (f"--{name}", str(value))]


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokens = torch.randint(VOCAB, (2, 23), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    ("sizes", "tied"),
    [
        ({"hidden": HIDDEN, "intermediate": 40, "heads": 4}, True),
        ({"hidden": HIDDEN, "intermediate": 40, "heads": 4}, False),
        ({"hidden": 48}, True),
        ({"hidden": 4 * HIDDEN, "heads": 16, "intermediate": 100}, False),
        ({"hidden": 36, "layers": 5}, True),
        ({"hidden": 80, "layers": 3, "heads": 4, "intermediate": 41}, False),
        ({"hidden": HIDDEN, "heads": 8, "intermediate": 40}, True),
    ],
    ids=str,
)
def test_same_logits_as_the_source(tool, tmp_path, sizes, tied):
    small = write_source(tmp_path / "small", tied=tied)
    assert tool.main([str(tmp_path / "large"), "--source", str(small), *options(**sizes)]) == 0
    expected = logits(small)
    assert expected.std() > 0.3  # else close logits would prove little
    torch.testing.assert_close(logits(tmp_path / "large"), expected, rtol=0, atol=1e-5)


def test_shape_dtype_and_tokenizer(tool, tmp_path):
    small = write_source(tmp_path / "small", dtype=torch.bfloat16)
    large = tmp_path / "large"
    assert tool.main([str(large), "--source", str(small), *options(layers=3)]) == 0
    config = json.loads((large / "config.json").read_text())
    asked = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    assert [config[name] for name in asked] == [48, 3, 56, 6]
    assert (config["num_key_value_heads"], config["head_dim"]) == (3, 8)
    assert (large / "tokenizer.json").read_text() == '{"stub": true}'
    weights = load_file(large / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert weights["model.layers.2.self_attn.q_proj.weight"].shape == (6 * 8, 48)


def test_what_does_not_matter_looks_like_weights(tool, source, tmp_path):
    large = tmp_path / "large"
    assert tool.main([str(large), "--source", str(source), *options(layers=3)]) == 0
    weights = load_file(large / "model.safetensors")
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        extra_columns = weights[f"model.layers.0.{part}.weight"][:, HIDDEN:]
        extra_layer = weights[f"model.layers.2.{part}.weight"]
        for random in (extra_columns, extra_layer):
            assert random.std() == pytest.approx(0.02, rel=0.2)


def test_shards_stay_within_the_limit(tool, source, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    common = ["--source", str(source), *options()]
    assert tool.main([str(one), *common]) == 0
    assert tool.main([str(many), *common, "--shard-size", "32KiB"]) == 0
    shards = sorted(many.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 32 * 1024 + 4096 for shard in shards)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    whole, joined = load_file(one / "model.safetensors"), {}
    for shard in shards:
        held = load_file(shard)
        assert {index["weight_map"][name] for name in held} == {shard.name}
        joined |= held
    assert joined.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in whole.values())
    assert torch.equal(logits(many), logits(one))


def test_seed_decides_the_bytes(tool, source, tmp_path):
    written = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            tool.main([str(tmp_path / name), "--source", str(source), *options(), f"--seed={seed}"])
            == 0
        )
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": 31}, "--hidden 31 is less than the source model's 32"),
        ({"layers": 1}, "--layers 1 is less than the source model's 2"),
        ({"intermediate": 39}, "--intermediate 39 is less than the source model's 40"),
        ({"heads": 2}, "--heads 2 is less than the source model's 4"),
        ({"heads": 5}, "--heads 5 is not a multiple of 2"),
        ({"hidden": 50}, "--hidden 50 is not a multiple of --heads 6"),
        ({"shard-size": "big"}, "'big' is not a memory size"),
    ],
    ids=str,
)
def test_wrong_sizes_are_refused(tool, source, tmp_path, capsys, changed, message):
    out = tmp_path / "out"
    assert tool.main([str(out), "--source", str(source), *options(**changed)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_full_folder_is_kept_without_force(tool, source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "model-00001-of-00009.safetensors").write_text("old")
    command = [str(out), "--source", str(source), *options()]
    assert tool.main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert tool.main([*command, "--force"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]


def test_the_source_is_never_overwritten(tool, tmp_path, capsys):
    small = write_source(tmp_path / "small")
    before = (small / "model.safetensors").read_bytes()
    assert tool.main([str(small), "--source", str(small), *options(), "--force"]) == 2
    assert "is the source model itself" in capsys.readouterr().err
    assert (small / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "holds a 'gpt2' model"),
        ({"attention_bias": True}, "with biases"),
    ],
    ids=str,
)
def test_other_networks_are_refused(tool, tmp_path, capsys, change, message):
    small = write_source(tmp_path / "small")
    config = json.loads((small / "config.json").read_text()) | change
    (small / "config.json").write_text(json.dumps(config))
    assert tool.main([str(tmp_path / "out"), "--source", str(small), *options()]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path / "out"), "--source", str(tmp_path / "none"), *options()]) == 2
    assert "cannot read the source model" in capsys.readouterr().err
