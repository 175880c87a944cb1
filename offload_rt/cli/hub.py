"""The process that talks with the hub: lists a repository, then fetches what it is told to.

huggingface_hub does the work: it fetches, verifies and fills the cache. It reads its settings from
the environment when it is imported, and its threads cannot be stopped, so it has a process of its
own, which ends when nobody listens any more.

Argument: a JSON object with `repo`, `revision`, `cache`. Lines out: `files` (name to bytes still to
fetch), then `folder` for each line of names in; or one `error`.
"""

import errno
import json
import os
import queue
import signal
import sys
import threading
from typing import Any

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def main() -> None:
    """Serve one repository."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this ends it
    asked = json.loads(sys.argv[1])
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    try:
        _say({"files": {one.filename: _missing(one) for one in _fetch(asked, None, dry_run=True)}})
        while True:
            _say({"folder": _fetch(asked, json.loads(lines.get()))})
    except Exception as error:  # noqa: BLE001 - whatever libraries of the network throw
        _say({"error": _sentence(error, asked["repo"])})


def _fetch(asked: dict[str, Any], names: list[str] | None, *, dry_run: bool = False) -> Any:  # noqa: ANN401
    from huggingface_hub import snapshot_download

    return snapshot_download(
        asked["repo"],
        revision=asked["revision"],
        cache_dir=asked["cache"],
        allow_patterns=None if names is None else [_literally(name) for name in names],
        dry_run=dry_run,
    )


def _missing(file: Any) -> int:  # noqa: ANN401 - a DryRunFileInfo
    return int(file.file_size or 0) if file.will_download else 0


def _literally(name: str) -> str:
    """A pattern that matches this name only."""
    return "".join(f"[{one}]" if one in "*?[" else one for one in name)


def _sentence(error: Exception, repo: str) -> str:
    from huggingface_hub import constants, errors

    where = constants.ENDPOINT
    error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at {where}/{repo}, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{where} has no {repo}, or it is private: check the name, or `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision on {where}"
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"cannot write the download: {error.strerror}"
    reason = " ".join(str(error).split())[:200]
    return f"cannot download {repo} from {where} ({reason}): check the network, and run it again"


def _listen(lines: "queue.Queue[str]") -> None:
    """Pass on what is said; when nobody is there any more, end without a rest.

    Files that are whole stay, and the next download goes on with the others. huggingface_hub
    cannot go on with half a file (2.4), so what it is writing would only lie there.
    """
    for line in sys.stdin:
        lines.put(line)
    for number in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{number}")
            if path.endswith(".incomplete"):
                os.unlink(path)
        except OSError:
            continue
    os._exit(1)


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
