"""What trained models do: policies in each role, dynamics, and files, also those of strangers."""

import json
import resource

import numpy as np
import pytest
import torch

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, Policy, PolicyMeta, check_chunk
from offbook.errors import CheckpointError, ConfigError
from offbook.learning.masked_roles import FILL, ROLES
from offbook.learning.policies import load_policy
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.systems.mtm import Dynamics, MaskedTrajectoryModel, Modality, RolePolicy, Sizes, load_model

STATE, RETURN = Modality(name="state", size=3, residual=True), Modality(name="return", size=1, residual=True)
ACTION = Modality(name="action", size=2)
MOVE = Modality(name="action", size=1, kind="index", classes=5)
BOUNDS = ActionSpec(size=2, low=(-0.5, -np.inf), high=(0.5, 1.0))
MOVES = ActionSpec(size=1, low=(0.0,), high=(4.0,), choices=5)
SPAN = (-1.0, 3.0)


def build(modalities=(STATE, RETURN, ACTION), length=4):
    rng = torch.Generator().manual_seed(0)
    model = MaskedTrajectoryModel(modalities, Sizes(length=length, dim=16, heads=2, encoder=1))
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=rng)
    for modality in modalities:
        if modality.kind == "continuous":
            size = modality.size
            model.standardise(modality.name, torch.rand(size, generator=rng), 0.5 + torch.rand(size, generator=rng))
    return model


def policy(role="bc", modalities=(STATE, RETURN, ACTION), length=4, target=0.5):
    kinds = {modality.name: modality for modality in modalities}
    action = ActionSpec(size=0, low=(), high=())
    if "action" in kinds:
        action = BOUNDS if kinds["action"].kind == "continuous" else MOVES
    meta = PolicyMeta(name="mine", observation=ObservationSpec(state=(("joints", 3),)), action=action)
    about = {"role": role, "target": target, "return_range": SPAN if "return" in kinds else None}
    return RolePolicy(build(modalities, length), meta, about)


def discrete(role="bc", length=4):
    return policy(role, (STATE, RETURN, MOVE), length)


def episode(steps=7, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, 3)).astype(np.float32)


def ask(policy, sessions, states):
    seen = Observation(sessions=tuple(sessions), state=np.stack(states), images={}, time=np.zeros(len(states)))
    answer = check_chunk(policy.infer(seen), len(states), policy.meta)
    assert answer.shape == (len(states), 1, policy.meta.action.size)
    return answer[:, 0]


def play(policy, states, session="a"):
    return np.stack([ask(policy, [session], [state])[0] for state in states])


def test_every_role_is_a_policy_that_answers_as_the_role_says():
    assert isinstance(policy(), Policy)
    for made in (policy(), discrete()):
        answers = {role: play(made.in_role(role), episode()) for role in ROLES}
        assert len({of.tobytes() for of in answers.values()}) == len(ROLES) or made.meta.action.choices


def told(module, name, window, **seen):
    """What a model tells of one window, in its own units; what is given is visible, as 0 or 1 for each step."""
    length = len(window["state"])
    visible = {of: torch.zeros(1, length, 1, dtype=torch.bool) for of in module.modalities}
    for of, flags in seen.items():
        visible[of][0, :, 0] = torch.tensor(flags).bool()
    data = {of: torch.as_tensor(values)[None] for of, values in window.items()}
    with torch.no_grad():
        return module.values(name, module(data, visible)[name])[0]


def window(states, actions, present, size, reward=1.0):
    """States up to the present one and the actions before, the present one at place `present` of four."""
    made = {"state": np.zeros((4, 3)), "return": np.full((4, 1), reward), "action": np.zeros((4, size))}
    made["state"][: present + 1] = states[-present - 1 :]
    if present:
        made["action"][:present] = actions[-present:]
    return {name: torch.tensor(of, dtype=torch.float32) for name, of in made.items()}


@pytest.mark.parametrize("make", [policy, discrete])
@pytest.mark.parametrize("role", ["bc", "rcbc", "id"])
@pytest.mark.parametrize("step", [0, 1, 3, 6])
def test_a_session_sees_its_last_steps_and_what_it_did_in_them(make, role, step):
    made, states = make(role), episode()
    actions = play(made, states)
    # Two states before the present one where a state to come must have room behind it, three otherwise.
    now = min(step, 2 if role == "id" else 3)
    given = window(states[: step + 1], actions[:step], now, made.meta.action.size)
    shown, past = [int(t <= now) for t in range(4)], [int(t < now) for t in range(4)]
    if role == "id":
        filled = told(made.module, "state", given, state=shown, **{"return": [1] * 4})
        filled[: now + 1] = given["state"][: now + 1]
        answer = told(made.module, "action", {**given, "state": filled}, state=[1] * 4)
    else:
        more = {"return": [1] * 4} if role == "rcbc" else {}
        answer = told(made.module, "action", given, state=shown, action=past, **more)
    low, high = (np.asarray(of, np.float32) for of in (made.meta.action.low, made.meta.action.high))
    np.testing.assert_allclose(actions[step], np.clip(answer[now].numpy(), low, high), atol=1e-5)


