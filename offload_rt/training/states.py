"""Hidden states of a whole corpus: the model is streamed once per packed batch of texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from offload_rt.config import KVPlace, RuntimeConfig
from offload_rt.engine import Engine
from offload_rt.engine.diagnosis import not_numbers
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.training.cache import StateCache
from offload_rt.training.corpus import Sample, pack


@dataclass(frozen=True, slots=True)
class Reading:
    """Texts, and where their hidden states go.

    Attributes:
        samples: all of them, also those whose states are there already.
        cache: what is there, and where the rest goes.
    """

    samples: Sequence[Sample]
    cache: StateCache

    @property
    def rows(self) -> int:
        """Rows the cache has in the end."""
        return sum(len(sample.places) for sample in self.samples)

    @property
    def missing_bytes(self) -> int:
        """Bytes of the rows that are not there yet."""
        return (self.rows - self.cache.rows) * self.cache.shape.row_bytes

    def batches(self, pass_tokens: int) -> list[Sequence[Sample]]:
        """Texts of each pass that is still to be made."""
        found = [
            self.samples[batch.start : batch.stop] for batch in pack(self.samples, pass_tokens)
        ]
        done = 0
        for index, batch in enumerate(found):
            if done >= self.cache.samples:
                return found[index:]
            done += len(batch)
        return []


def reading_engine(
    checkpoint: Checkpoint,
    config: RuntimeConfig,
    readings: Sequence[Reading],
    pass_tokens: int,
    on_placed: Callable[[Engine], None] | None = None,
) -> Engine:
    """An engine with room for every pass: the n-th sequence for the n-th longest text of any.

    Raises:
        PlanError: it does not fit.
        CheckpointError: the files cannot be used.
    """
    lengths = [
        sorted((len(sample.ids) for sample in batch), reverse=True)
        for reading in readings
        for batch in reading.batches(pass_tokens)
    ]
    widest = max(map(len, lengths))
    capacities = [max(b[n] for b in lengths if n < len(b)) for n in range(widest)]
    return Engine(
        checkpoint,
        replace(config, kv=KVPlace.NONE, kv_folder=None, kv_block_tokens=None),
        capacities=capacities,
        prompt_tokens=max(map(sum, lengths)),
        on_placed=on_placed,
    )


def read_all(
    engine: Engine,
    readings: Sequence[Reading],
    pass_tokens: int,
    on_done: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Read what is not read yet and keep its hidden states.

    Args:
        engine: from `reading_engine`, for these readings.
        readings: texts, and where their hidden states go.
        pass_tokens: as the engine was made for.
        on_done: called after each pass with the tokens it read.
    """
    for reading in readings:
        for batch in reading.batches(pass_tokens):
            # The longest first, as the engine's room is; the states go back into their order.
            order = sorted(range(len(batch)), key=lambda n: len(batch[n].ids), reverse=True)
            texts = [batch[n] for n in order]
            hidden = _hidden(engine, texts)
            parts = dict(zip(order, hidden.split([len(t.places) for t in texts]), strict=True))
            labels = [sample.labels(reading.cache.shape.heads) for sample in batch]
            in_order = [parts[n] for n in range(len(batch))]
            reading.cache.add(torch.cat(in_order), torch.cat(labels), len(batch))
            on_done(sum(len(text.ids) for text in texts))


def _hidden(engine: Engine, texts: Sequence[Sample]) -> torch.Tensor:
    """Hidden states of texts.

    Raises:
        NumbersError: they are no numbers.
    """
    ids, places = [t.ids for t in texts], [t.places for t in texts]
    hidden = engine.hidden(ids, places)
    if not bool(hidden.isfinite().all()):  # host sync, as is the copy to the cache
        raise not_numbers(engine, lambda: engine.hidden(ids, places))
    return hidden
