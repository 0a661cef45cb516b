"""Exploration in Stable-Baselines3: the same agent without a weight, and a bonus that arrives where it trains."""

from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC, HerReplayBuffer
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, IdentityEnv, SimpleMultiObsEnv

from offbook.errors import ConfigError, DataError
from offbook.models.knn import joint_nearest
from offbook.systems.vcse import RND, VCSE, StateEntropy, sb3
from offbook.systems.vcse.bonus import Bonus
from offbook.systems.vcse.encoders import RandomProjection
from offbook.systems.vcse.explorer import CriticSettings, Explorer
from offbook.systems.vcse.sb3 import _tensors, encoder_for, explore
from offbook.systems.vcse.scaling import Linear

SMALL = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 3}
KINDS = {
    PPO: {"n_steps": 16, "batch_size": 16, "n_epochs": 2, **SMALL},
    A2C: {"n_steps": 8, **SMALL},
    SAC: {"learning_starts": 20, "batch_size": 16, "buffer_size": 200, **SMALL},
    DQN: {"learning_starts": 20, "batch_size": 16, "buffer_size": 200, "train_freq": 1, **SMALL},
}
STEPS = {PPO: 64, A2C: 64, SAC: 40, DQN: 60}


class Constant(Bonus):
    """Pays the same for every state."""

    def __init__(self, paid):
        super().__init__("none", "raise")
        self.paid = paid

    def novelty(self, features, values):
        return torch.full_like(values, self.paid)


def made(kind, algorithm=None, **more):
    world = "Pendulum-v1" if kind is SAC else "CartPole-v1"
    # Stable-Baselines3 writes into what it is given.
    return (algorithm or kind)("MlpPolicy", world, **deepcopy({**KINDS[kind], **more}))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_without_a_weight_it_is_the_same_agent_to_the_last_bit(kind):
    plain = made(kind).learn(STEPS[kind])
    other = made(kind, explore(kind, VCSE(k=3), beta=0)).learn(STEPS[kind])
    assert other.explorer.updates > 0
    for name, weight in plain.policy.state_dict().items():
        assert torch.equal(weight, other.policy.state_dict()[name]), name


class Seen(BaseCallback):
    """The first rollout, as the agent trains on it."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        self.returns = getattr(self, "returns", buffer.returns.copy())
        self.starts = getattr(self, "starts", buffer.episode_starts.copy())
        self.states = getattr(self, "states", buffer.observations.copy())


@pytest.mark.parametrize("kind", [PPO, A2C], ids=["PPO", "A2C"])
@pytest.mark.parametrize("propagate", ["gae", "step"])
def test_the_returns_that_it_trains_on_have_the_bonus(kind, propagate):
    seen = []
    for algorithm in (kind, explore(kind, Constant(2.0), beta=0.25, propagate=propagate)):
        seen.append(Seen())
        made(kind, algorithm, n_steps=32).learn(32, callback=seen[-1])
    gain = seen[1].returns - seen[0].returns
    wanted, ahead = np.zeros_like(gain), 0.0
    decay = 0.99 * (0.95 if kind is PPO else 1.0)
    for t in reversed(range(32)):
        ends = t == 31 or seen[0].starts[t + 1, 0]
        ahead = 0.5 + (0.0 if ends else decay * ahead)
        wanted[t] = ahead if propagate == "gae" else 0.5
    assert seen[0].starts[1:].sum() > 0
    np.testing.assert_allclose(gain, wanted, rtol=1e-4)


class Where(Bonus):
    """Pays what a state's first number says."""

    def __init__(self):
        super().__init__("none", "raise")

    def novelty(self, features, values):
        return features[:, 0]


