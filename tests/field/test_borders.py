"""Tokenizers and templates are programs of strangers: an answer, or one sentence, in any case.

The laws: what a user said is in the prompt, or nothing is answered; nothing a template or tokenizer
does takes more time or memory than its input is worth, ends the process, or outlives it.
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engines import reference_model
from forks import fork_tokenizers
from tiny import write_tokenizer
from waits import wait_until

from offload_rt.engine import Run
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.text import (
    DeclaredSampling,
    Message,
    build_prompt,
    check_tokenizer_files,
    declared_sampling,
    end_token_ids,
    load_tokenizer,
    text_process,
)
from offload_rt.text.worker import _Warnings

EACH = "{% for m in messages %}"
END = "{% endfor %}"
TALK = [
    Message(role="user", content="what we asked first"),
    Message(role="assistant", content="what was answered"),
    Message(role="user", content="what we ask now"),
]
THINKING = Message(role="assistant", content="<think>\nhm\n</think>\n\nwhat was answered")
LOOPS = "{% for i in range(100000) %}" * 4 + END * 4
DOUBLING = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 27,
}


@pytest.fixture(autouse=True)
def _forked_tokenizers(monkeypatch):
    fork_tokenizers(monkeypatch)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a tokenizer and a config.json, and no weights."""
    folder = write_tokenizer(tmp_path_factory.mktemp("plain"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture
def edited(plain, tmp_path):
    """Copies of that folder with another template, or other parts of tokenizer.json."""

    def make(template=None, **parts):
        folder = shutil.copytree(plain, tmp_path / f"m{len(list(tmp_path.iterdir()))}")
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | parts))
        return folder

    return make


# --- what was said is in the prompt, or there is no answer ----------------------------------------


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (EACH + "{{ m.content }}" + END, TALK),
        (EACH + "{{ m.content | trim }}" + END, [Message(role="user", content="  spaced \n")]),
        (EACH + "{{ m.content.split('</think>')[-1] }}" + END, [TALK[0], THINKING, TALK[2]]),
        (
            EACH + "{{ m.content.split('\u25c1/think\u25b7')[-1] }}" + END,
            [
                TALK[0],
                Message(role="assistant", content="\u25c1think\u25b7hm\u25c1/think\u25b7yes"),
                TALK[2],
            ],
        ),
        (EACH + "{{ m.content | tojson }}" + END, [Message(role="user", content='a "b"\nc')]),
        (EACH + "{% for p in m.content %}{{ p.text }}{% endfor %}" + END, TALK),
        (EACH + "{{ m.content[0]['text'] + '' }}" + END, TALK),
        ("{{ messages[-1].content }}", [TALK[0]]),
        ("{{ messages[1].content }} {{ messages[0].content }}", TALK[:2]),  # in another order
        (
            "{% if messages[0].content != 'yes' %}{{ fail() }}{% endif %}yes",
            [Message(role="user", content="yes")],
        ),
    ],
)
def test_turns_that_a_template_writes_are_taken(edited, template, turns):
    tokenizer = load_tokenizer(edited(template))
    text = tokenizer.decode(build_prompt(tokenizer, turns))
    for turn in turns:
        words = re.split("</think>|\u25c1/think\u25b7", turn.content)[-1].strip()
        assert words in text or json.dumps(words)[1:-1] in text
    assert "'type'" not in text  # a list of parts written out


@pytest.mark.parametrize(
    ("template", "turns", "lost"),
    [
        ("<|im_start|>", TALK[:1], "the prompt"),
        (EACH + "assistant of one" + END, [Message(role="user", content="one")], "the prompt"),
        ("{{ messages[-1].content }}", TALK, "turn 1 of 3 (user)"),
        (EACH + "{% if m.role == 'user' %}{{ m.content }}{% endif %}" + END, TALK, "turn 2 of 3"),
        (
            EACH + "{% if m.role == 'user' %}{{ m.content }}{% endif %}" + END,
            [TALK[0], Message(role="assistant", content="what was said is <b>bold</b>"), TALK[2]],
            "turn 2 of 3 (assistant)",
        ),
        (EACH + "{{ m.content | upper }}" + END, TALK[:1], "the prompt"),
        (EACH + "{{ m.content[:9] }}" + END, TALK[:1], "the prompt"),
        (
            EACH + "{{ m.content.split('</think>')[-1] }}" + END,
            [Message(role="user", content=THINKING.content)],
            "the prompt",
        ),
        (
            EACH + "{% if m.role != 'system' %}{{ m.content }}{% endif %}" + END,
            [Message(role="system", content="be brief"), *TALK[:1]],
            "the system prompt",
        ),
    ],
)
def test_turns_that_a_template_drops_or_changes_are_refused(edited, template, turns, lost):
    tokenizer = load_tokenizer(edited(template))
    with pytest.raises(CheckpointError) as caught:
        build_prompt(tokenizer, turns)
    assert f"leaves out or changes {lost}" in str(caught.value)


