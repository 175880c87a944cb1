"""The command line in this process: what it prints, what it refuses, what it exits with."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from offload_rt.cli import run
from offload_rt.cli.console import write_answer
from offload_rt.cli.options import settings_of
from offload_rt.cli.pages import VERBS, load_verb
from offload_rt.config import DraftConfig, GenerationConfig, RuntimeConfig, SamplingConfig
from offload_rt.costs.sizes import process_bytes
from offload_rt.engine import Engine, Run
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.text import build_prompt, end_token_ids, load_tokenizer

PROMPT = "hello there"


def engine_tokens(folder, max_tokens, **sampling):
    tokenizer, checkpoint = load_tokenizer(folder), open_checkpoint(folder)
    ids = build_prompt(tokenizer, PROMPT)
    with Engine(
        checkpoint, RuntimeConfig(), capacities=[len(ids) + max_tokens], prompt_tokens=len(ids)
    ) as engine:
        generating = Run.start(
            engine,
            [ids],
            SamplingConfig(**sampling),
            GenerationConfig(max_tokens=max_tokens),
            end_token_ids(tokenizer, folder),
        )
        generating.prefill()
        while generating.active:
            generating.step()
        tokens = generating.sequences[0].emitted
    return tokens, tokenizer.decode(tokens, skip_special_tokens=True)


def kinds(value):
    """A JSON value's shape: names and the types of numbers."""
    if isinstance(value, dict):
        return {name: kinds(inner) for name, inner in value.items()}
    return type(value).__name__


def test_stdout_is_the_engines_text_and_nothing_else(tiny_model, offload_run):
    _, text = engine_tokens(tiny_model, 12)
    done = offload_run("generate", tiny_model, "-p", PROMPT, "-n", 12)
    assert (done.code, done.out) == (0, text + "\n")
    assert re.search(r"tokens +\d+ in, 12 out, ended by length, greedy", done.err)
    assert "\x1b" not in done.err


def test_streamed_is_the_same_and_the_block_says_so(deep_model, offload_run):
    whole = offload_run("generate", deep_model, "-p", PROMPT, "-n", 12, "-q")
    done = offload_run(
        "generate", deep_model, "-p", PROMPT, "-n", 12, "--resident-layers", 1, "--slots", 2
    )
    assert done.out == whole.out
    assert whole.err == ""
    assert "1 of 4 layers resident, 3 streamed through 2 slots" in done.err
    assert re.search(r"link .* per pass, achieved .* GB/s of the link's .* GB/s", done.err)
    assert 6 <= len(done.err.splitlines()) <= 10


def test_json(tiny_model, offload_run):
    tokens, text = engine_tokens(tiny_model, 12)
    done = offload_run(
        "generate",
        *(tiny_model, "-p", PROMPT, "-n", 12, "--json", "--resident-layers", 1, "--draft", "none"),
    )
    assert done.err == ""
    record = json.loads(done.out)
    assert (record["text"], record["token_ids"]) == (text, tokens)
    assert (record["completion_tokens"], record["finish_reason"]) == (12, "length")
    assert record["memory"]["streamed_layers"] == len(record["plan"]["streamed"]) == 1
    got = kinds(record)
    wanted = {
        "text": "str",
        "token_ids": "list",
        "prompt_tokens": "int",
        "completion_tokens": "int",
        "finish_reason": "str",
        "seed": "NoneType",
        "device": "str",
        "dtype": "str",
        "versions": dict.fromkeys(("offload_rt", "torch", "transformers", "python"), "str"),
        "timings": dict.fromkeys(
            ("load_s", "ttft_s", "decode_s", "s_per_token", "tokens_per_s"), "float"
        ),
        "speculation": {
            "drafter": "str",
            "accept_rule": "str",
            "passes": "int",
            "drafted": "int",
            "accepted": "int",
            "acceptance_rate": "NoneType",
            "tokens_per_pass": "float",
            "acceptance_per_depth": "list",
            "draft_s": "float",
            "draft_share": "NoneType",
            "draft_link_bytes": "int",
            "retrieval": "NoneType",
            "draft_sizes": {},
        },
        "transfer": {
            "bytes_total": "int",
            "kv_bytes_total": "int",
            "bytes_per_pass": "int",
            "achieved_bytes_per_s": "float",
            "link_bytes_per_s": "float",
            "stall_s": "float",
            "overlap_ratio": "float",
        },
    }
    assert {name: got[name] for name in wanted} == wanted
    memory = {"device_limit_bytes", "device_peak_bytes", "host_peak_bytes", "resident_layers"}
    assert memory | {"streamed_layers", "slots"} <= got["memory"].keys()
    assert "predicted_s_per_token" in got["plan"]


