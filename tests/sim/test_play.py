import gymnasium as gym
import numpy as np
import pytest

from offbook.client.protocol import ActionSpec, FunctionPolicy, Observation, ObservationSpec, PolicyMeta
from offbook.errors import ConfigError, PolicyError
from offbook.sim.adapters import make
from offbook.sim.experts import RandomPolicy, random_policy
from offbook.sim.play import play
from offbook.sim.spaces import action_spec, observation_spec


@pytest.fixture
def carts():
    envs = [make("gym:CartPole-v1") for _ in range(3)]
    yield envs
    for env in envs:
        env.close()


def by_hand(env: gym.Env, policy, seed: int):
    """The loop as one would write it for one environment."""
    policy.reset([str(seed)], [""])
    observation, _ = env.reset(seed=seed)
    observations, actions, rewards = [observation], [], []
    while True:
        state = observation.astype(np.float32)[None]
        seen = Observation(sessions=(str(seed),), state=state, images={}, time=np.zeros(1))
        for action in policy.infer(seen)[0]:
            observation, reward, terminated, truncated, _ = env.step(int(action[0]))
            observations.append(observation)
            actions.append(action)
            rewards.append(reward)
            if terminated or truncated:
                return np.array(observations), np.array(actions), np.array(rewards), terminated


def test_several_at_once_equal_a_loop_by_hand(carts):
    seeds = [11, 3, 7, 200, 5, 42, 8]
    policy = random_policy(carts[0])
    together = list(play(carts, policy, seeds))
    assert [played.seed for played in together] == seeds
    for played in together:
        observations, actions, rewards, terminated = by_hand(carts[0], policy, played.seed)
        np.testing.assert_array_equal(played.fields["observation"], observations)
        np.testing.assert_array_equal(played.fields["action"], actions)
        np.testing.assert_array_equal(played.rewards, rewards)
        assert played.terminated == terminated
        assert played.return_ == rewards.sum()
        assert played.steps == len(rewards)


class Alternating:
    """Pushes left and right in chunks of three; writes down who asked."""

    def __init__(self, env):
        spec = observation_spec(env.observation_space)
        self.meta = PolicyMeta(name="alternating", observation=spec, action=action_spec(env.action_space), chunk=3)
        self.asked = []

    def reset(self, sessions, prompts):
        self.asked.append(("reset", sessions))

    def infer(self, observation):
        self.asked.append(("infer", observation.sessions, observation.time.copy()))
        return np.tile(np.array([[0.0], [1.0], [0.0]], np.float32), (len(observation.sessions), 1, 1))


def test_every_action_of_a_chunk_is_executed_and_requests_are_batched(carts):
    policy = Alternating(carts[0])
    first, second = play(carts[:2], policy, [1, 2], max_steps=6)
    assert first.fields["action"].ravel().tolist() == [0, 1, 0, 0, 1, 0]
    assert first.truncated
    assert not first.terminated
    assert second.steps == 6
    asked = [entry[1] for entry in policy.asked if entry[0] == "infer"]
    assert asked == [("1", "2"), ("1", "2")]
    times = [entry[2] for entry in policy.asked if entry[0] == "infer"]
    np.testing.assert_allclose(times, [[0, 0], [3 / 50, 3 / 50]])


def test_what_is_not_kept_is_not_there_but_the_result_is_the_same(carts):
    policy = random_policy(carts[0])
    [kept], [dropped] = play(carts[:1], policy, [9]), play(carts[:1], policy, [9], keep=False)
    assert not dropped.fields
    np.testing.assert_array_equal(kept.rewards, dropped.rewards)


def test_watchers_see_every_step_once(carts):
    seen = []
    [played] = play(carts[:1], random_policy(carts[0]), [9], frames=lambda seed, step, env: seen.append((seed, step)))
    assert seen == [(9, step) for step in range(played.steps + 1)]


def test_policies_that_do_not_fit_or_answer_nonsense_are_refused(carts):
    wrong = RandomPolicy(ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0)))
    with pytest.raises(ConfigError, match="CartPole"):
        list(play(carts, wrong, [1]))
    meta = PolicyMeta(name="broken", observation=ObservationSpec(), action=action_spec(carts[0].action_space))
    with pytest.raises(PolicyError, match="finite"):
        list(play(carts, FunctionPolicy(meta, lambda state, images: np.array([np.nan], np.float32)), [1]))
    with pytest.raises(PolicyError, match="0 to 1"):
        list(play(carts, FunctionPolicy(meta, lambda state, images: np.array([5.0], np.float32)), [1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [1, 1]}, "repeated seed"),
        ({"seeds": [1], "options": []}, "one for each seed"),
        ({"seeds": [1], "max_steps": 0}, "max_steps"),
        ({"seeds": [1], "envs": []}, "one environment"),
    ],
)
def test_arguments_that_do_not_agree_are_refused(carts, arguments, message):
    given = {"envs": carts, **arguments}
    with pytest.raises(ConfigError, match=message):
        list(play(given.pop("envs"), random_policy(carts[0]), given.pop("seeds"), **given))


def test_nothing_to_play_plays_nothing(carts):
    assert list(play(carts, random_policy(carts[0]), [])) == []
