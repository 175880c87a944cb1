"""Files are written whole or not at all, to plain files only, and readable for whom they should."""

import errno
import os
import resource
import stat
import threading
import time

import pytest
from safetensors import SafetensorError

from offload_rt.errors import ConfigError
from offload_rt.writing import (
    A_DAY_S,
    append,
    check_target,
    cut_off,
    make_folder,
    open_growing,
    replacing,
    sweep,
    temporary_folder,
    write_text,
    writing,
)


class StopError(Exception):
    """Ends a body."""


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_new_files_have_the_mode_of_the_umask_or_are_private(tmp_path, umask):
    write_text(tmp_path / "a", "x")
    write_text(tmp_path / "b", "x", private=True)
    assert (mode(tmp_path / "a"), mode(tmp_path / "b")) == (0o640, 0o600)
    assert os.umask(0o027) == 0o027


def test_a_file_keeps_its_mode_unless_it_is_to_be_private(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o604)
    write_text(path, "new")
    assert (path.read_text(), mode(path)) == ("new", 0o604)
    write_text(path, "new", private=True)
    assert mode(path) == 0o600


def test_the_mode_of_a_strangers_file_is_not_kept(tmp_path, monkeypatch, umask):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o666)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    write_text(path, "new")
    assert mode(path) == 0o640


def test_a_temporary_file_is_private_and_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(3):
        with pytest.raises(StopError), replacing(tmp_path / "a") as temporary:
            names.add(temporary.name)
            assert mode(temporary) == 0o600 and temporary.parent == tmp_path
            raise StopError
    assert len(names) == 3 and os.listdir(tmp_path) == []


def test_a_name_as_long_as_a_name_may_be(tmp_path):
    path = tmp_path / ("x" * 255)
    write_text(path, "new")
    assert path.read_text() == "new"


