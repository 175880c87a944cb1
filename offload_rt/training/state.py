"""The saved state of a training: parameters, the optimiser's moments, the step, the history."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offload_rt.errors import CheckpointError
from offload_rt.training.files import replacing
from offload_rt.training.settings import TrainConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What makes a training what it is, and where it is kept.

    Attributes:
        config: how heads are trained.
        seed: of all that is drawn.
        state: the file of its saved state.
    """

    config: TrainConfig
    seed: int
    state: Path


@dataclass(slots=True)
class Progress:
    """How far a training is.

    Attributes:
        step: steps done.
        history: what was noted, oldest first; each note has its step.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_state(
    path: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write all of it, whole or not at all.

    Raises:
        ConfigError: the disk is full.
    """
    tensors = {}
    for name, parameter in parameters.items():
        tensors[name] = parameter.detach().contiguous()
        for moment, value in optimizer.state.get(parameter, {}).items():
            if moment in _MOMENTS:
                tensors[f"{moment}:{name}"] = value.contiguous()
    notes = {"step": str(progress.step), "history": json.dumps(progress.history)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=notes)


def load_state(
    path: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> Progress:
    """Put parameters and optimiser back to where they were; a fresh start if there is no file.

    Raises:
        CheckpointError: it is damaged, or of other heads.
    """
    if not path.exists():
        return Progress()
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata()
            progress = Progress(int(notes["step"]), json.loads(notes["history"]))
            for name, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(name))
                if progress.step:
                    optimizer.state[parameter] = {"step": torch.tensor(float(progress.step))} | {
                        moment: file.get_tensor(f"{moment}:{name}").to(parameter.device)
                        for moment in _MOMENTS
                    }
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{path} is not the state of this training ({error}): remove it to train from the start"
        ) from error
    return progress
