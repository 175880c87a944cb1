"""Worker: transformers with accelerate's `device_map="auto"`, the rest on disk."""

import collections
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from offload_rt.baselines.workers.generation import (
    greedy,
    last_logits,
    limit_device_memory,
    peak_device_bytes,
)
from offload_rt.baselines.workers.harness import Clock, serve, versions

_STEP_BYTES = 128 * 2**20  # activations and logits of a pass, and the allocator's slack


def memory_map(settings: dict[str, Any]) -> dict[str | int, int]:
    """What accelerate may fill with weights.

    Of the device it gets all but KV and a little for a pass. It leaves room for its largest module
    by itself.
    """
    weights = max(0, settings["device_bytes"] - settings["kv_bytes"] - _STEP_BYTES)
    if settings["device"] == "cpu":
        return {"cpu": weights}
    return {torch.device(settings["device"]).index or 0: weights, "cpu": settings["host_bytes"]}


class Accelerate:
    """A model whose modules are spread over the device, host memory and disk."""

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Place and load the model."""
        self.device = settings["device"]
        limit_device_memory(self.device, settings["device_bytes"])
        limits = memory_map(settings)
        self.model = AutoModelForCausalLM.from_pretrained(
            settings["model"],
            dtype=getattr(torch, settings["dtype"]),
            device_map="auto",
            max_memory=limits,
            offload_folder=settings["scratch"],
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
        places = collections.Counter(map(str, self.model.hf_device_map.values()))
        return {
            "config": {
                "device_map": "auto",
                "max_memory": {str(place): size for place, size in limits.items()},
                "modules": dict(places),
            },
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "transformers", "accelerate"),
        }

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_tokens: frozenset[int],
        clock: Clock,
    ) -> list[list[int]]:
        """Continue all prompts at once."""
        with torch.inference_mode():
            return greedy(self.model, self.device, prompts, max_tokens, end_tokens, clock)

    def gap(self, ids: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """Logits after a sequence."""
        with torch.inference_mode():
            return last_logits(self.model, self.device, ids, tokens)

    def device_peak_bytes(self) -> int | None:
        """Most memory taken of a GPU."""
        return peak_device_bytes(self.device)

    def link_bytes(self) -> None:
        """Not counted by accelerate."""


if __name__ == "__main__":
    sys.exit(serve(Accelerate()))