@pytest.mark.parametrize("kind", [PPO, A2C], ids=["PPO", "A2C"])
@pytest.mark.parametrize("propagate", ["gae", "step"])
def test_each_state_is_paid_for_where_and_by_whom_it_was_met(kind, propagate):
    seen = []
    for algorithm in (kind, explore(kind, Where(), beta=100.0, propagate=propagate)):
        seen.append(Seen())
        worlds = make_vec_env("CartPole-v1", 3, seed=0)
        algorithm("MlpPolicy", worlds, **deepcopy({**KINDS[kind], "n_steps": 32})).learn(96, callback=seen[-1])
    gain, paid = seen[1].returns - seen[0].returns, 100 * seen[0].states[..., 0]
    wanted, ahead = np.zeros_like(gain), np.zeros(3)
    decay = 0.99 * (0.95 if kind is PPO else 1.0)
    for t in reversed(range(32)):
        goes_on = decay * (1 - seen[0].starts[t + 1]) if t < 31 else 0.0
        wanted[t] = ahead = paid[t] + goes_on * ahead
    assert paid.std(0).min() > 0
    assert paid.std(1).min() > 0
    np.testing.assert_allclose(gain, wanted if propagate == "gae" else paid, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 3])
def test_off_policy_the_critic_of_the_task_is_given_what_was_lived(monkeypatch, steps):
    world = gym.wrappers.TimeLimit(gym.make("CartPole-v1"), 12)
    settings = {**KINDS[DQN], "learning_starts": 100, "n_steps": steps, "gamma": 0.9}
    model = explore(DQN, Constant(5.0), beta=1.0)("MlpPolicy", world, **deepcopy(settings))
    memory, given, learn = model.replay_buffer, [], Explorer.transitions

    def noted(self, *of):
        given.append((memory.pos, *of))
        return learn(self, *of)

    monkeypatch.setattr(Explorer, "transitions", noted)
    model.learn(160)
    lived = {memory.observations[i, 0].tobytes(): i for i in range(memory.pos)}
    kinds = set()
    for newest, *batch in given:
        for first, last, reward, discount in zip(*batch, strict=True):
            i = at = lived[first.numpy().tobytes()]
            while at < min(i + steps, newest) - 1 and not memory.dones[at, 0]:
                at += 1
            cut = bool(memory.timeouts[at, 0])
            over = bool(memory.dones[at, 0]) and not cut
            assert np.array_equal(last.numpy(), memory.next_observations[at, 0])
            assert reward == pytest.approx(sum(0.9**n for n in range(at - i + 1)))
            assert discount == pytest.approx(0.0 if over else 0.9 ** (at - i + 1))
            kinds.add((over, cut))
    assert kinds == {(False, False), (True, False), (False, True)}


@pytest.mark.parametrize("kind", [SAC, DQN], ids=["SAC", "DQN"])
def test_sampled_rewards_have_the_bonus_and_stored_ones_do_not(kind, tmp_path):
    model = made(kind, explore(kind, StateEntropy(3, scaling="none"), beta=0.5)).learn(30)
    buffer = model.replay_buffer
    stored = buffer.rewards.copy()
    np.random.seed(0)  # noqa: NPY002 - what Stable-Baselines3 draws from
    batch = buffer.sample(16)
    np.random.seed(0)  # noqa: NPY002
    plain = super(type(buffer).__mro__[1], buffer).sample(16)
    bonus = StateEntropy(3, scaling="none")(plain.observations)
    torch.testing.assert_close(batch.rewards, plain.rewards + 0.5 * bonus[:, None])
    assert (buffer.rewards == stored).all()
    # On disk it is an ordinary buffer; loaded, it has the bonus again.
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    np.random.seed(0)  # noqa: NPY002
    torch.testing.assert_close(model.replay_buffer.sample(16).rewards, batch.rewards)


