"""A conversation: what was said, the next answer, and what can be taken back."""

import dataclasses
from dataclasses import dataclass, field

from offload_rt.cli.answering import Answering
from offload_rt.cli.chat_file import Conversation, Exchange
from offload_rt.cli.faults import of_system
from offload_rt.config import SEEDS, SamplingConfig
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.session.answering import Answer, seeded
from offload_rt.session.settings import Settings
from offload_rt.units import format_speed


@dataclass(frozen=True, slots=True)
class Said:
    """An exchange, and what is known of its tokens.

    Attributes:
        used: tokens of the conversation with this answer; None if they were not counted.
        reused: rows that the KV cache held before; with these alone it is as it was then.
    """

    exchange: Exchange
    used: int | None = None
    reused: int = 0


@dataclass(slots=True)
class Talk:
    """A conversation and the engine that answers.

    An error leaves the conversation as it was before the turn, and the engine as it was at the
    start; the turn is kept in `unanswered`.

    Attributes:
        capacity: tokens it may have.
        unanswered: a turn that has got no answer.
        last: the last answer.
        broken: why the engine cannot answer any more.
        failure: exit code of the last answer that the model or the machine failed to make; 0: none.
    """

    answering: Answering
    capacity: int
    said: list[Said] = field(default_factory=list)
    unanswered: str | None = None
    last: Answer | None = None
    broken: str | None = None
    failure: int = 0

    @property
    def settings(self) -> Settings:
        """How answers are made."""
        return self.answering.settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self.answering = dataclasses.replace(self.answering, settings=settings)

    def answer(self, turn: str) -> None:
        """Answer a turn; text goes to stdout as it comes.

        Raises:
            OffloadError: there is no answer.
            Interrupted: a signal came before the model began.
        """
        self.unanswered = turn
        if self.broken is not None:
            raise ConfigError(
                f"the model can answer no more: {self.broken}; /save FILE keeps the conversation, "
                "/load FILE takes it up in a new chat"
            )
        ids, engine = self._prompt(turn), self.answering.engine
        reused = engine.cached_tokens(0, ids)
        try:
            answer = self.answering.answer(ids, self._sampling())
        except Exception as error:
            self._start_over(error)
            raise
        self.last = answer
        if not answer.text:
            why = (
                "was stopped before its first word"
                if answer.finish_reason == "abort"
                else "is empty"
            )
            self.answering.console.note(
                f"the answer {why}: the turn is not part of the conversation"
            )
            return
        used = len(ids) + len(answer.token_ids)
        self.said.append(Said(Exchange(turn, answer.text), used, reused))
        self.unanswered = None
        self._tell(answer, used)

    def again(self) -> None:
        """Answer the last turn once more; without an answer the old one stays.

        Raises:
            ConfigError: there is none.
        """
        if self.unanswered is not None:
            self.answer(self.unanswered)
            return
        last = self._take_back()
        if self.settings.sampling.greedy or self.settings.sampling.seed is not None:
            what = "greedy" if self.settings.sampling.greedy else "made with a given seed"
            how = "temperature 0.7" if self.settings.sampling.greedy else "seed none"
            self.answering.console.note(f"answers are {what}, so it is the same again: /set {how}")
        kept = len(self.said)
        try:
            self.answer(last.exchange.turn)
        finally:
            if len(self.said) == kept:
                self.said.append(last)
                self.unanswered = None

    def undo(self) -> str:
        """Take the last turn and its answer back; returns the turn.

        Raises:
            ConfigError: there is none.
        """
        turn, self.unanswered = self.unanswered, None
        return self._take_back().exchange.turn if turn is None else turn

    def clear(self) -> None:
        """Forget what was said."""
        self.said.clear()
        self.unanswered = None

    def instruct(self, system: str | None) -> None:
        """Set the system prompt, or remove it.

        Raises:
            OffloadError: the model's template has no place for it, or it is too long.
        """
        before = self.settings
        self.settings = dataclasses.replace(before, system=system)
        try:
            if system is None:  # which makes room
                self._ids("x")
            else:
                self._prompt("x")
        except BaseException:
            self.settings = before
            raise
        self._forget_counts()

    def record(self) -> Conversation:
        """All of it, to be written."""
        return Conversation(
            model=self.answering.model.name,
            system=self.settings.system,
            settings=(self.settings.sampling, self.settings.generation),
            exchanges=tuple(said.exchange for said in self.said),
            unanswered=self.unanswered,
        )

    def resume(self, record: Conversation) -> None:
        """Go on with another conversation.

        Raises:
            OffloadError: the model's template refuses it; this one goes on then.
        """
        before = self.settings, self.said, self.unanswered
        sampling, generation = record.settings or (before[0].sampling, before[0].generation)
        self.settings = dataclasses.replace(
            self.settings, sampling=sampling, generation=generation, system=record.system
        )
        self.said = [Said(exchange) for exchange in record.exchanges]
        self.unanswered = record.unanswered
        try:
            self.used()
        except BaseException:
            self.settings, self.said, self.unanswered = before
            raise

    def used(self) -> int:
        """Tokens of the conversation so far; uncounted ones with the shortest turn that may follow.

        Raises:
            OffloadError: it has to be counted, and the model's template refuses it.
        """
        if not self.said:
            return 0
        counted = self.said[-1].used
        return len(self._ids("x")) if counted is None else counted

    def _ids(self, turn: str) -> list[int]:
        """Tokens of the conversation with a turn more."""
        from offload_rt.text import Message, build_prompt

        messages: list[Message] = []
        for said in self.said:
            messages.append(Message(role="user", content=said.exchange.turn))
            messages.append(Message(role="assistant", content=said.exchange.answer))
        messages.append(Message(role="user", content=turn))
        tokenizer = self.answering.model.tokenizer
        with self.answering.interrupts.raising(True):
            return build_prompt(tokenizer, messages, system=self.settings.system)

    def _prompt(self, turn: str) -> list[int]:
        """The same, if an answer has room."""
        ids = self._ids(turn)
        if len(ids) >= self.capacity:
            raise ConfigError(
                f"the conversation has {len(ids)} tokens, there is room for {self.capacity} with "
                f"the answer: {self.room_advice(len(ids))}"
            )
        return ids

    def _sampling(self) -> SamplingConfig:
        """Sampling with a seed of this turn's own: drawn, or counted on from the given one."""
        chosen = seeded(self.settings.sampling)
        if chosen.seed is None:
            return chosen
        return dataclasses.replace(chosen, seed=(chosen.seed + len(self.said)) % SEEDS)

    def _take_back(self) -> Said:
        """Remove the last exchange; what the engine keeps of it goes, too."""
        if not self.said:
            raise ConfigError("nothing was said yet: type a turn first")
        last = self.said.pop()
        self.answering.engine.truncate(0, last.reused)
        return last

    def _forget_counts(self) -> None:
        """Tokens are others now, and so is what the cache can give to them."""
        self.said = [Said(said.exchange) for said in self.said]

    def _start_over(self, error: Exception) -> None:
        """Bring the engine back to its start after an error within an answer."""
        self.failure = (error if isinstance(error, OffloadError) else OffloadError).exit_code
        if not isinstance(error, OffloadError) and not of_system(error):
            self.broken = f"{type(error).__name__}: {error}"
        try:
            self.answering.engine.forget()
        except (OffloadError, RuntimeError) as second:
            self.broken = str(second)
        self.said = [dataclasses.replace(said, reused=0) for said in self.said]

    def _tell(self, answer: Answer, used: int) -> None:
        """One line of numbers, and why the answer ended if it was not over."""
        count, s_per_token = len(answer.token_ids), answer.report.timings.s_per_token
        parts = ["1 token" if count == 1 else f"{count} tokens"]
        if s_per_token is not None:
            parts.append(format_speed(s_per_token))
        parts.append(fullness(used, self.capacity))
        if answer.finish_reason == "abort":
            parts.append("stopped")
        console, limit = self.answering.console, self.settings.generation.max_tokens
        full = used >= self.capacity and answer.finish_reason == "length"
        if answer.finish_reason == "length" and not full:
            parts.append(f"cut at max-tokens {limit}")
        console.block(f"({', '.join(parts)})")
        if full:
            console.note(
                f"the answer ends here because the conversation fills its {self.capacity} tokens: "
                f"{self.room_advice(used)}"
            )

    def room_advice(self, needed: int) -> str:
        """What to do when the context is full.

        Args:
            needed: tokens that have to fit.
        """
        before = self.said[-1].used if self.said else 0
        if before is not None and needed - before >= self.capacity:
            advice = "shorten the turn"
        else:
            advice = "/undo takes the last turn back, /clear forgets everything"
        most = self.answering.model.max_positions
        if needed >= most:
            return f"{advice}; the model was made for up to {most}"
        if not self.said:
            return f"{advice}, or start again with --context {most}"
        return f"{advice}, or /save FILE and start again with --context {most} and /load FILE"


def fullness(used: int, capacity: int) -> str:
    """How full the context is."""
    return f"context {used} of {capacity} ({100 * used / capacity:.0f} %)"
