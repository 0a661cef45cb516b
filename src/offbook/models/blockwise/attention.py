"""Exact attention of a block of queries to any number of keys, and its gradient, in pieces that merge.

The pieces are computed by PyTorch's own flash attention, forward and backward. Legend of the shapes: B samples, H heads
of queries, G heads of keys and values (H is a multiple), Q queries, K keys, E size of a head.

Two results over disjoint keys, o1 with l1 = log sum exp(scores) and o2 with l2, merge exactly to
l = log(exp l1 + exp l2), o = exp(l1 - l) o1 + exp(l2 - l) o2. And with the merged o and l, the gradient of each piece
can be computed by itself: P = exp(scores - l), D = rowsum(do * o), dscores = P * (do v' - D).

Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021); Dao et al., "FlashAttention" (2022),
algorithms 1 and 4; Liu and Abbeel, "Blockwise Parallel Transformer for Large Context Models" (2023), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from offbook.models.blockwise.dropout import kept
from offbook.models.blockwise.masks import Kind, Mask, pieces

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
_EFFICIENT_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward


@dataclass(frozen=True)
class Rule:
    """How queries attend.

    Attributes:
        mask: who sees whom.
        block: keys that are looked at in one piece.
        rate: share of attention probabilities to drop, in [0, 1).
        seed: of that dropout.
    """

    mask: Mask
    block: int = 2048
    rate: float = 0.0
    seed: int = 0


def attend(
    q: Float[Tensor, "B H Q E"],
    k: Float[Tensor, "B G K E"],
    v: Float[Tensor, "B G K E"],
    rule: Rule,
    queries: range,
    keys: range,
) -> tuple[Float[Tensor, "B H Q E"], Float[Tensor, "B H Q"]]:
    """Attends from a block of queries to a stretch of keys.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
        rule: how.
        queries: indices of the queries in the whole sequence.
        keys: indices of the keys in the whole sequence.

    Returns:
        The output, and the log of the sum of the exponentials of the scores, float32 or wider. A query that sees no
        key has output 0 and minus infinity.
    """
    merged: tuple[Tensor, Tensor] | None = None
    for part, kind in pieces(rule.mask, queries, keys, rule.block):
        cut = slice(part.start - keys.start, part.stop - keys.start)
        piece = _forward(q, k[:, :, cut], v[:, :, cut], rule, kind, queries, part)
        merged = piece if merged is None else merge(*merged, *piece)
    if merged is None:
        lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        return torch.zeros_like(q), lse
    return merged[0].to(q.dtype), merged[1]


def merge(
    one: Float[Tensor, "B H Q E"],
    one_lse: Float[Tensor, "B H Q"],
    other: Float[Tensor, "B H Q E"],
    other_lse: Float[Tensor, "B H Q"],
) -> tuple[Float[Tensor, "B H Q E"], Float[Tensor, "B H Q"]]:
    """Merges attention over one set of keys with that over another, in float32 or wider."""
    # By the difference: large sums have few digits left behind the point. It is no number where nothing is seen.
    share = torch.sigmoid(one_lse - other_lse).nan_to_num(0.5)[..., None]
    one, other = one.to(share.dtype), other.to(share.dtype)
    return torch.lerp(other, one, share), torch.logaddexp(one_lse, other_lse)


def attend_backward(
    do: Float[Tensor, "B H Q E"],
    q: Float[Tensor, "B H Q E"],
    k: Float[Tensor, "B G K E"],
    v: Float[Tensor, "B G K E"],
    o: Float[Tensor, "B H Q E"],
    lse: Float[Tensor, "B H Q"],
    rule: Rule,
    queries: range,
    keys: range,
    dk: Float[Tensor, "B G K E"],
    dv: Float[Tensor, "B G K E"],
) -> Float[Tensor, "B H Q E"]:
    """The gradient of `attend`.

    Args:
        do: gradient of the output.
        q: as given to `attend`, like the next two.
        k: the keys, or a part of them when others are attended to elsewhere.
        v: their values.
        o: the output over all keys there are.
        lse: the log of the sum over all keys there are.
        rule: as given to `attend`.
        queries: as given to `attend`.
        keys: indices of the keys at hand.
        dk: the gradient of the keys is added here, like the next.
        dv: gradient of the values.

    Returns:
        The gradient of the queries, from the keys at hand, in float32 or wider.
    """
    dq = torch.zeros_like(q, dtype=lse.dtype)
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    for part, kind in pieces(rule.mask, queries, keys, rule.block):
        cut = slice(part.start - keys.start, part.stop - keys.start)
        dq_part, dk_part, dv_part = _backward(do, q, k[:, :, cut], v[:, :, cut], o, lse, rule, kind, queries, part)
        dq += dq_part
        dk[:, :, cut] += dk_part
        dv[:, :, cut] += dv_part
        del dq_part, dk_part, dv_part  # before the next piece's are made
    return dq


def _forward(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, kind: Kind, queries: range, keys: range
) -> tuple[Tensor, Tensor]:
    if not _has_kernel(q, rule):
        return _eager(q, k, v, rule, kind, queries, keys)
    bias, dead = _bias(q, rule, kind, queries, keys)
    causal = kind is Kind.DIAGONAL
    if q.device.type == "cpu":
        out, lse = _FLASH(q, k, v, 0.0, causal, attn_mask=bias)
    else:
        k, v = (_repeated(x, q.shape[1]) for x in (k, v))
        out, lse = _EFFICIENT(q, k, v, None if bias is None else bias.expand(*q.shape[:3], -1), True, 0.0, causal)[:2]
        lse = lse[:, :, : q.shape[2]]  # which the kernel pads
    # The kernels give 0 to a query that sees nothing, for the output and for the log of the sum alike.
    return out, lse if dead is None else lse.masked_fill(dead, -math.inf)


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rule: Rule,
    kind: Kind,
    queries: range,
    keys: range,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _has_kernel(q, rule):
        return _eager_backward(do, q, k, v, o, lse, rule, kind, queries, keys)
    bias, _dead = _bias(q, rule, kind, queries, keys)
    causal = kind is Kind.DIAGONAL
    if q.device.type == "cpu":
        grads: tuple[Tensor, Tensor, Tensor] = _FLASH_BACKWARD(do, q, k, v, o, lse, 0.0, causal, attn_mask=bias)
        return grads
    heads, nothing = k.shape[1], torch.zeros((), dtype=torch.int64, device=q.device)
    k, v = (_repeated(x, q.shape[1]) for x in (k, v))
    bias = None if bias is None else bias.expand(*q.shape[:3], -1)
    # The kernel wants the sums padded to whole rows of 32.
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf).contiguous()
    wanted = [True, True, True, False]
    dq, dk, dv, _ = _EFFICIENT_BACKWARD(do, q, k, v, bias, o, lse, nothing, nothing, 0.0, wanted, causal)
    return dq, _summed(dk, heads), _summed(dv, heads)


def _has_kernel(q: Tensor, rule: Rule) -> bool:
    """Whether PyTorch has a kernel for it: none drops by our bits, and CUDA's wants sizes that its vectors divide."""
    if q.device.type == "cuda":
        return not rule.rate and q.dtype != torch.float64 and q.shape[-1] % 8 == 0
    return not rule.rate and q.device.type == "cpu"


