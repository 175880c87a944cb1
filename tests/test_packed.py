"""Packed folders: every bit comes back, and nothing loads that is not whole."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import all_logits, engine_for
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.config import HomeKind, RuntimeConfig
from offload_rt.costs import pass_cost
from offload_rt.costs.machine import speeds_of
from offload_rt.costs.pass_cost import home_rates
from offload_rt.costs.workload import PlacedModel, Residence, parts_of
from offload_rt.device.base import STAGING_BYTES
from offload_rt.device.host_memory import allocate_host
from offload_rt.device.kinds import CPU, Packing, Processor
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model import packed_files, packer, weight_files
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats import nested, planes
from offload_rt.model.formats.methods import CODED_BITS, NESTED_BITS
from offload_rt.model.formats.planes import DamagedError, decode, encode
from offload_rt.model.layout import plan_layouts
from offload_rt.model.packed_files import MANIFEST, NAMED, read_manifest
from offload_rt.model.packer import pack, unpack
from offload_rt.model.weight_files import FileSource, WeightFiles
from offload_rt.profiling.profile import Number, Obtained
from offload_rt.profiling.store import find_profile, load_profile

SPECIAL = [0x0000, 0x8000, 0x0001, 0x8001, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x3F80]


def bits_of(numbers):
    """bf16 bits of numbers, cut off."""
    return (np.asarray(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def trained(count, seed=0, zeros=0.0):
    dice = np.random.default_rng(seed)
    return bits_of(dice.normal(size=count) * 0.02 * (dice.random(count) >= zeros))


def again(words, bits):
    out = np.full_like(words, 0xABCD)
    decode(encode(words, bits), out)
    return out


@pytest.fixture(params=[False, True], ids=["compiled", "numpy"])
def without_numba(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(planes, "_compiled", lambda: None)
        monkeypatch.setattr(nested, "compile_now", lambda: None)


codes = pytest.mark.parametrize("bits", NAMED.values(), ids=NAMED)


@codes
@given(
    st.lists(st.sampled_from(SPECIAL) | st.integers(0, 0xFFFF), min_size=1, max_size=300),
    st.sampled_from([1, 3, 500, 2**16, 2**16 + 1]),
)
@settings(max_examples=60, deadline=None)
def test_every_bit_comes_back(bits, some, count):
    words = np.resize(np.array(some, np.uint16), count)
    assert np.array_equal(again(words, bits), words)
    mixed = trained(count)
    mixed[:: max(1, count // 50)] = words[0]
    assert np.array_equal(again(mixed, bits), mixed)


@codes
def test_pieces_longer_than_a_step_and_of_any_end(bits, without_numba, monkeypatch):
    """Numpy has steps, numba only an odd end."""
    monkeypatch.setattr(planes, "_STEP", 64)
    monkeypatch.setattr(nested, "_BLOCKS", 3)
    for count in (63, 64, 65, 127, 1000, 1024, 2**16 + 63):
        words = trained(count, zeros=0.3)
        assert np.array_equal(again(words, bits), words)


def test_a_place_right_behind_the_end_is_noticed(without_numba):
    words = trained(5000)
    words[-1] = 0x7F80
    piece = encode(words)
    escapes = int(piece[8:12].view("<u4")[0])
    at = (
        planes._HEAD_BYTES
        + packed_files.aligned(5000)
        + planes._pairs(5000)
        + 4
        + 2 * (escapes - 1)
    )
    place = piece[at : at + 2].view("<u2")
    assert place[0] == 4999
    place[0] = 5000
    with pytest.raises(DamagedError, match="weight 5000 of 5000"):
        decode(piece, np.zeros(5000, np.uint16))


@pytest.mark.parametrize("nudged", [0, 1, 4])
def test_planes_that_end_elsewhere_than_the_next_begin_are_noticed(nudged, without_numba):
    piece = encode(trained(5000), NESTED_BITS)
    at = 128 + packed_files.aligned(5000) + 5 * 256 + 4 * nudged
    piece[at] += 1
    either = f"planes of block [{max(0, nudged - 1)}{nudged}] of a piece of 5000 weights disagree"
    with pytest.raises(DamagedError, match=either):
        decode(piece, np.zeros(5000, np.uint16))


@codes
def test_trained_weights_have_few_bits_and_zeros_cost_no_more(bits):
    least, most = {CODED_BITS: (12.0, 12.1), NESTED_BITS: (10.6, 11.0)}[bits]
    for zeros in (0.0, 0.2):
        assert least < 8 * encode(trained(2**20, zeros=zeros), bits).size / 2**20 < most
    noise = np.random.default_rng(1).integers(0, 2**16, 2**18).astype(np.uint16)
    assert encode(noise, bits).size <= 2 * noise.size + 128
    assert np.array_equal(encode(noise, bits), encode(noise.copy(), bits))


@codes
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_pieces_end_in_a_sentence_or_in_other_weights(bits, data):
    """Never in a place outside of the weights, which numpy would not write to."""
    piece = encode(trained(5000, zeros=0.1), bits)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from([*range(12), *range(piece.size - 200, piece.size)]))
        piece[at] = data.draw(st.integers(0, 255))
    out = np.zeros(5000 + 2, np.uint16)
    with contextlib.suppress(DamagedError):
        decode(piece[: data.draw(st.sampled_from([piece.size, 12, 5000]))], out[1:-1])
    assert out[0] == out[-1] == 0


@codes
@pytest.mark.parametrize("zeros", [0.0, 0.2])
@pytest.mark.parametrize("count", [1, 2, 3, 64, 1001, 2**17 + 5])
def test_compiled_and_looked_up_are_the_same(zeros, count, bits, monkeypatch):
    pytest.importorskip("numba")
    words = trained(count, zeros=zeros)
    assert planes._compiled() is not None and nested.compile_now() is not None
    piece, out = encode(words, bits), np.empty_like(words)
    piece.flags.writeable = False
    decode(piece, out)
    assert np.array_equal(out, words)
    bad = encode(trained(5000, zeros=0.1), bits)
    bad[-700:] = 255  # among them places of escapes, or planes
    for made in (planes._compiled, lambda: None):
        monkeypatch.setattr(planes, "_compiled", made)
        monkeypatch.setattr(nested, "compile_now", made)
        assert np.array_equal(encode(words, bits), piece)
        assert np.array_equal(again(words, bits), words)
        with pytest.raises(DamagedError):
            decode(bad, np.zeros(5000, np.uint16))


@pytest.fixture(scope="module")
def small_pieces():
    """Tiny models have what large ones have: coded tensors, of several pieces."""
    patch = pytest.MonkeyPatch()
    patch.setattr(packer, "SMALLEST_WEIGHTS", 512)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny("llama", tokenizer=True, num_hidden_layers=4, dtype="bfloat16")


@pytest.fixture(scope="module", params=NAMED.values(), ids=NAMED)
def packed(request, model, small_pieces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack(open_checkpoint(model), folder, lambda nbytes: None, request.param)
    return folder


@pytest.fixture(scope="module")
def sharded(model, tmp_path_factory):
    """The same in three files with an index."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("sharded")
    shutil.copytree(model, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for part in range(3):
        name = f"model-{part + 1:05}-of-00003.safetensors"
        mine = dict(list(tensors.items())[part::3])
        save_file(mine, folder / name, {"format": "pt"})
        index |= dict.fromkeys(mine, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@codes
@pytest.mark.parametrize("which", ["model", "sharded"])
def test_unpacking_gives_the_same_files(which, bits, small_pieces, tmp_path, request):
    folder = request.getfixturevalue(which)
    (tmp_path / "p").mkdir()
    (tmp_path / "u").mkdir()
    seen = []
    done = pack(open_checkpoint(folder), tmp_path / "p", seen.append, bits)
    assert done.packed_bytes < 0.95 * done.original_bytes == 0.95 * sum(seen)
    assert not list((tmp_path / "p").glob("*.safetensors"))
    unpack(tmp_path / "p", tmp_path / "u", lambda nbytes: None)
    assert digests(tmp_path / "u") == digests(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("packing", list(Packing))
def test_images_are_the_same_byte_for_byte(model, packed, dtype, packing, monkeypatch):
    """By the reads that fill host memory, and by those through staging buffers."""
    monkeypatch.setattr(weight_files, "PIECE_BYTES", 4096)  # fp32 of a coded piece comes in parts
    parts = []
    for folder in (model, packed):
        checkpoint = open_checkpoint(folder)
        files, found = WeightFiles(checkpoint.files), {}
        for number, layout in enumerate(plan_layouts(checkpoint, dtype, packing)):
            source = FileSource(layout, files)
            image, staged = (
                allocate_host(layout.nbytes),
                torch.zeros(layout.nbytes, dtype=torch.uint8),
            )
            for block in source.blocks(image):
                block.run()
            staging = allocate_host(STAGING_BYTES)
            for piece in source.pieces():
                made = piece.load(staging)
                assert made.numel() == piece.image_bytes
                staged[piece.offset : piece.offset + piece.image_bytes] = made
            assert sum(b.nbytes for b in source.blocks(image)) == source.nbytes
            assert sum(p.nbytes for p in source.pieces()) == source.nbytes
            for place in layout.placements:
                here = slice(place.offset, place.offset + place.nbytes)
                found[number, place.name] = image.tensor[here].clone()
                assert torch.equal(staged[here], image.tensor[here])
        files.close()
        parts.append(found)
    assert parts[0].keys() == parts[1].keys()
    assert all(torch.equal(parts[0][key], parts[1][key]) for key in parts[0])


@pytest.mark.parametrize("home", [HomeKind.DISK, HomeKind.HOST])
def test_plans_count_packed_bytes_and_what_decoding_takes(model, packed, home, monkeypatch):
    """Decoding is added to the reads of packed files, and of nothing else."""
    [layer, *_] = parts_of(open_checkpoint(packed), "bfloat16", CPU).layers
    plain = parts_of(open_checkpoint(model), "bfloat16", CPU).layers[0]
    assert layer.file_bytes < 0.85 * plain.file_bytes and plain.packed == 0
    assert layer.packed_bits == read_manifest(packed)[0].bits
    assert layer.flops_per_token == plain.flops_per_token
    speeds = SimpleNamespace(
        devices=[CPU],
        further=(),
        profile=load_profile(find_profile("cpu-2core-avx512bf16")),
        device=CPU,
        home_bytes_per_s=lambda *given: (Number(value=2e9, obtained=Obtained.MEASURED),),
    )
    placed = PlacedModel(
        parts=parts_of(open_checkpoint(packed), "bfloat16", CPU),
        speeds=speeds_of(load_profile(find_profile("cpu-2core-avx512bf16")), Processor.CPU),
        residence=Residence(streamed=(1, 3), slots=2, from_files=home is HomeKind.DISK),
        context_tokens=8,
    )
    load = placed.load(1)
    for per_s in (1e9, 1e12):
        made, asked = Number(value=per_s, obtained=Obtained.ASSUMED), set()
        monkeypatch.setattr(
            pass_cost, "decoded_per_s", lambda *_, m=made, seen=asked: (seen.add(_[-1]), m)[1]
        )
        [rate] = home_rates(speeds, RuntimeConfig(), load, home, None).home
        layers = [placed.parts.layers[index] for index in (1, 3)]
        file_bytes = sum(each.file_bytes for each in layers)
        weights = sum(each.packed for each in layers)
        pass_s = file_bytes / 2e9 + (weights / per_s if home is HomeKind.DISK else 0)
        assert rate.value == pytest.approx(file_bytes / pass_s, rel=1e-9)
        assumed = home is HomeKind.DISK
        assert asked == ({layer.packed_bits} if assumed else set())
        assert rate.obtained is (Obtained.ASSUMED if assumed else Obtained.MEASURED)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("resident", [0, 2, 4])
def test_output_is_the_same_bit_for_bit(model, packed, dtype, resident):
    logits, moved = [], []
    for folder in (model, packed):
        with engine_for(folder, dtype=dtype, resident_layers=resident) as engine:
            logits.append(all_logits(engine))
            moved.append(engine.bytes_per_pass)
    assert torch.equal(*logits)
    assert moved[1] < moved[0] or resident == 4


@codes
def test_a_tensor_has_several_pieces(bits, model, tmp_path, small_pieces, monkeypatch):
    monkeypatch.setattr(packed_files, "PIECE_WEIGHTS", 1000)
    for name in ("p", "u"):
        (tmp_path / name).mkdir()
    pack(open_checkpoint(model), tmp_path / "p", lambda nbytes: None, bits)
    checkpoint = open_checkpoint(tmp_path / "p")
    assert max(len(extent.coded) for extent in checkpoint.tensors.values()) > 3
    unpack(tmp_path / "p", tmp_path / "u", lambda nbytes: None)
    assert digests(tmp_path / "u") == digests(model)
    with engine_for(model, resident_layers=0) as engine:
        expected = all_logits(engine)
    with engine_for(tmp_path / "p", resident_layers=0) as engine:
        assert torch.equal(all_logits(engine), expected)


def loads(folder):
    try:
        open_checkpoint(folder)
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("back", [False, True])
def test_killed_anywhere_leaves_nothing_that_loads(sharded, small_pieces, tmp_path, back):
    source = sharded
    if back:
        source = tmp_path / "source"
        source.mkdir()
        pack(open_checkpoint(sharded), source, lambda nbytes: None)
    checkpoint = open_checkpoint(source)

    def run(output, last=0):
        """Ended at once before the system call of that number; returns how many there were."""
        count = 0

        def counting(call):
            def counted(*arguments, **more):
                nonlocal count
                count += 1
                if count == last:
                    os._exit(9)
                return call(*arguments, **more)

            return counted

        with pytest.MonkeyPatch.context() as patch:
            for name in ("pwrite", "rename", "replace"):
                patch.setattr(os, name, counting(getattr(os, name)))
            output.mkdir()
            if back:
                unpack(source, output, lambda nbytes: None)
            else:
                pack(checkpoint, output, lambda nbytes: None)
        return count

    total = run(tmp_path / "whole")
    assert total > 20 and loads(tmp_path / "whole")
    for last in [1, total // 2, *range(total - 9, total + 1)]:
        output = tmp_path / str(last)
        if (child := os.fork()) == 0:
            run(output, last)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert any(output.iterdir()) and not loads(output)


def test_a_file_that_changes_while_it_is_packed_is_noticed(sharded, small_pieces, tmp_path):
    folder, output = tmp_path / "model", tmp_path / "packed"
    shutil.copytree(sharded, folder)
    output.mkdir()
    path = sorted(folder.glob("*.safetensors"))[0]

    def touch(_):
        os.utime(path)

    with pytest.raises(CheckpointError, match="changed while"):
        pack(open_checkpoint(folder), output, touch)
    assert not any(output.iterdir())


def test_a_stop_and_a_full_disk_leave_nothing(model, packed, tmp_path, monkeypatch):
    def stop(nbytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(open_checkpoint(model), tmp_path, stop)
    assert not any(tmp_path.iterdir())

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    for work in (
        lambda: pack(open_checkpoint(model), tmp_path, lambda nbytes: None),
        lambda: unpack(packed, tmp_path, lambda nbytes: None),
    ):
        with pytest.raises(ConfigError, match=r"No space left on device, .* is free: make room"):
            work()
        assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ConfigError, match="1000 B is free"):
        pack(open_checkpoint(model), tmp_path, lambda nbytes: None)


def changed(packed, tmp_path, change):
    folder = tmp_path / "changed"
    shutil.copytree(packed, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest, manifest["files"][0])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def nudge(starts, which, nbytes):
    starts[which] += nbytes


def first_coded(file):
    return next(name for name, starts in file["starts"].items() if len(starts) > 1)


def a_norm(file):
    return next(name for name in file["starts"] if name.endswith("norm.weight"))


def last_coded(file):
    return [name for name, starts in file["starts"].items() if len(starts) > 1][-1]


MANIFESTS = {
    "version": (lambda m, f: m.update(version=3), "version 3, read is"),
    "no version": (lambda m, f: m.update(version=[1]), "version a list of 1, read is"),
    "no files": (lambda m, f: m.update(files=[]), "files of a list of 0"),
    "a way out": (lambda m, f: f.update(stem="../model"), "stem '../model'"),
    "twice": (lambda m, f: m["files"].append(f), "names a file twice"),
    "no digest": (lambda m, f: f.update(sha256="no"), "sha256 'no'"),
    "size": (lambda m, f: f.update(packed_bytes=f["packed_bytes"] + 1), "bytes, .* says"),
    "original size": (lambda m, f: f.update(original_bytes=7), "promises"),
    "huge": (lambda m, f: f.update(original_bytes=2**60), "bytes 1152921504606846976"),
    "a tensor less": (lambda m, f: f["starts"].pop(first_coded(f)), "a header of"),
    "no place": (lambda m, f: f["starts"].update({first_coded(f): []}), "a list of 0"),
    "a word": (lambda m, f: f["starts"].update({first_coded(f): ["x"]}), "a list of 1"),
    "behind the end": (lambda m, f: f["starts"].update({first_coded(f): [2**40]}), "lie at bytes"),
    "in the header": (lambda m, f: f["starts"].update({a_norm(f): [8]}), "lie at bytes 8 to"),
    "over another": (
        lambda m, f: f["starts"].update({first_coded(f): [f["starts"][last_coded(f)][0]]}),
        "overlap",
    ),
    "a piece too many": (
        lambda m, f: f["starts"][first_coded(f)].append(f["starts"][first_coded(f)][-1] + 64),
        "is not coded in 2 pieces",
    ),
    "not aligned": (lambda m, f: nudge(f["starts"][first_coded(f)], 0, 8), "is not coded in 1"),
    "a piece too long": (
        lambda m, f: nudge(f["starts"][first_coded(f)], -1, 2**26),
        "is not coded in 1 pieces",
    ),
    "backwards": (lambda m, f: f["starts"][first_coded(f)].reverse(), "is not coded in"),
}


@pytest.mark.parametrize("which", MANIFESTS)
def test_manifests_that_contradict_the_files_are_refused(packed, tmp_path, which):
    change, message = MANIFESTS[which]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(changed(packed, tmp_path, change))


def test_other_ways_to_be_no_packed_folder(packed, model, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(packed, folder)
    shutil.copy(model / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match="holds both"):
        open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.packed").unlink()
    with pytest.raises(CheckpointError, match=r"model\.packed is missing"):
        open_checkpoint(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(folder)


def test_a_manifest_of_the_other_code_is_noticed(packed, tmp_path):
    """A GPU's kernels go by it, so before a piece is sent there."""
    folder = changed(packed, tmp_path, lambda m, f: m.update(version=3 - m["version"]))
    with (
        pytest.raises(CheckpointError, match=r"model\.packed: .* says kind \d, of another code"),
        engine_for(folder, resident_layers=0) as engine,
    ):
        all_logits(engine)


def test_damage_is_found_when_it_is_unpacked(packed, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(packed, folder)
    data = bytearray((folder / "model.packed").read_bytes())
    starts = json.loads((folder / MANIFEST).read_text())["files"][0]["starts"]
    at = next(found[0] for found in starts.values() if len(found) > 1)
    (tmp_path / "u").mkdir()
    for place, message in ((at + 200, "gives model.safetensors back with SHA-256"), (at, "kind 9")):
        data[place] = 9 if place == at else data[place] ^ 1
        (folder / "model.packed").write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            unpack(folder, tmp_path / "u", lambda nbytes: None)
        assert not any((tmp_path / "u").iterdir())
    with (
        pytest.raises(CheckpointError, match=r"model\.packed: the head of a piece"),
        engine_for(folder, resident_layers=0) as engine,
    ):
        all_logits(engine)


def test_fewer_bits_are_asked_for(offload_run, model, small_pieces, tmp_path):
    sizes = []
    for name in ("12", "10.75"):
        there = tmp_path / name
        made = offload_run("pack", model, "--output", there, "--bits", name, "--json")
        sizes.append(json.loads(made.out)["packed_bytes"])
        plan = json.loads(offload_run("plan", there, "--wire", "lossless", "--json").out)
        assert plan["quantised"]["method"] == f"bf16 in {name} bits"
    assert sizes[1] < sizes[0]
    refused = offload_run("pack", model, "-o", tmp_path / "r", "--wire", "int8", "--bits", "12")
    assert refused.code == 2 and "--bits has no effect with --wire int8" in refused.err


def test_the_verbs(offload_run, model, small_pieces, tmp_path):
    there, back = tmp_path / "p", tmp_path / "u"
    made = offload_run("pack", model, "--output", there, "--json")
    record = json.loads(made.out)
    assert made.code == 0 and record["files"] == 1 and made.err == ""
    assert record["packed_bytes"] == (there / "model.packed").stat().st_size
    assert offload_run("pack", model, "--output", there).code == 2
    refused = offload_run("pack", there, "--output", back)
    assert refused.code == 2 and "is packed already" in refused.err and not back.exists()
    assert offload_run("unpack", model, "--output", back).code == 2
    shown = offload_run("unpack", there, "-o", back)
    assert shown.code == 0 and shown.out.startswith("unpacked ")
    assert digests(back) == digests(model)
    answers = [
        json.loads(offload_run("generate", m, "-p", "a fox", "-n", 4, "--json", "--raw").out)
        for m in (model, there)
    ]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert "(packed in " in offload_run("plan", there).out
    plans = [json.loads(offload_run("plan", m, "--json").out) for m in (model, there)]
    assert plans[0]["weights_bytes"] == plans[1]["weights_bytes"] > plans[1]["weights_file_bytes"]
    compare = offload_run(
        "compare",
        there,
        "--prompts",
        tmp_path / "no",
        "--output",
        tmp_path / "o",
        "--device-memory",
        "1GiB",
    )
    assert compare.code == 2 and "is packed, which other runtimes do not read" in compare.err


def test_fp32_models_are_not_packed(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"has weights of F32, of which 0 B of"):
        packer.check_packable(open_checkpoint(tiny_model))
