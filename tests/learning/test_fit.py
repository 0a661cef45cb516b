import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import small_regression as regression
import torch
from torch import nn

from offbook.errors import CheckpointError, ConfigError, DataError, OffbookError
from offbook.learning.fit import KIND, FitConfig, ema_decay_at, fit, learning_rate_at
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.runs.directory import RunDirectory
from offbook.runs.seeding import torch_generator

SMALL = FitConfig(steps=40, warmup=5, learning_rate=1e-2, log_every=1, checkpoint_every=10, threads=1, batch_size=16)


def run_at(path, config=SMALL, *, resume=False):
    return RunDirectory.create(path, config, resume=resume)


def train(path, config=SMALL, *, resume=False, **kwargs):
    run = run_at(path, config, resume=resume)
    kwargs = {"batch_at": regression.batch_at, "loss": regression.loss} | kwargs
    module = kwargs.pop("module", None) or regression.network()
    return fit(module, config=config, run=run, resume=resume, **kwargs)


def files(path):
    return [(path / "metrics.jsonl").read_bytes(), (path / "checkpoints" / f"{KIND}.safetensors").read_bytes()]


def test_it_learns_and_two_runs_give_the_same_bytes(tmp_path):
    first = train(tmp_path / "a", replace(SMALL, ema=0.9))
    train(tmp_path / "b", replace(SMALL, ema=0.9))
    rows = RunDirectory.open(tmp_path / "a").metrics()
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert first.metrics == {k: v for k, v in rows[-1].items() if k != "step"}
    assert files(tmp_path / "a") == files(tmp_path / "b")
    train(tmp_path / "c", replace(SMALL, ema=0.9, seed=1))
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_the_global_generator_and_threads_are_left_alone(tmp_path):
    module = regression.network()
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    train(tmp_path / "a", replace(SMALL, threads=2, steps=2), module=module)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


@pytest.mark.faults
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    config = replace(SMALL, steps=60, ema=0.95, accumulate=2, checkpoint_every=7, log_every=3)
    train(tmp_path / "whole", config)
    run_at(tmp_path / "cut", config)
    # The subprocess kills itself with SIGKILL while it prepares the batch of step 33, between two checkpoints.
    done = subprocess.run(
        [sys.executable, regression.__file__, str(tmp_path / "cut")],
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    cut = load_checkpoint(RunDirectory.open(tmp_path / "cut").checkpoint(KIND), KIND)
    assert cut.record["step"] == 28
    assert RunDirectory.open(tmp_path / "cut").metrics()[-1]["step"] > 28
    train(tmp_path / "cut", config, resume=True)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = train(tmp_path / "a")
    before = files(tmp_path / "a")
    again = train(tmp_path / "a", resume=True)
    assert files(tmp_path / "a") == before
    assert again.metrics["loss"] == first.metrics["loss"]


def test_resume_where_nothing_was_saved_starts_anew(tmp_path):
    train(tmp_path / "a")
    run = run_at(tmp_path / "b")
    run.log(3, loss=1.0)
    run.close()
    train(tmp_path / "b", resume=True)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_schedule_against_its_closed_form(tmp_path):
    config = replace(SMALL, learning_rate=3e-3)
    train(tmp_path / "a", config)
    rows = RunDirectory.open(tmp_path / "a").metrics()
    t = np.arange(40)
    closed = 3e-3 * np.where(t < 5, (t + 1) / 5, (1 + np.cos(np.pi * np.clip((t - 5) / 35, 0, 1))) / 2)
    assert [row["learning_rate"] for row in rows] == pytest.approx(closed.tolist(), rel=1e-12)
    constant = replace(config, schedule="constant")
    assert {learning_rate_at(t, constant) for t in range(5, 40)} == {3e-3}


def test_average_against_its_closed_form(tmp_path):
    config = replace(SMALL, steps=12, ema=0.8, weight_decay=0.0)
    start = regression.network().state_dict()["0.weight"].clone()
    seen = []

    def observe(step, module):
        # The hook sees the average; the raw weights of each step are in the checkpoint.
        seen.append(module.state_dict()["0.weight"].clone())
        return {}

    result = train(tmp_path / "a", replace(config, checkpoint_every=1), hooks=[(1, observe)])
    # Rebuild the raw weights with plain PyTorch and average them by the definition.
    module = regression.network()
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    expected = start
    for step in range(12):
        value, _ = regression.loss(module, regression.batch_at(step), torch_generator(0, "fit", step))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, config)
        optimizer.step()
        decay = ema_decay_at(step, 0.8)
        expected = decay * expected + (1 - decay) * module.state_dict()["0.weight"]
        torch.testing.assert_close(seen[step], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.module.state_dict()["0.weight"], seen[-1])
    raw = load_checkpoint(result.checkpoint, KIND).values["module.0.weight"]
    torch.testing.assert_close(raw, module.state_dict()["0.weight"], rtol=1e-5, atol=1e-6)


