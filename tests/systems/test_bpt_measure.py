"""One step measured in a process of its own, and the search for the longest context that fits."""

from dataclasses import replace
from pathlib import Path

import pytest

from offbook.errors import ConfigError, OffbookError
from offbook.models.blockwise import BackboneConfig
from offbook.systems.bpt import measure as module
from offbook.systems.bpt.measure import Arm, Measured, Measurements, Step, longest, measure

SMALL = BackboneConfig(dim=128, layers=3, heads=4, block_q=256, block_k=512, block_ffn=128, remat="layer")


def test_all_arms_and_heads_compute_the_same_step() -> None:
    step = Step(backbone=SMALL, tokens=300, vocabulary=64)
    ways = [{"arm": "vanilla"}, {"arm": "sdpa"}, {"arm": "sdpa", "head": "torch"}, {"head": "full"}]
    losses = [measure(replace(step, **way)).loss for way in ways]
    assert losses == pytest.approx([losses[0]] * len(ways), rel=1e-5)


@pytest.mark.parametrize(
    ("arm", "backbone", "tokens"),
    [
        ("sdpa", SMALL, 6_144),
        ("blockwise", SMALL, 6_144),
        # So long that the pieces far back are left out as well.
        ("blockwise", replace(SMALL, dim=64, layers=1, heads=2), 16_384),
    ],
)
def test_attention_that_is_only_allocated_takes_the_memory_of_attention(
    arm: Arm, backbone: BackboneConfig, tokens: int
) -> None:
    step = Step(backbone=backbone, arm=arm, tokens=tokens, vocabulary=64)
    real, less = measure(step), measure(replace(step, attention="allocated"))
    assert less.bytes == pytest.approx(real.bytes, rel=0.03)
    assert less.seconds < real.seconds
    assert less.loss != real.loss


def test_a_step_that_fails_is_named_with_its_reason() -> None:
    with pytest.raises(
        OffbookError, match=r"a step of 128 tokens \(blockwise\): expected to come to its end, got .*CUDA"
    ):
        measure(Step(backbone=SMALL, tokens=128, device="cuda"))
    with pytest.raises(ConfigError, match="attention: expected flash attention on the CPU, got vanilla"):
        Step(arm="vanilla", attention="allocated")


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Step] = []

    def fake(step: Step) -> Measured:
        seen.append(step)
        return Measured(bytes=len(seen), seconds=0.5, loss=1.0)

    monkeypatch.setattr(module, "measure", fake)
    one, other = Step(tokens=64), Step(tokens=65)
    for _ in range(2):  # the second time as another process would
        measured = Measurements(tmp_path / "measurements.jsonl")
        assert [measured(one).bytes, measured(other).bytes, measured(one, turn=1).bytes] == [1, 2, 3]
    assert seen == [one, other, one]


class Law:
    """A machine whose memory follows a law."""

    def __init__(self, law) -> None:
        self.law, self.seen = law, []

    def __call__(self, step: Step, turn: int = 0) -> Measured:
        self.seen.append((step.tokens, step.attention))
        return Measured(bytes=self.law(step.tokens), seconds=0.0, loss=0.0)


@pytest.mark.parametrize("law", [lambda n: 5_000 + 10 * n, lambda n: 5_000 + n * n // 50], ids=["line", "square"])
def test_the_search_ends_just_below_the_budget(law) -> None:
    machine, budget = Law(law), 3_000_000
    found = longest(Step(), budget, (1_000, 2_000), computed=2_000, tries=8, measured=machine)
    assert 0.97 * budget <= law(found.tokens) <= budget
    assert found.points == tuple(sorted((n, law(n)) for n, _ in machine.seen))
    assert found.growth == (law(2_000) - law(1_000)) / 1_000
    assert {attention for n, attention in machine.seen if n <= 2_000} == {"computed"}
    assert {attention for n, attention in machine.seen if n > 2_000} == {"allocated"}
    assert len(machine.seen) <= 8


def test_vanilla_attention_is_always_computed_and_begins_with_less() -> None:
    machine = Law(lambda n: n * n)
    found = longest(Step(arm="vanilla"), 10**8, (1_000, 2_000), computed=100, tries=8, measured=machine)
    assert machine.seen[:2] == [(500, "computed"), (1_000, "computed")]
    assert {attention for _, attention in machine.seen} == {"computed"}
    assert 0.97 * 10**8 <= found.tokens**2 <= 10**8


def test_where_nothing_fits_the_longest_context_is_0() -> None:
    assert longest(Step(), 10, (1_000, 2_000), 2_000, tries=3, measured=Law(lambda n: 100 + n)).tokens == 0
