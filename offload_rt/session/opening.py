"""A model's folder opened: what belongs to it, and what is refused before torch is imported."""

import filecmp
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from offload_rt.config import DraftConfig, RuntimeConfig
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.session.early import check_context, check_early
from offload_rt.session.observer import Observer
from offload_rt.session.settings import Settings
from offload_rt.speculative.draft_model.pair import check_vocabularies, open_draft_checkpoint
from offload_rt.text import Tokenizer, end_token_ids, load_tokenizer, template_ids

AUTO_CONTEXT_TOKENS = 4096
NO_DRAFT = DraftConfig()


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder, opened.

    Attributes:
        end_tokens: tokens that end an answer.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    end_tokens: frozenset[int]

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.checkpoint.name

    @property
    def max_positions(self) -> int:
        """Longest sequence it was made for."""
        return self.checkpoint.config.max_positions


def open_model(
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    observer: Observer,
    draft: DraftConfig = NO_DRAFT,
    *,
    runs: bool = True,
) -> Model:
    """Load the tokenizer that belongs to a checkpoint; refuse first what is known to be wrong.

    Args:
        checkpoint: headers of the model.
        runtime: where it is to run.
        observer: is told what is waited for.
        draft: who is to draft.
        runs: it will run in this process, so what that needs is imported meanwhile.

    Raises:
        ConfigError: as `check_early`.
        DeviceError: as `check_early`.
        CheckpointError: the tokenizer or what drafts cannot be used.
    """
    check_early(checkpoint, runtime, draft)
    with observer.waiting(f"opening {checkpoint.name}"):
        tokenizer = Tokenizer(checkpoint.folder, checkpoint.embedding.shape[0])
        if runs:
            with _uncollected():
                import offload_rt.engine  # noqa: F401 - takes as long as the tokenizer's process
        tokenizer.wait()
        return Model(checkpoint, tokenizer, end_token_ids(tokenizer, checkpoint.folder))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no garbage meanwhile: modules that are imported live on.

    Going through them again and again was 0.9 of the 5.6 s of process time of that import.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def check_drafter(model: Model, draft: DraftConfig, *, raw: bool) -> None:
    """Refuse a draft model that does not speak the model's tokens; a head has no tokenizer.

    Raises:
        ConfigError: it has another tokenizer, or no row for a token of the chat template.
        CheckpointError: its files cannot be used.
    """
    checkpoint = open_draft_checkpoint(model.checkpoint, draft)
    if checkpoint is None or checkpoint.lent_ends:
        return
    rows = checkpoint.embedding.shape[0]
    highest = max(template_ids(model.tokenizer, raw=raw), default=0)
    if highest >= rows:
        raise ConfigError(
            f"--draft model: {checkpoint.name} knows {rows} tokens, and the chat template "
            f"of {model.name} writes token {highest} ({model.tokenizer.token(highest)!r}): it "
            "could draft nothing, take another draft model or --raw"
        )
    ours, theirs = (c.folder / "tokenizer.json" for c in (model.checkpoint, checkpoint))
    if ours.exists() and theirs.exists() and filecmp.cmp(ours, theirs, shallow=False):
        return  # loading one takes seconds
    other = load_tokenizer(checkpoint.folder)
    check_vocabularies(model.tokenizer.get_vocab(), other.get_vocab(), checkpoint.name)


def context_limit(model: Model, context_tokens: int | None) -> int:
    """Longest conversation that is possible: --context, or all the model was made for.

    Raises:
        ConfigError: --context is longer than that.
    """
    if context_tokens is not None:
        check_context(model.checkpoint, context_tokens)
    return context_tokens or model.max_positions


def answer_capacity(
    model: Model, settings: Settings, prompt_tokens: int, observer: Observer
) -> int:
    """KV rows for a prompt and its answer.

    Raises:
        ConfigError: the prompt alone is too long.
    """
    context, wanted = settings.runtime.context_tokens, settings.generation.max_tokens
    room = context_limit(model, context)
    limit = f"{model.name} was made for up to {model.checkpoint.config.longest} with the answer"
    if context is not None:
        limit = f"--context sets memory aside for {room} with the answer"
    if prompt_tokens >= room:
        advice = "" if context is None else " or raise --context"
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens, {limit}: shorten the prompt{advice}"
        )
    if prompt_tokens + wanted > room:
        observer.note(
            f"the answer is limited to {room - prompt_tokens} of {wanted} tokens: the prompt has "
            f"{prompt_tokens}, {limit}"
        )
    return min(prompt_tokens + wanted, room) if context is None else room
