import json
import pickle
import resource
import struct

import numpy as np
import pytest
import torch

from offbook.client.protocol import ActionSpec, ObservationSpec, Policy, PolicyMeta
from offbook.errors import CheckpointError
from offbook.learning.cloning import ClonedPolicy
from offbook.learning.hindsight import HindsightNetwork, HindsightSizes
from offbook.learning.networks import CloningNetwork
from offbook.learning.policies import load_policy, policy_file
from offbook.learning.trying import HindsightPolicy
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.runs.directory import RunDirectory

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    meta = PolicyMeta(
        name="sound",
        observation=ObservationSpec(state=(("joints", 3),), cameras={"front": (16, 16)}),
        action=ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0)),
        chunk=2,
    )
    torch.random.default_generator.manual_seed(0)
    module = CloningNetwork(meta.observation, meta.action, chunk=4, hidden=8, depth=2, dropout=0.0)
    path = tmp_path_factory.mktemp("policies") / "sound.safetensors"
    ClonedPolicy(module, meta, {"environment": "offbook:pour"}).save(path)
    return path


def changed(sound, path, *, record=None, tensors=None, kind="bc"):
    """A copy of the sound file with changes: `record(dict)` and `tensors(dict)` work in place."""
    whole = load_checkpoint(sound)
    content, values = json.loads(json.dumps(whole.record)), dict(whole.values)
    if record:
        record(content)
    if tensors:
        tensors(values)
    save_checkpoint(path, kind, values, content)
    return path


def test_the_sound_file_is_read(sound):
    policy = load_policy(sound)
    assert isinstance(policy, Policy)
    assert policy.meta.chunk == 2
    assert policy.provenance == {"environment": "offbook:pour"}


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a stranger ran code')",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_is_never_opened(tmp_path, protocol):
    path = tmp_path / "policy.safetensors"
    path.write_bytes(pickle.dumps(Bomb(), protocol))
    with pytest.raises(CheckpointError, match="pickle"):
        load_policy(path)


def test_torch_save_is_never_opened(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "policy.pt")
    with pytest.raises(CheckpointError, match=r"zip.*pickle"):
        load_policy(tmp_path / "policy.pt")


def test_giant_header(tmp_path):
    path = tmp_path / "policy.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(CheckpointError, match="header"):
        load_policy(path)


def test_giant_tensor_in_a_small_file(tmp_path):
    entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    record = json.dumps({"format": 1, "kind": "bc", "record": {}})
    header = json.dumps({"__metadata__": {"offbook": record}, "w": entry}).encode()
    path = tmp_path / "policy.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="truncated"):
        load_policy(path)


def test_truncated_and_empty(sound, tmp_path):
    whole = sound.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_policy(tmp_path / "cut.safetensors")


def test_too_large(sound):
    with pytest.raises(CheckpointError, match="at most 1000 bytes"):
        load_policy(sound, max_bytes=1000)


def test_too_many_tensors(sound, tmp_path):
    def add(values):
        values |= {f"extra.{i}": torch.zeros(0) for i in range(10_001)}

    with pytest.raises(CheckpointError, match="10000 tensors"):
        load_policy(changed(sound, tmp_path / "many.safetensors", tensors=add))


