"""What the process of `process.py` does: one request after the other, each within its limits.

Nothing here is imported by the process that runs the model. torch is kept out: tokenizers need none
of it, and importing it takes seconds and hundreds of MiB.
"""

import fcntl
import functools
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from offload_rt.device.system import give_back_holes
from offload_rt.model.sparing import import_models
from offload_rt.text.stream import TextStream, special_ids
from offload_rt.units import format_size

_LENGTH_BYTES = 8
_FILE_BYTES = 1 << 20  # it has nothing to write
_ERROR_CHARS = 1000

# The largest templates hold some 20 kB of fixed text and repeat a message at most a few times.
_TEMPLATE_FIXED_CHARS = 1 << 20
_TEMPLATE_GROWTH = 16

# What transformers warns of when token ids will not be what the model was trained on.
_SERIOUS = ("incorrect", "corrupt", "could not", "unexpected", "indexing errors")
_LIBRARY = "transformers"

# Spaces, capitals, digits, marks and letters of several bytes: what broken conversions lose.
_SAMPLE = "The  grey cat's 12 mats,\n\tnaïve 你好!"


def main(life: int) -> None:
    """Serve until whoever asks is gone.

    Args:
        life: read end of a pipe whose other end only the asking process holds.
    """
    _end_with(life)
    requests, replies = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):  # what a library prints is no reply
        os.dup2(nowhere, number)
    sys.modules["torch"] = None  # type: ignore[assignment]
    with suppress(ImportError):  # said when it is needed
        import_models()
        from transformers import AutoTokenizer  # noqa: F401 - a second, outside of the limits
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    served = _Served()
    with os.fdopen(requests, "rb") as source, os.fdopen(replies, "wb") as sink:
        while head := source.read(_LENGTH_BYTES):
            message = json.loads(source.read(int.from_bytes(head, "big")))
            reply = _answer(served, message)
            data = json.dumps(reply).encode()
            sink.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
            sink.flush()


def _end_with(life: int) -> None:
    """Have the kernel end this process with the other one, whatever it is doing then.

    A pipe whose last writer is gone sends SIGIO to its reader, and nobody handles that here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    try:
        gone = os.read(life, 1) == b""
    except BlockingIOError:
        gone = False
    if gone:  # before the line above
        os._exit(0)


def _answer(served: "_Served", message: Mapping[str, Any]) -> dict[str, object]:
    """The reply to a request: a value, or why there is none, and whether this process is done."""
    for number in message["forgotten"]:
        served.drop(number)
    try:
        _limit(float(message["cpu_s"]), int(message["memory_bytes"]))
        return {"value": served.operations[message["operation"]](**message["arguments"])}
    except MemoryError:
        _limit(0.0, None)
        size = format_size(int(message["memory_bytes"]))
        return _failure(f"needed more than {size} of memory", last=True)
    except Exception as error:  # noqa: BLE001 - programs of strangers raise anything
        _limit(0.0, None)
        return _failure(one_line(error), config=isinstance(error, _ConfigFileError))
    except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
        _limit(0.0, None)
        return _failure(f"made its library panic: {one_line(error)}", last=True)
    finally:
        _limit(0.0, None)


def _failure(reason: str, *, last: bool = False, config: bool = False) -> dict[str, object]:
    """A reply that says why there is no value; after the `last` one this process is ended."""
    return {"error": reason, "last": last, "config": config}


def _limit(cpu_s: float, memory_bytes: int | None) -> None:
    """Limit what is used from now on; 0 and None lift the limits.

    SIGPROF, when the time is over, ends the process within any operation: nobody handles it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard
    if memory_bytes is not None:
        pages = int(os.pread(_own_size(), 32, 0).split()[0])
        soft = pages * resource.getpagesize() + memory_bytes
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


@functools.cache
def _own_size() -> int:
    """A file whose first number is the pages of address space this process has."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def one_line(error: BaseException) -> str:
    """An error's message on one line, and not endless."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    return text if len(text) <= _ERROR_CHARS else text[: _ERROR_CHARS - 3] + "..."


class _ConfigFileError(Exception):
    """config.json is what keeps the tokenizer from being loaded."""


