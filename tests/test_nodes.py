"""One model over several nodes: no bit changes, memory keeps to plans, who is gone is named."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from engines import PROMPT, all_logits, engine_for, generate
from forks import PROGRAM, Forked
from hybrids import make_hybrid
from mtp_models import of_the_token, write_mtp
from nodes_double import LateGroup, nodes_engine, open_roads
from test_experts import copied
from test_medusa import knowing_heads
from tiny import DEEP
from transformers.models.llama import modeling_llama

from offload_rt.config import (
    DraftConfig,
    DraftShape,
    Exact,
    GenerationConfig,
    HomeKind,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.costs.machine import FreeMemory
from offload_rt.costs.sizes import RUNTIME_BYTES
from offload_rt.device.cuda.nccl import CROSS_S, OPEN_S, NcclGroup
from offload_rt.device.kinds import FREE_SHARE
from offload_rt.engine import Run
from offload_rt.engine.scheduler import Scheduler
from offload_rt.engine.sequence import Request
from offload_rt.errors import CheckpointError, ConfigError, PlanError, WeightsError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.identity import digest_of
from offload_rt.model.network import Network
from offload_rt.nodes import joining
from offload_rt.nodes.carrying import ByGroup
from offload_rt.nodes.line import _HEAD, Kind, Line, NodeError
from offload_rt.nodes.meeting import be_met, meet
from offload_rt.nodes.roster import Node, Roster, read_roster
from offload_rt.planning.fit import host_limits

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LIMIT_S = 90


@pytest.fixture(scope="module")
def folder(make_tiny):
    return make_tiny("llama", num_hidden_layers=6, tie_word_embeddings=True, **IDS)


def answers(engine, prompts=(PROMPT,), **sampling):
    return generate(engine, prompts, sampling=SamplingConfig(**sampling))


@pytest.mark.parametrize(
    ("count", "config"),
    [
        (2, {"resident_layers": 0, "slots": 1}),
        (3, {"resident_layers": 2, "slots": 2}),
        (3, {"resident_layers": 6}),
        (2, {"resident_layers": 1, "exact": Exact.ON}),
        (3, {"resident_layers": 0, "home": HomeKind.HOST}),
    ],
)
def test_logits_over_nodes_are_those_of_one_process(folder, count, config, monkeypatch):
    with engine_for(folder, **config) as engine:
        expected = all_logits(engine)
    limits, real = [], Network.exact_problem

    def exact_problem(self, *given, limit_bytes, **options):
        limits.append(limit_bytes)
        return real(self, *given, limit_bytes=limit_bytes, **options)

    monkeypatch.setattr(Network, "exact_problem", exact_problem)
    with nodes_engine(folder, count, **config) as engine:
        assert len(set(engine.placement.device)) == count
        if config.get("exact") is Exact.ON:  # in what is planned for each
            assert {*limits} == {share.device_bytes for share in engine.placement.shares}
        assert torch.equal(all_logits(engine), expected)
        assert not engine._nodes._like.untyped_storage().nbytes()  # no rows outlive their pass
        engine.forget()  # what is committed on the other nodes goes, too
        assert torch.equal(all_logits(engine), expected)


@pytest.mark.parametrize(("name", "several"), [("lfm2", 3), ("falcon_h1", 2)])
def test_each_node_has_the_recurrent_states_of_its_layers(name, several, make_tiny):
    """Prompts in parts, drafts of which some are accepted, and a turn that goes on."""
    folder = make_hybrid(make_tiny, name)
    draft, turn = DraftConfig(draft="ngram", draft_tokens=4), [*PROMPT * 3, 5, 6]
    room = {"prompts": [[*turn, *PROMPT]] * 2, "tokens": 40, "resident_layers": 1}
    found = []
    for count in (1, several):
        with nodes_engine(folder, count, draft=draft, **room) as engine:
            both = generate(engine, [PROMPT * 3, PROMPT[5:]], tokens=12)
            again = generate(engine, [turn, PROMPT[5:]], tokens=6)
            found.append((all_logits(engine), both, again))
            if count > 1:
                for holds, share in zip(
                    engine._nodes.tell(), engine.placement.shares[1:], strict=True
                ):
                    assert 0 < sum(holds.ledger.values()) <= share.device_bytes
                    states = holds.ledger["recurrent states"]
                    assert states == sum(share.demand.state_bytes)
    (expected, *texts), (logits, *others) = found
    assert others == texts and torch.equal(logits, expected)


def test_states_on_other_nodes_go_back_where_a_pass_is_given_up(make_tiny):
    """The first states are elsewhere, so a pass may move those and none here."""
    kinds = ["full_attention", "conv", "conv", "conv"]
    folder, turn = make_hybrid(make_tiny, "lfm2", layer_types=kinds), [*PROMPT * 4, 5, 6]
    room = {"prompts": [[*turn, *PROMPT * 4]], "tokens": 9, "resident_layers": 0, "slots": 1}
    whole = {"exact": Exact.ON, "prefill_chunk_tokens": 512}  # asked once a layer
    with nodes_engine(folder, 2, **whole, **room) as engine:
        assert engine.placement.device[:2] == (0, 1)
        (answer,) = generate(engine, [turn], tokens=6)
        more = [*turn, *answer[:3], *PROMPT * 3]
        expected = engine.forward([(0, more)], reuse=True)
        for layer in range(1, 5):
            engine.forget()
            generate(engine, [turn], tokens=6)
            calls = iter(range(layer))

            def poll(calls=calls):
                if next(calls, None) is None:
                    raise StopError

            engine.poll_with(poll)
            with suppress(StopError):
                engine.forward([(0, more)], reuse=True)
                assert layer == 4  # of four
            engine.poll_with(lambda: None)
            assert torch.equal(engine.forward([(0, more)], reuse=True), expected)


@pytest.mark.parametrize(
    ("broken", "said"), [(1, "from layer 1 on:"), (3, "in or before layer 4, here or on")]
)
def test_numbers_that_are_none_are_traced_over_nodes(folder, tmp_path, broken, said):
    """Layers 2 and 3 are on the second node; what they made is seen on its way to the third."""
    name = f"model.layers.{broken}.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name][3, 3] = float("nan")

    with nodes_engine(copied(folder, tmp_path, spoil), 3, resident_layers=6) as engine:
        assert engine.placement.device == (0, 0, 1, 1, 2, 2)
        with pytest.raises(WeightsError, match=f"{said}.*{re.escape(name)}.* holds 1 of them"):
            generate(engine, [PROMPT])


def test_a_family_whose_layers_read_what_tokens_make_is_refused(make_tiny, monkeypatch):
    folder = make_tiny(
        "llama", rms_norm_eps=0.03125, **DEEP, **IDS
    )  # of other modules than probed before
    rotary = modeling_llama.LlamaRotaryEmbedding.forward

    def by_rows(self, rows, position_ids):
        cos, sin = rotary(self, rows, position_ids)
        return cos * rows[..., :1].tanh(), sin

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", by_rows)
    with engine_for(folder, resident_layers=1) as engine:
        assert all_logits(engine).isfinite().all()
    said = "--nodes: layers of llama models run on one device only, as layer 0 reads, beside its"
    with pytest.raises(CheckpointError, match=said), nodes_engine(folder, 2, resident_layers=1):
        pass


@pytest.mark.parametrize("shape", [DraftShape.CHAIN, DraftShape.TREE])
def test_drafts_over_nodes_change_no_token_and_memory_keeps_to_each_plan(folder, shape):
    prompts = (PROMPT, PROMPT[::-1], [5] * 9)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=4, shape=shape)
    with engine_for(folder, resident_layers=2, prompts=prompts) as engine:
        expected = answers(engine, prompts)
    with nodes_engine(folder, 3, resident_layers=2, prompts=prompts, draft=draft) as engine:
        assert answers(engine, prompts) == expected
        shares = engine.placement.shares
        assert all(share.demand.workspace_bytes > RUNTIME_BYTES for share in shares)
        for own, share in zip(engine.memory().devices, shares, strict=True):
            assert own.planned_bytes == share.device_bytes
            assert bool(own.link_bytes) == bool(share.streamed)
        for holds, share in zip(engine._nodes.tell(), shares[1:], strict=True):
            assert 0 < sum(holds.ledger.values()) <= share.device_bytes
        total = sum(own.link_bytes for own in engine.memory().devices)
        assert engine.counters().bytes_copied == total


def steps_and_answers(engine):
    run = Run.start(engine, [PROMPT], SamplingConfig(), GenerationConfig(max_tokens=16))
    run.prefill()
    steps = 0
    while run.active:
        run.step()
        steps += 1
    return steps, [sequence.emitted for sequence in run.sequences]


@pytest.mark.parametrize("kind", ["mtp", "medusa"])
def test_drafters_that_read_hidden_states_do_so_over_nodes(folder, tmp_path, kind):
    if kind == "mtp":
        folder = write_mtp(tmp_path, change=of_the_token, num_hidden_layers=6)
        draft = DraftConfig(draft="mtp", draft_tokens=4)
    else:
        with engine_for(folder, resident_layers=1) as engine:
            known = generate(engine, [PROMPT])
        heads = knowing_heads(tmp_path / "heads", folder, [PROMPT], known)
        draft = DraftConfig(draft=f"medusa:{heads}", draft_tokens=4)
    options = {"resident_layers": 1, "draft": draft, "prefill_chunk_tokens": 9}
    with engine_for(folder, **options) as engine:
        expected = steps_and_answers(engine)
    with nodes_engine(folder, 3, **options) as engine:
        found = steps_and_answers(engine)
    assert found == expected
    assert found[0] <= 6  # they are right: states of the right rows come home


def test_sequences_come_and_go_and_share_memory_on_every_node(folder):
    draw = random.Random(3)
    begin = [draw.randrange(200) for _ in range(12)]
    texts = [
        begin[: draw.randrange(3, 12)] + [draw.randrange(200) for _ in range(6)] for _ in "1234567"
    ]
    requests = [Request(ids=text, max_tokens=5 + place % 3) for place, text in enumerate(texts)]
    found = {}
    for count in (1, 2):
        with nodes_engine(
            folder, count, prompts=(PROMPT,) * 2, tokens=30, kv_tokens=70, resident_layers=2
        ) as engine:
            scheduler, members = Scheduler(engine), []
            for request in requests:
                members.append(scheduler.join(request))
                scheduler.sweep()
            while scheduler.busy:
                scheduler.sweep()
            assert engine.prefixes.rows  # rows of ended sequences outlive them
            found[count] = [member.emitted for member in members]
            assert all(member.error is None for member in members)
    assert found[1] == found[2]


class StopError(BaseException):
    """Ends a pass."""


@pytest.mark.parametrize("roads", [None, open_roads()], ids=["line", "group"])
def test_a_pass_that_is_given_up_leaves_no_trace_on_other_nodes(folder, roads):
    other = [token + 1 for token in PROMPT]
    whole = {"prefill_chunk_tokens": 512, "roads": roads}  # asked once a layer
    with nodes_engine(folder, 3, resident_layers=0, slots=1, **whole) as engine:
        expected = all_logits(engine)
        for layer in range(5):
            engine.forget()
            calls = iter(range(layer + 1))

            def poll(calls=calls):
                if next(calls, None) is None:
                    raise StopError

            engine.poll_with(poll)
            with pytest.raises(StopError):
                engine.forward([(0, other)], reuse=True)
            engine.poll_with(lambda: None)
            if layer % 2:
                assert engine.memory().devices  # asked for before the next pass
            assert torch.equal(all_logits(engine), expected)
    assert not any(road.qsize() for road in (roads or {}).values())  # sends and receives in pairs


def test_hidden_states_cross_beside_the_line_where_there_is_a_group(folder, monkeypatch):
    with engine_for(folder, resident_layers=0, slots=1) as engine:
        expected = all_logits(engine)
    sizes, real = [], Line.send

    def send(self, kind, record=None, data=b""):
        sizes.append((kind, len(data)))
        return real(self, kind, record, data)

    monkeypatch.setattr(Line, "send", send)
    options = {"resident_layers": 0, "slots": 1, "roads": open_roads()}
    with nodes_engine(folder, 3, **options) as engine:
        assert torch.equal(all_logits(engine), expected)
    assert len(options["roads"]) == 4 and (Kind.ROWS, 0) in sizes
    assert not any(nbytes for _, nbytes in sizes)
    monkeypatch.setattr(ByGroup, "take", without_a_wait)
    with nodes_engine(folder, 3, **options) as engine:
        assert not torch.equal(all_logits(engine), expected)


def without_a_wait(self, frame, like):
    made = torch.empty(frame.record["shape"], dtype=like.dtype)
    self._group.irecv(made, self._peer)
    return made


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_node_that_is_gone_ends_what_waits_for_it_on_a_gpu(folder):
    with nodes_engine(folder, 2, resident_layers=0, slots=1, roads=open_roads()) as engine:
        (member,) = engine._nodes.members
        all_logits(engine)
        member.line.end("a test ends it")
        with pytest.raises(NodeError):
            all_logits(engine)
        assert member.carrier._group.closed == "aborted"


@pytest.mark.parametrize("older", [False, True])
def test_what_crosses_may_take_longer_than_joining(monkeypatch, older):
    """torch counts from when a receive is enqueued, which may be behind a prompt's kernels."""
    limits_s = []

    def keep(*_, timeout, **options):
        limits_s.append(timeout.total_seconds())

    def change(timeout):
        limits_s.append(timeout.total_seconds())

    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(dist, "init_process_group", keep)
    monkeypatch.setattr(dist, "set_timeout", None if older else change, raising=False)
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", change)
    NcclGroup(None, 1, 2, torch.device("cuda", 0))
    assert limits_s == [OPEN_S, CROSS_S] and CROSS_S >= 24 * 3600


