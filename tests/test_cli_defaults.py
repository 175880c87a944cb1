"""Defaults of the user's own: who counts before whom, and that no slip goes unseen."""

import json
import tomllib

import pytest

from offload_rt.cli.defaults import variables_of, verb_options
from offload_rt.cli.options import option_key


@pytest.fixture
def config_file(tmp_path):
    """Write the file that is looked for."""

    def write(text):
        path = tmp_path / "config" / "offload-rt" / "config.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def context_of(offload_run, *words):
    return json.loads(offload_run(*words, "--json").out)["context_tokens"]


def test_flag_variable_file_built_in(tiny_model, offload_run, config_file, monkeypatch):
    plan = ("plan", tiny_model)
    assert context_of(offload_run, *plan) == 512  # all the model was made for
    config_file("[common]\ncontext = 100\n")
    assert context_of(offload_run, *plan) == 100
    config_file("[common]\ncontext = 100\n[plan]\ncontext = 101\n[chat]\ncontext = 99\n")
    assert context_of(offload_run, *plan) == 101
    monkeypatch.setenv("OFFLOAD_RT_CONTEXT", "102")
    assert context_of(offload_run, *plan) == 102
    monkeypatch.setenv("OFFLOAD_RT_PLAN_CONTEXT", "103")
    assert context_of(offload_run, *plan) == 103
    assert context_of(offload_run, *plan, "-c", 104) == 104
    monkeypatch.delenv("OFFLOAD_RT_PLAN_CONTEXT")
    monkeypatch.delenv("OFFLOAD_RT_CONTEXT")
    assert context_of(offload_run, "--no-config", *plan) == 512


def test_lists_flags_and_short_names(tiny_model, offload_run, config_file, monkeypatch):
    config_file('[generate]\nstop = ["a", "b"]\nquiet = true\nmax_tokens = 3\n')
    done = offload_run(tiny_model, "hello")
    assert (done.code, done.err) == (0, "")
    config_file("[common]\ntemp = 1.0\nctx-size = 64\n")
    monkeypatch.setenv("OFFLOAD_RT_STOP", "zebra")
    monkeypatch.setenv("OFFLOAD_RT_QUIET", "1")
    record = json.loads(offload_run(tiny_model, "hello", "-n", 3, "--json").out)
    assert record["seed"] is not None and context_of(offload_run, "plan", tiny_model) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[common]\nslots = 1\nslotz = 2\n", "line 3, [common]: slotz .* did you mean slots?"),
        ("[plan]\nrounds = 2\n", "line 2, [plan]: rounds is no option"),
        ("[plam]\n", "line 1, [plam]: no verb is called plam: write [plan]"),
        ("[run]\n", "no verb is called run: write [generate]"),
        ("\nslots = 2\n", "line 2: slots is in no section: put it below [common]"),
        ("[common]\nslots = [1]\n", r"line 2, [common]: slots is [1], accepted is a text or a n"),
        ('[common]\nkv-folder = "a\\u0000"\n', r"kv-folder is 'a\x00', a text with a zero byte"),
        ("[common]\nslots = true\n", "slots is True, accepted is a text or a number"),
        ("[common]\njson = 1\n", "json is 1, accepted is true or false"),
        ("[common]\nslots = 0\n", "--slots is 0, .* --slots comes from .*config.toml line 2"),
        ("[common]\nslots = 'x'\n", "neither auto nor a whole number; .*line 2, [common]"),
        ("[common\n", "config.toml is not TOML: .*line 1"),
    ],
)
def test_slips_in_the_file_are_named(text, message, tiny_model, offload_run, config_file):
    import re

    config_file(text)
    done = offload_run("plan", tiny_model)
    assert (done.code, done.out) == (2, "")
    pattern = re.escape(message).replace(r"\.\*", ".*").replace(r"\ ", " ")
    assert re.search(pattern, " ".join(done.err.split())), done.err
    assert offload_run("--no-config", "plan", tiny_model).code == 0
    assert offload_run("plan", "--help").code == 0


