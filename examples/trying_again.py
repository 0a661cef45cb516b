"""A policy that remembers its trials: chains to learn from, several trials as one episode, and whether memory helps.

    python examples/trying_again.py

needs `pip install 'offbook[models,sim]'` and takes less than a minute.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from offbook.evaluate.groups import evaluate_trials, group_rows
from offbook.learning.hindsight_presets import smoke
from offbook.runs.directory import RunDirectory
from offbook.sim.recording import record
from offbook.systems.agentic_transformer import ChainSampler, train_hindsight

WORLD = "offbook:darkpoint"


def main() -> None:
    """Records trials at hidden goals, learns from chains of them, and tries at goals that were never recorded."""
    with TemporaryDirectory() as folder:
        store = record(WORLD, 160, Path(folder) / "dark", grades=(0.0, 0.6, 0.9, 1.0), trials=8)
        chains = ChainSampler(store, ["position", "action"], n_trials=(4, 4), group="seed").sample(batch=2, step=0)
        print(f"two chains of 4 trials, {chains.valid.sum()} steps, aiming at {chains.data['target'][:, 0].round(1)}")

        config = smoke()
        fit = replace(config.fit, steps=150, batch_size=32, learning_rate=3e-3)
        config = replace(config, group="seed", n_trials=(4, 4), validate_every=150, fit=fit)
        policy = train_hindsight(store, config, RunDirectory.create(Path(folder) / "run", config))

        groups = evaluate_trials(WORLD, policy, trials=4, groups=32, parallel=32, foreign=True)
        for name, value in group_rows({"policy": groups})[1]:
            print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
