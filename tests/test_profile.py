"""Machine profiles: written is read, damage is named, what lies between two numbers is right."""

import dataclasses
import json
import os
import stat
import tomllib
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.device.kinds import Processor
from offload_rt.errors import ConfigError, ProfileError
from offload_rt.model.formats import stored
from offload_rt.profiling import decoding, identity
from offload_rt.profiling.codec import MalformedError, decode, encode
from offload_rt.profiling.identity import compare
from offload_rt.profiling.profile import (
    SCHEMA_VERSION,
    AttentionSpeed,
    Direction,
    DiskSlowdown,
    DiskSpeed,
    GpuIdentity,
    HardwareProfile,
    HeadCurve,
    LayerCurve,
    LayerShape,
    LayerTime,
    LayerWork,
    LinkLoad,
    LinkSpeed,
    Machine,
    MemorySpeed,
    MemoryUse,
    Number,
    Obtained,
    Versions,
    WeightOrder,
)
from offload_rt.profiling.rates import (
    attention_s,
    disk_bytes_per_s,
    disk_delay_s,
    disk_slowdown,
    head_s,
    layer_s,
    link_bytes_per_s,
    memory_bytes_per_s,
)
from offload_rt.profiling.store import find_profile, list_profiles, load_profile, save_profile

PROJECT = Path(__file__).parent.parent
SHIPPED = sorted((PROJECT / "profiles").glob("*.json"))
MIB = 2**20


def measured(value, samples=5):
    return Number(value=value, obtained=Obtained.MEASURED, spread=0.0, samples=samples)


def assumed(value):
    return Number(value=value, obtained=Obtained.ASSUMED, source="a guess")


def link(block_bytes, bytes_per_s, **changed):
    keys = {"gpu": 0, "direction": Direction.H2D, "pinned": True, "load": LinkLoad.ALONE}
    return LinkSpeed(block_bytes=block_bytes, bytes_per_s=bytes_per_s, **(keys | changed))


def shape(scale):
    """A layer whose weights grow with the square of `scale`."""
    return LayerShape(
        hidden=64 * scale,
        intermediate=128 * scale,
        heads=4 * scale,
        kv_heads=2 * scale,
        head_dim=16,
        dtype="float32",
        weight_bytes=scale**2 * 4 * 64 * (2 * 16 * 6 + 3 * 128),
    )


def curve(scale, seconds, processor=Processor.CPU, weights=WeightOrder.PLAIN):
    times = [LayerTime(tokens=n, layer_s=measured(s)) for n, s in seconds.items()]
    return LayerCurve(processor=processor, weights=weights, shape=shape(scale), times=tuple(times))


def profile(**parts):
    made = {
        "schema_version": SCHEMA_VERSION,
        "name": "test",
        "date": "2026-11-23",
        "method": "made for a test",
        "versions": Versions(torch="2.14.1", driver="570.1"),
        "machine": Machine(cpu="CPU Y", cores=2, ram_bytes=2**34),
    }
    return HardwareProfile(**(made | parts))


FULL = profile(
    links=(link(MIB, measured(1e10)),),
    disk=(
        DiskSpeed(
            file_system="ext4",
            direct=True,
            block_bytes=4 * MIB,
            queue_depth=4,
            bytes_per_s=measured(3e9),
        ),
    ),
    layers=(curve(1, {1: 0.1, 8: 0.2}),),
)


PRINTABLE = st.characters(codec="utf-8", exclude_categories=("C", "Z"), include_characters=" ")
TEXTS = st.text(PRINTABLE, max_size=20)
KNOWN_TEXTS = TEXTS.map(lambda text: "x" + text)


def numbers(limits):
    values = st.floats(1e-300, limits["most"])
    counts = st.integers(1, limits.get("count", 99))
    spreads = st.floats(0, limits["most"])
    how = st.sampled_from([Obtained.PUBLISHED, Obtained.ASSUMED])
    one = st.builds(
        Number, value=values, obtained=st.just(Obtained.MEASURED), spread=spreads, samples=counts
    )
    return one | st.builds(Number, value=values, obtained=how, source=KNOWN_TEXTS)


