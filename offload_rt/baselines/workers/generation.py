"""Greedy answers of a transformers model, pass by pass, without `generate` around them."""

from collections.abc import Sequence
from typing import Any

import torch

from offload_rt.baselines.workers.harness import Clock

_NO_NUMBERS = "the logits are NaN or infinite"


def greedy(
    model: Any,  # noqa: ANN401 - whatever calls like a transformers model
    device: str,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    end_tokens: frozenset[int],
    clock: Clock,
) -> list[list[int]]:
    """Continue prompts that go through the model together, the shorter ones padded on the left.

    `device` is where tokens go: a model that is partly offloaded cannot tell. A sequence that has
    ended takes part until all have, as in `generate`; its tokens do not count.
    """
    width = max(map(len, prompts))
    padding = [width - len(ids) for ids in prompts]
    rows = [[0] * pad + list(ids) for pad, ids in zip(padding, prompts, strict=True)]
    ids = torch.tensor(rows, device=device)
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=device)
    padded = any(padding)
    answers: list[list[int]] = [[] for _ in prompts]
    active = set(range(len(prompts)))
    cache = None
    clock.tick(0)
    while active:
        places: dict[str, Any] = {}
        if padded:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            places = {"attention_mask": mask, "position_ids": positions[:, -ids.shape[1] :]}
        out = model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **places
        )
        cache = out.past_key_values
        largest, ids = out.logits[:, -1].max(-1, keepdim=True)
        told = torch.where(largest.isfinite(), ids, -1)
        for index, token in enumerate(told[:, 0].tolist()):
            if index in active:
                if token < 0:
                    raise ArithmeticError(_NO_NUMBERS)
                answers[index].append(token)
                if token in end_tokens or len(answers[index]) == max_tokens:
                    active.discard(index)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        clock.tick(sum(map(len, answers)))
    return answers


def last_logits(
    model: Any,  # noqa: ANN401 - as above
    device: str,
    ids: Sequence[int],
    tokens: Sequence[int],
) -> dict[str, Any]:
    """Logits of some tokens after a sequence, and the likeliest token."""
    row = torch.tensor([list(ids)], device=device)
    logits = model(input_ids=row, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    if not logits.amax().isfinite():
        raise ArithmeticError(_NO_NUMBERS)
    return {"logits": [float(logits[token]) for token in tokens], "best": int(logits.argmax())}


def limit_device_memory(device: str, limit_bytes: int | None) -> None:
    """Let torch take no more than this of a GPU; on the CPU the process has its cap."""
    if device == "cpu" or limit_bytes is None:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)


def peak_device_bytes(device: str) -> int | None:
    """Most memory torch used of a GPU; None on the CPU."""
    return None if device == "cpu" else int(torch.cuda.max_memory_reserved(device))
