"""What a training step will take, before the first one: memory counted tensor by tensor, and what fits a budget."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from offbook.errors import ResourceError
from offbook.models.blockwise.config import BackboneConfig

Remat = Literal["none", "ffn", "attn", "layer"]
# From the fastest, which keeps most, to the one that keeps least.
POLICIES: tuple[Remat, ...] = get_args(Remat)
# Of a budget, for what is not counted: other tensors of the user's, and what allocators lose between tensors.
_SPARE = 0.1
# Bytes that allocators lose where attention is computed again, whatever its size; measured.
_AGAIN = 2 << 20


class ContextTooLongError(ResourceError):
    """A training step would take more memory than there is."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a training step of a backbone will take at its peak, in bytes.

    Attributes:
        kept: what layers keep for the backward pass.
        layer: what the backward pass of one layer holds of the whole sequence.
        block: what it holds of a block.
        weights: gradients of weights.
        ends: what stands before the first layer and behind the last one.
    """

    kept: int
    layer: int
    block: int
    weights: int
    ends: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.kept + self.layer + self.block + self.weights + self.ends

    @property
    def dominant(self) -> str:
        """What takes most."""
        parts = {name: getattr(self, name) for name in ("kept", "layer", "block", "weights", "ends")}
        return max(parts, key=lambda name: parts[name])


def plan(config: BackboneConfig, tokens: int, batch: int = 1, element: int = 4, *, ring: bool = False) -> MemoryPlan:
    """Counts what a training step will hold at its peak.

    That is in the backward pass of the last layer, when all layers' inputs are kept, or in that of the first one, when
    all weights have their gradients.

    Args:
        config: the backbone; `"auto"` is taken for `"layer"`.
        tokens: of a sequence.
        batch: sequences.
        element: bytes of a number; gradients of weights have 4.
        ring: whether these are one process's tokens of a sequence that is spread over several.
    """
    d, n = config.dim, batch * tokens * element
    heads, keys = config.heads * config.head_size, config.key_heads * config.head_size
    up, hidden = config.hidden * (2 if config.ffn == "swiglu" else 1), config.hidden
    weights = 4 * (d * (2 * heads + 2 * keys + up + hidden) + (config.cond_dim or 0) * 6 * d)
    sums = 4 * batch * tokens * config.heads  # of the exponentials of the scores
    of_one, runs = d * n, math.ceil(config.layers / config.segment)
    rotary, together = config.positions == "rope", tokens <= config.block_q
    # Automatic differentiation keeps what queries and keys were rotated by, for each layer unless all share it.
    turned = 4 * config.rotated * tokens * element if rotary and not together else 0
    if config.remat == "none":
        of_one, runs = (4 * d + 2 * heads + 3 * keys + up + hidden) * n + sums + turned, config.layers
        layer, block = hidden * n, 0
    elif config.remat == "ffn":
        of_one, runs = (2 * d + 2 * heads + 3 * keys) * n + sums + turned, config.layers
        # The gradients of queries, keys and values, and of what makes them, come after those of the last block.
        feedforward = _feedforward(config, tokens, batch, element) - 4 * d * (heads + 2 * keys)
        layer, block = (d + heads) * n, max(feedforward, (heads + 2 * keys) * n)
    else:
        attended = heads * n + sums
        if config.remat == "attn" and config.segment == 1:
            of_one += attended
        layer = (2 * d + 2 * keys) * n + 2 * keys * n // element * 4
        if ring:
            # Queries, attention's output unless it is kept anyway, both gradients; and what is on its way.
            pair = batch * min(tokens, config.block_k)
            layer += (2 * element + 4) * heads * batch * tokens + 2 * keys * pair * (element + 4)
            layer += 0 if config.remat == "attn" and config.segment == 1 else attended
        block = _block(config, tokens, batch, element)
    inside = d * n * (config.segment - 1) if config.remat in ("attn", "layer") else 0
    away = config.offload != "none" and config.remat in ("attn", "layer")
    # From the processor's memory the next run's input is on its way while this one's is at hand.
    at_hand = min(runs, 2 if config.offload == "cpu" else 1) if away else runs
    last = of_one * at_hand + inside, weights * config.segment
    first = of_one + inside, weights * config.layers
    kept, gradients = max(last, first, key=sum)
    rope = (8 if together else 4) * config.rotated * tokens if rotary else 0
    # Automatic differentiation lets go of the last output late; layers that compute again have none of their own then.
    ends = rope + (d * n if config.remat in ("none", "ffn") else 0)
    return MemoryPlan(kept=kept, layer=layer, block=block, weights=gradients, ends=ends)


def _feedforward(config: BackboneConfig, tokens: int, batch: int, element: int) -> int:
    """What the backward pass of the feedforward holds for some tokens, and the gradients of its weights."""
    up, hidden = config.hidden * (2 if config.ffn == "swiglu" else 1), config.hidden
    each = element * batch * (2 * up + 2 * hidden + 2 * config.dim)
    # A block's gradients of weights stand beside the sums of those before it; the first block's become the sums.
    weights = 4 * config.dim * (config.heads * config.head_size + up + hidden)
    later = min(config.block_ffn, max(0, tokens - config.block_ffn))
    return max(each * min(config.block_ffn, tokens), each * later + weights)


def _block(config: BackboneConfig, tokens: int, batch: int, element: int) -> int:
    """What the backward pass of a layer that computes again holds of a block of queries."""
    d, heads, keys = config.dim, config.heads * config.head_size, config.key_heads * config.head_size
    again = config.remat != "attn" or config.segment > 1
    first = min(tokens, config.block_q)
    # The gradients of keys and values, and of what projects the input, are not written before the first block's
    # feedforward is done.
    early = 2 * keys * batch * tokens * 4 + 4 * d * (heads + 2 * keys)
    rest = [
        _feedforward(config, rows, batch, element) + element * batch * rows * (d + (3 if again else 2) * heads) - less
        for rows, less in ((first, early), (min(tokens - first, config.block_q), 0))
        if rows
    ]
    attention = element * batch * (first * (d + 6 * heads) + 2 * keys * min(tokens, config.block_k))
    return max(*rest, attention) + (_AGAIN if again else 0)


def ways(config: BackboneConfig) -> dict[str, BackboneConfig]:
    """The ways to spend memory, from the one that keeps all to the one that keeps least, by what they do.

    Example:
        >>> list(ways(BackboneConfig(dim=256, layers=9, heads=4)))
        ['none', 'ffn', 'attn', 'layer', 'layer, segments of 3', 'layer, offload to disk']
    """
    plain = replace(config, segment=1, offload="none")
    root = max(2, round(config.layers**0.5))
    return {
        **{policy: replace(plain, remat=policy) for policy in POLICIES},
        f"layer, segments of {root}": replace(plain, remat="layer", segment=root),
        "layer, offload to disk": replace(plain, remat="layer", offload="disk"),
    }


def work(config: BackboneConfig, tokens: int) -> float:
    """Arithmetic of a training step, as a multiple of that of one that computes nothing again.

    Counted for causal attention, whose backward pass takes 2.5 times its forward one, the scores being computed again
    in any case; everything else takes twice.
    """
    heads, keys = config.heads * config.head_size, config.key_heads * config.head_size
    feedforward = config.dim * config.hidden * (3 if config.ffn == "swiglu" else 2)
    attention, dense = heads * tokens, config.dim * (2 * heads + 2 * keys) + feedforward
    least = 3 * dense + 3.5 * attention
    # Keys and values are projected once more than the rest.
    whole = dense + config.dim * 2 * keys
    more = {"none": 0, "ffn": feedforward, "attn": whole, "layer": whole + attention, "auto": 0}
    again: float = more[config.remat]
    if config.segment > 1 and config.remat in ("attn", "layer"):
        again = whole + attention + (dense + attention) * (config.segment - 1) / config.segment
    return (least + again) / least


def longest(config: BackboneConfig, budget: int, batch: int = 1, element: int = 4, *, ring: bool = False) -> int:
    """Tokens of the longest sequence whose step fits a budget of bytes; 0 where none does."""
    low, high = 0, 1

    def fits(tokens: int) -> bool:
        return plan(config, tokens, batch, element, ring=ring).total <= budget

    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def choose(
    config: BackboneConfig, tokens: int, batch: int = 1, element: int = 4, *, budget: int, ring: bool = False
) -> Remat:
    """The policy that computes least again among those that fit a budget of bytes; see `plan` for the arguments.

    Raises:
        ContextTooLongError: none does.

    Example:
        >>> config = BackboneConfig(dim=256, layers=4, heads=4)
        >>> [choose(config, tokens, budget=1 << 30) for tokens in (1_000, 20_000, 80_000)]
        ['none', 'ffn', 'layer']
    """
    known = [replace(config, remat=policy) for policy in (POLICIES[2:] if ring else POLICIES)]
    for one in known:
        if plan(one, tokens, batch, element, ring=ring).total <= budget:
            return cast(Remat, one.remat)
    need = min(plan(one, tokens, batch, element, ring=ring).total for one in known)
    most = max(longest(one, budget, batch, element, ring=ring) for one in known)
    got = f"{_size(need)} for {tokens} tokens"
    fix = f"the longest here is {most}; or try segment or offload='disk'"
    raise ContextTooLongError("memory of a training step", expected=f"at most {_size(budget)}", got=got, fix=fix)


def available(device: torch.device) -> int:
    """Bytes that this process may still take: of the device, or of the machine and of the group it is confined to.

    Processes that torchrun starts on one machine share its memory alike.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * (1 - _SPARE))
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return int(free * (1 - _SPARE)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
