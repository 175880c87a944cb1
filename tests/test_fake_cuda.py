"""The whole engine on a GPU that is not there: devices, event order, host syncs, allocations."""

import itertools
import threading
from itertools import pairwise

import pytest
import torch
from expert_models import make_mixture
from fake_cuda import FakeCuda, FakeEvent, HiddenSyncError, build_for_real, fake_gpu, key
from torch._subclasses.fake_tensor import DataDependentOutputException

from offload_rt.attention import rows as attention
from offload_rt.config import (
    DraftConfig,
    Exact,
    GenerationConfig,
    HomeKind,
    KVPlace,
    RetrievalConfig,
    RuntimeConfig,
    SamplingConfig,
    Wire,
)
from offload_rt.device import opening
from offload_rt.device.base import STAGING_BYTES
from offload_rt.device.cuda import device as cuda
from offload_rt.device.cuda import pinned as pinned_module
from offload_rt.device.cuda import streams
from offload_rt.device.cuda.streams import CudaComputeStream
from offload_rt.engine import Engine, Run, decoding
from offload_rt.engine import engine as engine_module
from offload_rt.errors import CheckpointError, StreamOrderError
from offload_rt.kv import resident
from offload_rt.kv import sizes as kv_sizes
from offload_rt.kv.base import KVShape
from offload_rt.kv.home import RamHome
from offload_rt.model import experts, network, packer
from offload_rt.model import weight_files as files
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats import on_gpu
from offload_rt.model.formats.stored import TOGETHER_ROWS
from offload_rt.model.packed_files import NAMED
from offload_rt.model.weight_files import WeightFiles
from offload_rt.runner import loading
from offload_rt.runner.tree import TokenTree
from offload_rt.speculative.base import Draft
from offload_rt.speculative.ngram.drafter import NgramDrafter
from offload_rt.streaming import memory_home as home_module
from offload_rt.streaming.experts import ExpertPool

PROMPTS = ([7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24])
STEPS = 2
SAMPLED = SamplingConfig(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=1)


@pytest.fixture
def gpu(monkeypatch):
    """The double, behind `open_device`."""
    double = FakeCuda()
    monkeypatch.setattr(cuda, "TorchDriver", lambda: double)
    monkeypatch.setattr(opening, "TorchDriver", lambda: double)
    monkeypatch.setattr(decoding, "make_generator", lambda *_: torch.Generator())
    for module in (engine_module, loading):
        monkeypatch.setattr(module, "Network", build_for_real(module.Network))
    into = WeightFiles._read_into

    def read_into(self, file, run, start, nbytes, staging):
        double.host_write(staging.tensor)
        return into(self, file, run, start, nbytes, staging)

    monkeypatch.setattr(WeightFiles, "_read_into", read_into)
    return double


@pytest.fixture
def tiny(make_tiny):
    return make_tiny()


@pytest.fixture
def three(make_tiny):
    """So that one may stay beside two that are streamed."""
    return make_tiny(num_hidden_layers=3)


KEEPS_ONE = {"resident_layers": 1, "slots": 2}


def generate(gpu, folder, *, sampling=SAMPLED, after_step=lambda engine: None, **config):
    """Prefill two prompts in chunks and make some steps."""
    options = {"device": "cuda:0", "home": HomeKind.HOST, "resident_layers": 0, "slots": 1}
    runtime = RuntimeConfig(prefill_chunk_tokens=8, **(options | config))
    with (
        fake_gpu(gpu),
        Engine(open_checkpoint(folder), runtime, capacities=[20, 20], prompt_tokens=14) as engine,
    ):
        run = Run.start(engine, PROMPTS, sampling, GenerationConfig(max_tokens=STEPS + 1))
        gpu.strict = True
        for advance in [run.prefill, *[run.step] * STEPS]:
            assert [e.token_ids for e in advance()] == [[5], [5]]
            after_step(engine)
        gpu.strict = False
        assert not run.active
        return run.report()


