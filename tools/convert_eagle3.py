"""Write an EAGLE-3 head that comes as a PyTorch file in the form that runs load.

Usage: python tools/convert_eagle3.py HEAD FOLDER

HEAD is a folder with `config.json` and `pytorch_model.bin`, or a hub id in the local cache. The
file is read without unpickling it (`medusa_pickles.py`). FOLDER, which must be new or empty, gets
`config.json` as it is and `model.safetensors` with all tensors but the copy of the embedding and
the map from tokens to rows, which runs leave out. Exit codes are those of `offload-run`.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from medusa_pickles import open_pickled
from safetensors.torch import save_file

from offload_rt.errors import CheckpointError, ConfigError, OffloadError
from offload_rt.model.checkpoint import resolve_model
from offload_rt.model.files import open_inside, shown
from offload_rt.printable import printable
from offload_rt.speculative.eagle3.checkpoint import PICKLED, UNUSED
from offload_rt.speculative.medusa.storage import DTYPES
from offload_rt.units import format_size
from offload_rt.writing import replacing, writing

_CONFIG, _WEIGHTS, _CONFIG_LIMIT_BYTES = "config.json", "model.safetensors", 2**22


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a head that runs need.

    Raises:
        CheckpointError: the file is damaged, holds something else, or claims more than it has.
    """
    with open_pickled(folder, PICKLED) as file:
        wanted = {n: t for n, t in file.tensors.items() if not n.endswith(UNUSED)}
        if sum(tensor.nbytes for tensor in wanted.values()) > file.identity.size:
            raise CheckpointError(
                f"{folder / PICKLED}: some tensors share their bytes: get another"
            )
        found = {}
        for name, tensor in wanted.items():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{folder / PICKLED}: {shown(name)} is {tensor.dtype}, accepted are "
                    f"{', '.join(DTYPES)}"
                )
            data = torch.frombuffer(bytearray(file.read(name)), dtype=DTYPES[tensor.dtype])
            found[name] = data.view(tensor.shape)
    return found


def convert(source: Path, folder: Path) -> Path:
    """Write a head; returns the file of its tensors.

    Raises:
        ConfigError: the folder already has files of a model.
        CheckpointError: the head cannot be read.
    """
    if taken := [name for name in (_CONFIG, _WEIGHTS) if os.path.lexists(folder / name)]:
        raise ConfigError(
            f"{folder / taken[0]} is already there: give a folder that is new or empty"
        )
    tensors = read_tensors(source)
    with open_inside(source, _CONFIG) as file:
        config = file.read(min(file.identity.size, _CONFIG_LIMIT_BYTES), 0)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / _WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        (folder / _CONFIG).write_bytes(config)
    return folder / _WEIGHTS


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("head")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        path = convert(resolve_model(options.head), options.folder)
    except OffloadError as error:
        print(f"convert_eagle3: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{printable(str(path))} ({format_size(path.stat().st_size)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
