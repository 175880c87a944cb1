"""The file of --nodes: the machines of a run, the first of them first. No torch here."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from offload_rt.config import RuntimeConfig
from offload_rt.device.kinds import named_devices
from offload_rt.errors import ConfigError
from offload_rt.reading import decode_text, read_plain
from offload_rt.units import parse_size

_MOST_BYTES, _MOST_NODES, _MOST_NAME = 2**20, 64, 60
_KEYS = ("name", "device_memory", "host_memory", "link_bandwidth", "profile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of a run.

    Attributes:
        name: in output.
        limit_bytes: device memory it may use; None: as --device-memory says.
        host_bytes: host memory it may use; None: as --host-memory says.
        link_bytes_per_s: emulated; None: as --link-bandwidth says.
        profile: its speeds; None: those of the first node.
    """

    name: str
    limit_bytes: int | None = None
    host_bytes: int | None = None
    link_bytes_per_s: float | None = None
    profile: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """All of them.

    Attributes:
        nodes: the first has embedding, head, tokenizer and drafter.
        bytes_per_s: of the network between them, for predictions.
        latency_s: of a message, likewise.
    """

    nodes: tuple[Node, ...]
    bytes_per_s: float = 1.25e8  # of 1 Gbit/s
    latency_s: float = 2e-4

    def runtime(self, runtime: RuntimeConfig) -> RuntimeConfig:
        """How the first node plans: each node is a device that has layers in turn.

        Raises:
            ConfigError: --device names several, or values of it are for several.
        """
        if len(runtime.device_names) > 1:
            raise ConfigError(
                f"--device {runtime.device} names several devices, with --nodes each node has one: "
                "name one"
            )
        limit, link = runtime.only_limit_bytes, runtime.only_link_bytes_per_s
        limits = [node.limit_bytes or limit for node in self.nodes]
        if any(limits) and not all(limits):
            missing = next(n.name for n, size in zip(self.nodes, limits, strict=True) if not size)
            raise ConfigError(
                f"--nodes: {missing} has no device_memory and others have: give it to all, or use "
                "--device-memory for all"
            )
        links = [node.link_bytes_per_s or link for node in self.nodes]
        if any(links) and not all(links):
            missing = next(n.name for n, rate in zip(self.nodes, links, strict=True) if not rate)
            raise ConfigError(
                f"--nodes: {missing} has no link_bandwidth and others have: give it to all, or use "
                "--link-bandwidth for all"
            )
        return replace(
            runtime,
            device=_devices(runtime.device, len(self.nodes)),
            device_limit_bytes=tuple(size for size in limits if size) or None,
            link_bytes_per_s=tuple(rate for rate in links if rate) or None,
            machines=tuple(node.name for node in self.nodes),
            machine_host_bytes=tuple(node.host_bytes for node in self.nodes),
        )


def _devices(name: str, count: int) -> str:
    """The first node's device, and as many more of its kind, which are those of other machines."""
    kind, (index,) = named_devices(name)
    if not kind.numbered:
        return ",".join([name] * count)
    return ",".join(f"{kind.processor}:{index + more}" for more in range(count))


def read_roster(path: Path) -> Roster:
    """Read the file.

    Raises:
        ConfigError: it is not TOML, or says something that is not known.
    """
    text = decode_text(read_plain(path, _MOST_BYTES), str(path))
    try:
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"--nodes: {path} is not TOML: {error}") from error
    unknown = sorted(found.keys() - {"node", "network_bandwidth", "network_latency"})
    if unknown:
        raise ConfigError(
            f"--nodes: {path} has {unknown[0]!r}, accepted is network_bandwidth, network_latency "
            "and a [[node]] for each machine"
        )
    nodes = found.get("node")
    if not isinstance(nodes, list) or not 2 <= len(nodes) <= _MOST_NODES:
        count = len(nodes) if isinstance(nodes, list) else 0
        raise ConfigError(
            f"--nodes: {path} has {count} times [[node]], accepted is 2 to {_MOST_NODES}: one for "
            "each machine"
        )
    made = tuple(_node(path, number, node) for number, node in enumerate(nodes))
    names = [node.name for node in made]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--nodes: {path} has two nodes named {twice!r}: name each once")
    rate = _number(path, found, "network_bandwidth", "GB/s")
    latency = _number(path, found, "network_latency", "seconds")
    roster = Roster(nodes=made)
    if rate is not None:
        roster = replace(roster, bytes_per_s=rate * 1e9)
    return roster if latency is None else replace(roster, latency_s=latency)


def _node(path: Path, number: int, found: object) -> Node:
    if not isinstance(found, dict):
        raise ConfigError(f"--nodes: {path} has no table for node {number}: write [[node]]")
    if unknown := sorted(found.keys() - set(_KEYS)):
        raise ConfigError(
            f"--nodes: {path} says {unknown[0]!r} of node {number}, accepted is {', '.join(_KEYS)}"
        )
    name = found.get("name", f"node {number}")
    profile = found.get("profile")
    for key, value in (("name", name), ("profile", profile)):
        if value is not None and not (isinstance(value, str) and 0 < len(value) <= _MOST_NAME):
            raise ConfigError(
                f"--nodes: {path}, node {number}: {key} is a text of 1 to {_MOST_NAME} characters"
            )
    rate = _number(path, found, "link_bandwidth", "GB/s")
    return Node(
        name=name,
        limit_bytes=_size(path, found, "device_memory"),
        host_bytes=_size(path, found, "host_memory"),
        link_bytes_per_s=None if rate is None else rate * 1e9,
        profile=profile,
    )


def _size(path: Path, found: Mapping[str, object], key: str) -> int | None:
    value = found.get(key)
    if value is None:
        return None
    try:
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise ConfigError(f"{value!r} is not a memory size: write '2GiB'")
        return parse_size(str(value))
    except ConfigError as error:
        raise ConfigError(f"--nodes: {path}, {key}: {error}") from error


def _number(path: Path, found: Mapping[str, object], key: str, unit: str) -> float | None:
    value = found.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"--nodes: {path}: {key} is {value!r}, accepted is {unit} above 0")
    return float(value)
