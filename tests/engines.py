"""Small helpers to run the engine in tests."""

import gc
import os
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace

import torch

from offload_rt.config import Exact, GenerationConfig, RuntimeConfig, SamplingConfig, Wire
from offload_rt.device.base import upload_together
from offload_rt.device.kinds import CPU
from offload_rt.engine import NO_DRAFT, Engine, Run
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.wire import wired
from offload_rt.runner.tree import looks_back, pending_tree

ROOMY = 512 * 2**20
# All that deciding about a draft asks of a device.
HOST = SimpleNamespace(
    kind=CPU,
    torch_device=torch.device("cpu"),
    upload=lambda values: torch.tensor(list(values)),
    download=torch.Tensor.tolist,
)
PROMPT = [7, 41, 3, 99, 120, 5, 5, 63, 18, 230, 77, 12, 150, 9, 201, 44, 31]


@contextmanager
def engine_for(folder, *, prompts=(PROMPT,), tokens=16, draft=NO_DRAFT, repeats=False, **config):
    """An engine with room for these prompts and that many tokens after each."""
    config = {"device": "cpu", "device_limit_bytes": ROOMY, "prefill_chunk_tokens": 15} | config
    config = {"exact": Exact.OFF} | config  # `auto` is on where layers stream: other bits
    checkpoint = wired(_headers(folder), config.get("wire", Wire.RAW))
    gc.collect()  # memory of an earlier engine must not be counted as there before this one
    gc.freeze()  # what lives on is not looked through the next time; engines are in no circle
    with Engine(
        checkpoint,
        RuntimeConfig(**config),
        capacities=[len(p) + tokens for p in prompts],
        prompt_tokens=sum(len(p) for p in prompts),
        draft=draft,
        repeats=repeats,
    ) as engine:
        yield engine


def _headers(folder):
    """The checkpoint of a folder: of one that several engines are made of, opened once."""
    files = sorted((e.name, e.stat().st_mtime_ns, e.stat().st_size) for e in os.scandir(folder))
    return opened_once(open_checkpoint, folder, tuple(files))


@lru_cache(8)
def opened_once(opens, folder, files):
    """What `opens` makes of a folder with these files."""
    return opens(folder)


def generate(engine, prompts=(PROMPT,), tokens=16, sampling=None, **generation):
    """All tokens of each prompt's answer."""
    options = GenerationConfig(max_tokens=tokens, **generation)
    run = Run.start(engine, prompts, sampling or SamplingConfig(), options)
    run.prefill()
    while run.active:
        run.step()
    return [s.emitted for s in run.sequences]


def what_rows_see(parents, rows=None):
    """[S, P] bool: of pending rows that continue one another, which the newest see."""
    back, places = upload_together(HOST, [looks_back(parents), range(len(parents))])
    return pending_tree(parents, back, places, len(parents) if rows is None else rows).visible


def all_logits(engine, prompt=PROMPT, steps=3):
    """Logits after the prompt and after each of a few fixed tokens: [1 + steps, V]."""
    rows = [engine.forward([(0, prompt)], reuse=True)]
    rows += [engine.forward([(0, [prompt[i]])], reuse=False) for i in range(steps)]
    return torch.cat(rows).clone()


def reference_model(folder, dtype=torch.float32):
    """The same model in transformers, eager attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()
