"""What was typed is there in the next chat."""

import os
import stat
import threading

import pytest

from offload_rt.cli import chat_history
from offload_rt.cli.chat_history import HistoryFile, history_path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "history"


def test_turns_come_back_in_order_for_the_owner_only(path):
    turns = ["one", "two\nlines", 'quo"te \x1b[2J', "ünï", "half \ud800"]
    for turn in turns:
        HistoryFile(path).add(turn)
    assert HistoryFile(path).load() == turns
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_path_is_that_of_the_users_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    assert history_path() == tmp_path / "elsewhere" / "offload-rt" / "chat_history"


def test_a_file_open_to_others_is_closed(path):
    HistoryFile(path).add("one")
    path.chmod(0o644)
    HistoryFile(path).add("two")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_damage_costs_the_damaged_lines(path):
    HistoryFile(path).add("one")
    with path.open("ab") as file:
        file.write(b'\xff\n[1]\n"half')  # the last write was cut off
    HistoryFile(path).add("two")
    assert HistoryFile(path).load() == ["one", "two"]


def spoil(path, how):
    path.parent.mkdir()
    if how == "link":
        path.symlink_to(path.parent / "other")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    else:
        path.parent.rmdir()
        path.parent.write_text("")


@pytest.mark.parametrize("how", ["link", "pipe", "folder", "no folder"])
def test_a_file_that_cannot_be_used_is_told_and_left_alone(path, how):
    spoil(path, how)
    history = HistoryFile(path)
    history.add("one")
    first = history.problem
    history.add("two")
    assert history.load() == [] and history.problem == first
    assert str(path) in first and "not kept" in first
    assert not (path.parent / "other").exists()


def test_chats_at_a_time_lose_nothing(path):
    def chat(number):
        for i in range(50):
            HistoryFile(path).add(f"{number} {i}")

    threads = [threading.Thread(target=chat, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(HistoryFile(path).load()) == sorted(
        f"{n} {i}" for n in range(4) for i in range(50)
    )


def test_a_long_history_loses_its_oldest_turns(path, monkeypatch):
    monkeypatch.setattr(chat_history, "_MOST_BYTES", 1000)
    monkeypatch.setattr(chat_history, "_KEPT_BYTES", 500)
    turns = [f"turn {i:04}" for i in range(200)]
    for turn in turns:
        HistoryFile(path).add(turn)
    loaded = HistoryFile(path).load()
    assert len(loaded) > 20 and turns[-len(loaded) :] == loaded
    assert 400 < path.stat().st_size <= 500
    assert HistoryFile(path).load()[-1] == "turn 0199"


def test_a_document_is_not_kept(path):
    HistoryFile(path).add("x" * 10**6)
    HistoryFile(path).add("short")
    assert HistoryFile(path).load() == ["short"]
