"""F-26: an adapter beside a model is never left out in silence, and one that is named is applied.

The law: with `--adapter` weights and tokens are those of peft's `merge_and_unload` in the number
format of the computation, bit for bit, resident and streamed.
"""

import json
import shutil

import engines
import peft
import pytest
import torch
from engines import PROMPT, engine_for, generate
from safetensors.torch import load_file, save_file

from offload_rt.adapters.merging import with_adapter
from offload_rt.adapters.reading import read_adapter
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.weight_files import WeightFiles

IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def make_adapter(tmp_path_factory):
    """Write an adapter of random numbers for a model, made by peft."""

    made_before = {}

    def make(folder, *, to=None, stored=torch.float32, **config):
        key = None if to else (folder, stored, json.dumps(config))
        if key in made_before:
            return made_before[key]
        model = engines.reference_model(folder)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | config
        made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        dice = torch.Generator().manual_seed(5)
        for name, parameter in made.named_parameters():
            if "lora_magnitude" not in name and (parameter.requires_grad or "lora_" in name):
                noise = torch.randn(parameter.shape, generator=dice) * 0.2
                parameter.data += noise if "lora_" not in name else noise - parameter.data
        to = to or tmp_path_factory.mktemp("adapter") / "tuned"
        made.to(stored).save_pretrained(to)
        (to / "README.md").unlink(missing_ok=True)
        if key:
            made_before[key] = to
        return to

    return make


def merged_by_peft(folder, adapter, dtype):
    """The reference: the whole model in memory, merged at once."""
    model = engines.reference_model(folder, dtype)
    return peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()


def tokens_of(model, count=12):
    made = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return made[0, len(PROMPT) :].tolist()


KINDS = {
    "lora": {},
    "rank-stabilised": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "all-linear": {"target_modules": "all-linear", "layers_to_transform": None},
    "some-layers": {"layers_to_transform": [1]},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "biases-of-lora": {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
    "lora-bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "head-and-norm": {"modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "up_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_peft_merges(make_tiny, make_adapter, kind):
    folder = make_tiny("llama", attention_bias=True, dtype="bfloat16", **IDS)
    adapter = make_adapter(folder, **KINDS[kind])
    checkpoint = open_checkpoint(folder)
    made = with_adapter(checkpoint, read_adapter(adapter), "auto")
    expected = merged_by_peft(folder, adapter, torch.bfloat16).state_dict()
    files = WeightFiles(made.files)
    changed = 0
    for name, extent in made.tensors.items():
        assert torch.equal(files.read(extent), expected[name]), name
        changed += extent.path.parent != folder
    files.close()
    plain = load_file(folder / "model.safetensors")
    assert changed >= sum(not torch.equal(plain[name], expected[name]) for name in plain) > 0
    parts = [*made.layers, made.others, (made.embedding, made.head)]
    assert made.total_bytes == checkpoint.total_bytes  # nor does a pass read more
    assert all(extent is made.tensors[extent.name] for part in parts for extent in part)
    assert [len(layer) for layer in made.layers] == [len(layer) for layer in checkpoint.layers]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_in_the_format_of_the_computation(make_tiny, make_adapter, dtype, stored):
    folder = make_tiny("llama", dtype="bfloat16", **IDS)
    adapter = make_adapter(folder, stored=stored)
    made = with_adapter(open_checkpoint(folder), read_adapter(adapter), dtype)
    expected = merged_by_peft(folder, adapter, getattr(torch, dtype)).state_dict()
    files = WeightFiles(made.files)
    for name, extent in made.tensors.items():
        assert torch.equal(files.read(extent).to(getattr(torch, dtype)), expected[name]), name
    files.close()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_answers_are_those_of_the_merged_model(make_tiny, make_adapter, monkeypatch, family):
    folder = make_tiny(family, **IDS)
    adapter = make_adapter(folder, target_modules=["q_proj", "down_proj"])
    expected = tokens_of(merged_by_peft(folder, adapter, torch.float32))
    assert expected != tokens_of(engines.reference_model(folder))
    made = with_adapter(open_checkpoint(folder), read_adapter(adapter), "auto")
    monkeypatch.setattr(engines, "open_checkpoint", lambda _: made)
    for more in ({}, {"resident_layers": 0}, {"resident_layers": 1, "slots": 1}):
        with engine_for(folder, **more) as engine:
            assert generate(engine, tokens=12) == [expected]


def ask(offload_run, *arguments):
    return offload_run("generate", *arguments, "-p", "the quick", "--raw", "-n", 6)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapters.safetensors"])
def test_an_adapter_beside_the_model_asks_what_to_do(
    tiny_model, offload_run, prompt_file, tmp_path, name
):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    plain = ask(offload_run, folder)
    (folder / name).write_text("{}")
    for verb in (["generate", folder], ["chat", folder], ["bench", folder, "--prompts", "x"]):
        done = offload_run(*verb)
        assert (done.code, done.out) == (2, "")
        assert f"holds an adapter ({name}) beside the model" in done.err
        assert f"--adapter {folder} to apply it, or --adapter none" in done.err
    shared = ["--output", tmp_path / "out", "--device-memory", "1GiB"]
    compare = ["compare", folder, "--prompts", prompt_file, "--against", "transformers", *shared]
    for verb in (compare, ["train-medusa", folder, "--data", prompt_file, *shared]):
        done = offload_run(*verb)
        assert done.code == 2 and "move the adapter into a folder of its own" in done.err
    left_out = ask(offload_run, folder, "--adapter", "none")
    assert (left_out.code, left_out.out) == (0, plain.out)
    told = offload_run("plan", folder, "--device", "cpu")
    assert told.code == 0 and f"an adapter ({name}) beside the model: it is not applied" in told.err


def test_one_that_is_named_is_applied_said_and_kept(
    tiny_model, make_adapter, offload_run, tmp_path
):
    adapter = make_adapter(tiny_model, to=tmp_path / "tuned", target_modules=["q_proj", "up_proj"])
    plain = ask(offload_run, tiny_model)
    done = ask(offload_run, tiny_model, "--adapter", adapter, "--draft", "ngram")
    assert done.code == 0 and done.out != plain.out
    assert "adapter 'tuned', LoRA of rank 4 on 'q_proj, up_proj', is merged into 4 of" in done.err
    merged = tmp_path / "merged"
    merged_by_peft(tiny_model, adapter, torch.float32).save_pretrained(merged)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny_model / file, merged / file)
    assert ask(offload_run, merged).out == done.out
    (kept,) = (tmp_path / "cache" / "adapters").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert ask(offload_run, tiny_model, "--adapter", adapter).out == done.out
    assert kept.stat().st_mtime_ns == stamp
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t * 2 for n, t in tensors.items()}, adapter / "adapter_model.safetensors")
    assert ask(offload_run, tiny_model, "--adapter", adapter).out != done.out
    (other,) = (tmp_path / "cache" / "adapters").iterdir()  # in place of the one of before
    assert other != kept


