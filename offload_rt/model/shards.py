"""Find the weight files of a model folder and read their headers: one file, or shards by index."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.model.files import FileIdentity, read_json_object, shown
from offload_rt.model.header import TensorExtent, read_header
from offload_rt.model.kinds import weights_note
from offload_rt.model.locate import how_to_complete
from offload_rt.model.packed_files import MANIFEST, read_manifest, read_packed_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_INDEX_LIMIT_BYTES = 64 * 2**20  # DeepSeek-V3, 91,000 tensors, has 9 MB
_TENSOR_LIMIT = 2**18
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_weights(folder: Path) -> dict[str, str]:
    """Find the safetensors files of a model folder.

    The index's `total_size` is not read: nothing depends on it, sizes come from the headers.

    Returns:
        The file of every tensor as the index says; empty for a single file without index.

    Raises:
        CheckpointError: no weights in safetensors format, or a bad or incomplete index.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} does not exist: give a model folder") from error
    except NotADirectoryError as error:
        raise CheckpointError(
            f"{folder} is a file: give the model folder that holds config.json and *.safetensors"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    if MANIFEST in names:
        _refuse_beside_packed(folder, names)
        return _read_index(folder, missing_too=True) if INDEX in names else {}
    if INDEX in names:
        index = _read_index(folder)
        if SINGLE in names and set(index.values()) != {SINGLE}:
            raise CheckpointError(
                f"{folder} holds both {SINGLE} and {INDEX} for {len(set(index.values()))} other "
                "files: remove the one that is not the model"
            )
        return index
    if SINGLE in names:
        return {}
    complete = how_to_complete(folder) if "config.json" in names else "give a model folder"
    raise CheckpointError(f"{folder} {_why_no_weights(names, complete, weights_note(folder))}")


def _refuse_beside_packed(folder: Path, names: list[str]) -> None:
    stems = [each.stem for each in read_manifest(folder)]
    if beside := [stem for stem in stems if f"{stem}.safetensors" in names]:
        raise CheckpointError(
            f"{folder} holds both {MANIFEST} and {beside[0]}.safetensors: remove what is not the "
            "model"
        )


def _why_no_weights(names: list[str], complete: str, note: str) -> str:
    weights = [name for name in names if name.endswith(".safetensors")]
    if "adapter_model.safetensors" in weights:
        return "is an adapter (adapter_model.safetensors): give the model it is for, and --adapter"
    if weights:
        return (
            f"holds {len(weights)} .safetensors files ({shown(weights[0])}) but neither {SINGLE} "
            f"nor {INDEX}, so files are missing: {complete}"
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return (
            f"holds its weights as pickles ({shown(pickles[0])}, {len(pickles)} files), which can "
            "run code and are never opened: convert them to safetensors, for example at "
            "https://huggingface.co/spaces/safetensors/convert"
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return (
            f"holds its weights as GGUF ({shown(gguf[0])}){note}: give that file instead of the "
            "folder"
        )
    return f"holds no weights ({len(names)} files, none .safetensors): {complete}"


def _read_index(folder: Path, *, missing_too: bool = False) -> dict[str, str]:
    path = folder / INDEX
    raw = read_json_object(folder, INDEX, _INDEX_LIMIT_BYTES)
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} has a weight_map of {shown(weight_map)} instead of file names by tensor name"
        )
    if len(weight_map) > _TENSOR_LIMIT:
        raise CheckpointError(
            f"{path} lists {len(weight_map)} tensors, accepted is up to {_TENSOR_LIMIT}"
        )
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{path} puts tensor {shown(tensor)} into {shown(shard)}, accepted is a plain file "
                "name NAME.safetensors in the same folder"
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.lexists(folder / shard)]
    if missing and not missing_too:
        raise CheckpointError(
            f"{folder / missing[0]} is missing, {len(missing)} of the {len(shards)} files of the "
            f"model are: {how_to_complete(folder)}"
        )
    return weight_map


def read_shards(
    folder: Path, index: dict[str, str]
) -> tuple[dict[str, TensorExtent], dict[Path, FileIdentity]]:
    """Read the headers of all files that `find_weights` found.

    Raises:
        CheckpointError: a damaged file, a tensor in two files, or files that are not those of the
            index.
    """
    tensors: dict[str, TensorExtent] = {}
    files: dict[Path, FileIdentity] = {}
    for identity, extents in _headers(folder, index):
        files[identity.path] = identity
        for extent in extents:
            if extent.name in tensors:
                raise CheckpointError(
                    f"tensor {shown(extent.name)} is in two files, {tensors[extent.name].path} "
                    f"and {extent.path}: download the model again"
                )
            tensors[extent.name] = extent
    if index:
        _check_index(folder, index, tensors)
    return tensors, files


def _headers(
    folder: Path, index: dict[str, str]
) -> Iterator[tuple[FileIdentity, tuple[TensorExtent, ...]]]:
    """Of each file what it was, and its tensors."""
    if os.path.lexists(folder / MANIFEST):
        for packed in sorted(read_manifest(folder), key=lambda each: each.stem):
            identity, _, _, extents = read_packed_header(folder, packed)
            yield identity, extents
        return
    for shard in sorted(set(index.values())) or [SINGLE]:
        yield read_header(folder, shard)


def _check_index(folder: Path, index: dict[str, str], tensors: Mapping[str, TensorExtent]) -> None:
    path = folder / INDEX
    absent = [
        name
        for name, shard in index.items()
        if name not in tensors or tensors[name].path.stem != shard.removesuffix(".safetensors")
    ]
    if absent:
        raise CheckpointError(
            f"{path} lists {shown(absent[0])} in {index[absent[0]]}, which does not hold it "
            f"({len(absent)} of {len(index)} tensors): index and files are not of one download"
        )
    extra = [name for name in tensors if name not in index]
    if extra:
        raise CheckpointError(
            f"{tensors[extra[0]].path} holds {shown(extra[0])}, which {INDEX} does not list "
            f"({len(extra)} tensors): index and files are not of one download"
        )
