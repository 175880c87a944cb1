"""Whether a model may draft for another: token ids must mean the same to both. No torch here."""

from collections.abc import Mapping

from offload_rt.config import DraftConfig
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint, open_checkpoint, resolve_model
from offload_rt.model.config import PADDING_TOKENS
from offload_rt.model.kept import keeps_states
from offload_rt.model.outline import open_or_outline
from offload_rt.speculative.eagle3.checkpoint import open_head
from offload_rt.speculative.mtp.checkpoint import open_module

_SAME = "take a draft model with the same tokenizer"


def open_draft_checkpoint(
    target: Checkpoint, config: DraftConfig, *, runs: bool = True
) -> Checkpoint | None:
    """Open the draft model or head, if one drafts; see that the target has a module, if that does.

    Args:
        target: the model it drafts for.
        config: names it.
        runs: it will run; otherwise its sizes are enough, and `config.json` for them.

    Raises:
        ConfigError: its token ids mean something else than the target's, or it keeps states; or
            the target has no module.
        CheckpointError: its files cannot be used, or the module or head cannot.
    """
    if config.module:
        return open_head(target, resolve_model(config.module), runs=runs)
    if config.words.of_hidden:
        open_module(target)
    if not config.model:  # Medusa heads are no model: see medusa/checkpoint.py
        return None
    folder = resolve_model(config.model)
    draft = open_checkpoint(folder) if runs else open_or_outline(folder)[0]
    check_sizes(target, draft)
    if keeps_states(draft.config):
        raise ConfigError(
            f"--draft model: layers of {draft.name} keep recurrent states, and such models do not "
            "draft yet: take a draft model whose layers all attend"
        )
    return draft


def check_sizes(target: Checkpoint, draft: Checkpoint) -> None:
    """Refuse a draft model whose vocabulary cannot be the target's, by its size.

    Raises:
        ConfigError: they differ by more than padding.
    """
    sizes = target.config.vocab_size, draft.config.vocab_size
    rows = target.embedding.shape[0], draft.embedding.shape[0]
    if abs(sizes[0] - sizes[1]) > PADDING_TOKENS:
        raise ConfigError(
            f"--draft model: {draft.name} has {sizes[1]} tokens (embedding of {rows[1]} "
            f"rows), the target {sizes[0]} (of {rows[0]}): {_SAME}"
        )


def check_vocabularies(target: Mapping[str, int], draft: Mapping[str, int], name: str) -> None:
    """Refuse a draft model to which an id means another token.

    Ids that only one of them uses are padding to the other and may be there.

    Args:
        target: token to id of the target's tokenizer.
        draft: the same of the draft model's.
        name: of the draft model.

    Raises:
        ConfigError: both know an id and disagree about it.
    """
    known = {token_id: token for token, token_id in target.items()}
    for token, token_id in sorted(draft.items(), key=lambda item: item[1]):
        theirs = known.get(token_id, token)
        if theirs != token:
            raise ConfigError(
                f"--draft model: the tokenizer of {name} has {len(draft)} tokens, the target's "
                f"{len(target)}, and token {token_id} is {token!r} there and {theirs!r} in the "
                f"target's: {_SAME}"
            )
