"""The losses beside TorchRL's, and beside the papers' equations where TorchRL departs from them."""

import copy
import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import distributions, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import CQLLoss, IQLLoss, TD3BCLoss
from torchrl.objectives.utils import ValueEstimators

from offbook.learning.actor_critic import Actor, ActorCritic, _log_sum_exp, cql_loss, iql_loss, td3bc_loss

# Who updates targets is our own affair.
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

BATCH, STATE, ACTION, GAMMA = 32, 5, 3, 0.9
LOSSES = {
    # So steep that some of the weights are cut at the largest.
    "iql": partial(iql_loss, gamma=GAMMA, expectile=0.8, beta=40.0, max_weight=100.0),
    "td3bc": partial(td3bc_loss, gamma=GAMMA, alpha=2.5, policy_delay=1, policy_noise=0.2, noise_clip=0.3),
    "cql": partial(cql_loss, gamma=GAMMA, alpha=5.0, samples=4),
}
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)


def made(algorithm, **changes):
    """A model whose target networks differ from the trained ones, as after some training."""
    torch.random.default_generator.manual_seed(1)
    actor = Actor(algorithm, STATE, ACTION, 16, 2)
    if algorithm == "iql":
        nn.init.uniform_(actor.log_std, -1, 0.5)
    model = ActorCritic(actor, partial(LOSSES[algorithm], **changes), target_rate=0.1)
    if algorithm == "cql":
        nn.init.constant_(model.log_temperature, -0.7)
    for name, parameter in model.named_parameters():
        if name.startswith("target"):
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def drawn():
    rng = torch.Generator().manual_seed(2)
    return {
        "state": torch.randn(BATCH, STATE, generator=rng),
        "next_state": torch.randn(BATCH, STATE, generator=rng),
        "action": 1.98 * torch.rand(BATCH, ACTION, generator=rng) - 0.99,
        "reward": torch.randn(BATCH, generator=rng),
        "terminated": (torch.rand(BATCH, generator=rng) < 0.3).float(),
    }


def losses(model, batch, seed=3):
    model.zero_grad()
    total, metrics = model(batch, torch.Generator().manual_seed(seed))
    total.backward()
    return metrics


class Joined(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, state, action):
        return self.net(torch.cat([state, action], -1))


class Gaussian(nn.Module):
    def __init__(self, actor):
        super().__init__()
        self.actor = actor

    def forward(self, state):
        if self.actor.algorithm == "iql":
            return self.actor(state), self.actor.log_std.exp().expand(len(state), ACTION)
        mean, log_std = self.actor.mlp(state).chunk(2, -1)
        return mean, log_std.exp()


def theirs(kind, model, actor, batch, **settings):
    """TorchRL's loss with our weights; its `done` also counts steps after which an episode was merely cut."""
    critics = [ValueOperator(Joined(net), in_keys=["observation", "action"]) for net in model.critics.each]
    targets = [ValueOperator(Joined(net), in_keys=["observation", "action"]) for net in model.target_critics.each]
    loss = kind(actor, critics, loss_function="l2", **settings)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    loss.target_qvalue_network_params.data.copy_(TensorDict.from_modules(*targets, as_module=True).data)
    done = torch.ones(BATCH, 1, dtype=torch.bool)
    following = {"observation": batch["next_state"], "reward": batch["reward"][:, None], "done": done}
    following["terminated"] = batch["terminated"][:, None].bool()
    return loss, TensorDict(
        {"observation": batch["state"], "action": batch["action"], "next": following}, batch_size=[BATCH]
    )


def same_gradients(params, modules, prefix):
    """The gradients of TorchRL's parameters are those of ours, of which there may be several stacked."""
    grads = {name: p.grad for name, p in params.flatten_keys(".").items() if isinstance(p, nn.Parameter)}
    ours = [dict(module.named_parameters()) for module in modules]
    assert grads.keys() == {prefix + name for name in ours[0]}
    for name in ours[0]:
        mine = torch.stack([each[name].grad for each in ours])
        assert mine.abs().sum() > 0
        close(grads[prefix + name].reshape(mine.shape), mine)


def gaussian(actor, kind):
    module = TensorDictModule(Gaussian(actor), in_keys=["observation"], out_keys=["loc", "scale"])
    return ProbabilisticActor(module, in_keys=["loc", "scale"], distribution_class=kind)


