"""Many prompts over many machines: each is an actor of Ray Data that has the whole model.

Blocks of lines, what becomes of them when a machine is gone, and where they wait are Ray's
business. What a line's answer is does not depend on who else is answered with it
(docs/SERVING.md), so not on the split either: lines of a worker that was killed are answered by
others.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_rt import errors
from offload_rt.config import RuntimeConfig
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.model.identity import digest_of
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
        weights: its digest where the command was given; one with another is not the same model.
        settings: how it is run.
        needs: tokens of each prompt, and of its answer at most.
        sequences: answers in the making at once; None: as many as are predicted to be fastest.
    """

    model: str
    weights: str
    settings: Settings
    needs: Sequence[tuple[int, int]]
    sequences: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What workers are given of a cluster.

    Attributes:
        workers: there are.
        gpus: that each has to itself.
        together: workers on one machine, at most, if Ray spreads them as it is asked to.
    """

    workers: int
    gpus: int
    together: int


def share_of(device: str, machines: Sequence[Mapping[str, Any]], workers: int | None) -> Share:
    """How a cluster is shared out: a worker on each machine, or on each that has GPUs to be used.

    Args:
        device: as in --device.
        machines: as Ray tells of them.
        workers: that are asked for; None: one for each machine.

    Raises:
        ConfigError: there are too few GPUs.
    """
    names = device.split(",")
    found = [m["Resources"] for m in machines if m["Alive"]]
    gpus = 0 if names[0].startswith("cpu") else len(names)
    fitting = [int(resources.get("GPU", 0)) // gpus for resources in found] if gpus else []
    if device == "auto" and not sum(fitting):
        gpus = 0
    if not gpus:
        count = workers or len(found)
        return Share(workers=count, gpus=0, together=-(-count // len(found)))
    room, wanted = sum(fitting), workers or max(1, sum(map(bool, fitting)))
    if wanted > room:
        raise ConfigError(
            f"--ray-workers of --device {device} have a GPU for each of its names to themselves: "
            f"{wanted} of them do not fit, the machines of the cluster have room for {room}"
        )
    return Share(workers=wanted, gpus=gpus, together=min(max(fitting), wanted))


class Worker:
    """The model on one machine, for as long as there are lines.

    What it cannot be made for is told with the first lines: Ray would make of an error here one of
    its own.
    """

    def __init__(self, job: Job, share: Share) -> None:
        self._open, self._failed = ExitStack(), ""
        try:
            self._begin(job, share)
        except OffloadError as error:
            told = {"kind": type(error).__name__, "why": f"on {socket.gethostname()}: {error}"}
            self._failed = json.dumps(told)

    def _begin(self, job: Job, share: Share) -> None:
        from offload_rt.costs.machine import FreeMemory
        from offload_rt.device.opening import chosen_kind
        from offload_rt.device.system import free_memory_bytes, settle_math
        from offload_rt.session.adapters import adapted, open_answering
        from offload_rt.session.crowd import Crowd
        from offload_rt.session.session import Logged
        from offload_rt.session.shared import fastest_room, shared_engine

        settle_math()
        observer = Logged()
        settings = replace(job.settings, runtime=shared_out(job.settings.runtime, share))
        opened, settings = open_answering(job.model, settings, observer)
        if digest_of(opened.checkpoint) != job.weights:
            raise ConfigError(
                f"{opened.name} has other weights here than where the command was given: copy the "
                "same folder to all machines"
            )
        opened = adapted(opened, settings, observer)
        kind, host = chosen_kind(settings.runtime), free_memory_bytes()
        free = FreeMemory(
            device_bytes=kind.free_bytes()[0] if kind.own_memory else host, host_bytes=host
        )
        rooms = fastest_room(opened, settings, kind, free, job.needs, job.sequences)
        engine, _ = self._open.enter_context(shared_engine(opened, settings, observer, rooms))
        self._made = engine.exact.on, str(kind.processor)
        self._maker = maker_of(opened, settings)
        self._crowd = Crowd(opened, engine, patient=True, check=lambda: None)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Answer a block of lines."""
        numbers = [int(number) for number in rows["line"]]
        if self._failed:
            return _columns(numbers, [self._failed] * len(numbers), (False, ""))
        lines = [
            understood(self._maker, n, str(t)) for n, t in zip(numbers, rows["text"], strict=True)
        ]
        kept = Kept()
        Batch(self._crowd, self._maker, lines, kept).run(lambda: None)
        results = [json.dumps(kept.results[number]) for number in numbers]
        return _columns(numbers, results, self._made)


def _columns(
    numbers: list[int], results: list[str], made: tuple[bool, str]
) -> dict[str, list[Any]]:
    """Rows of Ray's: lines, their results, and how they were made."""
    exact, kind = ([each] * len(numbers) for each in made)
    return {"line": numbers, "result": results, "exact": exact, "kind": kind}


def shared_out(runtime: RuntimeConfig, share: Share) -> RuntimeConfig:
    """A worker's part of what its machine has, where the user does not say.

    Ray tells each worker to compute with one thread (OMP_NUM_THREADS), which is not the user's
    word. A GPU's place among those of its machine is Ray's to say.
    """
    from offload_rt.device.kinds import FREE_SHARE
    from offload_rt.device.system import free_memory_bytes, machine_threads

    together, own = share.together, free_memory_bytes() // share.together
    changes: dict[str, Any] = {}
    if runtime.threads is None:
        changes["threads"] = max(1, machine_threads() // together)
    if share.gpus and runtime.device != "auto":
        changes["device"] = ",".join(f"cuda:{place}" for place in range(share.gpus))
    if together > 1 and share.gpus and runtime.host_limit_bytes is None:
        changes["host_limit_bytes"] = int(own * FREE_SHARE)
    if together > 1 and not share.gpus and runtime.device_limit_bytes is None:
        changes["device_limit_bytes"] = int(own * FREE_SHARE)
    return replace(runtime, **changes)


def answered(
    job: Job,
    lines: Sequence[Line],
    texts: Sequence[tuple[int, str]],
    address: str,
    workers: int | None,
) -> Iterator[tuple[int, Json, bool, str]]:
    """Results of lines, in whatever order they come.

    Of each its number, its result, whether passes were row-invariant, and the kind of device.

    Args:
        job: of the workers.
        lines: that are to be answered.
        texts: all lines of the input.
        address: of a Ray cluster, or `local` to start one here.
        workers: how many; None: one for each machine.

    Raises:
        ConfigError: Ray does not answer at that address, or its machines have too few GPUs.
        OffloadError: what a worker cannot be made for.
    """
    import ray
    import ray.data
    from ray.exceptions import RayError

    try:
        known = None if address == LOCAL else address
        ray.init(
            address=known,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (RayError, ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--ray {address}: no Ray cluster answers there: {first}") from error
    try:
        share = share_of(job.settings.runtime.device, ray.nodes(), workers)
        wanted = {line.number for line in lines}
        rows = [{"line": n, "text": text} for n, text in texts if n in wanted]
        size = max(1, min(_MOST_LINES, -(-len(rows) // (2 * share.workers))))
        found = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size)).map_batches(
            Worker,
            fn_constructor_args=(job, share),
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=share.workers),
            num_cpus=1,
            num_gpus=share.gpus,
            scheduling_strategy="SPREAD",
        )
        for row in found.iter_rows():
            result = json.loads(row["result"])
            if why := result.get("why"):
                raise getattr(errors, result["kind"], OffloadError)(why)
            yield int(row["line"]), result, bool(row["exact"]), str(row["kind"])
    finally:
        ray.shutdown()