def test_a_system_prompt_that_a_template_drops_is_an_error(tiny_model, offload_run, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        EACH + "{% if m.role == 'user' %}{{ m.content }}{% endif %}" + END
    )
    ask = ("generate", folder, "-p", "the quick fox", "-n", 1, "-q")
    assert offload_run(*ask).code == 0
    done = offload_run(*ask, "--system", "be brief")
    assert done.code == 4 and "leaves out or changes the system prompt: leave out" in done.err


# --- bombs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 3000000000 }}", "needed more than 256 MiB of memory; use --raw"),
        ("{{ strftime_now('%c' * 2000000000) }}", "needed more than 256 MiB of memory"),
        ("{{ 10 ** (10 ** 8) }}", "ran for more than 0.4 s"),  # holds the interpreter
        (LOOPS, "ran for more than 0.4 s"),
        (r"{{ '\ud800' }}{{ messages[0].content }}", "failed: it wrote half a character"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: maximum recursion depth"),
    ],
)
def test_a_templates_bomb_is_one_sentence(edited, monkeypatch, template, message):
    monkeypatch.setattr("offload_rt.text.tokenizer._RENDER_S", 0.4)
    tokenizer = load_tokenizer(edited(template))
    with pytest.raises(CheckpointError, match=message):
        build_prompt(tokenizer, "hi")
    assert build_prompt(tokenizer, "hi", raw=True)  # it goes on with what is sound


@pytest.mark.parametrize(
    ("parts", "prompt", "message"),
    [
        ({"normalizer": DOUBLING}, "banana", "given 6 characters, needed more than 64.0 MiB"),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "(x+x+)+y"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            "x" * 27,
            "given 27 characters, made its library panic",
        ),
    ],
)
def test_a_tokenizers_bomb_is_one_sentence(edited, capfd, monkeypatch, parts, prompt, message):
    monkeypatch.setattr("offload_rt.text.tokenizer._ENCODE_BYTES", 64 * 2**20)
    tokenizer = load_tokenizer(edited(**parts))
    with pytest.raises(CheckpointError, match=message):
        build_prompt(tokenizer, prompt, raw=True)
    assert build_prompt(tokenizer, "1", raw=True)
    assert capfd.readouterr().err == ""


def test_a_decoders_bomb_ends_the_answer_in_a_sentence(edited, monkeypatch):
    monkeypatch.setattr("offload_rt.text.tokenizer._DECODE_BYTES", 32 * 2**20)
    growth = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 30
    tokenizer = load_tokenizer(edited(decoder={"type": "Sequence", "decoders": growth}))
    stream = tokenizer.stream()
    with pytest.raises(CheckpointError, match="the decoder .* needed more than 32.0 MiB of memory"):
        stream.push(tokenizer.encode("banana"))
    with pytest.raises(CheckpointError, match="was ended"):
        stream.push([5])


def test_limits_grow_with_the_prompt(edited, monkeypatch):
    tokenizer = load_tokenizer(edited())
    novel = "the quick brown fox " * 8_000
    monkeypatch.setattr("offload_rt.text.tokenizer._ENCODE_S", 0.002)
    with pytest.raises(CheckpointError, match="ran for more than"):
        monkeypatch.setattr("offload_rt.text.tokenizer._ENCODE_S_PER_MIB", 0.0)
        tokenizer.encode(novel)
    monkeypatch.setattr("offload_rt.text.tokenizer._ENCODE_S_PER_MIB", 200.0)
    assert len(tokenizer.encode(novel)) > 20_000


