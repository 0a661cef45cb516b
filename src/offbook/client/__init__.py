"""What a robot or a policy author needs: the policy protocol, the wire, dialling out, submitting. No torch.

Importing it costs next to nothing: NumPy, the websocket and the HTTP library come with the first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from offbook.client.protocol import (
    ActionSpec,
    FunctionPolicy,
    Observation,
    ObservationSpec,
    Policy,
    PolicyMeta,
)

if TYPE_CHECKING:
    from offbook.client.remote import RemotePolicy
    from offbook.client.serve import serve_policy
    from offbook.client.submit import ArenaClient

__all__ = [
    "ActionSpec",
    "ArenaClient",
    "FunctionPolicy",
    "Observation",
    "ObservationSpec",
    "Policy",
    "PolicyMeta",
    "RemotePolicy",
    "serve_policy",
]

_ON_FIRST_USE = {
    "ArenaClient": "offbook.client.submit",
    "RemotePolicy": "offbook.client.remote",
    "serve_policy": "offbook.client.serve",
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
