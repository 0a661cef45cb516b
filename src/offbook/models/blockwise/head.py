"""The vocabulary head without its logits: loss, log-probabilities and choice of tokens, some rows at a time.

For N tokens of width d and a vocabulary of V, the logits are N × V numbers, and ordinary training holds three such
tensors; the body of a small transformer is far less. Here the rows go through the head in chunks, so that only the
chunk's logits exist:

    s_ij = cap(h_i · w_j + b_j),    cap(x) = softcap · tanh(x / softcap), or x
    lse_i = log Σ_j exp s_ij,    log p(y | h_i) = s_iy − lse_i

Source: Liu & Abbeel, "Blockwise Parallel Transformer for Large Context Models" (2023), and its published code, which
chunks head and loss. We differ where that goes wrong: it joins the chunks' logits before the loss, and averages the
chunks' means, which weighs tokens by how full their chunk is; here no more than a chunk's logits is ever held, and the
global sum is divided by the global count.
"""

import math
import warnings
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from offbook.errors import ConfigError, OffbookError

# A product of few rows reads the whole weight for little work, while beyond some hundred rows only memory grows. A
# smaller vocabulary has more rows in the same room, up to where their inputs would take more of it; GPUs want more.
_ROWS = {"cpu": (64, 1024), "cuda": (64, 16_384)}
_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}


class _Settings(NamedTuple):
    """What the sweep over the chunks needs beside the tensors."""

    chunk: int
    compute: torch.dtype  # of logits and sums: float32, or float64 where an input is
    operand: torch.dtype  # of the factors of the matrix products
    softcap: float | None = None
    smoothing: float = 0.0
    z_loss: float = 0.0


def linear_cross_entropy(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int64[Tensor, "*batch"],
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    ignore_index: int = -100,
    weights: Float[Tensor, "*batch"] | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "..."]:
    """The cross entropy of `hidden @ weight.T + bias` against `targets`, exact, without the N × V logits.

        loss_i = lse_i − (1 − ε) s_iy − (ε / V) Σ_j s_ij + z lse_i²
        mean = Σ_i weights_i loss_i / Σ_i weights_i    over the targets that are not ignored

    Rows that are ignored, or weigh 0, are not computed at all: nothing in them, NaN included, reaches the loss or a
    gradient, and they cost no time. "mean" and "sum" compute the gradients during the forward pass, as Hsu et al.,
    "Liger Kernel: Efficient Triton Kernels for LLM Training" (2024), do: three matrix products instead of four, and
    nothing saved but the gradients themselves. So they allow one `backward()`, and want `torch.no_grad()` where none
    is to come. "none" keeps its inputs and computes each chunk again, as often as it is asked to.

    Args:
        hidden: outputs of the body, [..., d] with at least one axis before the last; half precision is summed in
            float32, and may go with a float32 weight.
        weight: [V, d]; may be the (tied) embedding table.
        targets: ids in 0..V−1, or `ignore_index`.
        bias: added to the logits; None for none.
        ignore_index: the target that does not count.
        weights: of the tokens, without gradient; at least 0 for "mean". None: 1 each.
        reduction: "mean", "sum", or "none" for the loss of each token (0 where ignored).
        label_smoothing: ε, in [0, 1): share of the target spread evenly over the vocabulary.
        z_loss: z, at least 0; keeps lse near 0.
        softcap: bound on the absolute logits, above 0.
        chunk: rows at a time. None: as many as make 16 MiB of logits (128 MiB on a GPU), but 64 to 1024 (16,384).

    Returns:
        A scalar, or [...] for "none"; float32, or float64 where an input is float64. With no target that counts,
        "mean" and "sum" are 0 with zero gradients, and warn.

    Raises:
        ConfigError: a shape, type, device, setting or target that does not fit, with its place and value.
        RuntimeError: in backward: a second derivative, or a second pass through "mean" or "sum", was asked for.

    Example:
        >>> hidden, table = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.eye(2).requires_grad_()
        >>> loss = linear_cross_entropy(hidden, table, torch.tensor([0, -100]))
        >>> loss.backward()
        >>> round(loss.item(), 4), table.grad[:, 0].mul(1e4).round().tolist()
        (0.3133, [-2689.0, 2689.0])
    """
    _check("reduction", reduction, reduction in ("mean", "sum", "none"), "mean, sum or none")
    _check("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "a number in [0, 1)")
    _check("z_loss", z_loss, 0 <= z_loss < math.inf, "a number of at least 0")
    settings = _settings(hidden, weight, bias, softcap, chunk)._replace(smoothing=label_smoothing, z_loss=z_loss)
    counted = _check_targets(targets, hidden, weight, ignore_index)
    scale = torch.ones_like(targets, dtype=settings.compute)
    if weights is not None:
        _check_weights(weights, targets, counted, signed=reduction != "mean")
        counted = counted & (weights != 0)
        scale = weights.to(settings.compute)
    rows = counted.flatten().nonzero().squeeze(1)
    scale = scale.flatten()[rows]
    inputs = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.flatten(), rows)
    if reduction == "none":
        losses = targets.new_zeros(targets.numel(), dtype=settings.compute)
        each = _EachToken.apply(*inputs, settings)  # type: ignore[no-untyped-call]
        return losses.index_put((rows,), scale * each).view_as(targets)
    if not len(rows):
        warnings.warn("linear_cross_entropy: no target counts, the loss is 0", stacklevel=2)
    elif reduction == "mean":
        scale = scale / scale.sum()
    total: Tensor = _Total.apply(  # type: ignore[no-untyped-call]
        *inputs, scale, settings, torch.is_grad_enabled()
    )
    return total