@pytest.mark.parametrize(
    ("versions", "failing", "why"),
    [
        (["2.28", "2.28", "2.28"], None, ""),
        (["2.28", "2.27", "2.28"], None, "a has NCCL 2.28 and b 2.27"),
        (["2.28", "2.28", ""], None, "torch has no NCCL on c"),
        (["", "", ""], None, ""),
        (["2.28", "2.28", "2.28"], 2, "c: Duplicate GPU detected"),
        (["2.28", "2.28", "2.28"], 0, "a: Duplicate GPU detected"),
    ],
)
def test_nodes_agree_how_hidden_states_cross(versions, failing, why):
    roads, opened, made = open_roads(), {}, {}

    def open_group(number):
        if number == failing:
            raise RuntimeError("Duplicate GPU detected\nat some place")
        return opened.setdefault(number, LateGroup(roads, number))

    def free(number):
        return {"device_bytes": number, "host_bytes": 10 + (number in opened)}

    def guest(line, number):
        made[number] = be_met(line, lambda: open_group(number), lambda: free(number))

    pairs = [socket.socketpair(socket.AF_UNIX) for _ in "bc"]
    ends = [(Line(mine, "guest"), Line(theirs, "lead")) for mine, theirs in pairs]
    threads = [
        threading.Thread(target=guest, args=(line, number))
        for number, (_, line) in enumerate(ends, 1)
    ]
    for thread in threads:
        thread.start()
    lines = [line for line, _ in ends]
    found, group, said = meet(lines, ["a", "b", "c"], versions, lambda: open_group(0))
    for thread in threads:
        thread.join(20)
    for line in [line for pair in ends for line in pair]:
        line.close()
    assert said == why and (group is not None) == (why == "" and versions[0] != "")
    # What is free is told after NCCL took its memory.
    assert [one["device_bytes"] for one in found] == [1, 2]
    assert [one["host_bytes"] for one in found] == [10 + (made[n] is not None) for n in (1, 2)]
    if failing == 2:
        assert opened[0].closed == "aborted"


