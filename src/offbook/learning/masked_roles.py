"""What a trained model does: a policy in one of four roles, dynamics forwards and backwards, and filling in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from offbook.client.protocol import Observation, PolicyMeta
from offbook.errors import CheckpointError, ConfigError, nearest
from offbook.learning.masked_model import MaskedTrajectoryModel
from offbook.learning.masked_patterns import Shape, Visible, at_step
from offbook.learning.memory import Memory
from offbook.learning.policies import check_meta, load_policy
from offbook.learning.trajectories import ACTION, RETURN, STATE
from offbook.runs.checkpoint import save_checkpoint

KIND = "mtm"

ROLES: Mapping[str, tuple[str, ...]] = {
    "bc": (STATE, ACTION),
    "rcbc": (STATE, RETURN, ACTION),
    "id": (STATE, RETURN, ACTION),
    "plan": (STATE, RETURN, ACTION),
}
"""The roles of a policy, and the modalities that each needs."""

FARTHEST = 10.0
"""How far from the returns of the recordings, in lengths of their range, a policy may aim, either way."""
TARGET = f"a share of the recordings' range, {-FARTHEST:g} to {FARTHEST:g}"

FILL = "fill"
"""What a model without actions is saved as: it fills in, and cannot act."""

# Actions that planning tries in a step, how far they lie from the proposal in the recordings' standard deviations, how
# much better than the others, in standard deviations of what they promise, one must be to be preferred, and by what
# share of the returns' deviation promises differ at least.
_TRIED, _SPREAD, _TEMPERATURE, _ALIKE = 32, 0.5, 0.5, 1e-4


def chosen_role(role: str, modalities: Mapping[str, Any], where: str) -> str:
    """The role that is meant, `auto` being return-conditioned cloning where there are returns.

    Raises:
        ConfigError: there is no such role, or it needs what the model does not have.
    """
    if role == "auto":
        return "rcbc" if {RETURN, ACTION} <= modalities.keys() else "bc" if ACTION in modalities else FILL
    if role not in ROLES:
        raise ConfigError("role", expected=" or ".join(ROLES), got=repr(role), fix=nearest(role, ROLES))
    missing = [name for name in ROLES[role] if name not in modalities]
    if missing:
        expected = f"{' and '.join(missing)}s in one training episode or more, for role {role!r}"
        fix = "learn from recordings that have them, or choose another role"
        raise ConfigError(where, expected=expected, got="none", fix=fix)
    return role


class RolePolicy:
    """A trained model as a `Policy`; made by `train_mtm`, or read from a file by `learning.policies.load_policy`.

    Each session's last states and actions are kept, and go in at the beginning of the window.

    Args:
        module: the model, in evaluation mode.
        meta: what it wants and gives.
        provenance: JSON types kept in the file; of these, `role` is one of `ROLES`, `target` the return that is aimed
            at, 0 for the least of the recordings and 1 for the best, and `return_range` those two.
    """

    def __init__(self, module: MaskedTrajectoryModel, meta: PolicyMeta, provenance: Mapping[str, Any]) -> None:
        self.module, self.meta, self.provenance = module.eval(), meta, dict(provenance)
        self.role = str(self.provenance["role"])
        self._device = next(module.parameters()).device
        # What plans needs a step behind the present one.
        self._memory = Memory(module.sizes.length - (1 if self.role in ("id", "plan") else 0))

    def in_role(self, role: str, target: float | None = None) -> RolePolicy:
        """The same model in another role, or aiming at another return.

        Raises:
            ConfigError: it cannot play that role, or a target is out of its range or for a role that has none.
        """
        where = f"policy {self.meta.name!r}"
        role = chosen_role(role, self.module.modalities, where)
        if target is not None:
            where = f"{where} in role {role!r}"
            if RETURN not in ROLES.get(role, ()):
                aiming = " or ".join(name for name, needs in ROLES.items() if RETURN in needs)
                got, fix = f"one, {target:g}", f"leave the target out, or choose the role {aiming}"
                raise ConfigError(where, expected="no target, as it aims at nothing", got=got, fix=fix)
            if not abs(target) <= FARTHEST:
                raise ConfigError(f"{where}, target", expected=TARGET, got=f"{target:g}", fix="choose one such as 0.9")
        kept = self.provenance["target"] if target is None else target
        return RolePolicy(self.module, self.meta, {**self.provenance, "role": role, "target": kept})

    def aiming_at(self, target: float) -> RolePolicy:
        """The same model in the same role, aiming at another return.

        Raises:
            ConfigError: the target is out of its range, or the role has none.
        """
        return self.in_role(self.role, target)

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Forgets what was seen and done in each session."""
        self._memory.reset(sessions)

    @torch.inference_mode()
    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 action"]:
        """The next action for each session, within the bounds of the actions.

        Raises:
            ConfigError: the model has no actions.
        """
        if self.role == FILL:
            chosen_role("bc", self.module.modalities, f"policy {self.meta.name!r}")
        data, step = self._windows(observation)
        action = _ACT[self.role](self, data, step).cpu().numpy()
        spec = self.meta.action
        if spec.choices is None:
            action = action.clip(np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32))
        self._memory.did(observation.sessions, action)
        return np.asarray(action[:, None], np.float32)

    def _windows(self, observation: Observation) -> tuple[dict[str, Tensor], Tensor]:
        """The latest states and actions of each session, and where in the window the present step is."""
        batch, length = len(observation.sessions), self.module.sizes.length
        arrays = {
            name: np.zeros((batch, length, modality.size), np.float32)
            for name, modality in self.module.modalities.items()
        }
        step = np.zeros((batch, 1), np.int64)
        for i, session in enumerate(observation.sessions):
            states, actions = self._memory.see(session, observation.state[i])
            n = step[i, 0] = len(actions)
            arrays[STATE][i, : n + 1] = states
            if n:
                arrays[ACTION][i, :n] = actions
        if RETURN in arrays:
            low, high = self.provenance["return_range"]
            arrays[RETURN][:] = low + self.provenance["target"] * (high - low)
        data = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
        return data, torch.from_numpy(step)

    def _told(self, role: str, name: str, data: Mapping[str, Tensor], step: Tensor, offset: int = 0) -> Tensor:
        """What the model tells, in a role, of a modality `offset` steps after the present one."""
        visible = self._visible(role, step)
        values = self.module.values(name, self.module(data, visible)[name])
        return values[torch.arange(len(step)), step[:, 0] + offset]

    def _visible(self, role: str, step: Tensor) -> Visible:
        shape = Shape(tokens=self.module.tokens, length=self.module.sizes.length, batch=len(step))
        return {name: seen.to(self._device) for name, seen in at_step(role, shape, step).items()}

    def _clone(self, data: dict[str, Tensor], step: Tensor) -> Tensor:
        return self._told("bc", ACTION, data, step)

    def _conditioned(self, data: dict[str, Tensor], step: Tensor) -> Tensor:
        return self._told("rcbc", ACTION, data, step)

    def _two_stages(self, data: dict[str, Tensor], step: Tensor) -> Tensor:
        """First the states to come, from those so far and the returns; then the action between them."""
        seen = self._visible("rcbc", step)
        seen[ACTION] = torch.zeros_like(seen[ACTION])
        states = self.module.values(STATE, self.module(data, seen)[STATE])
        known = self._visible("bc", step)[STATE][:, :, :1]
        filled = {**data, STATE: torch.where(known, data[STATE], states)}
        every = {name: torch.full_like(of, name == STATE) for name, of in seen.items()}
        actions = self.module.values(ACTION, self.module(filled, every)[ACTION])
        return actions[torch.arange(len(step)), step[:, 0]]

    def _plan(self, data: dict[str, Tensor], step: Tensor) -> Tensor:
        """Tries actions near the proposal, follows each to the end of the window, and averages what promises most.

        Source: Wang et al., "M3PC: Test-time Model Predictive Control for Pretrained Masked Trajectory Model" (2024),
        with a fixed set of deviations instead of random ones.
        """
        tried = self._candidates(self._conditioned(data, step))
        batch, count = len(step), tried.shape[1]
        wide = {name: of.repeat_interleave(count, 0) for name, of in data.items()}
        first, rows = step.repeat_interleave(count, 0), torch.arange(batch * count)
        now, end = first.clone(), self.module.sizes.length - 1
        wide[ACTION][rows, now[:, 0]] = tried.flatten(0, 1)
        for _ in range(end - int(step.min())):
            going = now[:, 0] < end
            following = (now + 1).clamp(max=end)
            state = self._told("fd", STATE, wide, now.clamp(max=end - 1), 1)
            wide[STATE][rows[going], following[going, 0]] = state[going]
            action = self._bounded(self._told("rcbc", ACTION, wide, following))
            wide[ACTION][rows[going], following[going, 0]] = action[going]
            now = following
        returns = self.module.values(RETURN, self.module(wide, self._visible("plan", now))[RETURN])[:, :, 0]
        ahead = (torch.arange(end + 1) >= first).to(self._device)
        score = ((returns * ahead).sum(1) / ahead.sum(1)).reshape(batch, count)
        # Promises that differ by less are equal but for rounding, which must not choose.
        least = _ALIKE * self.module.get_buffer(f"{RETURN}_std")
        deviation = torch.maximum(score.std(1, keepdim=True), least).clamp(min=1e-8)
        weight = torch.softmax((score - score.mean(1, keepdim=True)) / (deviation * _TEMPERATURE), 1)
        if self.meta.action.choices is not None:
            return tried[torch.arange(batch), score.argmax(1)]
        return (tried * weight[..., None]).sum(1)

    def _candidates(self, proposal: Float[Tensor, "batch action"]) -> Float[Tensor, "batch tried action"]:
        """Actions to try: the proposal and others around it; all of them where actions are discrete."""
        if self.meta.action.choices is not None:
            every = torch.arange(float(self.meta.action.choices), device=self._device)
            return every[None, :, None].expand(len(proposal), -1, -1)
        # Always the same: what a session gets must not depend on which others are asked for beside it.
        rng = torch.Generator().manual_seed(0)
        noise = torch.randn(_TRIED - 1, proposal.shape[1], generator=rng).to(self._device)
        spread = noise * _SPREAD * self.module.get_buffer(f"{ACTION}_std")
        return self._bounded(torch.cat([proposal[:, None], proposal[:, None] + spread], 1))

    def _bounded(self, action: Tensor) -> Tensor:
        if self.meta.action.choices is not None:
            return action
        low, high = (torch.tensor(of, device=self._device) for of in (self.meta.action.low, self.meta.action.high))
        return torch.minimum(torch.maximum(action, low), high)

    def save(self, path: Path) -> None:
        """Writes the model with its role as one file that needs nothing else to run."""
        record = {"meta": self.meta.to_json(), "model": self.module.record(), **self.provenance}
        save_checkpoint(path, KIND, self.module.state_dict(), record)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RolePolicy:
        """A policy of the recorded sizes, on whatever device is the default, whose weights mean nothing yet.

        Raises:
            ConfigError: the record is not what `save` writes, or sizes disagree.
        """
        meta = PolicyMeta.from_json(record["meta"])
        check_meta(meta)
        if len(record["model"]["modalities"]) > len(ROLES["rcbc"]):
            raise ConfigError("policy record", expected="three modalities at most", got="more", fix="save it again")
        module = MaskedTrajectoryModel.from_record(record["model"])
        of, acts = meta.action, module.modalities.get(ACTION)
        role = FILL if acts is None else chosen_role(record["role"], module.modalities, "policy record")
        sizes = {name: modality.size for name, modality in module.modalities.items()}
        wanted = {STATE: meta.observation.state_size} | ({} if acts is None else {ACTION: of.size})
        classes = acts.classes if acts is not None and acts.kind == "index" else None
        agree = (
            wanted.items() <= sizes.items()
            and classes == (None if of.choices is None else max(2, of.choices))
            and role == record["role"]
            and meta.chunk == 1
            and not meta.observation.cameras
        )
        if not agree:
            expected = f"a model of {sizes} in role {role!r}, {classes or 'no'} choices"
            got = f"an observation and an action of {wanted} in role {record['role']!r}, {of.choices or 'no'} choices"
            raise ConfigError("policy record", expected=expected, got=got, fix="save the policy again")
        kept = {name: value for name, value in record.items() if name not in ("meta", "model")}
        target, span = kept["target"], kept["return_range"]
        if RETURN in sizes:
            low, high = span
            if not all(isinstance(x, int | float) and math.isfinite(x) for x in (target, low, high)):
                got = f"{target}, {span}"
                raise ConfigError("policy record", expected="finite returns", got=got, fix="save the policy again")
        return cls(module, meta, kept)


