"""Value-conditional state entropy (VCSE): an exploration bonus that leaves an agent at the valuable states it found.

Plain state entropy pays for whatever lies far from the rest, so it pulls an agent that has begun to collect reward back
to where there is none. Here a state is compared with others of about the same value only. The bonuses take tensors;
`sb3.explore` puts one into an algorithm of Stable-Baselines3, and `torchrl.AddBonus` into TorchRL's data.

Source: Kim et al., "Accelerating Reinforcement Learning with Value-Conditional State Entropy Exploration" (2023),
arXiv:2305.19476.
"""

from offbook.systems.vcse.bonus import RND, VCSE, Bonus, StateEntropy, Sum, value_conditional_state_entropy

__all__ = ["RND", "VCSE", "Bonus", "StateEntropy", "Sum", "value_conditional_state_entropy"]
