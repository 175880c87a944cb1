"""What an adapter's folder says of it, and whether it can be merged exactly. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.model.adapter import CONFIG, WEIGHTS
from offload_rt.model.files import FileIdentity, open_inside, read_json_object, shown
from offload_rt.model.header import read_header
from offload_rt.model.identity import digest_of_tensors

_LIMIT_BYTES = 2**20
# Settings that peft's merge takes care of, or that only matter while an adapter is trained.
_MERGED = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# Those that leave the model's own weights alone when an adapter begins; others change them too.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: where it is.
        kind: LoRA or DoRA.
        rank: of its matrices, where no pattern says otherwise.
        targets: modules it changes, in words.
        files: what its two files were when they were read.
        tensors: how many it has.
        has_tokenizer: whether tokenizer files lie beside it.
        digest: of what it says and its weights (`model/identity.py`).
    """

    folder: Path
    kind: str
    rank: object
    targets: str
    files: tuple[FileIdentity, FileIdentity]
    tensors: int
    has_tokenizer: bool
    digest: str

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.folder.resolve().name


def read_adapter(folder: Path) -> Adapter:
    """Read the headers of an adapter.

    Raises:
        CheckpointError: it is none, is damaged, or is of a kind that cannot be merged exactly.
    """
    config = read_json_object(folder, CONFIG, _LIMIT_BYTES)
    _check_kind(folder, config)
    with open_inside(folder, CONFIG) as file:
        settings = file.identity
    weights, extents = read_header(folder, WEIGHTS)
    return Adapter(
        folder=folder,
        kind="DoRA" if config.get("use_dora") else "LoRA",
        rank=config.get("r"),
        targets=_targets(config),
        files=(settings, weights),
        tensors=len(extents),
        has_tokenizer=(folder / "tokenizer_config.json").exists(),
        digest=digest_of_tensors(repr(sorted(config.items())), extents),
    )


def _check_kind(folder: Path, config: Mapping[str, object]) -> None:
    path = folder / CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path} is of the kind {shown(kind)}, only LORA can be merged into weights that are "
            "streamed: merge it with its own tool, or give --adapter none"
        )
    unknown = sorted(name for name, value in config.items() if value and name not in _MERGED)
    if config.get("init_lora_weights", True) not in _STARTS:
        unknown.append("init_lora_weights")
    if unknown:
        raise CheckpointError(
            f"{path} sets {shown(unknown[0])} to {shown(config[unknown[0]])}, with which merging "
            "tensor by tensor would not be exact: merge it with peft's merge_and_unload, and run "
            "what that makes"
        )


def _targets(config: Mapping[str, object]) -> str:
    named: list[str] = []
    for key in ("target_modules", "modules_to_save"):
        value = config.get(key) or []
        named += [value] if isinstance(value, str) else [str(v) for v in _listed(value)]
    return ", ".join(sorted(named)) or "nothing"


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
