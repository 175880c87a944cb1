"""Files this package writes: whole or as they were, never through a link, a sentence if it fails.

What is written first has a name nobody can guess and is its owner's alone, then it gets its own
name. Only plain files are replaced; a device, a pipe or an open file (`/dev/stdout`) is written to
as it is. No torch here.
"""

import errno
import os
import re
import resource
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from offload_rt.errors import ConfigError
from offload_rt.units import format_size

A_DAY_S = 86400.0
_OWNER_ONLY = 0o600
_PREFIX, _SUFFIX = ".offload-run-", ".tmp"
_LEFT_BEHIND = re.compile(rf"{re.escape(_PREFIX)}\w{{8}}{re.escape(_SUFFIX)}")
_OPEN_FILE = re.compile(r"/dev/(?:std(in|out|err)|fd/(\d+))|/proc/(?:self|thread-self)/fd/(\d+)")
_STANDARD = {"in": 0, "out": 1, "err": 2}
_CODE = re.compile(r"os error (\d+)")  # how Rust tells an errno
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFBLK: "a disk",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFIFO: "a pipe",
}


@contextmanager
def writing(path: Path, after: str = "") -> Iterator[None]:
    """Turn what the system says against writing into a sentence.

    Args:
        path: what is written, for the message.
        after: what to say behind the reason.

    Raises:
        ConfigError: the body could not write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {path}: {why_not(error, path)}{after}") from error


def write_text(
    path: Path, text: str, *, private: bool = False, lasting: bool = True, after: str = ""
) -> None:
    """Write a file whole or not at all; see `replacing`.

    Raises:
        ConfigError: it could not be written.
    """
    with writing(path, after):
        stream = _open_stream(path)
        if stream is not None:
            with os.fdopen(stream, "w", encoding="utf-8") as file:
                file.write(text)
            return
    with replacing(path, private=private, lasting=lasting, after=after) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(
    path: Path, *, private: bool = False, lasting: bool = True, after: str = ""
) -> Iterator[Path]:
    """Lend a temporary file; what the body writes there gets the name `path`.

    Args:
        path: a plain file, or nothing yet.
        private: let nobody but its owner read it; else it is as readable as the file of ours that
            it replaces, or as any new file.
        lasting: have it on the disk before it gets its name. Else it lies where only this package
            writes: what killed runs left there a day ago is removed.
        after: what to say behind the reason.

    Raises:
        ConfigError: it could not be written, or `path` is something else; `path` is what it was.
    """
    if not lasting:
        sweep(path.parent, A_DAY_S)
    with writing(path, after):
        mode = _mode(_require_plain(path), private)
        handle, name = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(mode)
            if lasting:
                _sync(temporary)
            _require_plain(path)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if lasting:
            with suppress(OSError):  # it has its name; some network drives cannot sync a folder
                _sync(path.parent)


def make_folder(folder: Path, *names: str) -> Path:
    """Make a folder for what is written, with those it is in; returns it.

    Args:
        folder: to be made, if it is missing.
        names: of files that will be written there after long work.

    Raises:
        ConfigError: it cannot be made, or one of the files could not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {why_not(error, folder)}") from error
    for name in names:
        check_target(folder / name)
    return folder


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Lend a folder beside what is in `folder`; it is gone afterwards, unless it was renamed."""
    made = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def give_names(made: Path, folder: Path, names: Sequence[str]) -> None:
    """Move what was written in a `temporary_folder` into the folder that it is in.

    Args:
        made: the temporary folder.
        folder: where the names are to be.
        names: of files and folders, in the order in which they appear.

    Raises:
        ConfigError: one could not be moved.
    """
    for name in names:
        with writing(folder / name):
            os.rename(made / name, folder / name)


def sweep(folder: Path, least_age_s: float = 0.0) -> None:
    """Remove what runs that were killed left behind.

    Args:
        folder: to be swept.
        least_age_s: what was written later is left, as another run may be at it, and so are
            folders, whose age says nothing of what is in them; 0: nobody else writes here.
    """
    left: list[os.DirEntry[str]] = []
    with suppress(OSError):
        left = [entry for entry in os.scandir(folder) if is_temporary(entry.name)]
    for entry in left:
        with suppress(OSError):  # another's file; those after it go
            if entry.is_dir(follow_symlinks=False):
                if not least_age_s:
                    shutil.rmtree(entry.path, ignore_errors=True)
            elif _age_s(entry) >= least_age_s:
                os.unlink(entry.path)


def _age_s(entry: "os.DirEntry[str]") -> float:
    """Seconds since it was written; none where a clock says that it will be."""
    return max(0.0, time.time() - entry.stat(follow_symlinks=False).st_mtime)


def open_growing(path: Path, flags: int) -> int:
    """Open a file that is added to: a plain one, its owner's alone where it is made now.

    Raises:
        OSError: it cannot be opened, or is a link.
        ConfigError: it is no plain file.
    """
    # Not blocking: a pipe of that name would wait for ever.
    flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    handle = os.open(path, flags, _OWNER_ONLY)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ConfigError(f"cannot write {path}: it is no plain file")
    return handle


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that was never finished."""
    return _LEFT_BEHIND.fullmatch(name) is not None


