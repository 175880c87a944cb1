"""Model files as untrusted input: the 34 hand-made files of safetensors, indexes, links, fuzz."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_rt.errors import CheckpointError
from offload_rt.model import header, shards
from offload_rt.model.checkpoint import (
    Checkpoint,
    FileIdentity,
    demo_folder,
    open_checkpoint,
    resolve_model,
)
from offload_rt.model.files import read_part
from offload_rt.model.header import read_header

LAYERS, HIDDEN, VOCAB = 3, 8, 16
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "intermediate_size": 12,
    "tie_word_embeddings": False,
}
SHAPES = {
    "model.embed_tokens.weight": [VOCAB, HIDDEN],
    "lm_head.weight": [VOCAB, HIDDEN],
    "model.norm.weight": [HIDDEN],
} | {
    f"model.layers.{i}.{name}": shape
    for i in range(LAYERS)
    for name, shape in (("norm.weight", [HIDDEN]), ("mlp.up_proj.weight", [12, HIDDEN]))
}

_listeners: list[list[str]] = []


def _on_audit(event, args):
    for seen in _listeners:
        if event in ("open", "socket.connect", "import"):
            seen.append(f"{event} {args[0]}")


sys.addaudithook(_on_audit)  # cannot be taken away again, so it has listeners


@pytest.fixture
def opened():
    """Every file opened, module imported and connection made during the test."""
    seen: list[str] = []
    _listeners.append(seen)
    yield seen
    _listeners.remove(seen)


def entries(shapes, dtype="BF16", size=2):
    fields, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = size
        for n in shape:
            nbytes *= n
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    return fields, offset


def raw_file(fields, data: bytes, length: int | None = None) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def weights(shapes=SHAPES, dtype="BF16", size=2, fill: bytes = b"\1") -> bytes:
    fields, nbytes = entries(shapes, dtype, size)
    return raw_file(fields, fill * nbytes)


def make_model(folder: Path, config=None, shapes=SHAPES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (folder / SINGLE).write_bytes(weights(shapes))
    return folder


def make_sharded(folder: Path) -> tuple[Path, dict[str, str]]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = list(SHAPES)
    weight_map = {}
    for i, part in enumerate((names[:3], names[3:6], names[6:]), start=1):
        shard = f"model-0000{i}-of-00003.safetensors"
        (folder / shard).write_bytes(weights({name: SHAPES[name] for name in part}))
        weight_map |= dict.fromkeys(part, shard)
    write_index(folder, weight_map)
    return folder, weight_map


def write_index(folder: Path, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def error_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in message
    assert len(message) < 800
    return message


# --- what a good folder gives ------------------------------------------------------------------


def check_good(checkpoint: Checkpoint) -> None:
    assert set(checkpoint.tensors) == set(SHAPES)
    assert len(checkpoint.layers) == LAYERS
    for i, layer in enumerate(checkpoint.layers):
        assert {e.name for e in layer} == {n for n in SHAPES if n.startswith(f"model.layers.{i}.")}
        assert [(e.path, e.offset) for e in layer] == sorted((e.path, e.offset) for e in layer)
        assert checkpoint.layer_bytes(i) == 2 * (HIDDEN + 12 * HIDDEN)
    others_bytes = sum(extent.nbytes for extent in checkpoint.others)
    assert others_bytes == 2 * (2 * VOCAB * HIDDEN + HIDDEN)
    in_layers = sum(checkpoint.layer_bytes(i) for i in range(LAYERS))
    assert checkpoint.total_bytes == in_layers + others_bytes
    assert checkpoint.embedding.name == "model.embed_tokens.weight"
    assert checkpoint.head is not None
    assert checkpoint.head.name == "lm_head.weight"


def test_single_file(tmp_path):
    checkpoint = open_checkpoint(make_model(tmp_path))
    check_good(checkpoint)
    path = tmp_path / SINGLE
    assert checkpoint.files == {path: FileIdentity.of(path, path.stat())}


def test_shards(tmp_path):
    checkpoint = open_checkpoint(make_sharded(tmp_path)[0])
    check_good(checkpoint)
    assert len(checkpoint.files) == 3


def test_identity_tells_a_changed_file(tmp_path):
    checkpoint = open_checkpoint(make_model(tmp_path))
    path = tmp_path / SINGLE
    before = checkpoint.files[path]
    os.truncate(path, 100)
    assert FileIdentity.of(path, path.stat()) != before


def test_bytes_are_those_safetensors_reads(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    make_model(tmp_path)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    data = (tmp_path / SINGLE).read_bytes()
    for name, tensor in load_file(tmp_path / SINGLE).items():
        extent = checkpoint.tensors[name]
        assert tuple(tensor.shape) == extent.shape
        stored = data[extent.offset : extent.offset + extent.nbytes]
        assert stored == tensor.view(torch.uint8).numpy().tobytes()


def test_family_names(tmp_path):
    shapes = {"wte.weight": [VOCAB, HIDDEN], "wpe.weight": [64, HIDDEN], "ln_f.weight": [HIDDEN]}
    shapes |= {f"h.{i}.ln_{j}.weight": [HIDDEN] for i in range(LAYERS) for j in (1, 2)}
    config = {"model_type": "gpt2", "tie_word_embeddings": True}
    checkpoint = open_checkpoint(make_model(tmp_path, config, shapes))
    assert [len(layer) for layer in checkpoint.layers] == [2, 2, 2]
    assert (checkpoint.embedding.name, checkpoint.head) == ("wte.weight", None)


def test_tied_copy_is_counted_once(tmp_path):
    checkpoint = open_checkpoint(make_model(tmp_path, {"tie_word_embeddings": True}))
    assert checkpoint.head is None
    assert [extent.name for extent in checkpoint.left_out] == ["lm_head.weight"]
    assert "lm_head.weight" not in checkpoint.tensors
    assert "lm_head.weight" not in {e.name for e in checkpoint.others}
    assert checkpoint.total_bytes == sum(e.nbytes for e in checkpoint.tensors.values())
    others_bytes = sum(extent.nbytes for extent in checkpoint.others)
    assert others_bytes == 2 * (VOCAB * HIDDEN + HIDDEN)


def test_head_that_differs_is_used_though_config_ties(tmp_path, caplog):
    make_model(tmp_path, {"tie_word_embeddings": True})
    (head,) = open_checkpoint(tmp_path).left_out
    with (tmp_path / SINGLE).open("r+b") as file:
        file.seek(head.offset)
        file.write(b"\7")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.head, checkpoint.left_out) == (head, ())
    assert "lm_head.weight' differs from the embedding" in caplog.text


def test_only_headers_of_a_large_model_are_read(tmp_path, monkeypatch):
    layers, hidden, vocab = 80, 8192, 128_256
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden]}
    shapes |= {
        f"model.layers.{i}.mlp.experts.{j}.up_proj.weight": [hidden, hidden]
        for i in range(layers)
        for j in range(12)
    }
    config = {"num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": vocab}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
    fields, nbytes = entries(shapes)
    text = raw_file(fields, b"")
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(text)
        file.truncate(len(text) + nbytes)  # a sparse file
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: read.append(pread(*a)) or read[-1])
    assert open_checkpoint(tmp_path).total_bytes == nbytes > 120 * 2**30
    assert sum(map(len, read)) < 2**20


def test_heavy_libraries_are_not_imported():
    code = (
        "import sys, offload_rt.model.checkpoint as c\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'transformers', 'pickle', 'mmap'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- D01, D02: one bad file --------------------------------------------------------------------

GOOD, GOOD_BYTES = entries(SHAPES)
DATA = b"\1" * GOOD_BYTES
NORM = "model.norm.weight"


def changed(**fields) -> bytes:
    return raw_file(GOOD | {NORM: GOOD[NORM] | fields}, DATA)


def without_first() -> bytes:
    return raw_file({k: v for k, v in GOOD.items() if k != "model.embed_tokens.weight"}, DATA)


def twice() -> bytes:
    text = json.dumps(GOOD)
    entry = json.dumps(GOOD[NORM])
    return raw_file(f'{text[:-1]}, "{NORM}": {entry}}}'.encode(), DATA)


BEGIN, END = GOOD[NORM]["data_offsets"]
BAD_FILES = {
    "empty": (b"", "has 0 bytes"),
    "seven bytes": (b"\1" * 7, "has 7 bytes"),
    "length 0": (struct.pack("<Q", 0) + b"abcdefgh", "starts with b'a'"),
    "zeros": (bytes(4096), "starts with zeros: its download of 4.00 KiB is not complete"),
    "length 2^64-1": (raw_file(GOOD, DATA, 2**64 - 1), "18446744073709551615 bytes, accepted is"),
    "length over limit": (raw_file(GOOD, DATA, 100_000_001), "100000001 bytes, accepted is up to"),
    "length past end": (raw_file(GOOD, DATA, 99_999_999), "its header alone needs 100000007"),
    "bad UTF-8": (raw_file(b'{"\xff": 1}', b""), "not valid JSON ('utf-8'"),
    "bad JSON": (raw_file(b'{"a": }', b""), "not valid JSON (Expecting value"),
    "array": (raw_file(b"[1, 2, 3]", b""), "starts with b'['"),
    "space first": (raw_file(b" {}", b""), "starts with b' '"),
    "NaN": (raw_file(b'{"a": NaN}', b""), "NaN is not a number"),
    "huge number": (raw_file(b'{"a": 1e999}', b""), "'1e999' is too large"),
    "nested": (raw_file(b'{"a": ' + b"[" * 100_000, b""), "nested too deeply"),
    "truncated": (raw_file(GOOD, DATA[:-10]), "10 B are missing"),
    "tail": (raw_file(GOOD, DATA + b"tail!"), "5 bytes belong to no tensor"),
    "hole at start": (without_first(), f"{2 * VOCAB * HIDDEN} bytes before its first tensor"),
    "hole": (
        raw_file({k: v for k, v in GOOD.items() if k != NORM}, DATA),
        "leave a hole of 16 bytes",
    ),
    "overlap": (changed(data_offsets=[BEGIN - 4, END - 4]), "overlap by 4 bytes"),
    "begin over end": (changed(data_offsets=[END, BEGIN]), f"data_offsets of [{END}, {BEGIN}]"),
    "past end": (
        changed(data_offsets=[10**12, 10**12 + 16]),
        "(931 GiB are missing)",
    ),
    "negative offset": (changed(data_offsets=[-16, 0]), "data_offsets of [-16, 0]"),
    "one offset": (changed(data_offsets=[0]), "data_offsets of [0]"),
    "boolean offset": (changed(data_offsets=[False, 16]), "data_offsets of [False, 16]"),
    "shape mismatch": (changed(shape=[HIDDEN + 1]), "18 bytes, but its data_offsets span 16"),
    "shape overflow": (changed(shape=[2**62, 2**62, 8]), "but its data_offsets span 16"),
    "dimension overflow": (changed(shape=[2**64]), "shape of [18446744073709551616]"),
    "negative shape": (changed(shape=[-1, -8]), "shape of [-1, -8]"),
    "float shape": (changed(shape=[8.0]), "shape of [8.0]"),
    "text shape": (changed(shape="8"), "shape of '8'"),
    "dimensions": (changed(shape=[1] * 10_000), "shape of a list of 10000"),
    "unknown dtype": (changed(dtype="BF17"), "has dtype 'BF17', known are"),
    "dtype list": (changed(dtype=["BF16"]), "has dtype a list of 1"),
    "quantized": (weights(dtype="F8_E4M3", size=1), "no quantization_config that says so"),
    "unknown key": (changed(strides=[1]), "described by 'dtype', 'shape', 'data_offsets', 'strid"),
    "entry a list": (raw_file(GOOD | {NORM: [1]}, DATA), "is described by a list of 1"),
    "metadata number": (raw_file(GOOD | {"__metadata__": {"a": 1}}, DATA), "__metadata__ that is"),
    "twice": (twice(), f"the name '{NORM}' appears twice"),
    "no name": (raw_file(GOOD | {"": GOOD[NORM]}, DATA), "a name of 0 characters"),
    "HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
    "HTML 2": (b"\n<html><head></head></html>", "is a web page"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run `git lfs pull`"),
    "pickle": (b"\x80\x04\x95" + b"\1" * 100, "looks like a pickle"),
    "zip": (b"PK\x03\x04" + b"\1" * 100, "is a zip archive"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\1" * 100, "is a GGUF file"),
    "JSON": (b'{"error": "Repository not found"}', "is JSON text"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path, case):
    data, expected = BAD_FILES[case]
    make_model(tmp_path)
    (tmp_path / SINGLE).write_bytes(data)
    message = error_of(tmp_path)
    assert expected in message
    assert SINGLE in message


def test_names_and_values_that_are_only_odd(tmp_path):
    make_model(tmp_path, shapes=SHAPES | {"../../etc/passwd": [2], "empty": [0, 8], "scalar": []})
    checkpoint = open_checkpoint(tmp_path)
    sizes = {extent.name: extent.nbytes for extent in checkpoint.left_out}
    assert sizes == {"../../etc/passwd": 4, "empty": 0, "scalar": 2}


def test_header_length_that_looks_like_a_pickle_is_read(tmp_path):
    make_model(tmp_path)
    text = json.dumps(GOOD).encode().ljust(0x0480)
    assert raw_file(text, DATA)[:2] == b"\x80\x04"
    (tmp_path / SINGLE).write_bytes(raw_file(text, DATA))
    assert open_checkpoint(tmp_path).total_bytes == GOOD_BYTES


def test_number_of_tensors_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "_TENSOR_LIMIT", 8)
    assert "lists 9 tensors, accepted is up to 8" in error_of(make_model(tmp_path))


def test_number_of_values_is_bounded(tmp_path):
    make_model(tmp_path)
    (tmp_path / SINGLE).write_bytes(raw_file(b'{"a": [' + b"[]," * 2**21 + b"[]]}", b""))
    assert "holds 4194307 values, accepted is up to 4194304" in error_of(tmp_path)


def test_metadata_null_or_text_is_accepted(tmp_path):
    make_model(tmp_path)
    for metadata in (None, {}, {"format": "pt"}):
        (tmp_path / SINGLE).write_bytes(raw_file({"__metadata__": metadata} | GOOD, DATA))
        assert "__metadata__" not in open_checkpoint(tmp_path).tensors


# --- layers, embedding, head -------------------------------------------------------------------


def renamed(old: str, new: str | None, shape=None) -> dict:
    shapes = {k: v for k, v in SHAPES.items() if not k.startswith(old)}
    return shapes if new is None else shapes | {new: shape or SHAPES[old]}


EMBED = "model.embed_tokens.weight"
BAD_TENSORS = {
    "more layers in config": (
        {"num_hidden_layers": 5},
        SHAPES,
        ["config.json says 5 layers, the files have 3", "missing are 3, 4"],
    ),
    "a layer missing": ({}, renamed("model.layers.1.", None), ["have 2", "missing are 1)"]),
    "many layers missing": ({"num_hidden_layers": 99}, SHAPES, ["3, 4, 5, 6, 7 and more"]),
    "no layers": (
        {},
        {EMBED: [VOCAB, HIDDEN], "lm_head.weight": [VOCAB, HIDDEN]},
        ["says 3 layers, but no tensor is named like model.layers.0.x"],
    ),
    "two networks": (
        {},
        SHAPES
        | {"other.embed_tokens.weight": [VOCAB, HIDDEN]}
        | {f"other.layers.{i}.w": [2] for i in range(LAYERS)},
        ["2 groups of tensors", "'model.layers'", "'other.layers'"],
    ),
    "vocabulary": ({"vocab_size": 17}, SHAPES, ["shape [16, 8]", "vocab_size 17", EMBED]),
    "hidden size": ({"hidden_size": 16}, SHAPES, ["shape [16, 8]", "hidden_size 16"]),
    "embedding 1-D": ({}, renamed(EMBED, EMBED, [128]), ["shape [128]"]),
    "no embedding": ({}, renamed(EMBED, "model.other"), ["has no token embedding"]),
    "two embeddings": (
        {},
        SHAPES | {"model.model.embed_tokens.weight": [VOCAB, HIDDEN]},
        ["has 2 token embeddings", "'model.model.embed_tokens.weight'"],
    ),
    "no head": (
        {},
        renamed("lm_head.weight", None),
        ["has no head", "tie_word_embeddings is false"],
    ),
    "head shape": (
        {},
        renamed("lm_head.weight", "lm_head.weight", [8, 8]),
        ["'lm_head.weight', has shape [8, 8]", "vocab_size 16"],
    ),
    "two heads": (
        {},
        SHAPES | {"embed_out.weight": [VOCAB, HIDDEN]},
        ["has 2 heads", "'embed_out.weight'"],
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_the_config(tmp_path, case):
    config, shapes, expected = BAD_TENSORS[case]
    message = error_of(make_model(tmp_path, config, shapes))
    for part in expected:
        assert part in message


# --- D04: index --------------------------------------------------------------------------------

SHARD = "model-00002-of-00003.safetensors"
HOSTILE_NAMES = [
    "../secret.safetensors",
    "/etc/passwd",
    "/tmp/x.safetensors",
    "C:\\x.safetensors",
    "sub/x.safetensors",
    "x\0.safetensors",
    "x.safetensors\n",
    "x.bin",
    ".safetensors/..",
    "",
    7,
    None,
    ["x.safetensors"],
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_shard_names(tmp_path, name, opened):
    folder, weight_map = make_sharded(tmp_path / "model")
    write_index(folder, weight_map | {NORM: name})
    (tmp_path / "secret.safetensors").write_bytes(weights({NORM: [HIDDEN]}))
    opened.clear()
    message = error_of(folder)
    assert "accepted is a plain file name" in message
    assert NORM in message
    assert opened == [f"open {folder / INDEX}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty (0 bytes)"),
        ("[]", "holds a list of 0 instead of a JSON object"),
        ("{}", "weight_map of None"),
        ('{"weight_map": {}}', "weight_map of an object of 0"),
        ('{"weight_map": [1]}', "weight_map of a list of 1"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ("<!DOCTYPE html>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1", "run `git lfs pull`"),
    ],
)
def test_bad_index(tmp_path, text, expected):
    folder, _ = make_sharded(tmp_path)
    (folder / INDEX).write_text(text)
    message = error_of(folder)
    assert expected in message
    assert INDEX in message


def test_index_size_is_bounded(tmp_path):
    folder, _ = make_sharded(tmp_path)
    os.truncate(folder / INDEX, 2**40)  # sparse
    assert "has 1.00 TiB, accepted is up to 64.0 MiB" in error_of(folder)


def test_index_of_100k_entries(tmp_path, monkeypatch):
    folder, weight_map = make_sharded(tmp_path)
    write_index(folder, weight_map | {f"t{i}": f"{i}.safetensors" for i in range(100_000)})
    assert "is missing, 100000 of the 100003 files" in error_of(folder)
    monkeypatch.setattr(shards, "_TENSOR_LIMIT", 8)
    write_index(folder, weight_map)
    assert "lists 9 tensors, accepted is up to 8" in error_of(folder)


def test_missing_shard(tmp_path):
    folder, _ = make_sharded(tmp_path)
    (folder / SHARD).unlink()
    message = error_of(folder)
    assert f"{SHARD} is missing, 1 of the 3 files" in message


def test_tensor_listed_but_absent(tmp_path):
    folder, weight_map = make_sharded(tmp_path)
    write_index(folder, weight_map | {"ghost": SHARD})
    message = error_of(folder)
    assert f"lists 'ghost' in {SHARD}, which does not hold it (1 of 10 tensors)" in message


def test_tensor_listed_in_another_shard(tmp_path):
    folder, weight_map = make_sharded(tmp_path)
    assert weight_map[NORM] != SHARD
    write_index(folder, weight_map | {NORM: SHARD})
    assert f"lists '{NORM}' in {SHARD}, which does not hold it" in error_of(folder)


def test_tensor_in_two_shards(tmp_path):
    folder, weight_map = make_sharded(tmp_path)
    held = [name for name, shard in weight_map.items() if shard == SHARD]
    (folder / SHARD).write_bytes(weights({name: SHAPES[name] for name in [*held, NORM]}))
    message = error_of(folder)
    assert f"tensor '{NORM}' is in two files" in message
    assert SHARD in message


def test_tensor_not_listed(tmp_path):
    folder, weight_map = make_sharded(tmp_path)
    held = [name for name, shard in weight_map.items() if shard == SHARD]
    (folder / SHARD).write_bytes(weights({n: SHAPES[n] for n in held} | {"extra": [2]}))
    message = error_of(folder)
    assert f"{SHARD} holds 'extra', which {INDEX} does not list (1 tensors)" in message


def test_index_and_single_file(tmp_path):
    folder, _ = make_sharded(tmp_path)
    (folder / SINGLE).write_bytes(weights())
    assert f"holds both {SINGLE} and {INDEX} for 3 other files" in error_of(folder)
    write_index(folder, dict.fromkeys(SHAPES, SINGLE))
    check_good(open_checkpoint(folder))


# --- D04: links and things that are not files --------------------------------------------------


def replace_by_link(folder: Path, target: Path | str) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(target)


def make_kind(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("fifo", "is not a regular file"),
        ("directory", "is not a regular file"),
        ("loop", "cannot be read: Too many levels"),
        ("device", "leads out of the model folder, to /dev/zero"),
    ],
)
def test_not_a_file(tmp_path, name, kind, expected):
    folder, _ = make_sharded(tmp_path)
    make_kind(folder / name, kind)
    message = error_of(folder)
    assert expected in message
    assert name in message


def test_a_link_to_a_file_that_ends_otherwise_is_not_opened(tmp_path, opened):
    folder, _ = make_sharded(tmp_path / "model")
    (folder / "config.json").rename(tmp_path / "id_rsa")
    (folder / "config.json").symlink_to(tmp_path / "id_rsa")
    opened.clear()
    assert f"leads out of the model folder, to {tmp_path / 'id_rsa'}" in error_of(folder)
    outside = [x for x in opened if x.startswith("open") and str(folder) not in x]
    assert outside == []


def test_weights_linked_to_something_else_show_nothing_of_it(tmp_path):
    folder, _ = make_sharded(tmp_path / "model")
    (tmp_path / "id_rsa").write_text("-----BEGIN KEY-----\nsecret\n" * 99)
    replace_by_link(folder, tmp_path / "id_rsa")
    message = error_of(folder)
    assert SHARD in message and "secret" not in message and "BEGIN" not in message


def test_link_within_the_folder_is_fine(tmp_path):
    folder, _ = make_sharded(tmp_path)
    (folder / SHARD).rename(folder / "renamed")
    (folder / SHARD).symlink_to("renamed")
    check_good(open_checkpoint(folder))


def test_broken_link(tmp_path):
    folder, _ = make_sharded(tmp_path)
    replace_by_link(folder, "gone")
    assert f"{SHARD} is a link to a file that is gone" in error_of(folder)


def test_model_folder_may_be_a_link(tmp_path):
    make_sharded(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    check_good(open_checkpoint(tmp_path / "link"))


COMMIT = "a" * 40


def make_cache(cache: Path, repo: str = "models--org--name", commit: str = COMMIT) -> Path:
    """The layout of huggingface_hub: snapshots of links into blobs."""
    repository = cache / repo
    blobs, snapshot = repository / "blobs", repository / "snapshots" / commit
    blobs.mkdir(parents=True)
    make_sharded(snapshot)
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / f"{i:064x}")
        file.symlink_to(f"../../blobs/{i:064x}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def test_hub_cache_links_work(tmp_path):
    check_good(open_checkpoint(make_cache(tmp_path)))


def test_links_into_blobs_of_another_repository(tmp_path):
    snapshot = make_cache(tmp_path)
    make_cache(tmp_path, "models--org--other")
    blobs = tmp_path / "models--org--other" / "blobs"
    (blobs / "id_rsa").touch()
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(f"../../../models--org--other/blobs/{2:064x}")
    check_good(open_checkpoint(snapshot))
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(blobs.rename(blobs.parent / "keys") / f"{2:064x}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../models--org--other/keys/id_rsa")
    assert "leads out of the model folder" in error_of(snapshot)


# --- folders without weights -------------------------------------------------------------------


class Marker:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_and_not_run(tmp_path, name, opened):
    import pickle

    folder = make_model(tmp_path / "model")
    payload = pickle.dumps(Marker(tmp_path / "marker"))
    (folder / name).write_bytes(payload)
    (folder / SINGLE).rename(tmp_path / SINGLE)
    opened.clear()
    message = error_of(folder)
    assert f"pickles ('{name}', 1 files)" in message
    assert "safetensors/convert" in message
    (folder / SINGLE).write_bytes(payload)  # the same under the accepted name
    assert "looks like a pickle" in error_of(folder)
    assert not (tmp_path / "marker").exists()
    assert not [x for x in opened if name in x]
    pickle.loads(payload)  # noqa: S301  # the payload would have worked
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model-Q4.gguf"], "weights as GGUF ('model-Q4.gguf')"),
        (["adapter_model.safetensors"], "is an adapter"),
        (["a.safetensors", "b.safetensors"], "holds 2 .safetensors files ('a.safetensors')"),
        ([], "holds no weights (1 files"),
    ],
)
def test_folder_without_weights(tmp_path, names, expected):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF")
    assert expected in error_of(tmp_path)


def test_no_folder(tmp_path):
    assert f"{tmp_path / 'none'} does not exist" in error_of(tmp_path / "none")
    file = tmp_path / "model.gguf"
    file.touch()
    assert f"{file} is a file: give the model folder" in error_of(file)


def test_missing_config(tmp_path):
    (make_model(tmp_path) / "config.json").unlink()
    assert "config.json is missing" in error_of(tmp_path)


@pytest.mark.parametrize("call", ["open", "pread", "listdir", "stat"])
def test_refusals_of_the_system_are_named(tmp_path, monkeypatch, call):
    make_model(tmp_path)
    with monkeypatch.context() as patch:

        def refuse(*_args, **_kwargs):
            raise PermissionError(13, "Permission denied")

        patch.setattr(os, call, refuse)
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied") as caught:
            open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_file_cut_while_its_header_is_read(tmp_path, monkeypatch):
    make_model(tmp_path)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, o: b"" if o == 64 else pread(fd, min(n, 56), o))
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        open_checkpoint(tmp_path)


def test_a_file_that_ends_before_what_is_read_of_it_is_named(tmp_path):
    (tmp_path / "part").write_bytes(bytes(range(10)))
    assert read_part(tmp_path, "part", 4, 6) == bytes([6, 7, 8, 9])
    with pytest.raises(CheckpointError, match="part became shorter while it was read: start again"):
        read_part(tmp_path, "part", 5, 6)


# --- D10: fuzz ---------------------------------------------------------------------------------

FUZZ = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def rewrite(path: Path, data: bytes) -> None:
    """Write a file anew; to cut one that is there takes 1 ms on ext4."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def only_checkpoint_errors(folder: Path) -> None:
    try:
        _, extents = read_header(folder, SINGLE)
    except CheckpointError:
        return
    position = min((e.offset for e in extents), default=0)
    for extent in extents:
        assert extent.offset == position
        position += extent.nbytes
    assert not extents or position == (folder / SINGLE).stat().st_size