def _bias(q: Tensor, rule: Rule, kind: Kind, queries: range, keys: range) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, shape (#B, 1, Q, K), and which queries see nothing, shape (#B, 1, Q)."""
    if kind is not Kind.PARTIAL:
        return None, None
    seen = rule.mask.visible(queries, keys, q.device)[:, None]
    # CUDA's kernel reads rows that begin at multiples of 16 numbers.
    keys_there = len(keys) if q.device.type == "cpu" else -(-len(keys) // 16) * 16
    bias = torch.zeros(*seen.shape[:-1], keys_there, dtype=q.dtype, device=q.device)[..., : len(keys)]
    return bias.masked_fill_(~seen, -math.inf), ~seen.any(-1)


def _scores(q: Tensor, k: Tensor, rule: Rule, kind: Kind, queries: range, keys: range) -> tuple[Tensor, Tensor | None]:
    """Masked scores in float32 or wider, and what dropout multiplies the probabilities by."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ _repeated(k, q.shape[1]).to(wide).mT / math.sqrt(q.shape[-1])
    if kind is not Kind.FULL:
        scores = scores.masked_fill(~rule.mask.visible(queries, keys, q.device)[:, None], -math.inf)
    if not rule.rate:
        return scores, None
    batch, heads = (torch.arange(n, device=q.device) for n in q.shape[:2])
    i, j = (torch.arange(span.start, span.stop, device=q.device) for span in (queries, keys))
    keep = kept(rule.seed, rule.rate, batch[:, None, None, None], heads[:, None, None], i[:, None], j)
    return scores, keep.to(wide) / (1 - rule.rate)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, kind: Kind, queries: range, keys: range
) -> tuple[Tensor, Tensor]:
    """What the kernels do, in plain operations: with dropout, and where there is no kernel."""
    scores, drop = _scores(q, k, rule, kind, queries, keys)
    lse = scores.logsumexp(-1)
    probabilities = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    if drop is not None:
        probabilities = probabilities * drop
    return probabilities @ _repeated(v, q.shape[1]).to(scores.dtype), lse


def _eager_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rule: Rule,
    kind: Kind,
    queries: range,
    keys: range,
) -> tuple[Tensor, Tensor, Tensor]:
    scores, drop = _scores(q, k, rule, kind, queries, keys)
    wide = scores.dtype
    probabilities = (scores - lse[..., None]).exp()
    do, dp = do.to(wide), do.to(wide) @ _repeated(v, q.shape[1]).to(wide).mT
    dv = (probabilities if drop is None else probabilities * drop).mT @ do
    if drop is not None:
        dp = dp * drop
    ds = probabilities * (dp - (do * o).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    dq, dk = ds @ _repeated(k, q.shape[1]).to(wide), ds.mT @ q.to(wide)
    return dq, _summed(dk, k.shape[1]), _summed(dv, k.shape[1])


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Heads of keys or values, one for each head of queries."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _summed(dx: Tensor, heads: int) -> Tensor:
    """The gradient of heads that were repeated."""
    return dx if dx.shape[1] == heads else dx.reshape(len(dx), heads, -1, *dx.shape[2:]).sum(2)
