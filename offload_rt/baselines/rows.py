"""The raw rows of a comparison: a line of JSON each, on the disk before the next run begins.

The first line is the setup. A comparison that was interrupted, or killed, goes on from its rows,
and the report is made from nothing else. Imports no torch.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from offload_rt.errors import ConfigError
from offload_rt.model.files import shown
from offload_rt.reading import read_plain
from offload_rt.writing import append, cut_off, writing

VERSION = 1
_LIMIT_BYTES = 2**30
_LARGEST = 2**53  # a float has all whole numbers up to it
_SHORTEST_S = 1e-12
_MOST_RUNS = 64  # batch sizes, or engines
_DEEPEST = 64

RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A prompt of the set.

    Attributes:
        digest: of its token ids.
    """

    name: str
    category: str
    tokens: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRow:
    """A GPU of the machine, and its PCIe link (0 where the driver does not say)."""

    name: str
    memory_bytes: int = 0
    link_generation: int = 0
    link_width: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRow:
    """What a comparison ran on."""

    cpu: str
    cores: int
    ram_bytes: int
    gpus: list[GpuRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is compared under which conditions; a comparison goes on only under the same ones.

    Attributes:
        model: its name.
        files: name and size of each weight file.
        device: `cpu` or `cuda:N`.
        device_bytes: what an engine may keep on the device.
        cap_bytes: what its process may take in all, or None.
        cap: how that is enforced.
        page_cache: what is done about cached weights.
        ends: whether an end token ends an answer.
        draft: drafter of the drafting engines; empty without them.
        runtime: where our own engines run and what they may use, as JSON.
        batches: numbers of sequences that run at once.
        engines: in the order of a round.
        weights_bytes: all weights.
        command: the command line, for the report; another one may go on.
    """

    kind: str = "setup"
    version: int = VERSION
    model: str
    files: list[list[Any]]
    dtype: str
    device: str
    device_bytes: int
    cap_bytes: int | None
    cap: str
    page_cache: str
    prompt_file: str
    prompts: list[PromptRow]
    max_tokens: int
    ends: bool
    draft: str
    runtime: str = ""
    batches: list[int]
    engines: list[str]
    machine: MachineRow
    weights_bytes: int
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Which run of the comparison a row is about: one process of one engine."""

    round: int
    engine: str
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An engine is ready.

    Attributes:
        cached_bytes: of the model's files in the page cache before it began; None if not known.
        facts: the engine's configuration, versions and threads, in its own words.
    """

    kind: str = "loaded"
    run: Run
    load_s: float
    cached_bytes: int | None
    host_peak_bytes: int
    device_peak_bytes: int
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One batch of prompts is answered.

    Attributes:
        group: number of the batch among the batches of its size.
        prompts: which prompts are in it, by their number in the setup.
        texts: the answers' texts.
        ttft_s: from the start of the prompts' pass to its end.
        decode_s: from there to the last token.
        first_tokens: emitted by the prompts' pass, all sequences together.
        passes: over the model, the prompts' included.
        prompt_read_bytes: that the process read from disks in the prompts' pass.
        decode_read_bytes: the same in the passes after it.
        decode_link_bytes: what the engine counted on its link after the prompts' pass.
    """

    kind: str = "answered"
    run: Run
    group: int
    prompts: list[int]
    token_ids: list[list[int]]
    texts: list[str]
    ttft_s: float
    decode_s: float
    first_tokens: int
    passes: int
    prompt_read_bytes: int
    decode_read_bytes: int
    decode_link_bytes: int | None
    host_peak_bytes: int
    device_peak_bytes: int

    @property
    def tokens(self) -> int:
        """Emitted, all sequences together."""
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float | None:
        """Of the passes after the prompts'; None if there was none."""
        later = self.tokens - self.first_tokens
        return later / self.decode_s if later > 0 and self.decode_s > 0 else None

    @property
    def s_per_token(self) -> float | None:
        """Seconds a sequence waited for a token after the first."""
        rate = self.tokens_per_s
        return len(self.token_ids) / rate if rate else None

    @property
    def tokens_per_pass(self) -> float | None:
        """Of each sequence, in the passes after the prompts'; None if there was none."""
        steps = (self.passes - 1) * len(self.token_ids)
        return (self.tokens - self.first_tokens) / steps if steps else None

    @property
    def read_bytes_per_s(self) -> float | None:
        """From disks, in the passes after the prompts'."""
        return self.decode_read_bytes / self.decode_s if self.decode_s > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A run came to nothing; the engine is not tried again with this batch.

    Attributes:
        stage: what it was doing.
    """

    kind: str = "failed"
    run: Run
    stage: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How near two tokens were to each other where an engine's text parts from ours.

    Attributes:
        prompt: number of the prompt in the setup.
        index: of the first token that differs.
        tokens: ours and theirs.
        logits: of the two, after the tokens they agree on, computed by us in one pass.
        best: the likeliest token there.
    """

    kind: str = "gap"
    engine: str
    batch: int
    prompt: int
    index: int
    tokens: list[int]
    logits: list[float]
    best: int


Row = Loaded | Answered | Failed | Gap
_KINDS: dict[str, type[Row]] = {
    "loaded": Loaded,
    "answered": Answered,
    "failed": Failed,
    "gap": Gap,
}


@dataclass(slots=True)
class RawRows:
    """The rows of a comparison and the file they are in.

    Attributes:
        rows: all so far, in their order.
        torn_bytes: of a line that a killed process left unfinished; they are cut off.
    """

    path: Path
    setup: Setup
    rows: list[Row] = field(default_factory=list)
    torn_bytes: int = 0

    def append(self, row: Row) -> None:
        """Add a row; it is on the disk when this returns."""
        _append(self.path, row)
        self.rows.append(row)

    def answers(self) -> list[Answered]:
        """The answers among the rows."""
        return [row for row in self.rows if isinstance(row, Answered)]

    def loads(self) -> list[Loaded]:
        """The loads among the rows."""
        return [row for row in self.rows if isinstance(row, Loaded)]

    def failures(self) -> list[Failed]:
        """The failures among the rows."""
        return [row for row in self.rows if isinstance(row, Failed)]

    def gaps(self) -> list[Gap]:
        """The gaps among the rows."""
        return [row for row in self.rows if isinstance(row, Gap)]


def begin(path: Path, setup: Setup) -> RawRows:
    """Start a file of rows, or go on with one of the same setup.

    Raises:
        ConfigError: the file is damaged or belongs to another comparison.
    """
    if not path.exists() or path.stat().st_size == 0:
        raw = RawRows(path, setup)
        _append(path, setup)
        return raw
    raw = read(path)
    if (what := _difference(raw.setup, setup)) is not None:
        raise ConfigError(
            f"{path} holds another comparison ({what}): give another --output, or remove it"
        )
    if raw.torn_bytes:
        with writing(path):
            cut_off(path, raw.torn_bytes)
    return raw


def read(path: Path) -> RawRows:
    """Read a file of rows; a last line without its end is left out.

    Raises:
        ConfigError: it cannot be read, or a line of it is no row.
    """
    data = read_plain(path, _LIMIT_BYTES)
    *lines, torn = data.split(b"\n")
    if not lines:
        raise ConfigError(f"{path} has no rows: run the comparison first")
    setup = _parse(lines[0], {"setup": Setup}, path, 1)
    _require(_fault_of_setup(setup), path, 1)
    rows: list[Row] = []
    for number, line in enumerate(lines[1:], start=2):
        rows.append(_parse(line, _KINDS, path, number))
        _require(_fault(rows[-1], setup), path, number)
    return RawRows(path, setup, rows, len(torn))


def _require(fault: str, path: Path, number: int) -> None:
    if fault:
        raise ConfigError(f"{path}, line {number} cannot be: {fault}")


def _fault_of_setup(setup: Setup) -> str:
    """What keeps a setup from being one; empty if nothing does."""
    for name, values in (("batches", setup.batches), ("engines", setup.engines)):
        if not 0 < len(set(values)) == len(values) <= _MOST_RUNS:
            return f"{name} has {len(values)} values, some of them twice or none"
    if 0 in setup.batches:
        return "a batch has 0 sequences"
    if not setup.prompts:
        return "there are no prompts"
    draft = drafter(setup)
    if draft is not None and type(draft.get("draft")) is not str:
        return "the drafter has no name"
    if draft is not None and type(draft.get("draft_tokens")) not in (int, NoneType):
        return "the drafter's tokens are no number"
    return ""


def drafter(setup: Setup) -> dict[str, Any] | None:
    """The drafter's settings; None without one, nothing in it where they are damaged."""
    if not setup.draft:
        return None
    try:
        found = _loads(setup.draft)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _fault(row: Row, setup: Setup) -> str:
    """What keeps a row from being one of this setup; empty if nothing does."""
    if isinstance(row, Gap) and not len(row.logits) == len(row.tokens) == 2:
        return f"{len(row.tokens)} tokens and {len(row.logits)} logits instead of two"
    if not isinstance(row, Answered):
        return ""
    counts = {len(row.prompts), len(row.token_ids), len(row.texts), row.run.batch}
    if len(counts) > 1:
        return f"a batch of {row.run.batch} has {len(row.token_ids)} answers"
    if max(row.prompts, default=0) >= len(setup.prompts):
        return f"prompt {max(row.prompts)} is asked, there are {len(setup.prompts)}"
    return "an answer took no pass" if row.passes < 1 else ""


def _append(path: Path, row: Row | Setup) -> None:
    line = json.dumps(dataclasses.asdict(row), ensure_ascii=True, allow_nan=False)
    with writing(path):
        append(path, line + "\n")


def _difference(before: Setup, now: Setup) -> str | None:
    """What makes two setups different, in words."""
    for one in dataclasses.fields(Setup):
        was, wanted = getattr(before, one.name), getattr(now, one.name)
        unknown = one.name == "runtime" and not was  # rows of an older version do not tell
        if one.name == "command" or was == wanted or unknown:
            continue
        what = one.name.replace("_", " ")
        if one.name == "runtime":
            return "its options for memory and placement are others"
        if isinstance(was, list | MachineRow):
            return f"its {what} are others"
        return f"its {what} is {was!r}, now {wanted!r}"
    return None


def _parse(line: bytes, kinds: "dict[str, type[RowT]]", path: Path, number: int) -> RowT:
    wrong = f"{path}, line {number}"
    try:
        values = _loads(line)
    except RecursionError as error:
        raise ConfigError(f"{wrong} is nested too deeply") from error
    except ValueError as error:
        raise ConfigError(f"{wrong} is not JSON: {error}") from error
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"{wrong} is no row of a comparison: its kind is {shown(kind)}")
    if values.get("version", VERSION) != VERSION:
        version = shown(values["version"])
        raise ConfigError(f"{wrong} is of version {version}, this one reads {VERSION}")
    try:
        row = _record(kinds[kind], values)
    except MalformedError as error:
        raise ConfigError(f"{wrong} is no proper {kind} row: {error}") from error
    assert isinstance(row, kinds[kind])
    return row