@pytest.mark.parametrize(
    ("family", "home", "device"),
    [
        ("llama", HomeKind.HOST, "cuda:0"),
        ("gemma3_text", HomeKind.HOST, "cuda:0"),
        ("qwen2", HomeKind.DISK, "cuda:0"),
        ("llama", HomeKind.DISK, "cuda:1"),
    ],
)
def test_the_engine_runs_on_a_gpu(gpu, make_tiny, family, home, device):
    folder = make_tiny(family, num_hidden_layers=3)
    report = generate(gpu, folder, home=home, device=device, **KEEPS_ONE)
    assert gpu.device == torch.device(device)
    assert (report.memory.streamed_layers, report.memory.resident_layers) == (2, 1)
    assert gpu.unpinned_copies == 0
    assert report.transfer.stall_s > 0
    assert report.transfer.bytes_total >= STEPS * report.transfer.bytes_per_pass


@pytest.mark.parametrize(("bits", "kernel"), [("12", "coded"), ("10.75", "nested")])
@pytest.mark.parametrize("home", [HomeKind.HOST, HomeKind.DISK])
def test_packed_layers_cross_the_link_as_they_are(
    gpu, make_tiny, tmp_path, monkeypatch, bits, kernel, home
):
    """And are decoded by the kernel of their code, wherever they live."""
    pytest.importorskip("triton")
    folder = make_tiny(num_hidden_layers=3, dtype="bfloat16")
    monkeypatch.setattr(packer, "SMALLEST_WEIGHTS", 512)
    packer.pack(open_checkpoint(folder), tmp_path, lambda nbytes: None, NAMED[bits])
    launched, run = set(), on_gpu.dequantise
    monkeypatch.setattr(
        on_gpu, "dequantise", lambda name, *rest: (launched.add(name), run(name, *rest))
    )
    report = generate(gpu, tmp_path, home=home, wire=Wire.LOSSLESS, **KEEPS_ONE)
    assert launched == {kernel}
    assert gpu.unpinned_copies == 0
    plain_bytes = sum(
        extent.nbytes for layer in open_checkpoint(folder).layers[1:] for extent in layer
    )
    assert report.transfer.bytes_per_pass < plain_bytes


@pytest.mark.parametrize(
    ("family", "home", "layers", "resident", "slots"),
    [
        ("llama", HomeKind.HOST, 5, 0, 2),
        ("gemma3_text", HomeKind.HOST, 4, 1, 1),
        ("qwen2", HomeKind.DISK, 3, 0, 1),
    ],
)
def test_the_engine_runs_on_two_gpus(gpu, make_tiny, family, home, layers, resident, slots):
    """Tensors of two devices never meet, hidden states hop in order, and nobody waits.

    One of the two at least has more layers than slots.
    """
    folder = make_tiny(family, num_hidden_layers=layers)
    counts, placed = [], set()

    def note(engine):
        counts.append((gpu.downloads, gpu.host_syncs[threading.current_thread().name]))
        placed.add(engine.placement.device)
        for device in engine.devices:
            assert device.ledger()["slots"] and device.ledger()["KV cache"]
            assert ("embedding and head" in device.ledger()) == (device.name == "cuda:1")

    names = "cuda:1,cuda:0"
    place = {"home": home, "resident_layers": resident, "slots": slots}
    report = generate(gpu, folder, device=names, after_step=note, **place)
    assert [downloads for downloads, _ in counts] == [1, 2, 3]
    assert len({waits for _, waits in counts}) == 1
    assert report.memory.streamed_layers == layers - resident
    # Hidden states cross borders and come home; rotary tables cross once a pass.
    (device,) = placed
    borders = sum(a != b for a, b in pairwise((0, *device, 0)))
    assert gpu.hops >= borders * (STEPS + 1)
    assert gpu.unpinned_copies == 0


@pytest.mark.parametrize(("tied", "resident"), [(False, 1), (False, 3), (True, 1)])
def test_an_embedding_in_host_memory_adds_no_copy_and_no_wait(gpu, make_tiny, tied, resident):
    """Kernels read it there, so a pass is what it was: one upload, one sync of a step."""
    folder = make_tiny(num_hidden_layers=3, tie_word_embeddings=tied)
    counts = [(0, 0)]
    options = {"slots": 2} if resident < 3 else {"home": HomeKind.AUTO, "slots": None}

    def note(engine):
        counts.append((gpu.uploads, gpu.downloads))
        nbytes = engine.placement.demand.host_base_bytes
        assert (gpu.mapped_bytes, nbytes > 0) == (nbytes, not tied and resident < 3)
        assert engine.device.ledger()["embedding and head"] == engine.placement.base_bytes

    generate(gpu, folder, resident_layers=resident, after_step=note, **options)
    assert [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(counts)] == [(1, 1)] * 3


