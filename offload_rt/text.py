"""Text at both ends of a run: prompts to token ids, token ids to text that is safe to show.

A model folder is untrusted. Its tokenizer is loaded without running code of the folder. Its chat
template is a program: it runs in the `ImmutableSandboxedEnvironment` of transformers and under a
time limit.
"""

import ctypes
import json
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from offload_rt.errors import CheckpointError, ConfigError

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not, or not yet, a character

# A character is at most 4 bytes, so at most 4 tokens; a window that grows past this holds bytes
# that never become one.
_WINDOW_TOKENS = 32

_MARKS = ("first 7391", "second 7391", "third 7391")  # no template writes that by itself

# Templates of known models render in under 50 ms, compiling included.
_TEMPLATE_LIMIT_S = 2.0

# The largest templates hold some 20 kB of fixed text and repeat a message at most a few times.
_TEMPLATE_FIXED_CHARS = 1 << 20
_TEMPLATE_GROWTH = 16

# Without one of these transformers may make up an empty tokenizer for a known model type.
_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
)


class TextStream:
    """Turns tokens into text as they are committed, never taking back what was shown.

    Held back is an incomplete character, and text that may still grow into a stop string. What
    `push` and `finish` return, joined, equals `tokenizer.decode(ids, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)`, cut where the first stop string begins. The first is the
    one that is complete first, as if text came one character at a time; of several that end
    together the longest. So the text does not depend on how tokens are grouped into pushes.

    Tokens are decoded in a moving window that starts with tokens whose text was shown before: the
    decoders of sentencepiece drop a leading space, and need a token in front of it. Total work is
    proportional to the number of tokens.

    One exception: byte-fallback tokenizers (Llama 2, Gemma) decode a run of byte tokens all or
    nothing. Where a run begins as valid UTF-8 and then is not, `decode` turns the whole run into
    U+FFFD; here the characters already shown stay.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_strings: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        if not all(stop_strings):
            raise ConfigError("a stop string is empty: give a text that ends the answer")
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._skip_special_tokens = skip_special_tokens
        self._special_ids = _special_ids(tokenizer)
        self._window: list[int] = []
        self._released = 0  # characters of the window's text that left the decoder
        self._mark = 0  # tokens of the window when they did; the next window starts here
        self._held = ""  # released, but may be the beginning of a stop string
        self._shown: list[str] = []
        self._stopped: str | None = None
        self._kept_tokens = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._stopped

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._shown)

    @property
    def kept_tokens(self) -> int:
        """Tokens pushed, up to and including the one that completed the stop string."""
        return self._kept_tokens

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; return the text that is now safe to show.

        After a stop string everything is ignored, so a whole window of accepted drafts can be
        pushed and then cut to `kept_tokens`.
        """
        shown = ""
        for token_id in token_ids:
            if self._stopped is not None:
                break
            self._kept_tokens += 1
            if not self._is_silent(token_id):
                shown += self._through_stops(self._decode_next(token_id))
        if shown:
            self._shown.append(shown)
        return shown

    def finish(self) -> str:
        """Return what is still held; an incomplete character comes out as U+FFFD."""
        if self._stopped is not None:
            return ""
        rest = self._decode(self._window)[self._released :]
        shown = self._through_stops(rest)
        if self._stopped is None:
            shown += self._held
        self._window, self._released, self._mark, self._held = [], 0, 0, ""
        if shown:
            self._shown.append(shown)
        return shown

    def _is_silent(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out: special, or an id of the padded vocabulary."""
        if self._skip_special_tokens and token_id in self._special_ids:
            return True
        return self._tokenizer.convert_ids_to_tokens(token_id) is None

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids,
            skip_special_tokens=self._skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def _decode_next(self, token_id: int) -> str:
        """The text that the token adds and that later tokens cannot change."""
        self._window.append(token_id)
        text = self._decode(self._window)
        crowded = len(self._window) - self._mark > _WINDOW_TOKENS
        stable = _stable_chars(text, crowded)
        if stable <= self._released:
            return ""
        added = text[self._released : stable]
        self._released = stable
        self._slide(crowded)
        return added

    def _slide(self, crowded: bool) -> None:
        """Drop tokens from the front of the window, keeping shown text in front of the new.

        The shorter window's stable text must end at the same character as the longer one's. It
        does when it ends with a whole character; with U+FFFD only, when its cut is so far back that
        the character in the making lies behind it.
        """
        if crowded:
            self._window = self._window[-_WINDOW_TOKENS // 2 :]
            self._released = _stable_chars(self._decode(self._window), crowded)
            self._mark = 0
            return
        shorter = self._window[self._mark :]
        stable = _stable_chars(self._decode(shorter), crowded)
        if stable == 0:  # only the tail of a character, or a space at the front: cut there later
            return
        self._window, self._released, self._mark = shorter, stable, len(shorter)

    def _through_stops(self, added: str) -> str:
        """Pass text through the stop strings; return what none of them can claim any more."""
        if not self._stop_strings:
            return added
        self._held += added
        matches = [
            (start + len(stop), start, stop)
            for stop in self._stop_strings
            if (start := self._held.find(stop)) >= 0
        ]
        if matches:
            _, start, self._stopped = min(matches)
            shown, self._held = self._held[:start], ""
            return shown
        cut = len(self._held) - self._claimed_chars()
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _claimed_chars(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stop_strings)) - 1)
        for length in range(longest, 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop_strings):
                return length
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation; `role` is what the chat template knows, such as `user`."""

    role: str
    content: str


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    raw: bool = False,
) -> list[int]:
    """Token ids of a prompt, through the model's chat template when it has one.

    Args:
        tokenizer: from `load_tokenizer`.
        prompt: a text, or a conversation whose last turn wants an answer.
        system: system prompt put in front; needs a chat template.
        raw: encode a text as it is, without the chat template.

    Raises:
        ConfigError: nothing to encode, or options that need a chat template without one.
        CheckpointError: the chat template failed or took too long.
    """
    templated = not raw and tokenizer.chat_template is not None
    if not templated and (system is not None or not isinstance(prompt, str)):
        what = "a system prompt" if system is not None else "a conversation"
        why = "--raw leaves it out" if raw else "the model has none"
        raise ConfigError(f"{what} needs a chat template and {why}: give one plain text")
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    if not turns or not turns[-1].content:
        raise ConfigError("the prompt is empty: give text with -p, -f or on stdin")
    if system is not None:
        if turns[0].role == "system":
            raise ConfigError("two system prompts: leave out --system or the system message")
        turns.insert(0, Message(role="system", content=system))
    _require_unicode(turns)
    text = _render(tokenizer, turns) if templated else turns[0].content
    # The template has written the special tokens already.
    ids = tokenizer.encode(text, add_special_tokens=not templated, verbose=False)
    if not ids:
        raise ConfigError(f"the prompt of {len(text)} characters gives no token: give other text")
    return ids


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; runs no code of it, asks nothing, uses no network.

    Raises:
        CheckpointError: the files are missing, damaged, or need code of the folder to run.
    """
    if not any(path for name in _VOCABULARY_FILES for path in folder.glob(name)):
        raise CheckpointError(
            f"no tokenizer in {folder}: expected tokenizer.json or tokenizer.model there, "
            "download it next to the weights"
        )
    try:
        # An explicit False is an error where code would be needed; None would ask on stdin.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises plain Exception on damaged files
        reason = _first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs Python code of the folder, which is never run"
        raise CheckpointError(f"cannot load the tokenizer of {folder}: {reason}") from error
    if len(tokenizer) == 0:
        raise CheckpointError(f"the tokenizer of {folder} has no tokens: download it again")
    return tokenizer


def end_token_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> frozenset[int]:
    """Tokens that end an answer, from every place a model folder names them.

    `<|endoftext|>` is one wherever it is a special token: Qwen names only `<|im_end|>`, and goes on
    for ever after plain text.

    Raises:
        CheckpointError: a file is damaged or names something that is not a token id.
    """
    ids = {
        token_id
        for name in ("generation_config.json", "config.json")
        for token_id in _declared_end_ids(folder / name)
    }
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    for token_id in _special_ids(tokenizer):
        if tokenizer.convert_ids_to_tokens(token_id) == "<|endoftext|>":
            ids.add(token_id)
    return frozenset(ids)


def answer_end_token(
    tokenizer: PreTrainedTokenizerBase, end_tokens: Collection[int], *, raw: bool = False
) -> int | None:
    """The token behind an answer in a text the model was trained on.

    It is what the chat template writes there: Gemma and Phi-3 end a turn with another token than
    the tokenizer's own end of a text.

    Args:
        tokenizer: from `load_tokenizer`.
        end_tokens: all tokens that end an answer (`end_token_ids`).
        raw: texts are given without the chat template.

    Returns:
        The tokenizer's own where no template tells; None if there is no end token at all.
    """
    own = tokenizer.eos_token_id
    fallback = min(end_tokens, default=None) if own is None else int(own)
    if raw or tokenizer.chat_template is None:
        return fallback
    turns = [("user", _MARKS[0]), ("assistant", _MARKS[1]), ("user", _MARKS[2])]
    try:
        text = _render(tokenizer, [Message(role=role, content=mark) for role, mark in turns])
    except CheckpointError:
        return fallback  # a template for other roles
    behind = text.rpartition(_MARKS[1])[2].partition(_MARKS[2])[0]
    ids = tokenizer.encode(behind, add_special_tokens=False, verbose=False)
    return next((token for token in ids if token in end_tokens), fallback)


def _stable_chars(text: str, crowded: bool) -> int:
    """How much of a window's text later tokens cannot change.

    In a crowded window all U+FFFD are real but the last, which may be a character in the making.
    """
    whole = len(text.rstrip(_REPLACEMENT))
    return max(whole, len(text) - 1) if crowded else whole


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that `skip_special_tokens` leaves out; `all_special_ids` lacks the unnamed ones."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(token_id for token_id, token in added if token.special)


def _declared_end_ids(path: Path) -> list[int]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {_first_line(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object: download it again")
    declared = config.get("eos_token_id")
    if declared is None:
        return []
    ids = declared if isinstance(declared, list) else [declared]
    for token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise CheckpointError(f"eos_token_id in {path} is {token_id!r}, expected a token id")
    return ids


def _require_unicode(turns: Sequence[Message]) -> None:
    for turn in turns:
        try:
            turn.content.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"the prompt is not UTF-8 at character {error.start}: convert it first"
            ) from error


class _TemplateTimeout(BaseException):
    """Raised inside the thread of a template; not an Exception, so nothing there catches it."""


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> str:
    """Run the chat template, in a thread that can be given up.

    The sandbox limits `range()` to 100,000 but not loops in loops. Past the time limit the thread
    is stopped by an exception set from here, which Python delivers between two bytecodes; a single
    long operation (`10 ** 10 ** 9`) holds the interpreter and is not covered. A process could be
    killed in any state, but starting one costs every run 0.7 s.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    rendered: list[str] = []
    failures: list[Exception] = []

    def work() -> None:
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            rendered.append(text)
        except _TemplateTimeout:
            return
        except Exception as error:  # noqa: BLE001  the template is a program, it can raise anything
            failures.append(error)

    thread = threading.Thread(target=work, name="chat-template", daemon=True)
    thread.start()
    thread.join(_TEMPLATE_LIMIT_S)
    source = f"the chat template of {tokenizer.name_or_path or 'the model'}"
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TemplateTimeout)
        )
        raise CheckpointError(f"{source} ran for more than {_TEMPLATE_LIMIT_S:g} s: use --raw")
    if failures:
        advice = "leave out --system or use --raw" if turns[0].role == "system" else "use --raw"
        raise CheckpointError(f"{source} failed: {_first_line(failures[0])}; {advice}")
    limit = _TEMPLATE_FIXED_CHARS + _TEMPLATE_GROWTH * sum(len(turn.content) for turn in turns)
    if len(rendered[0]) > limit:
        raise CheckpointError(
            f"{source} wrote {len(rendered[0])} characters, limit for this prompt is {limit}: "
            "use --raw"
        )
    return rendered[0]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
