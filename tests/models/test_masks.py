import random

import pytest
import torch

from offbook.errors import ConfigError
from offbook.models.blockwise import Causal, FrameCausal, Full, KeyPadding, Prefix, Segments, TokenTypes, Where, Window
from offbook.models.blockwise.audit import random_mask
from offbook.models.blockwise.masks import Kind, blocks, pieces


@pytest.mark.parametrize("seed", range(60))
def test_a_block_is_what_its_pairs_say_for_random_masks_and_blocks(seed: int) -> None:
    rng = random.Random(seed)
    batch, tokens = rng.randint(1, 3), rng.randint(1, 60)
    made = random_mask(rng, batch, tokens)
    for _ in range(20):
        (q0, q1), (k0, k1) = (sorted(rng.sample(range(tokens + 1), 2)) for _ in range(2))
        queries, keys = range(q0, q1), range(k0, k1)
        pairs, seen = made.pairs[:, q0:q1, k0:k1], made.mask.visible(queries, keys)
        assert torch.equal(seen.expand(batch, -1, -1), pairs), made.words
        kind = made.mask.kind(queries, keys)
        assert kind is not Kind.EMPTY or not pairs.any(), made.words
        assert kind is not Kind.FULL or pairs.all(), made.words
        assert kind is not Kind.DIAGONAL or torch.equal(pairs, torch.ones_like(pairs).tril()), made.words


@pytest.mark.parametrize("seed", range(30))
def test_pieces_hold_each_visible_pair_once(seed: int) -> None:
    rng = random.Random(seed)
    tokens = rng.randint(1, 60)
    made = random_mask(rng, 2, tokens)
    for queries in blocks(range(tokens), rng.randint(1, 20)):
        times = torch.zeros(tokens, dtype=torch.int64)
        for part, _kind in pieces(made.mask, queries, range(tokens), rng.randint(1, 20)):
            times[part.start : part.stop] += 1
        assert int(times.max()) <= 1
        wanted = made.pairs[:, queries.start : queries.stop].any(1).any(0)
        assert bool(times[wanted].all()), made.words


def test_blocks_that_nobody_sees_and_blocks_that_all_see_are_known_without_looking_at_pairs() -> None:
    before, here, after, near = range(0, 8), range(8, 16), range(16, 24), range(12, 20)
    known = {
        Causal(): (Kind.FULL, Kind.DIAGONAL, Kind.EMPTY, Kind.PARTIAL),
        Full(): (Kind.FULL,) * 4,
        FrameCausal(8): (Kind.FULL, Kind.FULL, Kind.EMPTY, Kind.PARTIAL),
        Prefix(8): (Kind.FULL, Kind.EMPTY, Kind.EMPTY, Kind.EMPTY),
        Window(1): (Kind.EMPTY, Kind.PARTIAL, Kind.EMPTY, Kind.PARTIAL),
        Window(30): (Kind.FULL,) * 4,
        Causal() & KeyPadding(torch.tensor([16, 20])): (Kind.FULL, Kind.DIAGONAL, Kind.EMPTY, Kind.PARTIAL),
        Causal() & KeyPadding(torch.tensor([8, 3])): (Kind.PARTIAL, Kind.EMPTY, Kind.EMPTY, Kind.EMPTY),
        Causal() | Prefix(16): (Kind.FULL, Kind.FULL, Kind.EMPTY, Kind.PARTIAL),
        Causal() | Full(): (Kind.FULL,) * 4,
        Causal() & Segments(torch.arange(24) // 8): (Kind.EMPTY, Kind.DIAGONAL, Kind.EMPTY, Kind.PARTIAL),
    }
    for mask, kinds in known.items():
        assert tuple(mask.kind(here, keys) for keys in (before, here, after, near)) == kinds, mask


def test_padding_is_known_of_masks_that_need_both_and_not_of_either() -> None:
    lengths, some = KeyPadding(torch.tensor([2, 0])), KeyPadding(torch.tensor([[True, False, True]] * 2))
    both = (Causal() & lengths & some).real(range(3))
    assert both is not None
    assert both.tolist() == [[True, False, False], [False, False, False]]
    assert (Causal() | lengths).real(range(3)) is None
    assert Causal().real(range(3)) is None


def test_types_of_tokens_see_those_that_are_allowed() -> None:
    allow = torch.tensor([[True, False], [True, True]])
    mask = TokenTypes(torch.tensor([0, 1, 1]), allow)
    assert mask.visible(range(3), range(3))[0].int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Window(0), "window: expected 1 or more, got 0"),
        (lambda: FrameCausal(0), "tokens of a frame: expected 1 or more, got 0"),
        (lambda: KeyPadding(torch.tensor([1.0])), r"KeyPadding: expected integers \(batch,\) or booleans .*float32"),
        (lambda: KeyPadding(torch.ones(2, 3, dtype=torch.int64)), r"KeyPadding: expected .* got torch.int64 \(2, 3\)"),
        (lambda: TokenTypes(torch.tensor([0.0])), "TokenTypes: expected integers .*float32"),
        (lambda: TokenTypes(torch.tensor([0, 2]), torch.ones(2, 2, dtype=torch.bool)), "types 0 to 1, got 0 to 2"),
        (lambda: TokenTypes(torch.tensor([-1]), torch.ones(2, 2, dtype=torch.bool)), "types 0 to 1, got -1 to -1"),
        (lambda: TokenTypes(torch.tensor([0]), torch.ones(2, 2)), r"booleans of shape \(T, T\), got torch.float32"),
        (
            lambda: KeyPadding(torch.tensor([1, 2])) & KeyPadding(torch.tensor([1, 2, 3])),
            r"masks: expected the same number of samples, got \[2, 3\]",
        ),
        (lambda: Segments(torch.arange(4)).check(1, 5), "mask Segments: expected one for 5 tokens, got one for 4"),
        (
            lambda: (Causal() & KeyPadding(torch.tensor([1, 2]))).check(3, 5),
            "expected one for 3 samples, got one for 2",
        ),
    ],
)
def test_masks_that_cannot_be_are_refused(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda i, j: (j <= i).float(), "torch.float32"),
        (lambda i, j: (j <= i)[0], r"\(4, 6\)"),
        (lambda i, j: torch.ones(1, 3, 6, dtype=torch.bool), r"\(1, 3, 6\)"),
        (lambda i, j: torch.ones(1, 4, 6, dtype=torch.bool, device="meta"), "on meta"),
        (lambda i, j: True, "True"),
    ],
)
def test_functions_that_give_no_booleans_for_the_pairs_are_refused_alone_and_combined(function, got: str) -> None:
    for mask in (Where(function), Where(function) & Full(), Causal() | Where(function)):
        with pytest.raises(ConfigError, match=rf"mask Where: expected booleans .* on cpu, got .*{got}"):
            mask.visible(range(4), range(6))