def test_unknown_kind(sound, tmp_path):
    with pytest.raises(CheckpointError, match=r"kind 'bcc'.*did you mean 'bc'"):
        load_policy(changed(sound, tmp_path / "kind.safetensors", kind="bcc"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(extra=torch.zeros(1)), "no tensor 'extra'"),
        (lambda v: v.pop("mlp.0.bias"), "a tensor 'mlp.0.bias'"),
        (lambda v: v.update({"mlp.0.bias": torch.zeros(9)}), r"\(8,\) for tensor 'mlp.0.bias', got F32 \(9,\)"),
        (lambda v: v.update({"mlp.0.bias": torch.zeros(8, dtype=torch.float64)}), "got F64"),
        (lambda v: v["mlp.0.weight"].fill_(float("nan")), "finite numbers in 'mlp.0.weight'"),
        (lambda v: v["state_std"].fill_(float("inf")), "finite numbers in 'state_std'"),
    ],
)
def test_tensors_that_do_not_belong(sound, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_policy(changed(sound, tmp_path / "bad.safetensors", tensors=change))


def _set(*keys, to):
    def change(record):
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.clear(),
        lambda record: record.pop("network"),
        _set("meta", to=7),
        _set("meta", "chunk", to=0),
        _set("meta", "chunk", to=5),
        _set("meta", "chunk", to=10**12),
        _set("meta", "action", "size", to=-1),
        _set("meta", "action", "size", to=10**15),
        _set("meta", "action", "low", to=[float("nan"), 0.0]),
        _set("meta", "action", "low", to=[2.0, 0.0]),
        _set("meta", "action", "choices", to=-4),
        _set("meta", "action", "choices", to=4),
        _set("meta", "observation", "state", to=[["joints", 10**18]]),
        _set("meta", "observation", "state", to=[["joints", -3]]),
        _set("meta", "observation", "cameras", to={str(i): [16, 16] for i in range(10_000)}),
        _set("meta", "observation", "cameras", to={"front": [10**9, 16]}),
        _set("network", "depth", to=10**12),
        _set("network", "hidden", to=10**12),
        _set("network", "hidden", to="8"),
        _set("network", to={"chunk": 4, "hidden": True, "depth": 2}),
        _set("network", to=[1, 2]),
        _set("network", "body", to="transformers"),
        _set("network", "body", to=["mlp"]),
    ],
)
def test_records_that_lie(sound, tmp_path, change):
    path = changed(sound, tmp_path / "liar.safetensors", record=change)
    with pytest.raises(CheckpointError, match=r"liar\.safetensors"):
        load_policy(path)


@pytest.fixture(scope="module")
def remembering(tmp_path_factory):
    meta = PolicyMeta(
        name="remembering",
        observation=ObservationSpec(state=(("position", 2), ("trial", 3))),
        action=ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0)),
    )
    torch.random.default_generator.manual_seed(0)
    module = HindsightNetwork(2, meta.action, trials=3, steps=4, sizes=HindsightSizes(width=8, layers=1, heads=2))
    path = tmp_path_factory.mktemp("policies") / "remembering.safetensors"
    HindsightPolicy(module, meta, {"target": 1.0, "seed": 0}).save(path)
    return path


S = "network", "sizes"
LIES = {
    "nothing": lambda record: record.clear(),
    "no meta": lambda record: record.pop("meta"),
    "no network": lambda record: record.pop("network"),
    "no trials": lambda record: record["network"].pop("trials"),
    "no sizes": lambda record: record["network"].pop("sizes"),
    "no width": lambda record: record["network"]["sizes"].pop("width"),
    "no values": lambda record: record["network"]["sizes"].pop("values"),
    "no target": lambda record: record.pop("target"),
    "no seed": lambda record: record.pop("seed"),
    "chunk": _set("meta", "chunk", to=2),
    "camera": _set("meta", "observation", "cameras", to={"front": [16, 16]}),
    "no trial to read": _set("meta", "observation", "state", to=[["position", 5]]),
    "trial of another size": _set("meta", "observation", "state", to=[["position", 2], ["trial", 2]]),
    "trial before the state": _set("meta", "observation", "state", to=[["trial", 3], ["position", 2]]),
    "huge state": _set("meta", "observation", "state", to=[["position", 10**18], ["trial", 3]]),
    "action size": _set("meta", "action", "size", to=10**15),
    "choices": _set("meta", "action", to={"size": 1, "low": [0.0], "high": [1.0], "choices": 10**13}),
    "NaN bounds": _set("meta", "action", "low", to=[float("nan"), 0.0]),
    "no trial": _set("network", "trials", to=0),
    "steps below 0": _set("network", "steps", to=-1),
    "one trial more": _set("network", "trials", to=4),
    "huge steps": _set("network", "steps", to=10**12),
    "fractional steps": _set("network", "steps", to=4.0),
    "steps as text": _set("network", "steps", to="4"),
    "true steps": _set("network", "steps", to=True),
    "huge width": _set(*S, "width", to=10**12),
    "width as text": _set(*S, "width", to="8"),
    "fractional width": _set(*S, "width", to=8.0),
    "heads that do not divide": _set(*S, "heads", to=3),
    "no heads": _set(*S, "heads", to=0),
    "huge layers": _set(*S, "layers", to=10**12),
    "all at their largest": _set("network", "sizes", to={"width": 65_536, "layers": 256, "heads": 256, "values": []}),
    "dropout": _set(*S, "dropout", to=float("nan")),
    "tokens": _set(*S, "tokens", to="words"),
    "unknown value": _set(*S, "values", to=["target", "state", "goal"]),
    "values without the state": _set(*S, "values", to=["target", "action"]),
    "no list of values": _set(*S, "values", to=7),
    "head": _set(*S, "head", to="oracle"),
    "huge bins": _set(*S, "bins", to=10**12),
    "other bins": _set(*S, "bins", to=12),
    "remat": _set(*S, "remat", to="always"),
    "offload": _set(*S, "offload", to="/etc"),
    "unknown size": _set(*S, "colour", to="red"),
    "endless target": _set("target", to=10**400),
    "NaN target": _set("target", to=float("nan")),
    "target as text": _set("target", to="high"),
    "seed below 0": _set("seed", to=-1),
    "seed as text": _set("seed", to="0"),
}


