"""An audit of the outputs and gradients: random backbones against an ordinary transformer written from the equations.

The reference computes all scores at once, in plain tensor operations and automatic differentiation, and shares no code
with what it judges but the random bits of dropout. It always computes in float64, from the same weights: so the error
of float32 is that of float32 alone, and it stands beside the error that the reference itself has in float32.

The error of a tensor, of the output or of one gradient, is its largest difference from the reference as a share of the
reference's largest number there; that of a backbone is the largest of its tensors' errors. Four choices are in it:

- Some gradients are zero by the equations: those of queries and keys where each query sees one key, or that of the
  keys' bias, which the softmax takes out. What is computed is then the rounding of larger terms, and a share of it
  would say nothing. So no tensor is judged by less than a thousandth of the largest gradient of all. Between zeros and
  that thousandth lies no gradient of the shapes drawn here, so this hides nothing.
- In float64, queries, keys and values are judged each by themselves. In float32, where the rounding of such a zero is
  beyond its limit even so, they are judged as one tensor: a mistake in them is for float64 to find.
- Weights are drawn as for training, and then changed by noise of 0.1: a norm's weight of 1, a bias of 0 or a modulation
  of 0 would hide mistakes.
- No loss looks at padding. There a norm divides zeros by the root of `norm_eps`, and so makes the rounding of float32
  300 times as large, in any implementation. That nothing comes back from padding is judged all the same.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from offbook.models.blockwise.backbone import Backbone
from offbook.models.blockwise.config import BackboneConfig
from offbook.models.blockwise.dropout import kept
from offbook.models.blockwise.masks import (
    Causal,
    FrameCausal,
    Full,
    KeyPadding,
    Mask,
    Prefix,
    Segments,
    TokenTypes,
    Where,
    Window,
)

LIMITS = {torch.float32: 2e-6, torch.float64: 1e-11}
# Of the largest gradient: a tensor's error is never a share of less than that.
_FLOOR = 1e-3


@dataclass(frozen=True)
class Result:
    """How one random backbone did.

    Attributes:
        case: what it was, in words.
        dtype: in which it computed.
        error: largest of |g - r| / max |r| over the output and all gradients g, with r the reference in float64; see
            above for gradients that are zero.
        tensor: where that was.
        plain: the error of the reference in the same kind of number.
        limit: what the error may be.
    """

    case: str
    dtype: torch.dtype
    error: float
    tensor: str
    plain: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit; no number is not."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Visible:
    """A mask, and what it means, pair by pair.

    Attributes:
        mask: the one to be judged.
        pairs: which keys a query sees, shape (batch, tokens, tokens).
        real: which tokens are no padding, shape (batch, tokens).
        words: its name.
    """

    mask: Mask
    pairs: Tensor
    real: Tensor
    words: str


def audit(
    shapes: int = 200,
    seed: int = 0,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    device: str = "cpu",
) -> Iterator[Result]:
    """Compares random backbones with the reference.

    Args:
        shapes: how many.
        seed: of their choice.
        dtypes: in which each computes.
        device: on which.

    Yields:
        A result for each shape and dtype.

    Example:
        >>> all(result.ok for result in audit(shapes=2))
        True
    """
    for number in range(shapes):
        rng = random.Random(f"{seed} {number}")
        tokens = rng.choice([1, 2] + 6 * [rng.randint(3, 150)])
        config, visible = _config(rng), random_mask(rng, rng.randint(1, 3), tokens)
        for dtype in dtypes:
            yield _compared(config, visible, dtype, device, rng.getrandbits(31))


def reference(
    config: BackboneConfig,
    weights: Mapping[str, Tensor],
    x: Float[Tensor, "batch tokens dim"],
    visible: Bool[Tensor, "#batch tokens tokens"],
    *,
    positions: Int64[Tensor, "#batch tokens"] | None = None,
    cond: Float[Tensor, "batch _ cond"] | None = None,
    real: Bool[Tensor, "#batch tokens"] | None = None,
    seed: int | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """What a backbone gives, by the equations.

    Args:
        config: what it is; blocks and what is kept do not matter.
        weights: by the names of its parameters.
        x: its input.
        visible: which keys a query sees.
        positions: of the tokens; 0, 1, 2, ... by default.
        cond: what it is conditioned on.
        real: which tokens are no padding; the others are made 0.
        seed: of dropout; None for none.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3, with norms before the branches.
    """
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)[None]
    if "table" in weights:
        x = x + weights["table"][positions]
    if real is not None:
        x = torch.where(real[..., None], x, 0)
    x = _drop(x, config.dropout, seed, -1)
    for number in range(config.layers):
        own = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"layers.{number}.")}
        m: Sequence[Tensor] = [x.new_zeros(1)] * 2 + [x.new_ones(1)] + [x.new_zeros(1)] * 2 + [x.new_ones(1)]
        if cond is not None:
            m = _linear(own, "modulation", cond * torch.sigmoid(cond)).chunk(6, -1)
        normed = _norm(config, own, "norm1", x) * (1 + m[1]) + m[0]
        h = x + m[2] * _drop(_attended(config, own, normed, visible, positions, seed, number), config.dropout, seed,
                             3 * number + 1)  # fmt: skip
        normed = _norm(config, own, "norm2", x if config.residual == "parallel" else h) * (1 + m[4]) + m[3]
        x = h + m[5] * _drop(_feedforward(config, own, normed), config.dropout, seed, 3 * number + 2)
    return _norm(config, weights, "norm", x)


def dense_attention(
    q: Float[Tensor, "B Q H E"],
    k: Float[Tensor, "B K G E"],
    v: Float[Tensor, "B K G E"],
    visible: Bool[Tensor, "#B #Q K"],
    factors: Float[Tensor, "B H Q K"] | None = None,
) -> tuple[Float[Tensor, "B Q H E"], Float[Tensor, "B H Q"]]:
    """Softmax attention with all scores at once, and the log of the sum of their exponentials.

    Args:
        q: queries.
        k: keys; head h of the queries looks at head h * G // H.
        v: values.
        visible: which keys a query sees; with none, its output is 0.
        factors: what dropout multiplies the probabilities by.
    """
    k, v = (x[:, :, torch.arange(q.shape[2], device=q.device) * x.shape[2] // q.shape[2]] for x in (k, v))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1])
    top = scores.detach().masked_fill(~visible[:, None], -math.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    exponentials = torch.where(visible[:, None], (scores - top).clamp(max=0).exp(), 0)
    total = exponentials.sum(-1, keepdim=True)
    probabilities = exponentials / torch.where(total > 0, total, 1)
    out = torch.einsum("bhqk,bkhe->bqhe", probabilities if factors is None else probabilities * factors, v)
    return out, (top + total.log())[..., 0]


def _attended(
    config: BackboneConfig,
    own: Mapping[str, Tensor],
    normed: Tensor,
    visible: Tensor,
    positions: Tensor,
    seed: int | None,
    number: int,
) -> Tensor:
    split = (*normed.shape[:2], -1, config.head_size)
    q, k, v = _linear(own, "q", normed).view(split), *_linear(own, "kv", normed).chunk(2, -1)
    k, v = k.view(split), v.view(split)
    if config.positions == "rope":
        q, k = (_rotated(config, x, positions) for x in (q, k))
    factors = None
    if seed is not None and config.attention_dropout:
        b, h, i, j = (torch.arange(n, device=q.device) for n in (len(q), q.shape[2], q.shape[1], k.shape[1]))
        bits = kept(_site(seed, 3 * number), config.attention_dropout, b[:, None, None, None], h[:, None, None],
                    i[:, None], j)  # fmt: skip
        factors = torch.where(bits, 1 / (1 - config.attention_dropout), 0.0).to(q.dtype)
    return _linear(own, "out", dense_attention(q, k, v, visible, factors)[0].flatten(2))


def _feedforward(config: BackboneConfig, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    u = _linear(own, "up", x)
    if config.ffn == "swiglu":
        gate, value = u.chunk(2, -1)
        hidden = gate * torch.sigmoid(gate) * value
    elif config.ffn == "gelu":
        hidden = u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))
    else:
        hidden = u * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return _linear(own, "down", hidden)


def _rotated(config: BackboneConfig, x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding as a product of complex numbers; sine and cosine are float32, as documented."""
    size = config.rotated
    shares = torch.arange(0, size, 2, dtype=torch.float64, device=x.device) / size
    angles = positions[..., None] / config.rope_base**shares
    turns = torch.complex(*(part.float().to(x.dtype) for part in (angles.cos(), angles.sin())))[:, :, None]
    turned, rest = x[..., :size], x[..., size:]
    halves = config.rope_layout == "half"
    shape = (*turned.shape[:-1], 2, -1) if halves else (*turned.shape[:-1], -1, 2)
    pairs = turned.reshape(shape).mT if halves else turned.reshape(shape)
    spun = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    return torch.cat([(spun.mT if halves else spun).flatten(-2), rest], -1)


