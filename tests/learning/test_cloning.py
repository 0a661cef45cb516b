from dataclasses import replace

import numpy as np
import point_world
import pytest
import torch

from offbook.client.protocol import Observation, Policy, check_chunk
from offbook.data.splits import write_splits
from offbook.errors import ConfigError, DataError
from offbook.learning import cloning
from offbook.learning.cloning import CloningConfig, train_cloning
from offbook.learning.fit import FitConfig
from offbook.learning.networks import shift_images
from offbook.learning.policies import load_policy
from offbook.runs.directory import RunDirectory
from offbook.runs.seeding import torch_generator

FIT = FitConfig(steps=300, batch_size=64, warmup=20, learning_rate=3e-3, ema=0.98, threads=1, log_every=50)
CONFIG = CloningConfig(
    parts=("place", "goal"), chunk=3, execute=2, hidden=48, dropout=0.0, validate_every=100, held_out=0.2, fit=FIT
)
BRIEF = replace(CONFIG, fit=replace(FIT, steps=4, log_every=2, checkpoint_every=2), validate_every=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return point_world.record(tmp_path_factory.mktemp("recordings") / "store")


def train(store, path, config=CONFIG, *, resume=False):
    return train_cloning(store, config, RunDirectory.create(path, config, resume=resume), resume=resume)


def observe(policy, batch=5, seed=0):
    rng = np.random.default_rng(seed)
    return Observation(
        sessions=tuple(map(str, range(batch))),
        state=rng.uniform(-1, 1, (batch, policy.meta.observation.state_size)).astype(np.float32),
        images={
            name: rng.integers(0, 256, (batch, *size, 3), np.uint8)
            for name, size in policy.meta.observation.cameras.items()
        },
        time=np.zeros(batch),
    )


@pytest.mark.learning
def test_a_linear_expert_is_cloned(store, tmp_path):
    policy = train(store, tmp_path / "run")
    assert isinstance(policy, Policy)
    assert policy.meta.observation.state == (("place", 2), ("goal", 2))
    assert policy.meta.chunk == 2
    assert np.mean(point_world.distances(policy) < 0.1) >= 0.95
    rows = RunDirectory.open(tmp_path / "run").metrics()
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert len(held_out) == 3
    assert held_out[-1] < 0.1


def test_what_never_varied_is_ignored_and_given_back_exactly(store, tmp_path):
    from offbook.data.normalise import Normalizer
    from offbook.learning.networks import CloningNetwork

    observed, action = store.schema.observation_spec(), store.schema.action_spec()
    network = CloningNetwork(observed, action, chunk=2, hidden=8, depth=1, dropout=0.0)
    parts, name = [part for part, _ in observed.state], store.schema.actions[0]
    fitted = Normalizer.fit(store, [*parts, name])
    fitted.std[parts[0]][0], fitted.std[name][1] = 0, 0
    network.standardise(fitted, parts, name)
    state = torch.rand(3, observed.state_size, generator=torch.Generator().manual_seed(0))
    images = {camera: torch.zeros(3, *size, 3, dtype=torch.uint8) for camera, size in observed.cameras.items()}
    answer = network.act(state, images)
    assert (answer[..., 1] == np.float32(fitted.mean[name][1])).all()
    assert answer[..., 0].std() > 0
    assert torch.isfinite(network.targets(answer)).all()
    state[:, 0] += 1e6
    assert torch.equal(network.act(state, images), answer)


@pytest.mark.learning
@pytest.mark.parametrize("body", ["mlp", "transformer"])
def test_the_goal_is_found_in_the_picture(store, tmp_path, body):
    # With the goal hidden from the state, only the camera can tell where to go.
    fit = replace(FIT, steps=400, learning_rate=FIT.learning_rate if body == "mlp" else 1e-3)
    config = replace(CONFIG, parts=("place",), cameras=("front",), shift=1, body=body, fit=fit)
    seeing = train(store, tmp_path / "seeing", config)
    blind = train(store, tmp_path / "blind", replace(config, cameras=()))
    assert seeing.meta.observation.cameras == {"front": (24, 24)}
    assert point_world.distances(seeing).mean() < 0.15
    assert point_world.distances(blind).mean() > 0.4


@pytest.mark.learning
def test_discrete_actions_are_cloned(tmp_path):
    store = point_world.record(tmp_path / "store", discrete=True)
    policy = train(store, tmp_path / "run", replace(CONFIG, chunk=1, execute=1))
    assert policy.meta.action.choices == 4
    seen = observe(policy, 400)
    answer = check_chunk(policy.infer(seen), 400, policy.meta)
    move = seen.state[:, 2:] - seen.state[:, :2]
    axis = np.abs(move).argmax(1)
    right = 2 * axis + (np.take_along_axis(move, axis[:, None], 1)[:, 0] > 0)
    assert (answer[:, 0, 0] == right).mean() > 0.8


def test_saved_and_loaded_acts_the_same_to_the_last_bit(store, tmp_path):
    for name, cameras, body in (
        ("state", (), "mlp"),
        ("images", ("front",), "mlp"),
        ("queries", ("front",), "transformer"),
    ):
        policy = train(store, tmp_path / name, replace(BRIEF, cameras=cameras, body=body))
        loaded = load_policy(tmp_path / name)
        assert loaded.meta == policy.meta
        seen = observe(policy)
        assert np.array_equal(policy.infer(seen), loaded.infer(seen))
        # A copy of the file alone is enough.
        (tmp_path / f"{name}.safetensors").write_bytes(
            (tmp_path / name / "checkpoints" / "last.safetensors").read_bytes()
        )
        assert np.array_equal(load_policy(tmp_path / f"{name}.safetensors").infer(seen), loaded.infer(seen))


def test_two_runs_give_the_same_bytes_and_a_resumed_one_too(store, tmp_path, monkeypatch):
    config = replace(BRIEF, cameras=("front",), dropout=0.5)
    for name in ("a", "b"):
        train(store, tmp_path / "x" / name / "run", config)

    class StopError(Exception):
        pass

    def interrupt(self, network):
        raise StopError

    # Interrupted in the validation after step 2, before that step's checkpoint: all is done anew.
    with monkeypatch.context() as patch:
        patch.setattr(cloning._Recordings, "validate", interrupt)
        with pytest.raises(StopError):
            train(store, tmp_path / "x" / "c" / "run", config)
    train(store, tmp_path / "x" / "c" / "run", config, resume=True)
    for file in ("checkpoints/last.safetensors", "checkpoints/training.safetensors", "metrics.jsonl"):
        contents = [(tmp_path / "x" / name / "run" / file).read_bytes() for name in ("a", "b", "c")]
        assert contents[0] == contents[1] == contents[2]


def test_actions_stay_within_their_bounds(store, tmp_path):
    policy = train(store, tmp_path / "run", BRIEF)
    seen = observe(policy)
    far = replace(seen, state=seen.state * 1e6)
    answer = check_chunk(policy.infer(far), 5, policy.meta)
    assert np.abs(answer).max() <= np.float32(0.3)


def test_validation_episodes_are_not_trained_on(store, tmp_path, monkeypatch):
    data = cloning._Recordings(store, CONFIG)
    assert len(data.held_out) == 6
    assert len(data.train) == 24
    assert not set(data.held_out) & set(data.train)
    drawn = {int(e) for i in range(50) for e in data.sampler.sample(64, i).episode}
    assert drawn == set(data.train.tolist())


@pytest.mark.parametrize("name", ["held_out", "valid"])
def test_episodes_that_the_store_holds_out_are_not_trained_on(name, tmp_path):
    store = point_world.record(tmp_path / "store")
    write_splits(store, {name: [0, 4], "elsewhere": [1]})
    data = cloning._Recordings(store, replace(CONFIG, success_only=False))
    assert data.held_out.tolist() == [0, 4]
    assert sorted([*data.train, 0, 4]) == list(range(len(store)))
    write_splits(store, {name: [0, 4], "train": [1, 2, 4]})
    assert cloning._Recordings(store, replace(CONFIG, success_only=False)).train.tolist() == [1, 2]
    write_splits(store, {"train": [1, 2], "test": [0]})
    alone = cloning._Recordings(store, replace(CONFIG, success_only=False))
    assert (alone.train.tolist(), alone.held_out.tolist()) == ([1, 2], [])
    write_splits(store, {name: range(len(store))})
    with pytest.raises(DataError, match="an episode to train on"):
        cloning._Recordings(store, CONFIG)


def test_failed_episodes_are_left_out(tmp_path):
    store = point_world.record(tmp_path / "mixed", 10, success=lambda number: number % 2 == 0)
    chosen = cloning._Recordings(store, replace(CONFIG, held_out=0.0))
    assert chosen.train.tolist() == [0, 2, 4, 6, 8]
    everything = cloning._Recordings(store, replace(CONFIG, held_out=0.0, success_only=False))
    assert len(everything.train) == 10
    unknown = point_world.record(tmp_path / "unknown", 3, success=None)
    assert len(cloning._Recordings(unknown, replace(CONFIG, held_out=0.0)).train) == 3
    failed = point_world.record(tmp_path / "failed", 3, success=False)
    with pytest.raises(DataError, match=r"successful episode.*none among 3.*--no-success-only"):
        cloning._Recordings(failed, CONFIG)


def test_the_best_share_of_those_trained_on_is_learnt_from(tmp_path):
    store = point_world.record(tmp_path / "all", 20)
    everything = cloning._Recordings(store, CONFIG)
    best = cloning._Recordings(store, replace(CONFIG, top=0.25))
    returns = store.episodes["return"]
    assert len(best.train) == round(0.25 * len(everything.train))
    assert set(best.train) < set(everything.train)
    assert returns[best.train].min() > np.median(returns[everything.train])
    assert (best.held_out == everything.held_out).all()


@pytest.mark.faults
def test_nan_in_the_recordings_names_episode_and_step(tmp_path):
    store = point_world.record(tmp_path / "store", 4, poison=2)
    with pytest.raises(DataError, match=r"field 'action', episode 2, step 4.*NaN"):
        train(store, tmp_path / "run", replace(BRIEF, held_out=0.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("plaice",)}, "--parts plaice.*did you mean 'place'"),
        ({"parts": ("front",)}, "--parts front"),
        ({"cameras": ("wrist",)}, "--cameras wrist.*front"),
        ({"parts": ()}, "nothing"),
    ],
)
def test_fields_that_are_not_there(store, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        train(store, tmp_path / "run", replace(BRIEF, **change))


@pytest.mark.parametrize("bad", [{"chunk": 0}, {"execute": 99}, {"dropout": 1.0}, {"held_out": -0.1}, {"depth": 0},
                                 {"hidden": 6, "body": "transformer"}, {"top": 0.0}])  # fmt: skip
def test_settings_that_make_no_sense(bad):
    with pytest.raises(ConfigError, match=f"--{next(iter(bad)).replace('_', '-')}"):
        CloningConfig(**bad)


def test_shifted_images_are_crops_of_the_padded_ones():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 16, 18, 3), np.uint8))
    shifted = shift_images(images, 2, torch_generator(0))
    padded = np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    places = set()
    for image, whole in zip(shifted.numpy(), padded, strict=True):
        found = [(y, x) for y in range(5) for x in range(5) if np.array_equal(image, whole[y : y + 16, x : x + 18])]
        assert found
        places.add(found[0])
    assert len(places) > 5
    assert shift_images(images, 0, torch_generator(0)) is images