def token_logprobs(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int64[Tensor, "*batch"],
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "*batch"]:
    """The log-probability of each token, s_iy − lse_i, differentiable; each chunk is computed again in backward.

    Args:
        hidden: outputs of the body, [..., d].
        weight: [V, d].
        targets: ids in 0..V−1; none is ignored.
        bias: added to the logits.
        softcap: bound on the absolute logits, above 0.
        chunk: rows at a time, see `linear_cross_entropy`.

    Returns:
        In nats, [...]; float32, or float64 where an input is float64.

    Raises:
        ConfigError: a shape, type, device, setting or target that does not fit, with its place and value.
        RuntimeError: in backward: a second derivative was asked for.

    Source: as for `linear_cross_entropy`.

    Example:
        >>> token_logprobs(torch.zeros(1, 3, 2), torch.eye(2), torch.tensor([[0, 1, 1]])).exp().round(decimals=4)
        tensor([[0.5000, 0.5000, 0.5000]])
    """
    settings = _settings(hidden, weight, bias, softcap, chunk)
    _check_targets(targets, hidden, weight, None)
    rows = torch.arange(targets.numel(), device=targets.device)
    inputs = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.flatten(), rows)
    losses: Tensor = _EachToken.apply(*inputs, settings)  # type: ignore[no-untyped-call]
    return -losses.view_as(targets)


@torch.no_grad()
def argmax(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocabulary width"],
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    chunk: int | None = None,
) -> Int64[Tensor, "*batch"]:
    """The likeliest token of each row; of equals, any one.

    Args:
        hidden: outputs of the body, [..., d].
        weight: [V, d].
        bias: added to the logits.
        chunk: rows at a time, see `linear_cross_entropy`.

    Returns:
        Ids, [...]. No softcap or temperature would change them.

    Raises:
        ConfigError: a shape, type, device or setting that does not fit.

    Source: as for `linear_cross_entropy`.

    Example:
        >>> argmax(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.eye(2)).tolist()
        [1, 0]
    """
    settings = _settings(hidden, weight, bias, None, chunk)
    flat, weight = hidden.reshape(-1, hidden.shape[-1]), weight.to(settings.operand)
    chosen = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), settings.chunk):
        rows = slice(start, start + settings.chunk)
        chosen[rows] = _logits(flat[rows], weight, bias, settings).argmax(1)
    return chosen.view(hidden.shape[:-1])


