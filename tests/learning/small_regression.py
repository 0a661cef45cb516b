"""A small regression that the tests fit, also in processes of its own: `python small_regression.py RUN`."""

import os
import signal
import sys

import torch
from torch import nn

from offbook.learning.fit import FitConfig, fit
from offbook.runs.config import from_json
from offbook.runs.directory import RunDirectory
from offbook.runs.seeding import torch_generator


def network(hidden=16):
    torch.random.default_generator.manual_seed(0)
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Dropout(0.0), nn.Linear(hidden, 2))


def batch_at(index):
    x = torch.randn(16, 3, generator=torch_generator(0, "batch", index))
    return {"x": x, "y": torch.stack([x.sum(1), x[:, 0] - x[:, 1]], 1), "index": torch.full((16,), float(index))}


def loss(module, batch, generator):
    noise = 1e-3 * torch.randn(batch["x"].shape, generator=generator)
    error = (module(batch["x"] + noise.to(batch["x"].device)) - batch["y"]).square().mean()
    return error, {"error": error.sqrt()}


def main(path):
    run = RunDirectory.open(path)
    config = from_json(FitConfig, run.config())
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1

    def until_killed(index):
        if index == 33 * config.accumulate and not distributed:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch_at(index)

    fit(network(), until_killed, loss, config, run)


if __name__ == "__main__":
    main(sys.argv[1])