def anything(kind, limits):
    """Any value the schema allows, from the fields of its records."""
    if kind is Number:
        return numbers(limits)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        fields = dataclasses.fields(kind)
        return st.builds(kind, **{f.name: anything(hints[f.name], f.metadata) for f in fields})
    if get_origin(kind) is tuple:
        return st.lists(anything(get_args(kind)[0], limits), max_size=2).map(tuple)
    if isinstance(kind, UnionType):
        return st.none() | anything(get_args(kind)[0], limits)
    if kind is int:
        return st.integers(limits["least"], limits["most"])
    if kind is bool:
        return st.booleans()
    return st.sampled_from(kind) if issubclass(kind, StrEnum) else TEXTS


PROFILES = anything(HardwareProfile, {}).map(
    lambda made: dataclasses.replace(made, schema_version=SCHEMA_VERSION)
)


@given(made=PROFILES)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(made):
    assert decode(encode(made)) == made


def paths(tree, at=()):
    """Every place in a JSON tree."""
    yield at
    items = tree.items() if isinstance(tree, dict) else ()
    for key, value in enumerate(tree) if isinstance(tree, list) else items:
        yield from paths(value, (*at, key))


def key_of(path):
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def damaged(path, value):
    """The full profile with one value replaced, as text."""
    tree = json.loads(encode(FULL))
    place = tree
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return json.dumps(tree)


TREE = json.loads(encode(FULL))
NUMBERS = [p for p in paths(TREE) if p and p[-1] in ("value", "block_bytes", "tokens", "samples")]
WRONG = ["x", None, True, [], {}, -1, 10**30, float("nan"), float("inf"), 0]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("path", NUMBERS, ids=key_of)
def test_a_wrong_number_is_named(path, value):
    with pytest.raises(MalformedError) as caught:
        decode(damaged(path, value))
    message = str(caught.value)
    not_json = isinstance(value, float)
    place = key_of(path[:-1]) if (path[-1], value) == ("samples", 0) else key_of(path)
    assert ("no number" if not_json else place) in message
    assert "\n" not in message


@given(st.sampled_from([p for p in paths(TREE) if p and isinstance(p[-1], str)]))
@settings(deadline=None)
def test_a_missing_key_is_named_or_has_a_default(path):
    tree = json.loads(encode(FULL))
    place = tree
    for part in path[:-1]:
        place = place[part]
    del place[path[-1]]
    try:
        made = decode(json.dumps(tree))
    except MalformedError as error:
        place = path[:-1] if path[-1] in ("spread", "samples") else path
        assert key_of(place) in str(error)
    else:
        assert made != FULL and path[-1] not in ("schema_version", "value", "obtained", "machine")


@given(
    st.sampled_from([p for p in paths(TREE) if p]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=4,
    ),
)
@settings(max_examples=200, deadline=None)
def test_damage_gives_a_sentence_or_a_valid_profile(path, value):
    try:
        made = decode(damaged(path, value))
    except MalformedError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert decode(encode(made)) == made


@given(at=st.integers(0, len(encode(FULL).encode()) - 1), byte=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_a_changed_byte_never_is_a_traceback(at, byte):
    data = bytearray(encode(FULL).encode())
    data[at] = byte
    try:
        decode(data.decode(errors="replace"))
    except MalformedError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[]", "not an object"),
        ("{}", "schema_version is missing"),
        ('{"schema_version": 2}', "schema_version is 2, this program reads 1"),
        ('{"schema_version": true}', "schema_version is true"),
        ('{"schema_version": 1, "schema_version": 1}', '"schema_version" occurs twice'),
        ('{"schema_version": 1, "extra": 0}', "extra is no key"),
        ("[" * 100_000, "not JSON"),
        ('{"schema_version": ' + "9" * 5000 + "}", "not JSON"),
        ('{"schema_version": 1e999}', "schema_version is Infinity"),
    ],
)
def test_what_is_no_profile(text, says):
    with pytest.raises(MalformedError, match=says.replace("(", r"\(")):
        decode(text)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        ({"value": 1, "obtained": "measured", "samples": 3}, "lacks its spread"),
        ({"value": 1, "obtained": "measured", "spread": 0}, "its samples"),
        ({"value": 1, "obtained": "published"}, "published but names no source"),
        ({"value": 1, "obtained": "assumed", "source": " "}, "assumed but names no source"),
        ({"value": 1e14, "obtained": "assumed", "source": "x"}, "at most 1e\\+13"),
        ({"value": 1, "obtained": "guessed", "source": "x"}, "one of measured, published"),
    ],
)
def test_a_number_must_say_how_it_is_known(number, says):
    with pytest.raises(MalformedError, match=f"links.0..bytes_per_s.*{says}"):
        decode(damaged(("links", 0, "bytes_per_s"), number))


