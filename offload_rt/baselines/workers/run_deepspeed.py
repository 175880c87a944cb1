"""Worker: DeepSpeed ZeRO-Inference, that is ZeRO-3 without an optimizer, parameters on CPU or NVMe.

What is done in its favour, beyond its defaults and its own example script:

* buckets, live parameters and NVMe buffers hold two layers, so that it can always read ahead;
* memory that is left keeps parameters from being offloaded at all, in the order of the model;
* a parameter larger than every one of the layers (the embedding) is always kept: else each of the
  equally large NVMe buffers would have to be of its size;
* malloc gives freed parameters back at once, so that more of them can be kept;
* on the CPU kept parameters are taken off the swapper by hand. Its own way (`ds_persist`) frees the
  buffer they lie in, because it counts on a copy on another device.

The comparison warms workers up, so the passes that record the order of modules are not measured.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload_rt.baselines.workers.harness import Clock, resident_bytes, serve, versions
from offload_rt.baselines.workers.zero_settings import Spending, spend, zero_config

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc


def _prepare_environment() -> None:
    """What DeepSpeed reads when it is imported: one process, its compiler, libaio beside Python."""
    prefix = Path(sys.prefix)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    # ninja is there; where libaio came with the environment, its header and library are too
    for variable, folder in (("PATH", "bin"), ("CPATH", "include"), ("LIBRARY_PATH", "lib")):
        known = os.environ.get(variable)
        os.environ[variable] = os.pathsep.join(filter(None, [str(prefix / folder), known]))
    # Parameters come and go; without this the holes they leave took 1 GB beside a 6.3 GB model.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
    library = prefix / "lib" / "libaio.so.1"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its name from then on


_prepare_environment()
import deepspeed  # noqa: E402
import torch  # noqa: E402
from deepspeed.runtime.swap_tensor import partitioned_param_swapper as swapping  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.integrations import HfDeepSpeedConfig  # noqa: E402

from offload_rt.baselines.workers.generation import (  # noqa: E402
    greedy,
    last_logits,
    limit_device_memory,
    peak_device_bytes,
)


class ZeroInference:
    """A model whose parameters DeepSpeed fetches before each module."""

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Partition the model into host memory or swap files."""
        self.device = settings["device"]
        limit_device_memory(self.device, settings["device_bytes"])
        spending = spend(settings, resident_bytes())
        config = zero_config(settings, spending)
        if self.device != "cpu":  # by that DeepSpeed chooses its GPU
            os.environ["LOCAL_RANK"] = str(torch.device(self.device).index or 0)
        deepspeed.init_distributed(
            "gloo" if self.device == "cpu" else "nccl",
            auto_mpi_discovery=False,
            verbose=False,
            init_method=f"file://{settings['scratch']}/rendezvous",  # a port may be taken
            rank=0,
            world_size=1,
        )
        _swap_only_what_fits_a_buffer()
        self._alive = HfDeepSpeedConfig(config)  # from_pretrained asks for it
        model = AutoModelForCausalLM.from_pretrained(
            settings["model"],
            dtype=getattr(torch, settings["dtype"]),
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
        kept = 0
        if settings["offload"] == "nvme" and self.device == "cpu":
            kept = _keep_in_memory(model, spending)
        self.engine, *_ = deepspeed.initialize(model=model, config=config)
        self.model = self.engine.module.eval()
        return {
            "config": config | {"elements_kept_by_hand": kept},
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "transformers", "deepspeed"),
        }

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_tokens: frozenset[int],
        clock: Clock,
    ) -> list[list[int]]:
        """Continue all prompts at once."""
        with torch.no_grad():
            return greedy(self.model, self.device, prompts, max_tokens, end_tokens, clock)

    def gap(self, ids: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """Logits after a sequence."""
        with torch.no_grad():
            return last_logits(self.model, self.device, ids, tokens)

    def device_peak_bytes(self) -> int | None:
        """Most memory taken of a GPU."""
        return peak_device_bytes(self.device)

    def link_bytes(self) -> None:
        """Not counted by DeepSpeed."""


def _swap_only_what_fits_a_buffer() -> None:
    """Have parameters larger than an NVMe buffer stay in memory, where DeepSpeed would refuse."""
    swapper = swapping.AsyncPartitionedParameterSwapper
    own = swapper.swappable_tensor

    def swappable(self: Any, param: Any = None, numel: int | None = None) -> bool:  # noqa: ANN401
        size = param.ds_tensor.ds_numel if numel is None else numel
        return size <= self.elements_per_buffer and bool(own(self, param, numel))

    swapper.swappable_tensor = swappable


def _keep_in_memory(model: Any, spending: Spending) -> int:  # noqa: ANN401 - as above
    """Read as many parameters as may be kept back into memory of their own, for good."""
    left = spending.kept_elements
    parameters = list(model.parameters())
    left -= sum(p.ds_numel for p in parameters if not _is_swapped(p))
    kept = 0
    for parameter in filter(_is_swapped, parameters):
        if parameter.ds_numel > left - kept:
            break
        swapper = parameter.nvme_swapper
        swapper.swap_in([parameter], async_op=False)
        own = parameter.ds_tensor.data.clone()
        swapper.remove_partition_and_release_buffers([parameter])
        parameter.ds_tensor.data = own
        parameter.ds_tensor.status = swapping.PartitionedParamStatus.AVAILABLE
        parameter.ds_tensor.final_location = None  # as of those that were never swapped
        kept += parameter.ds_numel
    return kept


def _is_swapped(parameter: Any) -> bool:  # noqa: ANN401 - DeepSpeed adds attributes to it
    return parameter.ds_tensor.final_location == "nvme"


if __name__ == "__main__":
    sys.exit(serve(ZeroInference()))
