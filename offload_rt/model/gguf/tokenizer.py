r"""The tokenizer that a GGUF file describes, as the files a model folder would have.

Two kinds are read: byte-level BPE (`gpt2`), whose file names how text is split before, and BPE of
sentencepiece (`llama`), whose merges follow from scores. `tokenizer.json` is written as the package
tokenizers reads it. How text is split is what the models' own tokenizer.json say.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.model.files import shown
from offload_rt.model.gguf.container import Value
from offload_rt.model.gguf.network import ARCHITECTURE

_BEGIN = "tokenizer.ggml."
_TOKENS, _TYPES = f"{_BEGIN}tokens", f"{_BEGIN}token_type"
_SCORES, _MERGES = f"{_BEGIN}scores", f"{_BEGIN}merges"
_TEMPLATE = "tokenizer.chat_template"
WANTED = (_TOKENS, _TYPES, _SCORES, _MERGES, _TEMPLATE)
_UNKNOWN, _CONTROL, _USER, _UNUSED = 2, 3, 4, 5  # of token_type; 1 is text, 6 a byte
_PIECE_LIMIT = 512  # characters of a piece whose merges are looked for
_MARK = "\u2581"  # what sentencepiece has for a space

# What ends an answer besides the end of a text, where it is no text itself (of chat models, which
# often name only one of the two).
_ENDS = frozenset(
    (
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "</s>",
    )
)
_UNCASED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _SIGNS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_AHEAD = r"[^\r\n\p{L}\p{N}]?"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _cased(after: str, digits: str) -> str:
    """Words that begin anew where a capital follows a small letter."""
    words = f"{_AHEAD}{_UPPER}*{_LOWER}+{after}|{_AHEAD}{_UPPER}+{_LOWER}*{after}"
    return f"{words}|{digits}|{_PATHS}|{_SPACES}"


def _split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_DIGITS: dict[str, object] = {"type": "Digits", "individual_digits": True}
_LLAMA3 = [_split(rf"{_UNCASED}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}")]
_QWEN2 = [_split(rf"{_UNCASED}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}")]
_DEEPSEEK_CODER = [
    *map(_split, (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")),
    _DIGITS,
]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splitting:
    """How text is split before pairs of bytes are merged.

    Attributes:
        steps: before bytes become characters.
        by_words: then it is split as GPT-2's text is.
        composed: letters and their marks become one character (NFC) first.
        whole: a word that is a token is one, whatever the merges would make of it.
        begins: a text begins with the token for that, if the file does not say.
    """

    steps: Sequence[dict[str, object]] = ()
    by_words: bool = False
    composed: bool = False
    whole: bool = False
    begins: bool = False


_OF_GPT2 = _Splitting(by_words=True)
_OF_DIGITS = _Splitting(steps=[_DIGITS], by_words=True)
_OF_LLAMA3 = _Splitting(steps=_LLAMA3, whole=True, begins=True)
_SPLITTINGS: Mapping[str, _Splitting] = {
    "gpt-2": _OF_GPT2,
    "phi-2": _OF_GPT2,
    "olmo": _OF_GPT2,
    "smollm": _OF_DIGITS,
    "starcoder": _OF_DIGITS,
    "refact": _OF_DIGITS,
    "codeshell": _OF_DIGITS,
    "llama-bpe": _OF_LLAMA3,
    "llama3": _OF_LLAMA3,
    "llama-v3": _OF_LLAMA3,
    "falcon3": _OF_LLAMA3,
    "smaug-bpe": _Splitting(steps=_LLAMA3),
    "dbrx": _Splitting(steps=_LLAMA3),
    "qwen2": _Splitting(steps=_QWEN2, composed=True),
    "deepseek-r1-qwen": _Splitting(steps=_QWEN2),
    "stablelm2": _Splitting(steps=_QWEN2),
    "deepseek-coder": _Splitting(steps=_DEEPSEEK_CODER),
    "tekken": _Splitting(steps=[_split(_cased("", r"\p{N}"))], whole=True, begins=True),
    "gpt-4o": _Splitting(steps=[_split(_cased(f"{_UNCASED}?", r"\p{N}{1,3}"))]),
}

_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What is said of a model's text.

    Attributes:
        config: that `config.json` has of it.
        files: the others by name.
    """

    config: Mapping[str, object]
    files: Mapping[str, dict[str, object]] = field(default_factory=dict)


