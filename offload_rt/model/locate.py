"""Find the folder a user means: a path, a hub id in the local Hugging Face cache, or `demo`."""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.folders import cache_folder
from offload_rt.model.files import open_inside, shown
from offload_rt.model.gguf import ENDING, MANIFEST

_log = logging.getLogger(__name__)

_REPOSITORY = "models--"

_DEMO = "demo"
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_REPO = rf"{_PART}(?:/{_PART})?"
_HUB_ID = re.compile(rf"(?P<repo>{_REPO})(?:@(?P<rev>{_PART}(?:/{_PART})*))?")
# An address as a browser shows it: of the model, of a branch, of a file there.
_ADDRESS = re.compile(
    rf"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>{_PART}/{_PART})"
    rf"(?:/(?:tree|blob|resolve)/(?P<rev>{_PART})(?:/.*)?)?/?(?:[?#].*)?|hf://(?P<bare>{_REPO})"
)
_TAGGED = re.compile(rf"(?:[\w.-]+/)*{_PART}:{_PART}")  # ollama's names
_WEIGHTS = (".safetensors", ".packed", ".bin", ".pt", ".pth", ".ckpt")  # rather than GGUF beside
_COMMIT = re.compile(r"[0-9A-Za-z]{1,64}")
_REF_LIMIT_BYTES = 128
# A file of a model folder that people give instead of it.
_OF_A_MODEL = re.compile(
    r"model.*\.safetensors(\.index\.json)?|tokenizer.*|generation_config\.json|"
    r".*\.packed|offload_rt_packed\.json"
)


@dataclass(frozen=True, slots=True)
class HubId:
    """A model on the Hugging Face hub.

    Attributes:
        repo: `org/name`.
        revision: branch, tag or commit; None is its main branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def how_to_get(self) -> str:
        """What downloads it."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"download it with `hf download {self.repo}{revision}`, or add --download"

    @property
    def repository(self) -> Path:
        """Its folder in the cache, there or not."""
        return hub_cache() / f"{_REPOSITORY}{self.repo.replace('/', '--')}"


def resolve_model(spec: str) -> Path:
    """Find the model folder for `MODEL` of the command line.

    A path that exists wins over a hub id of the same spelling; `demo` is always the demo model, a
    folder of that name is `./demo`. Nothing is downloaded.

    Args:
        spec: folder, its `config.json`, `org/name`, `org/name@revision` (branch, tag or commit),
            the model's address on the hub, or `demo`.

    Raises:
        CheckpointError: there is no such folder or no such model in the cache.
    """
    if spec == _DEMO:
        return _require_demo()
    if not spec or "\0" in spec:
        raise CheckpointError(f"{shown(spec)} is not a model: give a folder or a hub id org/name")
    path = Path(os.path.expanduser(spec))  # Path.expanduser raises for an unknown user
    if os.path.lexists(path):
        return _folder_of(path)
    hub_id = hub_id_of(spec)
    if hub_id is not None:
        return _cached_snapshot(hub_id)
    if _TAGGED.fullmatch(spec.rpartition("://")[2]):
        raise CheckpointError(
            f"{shown(spec)} is a name with a tag, as ollama has them: give the .gguf file itself, "
            "a model folder or a hub id org/name"
        )
    raise CheckpointError(f"{shown(spec)} does not exist: give a model folder or a hub id")


def hub_id_of(spec: str) -> HubId | None:
    """The hub id that is written, as one or as an address; None for anything else."""
    if spec == _DEMO or os.path.lexists(os.path.expanduser(spec)):
        return None
    if match := _ADDRESS.fullmatch(spec):
        return HubId(match["repo"] or match["bare"], match["rev"])
    if match := _HUB_ID.fullmatch(spec):
        return HubId(match["repo"], match["rev"])
    return None


def how_to_complete(folder: Path) -> str:
    """What gets missing files of a model folder."""
    folder = Path(os.path.abspath(folder))
    repository = folder.parent.parent
    if folder.parent.name != "snapshots" or not repository.name.startswith(_REPOSITORY):
        return "download them"
    repo = repository.name.removeprefix(_REPOSITORY).replace("--", "/")
    return f"download them with `hf download {repo} --revision {folder.name}`, or add --download"


