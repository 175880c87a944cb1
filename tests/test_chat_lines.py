"""Turns from a pipe."""

import io
import sys

import pytest

from offload_rt.cli import chat_lines
from offload_rt.cli.chat_lines import LineReader
from offload_rt.errors import ConfigError


@pytest.fixture
def turns(monkeypatch):
    """All turns of some bytes; errors are among them."""

    def read(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        reader, found = LineReader(), []
        while True:
            try:
                turn = reader.read()
            except ConfigError as error:
                found.append(error)
                continue
            if turn is None:
                return found
            found.append(turn)

    return read


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b'\xef\xbb\xbf"""\na\n"""\n', ['"""\na\n"""']),
        (b"a\\\nb\\\r\nc\nd\n", ["a\nb\nc", "d"]),
        (b"a\\\\\nb\n", ["a\\\\", "b"]),
        (b"a\\", ["a\\"]),
        (b'"""\na\n\nb\\\n"""\nc\n', ['"""\na\n\nb\\\n"""', "c"]),
        (b'"""\r\na\r\n"""\r\nc', ['"""\na\n"""', "c"]),
        (b'"""one"""\ntwo\n', ['"""one"""', "two"]),
        (b'"""\na\nb', ['"""\na\nb\n"""']),
        (b'/system """\na\n"""\nb\n', ['/system """\na\n"""', "b"]),
        (b"a\0b\n\n", ["a\0b", ""]),
        (b"", []),
    ],
)
def test_lines_that_belong_together(turns, data, expected):
    assert turns(data) == expected


def test_bytes_that_are_not_utf8_cost_their_own_turn(turns):
    first, second, third, last = turns(b'a\xff\n"""\nb\n\xc3\n"""\n\xed\xa0\x80\nhello\n')
    assert "byte 0xff at offset 1" in str(first)
    assert "byte 0xc3" in str(second) and "byte 0xed" in str(third)
    assert last == "hello"


@pytest.mark.parametrize("around", [b"%s\n", b'"""\n%s\nmore\n"""\n', b"a\\\n%s\\\nb\n"])
def test_a_turn_that_is_too_long_is_left_out_whole(turns, monkeypatch, around):
    monkeypatch.setattr(chat_lines, "TURN_BYTES", 100)
    monkeypatch.setattr(chat_lines, "_STEP_BYTES", 7)
    error, last = turns(around % (b"x" * 1000) + b"hello\n")
    assert "more than 100 bytes" in str(error) and last == "hello"
    assert turns(b"x" * 100 + b"\ny\n") == ["x" * 100, "y"]


def test_many_lines_between_quotes_take_time_by_their_number(turns):
    lines = b"some words of a line\n" * 200_000  # 4 MB: seconds become hours if each costs all
    (turn,) = turns(b'"""\n' + lines + b'"""\n')
    assert len(turn) == len(lines) + len('"""\n"""')
