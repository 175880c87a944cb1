"""A tokenizer of a model folder, held by a process of its own; see `process.py`."""

import itertools
import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.text.files import check_tokenizer_files
from offload_rt.text.process import Limits, Pending, RequestError, TextProcess, text_process

_log = logging.getLogger(__name__)

_MIB = 2**20
# Measured with vocabularies of 49 and 152 thousand tokens (2026-11-28, 2 busy cores): loading and
# comparing with tokenizer.json take 0.3 and 1.0 s and 20 times the files' bytes; a text of 1 MB
# takes 0.6 to 1.1 s and 160 times its bytes; the largest templates take 50 ms.
_LOAD_S, _LOAD_S_PER_MIB = 60.0, 10.0
_LOAD_BYTES, _LOAD_BYTES_PER_BYTE = 1024 * _MIB, 64
_ENCODE_S, _ENCODE_S_PER_MIB = 10.0, 20.0
_ENCODE_BYTES, _ENCODE_BYTES_PER_BYTE = 512 * _MIB, 512
_RENDER_S, _RENDER_S_PER_MIB = 2.0, 5.0
_RENDER_BYTES, _RENDER_BYTES_PER_BYTE = 256 * _MIB, 64
_DECODE_S, _DECODE_S_PER_TOKEN = 5.0, 0.01
_DECODE_BYTES, _DECODE_BYTES_PER_TOKEN = 256 * _MIB, 4096
_SMALL = Limits(cpu_s=_LOAD_S, memory_bytes=_LOAD_BYTES)

_numbers = itertools.count()


class Tokenizer:
    """The tokenizer of a model folder.

    Its process may be killed, by its limits or by Ctrl-C; the next call then loads it anew.

    Args:
        folder: of the model; its files are looked at here, and read meanwhile.
        rows: of the model's embedding; None accepts any token.
        process: that holds it; None is the one all share.

    Raises:
        CheckpointError: there are no files of a tokenizer that could be read.
    """

    def __init__(
        self, folder: Path, rows: int | None = None, process: TextProcess | None = None
    ) -> None:
        self.folder, self.rows = folder, rows
        self._bytes = check_tokenizer_files(folder)
        self._number = next(_numbers)
        self._process = process or text_process()
        self._loading = self._begin()
        self._generation = self._process.generation
        self._facts: dict[str, Any] = {}
        weakref.finalize(self, self._process.forget, self._number)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, by the tokenizer's own files."""
        found: int | None = self._known["eos_token_id"]
        return found

    @property
    def begin_token_id(self) -> int | None:
        """The token that begins a text, else the one that ends one; None if there is neither."""
        begin: int | None = self._known["bos_token_id"]
        return self.eos_token_id if begin is None else begin

    @property
    def chat_template(self) -> object:
        """Its template, or several by name; None if it has none."""
        return self._known["chat_template"]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Tokens that are no text, and their ids."""
        return dict(self._known["special_tokens"])

    def __len__(self) -> int:
        tokens: int = self._known["tokens"]
        return tokens

    def wait(self) -> "Tokenizer":
        """Have it loaded.

        Raises:
            CheckpointError: its files are damaged, or need code of the folder to run.
        """
        if self._facts and self._generation == self._process.generation:
            return self
        if self._generation != self._process.generation:
            self._loading, self._generation = self._begin(), self._process.generation
        again = bool(self._facts)
        try:
            self._facts = self._loading.result()
        except RequestError as error:
            what = "config.json" if error.config else "the tokenizer"
            reason = str(error) if error.raised else f"it {error}"
            raise CheckpointError(f"cannot load {what} of {self.folder}: {reason}") from error
        if self._facts["tokens"] == 0:
            raise CheckpointError(
                f"the tokenizer of {self.folder} has no tokens: download it again"
            )
        for note in self._facts["notes"] if not again else ():
            _log.warning("%s: %s", self.folder.name, note)
        return self

    def end(self) -> None:
        """End its process for good, from any thread; whoever waits for it gets an error."""
        self._process.end()

    def render(
        self,
        messages: Sequence[dict[str, object]],
        chars: int,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """Run the chat template; `chars` are those of the messages' texts and of tools.

        Raises:
            CheckpointError: it failed, took too long or too much.
        """
        limits = Limits(
            cpu_s=_RENDER_S + _RENDER_S_PER_MIB * chars / _MIB,
            memory_bytes=_RENDER_BYTES + _RENDER_BYTES_PER_BYTE * chars,
        )
        what = f"the chat template of {self.folder}"
        text: str = self._ask(what, "render", limits, messages=messages, chars=chars, tools=tools)
        return text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            ConfigError: a token has no row in the model's embedding.
            CheckpointError: it failed, took too long or too much memory.
        """
        nbytes = len(text.encode("utf-8", "surrogatepass"))
        limits = Limits(
            cpu_s=_ENCODE_S + _ENCODE_S_PER_MIB * nbytes / _MIB,
            memory_bytes=_ENCODE_BYTES + _ENCODE_BYTES_PER_BYTE * nbytes,
        )
        what = f"the tokenizer of {self.folder}, given {len(text)} characters,"
        ids: list[int] = self._ask(what, "encode", limits, text=text, special=add_special_tokens)
        highest = max(ids, default=0)
        if self.rows is not None and highest >= self.rows:
            raise ConfigError(
                f"the text holds token {highest} ({self.token(highest)!r}), the embedding of "
                f"{self.folder.name} has {self.rows} rows: the tokenizer is not of these weights; "
                "take the one they came with, or leave that token out"
            )
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens.

        Raises:
            CheckpointError: it failed, took too long or too much memory.
        """
        text: str = self._ask_about(len(ids), "decode", ids=list(ids), skip=skip_special_tokens)
        return text

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself; what is no whole character is U+FFFD.

        Raises:
            CheckpointError: it failed, took too long or too much memory.
        """
        found: list[str] = self._ask_about(len(ids), "texts", ids=list(ids))
        return found

    def token(self, token_id: int) -> str | None:
        """The token of an id; None if it is not known."""
        found: str | None = self._ask_about(1, "token", token_id=token_id)
        return found

    def get_vocab(self) -> dict[str, int]:
        """All tokens and their ids."""
        vocabulary: dict[str, int] = self._ask(
            f"the tokenizer of {self.folder}", "vocabulary", _SMALL
        )
        return vocabulary

    def stream(self, stop_strings: Sequence[str] = ()) -> "RemoteStream":
        """Begin to turn tokens into text; see `TextStream`."""
        if not all(stop_strings):
            raise ConfigError("a stop string is empty: give a text that ends the answer")
        number = next(_numbers)
        self._ask_about(0, "stream", stream=number, stops=list(stop_strings), skip=True)
        return RemoteStream(self._process, number, f"the decoder of the tokenizer of {self.folder}")

    @property
    def _known(self) -> dict[str, Any]:
        return self.wait()._facts

    def _begin(self) -> Pending:
        limits = Limits(
            cpu_s=_LOAD_S + _LOAD_S_PER_MIB * self._bytes / _MIB,
            memory_bytes=_LOAD_BYTES + _LOAD_BYTES_PER_BYTE * self._bytes,
        )
        folder = str(self.folder)
        return self._process.begin("load", limits, number=self._number, folder=folder)

    def _ask_about(self, tokens: int, operation: str, **arguments: object) -> Any:  # noqa: ANN401
        what = f"the decoder of the tokenizer of {self.folder}"
        return self._ask(what, operation, _decoding(tokens), **arguments)

    def _ask(self, what: str, operation: str, limits: Limits, **arguments: object) -> Any:  # noqa: ANN401
        self.wait()
        return ask(self._process, what, operation, limits, number=self._number, **arguments)


