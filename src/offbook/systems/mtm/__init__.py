"""Masked trajectory models (MTM): one network that fills in what is hidden of a window of states, returns and actions.

What is hidden decides its role: behaviour cloning, return-conditioned cloning, forward or inverse dynamics, goals,
waypoints, planning, or an encoder of states. Episodes without actions teach it too.

Source: Wu et al., "Masked Trajectory Models for Prediction, Representation, and Control" (2023), arXiv:2305.02968.
"""

from offbook.learning.masked_model import MaskedTrajectoryModel, Modality, Sizes
from offbook.learning.masked_patterns import Shape, draw
from offbook.learning.masked_roles import Dynamics, RolePolicy, load_model
from offbook.learning.masked_training import MtmConfig, train_mtm

__all__ = [
    "Dynamics", "MaskedTrajectoryModel", "Modality", "MtmConfig", "RolePolicy", "Shape", "Sizes", "draw", "load_model",
    "train_mtm",
]  # fmt: skip
