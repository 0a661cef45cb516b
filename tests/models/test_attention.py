import math
import random

import pytest
import torch
from torch import Tensor

from offbook.models.blockwise import Causal, Full, KeyPadding, Window
from offbook.models.blockwise.attention import Rule, attend, attend_backward, merge
from offbook.models.blockwise.audit import dense_attention, random_mask
from offbook.models.blockwise.dropout import dropped, kept
from offbook.models.blockwise.masks import blocks


def inputs(batch: int, heads: int, groups: int, tokens: int, size: int = 8, dtype=torch.float64) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(batch, n, tokens, size) for n in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


def bits(rule: Rule, batch: int, heads: int, tokens: int) -> Tensor | None:
    if not rule.rate:
        return None
    b, h, i, j = (torch.arange(n) for n in (batch, heads, tokens, tokens))
    return kept(rule.seed, rule.rate, b[:, None, None, None], h[:, None, None], i[:, None], j).double() / (
        1 - rule.rate
    )


def by_blocks(q: Tensor, k: Tensor, v: Tensor, do: Tensor, rule: Rule, block: int, cuts: list[range]) -> list[Tensor]:
    """Output, sums and gradients, with keys in several stretches whose results are merged."""
    tokens = range(q.shape[2])
    outs, sums, dqs = [], [], []
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rows in blocks(tokens, block):
        here = slice(rows.start, rows.stop)
        o, lse = torch.zeros_like(q[:, :, here]), q.new_full((*q.shape[:2], len(rows)), -math.inf)
        for cut in cuts:
            at = slice(cut.start, cut.stop)
            o, lse = merge(o, lse, *attend(q[:, :, here], k[:, :, at], v[:, :, at], rule, rows, cut))
        dq = torch.zeros_like(o)
        for cut in cuts:
            at = slice(cut.start, cut.stop)
            dq += attend_backward(
                do[:, :, here],
                q[:, :, here],
                k[:, :, at],
                v[:, :, at],
                o,
                lse,
                rule,
                rows,
                cut,
                dk[:, :, at],
                dv[:, :, at],
            )
        outs.append(o)
        sums.append(lse)
        dqs.append(dq)
    return [torch.cat(outs, 2), torch.cat(sums, 2), torch.cat(dqs, 2), dk, dv]


