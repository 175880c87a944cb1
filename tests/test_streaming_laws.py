"""Laws 1 and 6: streaming changes no bit, moves each byte once, and keeps to the plan."""

import gc
import itertools
import os
import random
import threading
import time
import weakref
from contextlib import closing

import pytest
import torch
from engines import NO_DRAFT, PROMPT, all_logits, engine_for, generate

from offload_rt.config import (
    DraftConfig,
    DraftWeights,
    GenerationConfig,
    HomeKind,
    RetrievalConfig,
    SamplingConfig,
)
from offload_rt.device import cpu as cpu_module
from offload_rt.device.base import PAGE_BYTES, CopyBlock
from offload_rt.engine import Run
from offload_rt.errors import CapacityError, CheckpointError, ConfigError, PlanError
from offload_rt.model import weight_files as files_module
from offload_rt.model.formats.packed import PackedLinear, can_pack
from offload_rt.runner.loading import BASE

MANY = 6


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny("llama", num_hidden_layers=MANY, dtype="bfloat16")


@pytest.fixture(scope="module")
def resident_logits(model):
    with engine_for(model) as engine:
        assert not engine.placement.streamed
        return all_logits(engine)


# Layers that stay, and slots.
KEPT = [*itertools.product([0, 1], [1, 2, 3]), (3, 3), (4, 2), (5, 1)]


@pytest.mark.parametrize(
    ("home", "resident", "slots"),
    [
        *((HomeKind.DISK, *kept) for kept in KEPT),
        *((HomeKind.HOST, *kept) for kept in [(0, 1), (1, 2), (3, 3), (4, 2)]),
    ],
)
def test_streamed_equals_resident_bit_for_bit(model, resident_logits, resident, slots, home):
    with engine_for(model, resident_layers=resident, slots=slots, home=home) as engine:
        assert len(engine.placement.resident) == resident
        assert torch.equal(all_logits(engine), resident_logits)


