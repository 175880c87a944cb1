"""Answers made with a model on a device: the passes of a model, and the loop over them."""

from offload_rt.engine.decoding import Run
from offload_rt.engine.engine import NO_DRAFT, Engine
from offload_rt.engine.sequence import Emitted, FinishReason, Request, SequenceState

__all__ = ["NO_DRAFT", "Emitted", "Engine", "FinishReason", "Request", "Run", "SequenceState"]
