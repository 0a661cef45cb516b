"""What a robot or a policy author needs: the policy protocol, the wire, dialling out, submitting. No torch."""

from offbook.client.protocol import (
    ActionSpec,
    FunctionPolicy,
    Observation,
    ObservationSpec,
    Policy,
    PolicyMeta,
)

__all__ = ["ActionSpec", "FunctionPolicy", "Observation", "ObservationSpec", "Policy", "PolicyMeta"]
