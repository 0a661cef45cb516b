"""Trained policies from files, also from strangers' files: nothing is allocated, built or run before it is checked."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from offbook.client.protocol import Policy, PolicyMeta
from offbook.errors import CheckpointError, ConfigError, nearest
from offbook.runs.checkpoint import Header, load_checkpoint, read_header

KINDS: dict[str, str] = {
    "bc": "offbook.learning.cloning:ClonedPolicy",
    "encoded": "offbook.learning.encoding:EncodedPolicy",
    "mtm": "offbook.learning.masked_roles:RolePolicy",
    "hindsight": "offbook.learning.trying:HindsightPolicy",
    "offline": "offbook.learning.offline:OfflinePolicy",
    "pixels": "offbook.learning.pixel_policy:PixelPolicy",
    "vinn": "offbook.learning.vinn:VinnPolicy",
}
"""Kind of checkpoint -> the class that plays it: `from_record(record)` builds it, `module` takes the weights.

Names alone: what stands in a higher layer is imported when a file of its kind is opened, and not before.
"""

MAX_BYTES = 2 * 2**30
MAX_TENSORS = 10_000


def policy_file(path: Path | str) -> Path:
    """The checkpoint that a path means: the file itself, or the newest policy of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    file = path / "checkpoints" / "last.safetensors" if path.is_dir() else path
    if not file.is_file():
        unfinished = (path / "config.json").is_file()
        fix = "finish the training with --resume" if unfinished else "check the path"
        expected = "a trained policy: a run folder or a checkpoint file"
        got = "a run that has not saved one yet" if unfinished else "neither"
        raise CheckpointError(str(path), expected=expected, got=got, fix=fix)
    return file


def load_policy(path: Path | str, *, max_bytes: int = MAX_BYTES) -> Policy:
    """Reads a policy. Safe for a stranger's file: at worst it is refused.

    Checked before anything is allocated: the format (never pickle), the size, the kind, and that the file holds
    exactly the tensors that its record calls for; after loading, that every number is finite.

    Args:
        path: a run folder or a checkpoint file.
        max_bytes: larger files are refused.

    Raises:
        CheckpointError: the file is missing, damaged, too large, of an unknown kind, or not what it claims to be.
    """
    file = policy_file(path)
    header = read_header(file)
    if header.size > max_bytes or len(header.tensors) > MAX_TENSORS:
        raise _refused(
            file,
            f"at most {max_bytes} bytes and {MAX_TENSORS} tensors",
            f"{header.size} bytes and {len(header.tensors)} tensors",
            "save a smaller policy",
        )
    if header.kind not in KINDS:
        raise _refused(file, "a policy", f"a checkpoint of kind {header.kind!r}", nearest(header.kind, KINDS))
    policy = _skeleton(file, header)
    expected = {name: tuple(tensor.shape) for name, tensor in policy.module.state_dict().items()}
    _check_tensors(file, header, expected)
    values = load_checkpoint(file, header.kind).values
    for name, tensor in values.items():
        if not bool(torch.isfinite(tensor).all()):
            raise _refused(file, f"finite numbers in {name!r}", "NaN or infinity", "train the policy again")
    policy.module.load_state_dict(dict(values), assign=True)
    loaded: Policy = type(policy)(policy.module, policy.meta, policy.provenance)
    return loaded


def check_meta(meta: PolicyMeta) -> None:
    """Refuses what a stranger's record says of a policy where its sizes or bounds disagree.

    Raises:
        ConfigError: they do.
    """
    action, cameras = meta.action, meta.observation.cameras
    sound = (
        len(action.low) == len(action.high) == action.size
        and all(low <= high for low, high in zip(action.low, action.high, strict=True))
        and (action.choices is None or (action.size == 1 and action.choices >= 1))
        and all(size >= 0 for _, size in meta.observation.state)
        and len(cameras) <= 16
        and all(16 <= side <= 4096 for camera in cameras.values() for side in camera)
    )
    if not sound:
        raise ConfigError("policy record", expected="sizes that agree", got="others", fix="save the policy again")


def policy_class(kind: str) -> Any:
    """The class that plays a kind of checkpoint.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in KINDS:
        fix = nearest(str(kind), KINDS)
        raise ConfigError("kind of policy", expected="one that is played here", got=repr(kind)[:60], fix=fix)
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def _skeleton(file: Path, header: Header) -> Any:
    """The policy without numbers: on the meta device sizes cost nothing, however large a stranger's record says."""
    try:
        with torch.device("meta"):
            return policy_class(header.kind).from_record(header.record)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        got = f"another one ({type(error).__name__}: {str(error)[:200]})"
        raise _refused(file, "the record of a policy", got, "save the policy with offbook") from error


def _check_tensors(file: Path, header: Header, expected: dict[str, tuple[int, ...]]) -> None:
    fix = "save the policy with offbook"
    different = sorted(expected.keys() ^ header.tensors.keys())
    if different:
        missing = different[0] in expected
        wanted, got = ("a", "none") if missing else ("no", "one")
        raise _refused(file, f"{wanted} tensor {different[0][:80]!r}", got, fix)
    for name, shape in expected.items():
        info = header.tensors[name]
        if info.shape != shape or info.dtype != "F32":
            raise _refused(file, f"F32 {shape} for tensor {name!r}", f"{info.dtype} {info.shape}", fix)


def _refused(file: Path, expected: str, got: str, fix: str) -> CheckpointError:
    return CheckpointError(str(file), expected=expected, got=got, fix=fix)
