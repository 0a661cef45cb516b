"""The reproduction of masked trajectory models: verdicts beside their limits, and all of it at the smallest size."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offbook.data.normalise import Normalizer
from offbook.data.splits import ensure_split, read_splits
from offbook.data.store import EpisodeStore
from offbook.runs.ledger import Dataset
from offbook.sim.recording import record
from offbook.systems.mtm import claims
from offbook.systems.mtm.agents import Curve
from offbook.systems.mtm.experiments import Arm, Play, without_actions
from offbook.systems.mtm.presets import PRESETS, TRAINING, smoke, tiny

STUDY = tiny()
DATA = Dataset(name="d", sha256="0" * 64, episodes=3)


def card(**model: float) -> dict[str, dict[str, float]]:
    """Errors of a model, whose specialists are at 1 and whose state stays at 1."""
    return {role: {"model": error, f"MLP {role}": 1.0, "state stays": 1.0} for role, error in model.items()}


def test_a_model_is_held_against_its_specialists_and_the_rule() -> None:
    good = card(bc=0.9, rcbc=1.15, id=3.0, fd=1.1)
    found = claims.roles(STUDY, "d", dict.fromkeys((0, 1, 2), good), DATA)
    assert found.verdict == "reproduced"
    assert {m.name: m.value for m in found.metrics}["id, model to MLP id"] == 3.0
    for worse in (card(bc=1.0, rcbc=1.15, id=1.0, fd=1.1), card(bc=0.9, rcbc=1.2, id=3.0, fd=1.0),
                  card(bc=0.9, rcbc=1.0, id=1.0, fd=1.11)):  # fmt: skip
        assert claims.roles(STUDY, "d", dict.fromkeys((0, 1, 2), worse), DATA).verdict == "contradicted"
    mixed = {0: good, 1: good, 2: card(bc=2.0, rcbc=2.0, id=3.0, fd=1.4)}
    assert claims.roles(STUDY, "d", mixed, DATA).verdict == "not separated"
    assert claims.roles(replace(STUDY, judged=False), "d", {0: good}, DATA).verdict == "recorded"


def test_who_clones_from_as_many_states_is_another_claim() -> None:
    good = card(bc=0.9, rcbc=1.15, id=3.0, fd=1.1)
    for role, error in {"bc": 0.75, "rcbc": 1.2}.items():
        good[role][f"MLP {role}, 4 states"] = error
    found = claims.roles(STUDY, "d", dict.fromkeys((0, 1, 2), good), DATA, 4)
    assert found.verdict == "contradicted"
    assert found.claim.endswith("where who clones sees 4 states as the model does")
    values = {metric.name: metric.value for metric in found.metrics}
    assert values["bc, model to MLP bc, 4 states"] == pytest.approx(1.2)
    good["bc"]["MLP bc, 4 states"] = 0.95
    assert claims.roles(STUDY, "d", dict.fromkeys((0, 1, 2), good), DATA, 4).verdict == "reproduced"


def plays_of(name: str, seeds: tuple[int, ...]) -> dict[int, Play]:
    arms = {
        seed: Arm(store=Path("s"), model=STUDY.model, config=STUDY.model, folder=Path(f"{name}-{seed}"))
        for seed in seeds
    }
    return {seed: Play(arm=arm, task="t", episodes=2) for seed, arm in arms.items()}


def test_few_actions_want_every_seed_and_the_return() -> None:
    plays = {
        ("d", which, seed): play for which in ("all", "few") for seed, play in plays_of(which, STUDY.seeds).items()
    }
    cards = {key: card(bc=0.9 if key[1] == "all" else 1.0) for key in plays}
    returns = {play: [12.0, 12.0] if which == "all" else [10.0, 10.0] for (_, which, _), play in plays.items()}
    assert claims.few_actions(STUDY, "d", cards, plays, returns, DATA).verdict == "reproduced"
    lower = {**returns, plays["d", "all", 2]: [11.0, 11.0]}
    assert claims.few_actions(STUDY, "d", cards, plays, lower, DATA).verdict == "not separated"
    lower |= {plays["d", "all", seed]: [11.0 + seed / 10] * 2 for seed in STUDY.seeds}
    assert claims.few_actions(STUDY, "d", cards, plays, lower, DATA).verdict == "contradicted"
    even = {**cards, ("d", "all", 1): card(bc=1.0)}
    assert claims.few_actions(STUDY, "d", even, plays, returns, DATA).verdict == "not separated"
    even |= {("d", "all", seed): card(bc=1.1) for seed in STUDY.seeds}
    assert claims.few_actions(STUDY, "d", even, plays, returns, DATA).verdict == "contradicted"


def test_the_best_of_several_targets_is_named_as_such() -> None:
    names = ("MTM", "MLP rcbc")
    hopper = {(name, seed): play for name in names for seed, play in plays_of(name, STUDY.seeds).items()}
    targets = {
        (target, seed): replace(play, target=target)
        for target in STUDY.targets for seed, play in plays_of("aim", STUDY.seeds).items()
    }  # fmt: skip
    plays = claims.Plays(few={}, hopper=hopper, targets=targets)
    returns = {play: [95.0, 95.0] if name == "MTM" else [100.0, 100.0] for (name, _), play in hopper.items()}
    returns |= {play: [target * 100] * 2 for (target, _), play in targets.items()}
    found = claims.offline(STUDY, plays, returns, DATA)
    assert found.verdict == "reproduced"
    values = {m.name: m.value for m in found.metrics}
    assert values["MTM, best of 6 targets"] == pytest.approx(110)
    assert values["MTM, final, target 1"] == 95
    assert [m.name for m in found.baseline_metrics] == ["MLP rcbc"]
    returns[hopper["MTM", 0]] = [90.0, 90.0]
    assert claims.offline(STUDY, plays, returns, DATA).verdict == "not separated"
    returns |= {hopper["MTM", seed]: [90.0 + seed] * 2 for seed in STUDY.seeds}
    assert claims.offline(STUDY, plays, returns, DATA).verdict == "contradicted"


def test_masks_and_features_are_judged() -> None:
    errors = {"auto": card(bc=1.05, rcbc=1.0, id=1, fd=1), "random": card(bc=1.0, rcbc=1.2, id=1, fd=1)}
    errors["rcbc"] = card(bc=3.0, rcbc=1.0, id=9, fd=9)
    cards = {(pattern, seed): one for pattern, one in errors.items() for seed in STUDY.seeds}
    assert claims.masks(STUDY, cards, DATA).verdict == "reproduced"
    cards |= {("random", seed): card(bc=0.99, rcbc=1.0, id=1, fd=1) for seed in STUDY.seeds}
    assert claims.masks(STUDY, cards, DATA).verdict == "contradicted"
    cards["random", 0] = card(bc=1.2, rcbc=1.2, id=1, fd=1)
    cards["random", 1] = card(bc=0.6, rcbc=1.2, id=1, fd=1)
    assert claims.masks(STUDY, cards, DATA).verdict == "not separated"

    def verdict(*gains: float) -> str:
        lives = [("state alone", 0.0), ("frozen features", 1.0), ("tuned features", 0.0)]
        curves = [
            Curve(kind=kind, seed=seed, steps=(1,), returns=(10.0 + sign * gain,))
            for kind, sign in lives for seed, gain in enumerate(gains)
        ]  # fmt: skip
        return claims.features(STUDY, curves).verdict

    assert verdict(5.0, 6.0, 5.5) == "reproduced"
    assert verdict(5.0, -6.0, 5.5) == "not separated"
    assert verdict(-5.0, -6.0, -5.5) == "contradicted"


def test_few_actions_are_left_and_the_rest_is_as_it_was(tmp_path) -> None:
    store = record("gym:Pendulum-v1", 30, tmp_path / "all", policy="random")
    ensure_split(store, 0.1)
    every, few = (EpisodeStore.open(path) for path in without_actions(store, 0.1, 0, tmp_path))
    groups = read_splits(every)
    there = every.present("action")
    assert there[groups["held_out"]].all()
    assert int(there[groups["train"]].sum()) == 3
    assert len(few) == 3 + len(groups["held_out"])
    assert few.present("action").all()
    np.testing.assert_array_equal(every.field("observation"), store.field("observation"))
    again = [EpisodeStore.open(path).digest for path in without_actions(store, 0.1, 0, tmp_path)]
    assert again == [every.digest, few.digest]
    assert EpisodeStore.open(without_actions(store, 0.1, 1, tmp_path)[1]).digest != few.digest
    assert "action" in Normalizer.fit(every, ["action"])


def test_presets_are_whole() -> None:
    assert list(PRESETS) == ["smoke", "tiny", "paper"]
    assert list(TRAINING) == ["smoke", "tiny", "paper", "official"]
    assert not smoke().judged
    assert tiny().seeds == (0, 1, 2)


def test_smoke_runs_from_the_command_line_and_goes_on_from_its_folder(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFBOOK_CACHE", str(tmp_path / "cache"))
    outcome = cli(["reproduce", "mtm", "--preset", "smoke", "--out", "run", "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)["claims"]
    assert len(found) == 9
    assert {claim["verdict"] for claim in found} == {"recorded"}
    assert Path("run/mtm.png").stat().st_size > 10_000
    again = cli(["reproduce", "mtm", "--preset", "smoke", "--out", "run", "--resume", "--json"])
    assert json.loads(again.stdout)["claims"] == found
