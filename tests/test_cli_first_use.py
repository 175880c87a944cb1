"""What people type from habit of other tools: it works, or one sentence says what to use."""

import json
import re
import sys
from types import SimpleNamespace

import click
import pytest
import torch

from offload_rt.cli.app import cli
from offload_rt.cli.habits import OPTIONS, VERBS, option_advice
from offload_rt.cli.pages import PAGES, load_verb
from offload_rt.cli.pages import VERBS as OURS

PROMPT = "hello there"
SHORT = ("-n", 6, "-q")


def names_of(verb):
    """Options of a verb, and of the verbs below it."""
    command = load_verb(verb)
    below = command.commands.values() if isinstance(command, click.Group) else []
    return {name for c in (command, *below) for param in c.params for name in param.opts}


def resolved(*words):
    """The verb a command line runs, and its arguments."""
    context = click.Context(cli, info_name="offload-run")
    cli.parse_args(context, list(words))
    verb, _, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    return verb, rest


def test_a_model_in_the_place_of_a_verb_is_run(tiny_model, offload_run):
    wanted = offload_run("generate", tiny_model, "-p", PROMPT, *SHORT)
    assert wanted.code == 0 and wanted.out
    for words in (
        (tiny_model, PROMPT, *SHORT),
        (tiny_model, *PROMPT.split(), *SHORT),
        (*SHORT, "-m", tiny_model, "-p", PROMPT),
        (f"--model={tiny_model}", PROMPT, *SHORT),
        ("run", tiny_model, PROMPT, *SHORT),
        ("run", "-m", tiny_model, *SHORT, PROMPT),
        ("generate", tiny_model, PROMPT, *SHORT),
        ("generate", "-m", tiny_model, *SHORT, "--", PROMPT),
    ):
        assert (done := offload_run(*words)).out == wanted.out, (words, done.err)
    assert offload_run(tiny_model, *SHORT, stdin=PROMPT.encode()).out == wanted.out


def test_without_a_prompt_a_terminal_is_talked_to(tiny_model, monkeypatch):
    folder = str(tiny_model)
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert resolved(folder) == ("chat", [folder])
    assert resolved("run", folder, "-c", "64") == ("chat", [folder, "-c", "64"])
    assert resolved("-m", folder, "-n32")[0] == "chat"
    for words in (("hi",), ("-p", "hi"), ("-phi",), ("--raw",), ("--json",), ("-h",)):
        assert resolved(folder, *words)[0] == "run", words
    terminal.isatty = lambda: False
    assert resolved(folder)[0] == "run"


@pytest.mark.parametrize("word", ["MODEL/x", "./x.gguf", "org/name", "demo", "qwen3:8b"])
def test_what_can_only_be_a_model_is_no_unknown_verb(word):
    assert resolved(word, "hi")[0] == "run"


def test_a_cached_hub_id_is_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(click.UsageError, match="gpt2 is no verb and no model"):
        resolved("gpt2")
    (tmp_path / "models--gpt2").mkdir()
    assert resolved("gpt2", "hi")[0] == "run"


@pytest.mark.parametrize("words", [("-ngl", "20"), ("-ngl20",), ("--n-gpu-layers", "20")])
def test_layers_on_the_gpu(words, tiny_model, offload_run):
    done = offload_run(tiny_model, "-p", "x", *words)
    assert (done.code, done.out) == (2, "")
    assert "use --resident-layers N" in done.err
    assert "integer" not in done.err


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_other_tools_get_a_sentence(name, tiny_model, offload_run):
    done = offload_run("generate", tiny_model, "-p", "x", name, "1")
    assert done.code == 2
    assert f"no option {name} here: {OPTIONS[name]}" in " ".join(done.err.split())


def test_a_wrong_command_line_is_one_line(offload_run):
    for words in (["serve"], ["nonsense"], ["plan"], ["plan", "x", "--slots"], ["plan", "x", "-q"]):
        done = offload_run(*words)
        assert (done.code, done.out) == (2, "")
        assert re.fullmatch(r"offload-run: error: [^\n]+\n", done.err)
    done = offload_run()
    assert done.code == 2 and "Start here:" in done.out + done.err


def test_all_of_them_are_answered_at_once(tiny_model, offload_run):
    done = offload_run(tiny_model, "hi", "-ngl", 20, "-fa", "--repeat-penalty", 1.1)
    for name in ("-ngl", "-fa", "--repeat-penalty"):
        assert f"no option {name} here: {OPTIONS[name]}" in done.err


def test_one_dash_or_two_and_underscores():
    assert option_advice("--ngl") == option_advice("-ngl") is not None
    assert option_advice("--max_new_tokens") == option_advice("--max-new-tokens") is not None
    assert option_advice("-max-new-tokens") and option_advice("--nonsense") is None


@pytest.mark.parametrize("word", VERBS)
def test_verbs_of_other_tools_get_a_sentence(word, offload_run):
    done = offload_run(word, "x")
    assert done.code == 2
    assert f"no verb {word} here: {VERBS[word]}" in " ".join(done.err.split())


