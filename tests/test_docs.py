"""The pages: what they link to, name and tell to type is there, and so is what the code cites."""

import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest

from offload_rt.cli.pages import VERBS, load_verb

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SOURCES = [p for folder in ("offload_rt", "tests", "tools") for p in (ROOT / folder).rglob("*.py")]
FOREIGN = {"first-ten-commands.md"}  # shows commands that are refused

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACE = re.compile(r"`((?:offload_rt|tests|tools|docs|profiles|\.ci)/[\w./*-]+)`")
PACKAGES = [path.name for path in (ROOT / "offload_rt").iterdir() if path.is_dir()]
ROOM = re.compile(rf"`((?:{'|'.join(PACKAGES)})/[\w/]*)`")
CITED = re.compile(r'docs/[\w-]+\.md(?:,\s+(?:#\s+)?"(?P<section>[^"]+)")?')


def without_code(page):
    """A page's text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def headings(page):
    return re.findall(r"^#+ +(.*)$", without_code(page), flags=re.MULTILINE)


def anchor(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def lost_links(page):
    """Relative links of a page that lead nowhere."""
    lost = []
    for link in LINK.findall(without_code(page)):
        path, _, fragment = link.partition("#")
        to = page.parent / path if path else page
        if "://" in link:
            continue
        if not to.exists() or (fragment and fragment not in map(anchor, headings(to))):
            lost.append(link)
    return lost


def commands(page):
    """The command lines of a page's console blocks, comments cut off."""
    blocks = re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    for block in blocks:
        for line in re.findall(r"^\$ ((?:.*\\\n)*.*)$", block, re.MULTILINE):
            yield shlex.split(line.replace("\\\n", " "), comments=True)


def of_ours(words):
    """The words after `offload-run`, or none."""
    return words[words.index("offload-run") + 1 :] if "offload-run" in words else []


def unknown_options(words):
    """What of a command line of ours no verb knows."""
    verb, *rest = words if words[0] in VERBS else ["run", *words]
    command = load_verb(verb)
    if isinstance(command, click.Group):
        command = command.commands[rest[0]]
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    options = [word.partition("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)]
    return [option for option in options if option not in known]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    assert lost_links(ROOT / name) == []


def test_a_lost_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n[x](#a-b-c) [y](#d) [z](page.md#a-b-c) [w](other.md) [v](http://n)\n"
    )
    assert lost_links(page) == ["#d", "other.md"]


@pytest.mark.parametrize("name", NAMES)
def test_named_files_are_there(name):
    named = PLACE.findall((ROOT / name).read_text())
    assert [place for place in named if not any(ROOT.glob(place.rstrip("/")))] == []


@pytest.mark.parametrize("name", NAMES)
def test_named_rooms_are_there(name):
    """`costs/step` is a module of the package, `costs/` a folder of it."""
    named = ROOM.findall((ROOT / name).read_text())
    lost = [room for room in named if not (ROOT / "offload_rt" / room).is_dir()]
    assert [room for room in lost if not (ROOT / "offload_rt" / f"{room}.py").exists()] == []


def test_cited_sections_are_there():
    cited = [
        (path.name, match[0], match["section"])
        for path in SOURCES
        if path.name != Path(__file__).name
        for match in CITED.finditer(path.read_text())
    ]
    assert len(cited) > 3
    for file, citation, section in cited:
        page = ROOT / citation.partition(",")[0]
        assert page.exists(), (file, citation)
        assert section is None or section in headings(page), (file, citation)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in FOREIGN], ids=lambda p: p.name)
def test_commands_have_the_options_they_show(page):
    for words in commands(page):
        if ours := of_ours(words):
            assert unknown_options(ours) == [], words
        for place in (word for word in words if word.startswith("tools/")):
            text = (ROOT / place).read_text()
            options = [word.lstrip("-") for word in words if word.startswith("--")]
            assert [name for name in options if name not in text] == [], words


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
