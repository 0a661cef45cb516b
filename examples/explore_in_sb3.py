"""An exploration bonus in an agent of Stable-Baselines3: train, look at what it was paid, save and go on.

    python examples/explore_in_sb3.py

needs `pip install 'offbook[models,rl]'` and takes seconds.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env

from offbook.systems.vcse import VCSE
from offbook.systems.vcse.sb3 import explore
from offbook.systems.vcse.scaling import Linear


def main() -> None:
    """A2C on a cart and pole, with a bonus that fades."""
    world = make_vec_env("CartPole-v1", n_envs=4, seed=0)
    algorithm = explore(A2C, VCSE(k=3), beta=Linear(start=0.05, end=0.0, steps=4_000))
    model = algorithm("MlpPolicy", world, n_steps=16, seed=0, device="cpu").learn(1_920)
    for name, value in model.explorer.report.items():
        print(f"{name:14} {value:.4g}")
    with TemporaryDirectory() as folder:
        model.save(Path(folder) / "agent.zip")
        again = algorithm.load(Path(folder) / "agent.zip", env=world, device="cpu")
    again.learn(640, reset_num_timesteps=False)
    print(f"after {again.num_timesteps} steps the bonus weighs {again.explorer.weight():.3f}")


if __name__ == "__main__":
    main()
