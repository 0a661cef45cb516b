"""The audit holds what the backbone computes to its limits, and notices whatever mistake is made on purpose."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offbook.models.blockwise import Backbone, BackboneConfig, attention, backbone, layer, remat, sequence
from offbook.models.blockwise import audit as audit_module
from offbook.models.blockwise.audit import Result, audit, reference
from offbook.models.blockwise.layer import BlockwiseLayer

DTYPES = (torch.float32, torch.float64)


def test_gradients_are_those_of_an_ordinary_transformer_for_random_shapes() -> None:
    results = list(audit(shapes=25, seed=1))
    assert len(results) == 50
    assert [str(result) for result in results if not result.ok] == []
    for word in ("none", "ffn", "attn", "layer"):
        assert any(f"remat {word}" in result.case for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_no_shape_of_five_seeds_is_beyond_its_limit(seed: int) -> None:
    assert [str(result) for result in audit(seed=seed) if not result.ok] == []


class Mistake:
    """A mistake in what is audited, and whether it has made a difference since it was last asked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.made = patch, False

    def replace(self, place: Any, name: str, wrong: Callable[..., Any]) -> None:
        """Puts `wrong(right, *arguments)` in the place of `right(*arguments)`."""
        right = getattr(place, name)
        self.patch.setattr(place, name, lambda *arguments, **more: wrong(right, *arguments, **more))

    def verdicts(self, shapes: int, suits: Callable[[BackboneConfig], bool]) -> dict[torch.dtype, list[bool]]:
        """Whether it is noticed, for the first shapes that suit, compute again and in which it makes a difference."""
        right, verdicts = audit_module._compared, {dtype: [] for dtype in DTYPES}
        skip = Result("", torch.float64, 0.0, "", 0.0, 0.0)

        def compared(config: BackboneConfig, *of: Any) -> Result:
            return right(config, *of) if config.remat in ("attn", "layer") and suits(config) else skip

        self.patch.setattr(audit_module, "_compared", compared)
        for result in audit(shapes=1000, seed=1):
            if result is not skip and self.made:
                verdicts[result.dtype].append(not result.ok)
            self.made = False
            if all(len(found) >= shapes for found in verdicts.values()):
                return verdicts
        raise AssertionError("too few shapes suit")


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch) -> Mistake:
    return Mistake(monkeypatch)


@pytest.mark.parametrize("which", ["dq", "dk", "dv"])
@pytest.mark.parametrize(("share", "least"), [(1e-3, (0.7, 1.0)), (1e-4, (0.4, 1.0))])
def test_a_gradient_that_is_a_little_off_is_noticed(
    mistake: Mistake, which: str, share: float, least: tuple[float, float]
) -> None:
    def wrong(right: Callable[..., Any], *arguments: Any) -> tuple[Tensor, ...]:
        grads = dict(zip(("dq", "dk", "dv"), right(*arguments), strict=True))
        # A query that sees one key, and that key, get no gradient but rounding.
        mistake.made = mistake.made or float(grads[which].abs().max()) > 1e-6
        return tuple(grad * (1 + share) if name == which else grad for name, grad in grads.items())

    mistake.replace(attention, "_backward", wrong)
    verdicts = mistake.verdicts(10, lambda config: True)
    for dtype, wanted in zip(DTYPES, least, strict=True):
        assert verdicts[dtype].count(True) >= wanted * len(verdicts[dtype]), dtype


def _sums_of_the_larger_alone(mistake: Mistake) -> None:
    def wrong(right: Callable[..., Any], one: Tensor, one_lse: Tensor, other: Tensor, lse: Tensor) -> Any:
        mistake.made = True
        return right(one, one_lse, other, lse)[0], torch.maximum(one_lse, lse)

    mistake.replace(attention, "merge", wrong)


def _outputs_of_pieces_weighed_alike(mistake: Mistake) -> None:
    def wrong(right: Callable[..., Any], one: Tensor, one_lse: Tensor, other: Tensor, lse: Tensor) -> Any:
        mistake.made = True
        return (one + other) / 2, right(one, one_lse, other, lse)[1]

    mistake.replace(attention, "merge", wrong)


def _a_piece_of_keys_missed(mistake: Mistake) -> None:
    def wrong(right: Callable[..., Any], *arguments: Any) -> list[Any]:
        found = list(right(*arguments))
        mistake.made = mistake.made or len(found) > 1
        return found[:-1] if len(found) > 1 else found

    mistake.replace(attention, "pieces", wrong)


