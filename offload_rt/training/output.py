"""What a training leaves: heads as runs load them, the merged model of Medusa-2, the loss curve."""

import json
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from offload_rt.speculative.medusa.checkpoint import CONFIG, FULL_MODEL, HEADS_FILE
from offload_rt.speculative.medusa.heads import MedusaHeads
from offload_rt.speculative.medusa.names import TOKEN_MAP, LmHead
from offload_rt.speculative.medusa.storage import Heads, Layout, write_heads
from offload_rt.training.files import replacing, write_text, writing
from offload_rt.training.vocabulary import Vocabulary
from offload_rt.writing import temporary_folder

MODEL_FOLDER = "model"
CURVE, HISTORY = "loss.png", "loss.jsonl"
_OF_TOKENIZER = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)


def put_heads(
    heads: MedusaHeads, vocabulary: Vocabulary, dtype: torch.dtype, base: str, folder: Path
) -> None:
    """Write heads into a folder in the layout that holds them without loss.

    They are made beside the folder's files and moved there, the tensors last: without those nobody
    reads it as heads.

    Raises:
        ConfigError: the disk is full.
    """
    tensors = {n: p.detach().to("cpu", dtype).contiguous() for n, p in heads.named_parameters()}
    layout = Layout.SHARED if heads.shape.lm_head is LmHead.MODEL else Layout.TGI
    if vocabulary.tokens is not None:
        layout, tensors[TOKEN_MAP] = Layout.VLLM, vocabulary.tokens.cpu()
    with writing(folder), temporary_folder(folder) as parts:
        for name in (HEADS_FILE, FULL_MODEL):
            (folder / name).unlink(missing_ok=True)
        made = write_heads(Heads(shape=heads.shape, tensors=tensors, base=base), parts, layout)
        (parts / CONFIG).replace(folder / CONFIG)
        made.replace(folder / made.name)


def put_model(model: Any, source: Path, folder: Path) -> Path:  # noqa: ANN401
    """Write a model with its source's tokenizer into a folder of its own; returns that.

    Raises:
        ConfigError: the disk is full.
    """
    final = folder / MODEL_FOLDER
    with writing(final), temporary_folder(folder) as parts:
        shutil.rmtree(final, ignore_errors=True)
        model.save_pretrained(parts)
        for pattern in _OF_TOKENIZER:
            for path in source.glob(pattern):
                if path.is_file():
                    shutil.copyfile(path, parts / path.name)
        parts.chmod(stat.S_IMODE(folder.stat().st_mode))
        parts.replace(final)
    return final


def put_history(history: Sequence[Mapping[str, object]], folder: Path) -> None:
    """Write the notes of a training, one JSON object in each line.

    Raises:
        ConfigError: the disk is full.
    """
    write_text(folder / HISTORY, "".join(json.dumps(note) + "\n" for note in history))


def draw_curve(history: Sequence[Mapping[str, Any]], folder: Path) -> bool:
    """Draw loss and accuracy over steps; False if matplotlib is not installed.

    Raises:
        ConfigError: the disk is full.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = [note["step"] for note in history]
    upper.plot(steps, [note["loss"] for note in history])
    upper.set_ylabel("training loss")
    held_out = [note for note in history if "held_out_top1" in note]
    for head, color in enumerate(f"C{n}" for n in range(len(history[0]["top1"]))):
        lower.plot(steps, [n["top1"][head] for n in history], color=color, label=f"head {head + 1}")
        points = [n["held_out_top1"][head] for n in held_out]
        lower.plot([n["step"] for n in held_out], points, "o", color=color)
    lower.set_ylabel("right at once (points: held out)")
    lower.set_xlabel("step")
    lower.legend()
    with replacing(folder / CURVE) as temporary:
        figure.savefig(temporary, format="png")
    return True
