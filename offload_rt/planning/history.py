"""What earlier runs on this machine saw, kept in small files by model. No torch here.

How many drafted tokens were accepted, and which experts of a mixture tokens asked for.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offload_rt.config import DraftConfig, SamplingConfig
from offload_rt.costs.experts import Distances, ExpertUse
from offload_rt.entries import read_entries, write_entries
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.planning.yields import NOTHING_SEEN, Seen
from offload_rt.speculative.kinds import kind_of
from offload_rt.streaming.experts import PROMPTS, ExpertCounts

_MOST_STEPS = 512.0  # older steps fade, so that a change of habits shows
_MOST_ENTRIES = 500
# Times that layers asked for experts. Fewer say little: nearly all are asked for the first time.
_FEWEST_CALLS, _MOST_CALLS = 200, 2**16
_MOST_EXPERTS, _MOST_CLASSES = 2**13, 24
_MOST_MIXTURES = 8  # 50 kB each, of 60 layers of 256 experts, in a file of 1 MiB
_MOST_USES = 2**15  # counts of a model, 64 kB; of one with more experts in all none are kept
_USE_BITS = 8  # of such a count: a layer's are halved until its largest is that small


def model_key(checkpoint: Checkpoint) -> str:
    """A model by its name and size."""
    return f"{checkpoint.name} of {checkpoint.total_bytes} bytes"


def experience_key(
    target: Checkpoint, draft: DraftConfig, drafter: Checkpoint | None, sampling: SamplingConfig
) -> str:
    """What counts belong to: both models by name and size, the drafter's shape, greedy or not."""
    kind = kind_of(draft.kind)
    parts = [model_key(target), kind.seen_as or draft.kind]
    if drafter is not None:
        parts.append(model_key(drafter))
    parts += kind.history(draft)
    parts.append("greedy" if sampling.greedy else f"temperature {sampling.temperature:g}")
    return ", ".join(parts)


def read_seen(path: Path, key: str) -> Seen:
    """What was seen under a key; nothing if there is none or the file cannot be used."""
    entry = read_entries(path, _parsed).get(key)
    return NOTHING_SEEN if entry is None else entry


def add_seen(path: Path, key: str, new: Seen) -> None:
    """Add counts to those of a key, and replace the file whole; what goes wrong is only logged."""
    if not new.accepted and not new.hits[0]:
        return
    entries = read_entries(path, _parsed)
    entries[key] = _added(entries.pop(key, NOTHING_SEEN), new)  # the latest is last
    write_entries(path, {name: _as_json(seen) for name, seen in entries.items()}, _MOST_ENTRIES)


def _added(old: Seen, new: Seen) -> Seen:
    accepted = dict(old.accepted)
    for size, counted in new.accepted.items():
        accepted[size] = _mean(accepted.get(size, (0.0, 0.0)), counted)
    return Seen(accepted=accepted, hits=_mean(old.hits, new.hits), made=_mean(old.made, new.made))


def _mean(old: tuple[float, float], new: tuple[float, float]) -> tuple[float, float]:
    kept = min(old[0], max(0.0, _MOST_STEPS - new[0]))
    whole = kept + new[0]
    return whole, (kept * old[1] + new[0] * new[1]) / whole if whole else 0.0


def _as_json(seen: Seen) -> dict[str, object]:
    accepted = {str(n): list(v) for n, v in seen.accepted.items()}
    return {"accepted": accepted, "hits": seen.hits, "made": seen.made}


def _parsed(entry: Any) -> Seen:  # noqa: ANN401 - of JSON
    return _seen(**entry)


def _seen(accepted: Mapping[str, object], hits: object, made: object = None) -> Seen:
    sizes = {int(size): pair for size, pair in accepted.items()}
    return Seen(
        accepted={size: _pair(pair, size) for size, pair in sizes.items()},
        hits=_pair(hits, 1),
        made=(0.0, 0.0) if made is None else _pair(made, 1),  # older files lack it
    )


def _pair(pair: object, most: float) -> tuple[float, float]:
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError(f"{pair!r} is not a number of steps and a mean")
    steps, value = (float(number) for number in pair)
    if not (0.0 <= steps < math.inf and 0.0 <= value <= most):  # NaN too
        raise ValueError(f"{pair!r} cannot be")
    return min(steps, _MOST_STEPS), value


def read_asked(path: Path, key: str) -> ExpertUse:
    """Which experts tokens of a model asked for; nothing where too little or nothing is known."""
    entry = read_entries(path, _parsed_asked).get(key, ExpertUse())
    seen = {c: found for c, found in entry.seen.items() if found.calls >= _FEWEST_CALLS}
    return ExpertUse(seen=seen, uses=entry.uses)


def use_of(counts: ExpertCounts) -> ExpertUse:
    """What a pool counted."""
    seen = {
        size: Distances(calls=counts.calls[size], counts=tuple(found))
        for size, found in counts.distances.items()
    }
    return ExpertUse(seen=seen, uses=counts.uses)


def add_asked(path: Path, key: str, new: ExpertUse) -> None:
    """Add what a pool counted to that of a model; what goes wrong is only logged."""
    if not new.seen:
        return
    entries = read_entries(path, _parsed_asked)
    known = entries.pop(key, ExpertUse())
    seen = dict(known.seen)
    for size, found in new.seen.items():
        seen[size] = seen[size].joined(found, _MOST_CALLS) if size in seen else found
    uses = {layer: _faded(known.uses.get(layer, ()), own) for layer, own in new.uses.items()}
    if sum(map(len, uses.values())) > _MOST_USES:
        uses = {}
    entries[key] = ExpertUse(seen=seen, uses=uses)  # the latest is last
    made = {name: _asked_as_json(each) for name, each in entries.items()}
    write_entries(path, made, _MOST_MIXTURES)


def _faded(old: Sequence[int], new: Sequence[int]) -> bytes:
    """Uses of a layer's experts, both together; older ones count half whenever they are halved."""
    if len(old) != len(new):
        old = [0] * len(new)  # of another model by the same name
    both = [a + b for a, b in zip(old, new, strict=True)]
    halvings = max(0, max(both).bit_length() - _USE_BITS)
    return bytes(count >> halvings for count in both)


def _asked_as_json(entry: ExpertUse) -> dict[str, object]:
    made: dict[str, object] = {
        str(size): [round(found.calls, 1), *(round(count, 1) for count in found.counts)]
        for size, found in sorted(entry.seen.items())
    }
    return made | {"uses": {str(layer): bytes(own).hex() for layer, own in entry.uses.items()}}


def _parsed_asked(entry: Any) -> ExpertUse:  # noqa: ANN401 - of JSON
    found, numbered = {}, dict(entry)
    uses = {int(layer): bytes.fromhex(own) for layer, own in numbered.pop("uses", {}).items()}
    for size, numbers in numbered.items():
        calls, *counts = map(float, numbers)
        of_prompts, like = divmod(int(size), PROMPTS)
        fits = calls > 0 and 2 <= len(counts) <= _MOST_EXPERTS
        fits &= of_prompts in (0, 1) and like <= _MOST_CLASSES
        if not fits or not all(0.0 <= number < math.inf for number in (calls, *counts)):
            raise ValueError(f"{size!r} is no class of passes, or its counts cannot be")
        found[int(size)] = Distances(calls=calls, counts=tuple(counts))
    return ExpertUse(seen=found, uses=uses)
