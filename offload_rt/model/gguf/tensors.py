"""The tensors of a model in GGUF files, named as transformers names them."""

import json
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.model.files import FileIdentity, read_part, shown
from offload_rt.model.formats.methods import BLOCKS, Form, block_bits
from offload_rt.model.formats.stored import Stored, StoredTensors
from offload_rt.model.gguf import ENDING
from offload_rt.model.gguf.container import GgufHeader, GgufTensor, Value, read_gguf
from offload_rt.model.gguf.network import ARCHITECTURE, Family, family_of, names_of
from offload_rt.model.header import TensorExtent, read_header

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"
_FILES_LIMIT = 1000
_TENSOR_LIMIT = 2**18  # as safetensors files have at most
_HEADS = {
    "q_proj": "attention.head_count",
    "k_proj": "attention.head_count_kv",
}
_ROWS = "shared_expert_gate.weight"  # matrices of one row, which files have as vectors
NORMS = "offload_rt_norms.safetensors"
_ALIGNMENT = 64
_PLAIN_BITS = {"F32": 32, "F16": 16, "BF16": 16}


def files_of(name: str) -> tuple[str, list[str]]:
    """The model that a file is of, and the names of all of its files.

    Raises:
        CheckpointError: it is of more files than are accepted.
    """
    match = _SPLIT.fullmatch(name)
    if match is None:
        return name.removesuffix(ENDING), [name]
    count, stem = int(match["count"]), match["stem"]
    if not 1 <= int(match["number"]) <= count <= _FILES_LIMIT:
        raise CheckpointError(
            f"{shown(name)} is named as file {int(match['number'])} of {count}, accepted are up to "
            f"{_FILES_LIMIT}"
        )
    return stem, [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def read_files(
    folder: Path, names: Sequence[str], wanted: Sequence[str] = ()
) -> tuple[GgufHeader, list[GgufHeader]]:
    """The header of the first file, which describes the model, and those of all.

    Args:
        folder: the files are in.
        names: of all files of the model, in order.
        wanted: what long arrays and texts of the first are kept.

    Raises:
        CheckpointError: a file is missing or damaged, or is not of these.
    """
    headers = [read_gguf(folder, name, () if i else wanted) for i, name in enumerate(names)]
    first = headers[0]
    for number, header in enumerate(headers):
        path, facts = header.identity.path, header.metadata
        count, place = facts.get(_COUNT, 1), facts.get(_NUMBER, 0)
        if count in (0, 1) and len(names) == 1:
            continue
        if (count, place) != (len(names), number):
            raise CheckpointError(
                f"{path} says that it is file {shown(place)} of {shown(count)}, counted from 0, "
                f"its name {number} of {len(names)}: names were changed, give the files as they "
                "were"
            )
    found = [tensor.name for header in headers for tensor in header.tensors]
    if len(set(found)) < len(found):
        counts = Counter(found)
        twice = next(name for name in found if counts[name] > 1)
        raise CheckpointError(
            f"{first.identity.path}: tensor {shown(twice)} is in two files: download them again"
        )
    promised = first.metadata.get(_TENSORS, len(found))
    if promised != len(found):
        raise CheckpointError(
            f"{first.identity.path} promises {shown(promised)} tensors in all files, they have "
            f"{len(found)}: they are not of one model, download them again"
        )
    return first, headers


def open_tensors(
    folder: Path, names: Sequence[str]
) -> tuple[dict[str, TensorExtent], dict[Path, FileIdentity], StoredTensors]:
    """Where the tensors lie, as a checkpoint has them.

    Args:
        folder: the files are in.
        names: of all files of the model, in order.

    Raises:
        CheckpointError: a file is missing or damaged, or holds another network than is read.
    """
    first, headers = read_files(folder, names)
    family = family_of(first.metadata)
    if family is None:
        raise CheckpointError(f"{first.identity.path} was another file: give it again")
    tensors, by_part = dict[str, TensorExtent](), dict[str, Stored]()
    for header in headers:
        for tensor in header.tensors:
            found = names_of(tensor.path, family, tensor)
            if len(tensors) + len(found) > _TENSOR_LIMIT:
                raise CheckpointError(
                    f"{tensor.path} has matrices of more than {_TENSOR_LIMIT} experts: not "
                    "supported"
                )
            for name, each in zip(found, _parts(tensor, len(found)), strict=True):
                if name in tensors:
                    raise CheckpointError(
                        f"{tensor.path}: {shown(tensor.name)} is there in two forms: the file is "
                        "damaged, download it again"
                    )
                tensors[name] = extent = _extent(each, name)
                heads = _heads(first.metadata, family, name, extent)
                if each.type.form is not None or heads:
                    by_part[name] = _stored(each, extent, heads)
    files = {header.identity.path: header.identity for header in headers}
    if family.raised:
        identity, norms = read_header(folder, NORMS)
        files[identity.path] = identity
        tensors |= {extent.name: extent for extent in norms}
    return tensors, files, StoredTensors(by_part, frozenset())


def norms_of(folder: Path, family: Family, tensors: Sequence[GgufTensor]) -> bytes | None:
    """A safetensors file of the norms as transformers has them; None: they are so in the files.

    Raises:
        CheckpointError: a norm is of another type than is known, or not to be read.
    """
    if not family.raised:
        return None
    import numpy as np  # first runs of such files only

    header, data = dict[str, object](), list[bytes]()
    at = 0
    for tensor in tensors:
        (name, *_) = names_of(tensor.path, family, tensor) or [""]
        if not name.endswith("norm.weight"):
            continue
        if tensor.type.dtype != "F32" or len(tensor.shape) != 1:
            raise CheckpointError(
                f"{tensor.path}: {shown(tensor.name)} is {tensor.type.name} {list(tensor.shape)}, "
                "a norm is a row of F32: take another conversion"
            )
        stored = read_part(folder, tensor.path.name, tensor.nbytes, tensor.offset)
        data.append((np.frombuffer(stored, "<f4") - np.float32(1)).tobytes())
        places = [at, at + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": places}
        at = places[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([struct.pack("<Q", len(text)), text, *data])


def _parts(tensor: GgufTensor, count: int) -> list[GgufTensor]:
    """A tensor, or the matrices of each expert in one of all.

    Raises:
        CheckpointError: it has other matrices than those.
    """
    if len(tensor.shape) != 3 or not count:
        return [tensor] * count
    if tensor.shape[0] != count:
        raise CheckpointError(
            f"{tensor.path}: {shown(tensor.name)} has three dimensions, here a matrix has two: the "
            "file is damaged, download it again"
        )
    nbytes = tensor.nbytes // count
    return [
        replace(
            tensor, shape=tensor.shape[1:], offset=tensor.offset + number * nbytes, nbytes=nbytes
        )
        for number in range(count)
    ]


def _extent(tensor: GgufTensor, name: str) -> TensorExtent:
    """The bytes of a tensor; those of blocks are U8 [O, bytes of a row]."""
    code, shape = tensor.type.dtype, tensor.shape
    if name.endswith(_ROWS) and len(shape) == 1:
        shape = (1, *shape)
    if code is None:
        code, shape = "U8", (*shape[:-1], tensor.nbytes // max(1, shape[0]))
    return TensorExtent(
        name=name,
        dtype=code,
        shape=shape,
        path=tensor.path,
        offset=tensor.offset,
        nbytes=tensor.nbytes,
    )


def _heads(metadata: Mapping[str, Value], family: Family, name: str, extent: TensorExtent) -> int:
    """Of a weight whose rows come in pairs; 0: they are in order.

    Raises:
        CheckpointError: its rows are no whole heads.
    """
    key = _HEADS.get(name.rpartition(".")[0].rpartition(".")[2])
    if key is None or not family.paired:
        return 0
    architecture = metadata[ARCHITECTURE]
    heads = metadata.get(
        f"{architecture}.{key}", metadata.get(f"{architecture}.{_HEADS['q_proj']}")
    )
    rows = extent.shape[0]
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise CheckpointError(
            f"{extent.path}: {name} has {rows} rows, which are not those of {shown(heads)} heads: "
            "the file is damaged, download it again"
        )
    return heads


def _stored(tensor: GgufTensor, extent: TensorExtent, heads: int) -> Stored:
    form = tensor.type.form or Form.PAIRED
    if len(tensor.shape) != 2:
        raise CheckpointError(
            f"{extent.path}: {extent.name} has {len(tensor.shape)} dimensions, a matrix has two: "
            "the file is damaged, download it again"
        )
    outputs, inputs = tensor.shape
    numbers = BLOCKS[form][0] if form in BLOCKS else inputs
    return Stored(
        module=extent.name.removesuffix(".weight"),
        form=form,
        outputs=outputs,
        inputs=inputs,
        bits=_PLAIN_BITS[extent.dtype] if form is Form.PAIRED else block_bits(form),
        groups=inputs // numbers,
        parts={"weight": extent},
        heads=heads,
    )