def test_a_hop_without_its_events_is_found(gpu, tiny, monkeypatch):
    monkeypatch.setattr(CudaComputeStream, "follow", lambda self, event: None)
    with pytest.raises(StreamOrderError, match="hidden state"):
        generate(gpu, tiny, device="cuda:0,cuda:1")


@pytest.mark.parametrize(
    ("slots", "resident", "home"),
    [(1, 1, HomeKind.HOST), (1, 0, HomeKind.DISK), (3, 0, HomeKind.HOST), (3, 0, HomeKind.DISK)],
)
def test_every_access_is_ordered(gpu, three, slots, resident, home):
    """The fewest slots and as many as layers."""
    generate(gpu, three, slots=slots, resident_layers=resident, home=home)


@pytest.mark.parametrize(
    ("home", "sampling"), [(HomeKind.HOST, SAMPLED), (HomeKind.DISK, SamplingConfig())]
)
def test_a_step_syncs_once_uploads_once_and_allocates_nothing(gpu, tiny, home, sampling):
    """Ids, places and wanted rows of both sequences go up together."""
    counts, uploads, ledgers, pinned = [], [0], [], []

    def note(engine):
        counts.append((gpu.downloads, gpu.host_syncs[threading.current_thread().name]))
        uploads.append(gpu.uploads)
        ledgers.append((engine.device.ledger(), len(gpu.buffers)))
        pinned.append(dict(gpu.registered))

    generate(gpu, tiny, home=home, sampling=sampling, after_step=note)
    assert [downloads for downloads, _ in counts] == [1, 2, 3]
    assert len({waits for _, waits in counts}) == 1, "the program waited for an event in a step"
    assert [b - a for a, b in itertools.pairwise(uploads)] == [1, 1, 1]
    assert all(ledger == ledgers[0] for ledger in ledgers)
    assert all(map(pinned[0].__eq__, pinned))
    passages = (STAGING_BYTES, pinned_module.UPLOAD_BYTES)
    images = [nbytes for nbytes in pinned[0].values() if nbytes not in passages]
    assert len(images) == (2 if home is HomeKind.HOST else 0) + 1  # the embedding
    assert not gpu.registered


@pytest.mark.parametrize("home", [HomeKind.HOST, HomeKind.DISK])
@pytest.mark.parametrize("waiting", ["CudaComputeStream", "CudaCopyStream"])
def test_without_either_wait_the_order_breaks(gpu, tiny, monkeypatch, waiting, home):
    def forget(self, event):
        event.enqueued()

    monkeypatch.setattr(getattr(streams, waiting), "wait", forget)
    with pytest.raises(StreamOrderError, match="buffer"):
        generate(gpu, tiny, home=home)


def test_staging_is_not_overwritten_while_copied_from(gpu, make_tiny, monkeypatch):
    folder = make_tiny(num_hidden_layers=5)
    generate(gpu, folder, home=HomeKind.DISK, **KEEPS_ONE)

    def forget(self):
        assert isinstance(self, FakeEvent)

    monkeypatch.setattr(FakeEvent, "synchronize", forget)
    with pytest.raises(StreamOrderError, match="overwritten while being read"):
        generate(gpu, folder, home=HomeKind.DISK, **KEEPS_ONE)


def test_layers_that_cannot_be_pinned_go_through_pinned_staging(gpu, tiny, monkeypatch, caplog):
    gpu.refuse_from = 2**16
    monkeypatch.setattr(home_module, "PIECE_BYTES", 2**14)
    monkeypatch.setattr(files, "PIECE_BYTES", 2**14)
    monkeypatch.setattr(pinned_module, "STAGING_BYTES", 2**15)
    generate(gpu, tiny)
    assert "refused" in caplog.text
    assert gpu.unpinned_copies == 0