# --- the process ----------------------------------------------------------------------------------


def test_an_interrupt_is_not_kept_waiting_and_leaves_nothing(edited):
    tokenizer = load_tokenizer(edited(LOOPS))
    child = text_process().pid

    class Interrupt(BaseException):
        pass

    def interrupt(*_):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Interrupt):
            build_prompt(tokenizer, "hi")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not Path(f"/proc/{child}").exists()
    assert build_prompt(tokenizer, "hi", raw=True)  # another one takes over


def test_it_ends_with_whoever_started_it_whatever_it_is_doing(edited):
    folder = edited(LOOPS)
    code = (
        "import sys; from pathlib import Path\n"
        "from offload_rt.text import build_prompt, load_tokenizer, text_process, tokenizer as t\n"
        "t._RENDER_S = 600.0\n"
        "tokenizer = load_tokenizer(Path(sys.argv[1]))\n"
        "print(text_process().pid, flush=True)\n"
        "build_prompt(tokenizer, 'hi')\n"
    )
    asking = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE)
    child = Path(f"/proc/{int(asking.stdout.readline())}")
    time.sleep(0.3)  # in the middle of it
    asking.kill()
    asking.communicate()
    wait_until(lambda: not (child.exists() and _runs(child)))


def _runs(process):
    """Not a zombie that nobody has asked about yet."""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except OSError:
        return False


# --- files ----------------------------------------------------------------------------------------

NAMES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool.jinja",
    "merges.txt",
    "tokenizer.model",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["pipe", "zero", "outside", "large", "gone"])
def test_files_are_looked_at_before_anything_opens_them(edited, tmp_path, name, kind):
    folder = edited()
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    other = tmp_path / "other"
    other.write_text("{}")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(300 * 2**20)
    else:
        path.symlink_to({"zero": "/dev/zero", "outside": "/etc/hostname", "gone": "gone"}[kind])
    with pytest.raises(CheckpointError, match=name):
        check_tokenizer_files(folder)


@pytest.mark.parametrize("content", ["pipe", "zero", "large"])
def test_a_generation_config_is_read_as_weights_are(edited, content):
    folder = edited()
    path = folder / "generation_config.json"
    path.unlink()
    if content == "pipe":
        os.mkfifo(path)
    elif content == "zero":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(300 * 2**20)
    with pytest.raises(CheckpointError, match="generation_config.json"):
        end_token_ids(load_tokenizer(folder), folder)


@pytest.mark.parametrize(
    ("name", "package"), [("tekken.json", "mistral-common"), ("tokenizer.model", "sentencepiece")]
)
def test_a_vocabulary_without_its_package_is_told_before_it_is_read(
    edited, monkeypatch, name, package
):
    folder = edited()
    (folder / "tokenizer.json").rename(folder / name)
    monkeypatch.setattr("offload_rt.text.files._is_installed", lambda _: False)
    with pytest.raises(CheckpointError, match=f"{name} only, .* `pip install {package}`"):
        check_tokenizer_files(folder)
    monkeypatch.setattr("offload_rt.text.files._is_installed", lambda _: True)
    assert check_tokenizer_files(folder) > 0


