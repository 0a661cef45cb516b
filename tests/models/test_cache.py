"""Cached decoding gives what the forward pass gives, for whatever mask and lengths, and costs what it must."""

import pickle
import statistics
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from offbook.errors import ConfigError
from offbook.models.blockwise import (
    Backbone,
    BackboneConfig,
    Causal,
    FrameCausal,
    Full,
    KeyPadding,
    Mask,
    Prefix,
    TokenTypes,
    Where,
    Window,
)
from offbook.models.blockwise.cache import CacheFullError, Extension, KVCache
from offbook.models.blockwise.positions import rope_tables


def network(**settings: Any) -> Backbone:
    torch.manual_seed(1)
    net = Backbone(BackboneConfig(**{"dim": 32, "layers": 2, "heads": 4, **settings})).eval()
    for weight in net.parameters():
        # No term of the arithmetic is 0 or 1 any more.
        torch.nn.init.normal_(weight, std=0.2)
    return net


def alone(net: Backbone, x: Tensor, mask: Mask | None = None, cond: Tensor | None = None) -> Tensor:
    """The forward pass over all tokens of one sample."""
    with torch.no_grad():
        return net(x[None], mask=mask or Causal(), cond=cond)[0]


KINDS = {
    "bpt": {},
    "llama": {"kv_heads": 2, "ffn": "swiglu", "norm": "rms", "bias": "none"},
    "neox": {"rope_dim": 4, "residual": "parallel", "bias": "all", "ffn": "gelu"},
    "gptj": {"rope_layout": "pairs", "kv_heads": 1},
    "gpt2": {"positions": "learned", "bias": "all", "kv_heads": 2},
    "conditioned": {"positions": "none", "cond_dim": 3, "head_dim": 6},
}


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_forward_pass(kind: str) -> None:
    net, total = network(**KINDS[kind]), (540, 512, 523)
    x, cond = torch.randn(3, 540, 32), None if kind != "conditioned" else torch.randn(3, 1, 3)
    whole = [
        alone(net, row[:n], cond=cond if cond is None else cond[i : i + 1])
        for i, (row, n) in enumerate(zip(x, total, strict=True))
    ]
    cache, prompt = net.new_cache(3, 540), (300, 7, 200)
    h, same = net.prefill(x[:, :350], cache=cache, lengths=prompt, cond=cond, chunk=64)
    assert same is cache
    assert cache.lengths == prompt
    for row, (n, expected) in enumerate(zip(prompt, whole, strict=True)):
        torch.testing.assert_close(h[row, :n], expected[:n], atol=1e-5, rtol=1e-5)
        assert not h[row, n:].any()

    cache.crop((290, 7, 190))
    at = list(cache.lengths)
    # Unequal stretches by the chunk, then token by token until a sample is done.
    for more in [(90, 350, 5), *[(1, 1, 1)] * 100, (60, 55, 228)]:
        new = torch.stack(
            [
                functional.pad(x[row, n : n + m], (0, 0, 0, max(more) - m))
                for row, (n, m) in enumerate(zip(at, more, strict=True))
            ]
        )
        if more == (1, 1, 1):
            h = net.step(new, cache, cond=cond)
        else:
            h = net.prefill(new, cache=cache, lengths=torch.tensor(more), cond=cond)[0]
        for row, (n, m) in enumerate(zip(at, more, strict=True)):
            torch.testing.assert_close(h[row, :m], whole[row][n : n + m], atol=1e-5, rtol=1e-5)
        at = [n + m for n, m in zip(at, more, strict=True)]
    assert cache.lengths == tuple(at) == total