# In some of these the return of the present step alone, or of the steps before too, would choose another action.
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (0, 5), (2, 2), (1, 2), (6, 2), (11, 2)])
def test_a_plan_takes_the_action_after_which_the_model_tells_the_best_returns(seed, step):
    made, states = discrete("plan"), episode(7, seed)
    actions = play(made, states)
    now, promised = min(step, 2), []
    for choice in range(5):
        follow = window(states[: step + 1], actions[:step], now, 1)
        follow["action"][now] = choice
        for t in range(now, 3):
            until = [int(of <= t) for of in range(4)]
            only = [int(of == t) for of in range(4)]
            follow["state"][t + 1] = told(made.module, "state", follow, state=until, action=only)[t + 1]
            shown = [int(of <= t + 1) for of in range(4)]
            answer = told(made.module, "action", follow, state=shown, action=until, **{"return": [1] * 4})
            follow["action"][t + 1] = answer[t + 1]
        returns = told(made.module, "return", follow, state=[1] * 4, action=[1] * 4)
        promised.append(float(returns[now:].mean()))
    assert actions[step, 0] == np.argmax(promised)
    assert np.sort(promised)[-1] - np.sort(promised)[-2] > 2e-5  # more than rounding


def test_a_plan_leans_towards_what_promises_more_and_a_target_is_aimed_at():
    made, states = policy("plan", target=0.0), episode(1)
    proposal = play(made.in_role("rcbc"), states)
    assert 1e-3 < np.abs(play(made, states) - proposal).max() < 2
    low, high = (play(made.in_role("rcbc", target), states) for target in (0.0, 1.0))
    assert np.abs(high - low).max() > 1e-3
    np.testing.assert_array_equal(low, proposal)
    np.testing.assert_array_equal(*(play(policy("bc", target=target), states) for target in (0.0, 1.0)))


@pytest.mark.parametrize("length", [2, 4])
@pytest.mark.parametrize("role", ROLES)
def test_others_in_the_batch_do_not_change_an_answer_and_a_reset_forgets(role, length):
    made = policy(role, length=length)
    first, second = episode(6, 1), episode(6, 2)
    alone = [play(policy(role, length=length), states) for states in (first, second)]
    near = {"atol": 2e-4 if role == "plan" else 1e-5}  # weighing promises makes rounding larger
    play(made, first[:2], "a")
    for t in range(4):  # one is two steps ahead of the other
        both = ask(made, ["b", "a"], [second[t], first[t + 2]])
        np.testing.assert_allclose(both[1], alone[0][t + 2], **near)
        np.testing.assert_allclose(both[0], alone[1][t], **near)
    made.reset(["a"], [""])
    np.testing.assert_allclose(ask(made, ["b", "a"], [second[4], first[0]])[1], alone[0][0], **near)
    np.testing.assert_allclose(play(made, second[5:], "b"), alone[1][5:], **near)
    # Else there would be nothing to forget. With windows of two steps, room is needed for the one to come.
    forgetful = length == 2 and role in ("id", "plan")
    fresh = play(policy(role, length=length), first[5:])
    assert np.allclose(fresh, alone[0][5:], atol=1e-4) == forgetful


def test_a_plan_is_not_made_of_rounding_where_nothing_promises_more():
    made = policy("plan")
    with torch.no_grad():
        made.module.heads["return"][3].weight.mul_(1e-5)
    states = episode(12)
    together = ask(made, [str(i) for i in range(12)], list(states))
    alone = np.stack([ask(made, ["x" + str(i)], [state])[0] for i, state in enumerate(states)])
    np.testing.assert_allclose(together, alone, atol=2e-4)


@pytest.mark.parametrize("role", ROLES)
def test_actions_stay_within_their_bounds_and_are_choices_where_there_are_some(role):
    made = policy(role)
    made.module.get_buffer("action_std").fill_(1e4)
    answers = play(made, episode() * 1e6)
    assert (np.abs(answers[:, 0]) == 0.5).any() or role == "plan"  # which averages
    assert np.abs(answers[:, 0]).max() <= 0.5
    assert answers[:, 1].max() <= 1.0
    assert set(play(discrete(role), episode(40)).ravel()) <= set(range(5))


