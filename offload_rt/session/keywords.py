"""The options of `load` and of answers, by name and type; what they are for: `offload_rt.options`.

They are those of `offload-run generate`, without the dashes. A test holds the two together.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Literal, TypedDict

Auto = int | Literal["auto"] | None
Size = int | str | None
Path = str | PathLike[str]


class AnswerOptions(TypedDict, total=False):
    """How an answer is made."""

    max_tokens: int
    stop: str | Sequence[str]
    ignore_eos: bool
    system: str | None
    raw: bool
    sampling: Literal["greedy", "model"]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None


class LoadOptions(AnswerOptions, total=False):
    """Where a model runs, who drafts, and how answers are made where they do not say."""

    device: str
    device_memory: Size | Sequence[int | str]
    host_memory: Size
    dtype: str
    slots: Auto
    resident_layers: Auto
    expert_slots: Auto
    look_ahead: str
    expert_misses: str
    home: str
    wire: str
    context: Auto
    kv: str
    kv_block_tokens: Auto
    kv_folder: Path | None
    exact: Literal["auto", "on", "off"]
    link_bandwidth: float | str | Sequence[float] | None
    readers: int
    threads: Auto
    draft: Path
    draft_tokens: Auto
    draft_shape: str
    draft_window: int | Literal["auto", "full"] | None
    draft_weights: str
    accept: str
    inner_gamma: Auto
    retrieval_budget: int
    retrieval_chunk: int
    retrieval_recent: float | Literal["auto"] | None
    retrieval_rebuild: int
    retrieval_weights: str
    plan: Path | None
    profile: Path | None
    adapter: Path | None
