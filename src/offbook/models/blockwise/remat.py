"""What is kept for the backward pass, and the backward pass that computes the rest again, block by block.

Of a run of layers only the first one's input is kept, or also, for a single layer, what its attention gave. The
backward pass of a layer goes through its blocks of queries: it computes the queries and their attention again, pulls
the gradient through the rest of the layer, then through the attention, which adds to the gradients of all keys and
values that were seen, and through the queries. At the end it pulls those of keys and values through their projection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from offbook.models.blockwise.masks import blocks
from offbook.models.blockwise.offload import put_away

if TYPE_CHECKING:
    from offbook.models.blockwise.layer import BlockwiseLayer, Pass

_ONCE = "blockwise layers have first derivatives only, of plain backward passes: for {}, set remat='none'"

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


# A graph break, where torch.compile would look into the backward pass in vain.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def through(layers: Sequence[BlockwiseLayer], x: Tensor, shared: Pass, cond: Tensor | None) -> Tensor:
    """Runs layers by blocks, keeping the first one's input.

    Raises:
        RuntimeError: a function transform is active, or a part of a layer drops numbers by PyTorch's own generator, or
            a layer of several has a hook; or, later, the backward pass would give gradients of something else than was
            computed.
    """
    if len(layers) > 1 and any(getattr(layer, hooks) for layer in layers for hooks in _HOOKS):
        # Of fully_shard, for instance, which brings a layer's weights together just before it is called.
        raise RuntimeError("hooks of layers that are computed as one would not be called: set segment=1")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(_ONCE.format("torch.func"))
    if not torch.is_grad_enabled():
        with _autocast(x.device.type)():
            return _run(layers, x, shared, cond, None)
    for name, module in ((name, module) for layer in layers for name, module in layer.named_modules()):
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
            raise RuntimeError(f"{name} would drop other numbers in the backward pass: set its p=0, or remat='none'")
    y: Tensor = _Through.apply(layers, shared, x, cond, *_weights(layers))  # type: ignore[no-untyped-call]
    return y


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layers: Sequence[BlockwiseLayer], shared: Pass, x: Tensor, cond: Tensor | None, *weights: Tensor
    ) -> Tensor:
        ctx.layers, ctx.shared, ctx.weights, ctx.context = layers, shared, weights, _autocast(x.device.type)
        single = len(layers) == 1 and shared.remat == "attn"
        attended: list[tuple[Tensor, Tensor]] | None = [] if single else None
        with ctx.context():
            y = _run(layers, x, shared, cond, attended)
        here, ctx.away = put_away([x, *(attended[0] if attended else ())], shared.offload, shared.away)
        shared.away = ctx.away
        # Weights, frozen ones too, for the check that nobody changes them before the backward pass.
        ctx.save_for_backward(cond, *weights, *here)
        return y if y is not x else x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_ONCE.format("a second derivative"))
        cond, *rest = ctx.saved_tensors
        now = _weights(ctx.layers)
        if len(now) != len(ctx.weights) or any(one is not other for one, other in zip(now, ctx.weights, strict=True)):
            raise RuntimeError(_ONCE.format("weights that are others in the backward pass, as of functional_call"))
        kept = [*rest[len(now) :], *(away.back() for away in ctx.away)]
        sums = _Sums(now, cond)
        dy, x, attended = grads[0], kept[0], (kept[1], kept[2]) if len(kept) > 1 else None
        with ctx.context():
            inputs = [x]
            for layer in ctx.layers[:-1]:
                inputs.append(_forward(layer, inputs[-1], ctx.shared, cond, None))
            for layer in reversed(ctx.layers):
                dy = _backward(layer, inputs.pop(), attended, dy, ctx.shared, cond, sums)
        return None, None, dy, *sums.found()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_ONCE.format("forward-mode derivatives"))


def _weights(layers: Sequence[BlockwiseLayer]) -> list[Tensor]:
    """All of the layers' weights, each once."""
    return list(dict.fromkeys(weight for layer in layers for weight in layer.parameters()))


