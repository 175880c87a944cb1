"""Self-distillation: the model answers prompts itself, many in each pass (arXiv:2401.10774, 2.3.2).

Answers are written to a file as they come. A run that was killed goes on with the first batch that
is not whole. Its batches are the same ones, and each sequence draws from a seed of its own, so the
answers are the same, too.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from offload_rt.config import GenerationConfig, SamplingConfig
from offload_rt.engine import Engine, Run
from offload_rt.errors import CheckpointError
from offload_rt.reading import read_plain
from offload_rt.training.files import write_text, writing
from offload_rt.writing import append, cut_off

_LIMIT_BYTES = 2**32
Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts that are answered together.

    Attributes:
        first: place of the first of them among all prompts.
        prompts: at most as many as the engine has room for.
        temperature: 0 is greedy.
    """

    first: int
    prompts: Sequence[Prompt]
    temperature: float


def batches(
    train: Sequence[Prompt], held_out: Sequence[Prompt], sequences: int, temperature: float
) -> list[Asked]:
    """All prompts, those to train on first; held-out ones are answered greedily."""
    found = []
    for base, prompts, drawn in ((0, train, temperature), (len(train), held_out, 0.0)):
        for start in range(0, len(prompts), sequences):
            found.append(Asked(base + start, prompts[start : start + sequences], drawn))
    return found


class AnswerFile:
    """Answers by the place of their prompt, one JSON line each.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: list[tuple[int, ...]] = []
        if path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, prompt: int) -> tuple[int, ...]:
        return self._answers[prompt]

    def cut(self, count: int) -> None:
        """Forget answers from `count` on."""
        if count < len(self._answers):
            del self._answers[count:]
            lines = "".join(map(_line, self._answers))
            write_text(self.path, lines, private=True)

    def add(self, answers: Sequence[Sequence[int]]) -> None:
        """Append answers; once this returns they are there for good."""
        with writing(self.path):
            append(self.path, "".join(map(_line, answers)))
        self._answers += map(tuple, answers)

    def _read(self) -> None:
        whole, _, rest = read_plain(self.path, _LIMIT_BYTES).rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
            try:
                ids = json.loads(line)
                good = isinstance(ids, list) and all(type(token) is int for token in ids)
            except (ValueError, RecursionError):
                good = False
            if not good:
                raise CheckpointError(
                    f"{self.path}, line {number} is not an answer: remove it and what follows"
                )
            self._answers.append(tuple(ids))
        if rest:  # a line that was being written when the run was killed
            with writing(self.path):
                cut_off(self.path, len(rest))


def answer_all(
    engine: Engine,
    asked: Sequence[Asked],
    file: AnswerFile,
    *,
    answer_tokens: int,
    end_tokens: frozenset[int],
    seed: int,
) -> None:
    """Have the model answer what is not answered yet.

    Args:
        engine: with room for a batch.
        asked: all batches.
        file: where answers are kept; whole batches that are there already are not asked again.
        answer_tokens: of each answer, at most.
        end_tokens: tokens that end an answer.
        seed: of drawn answers.
    """
    for batch in asked:
        if batch.first + len(batch.prompts) <= len(file):
            continue
        file.cut(batch.first)
        sampling = SamplingConfig(temperature=batch.temperature, seed=seed + batch.first)
        sampling = replace(sampling, seed=None) if sampling.greedy else sampling
        generation = GenerationConfig(max_tokens=answer_tokens)
        engine.forget()
        run = Run.start(engine, batch.prompts, sampling, generation, end_tokens)
        run.prefill()
        while run.active:
            run.step()
        file.add([sequence.emitted for sequence in run.sequences])


def _line(answer: Sequence[int]) -> str:
    return json.dumps(list(answer), separators=(",", ":")) + "\n"
