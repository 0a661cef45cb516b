"""Exploration of agents that see pictures: nothing without a weight, what is paid, and what it learns from."""

from contextlib import closing
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from offbook.errors import ConfigError
from offbook.learning.pixel_agent import Encoded, PixelSizes
from offbook.learning.pixel_training import train_pixels
from offbook.runs.checkpoint import load_checkpoint
from offbook.runs.directory import RunDirectory
from offbook.sim.adapters import make
from offbook.sim.experts import make_expert
from offbook.sim.play import play
from offbook.systems.vcse.agents import HIDDEN, OURS
from offbook.systems.vcse.bonus import RND, VCSE, StateEntropy, value_conditional_state_entropy
from offbook.systems.vcse.experiments import _KINDS, Life
from offbook.systems.vcse.pixels import ExploringConfig, PixelExplorer
from offbook.systems.vcse.presets import PIXELS, drqv2_dmc, seen, small_pixels, sparse

BRIEF = replace(
    small_pixels(), steps=100, image_size=16, repeat=1, batch_size=16, random_steps=40, update_every=2,
    evaluate_every=0, checkpoint_every=50,
)  # fmt: skip
SHORT = {"time_limit": 0.5}  # 50 steps of a cart and a pole


def batch(count=32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    here, there = (torch.rand(count, 10, generator=rng) for _ in range(2))
    action, intended, following = (torch.rand(count, 2, generator=rng) * 2 - 1 for _ in range(3))
    return Encoded(
        here=here, action=action, intended=intended, reward=torch.rand(count, generator=rng),
        discount=torch.full((count,), 0.97), there=there, following=following,
    )  # fmt: skip


def explorer(config=BRIEF):
    return config.explores()(10, 2, torch.device("cpu"))


def lived(path, config, **more):
    run = RunDirectory.create(path, config, **more)
    train_pixels("dmc:cartpole-balance", config, run, settings=SHORT, explores=config.explores(), **more)
    return load_checkpoint(run.checkpoint()).values, run


def test_without_a_weight_it_is_the_same_agent_to_the_last_bit(tmp_path):
    plain, _ = lived(tmp_path / "plain", BRIEF)
    weightless, run = lived(tmp_path / "weightless", replace(BRIEF, bonus="vcse", beta=0.0))
    paid, _ = lived(tmp_path / "paid", replace(BRIEF, bonus="vcse", beta=0.1))
    assert run.metrics()[-1]["explore/critic_loss"] > 0
    assert all(torch.equal(weightless[name], plain[name]) for name in plain)
    assert not torch.equal(paid["actor.0.weight"], plain["actor.0.weight"])


@pytest.mark.parametrize("bonus", ["state-entropy", "rnd", "vcse"])
def test_an_explorer_goes_on_from_where_it_was_saved(bonus):
    config = replace(BRIEF, bonus=bonus)
    one, other = explorer(config), explorer(replace(config, seed=5))
    for seed in range(3):
        one.pay(batch(seed=seed))
    other.load_state_dict(deepcopy(one.state_dict()))  # optimisers keep the very tensors that they are given
    for seed in range(3, 6):
        torch.testing.assert_close(one.pay(batch(seed=seed)), other.pay(batch(seed=seed)), rtol=0, atol=0)


def test_it_pays_by_the_features_it_has_learnt_and_the_value_of_the_task_alone():
    mine, given = explorer(replace(BRIEF, bonus="vcse", beta=0.5, k=3)), batch()
    values = mine.critic(given.here, given.intended).amin(0).detach()
    paid = mine.pay(given)
    scaled = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
    wanted = 0.5 * value_conditional_state_entropy(mine.trunk(given.here).detach(), scaled, 3)
    torch.testing.assert_close(paid, wanted)
    assert not paid.requires_grad


def test_it_learns_what_follows_from_an_action_and_what_the_task_is_worth():
    mine = PixelExplorer(
        RND(8), 10, 2, PixelSizes(features=8, hidden=64), beta=1.0, learning_rate=3e-3, tau=0.05, seed=0
    )
    assert mine.critic is None  # nobody looks at values
    begun = mine.trunk[0].weight.clone()
    errors = []
    for _ in range(200):
        mine.pay(batch(16))
        with torch.no_grad():
            here, there = mine.trunk(batch(16).here), mine.trunk(batch(16).there)
            errors.append(float((mine.inverse(torch.cat([here, there], 1)) - batch(16).action).norm(dim=1).mean()))
    assert errors[-1] < errors[0] / 2
    assert not torch.equal(mine.trunk[0].weight, begun)
    worth = explorer(replace(BRIEF, bonus="vcse", learning_rate=3e-3))
    ends = replace(batch(16), discount=torch.zeros(16))
    for _ in range(200):
        worth.pay(ends)
    assert worth.report["critic_loss"] < 0.02  # of the reward itself where nothing follows


@pytest.mark.parametrize(("discount", "wanted"), [(0.5, 2.0), (0.0, 1.0)])
def test_what_the_task_is_worth_looks_as_far_ahead_as_it_goes_on(discount, wanted):
    mine = PixelExplorer(
        VCSE(3), 10, 2, PixelSizes(features=8, hidden=64), beta=1.0, learning_rate=3e-3, tau=0.2, seed=0
    )
    one = batch(16)
    given = replace(
        one, there=one.here, intended=one.action, following=one.action, reward=torch.ones(16),
        discount=torch.full((16,), discount),
    )  # fmt: skip
    for _ in range(400):
        mine.pay(given)
    assert (mine.critic(given.here, given.intended) - wanted).abs().max() < 0.1


def test_arms_are_the_bonuses_of_the_published_code():
    config = PIXELS["drqv2-dmc"]()
    assert (config.steps, config.noise(0), config.noise(config.steps), config.batch_size) == (510_000, 0.2, 0.2, 256)
    assert replace(config, bonus=_KINDS["plain"]).explores() is None
    small = replace(config, sizes=PixelSizes(features=8, hidden=16))
    assert explorer(replace(small, bonus=_KINDS["VCSE"])).bonus.k == 12
    conditional = [explorer(replace(small, bonus=_KINDS[arm])).bonus.conditional for arm in (OURS, HIDDEN)]
    assert conditional == [True, False]
    assert isinstance(explorer(replace(small, bonus=_KINDS["RND"])).bonus, RND)
    entropy = explorer(replace(small, bonus=_KINDS["state entropy"])).bonus
    assert isinstance(entropy, StateEntropy)
    assert entropy.normalise.kind == "mean"
    assert {task.algorithm for task in drqv2_dmc().tasks} == {"drqv2"}
    assert all(task.steps % drqv2_dmc().looks == 0 for task in drqv2_dmc().tasks)
    with pytest.raises(ConfigError, match="--beta: expected a number, 0 or more, got -1"):
        ExploringConfig(beta=-1.0)


def test_a_life_is_looked_at_and_its_pictures_are_thrown_away(tmp_path):
    pixels = replace(BRIEF, checkpoint_every=500)
    task = seen("cartpole-balance", steps=2_000, episodes=1, pixels=replace(pixels, repeat=4, update_every=100))
    life = Life(task=task, arm="VCSE", seed=1, looks=2, out=tmp_path)
    curve = life.curve()
    assert len(curve.returns) == 2
    assert min(curve.returns) > 0
    assert curve.successes == ()
    folder = tmp_path / "cartpole-balance"
    assert {path.name for path in folder.iterdir()} == {"VCSE-1", "VCSE-1.json"}
    assert not (folder / "VCSE-1/replay").exists()
    assert life.curve() == curve


def test_meta_world_pays_for_success_alone():
    name = sparse("reach", steps=10).name
    with closing(make(name, **sparse("reach", steps=10).settings)) as env:
        [played] = play([env], make_expert(name), [1])
    assert played.success
    assert set(np.unique(played.rewards)) == {0.0, 1.0}
    assert played.rewards[0] == 0
    assert sparse("reach", steps=10).short == "reach"


@pytest.mark.gpu
@pytest.mark.parametrize("bonus", ["none", "state-entropy", "rnd", "vcse"])
def test_it_lives_on_a_gpu_and_goes_on_there(bonus, tmp_path):
    config = replace(BRIEF, bonus=bonus, device="auto")
    _, run = lived(tmp_path / "run", config)
    assert np.isfinite(run.metrics()[-1]["critic_loss"])
    saved, run = lived(tmp_path / "run", config, resume=True)
    assert all(bool(weight.isfinite().all()) for weight in saved.values())
