"""Open the device that a run asks for."""

import torch

from offload_rt.config import HomeKind, KVPlace, RuntimeConfig
from offload_rt.device.base import Device
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.cuda.device import CudaDevice, TorchDriver
from offload_rt.device.present import cuda_index
from offload_rt.device.system import compute_threads
from offload_rt.errors import ConfigError
from offload_rt.model.layout import Packing


def open_device(config: RuntimeConfig) -> tuple[Device, Packing]:
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
    name = config.device
    if name == "auto":
        name = "cpu" if TorchDriver().missing(0) else "cuda:0"
    if name == "cpu":
        device = CpuDevice(readers=config.readers, link_bytes_per_s=config.link_bytes_per_s)
        return device, Packing.FILE
    index = cuda_index(name)
    if config.link_bytes_per_s is not None:
        raise ConfigError("--link-bandwidth emulates a GPU's link: add --device cpu")
    return CudaDevice(index, readers=config.readers), Packing.DEVICE
