"""Attention to one part of the rows, and the exact merge of parts by their log-sum-exp.

Softmax over all rows is the mean of the softmaxes over parts, each weighted with its share of the
sum of exponentials (FlashAttention, Dao et al. 2022, section 3.1; exllamav3 and FlashInfer merge
the same way). Query heads of a group are rows of their KV head, so keys are never copied.
"""

import torch

from offload_rt.attention.spec import AttentionSpec

# Scores written out are made for as many query rows as fit in this.
SCORE_BYTES = 8 * 2**20
MERGE_AT = 8  # parts that are kept before they are merged: fewer kernels, bounded memory


class PartialAttention:
    """Attention of one query to rows that come part by part.

    Args:
        query: [H, S, D].
        kv_heads: K.
        spec: how the layer attends; the window is up to the caller's masks.
    """

    def __init__(self, query: torch.Tensor, kv_heads: int, spec: AttentionSpec) -> None:
        self._heads, self._rows, _ = query.shape
        self._spec, self._dtype = spec, query.dtype
        self._groups = self._heads // kv_heads
        self._query = query.reshape(kv_heads, self._groups * self._rows, -1)  # [K, G * S, D]
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(
        self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None = None
    ) -> None:
        """Attend to more rows.

        Args:
            key: [K, T, D].
            value: [K, T, D].
            visible: [S, T] bool, which of them each query row sees; None: all.
        """
        fused = visible is None and self._spec.softcap is None and key.device.type == "cpu"
        attend = self._attend_fused if fused else self._attend_explicitly
        self._parts.append(attend(key, value, visible))
        if len(self._parts) == MERGE_AT:
            self._parts = [_merge(self._parts)]

    def result(self) -> torch.Tensor:
        """Return [S, H, D] over everything added; each row has seen at least one key."""
        if self._spec.sinks is not None:
            sinks = self._spec.sinks.float().view(-1, self._groups, 1)  # [K, G, 1]
            logits = sinks.expand(-1, -1, self._rows).flatten(1)  # [K, G * S]
            self._parts.append((torch.zeros_like(self._parts[0][0]), logits))
        out = self._parts[0][0] if len(self._parts) == 1 else _merge(self._parts)[0]
        return out.reshape(self._heads, self._rows, -1).transpose(0, 1).to(self._dtype)

    def _attend_fused(
        self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The CPU's flash kernel, which also returns the log-sum-exp."""
        assert visible is None
        if key.shape[-1] != value.shape[-1]:
            return self._attend_explicitly(key, value, None)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            self._query[None], key[None], value[None], 0.0, False, scale=self._spec.scaling
        )
        return out[0].float(), lse[0].float()

    def _attend_explicitly(
        self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Written out in fp32: [K, G * S, D] and [K, G * S]; in blocks of query rows."""
        key, value = key.float(), value.float()
        hidden = None if visible is None else (~visible).repeat(self._groups, 1)  # [G * S, T]
        count = self._query.shape[1]
        block = max(1, SCORE_BYTES // (key.shape[0] * key.shape[1] * 4))
        outs, sums = [], []
        for start in range(0, count, block):
            part = self._query[:, start : start + block].float()
            scores = torch.matmul(part, key.transpose(1, 2)) * self._spec.scaling  # [K, g, T]
            if self._spec.softcap is not None:
                scores = torch.tanh(scores / self._spec.softcap) * self._spec.softcap
            if hidden is not None:
                scores = scores.masked_fill(hidden[start : start + block], float("-inf"))
            lse = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - _finite(lse)[..., None])
            outs.append(torch.matmul(weights, value))
            sums.append(lse)
        if len(outs) == 1:
            return outs[0], sums[0]
        return torch.cat(outs, dim=1), torch.cat(sums, dim=1)


def _merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge parts: outputs [K, R, D] and log-sum-exps [K, R] in fp32."""
    sums = torch.stack([lse for _, lse in parts])  # [P, K, R]
    lse = torch.logsumexp(sums, dim=0)
    weights = torch.exp(sums - _finite(lse))
    out = parts[0][0] * weights[0, ..., None]
    for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
        out = torch.addcmul(out, part, weight[..., None])
    return out, lse


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """Replace -inf, the sum over no visible row, so that its weights become 0 and not nan."""
    return torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
