"""Text of strangers is shown so that it can neither steer a terminal nor look like another."""

import json
import unicodedata

import pytest

from offload_rt.printable import (
    encodable,
    in_markdown,
    printable,
    printable_lines,
    printable_prose,
)

STEERING = [chr(code) for code in [*range(0x20), *range(0x7F, 0xA0)]]
TURNING = [chr(code) for code in [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]]
UNSEEN = [*"\u00ad\u200b\u200c\u200d\u200e\u2060\ufeff\u061c\u2028\u3164\ufe0f", "\U000e0041"]
LONE = ["\udcff", "\ud800"]


@pytest.mark.parametrize("one", [*STEERING, *TURNING, *UNSEEN, *LONE], ids=ascii)
def test_a_name_shows_all_of_itself(one):
    shown = printable(f"a{one}b")
    assert shown.isascii() and shown.isprintable() and shown.startswith("a\\")


def test_no_character_of_a_name_is_a_control_or_a_format():
    for code in [*range(0x40000), *range(0xE0000, 0xE1000)]:
        assert unicodedata.category(printable(chr(code))[0]) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize("text", ["model-7B_v2.1", "日本語/é±λ", "", "a b|c\\n"])
def test_what_shows_itself_stays(text):
    assert printable(text) == printable_lines(text) == printable_prose(text) == text


def test_lines_and_tabs_stay_in_a_table_only():
    assert printable("a\n\tb") == r"a\n\tb"
    assert printable_lines("a\n\tb\r\x1b[2J") == "a\n\tb\\r\\x1b[2J"


def test_prose_of_any_language_stays_and_controls_do_not():
    prose = (
        "1\u00a0000\u3000\u202f\n\tमी\u200dन\u200c \u200f\u2764\ufe0f \U0001f468\u200d\U0001f469"
    )
    prose += "\r\n"
    assert printable_prose(prose) == prose
    for one in [*STEERING, *TURNING, *LONE]:
        if one not in "\n\t":
            assert printable_prose(f"a{one}b").isprintable()


def test_json_means_the_same_afterwards():
    value = "".join(STEERING + TURNING + LONE)
    assert json.loads(printable_lines(json.dumps(value))) == value


def test_markdown_gets_a_name_without_markup():
    assert in_markdown("a|b\n# c [d](e) <img> `f` *g*\x1b") == (
        r"a\|b\n# c \[d\](e) \<img\> \`f\` \*g\*\x1b"
    )
    assert in_markdown("SmolLM2-135M_v1.0") == "SmolLM2-135M_v1.0"


def test_what_an_encoding_lacks_is_escaped():
    assert encodable("é日", "ascii") == "\\xe9\\u65e5"
    assert encodable("é日", "latin-1") == "é\\u65e5"
    assert encodable("é日", "utf-8") == "é日"
