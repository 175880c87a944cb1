"""What tensors of Medusa heads are called in the layouts that are in use, and what they add up to.

Upstream's names are read, with or without the prefix of a full model (FasterDecoding/Medusa v0.1,
v1.0, "version 2"; TGI keeps them), and vLLM's. Counts, biases and sharing come from the tensors:
the first published config.json says 2 heads where the file has 5. No torch here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import MEDUSA_PREFIX
from offload_rt.model.files import shown

TOKEN_MAP, COMMON_HEAD = "token_map", "lm_head.weight"
MAX_HEADS, MAX_LAYERS = 64, 16  # a bound on what a file may ask for; five heads of one are usual

_PREFIXES = (MEDUSA_PREFIX, "medusa_heads.")
_UPSTREAM = re.compile(r"(\d{1,3})\.(\d{1,3})\.linear\.(weight|bias)")
_UPSTREAM_HEAD = re.compile(r"(\d{1,3})\.(\d{1,3})\.weight")
_VLLM = re.compile(r"blocks\.(\d{1,3})\.layers\.(\d{1,3})\.(weight|bias)")
_VLLM_HEAD = re.compile(r"lm_heads\.(\d{1,3})\.weight")


class LmHead(StrEnum):
    """Whose output head turns a Medusa head's state into logits."""

    MODEL = "model"
    COMMON = "common"
    OWN = "own"


class Naming(StrEnum):
    """Whose names the tensors have."""

    UPSTREAM = "upstream"
    VLLM = "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsShape:
    """What a set of heads consists of.

    Attributes:
        heads: how many; head i (from 0) guesses the token i + 2 places ahead.
        layers: residual blocks of each.
        hidden_size: width of the model's hidden state.
        bias: whether the blocks' linear layers have one.
        lm_head: the model's own, one stored for all heads, or one stored for each.
        head_rows: rows of a stored output head; 0 for the model's.
        truncated: whether a stored head's rows are those of a token map, not of all tokens.
    """

    heads: int
    layers: int
    hidden_size: int
    bias: bool = True
    lm_head: LmHead = LmHead.MODEL
    head_rows: int = 0
    truncated: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all floating tensors, by the names of `heads.py`."""
        found: dict[str, tuple[int, ...]] = {}
        for head in range(self.heads):
            for layer in range(self.layers):
                name = f"blocks.{head}.{layer}.linear"
                found[f"{name}.weight"] = (self.hidden_size, self.hidden_size)
                if self.bias:
                    found[f"{name}.bias"] = (self.hidden_size,)
            if self.lm_head is LmHead.OWN:
                found[f"lm_heads.{head}.weight"] = (self.head_rows, self.hidden_size)
        if self.lm_head is LmHead.COMMON:
            found[COMMON_HEAD] = (self.head_rows, self.hidden_size)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The tensors of a checkpoint under our names.

    Attributes:
        naming: whose names the file uses.
        stored: our name to that of the file; the token map's too, if there is one.
        shape: what they add up to.
    """

    naming: Naming
    stored: Mapping[str, str]
    shape: HeadsShape


def read_names(
    shapes: Mapping[str, tuple[int, ...]], where: str, *, one_head_for_all: bool = False
) -> Names:
    """Recognise the tensors of a checkpoint.

    Args:
        shapes: of all its tensors; in a full model those that are not of heads are left out.
        where: what error messages call the checkpoint.
        one_head_for_all: the first output head serves all (vLLM's `original_lm_head`).

    Raises:
        CheckpointError: there are no heads, a tensor is missing, left over, or of a wrong shape.
    """
    of_heads = [name for name in shapes if name.startswith(MEDUSA_PREFIX)]
    names = of_heads or list(shapes)
    layers = _count_layers(names)
    stored: dict[str, str] = {}
    for name in names:
        ours = _our_name(_bare(name), layers)
        if ours is None:
            raise CheckpointError(_why_unknown(name, layers, where))
        if ours == "lm_heads.0.weight" and one_head_for_all:
            ours = COMMON_HEAD
        if ours in stored:
            raise CheckpointError(
                f"{where} holds {shown(name)} and {shown(stored[ours])}, which are the same "
                "tensor under two names: remove one"
            )
        stored[ours] = name
    naming = Naming.VLLM if any(_VLLM.fullmatch(_bare(n)) for n in names) else Naming.UPSTREAM
    shape = _shape({ours: shapes[name] for ours, name in stored.items()}, layers, where)
    return Names(naming=naming, stored=stored, shape=shape)


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _count_layers(names: Iterable[str]) -> int:
    """One more than the highest residual block of any head; 0 if there is none."""
    matches = [_UPSTREAM.fullmatch(_bare(n)) or _VLLM.fullmatch(_bare(n)) for n in names]
    return max((int(match[2]) + 1 for match in matches if match), default=0)


