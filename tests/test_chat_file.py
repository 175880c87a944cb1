"""Conversations in files: what is written, what is refused, what is never replaced."""

import json
import os
import stat

import pytest

from offload_rt.cli.chat_file import (
    Conversation,
    Exchange,
    read_conversation,
    read_text,
    write_conversation,
)
from offload_rt.config import GenerationConfig, SamplingConfig
from offload_rt.errors import ConfigError

HEAD = {"kind": "offload-run conversation", "version": 1}
TALK = Conversation(
    model="some-model",
    system="be brief",
    settings=(
        SamplingConfig(temperature=0.5, top_p=0.9, seed=7),
        GenerationConfig(max_tokens=9, stop=("\n\n", "###"), ignore_eos=True),
    ),
    exchanges=(Exchange("hi \x1b[2J ü", "there\n"), Exchange("/clear", "no")),
    unanswered="and?",
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "talk.json"


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_conversation_comes_back_as_it_was(path):
    write_conversation(path, TALK)
    assert read_conversation(path) == TALK
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes().isascii() and b"\x1b" not in path.read_bytes()


def test_a_conversation_replaces_one(path):
    path.touch(mode=0o644)
    write_conversation(path, TALK)
    path.chmod(0o644)
    write_conversation(path, TALK)
    assert read_conversation(path) == TALK
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def put(path, what):
    if what == "link":
        (path.parent / "other").write_text("")
        path.symlink_to(path.parent / "other")
    elif what == "dangling":
        path.symlink_to(path.parent / "none")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text("my thesis")
    elif what == "json":
        path.write_text('{"kind": "something else"}')


def state(path):
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("what", ["link", "dangling", "pipe", "folder", "text", "json"])
def test_nothing_else_is_replaced(path, what):
    put(path, what)
    before = state(path)
    with pytest.raises(ConfigError, match="give another name|it is a"):
        write_conversation(path, TALK)
    assert state(path) == before and not (path.parent / "none").exists()
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")]


@pytest.mark.parametrize("name", ["/dev/null", "/dev/full", "/proc/version"])
def test_devices_are_not_replaced(name, path):
    before = os.stat(name)
    with pytest.raises(ConfigError):
        write_conversation(path.__class__(name), TALK)
    assert os.stat(name).st_rdev == before.st_rdev


def test_a_folder_that_is_not_there_is_a_sentence(path):
    with pytest.raises(ConfigError, match="cannot write .* make it first"):
        write_conversation(path / "x" / "y.json", TALK)


def test_a_list_of_messages_is_a_conversation(path):
    messages = [{"role": "system", "content": "be kind"}, *turns("a", "b", "c")]
    path.write_text("\ufeff" + json.dumps(messages), encoding="utf-8")
    found = read_conversation(path)
    assert found.system == "be kind" and found.settings is None and found.model == ""
    assert found.exchanges == (Exchange("a", "b"),) and found.unanswered == "c"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deep"),
        ("3", "does not say"),
        ({}, "does not say"),
        (HEAD | {"version": 2, "turns": []}, "version is 2"),
        (HEAD | {"turns": [], "sytem": "x"}, "'sytem'"),
        (HEAD, "'turns' must be a list"),
        (HEAD | {"turns": {}}, "'turns' must be a list"),
        (HEAD | {"turns": ["x"]}, "message 0 must have"),
        (HEAD | {"turns": [{"role": "user"}]}, "message 0 must have"),
        (HEAD | {"turns": [{"role": "user", "content": 3}]}, "message 0 is not a text"),
        (HEAD | {"turns": [{"role": "user", "content": ""}]}, "message 0 is empty"),
        (HEAD | {"turns": turns("a", "b\ud800")}, "half a character at 1"),
        (HEAD | {"turns": turns("a", "b")[::-1]}, "message 0 is of 'assistant'"),
        (HEAD | {"turns": [{"role": "tool", "content": "x"}]}, "message 0 is of 'tool'"),
        (HEAD | {"turns": [], "system": 3}, "system is not a text"),
        (HEAD | {"turns": [], "settings": []}, "'settings' must be an object"),
        (HEAD | {"turns": [], "settings": {"heat": 1}}, "'heat'"),
        (HEAD | {"turns": [], "settings": {"temperature": "1"}}, "'temperature'"),
        (HEAD | {"turns": [], "settings": {"temperature": True}}, "'temperature'"),
        (HEAD | {"turns": [], "settings": {"temperature": float("nan")}}, "'temperature'"),
        (HEAD | {"turns": [], "settings": {"temperature": 101}}, "--temperature is 101"),
        (HEAD | {"turns": [], "settings": {"top_k": 1.5}}, "'top_k'"),
        (HEAD | {"turns": [], "settings": {"seed": 10**30}}, "'seed'"),
        (HEAD | {"turns": [], "settings": {"max_tokens": None}}, "'max_tokens'"),
        (HEAD | {"turns": [], "settings": {"max_tokens": 0}}, "--max-tokens is 0"),
        (HEAD | {"turns": [], "settings": {"stop": "x"}}, "'stop'"),
        (HEAD | {"turns": [], "settings": {"stop": [1]}}, "stop is not a text"),
        (HEAD | {"turns": [], "settings": {"stop": [""]}}, "--stop is empty"),
        (HEAD | {"turns": [], "settings": {"ignore_eos": 1}}, "'ignore_eos'"),
    ],
)
def test_what_is_no_conversation_is_one_sentence(path, content, why):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        read_conversation(path)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_texts_are_read_from_plain_files_only(path, tmp_path):
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_text(path) == "one\r\ntwo"
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/zero", tmp_path / "pipe", tmp_path, tmp_path / "none", tmp_path / "a\0"):
        with pytest.raises(ConfigError, match="cannot read"):
            read_text(path.__class__(name))
    path.write_bytes(b"a\xff")
    with pytest.raises(ConfigError, match="byte 0xff at offset 1"):
        read_text(path)
