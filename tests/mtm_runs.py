"""Small trainings of masked trajectory models, and verbs that must go well or be refused."""

import json

from offbook.learning.fit import FitConfig
from offbook.runs.directory import RunDirectory
from offbook.systems.mtm import MtmConfig, Sizes, train_mtm

FIT = FitConfig(steps=5, batch_size=16, warmup=2, learning_rate=3e-3, ema=0.9, threads=1, log_every=1)
TINY = MtmConfig(model=Sizes(dim=16, heads=2, encoder=1), held_out=0.25, validate_every=5, fit=FIT)
BRIEF = ["--preset", "smoke", "--fit.steps", "4", "--fit.batch-size", "16", "--model.dim", "16", "--held-out", "0.25"]


def train(store, path, config=TINY, *, resume=False):
    return train_mtm(store, config, RunDirectory.create(path, config, resume=resume), resume=resume)


def offbook(cli, *words):
    """A verb that must go well, and what it reports."""
    done = cli([*map(str, words), "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def refused(cli, code, *words):
    """What a verb that must be refused says."""
    done = cli([*map(str, words)])
    assert done.exit_code == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr
