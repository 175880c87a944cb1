"""The CUDA device over CPU memory: what it copies gives the same bits, and the same answers."""

import sys
from dataclasses import replace

import pytest
import torch
from engines import PROMPT, all_logits, engine_for, generate
from expert_models import make_mixture
from flash_double import flash_of_a_gpu
from medusa_heads import write_shared
from quantised import write_gpt_oss
from tiny import DEEP
from value_double import open_as, open_double

from offload_rt.config import (
    DraftConfig,
    DraftWeights,
    HomeKind,
    KVPlace,
    RetrievalConfig,
)
from offload_rt.device.base import PAGE_BYTES, STAGING_BYTES
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.cuda import nvml
from offload_rt.device.cuda import pinned as pinned_module
from offload_rt.device.cuda import streams as streams_module
from offload_rt.device.cuda.streams import CudaComputeStream
from offload_rt.device.host_memory import allocate_host
from offload_rt.device.kinds import Packing
from offload_rt.errors import NumbersError
from offload_rt.model import weight_files as files_module
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats.rounded import Int4Linear
from offload_rt.model.network import Network
from offload_rt.model.weight_files import FileSource, WeightFiles
from offload_rt.runner.loading import BASE
from offload_rt.streaming import memory_home as home_module
from offload_rt.streaming.experts import ExpertPool
from offload_rt.streaming.memory_home import MemoryHome

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONG = [(7 * i + i * i // 9) % 290 for i in range(24)] * 3
TOKENS = 10
PROMPTS = {False: [LONG], True: [LONG, PROMPT, LONG[:50]]}  # many or one
# With what a GPU takes beside what is allocated; `PROMPT` in two parts, of many rows and of few.
ROOM = {"device_limit_bytes": 2**31, "prefill_chunk_tokens": 9}
STREAMED = {"home": HomeKind.HOST, "resident_layers": 1, "slots": 2} | ROOM
KV_HOST = {"kv": KVPlace.HOST, "kv_block_tokens": 16}
TRIFORCE = DraftConfig(
    draft="triforce",
    draft_tokens=4,
    retrieval=RetrievalConfig(
        budget_tokens=32, chunk_tokens=4, rebuild_tokens=4, retrieval_weights=DraftWeights.SAME
    ),
)
CASES = {
    "pinned": {},
    "staged": {"driver": {"pin": False}},
    "disk": {"home": HomeKind.DISK},
    "one slot": {"slots": 1, "resident_layers": 0},
    "batch": {"many": True},
    "n-grams": {"draft": "ngram", "draft_tokens": 8},
    "tree of a model": {"draft": "model", "draft_tokens": 16, "prefill_chunk_tokens": 9},
    "Medusa": {"draft": "medusa", "draft_tokens": 9},
    "KV": KV_HOST,
    "KV, a ring of all layers": {"kv": KVPlace.HOST},
    "KV, a ring of all layers, TriForce, batch": {
        "kv": KVPlace.HOST,
        "draft": TRIFORCE,
        "many": True,
    },
    "KV staged": KV_HOST | {"driver": {"pin": False}},
    "KV, batch": KV_HOST | {"many": True},
    "KV, tree of a model": KV_HOST | {"draft": "model", "draft_tokens": 16},
    "KV of resident layers": KV_HOST | {"resident_layers": 4, "slots": None, "home": HomeKind.AUTO},
    "TriForce": {"draft": TRIFORCE},
    "KV, TriForce, batch": KV_HOST | {"draft": TRIFORCE, "many": True},
}
# On two GPUs everything may be: each has its ring, its streams and its share of KV.
TWO = {"gpus": 2, "device": "cpu,cpu", "resident_layers": 0, "slots": 1}
CASES |= {
    f"two GPUs, {name}": CASES[name] | TWO
    for name in ("pinned", "disk", "Medusa", "KV, tree of a model")
    + ("TriForce", "KV, TriForce, batch")
}


@pytest.fixture(autouse=True)
def flash_of_cuda(monkeypatch):
    """What attends on a GPU, in fp32 too."""
    with flash_of_a_gpu(torch.float32):
        yield
        monkeypatch.undo()  # kinds it put in meanwhile are to go before those that were


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("home", "driver", "dtype"),
    [
        (HomeKind.HOST, {}, "bfloat16"),
        (HomeKind.HOST, {"pin": False}, "float32"),
        (HomeKind.HOST, {"pin": False, "allocates_pinned": True}, "float32"),
        (HomeKind.DISK, {}, "bfloat16"),
    ],
)
def test_same_logits_as_resident(make_tiny, monkeypatch, home, driver, dtype):
    folder = make_tiny(**DEEP)
    open_as(monkeypatch, CpuDevice())  # images that lie alike are computed alike
    with engine_for(folder, dtype=dtype, resident_layers=4, **ROOM) as engine:
        resident = all_logits(engine)
    for module in (files_module, home_module):  # many pieces per tensor
        monkeypatch.setattr(module, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(pinned_module, "STAGING_BYTES", 20_000 + 2 * 4096)
    monkeypatch.setattr(streams_module, "COPY_BYTES", 30_000)
    monkeypatch.setattr(pinned_module, "UPLOAD_BYTES", 8 * 5)  # in parts, too
    open_double(monkeypatch, **driver)
    with engine_for(folder, dtype=dtype, **(STREAMED | {"home": home})) as engine:
        assert torch.equal(all_logits(engine), resident)


@pytest.mark.parametrize(
    ("gpu", "options", "dtype"),
    [
        ({}, {}, "bfloat16"),
        ({}, {"home": HomeKind.DISK}, "float32"),
        ({"maps": False}, {}, "float32"),
        ({"pin": False}, {}, "float32"),
        ({"count": 2}, {"device": "cpu,cpu", "resident_layers": 0, "slots": 1}, "float32"),
    ],
)
def test_an_embedding_in_host_memory_is_read_where_it_lies(
    make_tiny, monkeypatch, caplog, gpu, options, dtype
):
    """Where layers are streamed and the head is another matrix; else it is on the device."""
    folder = make_tiny(tie_word_embeddings=False, dtype="bfloat16", **DEEP)
    open_as(monkeypatch, CpuDevice())
    with engine_for(folder, dtype=dtype, resident_layers=4, **ROOM) as engine:
        expected, whole_bytes = all_logits(engine), engine.device.ledger()[BASE]
        assert not engine.placement.demand.host_base_bytes
        assert engine.device.ledger()[BASE] == engine.placement.base_bytes
    open_double(monkeypatch, **gpu)
    with engine_for(folder, dtype=dtype, **(STREAMED | options)) as engine:
        assert torch.equal(all_logits(engine), expected)
        placement, kept_bytes = engine.placement, engine.device.ledger()[BASE]
    own = open_checkpoint(folder).embedding
    own_bytes = own.nbytes * (2 if dtype == "float32" else 1)
    assert 0 <= placement.demand.host_base_bytes - own_bytes < PAGE_BYTES
    in_host = placement.streamed_bytes if placement.home is HomeKind.HOST else 0
    assert placement.host_bytes == placement.demand.host_base_bytes + in_host
    there = not gpu or "count" in gpu
    assert kept_bytes == (placement.base_bytes if there else whole_bytes)
    assert whole_bytes - placement.base_bytes >= own_bytes - PAGE_BYTES
    assert ("not in host memory as planned" in caplog.text) == (not there)


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "auto")]
)
def test_pieces_and_blocks_make_the_same_image(make_tiny, monkeypatch, stored, dtype):
    monkeypatch.setattr(files_module, "PIECE_BYTES", 20_000)
    checkpoint = open_checkpoint(make_tiny(dtype=stored))
    layout = Network(checkpoint, dtype, Packing.DEVICE).layouts[1]
    files = WeightFiles(checkpoint.files)
    source = FileSource(layout, files)
    by_blocks, by_pieces = allocate_host(layout.nbytes), allocate_host(layout.nbytes)
    for block in source.blocks(by_blocks):
        block.run()
    staging = allocate_host(STAGING_BYTES)
    for piece in reversed(source.pieces()):
        data = piece.load(staging)
        assert data.numel() == piece.image_bytes <= 20_000
        by_pieces.tensor[piece.offset : piece.offset + piece.image_bytes].copy_(data)
    assert by_blocks.tensor.any()
    assert torch.equal(by_blocks.tensor, by_pieces.tensor)
    assert sum(p.nbytes for p in source.pieces()) == source.nbytes
    files.close()


def test_rows_that_cannot_be_pinned_are_read_after_they_were_written(monkeypatch):
    """The host reads them, whatever streams wait for."""
    device = open_double(monkeypatch, pin=False)
    stream, home = device.new_copy_stream(), MemoryHome(allocate_host(3000))
    rows, back = device.allocate(3000, "rows"), device.allocate(3000, "back")
    rows.tensor.copy_(torch.arange(3000))
    stream.store(home, rows.tensor)
    stream.copy(back, home)
    device.compute.wait(stream.record())
    assert torch.equal(back.tensor, rows.tensor)
    stream.close()
    device.close()


def test_memory_is_told_where_pynvml_is_not_installed(make_tiny, monkeypatch):
    monkeypatch.setattr(nvml, "pynvml", None)
    open_double(monkeypatch)
    with engine_for(make_tiny(**DEEP), **STREAMED) as engine:
        memory = engine.memory()
    assert memory.device_driver_bytes is None and memory.device_planned_bytes > 0


# --- the same answers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(make_tiny):
    return make_tiny(**DEEP, **IDS)


@pytest.fixture(scope="module")
def folders(make_tiny, tmp_path_factory):
    heads = write_shared(tmp_path_factory.mktemp("heads"))
    return {"model": f"model:{make_tiny(**IDS)}", "medusa": f"medusa:{heads}"}


