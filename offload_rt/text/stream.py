"""Token ids to text that is safe to show, piece by piece."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from offload_rt.errors import ConfigError

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not, or not yet, a character

# A character is at most 4 bytes, so at most 4 tokens; a window that grows past this holds bytes
# that never become one.
_WINDOW_TOKENS = 32


class Decoder(Protocol):
    """What a stream needs of a tokenizer of transformers."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Added tokens by their ids."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """The token of an id, None of one that is unknown."""
        ...

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """The text of tokens."""
        ...


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
        tokenizer: Decoder,
        stop_strings: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        if not all(stop_strings):
            raise ConfigError("a stop string is empty: give a text that ends the answer")
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._skip_special_tokens = skip_special_tokens
        self._special_ids = special_ids(tokenizer)
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


def _stable_chars(text: str, crowded: bool) -> int:
    """How much of a window's text later tokens cannot change.

    In a crowded window all U+FFFD are real but the last, which may be a character in the making.
    """
    whole = len(text.rstrip(_REPLACEMENT))
    return max(whole, len(text) - 1) if crowded else whole


def special_ids(tokenizer: Decoder) -> frozenset[int]:
    """Ids that `skip_special_tokens` leaves out; `all_special_ids` lacks the unnamed ones."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(token_id for token_id, token in added if token.special)
