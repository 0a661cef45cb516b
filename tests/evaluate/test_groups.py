"""One of eight buttons is right, which one is hidden in the seed; a trial is three presses."""

import json
from dataclasses import replace
from itertools import product
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image

from offbook.client.protocol import ActionSpec, FunctionPolicy, ObservationSpec, PolicyMeta
from offbook.errors import ConfigError
from offbook.evaluate.figures import draw_groups
from offbook.evaluate.groups import Groups, evaluate_trials, group_rows, luck_only_max, retry_value
from offbook.evaluate.stats import bootstrap_mean, clopper_pearson, paired_bootstrap
from offbook.runs.seeding import evaluation_seeds, generator
from offbook.sim.trials import TRIAL

NAME = "gym:OffbookButtons-v0"
BUTTONS = ActionSpec(size=1, low=(0.0,), high=(7.0,), choices=8)


class Buttons(gym.Env[Any, Any]):
    metadata = {"render_modes": ["rgb_array"], "control_hz": 4.0}  # noqa: RUF012
    mission = "press"
    observation_space = spaces.Dict({"answer": spaces.Box(0, 7, (1,), np.float32)})
    action_space = spaces.Discrete(8)

    def __init__(self, render_mode: str | None = None, worth: float = 1.0) -> None:
        self.render_mode, self._worth = render_mode, worth

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._answer = int(self.np_random.integers(8))
        self._steps = 0
        return {"answer": np.array([self._answer], np.float32)}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        right = bool(action == self._answer)
        seen = {"answer": np.array([self._answer], np.float32)}
        return seen, self._worth * right, False, self._steps == 3, {"success": right}


gym.register("OffbookButtons-v0", entry_point=Buttons)


class Scripted:
    """What all of the policies below have in common; keeps what it was told, to look at."""

    def __init__(self, *state, chunk=1):
        self.meta = PolicyMeta(
            name=type(self).__name__, observation=ObservationSpec(state=state), action=BUTTONS, chunk=chunk
        )
        self.prompts, self.seen, self.recalled = {}, {}, {}

    def reset(self, sessions, prompts):
        self.prompts.update(zip(sessions, prompts, strict=True))
        self.seen.update((session, []) for session in sessions)

    def infer(self, observation):
        for session, state, time in zip(observation.sessions, observation.state, observation.time, strict=True):
            self.seen[session].append((*state.tolist(), float(time)))
        pressed = [self.press(*pair) for pair in zip(observation.sessions, observation.state, strict=True)]
        return np.array(pressed, np.float32).reshape(-1, 1, 1)


class Guesser(Scripted):
    """Remembers nothing, though it listens."""

    def __init__(self):
        super().__init__()
        self.rngs, self.dropped, self.cut = {}, 0, 0

    def reset(self, sessions, prompts):
        super().reset(sessions, prompts)
        self.rngs.update((session, generator(0, session)) for session in sessions)

    def press(self, session, state):
        return self.rngs[session].integers(8)

    def recall(self, session, trials):
        self.recalled[session] = trials


class Searcher(Guesser):
    """Tries one button after the other; once it has found the right one in any trial, it presses that."""

    def __init__(self):
        super().__init__()
        self.meta = replace(self.meta, observation=ObservationSpec(state=(("answer", 1), (TRIAL, 3))))
        self.tried = {}

    def reset(self, sessions, prompts):
        super().reset(sessions, prompts)
        self.tried.update((session, []) for session in sessions)

    def press(self, session, state):
        tried = self.tried[session]
        if tried and len(tried[-1]) == 1:
            tried[-1] += (state[3],)
        found = [button for button, reward in tried if reward > 0]
        untried = sorted(set(range(8)) - {button for button, _ in tried})
        tried.append((found[0] if found else self.rngs[session].choice(untried),))
        return tried[-1][0]

    def recall(self, session, trials):
        super().recall(session, trials)
        for trial in trials:
            self.tried[session] += zip(trial.action[:, 0].astype(int), trial.reward, strict=True)