def describe_text(path: Path, metadata: Mapping[str, Value]) -> Texts:
    """The tokenizer's files, and what ends an answer.

    Args:
        path: of the file.
        metadata: of it, with what is `WANTED`.

    Raises:
        CheckpointError: it is of another kind than is read, or its lists contradict each other.
    """
    vocabulary = _Vocabulary(path, metadata)
    kind = vocabulary.kind
    if kind == "none":
        return Texts(config={})
    if kind == "gpt2":
        made = _byte_level(vocabulary)
    elif kind == "llama":
        made = _of_pieces(vocabulary)
    else:
        raise vocabulary.error(
            f"has a tokenizer of kind {shown(kind)}, read are gpt2 (byte-level BPE) and llama "
            "(BPE of sentencepiece): take the model it was made from"
        )
    ends = vocabulary.ends()
    config = {"bos_token_id": vocabulary.special("bos"), "eos_token_id": ends or None}
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for word, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = vocabulary.special(name)
        if token is not None:
            settings[f"{word}_token"] = vocabulary.tokens[token]
    if (template := metadata.get(_TEMPLATE)) is not None:
        settings["chat_template"] = template
    generation: dict[str, object] = {"eos_token_id": ends} if ends else {}
    sampling = {name: metadata[key] for key, name in _SAMPLING.items() if key in metadata}
    if sampling:
        generation |= {"do_sample": True, **sampling}
    return Texts(
        config=config,
        files={
            "tokenizer.json": made,
            "tokenizer_config.json": settings,
            "generation_config.json": generation,
        },
    )


class _Vocabulary:
    """The lists of a file, which are checked against each other."""

    def __init__(self, path: Path, metadata: Mapping[str, Value]) -> None:
        self._path, self._metadata = path, metadata
        kind = metadata.get(f"{_BEGIN}model", "none")
        self.kind = kind if isinstance(kind, str) else shown(kind)
        self.tokens = self.texts(_TOKENS) if self.kind != "none" else ()
        types = metadata.get(_TYPES, (1,) * len(self.tokens))
        self.types = self.numbers(_TYPES, types)

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} {what}")

    def texts(self, key: str) -> tuple[str, ...]:
        found = self._metadata.get(key)
        if not isinstance(found, tuple) or not all(isinstance(each, str) for each in found):
            raise self.error(f"has no {key}, a list of texts: the file is damaged")
        return found  # type: ignore[return-value]

    def numbers(self, key: str, found: Value | None) -> Sequence[float]:
        """A list with a number for each token."""
        if (
            not isinstance(found, tuple)
            or len(found) != len(self.tokens)
            or any(isinstance(each, str) for each in found)
        ):
            raise self.error(f"has {len(self.tokens)} tokens and no {key} for each of them")
        return found  # type: ignore[return-value]

    def scores(self) -> Sequence[float]:
        return self.numbers(_SCORES, self._metadata.get(_SCORES))

    def text(self, word: str) -> str | None:
        """A setting of the tokenizer, if it is there."""
        value = self._metadata.get(f"{_BEGIN}{word}")
        return value if isinstance(value, str) else None

    def flag(self, word: str, default: bool) -> bool:
        value = self._metadata.get(f"{_BEGIN}{word}", default)
        return value if isinstance(value, bool) else default

    def special(self, word: str) -> int | None:
        """The id of a token that is named by its use, if there is such a token."""
        value = self._metadata.get(f"{_BEGIN}{word}_token_id")
        if type(value) is not int or not 0 <= value < len(self.tokens):
            return None
        return value

    def ends(self) -> list[int]:
        """What ends an answer."""
        stated = [self.special(word) for word in ("eos", "eot", "eom")]
        known = [
            token
            for token, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (_CONTROL, _USER) and text in _ENDS  # some files have them as a user's
        ]
        return list(dict.fromkeys([*(token for token in stated if token is not None), *known]))

    def ids(self, *, unused: bool) -> dict[str, int]:
        """Tokens by text; of equal ones the first."""
        found = dict[str, int]()
        for token, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if unused or kind != _UNUSED:
                found.setdefault(text, token)
        return found

    def added(self) -> list[dict[str, object]]:
        """Tokens that are found in a text before it is split; others than text are special."""
        phi3 = self._metadata.get(ARCHITECTURE) == "phi3" and self.kind == "llama"
        return [
            {
                "id": token,
                "content": text,
                "single_word": False,
                "lstrip": False,
                # Phi-3's own, which a file does not say
                "rstrip": phi3 and text not in ("<unk>", "<s>", "<|endoftext|>"),
                "normalized": False,
                "special": kind != _USER or text in _ENDS,
            }
            for token, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER) and text
        ]

    def around(self, begins: bool) -> dict[str, object] | None:
        """What puts the first token before a text; None: nothing does."""
        first = self.special("bos")
        if first is None or not self.flag("add_bos_token", begins):
            return None
        text = self.tokens[first]

        def part(name: str, number: int) -> dict[str, object]:
            return {"Sequence": {"id": name, "type_id": number}}

        begin = {"SpecialToken": {"id": text, "type_id": 0}}
        return {
            "type": "TemplateProcessing",
            "single": [begin, part("A", 0)],
            "pair": [begin, part("A", 0), part("B", 1)],
            "special_tokens": {text: {"id": text, "ids": [first], "tokens": [text]}},
        }