def test_sampling_repeats_by_its_seed_and_reports_a_drawn_one(tiny_model, offload_run):
    def sample(*more):
        arguments = ("-p", PROMPT, "-n", 8, "--temperature", 1, "--json", *more)
        return json.loads(offload_run("generate", tiny_model, *arguments).out)

    drawn = sample()
    assert type(drawn["seed"]) is int
    assert sample("--seed", drawn["seed"])["token_ids"] == drawn["token_ids"]
    assert sample("--seed", (drawn["seed"] + 1) % 2**63)["token_ids"] != drawn["token_ids"]
    assert (
        drawn["token_ids"] == engine_tokens(tiny_model, 8, temperature=1.0, seed=drawn["seed"])[0]
    )


def test_stop_string_ends_the_answer_and_is_not_in_it(tiny_model, offload_run):
    whole = json.loads(offload_run("generate", tiny_model, "-p", PROMPT, "-n", 24, "--json").out)
    stop = next(c for c in whole["text"][8:] if c.isascii() and c.isprintable())
    done = offload_run("generate", tiny_model, "-p", PROMPT, "-n", 24, "--json", "--stop", stop)
    record = json.loads(done.out)
    assert record["text"] == whole["text"][: whole["text"].index(stop)]
    assert record["finish_reason"] == "stop"
    count = record["completion_tokens"]
    assert count < 24 and record["token_ids"] == whole["token_ids"][:count]


def test_all_sources_give_the_same_prompt(tiny_model, offload_run, tmp_path):
    file = tmp_path / "prompt.txt"
    base = ("generate", tiny_model, "-n", 4, "-q")
    wanted = offload_run(*base, "-p", PROMPT).out
    for newline in (b"", b"\n", b"\r\n"):
        file.write_bytes(PROMPT.encode() + newline)
        assert offload_run(*base, "-f", file).out == wanted
        assert offload_run(*base, stdin=file.read_bytes()).out == wanted
    assert offload_run(*base, "-f", "-", stdin=file.read_bytes()).out == wanted


def test_raw_system_and_ignore_eos_change_the_run(tiny_model, offload_run):
    def tokens(*more):
        done = offload_run("generate", tiny_model, "-p", PROMPT, "-n", 4, "--json", *more)
        return json.loads(done.out)["prompt_tokens"]

    assert tokens("--raw") < tokens() < tokens("--system", "be brief")


def test_a_limited_answer_is_announced(tiny_model, offload_run):
    done = offload_run("generate", tiny_model, "-p", PROMPT, "-n", 100, "--context", 40)
    assert done.code == 0
    assert re.search(r"answer is limited to \d+ of 100 tokens: .* --context .* 40", done.err)
    assert "ended by length" in done.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_answer_is_whole_json(number, code, tiny_model, offload_run, monkeypatch):
    tokens, _ = engine_tokens(tiny_model, 12)
    step = Run.step

    def interrupted_step(self):
        if self.passes == 5:
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(Run, "step", interrupted_step)
    done = offload_run("generate", tiny_model, "-p", PROMPT, "-n", 12, "--json")
    record = json.loads(done.out)
    assert (done.code, record["finish_reason"]) == (code, "abort")
    assert record["token_ids"] == tokens[:5]


