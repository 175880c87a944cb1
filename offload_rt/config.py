"""What a user sets, as frozen records. A default lives here and nowhere else."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from offload_rt.errors import ConfigError
from offload_rt.options import Form, check_bounds, option, settables

T = TypeVar("T")

SEEDS = 2**63  # that there are
MOST_SEQUENCES = 256  # at once: Python's part of a step grows with them
MOST_READ = 2048  # tokens of prompts in one sweep of several sequences, at most

_SHORT_DTYPES = {
    **dict.fromkeys(("bf16", "bfloat"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
}


class DType(StrEnum):
    """Number format the model computes in; `auto` is the checkpoint's own."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class HomeKind(StrEnum):
    """Where streamed layers live: pinned host memory, the checkpoint's own files, or both."""

    AUTO = "auto"
    HOST = "host"
    DISK = "disk"
    SPLIT = "split"

    @property
    def in_memory(self) -> bool:
        """Whether layers, or some of them, are asked to be in host memory, or are there."""
        return self in {HomeKind.HOST, HomeKind.SPLIT}


class Wire(StrEnum):
    """Form in which weights of layers lie in memory and cross the link."""

    AUTO = "auto"
    RAW = "raw"
    LOSSLESS = "lossless"
    INT8 = "int8"
    INT4 = "int4"


class KVPlace(StrEnum):
    """Where committed keys and values live: on the device, in host memory, or in a file.

    `none` is for reading texts only (`Engine.hidden`): a layer's are gone once the next begins.
    """

    AUTO = "auto"
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    NONE = "none"


class Exact(StrEnum):
    """Whether the bits of a row depend on its past alone, not on the pass it is in.

    `auto` is on where anything streams or anyone drafts, and in bf16 on a processor with AMX, as
    far as that can be had.
    """

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class LookAhead(StrEnum):
    """Whether experts are copied before their layer asks for them.

    `auto` compares passes with and without it, and keeps it only where they are faster.
    """

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class ExpertMisses(StrEnum):
    """Who computes experts that no slot holds when a layer asks for them.

    `link` brings them to the device, `host` has the processor compute some of them where they lie
    meanwhile; `auto` is `host` where `--exact` is off and that is predicted to take less time.
    """

    AUTO = "auto"
    LINK = "link"
    HOST = "host"


