"""Train offline, test online (TOTO): what policies on frozen representations are worth once others test them.

A user gets encoders that learn from one's own frames, neighbours as a policy, and any learner on features; the arena
that tests what comes out is `offbook.arena`. Two tasks on a table, five splits of what is new.

Source: Zhou et al., "Train Offline, Test Online: A Real Robot Learning Benchmark" (2023), arXiv:2306.00942.
"""

from offbook.learning.encoding import EncodedPolicy, encoded_store, train_encoded
from offbook.learning.self_supervised import EncoderConfig, train_encoder
from offbook.learning.vinn import VinnConfig, VinnPolicy, train_vinn
from offbook.models.encoders import Encoder, load_encoder

__all__ = [
    "EncodedPolicy", "Encoder", "EncoderConfig", "VinnConfig", "VinnPolicy", "encoded_store", "load_encoder",
    "train_encoded", "train_encoder", "train_vinn",
]  # fmt: skip