def test_a_refused_file_is_one_sentence_with_the_command(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(damaged(("links", 0, "bytes_per_s", "value"), -3))
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(caught.value) == (
        f"{path} is not a usable profile: links[0].bytes_per_s.value is -3, must be above 0 and at "
        f"most 1e+13; make a new one with `offload-run profile --output {path}`"
    )


def fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "not a file"),
        (fifo, "not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a file"),
        (lambda path: path.write_bytes(b" " * (2**20 + 1)), "more than the 1048576 bytes"),
        (lambda path: path.write_bytes(b"\xff"), "not text"),
    ],
)
def test_files_that_are_no_text(make, says, tmp_path):
    make(tmp_path / "x.json")
    with pytest.raises(ProfileError, match=says):
        load_profile(tmp_path / "x.json")


def test_saving_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "machine.json"
    save_profile(profile(), path)
    save_profile(FULL, path)
    assert load_profile(path) == FULL
    assert os.listdir(path.parent) == ["machine.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "machine.json"
    save_profile(FULL, path)

    def refuse(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ConfigError, match="machine.json: No space left on device, .* is free"):
        save_profile(profile(), path)
    assert load_profile(path) == FULL and os.listdir(tmp_path) == ["machine.json"]


def test_the_name_is_given_only_after_the_bytes_are_on_the_disk(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("name"), replace(a, b)))
    save_profile(FULL, tmp_path / "machine.json")
    assert done == ["fsync", "name", "fsync"]


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    absurd = profile(links=(link(MIB, measured(1e14)),))
    with pytest.raises(ProfileError, match="links.0..bytes_per_s.value.*measure again"):
        save_profile(absurd, tmp_path / "x.json")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working folder and a user's folder of their own."""
    (tmp_path / "here" / "profiles").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "here" / "profiles", tmp_path / "data" / "offload-rt" / "profiles"


def test_search_order(folders):
    here, user = folders
    name = "rtx4090-pcie4x16"
    assert find_profile(name).parent == PROJECT / "profiles"
    save_profile(FULL, user / f"{name}.json")
    assert find_profile(name) == user / f"{name}.json"
    save_profile(FULL, here / f"{name}.json")
    assert find_profile(name) == user / f"{name}.json"
    save_profile(FULL, here / "only-here.json")
    with pytest.raises(
        ProfileError, match="no profile 'only-here'.*give its path, profiles/only-here"
    ):
        find_profile("only-here")
    assert find_profile("profiles/only-here.json").resolve() == here / "only-here.json"
    assert find_profile(f"{user}/{name}.json") == user / f"{name}.json"
    assert {path.stem for path in SHIPPED} <= set(list_profiles())


def test_an_unknown_name_lists_the_known_ones(folders):
    with pytest.raises(ProfileError, match="no profile 'rtx'.*rtx4090-pcie4x16.*offload-run"):
        find_profile("rtx")


