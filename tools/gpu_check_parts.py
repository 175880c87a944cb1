"""The parts of `gpu_check.py`: what is checked and measured on the device."""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from gpu_check import ROOT, tell
from gpu_check_models import Made, write_model

from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec
from offload_rt.config import (
    DraftConfig,
    DraftShape,
    DraftWeights,
    Exact,
    GenerationConfig,
    HomeKind,
    KVPlace,
    RetrievalConfig,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.costs.sizes import ahead_bytes
from offload_rt.device.base import Device, Stream
from offload_rt.device.opening import open_device
from offload_rt.engine import NO_DRAFT, Engine, Run
from offload_rt.errors import OffloadError
from offload_rt.kv.base import KVShape, RowWatcher
from offload_rt.kv.home import RamHome
from offload_rt.kv.offloaded import KVSpace, OffloadedKV
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.retrieval import RetrievalKV
from offload_rt.kv.sizes import KVSizes, RetrievalSizes
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats.rounded import Int4Linear
from offload_rt.profiling.effort import Effort
from offload_rt.report import RunReport
from offload_rt.runner.loading import load_drafting
from offload_rt.runner.runner import Rows, Runner
from offload_rt.runner.static import EAGER_FIRST
from offload_rt.runner.tree import TokenTree
from offload_rt.sampling import likeliest

MIB, GIB = 2**20, 2**30
CHAIN = 4  # tokens of a greedy draft
EMPTY: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large everything is.

    Attributes:
        law: the model of the laws.
        long: the model with a long context.
        prompt: tokens of its prompt.
        budgets: of its retrieval cache.
        streamed: layers of a 70B model.
        drafted: a streamed model of which a draft model has the first layers.
        answer: tokens that it and the model of the laws say.
        rows: of a streamed pass.
        small: layers, hidden size, intermediate size of models whose passes launches bound.
        blocks: bytes of copies that are timed.
        large: bytes of a copy that an upload waits behind.
        kv: heads, head size, rows, layers of the offloaded cache that is read.
        kv_blocks: rows of its blocks.
        limit: device memory.
    """

    law: Made
    long: Made
    prompt: int
    budgets: tuple[int, ...]
    streamed: Made
    drafted: Made
    answer: int
    rows: tuple[int, ...]
    small: tuple[tuple[int, int, int], ...]
    blocks: tuple[int, ...]
    large: int
    kv: tuple[int, int, int, int]
    kv_blocks: tuple[int, ...]
    limit: int


TINY = Sizes(
    law=Made(layers=3, late=0.3, positions=512),
    long=Made(looks_back=True, late=0.3, positions=1024),
    prompt=160,
    budgets=(32, 64),
    streamed=Made(layers=3),
    drafted=Made(),
    answer=16,
    rows=(1, 8),
    small=((2, 64, 128),),
    blocks=(2**16, 2**20),
    large=2**22,
    kv=(2, 16, 400, 2),
    kv_blocks=(64, 128),
    limit=2 * GIB,
)
# Its numbers scatter more than those of `offload-run profile`, in a third of the time.
QUICK = Effort(most_samples=3, scattered_samples=3, number_s=0.2, again_s=0.5, disk_depths=(8,))
SMALL = Effort(  # of a profile whose parts are tried, not its numbers
    least_samples=2,
    most_samples=2,
    scattered_samples=2,
    number_s=0.0,
    again_s=0.0,
    disk_depths=(1, 2),
    disk_file_bytes=4 * MIB,
    disk_sample_bytes=MIB,
    memory_bytes=MIB,
    pin_bytes=MIB,
    shapes=((64, 128, 4, 2, 16),),
    cold_bytes=MIB,
    compute_sample_s=0.0,
    tokens=(1, 4),
    packed_tokens=(1, 2),
    heads=((64, 128),),
    head_rows=(1, 4),
    beside_disk=(0, 1),
    beside_tokens=(1, 4),
    beside_read_bytes=MIB,
    beside_sample_s=0.0,
    kv_bytes=2**16,
    query_tokens=(1,),
)
FULL = Sizes(
    law=Made(hidden=1024, layers=6, intermediate=3072, heads=8, kv_heads=4, vocab=4096, late=0.3),
    long=Made(
        hidden=1024,
        layers=8,
        intermediate=2816,
        heads=8,
        kv_heads=8,
        vocab=8192,
        positions=40_000,
        dtype="bfloat16",
        late=0.2,
        first=4,
        looks_back=True,
    ),
    prompt=32_000,
    budgets=(256, 1024, 4096),
    streamed=Made(
        hidden=8192,
        layers=8,
        intermediate=28_672,
        heads=64,
        kv_heads=8,
        vocab=32_000,
        dtype="bfloat16",
    ),
    drafted=Made(
        hidden=2048,
        layers=12,
        intermediate=5632,
        heads=16,
        kv_heads=4,
        vocab=32_000,
        dtype="bfloat16",
    ),
    answer=48,
    rows=(1, 64, 256, 1024),
    small=((2, 768, 3072), (24, 896, 4864), (16, 2048, 8192), (22, 2048, 5632)),
    blocks=(MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB),
    large=1700 * MIB,
    kv=(32, 128, 65_536, 8),
    kv_blocks=(512, 2048, 4096),
    limit=12 * GIB,
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What a part is given.

    Attributes:
        device: as --device names it.
        folder: for models; in memory where there is room.
    """

    part: str
    device: str
    out: Path
    folder: Path

    @property
    def sizes(self) -> Sizes:
        """Of this device."""
        return TINY if self.device == "cpu" else FULL

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device != "cpu"

    def fact(self, name: str, **values: object) -> None:
        """Write a fact."""
        tell(self.out, self.part, name, **values)

    def law(self, name: str, check: Callable[[], bool | str]) -> None:
        """Write whether a law held; one that raises did not."""
        try:
            found = check()
        except Exception as error:  # noqa: BLE001 - a fact, and the next law is checked
            found = f"{type(error).__name__}: {error}"
        self.fact(name, held=found is True, why="" if found is True else found or "not equal")

    def made(self, name: str, made: Made, layers: int | None = None) -> Path:
        """A model's folder, written once."""
        folder = self.folder / name
        if not folder.exists():
            write_model(folder, made, self.device, layers)
        return folder


def run(part: str, device: str, out: Path) -> None:
    """Run a part with a folder of its own, which is gone afterwards."""
    shared = Path("/dev/shm")
    room = shared.is_dir() and shutil.disk_usage(shared).free > 24 * GIB
    where = shared if room and device != "cpu" else None
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=where) as folder:
        PARTS[part](Bench(part, device, out, Path(folder)))