def test_errors_of_config_json_are_not_blamed_on_the_tokenizer_nor_cut(edited):
    folder = edited()
    config = {"model_type": "llama", "layer_types": ["x"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert "cannot load config.json of" in str(caught.value)
    assert "full_attention" in str(caught.value) and "'x'" in str(caught.value)


def test_a_template_of_a_processor_is_used_where_the_tokenizer_has_none(edited):
    folder = edited()
    (folder / "chat_template.jinja").rename(folder / "template")
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": EACH + "<{{ m.content }}>" + END})
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(build_prompt(tokenizer, "hi")) == "<hi>"


def test_a_tokenizer_that_a_class_reads_in_another_way_is_told(edited, caplog):
    level = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    folder = edited(pre_tokenizer=level)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizerFast"})
    )
    load_tokenizer(folder)
    assert "reads this tokenizer.json as Qwen2Tokenizer: a line of" in caplog.text


def test_only_warnings_that_ids_will_be_wrong_are_kept(caplog):
    caplog.set_level(logging.WARNING, logger="transformers")  # as in the process of tokenizers
    log = logging.getLogger("transformers.tokenization")
    with _Warnings() as warnings:
        log.warning("loaded with an incorrect regex pattern:\nthis will lead to other ids")
        log.warning("you are using the default legacy behaviour")
    log.warning("an incorrect one afterwards")
    (kept,) = warnings.serious
    assert kept.startswith("transformers says: loaded with an incorrect regex pattern: this will")


def test_a_tokenizer_that_is_read_as_it_is_needs_no_note(plain, caplog):
    load_tokenizer(plain)
    assert caplog.text == ""


# --- ends of an answer, and how to draw -----------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config"),
    [
        ({"eos_token_id": 2}, "stale"),
        ({"eos_token_id": [2, 1]}, "stale"),
        ({"eos_token_id": "fifth"}, 2),
        (None, "stale"),
        ({"eos_token_id": -1}, -1),
    ],
)
def test_answers_end_where_those_of_transformers_do(
    tiny_model, offload_run, tmp_path, generation, config
):
    """`stale` and `fifth` are tokens that the model writes in the middle of its answer."""
    ask = ("-p", "the quick", "--raw", "-n", 16, "--json", "--draft", "none", "-q")
    whole = json.loads(offload_run("generate", tiny_model, *ask, "--ignore-eos").out)["token_ids"]
    known = {"stale": whole[3], "fifth": whole[5]}
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(settings | {"eos_token_id": known.get(config, config)})
    )
    (folder / "generation_config.json").unlink()
    if generation is not None:
        ends = {name: known.get(str(end), end) for name, end in generation.items()}
        (folder / "generation_config.json").write_text(json.dumps(ends))
    ids = load_tokenizer(folder).encode("the quick")
    with torch.no_grad():
        made = reference_model(folder).generate(
            torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=0
        )
    answer = json.loads(offload_run("generate", folder, *ask).out)
    assert answer["token_ids"] == made[0, len(ids) :].tolist()


def test_sampling_as_the_makers_of_a_model_want_it(tmp_path):
    assert declared_sampling(tmp_path) == DeclaredSampling()
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "x": []}')
    assert declared_sampling(tmp_path) == DeclaredSampling(
        do_sample=True, temperature=0.6, top_p=0.95, top_k=20
    )
    for name, value in (
        ("temperature", "-1"),
        ("temperature", '"hot"'),
        ("top_p", "1.5"),
        ("top_k", "0.5"),
        ("do_sample", "1"),
        ("min_p", "[]"),
        ("repetition_penalty", "0"),
    ):
        path.write_text(f'{{"{name}": {value}}}')
        with pytest.raises(CheckpointError, match=f"{name} in .*generation_config.json is "):
            declared_sampling(tmp_path)


# --- ids ------------------------------------------------------------------------------------------


