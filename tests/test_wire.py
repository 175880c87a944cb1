"""`--wire`: a model rounded while it is loaded is the folder of rounded weights, bit for bit."""

import json

import numpy as np
import pytest
import torch
from engines import all_logits, engine_for, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised import save_aligned
from safetensors.torch import load_file, save_file

from offload_rt.config import DraftConfig, HomeKind, RuntimeConfig, Wire
from offload_rt.device.base import STAGING_BYTES
from offload_rt.device.host_memory import allocate_host
from offload_rt.device.kinds import Packing
from offload_rt.errors import CheckpointError, ConfigError, PlanError
from offload_rt.model import rounded_files, weight_files
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats.rounding import GROUP, numbers_of, rounded
from offload_rt.model.layout import plan_layouts
from offload_rt.model.outline import outline_checkpoint
from offload_rt.model.packer import pack
from offload_rt.model.rounded_files import write_rounded
from offload_rt.model.weight_files import FileSource, WeightFiles
from offload_rt.model.wire import wired

LOSSY = (Wire.INT8, Wire.INT4)


@pytest.fixture(scope="module")
def folders(make_tiny, tmp_path_factory):
    """A plain model, and folders of it rounded to 8 and 4 bits."""
    made = {}

    def make(family="qwen2", dtype="bfloat16"):
        if (family, dtype) not in made:
            plain = make_tiny(family, dtype=dtype, num_hidden_layers=3, pad_token_id=0)
            if dtype == "float32":
                aligned = tmp_path_factory.mktemp(family)
                (aligned / "config.json").write_bytes((plain / "config.json").read_bytes())
                save_aligned(load_file(plain / "model.safetensors"), aligned / "model.safetensors")
                plain = aligned
            made[family, dtype] = {Wire.RAW: plain}
            for wire in LOSSY:
                folder = tmp_path_factory.mktemp(wire)
                patch = pytest.MonkeyPatch()
                patch.setattr(rounded_files, "PIECE_BYTES", 1000)
                write_rounded(wired(open_checkpoint(plain), wire), folder, lambda nbytes: None)
                patch.undo()
                made[family, dtype][wire] = folder
        return made[family, dtype]

    return make


FAMILIES = {"qwen2": "bfloat16", "phi3": "float32", "llama": "float16"}


@pytest.mark.parametrize("wire", LOSSY)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_at_load_is_the_folder_of_the_rounded_weights(folders, family, wire):
    """L6, with the folder streamed from its files: wherever layers are, every bit of logits."""
    made = folders(family, FAMILIES[family])
    with engine_for(made[wire], resident_layers=0) as engine:
        expected, nbytes = all_logits(engine), engine.bytes_per_pass
    with engine_for(made[Wire.RAW], resident_layers=0) as engine:
        assert not torch.equal(all_logits(engine), expected)
        whole = engine.bytes_per_pass
    places = (  # of one family each, of the others one
        {"resident_layers": 1, "home": HomeKind.HOST},
        {"resident_layers": 0, "slots": 1, "home": HomeKind.HOST},
        {},
    )
    for options in places if family == "qwen2" else places[:1]:
        with engine_for(made[Wire.RAW], wire=wire, **options) as engine:
            assert torch.equal(all_logits(engine), expected), options
            assert engine.checkpoint.name.endswith(f"rounded to {wire}")
            memory = engine.memory()
            assert memory.device_peak_bytes <= memory.device_planned_bytes
            if options.get("slots"):
                assert nbytes <= engine.bytes_per_pass < whole  # a page or two are filled up


def test_rounded_layers_draft_and_are_drafted_for(folders):
    folder = folders()[Wire.RAW]
    options = {"wire": Wire.INT8, "resident_layers": 1, "home": HomeKind.HOST}
    with engine_for(folder, **options) as engine:
        alone = generate(engine)
    with engine_for(folder, draft=DraftConfig(draft="self:int4", draft_tokens=4), **options) as e:
        assert generate(e) == alone


