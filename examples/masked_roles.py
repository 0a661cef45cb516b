"""One model, many roles: learn from recordings of which most have no actions, then predict, clone and see with it.

    python examples/masked_roles.py

needs `pip install 'offbook[models,sim,rl]'` and takes about a minute.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from stable_baselines3 import TD3

from offbook.data.store import EpisodeStore
from offbook.evaluate.rollout import evaluate_policy
from offbook.runs.directory import RunDirectory
from offbook.sim.recording import record
from offbook.systems.mtm import Dynamics, train_mtm
from offbook.systems.mtm.encoder import StateFeatures
from offbook.systems.mtm.presets import smoke_model


def main() -> None:
    """Records, forgets most actions, learns, and uses the model in three ways."""
    with TemporaryDirectory() as folder:
        recorded = record("gym:Pendulum-v1", 12, f"{folder}/all", policy="random")

        # A camera on the wall sees states; what was done is known of few episodes.
        path = Path(folder) / "few-actions"
        with EpisodeStore.create(path, recorded.schema) as writer:
            for number in range(len(recorded)):
                episode = recorded.episode(number)
                fields = {**episode.fields, **({} if number < 4 else {"action": None})}
                writer.append(fields, terminated=episode.terminated, truncated=episode.truncated)
        store = EpisodeStore.open(path)

        config = smoke_model()
        config = replace(config, fit=replace(config.fit, steps=300))
        policy = train_mtm(store, config, RunDirectory.create(f"{folder}/run", config))

        # As dynamics, in the recordings' own units.
        first = recorded.episode(0).fields
        states, actions = torch.tensor(first["observation"][None, :1]), torch.tensor(first["action"][None, :1])
        after = Dynamics(policy.module).forward(states, actions)
        print("told   ", [round(x, 2) for x in after[0].tolist()])
        print("was    ", [round(float(x), 2) for x in first["observation"][1]])

        # As policies, in any role.
        for role in ("bc", "rcbc"):
            found = evaluate_policy("gym:Pendulum-v1", policy.in_role(role), episodes=4)
            print(role, "return", found.summary["return"])

        # As the eyes of an agent.
        eyes = {"features_extractor_class": StateFeatures, "features_extractor_kwargs": {"model": policy.module}}
        agent = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs=eyes, learning_starts=50, batch_size=32, seed=0)
        agent.learn(100)
        print("an agent sees", agent.actor.features_dim, "numbers")


if __name__ == "__main__":
    main()
