"""A stack of blockwise layers: the transformer under every sequence model here."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from offbook.errors import ConfigError, DataError
from offbook.models.blockwise.cache import Extension, KVCache, Lengths
from offbook.models.blockwise.config import BackboneConfig
from offbook.models.blockwise.dropout import dropped
from offbook.models.blockwise.layer import BlockwiseLayer, Pass, make_norm
from offbook.models.blockwise.masks import Mask
from offbook.models.blockwise.plan import available, choose
from offbook.models.blockwise.positions import rope_tables, turns
from offbook.models.blockwise.remat import part, through
from offbook.models.blockwise.ring import Arrival, Ring
from offbook.models.blockwise.sequence import Place, Whole

if TYPE_CHECKING:
    from offbook.models.blockwise.hf import LanguageModel


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
        self._chosen: dict[tuple[int, int, bool], str] = {}
        self.layers = nn.ModuleList(BlockwiseLayer(config, number) for number in range(config.layers))
        self.norm = make_norm(config)
        self.table: nn.Parameter | None = None
        if config.positions == "learned":
            self.table = nn.Parameter(torch.randn(config.max_positions, config.dim) * 0.02)

    @staticmethod
    def from_hf(
        path: Path | str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **settings: Any,
    ) -> LanguageModel:
        """A language model from a local folder in the layout of GPT-2, GPT-NeoX or Llama; see `hf.load`."""
        from offbook.models.blockwise.hf import load

        return load(path, dtype=dtype, device=device, **settings)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        mask: Mask,
        positions: Int64[Tensor, "#batch tokens"] | None = None,
        cond: Float[Tensor, "batch _ cond"] | None = None,
        ring: Ring | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Embedded tokens through all layers and a norm.

        Args:
            x: embedded tokens.
            mask: who sees whom.
            positions: of the tokens; 0, 1, 2, ... by default.
            cond: what the layers are conditioned on, for each sample, shape (batch, 1, cond), or for each token.
            ring: over which the sequence is spread; the tokens at hand are then this process's. For layers that compute
                again: `remat` `"attn"`, `"layer"`, or `"auto"`, which then chooses between them.

        Raises:
            ConfigError: shapes, kinds of number or positions are not what the configuration says, or, in a ring, not
                what those of other processes are.
            RingError: another process of the ring is gone or late, in this pass or the backward pass.
            DataError: under `torch.autograd.set_detect_anomaly(True)`, a layer gives infinity or no number; otherwise
                such propagate.
        """
        config = self.config
        place: Place = Whole()
        if ring is None:
            self._check(x, positions, cond)
            tokens, remat, seed = x.shape[1], self._remat(x), self._seed()
        else:
            arrive = functools.partial(self._arrival, x, mask, positions, cond)
            place = share = ring.share(arrive, config.block_k, x.device)
            tokens, remat, seed = share.tokens, share.remat, share.seed
        self._check_whole(x.shape[0], tokens, mask, positions)
        indices = place.indices(range(x.shape[1]), x.device)
        if positions is None and config.positions != "none":
            positions = indices[None]
        if self.table is not None:
            x = x + self.table[positions]
        if (real := mask.real(range(tokens), x.device)) is not None:
            real = real[:, indices, None]
            # What stands in the padding, infinities too, must reach nobody, and 0 times infinity would.
            x = x.masked_fill(~real, 0.0)
            if cond is not None and cond.shape[1] == x.shape[1]:
                cond = cond.masked_fill(~real, 0.0)
        shared = Pass(mask, remat, config.offload, seed=seed, place=place)
        if positions is not None and config.positions == "rope":
            tables = rope_tables(positions, config.rotated, config.rope_base, config.rope_stretch)
            if x.shape[1] <= config.block_q:
                shared.turns = turns(*tables, config.rope_layout)
            else:
                shared.cos, shared.sin = tables
        if seed is not None:
            x = dropped(x, seed, config.dropout, indices)
        out: Tensor = self.norm(self._run(x, shared, cond))
        return out

    def _run(self, x: Tensor, shared: Pass, cond: Tensor | None) -> Tensor:
        """Through all layers, as many at a time as go without keeping what is between them."""
        step = self.config.segment if shared.remat in ("attn", "layer") else 1
        layers, indices = list(self.layers), shared.place.indices(range(x.shape[1]), x.device)
        if torch.is_anomaly_enabled():
            _check_finite(x, indices, "input")
        for first in range(0, len(layers), step):
            run = layers[first : first + step]
            x = through(run, x, shared, cond) if len(run) > 1 else run[0](x, shared, cond)
            if torch.is_anomaly_enabled():
                names = f"layer {first}" if len(run) == 1 else f"layers {first} to {first + len(run) - 1}"
                _check_finite(x, indices, f"output of {names}")
        return x

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache for so many samples, and so many tokens of each, in the type and place of the weights."""
        config, weight = self.config, next(self.parameters())
        sizes = (config.layers, batch, max_len, config.key_heads, config.head_size)
        return KVCache(*sizes, dtype=weight.dtype, device=weight.device)

    def prefill(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        cache: KVCache,
        mask: Mask | None = None,
        lengths: Lengths | None = None,
        cond: Float[Tensor, "batch _ cond"] | None = None,
        chunk: int = 2048,
    ) -> tuple[Float[Tensor, "batch tokens dim"], KVCache]:
        """The output for new tokens, which see those in a cache and join them.

        It is what `forward` gives for them in the whole sequence. Samples may get different numbers of tokens, with
        padding behind; each goes on from its own end.

        Args:
            x: embedded tokens.
            cache: where their keys and values go, of `new_cache`.
            mask: who sees whom, in later calls too; `Causal()` by default. It is decided when the cache is empty.
            lengths: real tokens of each sample, the first ones; all by default.
            cond: what the layers are conditioned on, as in `forward`.
            chunk: tokens that are computed at a time.

        Returns:
            The output, 0 for padding; and the cache.

        Raises:
            CacheFullError: there are more tokens than the cache has room for.
            ConfigError: shapes that do not fit; a mask under which an earlier token would see a new one; training, for
                which a cache keeps no gradients. The cache is as it was, like after any error.
        """
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            got, fix = "training", "call eval(), and this under torch.no_grad(); or use the forward pass"
            raise ConfigError("cache", expected="inference", got=got, fix=fix)
        if chunk < 1:
            raise ConfigError("chunk", expected="1 or more tokens", got=str(chunk), fix="choose a positive number")
        self._check(x, None, cond)
        self._check_whole(x.shape[0], x.shape[1], mask or cache.mask, None)
        cache.check(x.shape[0], self.config.layers, self.config.key_heads, self.config.head_size, x.device)
        new = cache.append(x.shape[1], lengths, mask)
        with torch.no_grad():
            return self._extended(x, new, cond, chunk), cache

    def step(
        self,
        x: Float[Tensor, "batch tokens dim"],
        cache: KVCache,
        *,
        cond: Float[Tensor, "batch _ cond"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The output for each sample's next token, or next few; see `prefill`.

        Example:
            >>> net = Backbone(BackboneConfig(dim=32, layers=2, heads=4)).eval()
            >>> cache = net.new_cache(batch=1, max_len=100)
            >>> prompt, token = torch.zeros(1, 10, 32), torch.zeros(1, 1, 32)
            >>> h, cache = net.prefill(prompt, cache=cache)
            >>> net.step(token, cache).shape, cache.lengths
            (torch.Size([1, 1, 32]), (11,))
        """
        return self.prefill(x, cache=cache, cond=cond)[0]

    def _extended(self, x: Tensor, new: Extension, cond: Tensor | None, chunk: int) -> Tensor:
        tokens, config = x.shape[1], self.config
        if new.tokens < tokens:  # all that is left out is padding
            x, cond = part(x, range(new.tokens)), part(cond, range(new.tokens))
        if self.table is not None:
            if new.stop > config.max_positions:
                expected = f"0 to {config.max_positions - 1}, the rows of the learned table"
                raise ConfigError("positions", expected=expected, got=f"up to {new.stop - 1}", fix="use fewer tokens")
            x = x + new.rows(self.table[None])
        if (real := new.real()) is not None:
            x = x.masked_fill(~real, 0.0)
        shared = Pass(new.mask, "none")
        if config.positions == "rope":
            own, other = new.cache.turns(config.rotated, config.rope_base, config.rope_stretch, config.rope_layout)
            shared.turns = new.rows(own)[:, None], new.rows(other)[:, None]
        if new.tokens:
            chunk = new.chunk(chunk)
            for new.layer, layer in enumerate(self.layers):
                x = layer.extended(x, shared, cond, new, chunk)  # type: ignore[operator]
        out: Tensor = self.norm(x)
        new.commit()
        if real is not None:
            out = out.masked_fill(~real, 0.0)
        return out if new.tokens == tokens else functional.pad(out, (0, 0, 0, tokens - new.tokens))

    def _arrival(self, x: Tensor, mask: Mask, positions: Tensor | None, cond: Tensor | None) -> Arrival:
        """What this process comes to a ring with."""
        self._check(x, positions, cond)
        if self.config.remat in ("none", "ffn"):
            expected, fix = "attn, layer or auto, which compute by blocks, as a ring does", "set remat='attn'"
            raise ConfigError("remat", expected=expected, got=repr(self.config.remat), fix=fix)
        kind = x.device.type
        settings = {
            "numbers": x.dtype,
            "device": kind,
            "mixed precision": torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            "training": self.training,
            "gradients": torch.is_grad_enabled(),
            "mask": type(mask).__name__,
            **asdict(self.config),
        }
        return Arrival(tuple(x.shape), settings, self._remat(x, ring=True), self._seed())

    def _seed(self) -> int | None:
        """Of the next pass's dropout; None where nothing is dropped."""
        dropping = self.training and (self.config.dropout or self.config.attention_dropout)
        return int(torch.randint(2**63 - 1, ())) if dropping else None

    def _remat(self, x: Tensor, ring: bool = False) -> str:
        if self.config.remat != "auto":
            return self.config.remat
        batch, tokens = x.shape[:2]
        if not torch.is_grad_enabled():
            return "none" if tokens <= self.config.block_q and not ring else "layer"
        # What is left of the memory is asked once for each size of input, since asking takes longer than a small step.
        if (batch, tokens, ring) not in self._chosen:
            size, budget, config = x.element_size(), available(x.device), self.config
            if config.offload == x.device.type == "cpu":  # what is there already goes nowhere
                config = replace(config, offload="none")
            self._chosen[batch, tokens, ring] = choose(config, tokens, batch, size, budget=budget, ring=ring)
        return self._chosen[batch, tokens, ring]

    def _check_whole(self, batch: int, tokens: int, mask: Mask, positions: Tensor | None) -> None:
        """Checks what goes by the whole sequence."""
        mask.check(batch, tokens)
        if positions is None and tokens:
            self._check_positions(0, tokens - 1)

    def _check_positions(self, lowest: int, last: int) -> None:
        if self.config.positions == "learned" and (last >= self.config.max_positions or lowest < 0):
            expected = f"0 to {self.config.max_positions - 1}, the rows of the learned table"
            fix = "change the input, or the configuration"
            raise ConfigError("positions", expected=expected, got=f"{lowest} to {last}", fix=fix)

    def _check(self, x: Tensor, positions: Tensor | None, cond: Tensor | None) -> None:
        config, fix = self.config, "change the input, or the configuration"
        if x.ndim != 3 or x.shape[2] != config.dim or not x.is_floating_point():
            expected = f"floats (batch, tokens, {config.dim})"
            raise ConfigError("input", expected=expected, got=f"{x.dtype} {tuple(x.shape)}", fix=fix)
        batch, tokens = x.shape[:2]
        if positions is not None:
            got = f"{positions.dtype} {tuple(positions.shape)} on {positions.device}"
            fits = positions.ndim == 2 and positions.shape[0] in (1, batch) and positions.shape[1] == tokens
            if positions.dtype != torch.int64 or not fits or positions.device != x.device:
                expected = f"int64 (batch or 1, {tokens}) on {x.device}"
                raise ConfigError("positions", expected=expected, got=got, fix=fix)
            if config.positions == "learned" and positions.numel():
                self._check_positions(int(positions.min()), int(positions.max()))
        if (cond is None) != (config.cond_dim is None):
            got = "none" if cond is None else "one"
            expected = "none" if config.cond_dim is None else f"one of size {config.cond_dim}"
            raise ConfigError("conditioning", expected=expected, got=got, fix=fix)
        if cond is not None and cond.shape not in [(batch, number, config.cond_dim) for number in (1, tokens)]:
            expected = f"({batch}, 1 or {tokens}, {config.cond_dim})"
            raise ConfigError("conditioning", expected=expected, got=f"{tuple(cond.shape)}", fix=fix)


def _check_finite(x: Tensor, indices: Tensor, where: str) -> None:
    if x.isfinite().all():
        return
    # The first in time, not the first of the first sample.
    token, sample, number = (~x.isfinite()).transpose(0, 1).nonzero()[0].tolist()
    got = f"{x[sample, token, number].item()} at token {int(indices[token])} of sample {sample}"
    raise DataError(where, expected="finite numbers", got=got, fix="look at what comes before it")