@pytest.mark.parametrize("wire", LOSSY)
def test_pieces_for_a_device_are_the_blocks_of_a_host(folders, wire, monkeypatch, tmp_path):
    """The image is the same through staging buffers, in parts of any size, from packed files."""
    monkeypatch.setattr(weight_files, "PIECE_BYTES", 1000)
    folder = folders()[Wire.RAW]
    monkeypatch.setattr("offload_rt.model.packer.SMALLEST_WEIGHTS", 64)
    for module in ("packer", "packed_files"):
        monkeypatch.setattr(f"offload_rt.model.{module}.PIECE_WEIGHTS", 512, raising=False)
    pack(open_checkpoint(folder), tmp_path, lambda nbytes: None)
    images = []
    for where in (folder, tmp_path):
        checkpoint = wired(open_checkpoint(where), wire)
        layout = plan_layouts(checkpoint, "bfloat16", Packing.DEVICE)[1]
        files = WeightFiles(checkpoint.files)
        source = FileSource(layout, files)
        for way in ("blocks", "pieces"):
            image = allocate_host(layout.nbytes)
            image.tensor.zero_()
            if way == "blocks":
                for block in source.blocks(image):
                    block.run()
            else:
                staging = allocate_host(STAGING_BYTES)
                for piece in source.pieces():
                    part = image.tensor[piece.offset : piece.offset + piece.image_bytes]
                    part.copy_(piece.load(staging))
            spans = {p.name: slice(p.offset, p.offset + p.nbytes) for p in layout.placements}
            images.append({name: image.tensor[span] for name, span in spans.items()})
        files.close()
    for name, expected in images[0].items():
        assert all(torch.equal(image[name], expected) for image in images[1:]), name
        assert expected.any() or "bias" in name


@given(
    st.sampled_from([4, 8]),
    st.sampled_from(["BF16", "F16", "F32"]),
    st.integers(0, 2**31),
    st.sampled_from([1e-30, 1e-4, 1.0, 1e4]),
)
@settings(max_examples=60, deadline=None)
def test_codes_are_the_nearest_and_scales_are_of_the_largest(bits, dtype, seed, size):
    """By numbers in fp64: a code is as near as any, and the largest number has the outermost."""
    dice = np.random.default_rng(seed)
    numbers = (dice.normal(size=(3, 2 * GROUP)) * size).astype(np.float32)
    numbers[0, :GROUP] = 0
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    numbers = torch.from_numpy(numbers).clamp(-6e4, 6e4).to(kind)
    numbers = numbers_of(numbers.view(torch.uint8).numpy().reshape(-1), dtype).reshape(3, -1)
    packed, stored = rounded(numbers, bits, dtype)
    scales = torch.from_numpy(stored.copy()).view(kind).double().reshape(3, 2, 1).numpy()
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    half = 2 ** (bits - 1)
    groups, codes = numbers.astype(np.float64).reshape(3, 2, GROUP), codes.astype(float) - half
    codes = codes.reshape(groups.shape)
    steps = np.where(scales == 0, 1, np.abs(scales))
    error = np.abs(codes * scales - groups)
    inside = (codes < half - 1) & (codes > -half)
    assert (error <= steps / 2 * (1 + 1e-6))[inside & (scales != 0)].all()
    assert (codes[0, 0] == 0).all() and (np.signbit(scales[0, 0]) == 0).all()
    if size > 1e-20 and dtype != "F16":
        largest = np.abs(groups) == np.abs(groups).max(axis=2, keepdims=True)  # may be two
        assert (largest & (codes == -half)).any(axis=2)[1:].all()
        assert np.abs(error).max() <= np.abs(groups).max() / half * 1.01


def test_weights_that_are_no_numbers_are_not_rounded(folders, tmp_path):
    source = folders()[Wire.RAW]
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 1] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    words = "holds weights that are NaN, infinite or too large"
    with pytest.raises(CheckpointError, match=words), engine_for(tmp_path, wire=Wire.INT4):
        pass
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=words):
        write_rounded(wired(open_checkpoint(tmp_path), Wire.INT4), tmp_path / "out", print)
    assert not list((tmp_path / "out").iterdir())