# --- what parts share ----------------------------------------------------------------------------


@contextmanager
def engine_of(
    bench: Bench, folder: Path, prompt: Sequence[int], tokens: int, how: Mapping[str, Any] = EMPTY
) -> Iterator[Engine]:
    """An engine on the device; `how` is of `RuntimeConfig`, but for `draft` and `means`.

    Bits are compared with those of all resident, for which `--exact auto` is off.
    """
    options = {"device": bench.device, "device_limit_bytes": bench.sizes.limit, **how}
    defaults: dict[str, Any] = {"prefill_chunk_tokens": 512, "exact": Exact.OFF}
    draft, means = options.pop("draft", NO_DRAFT), options.pop("means", None)
    with Engine(
        open_checkpoint(folder),
        RuntimeConfig(**(defaults | options)),
        capacities=[len(prompt) + tokens],
        prompt_tokens=len(prompt),
        draft=draft,
        means=means,
    ) as engine:
        yield engine


def finished(engine: Engine, prompt: Sequence[int], tokens: int) -> Run:
    """A greedy answer of a fixed length."""
    run = Run.start(engine, [prompt], SamplingConfig(), GenerationConfig(max_tokens=tokens))
    run.prefill()
    while run.active:
        run.step()
    return run


def text_of(length: int, vocab: int, seed: int = 1) -> list[int]:
    """Random ids, some of which come again and again."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (length,), generator=generator)
    rare = torch.randint(3, vocab, (max(8, length // 64),), generator=generator)
    again = torch.rand(length, generator=generator) < 0.05
    chosen = rare[torch.randint(0, len(rare), (length,), generator=generator)]
    return torch.where(again, chosen, ids).tolist()


def timed(work: Callable[[], object], wait: Callable[[], None]) -> tuple[float, float]:
    """Seconds until the host is free, and until the device is."""
    began = time.perf_counter()
    work()
    free = time.perf_counter()
    wait()
    return free - began, time.perf_counter() - began


def median_of(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Medians of both."""
    return statistics.median(s[0] for s in samples), statistics.median(s[1] for s in samples)