def _loads(text: bytes | str) -> Any:  # noqa: ANN401 - any JSON
    """JSON of finite numbers that is not too deep for whoever walks through it.

    Raises:
        ValueError: it is not.
        RecursionError: it is too deep.
    """
    values = json.loads(text, parse_constant=_finite, parse_float=_finite)
    _measure_depth(values, _DEEPEST)
    return values


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{shown(text)} is no finite number")
    return value


def _measure_depth(value: object, left: int) -> None:
    if not left:
        raise RecursionError
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        _measure_depth(part, left - 1)


class MalformedError(ValueError):
    """A value from outside is not what a record needs; the message names the key."""


def checked(kind: type[RowT], values: object) -> RowT:
    """A record made of a JSON object, every value checked.

    Raises:
        MalformedError: a key is missing, unknown, or of another type.
    """
    record = _record(kind, values)
    assert isinstance(record, kind)
    return record


def _record(kind: Any, values: object) -> object:  # noqa: ANN401 - any dataclass
    if not isinstance(values, dict):
        raise MalformedError(f"{kind.__name__} is not an object")
    hints, fields = _hints(kind), dataclasses.fields(kind)
    if unknown := sorted(set(values) - {one.name for one in fields}):
        raise MalformedError(f"the key {unknown[0]!r} is not known")
    made = {}
    for one in fields:
        if one.name in values:
            made[one.name] = _value(hints[one.name], values[one.name], one.name)
        elif one.default is dataclasses.MISSING:
            raise MalformedError(f"the key {one.name!r} is missing")
    return kind(**made)


