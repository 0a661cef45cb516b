"""Networks over chains of trials: what they may see, what they are worth, and that policies see just that."""

import functools
import itertools
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, PolicyMeta
from offbook.data.chains import Trial
from offbook.errors import ConfigError
from offbook.learning.hindsight import VALUES, HindsightNetwork, HindsightSizes, hindsight_loss
from offbook.learning.hindsight_presets import decision_transformer, tiny
from offbook.learning.trying import HindsightPolicy
from offbook.sim.adapters import make
from offbook.sim.play import play
from offbook.sim.trials import TRIAL

BOX = ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0))
PUSH = ActionSpec(size=1, low=(0.0,), high=(1.0,), choices=2)
_gelu = functools.partial(functional.gelu, approximate="tanh")
LAYOUTS = ("split", "fused")


def _network(action=BOX, state=3, trials=4, steps=30, **sizes):
    torch.manual_seed(0)
    network = HindsightNetwork(state, action, trials, steps, HindsightSizes(width=16, heads=2, **sizes)).eval()
    for parameter in network.parameters():  # so that everything has an influence
        nn.init.normal_(parameter, std=0.3)
    return network


def _chains(lengths, batch=2, state=3, seed=0):
    rng = np.random.default_rng(seed)
    time = sum(lengths)
    trial = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(n) for n in lengths])
    actions = rng.uniform(-1, 1, (batch, time, 2))
    values = {
        "target": rng.normal(size=(batch, time, 1)), "state": rng.normal(size=(batch, time, state)), "action": actions,
        "reward": rng.normal(size=(batch, time, 1)), "done": rng.random((batch, time, 1)) < 0.2,
    }  # fmt: skip
    chains = {name: torch.tensor(of, dtype=torch.float32) for name, of in values.items()}
    places = {"trial": trial, "time": step, "valid": np.ones(time, bool)}
    return {**chains, **{name: torch.from_numpy(np.stack([of] * batch)) for name, of in places.items()}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VALUES)
def test_a_step_sees_what_it_has_and_what_came_before(layout, name):
    network, chains, at = _network(tokens=layout), _chains([4, 5]), 5
    before = network(chains)
    changed = {key: of.clone() for key, of in chains.items()}
    changed[name][:, at] = 1 - changed[name][:, at]
    differs = (network(changed) - before).abs().amax((0, 2, 3)) > 1e-6
    first = at if name in ("target", "state") else at + 1
    assert not differs[:first].any()
    assert differs[first:].all()


def test_the_first_trial_matters_to_the_second():
    network, chains = _network(), _chains([4, 5])
    changed = {key: of.clone() for key, of in chains.items()}
    changed["reward"][:, 0] += 1
    assert ((network(changed) - network(chains)).abs().amax((0, 2, 3))[4:] > 1e-6).all()


def test_one_trial_and_its_own_return_is_a_decision_transformer():
    network = _network(trials=1, tokens="split", head="mse", values=("target", "state", "action"), layers=2)
    chains = _chains([7], batch=3)
    chains["valid"][2, 5:] = False
    w = dict(network.named_parameters())
    embed = {
        n: chains[n] @ w[f"stream.embed.{n}.weight"].T + w[f"stream.embed.{n}.bias"]
        for n in ("target", "state", "action")
    }
    time = w["time.weight"][:7] + w["number.weight"][0]
    h = torch.stack([of + time for of in embed.values()], 2).reshape(3, 21, 16)

    def norm(x, name):
        return functional.layer_norm(x, (16,), w[f"{name}.weight"], w.get(f"{name}.bias"))

    def linear(x, name):
        return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    mask = torch.ones(21, 21).tril() == 0
    for layer in ("backbone.layers.0", "backbone.layers.1"):
        x = norm(h, f"{layer}.norm1")
        q = linear(x, f"{layer}.q").reshape(3, 21, 2, 8).transpose(1, 2)
        k, v = (of.reshape(3, 21, 2, 8).transpose(1, 2) for of in linear(x, f"{layer}.kv").chunk(2, -1))
        scores = (q @ k.transpose(2, 3) / math.sqrt(8)).masked_fill(mask, -math.inf)
        h = h + linear((scores.softmax(3) @ v).transpose(1, 2).reshape(3, 21, 16), f"{layer}.out")
        h = h + linear(_gelu(linear(norm(h, f"{layer}.norm2"), f"{layer}.up")), f"{layer}.down")
    told = linear(norm(h, "backbone.norm")[:, 1::3], "output")
    error = (told - chains["action"]).square().mean(2)[chains["valid"]].mean()
    assert hindsight_loss(network, network(chains), chains, "all").item() == pytest.approx(error.item(), rel=1e-5)


