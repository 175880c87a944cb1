"""Conversations in this process: commands, what an error costs, what is taken back."""

import json
import re
import shutil

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from offload_rt.cli import chat as chat_module
from offload_rt.cli.chat_history import HistoryFile
from offload_rt.cli.chat_terminal import TerminalReader
from offload_rt.engine import Engine, Run
from offload_rt.errors import DeviceError, NumbersError

PLAIN = ("-n", 6, "--draft", "none")


@pytest.fixture
def talk(tiny_model, offload_run, tmp_path):
    """Say lines in one chat; returns what came of it, with the conversation as it was saved."""

    def say(*lines, options=PLAIN, model=tiny_model):
        path = tmp_path / "said.json"
        path.unlink(missing_ok=True)
        typed = [line.encode() if isinstance(line, str) else line for line in lines]
        stdin = b"".join(line + b"\n" for line in (*typed, f"/save {path}".encode()))
        done = offload_run("chat", model, *options, stdin=stdin)
        done.saved = json.loads(path.read_text()) if path.exists() else None
        done.turns = [turn["content"] for turn in done.saved["turns"]] if done.saved else None
        return done

    return say


@pytest.fixture
def type_keys(tiny_model, offload_run, tmp_path, monkeypatch):
    """Type keys into a chat on a terminal's stand-in."""

    def type_all(keys, *options, model=tiny_model):
        def reader(interrupts, console):
            history = HistoryFile(tmp_path / "history")
            return TerminalReader(
                interrupts, history, console.note, source=pipe, screen=DummyOutput()
            )

        with create_pipe_input() as pipe:
            monkeypatch.setattr(chat_module, "open_reader", reader)
            pipe.send_text(keys)
            pipe.close()  # a chat that goes on too long meets the end of its input
            return offload_run("chat", model, *PLAIN, *options)

    return type_all


def fails_at_pass(monkeypatch, number, error):
    """Let the so-manieth pass after a prompt's end in an error, once."""
    passes, real = [], Run.step

    def step(self):
        passes.append(self)
        if len(passes) == number:
            raise error
        return real(self)

    monkeypatch.setattr(Run, "step", step)


def test_each_answer_has_a_line_of_numbers(talk):
    done = talk("hello", "/context", options=(*PLAIN, "--context", 100))
    line = r"\(6 tokens, [\d.]+ tokens/s, context (\d+) of 100 \(\d+ %\), cut at max-tokens 6\)"
    (used,) = re.findall(line, done.err)
    assert f"context {used} of 100" in done.err.splitlines()[1]
    assert f"{100 - int(used)} tokens left" in done.err and "1 turn" in done.err
    assert talk("hello", options=(*PLAIN, "-q")).err == ""


def test_undo_leaves_what_a_fresh_conversation_has(talk):
    short = talk("one", "three")
    long = talk("one", "two", "/undo", "three", "four", "/undo", "/context")
    assert long.turns == short.turns and len(short.turns) == 4
    assert "the last turn is taken back; 1 turn left" in long.err
    none = talk("/undo", "hello")
    assert "nothing was said yet" in none.err and len(none.turns) == 2


@pytest.mark.parametrize("options", [(), ("--temperature", 1, "--seed", 5)])
def test_regenerate_gives_the_answer_of_a_fresh_conversation(talk, options):
    options = (*PLAIN[:2], "--draft", "ngram", *options)
    once = talk("one", "two", options=options)
    again = talk("one", "/regenerate", "two", "/regenerate", "/regenerate", options=options)
    assert again.turns == once.turns
    assert "the same again: /set" in again.err
    assert "nothing was said yet" in talk("/regenerate").err


def test_regenerate_with_a_drawn_seed_draws_another(talk):
    done = talk("one", "/stats", "/regenerate", "/stats", options=(*PLAIN, "--temperature", 5))
    first, second = re.findall(r"seed (\d+)", done.err)
    assert first != second and "same again" not in done.err and len(done.turns) == 2


def test_a_given_seed_counts_turns(talk):
    lines = ("one", "/stats", "two", "/stats", "/undo", "three", "/stats")
    done = talk(*lines, options=(*PLAIN, "--temperature", 1, "--seed", 5))
    assert re.findall(r"seed (\d+)", done.err) == ["5", "6", "6"]