@cache  # else a row costs more than its JSON does
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _value(kind: Any, value: object, key: str) -> object:  # noqa: ANN401 - any annotation
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _record(kind, value)
    if isinstance(kind, UnionType):
        (kind,) = [option for option in get_args(kind) if option is not NoneType]
        return None if value is None else _value(kind, value, key)
    if get_origin(kind) is list and isinstance(value, list):
        return [_value(get_args(kind)[0], item, key) for item in value]
    plain = get_origin(kind) or kind
    number = plain is float and type(value) is int
    if not number and type(value) is not plain:
        raise MalformedError(f"{key!r} is {shown(value)}")
    if isinstance(value, int | float) and plain in (int, float):
        if not _possible(value, key):
            raise MalformedError(f"{key!r} is {shown(value)}, which cannot be")
        return plain(value)
    return value


def _possible(value: float, key: str) -> bool:
    """Whether a number may be one of a row: no time too short and no count too large to compute."""
    if key == "logits":
        return abs(value) <= _LARGEST
    return value == 0 or _SHORTEST_S <= value <= _LARGEST


def runs_done(rows: Iterable[Row]) -> set[tuple[Run, int]]:
    """Runs and groups that have an answer."""
    return {(row.run, row.group) for row in rows if isinstance(row, Answered)}


def same_tokens(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two answers differ first, as a token's index; None if they do not."""
    pairs = enumerate(zip(one, other, strict=False))
    found = next((i for i, (a, b) in pairs if a != b), None)
    return min(len(one), len(other)) if found is None and len(one) != len(other) else found