def test_implicit_q_learning_is_torchrls():
    model, batch = made("iql"), drawn()
    other = copy.deepcopy(model)
    metrics = losses(model, batch)
    assert 1 < metrics["advantage_weight"] < 100
    value = ValueOperator(other.value, in_keys=["observation"])
    settings = {"value_network": value, "temperature": 40.0, "expectile": 0.8}
    loss, data = theirs(IQLLoss, other, gaussian(other.actor, IndependentNormal), batch, **settings)
    found = loss(data)
    for name, ours in (("loss_actor", "actor_loss"), ("loss_qvalue", "critic_loss"), ("loss_value", "value_loss")):
        close(found[name], metrics[ours])
    sum(found[name] for name in ("loss_actor", "loss_qvalue", "loss_value")).backward()
    same_gradients(loss.actor_network_params, [model.actor], "module.0.module.actor.")
    same_gradients(loss.qvalue_network_params, model.critics.each, "module.net.")
    same_gradients(loss.value_network_params, [model.value], "module.")


def test_td3_with_cloning_is_torchrls():
    model, batch = made("td3bc"), drawn()
    other = copy.deepcopy(model)
    metrics = losses(model, batch)
    actor = TensorDictModule(other.actor, in_keys=["observation"], out_keys=["action"])
    settings = {"bounds": (-1.0, 1.0), "policy_noise": 0.2, "noise_clip": 0.3, "alpha": 2.5}
    loss, data = theirs(TD3BCLoss, other, actor, batch, **settings)
    targets = TensorDict.from_module(TensorDictModule(other.target_actor, in_keys=["a"], out_keys=["b"]))
    loss.target_actor_network_params.data.copy_(targets.data)
    # Their noise is the first that is drawn from the default generator, ours from the one that is handed over.
    torch.random.default_generator.manual_seed(3)
    found = loss(data)
    for name, ours in (("loss_actor", "actor_loss"), ("loss_qvalue", "critic_loss"), ("bc_loss", "cloning_loss")):
        close(found[name], metrics[ours])
    (found["loss_actor"] + found["loss_qvalue"]).backward()
    same_gradients(loss.actor_network_params, [model.actor], "module.")
    same_gradients(loss.qvalue_network_params, model.critics.each, "module.net.")


def test_conservative_q_learning_is_torchrls_where_that_follows_the_paper():
    # TorchRL adds up one action of each kind at a time, not all 3 N, and values those drawn at s' in s', not in s. With
    # N = 1 and s' = s that makes no difference but the logarithm of the number of actions, which it leaves out.
    model, batch = made("cql", samples=1), drawn()
    batch["next_state"] = batch["state"]
    other = copy.deepcopy(model)
    metrics = losses(model, batch)
    settings = {"num_random": 1, "min_q_weight": 5.0, "target_entropy": -float(ACTION), "alpha_init": math.exp(-0.7)}
    loss, data = theirs(CQLLoss, other, gaussian(other.actor, TanhNormal), batch, **settings)
    torch.random.default_generator.manual_seed(3)
    error, _ = loss.q_loss(data)
    penalty, _ = loss.cql_loss(data)
    actor, drawn_with = loss.actor_loss(data)
    temperature, _ = loss.alpha_loss(data.update(drawn_with))
    close(metrics["critic_loss"], error + penalty - 5 * 2 * math.log(3))
    close(metrics["actor_loss"], actor)
    (error + penalty + actor + temperature).backward()
    close(model.log_temperature.grad, loss.log_alpha.grad)
    same_gradients(loss.actor_network_params, [model.actor], "module.0.module.actor.")
    same_gradients(loss.qvalue_network_params, model.critics.each, "module.net.")


