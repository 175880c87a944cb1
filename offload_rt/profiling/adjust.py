"""A profile with other numbers: what if the link were slower, the memory larger.

A number is named by its place in the file, as `links[4].bytes_per_s`. One of `NAMES` changes it
everywhere: at every block size of every link of a direction, at every depth of the disk. What is
set is an assumption, and recorded as one.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from offload_rt.errors import ConfigError
from offload_rt.profiling.codec import MalformedError, encode, read_tree
from offload_rt.profiling.profile import HardwareProfile
from offload_rt.units import parse_size

Tree = dict[str, Any]

_STEP = re.compile(r"(\w+)((?:\[\d{1,4}\])*)")
_SOURCE = "set by --profile-set or a scenario's `set`"


def adjust_profile(profile: HardwareProfile, settings: Sequence[str]) -> HardwareProfile:
    """Return the profile with the numbers that `KEY=VALUE` texts name.

    Raises:
        ConfigError: a text is not of that form, names no number, or the number cannot be.
    """
    tree: Tree = json.loads(encode(profile))
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign or not key or not text:
            raise ConfigError(f"{setting!r} sets nothing: write KEY=VALUE, as h2d_bytes_per_s=13e9")
        value = _number(key, text)
        if key in NAMES:
            NAMES[key](tree, value)
        else:
            _set_at(tree, key, value)
        try:
            profile = read_tree(tree)
        except MalformedError as error:
            raise ConfigError(f"--profile-set {setting} cannot be: {error}") from error
    return profile


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        try:
            value = float(parse_size(text))
        except ConfigError:
            value = math.nan
    if not 0.0 < value < math.inf:
        raise ConfigError(
            f"--profile-set {key} is {text!r}: give a number above 0, or a size as 12GiB"
        )
    return value


def _set_at(tree: Tree, key: str, value: float) -> None:
    """Set the number at a place of the file."""
    names = [_STEP.fullmatch(step) for step in key.split(".")]
    here: Any = tree
    steps: list[str | int] = []
    for match in names:
        if match is None:
            raise _unknown(key)
        steps += [match[1], *map(int, re.findall(r"\d+", match[2]))]
    try:
        for step in steps[:-1]:
            here = here[step]
        old = here[steps[-1]]
    except (KeyError, IndexError, TypeError) as error:
        raise _unknown(key) from error
    if isinstance(old, dict) and "obtained" in old:
        here[steps[-1]] = _assumed(value)
    elif type(old) is int:
        here[steps[-1]] = _whole(value)
    else:
        raise _unknown(key)


def _unknown(key: str) -> ConfigError:
    known = ", ".join(NAMES)
    return ConfigError(
        f"{key!r} is no number of a profile: give {known}, or a place in the file as "
        "links[0].bytes_per_s (`offload-run profile --show NAME --json` prints it)"
    )


def _assumed(value: float) -> Tree:
    return {"value": value, "obtained": "assumed", "source": _SOURCE}


def _whole(value: float) -> float:
    return int(value) if value.is_integer() else value  # the check says what is wrong with 1.5


def _set_links(direction: str) -> Callable[[Tree, float], None]:
    def change(tree: Tree, value: float) -> None:
        """Give the largest block that rate; smaller ones keep what a copy costs at the start."""
        links = [link for link in tree.get("links", []) if link["direction"] == direction]
        pinned = [link for link in links if link["pinned"]]
        if not pinned:
            raise ConfigError(f"the profile has no {direction} link to set the speed of")
        groups: dict[tuple[int, str], list[Tree]] = {}
        for link in pinned:
            groups.setdefault((link["gpu"], link["load"]), []).append(link)
        alone = [g for (_, load), g in groups.items() if load == "alone"] or [pinned]
        before = max(link["bytes_per_s"]["value"] for link in alone[0])
        for group in groups.values():
            most = max(link["bytes_per_s"]["value"] for link in group)
            for link in group:
                size, rate = link["block_bytes"], link["bytes_per_s"]["value"]
                start_s = size / rate - size / most
                link["bytes_per_s"] = _assumed(size / (start_s + size / (value * most / before)))

    return change


def _set_disk(tree: Tree, value: float) -> None:
    """Give the deepest queue that rate, and shallower ones their share of it."""
    disks = tree.get("disk", [])
    if not disks:
        raise ConfigError("the profile has no disk to set the speed of")
    most = max(disk["bytes_per_s"]["value"] for disk in disks)
    for disk in disks:
        disk["bytes_per_s"] = _assumed(value * disk["bytes_per_s"]["value"] / most)


def _set_device_memory(tree: Tree, value: float) -> None:
    gpus = tree["machine"].get("gpus", [])
    if not gpus:
        raise ConfigError("the profile has no GPU to set the memory of: set ram_bytes")
    for gpu in gpus:
        gpu["memory_bytes"] = _whole(value)


def _set_ram(tree: Tree, value: float) -> None:
    tree["machine"]["ram_bytes"] = _whole(value)


def _set_pinned(tree: Tree, value: float) -> None:
    if "pinning" not in tree:
        raise ConfigError("the profile has no pinned memory to limit")
    tree["pinning"]["most_bytes"] = _whole(value)


NAMES: dict[str, Callable[[Tree, float], None]] = {
    "h2d_bytes_per_s": _set_links("h2d"),
    "d2h_bytes_per_s": _set_links("d2h"),
    "disk_bytes_per_s": _set_disk,
    "device_memory_bytes": _set_device_memory,
    "ram_bytes": _set_ram,
    "pinned_bytes": _set_pinned,
}
