"""`tools/convert_medusa.py`: heads in every layout that is about, read, written, refused."""

import io
import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from medusa_heads import (
    by_formula,
    computed,
    random_heads,
    write_own,
    write_pickled,
    write_shared,
    write_vllm,
)
from safetensors.torch import load_file, save_file

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.speculative.medusa.checkpoint import open_heads
from offload_rt.speculative.medusa.names import LmHead
from offload_rt.speculative.medusa.storage import Layout, read_output_head

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from convert_medusa import convert, open_pickles, pickled_files, read_any, with_output_head
from medusa_pickles import PickledTensor, _Machine, _UnknownError

SIZE, ROWS = 64, 300


@pytest.fixture(scope="module")
def hidden():
    return torch.randn(5, SIZE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model_head():
    return torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(4)) / 8


# --- reading -------------------------------------------------------------------------------------


def make_layouts(tmp_path, tensors, *, own):
    """The same heads in every layout that holds them."""
    yield "v0.1", write_pickled(tmp_path / "v0.1", tensors)
    prefixed = {f"medusa_head.{name}": tensor for name, tensor in tensors.items()}
    full = {"model.embed_tokens.weight": torch.ones(ROWS, SIZE)} | prefixed
    for name in ("v1.0", "v1.0-pickled"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(full, tmp_path / "v1.0" / "model.safetensors")
    yield "v1.0", tmp_path / "v1.0"
    names = sorted(full)
    shards = {"pytorch_model-1-of-2.bin": names[:4], "pytorch_model-2-of-2.bin": names[4:]}
    for shard, held in shards.items():
        torch.save({name: full[name] for name in held}, tmp_path / "v1.0-pickled" / shard)
    index = {name: shard for shard, held in shards.items() for name in held}
    text = json.dumps({"weight_map": index})
    (tmp_path / "v1.0-pickled" / "pytorch_model.bin.index.json").write_text(text)
    yield "v1.0-pickled", tmp_path / "v1.0-pickled"
    folder = tmp_path / "safetensors"  # version 2, and TGI
    folder.mkdir()
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    yield "safetensors", folder
    if own:
        yield "vllm", write_vllm(tmp_path / "vllm", tensors)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_every_layout_gives_the_same_heads(tmp_path, hidden, model_head, own, bias, layers):
    tensors = random_heads(heads=5, own=own, bias=bias, layers=layers)
    expected = by_formula(tensors, hidden, model_head)
    seen = []
    for name, folder in make_layouts(tmp_path, tensors, own=own):
        source = read_any(folder)
        assert (source.shape.heads, source.shape.bias) == (5, bias), name
        found = computed(source, hidden, None if own else model_head)
        assert torch.allclose(found, expected, atol=1e-5), name
        assert bool(pickled_files(folder)) == (name in ("v0.1", "v1.0-pickled"))
        seen.append(name)
    assert len(seen) == 4 + own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_bits(tmp_path, dtype):
    tensors = {name: t.to(dtype) for name, t in random_heads(own=True).items()}
    read = read_any(write_pickled(tmp_path, tensors)).tensors
    assert torch.equal(read["blocks.1.0.linear.bias"], tensors["1.0.linear.bias"])
    assert torch.equal(read["lm_heads.2.weight"], tensors["2.1.weight"])


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["tgi", "vllm"])
def test_heads_with_output_heads_survive_a_round_trip(tmp_path, hidden, layout, bias):
    tensors = random_heads(own=True, bias=bias)
    source = read_any(write_pickled(tmp_path / "from", tensors))
    convert(source, tmp_path / "to", Layout(layout))
    back = read_any(tmp_path / "to")
    assert torch.allclose(computed(back, hidden), by_formula(tensors, hidden), atol=1e-5)
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    stored = load_file(next((tmp_path / "to").glob("*.safetensors")))
    if layout == "tgi":
        assert config["medusa_num_heads"] == 3 and config["base_model_name_or_path"] == "tiny"
        assert stored["0.0.linear.bias"].any() == bias  # TGI needs one: zeros where there was none
        assert set(stored) == set(random_heads(own=True))
    else:
        assert config["medusa_fc_bias"] is bias and config["num_heads"] == 3
        assert ("blocks.0.layers.0.bias" in stored) == bias
        assert torch.equal(stored["lm_heads.2.weight"], tensors["2.1.weight"])


@pytest.mark.parametrize("layout", ["shared", "tgi"])
def test_heads_without_output_heads_survive_a_round_trip(tmp_path, hidden, model_head, layout):
    tensors = random_heads()
    source = read_any(write_shared(tmp_path / "from"))
    convert(source, tmp_path / "to", Layout(layout))
    stored = load_file(tmp_path / "to" / "medusa_lm_head.safetensors")
    assert set(stored) == set(tensors) and all(torch.equal(stored[n], tensors[n]) for n in stored)
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert (config.get("version") == "2") == (layout == "shared")
    found = computed(read_any(tmp_path / "to"), hidden, model_head)
    assert torch.allclose(found, by_formula(tensors, hidden, model_head), atol=1e-5)


