"""System 4, BPT: transformers that train on far longer sequences in the same memory.

The layers are `offbook.models.blockwise`, which any PyTorch user can take alone; here is what shows their worth: the
ordinary ways to train beside ours, measured.

Source: Liu and Abbeel, "Blockwise Parallel Transformer for Large Context Models", NeurIPS 2023, arXiv:2305.19370.
"""

from offbook.models.blockwise import Backbone, BackboneConfig, Causal

__all__ = ["Backbone", "BackboneConfig", "Causal"]
