"""Policies that see through a frozen encoder: pictures become parts of the state, before any learner looks.

Features are computed once for a store, into a store of their own beside it, in which each camera is a state part
`CAMERA features`. Whatever learns from stores learns from that one and knows nothing of pictures. The policy that comes
out is put into one file with the encoder, and looks at the camera again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import nn

from offbook.client.protocol import Observation, ObservationSpec, PolicyMeta
from offbook.data.index import Outcome
from offbook.data.schema import FieldSpec, Schema
from offbook.data.splits import read_splits, write_splits
from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, DataError
from offbook.learning.policies import check_meta, load_policy, policy_class
from offbook.learning.self_supervised import chosen_cameras
from offbook.models.encoders import Encoder, build_encoder, encoder_digest, load_encoder
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.runs.directory import RunDirectory, write_atomic
from offbook.runs.progress import track

KIND = "encoded"
FEATURES = " features"
"""Behind a camera's name, that of the state part that an encoder makes of it."""

C = TypeVar("C")

# Frames that go through an encoder at a time, and episodes between two waits for the disk.
_FRAMES, _EPISODES = 256, 32


def encode(encoder: Encoder, images: UInt8[np.ndarray, "frames height width 3"]) -> Float32[np.ndarray, "frames size"]:
    """The features of frames, on the device of the encoder.

    Raises:
        DataError: the encoder made something that is not finite.
    """
    device = next(iter(encoder.state_dict().values())).device
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), _FRAMES):
            part = torch.tensor(images[start : start + _FRAMES])
            found.append(encoder(part.to(device)).float().cpu().numpy())
    features = np.concatenate(found)
    if not np.isfinite(features).all():
        fix = "use another encoder"
        raise DataError("features of an encoder", expected="finite numbers", got="NaN or infinity", fix=fix)
    return np.asarray(features, np.float32)


def encoded_store(store: EpisodeStore, encoder: Encoder, cameras: tuple[str, ...] | None = None) -> EpisodeStore:
    """The same episodes with features in place of pictures.

    They are computed once: the store `STORE.features/DIGEST` is made beside the recordings, or gone on with after an
    interruption, or taken as it is. Its name follows from the digests of the recordings and of the encoder.

    Args:
        store: the recordings.
        encoder: what sees.
        cameras: which; None for all. The others' pictures are left out.

    Raises:
        ConfigError: the recordings have no such camera.
        DataError: they have none at all, or the store cannot be written.
    """
    cameras = chosen_cameras(store, cameras)
    facts = {"recordings": store.digest, "encoder": encoder_digest(encoder), "cameras": list(cameras)}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = store.path.resolve().with_name(f"{store.path.resolve().name}.features") / name
    if not (path / "store.json").exists():
        path.parent.mkdir(exist_ok=True)
        EpisodeStore.create(path, _schema(store, encoder, cameras, facts)).close()
    if len(EpisodeStore.open(path)) < len(store):
        _append(store, encoder, cameras, path)
    found = EpisodeStore.open(path)
    groups = read_splits(store)
    if {k: v.tolist() for k, v in read_splits(found).items()} != {k: v.tolist() for k, v in groups.items()}:
        write_splits(found, groups)
    return found


def _schema(store: EpisodeStore, encoder: Encoder, cameras: Sequence[str], facts: Mapping[str, Any]) -> Schema:
    kept = tuple(spec for spec in store.schema.fields if not spec.camera)
    made = tuple(FieldSpec(camera + FEATURES, "float32", (encoder.size,), "observation") for camera in cameras)
    sizes = store.schema.observation_spec().cameras
    return replace(
        store.schema,
        fields=(*kept, *made),
        extra={**store.schema.extra, "encoded": {**facts, "sizes": {name: list(sizes[name]) for name in cameras}}},
    )


def _append(store: EpisodeStore, encoder: Encoder, cameras: Sequence[str], path: Path) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    encoder = encoder if device is None else encoder.to(device)
    with EpisodeStore.append_to(path) as writer:
        for number in track(range(len(writer), len(store)), "encoding"):
            episode = store.episode(number)
            outcome = {name: getattr(episode, name) for name in Outcome.__dataclass_fields__}
            fields: dict[str, Any] = {
                spec.name: episode.fields.get(spec.name) for spec in store.schema.fields if not spec.camera
            }
            for camera in cameras:
                images = episode.fields.get(camera)
                fields[camera + FEATURES] = None if images is None else encode(encoder, images)
            writer.append(fields, **outcome, sync=(number + 1) % _EPISODES == 0)
    encoder.cpu()


