"""Chains of trials: relabelled by the definition, packed without holes, and a function of seed and step alone."""

import hashlib
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import chisquare

from offbook.data.chains import ChainSampler, relabel
from offbook.data.returns import ReturnSpec, returns_to_go
from offbook.data.store import EpisodeStore, FieldSpec, Schema
from offbook.errors import ConfigError, DataError

SCHEMA = Schema(
    (
        FieldSpec("code", "float64", (2,), "observation"),
        FieldSpec("front", "uint8", (16, 16, 3), "observation"),
        FieldSpec("action", "int64", (), "action"),
        FieldSpec("earned", "float64", (), "reward"),
    )
)
FIELDS = ["front", "code", "action"]


def tries(path, rewards, **columns):
    """A store with an episode for each list of rewards; each step carries its episode and its place in it, from 1."""
    with EpisodeStore.create(path, SCHEMA) as writer:
        for i, earned in enumerate(rewards):
            steps = np.arange(1, len(earned) + 2)
            fields = {
                "code": np.stack([np.full(len(steps), i + 1.0), steps], 1),
                "front": np.broadcast_to((10 * i + steps)[:, None, None, None], (len(steps), 16, 16, 3)),
                "action": steps[:-1],
                "earned": np.array(earned, np.float64),
            }
            fields["front"] = np.ascontiguousarray(fields["front"], np.uint8)
            outcome = {name: values[i] for name, values in columns.items()}
            writer.append(fields, terminated=True, truncated=False, sync=False, **outcome)
    return EpisodeStore.open(path)


