"""The bonus in TorchRL's replay buffers and batches."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from offbook.errors import ConfigError, DataError
from offbook.systems.vcse import VCSE, StateEntropy
from offbook.systems.vcse.encoders import Identity
from offbook.systems.vcse.scaling import Linear
from offbook.systems.vcse.torchrl import AddBonus


def batch(*shape):
    rng = torch.Generator().manual_seed(0)
    return TensorDict(
        {
            "pixels": torch.randn(*shape, 2, 3, generator=rng),
            "state_value": torch.randn(*shape, 1, generator=rng),
            "next": {"reward": torch.randn(*shape, 1, generator=rng)},
        },
        shape,
    )


def test_a_replay_buffer_pays_what_it_samples_and_stores_what_it_was_given():
    memory = TensorDictReplayBuffer(storage=LazyTensorStorage(50), batch_size=20)
    memory.extend(batch(50))
    memory.append_transform(AddBonus(VCSE(3), beta=0.5, encoder=Identity(2.0), observation_key="pixels"))
    sample = memory.sample()
    before = batch(50)[sample["index"]]
    bonus = VCSE(3)(2 * before["pixels"].flatten(1), before["state_value"])
    torch.testing.assert_close(sample["next", "reward"], before["next", "reward"] + 0.5 * bonus[:, None])
    assert torch.equal(memory._storage[:]["next", "reward"], batch(50)["next", "reward"])


def test_a_rollout_is_one_batch_and_the_weight_falls():
    add = AddBonus(StateEntropy(3, scaling="none"), beta=Linear(start=1.0, end=0.0, steps=40), observation_key="pixels")
    first, second, third = (add(batch(4, 5))["next", "reward"] - batch(4, 5)["next", "reward"] for _ in range(3))
    bonus = StateEntropy(3, scaling="none")(batch(4, 5)["pixels"].view(20, 6)).view(4, 5, 1)
    torch.testing.assert_close(first, bonus)
    torch.testing.assert_close(second, bonus / 2)
    assert (third == 0).all()


def test_a_loaded_transform_goes_on_with_its_schedule():
    made = [
        AddBonus(StateEntropy(3), beta=Linear(start=1.0, end=0.0, steps=40), observation_key="pixels") for _ in "ab"
    ]
    made[0](batch(4, 5))
    made[1].load_state_dict(made[0].state_dict())
    assert made[1].seen == 20
    torch.testing.assert_close(made[1](batch(4, 5)), made[0](batch(4, 5)))


def test_what_is_not_finite_never_reaches_the_reward():
    spoilt = batch(9)
    spoilt["pixels"][0] = torch.nan
    add = AddBonus(StateEntropy(3), beta=1.0, observation_key="pixels")
    add(batch(9))
    with pytest.raises(DataError, match="bonus StateEntropy, after 9 states: expected finite numbers"):
        add(spoilt)
    with pytest.raises(ConfigError, match="beta at environment step 0: expected a finite weight, got nan"):
        AddBonus(StateEntropy(3), beta=float("nan"), observation_key="pixels")(batch(9))


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="AddBonus: expected an entry 'state_value'"):
        AddBonus(VCSE(3), beta=1.0, observation_key="pixels")(batch(9).exclude("state_value"))