MASKS = {
    "window": (Causal() & Window(5), 1),
    "frames": (FrameCausal(4), 4),
    "prefix": (Causal() | Prefix(8), 1),
    "types": (Causal() & TokenTypes(torch.arange(24) % 3, torch.tensor([[1, 0, 1], [1, 1, 0], [1, 1, 1]]).bool()), 1),
    "own": (Where(lambda i, j: (j <= i) & ((i - j) % 3 != 1)), 1),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("prompt", [(8, 8), (12, 8)])
def test_a_mask_holds_in_steps_too(name: str, prompt: tuple[int, int]) -> None:
    net, (mask, tokens) = network(), MASKS[name]
    x = torch.randn(2, 24, 32)
    whole = [alone(net, row, mask) for row in x]
    cache = net.new_cache(2, 24)
    h = net.prefill(x[:, :12], cache=cache, mask=mask, lengths=prompt, chunk=5)[0]
    for row, n in enumerate(prompt):
        torch.testing.assert_close(h[row, :n], whole[row][:n], atol=1e-5, rtol=1e-5)
    for k in range(0, 12, tokens):
        h = net.step(torch.stack([x[row, n + k : n + k + tokens] for row, n in enumerate(prompt)]), cache)
        for row, n in enumerate(prompt):
            torch.testing.assert_close(h[row], whole[row][n + k : n + k + tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [FrameCausal(4), Full(), Causal() | Prefix(9), Where(lambda i, j: j <= i + 1)])
def test_what_went_by_cannot_see_what_comes(mask: Mask) -> None:
    net, cache = network(), KVCache(2, 1, 20, 4, 8)
    net.prefill(torch.randn(1, 6, 32), cache=cache, mask=mask)
    with pytest.raises(ConfigError, match="no earlier token that sees new ones, got one that sees token 6"):
        net.step(torch.randn(1, 1, 32), cache)
    assert cache.lengths == (6,)


def test_a_layer_that_is_used_twice_has_two_places() -> None:
    net, x = network(), torch.randn(1, 5, 32)
    net.layers[1] = net.layers[0]
    cache = net.new_cache(1, 5)
    net.prefill(x[:, :4], cache=cache)
    torch.testing.assert_close(net.step(x[:, 4:], cache)[0], alone(net, x[0])[4:])


def state(cache: KVCache) -> tuple[Any, ...]:
    return cache.lengths, cache.mask, [tensor.clone() for tensor in (*cache.keys, *cache.values)]


def test_errors_leave_the_cache_as_it_was() -> None:
    net, cache, x = network(positions="learned", max_positions=10), KVCache(2, 2, 12, 4, 8), torch.randn(2, 13, 32)
    net.prefill(x[:, :6], cache=cache, lengths=[6, 3])
    before = state(cache)
    faults = [
        (CacheFullError, "at most 12 tokens of a sample, got 13", lambda: net.step(x[:, :7], cache)),
        (ConfigError, "positions: expected 0 to 9.*got up to 10", lambda: net.step(x[:, :5], cache)),
        (ConfigError, "2 layers, 3 samples, 4 heads of 8 numbers on cpu, got 2, 2, 4",
         lambda: net.step(torch.randn(3, 1, 32), cache)),
        (ConfigError, "4 layers", lambda: network(layers=4).step(x[:, :1], cache)),
        (ConfigError, "2 numbers from 0 to 4", lambda: net.prefill(x[:, :4], cache=cache, lengths=[5, 1])),
        (ConfigError, r"lengths: expected 2 numbers", lambda: net.prefill(x[:, :4], cache=cache, lengths=[1])),
        (ConfigError, "mask: expected the cache's own", lambda: net.prefill(x[:, :1], cache=cache, mask=Full())),
        (ConfigError, r"input: expected floats", lambda: net.step(x[:, 0], cache)),
        (ConfigError, r"crop: expected at most \[6, 3\] tokens", lambda: cache.crop(4)),
        (ConfigError, r"crop: expected at most \[6, 3\] tokens", lambda: cache.crop([-1, 2])),
        (ConfigError, "chunk: expected 1 or more", lambda: net.prefill(x[:, :1], cache=cache, chunk=0)),
        (ConfigError, r"crop", lambda: cache.crop([1])),
        (ConfigError, "samples: expected numbers from 0 to 1", lambda: cache.reorder([0, 2])),
        (ConfigError, "samples: expected", lambda: cache.reorder([])),
    ]  # fmt: skip
    for kind, message, fault in faults:
        with pytest.raises(kind, match=message), torch.no_grad():
            fault()
        after = state(cache)
        assert after[:2] == before[:2]
        assert all(torch.equal(a, b) for a, b in zip(after[2], before[2], strict=True))


def test_a_full_cache_says_how_full() -> None:
    error = pickle.loads(pickle.dumps(CacheFullError(10, 12)))
    assert (error.have, error.need) == (10, 12)
    assert str(error) == (
        "cache: expected at most 10 tokens of a sample, got 12; make a cache with a larger max_len, or crop this one."
    )
    with pytest.raises(ConfigError, match="max_len: expected 1 or more, got 0"):
        KVCache(1, 1, 0, 1, 1)


def test_training_with_a_cache_is_refused() -> None:
    net, x = network(), torch.randn(1, 2, 32)
    with pytest.raises(ConfigError, match="expected inference, got training"):
        net.step(x.requires_grad_(), net.new_cache(1, 4))
    with pytest.raises(ConfigError, match=r"call eval\(\)"):
        net.train().step(x.detach(), net.new_cache(1, 4))
    assert not net.eval().step(x.detach(), net.new_cache(1, 4)).requires_grad


def test_padding_belongs_to_lengths() -> None:
    net, x = network(), torch.randn(2, 6, 32)
    with pytest.raises(ConfigError, match=r"one without padding, got _Combined; .*lengths="):
        net.prefill(x, cache=net.new_cache(2, 9), mask=Causal() & KeyPadding(torch.tensor([6, 2])))


@pytest.mark.parametrize("mask", [Causal(), Full()])
def test_what_stands_in_padding_or_was_cropped_reaches_nobody(mask: Mask) -> None:
    net, x = network(), torch.randn(2, 6, 32)
    expected = alone(net, x[1, :2], mask)
    x[1, 2:] = float("nan")
    cache = net.new_cache(2, 9)
    h = net.prefill(x, cache=cache, mask=mask, lengths=[6, 2])[0]
    torch.testing.assert_close(h[1, :2], expected)
    assert not h[1, 2:].any()
    if mask == Causal():
        net.step(torch.full((2, 1, 32), float("inf")), cache)
        cache.crop([6, 2])
        new = torch.randn(2, 1, 32)
        torch.testing.assert_close(net.step(new, cache)[1, 0], alone(net, torch.cat([x[1, :2], new[1]]))[-1])


def test_samples_are_reordered_multiplied_and_dropped() -> None:
    net, x = network(), torch.randn(3, 9, 32)
    cache = net.new_cache(3, 12)
    net.prefill(x, cache=cache, lengths=[9, 4, 6])
    new = torch.randn(5, 1, 32)
    for order in ([2, 0, 0], [1, 1, 2, 0, 1], [3]):
        cache.reorder(torch.tensor(order))
        sequences = [torch.cat([x[row][: [9, 4, 6][row]]]) for row in range(3)] if len(order) == 3 else sequences
        sequences = [sequences[row] for row in order]
        assert cache.lengths == tuple(map(len, sequences))
        h = net.step(new[: len(order)], cache)
        sequences = [torch.cat([old, token]) for old, token in zip(sequences, new, strict=False)]
        for row, sequence in enumerate(sequences):
            torch.testing.assert_close(h[row, 0], alone(net, sequence)[-1], atol=1e-5, rtol=1e-5)
    own = net.new_cache(2, 12)
    net.prefill(x[:2], cache=own, mask=Causal() & TokenTypes(torch.zeros(2, 12).long()))
    with pytest.raises(ConfigError, match="a mask for any sample, got one for these"):
        own.reorder([1, 0])


def test_a_cache_of_inference_mode_serves_outside_and_takes_half_precision() -> None:
    net, x = network(), torch.randn(1, 5, 32)
    with torch.inference_mode():
        cache = net.new_cache(1, 8)
        net.prefill(x[:, :4], cache=cache)
    torch.testing.assert_close(net.step(x[:, 4:], cache)[0], alone(net, x[0])[4:])
    half = KVCache(2, 1, 8, 4, 8, dtype=torch.bfloat16)
    assert half.nbytes * 2 == cache.nbytes == 2 * 2 * 8 * 4 * 8 * 4
    h = net.prefill(x, cache=half)[0]
    assert h.dtype == torch.float32
    torch.testing.assert_close(h[0], alone(net, x[0]), atol=0.05, rtol=0.05)
    assert net.step(x[:, :0], cache).shape == (1, 0, 32)
    assert not net.prefill(x, cache=cache, lengths=[0])[0].any()


@torch.no_grad()
def plain_step(
    net: Backbone, x: Tensor, keys: list[Tensor], values: list[Tensor], cos: Tensor, sin: Tensor, n: int
) -> Tensor:
    """A step in ordinary PyTorch."""
    cos, sin, half = cos[:, None, n : n + 1], sin[:, None, n : n + 1], cos.shape[-1]
    for layer, k_all, v_all in zip(net.layers, keys, values, strict=True):
        h = layer.norm1(x)
        q = layer.q(h).view(len(x), 1, -1, 2 * half).transpose(1, 2)
        k, v = layer.kv(h).view(len(x), 1, 2, -1, 2 * half).permute(2, 0, 3, 1, 4)
        q, k = (
            torch.cat([y[..., :half] * cos - y[..., half:] * sin, y[..., half:] * cos + y[..., :half] * sin], -1)
            for y in (q, k)
        )
        k_all[:, :, n : n + 1], v_all[:, :, n : n + 1] = k, v
        o = functional.scaled_dot_product_attention(q, k_all[:, :, : n + 1], v_all[:, :, : n + 1])
        x = x + layer.out(o.transpose(1, 2).flatten(2))
        x = x + layer.down(functional.gelu(layer.up(layer.norm2(x)), approximate="tanh"))
    return net.norm(x)


def filled(net: Backbone, tokens: int, room: int) -> KVCache:
    cache = net.new_cache(1, tokens + room)
    for tensor in (*cache.keys, *cache.values):
        tensor[:, :, :tokens].normal_()
    cache.append(tokens).commit()
    return cache


def processor_time(compute: Any) -> float:
    start = time.thread_time()
    compute()
    return time.thread_time() - start


def by_turns(one: Any, other: Any, turns: int, wanted: float) -> float:
    """The median ratio of times, the best of three: what else the machine does is none of our doing."""
    ratios = []
    while len(ratios) < 3 and min(ratios, default=wanted + 1) > wanted:
        pairs = []
        for turn in range(turns):
            first, second = (one, other) if turn % 2 else (other, one)
            times = processor_time(first), processor_time(second)
            pairs.append(times[0] / times[1] if turn % 2 else times[1] / times[0])
        ratios.append(statistics.median(pairs))
    return min(ratios)


def test_a_step_costs_what_a_plain_one_costs() -> None:
    net = network(dim=256, layers=4)
    cache, x = filled(net, 1024, 400), torch.randn(1, 1, 256)
    keys, values = [tensor.clone() for tensor in cache.keys], [tensor.clone() for tensor in cache.values]
    tables = rope_tables(torch.arange(1424)[None], 64)
    ours, theirs = [], []

    def plain() -> None:
        theirs.append(plain_step(net, x, keys, values, *tables, 1024 + len(theirs)))

    ratio = by_turns(lambda: ours.append(net.step(x, cache)), plain, 100, 1.1)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=1e-5)
    assert ratio <= 1.1


def test_a_step_costs_the_same_after_many_tokens_apart_from_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(dim=256, layers=2)
    short, long, x = filled(net, 1024, 400), filled(net, 8192, 400), torch.randn(1, 1, 256)
    monkeypatch.setattr(Extension, "attend", lambda new, rows, q: q)
    assert by_turns(lambda: net.step(x, long), lambda: net.step(x, short), 100, 1.3) <= 1.3