def test_order_of_completion_changes_nothing(model, resident_logits, monkeypatch):
    """Small blocks that finish in any order, short reads among them."""
    dice, lock = random.Random(5), threading.Lock()

    def preadv(fd, buffers, offset):
        with lock:
            delay, share = dice.random() * 2e-3, dice.randint(1, 4)
        time.sleep(delay)
        size = len(buffers[0])
        part = size if size < 2 * 4096 else max(4096, size // share // 4096 * 4096)
        return os.preadv(fd, [buffers[0][:part]], offset)

    monkeypatch.setattr(files_module, "PIECE_BYTES", 16384)
    monkeypatch.setitem(files_module.WeightFiles.__init__.__kwdefaults__, "preadv", preadv)
    with engine_for(model, resident_layers=2, slots=2, readers=5) as engine:
        assert torch.equal(all_logits(engine), resident_logits)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_conversion_on_the_way_is_a_plain_cast(model, monkeypatch, direct, dtype):
    monkeypatch.setitem(files_module.WeightFiles.__init__.__kwdefaults__, "direct", direct)
    with engine_for(model, dtype=dtype) as engine:
        expected = all_logits(engine)
    with engine_for(model, dtype=dtype, resident_layers=3, slots=2) as engine:
        assert engine._files.direct is direct
        assert torch.equal(all_logits(engine), expected)


def test_chunks_of_the_prompt_change_nothing_but_rounding(model):
    with engine_for(model, dtype="float32", resident_layers=0, prefill_chunk_tokens=99) as engine:
        whole = all_logits(engine)
    for chunk in (1, 2, 7, 16):
        config = {"dtype": "float32", "resident_layers": 0, "prefill_chunk_tokens": chunk}
        with engine_for(model, **config) as engine:
            assert torch.allclose(all_logits(engine), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt_tokens", [1, 40, 300])
def test_a_prompt_moves_each_streamed_byte_once(model, prompt_tokens):
    prompt = [(i * 7) % 250 for i in range(prompt_tokens)]
    with engine_for(model, prompts=[prompt], resident_layers=1, slots=2) as engine:
        engine.device.copy.record().synchronize()
        layer_bytes = engine.bytes_per_pass // len(engine.placement.streamed)
        ring_full = engine.counters().bytes_copied
        engine.forward([(0, prompt)], reuse=True)
        engine.device.copy.record().synchronize()
        moved = engine.counters().bytes_copied - ring_full
        assert moved == engine.bytes_per_pass == 5 * layer_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_of_an_embedding_that_is_no_head_are_read_of_its_file(make_tiny, dtype):
    """Where layers are; its place on the device is left to them."""
    folder = make_tiny("llama", tie_word_embeddings=False, dtype="bfloat16", num_hidden_layers=4)
    with engine_for(folder, dtype=dtype) as engine:
        expected, answer = all_logits(engine), generate(engine)
        whole_bytes = engine.placement.demand.base_bytes
        assert not engine.placement.demand.rows_apart
    selves = DraftConfig(draft="self:int4", draft_tokens=3)
    for draft in (NO_DRAFT, selves) if dtype == "float32" else (NO_DRAFT,):
        with engine_for(folder, dtype=dtype, resident_layers=1, slots=2, draft=draft) as engine:
            assert torch.equal(all_logits(engine), expected)
            engine.truncate(0, 0)
            assert generate(engine) == answer
            placement = engine.placement
            assert engine.device.ledger()[BASE] == placement.base_bytes
            memory = engine.memory()
            assert memory.device_peak_bytes <= memory.device_planned_bytes
            own = engine.checkpoint.tensors["model.embed_tokens.weight"]
    width = 2 if dtype == "float32" else 1
    assert 0 <= placement.demand.file_base_bytes - width * own.nbytes < 2 * PAGE_BYTES
    pages = 4 * PAGE_BYTES  # that norm and head begin and end in, apart and together
    assert abs(whole_bytes - placement.base_bytes - width * own.nbytes) < pages
    with engine_for(folder, dtype=dtype, resident_layers=1, home=HomeKind.HOST) as engine:
        assert not engine.placement.demand.rows_apart  # nothing of it stays in files


def test_an_interrupted_pass_leaves_no_trace(model, resident_logits):
    with engine_for(model, resident_layers=3, slots=2) as engine:
        layer = engine.network._layers[4]
        forward = layer.forward
        layer.forward = lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.forward([(0, PROMPT)], reuse=True)
        layer.forward = forward
        assert torch.equal(all_logits(engine), resident_logits)


def test_rows_a_cache_already_has_are_reused_and_nothing_else(make_tiny):
    """Prompts that share a beginning, with an interrupted one between, against fresh engines."""
    prompts = [PROMPT, PROMPT[:9] + PROMPT[3:7], PROMPT[:4], PROMPT[::-1], PROMPT]
    model, fresh = make_tiny("llama", num_hidden_layers=MANY), []
    for prompt in prompts:
        with engine_for(model) as engine:
            fresh.append(engine.forward([(0, prompt)], reuse=True))
    with engine_for(model, resident_layers=3, slots=2, prefill_chunk_tokens=9) as engine:
        for turn, (prompt, expected) in enumerate(zip(prompts, fresh, strict=True)):
            got = engine.forward([(0, prompt)], reuse=True)
            assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)  # other chunks
            engine.network.poll = interrupt_after(turn)
            with pytest.raises(KeyboardInterrupt):
                engine.forward([(0, PROMPT[:12][::-1])], reuse=True)
            engine.network.poll = lambda: None


def interrupt_after(calls):
    left = iter(range(calls + 1))

    def poll():
        if next(left, None) is None:
            raise KeyboardInterrupt

    return poll


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"slots": 3, "resident_layers": 4}, "--slots is 3, but 2 layers are streamed"),
        ({"slots": 3}, "--slots is 3, but 0 layers are streamed"),
        ({"home": HomeKind.HOST}, "--home has no effect, all layers fit"),
    ],
)
def test_options_that_would_do_nothing_are_errors(model, config, message):
    with pytest.raises(ConfigError, match=message), engine_for(model, **config):
        pass


