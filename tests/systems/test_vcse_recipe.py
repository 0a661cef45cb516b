"""The reproduction of VCSE: verdicts from curves, agents that differ in their bonus alone, and all of it once."""

import json
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from offbook.runs.seeding import evaluation_seeds, training_seeds
from offbook.systems.vcse import claims
from offbook.systems.vcse.agents import ARMS, HIDDEN, OURS, PLAIN, RANDOM, GridFeatures, agent
from offbook.systems.vcse.bonus import RND, VCSE, StateEntropy
from offbook.systems.vcse.experiments import Curve, Life, play
from offbook.systems.vcse.presets import PRESETS, grid, paper, smoke, tiny

STUDY = tiny()


def curves(**gains):
    """Agents whose seeds differ widely and whose arms differ by so much from the plain one; by task, if a list."""
    made = {}
    for place, task in enumerate(STUDY.tasks):
        for arm in ARMS:
            gain = gains.get(arm.replace(" ", "_"), 0.0)
            gain = gain[place] if isinstance(gain, list) else gain
            for seed in STUDY.seeds:
                life = Life(task=task, arm=arm, seed=seed, looks=2, out=Path())
                ends = 1.0 * seed + gain + 0.01 * (seed % 2)
                made[life] = Curve(returns=(0.0, ends), successes=(0.0, 0.5) if task.algorithm == "a2c" else ())
    return made


def verdict(**gains):
    return claims.task(STUDY, STUDY.tasks[0], curves(**gains)).verdict


def test_a_task_is_won_only_against_both():
    assert verdict(VCSE=0.5, state_entropy=0.1) == "reproduced"
    assert verdict(VCSE=0.5, state_entropy=0.5) == "not separated"
    assert verdict(VCSE=0.5, state_entropy=0.9) == "contradicted"
    assert verdict(VCSE=-0.5, state_entropy=-0.9) == "contradicted"
    lost = claims.task(STUDY, STUDY.tasks[0], curves(VCSE=0.5, RND=0.9))
    assert lost.verdict == "reproduced"  # the paper says nothing of RND
    assert "VCSE loses to: RND." in lost.note
    found = {metric.name: metric.value for metric in lost.metrics}
    np.testing.assert_allclose(found["mean return, VCSE less plain"], 0.25)
    np.testing.assert_allclose(found["success at the end, VCSE"], 0.5)
    assert claims.task(replace(STUDY, judged=False), STUDY.tasks[0], curves(VCSE=0.5)).verdict == "recorded"


def test_together_two_of_three_grid_worlds_are_wanted_against_both():
    def together(ours):
        return claims.together(STUDY, curves(VCSE=ours)).verdict

    assert together([0.5, 0.5, 0.0, 0.0]) == "reproduced"
    assert together([0.5, 0.0, 0.0, 0.5]) == "not separated"  # a body is no grid world
    assert together([0.5, -0.5, -0.5, 0.5]) == "contradicted"


def test_values_have_to_win_on_most_tasks_over_the_same_bonus_without_them():
    def judged(*gains):
        return claims.conditioning(STUDY, curves(VCSE=list(gains), state_entropy=9.0))

    assert judged(0.5, 0.5, 0.5, 0.0).verdict == "reproduced"
    assert judged(0.5, 0.5, 0.0, 0.0).verdict == "not separated"
    assert judged(0.5, -0.5, -0.5, -0.5).verdict == "contradicted"
    found = {metric.name: metric.value for metric in judged(0.5, 0.5, -0.5, 0.0).metrics}
    assert (found["tasks ahead of VCSE without values"], found["tasks behind VCSE without values"]) == (2, 1)
    np.testing.assert_allclose(found["SimpleCrossingS9N1, VCSE less VCSE without values"], 0.25)


def test_the_table_says_where_it_loses(tmp_path):
    made = curves(VCSE=[0.5, -0.5, 0.0, 0.5], RND=0.5)
    rows = [line.split(" | ") for line in claims.table(STUDY, made).splitlines()[2:]]
    said = {(row[0].strip("| "), row[1]): row[-1].strip(" |") for row in rows}
    assert said["Empty-8x8", "plain"] == "wins"
    assert said["SimpleCrossingS9N1", "state entropy"] == "loses"
    assert said["DoorKey-6x6", "RND"] == "loses"
    assert said["pendulum-swingup", "RND"] == "-"
    claims.draw(STUDY, tmp_path / "a.png", made)
    assert (tmp_path / "a.png").stat().st_size > 10_000


