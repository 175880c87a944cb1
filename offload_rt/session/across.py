"""A run over several machines (--nodes): the first has the session, others a share of layers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_rt.config import RuntimeConfig
from offload_rt.errors import OffloadError
from offload_rt.session.adapters import merged, open_for_answers
from offload_rt.session.observer import Observer
from offload_rt.session.settings import Settings

if TYPE_CHECKING:
    import torch

    from offload_rt.device.kinds import DeviceKind
    from offload_rt.model.checkpoint import Checkpoint
    from offload_rt.nodes.carrying import Group
    from offload_rt.nodes.joining import Rank
    from offload_rt.nodes.line import Line
    from offload_rt.nodes.roster import Node


def is_guest(nodes: Path | None) -> bool:
    """Whether this process is another than the first of a run over several machines.

    Raises:
        ConfigError: torchrun did not start it, the file is not usable, or its nodes are not as many
            as there are processes. Each of those says so: the first may be gone before others come.
    """
    if nodes is None:
        return False
    from offload_rt.nodes.joining import Rank
    from offload_rt.nodes.roster import read_roster

    rank = Rank.read()
    rank.check(read_roster(nodes))
    return rank.number > 0


def be_guest(model: str, settings: Settings, observer: Observer) -> int:
    """Take a share of the layers until the first node ends the run; returns the exit code.

    Raises:
        NodeError: the first node is gone, or ended as something failed.
        OffloadError: this one cannot take part.
    """
    from offload_rt.model.identity import digest_of
    from offload_rt.nodes.joining import Rank, join

    rank = Rank.read()
    with observer.waiting(f"opening {model}"):
        checkpoint = merged(open_for_answers(model, settings), settings, observer)
    with ExitStack() as undo, observer.waiting(f"node {rank.number} of {rank.count}"):
        line = join(rank, digest_of(checkpoint))
        undo.callback(line.close)
        _take_part(line, checkpoint, settings, undo)
    return 0


def _take_part(line: "Line", checkpoint: "Checkpoint", settings: Settings, undo: ExitStack) -> None:
    from offload_rt.engine.engine import open_devices
    from offload_rt.nodes.joining import Rank
    from offload_rt.nodes.line import Kind, NodeError
    from offload_rt.nodes.meeting import be_met
    from offload_rt.nodes.stage import work

    if (frame := line.take()).kind is Kind.END:
        return
    told: dict[str, Any] = frame.record
    line.works(True)
    try:
        runtime = replace(settings.runtime, link_bytes_per_s=told["link_bytes_per_s"])
        devices = open_devices(runtime, undo, [checkpoint])
        device = devices[0]
        if device.kind.processor != told["processor"]:
            raise NodeError(
                f"this node computes on {device.kind.processor} and the first on "
                f"{told['processor']}: give all the same kind with --device"
            )
        line.send(Kind.HELLO, {"nccl": _nccl(device.kind)})

        def free() -> dict[str, int]:
            (device_bytes,) = devices.free_bytes()
            return {"device_bytes": device_bytes, "host_bytes": _free_host_bytes(told)}

        group = be_met(line, partial(_open_group, Rank.read(), device.torch_device), free)
    except OffloadError as error:
        line.end(str(error))
        raise
    work(line, checkpoint, device, group)


def _named(settings: Settings, processor: str) -> str:
    device = settings.runtime.device
    return processor if device == "auto" else device


def _greet(line: "Line", node: "Node", part: RuntimeConfig, processor: str) -> str:
    """Tell a node what it is to open; its version of NCCL."""
    from offload_rt.nodes.line import Kind

    asked = {"link_bytes_per_s": part.link_bytes_per_s, "host_bytes": node.host_bytes}
    line.send(Kind.HELLO, {**asked, "processor": processor})
    return str(line.expect(Kind.HELLO).record.get("nccl", ""))


def _nccl(kind: "DeviceKind") -> str:
    """The version of NCCL there is for a kind of device; empty: none."""
    if not kind.own_memory:
        return ""
    from offload_rt.device.cuda.nccl import nccl_version

    return nccl_version()


def _open_group(rank: "Rank", device: "torch.device") -> "Group":
    """Join the nodes' group of GPUs."""
    from offload_rt.device.cuda.nccl import NcclGroup
    from offload_rt.nodes.joining import rendezvous_store

    return NcclGroup(rendezvous_store(), rank.number, rank.count, device)


def _place(name: str) -> "torch.device":
    """Where tensors of a device live."""
    import torch

    from offload_rt.device.kinds import named_devices

    kind, (index,) = named_devices(name)
    return torch.device(kind.processor, index)


def _free_host_bytes(told: dict[str, Any]) -> int:
    from offload_rt.device.system import free_memory_bytes

    return min(free_memory_bytes(), told["host_bytes"] or free_memory_bytes())


@contextmanager
def across(
    nodes: Path | None, checkpoint: "Checkpoint", settings: Settings, observer: Observer
) -> Iterator[Settings]:
    """As the first node: the settings with all nodes in them, which are told when the body ends.

    Args:
        nodes: the file that names them; None: there is this machine alone.
        checkpoint: what runs, with its adapter.
        settings: of the command line.
        observer: is told what is waited for.

    Raises:
        ConfigError: the file is not usable, or its nodes are not as many as there are processes.
        NodeError: one did not come, has other files, or cannot take part.
    """
    if nodes is None:
        yield settings
        return
    from offload_rt.device.opening import chosen_kind
    from offload_rt.model.identity import digest_of
    from offload_rt.nodes.carrying import ByGroup, ByLine
    from offload_rt.nodes.crossing import Lead, Member
    from offload_rt.nodes.joining import Host, Rank
    from offload_rt.nodes.meeting import meet
    from offload_rt.nodes.roster import read_roster

    rank = Rank.read()
    with Host() as host:
        roster = read_roster(nodes)
        processor = chosen_kind(settings.runtime).processor
        runtime = roster.runtime(replace(settings.runtime, device=_named(settings, processor)))
        with observer.waiting(f"waiting for {rank.count - 1} other nodes"):
            lines = host.gather(roster, rank, digest_of(checkpoint))
            others = zip(lines, roster.nodes[1:], runtime.each_device()[1:], strict=True)
            versions = [_greet(line, node, part, processor) for line, node, part in others]
            first = runtime.each_device()[0]
            names = [node.name for node in roster.nodes]
            every = [_nccl(chosen_kind(first)), *versions]
            found, group, why = meet(
                lines, names, every, lambda: _open_group(rank, _place(first.device))
            )
        if why:
            observer.note(f"hidden states cross in host memory, as {why}")
        members = [
            Member(line=line, carrier=ByLine() if group is None else ByGroup(group, at), **free)
            for at, (line, free) in enumerate(zip(lines, found, strict=True), 1)
        ]
        lead = Lead(members, roster)
        try:
            yield replace(settings, runtime=runtime, nodes=lead)
        except BaseException:
            lead.close(abort=True)
            raise
        lead.close()