def test_more_memory_than_is_free_is_not_promised(model, monkeypatch):
    monkeypatch.setattr("offload_rt.device.cpu.free_memory_bytes", lambda: 50 * 2**20)
    config = {"device_limit_bytes": 900 * 2**30}
    with pytest.raises(PlanError, match="50.0 MiB are free"), engine_for(model, **config):
        pass


def test_a_read_error_ends_the_run_with_a_sentence(model, monkeypatch):
    reads = []

    def preadv(fd, buffers, offset):
        reads.append(offset)
        if len(reads) > 30:
            raise OSError(5, "Input/output error")
        return os.preadv(fd, buffers, offset)

    monkeypatch.setitem(files_module.WeightFiles.__init__.__kwdefaults__, "preadv", preadv)
    config = {"resident_layers": 0, "slots": 2}
    with (
        engine_for(model, **config) as engine,
        pytest.raises(CheckpointError, match="Input/output error; check the disk"),
    ):
        generate(engine)


def test_weights_are_gone_outside_the_loan(model):
    with engine_for(model, resident_layers=0) as engine:
        all_logits(engine)
        assert all(p.is_meta for p in engine.network._layers[0].parameters())


def test_the_ledger_is_the_plan(model):
    limit = 100 * 2**20
    with engine_for(model, resident_layers=3, slots=2, device_limit_bytes=limit) as engine:
        generate(engine)
        placement, ledger = engine.placement, engine.device.ledger()
        assert ledger == {
            "embedding and head": placement.demand.base_bytes,
            "resident layers": placement.resident_bytes,
            "slots": placement.slots * placement.slot_bytes,
            "KV cache": placement.demand.kv_bytes,
        }
        assert engine.memory().device_peak_bytes <= placement.device_bytes <= limit


def test_a_head_is_reordered_where_all_layers_leave_memory_for_it(model, resident_logits):
    if not can_pack(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this CPU has no bf16 instructions")
    with engine_for(model) as engine:
        placement, ledger = engine.placement, engine.device.ledger()
        head = engine.network._model.get_output_embeddings()
    assert isinstance(head, PackedLinear) and placement.packs_head
    assert ledger["embedding and head"] == placement.base_bytes > placement.demand.base_bytes
    with engine_for(model, device_limit_bytes=placement.device_bytes - 1) as engine:
        assert not engine.placement.streamed and not engine.placement.packs_head
        assert type(engine.network._model.get_output_embeddings()) is torch.nn.Linear
        assert torch.equal(all_logits(engine), resident_logits)


LARGE = {"dtype": "bfloat16", "large": True}


def test_a_home_in_host_memory_is_not_counted_as_the_devices(make_tiny):
    folder = make_tiny(
        "llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=6, **LARGE
    )
    with engine_for(folder, resident_layers=0, slots=2, home=HomeKind.HOST) as engine:
        generate(engine, tokens=4)
        memory = engine.memory()
        home_bytes = sum(engine.placement.demand.layer_bytes)
        assert memory.device_peak_bytes <= memory.device_planned_bytes < 64 * 2**20 + home_bytes


def test_peak_memory_falls_with_the_number_of_resident_layers(make_tiny):
    folder = make_tiny(
        "llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=6, **LARGE
    )
    peaks = []
    for resident, slots in ((6, None), (3, 2), (0, 2)):
        with engine_for(folder, resident_layers=resident, slots=slots) as engine:
            generate(engine, tokens=4)
            peaks.append(engine.memory().device_peak_bytes)
            assert peaks[-1] <= engine.placement.device_bytes
    assert peaks[0] > peaks[1] > peaks[2]


def test_the_limit_named_by_a_refusal_works(model):
    refusal = pytest.raises(PlanError, match=r"--device-memory (\d+)MiB")
    with refusal as caught, engine_for(model, device_limit_bytes=1 * 2**20):
        pass
    named = int(str(caught.value).split("--device-memory ")[1].split("MiB")[0]) * 2**20
    with engine_for(model, device_limit_bytes=named) as engine:
        generate(engine)
    with pytest.raises(PlanError), engine_for(model, device_limit_bytes=named - 2**20):
        pass


def test_a_prompt_longer_than_the_cache_is_refused_with_both_numbers(model):
    refusal = pytest.raises(CapacityError, match="the prompt has 9 tokens.* 7 ")
    with engine_for(model, prompts=[[1] * 4], tokens=3) as engine, refusal:
        Run.start(engine, [[1] * 9], SamplingConfig(), GenerationConfig())


WIDE = {"head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 256}
EXPERTS = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16, "head_dim": 64}
LONG = {"max_position_embeddings": 20000, "num_hidden_layers": 2, **LARGE}
TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512}