_ACT = {
    "bc": RolePolicy._clone,
    "rcbc": RolePolicy._conditioned,
    "id": RolePolicy._two_stages,
    "plan": RolePolicy._plan,
}


class Dynamics:
    """What follows from an action, and which action was between two states, as a trained model has it.

    Args:
        module: the model, with actions.

    Raises:
        ConfigError: it has no actions.
    """

    def __init__(self, module: MaskedTrajectoryModel) -> None:
        chosen_role("bc", module.modalities, "dynamics")
        self.module = module.eval()

    @torch.inference_mode()
    def forward(
        self, states: Float[Tensor, "batch n state"], actions: Float[Tensor, "batch n action"]
    ) -> Float[Tensor, "batch state"]:
        """The state after the last action, from up to T - 1 steps in the recordings' own units.

        Raises:
            ConfigError: there are more steps.
        """
        n = states.shape[1]
        seen = self._seen(n + 1, **{STATE: torch.arange(n + 1) < n, ACTION: torch.arange(n + 1) == n - 1})
        return self._tell(STATE, states, actions, seen)[:, n]

    @torch.inference_mode()
    def inverse(self, states: Float[Tensor, "batch n state"]) -> Float[Tensor, "batch _ action"]:
        """The n - 1 actions between up to T states.

        Raises:
            ConfigError: there are more states.
        """
        n = states.shape[1]
        seen = self._seen(n, **{STATE: torch.ones(n, dtype=torch.bool)})
        return self._tell(ACTION, states, states.new_zeros(len(states), 0, 1), seen)[:, : n - 1]

    def _seen(self, length: int, **steps: Tensor) -> Visible:
        return Shape(tokens=self.module.tokens, length=length, batch=1).where(**steps)

    def _tell(self, name: str, states: Tensor, actions: Tensor, seen: Visible) -> Tensor:
        batch, length = len(states), next(iter(seen.values())).shape[1]
        data = {n: states.new_zeros(batch, length, m.size) for n, m in self.module.modalities.items()}
        data[STATE][:, : states.shape[1]] = states
        data[ACTION][:, : actions.shape[1]] = actions
        visible = {n: of.to(states.device).expand(batch, -1, -1) for n, of in seen.items()}
        return self.module.values(name, self.module(data, visible)[name])


def load_model(path: Path | str) -> MaskedTrajectoryModel:
    """The model of a run folder or a checkpoint file, whatever role it was saved in; see `load_policy`.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or not what it claims to be.
    """
    policy = load_policy(path)
    if not isinstance(policy, RolePolicy):
        got, fix = f"the policy {policy.meta.name!r} of another kind", "train one: offbook train mtm"
        raise CheckpointError(str(path), expected="a masked trajectory model", got=got, fix=fix)
    return policy.module
