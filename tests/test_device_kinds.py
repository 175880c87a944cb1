"""A kind of device is its traits: planning obeys each of them, whatever the kind is called."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_profile import PROJECT

from offload_rt.config import DraftConfig, DraftWeights, HomeKind, KVPlace, RuntimeConfig
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.machine import FreeMemory
from offload_rt.costs.sizes import layouts_of, staging_bytes
from offload_rt.device.kinds import CPU, CUDA, KINDS, Processor, named_devices
from offload_rt.device.opening import _OPENERS
from offload_rt.errors import ConfigError
from offload_rt.kv.sizes import kv_places, plan_kv
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats.base import resolve_weights, rounded_kind
from offload_rt.planning.fit import RunLoad, place_run
from offload_rt.planning.memory import OTHER_BUFFERS

FREE = FreeMemory(device_bytes=2**32, host_bytes=2**30)


def test_every_processor_has_a_kind_and_can_be_opened():
    assert set(KINDS) == set(_OPENERS) == set(Processor)
    assert all(kind.processor is processor for processor, kind in KINDS.items())


@pytest.mark.parametrize(
    ("name", "kind", "indices"),
    [
        ("cpu", CPU, (0,)),
        ("cuda", CUDA, (0,)),
        ("cuda:0", CUDA, (0,)),
        ("cuda:12", CUDA, (12,)),
        ("cuda:1,cuda:0", CUDA, (1, 0)),
        ("cpu,cpu", CPU, (0, 0)),
    ],
)
def test_names(name, kind, indices):
    assert named_devices(name) == (kind, indices)


@pytest.mark.parametrize(
    "name",
    [
        "tpu",
        "cpu:0",
        "cuda:",
        "cuda:x",
        "cuda:12345",
        "auto",
        "",
        "cuda,",
        "cuda:0,tpu",
        "cuda:0;cuda:1",
    ],
)
def test_names_that_are_none(name):
    with pytest.raises(ConfigError, match="is not known: use auto, cpu, cpu,cpu, cuda, cuda:N or "):
        named_devices(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:1,cuda:1", "names cuda:1 twice: name each once"),
        ("cuda,cuda:0", "names cuda:0 twice"),
        ("cpu,cuda:0", "mixes kinds of devices"),
    ],
)
def test_devices_that_cannot_share_a_model(name, message):
    with pytest.raises(ConfigError, match=message):
        named_devices(name)


@pytest.mark.parametrize("kind", [CPU, CUDA], ids=lambda kind: str(kind.processor))
@pytest.mark.parametrize("home", [HomeKind.HOST, HomeKind.DISK])
def test_streamed_layers_live_where_the_kind_would_have_them(tiny_model, kind, home):
    checkpoint = open_checkpoint(tiny_model)
    load = RunLoad(capacities=[64], prompt_tokens=16)
    config = RuntimeConfig(resident_layers=1)
    placed = place_run(checkpoint, config, replace(kind, home=home), load=load, free=FREE)
    assert placed.streamed and placed.home is home


@pytest.mark.parametrize(("kind", "kept"), [(CPU, 0.15 * 2**32), (CUDA, 2**29)])
def test_what_is_left_free_where_no_limit_is_given(tiny_model, kind, kept):
    load = RunLoad(capacities=[64], prompt_tokens=16)
    placed = place_run(open_checkpoint(tiny_model), RuntimeConfig(), kind, load=load, free=FREE)
    assert placed.device_limit_bytes == pytest.approx(2**32 - kept, abs=1)


@pytest.mark.parametrize(
    ("traits", "more"),
    [
        ({"context_bytes": 2**27}, 2**27),
        ({"buffer_bytes": 2**20}, (2 + OTHER_BUFFERS) * (2**20 - 1)),
    ],
)
def test_what_a_kind_takes_besides_buffers_is_planned(tiny_model, traits, more):
    load, bare = RunLoad(capacities=[64], prompt_tokens=16), {"context_bytes": 0, "buffer_bytes": 1}
    checkpoint = open_checkpoint(tiny_model)
    without, given = (
        place_run(checkpoint, RuntimeConfig(), replace(CUDA, **t), load=load, free=FREE)
        for t in (bare, bare | traits)
    )
    assert given.device_bytes - without.device_bytes == more


def test_kv_goes_where_the_kind_would_have_it():
    kind = replace(CUDA, kv_home=KVPlace.DISK, kv_on_disk=True)
    assert kv_places(RuntimeConfig(), kind) == (KVPlace.DEVICE, KVPlace.DISK)
    assert kv_places(RuntimeConfig(kv=KVPlace.DISK), kind) == (KVPlace.DISK,)
    with pytest.raises(ConfigError, match="--kv disk"):
        kv_places(RuntimeConfig(kv=KVPlace.DISK), replace(CPU, kv_on_disk=False))


@pytest.mark.parametrize("attends", [False, True])
def test_kv_at_home_is_attended_to_where_the_kind_can(attends):
    kind = replace(CUDA, attends_at_home=attends)
    plan = plan_kv(
        KVPlace.HOST,
        RuntimeConfig(),
        kind,
        row_bytes=[64],
        capacities=[4096],
        scratch_tokens=4,
    )
    assert plan.attend_on_host is attends and bool(plan.sizes[0].slots) is not attends


def test_weights_are_rounded_to_what_the_kind_has_kernels_for():
    bare = replace(CUDA, kernels={}, copy_weights=DraftWeights.SAME)
    assert resolve_weights(DraftWeights.SAME, "bfloat16", bare) is DraftWeights.SAME
    assert rounded_kind("bfloat16", bare) is DraftWeights.SAME
    for weights in (DraftWeights.INT8, DraftWeights.INT4):
        with pytest.raises(ConfigError, match="on a GPU"):
            resolve_weights(weights, "bfloat16", bare)
    eight = replace(CUDA, draft_weights=DraftWeights.INT8)
    assert resolve_weights(DraftWeights.AUTO, "bfloat16", eight) is DraftWeights.INT8


def test_what_lies_in_host_memory_counts_where_that_is_the_devices(tiny_model):
    checkpoint = open_checkpoint(tiny_model)
    apart = replace(CPU, own_memory=True)
    layouts = layouts_of(checkpoint, "float16", CPU)  # converted: nothing lands in place
    assert staging_bytes(layouts, CPU, 4) > 0 == staging_bytes(layouts, apart, 4)
    load = RunLoad(
        capacities=[100], prompt_tokens=16, drafting=Drafting(DraftConfig(draft="ngram"))
    )
    demands = [
        place_run(checkpoint, RuntimeConfig(), kind, load=load, free=FREE).demand
        for kind in (CPU, apart)
    ]
    assert demands[0].drafter_bytes > 0 == demands[1].drafter_bytes


# Kernels are written for a device: they ask torch for its type. What is assumed of how fast weights
# are dequantised is a table by processor.
KERNELS = ("device", "kernels", "model", "attention", "baselines", "sampling.py")
TABLE = Path("profiling", "decoding.py")
BY_NAME = re.compile(r"\bis (not )?(CPU|CUDA|Processor\.\w+)\b|[!=]= Processor\.|\.type [!=]=")


def test_nothing_but_kernels_asks_which_kind_it_is():
    package = PROJECT / "offload_rt"
    asked = {
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] not in KERNELS and path.relative_to(package) != TABLE
        for line in path.read_text().splitlines()
        if BY_NAME.search(line)
    }
    assert not asked
