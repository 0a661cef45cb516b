"""Nested states of modules and optimisers as what a checkpoint holds: tensors by name, and JSON for all else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def split_state(state: Any, prefix: str) -> tuple[dict[str, Tensor], Any]:
    """Takes a state apart.

    Args:
        state: mappings, sequences, tensors and JSON's own types, nested at will; keys are strings or numbers.
        prefix: of the names of its tensors.

    Returns:
        The tensors by name, and a record of JSON types for the rest.

    Example:
        >>> import torch
        >>> tensors, record = split_state({"lr": 0.1, "state": {0: {"step": torch.ones(1)}}}, "adam")
        >>> list(tensors), join_state(tensors, record)
        (['adam.state.0.step'], {'lr': 0.1, 'state': {0: {'step': tensor([1.])}}})
    """
    if isinstance(state, Tensor):
        return {prefix: state}, {"tensor": prefix}
    if not isinstance(state, Mapping | list | tuple):
        return {}, {"value": state}
    pairs = state.items() if isinstance(state, Mapping) else enumerate(state)
    tensors, parts = dict[str, Tensor](), []
    for key, part in pairs:
        found, record = split_state(part, f"{prefix}.{key}")
        tensors |= found
        parts.append([key, record])
    return tensors, {"mapping" if isinstance(state, Mapping) else "sequence": parts}


def join_state(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Any:
    """Puts together what `split_state` took apart; tuples come back as lists.

    Raises:
        KeyError: a tensor is missing.
    """
    if "tensor" in record:
        return tensors[record["tensor"]]
    if "value" in record:
        return record["value"]
    parts: Sequence[Any] = record["mapping" if "mapping" in record else "sequence"]
    joined = [(key, join_state(tensors, part)) for key, part in parts]
    return dict(joined) if "mapping" in record else [part for _, part in joined]
