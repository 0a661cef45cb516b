"""The one supervised loop. All that is random in it is a function of the seed and the step, so resuming is exact."""

from __future__ import annotations

import atexit
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from offbook.errors import CheckpointError, ConfigError, DataError, OffbookError, needs_extra
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.runs.directory import RunDirectory
from offbook.runs.progress import track
from offbook.runs.seeding import torch_generator

KIND = "training"

BatchAt = Callable[[int], Mapping[str, Tensor]]
Loss = Callable[[nn.Module, Mapping[str, Tensor], torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]
Hook = tuple[int, Callable[[int, nn.Module], Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to fit a module.

    Attributes:
        steps: number of optimiser steps.
        batch_size: samples in one batch, for each process and each accumulated part.
        learning_rate: AdamW's step size at the top of the schedule.
        weight_decay: decoupled decay of matrices and kernels; vectors (biases, norms) are never decayed, nor what a
            module's attribute `undecayed` names by the beginnings of its parameters' names.
        warmup: steps over which the learning rate rises linearly from zero.
        schedule: what follows: a cosine down to zero, or a constant.
        clip_norm: largest norm of the whole gradient; 0 leaves it as it is.
        ema: decay of the moving average of the weights that is evaluated and saved; 0 uses the last weights.
        precision: fp32, or bf16 autocast with weights and loss in fp32.
        accumulate: batches whose gradients are averaged into one step.
        checkpoint_every: steps between two checkpoints to resume from.
        log_every: steps between two rows of metrics.
        seed: of everything random in training.
        threads: threads of PyTorch on the CPU; 0 leaves its own choice.
        device: auto takes an accelerator where there is one.
    """

    steps: int = 2_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    clip_norm: float = 1.0
    ema: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulate: int = 1
    checkpoint_every: int = 500
    log_every: int = 50
    seed: int = 0
    threads: int = 0
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "log_every"):
            _require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("learning_rate", "weight_decay", "warmup", "clip_norm", "seed", "threads"):
            value = getattr(self, name)
            _require(value >= 0 and math.isfinite(value), name, "a finite number, 0 or more", value)
        _require(0 <= self.ema < 1, "ema", "a decay in [0, 1)", self.ema)


def _require(right: bool, name: str, expected: str, got: object) -> None:
    if not right:
        raise ConfigError(f"fit.{name}", expected=expected, got=str(got), fix=f"give --fit.{name.replace('_', '-')}")


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What training left behind.

    Attributes:
        module: the module to use, in evaluation mode: the moving average where there is one.
        step: number of steps done.
        metrics: the last logged row.
        checkpoint: the file from which training can be resumed.
    """

    module: nn.Module
    step: int
    metrics: Mapping[str, float]
    checkpoint: Path


def learning_rate_at(step: int, config: FitConfig) -> float:
    """The learning rate of step 0, 1, ...: `lr (t + 1) / warmup` first, then `lr` or `lr (1 + cos(pi u)) / 2`.

    u goes from 0 at the end of the warm-up to 1 at the end of training.

    Example:
        >>> config = FitConfig(steps=10, warmup=2, learning_rate=1.0)
        >>> [round(learning_rate_at(t, config), 3) for t in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def ema_decay_at(step: int, decay: float) -> float:
    """The decay of step 0, 1, ...: small at first, so that the average forgets the random weights of the start.

    Example:
        >>> [round(ema_decay_at(t, 0.99), 3) for t in (0, 10, 10_000)]
        [0.1, 0.55, 0.99]
    """
    return min(decay, (1 + step) / (10 + step))


@contextmanager
def main_process_first(device: Literal["auto", "cpu"] = "auto") -> Iterator[bool]:
    """Runs a block in the main process, then in the others that `torchrun` started: to make a run's folder once.

    Args:
        device: as in the `FitConfig` that follows.

    Example:
        >>> with main_process_first() as first:
        ...     first
        True
    """
    with needs_extra("models"):
        from accelerate import PartialState
    state = PartialState(cpu=_on_cpu(device))
    with state.main_process_first():
        yield bool(state.is_main_process)


def _on_cpu(device: Literal["auto", "cpu"]) -> bool:
    # Unless told so, accelerate does not see torchrun's other processes on a machine without an accelerator.
    return device == "cpu" or not torch.accelerator.is_available()


def fit(
    module: nn.Module,
    batch_at: BatchAt,
    loss: Loss,
    config: FitConfig,
    run: RunDirectory,
    *,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
) -> FitResult:
    """Minimises a loss with AdamW, and writes metrics and checkpoints into a run folder.

    Under `torchrun` each process takes different batches and gradients are averaged (data parallel): P processes with
    A accumulated batches each take the very steps of one process that accumulates P A.

    Args:
        module: what to train, in place; call it as `module(...)` in the loss, not by another method.
        batch_at: the batch of index 0, 1, ...: tensors by name, on the CPU, a pure function of the index. Each step
            uses `accumulate` times the number of processes of them. It is called ahead of time from a second thread.
        loss: `loss(module, batch, generator) -> (scalar, further metrics)`; draw randomness from the CPU generator.
        config: see `FitConfig`.
        run: where `metrics.jsonl` and `checkpoints/training.safetensors` go.
        resume: continue from that checkpoint where there is one. On the CPU the result is equal to the last bit.
        hooks: `(every, function)` pairs; `function(step, module)` runs after each `every`-th step and after the last
            one, without gradients, in evaluation mode, on the averaged weights, and returns metrics for that row.

    Raises:
        DataError: a batch holds NaN or infinity.
        OffbookError: the loss, a gradient or a weight became NaN or infinite; the step and the tensor are named.
        CheckpointError: the checkpoint to resume from is damaged or belongs to another module.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> x = torch.linspace(-1, 1, 64)[:, None]
        >>> def loss(module, batch, generator):
        ...     return (module(batch["x"]) - batch["y"]).square().mean(), {}
        >>> config = FitConfig(steps=200, warmup=0, learning_rate=0.1)
        >>> with TemporaryDirectory() as folder:
        ...     run = RunDirectory.create(f"{folder}/run", config)
        ...     result = fit(nn.Linear(1, 1), lambda index: {"x": x, "y": 2 * x + 1}, loss, config, run)
        >>> result.metrics["loss"] < 0.01
        True
    """
    with ExitStack() as stack:
        stack.callback(run.close)
        stack.enter_context(_threads(config.threads))
        # Dropout takes no generator; the default one is forked here and seeded anew in each step.
        stack.enter_context(torch.random.fork_rng())
        loop = _Loop(module, config, run)
        start = loop.restore() if resume else 0
        batches = stack.enter_context(_ahead(batch_at, loop.indices(start)))
        row: Mapping[str, float] = {k: float(v) for old in run.metrics()[-1:] for k, v in old.items() if k != "step"}
        for step in track(range(start, config.steps), "training") if loop.is_main else range(start, config.steps):
            metrics = loop.step(step, batches, batch_at, loss)
            done = step + 1
            due = [hook for every, hook in hooks if done % every == 0 or done == config.steps]
            if due or done % config.log_every == 0 or done == config.steps:
                row = loop.report(done, metrics, due)
            if done % config.checkpoint_every == 0 or done == config.steps:
                loop.save(done)
        final = loop.finish()
    return FitResult(module=final, step=config.steps, metrics=row, checkpoint=run.checkpoint(KIND))


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _ahead(batch_at: BatchAt, indices: range) -> Iterator[Iterator[Mapping[str, Tensor]]]:
    """Makes the next batch while the present one is used."""
    loader = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def batches() -> Iterator[Mapping[str, Tensor]]:
        waiting: Future[Mapping[str, Tensor]] | None = None
        for index in indices:
            following = loader.submit(batch_at, index)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()

    try:
        yield batches()
    finally:
        loader.shutdown(cancel_futures=True)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Loop:
    """One training: the module, its optimiser, its moving average, and where their states are kept."""

    def __init__(self, module: nn.Module, config: FitConfig, run: RunDirectory) -> None:
        with needs_extra("models"):
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState

        # accelerate keeps the first precision of a process for good; each training here has its own.
        AcceleratorState._reset_state()
        precision = "bf16" if config.precision == "bf16" else "no"
        self.accelerator = Accelerator(cpu=_on_cpu(config.device), mixed_precision=precision)
        self.config, self.run = config, run
        self.is_main = bool(self.accelerator.is_main_process)
        self.processes = int(self.accelerator.num_processes)
        if self.processes > 1:
            # Threads of the group that still run when the interpreter ends would abort a process that has done all.
            atexit.register(_leave_group)
        self.averaged = copy.deepcopy(module).to(self.accelerator.device) if config.ema else None
        self.wrapped = self.accelerator.prepare_model(module.train())
        self.module = self.accelerator.unwrap_model(self.wrapped)
        self.named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        # Decay pulls weights that multiply inputs towards zero; on biases and norms it only does harm.
        left = tuple(getattr(self.module, "undecayed", ()))
        decayed = {name: p.ndim >= 2 and not name.startswith(left) for name, p in self.named.items()}
        groups = [
            {"params": [p for name, p in self.named.items() if decayed[name]], "weight_decay": config.weight_decay},
            {"params": [p for name, p in self.named.items() if not decayed[name]], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # Fused: small modules would wait for its many small operations longer than for their gradients.
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)

    def indices(self, start: int) -> range:
        """The batches of this process, from a step to the end."""
        each = self.config.accumulate * self.processes
        return range(start * each + self.accelerator.process_index, self.config.steps * each, self.processes)

    def step(
        self, step: int, batches: Iterator[Mapping[str, Tensor]], batch_at: BatchAt, loss: Loss
    ) -> dict[str, Tensor]:
        """One optimiser step; the metrics are those of this process."""
        config, total = self.config, dict[str, Tensor]()
        indices = self.indices(step)[: config.accumulate]
        for index in indices:
            batch = {k: v.to(self.accelerator.device, non_blocking=True) for k, v in next(batches).items()}
            generator = torch_generator(config.seed, "fit", index)
            torch.manual_seed(generator.initial_seed())
            last = index == indices[-1]
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                value, metrics = loss(self.wrapped, batch, generator)
                self.accelerator.backward(value / config.accumulate)
            for name, metric in {"loss": value, **metrics}.items():
                total[name] = total.get(name, 0) + metric.detach() / config.accumulate
        norm = nn.utils.clip_grad_norm_(self.named.values(), config.clip_norm or math.inf)
        if not bool(torch.isfinite(total["loss"] + norm)):
            self._stop(step, float(total["loss"]), batch_at, indices)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average(step)
        return {**total, "gradient_norm": norm}

    @torch.no_grad()
    def _average(self, step: int) -> None:
        if self.averaged is None:
            return
        average: list[Tensor] = [p for p in self.averaged.parameters() if p.requires_grad]
        weights: list[Tensor] = list(self.named.values())
        torch._foreach_lerp_(average, weights, 1 - ema_decay_at(step, self.config.ema))
        for kept, new in zip(self.averaged.buffers(), self.module.buffers(), strict=True):
            kept.copy_(new)

    def _stop(self, step: int, loss: float, batch_at: BatchAt, indices: range) -> None:
        """Raises the error that names what is not finite: an input first, else a gradient, else the loss."""
        path = self.run.checkpoint(KIND)
        kept = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
        for index in indices:
            for name, tensor in batch_at(index).items():
                bad = int((~torch.isfinite(tensor)).sum())
                if bad:
                    got = f"{bad} of {tensor.numel()} NaN or infinite"
                    where = f"training step {step + 1}, batch tensor {name!r}"
                    raise DataError(where, expected="finite numbers", got=got, fix=f"mend the recordings; {kept}")
        culprits = [n for n, p in self.named.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        fix = f"lower --fit.learning-rate or --fit.clip-norm; {kept}"
        where = f"training step {step + 1}, " + (f"gradient of {culprits[0]!r}" if culprits else "loss")
        raise OffbookError(where, expected="finite numbers", got=f"NaN or infinity (loss {loss:g})", fix=fix)

    def report(
        self, done: int, metrics: Mapping[str, Tensor], due: Sequence[Callable[[int, nn.Module], Mapping[str, float]]]
    ) -> Mapping[str, float]:
        """Logs a row: the step's metrics averaged over processes, and those of the hooks that are due."""
        names = sorted(metrics)
        values = self.accelerator.reduce(torch.stack([metrics[n].float() for n in names]), reduction="mean").tolist()
        row = {**dict(zip(names, values, strict=True)), "learning_rate": learning_rate_at(done - 1, self.config)}
        if not self.is_main:
            return row
        module = self.averaged if self.averaged is not None else self.module
        module.eval()
        with torch.no_grad():
            for hook in due:
                row.update(hook(done, module))
        self.module.train()
        self.run.log(done, **row)
        return row

    def save(self, done: int) -> None:
        """Replaces the checkpoint, unless a weight is not finite."""
        if not self.is_main:
            return
        tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                self._refuse_weights(done, name)
        if self.averaged is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        for name, parameter in self.named.items():
            tensors |= {f"{key}.{name}": tensor for key, tensor in self.optimizer.state[parameter].items()}
        save_checkpoint(self.run.checkpoint(KIND), KIND, tensors, {"step": done})

    def _refuse_weights(self, done: int, name: str) -> None:
        path = self.run.checkpoint(KIND)
        kept = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
        fix = f"lower --fit.learning-rate; {kept}"
        expected = "finite numbers"
        raise OffbookError(f"training step {done}, weight {name!r}", expected=expected, got="NaN or infinity", fix=fix)

    def restore(self) -> int:
        """Loads the checkpoint, if there is one, and returns the number of steps that it has behind it."""
        path = self.run.checkpoint(KIND)
        if not path.exists():
            if self.is_main:
                self.run.truncate_metrics(0)
            return 0
        checkpoint = load_checkpoint(path, KIND)
        try:
            step = int(checkpoint.record["step"])
            take = dict(checkpoint.values)
            self._load(self.module, "module.", take)
            if self.averaged is not None:
                self._load(self.averaged, "average.", take)
            for name, parameter in self.named.items():
                if f"step.{name}" not in take:
                    continue  # it never had a gradient
                state = {key: take.pop(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                device = parameter.device
                moments = {k: v.reshape(parameter.shape).to(device) for k, v in state.items() if k != "step"}
                self.optimizer.state[parameter] = {"step": state["step"].to(device), **moments}
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            fix = "resume with the configuration and the data in the run's config.json"
            got = f"another one ({str(error).strip().splitlines()[0]})"
            raise CheckpointError(str(path), expected="the state of this very training", got=got, fix=fix) from error
        if self.is_main:
            self.run.truncate_metrics(step)
        return step

    @staticmethod
    def _load(module: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
        names = [name for name in tensors if name.startswith(prefix)]
        module.load_state_dict({name.removeprefix(prefix): tensors.pop(name) for name in names})

    def finish(self) -> nn.Module:
        """The module to use, as it was before it was wrapped, in evaluation mode."""
        self.accelerator.wait_for_everyone()
        module = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        # Unwrapping leaves a bound method on the instance, which would follow it into copies.
        vars(module).pop("forward", None)
        return (self.averaged if self.averaged is not None else module).eval()