class AcceptRule(StrEnum):
    """When a drafted token is accepted.

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
        return self not in (DraftWeights.AUTO, DraftWeights.SAME)


# Eight rows with the root, for which a CPU's 8-bit products take as long as for one (measured: 1.9
# ms a layer of 1.5B for 1 to 8 rows, 3.3 ms for 9).
INNER_NGRAM_TOKENS = 7
_INNER_MODEL_TOKENS = 4
INNER_WINDOW_TOKENS = 256  # what a draft model sees below triforce, as in its paper
RECENT_SHARES = (0.25, 1.0)  # what a text says where, and a sink cache; tried in this order
SINK_TOKENS = 16  # first tokens a window keeps; StreamingLLM needs 4, TriForce keeps 16


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterWords:
    """How a kind of drafter is asked for; its code is a folder of `speculative/`.

    Attributes:
        about: who that is, for --help.
        tokens: of a draft, where nobody says; 0: nobody drafts, or who does is not chosen yet.
        called: in the help of --draft-tokens.
        argument: what follows its name and a colon; empty: nothing.
        bare: its name may stand without that.
        choices: what may follow it, if that is not a name somebody gave; `argument` lists them.
        over_retrieval: it drafts over a retrieval cache, with another drafter below.
        over_own_rows: it drafts over the target's own cache, behind what is committed there.
        of_hidden: it drafts with a layer of its own, from the target's hidden states.
        within: it reads those between the target's layers.
        folder: of its code.
    """

    about: str
    tokens: int = 0
    called: str = ""
    argument: str = ""
    bare: bool = True
    choices: tuple[str, ...] = ()
    over_retrieval: bool = False
    over_own_rows: bool = False
    of_hidden: bool = False
    within: bool = False
    folder: str = ""

    def takes(self, argument: str) -> bool:
        """Whether that may follow its name."""
        return argument in self.choices if self.choices else bool(self.argument)


DRAFTERS = {
    "auto": DrafterWords(
        about="auto[:MODEL] (whichever of those without a folder, or of them and a small MODEL, "
        "should be fastest)",
        argument="MODEL",
    ),
    "none": DrafterWords(about="none"),
    "ngram": DrafterWords(
        about="ngram (phrases of the text, and the model's own earlier guesses)",
        tokens=16,
        called="ngram",
        folder="ngram",
    ),
    "model": DrafterWords(
        about="MODEL or model:MODEL, a small one with the same tokenizer",
        tokens=64,
        called="a model",
        argument="MODEL",
        bare=False,
        folder="draft_model",
    ),
    "medusa": DrafterWords(
        about="medusa:HEADS, heads trained on this model's hidden state",
        tokens=63,
        called="heads",
        argument="HEADS",
        bare=False,
        folder="medusa",
    ),
    "triforce": DrafterWords(
        about="triforce[:MODEL], this model itself over a part of a long context, with ngram or "
        "MODEL drafting for it",
        tokens=16,
        called="triforce",
        argument="MODEL",
        over_retrieval=True,
        folder="triforce",
    ),
    "self": DrafterWords(
        about="self[:int4|int8], this model with rounded copies in place of its streamed layers",
        tokens=64,
        called="self",
        argument="int4|int8",
        choices=(DraftWeights.INT4, DraftWeights.INT8),
        over_own_rows=True,
        folder="self_draft",
    ),
    "mtp": DrafterWords(
        about="mtp, the module for drafting that some checkpoints carry",
        tokens=8,
        called="mtp",
        of_hidden=True,
        folder="mtp",
    ),
    "eagle3": DrafterWords(
        about="eagle3:HEAD, an EAGLE-3 head trained on this model's hidden states",
        tokens=32,
        called="an EAGLE-3 head",
        argument="HEAD",
        bare=False,
        of_hidden=True,
        within=True,
        folder="eagle3",
    ),
}


def _written() -> str:
    """All that --draft may be."""
    forms = []
    for name, words in DRAFTERS.items():
        forms += [name] * words.bare + [f"{name}:{words.argument}"] * bool(words.argument)
    return f"{', '.join(forms[:-1])} or {forms[-1]}"


def _about_drafters(names: Collection[str] = DRAFTERS) -> str:
    *most, last = [words.about for name, words in DRAFTERS.items() if name in names]
    return f"{', '.join(most)}, or {last}"


_DRAFT_HELP = "Who drafts tokens that one pass then checks: "
# Where nothing runs that could be measured.
STATED_DRAFT_HELP = (
    f"{_DRAFT_HELP}{_about_drafters(DRAFTERS.keys() - {'auto'})}. How often drafts are right is "
    "for you to say, with --acceptance or --tokens-per-pass."
)


def _default_tokens() -> str:
    drafters = [words for words in DRAFTERS.values() if words.tokens]
    return ", ".join(f"{words.tokens} for {words.called}" for words in drafters)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalConfig:
    """The retrieval cache of TriForce (arXiv:2404.11912, section 4): what a draft pass may read.

    Attributes:
        budget_tokens: context it holds after a build, of each layer and KV head.
        rebuild_tokens: tokens after which it is built anew; or when the acceptance rate falls.
        retrieval_weights: `auto` lets the planner choose; without one it is `same`.
    """

    budget_tokens: int = option(
        1024, "--retrieval-budget", "With triforce: tokens of context its passes read."
    )
    chunk_tokens: int = option(
        8,
        "--retrieval-chunk",
        "With triforce: consecutive tokens that are read or left out together.",
        low=1,
        high=1024,
        accepted="1 to 1024",
    )
    recent_share: float | None = option(
        None,
        "--retrieval-recent",
        "With triforce: part of the budget that is the newest tokens; 1 leaves nothing else "
        f"but the very first. auto tries {' and '.join(f'{s:g}' for s in RECENT_SHARES)} and keeps "
        "to the one of which more is accepted.",
        low=0.0,
        high=1.0,
        accepted="auto or 0 to 1",
    )
    rebuild_tokens: int = option(
        16,
        "--retrieval-rebuild",
        "With triforce: tokens after which it is chosen anew what is read.",
        low=1,
        high=2**20,
        accepted=f"1 to {2**20}",
    )
    retrieval_weights: DraftWeights = option(
        DraftWeights.AUTO,
        "--retrieval-weights",
        "With triforce: draft with the model's own weights (same) or with rounded copies of "
        "them that stay on the device: faster, and nothing is streamed to draft; answers stay the "
        "same. auto takes what is predicted to be faster.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        chunk, budget = self.chunk_tokens, self.budget_tokens
        if not 4 * chunk <= budget <= 2**20:
            raise ConfigError(
                f"--retrieval-budget is {budget}, accepted is {4 * chunk} (4 chunks of {chunk}) "
                f"to {2**20}"
            )

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
        draft_tokens: nodes of a draft; None takes the drafter's own default.
        draft_window: 0 shows a draft model all, None takes the drafter's own default.
        inner_tokens: with triforce, nodes its own drafter proposes per retrieval pass; None takes
            that drafter's default.
        retrieval: with triforce, what its passes read.
    """

    draft: str = option(
        "none",
        "--draft",
        f"{_DRAFT_HELP}{_about_drafters()}.",
        form=Form.DRAFTER,
    )
    draft_tokens: int | None = option(
        None,
        "--draft-tokens",
        "Tokens of a draft; auto is the number predicted to be fastest, "
        "corrected while running. With sampling and --seed auto is a fixed number where the answer "
        f"rests on the draft or passes are not row-invariant (--exact): {_default_tokens()}.",
        low=1,
        high=1024,
        accepted="auto or 1 to 1024",
    )
    shape: DraftShape = option(
        DraftShape.AUTO,
        "--draft-shape",
        "Whether a model, mtp or eagle3 drafts one continuation or a tree of several; auto is a "
        "tree from 9 tokens on.",
    )
    draft_window: int | None = option(
        None,
        "--draft-window",
        f"Tokens a draft model sees at most: the first {SINK_TOKENS} and the newest; full is "
        f"the whole sequence, auto is full, or {INNER_WINDOW_TOKENS} below triforce.",
        form=Form.WINDOW,
    )
    draft_weights: DraftWeights = option(
        DraftWeights.AUTO,
        "--draft-weights",
        "How the weights of a draft model, or of the layer of mtp or eagle3, are kept: as in the "
        "files, or rounded, which is faster and smaller and changes guesses, never answers; auto "
        "is int8 for bf16 models on a CPU. What feeds that layer, and its output head, stay as "
        "they are.",
    )
    accept: AcceptRule = option(
        AcceptRule.LOSSLESS,
        "--accept",
        "When a drafted token is accepted: lossless keeps the model's distribution (the same "
        "tokens where the answer is greedy), greedy is for --temperature 0 only, typical changes "
        "the distribution.",
    )
    inner_tokens: int | None = option(
        None,
        "--inner-gamma",
        "With triforce: tokens drafted for each of its own passes; auto is "
        f"{INNER_NGRAM_TOKENS} for ngram, {_INNER_MODEL_TOKENS} for a model.",
        low=1,
        high=256,
        accepted="auto or 1 to 256",
    )
    retrieval: RetrievalConfig = RetrievalConfig()

    def __post_init__(self) -> None:
        kind, colon, name = self.draft.partition(":")
        words = DRAFTERS.get(kind)
        written = words is not None and (words.takes(name) if colon else words.bare)
        if words is None or not written or bool(colon) != bool(name):
            raise ConfigError(f"--draft {self.draft} is not known: use {_written()}")
        tokens = self.draft_tokens
        check_bounds(self)
        if not words.tokens and tokens is not None:
            raise ConfigError(f"--draft-tokens has no effect with --draft {kind}: name who drafts")
        if not self.grows and self.shape is not DraftShape.AUTO:
            raise ConfigError("--draft-shape is for drafting with a MODEL, self, mtp or eagle3")
        if not self.has_weights and self.draft_weights is not DraftWeights.AUTO:
            raise ConfigError("--draft-weights is for drafting with a MODEL, mtp or eagle3")
        if not self.model and self.draft_window is not None:
            raise ConfigError("--draft-window is for drafting with a MODEL")
        inner = self.inner_tokens
        over = " or ".join(name for name, words in DRAFTERS.items() if words.over_retrieval)
        if not words.over_retrieval and inner is not None:
            raise ConfigError(f"--inner-gamma is for --draft {over}")
        if not words.over_retrieval and self.retrieval != RetrievalConfig():
            raise ConfigError(f"--retrieval-... options are for --draft {over}")
        if words.over_retrieval:
            _ = self.inner  # checks its own part
        else:
            self._check_window()
        if not self.drafts and self.accept is AcceptRule.TYPICAL:
            raise ConfigError("--accept typical has no effect without --draft")

    @property
    def kind(self) -> str:
        """Its name in `DRAFTERS`."""
        return self.draft.partition(":")[0]

    @property
    def words(self) -> DrafterWords:
        """How its kind is asked for."""
        return DRAFTERS[self.kind]

    @property
    def automatic(self) -> bool:
        """Whether the planner chooses who drafts."""
        return self.kind == "auto"

    @property
    def drafts(self) -> bool:
        """Whether anybody does, or may come to."""
        return self.automatic or self.words.tokens > 0

    @property
    def over_retrieval(self) -> bool:
        """Whether drafts are made over a retrieval cache, with another drafter below."""
        return self.words.over_retrieval

    @property
    def answers_rest_on_it(self) -> bool:
        """Whether a sampled answer depends on what is drafted: it is drawn, or a rule is not exact.

        A chain of a network is drawn; of a tree, and of all others, nodes are chosen. Whom `auto`
        chooses is not known here.
        """
        draws = self.over_retrieval or (self.grows and self.shape is not DraftShape.TREE)
        return (draws and not self.automatic) or self.accept is AcceptRule.TYPICAL

    def is_made_together(self, *, sampled: bool) -> bool:
        """Whether a network may make such drafts of several sequences in the same passes.

        Not where a sampled answer rests on the draft, which is to be the same whoever else is
        there, to the last bit: where tokens are drawn, or acceptance is typical.

        Args:
            sampled: answers are.
        """
        rests = not self.as_tree or self.accept is AcceptRule.TYPICAL
        return not (sampled and rests)

    @property
    def model(self) -> str:
        """The draft model, as the user named it; empty for other drafters."""
        return self._named("MODEL")

    @property
    def grows(self) -> bool:
        """Whether a network drafts, chains or trees that it grows."""
        return bool(self.model) or self.words.over_own_rows or self.words.of_hidden

    @property
    def has_weights(self) -> bool:
        """Whether weights draft that are neither the target's own nor copies of them."""
        return bool(self.model) or self.words.of_hidden

    @property
    def heads(self) -> str:
        """The Medusa heads, as the user named them; empty for other drafters."""
        return self._named("HEADS")

    @property
    def module(self) -> str:
        """The folder of a layer that drafts from hidden states, as the user named it; or empty."""
        return self._named("HEAD")

    @property
    def copies(self) -> DraftWeights:
        """How copies of the target's own layers are kept that draft; `same`: there are none."""
        if self.over_retrieval:
            return self.retrieval.retrieval_weights if self.retrieval.rounded else DraftWeights.SAME
        if not self.words.over_own_rows:
            return DraftWeights.SAME
        return DraftWeights(self.draft.partition(":")[2] or DraftWeights.AUTO)

    @property
    def pending_rows(self) -> int:
        """Rows the target's cache needs beyond the sequence itself."""
        return max(self.nodes, self.scratch_rows if self.words.over_own_rows else 0)

    @property
    def nodes(self) -> int:
        """Nodes of a draft, at most."""
        return self.draft_tokens or self.words.tokens

    @property
    def inner(self) -> "DraftConfig":
        """Who drafts for the retrieval passes of triforce."""
        tokens = self.inner_tokens or (_INNER_MODEL_TOKENS if self.model else INNER_NGRAM_TOKENS)
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

    def chosen(self, draft: str, tokens: int | None = None) -> "DraftConfig":
        """Of `auto`: the same with that drafter. What is said of MODEL is not for others.

        Nor is how drafted tokens are accepted for none.

        Args:
            draft: who drafts.
            tokens: of a draft; None: the drafter's own default.

        Raises:
            ConfigError: the window is too small for them.
        """
        if draft == f"model:{self.model}":
            return replace(self, draft=draft, draft_tokens=tokens)
        return replace(
            self,
            draft=draft,
            draft_tokens=tokens,
            shape=DraftShape.AUTO,
            draft_window=None,
            draft_weights=DraftWeights.AUTO,
            accept=AcceptRule.LOSSLESS if draft == "none" else self.accept,
        )

    def limited(self, nodes: int | None) -> "DraftConfig":
        """The same with at most `nodes` nodes."""
        if nodes is None or nodes >= self.nodes:
            return self
        return replace(self, draft_tokens=nodes)

    @property
    def window_tokens(self) -> int | None:
        """Tokens of the sequence a draft model sees at most; None: all."""
        return self.draft_window or None

    def cache_rows(self, tokens: int) -> int:
        """Rows of a draft model's cache for a sequence of `tokens`."""
        return min(tokens, self.window_tokens or tokens) + self.scratch_rows

    @property
    def tree_breadth(self) -> int:
        """Nodes a model is fed in one pass while it grows a tree."""
        if self.words.over_own_rows:  # it is mostly right, so its trees are narrow and deep
            return 4 if self.nodes <= 64 else 8
        if self.nodes <= 256:
            return 8 if self.nodes <= 64 else 16
        return 32  # on a GPU, where rows are free; Sequoia's trees of 768 nodes have 64

    @property
    def tree_passes(self) -> int:
        """Draft passes for a tree: 15 for 64 nodes, 20 for 256, as deep as such trees get.

        A model that drafts for itself may make twice as many, and ends where they gain too little.
        """
        rate = 5.0 if self.words.over_own_rows else 2.5
        return max(2, math.floor(rate * math.log2(self.nodes)))

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

    def _named(self, argument: str) -> str:
        return self.draft.partition(":")[2] if self.words.argument == argument else ""

    def _check_window(self) -> None:
        nodes = max(1, self.nodes)  # how many `auto` may come to is not known here
        window, least = self.window_tokens, SINK_TOKENS + nodes + 1
        if window is not None and window < least:
            advice = "raise it or lower --draft-tokens" if nodes > 1 else "raise it"
            raise ConfigError(
                f"--draft-window is {window}, accepted is auto, full or {least} or more: the first "
                f"{SINK_TOKENS} tokens, the {nodes} of a draft and one to go on from; {advice}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How a token is drawn from logits.

    Attributes:
        seed: source of randomness; None draws one, and the run reports it.
    """

    temperature: float = option(
        0.0,
        "--temperature",
        "Randomness of the answer. 0 is greedy: the likeliest token always, exact and repeatable.",
        also=("--temp",),
        low=0.0,
        high=100.0,
        accepted="0 to 100",
    )
    top_k: int = option(
        0,
        "--top-k",
        "Sample from the K likeliest tokens; 0 turns it off.",
        low=0,
        accepted="0 (off) or more",
    )
    top_p: float = option(
        1.0,
        "--top-p",
        "Sample from the fewest tokens with this probability together; 1 turns it off.",
        low=0.0,
        above=True,
        high=1.0,
        accepted="above 0, up to 1 (off)",
    )
    min_p: float = option(
        0.0,
        "--min-p",
        "Drop tokens below this share of the likeliest one's probability; 0 turns it off.",
        low=0.0,
        high=1.0,
        below=True,
        accepted="0 (off) to below 1",
    )
    seed: int | None = option(
        None,
        "--seed",
        "Source of randomness; the same seed gives the same answer on one machine. Given one where "
        "passes are not row-invariant (--exact), measured times decide nothing about drafting.",
        also=("-s",),
        form=Form.INTEGER,
        low=0,
        high=SEEDS,
        below=True,
        accepted="0 to 2^63 - 1",
        unset="drawn, and reported",
    )

    def __post_init__(self) -> None:
        check_bounds(self)

    def seeds(self, count: int) -> list[int]:
        """A seed for each of several answers: this one and those after it; 0 follows the last."""
        return [((self.seed or 0) + place) % SEEDS for place in range(count)]

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def repeats(self) -> bool:
        """Whether a sampled answer is to be the same again."""
        return self.seed is not None and not self.greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """When an answer ends."""

    max_tokens: int = option(
        512,
        "--max-tokens",
        "Most tokens of an answer.",
        also=("-n",),
        low=1,
        accepted="1 or more",
    )
    stop: tuple[str, ...] = option(
        (),
        "--stop",
        "Text that ends the answer and is not part of it; may be given several times.",
        unset="none",
    )
    ignore_eos: bool = option(
        False,
        "--ignore-eos",
        "Go on after the model's end-of-text token, for measuring.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if any(not text for text in self.stop):
            raise ConfigError("--stop is empty: give a text that ends the answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Where the model runs and what it may use.

    Attributes:
        device_limit_bytes: None takes what is free, as do others whose default is None.
        resident: these very layers, as a plan names them; None chooses.
        whole_layers: so many layers have their experts in them where those of others come one by
            one, as a plan says.
        machines: names of the machines that have a device each; empty: all are on this one.
        machine_host_bytes: what each may use of its host memory; None: as `host_limit_bytes` says.
        prefill_chunk_tokens: prompt tokens that go through a layer at once.
        threads: None is what affinity and the cgroup's quota allow.
    """

    device: str = option(
        "auto",
        "--device",
        "auto, cpu, cuda or cuda:N; or several with commas between them, which have the model's "
        "layers in turn: cuda:0,cuda:1, or cpu,cpu with two emulated links.",
    )
    device_limit_bytes: int | tuple[int, ...] | None = option(
        None,
        "--device-memory",
        "All memory of the run on the device: 2GiB, 1500MiB, or bytes; on each of several, or "
        "22GiB,20GiB.",
        form=Form.SIZES,
        unset="what is free",
    )
    host_limit_bytes: int | None = option(
        None,
        "--host-memory",
        "Host memory for streamed layers and KV, with --home host or --kv host.",
        form=Form.SIZE,
        unset="what is free",
    )
    dtype: DType = option(
        DType.AUTO,
        "--dtype",
        "Number format of the computation, bf16, fp16 and fp32 for short; auto is the "
        "checkpoint's own.",
        short=_SHORT_DTYPES,
    )
    slots: int | None = option(
        None,
        "--slots",
        "Device buffers that streamed layers share.",
        low=1,
        high=64,
        accepted="auto or 1 to 64",
    )
    resident_layers: int | None = option(
        None,
        "--resident-layers",
        "Layers kept on the device; auto is as many as fit, 0 streams all.",
        low=0,
        accepted="auto or 0 or more",
    )
    resident: tuple[int, ...] | None = None
    whole_layers: int = 0
    machines: tuple[str, ...] = ()
    machine_host_bytes: tuple[int | None, ...] = ()
    expert_slots: int | None = option(
        None,
        "--expert-slots",
        "Device buffers for experts of a mixture, which are streamed one by one; auto is as many "
        "as fit, 0 streams whole layers.",
        low=0,
        high=2**20,
        accepted=f"auto or 0 to {2**20}",
    )
    look_ahead: LookAhead = option(
        LookAhead.AUTO,
        "--look-ahead",
        "Ask the next layer's router which experts it should need, and copy them while nothing "
        "else is copied. auto tries it and keeps it where passes get faster; changes no token.",
    )
    expert_misses: ExpertMisses = option(
        ExpertMisses.AUTO,
        "--expert-misses",
        "What is done with experts that no slot of a GPU holds: link brings them, host computes "
        "some of them on the CPU where they lie meanwhile. Bits then go by what is in slots, so "
        "host needs --exact off; auto is host there, as far as that is predicted to be faster.",
    )
    home: HomeKind = option(
        HomeKind.AUTO,
        "--home",
        "Where streamed layers live; auto is host memory on CUDA and the files on CPU. split keeps "
        "as many in host memory as --host-memory allows and the others in the files, and so does "
        "auto on CUDA where not all fit.",
    )
    wire: Wire = option(
        Wire.AUTO,
        "--wire",
        "Form in which weights of layers lie in memory and cross the link: raw is as they are, of "
        "packed folders unpacked; lossless is the code of packed folders, unpacked when they "
        "compute; auto is whichever is predicted to be faster. int8 and int4 round weights while "
        "they are loaded, which makes another model of it, and output says so.",
    )
    context_tokens: int | None = option(
        None,
        "--context",
        "Tokens of prompt and answer to set memory aside for.",
        also=("-c", "--ctx-size"),
        low=1,
        accepted="auto or 1 or more",
    )
    kv: KVPlace = option(
        KVPlace.AUTO,
        "--kv",
        "Where keys and values of past tokens live; auto is the device if they fit there, "
        "else host memory for CUDA and a file for the CPU.",
    )
    kv_block_tokens: int | None = option(
        None,
        "--kv-block-tokens",
        "Tokens of KV that are copied to the device at once; auto makes blocks of 4 MiB, on CUDA "
        "of 32 MiB and as many as there is room for.",
        low=1,
        accepted="auto or 1 or more",
    )
    kv_folder: str | None = option(
        None,
        "--kv-folder",
        "Where the file for --kv disk is made; it has no name and leaves nothing behind.",
        form=Form.PATH,
        unset="$TMPDIR or /var/tmp",
    )
    exact: Exact = option(
        Exact.AUTO,
        "--exact",
        "Row-invariant passes: a row's logits are the same bits in any pass, so drafting changes "
        "no token, in bf16 too. auto is on where layers or KV stream or anyone drafts, and "
        "in bf16 on a processor with AMX.",
    )
    prefill_chunk_tokens: int = 512
    link_bytes_per_s: float | tuple[float, ...] | None = option(
        None,
        "--link-bandwidth",
        "Emulate a link of this many GB/s, or one to each of several devices: 1,1; CPU with --home "
        "host or --kv host only.",
        form=Form.RATES,
        low=0,
        above=True,
        accepted="above 0",
        unset="none",
    )
    readers: int = option(
        4, "--readers", "File reads kept in flight.", low=1, high=64, accepted="1 to 64"
    )
    threads: int | None = option(
        None,
        "--threads",
        "Threads of the CPU that compute.",
        also=("-t",),
        low=1,
        high=1024,
        accepted="auto or 1 to 1024",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.kv_folder is not None and self.kv not in (KVPlace.AUTO, KVPlace.DISK):
            raise ConfigError("--kv-folder is where KV lives on disk: add --kv disk")
        if self.kv_block_tokens is not None and self.kv is KVPlace.DEVICE:
            raise ConfigError("--kv-block-tokens has no effect with --kv device")
        if self.prefill_chunk_tokens < 1:
            raise ConfigError(
                f"prefill_chunk_tokens is {self.prefill_chunk_tokens}, accepted is 1 or more"
            )
        whole = self.slots is not None or self.resident_layers is not None
        if self.expert_slots and whole:
            raise ConfigError(
                "--slots and --resident-layers are of whole layers, --expert-slots is of experts: "
                "leave out one of them"
            )
        if self.look_ahead is LookAhead.ON and self.expert_slots == 0:
            raise ConfigError(
                "--look-ahead is of experts that come one by one, with --expert-slots 0 layers are "
                "whole: leave out one of them"
            )
        self._check_misses()
        count = len(self.device_names)
        for field in settables(RuntimeConfig):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) != count:
                raise ConfigError(
                    f"{field.option.flag} has {len(value)} values, --device {self.device} names "
                    f"{count}: give one for each, or one for all"
                )

    def _check_misses(self) -> None:
        if self.expert_misses is not ExpertMisses.HOST:
            return
        if self.exact is not Exact.OFF:
            raise ConfigError(
                "--expert-misses host makes bits go by what is in slots: add --exact off"
            )
        if self.expert_slots == 0:
            raise ConfigError(
                "--expert-misses is of experts that come one by one, with --expert-slots 0 layers "
                "are whole: leave out one of them"
            )

    @property
    def misses_on_host(self) -> bool:
        """Whether a processor may compute experts that a GPU lacks."""
        return self.exact is Exact.OFF and self.expert_misses is not ExpertMisses.LINK

    @property
    def device_names(self) -> tuple[str, ...]:
        """The devices that have the layers in turn; the first has embedding, head and drafter."""
        return tuple(self.device.split(","))

    @property
    def only_limit_bytes(self) -> int | None:
        """The limit of the only device.

        Raises:
            ConfigError: there are several.
        """
        limit = self.device_limit_bytes
        if len(self.device_names) > 1 or isinstance(limit, tuple):
            raise ConfigError(f"--device {self.device} names several devices, name one here")
        return limit

    @property
    def only_link_bytes_per_s(self) -> float | None:
        """The emulated link of the only device."""
        assert not isinstance(self.link_bytes_per_s, tuple)  # as of `each_device`
        return self.link_bytes_per_s

    def each_device(self) -> "list[RuntimeConfig]":
        """The same for each of the devices, with its own limit and link."""
        limits = _for_each(self.device_limit_bytes, len(self.device_names))
        links = _for_each(self.link_bytes_per_s, len(self.device_names))
        return [
            replace(self, device=name, device_limit_bytes=limit, link_bytes_per_s=link)
            for name, limit, link in zip(self.device_names, limits, links, strict=True)
        ]


def _for_each(value: T | tuple[T, ...], count: int) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,) * count