class Counter(Guesser):
    """Is better the later the trial, whatever happened in the earlier ones."""

    def __init__(self):
        super().__init__()
        self.meta = replace(self.meta, observation=ObservationSpec(state=((TRIAL, 3), ("answer", 1))))

    def press(self, session, state):
        number, step, _, answer = state
        return answer if step < number else (answer + 1) % 8


@pytest.fixture(scope="module")
def played():
    return {
        kind.__name__: evaluate_trials(NAME, kind(), groups=32, foreign=True, fresh=12)
        for kind in (Searcher, Guesser, Counter)
    }


def contains_0(interval):
    return interval.low <= 0 <= interval.high


def test_only_the_use_of_experience_is_a_context_effect(played):
    searcher, guesser, counter = (played[name].summary for name in ("Searcher", "Guesser", "Counter"))
    assert searcher["gain"].low > 1.5
    assert searcher["context_effect"].low > 1.5
    assert contains_0(guesser["gain"])
    assert contains_0(guesser["context_effect"])
    # This one looks like learning if one asks only whether later trials are better.
    assert counter["gain"].low == 3
    assert counter["context_effect"].low == counter["context_effect"].high == 0
    assert retry_value(played["Searcher"], played["Guesser"]).low > 2
    assert contains_0(retry_value(played["Guesser"], played["Guesser"]))


def test_returns_are_those_of_the_trials(played):
    counter = played["Counter"]
    assert counter.seeds == tuple(evaluation_seeds(0, 32))
    assert np.array_equal(counter.returns, [[0, 1, 2, 3]] * 32)
    assert np.array_equal(counter.steps, np.full((32, 4), 3))
    assert counter.successes == (True,) * 32
    assert counter.summary["success"] == clopper_pearson(32, 32)
    assert np.array_equal(counter.foreign, np.full(32, 3))
    # 8 buttons are found in 9 presses; the next group's button is the own one now and then.
    searcher = played["Searcher"]
    assert np.array_equal(searcher.returns[:, 3], np.full(32, 3))
    answers = [np.random.Generator(np.random.PCG64(seed)).integers(8) for seed in searcher.seeds]
    assert searcher.foreign.any()
    assert np.array_equal(searcher.foreign, 3.0 * (np.array(answers) == np.roll(answers, -1)))


def test_a_fresh_trial_knows_of_no_other(played):
    # What counts trials never gets beyond the first; what searches finds no more than in its first.
    assert not played["Counter"].fresh.any()
    searcher = played["Searcher"]
    assert searcher.summary["first"].low < searcher.fresh.mean() < searcher.summary["first"].high
    # For what remembers nothing the maximum is luck, for what does it is not.
    guesser = played["Guesser"].summary
    assert guesser["max"].low < guesser["luck_only_max"].value < guesser["max"].high
    assert searcher.summary["max"].low > searcher.summary["luck_only_max"].high


@pytest.mark.parametrize("kind", [Searcher, Guesser])
def test_how_many_play_at_once_makes_no_difference(kind):
    alone, eight = (
        evaluate_trials(NAME, kind(), groups=9, foreign=True, fresh=2, parallel=parallel) for parallel in (1, 8)
    )
    assert alone.to_json() == eight.to_json()
    assert alone.fresh.any()
    assert not np.array_equal(evaluate_trials(NAME, kind(), groups=9, seed=1).returns, alone.returns)


def test_foreign_trials_are_those_of_the_next_group_as_if_lived():
    policy = Searcher()
    groups = evaluate_trials(NAME, policy, trials=3, groups=4, foreign=True, parallel=3)
    for i, seed in enumerate(groups.seeds):
        trials = policy.recalled[str(seed)]
        assert [float(trial.reward.sum()) for trial in trials] == groups.returns[(i + 1) % 4][:2].tolist()
        # The state is without what tells of the trial itself, as in recordings.
        assert [trial.state.shape for trial in trials] == [(3, 1)] * 2
        first = policy.seen[str(seed)][0]
        assert first[1:4] == (2, 0, trials[-1].reward[-1])
        assert policy.prompts[str(seed)] == "press"
    assert {trial.state[0, 0] for trial in trials} == {policy.seen[str(groups.seeds[0])][0][0]}