def on_terminal(monkeypatch, *arguments, **variables):
    """Run with both outputs on a pseudo terminal; returns the bytes it was sent."""
    outer, inner = pty.openpty()
    pieces = []

    def drain():  # a terminal's buffer holds 4 KB, and bars draw as long as the machine is busy
        with contextlib.suppress(OSError):
            while piece := os.read(outer, 2**16):
                pieces.append(piece)

    reader = threading.Thread(target=drain)
    reader.start()
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    with open(inner, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run([str(argument) for argument in arguments]) == 0
    reader.join()
    os.close(outer)
    return b"".join(pieces)


@pytest.mark.parametrize(("variables", "bar"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_bars_on_a_terminal_unless_no_color(variables, bar, tiny_model, monkeypatch):
    shown = on_terminal(monkeypatch, "generate", tiny_model, "-p", PROMPT, "-n", 4, **variables)
    assert (b"\x1b[" in shown) is bar
    assert (b"loading" in shown) is bar
    assert b"ended by length" in shown


def test_a_model_cannot_steer_the_terminal(monkeypatch):
    outer, inner = pty.openpty()
    with open(inner, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        write_answer("a\x1b[2Jb\x07\x9b\t\n")
        assert os.read(outer, 100).decode() == "a\\x1b[2Jb\\x07\\x9b\t\r\n"
    os.close(outer)


def test_a_pipe_gets_every_byte(capsys):
    write_answer("a\x1b[2Jb\x07")
    assert capsys.readouterr().out == "a\x1b[2Jb\x07"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperatur", "1"], "--temperature"),
        (["-f", "x", "-p", "y"], "-p and -f both"),
        (["-p", ""], "is empty"),
        (["-p", " \n "], "is empty"),
        (["-f", "/no/such/file"], "cannot read the prompt from /no/such/file: No such file"),
        (["-p", "x", "--device-memory", "lots"], "'lots' is not a memory size"),
        (["-p", "x", "--device-memory", "0"], "not a memory size"),
        (["-p", "x", "--slots", "many"], "neither auto nor a whole number"),
        (["-p", "x", "--slots", "0"], "--slots is 0"),
        (["-p", "x", "--resident-layers", "9"], "9, the model has 2 layers"),
        (["-p", "x", "--max-tokens", "0"], "--max-tokens is 0"),
        (["-p", "x", "--temperature", "nan"], "--temperature is nan"),
        (["-p", "x", "--top-p", "0.5"], "--top-p 0.5 has no effect on a greedy answer"),
        (["-p", "x", "--context", "513"], "--context is 513, .* up to 512"),
        (["-p", "x", "--link-bandwidth", "2"], "add --home host"),
        (["-p", "x", "--host-memory", "2GiB"], "add --home host"),
        (["-p", "x", "--device", "tpu"], "--device tpu is not known"),
        (["-p", "x", "--stop", ""], "--stop is empty"),
        (["-p", "x", "--raw", "--system", "s"], "system prompt needs a chat template"),
        (["-p", "x", "-v", "-q"], "-v and -q contradict"),
        (["-p", "x " * 600], r"the prompt has 1\d\d\d tokens, .* 512"),
        (["-p", "x " * 20, "--context", "30"], r"the prompt has \d\d tokens, --context .* 30"),
    ],
)
def test_bad_usage(arguments, message, tiny_model, offload_run):
    done = offload_run("generate", tiny_model, *arguments)
    assert (done.code, done.out) == (2, "")
    assert re.search(message, done.err)
    assert "Traceback" not in done.err


def test_no_prompt_on_a_terminal(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert run(["generate", str(tiny_model)]) == 2
    assert "no prompt: give -p TEXT or -f FILE" in capsys.readouterr().err


def test_not_utf8_names_the_offset(tiny_model, offload_run):
    done = offload_run("generate", tiny_model, stdin=b"abc\xff")
    assert done.code == 2
    assert "stdin is not UTF-8: byte 0xff at offset 3" in done.err


def test_too_little_memory_names_what_works(make_tiny, offload_run):
    # as wide as long, so that layers are more than what is there anyway
    model = make_tiny("llama", tokenizer=True, num_hidden_layers=8)
    base = ("generate", model, "-p", PROMPT, "-n", 8)
    done = offload_run(*base, "--device-memory", "1MiB")
    assert done.code == 3
    mib = int(re.search(r"use --device-memory (\d+)MiB", done.err)[1])
    assert offload_run(*base, "--device-memory", f"{mib}MiB").code == 0
    assert offload_run(*base, "--device-memory", f"{mib - 1}MiB").code == 3


def remove(folder):
    shutil.rmtree(folder)


def corrupt_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"{bad" + path.read_bytes()[12:])


def truncate(folder):
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "does not exist"),
        (corrupt_header, "model.safetensors"),
        (truncate, "model.safetensors"),
        (only_pickle, "pytorch_model.bin"),
        (no_tokenizer, "no tokenizer"),
    ],
)
def test_bad_model_files(damage, message, tiny_model, offload_run, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    damage(folder)
    done = offload_run("generate", folder, "-p", PROMPT, "--json")
    assert (done.code, done.out) == (4, "")
    assert re.fullmatch(rf"offload-run: error: [^\n]*{message}[^\n]*\n", done.err)


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_out_of_memory_is_a_sentence(fault, tiny_model, monkeypatch, offload_run):
    def full(*_):
        raise fault

    monkeypatch.setattr("offload_rt.cli.generate.read_prompt", full)
    done = offload_run("generate", tiny_model, "-p", "x")
    assert done.code == 2
    assert "out of memory: lower --device-memory" in done.err


def commands():
    return {name: load_verb(name) for name in VERBS}


def test_every_option_is_explained_and_has_its_records_default():
    for name, command in commands().items():
        for option in command.params:
            if option.param_type_name == "option":
                assert option.help, f"{name} {option.name}"
    defaults = commands()["generate"].make_context("generate", ["MODEL"]).params
    settings = settings_of(defaults)
    assert settings.sampling == SamplingConfig()
    assert settings.generation == GenerationConfig()
    assert settings.runtime == RuntimeConfig()
    assert settings.draft == DraftConfig(draft="auto")


def test_every_flag_of_the_verbs_has_a_default_in_help(offload_run):
    text = " ".join(offload_run("generate", "--help-all").out.split())
    for wanted in ("[default: 512]", "[default: auto]", "0 turns it off", "1 turns it off"):
        assert wanted in text
    done = offload_run("generat")
    assert (done.code, "did you mean generate?" in done.err) == (2, True)


def test_plan_table_and_json_agree(deep_model, offload_run):
    arguments = ("plan", deep_model, "--resident-layers", 1, "--context", 64)
    table = offload_run(*arguments).out
    record = json.loads(offload_run(*arguments, "--json").out)
    assert (record["context_tokens"], record["home"], record["device"]) == (64, "disk", "cpu")
    assert record["resident"] == [2] and record["streamed"] == [0, 1, 3]
    parts = ("base_bytes", "resident_bytes", "kv_bytes", "workspace_bytes", "drafter_bytes")
    total = sum(record[part] for part in parts) + record["slots"] * record["slot_bytes"]
    assert total == record["device_bytes"] <= record["device_limit_bytes"]
    assert record["process_bytes"] == process_bytes() and "the process" in table
    assert (record["context_bytes"], record["slack_bytes"]) == (0, 0)
    assert "1 resident layers" in table and "0-1, 3" in table and "64 tokens" in table


def test_plan_is_what_generate_does(tiny_model, offload_run):
    more = ("--resident-layers", 1, "--device-memory", "100MiB")
    planned = json.loads(offload_run("plan", tiny_model, "--context", 32, "--json", *more).out)
    ran = json.loads(
        offload_run("generate", tiny_model, "-p", "x", "--context", 32, "--json", *more).out
    )
    for name in ("resident", "streamed", "slots", "slot_bytes", "kv_bytes", "base_bytes", "home"):
        assert planned[name] == ran["plan"][name], name
    assert planned["bytes_per_pass"] == ran["transfer"]["bytes_per_pass"]
    assert ran["plan"]["device_bytes"] <= planned["device_bytes"]


def test_plan_that_cannot_be(tiny_model, offload_run):
    smallest = json.loads(offload_run("plan", tiny_model, "--json").out)["smallest_device_bytes"]
    assert offload_run("plan", tiny_model, "--device-memory", smallest).code == 0
    done = offload_run("plan", tiny_model, "--device-memory", smallest - 1)
    assert (done.code, done.out) == (3, "")
    assert "use --device-memory" in done.err


def test_plan_for_a_gpu_that_is_not_here(tiny_model, offload_run, monkeypatch):
    monkeypatch.setattr("offload_rt.device.cuda.nvml.find_driver", lambda: None)
    done = offload_run("plan", tiny_model, "--device", "cuda")
    assert done.code == 2 and "give --device-memory" in done.err
    done = offload_run("plan", tiny_model, "--device", "cuda", "--device-memory", "1GiB", "--json")
    assert json.loads(done.out)["device"] == "cuda"


def test_chat_keeps_the_conversation(tiny_model, offload_run):
    lines = b"hello\n/stats\nhello\n/stats\n/clear\nhello\n/stats\n"
    done = offload_run("chat", tiny_model, "-n", 6, stdin=lines)
    assert done.code == 0
    first, second, third = map(int, re.findall(r"tokens +(\d+) in", done.err))
    assert second > first == third
    assert "\x1b" not in done.err and "> " not in done.out


def test_chat_answers_as_generate_does(tiny_model, offload_run):
    alone = offload_run("generate", tiny_model, "-p", PROMPT, "-n", 6).out
    talk = offload_run("chat", tiny_model, "-n", 6, stdin=f"{PROMPT}\n/exit\nmore\n".encode())
    assert talk.out == alone


def test_chat_that_outgrows_its_context_goes_on(tiny_model, offload_run):
    lines = b"hello\n" + b"word " * 60 + b"\n/nonsense\n/help\n\n/clear\nhello\n"
    done = offload_run("chat", tiny_model, "-n", 4, "--context", 64, stdin=lines)
    assert done.code == 0
    assert re.search(
        r"conversation has \d+ tokens, there is room for 64 .* shorten the turn", done.err
    )
    assert "no command /nonsense" in done.err and "/stats" in done.err
    halves = done.out[: len(done.out) // 2], done.out[len(done.out) // 2 :]
    assert halves[0] == halves[1] != ""


def test_chat_says_when_an_answer_is_cut_by_the_context(tiny_model, offload_run):
    roomy = offload_run("chat", tiny_model, "-n", 40, "--context", 200, stdin=b"hello\n")
    assert "fills its" not in roomy.err
    tight = offload_run("chat", tiny_model, "-n", 40, "--context", 26, stdin=b"hello\n")
    assert "ends here because the conversation fills its 26 tokens" in tight.err


def test_chat_survives_a_line_that_is_not_utf8(tiny_model, offload_run):
    done = offload_run("chat", tiny_model, "-n", 4, "-q", stdin=b"a\xff\nhello\n/stats\n")
    assert done.code == 0 and done.out
    assert "byte 0xff at offset 1" in done.err and "ended by" in done.err


def test_chat_needs_a_template(tiny_model, offload_run, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    done = offload_run("chat", folder, stdin=b"x\n")
    assert done.code == 2 and "no chat template" in done.err