@pytest.fixture
def prompt_passes(monkeypatch):
    """Rows cached before and tokens given of each prompt's pass."""
    passes, real = [], Engine.sweep

    def sweep(self, texts, *others, **options):
        passes.extend((len(self._cached_ids[0]), len(tokens)) for _, tokens in texts)
        return real(self, texts, *others, **options)

    monkeypatch.setattr(Engine, "sweep", sweep)
    return passes


@pytest.mark.parametrize("command", ["/undo", "/regenerate"])
def test_the_cache_is_taken_back_to_what_it_was(talk, prompt_passes, command):
    talk("one", "two", command, *["two"] * (command == "/undo"))
    _, before, after = prompt_passes
    # Rows computed in other company than before may differ in their last bits.
    assert after[1] == before[1] and after[0] <= before[0]


def test_system_prompts_are_set_shown_and_removed(talk):
    begun = talk("hello", options=(*PLAIN, "--system", "be brief"))
    done = talk("/system", "/system be brief", "/system", "hello")
    assert done.out == begun.out and done.saved["system"] == "be brief"
    assert done.err.splitlines()[0].strip() == "no system prompt"
    assert done.err.splitlines()[2].strip() == "be brief"
    assert talk('/system ""', "hello", options=(*PLAIN, "--system", "x")).out == talk("hello").out
    lines = talk('/system """', "be", "brief", '"""', "/system")
    assert lines.saved["system"] == "be\nbrief"