def test_files_are_not_rounded_in_each_pass(folders):
    options = {"wire": Wire.INT4, "resident_layers": 1}
    for home in (HomeKind.AUTO, HomeKind.DISK):
        with (
            pytest.raises(PlanError, match="2 of them .*--home host .*pack --wire int4"),
            engine_for(folders()[Wire.RAW], home=home, **options),
        ):
            pass


def test_what_cannot_be_rounded_is_refused(folders, make_tiny):
    with pytest.raises(ConfigError, match="--wire int8 .*are quantised .compressed-tensors"):
        wired(open_checkpoint(folders()[Wire.INT4]), Wire.INT8)
    with pytest.raises(ConfigError, match="is of experts"):
        wired(open_checkpoint(make_tiny("mixtral")), Wire.INT4)
    narrow = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2}
    narrow |= {"num_key_value_heads": 1, "head_dim": 12}
    with pytest.raises(ConfigError, match="multiple of that"):
        wired(open_checkpoint(make_tiny("llama", **narrow)), Wire.INT4)
    plain = open_checkpoint(folders()[Wire.RAW])
    assert wired(plain, Wire.RAW) is plain


def test_the_command_line_says_what_is_rounded(tiny_model, tmp_path, offload_run):
    """`pack --wire`, then the same answer from there; and the names in plans and answers."""
    place = ("--device", "cpu", "--device-memory", "512MiB")
    asked = (*place, "-p", "the quick", "-n", 8, "--draft", "none", "--json", "--wire", "int8")
    answer = offload_run("generate", tiny_model, *asked)
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert facts["wire"] == "int8" and facts["plan"]["name"].endswith("rounded to int8")
    folder = tmp_path / "rounded"
    done = offload_run("pack", tiny_model, "--wire", "int8", "-o", folder, "--json")
    assert done.code == 0, done.err
    sizes = json.loads(done.out)
    assert sizes["packed_bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert sizes["packed_bytes"] < sizes["original_bytes"]
    other = offload_run("generate", folder, *asked[:-2], "--resident-layers", 0)
    assert other.code == 0, other.err
    assert json.loads(other.out)["token_ids"] == facts["token_ids"]
    planned = offload_run("plan", tiny_model, *place, "--wire", "int4")
    assert "rounded to int4 by request (--wire)" in planned.out
    record = json.loads(offload_run("plan", tiny_model, *place, "--wire", "int4", "--json").out)
    sizes = record["quantised"]
    assert sizes["rounded"] == record["wire"] == "int4"
    assert sizes["wire_bytes"] * 8 == pytest.approx(sizes["weights"] * 5)  # fp32: scales of 32 bits
    assert sizes["file_bytes"] == 4 * sizes["weights"]


def test_plans_know_the_bytes_from_config_json_alone(tiny_model, folders, tmp_path, offload_run):
    """Sizes of `simulate` are those of the files, and a 4-bit layer takes fewer seconds."""
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    alone, there = (
        wired(make(folder), Wire.INT4)
        for make, folder in ((outline_checkpoint, tmp_path), (open_checkpoint, tiny_model))
    )
    for ours, theirs in zip(alone.layers, there.layers, strict=True):
        assert sum(e.nbytes for e in ours) == sum(e.nbytes for e in theirs)
    asked = ("simulate", tmp_path, "--profile", "rtx4090-pcie4x16", "--json")
    asked += ("--resident-layers", 0)
    raw, rounded_ = (
        json.loads(offload_run(*asked, "--wire", wire).out) for wire in ("raw", "int4")
    )
    assert raw["wire"] == "raw" and rounded_["wire"] == "int4"
    embedding = alone.embedding.nbytes  # which is there as it is
    assert rounded_["host_bytes"] - embedding < (raw["host_bytes"] - embedding) / 4
    assert RuntimeConfig().wire is Wire.AUTO