def with_token(folder, token_id, content):
    """Give a tokenizer a special token of that id; those before it are padding."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added, tokens = tokenizer["added_tokens"], len(tokenizer["model"]["vocab"])
    for number in range(tokens, token_id + 1):
        name = content if number == token_id else f"<|{number}|>"
        added.append(dict(added[-1], id=number, content=name))
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def larger(tiny_model, tmp_path):
    """A model whose tokenizer has a token more than its embedding has rows."""
    return with_token(shutil.copytree(tiny_model, tmp_path / "larger"), 300, "<|tool|>")


@pytest.mark.parametrize(
    "verb",
    [
        ("generate", "MODEL", "-f", "FILE"),
        ("bench", "MODEL", "--prompts", "FILE"),
        ("train-medusa", "MODEL", "--data", "FILE", "--output", "OUT", "--self-distill"),
        ("compare", "MODEL", "--prompts", "FILE", "--output", "OUT", "--device-memory", "1GiB"),
    ],
    ids=lambda verb: verb[0],
)
def test_a_token_without_a_row_is_one_sentence(larger, offload_run, tmp_path, verb):
    file = tmp_path / "prompts.txt"
    file.write_text("the <|tool|> fox\nthe lazy dog\n")
    places = {"MODEL": larger, "FILE": file, "OUT": tmp_path / "out"}
    done = offload_run(*(places.get(word, word) for word in verb))
    assert done.code == 2, done.err
    assert "holds token 300 ('<|tool|>'), the embedding of larger has 300 rows" in done.err


def test_chat_goes_on_after_a_token_without_a_row(larger, offload_run):
    done = offload_run("chat", larger, "-n", 1, stdin=b"the <|tool|> fox\nthe dog\n")
    assert done.code == 0 and "holds token 300" in done.err and done.out.strip("\n") != ""


def test_a_draft_model_without_the_templates_tokens_is_refused(
    tiny_model, make_tiny, offload_run, tmp_path
):
    """Families pad their vocabularies differently; a template may write what is padding to one."""
    target = shutil.copytree(make_tiny(tokenizer=True, vocab_size=310), tmp_path / "target")
    with_token(target, 305, "<|turn|>")
    (target / "chat_template.jinja").write_text("<|turn|>" + EACH + "{{ m.content }}" + END)
    ask = ("generate", target, "-p", "the fox", "-n", 2, "--draft", f"model:{tiny_model}")
    done = offload_run(*ask)
    assert done.code == 2 and "knows 300 tokens, and the chat template of target writes" in done.err
    assert offload_run(*ask, "--raw").code == 0


# --- a byte order mark ----------------------------------------------------------------------------

MARK = b"\xef\xbb\xbf"


def test_a_mark_is_no_part_of_a_prompt(tiny_model, offload_run, tmp_path):
    def counts(mark):
        file = tmp_path / "prompt.txt"
        file.write_bytes(mark + b"the fox\r\n")
        words = (mark + b"the fox").decode()
        asked = [
            offload_run("generate", tiny_model, *options, "-n", 1, "--json", stdin=stdin)
            for options, stdin in (
                (("-f", file), b""),
                ((), mark + b"the fox\n"),
                (("-p", words), b""),
                (("-p", "the fox", "--system", words), b""),
            )
        ]
        return [json.loads(done.out)["prompt_tokens"] for done in asked]

    without = counts(b"")
    assert counts(MARK) == without and len(set(without)) == 2  # with a system prompt and without


def test_a_mark_is_no_part_of_other_files(tiny_model, offload_run, tmp_path):
    from offload_rt.cli.prompt_set import read_prompt_set
    from offload_rt.cli.talk_file import read_talks

    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(MARK + b'{"prompt": "one"}\n' + MARK + b'{"prompt": "two"}\n')
    assert [item.text for item in read_prompt_set(str(lines))] == ["one", "two"]
    assert [talk.prompt[0][1] for talk in read_talks(str(lines))] == ["one", "two"]
    plan = tmp_path / "plan.json"
    made = offload_run("plan", tiny_model, "--output", plan)
    assert made.code == 0, made.err
    plan.write_bytes(MARK + plan.read_bytes())
    done = offload_run("generate", tiny_model, "-p", "the fox", "-n", 1, "--plan", plan)
    assert done.code == 0, done.err
    for file, verb in (("profile.json", "--profile"), ("scenario.json", "--scenario")):
        (tmp_path / file).write_bytes(MARK + b"{}")
        model = () if verb == "--scenario" else (tiny_model,)
        done = offload_run("simulate", *model, verb, tmp_path / file)
        assert done.code == 2 and "JSON" not in done.err, done.err


def test_a_file_of_utf_16_is_named_as_such(tiny_model, offload_run, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("the fox", encoding="utf-16")
    done = offload_run("generate", tiny_model, "-f", file)
    assert done.code == 2 and "byte 0xff at offset 0; it is UTF-16: convert it first" in done.err


def test_ids_of_callers_are_compared_with_the_embedding(tiny_model):
    from engines import engine_for

    from offload_rt.config import GenerationConfig, SamplingConfig

    with engine_for(tiny_model, prompts=[[1, 2]]) as engine:
        for ids in ([1, 300], [1, -1]):
            with pytest.raises(ConfigError, match=r"token (300|-1) has no row .* has 300"):
                Run.start(engine, [ids], SamplingConfig(), GenerationConfig())


def test_a_plan_says_what_a_tokenizer_lacks(make_tiny, offload_run, tmp_path):
    folder = shutil.copytree(make_tiny("llama"), tmp_path / "model")
    (folder / "tekken.json").write_text("{}")
    done = offload_run("plan", folder)
    assert done.code == 0
    assert "no text can be generated as it is" in done.err and "mistral-common" in done.err