@pytest.mark.parametrize(
    ("family", "model_config", "rows", "options"),
    [
        ("gemma2", WIDE | TYPES, 2000, {}),
        ("mistral", {"sliding_window": 700}, 12000, {}),
        ("mixtral", EXPERTS, 480, {}),
        ("llama", {"hidden_size": 512}, 300, {"dtype": "float32", "readers": 32}),
    ],
)
def test_peak_memory_keeps_the_smallest_limit_that_is_named(
    make_tiny, family, model_config, rows, options
):
    """The cases a plan forgets first: soft caps, windows, experts, conversion by many readers.

    The least of three peaks counts: the process's own memory is in it, and twice in six runs of all
    tests one peak in a process used for long was above by 2 and 8 %, never by itself.
    """
    folder = make_tiny(family, **(LONG | model_config))
    prompts = [[3 + i * 7 % 250 for i in range(rows)]]
    options = {"prompts": prompts, "tokens": 3, "prefill_chunk_tokens": 512, **options}
    with pytest.raises(PlanError) as refusal, engine_for(folder, device_limit_bytes=1, **options):
        pass
    limit = -(-refusal.value.needed_bytes // 2**20) * 2**20
    peaks = []
    while not peaks or (peaks[-1] > limit and len(peaks) < 3):
        with engine_for(folder, device_limit_bytes=limit, **options) as engine:
            generate(engine, prompts, tokens=3)
            peaks.append(engine.memory().device_peak_bytes)
    assert min(peaks) <= limit, peaks


def test_a_copy_that_is_done_holds_on_to_nothing():
    """Nor do the threads that made it while they wait for another: it may be a layer."""

    class Image:
        """What a copy goes to."""

        def read(self):
            """Nothing to do."""

    class Source:
        nbytes = 3

        def blocks(self, dst):
            return [CopyBlock(1, image.read) for image in dst]

        def check(self):
            """It has not changed."""

    images = [Image() for _ in range(3)]
    held = [weakref.ref(image) for image in images]
    with closing(cpu_module.CpuDevice(readers=3)) as device:
        device.load.copy(images, Source())
        device.load.record().synchronize()
        del images
        end = time.monotonic() + 5
        while any(there() is not None for there in held) and time.monotonic() < end:
            time.sleep(0.01)  # a thread may have a few instructions left
        assert [there() for there in held] == [None] * 3


@pytest.mark.parametrize("draft", ["none", "model:{}", "triforce", "triforce:{}", "copies"])
def test_a_closed_engine_gives_its_memory_back_at_once(model, draft, monkeypatch):
    """Without waiting until Python looks for cycles."""
    held = []
    allocate = cpu_module.CpuDevice.allocate

    def watched(device, nbytes, purpose):
        buffer = allocate(device, nbytes, purpose)
        held.append((purpose, weakref.ref(buffer.tensor)))
        return buffer

    monkeypatch.setattr(cpu_module.CpuDevice, "allocate", watched)
    if draft == "copies":
        kept = RetrievalConfig(retrieval_weights=DraftWeights.INT8)
        config = DraftConfig(draft="triforce", retrieval=kept)
    else:
        config = DraftConfig(draft=draft.format(model))
    gc.collect()
    gc.disable()
    try:
        with engine_for(model, resident_layers=4, slots=2, draft=config) as engine:
            generate(engine, tokens=4)
            layers = engine.network._layers  # packed weights are theirs, not a buffer's
            held += [("modules", weakref.ref(part)) for layer in layers for part in layer.modules()]
        del engine, layers
        assert [purpose for purpose, there in held if there() is not None] == []
    finally:
        gc.enable()
    assert {"modules", "slots", "embedding and head"} <= {purpose for purpose, _ in held}
