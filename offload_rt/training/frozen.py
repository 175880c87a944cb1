"""Medusa-1: heads are trained from cached hidden states, the model is not touched.

The seed and the step alone decide which rows a step sees, and its learning rate. So a training that
goes on from a saved state ends with the weights of one that was never stopped. Heads do not depend
on each other: each is differentiated before the next is evaluated, so one head's logits are in
memory at a time.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from offload_rt.errors import ConfigError
from offload_rt.speculative.medusa.heads import MedusaHeads
from offload_rt.training.cache import StateCache
from offload_rt.training.corpus import NO_LABEL
from offload_rt.training.loss import Score, head_weight, rate_factor, score_heads, token_loss
from offload_rt.training.state import Recipe, load_state, save_state
from offload_rt.training.vocabulary import Vocabulary

BLOCK_ROWS = 32  # consecutive rows that are read, and shuffled, together
SAVE_S = 60.0
_NOTES = 200  # of the whole training


@dataclass(slots=True)
class Tally:
    """Sums over the steps since the last note.

    Attributes:
        loss: of the steps.
        right: per head, places where its likeliest token was the label.
        places: per head, places with a label.
    """

    loss: torch.Tensor
    right: torch.Tensor
    places: torch.Tensor
    steps: int = 0

    @classmethod
    def empty(cls, heads: int, device: torch.device) -> "Tally":
        """Nothing yet."""
        loss, right, places = (torch.zeros(n, device=device) for n in (1, heads, heads))
        return cls(loss, right, places)

    def add(self, head: int, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count one head's guesses, [R, V] logits and [R] targets."""
        known = targets != NO_LABEL
        self.right[head] += (known & (logits.argmax(dim=-1) == targets)).sum()
        self.places[head] += known.sum()

    def note(self, step: int) -> dict[str, object]:
        """The means.

        Raises:
            ConfigError: the loss is no number any more.
        """
        top = self.right / self.places.clamp(min=1)
        loss = float(self.loss) / max(1, self.steps)
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss is {loss} after step {step}, training has gone astray: lower --lr and "
                "give --output a new folder"
            )
        return {"step": step, "loss": loss, "top1": top.tolist()}


class FrozenTrainer:
    """Trains heads from a cache.

    Args:
        heads: fp32, on the device they are trained on.
        vocabulary: tokens of their rows, on the same device.
        cache: what they are trained on.
        recipe: how; its seed decides the order of rows.

    Attributes:
        progress: how far it is.
        steps: how many there are.
    """

    def __init__(
        self,
        heads: MedusaHeads,
        vocabulary: Vocabulary,
        cache: StateCache,
        recipe: Recipe,
    ) -> None:
        self.heads, self.vocabulary, self.cache = heads, vocabulary, cache
        config = self._config = recipe.config
        self._seed, self._path = recipe.seed, recipe.state
        self._device = next(heads.parameters()).device
        self._half = cache.shape.dtype != "float32"
        self._parameters = dict(heads.named_parameters())
        self._optimizer = torch.optim.AdamW(self._parameters.values(), config.lr, weight_decay=0.0)
        self.progress = load_state(recipe.state, self._parameters, self._optimizer)
        blocks = -(-cache.rows // BLOCK_ROWS)
        self._blocks_per_step = max(1, config.batch_tokens // BLOCK_ROWS)
        self.steps_per_epoch = -(-blocks // self._blocks_per_step)
        self.steps = config.epochs * self.steps_per_epoch

    def run(
        self,
        *,
        poll: Callable[[], None] = lambda: None,
        on_epoch: Callable[[int], dict[str, object]] = lambda epoch: {},
        save_s: float = SAVE_S,
    ) -> None:
        """Train to the end.

        Args:
            poll: called before each step; what it raises ends the training after saving it.
            on_epoch: called after each epoch with its number from 1; returns what is noted of it.
            save_s: seconds between saves.

        Raises:
            ConfigError: the disk is full.
        """
        tally, saved_at = self._empty(), time.monotonic()
        every = max(1, self.steps // _NOTES)
        while self.progress.step < self.steps:
            try:
                poll()
            except BaseException:  # between two steps, so what is saved fits together
                self.save()
                raise
            self._step(self.progress.step, tally)
            self.progress.step += 1
            step = self.progress.step
            ended = step % self.steps_per_epoch == 0
            if ended or step % every == 0:
                note = tally.note(step)
                if ended:
                    note |= on_epoch(step // self.steps_per_epoch)
                self.progress.history.append(note)
                tally = self._empty()
            if time.monotonic() - saved_at >= save_s or step == self.steps:
                self.save()
                saved_at = time.monotonic()

    def save(self) -> None:
        """Save the state of the training."""
        save_state(self._path, self._parameters, self._optimizer, self.progress)

    def score(self, cache: StateCache) -> Score:
        """How often the heads are right about the rows of a cache."""
        with self._autocast():
            return score_heads(self.heads, self.vocabulary, self._batches(cache))

    def _empty(self) -> Tally:
        return Tally.empty(self.heads.shape.heads, self._device)

    def _batches(self, cache: StateCache) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        size = self._config.batch_tokens
        for start in range(0, cache.rows, size):
            yield self._load(cache, [range(start, min(start + size, cache.rows))])

    def _step(self, step: int, tally: Tally) -> None:
        hidden, labels = self._load(self.cache, self._rows_of(step))
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr * rate_factor(step, self.steps)
        self._optimizer.zero_grad(set_to_none=False)
        for head in range(self.heads.shape.heads):
            targets = self.vocabulary.targets(labels[:, head])
            with self._autocast():
                logits = self.heads.head(head, hidden)
            loss = head_weight(head) * token_loss(logits, targets)
            loss.backward()
            tally.loss += loss.detach()
            tally.add(head, logits.detach(), targets)
        self._optimizer.step()
        tally.steps += 1

    def _rows_of(self, step: int) -> list[range]:
        """The blocks of rows a step sees: every epoch all of them, in an order of its own."""
        epoch, within = divmod(step, self.steps_per_epoch)
        blocks = -(-self.cache.rows // BLOCK_ROWS)
        generator = torch.Generator().manual_seed((self._seed + epoch) % 2**63)
        order = torch.randperm(blocks, generator=generator)
        first = within * self._blocks_per_step
        chosen = sorted(order[first : first + self._blocks_per_step].tolist())
        return [range(b * BLOCK_ROWS, min((b + 1) * BLOCK_ROWS, self.cache.rows)) for b in chosen]

    def _load(self, cache: StateCache, rows: list[range]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, labels = cache.read(rows)
        return hidden.to(self._device), labels.to(self._device)

    def _autocast(self) -> AbstractContextManager[object]:
        """Multiply in bf16 where states have 16 bits; sums and parameters stay fp32."""
        if not self._half:
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)
