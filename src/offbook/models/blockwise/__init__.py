"""A transformer that trains on long sequences: attention and feedforward by blocks, exact, on CPU and CUDA.

The weights, outputs and gradients are those of an ordinary pre-norm transformer; what differs is the order of the
arithmetic and what is kept for the backward pass. Nothing here knows of recordings or robots.

Source: Liu and Abbeel, "Blockwise Parallel Transformer for Large Context Models" (2023).
"""

from offbook.models.blockwise.backbone import Backbone
from offbook.models.blockwise.cache import CacheFullError, KVCache
from offbook.models.blockwise.config import BackboneConfig
from offbook.models.blockwise.head import argmax, linear_cross_entropy, sample, token_logprobs
from offbook.models.blockwise.hf import LanguageModel
from offbook.models.blockwise.masks import (
    Causal,
    FrameCausal,
    Full,
    KeyPadding,
    Mask,
    Prefix,
    Segments,
    TokenTypes,
    Where,
    Window,
)
from offbook.models.blockwise.plan import ContextTooLongError, MemoryPlan, longest, plan
from offbook.models.blockwise.ring import Ring, RingError

__all__ = [
    "Backbone",
    "BackboneConfig",
    "CacheFullError",
    "Causal",
    "ContextTooLongError",
    "FrameCausal",
    "Full",
    "KVCache",
    "KeyPadding",
    "LanguageModel",
    "Mask",
    "MemoryPlan",
    "Prefix",
    "Ring",
    "RingError",
    "Segments",
    "TokenTypes",
    "Where",
    "Window",
    "argmax",
    "linear_cross_entropy",
    "longest",
    "plan",
    "sample",
    "token_logprobs",
]