def _folder_of(path: Path) -> Path:
    """The model folder that a path means: that of a `config.json` or of GGUF files, or the path.

    Raises:
        CheckpointError: it is another file of a model, or GGUF files that are not read.
    """
    if not path.is_file():
        return _of_gguf(path)
    folder = path.parent
    if path.name == "config.json":
        return folder
    if path.suffix == ENDING:
        return _gguf_folder(path)
    if _OF_A_MODEL.fullmatch(path.name):
        raise CheckpointError(f"{path} is a file of the model folder {folder}: give {folder}")
    return path


def _of_gguf(folder: Path) -> Path:
    """The folder itself, or that of its one model in GGUF files where it holds no other weights."""
    try:
        names = os.listdir(folder)
    except OSError:
        return folder
    if MANIFEST in names or any(name.endswith(_WEIGHTS) for name in names):
        return folder
    from offload_rt.model.gguf.folder import gguf_in

    found = gguf_in(folder)
    return folder if found is None else _gguf_folder(found)


def _gguf_folder(path: Path) -> Path:
    from offload_rt.model.gguf.folder import gguf_folder  # 100 ms, which help does not need

    return gguf_folder(path)


def demo_folder() -> Path:
    """Where `tools/demo.sh` puts the demo model."""
    return cache_folder() / "models" / "smollm2-135m-instruct"


def _require_demo() -> Path:
    folder = demo_folder()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"the demo model is not in {folder}: run `bash tools/demo.sh`")
    return folder


def hub_cache() -> Path:
    """The Hugging Face cache, by the variables that huggingface_hub reads, in its order."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return Path(value).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "huggingface" / "hub"


def _cached_snapshot(hub_id: HubId) -> Path:
    repository, revision = hub_id.repository, hub_id.revision
    if not repository.is_dir():
        raise CheckpointError(
            f"{hub_id} is neither a folder nor a model in {hub_cache()}: {hub_id.how_to_get}"
        )
    ref = f"refs/{revision or 'main'}"
    commit = revision or ""
    if (repository / ref).is_file():
        commit = _read_ref(repository, ref)
    snapshot = repository / "snapshots" / commit
    if _COMMIT.fullmatch(commit) and snapshot.is_dir():
        return _of_gguf(snapshot)
    commits = _commits(repository)
    if revision is None and len(commits) == 1 and not (repository / ref).exists():
        _log.warning("%s has no refs/main: its only snapshot is taken, %s", repository, commits[0])
        return _of_gguf(repository / "snapshots" / commits[0])
    there = f"there are @{', @'.join(commits)}" if commits else "there are none"
    raise CheckpointError(
        f"{hub_id} has no complete snapshot in {repository}, {there}: {hub_id.how_to_get}"
    )


def _commits(repository: Path) -> list[str]:
    """The snapshots there are, by commit."""
    try:
        return sorted(e.name for e in os.scandir(repository / "snapshots") if e.is_dir())
    except OSError:
        return []


def _read_ref(repository: Path, name: str) -> str:
    with open_inside(repository, name) as file:
        return file.read(_REF_LIMIT_BYTES).decode("ascii", errors="replace").strip()


def model_name(folder: Path) -> str:
    """How a model folder is called: the hub id in the hub's cache, else the folder's own name."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository[8:].replace("--", "/")
    return folder.name


def cached_ids() -> list[str]:
    """Hub ids of the models in the local Hugging Face cache, whole or not."""
    try:
        names = sorted(path.name for path in hub_cache().iterdir())
    except OSError:
        return []
    return [n[len(_REPOSITORY) :].replace("--", "/") for n in names if n.startswith(_REPOSITORY)]


def means_model(word: str) -> bool:
    """Whether a word of the command line can only be meant as MODEL."""
    marks = ("/", ":", ".gguf", ".safetensors")  # no verb has any, ollama's tags have a colon
    if word == _DEMO or any(mark in word for mark in marks):
        return True
    return bool(word) and "\0" not in word and (os.path.lexists(word) or word in cached_ids())
