"""Find the folder a user means: a path, a hub id in the local Hugging Face cache, or `demo`."""

import os
import re
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.model.files import open_inside, shown

_DEMO = "demo"
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}(?:/{_PART})?)(?:@(?P<rev>{_PART}(?:/{_PART})*))?")
_COMMIT = re.compile(r"[0-9A-Za-z]{1,64}")
_REF_LIMIT_BYTES = 128


def resolve_model(spec: str) -> Path:
    """Find the model folder for `MODEL` of the command line.

    A path that exists wins over a hub id of the same spelling; `demo` is always the demo model, a
    folder of that name is `./demo`. Nothing is downloaded.

    Args:
        spec: folder, `org/name`, `org/name@revision` (branch, tag or commit), or `demo`.

    Raises:
        CheckpointError: there is no such folder or no such model in the cache.
    """
    if spec == _DEMO:
        return _require_demo()
    if not spec or "\0" in spec:
        raise CheckpointError(f"{shown(spec)} is not a model: give a folder or a hub id org/name")
    path = Path(os.path.expanduser(spec))  # Path.expanduser raises for an unknown user
    if os.path.lexists(path):
        return path
    match = _HUB_ID.fullmatch(spec)
    if match is None:
        raise CheckpointError(f"{shown(spec)} does not exist: give a model folder or a hub id")
    return _cached_snapshot(match["repo"], match["rev"])


def demo_folder() -> Path:
    """Where `tools/demo.sh` puts the demo model; `OFFLOAD_RT_CACHE` moves the cache."""
    root = os.environ.get("OFFLOAD_RT_CACHE")
    if root:
        cache = Path(root).expanduser()
    else:
        import platformdirs

        cache = platformdirs.user_cache_path("offload-rt")
    return cache / "models" / "smollm2-135m-instruct"


def _require_demo() -> Path:
    folder = demo_folder()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"the demo model is not in {folder}: run `bash tools/demo.sh`")
    return folder


def _hub_cache() -> Path:
    """The Hugging Face cache, by the variables that huggingface_hub reads, in its order."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return Path(value).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "huggingface" / "hub"


def _cached_snapshot(repo: str, revision: str | None) -> Path:
    cache = _hub_cache()
    repository = cache / f"models--{repo.replace('/', '--')}"
    wanted = f"{repo}@{revision}" if revision else repo
    if not repository.is_dir():
        raise CheckpointError(
            f"{wanted} is neither a folder nor a model in {cache}: "
            f"download it with `hf download {repo}`"
        )
    ref = f"refs/{revision or 'main'}"
    commit = revision or ""
    if (repository / ref).is_file():
        commit = _read_ref(repository, ref)
    snapshot = repository / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
        raise CheckpointError(
            f"{wanted} has no complete snapshot in {repository}: download it with `{command}`"
        )
    return snapshot


def _read_ref(repository: Path, name: str) -> str:
    with open_inside(repository, name) as file:
        return file.read(_REF_LIMIT_BYTES).decode("ascii", errors="replace").strip()


def cached_ids() -> list[str]:
    """Hub ids of the models in the local Hugging Face cache, whole or not."""
    try:
        names = sorted(path.name for path in _hub_cache().iterdir())
    except OSError:
        return []
    return [name[8:].replace("--", "/") for name in names if name.startswith("models--")]


def means_model(word: str) -> bool:
    """Whether a word of the command line can only be meant as MODEL."""
    if word == _DEMO or "/" in word or word.endswith((".gguf", ".safetensors")):
        return True
    return bool(word) and "\0" not in word and (os.path.lexists(word) or word in cached_ids())
