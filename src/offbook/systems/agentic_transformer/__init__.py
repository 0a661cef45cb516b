"""Agentic Transformer: a policy that keeps its earlier trials in view, learnt from chains of trials in rising order.

Every trial of a chain is told to aim at the return of the best one. With one trial in a chain and its own return as the
aim it is a Decision Transformer, which is therefore the same code.

Source: Liu and Abbeel, "Emergent Agentic Transformer from Chain of Hindsight Experience" (2023), arXiv:2305.16554.
"""

from offbook.data.chains import Chains, ChainSampler, Trial, relabel
from offbook.learning.hindsight import HindsightNetwork, HindsightSizes
from offbook.learning.hindsight_training import HindsightConfig, train_hindsight
from offbook.learning.trying import HindsightPolicy

__all__ = [
    "ChainSampler", "Chains", "HindsightConfig", "HindsightNetwork", "HindsightPolicy", "HindsightSizes", "Trial",
    "relabel", "train_hindsight",
]  # fmt: skip
