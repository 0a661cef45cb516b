"""A network that reads its earlier trials as a policy: sessions with memory, each new step at the cost of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from offbook.client.protocol import Observation, PolicyMeta
from offbook.data.chains import DONE, REWARD, TARGET, Trial
from offbook.errors import ConfigError
from offbook.learning.hindsight import ACTION, STATE, HindsightNetwork, HindsightSizes
from offbook.learning.policies import MAX_BYTES, check_meta
from offbook.models.blockwise import KVCache
from offbook.runs.checkpoint import save_checkpoint
from offbook.runs.progress import note
from offbook.runs.seeding import generator
from offbook.sim.trials import TRIAL

KIND = "hindsight"

# Sessions whose keys and values are kept, and those of which anything is: the ones asked least lately go first.
_SLOTS, _SESSIONS = 128, 1024
# Returns that differ by less, as a share of the target, are equal: rewards reach a policy in float32.
_ALIKE = 1e-5


@dataclass
class _Life:
    """What a session has lived through, as rows of a chain.

    Attributes:
        rng: of its draws.
        rows: by name a list with an entry for each step.
        starts: row at which each kept trial begins; of one that lost its first steps, before the first row.
        return_: of the last trial, so far.
        open: whether the last row's reward is still to come.
        slot: of the cache; None without one.
        cached: tokens there.
    """

    rng: np.random.Generator
    rows: dict[str, list[Any]] = field(default_factory=lambda: {n: [] for n in (TARGET, STATE, ACTION, REWARD, DONE)})
    starts: list[int] = field(default_factory=list)
    return_: float = 0.0
    open: bool = False
    slot: int | None = None
    cached: int = 0

    def __len__(self) -> int:
        return len(self.rows[STATE])

    def begin(self, trials: int) -> None:
        """A new trial; of the earlier ones as many stay as a network has learnt to read."""
        if len(self.starts) == trials:
            self.forget()
        self.starts.append(len(self))
        self.return_ = 0.0

    def forget(self) -> None:
        """Drops the oldest trial, whole."""
        first = self.starts[1] if len(self.starts) > 1 else len(self)
        for values in self.rows.values():
            del values[:first]
        self.starts = [start - first for start in self.starts[1:]]
        self.cached = 0

    def shorten(self, keep: int) -> int:
        """Drops the oldest steps of the only trial; gives their number."""
        more = len(self) - keep
        for values in self.rows.values():
            del values[:more]
        self.starts = [self.starts[0] - more]  # so that each step keeps its time in the trial
        self.cached = 0
        return more

    def rise(self) -> int:
        """Gives its place in the cache away."""
        slot = self.slot or 0
        self.slot, self.cached = None, 0
        return slot

    def see(self, state: np.ndarray, aim: float) -> None:
        """A state, at which an action is to be told."""
        for name, value in ((TARGET, aim - self.return_), (STATE, state), (ACTION, None), (REWARD, 0.0), (DONE, False)):
            self.rows[name].append(value)
        self.open = True

    def learn(self, reward: float, ended: bool, aim: float) -> None:
        """What came of the last action."""
        self.return_ += reward
        reached = self.return_ >= aim - _ALIKE * abs(aim)
        self.rows[REWARD][-1], self.rows[DONE][-1] = reward, ended and reached
        self.open = False


class HindsightPolicy:
    """A trained network as a `Policy` for environments of several trials, `make(..., trials=n)`.

    Each session's trials stay in view, as many as the network has learnt from at a time, and in keys and values that
    are kept, so that a step costs one step's tokens. Made by `train_hindsight`, or read by `policies.load_policy`.

    Args:
        module: the network, in evaluation mode.
        meta: what it wants and gives; the last part of the state is the trial.
        provenance: JSON types kept in the file; of these, `target` is the return that it aims at, and `seed` that of
            its draws.

    Attributes:
        dropped: whole trials that went out of view so far.
        cut: steps that did so alone, of trials for which there is not room enough; never while another trial is in
            view.
    """

    def __init__(self, module: HindsightNetwork, meta: PolicyMeta, provenance: Mapping[str, Any]) -> None:
        self.module, self.meta, self.provenance = module.eval(), meta, dict(provenance)
        self.target, self.dropped, self.cut = float(self.provenance["target"]), 0, 0
        self._lives: dict[str, _Life] = {}
        self._cache: KVCache | None = None
        self._holders: list[str | None] = []
        self._device = next(module.parameters()).device

    def aiming_at(self, target: float) -> HindsightPolicy:
        """The same network aiming at another return, in the unit of the recordings.

        Raises:
            ConfigError: it is not finite.
        """
        if not isfinite(target):
            where, fix = f"policy {self.meta.name!r}, target", "choose one of the recordings' returns"
            raise ConfigError(where, expected="a finite return", got=f"{target}", fix=fix)
        return HindsightPolicy(self.module, self.meta, {**self.provenance, "target": target})

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Forgets all trials of each session."""
        for session in sessions:
            self._leave(session)
            self._lives[session] = _Life(generator(int(self.provenance["seed"]), "actions", session))
        for session in list(self._lives)[: max(0, len(self._lives) - max(_SESSIONS, len(sessions)))]:
            self._leave(session)

    def recall(self, session: str, trials: Sequence[Trial]) -> None:
        """Takes earlier trials, after `reset`, as if it had lived them."""
        life = self._lives[session]
        for trial in trials:
            self._begin(life)
            for number, reward in enumerate(trial.reward):
                life.see(np.asarray(trial.state[number], np.float32), self.target)
                life.rows[ACTION][-1] = np.asarray(trial.action[number], np.float32)
                life.learn(float(reward), number == len(trial.reward) - 1, self.target)

    @torch.inference_mode()
    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 action"]:
        """The next action for each session, within the bounds of the actions."""
        lives = [self._see(session, observation.state[i]) for i, session in enumerate(observation.sessions)]
        self._seat(observation.sessions, lives)
        told = self.module.tell(self._told(lives)[:, None])[:, 0]
        entries = told.shape[1]
        uniform = torch.from_numpy(np.stack([life.rng.random(entries) for life in lives])).to(self._device)
        action, spec = self.module.draw(told, uniform).cpu().numpy(), self.meta.action
        if spec.choices is None:
            action = action.clip(np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32))
        for life, done in zip(lives, action, strict=True):
            life.rows[ACTION][-1] = done
        return np.asarray(action[:, None], np.float32)

    def _see(self, session: str, state: Float32[np.ndarray, " state"]) -> _Life:
        life = self._lives.pop(session, None) or _Life(generator(int(self.provenance["seed"]), "actions", session))
        self._lives[session] = life  # at the end of those that were asked
        _, step, reward = (float(x) for x in state[-3:])
        if life.open:
            life.learn(reward, step == 0, self.target)
        if step == 0 or not life.starts:
            self._begin(life)
        life.see(np.array(state[:-3], np.float32), self.target)
        room = self.module.trials * self.module.steps
        while len(life) > room and len(life.starts) > 1:
            life.forget()
            self.dropped += 1
        if len(life) > room:
            if not self.cut:
                said = f"a trial is longer than the {room} steps that it has room for; the oldest go out of view"
                note(f"policy {self.meta.name!r}: {said}")
            # Half of them at once, since all that stay are read anew.
            self.cut += life.shorten(max(1, room // 2))
        return life

    def _begin(self, life: _Life) -> None:
        self.dropped += len(life.starts) == self.module.trials
        life.begin(self.module.trials)

    def _leave(self, session: str) -> None:
        life = self._lives.pop(session, None)
        if life is not None and life.slot is not None:
            self._holders[life.slot] = None

    def _seat(self, sessions: Sequence[str], lives: Sequence[_Life]) -> None:
        """Gives each session a place in the cache, of one that was asked less lately if there is no other."""
        free = [slot for slot, holder in enumerate(self._holders) if holder is None]
        standing = [(s, life) for s, life in zip(sessions, lives, strict=True) if life.slot is None]
        if (short := len(standing) - len(free)) > 0:
            asked, before = set(sessions), len(self._holders)
            others = [life for s, life in self._lives.items() if life.slot is not None and s not in asked]
            free += [life.rise() for life in others[: max(0, before + short - _SLOTS)]]
            self._grow(len(standing) - len(free))
            free += range(before, len(self._holders))
        for (session, life), slot in zip(standing, free, strict=False):
            life.slot, life.cached, self._holders[slot] = slot, 0, session
        if self._cache is not None:
            lengths = tuple(0 if holder is None else self._lives[holder].cached for holder in self._holders)
            if lengths != self._cache.lengths:
                self._cache.crop(lengths)

    def _grow(self, more: int) -> None:
        """Makes room for more sessions."""
        if more <= 0:
            return
        if self._cache is None:
            room = self.module.trials * self.module.steps * self.module.stream.tokens
            self._cache = self.module.backbone.new_cache(more, room)
        else:
            before = len(self._holders)
            self._cache.reorder([*range(before), *[0] * more])
        self._holders += [None] * more

    def _told(self, lives: Sequence[_Life]) -> Tensor:
        """The transformer's output where each session is to tell, from the tokens that it has not seen yet."""
        stream, cache = self.module.stream, self._cache
        if cache is None:
            raise RuntimeError("sessions are seated before they are asked")
        totals = [(len(life) - 1) * stream.tokens + stream.ready for life in lives]
        new = [total - life.cached for total, life in zip(totals, lives, strict=True)]
        # Fused, a token reads the step before as well.
        more = 1 if stream.layout == "fused" else 0
        time = max(len(life) - life.cached // stream.tokens for life in lives) + more
        tokens = self.module.embed(self._windows(lives, time))
        width, end = max(new), (time - 1) * stream.tokens + stream.ready
        slots = [life.slot for life in lives]
        if min(new) == width and slots == [*range(len(self._holders))]:  # all sessions go in step
            out, _ = self.module.backbone.prefill(tokens[:, end - width : end], cache=cache)
            told = out[:, -1]
        else:
            counts, places = (torch.tensor(of, device=self._device) for of in (new, slots))
            index = (end - counts[:, None] + torch.arange(width, device=self._device)).clamp(max=end - 1)
            fresh = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
            x = tokens.new_zeros(len(self._holders), width, tokens.shape[2]).index_copy(0, places, fresh)
            lengths = counts.new_zeros(len(self._holders)).index_copy(0, places, counts)
            out, _ = self.module.backbone.prefill(x, cache=cache, lengths=lengths)
            told = out[places, counts - 1]
        for life, total in zip(lives, totals, strict=True):
            life.cached = total
        return told

    def _windows(self, lives: Sequence[_Life], time: int) -> dict[str, Tensor]:
        """The latest rows of each session, at the right of so many steps."""
        size, action = self.module.state_mean.numel(), self.meta.action.size
        arrays: dict[str, np.ndarray] = {
            TARGET: np.zeros((len(lives), time, 1), np.float32),
            STATE: np.zeros((len(lives), time, size), np.float32),
            ACTION: np.zeros((len(lives), time, action), np.float32),
            REWARD: np.zeros((len(lives), time, 1), np.float32),
            DONE: np.zeros((len(lives), time, 1), bool),
            "valid": np.zeros((len(lives), time), bool),
            "trial": np.zeros((len(lives), time), np.int64),
            "time": np.zeros((len(lives), time), np.int64),
        }
        for i, life in enumerate(lives):
            rows = range(max(0, len(life) - time), len(life))
            first = time - len(rows)
            for name in (TARGET, STATE, REWARD, DONE):
                arrays[name][i, first:] = np.asarray(life.rows[name][rows.start :]).reshape(len(rows), -1)
            if len(rows) > 1:
                arrays[ACTION][i, first:-1] = life.rows[ACTION][rows.start : -1]
            arrays["valid"][i, first:] = True
            arrays["trial"][i, first:], arrays["time"][i, first:] = _places(life.starts, rows)
        return {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}

    def save(self, path: Path) -> None:
        """Writes the policy as one file that needs nothing else to run."""
        record = {"meta": self.meta.to_json(), "network": self.module.record(), **self.provenance}
        save_checkpoint(path, KIND, self.module.state_dict(), record)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> HindsightPolicy:
        """A policy of the recorded sizes, on whatever device is the default, whose weights mean nothing yet.

        Raises:
            ConfigError: the record is not what `save` writes.
        """
        meta, network = PolicyMeta.from_json(record["meta"]), record["network"]
        check_meta(meta)
        trials, steps, last = network["trials"], network["steps"], meta.observation.state[-1:]
        sound = all(type(n) is int and 1 <= n <= 1_000_000 for n in (trials, steps))
        # What its first step would stumble over is refused here.
        sound = sound and type(record["seed"]) is int and record["seed"] >= 0 and isfinite(record["target"])
        fix, expected = "save the policy again", "a network from a state and a trial to an action"
        if not sound or meta.chunk != 1 or meta.observation.cameras or last != ((TRIAL, 3),):
            raise ConfigError("policy record", expected=expected, got="another", fix=fix)
        sizes = HindsightSizes(**{**network["sizes"], "values": tuple(network["sizes"]["values"])})
        module = HindsightNetwork(meta.observation.state_size - 3, meta.action, trials, steps, sizes)
        # No tensor of the file vouches for the product, and a session's keys and values are as large from its start.
        kept = trials * steps * module.stream.tokens * sizes.layers * sizes.width * 2 * 4
        if kept > MAX_BYTES:
            expected = f"trials of which a session keeps at most {MAX_BYTES} bytes"
            raise ConfigError("policy record", expected=expected, got=f"{kept}", fix="train on fewer or shorter trials")
        return cls(module, meta, {key: of for key, of in record.items() if key not in ("meta", "network")})


def _places(starts: Sequence[int], rows: range) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
    """Of some rows, the number of the trial and the step in it."""
    at = np.arange(rows.start, rows.stop)
    trial = np.searchsorted(starts, at, "right") - 1
    return trial, at - np.asarray(starts, np.int64)[trial]