def test_hindsight_replay_is_saved_and_loaded(tmp_path):
    algorithm = explore(SAC, VCSE(3), beta=0.5)
    env = BitFlippingEnv(n_bits=3, continuous=True, max_steps=3)
    model = algorithm("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, **deepcopy(KINDS[SAC])).learn(30)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    buffer = model.replay_buffer
    assert buffer.env is model.get_env()
    assert (buffer.sample(16).rewards % 1 != 0).any()  # the task pays -1 or 0
    model.learn(10, reset_num_timesteps=False)


def test_the_critic_of_the_task_looks_beyond_a_cut_but_not_beyond_an_end(monkeypatch):
    given = []
    rollout = Explorer.rollout
    monkeypatch.setattr(Explorer, "rollout", lambda self, *of: given.append(of) or rollout(self, *of))
    env = make_vec_env("CartPole-v1", 2, seed=0, wrapper_class=gym.wrappers.TimeLimit,
                       wrapper_kwargs={"max_episode_steps": 18})  # fmt: skip
    model = explore(A2C, Constant(1.0), beta=1.0)("MlpPolicy", env, **deepcopy({**KINDS[A2C], "n_steps": 80}))
    model.explorer.critic[2].bias.data.fill_(100.0)
    before = model.explorer.value(torch.zeros(1, 4))
    model.learn(160)
    _, _, rewards, ended = given[0]
    # The pole falls now and then before the time is over.
    cut = rewards > 50
    assert 0 < cut.sum() < ended.sum()
    assert (ended[cut] == 1).all()
    assert (rewards[~cut] == 1).all()
    assert (rewards[cut] - 1 - 0.99 * before).abs().max() < 1


def test_the_critic_learns_what_the_task_pays():
    settings = CriticSettings(learning_rate=0.03, tau=0.1)
    made = {"size": 1, "beta": 1.0, "gamma": 0.5, "settings": settings, "seed": 0}
    for rollout in (True, False):
        explorer = Explorer(Constant(0.0), torch.nn.Identity(), **made)
        x = torch.linspace(-1, 1, 40)[:, None]
        for _ in range(300):
            if rollout:
                explorer.rollout(x.view(4, 10, 1), x[:10], x.view(4, 10), torch.ones(4, 10))
            else:
                explorer.transitions(x, x, x[:, 0], torch.full((40,), 0.5))
        wanted = x[:, 0] if rollout else 2 * x[:, 0]
        assert (explorer.value(x) - wanted).abs().max() < 0.2


@pytest.mark.parametrize(("ended", "wanted"), [(0.0, 2.0), (1.0, 1.0)])
def test_the_critic_looks_ahead_in_a_rollout(ended, wanted):
    settings = CriticSettings(learning_rate=0.03, tau=0.1)
    explorer = Explorer(Constant(7.0), torch.nn.Identity(), size=1, beta=1.0, gamma=0.5, settings=settings, seed=0)
    for _ in range(200):
        explorer.rollout(torch.ones(4, 10, 1), torch.ones(10, 1), torch.ones(4, 10), torch.full((4, 10), ended))
    assert explorer.value(torch.ones(1, 1)).item() == pytest.approx(wanted, abs=0.05)


def test_a_saved_model_goes_on_as_it_was(tmp_path):
    kind = explore(A2C, RND(4, width=8), beta=Linear(start=1.0, end=0.0, steps=100))
    model = made(A2C, kind).learn(40)
    model.save(tmp_path / "model.zip")
    again = kind.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert again.explorer.updates == model.explorer.updates > 0
    x = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0))
    rest = x[0], torch.ones(8, 2), torch.zeros(8, 2)
    for _ in range(3):
        assert torch.equal(model.explorer.rollout(x, *rest), again.explorer.rollout(x, *rest))
        assert torch.equal(model.explorer.value(x), again.explorer.value(x))
    assert again.learn(16, reset_num_timesteps=False).explorer.weight() == pytest.approx(1 - 56 / 100)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_loaded_agent_lives_on_like_the_one_that_was_saved(kind, tmp_path):
    size = 3 if kind is SAC else 4
    encoder = RandomProjection(size, 5, seed=9)
    algorithm = explore(kind, VCSE(3), beta=0.5, encoder=encoder)
    model = made(kind, algorithm).learn(STEPS[kind])
    model.save(tmp_path / "model.zip")
    other = explore(kind, VCSE(3), beta=0.5, encoder=RandomProjection(size, 5))
    again = other.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert torch.equal(again.explorer.encoder.weight, encoder.weight)
    if kind in (SAC, DQN):
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        again.load_replay_buffer(tmp_path / "buffer.pkl")
    lived = []
    for one in (model, again):
        one.set_env(model.get_env())
        one.set_random_seed(5)
        one.learn(16, reset_num_timesteps=False)
        lived.append({**one.policy.state_dict(), **dict(one.explorer.named_parameters())})
    assert model.explorer.updates > 0
    for name, weight in lived[0].items():
        assert torch.equal(weight, lived[1][name]), name


