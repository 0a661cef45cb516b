"""What a user meets on the command line who trains on, or asks for, what chains of trials cannot have."""

import numpy as np
import pytest

import linear_world

WORDS = ["--preset", "smoke", "--fit.steps", "4", "--fit.log-every", "2"]


@pytest.mark.faults
@pytest.mark.parametrize("field", ["s", "a"])
@pytest.mark.parametrize("verb", ["agentic_transformer", "dt"])
def test_nan_is_placed_and_its_episode_to_be_left_out(cli, tmp_path, verb, field):
    def spoil(number, values):
        if number == 2:
            values[field][6] = np.nan

    store = linear_world.record(tmp_path / "store", (12,) * 8, change=spoil)
    done = cli(["train", verb, "--data", str(store.path), "--out", str(tmp_path / "run"), "--held-out", "0", *WORDS])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert f"field {field!r}, episode 2, step 6: expected finite numbers, got NaN or infinity; " in done.stderr
    assert done.stderr.endswith("; leave the episode out, or record it again.\n")
    assert not (tmp_path / "run").exists()
