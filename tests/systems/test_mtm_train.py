"""Training masked trajectory models: on what is there, resumed, told on a card."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import linear_world
from killing import check_training
from mtm_runs import BRIEF, FIT, TINY, offbook, refused, train
from offbook.client.protocol import ActionSpec
from offbook.data.returns import ReturnSpec
from offbook.data.splits import write_splits
from offbook.data.store import FieldSpec
from offbook.learning.masked_training import _Batches, build, trajectories
from offbook.learning.policies import load_policy
from offbook.learning.trajectories import Trajectories
from offbook.runs.directory import RunDirectory
from offbook.systems.mtm import Dynamics, MtmConfig, Sizes, load_model
from offbook.systems.mtm.card import MODEL, role_card
from offbook.systems.mtm.presets import TRAINING, official_model


def echo(number, values):
    """A state shows the action before it, and a number of the state before."""
    state = values["s"]
    state[1:, :2], state[1:, 2] = values["a"], state[:-1, 0].copy()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Recordings of such a world, and a model that has learnt them."""
    folder = tmp_path_factory.mktemp("learnt")
    store = linear_world.record(folder / "store", (20,) * 60, change=echo)
    fit = replace(FIT, steps=600, batch_size=64, warmup=20, learning_rate=1e-2, log_every=50, ema=0.95)
    sizes = Sizes(dim=32, heads=2, encoder=1, dropout=0.0)
    config = replace(TINY, model=sizes, patterns=("fd", "id", "auto"), validate_every=200, fit=fit)
    return store, config, train(store, folder / "run", config), folder / "run"


def held_out_windows(store, config, length=4):
    """Straight from the recordings: states, actions and states after the window, by window of the held-out episodes."""
    episodes = trajectories(store, config).held_out
    fields = [store.episode(int(number)).fields for number in episodes]
    starts = range(len(fields[0]["a"]) - length + 1)
    return [torch.from_numpy(np.stack([f[name][i : i + length] for f in fields for i in starts])) for name in "sa"]


@pytest.mark.learning
def test_one_model_tells_states_actions_and_what_lies_between(learnt):
    store, config, policy, run = learnt
    rows = RunDirectory.open(run).metrics()
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [200, 400, 600]
    assert held_out[-1] < 0.95 * held_out[0]
    module = load_model(run)
    assert all(torch.equal(of, policy.module.state_dict()[name]) for name, of in module.state_dict().items())
    states, actions = held_out_windows(store, config)
    std, dynamics = states.std((0, 1)), Dynamics(module)
    after = (dynamics.forward(states[:, :3], actions[:, :3]) - states[:, 3]) / std
    stays = (states[:, 2] - states[:, 3]) / std
    assert after.square().mean() < 0.2 * stays.square().mean()
    between = dynamics.inverse(states) - actions[:, :3]
    assert between.square().mean() < 0.1 * actions.var()


def test_the_units_of_the_card_are_the_recordings_whatever_the_model_is_standardised_by(tmp_path):
    recorded = linear_world.record(tmp_path / "store", (20,) * 30)
    cards = []
    for statistics in ("real", "official"):
        config = replace(TINY, statistics=statistics)
        data = trajectories(recorded, config)
        cards.append({row.role: row.errors for row in role_card(build(data, config), data)})
    for role, rule in (("bc", "mean action"), ("fd", "state stays"), ("return", "mean return")):
        assert cards[0][role][rule] == cards[1][role][rule]
    assert cards[0]["bc"]["mean action"].value == pytest.approx(1, rel=0.5)