def mixed(path):
    """Three tasks of six, four and two episodes of different lengths, several of which tie; seeds 0 and 1 by turns."""
    random = np.random.default_rng(5)
    rewards = [random.integers(-2, 3, random.integers(1, 8)).tolist() for _ in range(12)]
    tasks = np.array(list("abacabbacaab"))
    return tries(path, rewards, task=tasks.tolist(), seed=[i // 2 % 2 for i in range(12)], source=["x"] * 12)


def reference(trials, kind):
    """Targets and ends that reached them, in exact arithmetic."""
    returns = [sum(map(Fraction, trial)) for trial in trials]
    targets, done = [], []
    for trial, total in zip(trials, returns, strict=True):
        target = max(returns) if kind == "max" else total
        done += [False] * (len(trial) - 1) + [total == target]
        for reward in trial:
            targets.append(float(target))
            target -= Fraction(reward)
    return targets, done


def test_a_thousand_chains_are_relabelled_by_the_definition():
    random = np.random.default_rng(0)
    ties = 0
    for case in range(1000):
        scale = 10.0 ** random.integers(-3, 4)
        trials = [(scale * random.normal(size=random.integers(1, 12))).tolist() for _ in range(random.integers(1, 6))]
        best = max(trials, key=lambda trial: sum(map(Fraction, trial)))
        # The same rewards in another order: a sum that rounds at every step would not always tie.
        trials += [random.permutation(best).tolist() for _ in range(case % 3)]
        trials.sort(key=lambda trial: sum(map(Fraction, trial)))
        rewards, lengths = np.concatenate(trials), np.array([len(trial) for trial in trials])
        for kind in ("max", "own"):
            targets, done = relabel(rewards, lengths, kind)
            expected, ends = reference(trials, kind)
            np.testing.assert_allclose(targets, expected, rtol=1e-5, atol=1e-12 * scale)
            assert done.tolist() == ends
            np.testing.assert_allclose((targets - rewards)[done], 0, atol=1e-12 * scale)
            if kind == "max":
                assert set(targets[np.cumsum(lengths) - lengths]) == {float(sum(map(Fraction, best)))}
                ties += int(done.sum()) - 1
    assert ties == 999


def test_the_worked_example():
    rewards, lengths = np.array([1.0, 0.0, 1.0, 2.0]), np.array([2, 2])
    targets, done = relabel(rewards, lengths)
    assert (targets.tolist(), done.tolist()) == ([3, 2, 3, 2], [False, False, False, True])
    targets, done = relabel(rewards, lengths, "own")
    assert (targets.tolist(), done.tolist()) == ([1, 0, 3, 2], [False, True, False, True])
    assert relabel(np.array([-1, 2]), np.array([2]))[0].tolist() == [1, 2]  # rises where a reward is negative


@pytest.mark.parametrize(
    ("rewards", "lengths", "words"),
    [
        ([1.0, 2.0], [1, 2], "2 rewards for trials of"),
        ([1.0, 2.0], [2, 0], "one step or more"),
        ([], [], "0 rewards"),
        ([1.0, 2.0, np.nan, 1.0], [1, 3], "chain, trial 1, step 1: expected a finite reward, got nan"),
    ],
)
def test_what_cannot_be_relabelled_is_explained(rewards, lengths, words):
    with pytest.raises(DataError, match=words):
        relabel(np.array(rewards, np.float64), np.array(lengths, np.int64))


@pytest.mark.parametrize("kind", ["max", "own"])
@pytest.mark.parametrize("order", ["ascending", "random", "time"])
@pytest.mark.parametrize(("group", "names"), [("task", "abc"), ("seed", ["a/0", "a/1", "b/0", "b/1", "c/0", "c/1"])])
@pytest.mark.parametrize("max_steps", [None, 12])
def test_chains_are_the_stores_rows_packed(tmp_path, kind, order, group, names, max_steps):
    store = mixed(tmp_path / "s")
    keys = [name if group == "task" else f"{name}/{seed}" for name, seed in zip(
        store.episodes["task"].tolist(), store.episodes["seed"].tolist(), strict=True
    )]  # fmt: skip
    sampler = ChainSampler(
        store, FIELDS, n_trials=(1, 4), group=group, order=order, relabel=kind, max_steps=max_steps, seed=2
    )
    assert sampler.groups == {name: count for name, count in sorted(Counter(keys).items()) if name in names}
    assert sampler.short_groups == sum(count < 4 for count in sampler.groups.values())
    whole = [store.episode(i) for i in range(12)]
    returns = np.array([episode.return_ for episode in whole])
    np.testing.assert_array_equal(sampler.returns, returns)
    assert sampler.best == {name: max(r for r, k in zip(returns, keys, strict=True) if k == name) for name in names}
    chains = sampler.sample(200, 3)
    assert chains.valid.any(0).all()
    orders, shortened = set(), 0
    for row, numbers in enumerate(chains.episode.tolist()):
        trials = [number for number in numbers if number >= 0]
        assert numbers == trials + [-1] * (4 - len(trials))
        assert len(set(trials)) == len(trials)
        assert len({keys[number] for number in trials}) == 1
        orders.add(tuple(trials))
        if order == "ascending":
            assert trials == sorted(trials, key=lambda number: (returns[number], number))
        elif order == "time":
            assert trials == sorted(trials)
        lengths = np.array([whole[number].length for number in trials])
        total = int(lengths.sum())
        assert max_steps is None or total <= max_steps
        assert chains.valid[row].tolist() == [True] * total + [False] * (chains.valid.shape[1] - total)
        rewards = np.concatenate([whole[number].fields["earned"] for number in trials])
        target, done = relabel(rewards, lengths, kind)
        expected = {
            "code": np.concatenate([whole[number].fields["code"][:-1] for number in trials]).astype(np.float32),
            "front": np.concatenate([whole[number].fields["front"][:-1] for number in trials]),
            "action": np.concatenate([whole[number].fields["action"] for number in trials]),
            "reward": rewards.astype(np.float32),
            "target": target.astype(np.float32),
            "done": done,
        }
        assert set(chains.data) == set(expected)
        places = {
            "trial": np.repeat(np.arange(len(trials)), lengths),
            "step": np.concatenate([np.arange(length) for length in lengths]),
        }
        for name, values in {**expected, **places}.items():
            found = (chains.data[name] if name in expected else getattr(chains, name))[row]
            np.testing.assert_array_equal(found[:total], values)
            assert not found[total:].any()
            assert found.dtype == values.dtype
    assert chains.data["code"].shape == (*chains.valid.shape, 2)
    if order == "random":
        assert any(drawn[::-1] in orders for drawn in orders if len(drawn) == 2)
    if max_steps is not None:
        free = ChainSampler(store, FIELDS, n_trials=(1, 4), group=group, order=order, relabel=kind, seed=2)
        for long, short in zip(free.sample(200, 3).episode.tolist(), chains.episode.tolist(), strict=True):
            long, short = ([number for number in numbers if number >= 0] for numbers in (long, short))
            assert short == long[len(long) - len(short) :]
            if short != long:
                shortened += 1
                assert sum(whole[number].length for number in long[len(long) - len(short) - 1 :]) > max_steps
        assert shortened > 0
    assert chains.cut == shortened


def test_the_number_of_trials_is_uniform_and_both_ends_are_drawn(tmp_path):
    store = tries(tmp_path / "s", [[i] for i in range(9)])
    counts = (ChainSampler(store, [], n_trials=(1, 4)).sample(10_000, 0).episode >= 0).sum(1)
    assert chisquare(np.bincount(counts, minlength=5)[1:]).pvalue > 0.01
    assert sorted(set(counts.tolist())) == [1, 2, 3, 4]


def test_all_choices_of_trials_have_equal_chances(tmp_path):
    store = tries(tmp_path / "s", [[i] for i in range(4)])
    drawn = ChainSampler(store, [], n_trials=(3, 3), order="random").sample(10_000, 0).episode
    counts = Counter(map(tuple, drawn.tolist()))
    assert sorted(counts) == sorted(permutations(range(4), 3))
    assert chisquare(list(counts.values())).pvalue > 0.01


def test_groups_are_drawn_by_their_episodes_and_short_ones_give_what_they_have(tmp_path):
    store = tries(tmp_path / "s", [[i] for i in range(10)], source=["x"] * 7 + ["y"] * 2 + ["z"])
    sampler = ChainSampler(store, [], n_trials=(1, 4), group="source")
    assert (sampler.groups, sampler.short_groups) == ({"x": 7, "y": 2, "z": 1}, 2)
    drawn = sampler.sample(10_000, 0).episode
    group = np.repeat([0, 1, 2], [7, 2, 1])[drawn[:, 0]]
    assert chisquare(np.bincount(group), [7000, 2000, 1000]).pvalue > 0.01
    counts = (drawn >= 0).sum(1)
    assert chisquare(np.bincount(counts[group == 1])[1:], (group == 1).sum() * np.array([0.25, 0.75])).pvalue > 0.01
    assert set(counts[group == 2].tolist()) == {1}


def test_only_the_best_share_of_each_group_is_drawn(tmp_path):
    store = tries(tmp_path / "s", [[r] for r in (3, 1, 2, 9, 7, 8, 7)], task=["a"] * 3 + ["b"] * 4)
    sampler = ChainSampler(store, [], n_trials=(1, 2), within=0.5)
    assert sampler.groups == {"a": 2, "b": 2}
    assert (sampler.episodes.tolist(), sampler.returns.tolist()) == ([0, 2, 3, 5], [3, 2, 9, 8])
    chains = sampler.sample(100, 0)
    assert {tuple(numbers) for numbers in chains.episode.tolist()} == {(2, 0), (5, 3), *((i, -1) for i in (0, 2, 3, 5))}
    np.testing.assert_array_equal(chains.data["reward"][:, 0], store.field("earned")[chains.episode[:, 0]])
    few = ChainSampler(store, [], n_trials=(1, 1), within=0.01, episodes=np.array([6, 4, 1]))
    assert (few.episodes.tolist(), few.best) == ([1, 6], {"a": 1, "b": 7})


def test_single_trials_that_aim_at_their_own_return_have_its_return_to_go(tmp_path):
    store = mixed(tmp_path / "s")
    chains = ChainSampler(store, ["code"], n_trials=(1, 1), relabel="own").sample(100, 0)
    columns = store.episodes
    whole = returns_to_go(np.asarray(store.field("earned")), columns["start"], columns["length"], ReturnSpec())
    assert set(chains.episode[:, 0].tolist()) == set(range(12))
    for row, number in enumerate(chains.episode[:, 0].tolist()):
        length = int(columns["length"][number])
        np.testing.assert_allclose(
            chains.data["target"][row, :length], whole[columns["start"][number] :][:length], rtol=1e-6
        )
        assert np.flatnonzero(chains.data["done"][row]).tolist() == [length - 1]


def fingerprint(path):
    sampler = ChainSampler(EpisodeStore.open(path), FIELDS, n_trials=(1, 3), order="random", max_steps=15, seed=9)
    chains = sampler.sample(17, 4)
    parts = [*chains.data.values(), chains.valid, chains.trial, chains.step, chains.episode]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_equal_seed_and_step_give_equal_chains_in_another_process(tmp_path):
    store = mixed(tmp_path / "s")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_chains; print(test_chains.fingerprint(sys.argv[2]))"
    )
    folder = __file__.rpartition("/")[0]
    other = subprocess.run(
        [sys.executable, "-c", script, folder, store.path], capture_output=True, text=True, check=True, timeout=60
    )
    assert other.stdout.strip() == fingerprint(store.path)
    samplers = {seed: ChainSampler(store, [], seed=seed) for seed in (0, 1)}
    draws = {(seed, step): samplers[seed].sample(8, step).episode.tobytes() for seed in (0, 1) for step in (0, 1)}
    assert len(set(draws.values())) == 4
    assert samplers[0].sample(8, 0).episode.tobytes() == draws[0, 0]  # whatever was drawn before


def test_equal_returns_everywhere_are_told(tmp_path, capsys):
    rewards = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [5.0], [5.0]]
    store = tries(tmp_path / "s", rewards, task=["a", "a", "b", "b"])
    chains = ChainSampler(store, [], n_trials=(2, 2)).sample(50, 0)
    assert "no improvement to learn from" in capsys.readouterr().err
    assert {tuple(numbers) for numbers in chains.episode.tolist()} == {(0, 1), (2, 3)}
    assert chains.data["done"].sum(1).tolist() == [2] * 50
    ChainSampler(store, [], n_trials=(1, 1))
    ChainSampler(tries(tmp_path / "t", [*rewards, [6.0]], task=["a", "a", "b", "b", "b"]), [], n_trials=(2, 2))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"n_trials": (3, 4)}, DataError, r"group 'c': expected 3 episodes or more, .* got 2; lower n_trials, or"),
        ({"n_trials": (0, 4)}, ConfigError, r"n_trials: .* got \(0, 4\)"),
        ({"n_trials": (3, 2)}, ConfigError, r"n_trials: .* got \(3, 2\)"),
        ({"within": 0.0}, ConfigError, "above 0, at most 1, got 0.0"),
        ({"max_steps": 6}, DataError, r"episode \d+: expected at most 6 steps, the most of a chain, got 7"),
        ({"episodes": np.array([3, 12])}, DataError, "expected episodes 0 to 11, got 3 to 12"),
        ({"episodes": np.array([], np.int64)}, DataError, "expected an episode to draw from, got none"),
        ({"fields": ["cod"]}, DataError, "field 'cod': expected one of code, front"),
        ({"fields": ["code", "target"]}, ConfigError, "got 'target'"),
    ],
)
def test_wrong_settings_are_explained(tmp_path, settings, error, words):
    arguments = {"fields": FIELDS, **settings}
    fields = arguments.pop("fields")
    with pytest.raises(error, match=words):
        ChainSampler(mixed(tmp_path / "s"), fields, **arguments)