class Remembers(gym.Env):
    """Ends after as many steps as its seed's last digit says, with a reward or cut."""

    def __init__(self, ends):
        self.ends, self.seeds = ends, []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.left = 1 + seed % 10
        return np.zeros(2), {}

    def step(self, action):
        self.left -= 1
        over = self.left == 0
        return np.zeros(2), float(over), over and self.ends, over and not self.ends, {}


class Noisy:
    """Draws from the stream that agents draw from."""

    def predict(self, observations, deterministic):
        torch.rand(1)
        return np.zeros(len(observations)), None


def test_looks_are_the_same_and_leave_no_trace():
    worlds = [Remembers(ends=number < 3) for number in range(5)]
    before = torch.get_rng_state()
    for _ in range(2):
        returns, successes = play(Noisy(), worlds, sampled=True)
        assert returns == [1.0] * 5
        assert successes == [True] * 3 + [False] * 2
    assert torch.equal(torch.get_rng_state(), before)
    assert [one.seeds for one in worlds] == [[seed] * 2 for seed in evaluation_seeds(0, 5)]
    for seed in STUDY.seeds:
        assert not set(evaluation_seeds(0, 100)) & set(training_seeds(seed, 100_000))


def test_agents_of_a_seed_begin_alike_and_learn_the_whole_network():
    task = grid("Empty-5x5", steps=128)
    mine, plain = agent(task, "VCSE", 1), agent(task, "plain", 1)
    assert isinstance(mine.policy.features_extractor, GridFeatures)
    begun = {name: weight.clone() for name, weight in mine.policy.state_dict().items()}
    for name, weight in plain.policy.state_dict().items():
        assert torch.equal(weight, begun[name]), name
    mine.learn(128)
    changed = {name for name, weight in mine.policy.state_dict().items() if not torch.equal(weight, begun[name])}
    assert any("features_extractor" in name for name in changed)
    assert mine.explorer.weight() == 0.005
    assert mine.explorer.bonus.k == 3
    for one in (mine, plain):
        one.get_env().close()


@pytest.mark.parametrize("task", [grid("Empty-5x5", steps=128), STUDY.tasks[-1]], ids=["A2C", "SAC"])
def test_arms_differ_in_what_they_are_paid_alone(task):
    made = {arm: agent(task, arm, 1) for arm in ARMS}
    for arm, one in made.items():
        for name, weight in one.policy.state_dict().items():
            assert torch.equal(weight, made[PLAIN].policy.state_dict()[name]), (arm, name)
        one.get_env().close()
    assert not hasattr(made[PLAIN], "explorer")
    paid = {arm: one.explorer.bonus for arm, one in made.items() if arm != PLAIN}
    assert [type(bonus) for bonus in paid.values()] == [StateEntropy, RND, VCSE, VCSE]
    assert (paid[OURS].conditional, paid[HIDDEN].conditional) == (True, False)
    scaling = "std" if task.algorithm == "a2c" else "mean"
    assert [bonus.normalise.kind for bonus in paid.values()] == [scaling, "std", "none", "none"]
    assert {bonus.k for arm, bonus in paid.items() if arm != RANDOM} == {task.k}
    assert {one.explorer.weight() for arm, one in made.items() if arm != PLAIN} == {task.beta}


def test_presets_are_whole():
    assert list(PRESETS) == ["smoke", "tiny", "paper", "drqv2-dmc", "metaworld"]
    assert not smoke().judged
    assert len(tiny().seeds) == 5
    assert sum(task.algorithm == "a2c" for task in tiny().tasks) == 3
    for task in tiny().tasks:
        assert task.steps % (tiny().looks * 128) == 0 or task.algorithm == "sac"


def test_smoke_runs_from_the_command_line_and_ends_the_same_after_an_interruption(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli(["reproduce", "vcse", "--preset", "smoke", "--out", "run", "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)["claims"]
    assert len(found) == 6
    assert {claim["verdict"] for claim in found} == {"recorded"}
    assert Path("run/vcse.png").stat().st_size > 10_000
    assert all(metric["n"] == 2 and metric["interval"] for claim in found[:4] for metric in claim["metrics"])
    assert json.loads(Path("run/paper.json").read_text())["seeds"] == list(paper().seeds)
    kept = Path("run/Empty-5x5/VCSE-0.json")
    before = kept.read_bytes()
    for lost in (kept, Path("run/table.md")):
        lost.unlink()
    again = cli(["reproduce", "vcse", "--preset", "smoke", "--out", "run", "--resume", "--json"])
    assert json.loads(again.stdout)["claims"] == found
    assert kept.read_bytes() == before
