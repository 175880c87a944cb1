"""`offload-run profile`: measure this machine, or show a profile."""

import os
from dataclasses import replace
from pathlib import Path

import click

from offload_rt.cli import options
from offload_rt.cli.console import Console, quiet_libraries
from offload_rt.cli.options import Output
from offload_rt.cli.profile_table import profile_table
from offload_rt.device.kinds import KINDS
from offload_rt.device.system import cores, wait_asleep
from offload_rt.errors import ConfigError
from offload_rt.profiling.codec import encode
from offload_rt.profiling.effort import Effort
from offload_rt.profiling.identity import find_changes
from offload_rt.profiling.profile import HardwareProfile
from offload_rt.profiling.store import (
    BUSY,
    find_profile,
    load_profile,
    machine_name,
    save_profile,
    user_folder,
)
from offload_rt.writing import check_target, writing

EFFORT = Effort()  # what is measured; tests put a small one here

_DEVICES = ("auto", *sorted(map(str, KINDS)))


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    show_default="profiles/HOST.json in ~/.local/share/offload-rt",
    help="File to write, ending in .json; its name is the profile's name.",
)
@click.option(
    "--device",
    type=click.Choice(_DEVICES),
    default=None,
    show_default=_DEVICES[0],
    help="cuda measures every GPU and the CPU, cpu the CPU only; auto is cuda where there is one.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=None,
    show_default="the largest model in the local caches, else $TMPDIR or /var/tmp",
    help="The disk to measure. A folder with safetensors files has these read; elsewhere 1 GiB is "
    "written for a moment.",
)
@click.option(
    "--show",
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[NAME]",
    help="Measure nothing; print the profile of that name, or a file's; without NAME this "
    "machine's, and what has changed since.",
)
@options.json_option
@options.output_options
def profile(
    output: Path | None,
    device: str | None,
    folder: Path | None,
    show: str | None,
    **values: bool,
) -> int:
    """Measure this machine and keep the numbers in a profile.

    Links, disk, host memory, layers and attention, in one to two minutes; end other work first. A
    profile is looked for by name in the user's folder (it is written there unless --output says
    otherwise) and among those that come with this package.
    """
    printed = Output(**values)
    if show is not None:
        given = {"--output": output, "--device": device, "--folder": folder}
        _refuse_unused([name for name, value in given.items() if value is not None])
        return _show(show, printed)
    path = output or user_folder() / f"{machine_name()}.json"
    _check_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    check_target(path)
    console = Console(printed)
    if (load := os.getloadavg()[0]) > cores():
        console.note(
            f"{BUSY} (load average {load:.1f} on {cores()} cores): measuring takes longer, and is "
            "worth more when the machine is quiet"
        )
    made = _measure(path.stem, device or _DEVICES[0], folder, printed)
    save_profile(made, path)
    _print(made, printed)
    for note in made.notes:
        if note.startswith(BUSY):
            console.note(note)
    console.note(f"written to {path}")
    return 0


def _refuse_unused(names: list[str]) -> None:
    if names:
        raise ConfigError(f"{names[0]} has no effect with --show, which measures nothing: drop one")


def _check_name(path: Path) -> None:
    if path.suffix != ".json" or not path.stem.isprintable():
        raise ConfigError(f"--output {str(path)!r} must be a file name that ends in .json")


def _show(name: str, printed: Output) -> int:
    shown = load_profile(find_profile(name or machine_name()))
    _print(shown, printed)
    console = Console(printed)
    for change in [] if name else find_changes(shown):
        console.note(f"{change}: measure again with `offload-run profile`")
    return 0


def _measure(name: str, device: str, folder: Path | None, printed: Output) -> HardwareProfile:
    from offload_rt.profiling.neighbours import is_idle

    quiet_libraries(printed)
    idle = is_idle()
    if not idle:
        wait_asleep()
    with Console(printed).progress("measuring") as gauge:
        from offload_rt.profiling.measure import measure

        def report(done: int, total: int, what: str) -> None:
            gauge.done, gauge.total, gauge.detail = lambda: done, total, lambda: what

        return measure(
            name, device=device, folder=folder, effort=replace(EFFORT, idle=idle), report=report
        )


def _print(shown: HardwareProfile, printed: Output) -> None:
    click.echo(encode(shown) if printed.json else profile_table(shown), nl=not printed.json)