def wait_for(queue: Stream) -> None:
    """Until all that is enqueued is done."""
    queue.record().synchronize()


@contextmanager
def opened(bench: Bench) -> Iterator[Device]:
    """The device, without a model."""
    device = open_device(RuntimeConfig(device=bench.device))
    try:
        yield device
    finally:
        device.close()


# --- parts ---------------------------------------------------------------------------------------


def machine(bench: Bench) -> None:
    """What it is."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    bench.fact("host", cores=os.cpu_count(), memory=psutil.virtual_memory().total, memlock=soft)
    bench.fact("torch", version=torch.__version__, cuda=torch.version.cuda)
    if not bench.on_gpu:
        return
    from offload_rt.device.cuda.nvml import find_driver

    began = time.perf_counter()
    torch.ones(1, device=bench.device)
    context_s = time.perf_counter() - began
    free, total = torch.cuda.mem_get_info(bench.device)
    bench.fact("context", seconds=context_s, bytes=total - free, total=total)
    properties = torch.cuda.get_device_properties(bench.device)
    bench.fact(
        "gpu",
        gpu=properties.name,
        capability=torch.cuda.get_device_capability(bench.device),
        cudnn=torch.backends.cudnn.version(),
        gpus=torch.cuda.device_count(),
    )
    driver = find_driver()
    bench.fact("driver", driver=None if driver is None else asdict(driver))


def suite(bench: Bench) -> None:
    """`tests/gpu`, where there is pytest, which tells its results; without a GPU, skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", "tests/gpu"]
    command += [f"-p{name}" for name in ("no:xdist", "no:cacheprovider", "gpu_check_suite")]
    command += [f"--facts={bench.out.resolve()}"]
    paths = os.pathsep.join([str(ROOT / "tools"), str(ROOT)])
    own = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    if done.returncode in (0, 1):  # all or some passed
        bench.fact("tests", last=done.stdout.splitlines()[-1:])
    else:
        bench.fact("not run", why=(done.stderr or done.stdout)[-500:])


def laws(bench: Bench) -> None:
    """Streamed is resident, drafted is plain, rounded is as rounded by hand."""
    sizes = bench.sizes
    streamed = {"home": HomeKind.HOST, "resident_layers": 1, "slots": 2}
    prompt = text_of(90, sizes.law.vocab)
    for dtype in ("float32", "bfloat16"):
        folder = bench.made(dtype, replace(sizes.law, dtype=dtype))

        def logits(place: Mapping[str, Any], folder: Path = folder) -> torch.Tensor:
            with engine_of(bench, folder, prompt, 16, place) as engine:
                rows = [engine.forward([(0, prompt)], reuse=True)]
                rows += [engine.forward([(0, [t])], reuse=False) for t in prompt[:3]]
                return torch.cat(rows).cpu()

        resident = logits({"resident_layers": sizes.law.layers})
        layer_bytes = max(path.stat().st_size for path in folder.glob("*.safetensors"))
        limit = ahead_bytes(layer_bytes, RuntimeConfig().readers) + 2 * layer_bytes
        for home in (HomeKind.HOST, HomeKind.DISK, HomeKind.SPLIT):
            for slots in (1, 2):
                place = streamed | {"home": home, "slots": slots}
                place |= {"host_limit_bytes": limit} if home is HomeKind.SPLIT else {}
                bench.law(
                    f"{dtype}: streamed from {home}, {slots} slots = resident",
                    partial(_equal, partial(logits, place), resident),
                )
        same = partial(passes_agree, bench, folder, prompt, streamed)
        bench.law(f"{dtype}: --exact on: a row has the same bits in any pass", same)
    bench.law("a matrix of 4 bits = rounding by hand", lambda: int4_is_right(bench.device))
    _drafted_is_plain(bench, prompt, streamed, sizes.answer)