def test_what_needs_all_layers_here_is_refused(folder):
    own = DraftConfig(draft="self", draft_tokens=2)
    said = "drafts with the model's own layers.*--draft ngram"
    with pytest.raises(PlanError, match=said), nodes_engine(folder, 2, draft=own):
        pass
    said = "--kv disk: with --nodes each node keeps"
    with pytest.raises(ConfigError, match=said), nodes_engine(folder, 2, kv="disk"):
        pass


def ends():
    mine, theirs = socket.socketpair(socket.AF_UNIX)
    return mine, theirs


def test_a_node_that_is_gone_or_silent_or_strange_is_named():
    mine, theirs = ends()
    theirs.close()
    with pytest.raises(NodeError, match="shelf ended: its connection is closed"):
        Line(mine, "shelf").take()
    mine, theirs = ends()
    start = time.monotonic()
    with pytest.raises(NodeError, match="shelf has been silent for 0 s"):
        Line(mine, "shelf", silence_s=0.2).take()
    assert time.monotonic() - start < 5
    theirs.close()
    mine, theirs = ends()
    theirs.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(20))
    with pytest.raises(NodeError, match="no frame of offload-run"):
        Line(mine, "shelf").take()
    mine, theirs = ends()
    Line(theirs, "desk").end("disk full")
    with pytest.raises(NodeError, match="shelf ended: disk full"):
        Line(mine, "shelf").take()