@torch.no_grad()
def sample(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocabulary width"],
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Int64[Tensor, "*batch"]:
    """A token of each row, drawn with probability ∝ exp(s_ij / temperature).

    One random number is drawn for each row before the first chunk, and looked up in the cumulated probabilities, so
    that the choice depends on the generator alone and not on `chunk`.

    Args:
        hidden: outputs of the body, [..., d].
        weight: [V, d].
        bias: added to the logits.
        softcap: bound on the absolute logits, above 0.
        temperature: above 0; `argmax` is its limit at 0.
        top_k: draw from the k likeliest tokens only, k at least 1.
        top_p: draw from the fewest likeliest tokens that have this share, in (0, 1], of the probability that `top_k`
            left; at least one.
        generator: on the device of `hidden`; None for torch's own.
        chunk: rows at a time; None: a quarter of the rows of `linear_cross_entropy`, since sorting needs room too.

    Returns:
        Ids, [...].

    Raises:
        ConfigError: a shape, type, device or setting that does not fit.
        OffbookError: a row whose logits are NaN or +∞.

    Source: as for `linear_cross_entropy`; `top_p`: Holtzman et al., "The Curious Case of Neural Text Degeneration"
    (2020), section 3.1.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> sample(torch.zeros(6, 1), torch.ones(3, 1), top_k=1, generator=generator).unique().numel()
        1
    """
    _check("temperature", temperature, 0 < temperature < math.inf, "a number above 0", "use argmax for 0")
    _check("top_k", top_k, top_k is None or (isinstance(top_k, int) and top_k >= 1), "an integer of at least 1")
    _check("top_p", top_p, top_p is None or 0 < top_p <= 1, "a number in (0, 1]")
    settings = _settings(hidden, weight, bias, softcap, chunk)
    rows_each = settings.chunk if chunk else max(1, settings.chunk // 4)
    flat, weight = hidden.reshape(-1, hidden.shape[-1]), weight.to(settings.operand)
    draws = torch.rand(len(flat), 1, generator=generator, device=flat.device, dtype=settings.compute)
    chosen = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), rows_each):
        rows = slice(start, start + rows_each)
        logits = _logits(flat[rows], weight, bias, settings)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        mass = logits.div_(temperature).softmax(1)
        broken = mass[:, 0].isnan().nonzero()
        if len(broken):
            raise OffbookError(
                f"row {start + int(broken[0])} of hidden",
                expected="finite logits",
                got="NaN or infinity",
                fix="look for the first NaN in the model that made it",
            )
        chosen[rows] = _draw(mass, draws[rows], top_k, top_p)
    return chosen.view(hidden.shape[:-1])


