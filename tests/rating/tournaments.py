"""Made-up tournaments, and an independent reference that knows nothing of how ours are fitted."""

from collections import Counter

import numpy as np
from scipy.optimize import minimize

from offbook.rating.bradley_terry import Comparisons
from offbook.rating.records import Vote

CHOICES = ("left", "right", "tie")


def chances(d, nu):
    """Of left, right and tie, for differences d; shape (n, 3)."""
    weight = np.stack([np.exp(d / 2), np.exp(-d / 2), np.full(len(d), 2 * nu)], axis=1)
    return weight / weight.sum(axis=1, keepdims=True)


def draw(rng, d, nu):
    return (rng.random((len(d), 1)) > chances(d, nu).cumsum(axis=1)).sum(axis=1).clip(0, 2)


def random_pairs(rng, systems, n):
    left = rng.integers(systems, size=n)
    return left, (left + rng.integers(1, systems, size=n)) % systems


def comparisons(left, right, outcome, systems=None, style=None):
    left, right, outcome = (np.asarray(each, np.int64) for each in (left, right, outcome))
    style = np.zeros((len(left), 0)) if style is None else np.asarray(style, np.float64).reshape(len(left), -1)
    count = systems or int(max(left.max(), right.max())) + 1
    return Comparisons(
        systems=tuple(f"s{i:03}" for i in range(count)),
        left=left,
        right=right,
        outcome=outcome,
        features=tuple(f"f{i}" for i in range(style.shape[1])),
        style=style,
    )


def tournament(seed, systems, n, gamma=0.3, nu=0.4, beta=()):
    """Truth (theta, gamma, log nu, betas) and comparisons drawn from it."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(0, 1, systems)
    theta -= theta.mean()
    left, right = random_pairs(rng, systems, n)
    style = rng.uniform(-1, 1, (n, len(beta)))
    outcome = draw(rng, theta[left] - theta[right] + gamma + style @ np.asarray(beta, float), nu)
    truth = np.concatenate([theta, [gamma, np.log(nu)], beta])
    return truth, comparisons(left, right, outcome, systems, style)


def reference(data, weights=None, prior_sd=2.0):
    """The parameters by a general optimiser on the likelihood of single votes: only theta has a prior."""
    systems = len(data.systems)
    weights = np.ones(len(data.left)) if weights is None else weights

    def loss(params):
        theta, (gamma, log_nu), beta = params[:systems], params[systems : systems + 2], params[systems + 2 :]
        strong = np.exp(theta[data.left] + gamma + data.style @ beta)
        other = np.exp(theta[data.right])
        tie = 2 * np.exp(log_nu) * np.sqrt(strong * other)
        chosen = np.select([data.outcome == 0, data.outcome == 1], [strong, other], tie)
        likelihood = weights @ np.log(chosen / (strong + other + tie))
        return (theta @ theta) / (2 * prior_sd**2) - likelihood

    start = np.zeros(systems + 2 + len(data.features))
    return minimize(loss, start, jac="3-point", method="BFGS", options={"gtol": 1e-6}).x


def votes_of(data, raters, items, **common):
    """The comparisons as votes; a pair is an item and two systems, and another one where its rater had it before."""
    found, judged = [], Counter()
    for n in range(len(data.left)):
        left, right = data.systems[data.left[n]], data.systems[data.right[n]]
        pair = "/".join([f"i{items[n]}", *sorted((left, right))])
        judged[raters[n], pair] += 1
        pair += f"/{judged[raters[n], pair]}"
        found.append(
            Vote(
                **{"study": "s", "id": f"{n:06}", "created": "2026-01-31T12:00:00+00:00"}
                | {"pair": pair, "item": f"i{items[n]}"}
                | {"rater": f"r{raters[n]:03}", "left": left, "right": right, "choice": CHOICES[data.outcome[n]]}
                | common
            )
        )
    return found
