"""What a model is, told in a few numbers: files of the same names with other weights are others.

All bytes of a model are many GiB, so of its tensors samples are read: 4 KiB from the middle of
each, of 4,096 of them at most (16 MiB). Training, merging, rounding and quantising change numbers
everywhere in the tensors that they change. A change of a few numbers elsewhere is not seen. Dates
and places of files are not looked at: a copy is the same model.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.files import open_inside
from offload_rt.model.header import TensorExtent

_SAMPLES = 4096  # tensors that are looked into
_SAMPLE_BYTES = 4096  # of each


def digest_of(checkpoint: Checkpoint) -> str:
    """Of the configuration, and of names, kinds, sizes and samples of all tensors: SHA-256, hex.

    Raises:
        CheckpointError: a file cannot be read.
    """
    extents = dict.fromkeys(checkpoint.in_files(extent) for extent in checkpoint.tensors.values())
    return digest_of_tensors(repr((checkpoint.config, checkpoint.rounded)), extents)


def digest_of_tensors(said: str, extents: Iterable[TensorExtent]) -> str:
    """The same of tensors, and of what is said about them.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found = hashlib.sha256(said.encode())
    named = sorted(extents, key=lambda extent: extent.name)
    for extent in named:
        what = (extent.name, extent.dtype, extent.shape, extent.file_bytes)
        found.update(repr(what).encode())
    files = defaultdict(list)
    for extent in named[:: -(-len(named) // _SAMPLES) or 1]:
        files[extent.path].append(extent)
    read: dict[str, bytes] = {}
    for path, inside in files.items():
        with open_inside(path.parent, path.name) as file:
            for extent in inside:
                skipped = max(0, extent.file_bytes - _SAMPLE_BYTES) // 2
                count = min(extent.file_bytes, _SAMPLE_BYTES)
                read[extent.name] = file.read(count, extent.offset + skipped)
    for _, sample in sorted(read.items()):  # files may share tensors out in another way
        found.update(sample)
    return found.hexdigest()