def test_what_the_type_checker_of_the_tests_would_refuse_is_explained_without_it(tmp_path):
    script = """
import sys
import numpy as np
from offbook.data.chains import ChainSampler, Trial
from offbook.data.store import EpisodeStore
from offbook.errors import OffbookError
store, state = EpisodeStore.open(sys.argv[1]), np.zeros((3, 2), np.float32)
for name in ("group", "order", "relabel"):
    try:
        ChainSampler(store, [], **{name: "both"})
    except OffbookError as error:
        print(error)
try:
    Trial(state=state, action=state, reward=np.zeros(2))
except OffbookError as error:
    print(error)
"""
    path = mixed(tmp_path / "s").path
    run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.splitlines() == [
        "group: expected task or seed or source, got 'both'; choose one of them.",
        "order: expected ascending or random or time, got 'both'; choose one of them.",
        "relabel: expected max or own, got 'both'; choose one of them.",
        "trial: expected as many of each, got 3 states, 3 actions and 2 rewards; give those of the same steps.",
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e39])
def test_rewards_that_are_not_finite_are_refused_by_episode_and_step(tmp_path, bad):
    store = tries(tmp_path / "s", [[1, 2], [1, 2, 3], [1, bad, bad]])
    with pytest.raises(DataError, match=r"field 'earned', episode 2, step 1: expected a finite reward, got"):
        ChainSampler(store, [], episodes=np.array([0, 2]))
    ChainSampler(store, [], episodes=np.array([0, 1]))