class _Served:
    """Tokenizers and streams of text by their numbers."""

    def __init__(self) -> None:
        self._tokenizers: dict[int, Any] = {}
        self._streams: dict[int, TextStream] = {}
        self.operations: dict[str, Callable[..., object]] = {
            "load": self.load,
            "render": self.render,
            "encode": self.encode,
            "decode": self.decode,
            "token": self.token,
            "vocabulary": self.vocabulary,
            "stream": self.stream,
            "push": self.push,
            "push_each": self.push_each,
            "texts": self.texts,
            "finish": self.finish,
        }

    def load(self, number: int, folder: str) -> dict[str, object]:
        """Load the tokenizer of a folder; returns what the other side asks for often."""
        from transformers import AutoTokenizer

        folder = _spelled(folder)
        with _Warnings() as warnings:
            try:
                # An explicit False is an error where code would be needed; None would ask on stdin.
                tokenizer = AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=False, local_files_only=True
                )
            except Exception as error:  # tokenizers raises plain Exception on damaged files
                if "trust_remote_code" in str(error):
                    reason = "it needs Python code of the folder, which is never run"
                    raise ValueError(reason) from error
                _blame_config(folder)
                raise
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _processor_template(Path(folder))
        if tokenizer.is_fast:  # what its library was built from: 60 MiB for 152,000 tokens
            for name in ("_vocab", "_merges"):
                vars(tokenizer).pop(name, None)
        self._tokenizers[number] = tokenizer
        notes = [*warnings.serious, *_differences(tokenizer, Path(folder))]
        give_back_holes()  # what building two of them took: 140 of 310 MB for 152,000 tokens
        return {
            "tokens": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "special_tokens": {
                str(tokenizer.convert_ids_to_tokens(i)): i for i in sorted(special_ids(tokenizer))
            },
            "chat_template": tokenizer.chat_template,
            "notes": notes,
        }

    def drop(self, number: int) -> None:
        """Forget a tokenizer."""
        self._tokenizers.pop(number, None)

    def render(
        self,
        number: int,
        messages: Sequence[Mapping[str, object]],
        chars: int,
        tools: Sequence[Mapping[str, object]] | None,
    ) -> str:
        """Run the chat template; `chars` are those of the messages and tools."""
        text = self._tokenizers[number].apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )
        limit = _TEMPLATE_FIXED_CHARS + _TEMPLATE_GROWTH * chars
        if not isinstance(text, str):
            raise TypeError(f"it wrote {type(text).__name__} instead of text")
        if len(text) > limit:
            raise ValueError(f"it wrote {len(text)} characters, limit for this prompt is {limit}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            at = f"at character {error.start} of {len(text)}"
            raise ValueError(f"it wrote half a character, which is no text, {at}") from error
        return text

    def encode(self, number: int, text: str, special: bool) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts around one."""
        ids = self._tokenizers[number].encode(text, add_special_tokens=special, verbose=False)
        return [int(token_id) for token_id in ids]

    def decode(self, number: int, ids: list[int], skip: bool) -> str:
        """The text of tokens; `skip` leaves special ones out."""
        text = self._tokenizers[number].decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        return str(text)

    def texts(self, number: int, ids: list[int]) -> list[str]:
        """The text of each token by itself, special ones too."""
        return [self.decode(number, [token_id], False) for token_id in ids]

    def token(self, number: int, token_id: int) -> str | None:
        """The token of an id."""
        found: str | None = self._tokenizers[number].convert_ids_to_tokens(token_id)
        return found

    def vocabulary(self, number: int) -> dict[str, int]:
        """All tokens and their ids."""
        return dict(self._tokenizers[number].get_vocab())

    def stream(self, number: int, stream: int, stops: Sequence[str], skip: bool) -> None:
        """Begin to turn tokens into text."""
        self._streams[stream] = TextStream(self._tokenizers[number], stops, skip)

    def push(self, stream: int, ids: Sequence[int]) -> dict[str, object]:
        """Give the stream tokens."""
        text = self._streams[stream].push(ids)
        return {
            "text": text,
            "kept": self._streams[stream].kept_tokens,
            "stopped": self._streams[stream].stopped,
        }

    def push_each(self, pushes: Sequence[tuple[int, Sequence[int]]]) -> list[dict[str, object]]:
        """Give several streams tokens."""
        return [self.push(stream, ids) for stream, ids in pushes]

    def finish(self, stream: int) -> dict[str, object]:
        """What the stream still held; it is forgotten."""
        ended = self._streams.pop(stream)
        return {"text": ended.finish(), "kept": ended.kept_tokens, "stopped": ended.stopped}


class _Warnings(logging.Handler):
    """Collects what transformers warns of while it loads a tokenizer."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.serious: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        sentence = " ".join(record.getMessage().split())
        if any(word in sentence.lower() for word in _SERIOUS):
            self.serious.append(f"transformers says: {sentence[:_ERROR_CHARS]}")

    def __enter__(self) -> "_Warnings":
        logging.getLogger(_LIBRARY).addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(_LIBRARY).removeHandler(self)


def _spelled(folder: str) -> str:
    """A name that the library takes, which knows UTF-8 only."""
    try:
        folder.encode()
    except UnicodeEncodeError:
        return f"/proc/self/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY)}"
    return folder


def _blame_config(folder: str) -> None:
    """Say so where config.json alone cannot be read either: AutoTokenizer reads it first.

    Raises:
        _ConfigFileError: it cannot.
    """
    from transformers import AutoConfig, PreTrainedConfig

    try:
        try:
            AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (ValueError, OSError):
            PreTrainedConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # validators raise their own
        raise _ConfigFileError(one_line(error)) from error


def _processor_template(folder: Path) -> str | None:
    """The template of chat_template.json, where processors of multimodal models keep theirs."""
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    template = json.loads(path.read_text("utf-8")).get("chat_template")
    return template if isinstance(template, str) else None


def _differences(tokenizer: Any, folder: Path) -> list[str]:  # noqa: ANN401
    """Whether a class of transformers made something else of tokenizer.json than what it says.

    transformers 5 builds many tokenizers anew from the vocabulary of the file and the settings of
    their class. Its tokens are the law here; that they are not the file's is worth a note.
    """
    import transformers
    from tokenizers import Tokenizer

    path, name = folder / "tokenizer.json", type(tokenizer).__name__
    if name in ("TokenizersBackend", "PreTrainedTokenizerFast") or not path.is_file():
        return []
    plain = Tokenizer.from_file(str(path))
    plain.no_truncation()
    plain.no_padding()
    expected = plain.encode(_SAMPLE, add_special_tokens=False).ids
    found = tokenizer.encode(_SAMPLE, add_special_tokens=False, verbose=False)
    if found == expected:
        return []
    return [
        f"transformers {transformers.__version__} reads this tokenizer.json as {name}: a line of "
        f"{len(_SAMPLE)} characters becomes {len(found)} tokens, by the file itself "
        f"{len(expected)}{' others' if len(found) == len(expected) else ''}; the tokens are those "
        "of transformers, answers are wrong if the model was trained with the file's"
    ]