def _byte_level(vocabulary: _Vocabulary) -> dict[str, object]:
    """tokenizer.json of byte-level BPE."""
    name = vocabulary.text("pre")
    splitting = _SPLITTINGS.get(name or "")
    if splitting is None:
        what = (
            "does not say how text is split"
            if name in (None, "default")
            else (f"splits text as {shown(name)} does")
        )
        raise vocabulary.error(
            f"{what} (tokenizer.ggml.pre), known are {', '.join(_SPLITTINGS)}: take a newer "
            "conversion, or the model it was made from"
        )
    merges = vocabulary.texts(_MERGES)
    if wrong := next((each for each in merges if each.count(" ") != 1), None):
        raise vocabulary.error(f"has the merge {shown(wrong)}, expected are two texts")
    bytes_of: dict[str, object] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": splitting.by_words,
    }
    return _tokenizer(
        vocabulary,
        vocabulary.ids(unused=False),
        [each.split(" ") for each in merges],
        normalizer={"type": "NFC"} if splitting.composed else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*splitting.steps, bytes_of]},
        post_processor=vocabulary.around(splitting.begins),
        decoder=bytes_of,
        whole=splitting.whole,
    )


def _of_pieces(vocabulary: _Vocabulary) -> dict[str, object]:
    """tokenizer.json of sentencepiece's BPE: a space before a text, bytes where no piece fits."""
    spaced = vocabulary.flag("add_space_prefix", True)
    before = [{"type": "Prepend", "prepend": _MARK}] if spaced else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spaced else []
    ids = vocabulary.ids(unused=True)
    return _tokenizer(
        vocabulary,
        ids,
        _merges(ids, vocabulary),
        normalizer={
            "type": "Sequence",
            "normalizers": [
                *before,
                {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
            ],
        },
        pre_tokenizer=None,
        post_processor=vocabulary.around(True),
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        pieces=True,
    )


def _merges(ids: Mapping[str, int], vocabulary: _Vocabulary) -> list[list[str]]:
    """Pairs of pieces in the order they are merged: what makes high scores comes first."""
    scores = vocabulary.scores()
    found = [
        (-scores[token], -len(one), -len(other), one, other)
        for piece, token in ids.items()
        if vocabulary.types[token] not in (_CONTROL, _UNKNOWN) and len(piece) <= _PIECE_LIMIT
        for one, other in sorted(_pairs(piece, ids), key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    ]
    found.sort(key=lambda each: each[:3])
    return [[one, other] for *_, one, other in found]


def _pairs(piece: str, ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for at in range(1, len(piece)):
        if piece[:at] in ids and piece[at:] in ids:
            yield piece[:at], piece[at:]


def _tokenizer(  # noqa: PLR0913 - the parts of a tokenizer.json
    vocabulary: _Vocabulary,
    ids: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    normalizer: Mapping[str, object] | None,
    pre_tokenizer: Mapping[str, object] | None,
    post_processor: Mapping[str, object] | None,
    decoder: Mapping[str, object],
    pieces: bool = False,
    whole: bool = False,
) -> dict[str, object]:
    unknown = vocabulary.special("unknown") if pieces else None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": pieces,
            "byte_fallback": pieces,
            "ignore_merges": whole,
            "vocab": ids,
            "merges": merges,
        },
    }
