"""Answers made with a model on a device: the passes of a model, and the loop over them."""

from offload_rt.engine.decoding import Emitted, FinishReason, Run, SequenceState
from offload_rt.engine.engine import NO_DRAFT, Engine

__all__ = ["NO_DRAFT", "Emitted", "Engine", "FinishReason", "Run", "SequenceState"]