def test_variables_that_mean_nothing(tiny_model, offload_run, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_DEVICE_MEMROY", "1GiB")
    done = offload_run("plan", tiny_model)
    assert done.code == 2 and "did you mean OFFLOAD_RT_DEVICE_MEMORY?" in done.err
    monkeypatch.delenv("OFFLOAD_RT_DEVICE_MEMROY")
    monkeypatch.setenv("OFFLOAD_RT_BENCH_ROUNDS", "3")  # of another verb
    monkeypatch.setenv("OFFLOAD_RT_CACHE", "/nowhere")  # where the demo is, not --cache
    monkeypatch.setenv("OFFLOAD_RT_DEBUG", "1")
    assert offload_run("plan", tiny_model).code == 0


def test_a_named_file_must_be_there(tiny_model, offload_run, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_CONFIG", str(tmp_path / "mine.toml"))
    done = offload_run("plan", tiny_model)
    assert done.code == 2 and "mine.toml, which does not exist" in done.err
    (tmp_path / "mine.toml").write_text("[plan]\ncontext = 64\n")
    assert context_of(offload_run, "plan", tiny_model) == 64


def test_a_default_that_a_flag_makes_useless_is_left_out(tiny_model, offload_run, config_file):
    config_file("[common]\ntemperature = 1\ntop-p = 0.5\n")
    assert offload_run(tiny_model, "x", "-n", 2, "--temp", 0).code == 0
    done = offload_run(tiny_model, "x", "--temp", 0, "--top-p", 0.5)
    assert done.code == 2 and "--top-p 0.5 has no effect" in done.err
    assert "comes from" not in done.err  # both were typed


def test_a_common_drafter_is_not_simulates(tiny_model, offload_run, config_file):
    config_file('[common]\ndraft = "ngram"\n')
    record = json.loads(offload_run("simulate", tiny_model, "--profile", PROFILE, "--json").out)
    assert record["drafter"] == "none"
    config_file('[simulate]\ndraft = "ngram"\n')
    done = offload_run("simulate", tiny_model, "--profile", PROFILE)
    assert done.code == 2  # how often drafts are right is not said


PROFILE = "cpu-2core-avx512bf16"


def test_config_says_what_is_in_force_and_why(offload_run, config_file, monkeypatch):
    assert "all defaults are built in" in offload_run("config").out
    path = config_file("[bench]\nrounds = 3\n[common]\nslots = 2\n")
    monkeypatch.setenv("OFFLOAD_RT_CHAT_SLOTS", "3")
    shown = " ".join(offload_run("config").out.split())
    assert str(path) in shown and "--rounds 3 from line 2, [bench], for bench" in shown
    assert "--slots 3 from OFFLOAD_RT_CHAT_SLOTS, for chat" in shown
    found = json.loads(offload_run("config", "--json").out)
    assert {"option": "--rounds", "value": 3, "from": f"{path} line 2, [bench]"}.items() <= next(
        d for d in found["defaults"] if d["option"] == "--rounds"
    ).items()


def test_the_template_is_a_file_that_is_accepted(tiny_model, offload_run, config_file):
    template = offload_run("config", "--template").out
    sections = tomllib.loads(template)
    assert "common" in sections and not any(sections.values())
    lines = [line.removeprefix("# ") for line in template.splitlines()[4:] if '"..."' not in line]
    config_file("\n".join(lines))
    assert offload_run("config").code == 0
    assert offload_run("plan", tiny_model).code == 0


def test_no_two_options_have_one_variable():
    seen = {}
    for verb, options in verb_options():
        for option in options:
            key = option_key(option)
            for name in variables_of(verb, key):
                assert seen.setdefault(name, key) == key, name
    assert "OFFLOAD_RT_CACHE" not in seen
