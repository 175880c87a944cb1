"""Importing transformers' modelling without what only compiling and many processes need.

transformers marks some of its functions for torch's compiler, and imports tensors spread over
processes; with both come sympy, onnx and triton: 80 MiB and 1.2 s of processor time
(docs/RESULTS.md, "Memory beside the device memory"). A command line compiles nothing with torch and
is one process, so there transformers is told that torch has no processes to spread over, as on
macOS, and its marks are made without the compiler. What anything needs of the compiler besides is
answered by the real one, in a process of its own where that can be (`apart`). NVIDIA's package for
Python is left out, too: 8 MiB, of which torch has green contexts and notes on graphs. A program
that has us as a library keeps everything.

What all have is that transformers looks through its files of models once (`import_models`). No
torch here at import.
"""

import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from offload_rt.errors import CheckpointError

_COMPILER = "torch._dynamo"
_BINDINGS = "cuda.bindings"
_MARKS = ("allow_in_graph", "assume_constant_result", "disable")  # of functions, for the compiler
_ABSENT = ("is_torch_distributed_available", "is_torch_flex_attn_available")
_COMPUTES_SHAPES = {_COMPILER, "torch.fx.experimental.symbolic_shapes"}
_LONGEST_S = 60  # a fork's passes over shapes take one to three seconds
_asked: set[str] = set()


def spare_compiler() -> None:
    """Say that this process is ours alone; call it before torch is imported."""
    _asked.add(_COMPILER)
    if "torch" not in sys.modules:
        sys.modules.setdefault(_BINDINGS, None)  # type: ignore[arg-type]


def is_spared() -> bool:
    """Whether that was said."""
    return bool(_asked)


def import_models() -> None:
    """Import transformers' package of models without reading its 2,500 files a second time.

    To know what each has to offer takes 0.26 s of processor time. transformers reads them when it
    is imported, and again when its package of models is; what the package is to know is among what
    transformers knows, below the package's name.
    """
    import transformers
    from transformers.utils import import_utils

    look = getattr(import_utils, "define_import_structure", None)
    if look is None or "transformers.models" in sys.modules:
        return
    folder, within = Path(str(transformers.__file__)).parent / "models", "models."

    def known(asked: str, *more: object) -> dict[Any, dict[str, set[str]]]:
        if Path(asked) != folder / "__init__.py":
            found: dict[Any, dict[str, set[str]]] = look(asked, *more)
            return found
        return {
            needs: {n.removeprefix(within): has for n, has in of.items() if n.startswith(within)}
            for needs, of in look(folder, prefix="models").items()  # that is kept
        }

    import_utils.define_import_structure = known
    try:
        import_module("transformers.models")
    finally:
        import_utils.define_import_structure = look


def import_compiler() -> None:
    """Import now what a pass over shapes would."""
    for name in _COMPUTES_SHAPES:
        import_module(name)


def apart(find: Callable[[], object]) -> Any:  # noqa: ANN401 - what JSON can hold
    """What `find` returns, from a fork where it would import torch's compiler into this process.

    The compiler takes 100 MiB for a pass or two over shapes; what a fork takes ends with it. Memory
    that is read into or used by a GPU must not be forked, so call it before layers are copied.

    Args:
        find: makes passes over shapes; returns what JSON can hold.

    Raises:
        CheckpointError: it raised that.
    """
    from offload_rt.device.cuda.torch_driver import uses_gpu

    if not is_spared() or sys.modules.keys() >= _COMPUTES_SHAPES or uses_gpu():
        return find()
    replies, sink = os.pipe()
    child = os.fork()
    if child == 0:
        _reply(sink, find)
    os.close(sink)
    try:
        with os.fdopen(replies, "rb") as source:
            ready, _, _ = select.select([source], [], [], _LONGEST_S)
            data = source.read() if ready else b""
    finally:  # by Ctrl-C, too
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not data:  # it met something else, was killed, or waits for a thread that no fork has
        return find()
    reply = json.loads(data)
    if "error" in reply:
        raise CheckpointError(reply["error"])
    return reply["value"]


def _reply(sink: int, find: Callable[[], object]) -> NoReturn:
    """Find it, write it, and end this process with nothing that its parent would do at its end."""
    try:
        try:
            reply = {"value": find()}
        except CheckpointError as error:
            reply = {"error": str(error)}
        with os.fdopen(sink, "wb") as file:
            file.write(json.dumps(reply).encode())
    finally:
        os._exit(0)


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
