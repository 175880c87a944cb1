"""Launches and host time of a draft pass, eager and recorded, over CPU tensors.

    python tools/bench_recorded.py

One JSON line a depth. Eager passes run the kernels of a model so narrow that the host's time is
theirs; a launch on a GPU adds about 2 us to each. A recorded pass is timed without its kernels:
what is left is what the host does before and after the launch of the graph, which counts as one.
"""

from offload_rt.device.system import settle_math

settle_math()

import json  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from bench_steps import ROUNDS, Launches  # noqa: E402
from gpu_check_models import Made, write_model  # noqa: E402

from offload_rt.device.cpu import CpuDevice  # noqa: E402
from offload_rt.device.kinds import CPU  # noqa: E402
from offload_rt.kv.resident import ResidentKV  # noqa: E402
from offload_rt.model.checkpoint import open_checkpoint  # noqa: E402
from offload_rt.runner import static  # noqa: E402
from offload_rt.runner.loading import load_drafting  # noqa: E402
from offload_rt.runner.runner import Rows, Runner  # noqa: E402

PROMPT, CHAIN = list(range(3, 103)), 4


class Recorder:
    """Records nothing but where the result is; a replay does nothing."""

    replays = 0

    def record(
        self, device: object, work: Callable[[], torch.Tensor], vary: object
    ) -> Callable[[], torch.Tensor]:
        """In place of a device's."""
        result = work()

        def replay() -> torch.Tensor:
            self.replays += 1
            return result

        return replay


class Drafted:
    """A model and a sequence it drafts for.

    Args:
        model: that drafts.
    """

    def __init__(self, model: Runner) -> None:
        shapes, dtype = model.network.kv_shapes, model.network.dtype
        self.model, self.uploads = model, 0
        self.cache = ResidentKV(model.device, shapes, dtype, 200)
        model.logits([Rows.text(self.cache, PROMPT)])
        self.cache.commit(range(len(PROMPT)))

    def one_pass(self, rows: int) -> None:
        """Of a draft."""
        self.model.draft_logits(Rows.text(self.cache, PROMPT[:rows]))
        self.cache.truncate(len(PROMPT))

    def chain(self) -> None:
        """A greedy one, in one recording or pass by pass."""
        if self.model.draft_chain(Rows.text(self.cache, [5]), CHAIN) is None:
            for _ in range(CHAIN):
                logits = self.model.draft_logits(Rows.text(self.cache, [5]))
                logits.argmax().tolist()
                self.cache.commit([0])
        self.cache.truncate(len(PROMPT))


def median_us(work: Callable[[], None]) -> float:
    """Median time of some calls, after one."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times[1:])


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    recorder, upload = Recorder(), CpuDevice.upload
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(CpuDevice, "kind", replace(CPU, records=True)),
        mock.patch.object(CpuDevice, "record", lambda *given: recorder.record(*given)),
        mock.patch.object(static, "EAGER_FIRST", 0),
    ):
        for layers in (2, 16, 24):
            made = Made(layers=layers)
            path = write_model(Path(folder) / str(layers), made)
            device = CpuDevice(readers=1)
            model = load_drafting(
                open_checkpoint(path), device, chunk_tokens=512, target_ids=made.vocab
            )
            drafted, found = Drafted(model), dict[str, object](layers=layers)
            works: dict[str, Callable[[], None]] = {
                "1 row": partial(drafted.one_pass, 1),
                "8 rows": partial(drafted.one_pass, 8),
                f"a greedy chain of {CHAIN}": drafted.chain,
            }
            for name, work in works.items():
                for way, records in (("eager", False), ("recorded", True)):
                    model._records = records
                    work()  # the recording itself
                    before = recorder.replays
                    with (
                        Launches() as counted,
                        mock.patch.object(CpuDevice, "upload", autospec=True) as uploads,
                    ):
                        uploads.side_effect = upload
                        work()
                    launched = counted.count + recorder.replays - before
                    found[f"{name}, {way}"] = {
                        "launches": launched,
                        "uploads": uploads.call_count,
                        "host_us": round(median_us(work), 1),
                    }
            print(json.dumps(found), flush=True)
            device.close()


if __name__ == "__main__":
    main()
