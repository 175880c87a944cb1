"""Where a turn ends, and what is read from what is typed."""

import pytest

from offload_rt.cli.chat_words import (
    Text,
    as_typed,
    going_on,
    help_text,
    read_words,
    split_path,
    whole_path,
)


@pytest.mark.parametrize(
    ("typed", "longer"),
    [
        ("one", None),
        ("one\\", "one\n"),
        ("one\\\\", None),
        ("one\\\\\\", "one\\\\\n"),
        ("one\\\ntwo", None),
        ('"""', '"""\n'),
        ('"""one', '"""one\n'),
        ('"""one\\', '"""one\\\n'),
        ('"""one"""', None),
        ('"""one\ntwo"""', None),
        ('say """', None),
        ('/system """be', '/system """be\n'),
        ('/file x.txt """why', '/file x.txt """why\n'),
        ('/stats """', None),
        ('"""Doc."""\nimport os', None),
    ],
)
def test_what_goes_on(typed, longer):
    assert going_on(typed) == longer


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ('"""one"""', "one"),
        ('"""\none\n\n two\n"""', "one\n\n two"),
        ('"""\n/clear\n"""  ', "/clear"),
        ('"""Doc."""\nimport os', '"""Doc."""\nimport os'),
        ('a """b"""', 'a """b"""'),
    ],
)
def test_three_quotes_around_a_text_are_not_part_of_it(typed, text):
    assert read_words(typed) == Text(text)


@pytest.mark.parametrize(
    "text",
    ["one", "/clear", "//clear", "a\nb", "/etc/x", "end\\", "/clear\\", "//", "/"],
)
def test_any_turn_can_be_typed_again(text):
    typed = as_typed(text)
    assert read_words(typed) == Text(text) and going_on(typed) is None


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("a.txt", ("a.txt", "")),
        ("a.txt  what?", ("a.txt", "what?")),
        ("'a b.txt' what is\nthis", ("a b.txt", "what is\nthis")),
        ('"a b.txt"', ("a b.txt", "")),
        (r"a\ b.txt why", ("a b.txt", "why")),
        ('a.txt """one\ntwo"""', ("a.txt", "one\ntwo")),
    ],
)
def test_a_path_and_what_follows_it(argument, parts):
    assert split_path(argument) == parts


@pytest.mark.parametrize("argument", ["a b.json", "'a b.json'", r"a\ b.json"])
def test_a_path_alone_may_have_spaces(argument):
    assert whole_path(argument) == "a b.json"


@pytest.mark.parametrize("width", ["40", "100"])
def test_help_fits_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    lines = help_text().splitlines()
    assert max(map(len, lines)) <= int(width)
    assert any(line.startswith("  /regenerate") for line in lines)