def _our_name(name: str, layers: int) -> str | None:
    """Our name of a tensor, or None if heads have no such tensor."""
    if name in (TOKEN_MAP, COMMON_HEAD):
        return name
    if match := _UPSTREAM.fullmatch(name) or _VLLM.fullmatch(name):
        return f"blocks.{int(match[1])}.{int(match[2])}.linear.{match[3]}"
    if match := _VLLM_HEAD.fullmatch(name):
        return f"lm_heads.{int(match[1])}.weight"
    # Upstream's output head is numbered as one more layer.
    if (match := _UPSTREAM_HEAD.fullmatch(name)) and int(match[2]) == layers:
        return f"lm_heads.{int(match[1])}.weight"
    return None


def _why_unknown(name: str, layers: int, where: str) -> str:
    if not layers:
        return (
            f"{where} holds no Medusa heads (no tensor is named like 0.0.linear.weight, "
            f"medusa_head.0.0.linear.weight or blocks.0.layers.0.weight; one is {shown(name)})"
        )
    return (
        f"{where} holds tensor {shown(name)}, which Medusa heads of {layers} layers have no use "
        "for: download the heads again"
    )


def _shape(shapes: Mapping[str, tuple[int, ...]], layers: int, where: str) -> HeadsShape:
    """What the tensors add up to; `shapes` are by our names."""
    if not layers:
        raise CheckpointError(f"{where} holds no Medusa heads ({len(shapes)} tensors)")
    heads = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    if heads > MAX_HEADS or layers > MAX_LAYERS:
        raise CheckpointError(
            f"{where} numbers {heads} heads of {layers} layers, accepted is up to {MAX_HEADS} of "
            f"{MAX_LAYERS}: download the heads again"
        )
    kind = LmHead.MODEL
    if COMMON_HEAD in shapes:
        kind = LmHead.COMMON
    elif any(name.startswith("lm_heads.") for name in shapes):
        kind = LmHead.OWN
    head = next((s for n, s in shapes.items() if n.startswith("lm_head")), (0, 0))
    shape = HeadsShape(
        heads=heads,
        layers=layers,
        hidden_size=_hidden_size(shapes, where),
        bias=any(name.endswith(".bias") for name in shapes),
        lm_head=kind,
        head_rows=head[0] if head else 0,
        truncated=TOKEN_MAP in shapes,
    )
    _compare(shape, shapes, where)
    return shape


def _hidden_size(shapes: Mapping[str, tuple[int, ...]], where: str) -> int:
    weights = ((n, s) for n, s in shapes.items() if n.endswith("linear.weight"))
    name, first = next(weights, ("every linear.weight", ()))
    if len(first) != 2 or first[0] != first[1] or not first[0]:
        raise CheckpointError(
            f"{where}: {name} has shape {list(first)}, a residual block's is square: download the "
            "heads again"
        )
    return first[0]


def _compare(shape: HeadsShape, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse tensors that are missing, left over or of another shape than the others imply."""
    needed = shape.tensors()
    found = {name: s for name, s in shapes.items() if name != TOKEN_MAP}
    what = f"{shape.heads} heads of {shape.layers} layers"
    if missing := sorted(needed.keys() - found.keys()):
        raise CheckpointError(
            f"{where} lacks {len(missing)} of the {len(needed)} tensors of {what}, such as "
            f"{missing[0]}: download the heads again"
        )
    if extra := sorted(found.keys() - needed.keys()):
        raise CheckpointError(
            f"{where} holds {len(extra)} tensors that {what} have no use for, such as {extra[0]}: "
            "download the heads again"
        )
    for name, expected in needed.items():
        if found[name] != expected or 0 in expected:
            raise CheckpointError(
                f"{where}: {name} has shape {list(found[name])}, the other tensors make it "
                f"{list(expected)}: download the heads again"
            )
    _check_token_map(shape, shapes.get(TOKEN_MAP), where)


def _check_token_map(shape: HeadsShape, token_map: tuple[int, ...] | None, where: str) -> None:
    if token_map is None:
        return
    if shape.lm_head is LmHead.MODEL or len(token_map) != 1 or token_map[0] > shape.head_rows:
        raise CheckpointError(
            f"{where}: token_map has shape {list(token_map)}, the stored output heads have "
            f"{shape.head_rows} rows: a map names the token of each row, get the heads again"
        )
