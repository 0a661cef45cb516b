"""Features in place of pictures: encoders that learn from recordings, any learner on them, and policies in one file."""

import json
from dataclasses import replace

import numpy as np
import point_world
import pytest
import torch

from offbook.client.protocol import Observation, Policy
from offbook.data.splits import read_splits, write_splits
from offbook.data.store import EpisodeStore
from offbook.errors import CheckpointError, ConfigError, DataError
from offbook.learning import encoding
from offbook.learning.arms import Arm
from offbook.learning.augmentation import Augmentation, augment
from offbook.learning.cloning import CloningConfig, train_cloning
from offbook.learning.encoding import FEATURES, encoded_store, through, with_features
from offbook.learning.fit import FitConfig
from offbook.learning.hindsight import HindsightSizes
from offbook.learning.hindsight_presets import decision_transformer
from offbook.learning.hindsight_training import HindsightConfig
from offbook.learning.masked_model import Sizes
from offbook.learning.masked_training import MtmConfig
from offbook.learning.offline import OfflineConfig
from offbook.learning.policies import load_policy
from offbook.learning.self_supervised import EncoderConfig, TwoViews, train_encoder
from offbook.learning.vinn import VinnConfig
from offbook.models.encoders import ConvSizes, SmallConv, encoder_digest, frozen, load_encoder, save_encoder
from offbook.runs.directory import RunDirectory
from offbook.runs.seeding import torch_generator