KINDS = {
    "link": (lambda path: path.symlink_to("/etc/hostname"), "a link to /etc/hostname: give that"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "a link to nowhere: give that file"),
    "folder": (lambda path: path.mkdir(), "it is a folder"),
    "pipe": (os.mkfifo, "nobody reads from that pipe"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [lambda path: write_text(path, "x"), check_target])
def test_what_is_no_plain_file_stays(kind, write, tmp_path):
    make, message = KINDS[kind]
    path = tmp_path / "a"
    make(path)
    before = os.lstat(path)
    with pytest.raises(ConfigError, match=f"cannot write .*a: {message}|{message}"):
        write(path)
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode, after.st_size) == (
        before.st_ino,
        before.st_mode,
        before.st_size,
    )
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
@pytest.mark.parametrize("grow", [lambda path: append(path, "x"), lambda path: cut_off(path, 0)])
def test_what_grows_is_a_plain_file(kind, grow, tmp_path):
    KINDS[kind][0](path := tmp_path / "a")
    with pytest.raises(ConfigError), writing(path):
        grow(path)
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_that_comes_while_the_body_writes_stays(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(ConfigError, match="a link to"), replacing(path) as temporary:
        temporary.write_text("x")
        path.symlink_to("/etc/hostname")
    assert path.is_symlink() and os.listdir(tmp_path) == ["a"]


def test_a_pipe_somebody_reads_gets_the_text(tmp_path):
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    thread = threading.Thread(target=lambda: got.append(os.read(reader, 100)))
    write_text(path, "text")
    thread.start()
    thread.join()
    os.close(reader)
    assert got == [b"text"] and stat.S_ISFIFO(os.lstat(path).st_mode)


def test_devices_and_open_files_are_written_to_as_they_are(tmp_path):
    before = os.lstat("/dev/null")
    write_text(tmp_path.joinpath("/dev/null"), "text")
    assert os.lstat("/dev/null").st_ino == before.st_ino
    with (tmp_path / "log").open("w") as file:
        file.write("first ")
        file.flush()
        for name in (f"/dev/fd/{file.fileno()}", f"/proc/self/fd/{file.fileno()}"):
            write_text(tmp_path.joinpath(name), "text ")
    assert (tmp_path / "log").read_text() == "first text text "
    with pytest.raises(ConfigError, match="cannot write /dev/fd/987: Bad file descriptor"):
        write_text(tmp_path.joinpath("/dev/fd/987"), "text")
    with pytest.raises(ConfigError, match="cannot write /dev/full: No space left"):
        write_text(tmp_path.joinpath("/dev/full"), "text")


@pytest.fixture
def short_files():
    """No file of this process may have more than a page."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_of_file_sizes_is_no_full_disk(tmp_path, short_files):
    path = tmp_path / "a"
    write_text(path, "old")
    says = r"a file may have at most 4.00 KiB here \(ulimit -f\): raise that limit$"
    with pytest.raises(ConfigError, match=says):
        write_text(path, "x" * 5000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    with pytest.raises(ConfigError, match=says), writing(path):
        append(path, "x" * 5000)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_is_told_with_what_is_free(error, tmp_path):
    says = r"a: No space left on device, [\d.]+ .?i?B is free: make room, or .* again$"
    with pytest.raises(ConfigError, match=says), writing(tmp_path / "a", "; again"):
        raise error


def test_what_safetensors_says_is_understood(tmp_path):
    error = SafetensorError("Error while serializing: I/O error: xyz (os error 28)")
    with pytest.raises(ConfigError, match="No space left on device, .* is free"), writing(tmp_path):
        raise error
    with pytest.raises(ConfigError, match="a: some other$"), writing(tmp_path / "a"):
        raise SafetensorError("some other")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="new is no folder: make it first"):
        write_text(tmp_path / "new" / "a", "x")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is no folder"):
        write_text(tmp_path / "file" / "a", "x")
    with pytest.raises(ConfigError, match="cannot make the folder .*file/b"):
        make_folder(tmp_path / "file" / "b")


def test_what_grows_is_private_and_whole(tmp_path):
    path = tmp_path / "a"
    append(path, "one\n")
    append(path, "two")
    cut_off(path, 3)
    assert path.read_text() == "one\n" and mode(path) == 0o600
    os.close(open_growing(path, os.O_RDWR))


def test_what_killed_runs_left_is_swept_and_nothing_else(tmp_path):
    with pytest.raises(StopError), replacing(tmp_path / "a") as temporary:
        left = temporary.name
        raise StopError
    (tmp_path / left).touch()
    (tmp_path / left.replace(left[13:21], "abcd_123")).mkdir()
    (tmp_path / left.replace(left[13:21], "abcd_456")).symlink_to("/etc")
    for other in (".offload-run-x.tmp", "x.tmp", ".offload-run-abcd_123.tmp.json"):
        (tmp_path / other).touch()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(
        [".offload-run-x.tmp", "x.tmp", ".offload-run-abcd_123.tmp.json"]
    )
    assert os.path.exists("/etc/hostname")


def test_where_files_can_be_made_again_what_was_left_a_day_ago_goes_with_the_next(tmp_path):
    """Another run may be writing what is younger; beside files that last nothing is removed."""
    names = ("old_", "new_", "fold")
    old, young, folder = (tmp_path / f".offload-run-{name}_123.tmp" for name in names)
    for path in (old, young):
        path.touch()
    folder.mkdir()  # its time is not that of a file that grows in it
    for path in (old, folder):
        os.utime(path, (time.time() - A_DAY_S - 60,) * 2)
    write_text(tmp_path / "lasts", "")
    assert old.exists() and young.exists()
    write_text(tmp_path / "kept", "", lasting=False)
    assert sorted(os.listdir(tmp_path)) == sorted([young.name, folder.name, "kept", "lasts"])


def test_one_that_cannot_be_removed_keeps_no_other(tmp_path, monkeypatch):
    unlink, refused = os.unlink, []

    def foreign(path):
        if not refused:
            refused.append(os.path.basename(path))
            raise PermissionError
        unlink(path)

    monkeypatch.setattr(os, "unlink", foreign)
    for index in range(3):
        (tmp_path / f".offload-run-left_12{index}.tmp").touch()
    sweep(tmp_path)
    assert os.listdir(tmp_path) == refused


def test_a_temporary_folder_is_private_and_may_be_renamed(tmp_path):
    with temporary_folder(tmp_path) as folder:
        assert mode(folder) == 0o700
        (folder / "x").touch()
    assert os.listdir(tmp_path) == []
    with temporary_folder(tmp_path) as folder:
        folder.rename(tmp_path / "kept")
    assert os.listdir(tmp_path) == ["kept"]