def test_what_a_plan_tries_can_be_done_and_is_always_the_same():
    first, again = (policy("plan")._candidates(torch.tensor([[9.0, -9.0], [0.1, 0.0]])) for _ in range(2))
    assert torch.equal(first, again)
    assert (first[..., 0].abs() <= 0.5).all()
    assert (first[..., 1] <= 1.0).all()
    torch.testing.assert_close(first[:, 0], torch.tensor([[0.5, -9.0], [0.1, 0.0]]))
    assert discrete("plan")._candidates(torch.zeros(2, 1))[1, :, 0].tolist() == [0, 1, 2, 3, 4]


def test_roles_that_a_model_cannot_play_are_refused():
    with pytest.raises(ConfigError, match=r"'mine': expected returns in .* for role 'rcbc', got none; learn from"):
        policy("bc", (STATE, ACTION)).in_role("rcbc")
    blind = policy(FILL, (STATE, RETURN))
    for role in ROLES:
        with pytest.raises(ConfigError, match=r"actions? .*got none"):
            blind.in_role(role)
    with pytest.raises(ConfigError, match=r"'mine': expected actions in one training episode or more") as told:
        ask(blind, "a", episode(1))
    assert told.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"got 'plam'; did you mean 'plan'"):
        policy().in_role("plam")
    assert policy().in_role("auto").role == "rcbc"
    assert policy("bc", (STATE, ACTION)).in_role("auto").role == "bc"


@pytest.mark.parametrize("make", [policy, discrete])
def test_saved_and_loaded_plays_the_same(tmp_path, make):
    for role in ROLES:
        made = make(role)
        made.save(tmp_path / "p.safetensors")
        again = load_policy(tmp_path / "p.safetensors")
        assert (again.meta, again.role) == (made.meta, role)
        assert again.provenance == {**made.provenance, "return_range": list(SPAN)}
        np.testing.assert_allclose(play(again, episode()), play(made, episode()), atol=1e-6)
        for name, value in made.module.state_dict().items():
            assert torch.equal(again.module.state_dict()[name], value)


def test_a_model_without_actions_is_saved_and_read(tmp_path):
    made = policy(FILL, (STATE,))
    made.save(tmp_path / "p.safetensors")
    again = load_model(tmp_path / "p.safetensors")
    given = {"state": torch.from_numpy(episode(4))}
    assert torch.equal(
        told(again, "state", given, state=[1, 0, 0, 1]), told(made.module, "state", given, state=[1, 0, 0, 1])
    )
    with pytest.raises(ConfigError, match="dynamics: expected actions"):
        Dynamics(again)
    assert load_policy(tmp_path / "p.safetensors").role == FILL


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("policies") / "sound.safetensors"
    policy("rcbc").save(path)
    discrete("rcbc").save(path.with_stem("discrete"))
    return path


def changed(sound, path, record=None, tensors=None):
    whole = load_checkpoint(sound)
    content, values = json.loads(json.dumps(whole.record)), dict(whole.values)
    if record:
        record(content)
    if tensors:
        tensors(values)
    save_checkpoint(path, "mtm", values, content)
    return path


def put(*keys, to):
    def change(record):
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = to

    return change


M = "model", "modalities"
LIES = {
    "nothing": lambda record: record.clear(),
    "no model": lambda record: record.pop("model"),
    "no target": lambda record: record.pop("target"),
    "no range": lambda record: record.pop("return_range"),
    "meta": put("meta", to=7),
    "chunk": put("meta", "chunk", to=2),
    "camera": put("meta", "observation", "cameras", to={"front": [16, 16]}),
    "state size": put("meta", "observation", "state", to=[["joints", 4]]),
    "huge state": put("meta", "observation", "state", to=[["joints", 10**18]]),
    "action size": put("meta", "action", "size", to=3),
    "bounds": put("meta", "action", "low", to=[0.0]),
    "NaN bounds": put("meta", "action", "low", to=[float("nan"), 0.0]),
    "crossed bounds": put("meta", "action", "low", to=[2.0, 0.0]),
    "choices": put("meta", "action", "choices", to=5),
    "modalities": put(*M, to=[]),
    "no modalities": put(*M, to=7),
    "many modalities": lambda record: record["model"]["modalities"].extend(
        [{"name": f"m{i}", "size": 1} for i in range(10_000)]
    ),
    "other modality": put(*M, 1, "name", to="reward"),
    "dotted modality": put(*M, 1, "name", to="a.b"),
    "same modality twice": put(*M, 1, "name", to="state"),
    "unknown key": put(*M, 0, "colour", to="red"),
    "size as text": put(*M, 0, "size", to="3"),
    "fractional size": put(*M, 0, "size", to=3.0),
    "kind": put(*M, 0, "kind", to="words"),
    "bins": put(*M, 0, to={"name": "state", "size": 3, "kind": "bins", "classes": 10**12}),
    "huge size": put(*M, 0, "size", to=10**12),
    "fractional length": put("model", "sizes", "length", to=4.0),
    "short": put("model", "sizes", "length", to=1),
    "heads": put("model", "sizes", "heads", to=3),
    "depth": put("model", "sizes", "encoder", to=10**12),
    "width": put("model", "sizes", "dim", to=10**12),
    "dropout": put("model", "sizes", "dropout", to="much"),
    "role": put("role", to="king"),
    "role to choose": put("role", to="auto"),
    "role in a list": put("role", to=["bc"]),
    "no role": put("role", to=FILL),
    "target": put("target", to="high"),
    "endless target": put("target", to=10**400),
    "NaN target": put("target", to=float("nan")),
    "one end": put("return_range", to=[1.0]),
    "endless range": put("return_range", to=[0.0, float("inf")]),
}


