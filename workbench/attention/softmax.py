"""Attention weights from queries and keys, a stretch of the queries at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_CHUNK = 1 << 22
"""How many softmax weights are computed at once at the most: 16 MiB."""

Places = slice | torch.Tensor
"""Which queries or keys: a stretch of them, or their positions, ``(count,)`` integers."""


def weights(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    queries: Places = slice(None),
    columns: Places = slice(None),
    heads: Sequence[int] | None = None,
    over_heads: str | None = None,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return part of the softmax weights of an attention, in float32.

    Queries are taken a stretch at a time, so the whole matrix never exists unless all of it is asked for.

    Args:
        query: ``(batch, heads, queries, head_dim)``.
        key: ``(batch, heads, keys, head_dim)``; fewer heads are repeated (grouped queries).
        queries: which queries.
        columns: which keys to return; the softmax is over all of them.
        heads: which heads; None is all.
        over_heads: ``"mean"`` or ``"max"`` over them, or None to keep them apart.
        scale: of the dot products; None is 1/√head_dim.
        mask: boolean or additive, broadcastable to ``(batch, heads, queries, keys)``.

    Returns:
        Weights in [0, 1], ``(batch, queries, columns)``, with ``heads`` after the batch if kept apart.
    """
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if mask is not None:
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    if heads is not None:
        chosen = torch.as_tensor(heads, device=query.device)
        query, key = query[:, chosen], key[:, chosen]
        mask = mask[:, chosen] if mask is not None and mask.shape[1] > 1 else mask
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    wanted, keys = query[:, :, queries].float() * factor, key.float().transpose(-1, -2)
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, queries]
    total = wanted.shape[2]
    chunk = max(_CHUNK // max(wanted.shape[0] * wanted.shape[1] * keys.shape[3], 1), 1)
    if chunk >= total:
        return _joined(_probabilities(wanted @ keys, mask, slice(None))[..., columns], over_heads)
    # Memory taken once: of stretches that come and go, the process would keep many times as much.
    room = None if _has_graph(wanted, keys) else keys.new_empty(*wanted.shape[:2], chunk, keys.shape[3])
    result: torch.Tensor | None = None
    for start in range(0, total, chunk):
        stretch = slice(start, min(start + chunk, total))
        some = wanted[:, :, stretch]
        logits = some @ keys if room is None else torch.matmul(some, keys, out=room[:, :, : some.shape[2]])
        part = _joined(_probabilities(logits, mask, stretch)[..., columns], over_heads)
        if result is None:
            result = part.new_empty(*part.shape[:-2], total, part.shape[-1])
        result[..., stretch, :] = part
    assert result is not None
    return result


def _probabilities(logits: torch.Tensor, mask: torch.Tensor | None, stretch: slice) -> torch.Tensor:
    """Return the softmax of a stretch of queries under its part of the mask."""
    if mask is None:
        return logits.softmax(-1)
    # A query that may see no key has no weights; the kernel gives it zeros too.
    return masked(logits, mask[:, :, stretch] if mask.shape[2] > 1 else mask).softmax(-1).nan_to_num(0.0)


def _has_graph(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def masked(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return logits under a mask: boolean, True where a key may be seen, or added to them."""
    return torch.where(mask, logits, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()


def causal(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Return the mask under which each query sees the keys up to its own place, ``(queries, keys)``."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def _joined(part: torch.Tensor, over_heads: str | None) -> torch.Tensor:
    if over_heads == "mean":
        return part.mean(1)
    return part.amax(1) if over_heads == "max" else part