def test_recordings_that_lack_something_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"episode 1: expected a seed to group by, got none; group by task or source"):
        ChainSampler(tries(tmp_path / "s", [[1], [2]], seed=[3, None]), [], group="seed")
    arms = (FieldSpec("left", "float32", (2,), "action"), FieldSpec("right", "float32", (3,), "action"))
    schema = Schema((*arms, FieldSpec("reward", "float32", (), "reward")))
    with EpisodeStore.create(tmp_path / "arms", schema) as writer:
        for i in range(8):
            fields = {"left": np.ones((1, 2), np.float32), "right": np.ones((1, 3), np.float32)}
            fields |= {"reward": None if i == 7 else np.full(1, i, np.float32), "left" if i else "right": None}
            writer.append(fields, terminated=True, truncated=False)
    store = EpisodeStore.open(tmp_path / "arms")
    with pytest.raises(DataError, match=r"'left': expected values in all .* got none in 7 of 8: 1, 2, 3, 4, 5, \.\.\."):
        ChainSampler(store, ["left"])
    with pytest.raises(DataError, match=r"field 'reward': expected values in all .* got none in 1 of 8: 7; choose"):
        ChainSampler(store, [])
    with EpisodeStore.create(tmp_path / "free", Schema(SCHEMA.fields[2:3])) as writer:
        writer.append({"action": np.arange(3)}, terminated=True, truncated=False)
    with pytest.raises(DataError, match=r"expected rewards, .* got none; give the recordings rewards first"):
        ChainSampler(EpisodeStore.open(tmp_path / "free"), ["action"])
