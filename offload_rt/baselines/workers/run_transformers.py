"""Worker: transformers with all weights in memory, alone or with a smaller model assisting."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

from offload_rt.baselines.workers.generation import (
    greedy,
    last_logits,
    limit_device_memory,
    peak_device_bytes,
)
from offload_rt.baselines.workers.harness import Clock, serve, versions


class Ticker(StoppingCriteria):
    """Never stops anything: `generate` asks it after each pass over the model."""

    def __init__(self, clock: Clock, prompt_tokens: int) -> None:
        self._clock, self._prompt_tokens = clock, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """A pass over the model has ended."""
        self._clock.tick(input_ids.shape[1] - self._prompt_tokens)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Transformers:
    """One model, and perhaps one that assists it."""

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Load both onto the device."""
        self.device = settings["device"]
        limit_device_memory(self.device, settings["device_bytes"])
        dtype = getattr(torch, settings["dtype"])
        options = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False}
        self.model = AutoModelForCausalLM.from_pretrained(settings["model"], **options)
        self.model.to(self.device).eval()
        # `generate` fills what a config leaves open from the model's own, such as a penalty of
        # repetition; of that nothing shall count.
        self.model.generation_config = GenerationConfig()
        self.assistant = None
        if settings["draft_model"]:
            self.assistant = AutoModelForCausalLM.from_pretrained(
                settings["draft_model"], **options
            )
            self.assistant.to(self.device).eval()
            given = self.assistant.generation_config
            self.assistant.generation_config = GenerationConfig(
                num_assistant_tokens=given.num_assistant_tokens,
                num_assistant_tokens_schedule=given.num_assistant_tokens_schedule,
                assistant_confidence_threshold=given.assistant_confidence_threshold,
            )
        config = {"attention": self.model.config._attn_implementation, "device": self.device}
        if self.assistant is not None:
            own = self.assistant.generation_config
            config["assistant"] = {
                "num_assistant_tokens": own.num_assistant_tokens,
                "num_assistant_tokens_schedule": own.num_assistant_tokens_schedule,
                "assistant_confidence_threshold": own.assistant_confidence_threshold,
            }
        return {
            "config": config,
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "transformers"),
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
            if self.assistant is None:
                return greedy(self.model, self.device, prompts, max_tokens, end_tokens, clock)
            return [self._assisted(ids, max_tokens, end_tokens, clock) for ids in prompts]

    def gap(self, ids: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """Logits after a sequence."""
        with torch.inference_mode():
            return last_logits(self.model, self.device, ids, tokens)

    def device_peak_bytes(self) -> int | None:
        """Most memory taken of a GPU."""
        return peak_device_bytes(self.device)

    def link_bytes(self) -> None:
        """Nothing crosses a link."""

    def _assisted(
        self, ids: Sequence[int], max_tokens: int, end_tokens: frozenset[int], clock: Clock
    ) -> list[int]:
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=sorted(end_tokens) or None,
            pad_token_id=0,
        )
        row = torch.tensor([list(ids)], device=self.device)
        clock.tick(0)
        out = self.model.generate(
            row,
            attention_mask=torch.ones_like(row),
            generation_config=config,
            assistant_model=self.assistant,
            stopping_criteria=[Ticker(clock, len(ids))],
        )
        answer: list[int] = out[0, len(ids) :].tolist()
        return answer


if __name__ == "__main__":
    sys.exit(serve(Transformers()))
