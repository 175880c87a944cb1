"""What raw rows say: medians over rounds with their spread, ratios, differences. No torch here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from offload_rt.baselines.comparison import differing
from offload_rt.baselines.engines import DRAFTED, OURS
from offload_rt.baselines.rows import Answered, Gap, RawRows, same_tokens


@dataclass(frozen=True, slots=True)
class Figure:
    """A number measured once per round.

    Attributes:
        median: of the rounds.
        low: the smallest of them.
        high: the largest.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One engine with one batch size. Each figure's rounds are medians over prompts.

    Attributes:
        rounds: with at least one answer.
        answers: in all rounds.
        s_per_token: that a sequence waits for a token after the first.
        tokens_per_s: of all sequences together, after the first tokens.
        ttft_s: until the prompts' pass ended.
        faster: how many times as fast ours is, without drafting; paired by round and prompt.
        faster_drafted: the same with drafting.
        read_bytes_per_token: read from disks for a token of a sequence after the first.
        read_bytes_per_s: meanwhile.
        link_bytes_per_token: that crossed the link, of engines that count it.
        tokens_per_pass: emitted / passes for each sequence, after the prompts' pass.
        load_s: from the request to being ready; imports are not in it.
        load_peak_bytes: of the process until it was ready, mapped files included.
        host_peak_bytes: of the process while it answered, imports and mapped files included.
        device_peak_bytes: of GPU memory then; on the CPU, of the process above what it had before
            loading.
        cached_bytes: of the model's files in the page cache at the start, at most.
        same: sequences whose tokens are ours in the first round of both.
        compared: sequences for which that is known.
    """

    engine: str
    batch: int
    rounds: int
    answers: int
    s_per_token: Figure | None
    tokens_per_s: Figure | None
    ttft_s: Figure | None
    faster: Figure | None
    faster_drafted: Figure | None
    read_bytes_per_token: Figure | None
    read_bytes_per_s: Figure | None
    link_bytes_per_token: Figure | None
    tokens_per_pass: Figure | None
    load_s: Figure | None
    load_peak_bytes: int
    host_peak_bytes: int
    device_peak_bytes: int
    cached_bytes: int | None
    same: int
    compared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where an engine's answer parts from ours.

    Attributes:
        prompt: number of the prompt in the setup.
        index: of the first token that differs.
        texts: ours and theirs.
        gap: how near the two tokens were, if our engine was asked.
    """

    engine: str
    batch: int
    prompt: int
    index: int
    texts: tuple[str, str]
    gap: Gap | None


def summaries(raw: RawRows) -> list[Summary]:
    """One per batch size and engine that answered, in the order of a round."""
    answers = raw.answers()
    made = []
    for batch in raw.setup.batches:
        for engine in raw.setup.engines:
            own = [r for r in answers if (r.run.engine, r.run.batch) == (engine, batch)]
            if own:
                made.append(_summary(raw, engine, batch, own))
    return made


def differences(raw: RawRows) -> list[Difference]:
    """Answers of first rounds that are not ours, one per engine, batch size and prompt."""
    gaps = {(gap.engine, gap.batch, gap.prompt): gap for gap in raw.gaps()}
    found: dict[tuple[str, int, int], Difference] = {}
    for ours, theirs in differing(raw.answers()):
        for place, prompt in enumerate(theirs.prompts):
            index = same_tokens(ours.token_ids[place], theirs.token_ids[place])
            key = (theirs.run.engine, theirs.run.batch, prompt)
            if index is None or key in found:
                continue
            found[key] = Difference(
                engine=key[0],
                batch=key[1],
                prompt=prompt,
                index=index,
                texts=(ours.texts[place], theirs.texts[place]),
                gap=gaps.get(key),
            )
    return list(found.values())


def per_prompt(raw: RawRows, engine: str, group: int) -> Figure | None:
    """Seconds per token of an engine for one prompt, batch 1."""
    rows = [r for r in raw.answers() if (r.run.engine, r.run.batch, r.group) == (engine, 1, group)]
    return _figure({row.run.round: [row.s_per_token] for row in rows})


def _summary(raw: RawRows, engine: str, batch: int, own: Sequence[Answered]) -> Summary:
    loads = [r for r in raw.loads() if (r.run.engine, r.run.batch) == (engine, batch)]
    same, compared = _equality(raw.answers(), engine, batch)
    caches = [load.cached_bytes for load in loads if load.cached_bytes is not None]

    def figure(value: Callable[[Answered], float | None]) -> Figure | None:
        return _figure(_by_round(own, value))

    return Summary(
        engine=engine,
        batch=batch,
        rounds=len({row.run.round for row in own}),
        answers=len(own),
        s_per_token=figure(lambda row: row.s_per_token),
        tokens_per_s=figure(lambda row: row.tokens_per_s),
        ttft_s=figure(lambda row: row.ttft_s),
        faster=None if engine == OURS else _ratio(raw.answers(), own, OURS),
        faster_drafted=None if engine == DRAFTED else _ratio(raw.answers(), own, DRAFTED),
        read_bytes_per_token=figure(lambda row: _per_token(row, row.decode_read_bytes)),
        read_bytes_per_s=figure(lambda row: row.read_bytes_per_s),
        link_bytes_per_token=figure(lambda row: _per_token(row, row.decode_link_bytes)),
        tokens_per_pass=figure(lambda row: row.tokens_per_pass),
        load_s=_figure({load.run.round: [load.load_s] for load in loads}),
        load_peak_bytes=max((load.host_peak_bytes for load in loads), default=0),
        host_peak_bytes=max(row.host_peak_bytes for row in own),
        device_peak_bytes=max(row.device_peak_bytes for row in own),
        cached_bytes=max(caches, default=None),
        same=same,
        compared=compared,
    )


def _by_round(
    rows: Iterable[Answered], value: Callable[[Answered], float | None]
) -> dict[int, list[float | None]]:
    found: dict[int, list[float | None]] = {}
    for row in rows:
        found.setdefault(row.run.round, []).append(value(row))
    return found


def _figure(by_round: dict[int, list[float | None]]) -> Figure | None:
    """Median over rounds of the median over prompts; None where nothing is known."""
    known = [[v for v in values if v is not None] for values in by_round.values()]
    medians = [median(values) for values in known if values]
    return Figure(median(medians), min(medians), max(medians)) if medians else None


def _ratio(answers: Sequence[Answered], own: Sequence[Answered], engine: str) -> Figure | None:
    """Their time per token over that of `engine`, where both answered in the same round."""
    key = {
        (r.run.round, r.run.batch, r.group): r.s_per_token
        for r in answers
        if r.run.engine == engine
    }

    def value(row: Answered) -> float | None:
        reference = key.get((row.run.round, row.run.batch, row.group))
        return row.s_per_token / reference if row.s_per_token and reference else None

    return _figure(_by_round(own, value))


def _per_token(row: Answered, nbytes: int | None) -> float | None:
    later = row.tokens - row.first_tokens
    return nbytes * len(row.token_ids) / later if nbytes is not None and later > 0 else None


def _equality(answers: Sequence[Answered], engine: str, batch: int) -> tuple[int, int]:
    """Sequences of an engine's first round that have our tokens, and all that can be compared."""
    first: dict[tuple[str, int], Answered] = {}
    for row in answers:
        if row.run.batch == batch:
            first.setdefault((row.run.engine, row.group), row)
    pairs = [
        (ours, theirs)
        for (name, group), row in first.items()
        if name == engine and (reference := first.get((OURS, group))) is not None
        for ours, theirs in zip(reference.token_ids, row.token_ids, strict=True)
    ]
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)
