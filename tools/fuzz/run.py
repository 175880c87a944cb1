"""Fuzz one reader of untrusted files for a while and say what came of it.

Usage: python tools/fuzz/run.py TARGET [--seconds 600] [--seed 1] [--keep FOLDER]

Inputs are chosen by coverage (atheris, `pip install atheris`), and changed as bytes, as JSON values
or as words of the target. Prints one JSON line: inputs tried, how many were read, how many refused
with a sentence, by how many different sentences, the slowest one, and every kind of failure; files
that failed are kept. Exit code 1 if there was any.
"""

import argparse
import json
import logging
import os
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import atheris
from targets import PROJECT, TARGETS, Target, as_json

# Values that are put in the place of others.
_NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, 1e308, 0.5, 1e-30)
_TEXTS = ("", "a", "\x1b]0;x\x07", "\ud800", "a\x00b", "../x", "/etc/passwd", "a" * 2000, "auto")
_PARTS: tuple[object, ...] = (
    [],
    {},
    [[]],
    {"": {}},
    [0] * 50,
    ["full_attention"],
    {"rope_type": "yarn", "factor": 4},
)
_ODD: tuple[object, ...] = (None, True, False, *_NUMBERS, *_TEXTS, *_PARTS)
_SLOW_S = 10.0


@dataclass(slots=True)
class Tried:
    """What came of all inputs so far."""

    read: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    sentences: set[str] = field(default_factory=set)
    failures: Counter[str] = field(default_factory=Counter)


def near(value: object, chance: random.Random) -> object:
    """Another value of the same type, which a reader is more likely to take."""
    match value:
        case bool():
            return not value
        case int() | float():
            return chance.choice((value + 1, value - 1, value * 2, -value, value * 1000, 0, 1))
        case str() if value:
            at = chance.randrange(len(value))
            return chance.choice((value * 2, value[:at], value[at:] + value[:at], value + "a"))
        case None:
            return chance.choice((0, 1, "", "a", False, []))
    return value


def change_json(value: object, chance: random.Random, depth: int = 0) -> object:
    """The value with one place of it changed."""
    ends_here = depth > 12 or (depth > 0 and chance.random() < 0.1)
    if ends_here or not isinstance(value, dict | list) or not value:
        return near(value, chance) if chance.random() < 0.6 else chance.choice(_ODD)
    if isinstance(value, dict):
        name = chance.choice(list(value))
        what = chance.random()
        if what < 0.15:
            return {k: v for k, v in value.items() if k != name}
        if what < 0.25:
            return value | {str(chance.choice(_ODD))[:50]: value[name]}
        if what < 0.35:
            return value | {name: value[chance.choice(list(value))]}
        return value | {name: change_json(value[name], chance, depth + 1)}
    place, what = chance.randrange(len(value)), chance.random()
    if what < 0.2:
        return value[:place] + value[place + 1 :]
    if what < 0.4:
        return [*value, value[place]]
    return [*value[:place], change_json(value[place], chance, depth + 1), *value[place + 1 :]]


def change(data: bytes, most: int, seed: int, target: Target) -> bytes:
    """Another input made of this one."""
    chance = random.Random(seed)
    if chance.random() < 0.5:  # coverage says nothing of what runs in another process
        data = chance.choice(target.seeds())
    if target.words and chance.random() < 0.8:
        ends = [0, *(found.end() for found in re.finditer(rb"[%}#]}", data)), len(data)]
        for at in sorted(chance.choices(ends, k=chance.choice((1, 1, 2, 3))), reverse=True):
            data = data[:at] + chance.choice(target.words).encode() + data[at:]
        return data[:most]
    if target.is_json and chance.random() < 0.8:
        try:
            value = json.loads(data)
            for _ in range(chance.choice((1, 1, 1, 2, 4))):
                value = change_json(value, chance)
            return as_json(value)[:most]
        except (ValueError, RecursionError):
            pass
    return bytes(atheris.Mutate(data, most))


def where(error: BaseException) -> str:
    """A failure by its type and the last line of ours that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f"{os.sep}offload_rt{os.sep}" in f.filename]
    if not ours:
        return type(error).__name__
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"


def main() -> None:
    """Fuzz until the time is over, then print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    given = parser.parse_args()
    sys.path.insert(0, str(PROJECT))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with atheris.instrument_imports(include=["offload_rt"], enable_loader_override=False):
        import offload_rt.model.checkpoint
        import offload_rt.planning.plan_file
        import offload_rt.profiling.store  # noqa: F401
        from offload_rt.errors import OffloadError
    target, tried, end = TARGETS[given.target], Tried(), time.monotonic() + given.seconds

    def one(data: bytes) -> None:
        start = time.monotonic()
        if start > end:
            finish(given.target, given.seconds, tried)
        try:
            target.read(data)
            tried.read += 1
        except OffloadError as error:
            tried.refused += 1
            tried.sentences.add(re.sub(r"'[^']*'|\d+", "#", str(error))[:120])
        except BaseException as error:  # noqa: BLE001 - what is looked for
            keep(given.keep / given.target, where(error), data, tried)
        took = time.monotonic() - start
        tried.slowest_s = max(tried.slowest_s, took)
        if took > _SLOW_S:
            keep(given.keep / given.target, "slow", data, tried)

    corpus = given.keep / f"{given.target}.corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed{number}").write_bytes(seed)
    options = [
        f"-seed={given.seed}",
        "-max_len=262144",
        "-rss_limit_mb=6000",
        "-verbosity=0",
        "-mutate_depth=1",
        f"-artifact_prefix={given.keep / given.target}.",  # its own notes of slow inputs
    ]
    atheris.Setup(
        [sys.argv[0], *options, str(corpus)],
        one,
        custom_mutator=lambda data, most, seed: change(data, most, seed, target),
    )
    atheris.Fuzz()


def keep(folder: Path, kind: str, data: bytes, tried: Tried) -> None:
    """Count a failure and keep its first file."""
    tried.failures[kind] += 1
    if tried.failures[kind] == 1:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / re.sub(r"[^\w.-]+", "_", kind)).write_bytes(data)


def finish(name: str, seconds: float, tried: Tried) -> None:
    """Print what came of it and leave; libFuzzer would go on."""
    report = {
        "target": name,
        "seconds": seconds,
        "inputs": tried.read + tried.refused + sum(tried.failures.values()),
        "read": tried.read,
        "refused": tried.refused,
        "sentences": len(tried.sentences),
        "slowest_s": round(tried.slowest_s, 2),
        "failures": dict(tried.failures),
    }
    print(json.dumps(report), flush=True)
    os._exit(1 if tried.failures else 0)


if __name__ == "__main__":
    main()
