"""Training on chains of trials: what it learns from, what it refuses, and that it goes on exactly where it stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from offbook.cli.policy import find_policy
from offbook.data.splits import read_splits
from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, DataError
from offbook.evaluate.groups import evaluate_trials
from offbook.learning import cost
from offbook.learning.hindsight_presets import decision_transformer, smoke
from offbook.learning.hindsight_training import ChainData, train_hindsight
from offbook.learning.policies import load_policy
from offbook.runs.directory import RunDirectory
from offbook.sim.adapters import make
from offbook.sim.play import play
from offbook.sim.recording import record

BRIEF = replace(
    smoke(), group="seed", fit=replace(smoke().fit, steps=12, checkpoint_every=6, log_every=3, device="cpu")
)
WORDS = ["--group", "seed", "--preset", "smoke", "--fit.steps", "6", "--fit.log-every", "3"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("trials") / "darkpoint"
    return record("offbook:darkpoint", 80, path, grades=(0.0, 0.4, 0.7, 1.0), trials=8)


def test_whole_instances_are_held_out(store):
    data = ChainData(store, BRIEF)
    seeds = store.episodes["seed"]
    assert len(data.train) == 72
    assert not set(seeds[data.train].tolist()) & set(seeds[data.held_out].tolist())
    assert not read_splits(store)


def test_of_few_instances_one_is_held_out(store):
    few = replace(BRIEF, held_out=0.04)  # of 10 less than half a one
    assert (len(ChainData(store, few).train), len(ChainData(store, few).held_out)) == (72, 8)
    assert not len(ChainData(store, replace(BRIEF, held_out=0.0)).held_out)


def test_of_one_group_episodes_are_held_out(store):
    data = ChainData(store, replace(BRIEF, group="task"))
    assert (len(data.train), len(data.held_out)) == (72, 8)


def test_what_it_aims_at_and_what_it_saves(store, tmp_path):
    run = RunDirectory.create(tmp_path / "run", BRIEF)
    policy = train_hindsight(store, BRIEF, run)
    returns = store.episodes["return"]
    assert policy.target <= returns.max() + 1e-6
    assert policy.provenance["returns"]["100 %"] == pytest.approx(returns[ChainData(store, BRIEF).train].max())
    loaded = load_policy(run.path)
    assert loaded.target == policy.target
    env = make("offbook:darkpoint", trials=2)
    [one], [other] = (list(play([env], who, [5])) for who in (policy, loaded))
    assert np.array_equal(one.fields["action"], other.fields["action"])
    [aimed] = play([env], loaded.aiming_at(1.0), [5])
    assert not np.array_equal(one.fields["action"], aimed.fields["action"])


def test_training_goes_on_exactly_where_it_stopped(store, tmp_path):
    whole = RunDirectory.create(tmp_path / "whole", BRIEF)
    weights = train_hindsight(store, BRIEF, whole).module.state_dict()
    cut = RunDirectory.create(tmp_path / "cut", BRIEF)

    class StopError(Exception):
        pass

    sample = ChainData.batch

    def stopping(self, index):
        if index == 8:
            raise StopError
        return sample(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChainData, "batch", stopping)
        with pytest.raises(StopError):
            train_hindsight(store, BRIEF, cut)
    again = train_hindsight(store, BRIEF, cut, resume=True).module.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert [row["loss"] for row in whole.metrics()] == [row["loss"] for row in cut.metrics()]


def test_it_learns_to_aim(tmp_path):
    fixed = {"goal": "fixed"}
    store = record("offbook:darkpoint", 60, tmp_path / "fixed", grades=(0.0, 0.4, 0.7, 1.0), settings=fixed)
    fit = replace(BRIEF.fit, steps=150, batch_size=32, learning_rate=3e-3)
    config = replace(decision_transformer(BRIEF), group="task", validate_every=150, fit=fit)
    policy = train_hindsight(store, config, RunDirectory.create(tmp_path / "dt", config))
    played = [
        evaluate_trials("offbook:darkpoint", policy.aiming_at(target), groups=16, parallel=16, settings=fixed)
        for target in (13.0, 0.0)
    ]
    assert played[0].summary["mean"].value > played[1].summary["mean"].value + 2


def test_recordings_without_rewards_are_refused(tmp_path):
    store = record("offbook:darkpoint", 4, tmp_path / "store", trials=2, rewards=False)
    with pytest.raises(DataError, match=r"expected rewards, to tell good trials from bad ones, got none; give"):
        ChainData(store, BRIEF)


def test_a_group_with_too_few_trials_is_named(store):
    with pytest.raises(DataError, match=r"group '\d+': expected 9 episodes or more.* got 8"):
        ChainData(store, replace(BRIEF, n_trials=(9, 9)))


def test_settings_that_cannot_be_are_refused():
    for changes, message in (
        ({"n_trials": (3, 2)}, "--n-trials: expected two numbers from 1 to 4096, the smaller first"),
        ({"target": 1.5}, "--target: expected a quantile from 0 to 1, got 1.5"),
        ({"within": 0.0}, "--within: expected a share above 0, at most 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(BRIEF, **changes)


def test_what_it_takes_is_told_before(store):
    data = ChainData(store, BRIEF)
    network = data.build()
    before = {name: of.clone() for name, of in network.state_dict().items()}
    found = cost.measure_cost(data, network)
    assert all(torch.equal(of, network.state_dict()[name]) for name, of in before.items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert found.longest == 4 * 16
    assert 16 <= found.tokens <= 64
    assert found.hours == pytest.approx(found.seconds * 12 / 3600)
    with pytest.raises(ConfigError, match="expected at most 24 hours, got about 50 hours"):
        cost.check_cost(replace(found, hours=50.0))


def test_verbs(cli, store, tmp_path):
    where = ["--data", str(store.path)]
    dry = cli(["train", "agentic_transformer", *where, "--out", str(tmp_path / "x"), *WORDS, "--dry-run"])
    assert dry.exit_code == 0, dry.stderr
    assert "tokens a chain, at most 64;" in dry.stdout
    assert not (tmp_path / "x").exists()
    for verb, trials in (("agentic_transformer", " --trials 4"), ("dt", "")):
        out = tmp_path / verb
        done = cli(["train", verb, *where, "--out", str(out), *WORDS])
        assert done.exit_code == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"test it: offbook evaluate {out}{trials} --episodes 50"
        refused = cli(["train", verb, *where, "--out", str(out), *WORDS])
        assert refused.exit_code == 2
        assert "--resume" in refused.stderr
    assert RunDirectory.open(tmp_path / "dt").config()["n_trials"] == [1, 1]
    runs = [str(tmp_path / "agentic_transformer"), str(tmp_path / "dt")]
    tried = cli(["evaluate", *runs, "--trials", "3", "--episodes", "4", "--out", str(tmp_path / "tried"), "--json"])
    assert tried.exit_code == 0, tried.stderr
    policies = json.loads(tried.stdout)["policies"]
    assert [len(policy["returns"][0]) for policy in policies] == [3, 3]
    assert {"first", "last", "mean", "max", "gain", "context_effect"} <= policies[0]["summary"].keys()
    assert (tmp_path / "tried" / "trials.png").stat().st_size > 10_000
    once = cli(["evaluate", runs[0], "--episodes", "2", "--videos", "0"])
    assert once.exit_code == 0, once.stderr
    far, small = f"{runs[0]}::1000", ["--task", "offbook:darkpoint", "--episodes", "2"]
    tried = cli(["evaluate", *runs, far, "--trials", "6", *small])
    assert tried.exit_code == 0, tried.stderr
    assert tried.stdout.startswith("offbook:darkpoint, 2 groups of 6 trials each, at the last checkpoint, with 95%")
    assert "trials that went out of view" in tried.stdout
    returns = load_policy(runs[0]).provenance["returns"]
    listed = ", ".join(f"{value:.4g} ({name})" for name, value in returns.items())
    assert f"{runs[0]} aims at a return of {load_policy(runs[0]).target:.4g}; those of its recordings are {listed}" in (
        lines := tried.stdout.splitlines()
    )
    assert f"warning: {far} aims at a return of 1000, far outside those of its recordings: {listed}" in lines
    assert "at the last checkpoint" not in cli(["evaluate", "random", "--trials", "2", *small]).stdout
    assert find_policy(far, None).target == 1000
    alone = json.loads(cli(["evaluate", f"{runs[1]}::3", *small, "--videos", "0", "--json"]).stdout)
    assert (aim := alone["aims"][f"{runs[1]}::3"])["target"] == 3
    assert aim["returns"] == returns
    for words, message in (
        (":bc:3", f"expected a policy with roles, got hindsight-agentic_transformer, without; write {runs[0]}::TARGET"),
        ("::nan", "target: expected a finite return, got nan"),
    ):
        refused = cli(["evaluate", f"{runs[0]}{words}", *small])
        assert (refused.exit_code, message in refused.stderr) == (2, True), refused.stderr
    refused = cli(["train", "dt", *where, "--out", str(tmp_path / "x"), *WORDS, "--n-trials", "4", "4"])
    assert refused.exit_code == 2
    assert "expected 1 1, as it learns from single trials, got 4 4; run: offbook train agentic" in refused.stderr
    assert not (tmp_path / "x").exists()
    refused = cli(["evaluate", *runs, "--trials", "3", "--jobs", "2"])
    assert refused.exit_code == 2
    assert "--jobs" in refused.stderr


def test_discrete_actions_train_as_well(tmp_path):
    store = record("offbook:keyed-door", 16, tmp_path / "store", grades=(0.3, 1.0), trials=4)
    config = replace(BRIEF, fit=replace(BRIEF.fit, steps=3))
    policy = train_hindsight(EpisodeStore.open(store.path), config, RunDirectory.create(tmp_path / "run", config))
    played = evaluate_trials("offbook:keyed-door", policy, trials=2, groups=2)
    assert played.returns.shape == (2, 2)
