"""Exploration for TorchRL: a transform of batches, from a collector or a replay buffer, that pays a bonus."""

from __future__ import annotations

import torch
from torch import nn

from offbook.errors import ConfigError, DataError, needs_extra
from offbook.systems.vcse.bonus import Bonus
from offbook.systems.vcse.encoders import Identity
from offbook.systems.vcse.scaling import Beta, weight_at

with needs_extra("torchrl"):
    from tensordict import NestedKey, TensorDictBase
    from torchrl.envs.transforms import Transform


class AddBonus(Transform):  # type: ignore[misc]
    """Adds beta times a bonus to the rewards of a batch, in which neighbours are searched.

    Append it to a replay buffer, whose stored rewards stay as they are, or call it with what a collector gives before
    advantages are estimated. It is no transform of an environment: one step has no neighbours.

    Args:
        bonus: what pays.
        beta: its weight, or a function from states seen so far to it.
        encoder: from observations to features, one row each.
        observation_key: of what the encoder reads.
        value_key: of a critic's values, for a bonus that needs them: one that learns from the task's reward alone, not
            from what this transform makes of it.
        reward_key: of the rewards.

    Raises:
        ConfigError: a batch lacks an entry, or beta is not finite.
        DataError: features or values are not finite; it names the number of states seen before.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from offbook.systems.vcse import VCSE
        >>> add = AddBonus(VCSE(k=1), beta=0.1)
        >>> entries = {"observation": torch.eye(3), "state_value": torch.rand(3, 1)}
        >>> batch = TensorDict({**entries, "next": {"reward": torch.zeros(3, 1)}}, [3])
        >>> bool((add(batch)["next", "reward"] != 0).all())
        True
    """

    def __init__(
        self,
        bonus: Bonus,
        *,
        beta: Beta,
        encoder: nn.Module | None = None,
        observation_key: NestedKey = "observation",
        value_key: NestedKey = "state_value",
        reward_key: NestedKey = ("next", "reward"),
    ) -> None:
        keys = [observation_key, *([value_key] if bonus.needs_values else []), reward_key]
        super().__init__(in_keys=keys, out_keys=[reward_key])
        self.bonus, self.beta, self.encoder = bonus, beta, encoder or Identity()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # states, by which beta goes

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The same batch with other rewards."""
        found = [tensordict.get(key, None) for key in self.in_keys]
        if missing := [key for key, entry in zip(self.in_keys, found, strict=True) if entry is None]:
            fix = "write it before, such as by a value operator, or name another key"
            raise ConfigError("AddBonus", expected=f"an entry {missing[0]!r}", got="a batch without it", fix=fix)
        observations, *values, reward = found
        axes = tensordict.ndim
        features = self.encoder(observations.flatten(0, axes - 1))
        seen = int(self.seen)
        try:
            bonus = self.bonus(features, values[0].reshape(-1) if values else None)
        except DataError as error:
            where = f"{error.where}, after {seen} states"
            raise DataError(where, expected=error.expected, got=error.got, fix=error.fix) from None
        weight = weight_at(self.beta, seen)
        self.seen += tensordict.numel()
        return tensordict.set(self.out_keys[0], reward + weight * bonus.view_as(reward))