@pytest.mark.parametrize("lie", LIES)
def test_records_of_trials_that_lie(remembering, tmp_path, lie):
    assert load_policy(remembering).module.trials == 3
    path = changed(remembering, tmp_path / "liar.safetensors", record=LIES[lie], kind="hindsight")
    with pytest.raises(CheckpointError, match=r"liar\.safetensors"):
        load_policy(path)


def test_a_small_file_that_says_it_is_large_costs_nothing(remembering, tmp_path):
    def large(record):
        record["network"]["sizes"].update(width=8192, layers=64, heads=2)

    path = changed(remembering, tmp_path / "large.safetensors", record=large, kind="hindsight")  # would be 206 GB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="a tensor"):
        load_policy(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_a_session_may_not_be_made_to_keep_gigabytes(tmp_path):
    # Tables of 5,000 trials and 50,000 steps are small; a session of all of them keeps 4 GB from its first step.
    meta = PolicyMeta(
        name="endless",
        observation=ObservationSpec(state=(("position", 2), ("trial", 3))),
        action=ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0)),
    )
    module = HindsightNetwork(2, meta.action, 5_000, 50_000, HindsightSizes(width=2, layers=1, heads=1))
    HindsightPolicy(module, meta, {"target": 1.0, "seed": 0}).save(tmp_path / "endless.safetensors")
    with pytest.raises(CheckpointError, match=r"keeps at most 2147483648 bytes, got 4000000000"):
        load_policy(tmp_path / "endless.safetensors")


def test_a_folder_means_its_newest_policy(sound, tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    with pytest.raises(CheckpointError, match=r"has not saved one yet.*--resume"):
        policy_file(tmp_path / "run")
    run.checkpoint().write_bytes(sound.read_bytes())
    assert policy_file(tmp_path / "run") == run.checkpoint()
    with pytest.raises(CheckpointError, match="neither"):
        policy_file(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither"):
        load_policy(tmp_path / "empty")


def test_overflow_gives_a_policy_error_not_a_wild_action(sound, tmp_path):
    from offbook.client.protocol import Observation, check_chunk
    from offbook.errors import PolicyError

    huge = changed(sound, tmp_path / "huge.safetensors", tensors=lambda v: [value.mul_(1e36) for value in v.values()])
    policy = load_policy(huge)
    seen = Observation(
        sessions=("a",),
        state=np.zeros((1, 3), np.float32),
        images={"front": np.zeros((1, 16, 16, 3), np.uint8)},
        time=np.zeros(1),
    )
    with pytest.raises(PolicyError, match="finite action"):
        check_chunk(policy.infer(seen), 1, policy.meta)