def test_shipped_profiles_are_installed():
    config = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    files = config["tool"]["setuptools"]["data-files"]
    assert files == {
        "share/offload-rt/profiles": ["profiles/*.json"],
        "share/offload-rt/profiles/published": ["profiles/published/*.json"],
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_profiles_answer_every_question(path):
    made = load_profile(path)
    assert made.name == path.stem
    processors = {c.processor for c in made.layers}
    for index, _ in enumerate(made.machine.gpus):
        together = LinkLoad.TOGETHER if len(made.machine.gpus) > 1 else LinkLoad.ALONE
        for load in {LinkLoad.ALONE, together}:
            for direction in Direction:
                rate = link_bytes_per_s(made, 64 * MIB, gpu=index, load=load, direction=direction)
                assert 1e9 < rate.value < 64e9
        assert link_bytes_per_s(made, 64 * MIB, gpu=index, pinned=False).value > 1e9
        assert made.pinning.bytes_per_s.value > 1e8
    work = LayerWork(weight_bytes=400 * MIB, flops_per_token=400 * MIB)
    for processor in processors:
        one = layer_s(made, work, 1, processor=processor).value
        assert one < layer_s(made, work, 1024, processor=processor).value
        assert attention_s(made, MIB, 1, processor=processor).value > 0
    assert disk_bytes_per_s(made, 8).value >= disk_bytes_per_s(made, 1).value * 0.5
    assert memory_bytes_per_s(made, MemoryUse.READ, 2).value > 1e9


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_numbers_say_where_they_are_from(path):
    text = path.read_text()
    assert ('"measured"' in text) is path.stem.startswith("cpu-")
    assert "/home" not in text and "/work" not in text and "/tmp" not in text


def test_times_between_blocks_are_a_fixed_cost_and_a_rate():
    fixed_s, rate = 1e-4, 2e10

    def bandwidth(nbytes):
        return nbytes / (fixed_s + nbytes / rate)

    sizes = (MIB, 8 * MIB, 64 * MIB)
    made = profile(links=tuple(link(n, measured(bandwidth(n))) for n in sizes))
    for nbytes in (1, 4096, MIB, 3 * MIB, 8 * MIB, 50 * MIB, 64 * MIB):
        assert link_bytes_per_s(made, nbytes).value == pytest.approx(bandwidth(nbytes))
    most = link_bytes_per_s(made, 64 * MIB).value
    assert link_bytes_per_s(made, 2**40).value == pytest.approx(most)


def test_links_are_told_apart():
    others = [
        {"gpu": 1},
        {"direction": Direction.D2H},
        {"pinned": False},
        {"load": LinkLoad.TOGETHER},
        {"load": LinkLoad.CPU_BUSY},
    ]
    links = [link(MIB, measured(1e9))]
    links += [link(MIB, measured((i + 2) * 1e9), **other) for i, other in enumerate(others)]
    made = profile(links=tuple(links))
    assert link_bytes_per_s(made, MIB).value == pytest.approx(1e9)
    for i, other in enumerate(others):
        assert link_bytes_per_s(made, MIB, **other).value == pytest.approx((i + 2) * 1e9)
    with pytest.raises(ProfileError, match="profile test has no speed of GPU 2's link"):
        link_bytes_per_s(made, MIB, gpu=2)


def test_an_answer_is_as_good_as_the_worst_number_it_rests_on():
    made = profile(links=(link(MIB, assumed(1e9)), link(4 * MIB, measured(1e9))))
    assert link_bytes_per_s(made, 4 * MIB).obtained is Obtained.MEASURED
    made = profile(links=(link(MIB, measured(1e9)), link(4 * MIB, assumed(1e9))))
    assert link_bytes_per_s(made, MIB).obtained is Obtained.MEASURED
    between = link_bytes_per_s(made, 2 * MIB)
    assert (between.obtained, between.source) == (Obtained.ASSUMED, "a guess")


def disk_of(speeds):
    """A disk with so many bytes a second at these depths."""
    return tuple(
        DiskSpeed(
            file_system="ext4",
            direct=True,
            block_bytes=4 * MIB,
            queue_depth=depth,
            bytes_per_s=measured(rate),
        )
        for depth, rate in speeds.items()
    )


def test_disk_and_memory_between_and_beyond():
    disk = disk_of({1: 1e9, 4: 2.5e9, 8: 3e9})
    memory = [
        MemorySpeed(use=use, threads=n, block_bytes=MIB, bytes_per_s=measured(rate))
        for use, n, rate in (
            (MemoryUse.READ, 1, 1e10),
            (MemoryUse.READ, 3, 3e10),
            (MemoryUse.COPY, 1, 5e9),
        )
    ]
    made = profile(disk=tuple(disk), host_memory=tuple(memory))
    found = [disk_bytes_per_s(made, depth).value for depth in (1, 2, 4, 6, 8, 64)]
    assert found == pytest.approx([1e9, 1.5e9, 2.5e9, 2.75e9, 3e9, 3e9])
    read = [memory_bytes_per_s(made, MemoryUse.READ, n).value for n in (1, 2, 16)]
    assert read == pytest.approx([1e10, 2e10, 3e10])
    assert memory_bytes_per_s(made, MemoryUse.COPY, 2).value == pytest.approx(5e9)


def layer_model(work, tokens, start_s=1e-4, bytes_per_s=1e10, flops=1e12):
    """A layer as its rule sees it: kernels start, weights are read, arithmetic per token."""
    return start_s + work.weight_bytes / bytes_per_s + work.flops_per_token / flops * (tokens - 1)


@given(
    tokens=st.integers(1, 64),
    weight_bytes=st.integers(1, shape(8).work.weight_bytes),
    flops=st.integers(1, shape(8).work.flops_per_token),
)
@settings(deadline=None)
def test_a_layer_of_any_shape_follows_the_model(tokens, weight_bytes, flops):
    counts = (1, 4, 64)
    made = profile(
        layers=tuple(
            curve(scale, {n: layer_model(shape(scale).work, n) for n in counts})
            for scale in (2, 5, 8)
        )
    )
    work = LayerWork(weight_bytes=weight_bytes, flops_per_token=flops)
    found = layer_s(made, work, tokens, processor=Processor.CPU).value
    assert found == pytest.approx(layer_model(work, tokens), rel=1e-6)


def test_one_measured_layer_scales_in_proportion_and_grows_with_tokens():
    made = profile(layers=(curve(1, {1: 1.0, 8: 3.0}),))
    work = shape(1).work
    double = LayerWork(weight_bytes=2 * work.weight_bytes, flops_per_token=3 * work.flops_per_token)
    found = [layer_s(made, double, n, processor=Processor.CPU).value for n in (1, 8, 16)]
    assert found == pytest.approx([2.0, 2.0 + 3 * 2.0, 2.0 + 3 * 5.0])
    assert 2 * work.flops_per_token == work.weight_bytes  # four bytes, two flops


def test_layers_are_told_apart():
    made = profile(
        layers=(
            curve(1, {1: 1.0}),
            curve(1, {1: 0.5}, weights=WeightOrder.PACKED),
            curve(1, {1: 0.1}, processor=Processor.CUDA),
        )
    )
    work = shape(1).work
    assert layer_s(made, work, 1, processor=Processor.CUDA).value == pytest.approx(0.1)
    packed = layer_s(made, work, 1, processor=Processor.CPU, weights=WeightOrder.PACKED)
    assert packed.value == pytest.approx(0.5)
    with pytest.raises(ProfileError, match="time of a layer .cuda, packed weights"):
        layer_s(made, work, 1, processor=Processor.CUDA, weights=WeightOrder.PACKED)


def test_a_head_has_times_of_its_own_or_those_of_a_layer_of_its_size():
    head = LayerWork(weight_bytes=300, flops_per_token=300)
    alone = profile(layers=(curve(1, {1: 1.0, 8: 3.0}),))
    as_layer = layer_s(alone, head, 8, processor=Processor.CPU)
    assert head_s(alone, head, 8, processor=Processor.CPU) == as_layer
    heads = tuple(
        HeadCurve(
            processor=Processor.CPU,
            weight_bytes=nbytes,
            times=tuple(
                LayerTime(tokens=rows, layer_s=measured(nbytes * rows)) for rows in (1, 16)
            ),
        )
        for nbytes in (200, 400)
    )
    made = replace(alone, heads=heads)
    assert head_s(made, head, 1, processor=Processor.CPU).value == pytest.approx(300)
    assert head_s(made, head, 8, processor=Processor.CPU).value == pytest.approx(8 * 300)
    with pytest.raises(ProfileError, match="cuda"):
        head_s(made, head, 1, processor=Processor.CUDA)


def test_a_head_is_timed_in_the_order_its_weights_lie():
    def heads(weights, layer_s):
        times = (LayerTime(tokens=1, layer_s=measured(layer_s)),)
        return HeadCurve(processor=Processor.CPU, weights=weights, weight_bytes=300, times=times)

    head = LayerWork(weight_bytes=300, flops_per_token=300)
    both = (heads(WeightOrder.PLAIN, 7.0), heads(WeightOrder.PACKED, 5.0))
    made = profile(layers=(curve(1, {1: 1.0}),), heads=both)
    for order, seconds in ((WeightOrder.PLAIN, 7.0), (WeightOrder.PACKED, 5.0)):
        found = head_s(made, head, 1, processor=Processor.CPU, weights=order)
        assert found.value == pytest.approx(seconds)


def test_reads_slow_a_layer_by_what_was_measured_for_its_size_and_never_speed_it_up():
    assert disk_slowdown(profile(), 10**6, WeightOrder.PLAIN) == 1.0
    made = profile(
        beside_disk=tuple(
            DiskSlowdown(weight_bytes=nbytes, tokens=tokens, factor=measured(factor))
            for nbytes, tokens, factor in [
                (100, 1, 1.1),
                (100, 8, 1.3),
                (300, 1, 1.6),
                (500, 1, 0.9),
            ]
        )
    )
    for weights in (WeightOrder.PLAIN, WeightOrder.PACKED):  # which was not measured here
        found = [disk_slowdown(made, nbytes, weights) for nbytes in (1, 100, 200, 300, 500, 10**9)]
        assert found == pytest.approx([1.2, 1.2, 1.4, 1.6, 1.0, 1.0])
    packed = replace(made.beside_disk[0], weights=WeightOrder.PACKED, factor=measured(2.0))
    both = replace(made, beside_disk=(*made.beside_disk, packed))
    assert disk_slowdown(both, 300, WeightOrder.PLAIN) == pytest.approx(1.6)
    assert disk_slowdown(both, 300, WeightOrder.PACKED) == pytest.approx(2.0)
    assert disk_slowdown(both, 300, WeightOrder.INT8) == pytest.approx(1.6)


def test_a_copy_from_a_disk_is_whole_later_than_its_bytes_with_several_reads_in_flight():
    made = profile(disk=disk_of({1: 1e9, 4: 1e9}))
    block_s = made.disk[0].block_bytes / 1e9
    assert disk_delay_s(made, 1) == 0.0
    assert disk_delay_s(made, 4) == pytest.approx(1.5 * block_s)


def test_attention_is_proportional_to_bytes():
    speeds = [
        AttentionSpeed(
            processor=Processor.CPU,
            query_tokens=n,
            queries_per_head=4,
            kv_bytes=MIB,
            s_per_kv_byte=measured(s),
            exact=exact,
        )
        for n, s, exact in ((1, 1e-10, False), (5, 3e-10, False), (1, 5e-11, True))
    ]
    made = profile(attention=tuple(speeds))
    found = [attention_s(made, 10**10, n, processor=Processor.CPU).value for n in (1, 3, 5, 10)]
    assert found == pytest.approx([1.0, 2.0, 3.0, 6.0])
    both = made, profile(attention=tuple(speeds[:2]))  # of the second none is row-invariant
    found = [attention_s(p, 10**10, 1, processor=Processor.CPU, exact=True).value for p in both]
    assert found == pytest.approx([0.5, 1.0])


GPU = GpuIdentity(name="GPU X", memory_bytes=2**34, link_generation=4, link_width=16)
MACHINE = Machine(cpu="CPU Y", cores=8, ram_bytes=2**35, gpus=(GPU,))
VERSIONS = Versions(torch="2.14.1", driver="570.1")


def gpu_with(**changed):
    return {"gpus": (dataclasses.replace(GPU, **changed),)}


@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_machine_says_who_multiplies(registers, kernels, monkeypatch):
    """Elsewhere a plan makes of it what the machine itself would."""
    monkeypatch.setattr(identity, "takes_matrix_registers", lambda dtype: registers)
    monkeypatch.setattr(identity, "kernels_multiply", lambda *, exact: exact and kernels)
    made = profile(machine=identity.this_machine(None))
    monkeypatch.setattr(decoding, "processor", lambda: ("another", ""))
    monkeypatch.setattr(decoding, "kernels_multiply", lambda **_: pytest.fail("it is elsewhere"))
    assert decoding.multiplies(made, exact=True) is kernels
    assert decoding.multiplies(made) is (kernels and not registers)
    assert decoding.rows_apart(made) == (32 if registers and not kernels else 0)
    assert decode(encode(made)) == made


@pytest.mark.parametrize("llvm", [True, False])
def test_plain_weights_are_multiplied_by_kernels_whether_numba_is_on_or_off(llvm, monkeypatch):
    """LLVM makes those kernels without it; only without LLVM a product takes 32 rows at a time."""
    machine = dataclasses.replace(MACHINE, kernels=False, matrix_registers=True)
    made = profile(machine=machine)
    monkeypatch.setattr(decoding, "processor", lambda: (machine.cpu, ""))
    monkeypatch.setattr(stored, "processor_flags", lambda: {"avx512_bf16", "amx_bf16"})
    monkeypatch.setattr(decoding, "takes_matrix_registers", lambda _: True)
    monkeypatch.setattr(stored.compiled, "problem", lambda: "switched off by NUMBA_DISABLE_JIT")
    monkeypatch.setattr(stored.importlib.util, "find_spec", lambda name: llvm or None)
    assert decoding.rows_apart(made) == (0 if llvm else 32)
    assert not decoding.multiplies(made, exact=True)


@pytest.mark.parametrize(
    ("stated", "kernels", "registers"),
    [
        ({}, None, False),
        ({"rows_apart": 32}, False, True),
        ({"rows_apart": 32, "multiplies": False}, False, True),
        ({"multiplies": True}, True, False),
        ({"multiplies": True, "multiplies_exactly": True}, True, False),
        ({"multiplies": False, "multiplies_exactly": True}, True, True),
        ({"multiplies": False, "multiplies_exactly": False}, False, False),
    ],
)
def test_older_profiles_say_who_multiplies_in_other_words(stated, kernels, registers):
    tree = json.loads(encode(profile()))
    tree["machine"] |= stated
    machine = decode(json.dumps(tree)).machine
    assert (machine.kernels, machine.matrix_registers) == (kernels, registers)
    for name, wanted in (
        ("rows_apart", "a whole number"),
        ("multiplies", "true or false"),
        ("multiplies_exactly", "true or false"),
    ):
        wrong = json.dumps(tree | {"machine": tree["machine"] | {name: "often"}})
        with pytest.raises(MalformedError, match=f"machine.{name} is .often., must be {wanted}"):
            decode(wrong)


@pytest.mark.parametrize(
    ("machine", "versions", "says"),
    [
        ({"cpu": "CPU Z"}, {}, "the processor was CPU Y in profile test, is CPU Z here"),
        ({"cores": 4}, {}, "the number of cores was 8 in profile test, is 4 here"),
        (gpu_with(name="GPU W"), {}, "GPU 0 was GPU X in profile test, is GPU W here"),
        (
            gpu_with(link_width=8),
            {},
            "the PCIe width of GPU 0 was 16 in profile test, is 8 here",
        ),
        ({"gpus": ()}, {}, "the number of GPUs was 1 in profile test, is 0 here"),
        ({}, {"torch": "2.15"}, "torch was 2.14.1 in profile test, is 2.15 here"),
        ({}, {"driver": ""}, "the NVIDIA driver was 570.1 in profile test, is none here"),
    ],
)
def test_each_change_is_a_sentence(machine, versions, says):
    made = profile(machine=MACHINE, versions=VERSIONS)
    now = dataclasses.replace(MACHINE, **machine), dataclasses.replace(VERSIONS, **versions)
    assert compare(made, *now) == [says]


@pytest.mark.parametrize(
    "machine", [{}, {"ram_bytes": 2**34}, gpu_with(link_generation=1), gpu_with(link_width=0)]
)
def test_an_idle_link_or_other_memory_is_no_change(machine):
    made = profile(machine=MACHINE, versions=VERSIONS)
    assert compare(made, dataclasses.replace(MACHINE, **machine), VERSIONS) == []
    unknown = profile(machine=MACHINE, versions=Versions())
    assert compare(unknown, MACHINE, VERSIONS) == []
