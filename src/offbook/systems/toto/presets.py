"""What the reproduction does, from seconds to a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from offbook.data.returns import ReturnSpec
from offbook.learning.cloning import CloningConfig
from offbook.learning.fit import FitConfig
from offbook.learning.hindsight import HindsightSizes
from offbook.learning.hindsight_training import HindsightConfig
from offbook.learning.masked_model import Sizes
from offbook.learning.masked_training import MtmConfig
from offbook.learning.offline import OfflineConfig
from offbook.learning.self_supervised import EncoderConfig, Method
from offbook.learning.vinn import VinnConfig

JOINTS, CAMERA = ("joints",), ("front",)


def _fit(steps: int, batch: int, rate: float, **settings: float) -> FitConfig:
    """On one thread of the CPU, with nothing on the way that an end would not have."""
    fit = FitConfig(
        steps=steps, batch_size=batch, learning_rate=rate, warmup=steps // 20, checkpoint_every=max(1, steps // 2),
        log_every=max(1, steps // 10), device="cpu", threads=1,
    )  # fmt: skip
    return replace(fit, **settings)  # type: ignore[arg-type]


def _encoder() -> EncoderConfig:
    return EncoderConfig(cameras=CAMERA, save_every=600, fit=_fit(600, 64, 1e-3, weight_decay=1e-4))


def _cloning() -> CloningConfig:
    fit = _fit(1_500, 128, 1e-3, ema=0.99)
    return CloningConfig(parts=JOINTS, chunk=50, execute=50, dropout=0.1, validate_every=1_500, fit=fit)


def _own() -> CloningConfig:
    fit = _fit(800, 64, 2e-3, ema=0.99)
    return replace(_cloning(), cameras=CAMERA, dropout=0.0, validate_every=800, fit=fit)


def _offline() -> OfflineConfig:
    config = OfflineConfig(algorithm="iql", parts=JOINTS, save_every=2_000)
    fit = replace(config.fit, steps=2_000, learning_rate=1e-3, checkpoint_every=2_000, device="cpu", threads=1)
    return replace(config, fit=fit)


def _transformer() -> HindsightConfig:
    # Joint angles are told as they are: a tenth of their range is far too coarse a bin.
    sizes = HindsightSizes(head="mse")
    fit = _fit(500, 4, 1e-3, weight_decay=1e-4, clip_norm=0.25)
    return HindsightConfig(parts=JOINTS, n_trials=(4, 4), model=sizes, validate_every=500, fit=fit)


def _masked() -> MtmConfig:
    # The reward comes with the last step: a mean over the steps that are left would tell when an episode ends.
    fit = _fit(800, 128, 1e-3, weight_decay=5e-3, ema=0.99)
    returns = ReturnSpec(kind="sum")
    return MtmConfig(parts=JOINTS, model=Sizes(dim=64), returns=returns, validate_every=800, fit=fit)


@dataclass(frozen=True, kw_only=True)
class TotoStudy:
    """What the reproduction does.

    Attributes:
        tasks: names of the datasets.
        recorded: episodes of each.
        encoder: how in-domain encoders learn; `random` and `pca` have the same number of features.
        representations: what policies stand on, ways to get an encoder.
        main: the representation on which policies are tried on all splits; the others on the first alone.
        cloning: cloning on features, H actions at a time, all of them carried out; and the same with H = 1.
        own: cloning end to end, likewise.
        vinn: neighbours.
        offline: implicit Q-learning.
        masked: a masked trajectory model that is told its return.
        transformer: of chains of trials, the Agentic Transformer; and of as many steps in single trials, a policy that
            is told its return.
        trials: episodes on each split, the same for all.
        splits: the first is what was recorded, the last has everything new.
        seeds: of everything that is trained, encoders too.
        jobs: trainings at a time.
        judged: whether the limits, which are meant for the preset `tiny`, decide the verdicts.
    """

    tasks: tuple[str, ...] = ("toto-pour", "toto-scoop")
    recorded: int = 300
    encoder: EncoderConfig = field(default_factory=_encoder)
    representations: tuple[Method, ...] = ("pca", "random", "byol", "moco")
    main: Method = "byol"
    cloning: CloningConfig = field(default_factory=_cloning)
    own: CloningConfig = field(default_factory=_own)
    vinn: VinnConfig = field(default_factory=lambda: VinnConfig(parts=JOINTS))
    offline: OfflineConfig = field(default_factory=_offline)
    masked: MtmConfig = field(default_factory=_masked)
    transformer: HindsightConfig = field(default_factory=_transformer)
    trials: int = 40
    splits: tuple[str, ...] = ("seen", "position", "object", "lighting", "all")
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2
    judged: bool = True


def smoke() -> TotoStudy:
    """A minute on two cores: everything once, at sizes where the limits mean nothing."""
    fit = _fit(4, 8, 1e-3)
    study = TotoStudy()
    small = replace(study.cloning, chunk=20, execute=20, hidden=16, validate_every=4, fit=fit)
    return TotoStudy(
        recorded=4, trials=1, seeds=(0,), judged=False, splits=("seen", "all"), cloning=small,
        encoder=replace(study.encoder, side=32, width=4, size=8, hidden=16, queue=32, save_every=4, fit=fit),
        own=replace(small, cameras=CAMERA), vinn=replace(study.vinn, neighbours=2),
        offline=replace(study.offline, hidden=16, save_every=4, fit=replace(study.offline.fit, steps=4, batch_size=8)),
        masked=replace(study.masked, model=Sizes(dim=16, heads=2, encoder=1), validate_every=4, fit=fit),
        transformer=replace(study.transformer, n_trials=(2, 2), validate_every=4, fit=replace(fit, batch_size=1),
                            model=replace(study.transformer.model, width=8, layers=1, heads=2)),
    )  # fmt: skip


def tiny() -> TotoStudy:
    """More than an hour on two cores, once the recordings are there: the table that is claimed."""
    return TotoStudy()


def paper() -> TotoStudy:
    """On a GPU: TOTO's policies for as long as its repository trains them, on encoders that learn ten times as long."""
    study = TotoStudy()
    cloning = replace(study.cloning, hidden=128, fit=replace(study.cloning.fit, steps=30_000, device="auto"))
    return replace(
        study,
        recorded=1_000,
        encoder=replace(study.encoder, width=64, size=512, hidden=1_024, queue=16_384,
                        fit=replace(study.encoder.fit, steps=20_000, batch_size=256, device="auto")),
        cloning=cloning,
        own=replace(study.own, hidden=128, fit=replace(study.own.fit, steps=30_000, device="auto")),
        offline=replace(study.offline, fit=replace(study.offline.fit, steps=100_000, device="auto")),
        masked=replace(study.masked, model=Sizes(dim=512, dropout=0.1),
                       fit=replace(study.masked.fit, steps=50_000, batch_size=1_024, learning_rate=1e-4,
                                   device="auto")),
        transformer=replace(study.transformer, fit=replace(study.transformer.fit, steps=20_000, device="auto")),
        jobs=1,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], TotoStudy]] = {"smoke": smoke, "tiny": tiny, "paper": paper}
"""Presets of `offbook reproduce toto`."""