def append(path: Path, text: str) -> None:
    """Add to a file that grows; it is on the disk when this returns.

    Raises:
        OSError: it could not be written.
        ConfigError: it is no plain file.
    """
    with os.fdopen(open_growing(path, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def cut_off(path: Path, nbytes: int) -> None:
    """Take bytes off the end of a file that grows.

    Raises:
        OSError: it could not be written.
        ConfigError: it is no plain file.
    """
    with os.fdopen(open_growing(path, os.O_RDWR), "r+b") as file:
        file.truncate(os.fstat(file.fileno()).st_size - nbytes)


def check_target(path: Path) -> None:
    """See, before minutes of work, that a file could be written.

    Raises:
        ConfigError: it could not.
    """
    with writing(path):
        stream = _open_stream(path)
        if stream is not None:
            os.close(stream)
            return
        _require_plain(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def why_not(error: OSError | SafetensorError, path: Path) -> str:
    """Why a file could not be written, with the numbers and what to do."""
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or str(error)
    else:
        said = _CODE.search(str(error))
        number = int(said[1]) if said else None
        reason = os.strerror(number) if number else str(error)
    if number == errno.EFBIG:
        return size_limit()
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason}, {_free(path)}: make room, or give another place"
    if number in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        return _no_folder(path) or reason
    if number == errno.ELOOP and path.is_symlink():
        return _link(path)
    return "nobody reads from that pipe" if number == errno.ENXIO else reason


def size_limit() -> str:
    """Why a file cannot grow although the disk has room."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY:
        return "the file system takes no file of that size: give a place on another"
    return f"a file may have at most {format_size(limit)} here (ulimit -f): raise that limit"


def _free(path: Path) -> str:
    with suppress(OSError):
        status = os.statvfs(path.parent)
        return f"{format_size(status.f_bavail * status.f_frsize)} is free"
    return "nothing is free"


def _no_folder(path: Path) -> str:
    """What on the way to a file is no folder; empty where all of it is."""
    way = [*reversed(path.parents), path]
    wrong = next((place for place in way if not place.is_dir()), path)
    if os.path.lexists(wrong):
        return f"{wrong} is no folder: give another place"
    return f"{wrong} is no folder: make it first, or give another place" if wrong != path else ""


def _link(path: Path) -> str:
    return f"it is a link to {os.readlink(path)}: give that file itself"


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _require_plain(path: Path) -> os.stat_result | None:
    """What a plain file is; None where there is nothing.

    Raises:
        OSError: it is anything else.
    """
    status = _status(path)
    if status is None or stat.S_ISREG(status.st_mode):
        return status
    if stat.S_ISLNK(status.st_mode):
        raise OSError(0, _link(path))
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no plain file")
    raise OSError(0, f"it is {kind}")


def _open_stream(path: Path) -> int | None:
    """A file that is open already, a device or a pipe, to write to as it is; None for others."""
    found = _OPEN_FILE.fullmatch(os.path.abspath(path))
    if found is not None:
        number = _STANDARD[found[1]] if found[1] else int(found[2] or found[3])
        return os.dup(number)
    status = _status(path)
    if status is None or not (stat.S_ISCHR(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
        return None
    flags = os.O_WRONLY | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    handle = os.open(path, flags)  # not blocking: a pipe that nobody reads would wait for ever
    os.set_blocking(handle, True)
    return handle


def _mode(before: os.stat_result | None, private: bool) -> int:
    if private:
        return _OWNER_ONLY
    if before is not None and before.st_uid == os.geteuid():  # another's may be open to all
        return stat.S_IMODE(before.st_mode) & 0o777
    umask = os.umask(0o077)  # the only way to ask; meanwhile other threads make private files
    os.umask(umask)
    return 0o666 & ~umask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
