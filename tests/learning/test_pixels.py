"""An agent that learns from pictures: what it is shown, what it is paid, that it learns, and that it can be killed."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from pixel_world import SIDE, register

from offbook.data.schema import FieldSpec, Schema
from offbook.data.store import EpisodeStore
from offbook.errors import CheckpointError, ConfigError, DataError
from offbook.evaluate.rollout import evaluate_policy
from offbook.learning.networks import shift_images
from offbook.learning.pixel_agent import PixelNetwork, PixelSizes
from offbook.learning.pixel_policy import PixelPolicy
from offbook.learning.pixel_replay import PixelReplay
from offbook.learning.pixel_training import PixelConfig, train_pixels
from offbook.learning.policies import load_policy
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.runs.directory import RunDirectory
from offbook.systems.vcse.pixels import ExploringConfig

register()
SMALL = PixelConfig(
    steps=120, camera="observation", repeat=1, sizes=PixelSizes(stack=2, channels=4, features=8, hidden=32),
    batch_size=32, n_steps=2, gamma=0.5, learning_rate=3e-3, shift=1, update_every=1, noise_start=0.5, noise_end=0.2,
    noise_steps=300, random_steps=24, evaluate_every=60, evaluate_episodes=4, checkpoint_every=48, device="cpu",
)  # fmt: skip


def test_pictures_are_shifted_by_whole_pixels_each_film_as_one():
    films = torch.arange(7 * 7 * 4, dtype=torch.uint8).reshape(1, 7, 7, 4).repeat(400, 1, 1, 1)
    moved = shift_images(films, 2, torch.Generator().manual_seed(0))
    padded = np.pad(films[0].numpy(), ((2, 2), (2, 2), (0, 0)), mode="edge")
    crops = {padded[y : y + 7, x : x + 7].tobytes(): (y, x) for y in range(5) for x in range(5)}
    seen = [crops[one.numpy().tobytes()] for one in moved]  # a KeyError where a shift is of part of a pixel
    assert len(set(seen)) == 25
    assert torch.equal(shift_images(films, 0, torch.Generator()), films)


def lived(path, episodes):
    """A replay of episodes with so many steps and ends; pictures are numbered 10, 11, ... and 20, 21, ..."""
    picture = FieldSpec("camera", "uint8", (16, 16, 3), "observation")
    rest = FieldSpec("action", "float32", (1,), "action"), FieldSpec("reward", "float64", (), "reward")
    replay = PixelReplay(
        EpisodeStore.create(path, Schema((picture, *rest))), "camera", lambda a: a / 2,
        stack=3, n_steps=3, gamma=0.5, capacity=5,
    )  # fmt: skip
    for number, (steps, terminated) in enumerate(episodes, 1):
        named = np.arange(steps + 1, dtype=np.uint8) + 10 * number
        fields = {
            "camera": np.broadcast_to(named[:, None, None, None], (steps + 1, 16, 16, 3)).copy(),
            "action": named[:-1, None].astype(np.float32),
            "reward": 2.0 ** np.arange(steps) * number,
        }
        replay.append(fields, terminated=terminated, truncated=not terminated)
        replay.take()
    return replay


def test_returns_and_films_are_what_one_works_out_by_hand(tmp_path):
    with lived(tmp_path / "store", [(4, True), (3, False)]) as replay:
        replay._capacity = 100
        batch = replay.sample(300, np.random.default_rng(0))
        found = {}
        for i in range(300):
            here, there = (tuple(film[i, :, 0, 0, 0].tolist()) for film in (batch.here, batch.there))
            assert (batch.here[i] == batch.here[i, :, :1, :1, :1]).all()
            assert batch.action[i].item() == here[-1] / 2
            found[here] = (there, batch.reward[i].item(), batch.discount[i].item())
        # Rewards 1 2 4 8, ended by the task; 2 4 8, cut: beyond an end nothing follows, beyond a cut something does.
        assert found == {
            (10, 10, 10): ((11, 12, 13), 1 + 2 / 2 + 4 / 4, 0.125),
            (10, 10, 11): ((12, 13, 14), 2 + 4 / 2 + 8 / 4, 0.0),
            (10, 11, 12): ((12, 13, 14), 4 + 8 / 2, 0.0),
            (11, 12, 13): ((12, 13, 14), 8, 0.0),
            (20, 20, 20): ((21, 22, 23), 2 + 4 / 2 + 8 / 4, 0.125),
            (20, 20, 21): ((21, 22, 23), 4 + 8 / 2, 0.25),
            (20, 21, 22): ((21, 22, 23), 8, 0.5),
        }


def test_each_picture_is_kept_once_and_old_ones_are_let_alone(tmp_path):
    with lived(tmp_path / "store", [(4, True), (3, False)]) as replay:
        films = replay.sample(300, np.random.default_rng(0)).here
        assert set(films[:, -1, 0, 0, 0].tolist()) == {12, 13, 20, 21, 22}  # the latest five steps
    pictures = sum((tmp_path / "store" / of / "camera.npy").stat().st_size for of in ("fields", "final"))
    assert pictures == (4 + 1 + 3 + 1) * 16 * 16 * 3 + 2 * 128  # and two headers


def train(path, config=SMALL, task="gym:Sides-v0", **more):
    run = RunDirectory.create(path, config, resume=more.get("resume", False))
    return train_pixels(task, config, run, **more), run


@pytest.mark.learning
def test_it_learns_what_can_only_be_seen_and_the_saved_policy_plays_it(tmp_path):
    _, run = train(tmp_path / "run", replace(SMALL, steps=600))
    tested = [row["eval_return"] for row in run.metrics() if "eval_return" in row]
    assert len(tested) == 10
    assert tested[-1] > 9  # of 12; random actions get 0
    saved = load_policy(tmp_path / "run")
    assert isinstance(saved, PixelPolicy)
    assert saved.provenance["environment"] == "gym:Sides-v0"
    again = evaluate_policy("gym:Sides-v0", saved, episodes=4, parallel=1)
    assert again.summary["return"].value == pytest.approx(tested[-1], abs=1e-5)
    together = evaluate_policy("gym:Sides-v0", saved, episodes=4, parallel=4)  # sessions do not mix
    assert together.summary["return"].value == pytest.approx(tested[-1], abs=1e-3)


def test_another_reward_stands_in_the_place_of_the_tasks(tmp_path):
    def bright(episode):
        pictures = episode.fields["observation"][1:].astype(np.float32)
        return pictures[:, :, SIDE // 2 :].mean((1, 2, 3)) / 255

    _, run = train(tmp_path / "a", task="gym:Unpaid-v0", paid_for=bright)
    paid = load_checkpoint(run.checkpoint("training")).values["rewards"]
    assert paid.shape == (120,)
    assert set(paid.tolist()) == {0.0, 1.0}
    with pytest.raises(DataError, match="rewards of episode 0: expected 12 finite numbers, got 12 that are not"):
        train(tmp_path / "b", task="gym:Unpaid-v0")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("at", "bonus"), [(2, "none"), (6, "none"), (6, "vcse")],
    ids=["before the first checkpoint", "between two", "exploring"],
)  # fmt: skip
def test_killed_and_resumed_it_is_the_same_life_to_the_last_bit(tmp_path, monkeypatch, at, bonus):
    config = ExploringConfig(**vars(SMALL), bonus=bonus)
    mine = {"config": config, "explores": config.explores()}
    _, whole = train(tmp_path / "whole", **mine)
    if not (child := os.fork()):
        take = PixelReplay.take
        monkeypatch.setattr(
            PixelReplay, "take",
            lambda self, *of: take(self, *of) if self.episodes < at else os.kill(os.getpid(), signal.SIGKILL),
        )  # fmt: skip
        try:
            train(tmp_path / "torn", **mine)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    stored = EpisodeStore.open(tmp_path / "torn/replay")
    assert len(stored) == at + 1
    _, torn = train(tmp_path / "torn", resume=True, **mine)
    one, other = ([{**row, "explore/milliseconds": 0} for row in run.metrics()] for run in (whole, torn))
    assert one == other
    assert ("explore/critic_loss" in one[-1]) == (bonus == "vcse")
    timed = [] if bonus == "none" else ["metrics.jsonl"]  # the time that a bonus took differs
    for name in {"metrics.jsonl", "checkpoints/training.safetensors", "replay/fields/observation.npy"}.difference(
        timed
    ):
        assert (torn.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    one, other = (load_checkpoint(run.checkpoint()).values for run in (whole, torn))
    assert all(torch.equal(other[name], one[name]) for name in one)
    before = (torn.path / "checkpoints/training.safetensors").read_bytes()
    train(tmp_path / "torn", resume=True, **mine)  # which is over
    assert (torn.path / "checkpoints/training.safetensors").read_bytes() == before


def test_actions_are_held_and_pictures_of_the_control_suite_are_seen(cli, tmp_path):
    command = ["train", "drqv2", "dmc:cartpole-balance", "--preset", "smoke", "--steps", "1000", "--repeat", "4",
               "--random-steps", "0", "--out", str(tmp_path / "run"), "--json"]  # fmt: skip
    outcome = cli(command)
    assert outcome.exit_code == 0, outcome.stderr
    metrics = json.loads(outcome.stdout)["metrics"]
    assert metrics["length"] == 250
    store = EpisodeStore.open(tmp_path / "run/replay")
    assert store.steps == 250
    assert store.schema.rate_hz == 25
    assert store.field("image").shape == (250, 24, 24, 3)
    assert len(np.unique(store.field("image")[:])) > 10  # something is drawn
    outcome = cli(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--videos", "0", "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    [evaluated] = json.loads(outcome.stdout)["policies"]
    assert evaluated["environment"] == "dmc:cartpole-balance"
    # There the environment held the actions and drew once; here the policy says each four times.
    assert evaluated["episodes"][0]["return"] == pytest.approx(metrics["eval_return"], rel=1e-2)


def test_what_does_not_fit_is_told_in_a_sentence(cli, tmp_path):
    for words, said in (
        (["gym:Pendulum-v1"], "cameras of gym:Pendulum-v1: expected one called 'image', got none; give --camera"),
        (["gym:Sides-v0", "--camera", "front"], "expected one called 'front', got observation"),
        (["gym:Sides-v0", "--image-size", "8"], "--image-size: expected 16 to 4096 pixels, got 8"),
        (["ale:Pong-v5", "--camera", "observation"], "ale:Pong-v5: expected continuous actions with bounds"),
        (["gym:Sides-v0", "--bonus", "vcse", "--k", "300"], "--k: expected 1 or more, below the batch of 256"),
    ):
        outcome = cli(["train", "drqv2", *words, "--out", str(tmp_path / "a")])
        assert (outcome.exit_code, outcome.stdout) == (2, ""), words
        assert said in outcome.stderr
        assert not (tmp_path / "a").exists()


def test_a_strangers_file_or_another_life_is_refused(tmp_path):
    brief = replace(SMALL, steps=24, evaluate_every=0)
    _, run = train(tmp_path / "run", brief)
    saved = load_checkpoint(run.checkpoint())
    for network in ({**saved.record["network"], "stack": 0}, {"stack": 2.0}):
        save_checkpoint(tmp_path / "b.safetensors", "pixels", saved.values, {**saved.record, "network": network})
        with pytest.raises(CheckpointError, match="expected the record of a policy"):
            load_policy(tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="settings"):  # another task's recordings lie there
        train(tmp_path / "run", brief, resume=True, settings={"max_episode_steps": 5})
    wide = PixelNetwork((16, 16), 1, PixelSizes(stack=2, channels=4, features=8, hidden=33))
    training = load_checkpoint(run.checkpoint("training"))
    values = {**training.values, "state.agent.network.actor.0.weight": wide.actor[0].weight}
    save_checkpoint(run.checkpoint("training"), "pixel-training", values, training.record)
    with pytest.raises(CheckpointError, match="expected the state of this very life"):
        train(tmp_path / "run", brief, resume=True)