@pytest.mark.learning
def test_the_card_has_every_role_beside_its_rules_and_specialists(learnt, tmp_path):
    from offbook.learning.specialists import SpecialistConfig, train_specialist

    store, config, policy, _ = learnt
    data = trajectories(store, config)
    fit = replace(FIT, steps=100, batch_size=64)
    small = {role: SpecialistConfig(role=role, hidden=16, depth=1, fit=fit) for role in ("fd", "id")}
    others = {
        f"MLP, {role}": train_specialist(data, of, RunDirectory.create(tmp_path / role, of))
        for role, of in small.items()
    }
    rows = {row.role: row for row in role_card(policy.module, data, others)}
    assert {role: list(row.errors) for role, row in rows.items()} == {
        "bc": [MODEL, "last action", "mean action"],
        "rcbc": [MODEL, "last action", "mean action"],
        "id": [MODEL, "MLP, id", "last action", "mean action"],
        "fd": [MODEL, "MLP, fd", "state stays"],
        "return": [MODEL, "mean return"],
        "waypoint": [MODEL, "straight line", "state stays"],
    }
    states, actions = held_out_windows(store, config)
    dynamics, deviation = Dynamics(policy.module), {name: data.statistics[name][1] for name in ("state", "action")}

    def error(name, told, wanted):
        return float(np.mean(((told - wanted).numpy() / deviation[name]) ** 2))

    there = {f"{name} present": torch.ones(states.shape[:2], dtype=torch.bool) for name in deviation}
    mean = {name: torch.from_numpy(data.statistics[name][0]).float() for name in deviation}
    mlp = {}
    for role, name in (("fd", "state"), ("id", "action")):
        with torch.no_grad():
            told = others[f"MLP, {role}"]({"state": states, "action": actions, **there}, 2)
        mlp[role] = told * torch.from_numpy(deviation[name]).float() + mean[name]
    rewards = [store.episode(int(number)).fields["reward"] for number in data.held_out]
    returns = np.stack([np.cumsum(of[::-1])[::-1] / np.arange(20, 0, -1) for of in rewards])[:, 3:]
    centre, spread = data.statistics["return"]
    by_hand = {
        ("return", "mean return"): np.mean(((returns - centre) / spread) ** 2),
        ("fd", MODEL): error("state", dynamics.forward(states[:, :3], actions[:, :3]), states[:, 3]),
        ("fd", "MLP, fd"): error("state", mlp["fd"], states[:, 3]),
        ("fd", "state stays"): error("state", states[:, 2], states[:, 3]),
        ("id", MODEL): error("action", dynamics.inverse(states)[:, 2], actions[:, 2]),
        ("id", "MLP, id"): error("action", mlp["id"], actions[:, 2]),
        ("id", "last action"): error("action", actions[:, 1], actions[:, 2]),
        ("bc", "last action"): error("action", actions[:, 2], actions[:, 3]),
        ("bc", "mean action"): error("action", mean["action"], actions[:, 3]),
        ("waypoint", "straight line"): error("state", states[:, 0] / 3 + states[:, 3] * 2 / 3, states[:, 2]),
        ("waypoint", "state stays"): error("state", states[:, 0], states[:, 2]),
    }
    for (role, name), value in by_hand.items():
        told = rows[role].errors[name]
        assert told.value == pytest.approx(value, rel=1e-4), (role, name)
        assert told.low < told.value < told.high
    assert rows["waypoint"].errors[MODEL].value < rows["waypoint"].errors["state stays"].value


def test_no_rule_of_the_card_knows_the_answer(tmp_path):
    # In windows of two steps there is no action before the one between the two states.
    store = linear_world.record(tmp_path / "store")
    config = replace(TINY, model=replace(TINY.model, length=2))
    data = trajectories(store, config)
    rows = role_card(build(data, config).eval(), data)
    assert [row.role for row in rows] == ["bc", "rcbc", "id", "fd", "return"]
    assert {row.role: list(row.errors) for row in rows}["id"] == [MODEL, "mean action"]
    assert all(told.value > 0.01 for row in rows for told in row.errors.values())


def test_absent_values_have_no_influence_on_training(tmp_path, monkeypatch):
    def change(number, values):
        if number > 2:
            values["a"] = None
        if number in (0, 5, 6):
            values["reward"] = None

    store = linear_world.record(tmp_path / "store", change=change)
    clean = train(store, tmp_path / "clean" / "run")
    ours, count = Trajectories.tensors, []

    def poisoned(self, windows):
        found = ours(self, windows)
        for name in ("action", "return"):
            absent = ~found[f"{name} present"]
            found[name][absent] = 1e4
            count.append(int(absent.sum()))
        return found

    monkeypatch.setattr(Trajectories, "tensors", poisoned)
    again = train(store, tmp_path / "poisoned" / "run")
    assert sum(count) > 0
    contents = [(tmp_path / name / "run" / "metrics.jsonl").read_bytes() for name in ("clean", "poisoned")]
    assert contents[0] == contents[1]
    assert all(torch.equal(of, again.module.state_dict()[name]) for name, of in clean.module.state_dict().items())
    batch = _Batches(trajectories(store, TINY), clean.module, TINY)(0)
    for name in ("state", "return", "action"):
        assert not (batch[f"{name} visible"][..., 0] & ~batch[f"{name} present"]).any()
        assert batch[f"{name} visible"].any()


