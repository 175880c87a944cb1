"""Profiles as JSON. The dataclasses of `profile.py` are the schema; `records.py` does the work."""

from functools import lru_cache

from offload_rt.profiling.profile import SCHEMA_VERSION, HardwareProfile
from offload_rt.profiling.records import (
    MalformedError,
    RecordReader,
    check_version,
    parse_object,
    shown_json,
    to_json,
)

__all__ = ["MalformedError", "decode", "encode", "read_tree"]

_OLD_NAMES = {"rows_apart": int, "multiplies": bool, "multiplies_exactly": bool}


def encode(profile: HardwareProfile) -> str:
    """Write a profile as JSON text; fields that have their default are left out."""
    return to_json(profile)


@lru_cache(maxsize=4)  # a run asks for one several times: 20 ms
def decode(text: str) -> HardwareProfile:
    """Read what `encode` wrote.

    Raises:
        MalformedError: it is not JSON, or not a profile.
    """
    return read_tree(parse_object(text))


def read_tree(tree: dict[str, object]) -> HardwareProfile:
    """Turn parsed JSON into a profile.

    Raises:
        MalformedError: it is not one.
    """
    check_version(tree, SCHEMA_VERSION)
    profile = RecordReader("a profile").read(HardwareProfile, _renamed(tree))
    assert isinstance(profile, HardwareProfile)
    return profile


def _renamed(tree: dict[str, object]) -> dict[str, object]:
    """What profiles of before December 2026 say of a machine's products, by its new names."""
    machine = tree.get("machine")
    if not isinstance(machine, dict):
        return tree
    machine, old = dict(machine), []
    for name, wanted in _OLD_NAMES.items():
        old.append(value := machine.pop(name, None))
        if value is not None and type(value) is not wanted:
            says = "a whole number" if wanted is int else "true or false"
            raise MalformedError(f"machine.{name} is {shown_json(value)}, must be {says}")
    apart, always, exactly = old
    if apart or (exactly and not always):
        machine["matrix_registers"] = True
    found = [stated for stated in (exactly, always, False if apart else None) if stated is not None]
    return tree | {"machine": machine | ({"kernels": found[0]} if found else {})}