def test_fresh_trials_are_sessions_of_their_own():
    policy = Searcher()
    evaluate_trials(NAME, policy, trials=1, groups=2, fresh=3)
    names = [f"{seed}.{number}" for seed in evaluation_seeds(0, 2) for number in range(3)]
    assert set(names) <= policy.seen.keys()
    for name in names:
        seen = policy.seen[name]
        assert policy.prompts[name] == "press"
        assert [one[1:3] for one in seen] == [(0, 0), (0, 1), (0, 2)]
        assert seen[0][3] == 0
        assert [one[-1] for one in seen] == [0, 0.25, 0.5]
    # A policy that does not look at the number of the trial is not shown it.
    blind = Guesser()
    evaluate_trials(NAME, blind, trials=1, groups=1, fresh=2)
    assert {len(one) for seen in blind.seen.values() for one in seen} == {1}


def test_settings_and_shorter_trials():
    policy = Counter()
    groups = evaluate_trials(NAME, policy, trials=2, groups=3, settings={"worth": 0.5}, max_steps=2)
    assert np.array_equal(groups.returns, [[0, 0.5]] * 3)
    assert np.array_equal(groups.steps, np.full((3, 2), 2))
    assert set(policy.prompts.values()) == {"press"}
    assert groups.successes == (False,) * 3
    assert (groups.foreign, groups.fresh) == (None, None)


RETURNS = np.array([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]] * 6)


def made(returns=RETURNS, **changes):
    facts = {"environment": "a:b", "settings": {}, "policy": "x", "seeds": tuple(range(len(returns)))}
    return Groups(**{**facts, "returns": returns, "steps": np.ones(returns.shape, np.int64), **changes})


def test_intervals_of_known_returns():
    foreign, fresh = np.tile([1.0, 2.0], 6), np.tile([[0.0, 1.0], [2.0, 2.0]], (6, 1))
    summary = made(foreign=foreign, fresh=fresh).summary
    values = {name: interval.value for name, interval in summary.items()}
    assert values == pytest.approx(
        {"first": 0.5, "last": 1.5, "mean": 7 / 6, "max": 2.5, "gain": 1, "context_effect": 0, "luck_only_max": 23 / 16}
    )
    assert {interval.n for interval in summary.values()} == {12}
    assert summary["first"] == bootstrap_mean(RETURNS[:, 0])
    # Differences are paired: every group gains 1, so that there is nothing to doubt, while first and last both vary.
    assert (summary["gain"].low, summary["gain"].high) == (1, 1)
    assert summary["last"].low < 1.5 < summary["last"].high
    assert summary["context_effect"] == paired_bootstrap(RETURNS[:, 2], foreign)
    assert all(summary[name].method.startswith("max of 3,") for name in ("max", "luck_only_max"))
    told = json.loads(json.dumps(made().to_json(), allow_nan=False))
    assert (told["trials"], told["groups"], told["returns"]) == (3, 12, RETURNS.tolist())
    assert {"first", "last", "mean", "max"} <= told["summary"].keys()
    assert "context_effect" not in told["summary"]


@pytest.mark.parametrize(("m", "n"), [(1, 3), (3, 2), (4, 4), (5, 3)])
def test_luck_only_max_against_all_draws(m, n):
    fresh = np.round(np.random.default_rng(m).normal(size=(3, m)), 1)
    every = np.array(list(product(range(m), repeat=n)))
    assert luck_only_max(fresh, n) == pytest.approx(fresh[:, every].max(axis=2).mean(axis=1))