@pytest.fixture(scope="module")
def plain(llama):
    """Answers of the CPU's own device, drafted by nobody."""
    answers = {}
    for many, prompts in PROMPTS.items():
        with engine_for(llama, prompts=prompts, tokens=TOKENS) as engine:
            answers[many] = generate(engine, prompts, tokens=TOKENS)
    return answers


def options_of(
    folders, *, draft=None, draft_tokens=None, many=False, driver=None, gpus=1, **config
):
    """Of a case: whether it is a batch, options of the double, and those of `engine_for`."""
    if isinstance(draft, str):
        draft = DraftConfig(draft=folders.get(draft, draft), draft_tokens=draft_tokens)
    return (
        many,
        {"count": gpus} | (driver or {}),
        STREAMED
        | {"prefill_chunk_tokens": 25}
        | config
        | ({} if draft is None else {"draft": draft}),
    )


@pytest.fixture
def answers(llama, folders, monkeypatch):
    """Run a case on the double; gives the answers."""

    def run(**case):
        many, driver, options = options_of(folders, **case)
        open_double(monkeypatch, **driver)
        with engine_for(llama, prompts=PROMPTS[many], tokens=TOKENS, **options) as engine:
            found = generate(engine, PROMPTS[many], tokens=TOKENS)
            assert all(device._driver.received for device in engine.devices) == (
                driver["count"] > 1
            )
            return found

    return run


@pytest.mark.parametrize("case", CASES)
def test_same_answers_as_the_cpu(answers, plain, case):
    assert answers(**CASES[case]) == plain[CASES[case].get("many", False)]


@pytest.mark.parametrize("place", [{}, KV_HOST])
def test_rounded_copies_draft_the_same(make_tiny, monkeypatch, place):
    folder = make_tiny(dtype="bfloat16", vocab_size=320, **DEEP, **IDS)
    rounded = replace(TRIFORCE.retrieval, retrieval_weights=DraftWeights.INT4)
    config = STREAMED | place | {"draft": replace(TRIFORCE, retrieval=rounded)}
    found = []
    for open_it in (lambda: open_as(monkeypatch, CpuDevice()), lambda: open_double(monkeypatch)):
        open_it()
        with engine_for(folder, prompts=[LONG], tokens=TOKENS, **config) as engine:
            assert Int4Linear in {type(m) for m in engine._rounded_copy.network._model.modules()}
            found.append(generate(engine, [LONG], tokens=TOKENS))
    assert found[0] == found[1]


