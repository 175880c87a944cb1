"""A run over several nodes in one process: the others are threads, lines are socket pairs."""

import queue
import socket
import threading
from collections import defaultdict
from contextlib import contextmanager

import pytest
from engines import PROMPT, ROOMY

from offload_rt.config import Exact, RuntimeConfig
from offload_rt.device.opening import open_device
from offload_rt.engine import NO_DRAFT, Engine
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.network import Network
from offload_rt.nodes.carrying import ByGroup, ByLine
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


class LateGroup:
    """What NCCL promises and no more: what was sent or received is there behind a wait.

    Args:
        roads: tensors on their way, by sender and receiver; the same for all nodes.
        here: this node.
    """

    def __init__(self, roads, here):
        self.roads, self.here, self.closed = roads, here, None

    def isend(self, tensor, dst):
        return LateWork(lambda: self.roads[self.here, dst].put(tensor.clone()))

    def irecv(self, tensor, src):
        tensor.fill_(float("nan"))
        return LateWork(lambda: tensor.copy_(self.roads[src, self.here].get(timeout=20)))

    def close(self, *, abort=False):
        self.closed = "aborted" if abort or self.closed == "aborted" else "left"


class LateWork:
    def __init__(self, action):
        self.action = action

    def wait(self):
        self.action()


@contextmanager
def others(folder, count, roads=None, **config):
    """Nodes 1 to count - 1 as threads of this process; the lead of them.

    With `roads` hidden states cross by a group, as between GPUs.
    """
    members, threads = [], []
    lead_group = LateGroup(roads, 0)
    for number in range(1, count):
        mine, theirs = socket.socketpair(socket.AF_UNIX)
        device = open_device(RuntimeConfig(device="cpu", **config))
        group = None if roads is None else LateGroup(roads, number)
        arguments = (Line(theirs, "node 0"), open_checkpoint(folder), device, group)
        threads.append(threading.Thread(target=work, args=arguments))
        threads[-1].start()
        line = Line(mine, f"n{number}")
        line.works(True)
        by = ByLine() if roads is None else ByGroup(lead_group, number)
        members.append(Member(line=line, device_bytes=ROOMY, host_bytes=ROOMY, carrier=by))
    lead = Lead(members, Roster(nodes=tuple(Node(name=f"n{i}") for i in range(count))))
    try:
        yield lead
    finally:
        lead.end()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


def open_roads():
    return defaultdict(queue.Queue)


@contextmanager
def nodes_engine(
    folder,
    count,
    *,
    prompts=(PROMPT,),
    tokens=16,
    kv_tokens=None,
    draft=NO_DRAFT,
    roads=None,
    **config,
):
    config = {"device_limit_bytes": ROOMY, "prefill_chunk_tokens": 15, "exact": Exact.OFF} | config
    names = tuple(f"n{i}" for i in range(count)) if count > 1 else ()
    with one_network_at_a_time(), others(folder, count, roads) as lead:
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
