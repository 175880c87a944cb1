"""Drafting on the command line: flags, what is shown, and that answers stay what they were."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload_rt.errors import ConfigError
from offload_rt.planning.yields import Yield
from offload_rt.session import means
from offload_rt.speculative.draft_model.pair import check_vocabularies
from offload_rt.speculative.ngram.drafter import NgramDrafter
from offload_rt.text import load_tokenizer

PROMPT = "hello there"


def chain_of(folder, tokens=4):
    return ("--draft", f"model:{folder}", "--draft-tokens", tokens, "--draft-shape", "chain")


@pytest.fixture(scope="module")
def saying_model(tiny_model, tmp_path_factory):
    """Return a model that says `text` after "z": each byte of it leads to the next."""

    def make(text):
        folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("saying"), dirs_exist_ok=True)
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("z" + text, add_special_tokens=False)
        assert len(set(ids)) == len(ids)
        weights = load_file(folder / "model.safetensors")
        for name, tensor in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()  # layers change nothing
        embedding = torch.nn.functional.normalize(weights["model.embed_tokens.weight"])
        head = weights["lm_head.weight"].zero_()
        for token, following in zip(ids, ids[1:], strict=False):
            head[following] = embedding[token]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_auto_with_a_model_answers_as_it_would_alone(tiny_model, offload_run):
    base = ("generate", tiny_model, "-p", PROMPT, "-n", 8, "--json")
    plain = json.loads(offload_run(*base, "--draft", "none").out)
    both = json.loads(offload_run(*base, "--draft", f"auto:{tiny_model}").out)
    assert both["token_ids"] == plain["token_ids"]
    assert offload_run(*base, "--draft", "auto:nowhere").code == 4


def test_a_stop_string_inside_a_draft_ends_exactly_there(saying_model, offload_run):
    text = "a\u20acb\U0001f600\u00e9c"  # 1 + 3 + 1 + 4 + 2 + 1 bytes, a token each
    folder = saying_model(text)
    base = ("generate", folder, "--raw", "-p", "z", "-n", 12)
    plain = json.loads(offload_run(*base, "--json").out)
    assert plain["text"] == text
    # Tokens 1, 2-6, 7-11: the smiley begins in one draft and is complete at token 9.
    for stop, count, kept in (("\U0001f600", 9, "a\u20acb"), ("\u20ac", 4, "a"), ("cc", 12, text)):
        wanted = json.loads(offload_run(*base, "--json", "--stop", stop).out)
        drafted = json.loads(offload_run(*base, "--json", "--stop", stop, *chain_of(folder)).out)
        assert (wanted["completion_tokens"], wanted["text"]) == (count, kept)
        for name in ("text", "token_ids", "finish_reason", "completion_tokens"):
            assert drafted[name] == wanted[name], name
        assert drafted["speculation"]["passes"] < wanted["speculation"]["passes"]
        shown = offload_run(*base, "-q", "--stop", stop, *chain_of(folder))
        assert shown.out == kept + "\n"


def test_a_stop_string_of_a_random_model_cuts_as_without_drafting(tiny_model, offload_run):
    base = ("generate", tiny_model, "-p", PROMPT, "-n", 30, "--json")
    whole = json.loads(offload_run(*base).out)

    def kept(stop):
        stream = load_tokenizer(tiny_model).stream([stop])
        stream.push(whole["token_ids"])
        return stream.kept_tokens

    candidates = [c for c in whole["text"] if c.isprintable() and c != "\ufffd"]
    stop = next(c for c in candidates if kept(c) > 6 and kept(c) % 5 in (3, 4))
    wanted = json.loads(offload_run(*base, "--stop", stop).out)
    drafted = json.loads(offload_run(*base, "--stop", stop, *chain_of(tiny_model)).out)
    assert wanted["finish_reason"] == "stop"
    for name in ("text", "token_ids", "finish_reason"):
        assert drafted[name] == wanted[name], name


def test_the_block_has_a_line_about_drafting(tiny_model, offload_run):
    base = ("generate", tiny_model, "-p", PROMPT, "-n", 12)
    done = offload_run(*base, *chain_of(tiny_model))
    plain = offload_run(*base, "--draft", "none")
    assert done.out == plain.out
    assert "drafting" not in plain.err
    # The first token, then 4 + 1, 4 + 1, and 1: the last draft has nothing to propose.
    assert re.search(
        rf"drafting model {tiny_model.name}, 8 of 8 drafted accepted \(100%\), 3.67 tokens/pass, "
        r"by depth 100% 100% 100% 100%, drafting \d+\.\d\d s "
        r"\(\d+% of the time after the first token\)\n",
        done.err,
    )
    nothing = offload_run("generate", tiny_model, "--raw", "-p", "x", "-n", 2, "--draft", "ngram")
    assert "drafting ngram, nothing was drafted" in nothing.err


def test_triforce_says_what_its_passes_read(tiny_model, offload_run):
    base = ("generate", tiny_model, "-p", PROMPT, "-n", 24)
    plain = offload_run(*base)
    some = ("--draft", "triforce", "--retrieval-budget", 20, "--retrieval-chunk", 4)
    done = offload_run(*base, *some, "--retrieval-rebuild", 8)
    assert done.out == plain.out
    assert "within --retrieval-budget" not in done.err
    assert re.search(
        r"retrieve \d+ passes over at most 20 tokens in chunks of 4, chosen \d+ times"
        r"(, \d+ of them the newest only)?; "
        r"\d+ of \d+ tokens drafted by ngram accepted",
        done.err,
    )
    whole = offload_run(*base, "--draft", f"triforce:{tiny_model}", "--inner-gamma", 2)
    assert whole.out == plain.out
    assert re.search(r"the prompt's \d+ tokens are within --retrieval-budget 1024", whole.err)
    assert "chosen once" in whole.err and f"drafted by model {tiny_model.name}" in whole.err
    record = json.loads(offload_run(*base, *some, "--json").out)["speculation"]
    assert record["drafter"] == "triforce" and record["retrieval"]["passes"] > 0
    plan = json.loads(offload_run("plan", tiny_model, *some, "--json").out)
    assert plan["drafter_bytes"] > 0


def test_typical_says_that_it_changes_the_distribution(tiny_model, offload_run):
    base = ("generate", tiny_model, "-p", PROMPT, "-n", 8, "--temperature", 1, "--draft", "ngram")
    done = offload_run(*base, "--accept", "typical")
    assert "typical (changes the distribution)" in done.err
    assert "changes the distribution" not in offload_run(*base).err
    record = json.loads(offload_run(*base, "--accept", "typical", "--json").out)
    assert record["speculation"]["accept_rule"] == "typical"


@pytest.mark.parametrize("wins", [True, False])
def test_auto_may_draft_for_typical_acceptance_and_says_where_it_does_not(
    wins, tiny_model, offload_run, monkeypatch
):
    gives = Yield(((8, 7.9 * wins),))
    monkeypatch.setattr(means, "expected_yield", lambda *_: gives)
    base = ("generate", tiny_model, "-p", PROMPT, "-n", 8, "--temperature", 1)
    done = offload_run(*base, "--accept", "typical")
    assert done.code == 0, done.err
    assert ("typical (changes the distribution)" in done.err) is wins
    assert ("--accept typical has no effect here" in done.err) is not wins
    assert "no effect" not in offload_run(*base).err


def test_json_has_the_drafters_numbers(tiny_model, offload_run):
    base = ("generate", tiny_model, "-p", PROMPT, "-n", 12, "--json")
    record = json.loads(offload_run(*base, *chain_of(tiny_model)).out)
    speculation = record["speculation"]
    assert (speculation["drafter"], speculation["accept_rule"]) == ("model", "greedy")
    assert speculation["acceptance_per_depth"] == [1.0] * 4
    assert speculation["acceptance_rate"] == 1.0 and speculation["draft_s"] > 0
    assert record["plan"]["drafter"] == f"model:{tiny_model}"
    assert record["plan"]["draft_tokens"] == 4 and record["plan"]["drafter_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--draft", "magic"],
            "--draft magic is not known: use auto, auto:MODEL, none, ngram, model:MODEL, medusa:",
        ),
        (["--draft", "model:"], "is not known"),
        (
            ["--draft-tokens", "4"],
            "--draft-tokens has no effect with --draft auto: name",
        ),
        (["--draft", "ngram", "--draft-tokens", "0"], "--draft-tokens is 0"),
        (["--draft", "ngram", "--draft-tokens", "few"], "neither auto nor a whole number"),
        (["--draft", "ngram", "--draft-shape", "tree"], "--draft-shape is for drafting with"),
        (["--draft", "triforce", "--retrieval-budget", "9"], "--retrieval-budget is 9, accepted"),
        (["--draft", "triforce", "--retrieval-chunk", "0"], "--retrieval-chunk is 0"),
        (["--draft", "triforce", "--inner-gamma", "0"], "--inner-gamma is 0"),
        (["--draft", "ngram", "--retrieval-recent", "0.5"], "options are for --draft triforce"),
        (
            ["--draft", "none", "--accept", "typical", "--temperature", "1"],
            "typical has no effect without --draft",
        ),
        (
            ["--accept", "typical", "--temperature", "1", "--seed", "1"],
            "typical has no effect on an answer with --seed where --draft auto chooses",
        ),
        (["--draft", "ngram", "--accept", "typical"], "no effect on a greedy answer"),
        (
            ["--draft", "ngram", "--accept", "greedy", "--temperature", "0.5"],
            "--accept greedy contradicts --temperature 0.5",
        ),
    ],
)
def test_bad_usage(arguments, message, tiny_model, offload_run):
    for verb in ("generate", "chat"):
        prompt = ("-p", "x") if verb == "generate" else ()
        done = offload_run(verb, tiny_model, *prompt, *arguments)
        assert (done.code, done.out) == (2, "")
        assert message in done.err and "Traceback" not in done.err


def test_a_draft_model_that_is_not_there(tiny_model, offload_run):
    for verb in (("generate", tiny_model, "-p", "x"), ("plan", tiny_model)):
        done = offload_run(*verb, "--draft", "model:/no/such/folder")
        assert (done.code, done.out) == (4, "")
        assert "'/no/such/folder' does not exist" in done.err


@pytest.fixture
def other_tokenizer(tiny_model, tmp_path):
    """The tiny model with two tokens of its vocabulary swapped."""
    folder = shutil.copytree(tiny_model, tmp_path / "other")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    return folder


def test_another_tokenizer_is_refused(other_tokenizer, tiny_model, offload_run):
    for verb in (("generate", tiny_model, "-p", "x"), ("chat", tiny_model)):
        done = offload_run(*verb, "--draft", f"model:{other_tokenizer}")
        assert (done.code, done.out) == (2, "")
        assert re.search(
            r"tokenizer of other has \d{3} tokens, the target's \d{3}, and token \d+ is 'b' there "
            r"and 'a' in the target's: take a draft model with the same tokenizer",
            done.err,
        )


def test_the_same_vocabulary_in_another_file_is_fine(tiny_model, offload_run, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    base = ("generate", tiny_model, "-p", PROMPT, "-n", 8, "-q")
    done = offload_run(*base, *chain_of(folder))
    assert (done.code, done.out) == (0, offload_run(*base).out)


def test_ids_only_one_vocabulary_has_are_padding():
    target = {"a": 0, "b": 1}
    check_vocabularies(target, target | {"<extra>": 2}, "small")
    check_vocabularies(target | {"<extra>": 2}, target, "small")
    with pytest.raises(ConfigError, match="small has 3 tokens, the target's 2, and token 1 is 'c'"):
        check_vocabularies(target, {"a": 0, "c": 1, "d": 2}, "small")


@pytest.fixture
def broken_drafter(monkeypatch):
    def broken(*_):
        raise ValueError("it\nbroke")

    monkeypatch.setattr(NgramDrafter, "propose", broken)


@pytest.mark.usefixtures("broken_drafter")
def test_a_drafter_that_fails_is_announced_once(tiny_model, offload_run):
    line = "offload-run: the ngram drafter failed (it broke): decoding goes on without it\n"
    base = ("generate", tiny_model, "-p", PROMPT, "-n", 6)
    done = offload_run(*base, "--draft", "ngram")
    assert (done.code, done.out) == (0, offload_run(*base).out)
    assert done.err.count(line) == done.err.count("drafter failed") == 1
    assert offload_run(*base, "--draft", "ngram", "-q").err == ""
    again = offload_run(*base, "--draft", "ngram", "--json")
    assert again.err == line  # each command line announces it
    talk = offload_run("chat", tiny_model, "-n", 4, "--draft", "ngram", stdin=b"hello\nhello\n")
    assert talk.err.count("drafter failed") == 1


def test_chat_drafts(tiny_model, offload_run):
    base = ("chat", tiny_model, "-n", 8)
    done = offload_run(*base, *chain_of(tiny_model), stdin=b"hello\n/stats\nmore\n/stats\n")
    assert done.out == offload_run(*base, stdin=b"hello\nmore\n").out
    assert len(re.findall(r"drafting model .* \(100%\)", done.err)) == 2


def test_plan_counts_the_draft_model(tiny_model, offload_run):
    base = ("--context", 64, "--device-memory", "300MiB", "--json")
    plain = json.loads(offload_run("plan", tiny_model, *base, "--draft", "none").out)
    planned = json.loads(offload_run("plan", tiny_model, *base, *chain_of(tiny_model)).out)
    assert (plain["drafter"], plain["drafter_bytes"]) == ("none", 0)
    assert planned["drafter"] == f"model:{tiny_model}" and planned["draft_tokens"] == 4
    extra = planned["smallest_device_bytes"] - plain["smallest_device_bytes"]
    assert extra >= planned["drafter_bytes"] > 0
    parts = ("base_bytes", "resident_bytes", "kv_bytes", "workspace_bytes", "drafter_bytes")
    assert sum(planned[part] for part in parts) == planned["device_bytes"]
    ran = offload_run("generate", tiny_model, "-p", "x", *base, *chain_of(tiny_model))
    used = json.loads(ran.out)["plan"]["drafter_bytes"]
    assert 0 < used <= planned["drafter_bytes"]  # the prompt is shorter than the context
    table = offload_run("plan", tiny_model, *chain_of(tiny_model)).out
    assert re.search(rf"draft model +\d.* {tiny_model.name} and its KV cache", table)


def test_plan_with_a_draft_model_imports_no_torch(tiny_model):
    source = (
        "import sys; from offload_rt.cli import run; code = run(sys.argv[1:])\n"
        "print(code, 'torch' in sys.modules)"
    )
    arguments = ["plan", tiny_model, "--draft", f"model:{tiny_model}"]
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 False"
