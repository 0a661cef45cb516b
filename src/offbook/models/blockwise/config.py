"""What a backbone is, and how its memory is spent."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from offbook.errors import ConfigError, nearest
from offbook.models.blockwise.positions import RopeLayout, RopeStretch


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A stack of pre-norm transformer layers.

    Attributes:
        dim: size d of a token.
        layers: how many.
        heads: of the queries.
        kv_heads: of keys and values, a divisor of `heads`; None for as many.
        head_dim: size of a head; None for `dim / heads`.
        ffn: feedforward: `"gelu"`, `"gelu_tanh"` (its approximation, the paper's and GPT-2's) or gated `"swiglu"`.
        ffn_dim: its width; None for 4 times `dim`.
        norm: LayerNorm, or RMSNorm.
        norm_eps: added to variances.
        bias: which linear maps have one: the feedforward's (the paper's choice), all, or none.
        residual: attention, then feedforward; or `"parallel"`, both from the same input, as in GPT-J and GPT-NeoX.
        positions: rotary, a learned table, or none.
        max_positions: rows of the learned table.
        rope_dim: numbers of a head that are rotated, even; None for all.
        rope_base: see `positions.rope_tables`.
        rope_stretch: likewise.
        rope_layout: see `positions.rotate`.
        dropout: share of the numbers dropped from the input and from both residual branches.
        attention_dropout: share of the attention probabilities dropped.
        cond_dim: size of the vectors that condition each layer; None for none.
        remat: what is computed again in the backward pass instead of being kept, from nothing (the fastest, and the
            most memory) over the feedforward (`"ffn"`), and all but the layer's input and its attention's output
            (`"attn"`), to all but the layer's input (`"layer"`). `"auto"`: the first of them that fits.
        segment: layers of which only the first one's input is kept; 1 keeps each one's, and a number near the root of
            `layers` takes the least memory for one more forward pass. For `"attn"` and `"layer"`.
        offload: where kept inputs of layers wait for the backward pass: where they are, in the processor's memory, or
            in a scratch file.
        block_q: queries that attend at a time.
        block_k: keys that are looked at at a time.
        block_ffn: tokens that go through the feedforward at a time.

    Raises:
        ConfigError: a value is out of its range.

    Source: Liu and Abbeel, "Blockwise Parallel Transformer for Large Context Models" (2023), section 3, and the
    authors' settings; conditioning as in Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023).
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu_tanh"
    ffn_dim: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    bias: Literal["ffn", "all", "none"] = "ffn"
    residual: Literal["sequential", "parallel"] = "sequential"
    positions: Literal["rope", "learned", "none"] = "rope"
    max_positions: int = 1024
    rope_dim: int | None = None
    rope_base: float = 10_000.0
    rope_stretch: RopeStretch | None = None
    rope_layout: RopeLayout = "half"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    cond_dim: int | None = None
    remat: Literal["auto", "none", "ffn", "attn", "layer"] = "auto"
    segment: int = 1
    offload: Literal["none", "cpu", "disk"] = "none"
    block_q: int = 1024
    block_k: int = 2048
    block_ffn: int = 512

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            value, choices = getattr(self, entry.name), get_args(hints[entry.name])
            if isinstance(value, str) and value not in choices:
                fix = nearest(value, choices)
                raise ConfigError(entry.name, expected=" or ".join(choices), got=repr(value), fix=fix)
            if isinstance(value, int) and value < 1 and "float" not in str(entry.type):
                raise ConfigError(entry.name, expected="1 or more", got=str(value), fix="choose a positive number")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                got = str(getattr(self, name))
                raise ConfigError(name, expected="a share from 0 to below 1", got=got, fix="choose a smaller one")
        if self.head_dim is None and self.dim % self.heads:
            got, fix = f"{self.dim} and {self.heads}", "change one of them, or set head_dim"
            raise ConfigError("dim and heads", expected="a multiple, and its divisor", got=got, fix=fix)
        if self.heads % self.key_heads:
            got = f"{self.heads} and {self.kv_heads}"
            raise ConfigError("heads and kv_heads", expected="a multiple, and its divisor", got=got, fix="change one")
        if self.positions == "rope" and (self.rotated % 2 or self.rotated > self.head_size):
            expected = f"an even number up to {self.head_size}, the size of a head"
            raise ConfigError("rope_dim", expected=expected, got=str(self.rotated), fix="set rope_dim")

    @property
    def head_size(self) -> int:
        """Numbers of a head."""
        return self.head_dim or self.dim // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def hidden(self) -> int:
        """Width of the feedforward."""
        return self.ffn_dim or 4 * self.dim

    @property
    def rotated(self) -> int:
        """Numbers of a head that rotary embedding turns."""
        return self.rope_dim or self.head_size
