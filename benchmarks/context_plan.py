"""How far the planner of memory is off what training steps take, at sizes that no constant of it was chosen by.

Each step runs in a process of its own, whose growth at its peak is read; attention is allocated and not computed.
"""

from offbook.models.blockwise import BackboneConfig
from offbook.models.blockwise.plan import plan, ways
from offbook.runs.benchmark import Options
from offbook.runs.ledger import Claim, Metric
from offbook.runs.parallel import run_parallel
from offbook.systems.bpt.measure import Step, measure

LIMIT = 0.1
# Tokens, layers, width and heads; others than those that `offbook reproduce bpt` measures.
SIZES = ((700, 5, 320, 5), (3_072, 3, 128, 4), (4_096, 8, 256, 4), (8_192, 5, 384, 6), (12_288, 4, 256, 4))


def run(options: Options) -> list[Claim]:
    """Measures each way to spend memory at each size, once."""
    points = [
        (name.partition(" of ")[0], Step(backbone=way, tokens=tokens, vocabulary=64, attention="allocated"))
        for tokens, layers, dim, heads in SIZES
        for name, way in ways(BackboneConfig(dim=dim, layers=layers, heads=heads)).items()
    ]
    measured = run_parallel(measure, [step for _, step in points], jobs=2, label="points")
    worst: dict[str, float] = {}
    for (name, step), found in zip(points, measured, strict=True):
        off = abs(plan(step.backbone, step.tokens).total / found.bytes - 1)
        worst[name] = max(off, worst.get(name, 0.0))
    sizes = "; ".join(f"{tokens} tokens, {layers} layers of {dim}" for tokens, layers, dim, _ in SIZES)
    return [
        Claim(
            system="context_plan",
            claim=f"the planner is within a tenth of the measured memory at each of {len(points)} points",
            metrics=tuple(
                Metric(name=f"worst, {name}", value=off, higher_is_better=False) for name, off in worst.items()
            ),
            seeds=(options.seed,),
            verdict="met" if max(worst.values()) <= LIMIT else "missed",
            note=f"At {sizes}.",
        )
    ]