def with_features(config: C, store: EpisodeStore) -> C:
    """A learner's settings with all features among the parts that it looks at, unless it names some itself.

    Args:
        config: a dataclass with `parts`.
        store: of `encoded_store`.
    """
    parts: tuple[str, ...] | None = getattr(config, "parts")  # noqa: B009 (any learner's)
    made = tuple(name for name, _ in store.schema.observation_spec().state if name.endswith(FEATURES))
    if parts is None or set(parts) & set(made):
        return config
    found: C = replace(config, parts=(*parts, *made))  # type: ignore[type-var]
    return found


class EncodedPolicy:
    """A policy on features and the encoder that makes them, as one `Policy` that looks at cameras.

    Made by `train_encoded`, or read from a file by `policies.load_policy`.

    Args:
        module: `encoder` and `policy`.
        meta: what it wants and gives.
        provenance: JSON types kept in the file: those of the policy on features, and under `encoded` its `kind` and
            `meta`, the `encoder`, and the `cameras` with their sizes.
    """

    def __init__(self, module: nn.ModuleDict, meta: PolicyMeta, provenance: Mapping[str, Any]) -> None:
        self.module, self.meta, self.provenance = module.eval(), meta, dict(provenance)
        encoder, encoded = module["encoder"], self.provenance["encoded"]
        if not isinstance(encoder, Encoder):
            raise TypeError("an encoded policy has an encoder")
        self._encoder, self._features = encoder, PolicyMeta.from_json(encoded["meta"])
        own = {name: value for name, value in self.provenance.items() if name != "encoded"}
        self.inner: Any = policy_class(encoded["kind"])(module["policy"], self._features, own)

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Begins an episode for each session."""
        self.inner.reset(sessions, prompts)

    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch time action"]:
        """The next actions for each session."""
        parts, start = {}, 0
        for name, size in self.meta.observation.state:
            parts[name] = observation.state[:, start : start + size]
            start += size
        for camera in self.meta.observation.cameras:
            parts[camera + FEATURES] = encode(self._encoder, observation.images[camera])
        state = np.concatenate([parts[name] for name, _ in self._features.observation.state], 1)
        return np.asarray(self.inner.infer(replace(observation, state=state, images={})), np.float32)

    def in_role(self, role: str, target: float | None = None) -> EncodedPolicy:
        """The same policy in another role, or aiming at another return, where what stands on features has roles.

        Raises:
            ConfigError: it has none, or cannot play that one.
        """
        if not hasattr(self.inner, "in_role"):
            got, fix = f"{self.meta.name}, without", "leave the role out"
            raise ConfigError(f"role {role!r}", expected="a policy with roles", got=got, fix=fix)
        return self._as(self.inner.in_role(role, target))

    def aiming_at(self, target: float) -> EncodedPolicy:
        """The same policy aiming at another return, where what stands on features aims at one.

        Raises:
            ConfigError: it does not, or cannot aim at that one.
        """
        if not hasattr(self.inner, "aiming_at"):
            got, fix = f"{self.meta.name}, without", "leave the target out"
            raise ConfigError(f"target {target:g}", expected="a policy that aims at a return", got=got, fix=fix)
        return self._as(self.inner.aiming_at(target))

    def _as(self, inner: Any) -> EncodedPolicy:
        return EncodedPolicy(self.module, self.meta, {**inner.provenance, "encoded": self.provenance["encoded"]})

    def save(self, path: Path) -> None:
        """Writes the policy as one file that needs nothing else to run."""
        save_checkpoint(path, KIND, self.module.state_dict(), {"meta": self.meta.to_json(), **self.provenance})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> EncodedPolicy:
        """A policy of the recorded sizes, on whatever device is the default, whose weights mean nothing yet.

        Raises:
            ConfigError: the record is not what `save` writes.
        """
        meta, encoded = PolicyMeta.from_json(record["meta"]), record["encoded"]
        check_meta(meta)
        encoder, inner_meta = build_encoder(encoded["encoder"]), PolicyMeta.from_json(encoded["meta"])
        if meta != _seeing(inner_meta, encoded["cameras"], encoder) or encoded["kind"] == KIND:
            expected, fix = "a policy on the features of its encoder", "save the policy again"
            raise ConfigError("policy record", expected=expected, got="another", fix=fix)
        rest = {name: value for name, value in record.items() if name not in ("meta", "encoded")}
        inner = policy_class(encoded["kind"]).from_record({**rest, "meta": encoded["meta"]})
        module = nn.ModuleDict({"encoder": encoder, "policy": inner.module})
        return cls(module, meta, {name: value for name, value in record.items() if name != "meta"})


def _seeing(features: PolicyMeta, cameras: Mapping[str, Sequence[int]], encoder: Encoder) -> PolicyMeta:
    """What a policy on features wants once an encoder makes them: cameras in place of features."""
    looked = {name: size for name, size in features.observation.state if name.endswith(FEATURES)}
    if {name + FEATURES for name in cameras} != set(looked) or set(looked.values()) != {encoder.size}:
        expected = f"features of size {encoder.size} for each of {', '.join(cameras)}"
        got, fix = ", ".join(f"{name} ({size})" for name, size in looked.items()) or "none", "save the policy again"
        raise ConfigError("policy record", expected=expected, got=got, fix=fix)
    seen = ObservationSpec(
        state=tuple(part for part in features.observation.state if part[0] not in looked),
        cameras={name: (int(height), int(width)) for name, (height, width) in cameras.items()},
    )
    return replace(features, observation=seen)


class _OnFeatures(RunDirectory):
    """A run whose policy is not yet the one that a robot can use, and so lies elsewhere."""

    def checkpoint(self, name: str = "last") -> Path:
        return super().checkpoint("on-features" if name == "last" else name)


def train_encoded(
    store: EpisodeStore,
    config: Any,
    run: RunDirectory,
    *,
    train: Callable[..., object],
    encoder: Encoder,
    resume: bool = False,
) -> EncodedPolicy:
    """Lets any learner learn from features, and saves its policy with the encoder as the run's checkpoint `last`.

    Args:
        store: of `encoded_store`.
        config: the learner's settings.
        run: where metrics and checkpoints go.
        train: the learner, such as `train_cloning`.
        encoder: what made the features.
        resume: continue an interrupted training.

    Raises:
        ConfigError: the run began with another encoder, or no features are looked at; and what the learner raises.
        DataError: what the learner raises.
    """
    facts = store.schema.extra["encoded"]
    _remember(run.path / "encoder.json", facts["encoder"])
    inner = _OnFeatures(run.path)
    train(store, config, inner, resume=resume)
    if not inner.checkpoint().exists():  # nothing was left to do
        done: EncodedPolicy = load_policy(run.path)  # type: ignore[assignment]
        return done
    checkpoint, policy = load_checkpoint(inner.checkpoint()), load_policy(inner.checkpoint())
    looked = {name for name, _ in policy.meta.observation.state}
    cameras = {name: size for name, size in facts["sizes"].items() if name + FEATURES in looked}
    if not cameras:
        fix = "leave --encoder out, or name them too"
        raise ConfigError("--parts", expected="the features of a camera among them", got="none", fix=fix)
    provenance = {
        **{name: value for name, value in checkpoint.record.items() if name != "meta"},
        "encoded": {
            "kind": checkpoint.kind,
            "meta": policy.meta.to_json(),
            "encoder": encoder.record(),
            "cameras": cameras,
        },
    }
    provenance["recordings"] = {**checkpoint.record["recordings"], "sha256": facts["recordings"]}
    module = nn.ModuleDict({"encoder": encoder, "policy": policy.module})  # type: ignore[attr-defined]
    found = EncodedPolicy(module, _seeing(policy.meta, cameras, encoder), provenance)
    found.save(run.checkpoint())
    inner.checkpoint().unlink()
    return found


def through(
    encoder: Path | str, store: EpisodeStore, config: C, train: Callable[..., object]
) -> tuple[EpisodeStore, C, Callable[..., EncodedPolicy]]:
    """Puts an encoder between recordings and a learner.

    Args:
        encoder: see `offbook.models.encoders.load_encoder`.
        store: the recordings.
        config: the learner's settings.
        train: the learner, `train(store, config, run, resume=...)`.

    Returns:
        The recordings with features, the settings that look at them, and the learner of policies that see.

    Raises:
        CheckpointError: there is no such encoder.
        DataError: see `encoded_store`.
    """
    eyes = load_encoder(encoder)
    seen = encoded_store(store, eyes)
    return seen, with_features(config, seen), partial(train_encoded, train=train, encoder=eyes)


def _remember(file: Path, digest: str) -> None:
    """Keeps with a run which encoder it stands on; a run is gone on with on the same one."""
    if not file.exists():
        write_atomic(file, json.dumps({"sha256": digest}) + "\n")
    elif (before := json.loads(file.read_text())["sha256"]) != digest:
        fix = "give the encoder with which the run began, or start a new run"
        raise ConfigError("--encoder", expected=f"the one with digest {before[:12]}", got=digest[:12], fix=fix)
