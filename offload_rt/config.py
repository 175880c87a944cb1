"""What a user sets, as frozen records. A default lives here and nowhere else."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from offload_rt.errors import ConfigError


def _require(ok: bool, flag: str, value: object, accepted: str) -> None:
    if not ok or (isinstance(value, float) and math.isnan(value)):
        raise ConfigError(f"{flag} is {value}, accepted is {accepted}")


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


class KVPlace(StrEnum):
    """Where committed keys and values live: on the device, in host memory, or in a file.

    `none` is for reading texts only (`Engine.hidden`): a layer's are gone once the next begins.
    """

    AUTO = "auto"
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    NONE = "none"


class AcceptRule(StrEnum):
    """When a drafted token stands.

    `lossless` keeps the target's distribution, `greedy` its likeliest tokens; `typical` is Medusa's
    threshold and changes the distribution.
    """

    LOSSLESS = "lossless"
    GREEDY = "greedy"
    TYPICAL = "typical"


class DraftShape(StrEnum):
    """Whether a draft model drafts one continuation or several at once."""

    AUTO = "auto"
    CHAIN = "chain"
    TREE = "tree"


class DraftWeights(StrEnum):
    """How weights that only draft are kept: as in their files, or rounded to 8 or 4 bits."""

    AUTO = "auto"
    SAME = "same"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def rounds(self) -> bool:
        """Whether they are rounded copies; `auto` is not settled yet."""
        return self in (DraftWeights.INT8, DraftWeights.INT4)


# Eight rows with the root, for which a CPU's 8-bit products take as long as for one (measured: 1.9
# ms a layer of 1.5B for 1 to 8 rows, 3.3 ms for 9).
INNER_NGRAM_TOKENS = 7
INNER_WINDOW_TOKENS = 256  # what a draft model sees below triforce, as in its paper
RECENT_SHARES = (0.25, 1.0)  # what a text says where, and a sink cache; tried in this order
SINK_TOKENS = 16  # first tokens a window keeps; StreamingLLM needs 4, TriForce keeps 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalConfig:
    """The retrieval cache of TriForce (arXiv:2404.11912, section 4): what a draft pass may read.

    Attributes:
        budget_tokens: context it holds after a build, of each layer and KV head.
        chunk_tokens: consecutive tokens that are kept or left together.
        recent_share: part of the budget that is the newest tokens; 1 keeps the first chunk and the
            newest tokens only, as a sink cache does. None tries both for each answer and keeps to
            the one of which more is accepted.
        rebuild_tokens: it is built anew after so many tokens, and when drafts are accepted less.
        retrieval_weights: the target drafts from it with its own weights (`same`), or with copies
            rounded to 8 or 4 bits that stay on the device whole, which is faster and, where its own
            are streamed, streams nothing. `auto` lets the planner choose; without one it is `same`.
    """

    budget_tokens: int = 1024
    chunk_tokens: int = 8
    recent_share: float | None = None
    rebuild_tokens: int = 16
    retrieval_weights: DraftWeights = DraftWeights.AUTO

    def __post_init__(self) -> None:
        chunk, budget, rebuild = self.chunk_tokens, self.budget_tokens, self.rebuild_tokens
        _require(1 <= chunk <= 1024, "--retrieval-chunk", chunk, "1 to 1024")
        if not 4 * chunk <= budget <= 2**20:
            raise ConfigError(
                f"--retrieval-budget is {budget}, accepted is {4 * chunk} (4 chunks of {chunk}) "
                f"to {2**20}"
            )
        share = self.recent_share
        share_ok = share is None or 0.0 <= share <= 1.0
        _require(share_ok, "--retrieval-recent", share, "auto or 0 to 1")
        _require(1 <= rebuild <= 2**20, "--retrieval-rebuild", rebuild, f"1 to {2**20}")

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of recent tokens a build may have."""
        return RECENT_SHARES if self.recent_share is None else (self.recent_share,)

    @property
    def rounded(self) -> bool:
        """Whether rounded copies of the target's weights draft."""
        return self.retrieval_weights.rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Who drafts, and how much.

    Attributes:
        draft: `none`, `ngram`, `model:MODEL`, `medusa:HEADS`, `triforce` or `triforce:MODEL`;
            `auto` lets the planner choose among those that need no folder.
        draft_tokens: nodes of a draft; None takes the drafter's own default.
        shape: of a draft model's draft; `auto` is a tree from 9 nodes on.
        draft_window: tokens of the sequence a draft model sees at most, the first `SINK_TOKENS`
            and the newest; 0 shows it all, None takes the drafter's own default.
        draft_weights: how a draft model's weights are kept; `auto` is int8 for bf16 on a CPU, else
            as they are.
        accept: when a drafted token stands.
        inner_tokens: with triforce, nodes its own drafter proposes per retrieval pass; None takes
            that drafter's default.
        retrieval: with triforce, what its passes read.
    """

    draft: str = "none"
    draft_tokens: int | None = None
    shape: DraftShape = DraftShape.AUTO
    draft_window: int | None = None
    draft_weights: DraftWeights = DraftWeights.AUTO
    accept: AcceptRule = AcceptRule.LOSSLESS
    inner_tokens: int | None = None
    retrieval: RetrievalConfig = RetrievalConfig()

    def __post_init__(self) -> None:
        kind, colon, name = self.draft.partition(":")
        kinds = {
            "auto": "",
            "none": "",
            "ngram": "",
            "model": ":",
            "medusa": ":",
            "triforce": colon,
        }
        if colon != kinds.get(kind) or bool(colon) != bool(name):
            raise ConfigError(
                f"--draft {self.draft} is not known: use auto, none, ngram, model:MODEL, "
                "medusa:HEADS, triforce or triforce:MODEL"
            )
        tokens = self.draft_tokens
        tokens_ok = tokens is None or 1 <= tokens <= 1024
        _require(tokens_ok, "--draft-tokens", tokens, "auto or 1 to 1024")
        if kind in ("none", "auto") and tokens is not None:
            raise ConfigError(f"--draft-tokens has no effect with --draft {kind}: name who drafts")
        if not self.model and self.shape is not DraftShape.AUTO:
            raise ConfigError("--draft-shape is for drafting with a MODEL")
        if not self.model and self.draft_weights is not DraftWeights.AUTO:
            raise ConfigError("--draft-weights is for drafting with a MODEL")
        if not self.model and self.draft_window is not None:
            raise ConfigError("--draft-window is for drafting with a MODEL")
        inner = self.inner_tokens
        inner_ok = inner is None or 1 <= inner <= 256
        _require(inner_ok, "--inner-gamma", inner, "auto or 1 to 256")
        if kind != "triforce" and inner is not None:
            raise ConfigError("--inner-gamma is for --draft triforce")
        if kind != "triforce" and self.retrieval != RetrievalConfig():
            raise ConfigError("--retrieval-... options are for --draft triforce")
        if kind == "triforce":
            _ = self.inner  # checks its own part
        else:
            self._check_window()
        if kind == "none" and self.accept is AcceptRule.TYPICAL:
            raise ConfigError("--accept typical has no effect without --draft")

    @property
    def kind(self) -> str:
        """`auto`, `none`, `ngram`, `model`, `medusa` or `triforce`."""
        return self.draft.partition(":")[0]

    @property
    def model(self) -> str:
        """The draft model, as the user named it; empty for other drafters."""
        return "" if self.kind == "medusa" else self.draft.partition(":")[2]

    @property
    def heads(self) -> str:
        """The Medusa heads, as the user named them; empty for other drafters."""
        return self.draft.partition(":")[2] if self.kind == "medusa" else ""

    @property
    def nodes(self) -> int:
        """Nodes of a draft, at most."""
        if self.kind in ("none", "auto"):
            return 0
        default = {"ngram": 16, "model": 64, "medusa": 63, "triforce": 16}
        return self.draft_tokens or default[self.kind]

    @property
    def inner(self) -> "DraftConfig":
        """Who drafts for the retrieval passes of triforce."""
        tokens = self.inner_tokens or (4 if self.model else INNER_NGRAM_TOKENS)
        if not self.model:
            return DraftConfig(draft="ngram", draft_tokens=tokens)
        window = self.draft_window
        if window is None:
            window = max(INNER_WINDOW_TOKENS, SINK_TOKENS + 4 * tokens)
        return DraftConfig(
            draft=f"model:{self.model}",
            draft_tokens=tokens,
            shape=self.shape,
            draft_window=window,
            draft_weights=self.draft_weights,
        )

    def limited(self, nodes: int | None) -> "DraftConfig":
        """The same with at most so many nodes."""
        if nodes is None or nodes >= self.nodes:
            return self
        return replace(self, draft_tokens=nodes)

    @property
    def window_tokens(self) -> int | None:
        """Tokens of the sequence a draft model sees at most; None: all."""
        return self.draft_window or None

    def cache_rows(self, tokens: int) -> int:
        """Rows of a draft model's cache for a sequence of so many tokens."""
        return min(tokens, self.window_tokens or tokens) + self.scratch_rows

    @property
    def tree_breadth(self) -> int:
        """Nodes a draft model is fed in one pass while a tree grows."""
        return 8 if self.nodes <= 64 else 16

    @property
    def tree_passes(self) -> int:
        """Draft passes for a tree: 15 for 64 nodes, 20 for 256, as deep as such trees get."""
        return max(2, math.floor(2.5 * math.log2(self.nodes)))

    @property
    def scratch_rows(self) -> int:
        """Rows a draft model's cache needs beyond the sequence itself."""
        return self.tree_passes * self.tree_breadth if self.as_tree else self.nodes

    @property
    def as_tree(self) -> bool:
        """Whether a draft model grows a tree."""
        if self.shape is DraftShape.AUTO:
            return self.nodes > 8
        return self.shape is DraftShape.TREE

    def _check_window(self) -> None:
        window, least = self.window_tokens, SINK_TOKENS + self.nodes + 1
        if window is not None and window < least:
            raise ConfigError(
                f"--draft-window is {window}, accepted is auto, full or {least} or more: the first "
                f"{SINK_TOKENS} tokens, the {self.nodes} of a draft and one to go on from; "
                "raise it or lower --draft-tokens"
            )


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
        resident: these very layers, as a plan names them; None chooses.
        home: where streamed layers live; `auto` is pinned memory on CUDA where it
            suffices, else the files.
        context_tokens: KV rows set aside per sequence; None sizes them by the request.
        kv: where committed keys and values live; `auto` is the device if they fit there, else
            pinned memory for CUDA and a file for the CPU.
        kv_block_tokens: tokens of KV that are copied to the device at once; None chooses.
        kv_folder: where the file for KV is made; None takes $TMPDIR or /var/tmp.
        prefill_chunk_tokens: prompt tokens that go through a layer at once.
        link_bytes_per_s: emulate a link of this bandwidth (CPU with home `host` only).
        readers: file reads kept in flight.
        threads: of the CPU that compute; None is what affinity and the cgroup's quota allow.
    """

    device: str = "auto"
    device_limit_bytes: int | None = None
    host_limit_bytes: int | None = None
    dtype: DType = DType.AUTO
    slots: int | None = None
    resident_layers: int | None = None
    resident: tuple[int, ...] | None = None
    home: HomeKind = HomeKind.AUTO
    context_tokens: int | None = None
    kv: KVPlace = KVPlace.AUTO
    kv_block_tokens: int | None = None
    kv_folder: str | None = None
    prefill_chunk_tokens: int = 512
    link_bytes_per_s: float | None = None
    readers: int = 4
    threads: int | None = None

    def __post_init__(self) -> None:
        threads_ok = self.threads is None or 1 <= self.threads <= 1024
        _require(threads_ok, "--threads", self.threads, "auto or 1 to 1024")
        slots_ok = self.slots is None or 1 <= self.slots <= 64
        _require(slots_ok, "--slots", self.slots, "auto or 1 to 64")
        resident_ok = self.resident_layers is None or self.resident_layers >= 0
        _require(resident_ok, "--resident-layers", self.resident_layers, "auto or 0 or more")
        context_ok = self.context_tokens is None or self.context_tokens >= 1
        _require(context_ok, "--context", self.context_tokens, "auto or 1 or more")
        block_ok = self.kv_block_tokens is None or self.kv_block_tokens >= 1
        _require(block_ok, "--kv-block-tokens", self.kv_block_tokens, "auto or 1 or more")
        if self.kv_folder is not None and self.kv not in (KVPlace.AUTO, KVPlace.DISK):
            raise ConfigError("--kv-folder is where KV lives on disk: add --kv disk")
        if self.kv_block_tokens is not None and self.kv is KVPlace.DEVICE:
            raise ConfigError("--kv-block-tokens has no effect with --kv device")
        chunk = self.prefill_chunk_tokens
        _require(chunk >= 1, "prefill_chunk_tokens", chunk, "1 or more")
        link_ok = self.link_bytes_per_s is None or self.link_bytes_per_s > 0
        _require(link_ok, "--link-bandwidth", self.link_bytes_per_s, "above 0")
        _require(1 <= self.readers <= 64, "--readers", self.readers, "1 to 64")
