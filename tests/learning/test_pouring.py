"""The claim of the demo at its real size: half a hundred recordings are enough to pour like the expert."""

import pytest

from offbook.evaluate.rollout import evaluate_policy
from offbook.learning.cloning import CloningConfig, train_cloning
from offbook.runs.directory import RunDirectory
from offbook.sim.recording import record

pytestmark = [pytest.mark.slow, pytest.mark.learning]


@pytest.mark.parametrize(
    "config",
    [CloningConfig(), CloningConfig(parts=("joints",), cameras=("front",))],
    ids=["state", "images"],
)
def test_a_clone_pours(tmp_path, config):
    store = record("offbook:pour", 50, tmp_path / "recordings", jobs=2)
    policy = train_cloning(store, config, RunDirectory.create(tmp_path / "run", config))
    result = evaluate_policy("offbook:pour", policy, episodes=20, jobs=2)
    assert result.summary["score"].value > 0.9
