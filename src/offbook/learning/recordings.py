"""What of a store is learnt from: the parts and cameras that are looked at, the episodes, and those held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from offbook.client.protocol import ObservationSpec
from offbook.data.returns import PHYSICS, without_rewards
from offbook.data.splits import HELD_OUT, read_splits
from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, DataError, nearest
from offbook.runs.seeding import generator


def choose_observation(
    store: EpisodeStore, parts: Sequence[str] | None, cameras: Sequence[str] = ()
) -> ObservationSpec:
    """What a policy looks at.

    Args:
        store: the recordings.
        parts: names of state parts; None for all but the state of the physics, which only a simulator can see.
        cameras: names of cameras.

    Raises:
        ConfigError: the recordings have no such part or camera, or nothing to look at is left.
    """
    offered = store.schema.observation_spec()
    sizes = dict(offered.state)
    parts = tuple(name for name in sizes if name != PHYSICS) if parts is None else parts
    for kind, names, known in (("part", parts, sizes), ("camera", cameras, offered.cameras)):
        for name in names:
            if name not in known:
                fix = nearest(name, known) if known else f"leave --{kind}s out"
                expected = f"a {kind} of the recordings in {store.path}"
                got = f"none of {', '.join(known) or 'none at all'}"
                raise ConfigError(f"--{kind}s {name}", expected=expected, got=got, fix=fix)
    if not parts and not cameras:
        raise ConfigError("--parts, --cameras", expected="something to look at", got="nothing", fix="name a part")
    return ObservationSpec(
        state=tuple((name, sizes[name]) for name in parts),
        cameras={name: offered.cameras[name] for name in cameras},
    )


def choose_episodes(
    store: EpisodeStore, fields: Sequence[str], *, success_only: bool = False, held_out: float = 0.1, seed: int = 0
) -> tuple[Int64[np.ndarray, " a"], Int64[np.ndarray, " b"]]:
    """Numbers of the episodes to train on, and of those held out: as the store says, else drawn.

    Args:
        store: the recordings.
        fields: which an episode must have.
        success_only: leave out episodes without success, where the recordings know of success.
        held_out: share that is held out, where the store does not say which.
        seed: of the draw.

    Raises:
        DataError: no episode can be used.
    """
    use = np.logical_and.reduce([np.ones(len(store), bool), *(store.present(name) for name in fields)])
    success = store.episodes["success"]
    if success_only and not np.isnan(success).all():
        use &= success == 1.0
    kept = np.flatnonzero(use).astype(np.int64)
    if not len(kept):
        fix = "record more, choose other parts" + (", or add --no-success-only" if success_only else "")
        expected = f"a {'successful ' if success_only else ''}episode with {', '.join(fields)}"
        reward = store.schema.reward
        if reward is not None and reward in fields and not store.present(reward).any():
            fix = without_rewards(store, fix)
        raise DataError(str(store.path), expected=expected, got=f"none among {len(store)}", fix=fix)
    splits = read_splits(store)
    chosen = [splits[name] for name in HELD_OUT if name in splits]
    if chosen or "train" in splits:
        held = np.intersect1d(kept, np.concatenate([*chosen, np.zeros(0, np.int64)]))
        train = np.setdiff1d(np.intersect1d(kept, splits.get("train", kept)), held)
        if not len(train):
            got, fix = "none in its groups of episodes", "split anew: offbook data split"
            raise DataError(str(store.path), expected="an episode to train on", got=got, fix=fix)
        return train, held
    order = kept[generator(seed, "held out").permutation(len(kept))]
    count = min(round(held_out * len(kept)), len(kept) - 1)
    return np.sort(order[count:]), np.sort(order[:count])


def best_episodes(store: EpisodeStore, episodes: Int64[np.ndarray, " a"], share: float) -> Int64[np.ndarray, " b"]:
    """The share of the episodes with the highest returns, at least one, in their order.

    Args:
        store: the recordings.
        episodes: numbers of the episodes to choose from.
        share: above 0, at most 1, which takes all of them, whether they have returns or not.

    Raises:
        DataError: none of them has a return.
    """
    if share == 1:
        return episodes
    returns = store.episodes["return"]
    known = episodes[np.isfinite(returns[episodes])]
    if not len(known):
        fix = without_rewards(store, "learn from all of them")
        expected = "a training episode with a return, to choose the best of"
        raise DataError(str(store.path), expected=expected, got="none", fix=fix)
    count = max(1, round(share * len(known)))
    return np.sort(known[np.argsort(-returns[known], kind="stable")[:count]])