def test_a_pin_refused_in_the_middle_is_in_the_report(gpu, tiny, monkeypatch):
    monkeypatch.setattr(cuda, "own_gpu_bytes", lambda: 700 * 2**20)
    whole = generate(gpu, tiny).memory
    passages = whole.host_pinned_bytes - 2 * whole.slot_bytes
    assert (whole.host_unpinned_bytes, whole.pin_refusal) == (0, "")
    assert whole.device_reserved_bytes == whole.device_peak_bytes < whole.device_driver_bytes
    gpu.pinnable_bytes = passages + whole.slot_bytes
    part = generate(gpu, tiny).memory
    assert part.host_pinned_bytes == gpu.pinnable_bytes
    assert (part.host_unpinned_bytes, part.pin_refusal) == (whole.slot_bytes, "out of memory")
    assert gpu.unpinned_copies == 0


def test_everything_works_pageable(gpu, tiny, caplog):
    gpu.refuse_from = 0
    generate(gpu, tiny)
    assert "refused" in caplog.text
    assert gpu.unpinned_copies > 0


def test_a_cache_on_the_host_is_found(gpu, tiny, monkeypatch):
    allocate = cuda.CudaDevice.allocate

    def misplace(self, nbytes, purpose):
        if purpose == "KV cache":
            return cuda.CudaBuffer(torch.empty(nbytes, dtype=torch.uint8))
        return allocate(self, nbytes, purpose)

    monkeypatch.setattr(cuda.CudaDevice, "allocate", misplace)
    with pytest.raises((HiddenSyncError, RuntimeError), match="between host and device|device"):
        generate(gpu, tiny)


@pytest.mark.parametrize("wrong", ["cpu", "cuda:1"])
def test_tokens_on_another_device_are_found(gpu, tiny, monkeypatch, wrong):
    upload = FakeCuda.upload
    monkeypatch.setattr(FakeCuda, "upload", lambda self, values, _: upload(self, values, wrong))
    with pytest.raises((HiddenSyncError, RuntimeError), match="device"):
        generate(gpu, tiny)


def views_and_products():
    """Of a matrix and several, in all forms that are computed at once, and where they are."""
    rows = torch.empty(6, 4, device="cuda:0")
    many = rows.view(2, 3, 4)
    made = [
        *(
            torch.ops.aten.alias(rows),
            rows.detach(),
            rows.expand(3, 6, 4),
            many.flatten(0, 1),
            many[:, 1:, 2],
        ),
        *(many.permute(2, 0, 1), many.permute(2, 0, 1).reshape(4, 6), many.select(1, 2)),
        *(*many.split([1, 2], 1), *rows.split(4), rows[None].squeeze(0), rows.t(), rows[::2]),
        *(
            many.transpose(0, 1),
            rows.unflatten(0, (2, 3)),
            rows.unsqueeze(1),
            rows.view(torch.int16),
        ),
        *(many @ rows.t(), rows @ rows[0], torch.mm(rows, rows.t()), torch.bmm(many, many.mT)),
        torch.nn.functional.linear(many, rows, rows[:, 0]),
    ]
    looks = [(m.shape, m.stride(), m.storage_offset(), m.dtype, m.device) for m in made]
    return looks, [key(m) == key(rows) for m in made]


def test_what_is_computed_at_once_is_what_the_mode_says(gpu, monkeypatch):
    gpu.open(torch.device("cuda:0"))
    with fake_gpu(gpu), torch.inference_mode():
        at_once = views_and_products()
        monkeypatch.setattr("fake_cuda.AT_ONCE", frozenset())
        assert at_once == views_and_products()
    assert {kernel.split(".")[1] for _, kernel, *_ in gpu.trace} >= {
        "linear",
        "matmul",
        "mm",
        "bmm",
    }


def test_a_product_of_two_devices_is_found(gpu):
    for number in range(2):
        gpu.open(torch.device("cuda", number))
    with fake_gpu(gpu), pytest.raises(RuntimeError, match="device"):
        torch.empty(2, 2, device="cuda:0") @ torch.empty(2, 2, device="cuda:1")