def _run(
    layers: Sequence[BlockwiseLayer],
    x: Tensor,
    shared: Pass,
    cond: Tensor | None,
    attended: list[tuple[Tensor, Tensor]] | None,
) -> Tensor:
    for layer in layers:
        x = _forward(layer, x, shared, cond, attended)
    return x


def _forward(
    layer: BlockwiseLayer,
    x: Tensor,
    shared: Pass,
    cond: Tensor | None,
    attended: list[tuple[Tensor, Tensor]] | None,
) -> Tensor:
    """A layer's output; what its attention gave goes to `attended`, if that is a list."""
    y = torch.empty_like(x)
    if not len(x):
        return y
    keys, outs, sums = shared.place.keys(*_keys_values(layer, x, shared, cond), layer.rule(shared)), [], []

    def queries(rows: range) -> Tensor:
        return layer.queries(part(x, rows), shared, part(cond, rows), rows)

    for rows, o, lse in keys.attend(queries, shared.place.blocks(x.shape[1], layer.config.block_q)):
        for inner in blocks(rows, layer.config.block_ffn):
            cut = slice(inner.start - rows.start, inner.stop - rows.start)
            y[:, inner.start : inner.stop] = layer.rest(part(x, inner), o[:, :, cut], shared, part(cond, inner), inner)
        if attended is not None:
            outs.append(o)
            sums.append(lse)
    if attended is not None:
        # Without a token at hand there is nothing to put together.
        attended.append((torch.cat(outs, 2), torch.cat(sums, 2)) if outs else (x.new_empty(0), x.new_empty(0)))
    return y