def test_retry_value_is_of_the_same_groups():
    single = made(np.tile([[1.0, 0.0], [0.0, 1.0]], (6, 1)), policy="single")
    value = retry_value(made(), single)
    assert value == paired_bootstrap(RETURNS[:, 2], np.full(12, 0.5))
    assert value.value == 1
    for what, changed in (
        ("environment", {"environment": "a:c"}),
        ("settings", {"settings": {"worth": 2}}),
        ("seeds", {"seeds": tuple(range(1, 13))}),
    ):
        with pytest.raises(ConfigError, match=f"retry value of 'x' over 'single': expected the same {what}"):
            retry_value(made(), made(single.returns, policy="single", **changed))


class Cramped(Searcher):
    """Has room for two trials."""

    def press(self, session, state):
        self.dropped += int(state[1] >= 2 and state[2] == 0)
        self.cut += int(state[1] == 1)
        return super().press(session, state)


def test_trials_that_went_out_of_view_are_counted():
    policy = Cramped()
    policy.dropped = 100
    found = evaluate_trials(NAME, policy, trials=4, groups=3, foreign=True)
    assert (found.dropped, found.cut) == (2 * 3, 3 * 3)
    rows = group_rows({"cramped": found, "made": made()})[1]
    assert rows[-2:] == [["trials that went out of view", "6", "0"], ["steps that went out of view", "9", "0"]]
    again = Groups.from_json(json.loads(json.dumps(found.to_json())))
    assert again.to_json() == found.to_json()
    assert not any("out of view" in row[0] for row in group_rows({"made": made()})[1])


def test_rows_tell_of_how_many_the_maximum_is():
    head, rows = group_rows({"three": made(foreign=RETURNS[:, 0]), "two": made(RETURNS[:, :2])})
    assert head == ["return", "three", "two"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["trials"] == ["3", "2"]
    assert [cell[:3] for cell in cells["mean of trials"]] == ["1.1", "1 ["]
    assert cells["max of 3"] == [str(made().summary["max"]), "-"]
    assert cells["max of 2"][0] == "-"
    assert cells["context effect: last - foreign"][1] == "-"
    assert not any("luck" in row[0] or "success" in row[0] for row in rows)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"trials": 0}, r"trials: expected 1 or more, got 0"),
        ({"groups": 0}, r"groups: expected 1 or more, got 0"),
        ({"parallel": 0}, r"parallel: expected 1 or more, got 0"),
        ({"max_steps": 0}, r"max_steps: expected 1 or more, got 0"),
        ({"fresh": -1}, r"fresh: expected 0 or more, got -1"),
        ({"foreign": True, "trials": 1}, r"2 groups of 2 trials or more, to give foreign trials, got 4 of 1"),
        ({"foreign": True, "groups": 1}, r"2 groups of 2 trials or more, to give foreign trials, got 1 of 2"),
    ],
)
def test_what_cannot_be_played_is_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_trials(NAME, Searcher(), **({"trials": 2, "groups": 4} | bad))


def test_policies_that_do_not_fit_are_refused():
    meta = Guesser().meta
    forgetful = FunctionPolicy(meta, lambda state, images: np.zeros(1, np.float32))
    with pytest.raises(ConfigError, match=r"policy 'Guesser': expected a policy that has recall\(\)"):
        evaluate_trials(NAME, forgetful, foreign=True)
    chunky = FunctionPolicy(replace(meta, chunk=2), lambda state, images: np.zeros(2, np.float32))
    with pytest.raises(ConfigError, match=r"expected one action at a time, got chunks of 2"):
        evaluate_trials(NAME, chunky)
    for fresh in ([1.0], [[]], [[np.nan]]):
        with pytest.raises(ConfigError, match="luck_only_max: expected finite returns"):
            luck_only_max(fresh, 2)
    with pytest.raises(ConfigError, match="n: expected 1 or more, got 0"):
        luck_only_max([[1.0]], 0)


def test_the_figure_is_a_picture(tmp_path, played):
    draw_groups(tmp_path / "all.png", played)
    draw_groups(tmp_path / "one.png", {"one group": made(RETURNS[:1])})
    for name in ("all.png", "one.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > picture.size[1] > 300