FIT = FitConfig(steps=60, batch_size=32, warmup=5, learning_rate=2e-3, threads=1, log_every=10, checkpoint_every=20)
SMALL = EncoderConfig(side=32, width=8, size=12, hidden=32, queue=128, save_every=20, fit=FIT)
BRIEF = FitConfig(steps=4, batch_size=16, warmup=1, threads=1, log_every=2, checkpoint_every=2)
LEARNERS = {
    "bc": CloningConfig(parts=("place",), chunk=3, execute=2, hidden=16, validate_every=2, fit=BRIEF),
    "iql": OfflineConfig(algorithm="iql", parts=("place",), hidden=16, save_every=2, fit=BRIEF),
    "dt": decision_transformer(
        HindsightConfig(parts=("place",), model=HindsightSizes(width=8, layers=1, heads=2), validate_every=2, fit=BRIEF)
    ),
    "mtm": MtmConfig(parts=("place",), model=Sizes(dim=16, heads=2, encoder=1), validate_every=2, fit=BRIEF),
    "vinn": VinnConfig(parts=("place",), neighbours=3),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return point_world.record(tmp_path_factory.mktemp("recordings") / "store")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = SmallConv(ConvSizes(side=32, width=8, size=12))
    path = tmp_path_factory.mktemp("encoders") / "conv.safetensors"
    save_encoder(path, frozen(made), {})
    return path


def observe(policy, batch=4):
    rng, goals = np.random.default_rng(0), point_world.starts(batch, 5)[:, 1]
    parts = {"trial": np.zeros((batch, 3)), "place": rng.uniform(-1, 1, (batch, 2))}
    return Observation(
        sessions=tuple(map(str, range(batch))),
        state=np.concatenate([parts[name] for name, _ in policy.meta.observation.state], 1).astype(np.float32),
        images={name: np.stack([point_world.picture(goal) for goal in goals])
                for name in policy.meta.observation.cameras},
        time=np.zeros(batch),
    )  # fmt: skip


def answer(policy):
    seen = observe(policy)
    policy.reset(seen.sessions, [""] * len(seen.sessions))
    return policy.infer(seen)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_stands_on_features_and_its_policy_looks_at_the_camera(store, encoder, tmp_path, name):
    arm = Arm(store=store.path, config=LEARNERS[name], folder=tmp_path / "run", encoder=encoder)
    policy = arm.fit()
    assert isinstance(policy, Policy)
    assert policy.meta.observation.cameras == {"front": (24, 24)}
    assert dict(policy.meta.observation.state).keys() - {"trial"} == {"place"}
    # One file, alone, is enough; it remembers the recordings and not the features.
    copy = tmp_path / "alone.safetensors"
    copy.write_bytes((tmp_path / "run" / "checkpoints" / "last.safetensors").read_bytes())
    loaded = load_policy(copy)
    assert np.array_equal(answer(loaded), answer(policy))
    assert loaded.provenance["recordings"]["sha256"] == store.digest
    assert loaded.provenance["environment"] == "test:point"
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == copy.read_bytes()
    # What is done is read and not done again.
    before = copy.stat().st_mtime_ns
    assert np.array_equal(answer(arm.fit()), answer(policy))
    assert copy.stat().st_mtime_ns == before


def test_a_policy_on_features_is_asked_what_the_store_would_have_said(store, encoder, tmp_path):
    seen, config, train = through(encoder, store, LEARNERS["bc"], train_cloning)
    assert config.parts == ("place", "front features")
    policy = train(seen, config, RunDirectory.create(tmp_path / "run", config))
    row = 30
    features = np.asarray(seen.field("front features"))[row : row + 1]
    inside = Observation(
        sessions=("a",), images={}, time=np.zeros(1),
        state=np.concatenate([np.asarray(seen.field("place"))[row : row + 1], features], 1),
    )  # fmt: skip
    outside = replace(inside, state=np.asarray(store.field("place"))[row : row + 1],
                      images={"front": np.asarray(store.field("front"))[row : row + 1]})  # fmt: skip
    np.testing.assert_allclose(policy.infer(outside), policy.inner.infer(inside), atol=1e-5)
    other = replace(outside, images={"front": outside.images["front"][:, ::-1].copy()})
    assert np.abs(policy.infer(other) - policy.infer(outside)).max() > 1e-4


def test_a_model_of_many_roles_has_them_through_an_encoder_too(store, encoder, tmp_path):
    arms = (
        Arm(store=store.path, config=LEARNERS[name], folder=tmp_path / name, encoder=encoder) for name in ("mtm", "bc")
    )
    model, cloned = (arm.fit() for arm in arms)
    assert model.inner.role == "rcbc"
    told = model.in_role("rcbc", 0.2)
    assert np.abs(answer(told) - answer(model)).max() > 1e-6
    told.save(tmp_path / "told.safetensors")
    assert np.array_equal(answer(load_policy(tmp_path / "told.safetensors")), answer(told))
    assert model.in_role("bc").inner.role == "bc"
    with pytest.raises(ConfigError, match="role 'bc': expected a policy with roles"):
        cloned.in_role("bc")


def test_features_are_computed_once_and_gone_on_with(store, encoder, monkeypatch):
    eyes = load_encoder(encoder)
    whole = encoded_store(store, eyes)
    assert whole.path.parent == store.path.with_name("store.features")
    assert len(whole) == len(store)
    assert np.array_equal(whole.field("action"), store.field("action"))
    assert np.array_equal(whole.episodes["success"], store.episodes["success"])
    assert "front" not in whole.schema
    last = torch.from_numpy(np.array(store.episode(3).fields["front"][-1:]))
    np.testing.assert_allclose(whole.final("front" + FEATURES)[3:4], eyes(last), atol=1e-5)
    # Nothing is computed again, groups of episodes follow those of the recordings.
    monkeypatch.setattr(encoding, "encode", None)
    write_splits(store, {"train": [0, 1, 2], "held_out": [3]})
    assert read_splits(encoded_store(store, eyes))["train"].tolist() == [0, 1, 2]
    (store.path / "splits.json").unlink()
    assert read_splits(encoded_store(store, eyes)) == {}
    monkeypatch.undo()

    # Another encoder has another folder; interrupted, it goes on where it stopped.
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other, calls = frozen(SmallConv(ConvSizes(side=32, width=8, size=12))), []
    right = encoding.encode

    def tiring(made, images):
        calls.append(len(images))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return right(made, images)

    monkeypatch.setattr(encoding, "encode", tiring)
    with pytest.raises(KeyboardInterrupt):
        encoded_store(store, other)
    found = encoded_store(store, other)
    assert found.path != whole.path
    assert len(calls) == len(store) + 1
    found.verify()


@pytest.mark.faults
def test_what_does_not_fit_is_refused(store, encoder, tmp_path):
    blind = EpisodeStore.open(encoded_store(store, load_encoder(encoder)).path)
    with pytest.raises(DataError, match="recordings with a camera, got none"):
        through(encoder, blind, LEARNERS["bc"], train_cloning)
    with pytest.raises(ConfigError, match=r"--cameras fornt.*did you mean 'front'"):
        train_encoder(store, replace(SMALL, cameras=("fornt",)), RunDirectory.create(tmp_path / "e", SMALL))
    run = RunDirectory.create(tmp_path / "run", LEARNERS["bc"])
    seen, config, train = through(encoder, store, LEARNERS["bc"], train_cloning)
    train(seen, config, run)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_encoder(tmp_path / "other.safetensors", SmallConv(ConvSizes(side=32, width=8, size=12)), {})
    seen, config, train = through(tmp_path / "other.safetensors", store, LEARNERS["bc"], train_cloning)
    with pytest.raises(ConfigError, match=r"--encoder: expected the one with digest"):
        train(seen, config, run, resume=True)
    assert with_features(replace(config, parts=None), seen).parts is None


@pytest.mark.faults
@pytest.mark.parametrize("change", [
    lambda r: r.pop("encoded"), lambda r: r["encoded"].pop("kind"), lambda r: r["encoded"].update(kind="encoded"),
    lambda r: r["encoded"].update(kind="oracle"), lambda r: r["encoded"].update(kind=["bc"]),
    lambda r: r["encoded"]["encoder"].update(size=13), lambda r: r["encoded"]["encoder"].update(width=10**9),
    lambda r: r["encoded"].update(cameras={}), lambda r: r["encoded"]["cameras"].update(wrist=[24, 24]),
    lambda r: r["encoded"]["cameras"].update(front=[10**9, 24]), lambda r: r["encoded"]["meta"].update(chunk=3),
    lambda r: r["meta"]["observation"].update(cameras={}), lambda r: r["network"].update(hidden=10**9),
])  # fmt: skip
def test_records_that_lie(store, encoder, tmp_path, change):
    from offbook.runs.checkpoint import load_checkpoint, save_checkpoint

    Arm(store=store.path, config=LEARNERS["bc"], folder=tmp_path / "run", encoder=encoder).fit()
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors")
    record = json.loads(json.dumps(checkpoint.record))
    change(record)
    save_checkpoint(tmp_path / "liar.safetensors", "encoded", checkpoint.values, record)
    with pytest.raises(CheckpointError, match=r"liar\.safetensors"):
        load_policy(tmp_path / "liar.safetensors")


@pytest.mark.learning
@pytest.mark.parametrize("method", ["byol", "moco"])
def test_learning_from_two_views_goes_on_to_the_same_bytes(store, tmp_path, method):
    config = replace(SMALL, method=method)
    encoder = train_encoder(store, config, RunDirectory.create(tmp_path / "x" / "a", config))
    rows = RunDirectory.open(tmp_path / "x" / "a").metrics()
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]
    assert rows[-1]["spread"] > 0.3  # not all alike

    run, calls = RunDirectory.create(tmp_path / "x" / "b", config), []

    def stopping(self, *names):
        calls.append(names)
        if len(calls) == 45:
            raise KeyboardInterrupt
        return draw(self, *names)

    from offbook.learning.self_supervised import Frames

    draw, Frames.draw = Frames.draw, stopping
    try:
        with pytest.raises(KeyboardInterrupt):
            train_encoder(store, config, run)
    finally:
        Frames.draw = draw
    resumed = train_encoder(store, config, run, resume=True)
    assert encoder_digest(resumed) == encoder_digest(encoder) == encoder_digest(load_encoder(run.path))
    for file in ("checkpoints/last.safetensors", "checkpoints/training.safetensors", "metrics.jsonl"):
        assert (tmp_path / "x" / "a" / file).read_bytes() == (tmp_path / "x" / "b" / file).read_bytes()


