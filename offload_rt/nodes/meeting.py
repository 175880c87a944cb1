"""Whether hidden states cross by NCCL: the nodes agree before anything is loaded.

Each says which NCCL it has. If all have the same, all join a group at once; if one could not, all
go without. Memory that NCCL takes is taken before free memory is told.
"""

from collections.abc import Callable, Sequence
from typing import Any

from offload_rt.nodes.carrying import Group, why_not_nccl
from offload_rt.nodes.line import Kind, Line

Open = Callable[[], Group]


def meet(
    lines: Sequence[Line], names: Sequence[str], versions: Sequence[str], open_group: Open
) -> tuple[list[dict[str, Any]], Group | None, str]:
    """As the first node: have all join a group, if they can.

    Args:
        lines: to the others.
        names: of all, this one first.
        versions: of NCCL, likewise; empty: a node has none.
        open_group: joins here.

    Returns:
        what the others have free, the group, and why there is none: empty where nobody has a GPU.

    Raises:
        NodeError: one is gone.
    """
    why = why_not_nccl(names, versions)
    for line in lines:
        line.send(Kind.MEET, {"joins": not why})
    group, own = (None, why) if why else _joined(open_group)
    met: list[dict[str, Any]] = [line.expect(Kind.MEET).record for line in lines]
    whys = [own, *(record.pop("why") for record in met)]
    failed = next((f"{name}: {said}" for name, said in zip(names, whys, strict=True) if said), "")
    if failed and group is not None:
        group.close(abort=True)
        group = None
    return met, group, (why or failed) if any(versions) else ""


def be_met(line: Line, open_group: Open, free: Callable[[], dict[str, int]]) -> Group | None:
    """As another node: join a group if the first one says so.

    Args:
        line: to the first node.
        open_group: joins here.
        free: what is free then, by name.

    Raises:
        NodeError: the first node is gone.
    """
    joins = line.expect(Kind.MEET).record.get("joins")
    group, why = _joined(open_group) if joins else (None, "")
    line.send(Kind.MEET, {**free(), "why": why})
    return group


def _joined(open_group: Open) -> tuple[Group | None, str]:
    """The group, or why it could not be joined."""
    try:
        return open_group(), ""
    except (RuntimeError, ValueError, OSError) as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0]
