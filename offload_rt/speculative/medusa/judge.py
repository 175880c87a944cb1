"""Count how often heads are right about what the model itself wrote."""

from collections.abc import Callable, Sequence

import torch

from offload_rt.errors import NumbersError
from offload_rt.sampling import NO_TOKEN
from offload_rt.speculative.medusa.calibration import Calibration

ROWS = 8  # places the heads are evaluated at together: what is planned for is the logits of 8


class Judge:
    """Compares the heads' tokens with those that came.

    Args:
        ranked: the heads: [R, E] hidden states and a number of ranks to [R, K, ranks] ids.
        heads: how many they are.
        ranks: to count.
    """

    def __init__(
        self, ranked: Callable[[torch.Tensor, int], torch.Tensor], heads: int, ranks: int
    ) -> None:
        self._ranked, self._ranks = ranked, ranks
        self._places = [0] * heads
        self._hits = [[0] * ranks for _ in range(heads)]

    def add(self, hidden: Sequence[torch.Tensor], written: Sequence[int]) -> None:
        """Judge one text.

        Args:
            hidden: [E] each, the states that made the tokens of `written`, from the first on; there
                may be more.
            written: what the model wrote.
        """
        # The state that made token i guesses token i + 1 with head 0: the last is of no use.
        states = hidden[: max(0, len(written) - 1)]
        for start in range(0, len(states), ROWS):
            guesses = self._ranked(torch.stack(list(states[start : start + ROWS])), self._ranks)
            for row, of_heads in enumerate(guesses.tolist()):
                self._judge(of_heads, written[start + row + 1 :])

    def result(self, model: str, dtype: str) -> Calibration:
        """What was counted."""
        return Calibration(
            model=model,
            dtype=dtype,
            places=tuple(self._places),
            hits=tuple(map(tuple, self._hits)),
        )

    def _judge(self, guesses: Sequence[Sequence[int]], following: Sequence[int]) -> None:
        """One place: [K][ranks] guesses, and the tokens that came."""
        pairs = zip(guesses, following, strict=False)  # the text may end before the last head
        for head, (tokens, token) in enumerate(pairs):
            if NO_TOKEN in tokens:
                raise NumbersError(
                    f"the logits of head {head + 1} are NaN or infinite, so it has no guesses to "
                    "judge: use --dtype float32, or other heads"
                )
            self._places[head] += 1
            if token in tokens:
                self._hits[head][tokens.index(token)] += 1
