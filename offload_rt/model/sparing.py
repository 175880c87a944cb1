"""Importing transformers' modelling without what only compiling and many processes need.

transformers marks some of its functions for torch's compiler, and imports tensors spread over
processes; with both come sympy, onnx and triton: 80 MiB and 1.2 s of processor time
(docs/RESULTS.md, "Memory beside the device memory"). A command line compiles nothing with torch and
is one process, so there transformers is told that torch has no processes to spread over, as on
macOS, and its marks are made without the compiler. What anything needs of the compiler besides is
answered by the real one. A program that has us as a library keeps everything. No torch here at
import.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from offload_rt.device.system import (
    LIBRARIES,
    give_back_code,
    note_imported,
    restart_peak,
    rss_bytes,
)

_COMPILER = "torch._dynamo"
_MARKS = ("allow_in_graph", "assume_constant_result", "disable")  # of functions, for the compiler
_ABSENT = ("is_torch_distributed_available", "is_torch_flex_attn_available")
_COMPUTES_SHAPES = {_COMPILER, "torch.fx.experimental.symbolic_shapes"}
_asked: set[str] = set()


def spare_compiler() -> None:
    """Say that this process is ours alone; call it before transformers' modelling is imported."""
    _asked.add(_COMPILER)


def is_spared() -> bool:
    """Whether that was said."""
    return bool(_asked)


def import_compiler() -> None:
    """Import now what a pass over shapes would; it does not count as a device's memory."""
    if not is_spared() or sys.modules.keys() >= _COMPUTES_SHAPES:
        return
    taken, files = rss_bytes()
    for name in _COMPUTES_SHAPES:
        import_module(name)
    give_back_code(LIBRARIES)
    restart_peak()  # which had what was read of libraries just now
    taken_then, files_then = rss_bytes()
    note_imported(max(0, taken_then - files_then - taken + files))


@contextmanager
def compiler_spared() -> Iterator[None]:
    """Where that was said, have what is imported meanwhile do without torch's compiler."""
    if not is_spared() or _COMPILER in sys.modules or "transformers.modeling_utils" in sys.modules:
        yield
        return
    import torch
    from transformers import utils
    from transformers.utils import import_utils

    for name in _ABSENT:
        for place in (utils, import_utils):
            setattr(place, name, _no)
    disable = torch.compiler.disable
    stand_in = _Marks(_COMPILER)
    sys.modules[_COMPILER] = stand_in
    torch.compiler.disable = stand_in.disable
    try:
        yield
    finally:
        torch.compiler.disable = disable
        if sys.modules.get(_COMPILER) is stand_in:
            _forget()


def _no(*_: object, **__: object) -> bool:
    return False


def _unchanged(function: Any = None, *_: object, **__: object) -> Any:  # noqa: ANN401
    """A mark, with or without options in brackets, that changes nothing."""
    return function if callable(function) else _unchanged


class _Marks(ModuleType):
    """Stands for torch's compiler while functions are marked."""

    disable: Callable[..., Any]

    def __init__(self, name: str) -> None:
        super().__init__(name)
        import torch

        self.__path__ = [os.path.join(os.path.dirname(str(torch.__file__)), "_dynamo")]
        for mark in _MARKS:
            setattr(self, mark, _unchanged)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name.startswith("__"):  # what the import system asks a package
            raise AttributeError(name)
        _forget()
        return getattr(import_module(_COMPILER), name)


def _forget() -> None:
    """Have the compiler imported as a whole by whoever needs it next."""
    for name in [each for each in sys.modules if each.partition(f"{_COMPILER}.")[1]]:
        del sys.modules[name]
    del sys.modules[_COMPILER]
    torch = sys.modules["torch"]
    if "_dynamo" in vars(torch):
        del torch._dynamo