def test_advice_names_what_there_is():
    ours = set().union(*map(names_of, OURS)) | {"--version", "--help"}
    for word, advice in (OPTIONS | VERBS).items():
        missing = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", advice)) - ours
        assert not missing, (word, advice)
        verbs = re.findall(r"`(?:offload-run )?([a-z-]+) ", advice)
        assert not set(verbs) - {*OURS, "hf", "offload-run"}, (word, advice)


def test_nothing_of_ours_is_called_missing():
    """But for bits: a model is rounded by --wire, whatever others call it; a code has them."""
    found = {verb: names_of(verb) & OPTIONS.keys() for verb in OURS}
    assert {verb: names for verb, names in found.items() if names} == {
        "pack": {"--bits"},
        "simulate": {"--bits"},
    }
    assert not OURS.keys() & VERBS.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-nfoo"], "write -n foo if foo is the value of --max-tokens"),
        (["-pHello"], "write -p Hello"),
        (["--draft", "16"], "--draft-tokens 16 is how much"),
        (["--draft", "modle:x"], "--draft modle:x is not known"),
        (["--hepl"], "--help"),
        (["-mother"], "write -m other"),
        (["-m", "a", "-m", "b"], "-m takes one MODEL"),
        (["-m"], "-m takes one MODEL"),
    ],
)
def test_near_misses(words, message, tiny_model, offload_run):
    done = offload_run("generate", tiny_model, *words)
    assert (done.code, done.out) == (2, "")
    assert message in " ".join(done.err.split())


def test_a_second_model_is_no_silent_prompt(tiny_model, offload_run):
    done = offload_run("generate", tiny_model, "-m", tiny_model, "-p", "x")
    assert done.code == 2 and "both give a prompt" in done.err


def test_values_are_never_taken_for_options(tiny_model, offload_run):
    done = offload_run("generate", tiny_model, "-n6", "-q", "-p", "-ngl")
    assert (done.code, done.err) == (0, "")
    assert offload_run("generate", tiny_model, "-n6", "-q", "-p", "x", "--", "-ngl").code == 2


def test_short_names_are_the_long_ones(tiny_model, offload_run):
    base = ("generate", tiny_model, "-p", PROMPT, "-n", 4, "--json", "--draft", "none")
    long = ("--temperature", 1, "--seed", 7, "--context", 64, "--dtype", "bfloat16")
    short = ("--temp", 1, "-s", 7, "-c", 64, "--dtype", "bf16")
    records = [json.loads(offload_run(*base, *more).out) for more in (long, short)]
    for name in ("token_ids", "seed", "dtype", "text"):
        assert records[0][name] == records[1][name]
    assert records[0]["plan"]["kv_bytes"] == records[1]["plan"]["kv_bytes"]


def test_threads_are_torchs(tiny_model, offload_run):
    before = torch.get_num_threads()
    try:
        for count in (3, 1):
            done = offload_run("generate", tiny_model, "-p", PROMPT, "-n", 2, "-t", count)
            assert (done.code, torch.get_num_threads()) == (0, count)
    finally:
        torch.set_num_threads(before)
    done = offload_run("generate", tiny_model, "-p", PROMPT, "--threads", 0)
    assert done.code == 2 and "--threads is 0" in done.err


@pytest.mark.parametrize(("short", "name"), [("fp16", "float16"), ("f32", "float32")])
def test_short_number_formats(short, name, tiny_model, offload_run):
    record = json.loads(offload_run("plan", tiny_model, "--dtype", short, "--json").out)
    assert record["dtype"] == name


def test_a_folder_drafts(tiny_model, offload_run):
    base = ("plan", tiny_model, "--json", "--draft-tokens", 4)
    meant = json.loads(offload_run(*base, "--draft", tiny_model).out)
    assert meant["drafter"] == f"model:{tiny_model}"
    assert offload_run(*base, "--draft", "/no/such").code == 4


@pytest.mark.parametrize("verb", PAGES)
def test_common_options_come_first_and_all_are_named(verb, offload_run):
    common = PAGES[verb].common
    assert len(common) <= 15
    short, everything = (offload_run(verb, flag).out for flag in ("--help", "--help-all"))
    for param in load_verb(verb).params:
        if isinstance(param, click.Option):
            assert param.opts[-1] in short, param.name
            assert not common or param.opts[-1] in everything
    if common:
        explained = short[short.index("Common options") : short.index("More, explained by")]
        assert len(re.findall(r"^  -", explained, re.MULTILINE)) == len(common) + 2  # helps
        assert "Examples:" in short and "Examples:" in everything
        assert len(everything) > len(short)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_help_keeps_to_the_terminal(width, offload_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for words in (["--help"], ["generate", "--help"], ["plan", "--help-all"]):
        lines = offload_run(*words).out.splitlines()
        prose = [line for line in lines if not line.strip().startswith(("$", "-"))]
        assert max(map(len, prose)) <= width


def test_help_as_a_verb(offload_run):
    assert offload_run("help").out == offload_run("--help").out
    assert "offload-run generate [OPTIONS]" in offload_run("help", "generate").out
    assert "Usage: offload-run medusa info" in offload_run("help", "medusa", "info").out
    done = offload_run("help", "nothing")
    assert done.code == 2 and "there is no verb nothing" in done.err