@FUZZ
@given(data=st.binary(max_size=200))
def test_fuzz_bytes(tmp_path, data):
    rewrite(tmp_path / SINGLE, data)
    only_checkpoint_errors(tmp_path)
    rewrite(tmp_path / SINGLE, raw_file(b"{" + data, b""))
    only_checkpoint_errors(tmp_path)


@FUZZ
@given(at=st.integers(0, 2000), new=st.binary(max_size=4), cut=st.integers(0, 4))
def test_fuzz_changed_bytes(tmp_path, at, new, cut):
    data = weights()
    rewrite(tmp_path / SINGLE, data[:at] + new + data[at + cut :])
    only_checkpoint_errors(tmp_path)


@FUZZ
@given(key=st.sampled_from(["dtype", "shape", "data_offsets", "other"]), value=JSON)
def test_fuzz_entries(tmp_path, key, value):
    rewrite(tmp_path / SINGLE, changed(**{key: value}))
    only_checkpoint_errors(tmp_path)


@FUZZ
@given(weight_map=JSON, name=st.sampled_from([INDEX, "config.json"]))
def test_fuzz_json_files(tmp_path, weight_map, name):
    folder = tmp_path / "model"
    if not folder.exists():
        make_sharded(folder)
    text = {"weight_map": weight_map} if name == INDEX else weight_map
    was = (folder / name).read_bytes()
    rewrite(folder / name, json.dumps(text).encode())
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    rewrite(folder / name, was)


