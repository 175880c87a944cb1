"""Profile files: where they are looked for, how they are read, and how they are replaced."""

import os
import platform
import re
import stat
import sysconfig
from contextlib import suppress
from pathlib import Path

from offload_rt.errors import ProfileError
from offload_rt.profiling.codec import MalformedError, decode, encode
from offload_rt.profiling.profile import HardwareProfile
from offload_rt.reading import without_mark
from offload_rt.writing import make_folder, write_text

BUSY = "other work was running"  # how the note begins that a profile then carries

_LARGEST_BYTES = 2**20  # a measured one has about 30 KiB
_SUFFIX = ".json"


def machine_name() -> str:
    """The name this machine's profile has if nobody says otherwise: that of the host."""
    name = re.sub(r"[^a-z0-9._-]+", "-", platform.node().lower()).strip(".-")
    return name or "this-machine"


def user_folder() -> Path:
    """Where measured profiles go: under $XDG_DATA_HOME or ~/.local/share."""
    import platformdirs

    return platformdirs.user_data_path("offload-rt") / "profiles"


def search_folders() -> tuple[Path, ...]:
    """Where a profile is looked for by name, first match wins.

    The user's folder, then those that come with this package: next to it in a source tree, under
    `share` of the environment where it is installed. Not the working folder: whoever made that
    could put other numbers under a name that plans rest on. A path is taken as it is.
    """
    return (user_folder(), *shipped_folders())


def shipped_folders() -> tuple[Path, Path]:
    """Where those that come with this package are: in a source tree, or installed."""
    source_tree = Path(__file__).resolve().parents[2] / "profiles"  # workers have a link to it
    installed = Path(sysconfig.get_path("data"), "share", "offload-rt", "profiles")
    return source_tree, installed


def list_profiles() -> dict[str, Path]:
    """All names that can be asked for, and the file of each."""
    found: dict[str, Path] = {}
    for folder in search_folders():
        with suppress(OSError):
            for path in sorted(folder.glob(f"*{_SUFFIX}")):
                found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def find_profile(name: str) -> Path:
    """The file of a profile given by name or by path (with a slash, or ending in `.json`).

    Raises:
        ProfileError: there is none; the message lists the names there are.
    """
    if "/" in name or name.endswith(_SUFFIX):
        return Path(name)
    known = list_profiles()
    if name not in known:
        names = ", ".join(known) or "none"
        here = Path("profiles", f"{name}{_SUFFIX}")
        path = f"its path, {here}" if here.is_file() else "the path of a file"
        raise ProfileError(
            f"there is no profile {name!r} (there are: {names}): make this machine's with "
            f"`offload-run profile`, or give {path}"
        )
    return known[name]


def load_profile(path: Path) -> HardwareProfile:
    """Read a profile.

    Raises:
        ProfileError: the file cannot be read, or is no profile this version knows.
    """
    try:
        return decode(_read_text(path))
    except MalformedError as error:
        raise ProfileError(
            f"{path} is not a usable profile: {error}; make a new one with "
            f"`offload-run profile --output {path}`"
        ) from error


def save_profile(profile: HardwareProfile, path: Path) -> None:
    """Write a profile so that whatever happens the file is the old or the new one, whole.

    Raises:
        ProfileError: the profile would not be read again.
        ConfigError: the file cannot be written.
    """
    text = encode(profile)
    try:
        decode(text)
    except MalformedError as error:
        raise ProfileError(
            f"{path} is not written, what was measured cannot be right: {error}; "
            "measure again with `offload-run profile` when the machine is quiet"
        ) from error
    make_folder(path.parent)
    write_text(path, text)


def _read_text(path: Path) -> str:
    try:
        # Not blocking: a pipe of that name would wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ProfileError(
            f"profile {path} cannot be read ({reason}): give the name or the path of a profile, or "
            "make one with `offload-run profile`"
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise MalformedError("it is not a file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            data = file.read(_LARGEST_BYTES + 1)
    finally:
        os.close(handle)
    if len(data) > _LARGEST_BYTES:
        raise MalformedError(f"it has more than the {_LARGEST_BYTES} bytes a profile may have")
    try:
        return without_mark(data).decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"it is not text ({error.reason} at byte {error.start})") from error