def test_the_slow_copy_follows_and_the_queue_takes_in_what_was_seen(store):
    frames = torch.from_numpy(np.array(store.field("front")[:32]))
    module = TwoViews(SmallConv(ConvSizes(side=32, width=8, size=12)), replace(SMALL, method="moco", queue=40))
    before, first = module.queue.clone(), next(module.slow.parameters()).clone()
    with torch.no_grad():
        next(module.fast.parameters()).add_(1)
    module(frames, torch_generator(0))
    torch.testing.assert_close(next(module.slow.parameters()), first + 0.01)
    assert int(module.place) == 32
    assert torch.equal(module.queue[32:], before[32:])
    assert not torch.isclose(module.queue[:32], before[:32]).all(1).any()
    module(frames, torch_generator(1))
    assert int(module.place) == 24
    kept = module.eval()
    place, slow = int(kept.place), next(kept.slow.parameters()).clone()
    kept(frames, torch_generator(2))
    assert int(kept.place) == place
    assert torch.equal(next(kept.slow.parameters()), slow)


def test_components_and_untrained_networks_are_encoders_too(store, tmp_path):
    for method in ("pca", "random"):
        config = replace(SMALL, method=method)
        run = RunDirectory.create(tmp_path / method, config)
        made = train_encoder(store, config, run)
        assert encoder_digest(load_encoder(tmp_path / method)) == encoder_digest(made)
        assert encoder_digest(train_encoder(store, config, run, resume=True)) == encoder_digest(made)
    assert RunDirectory.open(tmp_path / "pca").metrics()[0]["explained"] > 0.6


