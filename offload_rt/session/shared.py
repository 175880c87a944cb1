"""An engine for many: how many are answered at once, and how much KV they share."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload_rt.config import MOST_READ, KVPlace
from offload_rt.costs.drafters import Drafting
from offload_rt.errors import ConfigError, PlanError
from offload_rt.session.answering import started_engine
from offload_rt.session.observer import Observer
from offload_rt.session.opening import AUTO_CONTEXT_TOKENS, Model, context_limit
from offload_rt.session.settings import Settings

if TYPE_CHECKING:
    from offload_rt.costs.machine import FreeMemory
    from offload_rt.device.kinds import DeviceKind
    from offload_rt.engine import Engine

AUTO_SEQUENCES = 8  # for who does not know how many will ask (RESULTS.md "Serving")
_FURTHER_TOKENS = 1024  # of KV for each sequence behind the first, if nobody says


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What is set aside for sequences that run together.

    Attributes:
        sequences: at once.
        context_tokens: of one, at most.
        kv_tokens: of all of them; with KV off the device each has its own context.
    """

    sequences: int
    context_tokens: int
    kv_tokens: int


def shared_room(
    model: Model, settings: Settings, sequences: int | None, kv_tokens: int | None
) -> list[Shared]:
    """Rooms to try, the largest first.

    Args:
        model: that answers.
        settings: whose --context is the longest sequence; auto is 4096, or what the model was made
            for.
        sequences: at once; None: 8, or fewer where there is no memory for them.
        kv_tokens: of all; None: one whole context, and 1024 tokens for each further sequence.

    Raises:
        ConfigError: --kv-tokens has no room for one --context, or is for KV that nobody shares.
    """
    context = context_limit(model, settings.runtime.context_tokens)
    if settings.runtime.context_tokens is None:
        context = min(context, AUTO_CONTEXT_TOKENS, kv_tokens or AUTO_CONTEXT_TOKENS)
    own = settings.runtime.kv not in (KVPlace.AUTO, KVPlace.DEVICE)
    if kv_tokens is not None and own:
        raise ConfigError(
            f"--kv-tokens has no effect with --kv {settings.runtime.kv}: there each sequence has "
            "its own --context"
        )
    if kv_tokens is not None and kv_tokens < context:
        raise ConfigError(
            f"--kv-tokens is {kv_tokens}, one sequence of --context {context} needs more: raise it "
            "or lower --context"
        )
    counts = [sequences] if sequences is not None else []
    count = AUTO_SEQUENCES
    while sequences is None and count:
        counts.append(count)
        count //= 2
    rooms = []
    for count in counts:
        most = count * context
        further = context + (count - 1) * min(context, _FURTHER_TOKENS)
        total = most if own else min(most, kv_tokens or further)
        rooms.append(Shared(sequences=count, context_tokens=context, kv_tokens=total))
    return rooms


def fastest_room(
    model: Model,
    settings: Settings,
    device: "DeviceKind",
    free: "FreeMemory",
    needs: Sequence[tuple[int, int]],
    sequences: int | None = None,
) -> list[Shared]:
    """The room in which prompts should be answered in the least time, all together.

    Args:
        model: that answers.
        settings: of the run.
        device: that computes.
        free: memory that is free now.
        needs: tokens of each prompt, and of its answer at most.
        sequences: at once; None: as many as is predicted to be fastest.

    Raises:
        PlanError: there is memory for none.
    """
    from offload_rt.planning.fit import RunLoad
    from offload_rt.planning.planner import plan_wires
    from offload_rt.session.means import means_for, speeds_of_run
    from offload_rt.speculative.draft_model.pair import open_draft_checkpoint

    whole = sorted((prompt + answer for prompt, answer in needs), reverse=True)
    longest, usual = whole[0], -(-sum(whole) // len(whole))
    counts = [sequences] if sequences else [2**i for i in range(9) if 2**i < 2 * len(needs)]
    rooms = [
        Shared(
            sequences=count,
            context_tokens=longest,
            kv_tokens=min(count * longest, longest + (count - 1) * usual),
        )
        for count in counts
    ]
    if len(rooms) == 1:
        return rooms
    settings = kept_near(settings)
    speeds = speeds_of_run(settings, device)
    means = means_for(model.checkpoint, settings.sampling, speeds, settings.draft)
    # What is known of one number of sequences only would speak for or against it.
    level = means.level
    means = replace(means, level=lambda streams, running: level(streams, 1))
    drafter = open_draft_checkpoint(model.checkpoint, settings.draft)
    found: list[tuple[float, Shared]] = []
    for room in rooms:
        load = RunLoad(
            capacities=[longest] * room.sequences,
            prompt_tokens=min(longest * room.sequences, MOST_READ),
            drafting=Drafting(settings.draft, drafter),
            kv_tokens=room.kv_tokens if settings.runtime.kv is KVPlace.DEVICE else None,
        )
        try:
            _, plan = plan_wires(
                model.checkpoint, settings.runtime, device, load=load, free=free, means=means
            )
        except PlanError:
            if room is rooms[0]:
                raise
            break
        assert plan.prediction is not None
        found.append((room.sequences / plan.prediction.s_per_token, room))
    return [room for _, room in sorted(found, key=lambda pair: -pair[0])]


def kept_near(settings: Settings) -> Settings:
    """The same with keys and values on the device, where the user leaves their place open.

    More sequences save passes over the weights, and KV that crosses the link in each pass would
    spend them again.
    """
    runtime = settings.runtime
    if (runtime.kv, runtime.kv_folder, runtime.kv_block_tokens) != (KVPlace.AUTO, None, None):
        return settings
    return replace(settings, runtime=replace(runtime, kv=KVPlace.DEVICE))


@contextmanager
def shared_engine(
    model: Model,
    settings: Settings,
    observer: Observer,
    rooms: Sequence[Shared],
    running: int | None = None,
) -> Iterator[tuple["Engine", Shared]]:
    """An engine with the first of some rooms there is memory for; KV is near (`kept_near`).

    Args:
        model: that answers.
        settings: of the run.
        observer: is told how far loading is.
        rooms: to try, in their order.
        running: sequences that usually run, for whom it is to be fastest; None: all of a room.

    Raises:
        PlanError: there is memory for none.
    """
    settings = kept_near(settings)
    pooled = settings.runtime.kv is KVPlace.DEVICE
    with ExitStack() as opened:
        for place, room in enumerate(rooms):
            try:
                engine = opened.enter_context(
                    started_engine(
                        model,
                        settings,
                        observer,
                        capacities=[room.context_tokens] * room.sequences,
                        prompt_tokens=min(room.context_tokens, MOST_READ),
                        kv_tokens=room.kv_tokens if pooled else None,
                        running=running,
                    )
                )
            except PlanError:
                if place == len(rooms) - 1:
                    raise
                continue
            if room.sequences < rooms[0].sequences:
                observer.note(
                    f"memory suffices for {room.sequences} sequences at once instead of "
                    f"{rooms[0].sequences}: raise --device-memory, or lower --context"
                )
            yield engine, room
            return