class RemoteStream:
    """A `TextStream` that runs where the tokenizer is.

    Attributes:
        text: everything returned so far.
        stopped: the stop string that ended the text.
        kept_tokens: tokens pushed, up to and including the one that completed the stop string.
    """

    def __init__(self, process: TextProcess, number: int, what: str) -> None:
        self._process, self._number, self._what = process, number, what
        self._generation = process.generation
        self._shown: list[str] = []
        self._finished = False
        self.stopped: str | None = None
        self.kept_tokens = 0

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._shown)

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; return the text that is now safe to show."""
        if self.stopped is not None or not token_ids:
            return ""
        return self._take("push", len(token_ids), ids=list(token_ids))

    @staticmethod
    def push_each(pushes: "Sequence[tuple[RemoteStream, Sequence[int]]]") -> list[str]:
        """`push` of several streams of one tokenizer, with one request.

        Raises:
            CheckpointError: it failed, took too long or too much memory: all of them are lost.
        """
        asked = [(stream, list(ids)) for stream, ids in pushes if ids and stream.stopped is None]
        if not asked:
            return [""] * len(pushes)
        first = asked[0][0]
        first._check()
        done = ask(
            first._process,
            first._what,
            "push_each",
            _decoding(sum(len(ids) for _, ids in asked)),
            pushes=[(stream._number, ids) for stream, ids in asked],
        )
        texts = {s: s._took(one) for (s, _), one in zip(asked, done, strict=True)}
        return [texts.get(stream, "") for stream, _ in pushes]

    def finish(self) -> str:
        """Return what is still held; an incomplete character comes out as U+FFFD."""
        if self._finished:
            return ""
        self._finished = True
        return self._take("finish", 0)

    def _take(self, operation: str, tokens: int, **arguments: object) -> str:
        self._check()
        limits, number = _decoding(tokens), self._number
        done = ask(self._process, self._what, operation, limits, stream=number, **arguments)
        return self._took(done)

    def _check(self) -> None:
        if self._generation != self._process.generation:
            raise CheckpointError(f"{self._what} was ended by somebody else: run it again")

    def _took(self, done: Mapping[str, Any]) -> str:
        self.stopped, self.kept_tokens = done["stopped"], done["kept"]
        text: str = done["text"]
        self._shown.append(text)
        return text


def ask(
    process: TextProcess, what: str, operation: str, limits: Limits, **arguments: object
) -> Any:  # noqa: ANN401
    """Send a request and wait for the reply; `what` is blamed if there is none.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return process.request(operation, limits, **arguments)
    except RequestError as error:
        failed = "failed: " if error.raised else ""
        raise CheckpointError(f"{what} {failed}{error}") from error


def _decoding(tokens: int) -> Limits:
    return Limits(
        cpu_s=_DECODE_S + _DECODE_S_PER_TOKEN * tokens,
        memory_bytes=_DECODE_BYTES + _DECODE_BYTES_PER_TOKEN * tokens,
    )


def load_tokenizer(folder: Path, rows: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder; runs no code of it, asks nothing, uses no network.

    Args:
        folder: of the model.
        rows: of the model's embedding, so that a token without one is refused.

    Raises:
        CheckpointError: the files are missing, damaged, or need code of the folder to run.
    """
    return Tokenizer(folder, rows).wait()
