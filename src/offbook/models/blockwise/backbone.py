"""A stack of blockwise layers: the transformer under every sequence model here."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from offbook.errors import ConfigError
from offbook.models.blockwise.config import BackboneConfig
from offbook.models.blockwise.dropout import dropped
from offbook.models.blockwise.layer import BlockwiseLayer, Pass, make_norm
from offbook.models.blockwise.masks import Mask
from offbook.models.blockwise.positions import rope_tables
from offbook.models.blockwise.remat import through


class Backbone(nn.Module):
    """A transformer from embedded tokens to as many vectors.

    Outputs and gradients are those of an ordinary one, in the memory that `config.remat` leaves it.

    Args:
        config: what it is.

    Example:
        >>> from offbook.models.blockwise.masks import Causal
        >>> net = Backbone(BackboneConfig(dim=32, layers=2, heads=4, remat="layer"))
        >>> net(torch.zeros(1, 100, 32), mask=Causal()).shape
        torch.Size([1, 100, 32])
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(BlockwiseLayer(config, number) for number in range(config.layers))
        self.norm = make_norm(config)
        self.table: nn.Parameter | None = None
        if config.positions == "learned":
            self.table = nn.Parameter(torch.randn(config.max_positions, config.dim) * 0.02)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        mask: Mask,
        positions: Int64[Tensor, "#batch tokens"] | None = None,
        cond: Float[Tensor, "batch _ cond"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Embedded tokens through all layers and a norm.

        Args:
            x: embedded tokens.
            mask: who sees whom.
            positions: of the tokens; 0, 1, 2, ... by default.
            cond: what the layers are conditioned on, for each sample, shape (batch, 1, cond), or for each token.

        Raises:
            ConfigError: shapes, kinds of number or positions are not what the configuration says.
        """
        self._check(x, mask, positions, cond)
        config = self.config
        if positions is None and config.positions != "none":
            positions = torch.arange(x.shape[1], device=x.device)[None]
        if self.table is not None:
            x = x + self.table[positions]
        if (real := mask.real(range(x.shape[1]), x.device)) is not None:
            # What stands in the padding, infinities too, must reach nobody, and 0 times infinity would.
            x = x.masked_fill(~real[..., None], 0.0)
        shared = Pass(mask, self._remat(x), config.offload)
        if positions is not None and config.positions == "rope":
            shared.cos, shared.sin = rope_tables(positions, config.rotated, config.rope_base)
        if self.training and (config.dropout or config.attention_dropout):
            shared.seed = int(torch.randint(2**63 - 1, ()))
            x = dropped(x, shared.seed, config.dropout)
        step = config.segment if shared.remat in ("attn", "layer") else 1
        layers = list(self.layers)
        for first in range(0, len(layers), step):
            run = layers[first : first + step]
            x = through(run, x, shared, cond) if len(run) > 1 else run[0](x, shared, cond)
        out: Tensor = self.norm(x)
        return out

    def _remat(self, x: Tensor) -> str:
        return "layer" if self.config.remat == "auto" else self.config.remat

    def _check(self, x: Tensor, mask: Mask, positions: Tensor | None, cond: Tensor | None) -> None:
        config, fix = self.config, "change the input, or the configuration"
        batch, tokens = x.shape[:2]
        if x.ndim != 3 or x.shape[2] != config.dim or not x.is_floating_point():
            expected = f"floats (batch, tokens, {config.dim})"
            raise ConfigError("input", expected=expected, got=f"{x.dtype} {tuple(x.shape)}", fix=fix)
        mask.check(batch, tokens)
        if positions is not None:
            got = f"{positions.dtype} {tuple(positions.shape)}"
            fits = positions.ndim == 2 and positions.shape[0] in (1, batch) and positions.shape[1] == tokens
            if positions.dtype != torch.int64 or not fits:
                raise ConfigError("positions", expected=f"int64 (batch or 1, {tokens})", got=got, fix=fix)
        if config.positions == "learned" and tokens:
            last = tokens - 1 if positions is None else int(positions.max())
            if last >= config.max_positions or (positions is not None and int(positions.min()) < 0):
                expected = f"0 to {config.max_positions - 1}, the rows of the learned table"
                raise ConfigError("positions", expected=expected, got=f"up to {last}", fix=fix)
        if (cond is None) != (config.cond_dim is None):
            got = "none" if cond is None else "one"
            expected = "none" if config.cond_dim is None else f"one of size {config.cond_dim}"
            raise ConfigError("conditioning", expected=expected, got=got, fix=fix)
        if cond is not None and (cond.ndim != 3 or cond.shape[0] != batch or cond.shape[1] not in (1, tokens)):
            expected = f"({batch}, 1 or {tokens}, {config.cond_dim})"
            raise ConfigError("conditioning", expected=expected, got=f"{tuple(cond.shape)}", fix=fix)