@pytest.mark.faults
@pytest.mark.parametrize("lie", LIES)
def test_records_that_lie_are_refused(sound, tmp_path, lie):
    path = changed(sound, tmp_path / "liar.safetensors", record=LIES[lie])
    for read in (load_policy, load_model):
        with pytest.raises(CheckpointError, match=r"liar\.safetensors"):
            read(path)


@pytest.mark.faults
@pytest.mark.parametrize("choices", [None, 1, 4, 10**13])
def test_choices_are_those_of_the_model(sound, tmp_path, choices):
    record = put("meta", "action", "choices", to=choices)
    with pytest.raises(CheckpointError, match=r"liar\.safetensors"):
        load_policy(changed(sound.with_stem("discrete"), tmp_path / "liar.safetensors", record=record))


@pytest.mark.faults
@pytest.mark.parametrize("read", [load_policy, load_model])
def test_a_small_file_that_says_it_is_large_costs_nothing(sound, tmp_path, read):
    def large(record):
        record["model"]["sizes"].update(dim=8192, heads=2, length=4096)

    path = changed(sound, tmp_path / "large.safetensors", record=large)  # would be 6 GB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="for tensor"):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


@pytest.mark.faults
@pytest.mark.parametrize("read", [load_policy, load_model])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(extra=torch.zeros(1)), "no tensor 'extra'"),
        (lambda v: v.pop("hidden.state"), "a tensor 'hidden.state'"),
        (lambda v: v.update({"hidden.state": torch.zeros(9)}), r"\(16,\) for tensor 'hidden.state', got F32 \(9,\)"),
        (lambda v: v.update({"hidden.state": torch.zeros(16, dtype=torch.float64)}), "got F64"),
        (lambda v: v["state_std"].fill_(float("inf")), "finite numbers in 'state_std'"),
        (lambda v: v["hidden.state"].fill_(float("nan")), "finite numbers in 'hidden.state'"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(sound, tmp_path, read, change, message):
    with pytest.raises(CheckpointError, match=message):
        read(changed(sound, tmp_path / "bad.safetensors", tensors=change))


@pytest.mark.faults
def test_a_model_is_not_read_from_another_policy(tmp_path):
    from offbook.learning.cloning import ClonedPolicy
    from offbook.learning.networks import CloningNetwork

    meta = policy().meta
    network = CloningNetwork(meta.observation, meta.action, chunk=1, hidden=8, depth=1, dropout=0.0)
    ClonedPolicy(network, meta, {}).save(tmp_path / "bc.safetensors")
    with pytest.raises(CheckpointError, match=r"bc\.safetensors: expected .*mtm|masked trajectory model"):
        load_model(tmp_path / "bc.safetensors")
    with pytest.raises(CheckpointError, match="neither"):
        load_model(tmp_path / "nothing")


def test_dynamics_ask_the_model_the_right_question():
    module = build()
    dynamics, states, actions = Dynamics(module), torch.from_numpy(episode(4)), torch.rand(3, 2)
    given = {"state": torch.cat([states[:3], torch.zeros(1, 3)]), "return": torch.zeros(4, 1),
             "action": torch.cat([actions, torch.zeros(1, 2)])}  # fmt: skip
    wanted = told(module, "state", given, state=[1, 1, 1, 0], action=[0, 0, 1, 0])[3]
    assert torch.allclose(dynamics.forward(states[None, :3], actions[None])[0], wanted, atol=1e-6)
    between = told(module, "action", {**given, "state": states}, state=[1] * 4)[:3]
    assert torch.allclose(dynamics.inverse(states[None])[0], between, atol=1e-6)
    with pytest.raises(ConfigError, match="at most 4 steps, got 5"):
        dynamics.forward(states[None], torch.zeros(1, 4, 2))
    with pytest.raises(ConfigError, match="at most 4 steps, got 5"):
        dynamics.inverse(torch.zeros(1, 5, 3))