def passes_agree(
    bench: Bench, folder: Path, prompt: list[int], streamed: Mapping[str, Any]
) -> bool:
    """Whether logits of rows decoded one by one are those of a prompt, of chains and of a tree."""
    how = {**streamed, "exact": Exact.ON, "kv": KVPlace.DEVICE}
    with engine_of(bench, folder, prompt, 80, how) as engine:
        first, *later = prompt
        alone = [engine.forward([(0, [first])], reuse=True)]
        alone += [engine.forward([(0, [token])], reuse=False) for token in later]
        wanted = torch.cat(alone).clone()
        engine.truncate(0, 60)
        tree = TokenTree((prompt[61], 9, prompt[62], 8, prompt[63]), (-1, -1, 0, 2, 2))
        (logits,) = engine.check([(0, prompt[60], tree)])
        if not torch.equal(logits[[0, 1, 3, 5]], wanted[60:64]):
            return False
        for start, rows in ((40, 17), (20, 64), (5, 3)):
            engine.truncate(0, start)
            chain = TokenTree.chain(prompt[start + 1 : start + rows])
            (logits,) = engine.check([(0, prompt[start], chain)])
            if not torch.equal(logits, wanted[start : start + rows]):
                return False
        engine.truncate(0, 0)
        return torch.equal(engine.forward([(0, prompt)], reuse=True), wanted[-1:])


def _equal(make: Callable[[], torch.Tensor], wanted: torch.Tensor) -> bool:
    return torch.equal(make(), wanted)


def sanitizer(bench: Bench) -> None:
    """The laws of drafting once more, under torch's checker of races between streams."""
    bench.fact("environment", sanitizer=os.environ.get("TORCH_CUDA_SANITIZER"))
    streamed = {"home": HomeKind.HOST, "resident_layers": 1, "slots": 2}
    _drafted_is_plain(bench, text_of(90, bench.sizes.law.vocab), streamed, 16)


def _drafted_is_plain(
    bench: Bench, prompt: list[int], streamed: dict[str, Any], tokens: int
) -> None:
    sizes = bench.sizes
    target = bench.made("float32", replace(sizes.law, dtype="float32"))
    first = bench.made("first", replace(sizes.law, dtype="float32"), sizes.law.first)
    with engine_of(bench, target, prompt, tokens, streamed) as engine:
        plain = finished(engine, prompt, tokens).sequences[0].emitted
    retrieval = RetrievalConfig(
        budget_tokens=32, chunk_tokens=4, rebuild_tokens=4, retrieval_weights=DraftWeights.SAME
    )
    drafts = {
        "n-grams": DraftConfig(draft="ngram", draft_tokens=8),
        "a tree of a model": DraftConfig(draft=f"model:{first}", draft_tokens=16),
        "TriForce": DraftConfig(draft="triforce", draft_tokens=4, retrieval=retrieval),
        "nobody": NO_DRAFT,
    }
    places: dict[str, dict[str, Any]] = {
        "": {},
        ", KV offloaded": {"kv": KVPlace.HOST, "kv_block_tokens": 32},
    }

    def same(draft: DraftConfig, place: dict[str, Any]) -> bool:
        how = {**streamed, **place, "draft": draft}
        with engine_of(bench, target, prompt, tokens, how) as engine:
            run = finished(engine, prompt, tokens)
            rate = run.report().speculation.acceptance_rate
            bench.fact(f"{draft.kind} drafts", acceptance_rate=rate, place=str(place))
            return run.sequences[0].emitted == plain

    for name, draft in drafts.items():
        for where, place in places.items():
            bench.law(f"drafted by {name}{where} = plain", partial(same, draft, place))