def plant(monkeypatch, change):
    """Let the attention function do something more."""
    rows = attention.attend_rows

    def planted(query, key, value, spec, tree=None):
        change(query)
        return rows(query, key, value, spec)

    monkeypatch.setattr(resident, "attend_rows", planted)


@pytest.mark.parametrize(
    "change",
    [
        lambda query: query.sum().item(),
        lambda query: query[0, 0].tolist(),
        lambda query: bool((query > 0).any()),
        lambda query: float(query.max()),
    ],
    ids=["item", "tolist", "bool", "float"],
)
def test_reading_a_value_back_is_found(gpu, tiny, monkeypatch, change):
    plant(monkeypatch, change)
    with pytest.raises((DataDependentOutputException, HiddenSyncError)):
        generate(gpu, tiny)


@pytest.mark.parametrize(
    "change",
    [
        lambda query: torch.tensor([1, 2], device=query.device),
        lambda query: query.cpu(),
        lambda query: query.new_tensor([0.5, 1.0]),
        lambda query: query[:, [0, 0]],
        lambda query: query.to(device="cpu", non_blocking=True),
    ],
    ids=["tensor", "cpu", "new_tensor", "index", "to"],
)
def test_a_copy_past_the_driver_is_found(gpu, tiny, monkeypatch, change):
    plant(monkeypatch, change)
    with pytest.raises(HiddenSyncError):
        generate(gpu, tiny)


def test_a_read_that_fails_reaches_the_program(gpu, tiny, monkeypatch):
    read, calls = WeightFiles._read, []

    def fail_late(self, *arguments):
        calls.append(1)
        if len(calls) > 40:
            raise CheckpointError("the disk is gone")
        return read(self, *arguments)

    monkeypatch.setattr(WeightFiles, "_read", fail_late)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        generate(gpu, tiny, home=HomeKind.DISK)
    assert not gpu.registered