def test_accumulating_equals_one_large_batch(tmp_path):
    config = replace(SMALL, steps=6, log_every=6, clip_norm=0.0)

    def loss(module, batch, generator):
        return (module(batch["x"]) - batch["y"]).square().mean(), {}

    parts = train(tmp_path / "a", replace(config, accumulate=2), loss=loss)

    def both(index):
        halves = [regression.batch_at(2 * index), regression.batch_at(2 * index + 1)]
        return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}

    whole = train(tmp_path / "b", config, batch_at=both, loss=loss)
    for name, weight in parts.module.state_dict().items():
        torch.testing.assert_close(weight, whole.module.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_only_matrices_decay(tmp_path):
    module = nn.Linear(3, 2)
    nn.init.constant_(module.bias, 1.0)
    weight = module.weight.detach().clone()
    config = replace(SMALL, steps=1, warmup=0, learning_rate=0.1, weight_decay=0.5)
    # A loss without a gradient: what changes, changes by decay alone.
    train(tmp_path / "a", config, module=module, loss=lambda m, b, g: (0.0 * m(b["x"]).sum(), {}))
    torch.testing.assert_close(module.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(module.bias.detach(), torch.ones(2))


def test_what_a_module_names_does_not_decay(tmp_path):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    module.undecayed = ("1.",)
    before = {name: of.clone() for name, of in module.state_dict().items()}
    config = replace(SMALL, steps=1, warmup=0, learning_rate=0.1, weight_decay=0.5)
    train(tmp_path / "a", config, module=module, loss=lambda m, b, g: (0.0 * m(b["x"]).sum(), {}))
    after = module.state_dict()
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(after["1.weight"], before["1.weight"])


def test_bf16_keeps_weights_and_loss_in_fp32(tmp_path):
    result = train(tmp_path / "a", replace(SMALL, precision="bf16"))
    exact = train(tmp_path / "b")
    assert {weight.dtype for weight in result.module.state_dict().values()} == {torch.float32}
    assert result.metrics["loss"] == pytest.approx(exact.metrics["loss"], abs=0.02)
    assert result.metrics["loss"] != exact.metrics["loss"]
    # The wrapper of mixed precision is gone: the module is what it was.
    assert "forward" not in vars(result.module)


def test_hooks_run_when_due_without_training_mode(tmp_path):
    modes = []

    def hook(step, module):
        modes.append((step, module.training, torch.is_grad_enabled()))
        return {"extra": float(step)}

    train(tmp_path / "a", replace(SMALL, steps=25, log_every=25), hooks=[(10, hook)])
    assert modes == [(10, False, False), (20, False, False), (25, False, False)]
    assert [row["extra"] for row in RunDirectory.open(tmp_path / "a").metrics()] == [10.0, 20.0, 25.0]


@pytest.mark.faults
def test_nan_in_the_data_names_step_tensor_and_checkpoint(tmp_path):
    def poisoned(index):
        batch = regression.batch_at(index)
        if index == 24:
            batch["y"][3, 0] = math.nan
        return batch

    with pytest.raises(DataError, match=r"training step 25, batch tensor 'y'.*1 of .*NaN.*training.safetensors"):
        train(tmp_path / "a", batch_at=poisoned)
    kept = load_checkpoint(tmp_path / "a" / "checkpoints" / "training.safetensors", KIND)
    assert kept.record["step"] == 20
    assert all(bool(torch.isfinite(value).all()) for value in kept.values.values())


@pytest.mark.faults
def test_diverging_names_the_gradient(tmp_path):
    def loss(module, batch, generator):
        value, metrics = regression.loss(module, batch, generator)
        return value * (math.inf if float(batch["index"][0]) == 3 else 1.0), metrics

    with pytest.raises(OffbookError, match=r"training step 4, gradient of '0.weight'.*no checkpoint was written yet"):
        train(tmp_path / "a", loss=loss)


@pytest.mark.faults
def test_an_error_in_the_data_comes_through(tmp_path):
    def broken(index):
        raise DataError("episode 3", expected="x", got="y", fix="z")

    with pytest.raises(DataError, match="episode 3"):
        train(tmp_path / "a", batch_at=broken)


@pytest.mark.faults
def test_resuming_with_another_module_is_refused(tmp_path):
    train(tmp_path / "a")
    with pytest.raises(CheckpointError, match="another one"):
        train(tmp_path / "a", resume=True, module=regression.network(hidden=5))
    save_checkpoint(RunDirectory.open(tmp_path / "a").checkpoint(KIND), "bc", {"w": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="kind"):
        train(tmp_path / "a", resume=True)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"learning_rate": -1.0}, {"learning_rate": math.inf}, {"ema": 1.0}, {"accumulate": 0}]
)
def test_settings_that_make_no_sense(bad):
    with pytest.raises(ConfigError, match=f"fit.{next(iter(bad))}"):
        FitConfig(**bad)


def test_two_processes_equal_one_that_accumulates(tmp_path):
    config = replace(SMALL, steps=6, log_every=2, checkpoint_every=6)
    single = train(tmp_path / "single", replace(config, accumulate=2))
    run_at(tmp_path / "double", config)
    flags = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *flags, regression.__file__, str(tmp_path / "double")],
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    double = load_checkpoint(tmp_path / "double" / "checkpoints" / "training.safetensors", KIND).values
    for name, weight in single.module.state_dict().items():
        torch.testing.assert_close(double[f"module.{name}"], weight, rtol=1e-4, atol=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "double" / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (tmp_path / "single" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row, other in zip(rows, whole, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_module_with_a_parameter_that_nothing_uses_can_be_resumed(tmp_path):
    config = FitConfig(steps=4, batch_size=16, warmup=1, checkpoint_every=2, log_every=1)
    run = RunDirectory.create(tmp_path / "run", config)
    module = nn.ModuleDict({"used": regression.network(), "spare": nn.Linear(3, 2)})

    def used_only(module, batch, generator):
        return regression.loss(module["used"], batch, generator)

    fit(module, regression.batch_at, used_only, config, run)
    assert fit(module, regression.batch_at, used_only, config, run, resume=True).step == 4