def test_the_models_head_is_stored_for_vllm(tmp_path, hidden, make_tiny):
    model = open_checkpoint(make_tiny("llama"))
    heads = read_any(write_shared(tmp_path / "from"))
    with pytest.raises(ConfigError, match="add --model"):
        convert(heads, tmp_path / "to", Layout.VLLM)
    output_head = load_file(model.folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(read_output_head(model), output_head)
    convert(with_output_head(heads, output_head), tmp_path / "to", Layout.VLLM)
    back = read_any(tmp_path / "to")
    assert back.shape.lm_head is LmHead.COMMON
    expected = by_formula(random_heads(), hidden, output_head)
    assert torch.allclose(computed(back, hidden), expected, atol=1e-5)
    # From there to TGI, which wants one for each head.
    convert(back, tmp_path / "tgi", Layout.TGI)
    last = read_any(tmp_path / "tgi")
    assert last.shape.lm_head is LmHead.OWN
    assert torch.allclose(computed(last, hidden), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="64 numbers, --model has 32"):
        with_output_head(heads, output_head[:, :32])


def test_the_first_output_head_can_serve_all(tmp_path, hidden):
    tensors = random_heads(own=True)
    source = read_any(write_vllm(tmp_path / "one", tensors, common=True))
    expected = by_formula(
        {n: t for n, t in tensors.items() if "linear" in n}, hidden, tensors["0.1.weight"]
    )
    assert torch.allclose(computed(source, hidden), expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="lacks 2 of the 9 tensors"):
        config = {"original_lm_head": False}
        read_any(write_vllm(tmp_path / "none", tensors, common=True, **config))


@pytest.mark.parametrize("cut", [True, False])
def test_a_truncated_vocabulary_survives_a_round_trip(tmp_path, hidden, cut):
    token_map = [7, 3, 299, 12]
    full = random_heads(own=True, bias=False)
    tensors = {n: t if "linear" in n or not cut else t[token_map].clone() for n, t in full.items()}
    source = read_any(write_vllm(tmp_path / "from", tensors, token_map=token_map))
    convert(source, tmp_path / "to", Layout.VLLM)
    back = open_heads(tmp_path / "to")
    assert (back.names.shape.head_rows, back.names.shape.truncated) == (4, True)
    expected = by_formula(full, hidden)[..., token_map]
    assert torch.allclose(computed(read_any(tmp_path / "to"), hidden), expected, atol=1e-5)
    for layout in ("tgi", "shared"):
        with pytest.raises(ConfigError, match="4 tokens by a token map"):
            convert(source, tmp_path / "no", Layout(layout))


def test_layouts_that_would_lose_something_are_refused(tmp_path):
    own = read_any(write_own(tmp_path / "own"))
    with pytest.raises(ConfigError, match=r"output heads of their own \(300 rows\)"):
        convert(own, tmp_path / "to", Layout.SHARED)
    deep = read_any(write_shared(tmp_path / "deep", layers=2))
    with pytest.raises(ConfigError, match="with 1 layer only, these have 2"):
        convert(deep, tmp_path / "to", Layout.TGI)
    assert not (tmp_path / "to").exists()


def test_nothing_is_overwritten(tmp_path):
    folder = write_own(tmp_path / "own")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ConfigError, match="is already there"):
        convert(read_any(folder), folder, Layout.VLLM)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        convert(read_any(folder), tmp_path / "file" / "x", Layout.TGI)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, bad):
    tensors = random_heads()
    tensors["1.0.linear.weight"][3, 5] = bad
    folder = write_pickled(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.0\.linear\.weight holds numbers that"):
        read_any(folder)


def test_a_truncated_file_is_refused(tmp_path):
    for folder in (
        write_own(tmp_path / "a"),
        write_pickled(tmp_path / "b", random_heads(own=True)),
    ):
        path = next(p for p in folder.iterdir() if p.name != "config.json")
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="100 B are missing|not an archive"):
            read_any(folder)