def test_conservative_q_learning_is_the_papers():
    model, batch = made("cql"), drawn()
    metrics = losses(model, batch)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    rng = torch.Generator().manual_seed(3)

    def policy(state):
        mean, log_std = model.actor.mlp(state).chunk(2, 1)
        normal = distributions.Independent(distributions.Normal(mean, log_std.exp()), 1)
        return distributions.TransformedDistribution(normal, distributions.TanhTransform(cache_size=1)), mean, log_std

    def act(state):
        law, mean, log_std = policy(state)
        action = torch.tanh(mean + log_std.exp() * torch.randn(mean.shape, generator=rng))
        return action, law.log_prob(action)

    state, after, samples = batch["state"], batch["next_state"], 4
    with torch.no_grad():
        target = model.target_critics(after, act(after)[0]).min(0).values
        target = batch["reward"] + GAMMA * (1 - batch["terminated"]) * target
        even = 2 * torch.rand(BATCH * samples, ACTION, generator=rng) - 1
        kinds = [(even, torch.full((len(even),), ACTION * math.log(0.5)))]
        kinds += [act(seen.repeat_interleave(samples, 0)) for seen in (state, after)]
    total = 0.0
    for critic in model.critics.each:
        value = critic(torch.cat([state, batch["action"]], 1))[:, 0]
        total = total + (target - value).pow(2).mean()
        for row in range(BATCH):
            own = slice(row * samples, (row + 1) * samples)
            ratio = [(critic(torch.cat([state[[row] * samples], a[own]], 1))[:, 0] - d[own]).exp() for a, d in kinds]
            total = total + 5.0 * (torch.cat(ratio).mean().log() - value[row]) / BATCH
    close(metrics["critic_loss"], total)
    action, log_prob = act(state)
    for name, parameter in model.critics.named_parameters():
        close(torch.autograd.grad(total, parameter, retain_graph=True)[0], grads[f"critics.{name}"])
    loss = (math.exp(-0.7) * log_prob - model.critics(state, action).min(0).values).mean()
    close(metrics["actor_loss"], loss)
    for name, parameter in model.actor.named_parameters():
        close(torch.autograd.grad(loss, parameter, retain_graph=True)[0], grads[f"actor.{name}"])


def test_the_estimate_of_the_sum_over_all_actions_is_right():
    # exp(q) = exp(k a) on [-1, 1] integrates to 2 sinh(k) / k for each entry of an action.
    model = made("cql")

    class Linear(nn.Module):
        def forward(self, state, action):
            return (0.7 * action.sum(1)).expand(2, -1)

    model.critics = Linear()
    state = torch.zeros(4, STATE)
    found = _log_sum_exp(model, state, state + 1, 20_000, ACTION, torch.Generator().manual_seed(0))
    right = torch.full((2, 4), ACTION * math.log(2 * math.sinh(0.7) / 0.7))
    torch.testing.assert_close(found, right, rtol=0.02, atol=0)


@pytest.mark.parametrize("algorithm", LOSSES)
def test_each_part_of_the_loss_moves_its_own_network(algorithm):
    model = made(algorithm)
    _, metrics = model(drawn(), torch.Generator().manual_seed(0))
    parts = {"actor_loss": "actor.", "critic_loss": "critics.", "value_loss": "value."}
    for part in metrics.keys() & parts.keys():
        names, parameters = zip(*[pair for pair in model.named_parameters() if pair[1].requires_grad], strict=True)
        grads = torch.autograd.grad(metrics[part], parameters, allow_unused=True, retain_graph=True)
        assert {name for name, grad in zip(names, grads, strict=True) if grad is not None} == {
            name for name in names if name.startswith(parts[part])
        }


@pytest.mark.parametrize(("algorithm", "every"), [("iql", 1), ("td3bc", 2), ("cql", 1)])
def test_copies_follow_the_weights_of_finished_steps(algorithm, every):
    model = made(algorithm)
    model.move_every = every
    pairs = [(model.target_critics, model.critics)]
    pairs += [(model.target_actor, model.actor)] if algorithm == "td3bc" else []
    expected = [[kept.clone() for kept in target.parameters()] for target, _ in pairs]
    for step in range(1, 6):
        model(drawn(), torch.Generator().manual_seed(step))
        for (target, online), wanted in zip(pairs, expected, strict=True):
            for kept, mine, trained in zip(target.parameters(), wanted, online.parameters(), strict=True):
                torch.testing.assert_close(kept.data, mine)
                trained.data += 0.1  # what an optimiser does after the call
                if step % every == 0:
                    mine.lerp_(trained.data, 0.1)
    assert int(model.steps) == 5


def test_squashed_densities_stay_finite_far_out():
    model = made("cql")
    nn.init.constant_(model.actor.mlp[-1].bias, 40.0)
    action, density = model.actor.sample(torch.zeros(2, STATE), torch.zeros(2, ACTION))
    assert (action == 1).all()
    assert torch.isfinite(density).all()
