"""F-33: what a user says in a chat is a turn, unless it is the exact name of a command.

The law: nothing typed is lost. It reaches the model as it is, or is obeyed, or is answered with a
sentence that says how to send it all the same.
"""

import pytest

from offload_rt.cli.chat_words import COMMANDS, Order, Refused, Text, read_words

TURNS = [
    "/etc/fstab has two lines, why?",
    "/etc/fstab",
    "/usr/bin/env python3",
    "/home is where?",
    "/tmp is full, what now?",
    "/proc and /sys, what are they?",
    "/r/linux",
    "/*",
    "/* a comment */ int x;",
    "/** javadoc",
    "/a.txt",
    "/dev/null",
    "/^[a-z]+$/ matches what?",
    "// a comment",
    "//foo/bar is a share",
    "///",
    " /clear",
    "what does /clear do?",
    "/clear\nand more lines",
    "/nonsense\nand more lines",
    "/" + "x" * 100,
    "\\",
    "-1",
]


@pytest.mark.parametrize("typed", TURNS)
def test_what_is_no_command_is_a_turn_as_it_was_typed(typed):
    assert read_words(typed) == Text(typed)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("/clear", Order("clear", "")),
        ("/clear  ", Order("clear", "")),
        ("/?", Order("help", "")),
        ("/bye", Order("exit", "")),
        ("/quit", Order("exit", "")),
        ("/save a b.json", Order("save", "a b.json")),
        ("/system  be brief\nand kind", Order("system", "be brief\nand kind")),
        ("/file notes.txt what is\nthis?", Order("file", "notes.txt what is\nthis?")),
    ],
)
def test_the_exact_name_of_a_command_is_obeyed(typed, expected):
    assert read_words(typed) == expected


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("/clera", "/clear"),
        ("/clera now", "/clear"),
        ("/sav x.json", "/save"),
        ("/Exit", "/exit"),
        ("/nonsense", "/help"),
        ("/", "/help"),
        ("/clear everything", "takes nothing"),
        ("/load", "needs FILE"),
    ],
)
def test_a_mistyped_command_is_told_with_a_way_to_send_it(typed, named):
    refused = read_words(typed)
    assert isinstance(refused, Refused) and named in refused.sentence
    assert read_words(f"/{typed}") == Text(typed)


@pytest.mark.parametrize("name", [name for c in COMMANDS for name in (c.name, *c.aliases)])
def test_two_slashes_send_the_name_of_a_command(name):
    assert read_words(f"//{name}") == Text(f"/{name}")
    assert read_words(f'"""/{name}"""') == Text(f"/{name}")


def test_paths_and_comments_are_answered_and_typing_errors_are_not(tiny_model, offload_run):
    lines = b"/etc/fstab has two lines, why?\n/* why */\n/clera\n/stats\n"
    done = offload_run("chat", tiny_model, "-n", 4, "--draft", "none", stdin=lines)
    assert done.code == 0 and done.err.count("(4 tokens") == 2
    assert "no command /clera, did you mean /clear?" in done.err
    first, second = (
        offload_run("chat", tiny_model, "-n", 4, stdin=line + b"\n").out
        for line in (b"//clear", b'"""\n/clear\n"""')
    )
    assert first == second != ""