def _norm(config: BackboneConfig, own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    if config.norm == "rms":
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * own[f"{name}.weight"]
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return x * own[f"{name}.weight"] + own[f"{name}.bias"]


def _linear(own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    product = x @ own[f"{name}.weight"].T
    return product + own[f"{name}.bias"] if f"{name}.bias" in own else product


def _drop(x: Tensor, rate: float, seed: int | None, site: int) -> Tensor:
    if seed is None or not rate:
        return x
    b, t, e = (torch.arange(n, device=x.device) for n in x.shape)
    return torch.where(kept(_site(seed, site), rate, b[:, None, None], t[:, None], e), x / (1 - rate), 0)


def _site(seed: int, site: int) -> int:
    """Seed of one use of dropout: -1 for the input, then three in each layer."""
    return (seed + (site + 1) * 0x9E3779B97F4A7C15) % 2**63


def _compared(config: BackboneConfig, visible: Visible, dtype: torch.dtype, device: str, seed: int) -> Result:
    """Runs one backbone forward and backward, and the reference twice."""
    batch, tokens = visible.real.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Backbone(config).to(device, dtype)
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        x = torch.randn(batch, tokens, config.dim, dtype=dtype).to(device)
        conds = random.Random(seed).choice([1, tokens])
        cond = None if config.cond_dim is None else torch.randn(batch, conds, config.cond_dim, dtype=dtype).to(device)
        positions = torch.randint(config.max_positions, (random.Random(seed).choice([1, batch]), tokens)).to(device)
        pull = (torch.randn(batch, tokens, config.dim, dtype=dtype) * visible.real[..., None]).to(device)
        state = torch.get_rng_state()
        drop = int(torch.randint(2**63 - 1, ())) if config.dropout or config.attention_dropout else None

        def found(wide: torch.dtype, run: Callable[..., Tensor]) -> dict[str, Tensor]:
            given = {"x": x, **({} if cond is None else {"cond": cond}), **dict(net.named_parameters())}
            leaves = {name: leaf.detach().to(wide).requires_grad_() for name, leaf in given.items()}
            out = run(leaves)
            grads = torch.autograd.grad(out, list(leaves.values()), pull.to(wide), allow_unused=True)
            zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
            pairs = zip(leaves, grads, zeros, strict=True)
            return {"output": out.detach() * (pull != 0), **{k: z if g is None else g for k, g, z in pairs}}

        def ours(leaves: dict[str, Tensor]) -> Tensor:
            torch.set_rng_state(state)
            leaves.update(net.named_parameters())
            out: Tensor = net(leaves["x"], mask=visible.mask, positions=positions, cond=leaves.get("cond"))
            return out

        def plain(leaves: dict[str, Tensor]) -> Tensor:
            pairs, real = visible.pairs.to(device), visible.real.to(device)
            return reference(config, leaves, leaves["x"], pairs, positions=positions, cond=leaves.get("cond"),
                             real=real, seed=drop)  # fmt: skip

        truth = found(torch.float64, plain)
        error, tensor = _error(found(dtype, ours), truth, dtype)
        beside = _error(found(dtype, plain), truth, dtype)[0]
    words = f"batch {batch}, tokens {tokens}, {visible.words}, {_words(config)}"
    return Result(words, dtype, error, tensor, beside, LIMITS[dtype])


def _error(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[float, str]:
    """The largest error of all tensors, and where it is."""
    found, truth = _parted(found), _parted(truth)
    scales: dict[str, float] = {}
    for name, want in truth.items():
        scales[_whole(name, dtype)] = max(float(want.abs().max()), scales.get(_whole(name, dtype), 0.0))
    floor = max(_FLOOR * max(scale for name, scale in scales.items() if name != "output"), 1e-300)
    errors = []
    for name, want in truth.items():
        off = float((found[name].double() - want).abs().max())
        errors.append((off / max(scales[_whole(name, dtype)], floor), name))
    # No number is the largest error of all.
    return max(errors, key=lambda pair: (math.isnan(pair[0]), pair[0]))


def _parted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, with the projection to keys and values as two."""
    parted = {}
    for name, tensor in tensors.items():
        parts = zip(("k", "v"), tensor.chunk(2), strict=True) if ".kv." in name else [("", tensor)]
        parted.update({name.replace(".kv.", f".{part}."): value for part, value in parts})
    return parted


def _whole(name: str, dtype: torch.dtype) -> str:
    """The tensor by whose largest number another one is judged."""
    return re.sub(r"\.[qkv]\.", ".qkv.", name) if dtype != torch.float64 else name


def _config(rng: random.Random) -> BackboneConfig:
    heads, layers = rng.choice([1, 2, 4]), rng.randint(1, 3)
    head_dim = rng.choice([None, 6, 8])
    dim = rng.choice([16, 32])
    dropout = rng.random() < 0.4
    size = head_dim or dim // heads
    return BackboneConfig(
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=rng.choice([n for n in (1, 2, 4) if heads % n == 0]),
        head_dim=head_dim,
        ffn=rng.choice(["gelu", "gelu_tanh", "swiglu"]),
        ffn_dim=rng.choice([None, 40]),
        norm=rng.choice(["layer", "rms"]),
        bias=rng.choice(["ffn", "all", "none"]),
        residual=rng.choice(["sequential", "parallel"]),
        positions=rng.choice(["rope", "rope", "learned", "none"]),
        max_positions=200,
        rope_dim=rng.choice([None, 2 * rng.randint(1, size // 2)]),
        rope_layout=rng.choice(["half", "pairs"]),
        dropout=0.1 * dropout,
        attention_dropout=rng.choice([0.0, 0.2]) * dropout,
        cond_dim=rng.choice([None, 5]),
        remat=rng.choice(["none", "ffn", "attn", "attn", "layer", "layer"]),
        segment=rng.randint(1, layers),
        offload=rng.choice(["none", "disk"]),
        block_q=rng.randint(7, 160),
        block_k=rng.randint(7, 160),
        block_ffn=rng.randint(7, 160),
    )


def _words(config: BackboneConfig) -> str:
    names = ("dim", "layers", "heads", "kv_heads", "head_dim", "ffn", "norm", "bias", "residual", "positions",
             "rope_dim", "rope_layout", "dropout", "attention_dropout", "cond_dim", "remat", "segment", "offload",
             "block_q", "block_k", "block_ffn")  # fmt: skip
    return ", ".join(f"{name} {getattr(config, name)}" for name in names)


def random_mask(rng: random.Random, batch: int, tokens: int) -> Visible:
    """A random mask, or two that are combined."""
    one = _simple(rng, batch, tokens)
    if rng.random() < 0.4:
        return one
    other = _simple(rng, batch, tokens)
    if rng.random() < 0.7:
        real, pairs = one.real & other.real, one.pairs & other.pairs
        return Visible(one.mask & other.mask, pairs, real, f"{one.words} & {other.words}")
    # Of either of two masks none can say what is padding.
    pairs = one.pairs | other.pairs
    return Visible(one.mask | other.mask, pairs, torch.ones_like(one.real), f"{one.words} | {other.words}")


def _simple(rng: random.Random, batch: int, tokens: int) -> Visible:
    torch_rng = torch.Generator().manual_seed(rng.getrandbits(31))
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    n = rng.randint(1, tokens)
    lengths = torch.randint(tokens + 1, (batch,), generator=torch_rng)
    some = torch.rand(batch, tokens, generator=torch_rng) < 0.7
    types = torch.randint(3, (batch, tokens), generator=torch_rng)
    ids = types.sort(1)[0]
    allow = torch.rand(3, 3, generator=torch_rng) < 0.6
    mask: Mask
    mask, pairs = rng.choice([
        (Full(), (i >= 0) & (j >= 0)),
        (Causal(), i >= j),
        (Causal(), i >= j),
        (Window(n), (i - n < j) & (j < i + n)),
        (FrameCausal(n), (i // n + 1) * n > j),
        (Prefix(n), (i >= 0) & (j < n)),
        (Segments(ids[0]), ids[0, :, None] == ids[0]),
        (Segments(ids), ids[:, :, None] == ids[:, None]),
        (TokenTypes(types, allow), torch.einsum("bit,tu,bju->bij", *(
            y.float() for y in (torch.eye(3)[types], allow, torch.eye(3)[types]))) > 0),
        (Where(lambda i, j: (i * j) % 3 != 1), (i * j) % 3 != 1),
        (KeyPadding(lengths), (j < lengths[:, None, None]).expand(-1, tokens, -1)),
        (KeyPadding(some), some[:, None].expand(-1, tokens, -1)),
    ])  # fmt: skip
    pairs = (pairs if pairs.ndim == 3 else pairs[None]).expand(batch, -1, -1)
    real = pairs[:, 0] if isinstance(mask, KeyPadding) else torch.ones(batch, tokens, dtype=torch.bool)
    return Visible(mask, pairs, real, type(mask).__name__)