def int4_is_right(device: str) -> bool | str:
    """`Int4Linear` against the same rounding, number by number."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 128, bias=True, dtype=torch.bfloat16).to(device)
    rows = torch.randn(1, 9, 256, dtype=torch.bfloat16, device=device)
    groups = linear.weight.detach().double().unflatten(1, (-1, 32))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low) / 15
    weight = (low + ((groups - low) / scale).round() * scale).flatten(1)
    with torch.inference_mode():
        wanted = rows.double() @ weight.t() + linear.bias.double()
        error = (Int4Linear(linear)(rows).double() - wanted).norm() / wanted.norm()
    return bool(error < 0.02) or f"off by {error:.3f}"


def link(bench: Bench) -> None:
    """Copies, and what waits behind them."""
    from gpu_check_links import check  # which takes what is here

    check(bench)


def streaming(bench: Bench) -> None:
    """Passes over layers of a 70B model, against their kernels and their copies alone."""
    sizes = bench.sizes
    folder = bench.made("streamed", sizes.streamed)
    place = {"home": HomeKind.HOST, "resident_layers": 0}
    passes, nbytes = _timed_passes(bench, folder, place)
    for rows, facts in passes.items():
        bench.fact(f"a pass of {rows} rows", bytes_per_s=nbytes / facts["pass_s"], **facts)
    copies_s = nbytes / _link_rate(bench)
    try:
        whole = {"resident_layers": sizes.streamed.layers, "device_limit_bytes": None}
        kernels, _ = _timed_passes(bench, folder, whole)
    except OffloadError as error:
        bench.fact("no pass with all resident", why=str(error))
        return
    for rows, facts in kernels.items():
        kernels_s = facts["pass_s"]
        bench.fact(
            f"a pass of {rows} rows, and the longer of its kernels and its copies",
            measured=passes[rows]["pass_s"],
            predicted=max(kernels_s, copies_s),
            kernels_s=kernels_s,
            copies_s=copies_s,
        )


def _timed_passes(
    bench: Bench, folder: Path, place: Mapping[str, Any]
) -> tuple[dict[int, dict[str, float]], int]:
    """Seconds of passes by their rows, and the bytes that one streams."""
    sizes, found = bench.sizes, {}
    longest = [1] * (max(sizes.rows) + 8)
    with engine_of(bench, folder, longest, 8, place) as engine:
        for rows in sizes.rows:
            ids, before, taken = text_of(rows, sizes.streamed.vocab), engine.counters(), []
            for _ in range(4):
                engine.truncate(0, 0)
                work = partial(engine.forward, [(0, ids)], reuse=False)
                taken.append(timed(work, partial(wait_for, engine.device.compute)))
            stalled_s = engine.counters().stalled_s - before.stalled_s
            enqueue_s, pass_s = median_of(taken[1:])
            found[rows] = {"pass_s": pass_s, "enqueue_s": enqueue_s, "stall_s": stalled_s / 4}
        return found, engine.bytes_per_pass


def _link_rate(bench: Bench) -> float:
    """Bytes per second of a copy to the device with nothing beside."""
    from gpu_check_links import lanes, seconds_of

    block = max(bench.sizes.blocks)
    with opened(bench) as device, lanes([device], block) as (lane,):
        return block / seconds_of([lane.to], [lane.queue])


def narrow(bench: Bench, layers: int, hidden: int, intermediate: int) -> Made:
    """A model whose passes launches bound."""
    heads = max(2, hidden // 64)
    return Made(
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        heads=heads,
        kv_heads=heads,
        dtype="bfloat16" if bench.on_gpu else "float32",
    )


def launches(bench: Bench) -> None:
    """Small models, whose passes the host bounds; and which kernels attend."""
    for layers, hidden, intermediate in bench.sizes.small:
        made = narrow(bench, layers, hidden, intermediate)
        folder = bench.made(f"small-{layers}-{hidden}", made)
        prompt = text_of(200, made.vocab)
        with engine_of(bench, folder, prompt, 200) as engine:
            engine.forward([(0, prompt)], reuse=True)
            for rows in (1, 8, 16):
                work = partial(engine.check, [(0, 5, TokenTree.chain(range(3, 2 + rows)))])
                taken = []
                for _ in range(12):
                    engine.truncate(0, len(prompt))
                    taken.append(timed(work, partial(wait_for, engine.device.compute)))
                host_s, pass_s = median_of(taken[2:])
                bench.fact(
                    f"{layers} layers of {hidden}, {rows} rows", enqueue_s=host_s, pass_s=pass_s
                )
            engine.truncate(0, len(prompt))
    if bench.on_gpu:
        _kernels(bench)


def graphs(bench: Bench) -> None:
    """Recorded passes of draft models: their bits, their seconds, and their memory."""
    for layers, hidden, intermediate in bench.sizes.small:
        made = narrow(bench, layers, hidden, intermediate)
        folder = bench.made(f"small-{layers}-{hidden}", made)
        with opened(bench) as device, torch.inference_mode():
            if not device.kind.records:
                bench.fact("nothing is recorded", device=device.name)
                return
            model = load_drafting(
                open_checkpoint(folder), device, chunk_tokens=512, target_ids=made.vocab
            )
            _replays(bench, f"{layers} layers of {hidden}", model, text_of(600, made.vocab))


def _replays(bench: Bench, name: str, model: Runner, prompt: list[int]) -> None:
    """Passes of one model, recorded and eager."""
    device, network = model.device, model.network
    cache = ResidentKV(device, network.kv_shapes, network.dtype, len(prompt) + 128)
    model.logits([Rows.text(cache, prompt)])
    cache.commit(range(len(prompt)))
    wait, length = partial(wait_for, device.compute), cache.length

    def eager(rows: Rows) -> torch.Tensor:
        cache.truncate(length)
        return model.logits([rows])

    def recorded(rows: Rows) -> torch.Tensor:
        cache.truncate(length)
        return model.draft_logits(rows)

    for count in (1, 8, 32):
        rows = Rows.draft(cache, 5, TokenTree.chain(prompt[: count - 1]))
        ways = {"eager": partial(eager, rows), "recorded": partial(recorded, rows)}
        for _ in range(EAGER_FIRST + 1):
            recorded(rows)
        taken = {way: [timed(work, wait) for _ in range(12)] for way, work in ways.items()}
        facts = {}
        for way, samples in taken.items():
            facts[f"{way}_host_s"], facts[f"{way}_s"] = median_of(samples[2:])
        bench.fact(f"{name}, {count} rows", **facts)
        close = partial(_close, eager(rows).clone(), recorded(rows).clone())
        bench.law(f"{name}, {count} rows: recorded is near eager", close)
    tokens, expected = [5], list[int]()
    cache.truncate(length)
    for _ in range(EAGER_FIRST):
        model.draft_chain(Rows.text(cache, tokens), CHAIN)
    for _ in range(CHAIN):
        expected += eager_token(model, cache, tokens)
        tokens = expected[-1:]
    cache.truncate(length)
    chain = model.draft_chain(Rows.text(cache, [5]), CHAIN)
    found = [] if chain is None else device.download(chain)
    agreed = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), CHAIN
    )
    bench.fact(f"{name}, a greedy chain", tokens=CHAIN, as_one_by_one=agreed if found else 0)
    cache.truncate(length)
    whole = partial(model.draft_chain, Rows.text(cache, [5]), CHAIN)

    def again() -> object:
        cache.truncate(length)
        return whole()

    host_s, pass_s = median_of([timed(again, wait) for _ in range(12)][2:])
    bench.fact(f"{name}, a greedy chain of {CHAIN}", recorded_host_s=host_s, recorded_s=pass_s)
    # What was captured was tried before it was used: another input, bit for bit.
    bench.law(f"{name}: all was captured, and replayed to the bit", partial(model.records, cache))
    ledger = device.ledger()
    bench.fact(f"{name}: memory", pool=ledger.get("recorded passes", 0))


def eager_token(model: Runner, cache: ResidentKV, tokens: list[int]) -> list[int]:
    """The likeliest token after these, which stay in the cache."""
    logits = model.logits([Rows.text(cache, tokens)])
    cache.commit(range(len(tokens)))
    return model.device.download(likeliest(logits))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool | str:
    """Both are sums in 16 bits, in another order."""
    error = float((one.double() - other.double()).norm() / one.double().norm())
    return error < 0.02 or f"off by {error:.3f}"


def _kernels(bench: Bench) -> None:
    """Names of the kernels that attention runs, by rows, heads and number format."""
    from torch.profiler import ProfilerActivity, profile

    for kv_heads in (8, 32):
        for rows in (1, 8, 512):
            query = torch.randn(32, rows, 128, dtype=torch.bfloat16, device=bench.device)
            keys = torch.randn(kv_heads, 4096, 128, dtype=torch.bfloat16, device=bench.device)
            spec = AttentionSpec(scaling=128**-0.5)
            attend_rows(query, keys, keys, spec)
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                attend_rows(query, keys, keys, spec)
                torch.cuda.synchronize(bench.device)
            names = [
                f"{e.key[:90]} {e.self_device_time_total:.0f} us" for e in found.key_averages()
            ]
            bench.fact(f"kernels of {rows} rows, {kv_heads} KV heads", names=names)
            ours = partial(_none_of, names)
            bench.law(f"no kernel of cuDNN: {rows} rows, {kv_heads} KV heads", ours)
    _cudnn(bench)


def _none_of(names: Sequence[str]) -> bool:
    return not any("cudnn" in name.lower() for name in names)


def _cudnn(bench: Bench) -> None:
    """Torch's own choice by name: a new number of keys each time, and the same once more."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend = torch.nn.functional.scaled_dot_product_attention
    query = torch.randn(1, 32, 1, 128, dtype=torch.bfloat16, device=bench.device)
    keys = torch.randn(1, 32, 4096, 128, dtype=torch.bfloat16, device=bench.device)
    wait = partial(torch.cuda.synchronize, bench.device)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        new: list[tuple[float, float]] = []
        again: list[tuple[float, float]] = []
        try:
            with sdpa_kernel(backend):
                for length in range(4000, 4008):
                    rows = keys[:, :, :length]
                    for taken in (new, again):
                        taken.append(timed(partial(attend, query, rows, rows), wait))
        except RuntimeError as error:
            bench.fact(f"{backend.name} is refused", why=str(error)[:200])
            continue
        seconds = {"new_length_s": median_of(new[1:])[1], "same_length_s": median_of(again[1:])[1]}
        bench.fact(f"{backend.name}, one row", **seconds)


