"""LayerNorm is PyTorch's in all it gives, but for the digits that long sums cost."""

import pytest
import torch
from torch import Tensor, nn

from offbook.models.blockwise.norm import LayerNorm


def make(kind: type[nn.LayerNorm], dtype: torch.dtype = torch.float32) -> nn.LayerNorm:
    norm = kind(8, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8))
        norm.bias.copy_(torch.linspace(-1, 1, 8))
    return norm


def numbers(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def gradients(norm: nn.LayerNorm, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(norm(x).square().sum(), (x, *norm.parameters())))


@pytest.mark.parametrize("rows", [0, 1, 100, 2048, 2049, 2500])
def test_what_it_gives_is_pytorchs(rows: int) -> None:
    ours, theirs, x = make(LayerNorm), make(nn.LayerNorm), numbers(rows)
    assert torch.equal(ours(x), theirs(x))
    for own, want in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(own, want, atol=1e-4, rtol=1e-4)


def test_sums_over_many_tokens_keep_their_digits() -> None:
    # Gradients of one sign, so that a sum that grows step by step rounds ever more.
    x = numbers(30_000)
    exact = gradients(make(nn.LayerNorm, torch.float64), x.double())
    off = {}
    for kind in (LayerNorm, nn.LayerNorm):
        found = gradients(make(kind), x)
        off[kind] = [float((g - e).abs().max() / e.abs().max()) for g, e in zip(found, exact, strict=True)]
    assert max(off[LayerNorm][1:]) <= 5e-7
    assert off[LayerNorm][0] == off[nn.LayerNorm][0]
    assert min(off[nn.LayerNorm][1:]) > 2e-6


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_frozen_weights_get_no_gradient(wanted: tuple[bool, bool]) -> None:
    norm, x = make(LayerNorm), numbers(2500).requires_grad_()
    every = gradients(norm, x)
    for weight, on in zip(norm.parameters(), wanted, strict=True):
        weight.requires_grad_(on)
    norm(x).square().sum().backward()
    for leaf, on, want in zip((x, *norm.parameters()), (True, *wanted), every, strict=True):
        assert (leaf.grad is not None) == on
        assert not on or torch.equal(leaf.grad, want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_second_derivatives_and_transforms_are_those_of_pytorch() -> None:
    found = []
    for norm in (make(LayerNorm), make(nn.LayerNorm)):
        x = numbers(2500).requires_grad_()
        first = torch.autograd.grad(norm(x).pow(3).sum(), (x, norm.weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, norm.weight))
        transformed = torch.func.grad(lambda x, norm=norm: norm(x).pow(3).sum())(x.detach())
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
            tangent = torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent
        found.append([tensor.detach() for tensor in (*second, transformed, tangent)])
    for own, want in zip(*found, strict=True):
        assert float((own - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_kinds_of_number_are_left_to_pytorch(dtype: torch.dtype) -> None:
    x = numbers(2500, dtype)
    pairs = zip(*(gradients(make(kind, dtype), x) for kind in (LayerNorm, nn.LayerNorm)), strict=True)
    assert all(torch.equal(own, want) for own, want in pairs)