def _draw(mass: Tensor, draws: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Looks uniform numbers [m, 1] up in the cumulated probabilities [m, V], after the unlikely ones are struck out."""
    order = None
    if top_k is not None:
        mass, order = mass.topk(min(top_k, mass.shape[1]), dim=1)
    elif top_p is not None:
        mass, order = mass.sort(dim=1, descending=True)
    below = mass.cumsum(1)
    if top_p is not None:
        mass = mass.where(below - mass < top_p * below[:, -1:], 0.0)
        below = mass.cumsum(1)
    total = below[:, -1:]
    place = torch.searchsorted(below, draws * total, right=True)
    # Rounding may carry a number to the very end, behind the last token that has any mass.
    place = place.minimum((below < total).sum(1, keepdim=True))
    return (place if order is None else order.gather(1, place)).squeeze(1)


class _Total(torch.autograd.Function):
    """Σ_i scale_i loss_i over the rows, with the gradients made on the way, while the chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        scale: Tensor,
        settings: _Settings,
        training: bool,
    ) -> Tensor:
        wanted = tuple(ctx.needs_input_grad[:3]) if training else (False, False, False)
        share = scale if any(wanted) else None
        losses, ctx.gradients = _sweep(hidden, weight, bias, targets, rows, share, wanted, settings)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        # Doubles cost nothing here and keep the sum of a million tokens as good as that of one; not every GPU has them.
        return (losses * scale).sum(dtype=torch.float64 if losses.is_cpu else None).to(settings.compute)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: the first backward() took the gradients with it; call it once, or use "
                "reduction='none', which computes them anew each time"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [g if g is None else g.mul_(outer).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return *scaled, None, None, None, None, None


class _EachToken(torch.autograd.Function):
    """loss_i of the rows; saves the inputs and computes every chunk again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        settings: _Settings,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets, rows)
        ctx.settings = settings
        return _sweep(hidden, weight, bias, targets, rows, None, (False, False, False), settings)[0]

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        hidden, weight, bias, targets, rows = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[:3])
        _, gradients = _sweep(hidden, weight, bias, targets, rows, outer, wanted, ctx.settings)
        cast = [g if g is None else g.to(x.dtype) for g, x in zip(gradients, (hidden, weight, bias), strict=True)]
        return *cast, None, None, None


def _refuse_second_derivative() -> None:
    # Under create_graph=True, and only then, backward runs with gradients enabled.
    if torch.is_grad_enabled():
        instead = "call backward without create_graph=True, or use torch.nn.functional.cross_entropy on full logits"
        raise RuntimeError(f"the chunked head has no second derivative: {instead}")


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    scale: Tensor | None,
    wanted: tuple[bool, ...],
    settings: _Settings,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The loss of each chosen row, and the gradients of Σ_i scale_i loss_i by hidden, weight and bias, where wanted."""
    compute = settings.compute
    losses = hidden.new_empty(len(rows), dtype=compute)
    # A gradient by float16 is kept wider until it has met the scale of the loss: float16 would lose the small ones.
    kept = compute if hidden.dtype == torch.float16 else hidden.dtype
    d_hidden = torch.zeros_like(hidden, dtype=kept) if wanted[0] else None
    d_weight = torch.zeros_like(weight, dtype=compute) if wanted[1] else None
    d_bias = torch.zeros_like(weight[:, 0], dtype=compute) if wanted[2] else None
    with torch.autocast(hidden.device.type, enabled=False):
        factors = weight.to(settings.operand)
        for start in range(0, len(rows), settings.chunk):
            part = slice(start, start + settings.chunk)
            index = rows[part]
            inputs = hidden[index].to(settings.operand)
            logits = _logits(inputs, factors, bias, settings)
            losses[part] = _consume(logits, targets[index], None if scale is None else scale[part], settings)
            if d_bias is not None:
                d_bias += logits.sum(0)
            if d_hidden is not None:
                d_hidden[index] = _product(logits, factors, compute).to(kept)
            if d_weight is not None and settings.operand == compute:
                d_weight.addmm_(logits.t(), inputs)
            elif d_weight is not None:
                d_weight += _product(logits.t(), inputs, compute)
            del logits  # before the next chunk's are made
    return losses, (d_hidden, d_weight, d_bias)


def _consume(logits: Tensor, targets: Tensor, scale: Tensor | None, settings: _Settings) -> Tensor:
    """The losses of a chunk's uncapped logits [m, V], which become, in place, the gradient of Σ_i scale_i loss_i."""
    smoothing, z_loss, softcap = settings.smoothing, settings.z_loss, settings.softcap
    target = targets.unsqueeze(1)
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = None if scale is None else logits.square().neg_().add_(1)
        logits.mul_(softcap)
    top = logits.amax(1, keepdim=True)
    pull = (1 - smoothing) * (logits.gather(1, target) - top)
    if smoothing:
        pull += smoothing * (logits.mean(1, keepdim=True) - top)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    lse = top + total.log()
    losses = (total.log() - pull + z_loss * lse.square()).squeeze(1)
    if scale is not None:
        share = scale.unsqueeze(1)
        logits.mul_(share * (1 + 2 * z_loss * lse) / total)
        logits.scatter_add_(1, target, (smoothing - 1) * share)
        if smoothing:
            logits.sub_(share * (smoothing / logits.shape[1]))
        if slope is not None:
            logits.mul_(slope)
    return losses


def _logits(rows: Tensor, factors: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
    """One chunk's logits [m, V] before the softcap, a new tensor."""
    with torch.autocast(rows.device.type, enabled=False):
        logits = _product(rows.to(settings.operand), factors.t(), settings.compute)
    return logits if bias is None else logits.add_(bias)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right`; bfloat16 factors are multiplied as they are (CUDA) and summed and kept in `dtype`."""
    return left @ right if right.dtype == dtype else torch.mm(left.to(right.dtype), right, out_dtype=dtype)


def _settings(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, chunk: int | None
) -> _Settings:
    """Checks the tensors of the head against one another, and chooses types and chunk."""
    _check("softcap", softcap, softcap is None or 0 < softcap < math.inf, "a number above 0, or None")
    _check("chunk", chunk, chunk is None or (isinstance(chunk, int) and chunk >= 1), "an integer of at least 1")
    fits = hidden.ndim >= 2 and hidden.shape[-1] > 0 and hidden.is_floating_point()
    _check_tensor("hidden", hidden, fits, "floats [..., width]", hidden)
    fits = weight.ndim == 2 and weight.shape[1] == hidden.shape[-1] and len(weight) > 0 and weight.is_floating_point()
    _check_tensor("weight", weight, fits, f"floats [vocabulary, {hidden.shape[-1]}] with at least one row", hidden)
    if bias is not None:
        fits = bias.shape == weight.shape[:1] and bias.is_floating_point()
        _check_tensor("bias", bias, fits, f"floats [{len(weight)}]", hidden)
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in (hidden, weight, bias))
    compute = operand = torch.float64 if wide else torch.float32
    device = hidden.device.type
    if device == "cuda" and not wide:
        given = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        operand = torch.bfloat16 if given == torch.bfloat16 else compute
    kind = device if device == "cpu" else "cuda"
    (least, most), rows = _ROWS[kind], _BYTES[kind] // (len(weight) * compute.itemsize)
    return _Settings(chunk or min(max(least, rows), most), compute, operand, softcap)


def _check_targets(targets: Tensor, hidden: Tensor, weight: Tensor, ignore_index: int | None) -> Tensor:
    """Which targets count; a bad one is named."""
    fits = targets.shape == hidden.shape[:-1] and targets.dtype == torch.int64
    _check_tensor("targets", targets, fits, f"int64 {list(hidden.shape[:-1])}", hidden)
    counted = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    ignored = "" if ignore_index is None else f", or {ignore_index} to ignore"
    right = ~counted | ((targets >= 0) & (targets < len(weight)))
    expected = f"an id in 0..{len(weight) - 1}{ignored}"
    _check_entries("targets", targets, right, expected, "compare the vocabulary of the data with that of the model")
    return counted


def _check_weights(weights: Tensor, targets: Tensor, counted: Tensor, *, signed: bool) -> None:
    fits = weights.shape == targets.shape and weights.is_floating_point()
    _check_tensor("weights", weights, fits, f"floats {list(targets.shape)}", targets)
    detach = "detach them, or use reduction='none' and weigh the losses yourself"
    _check("weights.requires_grad", weights.requires_grad, not weights.requires_grad, "False", detach)
    right = ~counted | (weights.isfinite() & ((weights >= 0) | signed))
    bound = "" if signed else " of at least 0 (only reduction='sum' or 'none' take signed ones)"
    _check_entries("weights", weights, right, f"a finite number{bound}", "mend the weights")


def _check_entries(name: str, tensor: Tensor, right: Tensor, expected: str, fix: str) -> None:
    if not right.all():
        place = (~right).nonzero()[0].tolist()
        raise ConfigError(f"{name}{place}", expected=expected, got=str(tensor[tuple(place)].item()), fix=fix)


def _check_tensor(name: str, tensor: Tensor, fits: bool, expected: str, beside: Tensor) -> None:
    if not fits or tensor.device != beside.device:
        raise ConfigError(
            name,
            expected=f"{expected} on {beside.device}",
            got=f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}",
            fix="reshape, cast or move it",
        )


def _check(name: str, value: object, right: bool, expected: str, fix: str = "change it") -> None:
    if not right:
        raise ConfigError(name, expected=expected, got=repr(value), fix=fix)