def test_off_policy_the_weight_goes_by_steps_and_what_was_paid_is_logged():
    model = made(SAC, explore(SAC, Constant(2.0), beta=Linear(start=1.0, end=0.0, steps=100)))
    model.learn(40)
    logged = model.logger.name_to_value
    assert logged["explore/beta"] == pytest.approx(0.6, abs=0.02)
    assert logged["explore/bonus_mean"] == 2
    of_task = -logged["explore/reward_mean"]  # of a pendulum all rewards are negative
    paid = 2 * logged["explore/beta"]
    assert logged["explore/bonus_share"] == pytest.approx(paid / (paid + of_task))
    assert logged["explore/critic_loss"] > 0


def test_a_weight_that_is_no_number_never_reaches_the_reward():
    model = made(A2C, explore(A2C, Constant(1.0), beta=lambda step: np.nan if step > 16 else 1.0))
    with pytest.raises(ConfigError, match="beta at environment step 24: expected a finite weight, got nan"):
        model.learn(40)


def test_what_is_logged():
    model = made(A2C, explore(A2C, VCSE(2), beta=0.1))
    model.learn(16, log_interval=10)
    logged = {name for name in model.logger.name_to_value if name.startswith("explore/")}
    names = "beta bonus_mean bonus_std reward_mean bonus_share zero_share skipped milliseconds critic_loss"
    assert logged == {f"explore/{name}" for name in names.split()}
    assert model.logger.name_to_value["explore/reward_mean"] == 1


def test_a_bonus_that_drowns_the_task_is_remarked_upon():
    explorer = Explorer(Constant(50.0), torch.nn.Identity(), size=1, beta=1.0, gamma=0.9,
                        settings=CriticSettings(), seed=0)  # fmt: skip
    x = torch.zeros(4, 1)
    for _ in range(12):
        explorer.transitions(x, x, torch.zeros(4), torch.ones(4))  # a task that has not paid yet is no comparison
    for _ in range(9):
        explorer.transitions(x, x, torch.ones(4), torch.ones(4))
    with pytest.warns(RuntimeWarning, match=r"over 90% .* with beta = 0.02 it would be a half"):
        explorer.transitions(x, x, torch.ones(4), torch.ones(4))


def test_a_task_that_seldom_pays_is_a_comparison_where_it_does():
    explorer = Explorer(Constant(50.0), torch.nn.Identity(), size=1, beta=1.0, gamma=0.9,
                        settings=CriticSettings(), seed=0)  # fmt: skip
    x, paid = torch.zeros(4, 1), torch.ones(4)
    for _ in range(9):
        for rewards in (paid, *[torch.zeros(4)] * 4):
            explorer.transitions(x, x, rewards, torch.ones(4))
    with pytest.warns(RuntimeWarning, match=r"over 90% .* even where the task pays"):
        explorer.transitions(x, x, paid, torch.ones(4))


@pytest.mark.parametrize("spoilt", ["features", "rewards"])
def test_one_batch_that_is_not_finite_spoils_no_other(spoilt):
    settings = {"size": 2, "beta": 1.0, "gamma": 0.9, "settings": CriticSettings(), "seed": 0}
    explorer = Explorer(VCSE(2, on_nan="zero"), torch.nn.Identity(), **settings)
    x, rewards = torch.randn(8, 2, 2, generator=torch.Generator().manual_seed(0)), torch.ones(8, 2)
    bad = torch.full_like(x, torch.nan) if spoilt == "features" else x
    bad_rewards = rewards * (torch.nan if spoilt == "rewards" else 1)
    explorer.rollout(bad, bad[0], bad_rewards, torch.zeros(8, 2))
    explorer.transitions(bad.flatten(0, 1), bad.flatten(0, 1), bad_rewards.flatten(), torch.ones(16))
    assert explorer.updates == 0
    assert explorer.report["skipped"] == explorer.bonus.skipped == (2 if spoilt == "features" else 0)
    assert (explorer.rollout(x, x[0], rewards, torch.zeros(8, 2)) != 0).all()
    assert explorer.updates > 0
    assert all(bool(weight.isfinite().all()) for weight in explorer.target.parameters())


