"""LayerNorm whose weights get their gradients to the last digits of float32, however many tokens there are."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Tokens whose gradients are added up one after another, at least; and up to how many of them PyTorch's own sums, which
# take half the time, cost no more than a digit.
_ROWS, _FEW = 256, 4096


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm over the last dimension, with other sums in its backward pass.

    On a processor, PyTorch's kernel adds the gradients of weight and bias up over all tokens one after another, so that
    the rounding of each step grows with what came before. Here stretches of tokens are added up first, and then their
    sums. In other kinds of number, on other devices and under function transforms it is PyTorch's own.

    Source: Higham, "The accuracy of floating point summation" (1993), on the order of sums.
    """

    def forward(self, input: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """The normalised vectors, times a weight and plus a bias."""
        if not torch.is_grad_enabled() or input.numel() <= _FEW * input.shape[-1]:
            return super().forward(input)
        transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
        if transformed or input.device.type != "cpu" or not input.dtype == self.weight.dtype == torch.float32:
            return super().forward(input)
        out: Tensor = _LayerNorm.apply(input, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        return out


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        (dy,), (wants_x, *wants) = grads, ctx.needs_input_grad[:3]
        size, kernel = x.shape[-1:], torch.ops.aten.native_layer_norm_backward
        dx = kernel(dy, x, size, mean, rstd, weight, bias, [wants_x, False, False])[0] if wants_x else None
        if not any(wants):
            return dx, None, None, None
        flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (dy, x, mean, rstd)]
        rows = max(_ROWS, math.isqrt(len(flat[0])))
        parts = [
            kernel(dy_rows, x_rows, size, mean_rows, rstd_rows, weight, bias, [False, *wants])[1:]
            for dy_rows, x_rows, mean_rows, rstd_rows in zip(*(tensor.split(rows) for tensor in flat), strict=True)
        ]
        dw, db = (
            torch.stack(some).sum(0) if want else None
            for some, want in zip(zip(*parts, strict=True), wants, strict=True)
        )
        return dx, dw, db, None
