"""What attention is asked for.

Letters used for shapes everywhere: `B` batch, `S` new tokens, `T` cached tokens, `H` query heads,
`K` KV heads, `D` head size, `E` hidden size, `V` vocabulary, `N` tree nodes, `L` layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROOT = -1  # in place of a row that is continued: none is


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """How one layer attends.

    Attributes:
        scaling: factor on query-key products.
        window: a token sees itself and this many minus one before it; None sees all.
        softcap: products are squashed to softcap * tanh(product / softcap); None leaves them.
        sinks: [H] a logit per head that takes probability and gives no value (GPT-OSS), or None.
        exact: by `exact.py`: a row's bits depend on its past alone.
        fixed: and on the device products have one shape each (`fixed.py`).
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    exact: bool = False
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class PendingTree:
    """Which pending rows the newest S rows may look at, when they are not simply in a row.

    Attributes:
        visible: [S, P] bool over all P pending rows, the S newest last; a row sees itself.
        positions: [P] int64, the place in the sequence of each pending row.
        parents: [P] on the host, the pending row that each continues; ROOT for none. None where
            nobody asks for them.
    """

    visible: torch.Tensor
    positions: torch.Tensor
    parents: Sequence[int] | None = None
