"""`offload-run pack` and `unpack`: bf16 weights in fewer bits and back, or rounded to 8 or 4."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from offload_rt.cli import options
from offload_rt.cli.console import Console, quiet_libraries
from offload_rt.cli.held import held
from offload_rt.cli.interrupts import Interrupts
from offload_rt.cli.options import Output
from offload_rt.config import Wire
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint, open_checkpoint, resolve_model
from offload_rt.model.formats.methods import CODED_BITS
from offload_rt.model.packed_files import NAMED, code_name, refuse_packed
from offload_rt.model.packer import (
    Packed,
    Poll,
    bytes_to_pack,
    bytes_to_unpack,
    check_packable,
    pack,
    unpack,
)
from offload_rt.model.rounded_files import write_rounded
from offload_rt.model.wire import BITS, wired
from offload_rt.printable import printable
from offload_rt.units import format_size
from offload_rt.writing import make_folder, sweep

_LOSSLESS = "lossless"
_BITS = code_name(CODED_BITS)
Write = Callable[[Checkpoint, Path, Poll], Packed]
_output = click.option(
    "-o", "--output", "folder", required=True, metavar="FOLDER", help="A new or empty folder."
)


@click.command("pack")
@click.argument("model")
@_output
@click.option(
    "--wire",
    type=click.Choice([_LOSSLESS, *map(str, BITS)]),
    default=_LOSSLESS,
    show_default=True,
    help="Form of the weights of layers: bf16 in fewer bits without loss, or rounded to 8 or 4, "
    "which makes another model.",
)
@click.option(
    "--bits",
    type=click.Choice([*NAMED]),
    default=None,
    show_default=_BITS,
    help="Of a weight, without loss: 12 are decoded with the fewest instructions, 10.75 are for "
    "GPUs, where bytes on the link are what a pass waits for.",
)
@options.json_option
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
@click.pass_obj
def pack_verb(  # noqa: PLR0913 - as click calls it
    interrupts: Interrupts,
    model: str,
    folder: str,
    wire: str,
    bits: str | None,
    json: bool,
    quiet: bool,
) -> int:
    """Pack the bf16 weights of MODEL in 12 bits, without loss; or round them to 8 or 4.

    Every verb takes the folder this makes as MODEL, streams a quarter fewer bytes (a third with
    --bits 10.75, which a CPU takes much longer to decode), and answers bit for bit the same.
    `unpack` gives the very same files back, SHA-256 checked.

    With --wire int8 or int4 it is a compressed-tensors folder of rounded weights instead, 53 or 28%
    of the bytes in groups of 32 inputs. It answers bit for bit as the same --wire of other verbs
    does, and can be streamed from the disk.
    """
    output = Output(json=json, quiet=quiet)
    quiet_libraries(output)
    checkpoint = open_checkpoint(resolve_model(model))
    write: Write = partial(pack, bits=NAMED[bits or _BITS])
    label, what = f"packing {checkpoint.name}", "packed"
    if wire == _LOSSLESS:
        check_packable(checkpoint)
    elif bits is not None:
        raise ConfigError(f"--bits has no effect with --wire {wire}: leave one of them out")
    else:
        checkpoint = wired(checkpoint, Wire(wire))
        refuse_packed(checkpoint.folder, "and rounding reads plain files")
        write, label, what = write_rounded, f"rounding {checkpoint.name}", "rounded"
    with _writing(folder, label, bytes_to_pack(checkpoint), output, interrupts) as (place, poll):
        done = write(checkpoint, place, poll)
    _show(done, Path(folder), output, what)
    return 0


@click.command("unpack")
@click.argument("model")
@_output
@options.json_option
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
@click.pass_obj
def unpack_verb(interrupts: Interrupts, model: str, folder: str, json: bool, quiet: bool) -> int:
    """Write the safetensors files that a packed MODEL was made from.

    They are the same byte for byte, which their SHA-256 is compared for; else none are left.
    """
    output = Output(json=json, quiet=quiet)
    quiet_libraries(output)
    source = resolve_model(model)
    label = f"unpacking {source.name}"
    total = bytes_to_unpack(source)
    with _writing(folder, label, total, output, interrupts) as (place, poll):
        done = unpack(source, place, poll)
    _show(done, Path(folder), output, "unpacked")
    return 0


@contextmanager
def _writing(
    folder: str, label: str, total: int, output: Output, interrupts: Interrupts
) -> Iterator[tuple[Path, Poll]]:
    """An empty folder that nobody else writes in, and a bar; made now, it goes if the body fails.

    Raises:
        ConfigError: there is something in it.
    """
    path = Path(folder)
    was_there = path.exists()
    make_folder(path)
    done = 0

    def poll(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        interrupts.check()

    try:
        with held(path, "--output"):
            sweep(path)
            if inside := sorted(entry.name for entry in path.iterdir()):
                raise ConfigError(
                    f"{path} is not empty ({inside[0]}): give a new folder with --output"
                )
            with Console(output).progress(label) as gauge:
                gauge.total, gauge.done = total, lambda: done
                yield path, poll
    except BaseException:
        if not was_there:
            with suppress(OSError):
                path.rmdir()
        raise


def _show(done: Packed, folder: Path, output: Output, what: str) -> None:
    if output.json:
        record: dict[str, Any] = {
            "output": str(folder),
            "files": done.files,
            "original_bytes": done.original_bytes,
            "packed_bytes": done.packed_bytes,
        }
        click.echo(json.dumps(record))
        return
    sizes = [format_size(size) for size in (done.original_bytes, done.packed_bytes)]
    if what == "unpacked":
        sizes.reverse()
    share = done.packed_bytes / done.original_bytes
    click.echo(
        f"{what} {sizes[0]} to {sizes[1]} ({share:.1%} of the original): {printable(str(folder))}"
    )
