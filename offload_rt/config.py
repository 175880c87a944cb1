"""What a user sets, as frozen records. A default lives here and nowhere else."""

import math
from dataclasses import dataclass
from enum import StrEnum

from offload_rt.errors import ConfigError


class DType(StrEnum):
    """Number format the model computes in; `auto` is the checkpoint's own."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class HomeKind(StrEnum):
    """Where streamed layers live: pinned host memory, or the checkpoint's own files."""

    AUTO = "auto"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How a token is drawn from logits.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set with at least this probability; 1 keeps all.
        min_p: drop tokens below this share of the likeliest one's probability; 0 keeps all.
        seed: source of randomness; None draws one, and the run reports it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(0.0 <= self.temperature <= 100.0, "--temperature", self.temperature, "0 to 100")
        _require(self.top_k >= 0, "--top-k", self.top_k, "0 (off) or more")
        _require(0.0 < self.top_p <= 1.0, "--top-p", self.top_p, "above 0, up to 1 (off)")
        _require(0.0 <= self.min_p < 1.0, "--min-p", self.min_p, "0 (off) to below 1")
        seed_ok = self.seed is None or 0 <= self.seed < 2**63
        _require(seed_ok, "--seed", self.seed, "0 to 2^63 - 1")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """When an answer ends.

    Attributes:
        max_tokens: tokens after which generation stops.
        stop: texts that end the answer; they are not part of it.
        ignore_eos: go on after the model's end-of-text token (for measuring).
    """

    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "--max-tokens", self.max_tokens, "1 or more")
        if any(not text for text in self.stop):
            raise ConfigError("--stop is empty: give a text that ends the answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Where the model runs and what it may use.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        device_limit_bytes: all memory of the run on the device; None takes what is free.
        host_limit_bytes: host memory for the home of streamed layers; None takes what is free.
        dtype: number format of the computation.
        slots: slots of the ring; None lets the placement choose.
        resident_layers: layers kept on the device; None keeps as many as fit.
        home: where streamed layers live; `auto` is pinned memory on CUDA where it
            suffices, else the files.
        context_tokens: KV rows set aside per sequence; None sizes them by the request.
        prefill_chunk_tokens: prompt tokens that go through a layer at once.
        link_bytes_per_s: emulate a link of this bandwidth (CPU with home `host` only).
        readers: file reads kept in flight.
    """

    device: str = "auto"
    device_limit_bytes: int | None = None
    host_limit_bytes: int | None = None
    dtype: DType = DType.AUTO
    slots: int | None = None
    resident_layers: int | None = None
    home: HomeKind = HomeKind.AUTO
    context_tokens: int | None = None
    prefill_chunk_tokens: int = 512
    link_bytes_per_s: float | None = None
    readers: int = 4

    def __post_init__(self) -> None:
        slots_ok = self.slots is None or 1 <= self.slots <= 64
        _require(slots_ok, "--slots", self.slots, "auto or 1 to 64")
        resident_ok = self.resident_layers is None or self.resident_layers >= 0
        _require(resident_ok, "--resident-layers", self.resident_layers, "auto or 0 or more")
        context_ok = self.context_tokens is None or self.context_tokens >= 1
        _require(context_ok, "--context", self.context_tokens, "auto or 1 or more")
        chunk = self.prefill_chunk_tokens
        _require(chunk >= 1, "prefill_chunk_tokens", chunk, "1 or more")
        link_ok = self.link_bytes_per_s is None or self.link_bytes_per_s > 0
        _require(link_ok, "--link-bandwidth", self.link_bytes_per_s, "above 0")
        _require(1 <= self.readers <= 64, "--readers", self.readers, "1 to 64")


def _require(ok: bool, flag: str, value: object, accepted: str) -> None:
    if not ok or (isinstance(value, float) and math.isnan(value)):
        raise ConfigError(f"{flag} is {value}, accepted is {accepted}")