def edited(adapter, to, **changes):
    folder = shutil.copytree(adapter, to)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "of the kind 'IA3', only LORA"),
        ({"peft_type": None}, "of the kind None"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "sets 'layer_replication'"),
        ({"trainable_token_indices": [3]}, "sets 'trainable_token_indices'"),
        ({"init_lora_weights": "pissa"}, "sets 'init_lora_weights' to 'pissa'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "sets 'target_parameters'"),
        ({"something_new": 1}, "sets 'something_new' to 1"),
        ({"target_modules": ["nothing_like_it"]}, "peft cannot put adapter"),
        ({"r": 3}, "peft cannot put adapter"),
        ({"target_modules": ["q_proj"]}, "the two do not belong together"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "the two do not belong together"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(
    tiny_model, make_adapter, offload_run, tmp_path, changes, told
):
    adapter = edited(make_adapter(tiny_model), tmp_path / "edited", **changes)
    done = ask(offload_run, tiny_model, "--adapter", adapter)
    assert (done.code, done.out) == (4, "") and told in done.err
    assert not list(tmp_path.glob("cache/adapters/*"))


@pytest.mark.parametrize(
    "config", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}]
)
def test_a_tied_end_is_refused(make_tiny, make_adapter, config):
    folder = make_tiny("qwen2", tie_word_embeddings=True, **IDS)
    adapter = make_adapter(folder, **config)
    with pytest.raises(CheckpointError, match="shares its tensor with another"):
        with_adapter(open_checkpoint(folder), read_adapter(adapter), "auto")


def test_an_adapter_that_is_no_number_is_refused(make_tiny, make_adapter, tmp_path):
    folder = make_tiny("llama", **IDS)
    adapter = make_adapter(folder, to=tmp_path / "tuned")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.inf
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is NaN or infinite with adapter 'tuned'"):
        with_adapter(open_checkpoint(folder), read_adapter(adapter), "auto")
    assert not list((tmp_path / "cache" / "adapters").iterdir())


def test_pickled_weights_are_not_opened(tiny_model, make_adapter, offload_run, tmp_path):
    adapter = make_adapter(tiny_model, to=tmp_path / "tuned")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    done = ask(offload_run, tiny_model, "--adapter", adapter)
    assert done.code == 4 and "adapter_model.safetensors is missing" in done.err
