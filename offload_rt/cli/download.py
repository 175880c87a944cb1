"""`--download`: fetch a model from the Hugging Face hub into its cache, when it is asked for."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offload_rt.cli.console import Console
from offload_rt.config import DraftConfig
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.config import load_model_config
from offload_rt.model.files import read_json_object
from offload_rt.model.kinds import READ
from offload_rt.model.locate import HubId, hub_cache, hub_id_of
from offload_rt.model.shards import INDEX, SINGLE
from offload_rt.units import format_size

_SMALL = (".json", ".txt", ".model", ".tiktoken", ".jinja")
_TEMPLATES = "additional_chat_templates/"
_HEADS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
_END_S = 5.0
_ENDED = "the download ended without a word: run it again, files that are whole are kept"
_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


class _Hub:
    """A repository of the hub, through a process that fetches from it (`hub.py`).

    Attributes:
        files: its files, with the bytes that the cache lacks of each.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.files: Mapping[str, int] = self._answer()["files"]

    @classmethod
    @contextlib.contextmanager
    def open(cls, hub_id: HubId) -> Iterator["_Hub"]:
        """Start the process; it ends with the body."""
        asked = {"repo": hub_id.repo, "revision": hub_id.revision, "cache": str(hub_cache())}
        process = subprocess.Popen(
            [sys.executable, "-m", "offload_rt.cli.hub", json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | _QUIET,
        )
        try:
            yield cls(process)
        finally:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # it ends, and leaves no half files
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def get(self, names: Sequence[str]) -> Path:
        """Fetch files; returns the snapshot they are in."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer, or its absence, says why
            self._process.stdin.write(json.dumps(list(names)) + "\n")
            self._process.stdin.flush()
        return Path(self._answer()["folder"])

    def bytes_of(self, names: Sequence[str]) -> int:
        """Bytes that the cache lacks of these files."""
        return sum(self.files[name] for name in names)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"error": _ENDED}
        if "error" in answer:
            raise CheckpointError(answer["error"])
        return answer


def download(model: str | None, draft: str, console: Console, *, asked: bool) -> None:
    """Fetch what MODEL and the drafter name on the hub, as far as the cache lacks it.

    Args:
        model: MODEL of the command line.
        draft: value of --draft.
        console: for progress.
        asked: by a flag on this command line, so that it must not be without effect.

    Raises:
        ConfigError: nothing is on the hub, or the user is offline by choice.
        CheckpointError: it cannot be fetched, or is of a kind that is not read.
    """
    config = DraftConfig(draft=draft)
    wanted = [(model, False), (config.model, False), (config.heads, True)]
    ids = [(found, heads) for spec, heads in wanted if spec and (found := hub_id_of(spec))]
    if not ids and asked:
        raise ConfigError(
            f"--download has no effect, {model or 'no MODEL'} is not a hub id: leave it out"
        )
    for hub_id, heads in ids:
        _fetch(hub_id, heads, console)


def _fetch(hub_id: HubId, heads: bool, console: Console) -> None:
    for name in _OFFLINE:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise ConfigError(f"--download contradicts {name}={os.environ[name]}: unset it")
    blobs = hub_id.repository / "blobs"
    before = _stored(blobs)
    with _Hub.open(hub_id) as hub, console.progress(f"downloading {hub_id}") as gauge:
        gauge.done = lambda: max(0, _stored(blobs) - before)
        small = [n for n in hub.files if n.endswith(_SMALL) and _is_ours(n)]
        gauge.total = hub.bytes_of(small)
        folder = hub.get(small)
        weights = _HEADS if heads else _weights(folder, hub.files, hub_id)
        names = [name for name in weights if name in hub.files]
        nbytes = hub.bytes_of(names)
        _check_disk(nbytes)
        gauge.total += nbytes
        if nbytes:
            files = f"{len(names)} file{'s' if len(names) > 1 else ''}"
            console.note(f"downloading {hub_id}: {files}, {format_size(nbytes)}")
        hub.get(names)


def _is_ours(name: str) -> bool:
    return "/" not in name or name.startswith(_TEMPLATES)


def _weights(folder: Path, names: Mapping[str, int], hub_id: HubId) -> Sequence[str]:
    """The weight files of a model, after its config.json was found good.

    Raises:
        CheckpointError: they are of a kind that is not read.
    """
    load_model_config(folder)
    if INDEX in names:
        found = read_json_object(folder, INDEX, 2**26).get("weight_map")
        return sorted(set(map(str, found.values()))) if isinstance(found, dict) else []
    if SINGLE in names:
        return [SINGLE]
    kinds = sorted({Path(name).suffix for name in names if names[name] > 2**20 and _is_ours(name)})
    instead = f": {READ}"
    if ".gguf" in kinds:
        instead = f": get one with `hf download {hub_id.repo} FILE.gguf`, and give that file"
    raise CheckpointError(
        f"{hub_id} has no safetensors weights on the hub (large files end in "
        f"{', '.join(kinds) or 'nothing known'}){instead}"
    )


def _check_disk(nbytes: int) -> None:
    place = hub_cache()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise CheckpointError(
            f"the download has {format_size(nbytes)}, {format_size(free)} is free in {place}: make "
            "room, or set HF_HUB_CACHE to a folder on another disk"
        )


def _stored(blobs: Path) -> int:
    """Bytes of the files of a repository so far, unfinished ones too."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(blobs))
    except OSError:
        return 0