WAITS = [
    ("Ring._await", "pinned"),
    ("Ring._await", "staged"),
    ("Ring._await", "disk"),
    ("Ring._await", "Medusa"),
    ("Ring._await", "KV of resident layers"),
    ("KVSpace.claim", "KV of resident layers"),
    ("KVSpace.claim", "KV, batch"),
    ("Ring._await", "two GPUs, pinned"),
    ("KVSpace.claim", "two GPUs, KV, TriForce, batch"),
]


@pytest.mark.parametrize(("caller", "case"), WAITS)
def test_without_a_wait_of_kernels_answers_differ(answers, plain, monkeypatch, caller, case):
    wait, left_out = CudaComputeStream.wait, []

    def most(self, event):
        if sys._getframe(1).f_code.co_qualname == caller:
            left_out.append(event)
        else:
            wait(self, event)

    monkeypatch.setattr(CudaComputeStream, "wait", most)
    try:
        found = answers(**CASES[case])
    except NumbersError:  # poison: numbers that are none
        found = None
    assert left_out and found != plain[CASES[case].get("many", False)]


# --- experts one by one --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slots", "home", "driver"),
    [
        ("qwen3_moe", 9, HomeKind.HOST, {}),
        ("gpt_oss", 3, HomeKind.HOST, {"pin": False}),
        ("mixtral", 20, HomeKind.DISK, {}),
        ("mixtral", 5, HomeKind.SPLIT, {}),
        ("mxfp4", 5, HomeKind.HOST, {}),
    ],
)
def test_experts_in_slots_have_the_bits_of_all_in_memory(
    make_tiny, tmp_path, monkeypatch, name, slots, home, driver
):
    """Home in pinned memory, the files or both, filled by the copy stream; prompt, then tokens."""
    monkeypatch.setattr(ExpertPool, "fill", lambda self, uses: None)  # bytes here are of tokens
    if name == "mxfp4":
        source = make_mixture(make_tiny, "gpt_oss", intermediate_size=64, **DEEP)
        folder = write_gpt_oss(source, tmp_path).folder
    else:
        folder = make_mixture(make_tiny, name, **DEEP)
    open_as(monkeypatch, CpuDevice())  # images that lie alike are computed alike
    with engine_for(folder, resident_layers=4, **ROOM) as engine:
        resident = all_logits(engine)
        experts = engine.placement.demand.experts
        half = experts.image_bytes // 2
    monkeypatch.setattr(streams_module, "COPY_BYTES", 30_000)
    double = open_double(monkeypatch, **driver)
    limit = half if home is HomeKind.SPLIT else None
    options = ROOM | {"home": home, "host_limit_bytes": limit}
    with engine_for(folder, expert_slots=slots, **options) as engine:
        assert engine.placement.expert_slots == slots
        assert (home is HomeKind.SPLIT) == (engine.placement.expert_share < 1.0)
        loaded_bytes = engine.counters().bytes_copied
        assert torch.equal(all_logits(engine), resident)
        counts = engine.runner.experts.counts
        engine.device.copy.record().synchronize()
        assert counts.misses > 0
        assert (counts.host_bytes > 0) == (home is not HomeKind.DISK)
        assert (counts.file_bytes > 0) == (home is not HomeKind.HOST)
        moved = engine.counters().bytes_copied - loaded_bytes
        assert counts.host_bytes + counts.file_bytes == moved
        placement = engine.placement
        beside_bytes = placement.demand.host_base_bytes  # the embedding
        assert (placement.host_bytes > beside_bytes) == (home is not HomeKind.DISK)
        assert limit is None or engine.placement.host_bytes <= limit
        assert double.ledger()["experts"] <= engine.placement.pool_bytes


def test_a_slot_that_is_not_waited_for_is_seen(make_tiny, monkeypatch):
    folder = make_mixture(make_tiny, **DEEP)
    open_as(monkeypatch, CpuDevice())
    with engine_for(folder, resident_layers=4, **ROOM) as engine:
        resident = all_logits(engine)
    open_double(monkeypatch)
    with engine_for(folder, expert_slots=9, home=HomeKind.HOST, **ROOM) as engine:
        monkeypatch.setattr(CudaComputeStream, "wait", lambda self, event: None)
        assert not torch.equal(all_logits(engine), resident)