def test_the_preset_for_single_trials_reads_what_a_decision_transformer_does():
    config = decision_transformer(tiny())
    assert (config.n_trials, config.relabel) == ((1, 1), "own")
    assert config.model.values == ("target", "state", "action")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_that_compute_again_give_the_same_on_a_long_chain(layout):
    chains = _chains([500, 524] if layout == "fused" else [200, 210], batch=1)
    found = []
    for remat in ("none", "layer"):
        network = _network(tokens=layout, remat=remat, steps=600).train()
        loss = hindsight_loss(network, network(chains), chains, "all")
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in network.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4)


def test_attention_by_blocks_is_the_plain_one_on_a_long_chain():
    chains = _chains([512] * 4, batch=1)
    found = []
    for remat, way in (("attn", nullcontext()), ("none", sdpa_kernel(SDPBackend.MATH))):
        network = _network(remat=remat, steps=512).train()
        with way:
            loss = hindsight_loss(network, network(chains), chains, "all")
            loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in network.named_parameters()}))
    (ours, grads), (plain, wanted) = found
    assert ours == pytest.approx(plain, abs=1e-4)
    for name, grad in grads.items():
        assert torch.allclose(grad, wanted[name], atol=1e-4), name


@pytest.mark.parametrize("lengths", [[3, 40, 7, 20, 5], [28, 40, 35, 34, 36]])
def test_chains_of_unequal_lengths_are_told_as_if_alone(lengths):
    network, chains = _network(), _chains([40], batch=20)
    for row, stop in enumerate(lengths * 4):
        chains["valid"][row, stop:] = False
    told = network(chains)
    for row in range(20):
        stop = int(chains["valid"][row].sum())
        alone = network({name: of[row : row + 1, :stop] for name, of in chains.items()})
        assert torch.allclose(told[row, :stop], alone[0], atol=1e-5)


def test_the_loss_may_count_the_last_trial_alone():
    network, chains = _network(), _chains([4, 5])
    chains["valid"][1, 7:] = False
    errors = network.errors(network(chains), chains["action"])
    last = torch.cat([errors[0, 4:], errors[1, 4:7]]).mean()
    assert hindsight_loss(network, network(chains), chains, "last").item() == pytest.approx(last.item())