def test_views_are_crops_in_other_colours():
    frames = torch.from_numpy(np.stack([point_world.picture(np.array([x, 0.3])) for x in np.linspace(-1, 1, 16)]))
    still = Augmentation(crop=1.0, colour=0.0, grey=0.0, blur=0.0)
    views = augment(frames, 24, still, torch_generator(0))
    np.testing.assert_allclose(views.permute(0, 2, 3, 1) * 255, frames, atol=1e-3)
    one, two = (augment(frames, 32, Augmentation(), torch_generator(0)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (16, 3, 32, 32)
    assert 0 <= one.min() < one.max() <= 1
    grey = augment(frames.clone().fill_(200) * torch.tensor([1, 0, 1], dtype=torch.uint8), 16,
                   Augmentation(crop=1.0, colour=0.0, grey=1.0, blur=0.0), torch_generator(0))  # fmt: skip
    np.testing.assert_allclose(grey[:, 0], grey[:, 1], atol=1e-5)
    np.testing.assert_allclose(grey[:, 0].mean(), (0.299 + 0.114) * 200 / 255, atol=1e-3)
    # A crop of a half shows at least that share of the picture: the bright square is seen larger, or not at all.
    bright = (augment(frames, 24, replace(still, crop=0.5), torch_generator(3)).mean(1) > 0.5).float().mean((1, 2))
    assert bright.max() > 1.3 * 25 / 24**2
    sharp, blurred = (augment(frames, 64, replace(still, blur=share), torch_generator(0)) for share in (0.0, 1.0))
    assert (blurred - sharp).abs().max() > 0.01
    np.testing.assert_allclose(blurred.mean((2, 3)), sharp.mean((2, 3)), atol=0.01)


@pytest.mark.parametrize("bad", [{"width": 7}, {"side": 60}, {"momentum": 1.0}, {"temperature": 0.0},
                                 {"method": "pca", "size": 10**6}])  # fmt: skip
def test_settings_that_make_no_sense(bad):
    with pytest.raises(ConfigError):
        EncoderConfig(**bad)
