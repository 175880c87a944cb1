"""An answer on standard output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_rt.cli.console import Console, write_answer
from offload_rt.cli.interrupts import Interrupts
from offload_rt.config import SamplingConfig
from offload_rt.session.answering import Answer, Answers
from offload_rt.session.opening import Model
from offload_rt.session.settings import Settings

if TYPE_CHECKING:
    from offload_rt.engine import Engine


@dataclass(frozen=True, slots=True)
class Answering:
    """Everything that stays the same from one answer to the next.

    Attributes:
        writes: text goes to stdout as it comes.
    """

    model: Model
    engine: "Engine"
    settings: Settings
    console: Console
    interrupts: Interrupts
    writes: bool = True

    def answer(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Answer:
        """Answer a prompt.

        A Ctrl-C ends the answer: what there is of it is returned with the reason `abort`.
        """
        answers = Answers(self.model, self.engine, [prompt_ids], sampling, self.settings.generation)
        with self.interrupts.raising(False):
            try:
                while answers.active:
                    for piece in answers.advance(self.console, self.interrupts):
                        self._write(piece.text)
            except Exception:
                if answers.has_text:
                    self._write("\n")  # what is said of it begins a line
                raise
            rest, (answer,) = answers.finish()
            self._write("".join(piece.text for piece in rest) + "\n")
        return answer

    def _write(self, text: str) -> None:
        if self.writes:
            write_answer(text)