def test_a_node_that_works_gives_signs_of_life():
    mine, theirs = ends()
    other = Line(theirs, "desk", silence_s=0.3)
    other.works(True)
    line, found = Line(mine, "shelf", silence_s=0.3), []
    thread = threading.Thread(target=lambda: found.append(line.take().kind))
    thread.start()
    time.sleep(1.0)
    other.send(Kind.READY)
    thread.join(5)
    assert found == [Kind.READY]
    other.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[node]", "is not TOML"),
        ("[[node]]\n", "has 1 times \\[\\[node\\]\\], accepted is 2 to 64"),
        ("[[node]]\n[[node]]\nspeed=1\n", "says 'speed' of node 1, accepted is name"),
        ("port=1\n[[node]]\n[[node]]\n", "has 'port', accepted is"),
        ('[[node]]\nname="a"\n[[node]]\nname="a"\n', "two nodes named 'a'"),
        ('[[node]]\ndevice_memory="x"\n[[node]]\n', "'x' is not a memory size"),
        ("[[node]]\nlink_bandwidth=0\n[[node]]\n", "link_bandwidth is 0, accepted is GB/s above 0"),
        ("node=[1,2]\n", "has no table for node 0"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, text, said):
    (path := tmp_path / "nodes.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_roster(path)


def test_limits_and_links_of_nodes_are_for_all_or_none():
    some = Roster(nodes=(Node(name="a", limit_bytes=5), Node(name="b")))
    with pytest.raises(ConfigError, match="b has no device_memory and others have"):
        some.runtime(RuntimeConfig(device="cpu"))
    made = some.runtime(RuntimeConfig(device="cpu", device_limit_bytes=7))
    assert (made.device_limit_bytes, made.machines, made.device) == ((5, 7), ("a", "b"), "cpu,cpu")
    own = replace(some, nodes=(replace(some.nodes[0], host_bytes=9), some.nodes[1]))
    made = own.runtime(RuntimeConfig(device="cpu", device_limit_bytes=7, host_limit_bytes=20))
    assert made.machine_host_bytes == (9, None)
    for host_bytes, expected in ((30, [9, 20]), (8, [8, 20])):
        free = FreeMemory(device_bytes=0, host_bytes=host_bytes, further_host_bytes=(40,))
        assert host_limits(made, free) == expected
    free = replace(free, further_bytes=(0,))
    assert host_limits(replace(made, host_limit_bytes=None), free) == [8, int(40 * FREE_SHARE)]
    with pytest.raises(ConfigError, match="names several devices, with --nodes each node has one"):
        some.runtime(RuntimeConfig(device="cpu,cpu"))


def test_nodes_compare_their_files(make_tiny, folder, tmp_path):
    other = make_tiny("llama", num_hidden_layers=4, **IDS)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    mine = digest_of(open_checkpoint(folder))
    assert mine == digest_of(open_checkpoint(copy)) != digest_of(open_checkpoint(other))


class Store(dict):
    """What torchrun's rendezvous keeps."""

    def set(self, name, said):
        self[name] = said.encode()

    def get(self, name):
        return self[name]

    def wait(self, names, limit):
        until = time.monotonic() + limit.total_seconds()
        while not set(names) <= self.keys() and time.monotonic() < until:
            time.sleep(0.005)


@pytest.fixture
def meeting(monkeypatch):
    """Where nodes of this process meet."""
    store = Store()
    monkeypatch.setattr(joining, "rendezvous_store", lambda: store)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return store


def strange(store, sent):
    """Somebody connects to the first node's port, and says that."""
    store.wait([joining._ADDRESS], timedelta(seconds=20))
    port = int(store.get(joining._ADDRESS).decode().split()[0])
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(sent)
    return connection


def gathering(results, monkeypatch):
    """The first node waits for one other, in a thread; returns that."""

    def gather():
        roster = Roster(nodes=(Node(name="desk"), Node(name="shelf")))
        with joining.Host() as host:
            results.append(host.gather(roster, joining.Rank(0, 2), "same"))
            results.append(results[0][0].take().record)

    thread = threading.Thread(target=gather, daemon=True)
    thread.start()
    return thread


STRANGERS = {
    "silent": b"",
    "in the middle": b"\x01\x00",
    "64 GiB": _HEAD.pack(Kind.HELLO.value, 2, 2**36) + b"{}",
    "a long record": _HEAD.pack(Kind.HELLO.value, 2**26, 0) + b"{",
    "another frame": _HEAD.pack(Kind.ROWS.value, 2, 0) + b"{}",
    "no record": _HEAD.pack(Kind.HELLO.value, 4, 0) + b"[{]]",
    "deep": _HEAD.pack(Kind.HELLO.value, 4000, 0) + b"[" * 4000,
    "HTTP": b"GET / HTTP/1.1\r\nHost: desk\r\n\r\n",
}


def test_strangers_hold_up_nobody_who_joins(meeting, monkeypatch):
    results, begun, asked = [], time.monotonic(), []
    real = Line._bytes
    monkeypatch.setattr(Line, "_bytes", lambda self, n: asked.append(n) or real(self, n))
    thread = gathering(results, monkeypatch)
    strangers = {name: strange(meeting, sent) for name, sent in STRANGERS.items()}
    strangers["wrong number"] = strange(meeting, b"")
    other = Line(strangers["wrong number"], "first")
    other.send(Kind.HELLO, {"node": 1, "token": "0" * 32, "digest": "same", "host": "x"})
    line = joining.join(joining.Rank(1, 2), "same")
    line.send(Kind.TELL, {"it": "works"})
    thread.join(timeout=20)
    assert results[1] == {"it": "works"} and time.monotonic() - begun < 15
    assert max(asked) <= 4096  # bytes that are set aside
    line.close()
    with pytest.raises(NodeError, match="this is another run"):
        other.take()
    other.close()
    for name in STRANGERS:
        with suppress(ConnectionResetError):  # what it said was not read
            assert strangers[name].recv(1) == b"", name


def test_who_says_nothing_is_sent_away_and_so_is_the_oldest_of_many(meeting, monkeypatch):
    monkeypatch.setattr(joining, "HELLO_S", 0.2)
    monkeypatch.setattr(joining, "_MOST_WAITING", 2)
    results = []
    thread = gathering(results, monkeypatch)
    for count in (1, 4):
        silent = [strange(meeting, b"") for _ in range(count)]
        for one in silent:
            one.settimeout(20)
            assert one.recv(1) == b""
    line = joining.join(joining.Rank(1, 2), "same")
    line.send(Kind.TELL, {})
    thread.join(timeout=20)
    assert len(results) == 2
    line.close()


def test_a_frame_for_which_there_is_no_memory_is_a_sentence(monkeypatch):
    here, there = socket.socketpair()
    line, real = Line(here, "shelf"), Line._bytes

    def bytes_of(self, count):
        if count > 2**30:
            raise MemoryError
        return real(self, count)

    monkeypatch.setattr(Line, "_bytes", bytes_of)
    there.sendall(_HEAD.pack(Kind.ROWS.value, 2, 2**36) + b"{}")
    with pytest.raises(NodeError, match=r"shelf sends 64\.0? ?GiB at once"):
        line.take()
    line.close()
    there.close()


PATIENT = """
from offload_rt.nodes.line import Line
from offload_rt.cli import main
Line.__init__.__defaults__ = (2.0,)
raise SystemExit(main())
"""


def start(model, nodes, count, *arguments, program=(PROGRAM,)):
    """The processes of a run, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    models = model if isinstance(model, list) else [model] * count
    return [
        Forked(
            [*program, *map(str, [arguments[0], models[rank], "--nodes", nodes, *arguments[1:]])],
            env=os.environ | common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]


def finish(process):
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def two(tmp_path):
    (path := tmp_path / "nodes.toml").write_text('[[node]]\nname="desk"\n[[node]]\nname="shelf"\n')
    return path


def test_a_plan_says_what_each_machine_has_and_what_binds(deep_model, two, offload_run):
    options = ["--nodes", two, "--device", "cpu", "--device-memory", "1GiB", "--context", "64"]
    done = offload_run("plan", deep_model, *options)
    assert done.code == 0, done.err
    for name in ("desk", "shelf"):
        said = rf"{name} \S+ \w+ 2 layers resident, .* s of kernels in a pass: compute binds"
        assert re.search(said, " ".join(done.out.split())), done.out
    made = json.loads(offload_run("plan", deep_model, *options, "--json").out)
    assert [own["resident"] for own in made["devices"]] == [[0, 1], [2, 3]]
    assert all(own["busy"]["kernels_s"] > 0 for own in made["devices"])


@pytest.mark.slow
def test_generate_over_two_processes_answers_as_one_does(deep_model, two, offload_run):
    options = ["-p", "hello there", "-n", "12", "--ignore-eos", "--resident-layers", "1"]
    options += ["--device", "cpu", "--device-memory", "1GiB", "--dtype", "fp32", "--json"]
    one = offload_run("generate", deep_model, *options)
    first, second = map(finish, start(deep_model, two, 2, "generate", *options))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert json.loads(first[1])["text"] == json.loads(one.out)["text"]
    assert second[1] == ""


@pytest.mark.slow
def test_a_node_that_dies_ends_the_run_and_is_named(make_tiny, two):
    model = make_tiny("llama", tokenizer=True, max_position_embeddings=40_000, **DEEP)
    options = ["generate", "-p", "hello", "-n", "30000", "--ignore-eos", "--device", "cpu"]
    options += ["--device-memory", "1GiB"]
    patient = (sys.executable, "-c", PATIENT)  # for 2 s instead of 30
    said = {signal.SIGSTOP: "silent for 2 s", signal.SIGKILL: "its connection is closed"}
    runs = {number: start(model, two, 2, *options, program=patient) for number in said}
    for number, (first, second) in runs.items():
        first.stdout.read(1)
        second.send_signal(number)
    for number, (first, second) in runs.items():
        code, _, err = finish(first)
        second.kill()
        assert code == 2
        assert re.search(rf"error: shelf \(node 1, .*\).*{said[number]}", err), err


@pytest.mark.slow
def test_other_files_and_other_counts_are_one_sentence_on_every_node(make_tiny, two, deep_model):
    other = make_tiny("llama", tokenizer=True, num_hidden_layers=3)
    options = ["generate", "-p", "hello", "-n", "3", "--device", "cpu"]
    others, many = start([deep_model, other], two, 2, *options), start(deep_model, two, 3, *options)
    for process in others:
        code, _, err = finish(process)
        assert code == 2 and "has another model than node 0" in err, err
    for process in many:
        code, _, err = finish(process)
        assert code == 2 and "names 2 machines and torchrun started 3 processes" in err, err