def test_folders_without_heads_are_refused(tmp_path, make_tiny):
    for opened in (open_heads, read_any):
        with pytest.raises(CheckpointError, match="expected medusa_lm_head.safetensors"):
            opened(tmp_path)
        with pytest.raises(CheckpointError, match="holds no Medusa heads"):
            opened(make_tiny("llama"))
        with pytest.raises(CheckpointError, match="does not exist"):
            opened(tmp_path / "missing")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "b.bin"}}')
    with pytest.raises(CheckpointError, match=r"lists no tensor medusa_head\."):
        read_any(tmp_path)
    index = {"weight_map": {"medusa_head.0.0.linear.weight": "../b.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file name"):
        read_any(tmp_path)


class Evil:
    """Would make a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    mark = tmp_path / "ran"
    folder = write_pickled(tmp_path / "evil", {"0.0.linear.weight": Evil(mark)})
    with pytest.raises(CheckpointError, match="asks to call '(io|_io|builtins).open'"):
        read_any(folder)
    assert not mark.exists()
    torch.load(folder / "medusa_lm_head.pt", weights_only=False)
    assert mark.exists()  # it would have


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "asks for|asks to call"),
        (lambda: [torch.ones(2, 2)], "asks for EMPTY_LIST"),
        (lambda: {"a": 1}, "something else than a dictionary of tensors"),
        (lambda: {}, "something else than a dictionary of tensors"),
        (lambda: torch.ones(2), "something else than a dictionary of tensors"),
        (lambda: {"a": torch.ones(3, 2).T}, "do not lie one after the other"),
        (lambda: {"a": torch.ones(2).expand(3, 2)}, "do not lie one after the other"),
        (lambda: {"a": torch.ones(2, dtype=torch.cfloat)}, "tensor of 'torch.ComplexFloatStorage'"),
        (lambda: {"a": torch.ones(2).to_sparse()}, "asks to call"),
        (
            lambda: {f"{i}.0.linear.weight": x for x in [torch.ones(99, 99)] for i in range(9)},
            "claim 352836 bytes of files that have 4.*some share theirs",
        ),
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path, made, message):
    folder = write_pickled(tmp_path, made())
    with pytest.raises(CheckpointError, match=message):
        read_any(folder)


def repacked(path, change, compression=zipfile.ZIP_STORED):
    """Write an archive again, each part as `change(name, bytes)` says."""
    with zipfile.ZipFile(path) as old:
        parts = [(i.filename, old.read(i)) for i in old.infolist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in parts:
            changed = change(name, data)
            if changed is not None:
                new.writestr(name, changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, d: d[:-4] if n.endswith("data/0") else d, "needs 1"),
        (lambda n, d: None if n.endswith("data/0") else d, "has no part"),
        (lambda n, d: None if n.endswith("data.pkl") else d, "0 of them data.pkl"),
        (lambda n, d: d[:-1] if n.endswith("data.pkl") else d, "as torch.save does"),
        (lambda n, d: d[:40] if n.endswith("data.pkl") else d, "as torch.save does"),
        (lambda n, d: b"big" if n.endswith("byteorder") else d, "big-endian"),
        (lambda n, d: b"." if n.endswith("data.pkl") else d, "as torch.save does"),
        (lambda n, d: b"\x80\x02u." if n.endswith("data.pkl") else d, "as torch.save does"),
        (lambda n, d: b"\x80\x02t." if n.endswith("data.pkl") else d, "as torch.save does"),
        (lambda n, d: b"\x80\x02h\x07." if n.endswith("data.pkl") else d, "as torch.save does"),
        (lambda n, d: bytes(9 * 2**20) if n.endswith("data.pkl") else d, "data.pkl of 9437184"),
    ],
)
def test_damaged_archives_are_refused(tmp_path, change, message):
    folder = write_pickled(tmp_path, {"0.0.linear.weight": torch.ones(64, 64)})
    repacked(folder / "medusa_lm_head.pt", change)
    with pytest.raises(CheckpointError, match=message):
        read_any(folder)


def test_compressed_parts_are_refused(tmp_path):
    """Nothing in a file may grow while it is read."""
    folder = write_pickled(tmp_path, {"0.0.linear.weight": torch.zeros(64, 64)})
    repacked(folder / "medusa_lm_head.pt", lambda n, d: d, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="stored as it is"):
        read_any(folder)


def test_a_flipped_bit_is_found(tmp_path):
    folder = write_pickled(tmp_path, random_heads(heads=1))
    path = folder / "medusa_lm_head.pt"
    source = open_pickles(folder, pickled_files(folder))
    data = bytearray(path.read_bytes())
    weight = random_heads(heads=1)["0.0.linear.weight"].numpy().tobytes()
    data[data.find(weight[:64]) + 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged at tensor"):
        source.read()


def test_files_that_are_no_archives_are_refused(tmp_path):
    path = write_pickled(tmp_path, random_heads()) / "medusa_lm_head.pt"
    old = io.BytesIO()
    torch.save(random_heads(), old, _use_new_zipfile_serialization=False)
    for data in (b"", b"<html>", pickle.dumps({}), old.getvalue(), struct.pack("<4s", b"PK\3\4")):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="not an archive as torch.save writes it"):
            read_any(tmp_path)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_description_is_refused_or_means_the_same_kind(program, data):
    """Whatever bytes change: tensors of these names and sizes, or one sentence; nothing else."""
    changed = bytearray(program)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = _Machine().run(bytes(changed))
    except _UnknownError as error:
        assert "\n" not in str(error)
    else:
        assert all(type(name) is str and type(t) is PickledTensor for name, t in found.items())


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = write_pickled(tmp_path_factory.mktemp("program"), random_heads(heads=2))
    with zipfile.ZipFile(folder / "medusa_lm_head.pt") as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
