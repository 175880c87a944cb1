"""What one door refuses the other refuses, with the same sentence: the command line and Python."""

import re
import shutil
from types import SimpleNamespace

import pytest

import offload_rt
from offload_rt.errors import ConfigError
from offload_rt.session.options import ANSWER_KEYWORDS, KEYWORDS
from offload_rt.session.scoring import encoded_pair

LONG = "x " * 600
LINKS = {"device": "cpu,cpu", "link_bandwidth": "1,1", "home": "host"}
# Options by keyword, and a part of the sentence.
WRONG = [
    ({"device_memory": "lots"}, "'lots' is not a memory size"),
    ({"device_memory": "0"}, "not a memory size"),
    ({"device_memory": 0}, "'0' is not a memory size"),
    ({"device_memory": -5}, "'-5' is not a memory size"),
    ({"host_memory": "2 parsecs"}, "not a memory size"),
    ({"host_memory": 0}, "'0' is not a memory size"),
    ({"host_memory": "2GiB"}, "add --home host"),
    ({"device": "tpu"}, "--device tpu is not known"),
    ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
    ({"device": "cuda:1,cuda:1"}, "names cuda:1 twice"),
    ({"device": "cpu,cpu"}, "2 emulated links: add --link-bandwidth 1,1"),
    ({"device": "cpu,cpu", "link_bandwidth": 1}, "add --home host"),
    ({"device": "cpu,cpu", "link_bandwidth": "1,2,3"}, "has 3 values, --device cpu,cpu names 2"),
    ({"device_memory": "1GiB,1GiB"}, "has 2 values, --device auto names 1"),
    (LINKS | {"device_memory": "1GiB,1KiB"}, "cpu number 1 would have none of the model's layers"),
    (LINKS, "--link-bandwidth has no effect"),
    ({"dtype": "float8"}, "'float8' is not one of"),
    ({"slots": "many"}, "neither auto nor a whole number"),
    ({"slots": 0}, "--slots is 0, accepted is"),
    ({"slots": 2.5}, "neither auto nor a whole number"),
    ({"expert_slots": "few"}, "neither auto nor a whole number"),
    ({"expert_slots": -1}, "--expert-slots is -1"),
    ({"expert_slots": 4}, "--expert-slots"),
    ({"expert_slots": 4, "slots": 2}, "leave out one of them"),
    ({"look_ahead": "maybe"}, "'maybe' is not one of"),
    ({"look_ahead": "on"}, "--look-ahead on has no effect"),
    ({"look_ahead": "on", "expert_slots": 0}, "leave out one of them"),
    ({"expert_misses": "gpu"}, "'gpu' is not one of"),
    ({"expert_misses": "host"}, "add --exact off"),
    ({"expert_misses": "host", "exact": "off"}, "the CPU computes all of it"),
    ({"wire": "int3"}, "'int3' is not one of"),
    ({"wire": "lossless"}, "keeps the codes"),
    ({"wire": "int8", "resident_layers": 1}, "would be read from the files in each pass"),
    ({"exact": "maybe"}, "'maybe' is not one of"),
    ({"resident_layers": -1}, "--resident-layers is -1"),
    ({"resident_layers": 9}, "9, the model has 2 layers"),
    ({"home": "moon"}, "'moon' is not one of"),
    ({"home": "host"}, "--home has no effect"),
    ({"home": "host", "resident_layers": 0, "host_memory": "8KiB"}, "host memory"),
    ({"home": "split", "resident_layers": 0, "host_memory": "8KiB"}, "--home split"),
    ({"context": 0}, "--context is 0"),
    ({"context": 513}, "--context is 513, .* up to 512"),
    ({"kv": "none"}, "'none' is not one of"),
    ({"kv": "host", "host_memory": "8KiB"}, "the KV cache needs .* of host memory"),
    ({"kv": "host", "kv_folder": "/tmp"}, "add --kv disk"),
    ({"kv_block_tokens": 0}, "--kv-block-tokens is 0"),
    ({"kv": "device", "kv_block_tokens": 4}, "no effect with --kv device"),
    ({"kv": "disk", "kv_folder": "/no/such/folder"}, "/no/such/folder"),
    ({"link_bandwidth": 2}, "add --home host"),
    ({"link_bandwidth": 0, "home": "host"}, "not in the range"),
    ({"link_bandwidth": "nan", "home": "host"}, "not in the range"),
    ({"readers": 0}, "--readers is 0"),
    ({"readers": "x"}, "not a valid integer"),
    ({"threads": 5000}, "--threads is 5000"),
    ({"draft": "magic"}, "--draft"),
    ({"draft": "4"}, "4 is no drafter"),
    ({"draft": "/no/such/model"}, "/no/such/model"),
    ({"draft": "medusa:/no/such/heads"}, "/no/such/heads"),
    ({"draft": "auto:/no/such/model"}, "/no/such/model"),
    ({"draft": "eagle3"}, "--draft eagle3 is not known"),
    ({"draft": "eagle3:/no/such/head"}, "/no/such/head"),
    ({"draft": "mtp"}, "--draft mtp"),
    ({"draft": "mtp:x"}, "--draft mtp:x is not known"),
    ({"draft": "self"}, "drafts with copies of streamed layers"),
    ({"draft": "self:int3"}, "--draft self:int3 is not known"),
    ({"draft": "self", "kv": "disk", "resident_layers": 1}, "--draft self"),
    ({"draft": "ngram", "draft_tokens": 0}, "--draft-tokens is 0"),
    ({"draft": "ngram", "draft_tokens": "few"}, "neither auto nor a whole number"),
    ({"draft": "none", "draft_tokens": 4}, "no effect with --draft none"),
    ({"draft": "ngram", "draft_shape": "tree"}, "--draft-shape is for"),
    ({"draft_shape": "bush"}, "'bush' is not one of"),
    ({"draft": "ngram", "draft_weights": "int8"}, "--draft-weights is for"),
    ({"draft": "ngram", "draft_window": 64}, "--draft-window is for"),
    ({"draft_window": 0}, "neither auto nor full"),
    ({"draft": "ngram", "inner_gamma": 4}, "--inner-gamma is for"),
    ({"draft": "ngram", "retrieval_budget": 64}, "are for --draft triforce"),
    ({"draft": "triforce", "retrieval_budget": 8}, "--retrieval-budget is 8"),
    ({"draft": "triforce", "retrieval_chunk": 0}, "--retrieval-chunk is 0"),
    ({"draft": "triforce", "retrieval_recent": 2}, "--retrieval-recent is 2"),
    ({"draft": "triforce", "retrieval_recent": "most"}, "neither auto nor a number"),
    ({"draft": "triforce", "retrieval_rebuild": 0}, "--retrieval-rebuild is 0"),
    ({"draft": "triforce", "retrieval_weights": "int2"}, "'int2' is not one of"),
    ({"accept": "always"}, "'always' is not one of"),
    ({"accept": "typical", "draft": "none"}, "no effect without --draft"),
    ({"accept": "typical", "draft": "ngram"}, "no effect on a greedy answer"),
    ({"accept": "greedy", "temperature": 0.5}, "contradicts --temperature 0.5"),
    ({"plan": "/no/such/plan.json"}, "there is no such file"),
    ({"profile": "no-such-machine"}, "no-such-machine"),
    ({"profile": ""}, "there is no profile ''"),
    ({"adapter": "/no/such/adapter"}, "/no/such/adapter"),
    ({"max_tokens": 0}, "--max-tokens is 0"),
    ({"max_tokens": "x"}, "not a valid integer"),
    ({"max_tokens": 1.5}, "not a valid integer"),
    ({"stop": ""}, "--stop is empty"),
    ({"temperature": "warm"}, "not a valid float"),
    ({"temperature": "nan"}, "--temperature is nan"),
    ({"temperature": -1}, "--temperature is -1"),
    ({"top_k": -1}, "--top-k is -1"),
    ({"top_p": 0, "temperature": 1}, "--top-p is 0"),
    ({"top_p": 0.5}, "--top-p 0.5 has no effect on a greedy answer"),
    ({"min_p": 1, "temperature": 1}, "--min-p is 1"),
    ({"min_p": 0.1}, "--min-p 0.1 has no effect"),
    ({"seed": -1}, "--seed is -1"),
    ({"seed": "x"}, "not a valid integer"),
    ({"sampling": "wild"}, "'wild' is not one of"),
    ({"sampling": "model"}, "recommends no sampling"),
    ({"system": "s", "raw": True}, "system prompt needs a chat template"),
    ({"prompt": ""}, "is empty"),
    ({"prompt": " \n "}, "is empty"),
    ({"prompt": "\ufeff"}, "is empty"),
    ({"prompt": "\ud800"}, "not UTF-8"),
    ({"prompt": LONG}, r"the prompt has 1\d\d\d tokens, .* 512"),
    ({"prompt": "x " * 20, "context": 30}, r"the prompt has \d\d tokens, --context .* 30"),
]