def test_a_critic_that_diverged_is_told_with_the_step():
    model = made(A2C, explore(A2C, VCSE(2), beta=0.1))
    model.learn(16)
    model.explorer.critic[2].bias.data.fill_(torch.nan)
    said = "bonus VCSE, environment step 24: expected finite numbers, got values that are not"
    with pytest.raises(DataError, match=said):
        model.learn(16, reset_num_timesteps=False)


def test_pictures_are_encoded_at_a_size_beside_which_values_count():
    codes, pictures = (spaces.Box(0, 255, (side, side, 3), np.uint8) for side in (7, 84))
    assert encoder_for(codes).scale == 1
    seen = torch.randint(256, (64, 84, 84, 3), generator=torch.Generator().manual_seed(0))
    radius = joint_nearest(encoder_for(pictures)(seen), None, 12).distance[:, -1]
    assert 0.05 < radius.median() < 2  # values of a batch have a deviation of 1
    joined = encoder_for(spaces.Dict({"picture": pictures, "codes": codes}))
    assert [one.scale for one in joined.encoders] in ([1 / 255, 1], [1, 1 / 255])


class Shows(gym.Env):
    """Has observations of some kind."""

    action_space = spaces.Discrete(2)

    def __init__(self, space):
        self.observation_space = space


BOX = spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    "space",
    [
        spaces.Tuple([BOX]), spaces.Dict({"a": spaces.Dict({"b": BOX})}), spaces.Text(3), spaces.Sequence(BOX),
        spaces.Dict({"a": spaces.Text(3)}),
    ],
    ids=["tuple", "nested", "text", "sequence", "text in a dict"],
)  # fmt: skip
def test_observations_of_another_kind_are_refused_in_a_sentence(space):
    for kind in (A2C, DQN):
        with pytest.raises(ConfigError, match=r"observation.*: expected Box, Discrete, MultiDiscrete, MultiBinary, or"):
            explore(kind, VCSE(2), beta=0.1)("MultiInputPolicy", Shows(space), device="cpu")


def test_observations_of_every_kind_have_features():
    space = spaces.Dict(
        {
            "picture": spaces.Box(0, 255, (7, 7, 3), np.uint8),
            "kind": spaces.Discrete(4),
            "many": spaces.MultiBinary(3),
            "vector": spaces.Box(-1, 1, (2, 5)),
        }
    )
    space.seed(0)
    one = [space.sample() for _ in range(6)]
    stacked = {
        name: np.stack([np.asarray(seen[name]).reshape(space[name].shape or (1,)) for seen in one]) for name in space
    }
    features = encoder_for(space)(_tensors(stacked, space, torch.device("cpu")))
    assert features.shape == (6, 64 + 4 + 3 + 10)
    explore(A2C, VCSE(2), beta=0.1)("MlpPolicy", IdentityEnv(dim=4), n_steps=8, device="cpu").learn(16)
    algorithm = explore(A2C, StateEntropy(2), beta=0.1)
    mixed = algorithm("MultiInputPolicy", SimpleMultiObsEnv(), n_steps=8, device="cpu").learn(8)
    assert mixed.explorer.critic[0].in_features == 64 + 5  # of a picture, and of a vector


def test_a_rollout_is_encoded_in_parts(monkeypatch):
    returns = []
    for at_a_time in (1_024, 3):
        monkeypatch.setattr(sb3, "_STATES", at_a_time)
        model = made(A2C, explore(A2C, VCSE(2), beta=0.1))
        returns.append(model.learn(8).rollout_buffer.returns)
    np.testing.assert_allclose(returns[0], returns[1], rtol=1e-5)


def test_wrong_use_is_told_in_a_sentence():
    with pytest.raises(ConfigError, match="propagate: expected gae or step, got 'both'"):
        explore(A2C, VCSE(2), beta=0.1, propagate="both")
    for beta in (float("nan"), float("inf"), "x", None):
        with pytest.raises(ConfigError, match="beta: expected a finite number or a function"):
            explore(A2C, VCSE(2), beta=beta)
    with pytest.raises(ConfigError, match="on-policy or off-policy one, got BaseAlgorithm"):
        explore(BaseAlgorithm, VCSE(2), beta=0.1)
    with pytest.raises(ConfigError, match="critic batch: expected 2 or more"):
        CriticSettings(batch=1)
