"""A masked trajectory model as the eyes of an agent of Stable-Baselines3."""

import gymnasium as gym
import pytest
import torch
from stable_baselines3 import SAC, TD3

from offbook.errors import ConfigError
from offbook.learning.masked_model import MaskedTrajectoryModel, Modality, Sizes
from offbook.systems.mtm.encoder import StandardState, StateFeatures


@pytest.fixture
def model() -> MaskedTrajectoryModel:
    torch.manual_seed(0)
    made = MaskedTrajectoryModel([Modality(name="state", size=3)], Sizes(length=2, dim=16, heads=2)).eval()
    made.standardise("state", torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.5, 1.0, 4.0]))
    return made


def test_the_state_alone_is_scaled_as_beside_the_features(model) -> None:
    space, seen = gym.spaces.Box(-8, 8, (3,)), torch.tensor([[0.5, -0.5, 3.0]])
    alone, features = StandardState(space, model), StateFeatures(space, model)
    torch.testing.assert_close(alone(seen), torch.tensor([[1.0, -1.0, 0.5]]))
    torch.testing.assert_close(features(seen)[:, -3:], alone(seen))
    torch.testing.assert_close(features(seen)[:, :-3], model.encode_state(seen))
    assert (alone.features_dim, features.features_dim) == (3, 19)


@pytest.mark.parametrize("kind", [StandardState, StateFeatures])
def test_another_task_is_refused(model, kind) -> None:
    with pytest.raises(ConfigError, match=kind.__name__ + r".*shape \(3,\).*\(4,\)"):
        kind(gym.spaces.Box(-1, 1, (4,)), model)


@pytest.mark.parametrize("agent", [SAC, TD3])
@pytest.mark.parametrize("freeze", [True, False])
def test_only_an_encoder_that_is_not_frozen_learns(model, agent, freeze) -> None:
    settings = {"features_extractor_class": StateFeatures, "net_arch": [8]}
    settings["features_extractor_kwargs"] = {"model": model, "freeze": freeze}
    made = agent(
        "MlpPolicy", "Pendulum-v1", policy_kwargs=settings, learning_starts=10, batch_size=8, seed=0, device="cpu"
    )
    before = {name: value.clone() for name, value in made.critic.features_extractor.model.state_dict().items()}
    made.learn(14)
    after = made.critic.features_extractor.model.state_dict()
    same = all(torch.equal(before[name], value) for name, value in after.items())
    assert same == freeze
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
