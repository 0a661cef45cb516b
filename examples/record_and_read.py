"""Records a few random episodes, reads them back, and draws training windows from them."""

import sys
from pathlib import Path

from offbook.data.normalise import Normalizer
from offbook.data.returns import ReturnSpec
from offbook.data.splits import draw_split
from offbook.data.store import EpisodeStore
from offbook.data.windows import WindowSampler
from offbook.sim.recording import record


def main(folder: Path) -> None:
    record("gym:Pendulum-v1", episodes=5, out=folder, policy="random")

    store = EpisodeStore.open(folder)  # memory-mapped: opening reads the index alone
    print(f"{len(store)} episodes, {store.steps} steps, digest {store.digest[:12]}")
    first = store.episode(0)
    print({name: values.shape for name, values in first.fields.items()}, f"return {first.return_:.1f}")

    split = draw_split(store, 0.2, seed=0)
    train, held_out = split["train"], split["held_out"]
    sampler = WindowSampler(
        store,
        ["observation", "action"],
        length=8,
        episodes=train,
        returns=ReturnSpec(),
        normalizer=Normalizer.fit(store, ["observation"], train),
    )
    windows = sampler.sample(batch=32, step=0)  # the same for the same seed and step, in any process
    print({name: values.shape for name, values in windows.data.items()}, f"held out: episode {held_out.tolist()}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "stores/pendulum"))
