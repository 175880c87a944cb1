"""Open the device that a run asks for."""

from collections.abc import Callable, Mapping

import torch

from offload_rt.config import KVPlace, RuntimeConfig
from offload_rt.device.base import Device
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.cuda.device import CudaDevice, TorchDriver
from offload_rt.device.kinds import CPU, CUDA, DeviceKind, Processor, named_devices
from offload_rt.device.system import compute_threads
from offload_rt.errors import ConfigError


def chosen_kind(config: RuntimeConfig) -> DeviceKind:
    """The kind of device that a run asks for, or would be given."""
    return _best() if config.device == "auto" else named_devices(config.device)[0]


def open_device(config: RuntimeConfig, beside: Device | None = None) -> Device:
    """Open the one device a run asks for.

    Args:
        config: names it.
        beside: another device of the run, open already.

    Raises:
        ConfigError: it is not known, or an option does not go with it.
        DeviceError: it is not there.
    """
    in_host = config.home.in_memory or config.kv is KVPlace.HOST
    if config.link_bytes_per_s is not None and not in_host:
        raise ConfigError(
            "--link-bandwidth emulates a link to host memory: add --home host or --kv host"
        )
    torch.set_num_threads(config.threads or compute_threads())
    if len(config.device_names) > 1:
        raise ConfigError(f"--device {config.device} names several devices, name one here")
    automatic = config.device == "auto"
    kind, (index,) = (_best(), (0,)) if automatic else named_devices(config.device)
    if config.link_bytes_per_s is not None and kind.own_memory:
        raise ConfigError("--link-bandwidth emulates a GPU's link: add --device cpu")
    return _OPENERS[kind.processor](config, index, beside)


def _best() -> DeviceKind:
    return CPU if TorchDriver().missing(0) else CUDA


def _open_cpu(config: RuntimeConfig, index: int, beside: Device | None) -> Device:
    assert beside is None or isinstance(beside, CpuDevice)
    rate = config.only_link_bytes_per_s
    return CpuDevice(readers=config.readers, link_bytes_per_s=rate, beside=beside)


def _open_cuda(config: RuntimeConfig, index: int, beside: Device | None) -> Device:
    return CudaDevice(index, readers=config.readers)


_OPENERS: Mapping[Processor, Callable[[RuntimeConfig, int, Device | None], Device]] = {
    Processor.CPU: _open_cpu,
    Processor.CUDA: _open_cuda,
}
