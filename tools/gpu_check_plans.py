"""The part of `gpu_check.py` about plans: a profile of the machine, and what it says of runs."""

import gc
from typing import Any

import torch
from gpu_check_models import Made
from gpu_check_parts import QUICK, SMALL, Bench, engine_of, finished, text_of

from offload_rt.config import DraftConfig, DraftWeights, HomeKind, KVPlace, RetrievalConfig
from offload_rt.costs.machine import speeds_of
from offload_rt.device.kinds import KINDS, DeviceKind, Processor, sharing
from offload_rt.planning.planner import Means
from offload_rt.planning.yields import expected_yield
from offload_rt.profiling.codec import encode
from offload_rt.profiling.measure import measure
from offload_rt.report import Memory

TOKENS = 24
Case = tuple[Made, int, dict[str, Any]]  # a model, tokens of its prompt, and options


def check(bench: Bench) -> None:
    """Each run's seconds against the predicted ones, and its memory against the plan."""
    name = bench.device.partition(":")[0]
    kind = KINDS[Processor(name)]
    profile = measure("here", device=name, effort=QUICK if bench.on_gpu else SMALL)
    (bench.out.parent / f"{bench.out.stem}-profile.json").write_text(encode(profile))
    speeds = speeds_of(profile, kind.processor, sharing(bench.device))
    means = Means(speeds=speeds, yields=lambda config: expected_yield(config.kind))
    for name, (made, length, config) in _cases(bench).items():
        folder, prompt = bench.made(f"plan-{name}", made), text_of(length, made.vocab)
        _return_memory(bench)
        how = {**config, "means": lambda device: means}
        with engine_of(bench, folder, prompt, TOKENS, how) as engine:
            predicted = engine.plan.prediction
            report = finished(engine, prompt, TOKENS).report()
            free = torch.cuda.mem_get_info(bench.device)[0] if bench.on_gpu else None
        per_pass = report.speculation.tokens_per_pass or 1.0
        bench.fact(  # of a step: how much is accepted is another question
            f"seconds per pass with its drafting, {name}",
            measured=(report.timings.s_per_token or 0.0) * per_pass,
            predicted=None if predicted is None else predicted.step_s,
            tokens_per_pass=per_pass,
        )
        _memory(bench, name, kind, report.memory, free)


def _cases(bench: Bench) -> dict[str, Case]:
    sizes = bench.sizes
    first = bench.made("first", sizes.law, sizes.law.first)
    drafted = DraftConfig(draft=f"model:{first}", draft_tokens=8)
    retrieval = RetrievalConfig(budget_tokens=sizes.budgets[1], retrieval_weights=DraftWeights.SAME)
    triforce = DraftConfig(draft="triforce", draft_tokens=6, retrieval=retrieval)
    streamed: dict[str, Any] = {"home": HomeKind.HOST, "resident_layers": 0}
    offloaded: dict[str, Any] = {"kv": KVPlace.HOST}
    return {
        "resident": (sizes.law, 90, {}),
        "streamed": (sizes.law, 90, streamed),
        "streamed and drafted": (sizes.law, 90, streamed | {"draft": drafted}),
        "KV offloaded": (sizes.long, sizes.prompt // 2, offloaded),
        "KV offloaded, TriForce": (sizes.long, sizes.prompt // 2, offloaded | {"draft": triforce}),
    }


def _memory(
    bench: Bench, name: str, kind: DeviceKind, memory: Memory, free_bytes: int | None
) -> None:
    """What tensors had, what torch had taken with the context, and what the driver counts."""
    planned = memory.device_planned_bytes
    taken = memory.device_reserved_bytes + kind.context_bytes
    more = {"planned": planned, "free_then": free_bytes}
    counted = {
        "tensors": memory.device_peak_bytes,
        "what torch takes, and the context": taken,
        "what the driver counts": memory.device_driver_bytes,
    }
    for what, nbytes in counted.items():
        if nbytes is not None:
            why = "" if nbytes <= planned else f"{nbytes - planned} bytes beyond the plan"
            law = f"{what} within the plan, {name}"
            bench.fact(law, held=nbytes <= planned, why=why, bytes=nbytes, **more)


def _return_memory(bench: Bench) -> None:
    """What an earlier run leaves in torch's reserve is not this one's."""
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