# --- finding the folder ------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ("HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OFFLOAD_RT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_resolve_folder(tmp_path, cache):
    folder = make_model(tmp_path / "org" / "name")
    make_cache(cache)
    assert resolve_model(str(folder)) == folder
    assert resolve_model("org/name") == Path("org/name")  # a folder wins over the cache


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}", "@refs/pr/1"])
def test_resolve_hub_id(cache, revision):
    snapshot = make_cache(cache)
    ref = cache / "models--org--name" / "refs" / "refs" / "pr" / "1"
    ref.parent.mkdir(parents=True)
    ref.write_text(COMMIT + "\n")
    assert resolve_model(f"org/name{revision}") == snapshot
    check_good(open_checkpoint(resolve_model(f"org/name{revision}")))


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_resolve_follows_the_cache_variables(tmp_path, cache, monkeypatch, variable, below):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / "other"))
    snapshot = make_cache(tmp_path / "other" / below)
    assert resolve_model("org/name") == snapshot


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("org/none", "download it with `hf download org/none`"),
        ("org/name@none", "`hf download org/name --revision none`"),
        ("org/name@../../x", "does not exist"),
        ("../x", "does not exist"),
        ("~no-such-user/x", "does not exist"),
        ("/no/such/folder", "'/no/such/folder' does not exist"),
        ("", "is not a model"),
        ("a\0b", "is not a model"),
        ("demo", "run `bash tools/demo.sh`"),
    ],
)
def test_resolve_refuses(tmp_path, cache, monkeypatch, spec, expected):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "empty"))
    make_cache(cache)
    with pytest.raises(CheckpointError) as caught:
        resolve_model(spec)
    assert expected in str(caught.value)


def test_ref_that_leads_elsewhere(tmp_path, cache):
    make_cache(cache)
    make_model(tmp_path / "elsewhere")
    for text in ("../../../elsewhere", "..", "", "a" * 1000, "\xff"):
        (cache / "models--org--name" / "refs" / "main").write_text(text)
        with pytest.raises(CheckpointError, match="has no complete snapshot"):
            resolve_model("org/name")


def test_demo(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "assets"))
    assert demo_folder() == tmp_path / "assets" / "models" / "smollm2-135m-instruct"
    make_model(demo_folder())
    assert resolve_model("demo") == demo_folder()
    monkeypatch.delenv("OFFLOAD_RT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_folder() == tmp_path / "offload-rt" / "models" / "smollm2-135m-instruct"
