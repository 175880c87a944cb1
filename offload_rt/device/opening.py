"""Open the device that a run asks for."""

from collections.abc import Callable, Mapping

import torch

from offload_rt.config import HomeKind, KVPlace, RuntimeConfig
from offload_rt.device.base import Device
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.cuda.device import CudaDevice, TorchDriver
from offload_rt.device.kinds import CPU, CUDA, DeviceKind, Processor, named_device
from offload_rt.device.system import compute_threads
from offload_rt.errors import ConfigError


def open_device(config: RuntimeConfig) -> Device:
    """Open the device a run asks for.

    Raises:
        ConfigError: it is not known, or an option does not go with it.
        DeviceError: it is not there.
    """
    in_host = config.home is HomeKind.HOST or config.kv is KVPlace.HOST
    if config.link_bytes_per_s is not None and not in_host:
        raise ConfigError(
            "--link-bandwidth emulates a link to host memory: add --home host or --kv host"
        )
    torch.set_num_threads(config.threads or compute_threads())
    kind, index = (_best(), 0) if config.device == "auto" else named_device(config.device)
    if config.link_bytes_per_s is not None and kind.own_memory:
        raise ConfigError("--link-bandwidth emulates a GPU's link: add --device cpu")
    return _OPENERS[kind.processor](config, index)


def _best() -> DeviceKind:
    return CPU if TorchDriver().missing(0) else CUDA


def _open_cpu(config: RuntimeConfig, index: int) -> Device:
    return CpuDevice(readers=config.readers, link_bytes_per_s=config.link_bytes_per_s)


def _open_cuda(config: RuntimeConfig, index: int) -> Device:
    return CudaDevice(index, readers=config.readers)


_OPENERS: Mapping[Processor, Callable[[RuntimeConfig, int], Device]] = {
    Processor.CPU: _open_cpu,
    Processor.CUDA: _open_cuda,
}