@pytest.mark.parametrize("seed", range(24))
def test_blocks_and_stretches_of_keys_give_dense_attention_and_its_gradients(seed: int) -> None:
    rng = random.Random(seed)
    batch, heads, tokens = rng.randint(1, 2), rng.choice([1, 2, 4]), rng.randint(1, 70)
    groups = rng.choice([n for n in (1, 2, 4) if heads % n == 0])
    made = random_mask(rng, batch, tokens)
    rule = Rule(made.mask, rng.randint(1, 40), rng.choice([0.0, 0.3]), rng.getrandbits(60))
    q, k, v, do = inputs(batch, heads, groups, tokens)
    found = by_blocks(q, k, v, do, rule, rng.randint(3, 40), blocks(range(tokens), rng.randint(5, 70)))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, lse = dense_attention(*(x.transpose(1, 2) for x in leaves), made.pairs, bits(rule, batch, heads, tokens))
    wanted = [o.transpose(1, 2), lse, *torch.autograd.grad(o.transpose(1, 2), leaves, do)]
    for name, own, want in zip(("o", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        torch.testing.assert_close(own, want, atol=1e-12, rtol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_merging_with_nothing_changes_nothing_and_nothing_with_nothing_is_nothing() -> None:
    o, lse = torch.randn(1, 1, 3, 4), torch.tensor([[[0.5, -200.0, -math.inf]]])
    o[..., 2, :] = 0
    nothing = torch.zeros_like(o), torch.full_like(lse, -math.inf)
    for merged in (merge(o, lse, *nothing), merge(*nothing, o, lse)):
        torch.testing.assert_close(merged, (o, lse), atol=0, rtol=0)


def test_merging_is_exact_for_sums_that_are_far_apart() -> None:
    one, other = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 3.0)
    o, lse = merge(one, torch.tensor([[[1000.0]]]), other, torch.tensor([[[-1000.0]]]))
    assert o.tolist() == one.tolist()
    assert float(lse) == 1000.0
    o, lse = merge(one, torch.tensor([[[1000.0]]]), other, torch.tensor([[[1000.0]]]))
    assert torch.allclose(o, torch.full_like(o, 2.0))
    assert float(lse) == pytest.approx(1000 + math.log(2))


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("block", [2, 100])
def test_queries_that_see_no_key_give_zeros_and_minus_infinity_and_zero_gradients(rate: float, block: int) -> None:
    mask = Window(1) & KeyPadding(torch.tensor([3, 0]))
    q, k, v, do = inputs(2, 2, 1, 6)
    tokens, rule = range(6), Rule(mask, block, rate)
    o, lse = attend(q, k, v, rule, tokens, tokens)
    dead = torch.zeros(2, 6, dtype=torch.bool)
    dead[0, 3:] = dead[1] = True
    gone = dead[:, None].expand(-1, 2, -1)
    assert bool((o[gone] == 0).all())
    assert torch.equal(lse == -math.inf, gone)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dq = attend_backward(do, q, k, v, o, lse, rule, tokens, tokens, dk, dv)
    assert bool((dq[gone] == 0).all())
    for gradient in (dk, dv):
        assert bool((gradient[dead[:, None]] == 0).all())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_scores_beyond_the_largest_half_precision_number_stay_finite(rate: float) -> None:
    q, k, v, do = (60 * x for x in inputs(1, 2, 2, 50, 64, torch.float16))
    assert float((q.float() @ k.float().mT).abs().max()) / 8 > 65504 / 8
    tokens, rule = range(50), Rule(Causal(), 16, rate)
    o, lse = attend(q, k, v, rule, tokens, tokens)
    assert (o.dtype, lse.dtype) == (torch.float16, torch.float32)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    dq = attend_backward((do / 600).half(), q, k, v, o, lse, rule, tokens, tokens, dk, dv)
    assert all(bool(x.isfinite().all()) for x in (o, lse, dk, dv, dq))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_blocks_of_half_precision_lose_nothing_that_one_block_keeps(dtype: torch.dtype) -> None:
    q, k, v, do = inputs(1, 1, 1, 256, 8, dtype)
    v = v + 1  # so that sums grow with the number of keys
    tokens, gradients = range(256), []
    for block in (8, 256):
        rule, rows = Rule(Full(), block), blocks(tokens, block)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for some in rows:
            at = slice(some.start, some.stop)
            o, lse = attend(q[:, :, at], k, v, rule, some, tokens)
            assert lse.dtype == torch.float32
            attend_backward(do[:, :, at] + 1, q[:, :, at], k, v, o, lse, rule, some, tokens, dk, dv)
        gradients.append(dv)
    leaf = v.double().transpose(1, 2).requires_grad_()
    every = torch.ones(1, 256, 256, dtype=torch.bool)
    o, _ = dense_attention(q.double().transpose(1, 2), k.double().transpose(1, 2), leaf, every)
    exact = torch.autograd.grad(o, leaf, (do + 1).double().transpose(1, 2))[0].transpose(1, 2)
    many, one = (float((x - exact).abs().max()) for x in gradients)
    assert many <= 2 * one + 1e-3 * float(exact.abs().max())


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    x = torch.ones(4, 200, 200)
    for rate in (0.1, 0.5, 0.9):
        y = dropped(x, seed=7, rate=rate, indices=torch.arange(x.shape[1]))
        share = float((y == 0).float().mean())
        # Five standard deviations of a share of 160,000 coins.
        assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / x.numel())
        torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - rate)))
    assert dropped(x, seed=7, rate=0.0, indices=torch.arange(x.shape[1])) is x


def test_dropped_numbers_are_independent_of_neighbours_and_of_other_seeds() -> None:
    b, t, e = torch.arange(4)[:, None, None], torch.arange(200)[:, None], torch.arange(200)
    bits = kept(123, 0.5, b, t, e).double() * 2 - 1
    bound = 5 / math.sqrt(bits.numel())
    for other in (bits.roll(1, 0), bits.roll(1, 1), bits.roll(1, 2), bits.roll((1, 1), (1, 2)), bits.mT):
        assert abs(float((bits * other).mean())) < bound * math.sqrt(2)  # of the transposed, each pair counts twice
    for seed in (124, 123 + 2**32, 123 + 0x9E3779B97F4A7C15 % 2**63, 0):
        assert abs(float((bits * (kept(seed, 0.5, b, t, e).double() * 2 - 1)).mean())) < bound
    for dim in (1, 2):  # no row and no column is dropped as a whole
        assert float(bits.mean(dim).abs().max()) < 6 / math.sqrt(200)


def test_a_stretch_drops_what_the_whole_does() -> None:
    x = torch.randn(2, 100, 8)
    indices = torch.arange(100)
    whole = dropped(x, seed=2**62 + 5, rate=0.3, indices=indices)
    cuts = [slice(start, start + 33) for start in range(0, 100, 33)]
    parts = [dropped(x[:, cut], seed=2**62 + 5, rate=0.3, indices=indices[cut]) for cut in cuts]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_bits_of_dropout_are_the_same_in_every_process_and_version() -> None:
    bits = kept(2**40 + 3, 0.5, torch.arange(2)[:, None], torch.arange(16))
    assert ["".join("01"[int(bit)] for bit in row) for row in bits] == ["0111011000011011", "1000100100000011"]
