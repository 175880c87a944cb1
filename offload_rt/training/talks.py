"""What a data file holds, and which of it is held out; no torch here."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """A prompt, or a conversation.

    Attributes:
        line: where it is in the file, from 1.
        turns: role and text of each turn.
    """

    line: int
    turns: tuple[tuple[str, str], ...]

    @property
    def prompt(self) -> tuple[tuple[str, str], ...]:
        """The turns before the first answer."""
        roles = [role for role, _ in self.turns]
        return self.turns[: roles.index(ASSISTANT)] if ASSISTANT in roles else self.turns

    @property
    def answered(self) -> bool:
        """Whether there is an answer in it."""
        return any(role == ASSISTANT for role, _ in self.turns)


def split(talks: Sequence[Talk], share: float, seed: int) -> tuple[list[Talk], list[Talk]]:
    """Hold out a share of the prompts, at least one of two or more unless the share is 0.

    What begins with the same prompt stays together, so nothing held out was trained on.

    Returns:
        Talks to train on and those held out, in their order.
    """
    prompts = {_digest(talk, seed) for talk in talks}
    count = min(len(prompts) - 1, max(1, round(share * len(prompts)))) if share else 0
    held = set(sorted(prompts)[:count])
    sides: tuple[list[Talk], list[Talk]] = ([], [])
    for talk in talks:
        sides[_digest(talk, seed) in held].append(talk)
    return sides


def _digest(talk: Talk, seed: int) -> bytes:
    return hashlib.sha256(repr((seed, talk.prompt)).encode()).digest()
