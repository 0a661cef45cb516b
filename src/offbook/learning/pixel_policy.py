"""What an agent that sees pictures has learnt, as a policy: it keeps the last few pictures of each session."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from offbook.client.protocol import ActionSpec, Observation, PolicyMeta
from offbook.errors import ConfigError
from offbook.learning.pixel_agent import PixelNetwork, PixelSizes
from offbook.learning.policies import check_meta
from offbook.runs.checkpoint import save_checkpoint

KIND = "pixels"

# Whose pictures are kept: the sessions asked least lately go first.
_SESSIONS = 1_024


class PixelPolicy:
    """A trained network as a `Policy`: from the last pictures of one camera to an action, held for some steps.

    Made by `train_pixels`, or read by `policies.load_policy`.

    Args:
        module: the network.
        meta: what it wants and gives; `meta.chunk` is for how many steps an action is held.
        provenance: JSON types kept in the file.
    """

    def __init__(self, module: PixelNetwork, meta: PolicyMeta, provenance: Mapping[str, Any]) -> None:
        self.module, self.meta, self.provenance = module, meta, dict(provenance)
        self._device = next(module.parameters()).device
        self._camera = next(iter(meta.observation.cameras))
        self._films: dict[str, deque[np.ndarray]] = {}

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Forgets the pictures of each session."""
        for session in sessions:
            self._films.pop(session, None)

    @torch.inference_mode()
    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch time action"]:
        """The next action for each session, as often as it is to be carried out."""
        seen = zip(observation.sessions, observation.images[self._camera], strict=True)
        films = torch.from_numpy(np.stack([self._film(session, picture) for session, picture in seen]))
        action = from_unit(self.module(films.to(self._device)).cpu().numpy(), self.meta.action)
        return np.repeat(action[:, None], self.meta.chunk, 1)

    def _film(self, session: str, picture: np.ndarray) -> np.ndarray:
        film, picture = self._films.pop(session, None), np.array(picture)  # a driver may write over its own
        if film is None:
            film = deque([picture] * self.module.sizes.stack, self.module.sizes.stack)
            for other in [*self._films][: max(0, len(self._films) + 1 - _SESSIONS)]:
                del self._films[other]
        else:
            film.append(picture)
        self._films[session] = film  # at the end of those that were asked
        return np.stack(film)

    def save(self, path: Path) -> None:
        """Writes the policy as one file that needs nothing else to run."""
        record = {"meta": self.meta.to_json(), "network": asdict(self.module.sizes), **self.provenance}
        save_checkpoint(path, KIND, self.module.state_dict(), record)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PixelPolicy:
        """A policy of the recorded sizes, on whatever device is the default, whose weights mean nothing yet.

        Raises:
            ConfigError: the record is not what `save` writes.
        """
        meta, sizes = PolicyMeta.from_json(record["meta"]), record["network"]
        check_meta(meta)
        seen = meta.observation
        sound = len(seen.cameras) == 1 and not seen.state and meta.action.choices is None and 1 <= meta.chunk <= 1_000
        sound = sound and bool(np.isfinite([*meta.action.low, *meta.action.high]).all())
        if not sound or not all(type(size) is int for size in sizes.values()):
            expected, fix = "a network from the pictures of one camera to an action", "save the policy again"
            raise ConfigError("policy record", expected=expected, got="another", fix=fix)
        module = PixelNetwork(next(iter(seen.cameras.values())), meta.action.size, PixelSizes(**sizes))
        return cls(module, meta, {key: of for key, of in record.items() if key not in ("meta", "network")})


def to_unit(action: Float32[np.ndarray, "*batch action"], spec: ActionSpec) -> Float32[np.ndarray, "*batch action"]:
    """What `from_unit` made of actions from -1 to 1, turned back."""
    low, high = np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32)
    return np.asarray(2 * (action - low) / np.maximum(high - low, np.finfo(np.float32).tiny) - 1, np.float32)


def from_unit(action: Float32[np.ndarray, "*batch action"], spec: ActionSpec) -> Float32[np.ndarray, "*batch action"]:
    """Actions from -1 to 1 in the units of a robot.

    Example:
        >>> from_unit(np.array([0.0, 1.0], np.float32), ActionSpec(size=2, low=(0.0, -2.0), high=(1.0, 2.0)))
        array([0.5, 2. ], dtype=float32)
    """
    low, high = np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32)
    return np.asarray(low + (action + 1) / 2 * (high - low), np.float32).clip(low, high)
