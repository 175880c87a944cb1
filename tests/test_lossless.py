"""`--wire lossless`: weights of packed folders stay coded until they compute, bit for bit."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engines import all_logits, engine_for, generate
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.config import DraftConfig, HomeKind, RuntimeConfig, Wire
from offload_rt.costs.machine import FreeMemory, speeds_of
from offload_rt.costs.workload import parts_of
from offload_rt.device.base import PIECE_BYTES, STAGING_BYTES
from offload_rt.device.host_memory import allocate_host
from offload_rt.device.kinds import CPU, CUDA, Packing, Processor
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model import packed_files, packer
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats.rounded import Int4Linear
from offload_rt.model.layout import plan_layouts
from offload_rt.model.outline import outline_checkpoint
from offload_rt.model.packed_files import NAMED
from offload_rt.model.packer import pack
from offload_rt.model.weight_files import FileSource, WeightFiles
from offload_rt.model.wire import as_if_packed, wired, wires_of
from offload_rt.planning.fit import RunLoad, place_run
from offload_rt.planning.placement import place, smallest_bytes
from offload_rt.planning.planner import Means, plan_wires
from offload_rt.profiling import decoding
from offload_rt.profiling.store import find_profile, load_profile


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny("llama", tokenizer=True, num_hidden_layers=4, dtype="bfloat16")


@pytest.fixture(scope="module", params=NAMED.values(), ids=NAMED)
def in_pieces(request, model, tmp_path_factory):
    """The same packed: coded tensors, some of several pieces."""
    folder = tmp_path_factory.mktemp("pieces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "SMALLEST_WEIGHTS", 512)
        patch.setattr(packed_files, "PIECE_WEIGHTS", 1000)
        pack(open_checkpoint(model), folder, lambda nbytes: None, request.param)
        yield folder


codes = pytest.mark.parametrize("bits", NAMED.values(), ids=NAMED)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_lossless_is_bit_for_bit_the_plain_model(model, in_pieces, dtype):
    """`--wire lossless`: few bits in memory and on the link, wherever layers are."""
    with engine_for(model, dtype=dtype, resident_layers=0) as engine:
        expected, plain_bytes = all_logits(engine), engine.bytes_per_pass
    places = [{"resident_layers": 0, "home": HomeKind.HOST}, {"resident_layers": 2}]
    if dtype == "bfloat16":  # in others decoded numbers are converted, wherever that is
        places += [{"resident_layers": 0, "slots": 1}, {}]
    for options in places:
        with engine_for(in_pieces, dtype=dtype, wire=Wire.LOSSLESS, **options) as engine:
            assert torch.equal(all_logits(engine), expected), options
            assert engine.config.wire is Wire.LOSSLESS
            memory = engine.memory()
            assert memory.device_peak_bytes <= memory.device_planned_bytes
            if "home" in options:  # what crosses the link is not unpacked
                assert engine.bytes_per_pass < plain_bytes
                assert engine.placement.host_bytes == engine.bytes_per_pass
                assert engine.checkpoint.total_bytes == open_checkpoint(model).total_bytes


def test_lossless_layers_draft_for_themselves(model, in_pieces):
    """Copies are rounded from what is decoded, so they are those of the plain model."""
    made, products = [], []
    for folder, wire in ((model, Wire.RAW), (in_pieces, Wire.LOSSLESS)):
        draft = DraftConfig(draft="self:int4", draft_tokens=4)
        with engine_for(folder, wire=wire, resident_layers=1, draft=draft) as engine:
            made.append(generate(engine))
            copies = engine._drafters[0]._model.network._model.modules()
            rounded = [module for module in copies if isinstance(module, Int4Linear)]
            rows = torch.linspace(-1, 1, max(m.inputs for m in rounded)).to(torch.bfloat16)
            products.append([module(rows[None, : module.inputs]) for module in rounded])
    assert made[0] == made[1]
    assert len(products[0]) >= 3 * 7
    assert all(torch.equal(one, other) for one, other in zip(*products, strict=True))


def test_a_damaged_piece_ends_a_lossless_pass_in_a_sentence(in_pieces, tmp_path):
    shutil.copytree(in_pieces, tmp_path / "broken")
    path = tmp_path / "broken" / "model.packed"
    extent = next(e for e in open_checkpoint(tmp_path / "broken").layers[2] if e.coded)
    with open(path, "r+b") as file:
        file.seek(extent.coded[-2])
        file.write(b"\x07" * 16)  # of a head
    with (
        pytest.raises(CheckpointError, match="head of a piece .*pack the model again"),
        engine_for(tmp_path / "broken", wire=Wire.LOSSLESS, resident_layers=0) as engine,
    ):
        all_logits(engine)


def loads(folder, wire, packing, how):
    """Read layer 2 twice, as a device does into memory or through staging; returns its image."""
    checkpoint = wired(open_checkpoint(folder), wire)
    layout = plan_layouts(checkpoint, "bfloat16", packing)[2]
    image, staging = allocate_host(layout.nbytes), allocate_host(STAGING_BYTES)
    files = WeightFiles(checkpoint.files)
    try:
        for _ in range(2):
            source = FileSource(layout, files)
            cut = source.blocks(image) if how == "blocks" else ()
            for block in cut:
                block.run()
            for piece in source.pieces() if how == "pieces" else ():
                image.tensor[piece.offset : piece.offset + piece.image_bytes] = piece.load(staging)
    finally:
        files.close()
    if wire is Wire.LOSSLESS and packing is Packing.FILE:  # as any file, once it was checked
        assert len(cut) <= sum(-(-run.nbytes // PIECE_BYTES) + 1 for run in layout.runs)
    return image.tensor.clone()


WAYS = [(Packing.FILE, "blocks"), (Packing.DEVICE, "blocks"), (Packing.DEVICE, "pieces")]


@pytest.mark.parametrize(("packing", "how"), WAYS)
@pytest.mark.parametrize("wire", [Wire.RAW, Wire.LOSSLESS])
def test_no_damaged_piece_reaches_a_device(in_pieces, tmp_path, wire, packing, how):
    """Heads by what they say, all else by a checksum, wherever layers go; old pieces have none."""
    intact = loads(in_pieces, wire, packing, how)
    shutil.copytree(in_pieces, tmp_path / "broken")
    path = tmp_path / "broken" / "model.packed"
    extent = next(e for e in open_checkpoint(path.parent).layers[2] if len(e.coded) > 2)
    begin = extent.coded[1]
    whole = path.read_bytes()

    def changed(places):
        data = bytearray(whole)
        for at, byte in places.items():
            data[begin + at] = byte
        path.write_bytes(data)
        return path.parent

    old = {3: 0} | dict.fromkeys(range(12, 16), 0)  # as the first version wrote it
    again = loads(changed(old), wire, packing, how)
    assert wire is Wire.LOSSLESS or torch.equal(again, intact)  # else heads are in the image
    low = {134: whole[begin + 134] ^ 1}
    assert not torch.equal(loads(changed(old | low), wire, packing, how), again)
    for places, said in (
        ({0: 7, 1: 200}, "says kind 7, base 200"),
        ({1: whole[begin + 1] ^ 1}, "has checksum"),
        (low, "has checksum"),
        ({3: 2}, "version 2"),
    ):
        with pytest.raises(CheckpointError, match=f"model.packed: .*{said}.*: the file is damaged"):
            loads(changed(places), wire, packing, how)


def test_lossless_asks_for_a_packed_folder(model, make_tiny):
    with pytest.raises(ConfigError, match="has none: make one with `offload-run pack`"):
        wired(open_checkpoint(model), Wire.LOSSLESS)
    with pytest.raises(ConfigError, match="no kernels on a thing: use raw"):
        wires_of(
            open_checkpoint(model), Wire.LOSSLESS, SimpleNamespace(decodes=False, called="a thing")
        )


def test_lossless_has_no_experts(make_tiny, tmp_path):
    """Packed or not, what is said is why, and not to pack it; raw and auto read a packed one."""
    folder = make_tiny("mixtral", dtype="bfloat16", num_hidden_layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "SMALLEST_WEIGHTS", 512)
        pack(open_checkpoint(folder), tmp_path, lambda nbytes: None)
    for found in (open_checkpoint(tmp_path), as_if_packed(open_checkpoint(folder))):
        with pytest.raises(ConfigError, match=r"experts\..* is of experts.*one size.*: use raw"):
            wired(found, Wire.LOSSLESS)
        assert wires_of(found, Wire.AUTO, CPU) == (Wire.RAW,)


def test_the_planner_takes_the_form_that_is_faster(model, in_pieces, monkeypatch):
    """Of a packed folder: raw where decoding is slow, coded where bytes are."""
    checkpoint = open_checkpoint(in_pieces)
    assert wires_of(checkpoint, Wire.AUTO, CPU) == (Wire.RAW, Wire.LOSSLESS)
    assert wires_of(open_checkpoint(model), Wire.AUTO, CPU) == (Wire.RAW,)
    profile = load_profile(find_profile("cpu-2core-avx512bf16"))
    profile = replace(profile, machine=replace(profile.machine, kernels=False))
    load = RunLoad(capacities=[64], prompt_tokens=32)
    config = RuntimeConfig(
        device="cpu", home=HomeKind.HOST, resident_layers=0, device_limit_bytes=2**29
    )
    for per_s, link, expected in ((1e12, 1e7, Wire.LOSSLESS), (1e4, 1e9, Wire.RAW)):
        rates = dict.fromkeys(decoding._CODED_PER_S, per_s)
        monkeypatch.setattr(decoding, "_CODED_PER_S", rates)
        parts_of.cache_clear()
        means = Means(speeds=speeds_of(profile, Processor.CPU), yields=lambda draft: None)
        made, plan = plan_wires(
            checkpoint,
            replace(config, link_bytes_per_s=link),
            CPU,
            load=load,
            free=FreeMemory(device_bytes=2**30, host_bytes=2**30),
            means=means,
        )
        assert plan.runtime.wire is expected
        assert any(each.pieces for each in made.stored.values()) is (expected is Wire.LOSSLESS)


@codes
def test_simulated_sizes_of_packing_are_those_it_has(bits, make_tiny, tmp_path):
    """Of trained weights: what is expected of a folder that is not packed yet."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    folder = make_tiny("llama", dtype="bfloat16", **sizes)
    with pytest.MonkeyPatch.context() as patch:
        for module in (packer, packed_files):
            patch.setattr(module, "SMALLEST_WEIGHTS", 512)
        pack(open_checkpoint(folder), tmp_path, lambda nbytes: None, bits)
        looked_ahead = as_if_packed(open_checkpoint(folder), bits)
        expected, there = (
            wired(checkpoint, Wire.LOSSLESS)
            for checkpoint in (looked_ahead, open_checkpoint(tmp_path))
        )
    mine, theirs = (
        {each.module: each.nbytes for each in one.stored.values()} for one in (expected, there)
    )
    assert mine.keys() == theirs.keys()
    assert sum(mine.values()) == pytest.approx(sum(theirs.values()), rel=0.05)


