"""A run over several nodes in one process: the others are threads, lines are socket pairs."""

import socket
import threading
from contextlib import contextmanager

import pytest
from engines import PROMPT, ROOMY

from offload_rt.config import Exact, RuntimeConfig
from offload_rt.device.opening import open_device
from offload_rt.engine import NO_DRAFT, Engine
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.network import Network
from offload_rt.nodes.crossing import Lead, Member
from offload_rt.nodes.line import Line
from offload_rt.nodes.roster import Node, Roster
from offload_rt.nodes.stage import work
from offload_rt.speculative.medusa.drafter import Medusa


@contextmanager
def one_network_at_a_time():
    """Nodes are processes; as threads they must not build modules together: that patches torch."""
    lock = threading.RLock()

    def locked(work):
        def alone(*args, **options):
            with lock:
                return work(*args, **options)

        return alone

    with pytest.MonkeyPatch.context() as patched:
        for made, name in ((Network, "__init__"), (Network, "attach"), (Medusa, "__init__")):
            patched.setattr(made, name, locked(getattr(made, name)))
        yield


@contextmanager
def others(folder, count, **config):
    """Nodes 1 to count - 1 as threads of this process; the lead of them."""
    members, threads = [], []
    for number in range(1, count):
        mine, theirs = socket.socketpair(socket.AF_UNIX)
        device = open_device(RuntimeConfig(device="cpu", **config))
        arguments = (Line(theirs, "node 0"), open_checkpoint(folder), device)
        threads.append(threading.Thread(target=work, args=arguments))
        threads[-1].start()
        line = Line(mine, f"n{number}")
        line.works(True)
        members.append(Member(line=line, device_bytes=ROOMY, host_bytes=ROOMY))
    lead = Lead(members, Roster(nodes=tuple(Node(name=f"n{i}") for i in range(count))))
    try:
        yield lead
    finally:
        lead.end()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def nodes_engine(
    folder, count, *, prompts=(PROMPT,), tokens=16, kv_tokens=None, draft=NO_DRAFT, **config
):
    config = {"device_limit_bytes": ROOMY, "prefill_chunk_tokens": 5, "exact": Exact.OFF} | config
    names = tuple(f"n{i}" for i in range(count)) if count > 1 else ()
    with one_network_at_a_time(), others(folder, count) as lead:
        runtime = RuntimeConfig(**config, device=",".join(["cpu"] * count), machines=names)
        with Engine(
            open_checkpoint(folder),
            runtime,
            capacities=[len(p) + tokens for p in prompts],
            prompt_tokens=sum(len(p) for p in prompts),
            kv_tokens=kv_tokens,
            draft=draft,
            nodes=lead if names else None,
        ) as engine:
            yield engine
