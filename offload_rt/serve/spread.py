"""Many prompts over many machines: each is an actor of Ray Data that has the whole model.

Blocks of lines, what becomes of them when a machine is gone, and where they wait are Ray's
business. What a line's answer is does not depend on who else is answered with it
(docs/SERVING.md), so not on the split either: lines of a worker that was killed are answered by
others.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_rt.errors import ConfigError
from offload_rt.serve.batch import Batch, Line, understood
from offload_rt.serve.bodies import Json
from offload_rt.serve.orders import Maker, Offer
from offload_rt.session.settings import Settings

if TYPE_CHECKING:
    from offload_rt.session.opening import Model

LOCAL = "local"
_MOST_LINES = 256  # of a block: more would not be answered at once


def maker_of(opened: "Model", settings: Settings) -> Maker:
    """What makes requests of lines, with the limits of a batch."""
    from offload_rt.session.opening import context_limit

    most = context_limit(opened, settings.runtime.context_tokens)
    offer = Offer(
        names=(opened.name,),
        sampling=settings.sampling,
        max_tokens=settings.generation.max_tokens,
        context_tokens=most,
        kv_tokens=most,
        sequences=1,
        version=metadata.version("offload-rt"),
    )
    return Maker(offer, opened.tokenizer, opened.end_tokens)


@dataclass(slots=True)
class Kept:
    """Results in memory, in place of a journal."""

    results: dict[int, Json] = field(default_factory=dict)
    path: Path = Path(os.devnull)

    def add(self, results: Sequence[tuple[int, Json]]) -> None:
        """Keep results."""
        self.results |= dict(results)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every worker is given.

    Attributes:
        model: folder or hub id, the same on all machines.
        settings: how it is run.
        needs: tokens of each prompt, and of its answer at most.
        sequences: answers in the making at once; None: as many as are predicted to be fastest.
    """

    model: str
    settings: Settings
    needs: Sequence[tuple[int, int]]
    sequences: int | None


class Worker:
    """The model on one machine, for as long as there are lines."""

    def __init__(self, job: Job) -> None:
        from offload_rt.costs.machine import FreeMemory
        from offload_rt.device.opening import chosen_kind
        from offload_rt.device.system import free_memory_bytes, settle_math
        from offload_rt.session.adapters import adapted, open_answering
        from offload_rt.session.crowd import Crowd
        from offload_rt.session.session import Logged
        from offload_rt.session.shared import fastest_room, shared_engine

        settle_math()
        observer = Logged()
        opened, settings = open_answering(job.model, job.settings, observer)
        opened = adapted(opened, settings, observer)
        kind, host = chosen_kind(settings.runtime), free_memory_bytes()
        free = FreeMemory(
            device_bytes=kind.free_bytes()[0] if kind.own_memory else host, host_bytes=host
        )
        rooms = fastest_room(opened, settings, kind, free, job.needs, job.sequences)
        self._open = ExitStack()
        engine, _ = self._open.enter_context(shared_engine(opened, settings, observer, rooms))
        self._maker = maker_of(opened, settings)
        self._crowd = Crowd(opened, engine, patient=True, check=lambda: None)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Answer a block of lines."""
        numbers = [int(number) for number in rows["line"]]
        lines = [
            understood(self._maker, n, str(t)) for n, t in zip(numbers, rows["text"], strict=True)
        ]
        kept = Kept()
        Batch(self._crowd, self._maker, lines, kept).run(lambda: None)
        results = [json.dumps(kept.results[number]) for number in numbers]
        return {"line": numbers, "result": results}


def answered(
    job: Job,
    lines: Sequence[Line],
    texts: Sequence[tuple[int, str]],
    address: str,
    workers: int | None,
) -> Iterator[tuple[int, Json]]:
    """Results of lines, in whatever order they come.

    Args:
        job: of the workers.
        lines: that are to be answered.
        texts: all lines of the input.
        address: of a Ray cluster, or `local` to start one here.
        workers: how many; None: one for each machine.

    Raises:
        ConfigError: Ray does not answer at that address.
    """
    import ray
    import ray.data
    from ray.exceptions import RayError

    try:
        known = None if address == LOCAL else address
        ray.init(address=known, include_dashboard=False, log_to_driver=False)
    except (RayError, ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--ray {address}: no Ray cluster answers there: {first}") from error
    try:
        machines = sum(node["Alive"] for node in ray.nodes())
        count = workers or machines
        wanted = {line.number for line in lines}
        rows = [{"line": n, "text": text} for n, text in texts if n in wanted]
        size = max(1, min(_MOST_LINES, -(-len(rows) // (2 * count))))
        found = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size)).map_batches(
            Worker,
            fn_constructor_args=(job,),
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=1,
            num_gpus=0 if job.settings.runtime.device.startswith("cpu") else None,
            scheduling_strategy="SPREAD",
        )
        for row in found.iter_rows():
            yield int(row["line"]), json.loads(row["result"])
    finally:
        ray.shutdown()