def test_draws_follow_what_is_told():
    network = _network(bins=5)
    told = torch.tensor([[[0.0, 0.0, 2.0, 0.0, -30.0], [0.0, -30.0, -30.0, -30.0, -30.0]]]).expand(4000, -1, -1)
    uniform = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    drawn = network.draw(told, uniform)
    shares = [(drawn[:, 0] == value).float().mean().item() for value in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    assert shares == pytest.approx(torch.softmax(told[0, 0], 0).tolist(), abs=0.03)
    assert (drawn[:, 1] == -1.0).all()
    gaussian = _network(head="gaussian")
    told = torch.tensor([[[0.3, -0.7], [0.0, -5.0]]]).expand(4000, -1, -1)
    drawn = gaussian.draw(told, uniform)
    assert drawn[:, 0].mean().item() == pytest.approx(0.3, abs=0.03)
    assert drawn[:, 0].std().item() == pytest.approx(math.exp(-0.7), rel=0.05)
    assert _network(head="mse").draw(told[..., :1], uniform)[0].tolist() == pytest.approx([0.3, 0.0])


@pytest.mark.parametrize("head", ["bins", "gaussian", "mse"])
def test_errors_are_least_where_the_action_is_told(head):
    network, chains = _network(head=head), _chains([6])
    told = network(chains).detach().requires_grad_()
    optimiser = torch.optim.Adam([told], lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        network.errors(told, chains["action"]).sum().backward()
        optimiser.step()
    middle = torch.full((2, 2), 0.5)
    step = 2 / (network.sizes.bins - 1)
    assert torch.allclose(network.draw(told[:, 3], middle), chains["action"][:, 3], atol=step / 2 + 1e-3)


@pytest.mark.parametrize("action", [BOX, PUSH])
def test_errors_of_classes_are_cross_entropies(action):
    network = _network(action=action, bins=7)
    entries, classes = (1, 2) if action is PUSH else (2, 7)
    chosen = torch.randint(0, classes, (3, 5, entries), generator=torch.Generator().manual_seed(0))
    told = 5 * torch.randn(3, 5, entries, classes, generator=torch.Generator().manual_seed(1))
    found = network.errors(told, chosen.float() if action is PUSH else chosen / 3 - 1)
    want = functional.cross_entropy(told.movedim(3, 1), chosen, reduction="none").mean(2)
    assert torch.allclose(found, want, atol=1e-5)


def test_a_fused_token_is_the_sum_of_its_values():
    chains, marks = _chains([4, 5]), torch.randn(2, 9, 16)
    stream = _network(tokens="fused").stream
    before = {name: functional.pad(chains[name][:, :-1], (0, 0, 1, 0)) for name in ("action", "reward", "done")}
    read = {**{name: chains[name] for name in ("target", "state")}, **before}
    want = marks + sum(stream.embed[name](of) for name, of in read.items())
    assert torch.allclose(stream(chains, marks), want, atol=1e-5)


def _policy(network, action, state, target=3.0):
    meta = PolicyMeta(name="p", observation=ObservationSpec(state=(("x", state), (TRIAL, 3))), action=action)
    return HindsightPolicy(network, meta, {"target": target, "seed": 0})


def _poles(count, trials):
    """Environments whose trials differ in length."""
    return [make("gym:CartPole-v1", trials=trials) for _ in range(count)]


def _pole_network(**sizes):
    return _network(action=PUSH, state=4, steps=200, **sizes)


def _pole(network, target=20.0):
    meta = PolicyMeta(name="p", observation=ObservationSpec(state=(("observation", 4), (TRIAL, 3))), action=PUSH)
    return HindsightPolicy(network, meta, {"target": target, "seed": 0})


class _Recompute:
    """The same policy without keys and values that are kept."""

    def __init__(self, policy):
        self.policy, self.meta = policy, policy.meta

    def reset(self, sessions, prompts):
        self.policy.reset(sessions, prompts)

    def infer(self, observation):
        for life in self.policy._lives.values():
            life.cached = 0
        return self.policy.infer(observation)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_keys_and_values_change_nothing(layout):
    network = _pole_network(tokens=layout, trials=3)
    envs = _poles(8, 3)
    told = []
    tell = network.tell
    network.tell = lambda x: told.append(tell(x)) or told[-1]
    episodes = []
    for policy in (_pole(network), _Recompute(_pole(network))):
        episodes.append(list(play(envs, policy, range(10))))
        told.append(None)
    split = told.index(None)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(told[:split], told[split + 1 : -1], strict=True))
    for a, b in zip(*episodes, strict=True):
        assert np.array_equal(a.fields["action"], b.fields["action"])
    lengths = {tuple(np.bincount(episode.fields[TRIAL][:-1, 0].astype(int))) for episode in episodes[0]}
    assert len(lengths) > 1  # sessions are at different places


def test_a_policy_sees_what_a_chain_of_its_own_trials_says():
    network = _pole_network(trials=3)
    [env], policy = _poles(1, 3), _pole(network)
    seen = []
    embed = network.embed
    network.embed = lambda chains: seen.append(chains) or embed(chains)
    [episode] = play([env], policy, [4])
    life = policy._lives["4"]
    leaf = episode.fields[TRIAL]
    starts = np.flatnonzero(leaf[:-1, 1] == 0)
    assert life.starts == starts.tolist()
    rewards = episode.rewards
    for begin, stop in zip(starts, [*starts[1:], len(rewards)], strict=True):
        earned = np.concatenate([[0.0], np.cumsum(rewards[begin : stop - 1])])
        assert np.allclose(life.rows["target"][begin:stop], 20.0 - earned)
        done = life.rows["done"][begin : stop - 1]
        assert not any(done)
    assert np.allclose(life.rows["reward"][:-1], rewards[:-1])
    reached = [bool(life.rows["done"][stop - 1]) for stop in starts[1:]]
    returns = [rewards[a:b].sum() for a, b in itertools.pairwise(starts)]
    assert reached == [one >= 20.0 for one in returns]
    last = seen[-1]
    assert last["trial"][0, -1] == 2
    assert last["time"][0, -1] == leaf[-2, 1]


def test_of_more_trials_than_it_has_learnt_from_the_last_are_in_view():
    network = _pole_network(trials=2)
    policy = _pole(network)
    [episode] = play(_poles(1, 5), policy, [1])
    leaf, life = episode.fields[TRIAL][:-1], policy._lives["1"]
    steps = [int((leaf[:, 0] == k).sum()) for k in range(5)]
    assert len(life) == steps[3] + steps[4]
    assert policy.dropped == 3


def test_what_was_recalled_is_as_if_it_had_been_lived():
    network = _network(trials=3, steps=16, state=2)
    meta = PolicyMeta(name="p", observation=ObservationSpec(state=(("position", 2), (TRIAL, 3))), action=BOX)

    def fresh():
        return HindsightPolicy(network, meta, {"target": 9.0, "seed": 0})

    env, lived = make("offbook:darkpoint", trials=3), fresh()
    [episode] = play([env], lived, [7])
    number = episode.fields[TRIAL][:-1, 0]
    state, action, rewards = (episode.fields["position"][:-1], episode.fields["action"], episode.rewards)
    trials = [Trial(state=state[number == k], action=action[number == k], reward=rewards[number == k]) for k in (0, 1)]
    told = fresh()
    told.reset(["7"], [""])
    told.recall("7", trials)
    rows = len(told._lives["7"])
    for name, values in told._lives["7"].rows.items():
        assert np.allclose(np.asarray(values, float), np.asarray(lived._lives["7"].rows[name][:rows], float), atol=1e-6)
    seen = np.concatenate([state[number == 2][0], [2, 0, 0]]).astype(np.float32)[None]
    told.infer(Observation(sessions=("7",), state=seen, images={}, time=np.zeros(1)))
    assert told._lives["7"].starts == lived._lives["7"].starts


@pytest.mark.parametrize("trials", [1, 2])
def test_only_a_policy_of_several_trials_is_moved_by_the_one_before(trials):
    network, told = _network(trials=trials, steps=16, state=2), []
    meta = PolicyMeta(name="p", observation=ObservationSpec(state=(("position", 2), (TRIAL, 3))), action=BOX)
    tell = network.tell
    network.tell = lambda x: told.append(tell(x)) or told[-1]
    for before in (0.1, 0.9):
        policy = HindsightPolicy(network, meta, {"target": 9.0, "seed": 0})
        policy.reset(["a"], [""])
        lived = np.full((5, 2), before, np.float32)
        policy.recall("a", [Trial(state=lived, action=-lived, reward=np.full(5, before))])
        for step in range(3):
            seen = np.array([[0.2, 0.3, 1, step, 0.5]], np.float32)
            policy.infer(Observation(sessions=("a",), state=seen, images={}, time=np.zeros(1)))
    same = [torch.equal(one, other) for one, other in zip(told[:3], told[3:], strict=True)]
    assert same == [trials == 1] * 3


def test_sessions_answer_alike_whoever_else_asks():
    network = _pole_network(trials=2)
    envs = _poles(5, 2)
    together = {e.seed: e.fields["action"] for e in play(envs, _pole(network), range(5))}
    for seed, actions in together.items():
        [alone] = play(envs[:1], _pole(network), [seed])
        assert np.array_equal(alone.fields["action"], actions)


def test_more_sessions_than_places_are_answered_all_the_same(monkeypatch):
    network = _pole_network(trials=2)
    seeds = range(6)
    envs = _poles(len(seeds), 2)
    expected = [e.fields["action"] for e in play(envs, _pole(network), seeds)]
    monkeypatch.setattr("offbook.learning.trying._SLOTS", 2)
    policy = _pole(network)
    for env, seed in zip(envs, seeds, strict=True):
        env.reset(seed=seed)
    policy.reset([str(seed) for seed in seeds], [""] * len(seeds))
    running = {seed: [env.reset(seed=seed)[0], []] for env, seed in zip(envs, seeds, strict=True)}
    while any(leaves is not None for leaves, _ in running.values()):
        for env, seed in zip(envs, seeds, strict=True):  # one by one, two places
            leaves, actions = running[seed]
            if leaves is None:
                continue
            state = np.concatenate([leaves["observation"], leaves[TRIAL]])[None].astype(np.float32)
            action = policy.infer(Observation(sessions=(str(seed),), state=state, images={}, time=np.zeros(1)))
            actions.append(action[0, 0])
            leaves, _, terminated, truncated, _ = env.step(int(action[0, 0, 0]))
            running[seed][0] = None if terminated or truncated else leaves
    assert len(policy._holders) == 2
    for (_, actions), wanted in zip(running.values(), expected, strict=True):
        assert np.array_equal(np.array(actions), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_a_trial_longer_than_any_room_the_last_steps_are_in_view(layout, capsys):
    network = _network(trials=1, steps=4, tokens=layout, head="mse")
    policy, rng = _policy(network, BOX, 3), np.random.default_rng(0)
    policy.reset(["a"], [""])
    kept = [1, 2, 3, 4, 2, 3, 4, 2, 3]  # steps in view: those after a cut, of which there is room for four, are two
    for step, count in enumerate(kept):
        state = np.concatenate([rng.normal(size=3), [0, step, 1.0 if step else 0.0]])[None].astype(np.float32)
        told = policy.infer(Observation(sessions=("a",), state=state, images={}, time=np.zeros(1)))
        life = policy._lives["a"]
        assert (len(life), life.starts) == (count, [count - 1 - step])
        # As if it had all been read at once, each step at its time in the trial.
        afresh = network(policy._windows([life], count))[0, -1]
        assert np.allclose(
            told[0, 0], network.draw(afresh[None], torch.zeros(1, 2))[0].clamp(-1, 1).detach(), atol=1e-5
        )
    assert policy.cut == 6
    assert policy.dropped == 0
    assert capsys.readouterr().err.count("longer than the 4 steps that it has room for") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": ("state",)}, "--model.values: expected target, state and any of action, reward, done"),
        ({"width": 30, "heads": 4}, "--model.width: expected a multiple of the heads, got 30"),
        ({"bins": 1}, "--model.bins: expected 2 to 65536, got 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(HindsightSizes(), **changes)
