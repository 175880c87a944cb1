"""Rows of a comparison are checked as they are read: a report is made, or one sentence."""

import copy
import json
import os

import pytest

from offload_rt.baselines.rows import read
from offload_rt.cli.compare_chart import draw
from offload_rt.cli.compare_report import as_json, as_markdown
from offload_rt.errors import ConfigError

SETUP = {
    "kind": "setup",
    "version": 1,
    "model": "m",
    "files": [["a", 1]],
    "dtype": "float32",
    "device": "cpu",
    "device_bytes": 1,
    "cap_bytes": 5,
    "cap": "none",
    "page_cache": "x",
    "prompt_file": "p",
    "prompts": [
        {"name": "a", "category": "c", "tokens": 3, "digest": "d"},
        {"name": "b", "category": "c", "tokens": 4, "digest": "e"},
    ],
    "max_tokens": 4,
    "ends": True,
    "draft": json.dumps({"draft": "ngram", "draft_tokens": 3}),
    "runtime": "",
    "batches": [1, 2],
    "engines": ["offload-rt", "accelerate"],
    "machine": {
        "cpu": "c",
        "cores": 2,
        "ram_bytes": 8,
        "gpus": [{"name": "g", "memory_bytes": 1, "link_generation": 4, "link_width": 16}],
    },
    "weights_bytes": 5,
    "command": "c",
}


def answered(engine, batch, last):
    return {
        "kind": "answered",
        "run": {"round": 0, "engine": engine, "batch": batch},
        "group": 0,
        "prompts": list(range(batch)),
        "token_ids": [[1, 2, last]] * batch,
        "texts": ["one", "two"][:batch],
        "ttft_s": 0.5,
        "decode_s": 1.0,
        "first_tokens": batch,
        "passes": 3,
        "prompt_read_bytes": 1,
        "decode_read_bytes": 2,
        "decode_link_bytes": 3,
        "host_peak_bytes": 6,
        "device_peak_bytes": 5,
    }


ROWS = [
    SETUP,
    {
        "kind": "loaded",
        "run": {"round": 0, "engine": "offload-rt", "batch": 1},
        "load_s": 1.0,
        "cached_bytes": 4,
        "host_peak_bytes": 5,
        "device_peak_bytes": 6,
        "facts": {"threads": 1},
    },
    answered("offload-rt", 1, 3),
    answered("accelerate", 1, 4),
    answered("offload-rt", 2, 3),
    answered("accelerate", 2, 4),
    {
        "kind": "failed",
        "run": {"round": 0, "engine": "deepspeed", "batch": 1},
        "stage": "load",
        "reason": "no",
    },
    {
        "kind": "gap",
        "engine": "accelerate",
        "batch": 1,
        "prompt": 0,
        "index": 2,
        "tokens": [3, 4],
        "logits": [1.0, 2.0],
        "best": 3,
    },
]
NESTED = "[" * 200 + "]" * 200
VALUES = ["null", "-1", "0", "1e308", "5e-324", "9" * 309, "NaN", "1e999", '"\\u001b`|$x$"', "true"]
VALUES += ["[]", "{}", "[[1]]", '{"draft": 1}', '"{"', NESTED, '"[" ']


def places(value, path=()):
    """Where something stands in a row."""
    yield path
    parts = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        parts = enumerate(value[:2])
    for key, part in parts:
        yield from places(part, (*path, key))


def written(folder, lines):
    path = folder / "raw.jsonl"
    path.unlink(missing_ok=True)  # to cut one that is there takes 1 ms on ext4
    path.write_text("".join(line + "\n" for line in lines))
    return path


def report(path):
    """All that a report is; only a sentence may keep it from being made."""
    try:
        raw = read(path)
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 400
        return False
    json.dumps(as_json(raw), allow_nan=False)
    assert "\x1b" not in as_markdown(raw)
    return True


def test_the_rows_as_they_are(tmp_path):
    assert report(written(tmp_path, map(json.dumps, ROWS)))


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_any_value_in_any_place(number, tmp_path):
    """Each place of a row gets each value, and is left out."""
    good = 0
    for place in places(ROWS[number]):
        for value in [None, *VALUES]:
            row = json.loads(json.dumps(ROWS[number]))
            inner = row
            for key in place[:-1]:
                inner = inner[key]
            if value is None and place:
                del inner[place[-1]]
            elif place:
                inner[place[-1]] = "@"
            text = json.dumps(row if place else "@").replace('"@"', value or "null")
            lines = [json.dumps(one) for one in ROWS]
            lines[number] = text
            good += report(written(tmp_path, lines))
    assert good > 5


def test_names_are_no_markup_of_a_chart(tmp_path):
    pytest.importorskip("matplotlib")
    rows = copy.deepcopy(ROWS)
    for row in rows:
        for name in (row, row.get("run", {})):
            if "engine" in name:
                name["engine"] = "$\\frac{" + name["engine"]
    rows[0] |= {"model": "$x^{$ \x1b", "engines": [f"$\\frac{{{e}" for e in rows[0]["engines"]]}
    assert draw(read(written(tmp_path, map(json.dumps, rows))), tmp_path / "chart.png") is None
    assert (tmp_path / "chart.png").stat().st_size > 1000


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_rows_are_a_plain_file(make, tmp_path):
    make(tmp_path / "raw.jsonl")
    with pytest.raises(ConfigError, match="raw.jsonl: it is no plain file"):
        read(tmp_path / "raw.jsonl")