def test_a_failed_pass_leaves_the_engine_usable(gpu, three, monkeypatch):
    rows, calls = attention.attend_rows, []

    def fail_once(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return rows(*arguments)

    monkeypatch.setattr(resident, "attend_rows", fail_once)
    config = RuntimeConfig(device="cuda:0", slots=2, resident_layers=1, prefill_chunk_tokens=8)
    checkpoint = open_checkpoint(three)
    with (
        fake_gpu(gpu),
        Engine(checkpoint, config, capacities=[20, 20], prompt_tokens=14) as engine,
    ):
        for _ in range(2):
            run = Run.start(engine, PROMPTS, SamplingConfig(), GenerationConfig(max_tokens=2))
            try:
                run.prefill()
            except KeyboardInterrupt:
                continue
            run.step()
        assert not run.active


def test_keeping_a_path_of_a_tree_does_not_make_the_host_wait(gpu):
    device = cuda.CudaDevice(0, driver=gpu)
    shape = KVShape(heads=2, key_dim=4, value_dim=4)
    with fake_gpu(gpu):
        cache = resident.ResidentKV(device, [shape], torch.float32, capacity=8)
        rows = torch.empty(2, 5, 4, device="cuda:0")
        gpu.strict = True
        cache.append(0, rows, rows)
        cache.commit([0, 2, 4])
    assert cache.length == 3
    device.close()


@pytest.mark.parametrize(
    ("device", "drawn", "sampling", "exact"),
    [
        ("cuda:0", False, SAMPLED, Exact.ON),
        ("cuda:0", False, SAMPLED, Exact.OFF),
        ("cuda:0", True, SAMPLED, Exact.OFF),
        ("cuda:0", True, SamplingConfig(), Exact.OFF),
        ("cuda:0,cuda:1", False, SamplingConfig(), Exact.ON),
        ("cuda:0,cuda:1", True, SAMPLED, Exact.OFF),
    ],
)
def test_a_tree_is_checked_with_one_host_sync_a_step(
    gpu, make_tiny, monkeypatch, device, drawn, sampling, exact
):
    """Tree masks, positions and the verifier's numbers all go up and come down in order."""
    folder = make_tiny("gemma3_text", num_hidden_layers=3 if "," in device else 2)
    tree = TokenTree((11, 12, 13, 14), (-1, -1, 0, 2))

    def propose(self, ids, max_depth, max_nodes=None):
        probs = torch.full((4, 300), 1 / 300, device="cuda:0") if drawn else None
        return Draft(tree, probs)

    monkeypatch.setattr(NgramDrafter, "propose", propose)
    monkeypatch.setattr(network, "places_problem", lambda *_: "")  # fake numbers cannot be compared
    runtime = RuntimeConfig(
        device=device,
        home=HomeKind.HOST,
        resident_layers=0,
        slots=1,
        prefill_chunk_tokens=8,
        exact=exact,
        kv=KVPlace.DEVICE,
    )
    draft, checkpoint = DraftConfig(draft="ngram", draft_tokens=4), open_checkpoint(folder)
    with (
        fake_gpu(gpu),
        Engine(checkpoint, runtime, capacities=[40, 40], prompt_tokens=14, draft=draft) as engine,
    ):
        run = Run.start(engine, PROMPTS, sampling, GenerationConfig(max_tokens=20))
        gpu.strict = True
        run.prefill()
        for step in range(1, 3):
            before = gpu.uploads
            gained = [emitted.token_ids for emitted in run.step()]
            stood = [11, 13, 14] if drawn and not sampling.greedy else []
            assert gained == [[*stood, 5]] * 2
            assert gpu.downloads == 1 + step
            # A tree goes up with the ids; drawn verdicts have lists of their own to send.
            assert not sampling.greedy or gpu.uploads == before + 1
        gpu.strict = False


@pytest.mark.parametrize(
    ("device", "sampling", "kv"),
    [
        ("cuda:0", SAMPLED, KVPlace.DEVICE),
        ("cuda:0", SamplingConfig(), KVPlace.HOST),
        ("cuda:0,cuda:1", SAMPLED, KVPlace.HOST),
        ("cuda:1,cuda:0", SamplingConfig(), KVPlace.DEVICE),
    ],
)
def test_triforce_downloads_once_a_pass_and_builds_without_waiting(
    gpu, make_tiny, monkeypatch, device, sampling, kv
):
    """Choosing chunks, following the full cache and both levels' verdicts stay on the device."""
    # A part of host memory is to be real, with an address, and known as part of the whole.
    monkeypatch.setattr(RamHome, "_part", build_for_real(RamHome._part))
    monkeypatch.setattr(kv_sizes, "PAGE_BYTES", 64)
    folder = make_tiny("llama", num_hidden_layers=3 if "," in device else 2)
    runtime = RuntimeConfig(
        device=device,
        home=HomeKind.HOST,
        resident_layers=0,
        slots=1,
        prefill_chunk_tokens=24,
        kv=kv,
        kv_block_tokens=16 if kv is KVPlace.HOST else None,
    )
    retrieval = RetrievalConfig(budget_tokens=12, chunk_tokens=3, rebuild_tokens=2)
    draft = DraftConfig(draft="triforce", draft_tokens=3, inner_tokens=2, retrieval=retrieval)
    prompts = [[(7 * i) % 290 for i in range(40)], [3, 4, 5]]
    checkpoint = open_checkpoint(folder)
    with (
        fake_gpu(gpu),
        Engine(checkpoint, runtime, capacities=[70, 30], prompt_tokens=43, draft=draft) as engine,
    ):
        run = Run.start(engine, prompts, sampling, GenerationConfig(max_tokens=20))
        gpu.strict = True
        run.prefill()
        for step in range(1, 3):
            run.step()
            inner = sum(s.retrieval.passes for s in run.sequences)
            assert inner >= 2 * step and gpu.downloads == 1 + step + inner
        assert run.sequences[0].retrieval.builds > 1
        assert bool(gpu.hops) == ("," in device)
        gpu.strict = False


# --- experts one by one --------------------------------------------------------------------------


@pytest.fixture
def experts_of(gpu, make_tiny, monkeypatch):
    """Run a mixture whose rows go to ever other experts; downloads by then, and the report."""
    turn, places = itertools.count(3), experts._places

    def sent_on(sent, count):
        return places([next(turn) * 5 % count for _ in sent], count)

    # Fake tensors are of one thread.
    monkeypatch.setattr(ExpertPool, "fill", lambda pool, uses: None)
    monkeypatch.setattr(experts, "_places", sent_on)
    monkeypatch.setattr(network, "experts_of", build_for_real(network.experts_of))

    def run(**config):
        downloads = []
        whole = {"resident_layers": None, "slots": None, "expert_slots": 7}
        report = generate(
            gpu,
            make_mixture(make_tiny, num_hidden_layers=2),
            after_step=lambda engine: downloads.append(gpu.downloads),
            **(whole | config),
        )
        return downloads, report

    return run


@pytest.mark.parametrize("home", [HomeKind.HOST, HomeKind.DISK])
def test_the_host_learns_of_experts_once_a_layer(gpu, experts_of, home):
    downloads, report = experts_of(home=home)
    assert report.experts.misses > 0 and report.memory.streamed_layers == 0
    assert downloads[2] - downloads[1] == 1 + 2  # its tokens, and one for each layer
    assert gpu.unpinned_copies == 0 and report.transfer.stall_s > 0


@pytest.fixture
def of_experts(gpu, make_tiny, monkeypatch):
    """What the experts of each layer of a pass are: those used, kernels, uploads and syncs."""
    made, used, computed, places = [], [], experts._computed, experts._places

    def sent_on(sent, count):
        found = places([place * 5 % count for place in range(len(sent))], count)
        used.append(len(found))
        return found

    def now():
        kernels = sum(at[0] == "kernel" for at in gpu.trace)
        return kernels, gpu.uploads, gpu.downloads, gpu.host_syncs[threading.current_thread().name]

    def watched(*given):
        before = now()
        result = computed(*given)
        made.append((used[-1], *(b - a for a, b in zip(before, now(), strict=True))))
        return result

    monkeypatch.setattr(ExpertPool, "fill", lambda pool, uses: None)
    monkeypatch.setattr(experts, "_places", sent_on)
    monkeypatch.setattr(experts, "_computed", watched)
    monkeypatch.setattr(network, "experts_of", build_for_real(network.experts_of))

    def run(rows, **config):
        folder = make_mixture(make_tiny, num_hidden_layers=LAYERS, **config)
        runtime = RuntimeConfig(device="cuda:0", home=HomeKind.HOST, expert_slots=12)
        made.clear()
        with (
            fake_gpu(gpu),
            Engine(
                open_checkpoint(folder), runtime, capacities=[rows], prompt_tokens=rows
            ) as engine,
        ):
            gpu.strict = True
            engine.forward([(0, [7] * rows)], reuse=False)
            gpu.strict = False
        assert len(made) == LAYERS
        return made[-1]

    return run


LAYERS = 2
# An expert's rows are gathered, multiplied with two halves and put together, gated by two kernels,
# multiplied again and put into their places. Of few rows those that come together are two products.
OF_EXPERT, OF_LAYER, OF_TOGETHER, COME_TOGETHER = 8, 4, 5, 6


@pytest.mark.parametrize(
    ("rows", "count"), [(1, 8), (8, 8), (TOGETHER_ROWS, 32), (TOGETHER_ROWS + 1, 32), (512, 8)]
)
def test_experts_launch_by_how_many_are_used_and_wait_once_a_layer(of_experts, rows, count):
    used, kernels, uploads, downloads, waits = of_experts(rows, num_experts=count)
    assert used == min(2 * rows, count)
    turns = -(-used // COME_TOGETHER) if rows <= TOGETHER_ROWS else 1
    launched = OF_LAYER + OF_EXPERT * used
    if rows <= TOGETHER_ROWS:
        launched = OF_LAYER - 1 + OF_TOGETHER * turns
    assert (kernels, uploads) == (launched, turns)
    assert (downloads, waits) == (1, 0)


@pytest.mark.parametrize(
    "waiting", [streams.CudaCopyStream, CudaComputeStream], ids=["drained", "filled"]
)
def test_slots_of_experts_need_both_waits(experts_of, monkeypatch, waiting):
    monkeypatch.setattr(waiting, "wait", lambda _, event: event.enqueued())
    with pytest.raises(StreamOrderError, match="buffer"):
        experts_of()
