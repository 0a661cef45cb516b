"""Small stores for the tests of the data layer."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from made import SCHEMA, values

from offbook.data.store import EpisodeStore


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., EpisodeStore]:
    """`make_store([5, 3])` is a store with episodes of 5 and 3 steps; `without` names a field that some lack."""

    def make(lengths: Sequence[int], name: str = "store", without: dict[int, str] | None = None) -> EpisodeStore:
        with EpisodeStore.create(tmp_path / name, SCHEMA) as writer:
            for i, length in enumerate(lengths):
                fields = values(i, length)
                if without and i in without:
                    fields[without[i]] = None
                writer.append(fields, terminated=bool(i % 2), truncated=not i % 2, seed=i, sync=False)
        return EpisodeStore.open(tmp_path / name)

    return make
