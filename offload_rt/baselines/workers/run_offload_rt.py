"""Worker: offload_rt itself, with or without a drafter, in our own environment.

It plans each batch size as `generate` plans a run: with the machine's profile, and with what
drafting gave in earlier runs of other verbs. What it sees itself is not kept, so that rounds are
alike.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from offload_rt.baselines.workers.harness import Clock, serve, versions
from offload_rt.config import DraftConfig, GenerationConfig, RuntimeConfig, SamplingConfig
from offload_rt.device.kinds import DeviceKind
from offload_rt.engine import Engine, Run
from offload_rt.errors import NumbersError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.options import record_of
from offload_rt.planning.planner import Means
from offload_rt.session.means import means_for, speeds_for


class OffloadRt:
    """One engine with room for as many sequences as a batch has."""

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Place and load the model."""
        runtime, draft = (
            record_of(RuntimeConfig, settings["runtime"]),
            record_of(DraftConfig, settings["draft"]),
        )
        checkpoint = open_checkpoint(Path(settings["model"]))

        def means(device: DeviceKind) -> Means:
            speeds = speeds_for(None, device, runtime.device)
            return means_for(checkpoint, SamplingConfig(), speeds, draft)

        self.engine = Engine(
            checkpoint,
            runtime,
            capacities=[settings["longest_tokens"]] * settings["batch"],
            prompt_tokens=settings["prompt_tokens"],
            draft=draft,
            means=means,
        )
        self.on_cpu = self.engine.device.torch_device.type == "cpu"
        placement = self.engine.placement
        return {
            "config": {
                "runtime": settings["runtime"],
                "draft": asdict(self.engine.draft),  # settled
                "first_draft_tokens": self.engine.plan.first_nodes,
                "resident_layers": len(placement.resident),
                "streamed_layers": len(placement.streamed),
                "slots": placement.slots,
                "bytes_per_pass": self.engine.bytes_per_pass,
                "planned_device_bytes": placement.device_bytes,
                "home": str(placement.home),
            },
            "threads": torch.get_num_threads(),
            "versions": versions("offload-rt", "torch", "transformers"),
        }

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_tokens: frozenset[int],
        clock: Clock,
    ) -> list[list[int]]:
        """Continue all prompts at once, each from empty caches."""
        self.engine.forget()
        generation = GenerationConfig(max_tokens=max_tokens)
        run = Run.start(self.engine, prompts, SamplingConfig(), generation, end_tokens)
        clock.tick(0)
        run.prefill()
        clock.tick(sum(len(s.emitted) for s in run.sequences))
        while run.active:
            run.step()
            clock.tick(sum(len(s.emitted) for s in run.sequences))
        return [sequence.emitted for sequence in run.sequences]

    def gap(self, ids: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """Logits after a sequence."""
        self.engine.forget()
        logits = self.engine.forward([(0, ids)], reuse=False)[0].float()
        if not logits.amax().isfinite():
            raise NumbersError("the logits are NaN or infinite")
        return {"logits": [float(logits[token]) for token in tokens], "best": int(logits.argmax())}

    def device_peak_bytes(self) -> int | None:
        """Most device memory the engine used; on the CPU the process tells, as for all."""
        return None if self.on_cpu else self.engine.device.peak_bytes()

    def link_bytes(self) -> int:
        """Bytes of layers and KV that crossed the link."""
        return self.engine.link_bytes()


if __name__ == "__main__":
    sys.exit(serve(OffloadRt()))
