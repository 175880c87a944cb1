"""Adapters (LoRA and its kin) that lie in a model's folder. No torch here."""

import os
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FILES = (CONFIG, WEIGHTS, "adapter_model.bin", "adapters.safetensors")


def adapter_beside(folder: Path) -> str | None:
    """The first file of an adapter in a folder, if there is one."""
    return next((name for name in _FILES if os.path.lexists(folder / name)), None)