def test_a_system_prompt_that_the_template_refuses_is_not_set(talk, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    template = folder / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    done = talk("/system be brief", "hello", model=folder)
    assert done.code == 0 and "no system" in done.err
    assert done.saved["system"] is None and len(done.turns) == 2


def test_a_system_prompt_must_leave_room_and_may_be_removed_to_make_some(talk, tmp_path):
    long = "word " * 40
    done = talk("one", f"/system {long}", "two", options=(*PLAIN, "--context", 80))
    assert "there is room for 80" in done.err and len(done.turns) == 4
    options = (*PLAIN, "--context", 80, "--system", long)
    done = talk("one", '/system ""', "one", options=options)
    assert done.err.count("there is room for 80") == 1 and len(done.turns) == 2
    full = ("-n", 80, *PLAIN[2:], "--context", 40, "--system", "be")
    done = talk("one", '/system ""', "/context", options=full)
    assert "error: " not in done.err and done.saved["system"] is None


def test_settings_are_shown_and_changed(talk):
    done = talk(
        "/set",
        "/set temperature 0.7 top-p 0.9 --seed 3",
        "/set max_tokens 2",
        '/set stop ["a b", "c"]',
        "hello",
        options=("--draft", "none"),
    )
    assert re.search(r"temperature +0\n", done.err) and re.search(r"seed +none", done.err)
    assert re.search(r"temperature +0.7\n +top-p +0.9\n +seed +3\n", done.err)
    assert "2 tokens" in done.err
    settings = done.saved["settings"]
    assert settings["stop"] == ["a b", "c"] and settings["max_tokens"] == 2
    same = talk("hello", options=(*PLAIN[2:], "-n", 2, "--temperature", 0.7, "--top-p", 0.9,
                                  "--seed", 3, "--stop", "a b", "--stop", "c"))  # fmt: skip
    assert same.turns == done.turns
    assert talk("/set stop none", options=(*PLAIN, "--stop", "x")).saved["settings"]["stop"] == []


WRONG_SETTINGS = [
    ("temperature", "needs a value"),
    ("temperature hot", "not a valid float"),
    ("temperature 101", "--temperature is 101"),
    ("temperature nan", "--temperature is nan"),
    ("top-p 0.9", "no effect on a greedy answer: /set temperature"),
    ("max-tokens 0", "--max-tokens is 0"),
    ("max-tokens 5 seed x", "'x' is not a valid integer"),
    ("ignore-eos maybe", "not a valid boolean"),
    ("tempreature 1", "did you mean temperature?"),
    ("warmth 1", "there are temperature"),
    ("context 8192", "--context is settled when a chat begins"),
    ("system x", "use /system TEXT"),
    ("stop [1]", 'give a text, or several as ["one", "two"]'),
    ('stop "x', "is not JSON"),
]


def test_settings_are_checked_as_the_flags_are(talk):
    done = talk(*(f"/set {words}" for words, _ in WRONG_SETTINGS))
    said = [line for line in done.err.splitlines() if "error: " in line]
    assert done.code == 0 and len(said) == len(WRONG_SETTINGS)
    for line, (words, why) in zip(said, WRONG_SETTINGS, strict=True):
        assert why in line, words
    assert done.saved["settings"]["temperature"] == 0 and done.saved["settings"]["max_tokens"] == 6


def test_an_accept_rule_goes_with_new_settings(talk):
    done = talk("/set temperature 1", options=("--draft", "ngram", "--accept", "greedy"))
    assert "--accept greedy contradicts --temperature 1" in done.err


def test_a_loaded_conversation_goes_on_as_if_it_had_been_held(talk, tmp_path):
    kept = tmp_path / "kept.json"
    whole = talk("one", "two", "three", options=(*PLAIN, "--system", "be kind"))
    talk("one", "two", f"/save {kept}", options=(*PLAIN, "--system", "be kind"))
    done = talk("other", f"/load {kept}", "/context", "three", options=("--draft", "none"))
    assert done.saved == whole.saved
    assert "2 turns from" in done.err and "held with" not in done.err


def test_a_conversation_that_cannot_be_loaded_changes_nothing(talk, tmp_path):
    (tmp_path / "bad.json").write_text("[1]")
    done = talk("one", f"/load {tmp_path / 'bad.json'}", "/load /dev/zero", "/load none.json")
    assert done.err.count("error: ") == 3 and len(done.turns) == 2


def test_a_conversation_that_the_template_refuses_is_not_loaded(talk, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    template = folder / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    kept = tmp_path / "kept.json"
    talk("one", f"/save {kept}", options=(*PLAIN, "--system", "be kind"))
    done = talk("two", f"/load {kept}", model=folder)
    assert "no system" in done.err
    assert done.saved["system"] is None and done.turns[0] == "two"


@pytest.mark.parametrize(
    ("lines", "context", "advice"),
    [
        (["x" * 300], 64, "shorten the turn, or start again with --context 512"),
        (["x" * 600], 64, "shorten the turn; the model was made for up to 512"),
        (["one", "x" * 600], 512, "shorten the turn; the model was made for up to 512"),
        (["x" * 30] * 2, 64, "/undo takes the last turn back, /clear forgets everything, or /save"),
    ],
)
def test_a_full_context_is_told_with_what_to_do(talk, lines, context, advice):
    done = talk(*lines, options=(*PLAIN, "--context", context))
    assert f"there is room for {context} with the answer: {advice}" in done.err
    assert len(done.turns) == 2 * len(lines) - 1  # the last has no answer


def test_names_of_files_that_cannot_be_are_sentences(talk):
    names = ["a\0b", "~no-such-user/x", "x" * 300, "", "/", "no/such/x"]
    commands = [f"/{command} {name}" for name in names for command in ("save", "load", "file")]
    done = talk(*commands, "one")
    assert done.code == 0 and done.err.count("offload-run: error: ") == len(commands)
    assert "unexpected" not in done.err and len(done.turns) == 2


def test_the_last_turn_of_a_file_may_want_an_answer(talk, tmp_path):
    path = tmp_path / "open.json"
    path.write_text(json.dumps([{"role": "user", "content": "one"}]))
    done = talk(f"/load {path}", "/regenerate")
    assert done.turns == talk("one").turns and "/regenerate answers it" in done.err


def test_a_loaded_conversation_that_is_too_long_says_so(talk, tmp_path):
    path = tmp_path / "long.json"
    turn = {"role": "user", "content": "x " * 60}
    path.write_text(json.dumps([turn, turn | {"role": "assistant"}]))
    done = talk(f"/load {path}", "more", options=(*PLAIN, "--context", 64))
    assert "the next turn has no room: /undo takes the last turn back" in done.err
    assert "start again with --context 512 and /load FILE" in done.err


def test_the_text_of_a_file_is_part_of_a_turn(talk, tmp_path):
    path = tmp_path / "my notes.txt"
    path.write_text("\ufeffa note\n/clear\n", encoding="utf-8")
    done = talk(f"/file '{path}'  what is it?", f'/file "{path}"', f"/file {tmp_path}", "/file x")
    assert done.turns[0] == "a note\n/clear\n\nwhat is it?" and done.turns[2] == "a note\n/clear"
    assert done.err.count("cannot read") == 2


def test_help_leaves_and_stats(talk):
    done = talk("/?", "/stats", "/bye", "hello")
    assert "/regenerate" in done.err and "no answer yet" in done.err
    assert done.out == "" and done.saved is None


def test_a_template_that_refuses_a_turn_costs_that_turn(talk, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    template = folder / "chat_template.jinja"
    refusal = "{% if 'boom' in messages[-1].content %}{{ raise_exception('no boom') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    done = talk("one", "boom", "two", model=folder)
    assert done.code == 0 and "no boom" in done.err
    assert done.turns == talk("one", "two").turns


def test_an_error_within_an_answer_costs_that_turn(talk, monkeypatch):
    fresh = talk("one", "three")
    for error, told in (
        (NumbersError("the logits are NaN"), "the logits are NaN"),
        (DeviceError("the disk is full"), "the disk is full"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ):
        with monkeypatch.context() as patch:
            fails_at_pass(patch, 7, error)  # the second pass of the second answer
            done = talk("one", "two", "three")
        assert told in done.err and done.turns == fresh.turns
        assert done.code == 2  # a script must know that an answer is missing
        # What was shown of the answer that failed ends with its line.
        assert done.out.startswith(fresh.turns[1] + "\n")
        assert done.out.endswith(fresh.turns[3] + "\n")


def test_the_engine_starts_over_after_an_error(talk, monkeypatch, prompt_passes):
    fails_at_pass(monkeypatch, 7, MemoryError())
    talk("one", "two", "three")
    assert [cached > 0 for cached, _ in prompt_passes] == [False, True, False]


def test_a_failed_turn_can_be_answered_again(talk, monkeypatch):
    fresh = talk("one", "two")
    fails_at_pass(monkeypatch, 7, MemoryError())
    assert talk("one", "two", "/regenerate").turns == fresh.turns
    fails_at_pass(monkeypatch, 7, MemoryError())
    done = talk("one", "two", "/undo")
    assert "the turn without an answer is taken back; 1 turn left" in done.err
    assert done.turns == fresh.turns[:2]
    fails_at_pass(monkeypatch, 12, MemoryError())
    assert talk("one", "two", "/regenerate").turns == fresh.turns  # the old answer stays


def test_a_fault_of_the_program_is_not_hidden_from_a_script(talk, monkeypatch):
    fails_at_pass(monkeypatch, 2, RuntimeError("an index is out of range"))
    done = talk("one", "two")
    assert done.code == 1 and "unexpected RuntimeError" in done.err and done.saved is None


def test_answers_that_nobody_gets_end_a_script(talk, type_keys, monkeypatch):
    fails_at_pass(monkeypatch, 2, OSError(28, "No space left on device"))
    done = talk("one", "two")
    assert done.code == 2 and "cannot write the output: No space" in done.err
    assert done.saved is None  # the rest was not even read
    fails_at_pass(monkeypatch, 2, OSError(28, "No space left on device"))
    done = type_keys("one\r\x15two\r\x04")
    assert done.code == 0 and "cannot write the output: No space" in done.err and done.out


def test_an_engine_that_is_broken_says_so_and_keeps_the_conversation(
    type_keys, monkeypatch, tmp_path
):
    fails_at_pass(monkeypatch, 7, RuntimeError("device-side assert"))
    path = tmp_path / "kept.json"
    done = type_keys(f"one\rtwo\r\x15three\r\x15/save {path}\r\x04")
    assert done.code == 0 and "device-side assert" in done.err
    assert "the model can answer no more: RuntimeError: device-side assert" in done.err
    assert [turn["content"] for turn in json.loads(path.read_text())["turns"]][0::2] == [
        "one",
        "three",
    ]


def test_a_turn_that_failed_is_there_to_be_edited(type_keys, tmp_path):
    path = tmp_path / "kept.json"
    done = type_keys(f"one\r/sav {path}\r\x01\x1b[C\x1b[C\x1b[C\x1b[Ce\r\x04")
    assert "did you mean /save?" in done.err and path.exists()


def test_a_turn_taken_back_is_there_to_be_edited(type_keys, tmp_path):
    path = tmp_path / "kept.json"
    done = type_keys(f"/clear\rone\r//clear\r/undo\r the desk\r/save {path}\r\x04")
    turns = [turn["content"] for turn in json.loads(path.read_text())["turns"]]
    assert done.code == 0 and turns[0::2] == ["one", "/clear the desk"]


def test_ctrl_c_twice_at_the_prompt_leaves(type_keys):
    done = type_keys("typed\x03\x03\x03")
    assert done.code == 130 and done.err.count("Ctrl-C again or Ctrl-D leaves") == 1
    assert "talking with" in done.err
    done = type_keys("\x03hello\r\x03\x04")
    assert done.code == 0 and done.out
