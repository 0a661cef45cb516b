"""One pre-norm transformer layer that computes block by block, and again in the backward pass.

With n1, n2 the norms, h = x + W_o attention(W_q n1(x), W_k n1(x), W_v n1(x)) and y = h + F(n2(h)). As soon as a block
of queries has attended, the rest of the layer is computed for that block alone, and everything but its y is dropped.
The backward pass, written by hand below, computes each block again. So what lives at a time is the layer's input, keys
and values with their gradients, and one block.

Source: Liu and Abbeel, "Blockwise Parallel Transformer for Large Context Models" (2023), section 3, algorithm 1. The
paper leaves the backward pass to automatic differentiation of rematerialised loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from offbook.models.blockwise.attention import Rule, attend
from offbook.models.blockwise.cache import Extension
from offbook.models.blockwise.config import BackboneConfig
from offbook.models.blockwise.dropout import dropped
from offbook.models.blockwise.masks import Kind, Mask, blocks
from offbook.models.blockwise.norm import LayerNorm
from offbook.models.blockwise.offload import Away
from offbook.models.blockwise.positions import RopeLayout, rotate, turns
from offbook.models.blockwise.remat import part, through
from offbook.models.blockwise.sequence import Place, Whole


@dataclass
class Pass:
    """What all layers of one forward pass have in common.

    Attributes:
        mask: who sees whom.
        remat: see `BackboneConfig`.
        cos: of `rope_tables`, for the tokens at hand; None without rotary positions, and beside `turns`.
        sin: of `rope_tables`.
        turns: of `positions.turns`, for the tokens at hand, where these are few: all layers use it as it is, but it
            takes twice the memory.
        seed: of this pass's dropout; None where nothing is dropped.
        offload: see `BackboneConfig`.
        place: which tokens are at hand.
        away: what the layer before has put away.
    """

    mask: Mask
    remat: str
    offload: str = "none"
    cos: Tensor | None = None
    sin: Tensor | None = None
    turns: tuple[Tensor, Tensor] | None = None
    seed: int | None = None
    place: Place = field(default_factory=Whole)
    away: Sequence[Away] = ()
    _dense: tuple[bool, Tensor | None] | None = None

    def dense(self, tokens: int, device: torch.device) -> tuple[bool, Tensor | None]:
        """Whether all is causal, and otherwise what is visible, shape (#batch, 1, tokens, tokens); made once."""
        if self._dense is None:
            whole = range(tokens)
            kind = self.mask.kind(whole, whole)
            seen = None if kind in (Kind.FULL, Kind.DIAGONAL) else self.mask.visible(whole, whole, device)[:, None]
            self._dense = kind is Kind.DIAGONAL, seen
        return self._dense

    def turned(self, heads: Tensor, tokens: range, layout: RopeLayout) -> Tensor:
        """Queries or keys of a block of tokens, rotated as their positions ask for."""
        if self.turns is not None:
            own, other = self.turns
            if own.shape[2] != len(tokens):
                own, other = (table[:, :, tokens.start : tokens.stop] for table in self.turns)
        elif self.cos is not None and self.sin is not None:
            own, other = turns(part(self.cos, tokens), part(self.sin, tokens), layout)
        else:
            return heads
        return rotate(heads, own, other, layout)


class BlockwiseLayer(nn.Module):
    """A transformer layer.

    Args:
        config: of the backbone that it belongs to.
        number: its place there, from 0; decides what dropout drops.
    """

    def __init__(self, config: BackboneConfig, number: int = 0) -> None:
        super().__init__()
        self.config, self.number = config, number
        dim, size, all_bias, ffn_bias = config.dim, config.head_size, config.bias == "all", config.bias != "none"
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.q = nn.Linear(dim, config.heads * size, bias=all_bias)
        self.kv = nn.Linear(dim, 2 * config.key_heads * size, bias=all_bias)
        self.out = nn.Linear(config.heads * size, dim, bias=all_bias)
        gated = config.ffn == "swiglu"
        self.up = nn.Linear(dim, config.hidden * (2 if gated else 1), bias=ffn_bias)
        self.down = nn.Linear(config.hidden, dim, bias=ffn_bias)
        self.modulation: nn.Linear | None = None
        if config.cond_dim is not None:
            # Zero, so that a layer begins as the identity.
            self.modulation = nn.Linear(config.cond_dim, 6 * dim)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        shared: Pass,
        cond: Float[Tensor, "batch _ cond"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The layer's output.

        Args:
            x: its input.
            shared: what all layers have in common.
            cond: what it is conditioned on, for each sample or each token.

        Raises:
            RuntimeError: a function transform is active, or a second derivative is asked for, and the policy is one
                that computes again by blocks.
        """
        if shared.remat in ("attn", "layer") or not x.numel():
            y: Tensor = through([self], x, shared, cond)
            return y
        tokens, rule, modulations = range(x.shape[1]), self.rule(shared), self._modulations(cond)
        normed = _modulated(self.norm1(x), modulations, 0)
        q, k, v = self._turned(self.q(normed), shared, tokens), *self._projected(normed, shared, tokens)
        if rule.rate:
            # Queries all at once: what is dropped is a function of the indices, but the probabilities are kept.
            o = attend(q, k, v, rule, tokens, tokens)[0]
        else:
            causal, seen = shared.dense(len(tokens), x.device)
            grouped = self.config.key_heads != self.config.heads
            o = functional.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, enable_gqa=grouped)
        if shared.remat == "none":
            return self.rest(x, o, shared, cond, tokens, modulations)
        parts: list[Tensor] = [
            checkpoint(self.rest, part(x, rows), o[:, :, rows.start : rows.stop], shared, part(cond, rows), rows,
                       use_reentrant=False)
            for rows in blocks(tokens, self.config.block_ffn)
        ]  # fmt: skip
        return torch.cat(parts, 1)

    def extended(self, x: Tensor, shared: Pass, cond: Tensor | None, new: Extension, chunk: int) -> Tensor:
        """The layer's output for new tokens whose keys and values go to a cache, `chunk` tokens at a time."""
        tokens = range(x.shape[1])
        if len(tokens) <= chunk:
            modulations = self._modulations(cond)
            normed = _modulated(self.norm1(x), modulations, 0)
            k, v = self.kv(normed).chunk(2, -1)
            # Queries and keys turn together: a single token's time goes into the number of operations.
            turned = self._turned(torch.cat([self.q(normed), k], -1), shared, tokens)
            q, k = turned[:, : self.config.heads], turned[:, self.config.heads :]
            new.write(tokens, k, self._split(v))
            return self.rest(x, new.attend(tokens, q), shared, cond, tokens, modulations)
        for rows in blocks(tokens, chunk):
            new.write(rows, *self.keys_values(part(x, rows), shared, part(cond, rows), rows))
        y = torch.empty_like(x)
        for rows in blocks(tokens, chunk):
            o = new.attend(rows, self.queries(part(x, rows), shared, part(cond, rows), rows))
            y[:, rows.start : rows.stop] = self.rest(part(x, rows), o, shared, part(cond, rows), rows)
        return y

    def rule(self, shared: Pass) -> Rule:
        """How its queries attend."""
        if shared.seed is None:
            return Rule(shared.mask, self.config.block_k)
        return Rule(shared.mask, self.config.block_k, self.config.attention_dropout, self._seed(shared.seed, 0))

    def queries(self, x: Tensor, shared: Pass, cond: Tensor | None, tokens: range) -> Tensor:
        """The queries of a block of tokens, shape (batch, heads, tokens, size)."""
        return self._turned(self.q(_modulated(self.norm1(x), self._modulations(cond), 0)), shared, tokens)

    def keys_values(self, x: Tensor, shared: Pass, cond: Tensor | None, tokens: range) -> tuple[Tensor, Tensor]:
        """The keys and values of a block of tokens, each of shape (batch, heads, tokens, size)."""
        return self._projected(_modulated(self.norm1(x), self._modulations(cond), 0), shared, tokens)

    def rest(
        self,
        x: Tensor,
        o: Tensor,
        shared: Pass,
        cond: Tensor | None,
        tokens: range,
        modulations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The layer's output for a block of tokens, from its input and its attention's output."""
        modulations = modulations or self._modulations(cond)
        attended = self._dropped(self.out(o.transpose(1, 2).flatten(2)), shared, 1, tokens)
        h = x + (attended if modulations is None else modulations[2] * attended)
        normed = _modulated(self.norm2(x if self.config.residual == "parallel" else h), modulations, 3)
        branch = self._dropped(self._feedforward(normed), shared, 2, tokens)
        return h + (branch if modulations is None else modulations[5] * branch)

    def _projected(self, normed: Tensor, shared: Pass, tokens: range) -> tuple[Tensor, Tensor]:
        k, v = self.kv(normed).chunk(2, -1)
        return self._turned(k, shared, tokens), self._split(v)

    def _turned(self, x: Tensor, shared: Pass, tokens: range) -> Tensor:
        return shared.turned(self._split(x), tokens, self.config.rope_layout)

    def _split(self, x: Tensor) -> Tensor:
        size = self.config.head_size
        return x.view(*x.shape[:2], x.shape[2] // size, size).transpose(1, 2)

    def _modulations(self, cond: Tensor | None) -> Sequence[Tensor] | None:
        return None if cond is None or self.modulation is None else self.modulation(functional.silu(cond)).chunk(6, -1)

    def _feedforward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.config.ffn == "swiglu":
            gate, value = up.chunk(2, -1)
            hidden = functional.silu(gate) * value
        else:
            hidden = functional.gelu(up, approximate="tanh" if self.config.ffn == "gelu_tanh" else "none")
        out: Tensor = self.down(hidden)
        return out

    def _dropped(self, x: Tensor, shared: Pass, site: int, tokens: range) -> Tensor:
        if shared.seed is None:
            return x
        indices = shared.place.indices(tokens, x.device)
        return dropped(x, self._seed(shared.seed, site), self.config.dropout, indices)

    def _seed(self, seed: int, site: int) -> int:
        """Of one use of dropout in this layer."""
        return seed + (self.number * 3 + site + 1) * 0x9E3779B97F4A7C15 & (1 << 63) - 1


def make_norm(config: BackboneConfig) -> nn.Module:
    """The kind of norm that a backbone has."""
    norm = LayerNorm if config.norm == "layer" else nn.RMSNorm
    return norm(config.dim, eps=config.norm_eps)


def _modulated(x: Tensor, modulations: Sequence[Tensor] | None, first: int) -> Tensor:
    return x if modulations is None else x * (1 + modulations[first + 1]) + modulations[first]