KEYWORDS_OF_SWITCHES = {"ignore_eos"}  # on a command line it is there or not


def test_every_option_is_among_what_is_refused():
    tried = {keyword for wrong, _ in WRONG for keyword in wrong} - {"prompt"}
    assert KEYWORDS - tried == KEYWORDS_OF_SWITCHES


def words_of(options):
    """The same on a command line."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [f"{flag}={value}"]
    return words


def refusal(call):
    with pytest.raises(offload_rt.OffloadError) as caught:
        call()
    return str(caught.value), caught.value.exit_code


def from_python(model, prompt, options):
    with offload_rt.load(model, **options) as loaded:
        loaded.generate(prompt)


def told(done):
    """The sentence of a command line, and its exit code."""
    assert done.out == "", done.out
    (line,) = re.findall(r"offload-run: error: (.*)\n", done.err)
    line = line.replace(" from --prompt", "")
    return re.sub(r"; see `offload-run \w+ --help`$", "", line), done.code


@pytest.fixture(scope="module")
def loaded(tiny_model):
    with offload_rt.load(tiny_model, device="cpu", device_memory="512MiB", draft="none") as model:
        yield model


def test_both_doors_say_what_memory_would_do(tiny_model, offload_run):
    """Python sets more memory aside for the prompt; all but the sizes is the same."""
    by_python = refusal(lambda: offload_rt.load(tiny_model, device="cpu", device_memory="1MiB"))
    done = told(offload_run("generate", tiny_model, "-p", "x", "--device-memory", "1MiB"))
    sizes = re.compile(r"[\d.]+ ?[KM]iB")
    assert (sizes.sub("?", done[0]), done[1]) == (sizes.sub("?", by_python[0]), 3)
    assert "use --device-memory ?" in sizes.sub("?", done[0])


@pytest.mark.parametrize(("wrong", "sentence"), WRONG, ids=lambda of: str(of)[:40])
def test_both_doors_refuse_it_alike(wrong, sentence, tiny_model, loaded, offload_run):
    options = dict(wrong)
    prompt = options.pop("prompt", "the quick fox")
    by_python = refusal(lambda: from_python(tiny_model, prompt, options))
    assert re.search(sentence, by_python[0])
    done = offload_run("generate", tiny_model, f"--prompt={prompt}", *words_of(options))
    assert told(done) == by_python
    if options.keys() <= ANSWER_KEYWORDS:
        assert refusal(lambda: loaded.generate(prompt, **options)) == by_python
        assert refusal(lambda: loaded.stream(prompt, **options)) == by_python


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def adapter_beside(folder):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [shutil.rmtree, only_pickle, no_tokenizer, no_config, truncated, adapter_beside]
)
def test_both_doors_refuse_a_damaged_folder_alike(damage, tiny_model, tmp_path, offload_run):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    damage(folder)
    by_python = refusal(lambda: offload_rt.load(folder))
    assert told(offload_run("generate", folder, "-p", "x")) == by_python


def test_both_doors_refuse_a_plan_that_contradicts_alike(tiny_model, tmp_path, offload_run):
    path = tmp_path / "plan.json"
    assert offload_run("plan", tiny_model, "--device-memory", "512MiB", "--output", path).code == 0
    with offload_rt.load(tiny_model, plan=path) as model:
        assert model.plan.device_limit_bytes == 512 * 2**20
    for wrong in ({"resident_layers": 2}, {"dtype": "float16"}):
        by_python = refusal(lambda: offload_rt.load(tiny_model, plan=path, **wrong))  # noqa: B023
        words = words_of(wrong | {"plan": path})
        assert told(offload_run("generate", tiny_model, "-p", "x", *words)) == by_python


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda m: m.generate("a", temperatur=1),
            "no option temperatur: did you",
        ),
        (lambda m: m.generate("a", slots=2), "an answer has no option slots"),
        (lambda m: m.generate(5), "the prompt is 5, accepted is a text"),
        (lambda m: m.generate(["a", 5]), "the prompt is 5, accepted is a text"),
        (lambda m: m.generate(b"hi"), "the prompt is b'hi', accepted is a text"),
        (lambda m: m.generate([True]), "the prompt is True, accepted is a text"),
        (lambda m: m.generate([{"role": "user"}]), "a turn of the prompt is {'role': 'user'}"),
        (lambda m: m.generate([[]]), "the prompt is empty"),
        (lambda m: m.stream([]), "the prompt is empty: give some text"),
        (lambda m: m.generate("a", logprobs="x"), "logprobs is 'x', accepted is True or False"),
        (lambda m: m.stream("a", logprobs=1), "logprobs is 1, accepted is True or False"),
        (lambda m: m.generate("a", raw="yes"), "--raw is 'yes'"),
        (lambda m: m.generate("a", ignore_eos=1), "'--ignore-eos': '1' is not a valid boolean"),
        (lambda m: m.generate("a", system=5), "--system is 5"),
        (lambda m: m.generate("a", stop=[5]), "neither a text nor a list of texts"),
        (lambda m: m.generate("a", max_tokens=None), "'None' is not a valid integer"),
        (lambda m: m.score(["a"]), "pair 1 is 'a', accepted is a context and a continuation"),
        (lambda m: m.score([("a", "")]), "the continuation of pair 1 is empty"),
        (lambda m: m.score([("a", [5])]), "pair 1 is a text and token ids"),
        (lambda m: m.score(None), "the pairs are None, accepted is a list of pairs"),
        (lambda m: m.score([(5, 6)]), "pair 1 has 5, accepted are two texts or two lists"),
        (lambda m: m.score([([5], [6.0])]), "pair 1 has [6.0], accepted are two texts"),
        (lambda m: m.score([(b"a", b"b")]), "pair 1 has b'a', accepted are two texts"),
        (lambda m: m.score([("a", "\ud800")]), "pair 1 is not UTF-8 at character 0"),
        (lambda m: m.score([([], [5])]), "the context of pair 1 has no token"),
        (lambda m: m.score([([5], [999])]), "token 999 has no row in the embedding"),
        (lambda m: m.score([("a", "b"), ("a", LONG)]), "was made for up to 513"),
    ],
)
def test_what_only_python_can_get_wrong(call, sentence, loaded):
    assert sentence in refusal(lambda: call(loaded))[0]


def test_a_continuation_that_merges_into_its_context_is_told():
    one_token = SimpleNamespace(encode=lambda text: [5])
    model = SimpleNamespace(name="m", tokenizer=one_token)
    with pytest.raises(ConfigError, match="pair 1, 'y', is part of the context's last token"):
        encoded_pair(model, 0, ("The sk", "y"), 100)


def test_names_that_are_no_option_of_load(tiny_model):
    assert (
        "load has no option device_memori: did you mean device_memory?"
        in refusal(lambda: offload_rt.load(tiny_model, device_memori=1))[0]
    )


@pytest.mark.parametrize("wrong", [5, None, b"x", ["x"]])
def test_what_is_no_model(wrong):
    assert f"the model is {wrong!r}, accepted is" in refusal(lambda: offload_rt.load(wrong))[0]


def test_what_is_no_observer(tiny_model):
    sentence = refusal(lambda: offload_rt.load(tiny_model, observer=5))[0]
    assert "the observer is 5, accepted is an object with note, waiting and progress" in sentence


def test_a_byte_order_mark_is_no_text(loaded):
    marked, plain = (loaded.generate(text, max_tokens=2) for text in ("\ufeffThe fox", "The fox"))
    assert marked.token_ids == plain.token_ids
    assert marked.prompt_tokens == plain.prompt_tokens


def test_after_the_largest_seed_comes_the_first(loaded):
    drawn = {"temperature": 1.0, "max_tokens": 3}
    last, first = loaded.generate(["a", "b"], seed=2**63 - 1, **drawn)
    assert (last.seed, first.seed) == (2**63 - 1, 0)
    assert loaded.generate("b", seed=0, **drawn).token_ids == first.token_ids