def kv(bench: Bench) -> None:
    """An offloaded cache read block by block, with and without choosing rows."""
    heads, dim, rows, layers = bench.sizes.kv
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    shape = KVShape(heads=heads, key_dim=dim, value_dim=dim)
    row_bytes = (shape.numbers_per_token * dtype.itemsize,) * layers
    for block in bench.sizes.kv_blocks:
        with opened(bench) as device, torch.no_grad():
            sizes = KVSizes(row_bytes=row_bytes, capacity=rows + 64, block_tokens=block)
            space, home = KVSpace(device, sizes.staging_bytes), RamHome(device, sizes)
            cache = OffloadedKV(space, [shape] * layers, dtype, sizes, home)
            retrieval = RetrievalKV(
                device,
                [shape] * layers,
                dtype,
                RetrievalSizes(
                    row_bytes=row_bytes,
                    config=RetrievalConfig(budget_tokens=min(1024, rows // 2)),
                    capacity=rows + 64,
                    scratch_tokens=64,
                ),
            )
            fill(
                cache, shape, layers, torch.empty(0, dtype=dtype, device=device.torch_device), rows
            )
            row = torch.randn(heads, 1, dim, dtype=dtype, device=device.torch_device)
            for builds in (False, True):
                chosen = retrieval if builds else None
                host_s, pass_s = read_all(device, cache, row, layers, chosen)
                blocks = layers * -(-rows // block)
                bench.fact(
                    f"blocks of {block * row_bytes[0]} bytes" + ", with a build" * builds,
                    host_s_per_block=host_s / blocks,
                    pass_s=pass_s,
                    bytes_per_s=rows * sum(row_bytes) / pass_s,
                )
            space.close()


def fill(cache: OffloadedKV, shape: KVShape, layers: int, like: torch.Tensor, rows: int) -> None:
    """Append random rows as a prompt does, so that they go home."""
    for layer in range(layers):
        made = torch.randn(shape.heads, rows, shape.key_dim, dtype=like.dtype, device=like.device)
        cache.append(layer, made, made)
    cache.commit(range(rows))


def read_all(
    device: Device,
    cache: OffloadedKV,
    row: torch.Tensor,
    layers: int,
    retrieval: RetrievalKV | None,
) -> tuple[float, float]:
    """Host's and device's seconds of a pass of one row [K, 1, D], medians of 5."""
    work, wait = partial(read_once, cache, row, row, layers, retrieval), device.compute
    taken = [timed(work, partial(wait_for, wait)) for _ in range(6)]
    return median_of(taken[1:])


def read_once(
    cache: OffloadedKV,
    row: torch.Tensor,
    query: torch.Tensor,
    layers: int,
    retrieval: RetrievalKV | None,
) -> None:
    """A pass of one row [K, 1, D], for which query [H, 1, D] asks; it is forgotten again."""
    spec, length = AttentionSpec(scaling=row.shape[2] ** -0.5), cache.length
    if retrieval is not None:
        retrieval.begin_build(length, 0.25)
    for layer in range(layers):
        cache.append(layer, row, row)
        watcher: RowWatcher | None = None
        if retrieval is not None:
            retrieval.begin_layer(layer, query, spec)
            watcher = retrieval
        cache.attend(layer, query, spec, None, watcher)
    if retrieval is not None:
        retrieval.end_build()
    cache.truncate(length)


def triforce(bench: Bench) -> None:
    """A model that looks back: acceptance over the budget, and against the newest tokens alone."""
    sizes = bench.sizes
    folder = bench.made("long", sizes.long)
    prompt, tokens = text_of(sizes.prompt, sizes.long.vocab), 48
    place = {"kv": KVPlace.HOST}

    def measure(name: str, draft: DraftConfig) -> RunReport:
        with engine_of(bench, folder, prompt, tokens, {**place, "draft": draft}) as engine:
            report = finished(engine, prompt, tokens).report()
        counted = report.speculation
        bench.fact(
            name,
            s_per_token=report.timings.s_per_token,
            acceptance_rate=counted.acceptance_rate,
            tokens_per_pass=counted.tokens_per_pass,
        )
        return report

    measure("plain", NO_DRAFT)
    drawn = DraftConfig(draft="triforce", draft_tokens=6)
    ways = {
        "": {"retrieval_weights": DraftWeights.SAME},
        ", the newest alone": {"retrieval_weights": DraftWeights.SAME, "recent_share": 1.0},
        ", level 2 in 4 bits": {"retrieval_weights": DraftWeights.INT4},
    }
    for budget in sizes.budgets:
        for name, way in ways.items():
            retrieval = RetrievalConfig(budget_tokens=budget, **way)  # type: ignore[arg-type]
            measure(f"budget {budget}{name}", replace(drawn, retrieval=retrieval))


def drafts(bench: Bench) -> None:
    """A draft model of the first layers, by what later ones add: accepted tokens, and speed."""
    made, tokens, rates = bench.sizes.drafted, bench.sizes.answer, []
    first = bench.made("first", made, made.first)
    draft = DraftConfig(draft=f"model:{first}", draft_tokens=6, shape=DraftShape.CHAIN)
    place, prompt = {"home": HomeKind.HOST, "resident_layers": 0}, text_of(64, made.vocab)
    for late in (1.0, 0.05, 0.03, 0.01):  # of tiny ones 0.20, 0.21 (0.1), 0.53 and all are accepted
        target = bench.made(f"late-{late}", replace(made, late=late))
        found = {}
        for name, drafter in (("plain", NO_DRAFT), ("drafted", draft)):
            with engine_of(bench, target, prompt, tokens, {**place, "draft": drafter}) as engine:
                report = finished(engine, prompt, tokens).report()
            found[f"{name}_s_per_token"] = report.timings.s_per_token
        counted = report.speculation
        rates.append(counted.acceptance_rate or 0.0)
        bench.fact(
            f"later layers times {late}",
            acceptance_rate=counted.acceptance_rate,
            tokens_per_pass=counted.tokens_per_pass,
            **found,
        )
        shutil.rmtree(target)
    bench.law("drafts are accepted by what later layers add", lambda: rates[0] < rates[-1])


def plan(bench: Bench) -> None:
    """A profile of this machine, and what it predicts of runs; device memory against the plan."""
    from gpu_check_plans import check  # which takes what is here

    check(bench)


def formats(bench: Bench) -> None:
    """Kernels that dequantise."""
    from gpu_check_formats import check  # which takes what is here

    check(bench)


PARTS: dict[str, Callable[[Bench], None]] = {
    "machine": machine,
    "suite": suite,
    "laws": laws,
    "sanitizer": sanitizer,
    "link": link,
    "streaming": streaming,
    "drafts": drafts,
    "launches": launches,
    "graphs": graphs,
    "formats": formats,
    "kv": kv,
    "triforce": triforce,
    "plan": plan,
}