def _a_piece_of_keys_missed_in_the_backward_pass(mistake: Mistake) -> None:
    def wrong(right: Callable[..., Any], do: Tensor, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            inner = Mistake(patch)
            _a_piece_of_keys_missed(inner)
            dq = right(do, q, k, *rest)
        mistake.made = mistake.made or inner.made
        return dq

    mistake.replace(sequence, "attend_backward", wrong)


def _what_dropout_leaves_not_made_larger(mistake: Mistake) -> None:
    def wrong(right: Callable[..., Any], x: Tensor, seed: int, rate: float, *first: int) -> Tensor:
        mistake.made = mistake.made or rate > 0
        return right(x, seed, rate, *first) * (1 - rate)

    for place in (layer, backbone):
        mistake.replace(place, "dropped", wrong)


def _probabilities_that_dropout_leaves_not_made_larger(mistake: Mistake) -> None:
    def wrong(right: Callable[..., Any], q: Tensor, k: Tensor, rule: Any, *rest: Any) -> tuple[Tensor, Tensor | None]:
        scores, drop = right(q, k, rule, *rest)
        mistake.made = mistake.made or drop is not None
        return scores, drop if drop is None else drop * (1 - rule.rate)

    mistake.replace(attention, "_scores", wrong)


def _heads_of_keys_and_values_in_another_order(mistake: Mistake) -> None:
    def wrong(right: Callable[..., Any], *arguments: Any) -> tuple[Tensor, ...]:
        dq, dk, dv = right(*arguments)
        mistake.made = True
        return dq, dk.flip(1), dv.flip(1)

    mistake.replace(attention, "_backward", wrong)


def _keys_for_values(mistake: Mistake) -> None:
    def wrong(right: Callable[..., Any], *arguments: Any) -> tuple[Tensor, ...]:
        dq, dk, dv = right(*arguments)
        mistake.made = True
        return dq, dv, dk

    mistake.replace(attention, "_backward", wrong)


def _no_rotation_in_the_backward_pass(mistake: Mistake) -> None:
    def wrong(right: Callable[..., Any], own: BlockwiseLayer, x: Tensor, shared: Any, *rest: Any) -> Any:
        if torch.is_grad_enabled() and shared.turns is not None:
            # Positions that are all 0 are rotated by nothing.
            mistake.made = mistake.made or float(shared.turns[1].abs().max()) > 0
            shared = dataclasses.replace(shared, turns=None)
        return right(own, x, shared, *rest)

    mistake.replace(BlockwiseLayer, "queries", wrong)


def _another_seed_when_a_segment_is_computed_again(mistake: Mistake) -> None:
    first = [False]

    def run(right: Callable[..., Any], *arguments: Any) -> Tensor:
        first[0] = True
        out = right(*arguments)
        first[0] = False
        return out

    def wrong(right: Callable[..., Any], own: BlockwiseLayer, x: Tensor, shared: Any, *rest: Any) -> Tensor:
        if not first[0] and shared.seed is not None:
            mistake.made = True
            shared = dataclasses.replace(shared, seed=shared.seed + 1)
        return right(own, x, shared, *rest)

    mistake.replace(remat, "_run", run)
    mistake.replace(remat, "_forward", wrong)


@pytest.mark.parametrize(
    ("make", "suits"),
    [
        (_sums_of_the_larger_alone, lambda config: True),
        (_outputs_of_pieces_weighed_alike, lambda config: True),
        (_a_piece_of_keys_missed, lambda config: True),
        (_a_piece_of_keys_missed_in_the_backward_pass, lambda config: True),
        (_what_dropout_leaves_not_made_larger, lambda config: config.dropout > 0),
        (_probabilities_that_dropout_leaves_not_made_larger, lambda config: config.attention_dropout > 0),
        (_heads_of_keys_and_values_in_another_order, lambda config: 1 < config.key_heads < config.heads),
        (_keys_for_values, lambda config: True),
        (_no_rotation_in_the_backward_pass, lambda config: config.positions == "rope"),
        (_another_seed_when_a_segment_is_computed_again, lambda config: config.dropout > 0 and config.segment > 1),
    ],
)
def test_a_mistake_is_noticed(mistake: Mistake, make: Callable[[Mistake], None], suits: Callable[..., bool]) -> None:
    make(mistake)
    for dtype, verdicts in mistake.verdicts(6, suits).items():
        assert all(verdicts), dtype


def test_no_number_is_a_miss_of_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Backbone, "forward", lambda self, x, **_: x * torch.nan + sum(w.sum() for w in self.parameters())
    )
    assert not any(result.ok for result in audit(shapes=2))


def test_the_reference_is_what_torch_calls_a_transformer() -> None:
    net = Backbone(BackboneConfig(dim=16, layers=2, heads=2, bias="all", positions="none", ffn="gelu")).double()
    want = x = torch.randn(2, 50, 16, dtype=torch.float64)
    for own in net.layers:
        theirs = nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True).double()
        with torch.no_grad():
            theirs.self_attn.in_proj_weight.copy_(torch.cat([own.q.weight, own.kv.weight]))
            theirs.self_attn.in_proj_bias.copy_(torch.cat([own.q.bias, own.kv.bias]))
            pairs = ((theirs.self_attn.out_proj, own.out), (theirs.linear1, own.up), (theirs.linear2, own.down))
            for one, other in (*pairs, (theirs.norm1, own.norm1), (theirs.norm2, own.norm2)):
                one.load_state_dict(other.state_dict())
        want = theirs(want, src_mask=nn.Transformer.generate_square_subsequent_mask(50, dtype=torch.float64))
    visible = torch.ones(50, 50, dtype=torch.bool).tril()[None]
    weights = dict(net.named_parameters())
    torch.testing.assert_close(reference(net.config, weights, x, visible), net.norm(want), atol=1e-12, rtol=1e-12)