@pytest.mark.parametrize(("bits", "least", "most"), [("12", 0.74, 0.84), ("10.75", 0.66, 0.78)])
def test_simulate_looks_ahead_and_plan_does_not(bits, least, most, make_tiny, offload_run):
    """What packing would give is simulated of any model; a plan is of the files there are."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1000}
    folder = make_tiny("llama", dtype="bfloat16", **shape)
    asked = ("simulate", folder, "--profile", "cpu-2core-avx512bf16", "--json")
    asked += ("--resident-layers", 0, "--home", "host", "--link-bandwidth", 1)
    raw, less = (
        json.loads(offload_run(*asked, "--wire", *wire).out)
        for wire in (("auto",), ("lossless", "--bits", bits))
    )
    assert raw["wire"] == "raw" and less["wire"] == "lossless"
    assert least < less["host_bytes"] / raw["host_bytes"] < most  # small ones are not coded
    assert less["quantised"]["method"] == f"bf16 in {bits} bits"
    refused = offload_run(*asked, "--bits", bits)
    assert refused.code == 2 and "--bits has no effect with --wire auto" in refused.err
    planned = offload_run("plan", folder, "--wire", "lossless")
    assert planned.code == 2 and "make one with `offload-run pack`" in planned.err


SHAPES = st.fixed_dictionaries(
    {
        "hidden_size": st.integers(4, 64).map(lambda n: 128 * n),
        "intermediate_size": st.integers(8, 240).map(lambda n: 128 * n),
        "num_hidden_layers": st.integers(2, 12),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "vocab_size": st.sampled_from([1000, 32000, 152064]),
        "tie_word_embeddings": st.booleans(),
    }
)


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, resident=st.integers(0, 12))
def test_12_bits_take_no_more_of_a_gpu(tmp_path_factory, shape, resident):
    """Nor is there room for fewer layers within the limit that plain ones need.

    They are decoded into the bytes of one matrix, and leave more of two layers, in slots or for
    good. Of one layer alone they may not, nor on a CPU, which decodes in steps besides.
    """
    folder, resident = tmp_path_factory.mktemp("sizes"), min(resident, shape["num_hidden_layers"])
    config = shape | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 256, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    plain = outline_checkpoint(folder)
    with pytest.MonkeyPatch.context() as patch:  # `in_pieces` has thousands of times as many
        patch.setattr(packed_files, "PIECE_WEIGHTS", 2**21)
        coded = wired(as_if_packed(plain), Wire.LOSSLESS)
    load, room = RunLoad(capacities=[128], prompt_tokens=64), 2**44
    runtime = RuntimeConfig(device_limit_bytes=room, resident_layers=resident)
    free = FreeMemory(device_bytes=room, host_bytes=room)
    made = [place_run(one, runtime, CUDA, load=load, free=free) for one in (plain, coded)]
    slots = min(2, len(made[0].streamed)) or None
    needed = [smallest_bytes(m.demand, slots=slots, resident_layers=resident) for m in made]
    assert needed[1] <= needed[0]
    within = [place(m.demand, needed[0]) for m in made]
    kept = [len(each.resident) + each.slots for each in within]  # a slot may be worth a layer
    assert kept[1] >= kept[0]