def test_few_episodes_with_actions_are_enough(cli, tmp_path):
    store = linear_world.record(tmp_path / "store", change=linear_world.lacking("a", range(1, 12)))
    write_splits(store, {"held_out": [1, 2]})
    found, told = offbook(cli, "train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF)
    assert found["role"] == "rcbc"
    assert "9 of 10 training episodes have no actions" in told
    # Of the episodes held out none has actions, so nobody can say how well they are told, or used.
    assert [row["role"] for row in found["card"]] == ["waypoint"]
    assert load_policy(tmp_path / "run").meta.action == linear_world.BOUNDS


@pytest.mark.parametrize(
    ("share", "lengths", "count"),
    [(0.5, 9, 8), (0.25, 9, 4), (0.001, 9, 1), (0.999, 9, 15), (0.5, [2] + [9] * 11, 0), (0.5, [9] + [2] * 11, 16)],
)
def test_a_share_of_each_batch_has_actions_however_few_episodes_do(tmp_path, share, lengths, count):
    lengths = [lengths] * 12 if isinstance(lengths, int) else lengths
    store = linear_world.record(tmp_path / "store", lengths, change=linear_world.lacking("a", range(1, 12)))
    write_splits(store, {"held_out": [11]})
    config = replace(TINY, with_actions=share)
    data = trajectories(store, config)
    batches = _Batches(data, build(data, config), config)
    for index in range(3):
        there = batches(index)["action present"]
        assert (len(there), int(there.any(1).sum())) == (16, count)
        assert torch.equal(there.all(1), there.any(1))


def test_without_any_actions_states_are_filled_in_and_roles_that_act_refused(cli, tmp_path):
    store = linear_world.record(tmp_path / "store", change=linear_world.lacking("a", range(12)))
    out, words = tmp_path / "run", ["train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF]
    for role in ("bc", "rcbc", "id", "plan"):
        told = refused(cli, 2, *words, "--role", role)
        assert f"{store.path}: expected actions in one training episode or more, for role '{role}', got none" in told
    assert not out.exists()
    found, _ = offbook(cli, *words)
    assert (found["role"], {row["role"] for row in found["card"]}) == ("fill", {"return", "waypoint"})
    done = cli([*map(str, words), "--resume"])
    assert "offbook evaluate" not in done.stdout
    module = load_model(out)
    assert set(module.modalities) == {"state", "return"}
    states = torch.from_numpy(store.episode(0).fields["s"][:4])[None]
    visible = {name: torch.tensor([[[1], [0], [0], [1]]]).bool() for name in module.modalities}
    visible["return"] = torch.zeros(1, 4, 1).bool()
    with torch.no_grad():
        filled = module.values("state", module({"state": states, "return": torch.zeros(1, 4, 1)}, visible)["state"])
    assert torch.isfinite(filled).all()
    told = refused(cli, 2, "evaluate", out, "--task", "gym:Pendulum-v1", "--episodes", "1")
    assert "policy 'mtm-run' on Pendulum-v1: expected a state part 's' of size 3" in told


def test_roles_need_returns(cli, tmp_path):
    store = linear_world.record(tmp_path / "store", fields=linear_world.FIELDS[:2])
    words = ["train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF]
    told = refused(cli, 2, *words, "--role", "rcbc")
    assert "expected returns in one training episode or more, for role 'rcbc', got none; learn from recordings" in told
    assert offbook(cli, *words)[0]["role"] == "bc"


LONG = replace(TINY, model=replace(TINY.model, dropout=0.3), validate_every=7,
               fit=replace(FIT, steps=150, checkpoint_every=3, log_every=2))  # fmt: skip


def learn(store, path):
    train(store, path, LONG, resume=True)


@pytest.mark.faults
def test_killed_again_and_again_training_ends_with_the_same_bytes(tmp_path):
    store = linear_world.record(tmp_path / "store", change=linear_world.lacking("a", range(6)))
    check_training(learn, store, tmp_path, LONG.fit.steps, times=6)


def padded(store, field, episodes, after=lambda values: values):
    """An episode's values in 1000 rows, the rest zeros, as the authors' code lays them out."""
    rows = np.zeros((len(episodes), 1000, store.schema[field].size))
    for row, number in zip(rows, episodes, strict=True):
        values = after(store.episode(int(number)).fields[field]).reshape(-1, rows.shape[2])
        row[: len(values)] = values
    return rows.reshape(-1, rows.shape[2])


def test_the_authors_statistics_are_those_of_padded_episodes(tmp_path):
    def change(number, values):
        values["s"] = values["s"] * np.array([4.0, 0.1, 30.0]) + np.array([1.0, 0.0, -40.0])

    store = linear_world.record(tmp_path / "store", (300, 120, 700, 20), change=change)
    config = replace(official_model(), model=TINY.model, held_out=0.0)
    data = trajectories(store, config)
    model = build(data, config)

    def mean_to_go(rewards):
        later = np.append(np.cumsum(rewards[::-1])[::-1][1:], 0.0)
        return later / (1000 - np.arange(len(rewards)))

    arrays = {
        "state": padded(store, "s", data.train, lambda values: values[:-1]),
        "action": padded(store, "a", data.train),
        "return": padded(store, "reward", data.train, mean_to_go),
    }
    small = 0
    for name, array in arrays.items():
        std = array.std(0)
        small += int((std < 0.1).sum())
        np.testing.assert_allclose(model.get_buffer(f"{name}_mean"), array.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(model.get_buffer(f"{name}_std"), np.where(std < 0.1, 1, std), rtol=1e-4)
    assert 0 < small < 6
    ordinary = build(data, replace(config, statistics="real"))
    np.testing.assert_allclose(ordinary.state_std, np.concatenate(
        [store.episode(i).fields["s"][:-1] for i in range(4)]).std(0), rtol=1e-4)  # fmt: skip


def test_the_official_preset_is_the_authors_way(cli, tmp_path):
    config = official_model()
    assert (config.mask_scope, config.residual, config.loss_on, config.patterns) == ("batch", "none", "all", ("auto",))
    assert config.returns == ReturnSpec(kind="mean", include_current=False, horizon=1000)
    assert (config.model.dim, config.model.length, config.fit.learning_rate) == (512, 4, 1e-4)
    assert (config.fit.steps, config.fit.batch_size, config.fit.warmup) == (140_010, 2048, 40_000)
    store = linear_world.record(tmp_path / "store", change=linear_world.lacking("a", [0, 1]))
    words = ["train", "mtm", "--data", store.path, "--out", tmp_path / "run", "--preset", "official"]
    small = "--model.dim 16 --fit.steps 3 --fit.batch-size 8 --fit.threads 1 --held-out 0.25"
    offbook(cli, *words, *small.split())
    assert not any(modality.residual for modality in load_model(tmp_path / "run").modalities.values())
    assert load_policy(tmp_path / "run").provenance["returns"]["horizon"] == 1000
    for scope in ("batch", "sample"):
        small = replace(TINY, mask_scope=scope)
        data = trajectories(store, small)
        batch = _Batches(data, build(data, small), small)(0)
        assert (len({str(of.tolist()) for of in batch["state visible"]}) == 1) == (scope == "batch")


SEVERAL = (
    FieldSpec("joints", "float64", (2,), "observation"),
    FieldSpec("place", "float32", (), "observation"),
    FieldSpec("keys", "int32", (2, 2), "observation"),
    FieldSpec("open", "bool", (), "observation"),
    FieldSpec("front", "uint8", (16, 16, 3), "observation"),
    linear_world.FIELDS[1],
    linear_world.REWARD,
)
DISCRETE = (linear_world.FIELDS[0], FieldSpec("a", "int64", (), "action"), linear_world.REWARD)


def several(number, values):
    s, rng = values.pop("s"), np.random.default_rng(number)
    more = {"joints": s[:, :2], "place": s[:, 2], "keys": rng.integers(0, 5, (len(s), 2, 2)), "open": s[:, 0] > 0}
    values |= {**more, "front": rng.integers(0, 256, (len(s), 16, 16, 3))}


def choices(number, values):
    values["a"] = (values["a"][:, 0] > 0) + 2 * (values["a"][:, 1] > 0)


@pytest.mark.parametrize(
    ("settings", "words", "size"),
    [
        ({}, [], 3),
        ({"fields": SEVERAL, "change": several}, [], 8),
        ({"fields": SEVERAL, "change": several}, ["--parts", "place", "joints"], 3),
        ({"fields": linear_world.FIELDS[:2]}, [], 3),
        ({"fields": linear_world.FIELDS[:1]}, [], 3),
        ({"fields": DISCRETE, "change": choices,
          "action": ActionSpec(size=1, low=(0.0,), high=(3.0,), choices=4)}, ["--specialists"], 3),
        ({"fields": DISCRETE, "change": choices,
          "action": ActionSpec(size=1, low=(0.0,), high=(3.0,), choices=4)}, ["--tokens", "bins", "--bins", "8"], 3),
        ({}, ["--tokens", "bins", "--loss-on", "hidden", "--role", "plan", "--specialists"], 3),
        ({}, ["--patterns", "full_random", "--fractions", "0", "--residual", "none", "--role", "id"], 3),
        ({}, ["--patterns", "fd", "id", "waypoints", "bc_random", "--mask-scope", "batch", "--role", "bc"], 3),
        ({}, ["--fit.precision", "bf16", "--fit.accumulate", "2", "--held-out", "0", "returns:none"], 3),
    ],
    ids=["plain", "several parts and a camera", "chosen parts", "no reward", "states alone", "discrete",
         "discrete and bins", "bins", "nothing visible", "several patterns", "bf16"],
)  # fmt: skip
def test_recordings_and_settings_of_every_kind(cli, tmp_path, settings, words, size):
    store = linear_world.record(tmp_path / "store", (8,) * 8, **settings)
    out = tmp_path / "run"
    found, _ = offbook(cli, "train", "mtm", "--data", store.path, "--out", out, *BRIEF, *words)
    rows = RunDirectory.open(out).metrics()
    assert all(math.isfinite(value) for row in rows for value in row.values())
    policy = load_policy(out)
    assert policy.meta.observation.state_size == policy.module.modalities["state"].size == size
    assert not policy.meta.observation.cameras
    held_out = "--held-out" not in words
    assert ("held_out_loss" in rows[-1]) == held_out
    assert (out / "card.json").exists() == held_out == (out / "card.png").exists()
    if held_out:
        assert json.loads((out / "card.json").read_text()) == found["card"]
        assert (out / "card.png").read_bytes().startswith(b"\x89PNG")
        specialists = [name for row in found["card"] for name in row["errors"] if name.startswith("MLP")]
        every = ["MLP, bc", "MLP, bc on 4 states", "MLP, rcbc", "MLP, id", "MLP, fd"]
        assert specialists == (every if "--specialists" in words else [])


def test_what_is_printed_and_a_saved_configuration(cli, tmp_path):
    store = linear_world.record(tmp_path / "store")
    words = ["train", "mtm", "--data", str(store.path), "--out"]
    done = cli([*words, str(tmp_path / "a"), *BRIEF, "--specialists"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("learnt from 9 episodes, 4 steps in ")
    for said in ("who tells", "MLP, bc on 4 states", "state stays", "card.png", "as a policy in the role rcbc"):
        assert said in done.stdout
    assert done.stdout.splitlines()[-1] == f"test it: offbook evaluate {tmp_path / 'a'} --episodes 50"
    assert RunDirectory.open(tmp_path / "a").config()["parts"] == ["s"]
    config = str(tmp_path / "a" / "config.json")
    assert cli([*words, str(tmp_path / "b"), "--config", config]).exit_code == 0
    weights = [load_model(tmp_path / name).state_dict() for name in ("a", "b")]
    assert all(torch.equal(of, weights[1][name]) for name, of in weights[0].items())
    assert cli([*words, str(tmp_path / "a"), *BRIEF]).exit_code == 2
    again = cli([*words, str(tmp_path / "a"), *BRIEF, "--specialists", "--resume"])
    assert (again.exit_code, again.stdout.split("\n", 1)[1]) == (0, done.stdout.split("\n", 1)[1])


def test_presets_are_what_they_say():
    assert set(TRAINING) == {"smoke", "tiny", "paper", "official"}
    for make in TRAINING.values():
        assert isinstance(make(), MtmConfig)