def _keys_values(layer: BlockwiseLayer, x: Tensor, shared: Pass, cond: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens."""
    tokens = range(x.shape[1])
    k = v = x
    for rows in blocks(tokens, layer.config.block_q) or [tokens]:
        k_rows, v_rows = layer.keys_values(part(x, rows), shared, part(cond, rows), rows)
        if not rows.start:
            k, v = (some.new_empty(*some.shape[:2], len(tokens), some.shape[3]) for some in (k_rows, v_rows))
        k[:, :, rows.start : rows.stop], v[:, :, rows.start : rows.stop] = k_rows, v_rows
    return k, v


def _backward(
    layer: BlockwiseLayer,
    x: Tensor,
    attended: tuple[Tensor, Tensor] | None,
    dy: Tensor,
    shared: Pass,
    cond: Tensor | None,
    sums: _Sums,
) -> Tensor:
    """The gradient of a layer's input; those of weights and conditioning are added to `sums`."""
    config, dx = layer.config, torch.empty_like(x)
    if not len(x):
        return dx
    keys = shared.place.keys(*_keys_values(layer, x, shared, cond), layer.rule(shared))
    every = shared.place.blocks(x.shape[1], config.block_q)
    # The block of queries at hand, which is asked for more than once, with what pulls gradients through it.
    opened: dict[range, tuple[tuple[Tensor, ...], Callable[..., tuple[Tensor, ...]]]] = {}

    def queries(rows: range) -> Tensor:
        if rows not in opened:
            opened.clear()
            opened[rows] = sums.open(layer.queries, x, shared, cond, rows)
        return opened[rows][0][0].detach()

    def through_the_rest() -> Iterator[tuple[range, Tensor, Tensor, Tensor]]:
        for rows, o, lse in keys.attend(queries, every) if attended is None else _cut(attended, every):
            do = torch.empty_like(o)
            for inner in blocks(rows, config.block_ffn):
                cut = slice(inner.start - rows.start, inner.stop - rows.start)
                _y, finish = sums.open(layer.rest, x, shared, cond, inner, o[:, :, cut])
                dx[:, inner.start : inner.stop], do[:, :, cut] = finish(dy[:, inner.start : inner.stop])
            yield rows, o, lse, do

    for rows, dq in keys.attend_backward(queries, through_the_rest()):
        dtype = queries(rows).dtype
        dx[:, rows.start : rows.stop] += opened.pop(rows)[1](dq.to(dtype))[0]
    dk, dv = keys.gradients()
    for rows in blocks(range(x.shape[1]), config.block_ffn):
        cut = slice(rows.start, rows.stop)
        (k, v), close = sums.open(layer.keys_values, x, shared, cond, rows)
        dx[:, cut] += close(dk[:, :, cut].to(k.dtype), dv[:, :, cut].to(v.dtype))[0]
    return dx


def _cut(attended: tuple[Tensor, Tensor], every: list[range]) -> Iterator[tuple[range, Tensor, Tensor]]:
    """What attention gave, block by block."""
    for rows in every:
        o, lse = (kept[:, :, rows.start : rows.stop] for kept in attended)
        yield rows, o, lse


class _Sums:
    """Gradients of weights and conditioning, summed over blocks in float32 or wider."""

    def __init__(self, weights: Sequence[Tensor], cond: Tensor | None) -> None:
        self._weights, self._every = [weight for weight in weights if weight.requires_grad], weights
        self._sums: list[Tensor | None] = [None] * len(self._weights)
        self._cond = None if cond is None else torch.zeros_like(cond, dtype=_wide(cond))
        self._cond_dtype = None if cond is None else cond.dtype

    def found(self) -> list[Tensor | None]:
        """The gradient of the conditioning, and of each weight."""
        sums = iter(self._sums)
        parts = [next(sums) if weight.requires_grad else None for weight in self._every]
        grads = [None if sum_ is None else sum_.to(w.dtype) for sum_, w in zip(parts, self._every, strict=True)]
        return [None if self._cond is None else self._cond.to(self._cond_dtype), *grads]

    def open(
        self, compute: Callable[..., Any], x: Tensor, shared: Pass, cond: Tensor | None, rows: range, *more: Tensor
    ) -> tuple[tuple[Tensor, ...], Callable[..., tuple[Tensor, ...]]]:
        """Computes a part of a layer for a block of tokens, and gives what pulls gradients through it.

        Args:
            compute: the part: of the block's input, `more`, `shared`, the block's conditioning and its place.
            x: the input of all blocks.
            shared: what all layers have in common.
            cond: the conditioning of all blocks.
            rows: the block.
            more: what else it depends on.

        Returns:
            The results, and a function from their gradients to those of the block's input and of `more`.
        """
        leaves = [leaf.detach().requires_grad_() for leaf in (part(x, rows), *more)]
        block = None if cond is None else part(cond, rows).detach().requires_grad_()
        with torch.enable_grad():
            results = compute(*leaves, shared, block, rows)
        results = results if isinstance(results, tuple) else (results,)
        conditioned = [] if block is None else [block]
        known = [*leaves, *conditioned, *self._weights]
        if not rows.start:
            _check_leaves(results, known)

        def pull(*gradients: Tensor) -> tuple[Tensor, ...]:
            found = torch.autograd.grad(results, known, gradients, allow_unused=True)
            for number, gradient in enumerate(found[len(leaves) + len(conditioned) :]):
                if gradient is not None:
                    before, wide = self._sums[number], _wide(gradient)
                    # A copy at first: two weights may be given one and the same gradient.
                    self._sums[number] = gradient.to(wide, copy=True) if before is None else before.add_(gradient)
            if block is not None and self._cond is not None and found[len(leaves)] is not None:
                part(self._cond, rows).add_(found[len(leaves)])
            return found[: len(leaves)]

        return results, pull


def _check_leaves(results: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Raises a RuntimeError if results depend on a tensor that would be left without its gradient."""
    names, seen, nodes = {id(leaf) for leaf in known}, set(), [result.grad_fn for result in results]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in names:
            what = f"a tensor of shape {tuple(leaf.shape)} that wants a gradient, but is none of its parameters"
            raise RuntimeError(f"a layer computes with {what}: make it one, hand it in as cond, or set remat='none'")
        nodes += [other for other, _ in node.next_functions]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@overload
def part(values: Tensor, rows: range) -> Tensor: ...
@overload
def part(values: None, rows: range) -> None: ...
def part(values: Tensor | None, rows: range) -> Tensor | None:
    """The tokens of a block; what all tokens share is as it is."""
    return values if values is None or values.shape[1] == 1 else values[:, rows.start : rows.stop]


def _autocast(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The mixed precision that is on now, or off, for later.

    Without its cache: that would keep graphs from one block to the next, and from a forward pass without gradients to
    others with them.
    """
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
