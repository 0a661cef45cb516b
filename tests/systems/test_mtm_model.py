"""The masked trajectory model beside an independent reference, and what may and may not have an influence on it."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offbook.errors import ConfigError
from offbook.learning.masked_model import MaskedTrajectoryModel, Modality, Sizes, last_visible, masked_loss, packed
from offbook.learning.masked_patterns import PATTERNS, Shape, draw

SIZES = Sizes(length=4, dim=16, heads=2, encoder=2, decoder=1)
STATE, RETURN, ACTION = Modality(name="state", size=3), Modality(name="return", size=1), Modality(name="action", size=2)
CHANGES = [replace(STATE, residual=True), replace(RETURN, residual=True), ACTION]
KINDS = {
    "plain": [STATE, RETURN, ACTION],
    "changes": CHANGES,
    "discrete": [*CHANGES[:2], Modality(name="action", size=1, kind="index", classes=5)],
    "bins": [Modality(name=m.name, size=m.size, kind="bins", classes=7) for m in (STATE, RETURN, ACTION)],
    "states": CHANGES[:1],
}


def build(modalities, sizes=SIZES, seed=0):
    """A model whose every weight matters, those that begin as 0 and 1 too."""
    rng = torch.Generator().manual_seed(seed)
    model = MaskedTrajectoryModel(modalities, sizes)
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=rng)
    for m in modalities:
        if m.kind != "index":
            model.standardise(m.name, torch.rand(m.size, generator=rng), 0.5 + torch.rand(m.size, generator=rng))
        if m.residual:
            model.scale_changes(m.name, 0.6 + torch.rand(m.size, generator=rng))
    return model.eval()


def values(modalities, batch=9, length=4, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return {
        m.name: torch.randint(m.classes, (batch, length, 1), generator=rng) if m.kind == "index"
        else torch.randn(batch, length, m.size, generator=rng)
        for m in modalities
    }  # fmt: skip


def pattern(model, batch=9, name="auto", seed=2, length=4):
    shape = Shape(tokens=model.tokens, length=length, batch=batch)
    return draw(name, shape, torch.Generator().manual_seed(seed))


def nothing(model, batch=9):
    return {name: torch.zeros(batch, 4, tokens, dtype=torch.bool) for name, tokens in model.tokens.items()}


def close(a, b, tolerance=1e-5):
    return all(torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance) for name in a) and a.keys() == b.keys()


def reference(w, modalities, heads, data, visible):
    """One sample at a time, and of it the very tokens that are visible; every formula written out."""

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def stack(name, x):
        for i in range(sum(key.startswith(f"{name}.layers") and key.endswith("q.weight") for key in w)):
            at, h = f"{name}.layers.{i}", norm(f"{name}.layers.{i}.norm1", x)
            q, k, v = linear(f"{at}.q", h), *linear(f"{at}.kv", h).chunk(2, -1)
            found = []
            for of in range(heads):
                own = slice(of * x.shape[1] // heads, (of + 1) * x.shape[1] // heads)
                share = torch.softmax(q[:, own] @ k[:, own].T / math.sqrt(x.shape[1] / heads), -1)
                found.append(share @ v[:, own])
            x = x + linear(f"{at}.out", torch.cat(found, 1))
            x = x + linear(f"{at}.down", gelu(linear(f"{at}.up", norm(f"{at}.norm2", x))))
        return norm(f"{name}.norm", x)

    def place(t, dim):
        turns = [t / 10_000 ** (2 * i / dim) for i in range(dim // 2)]
        return torch.tensor([f(turn) / 2 for turn in turns for f in (math.sin, math.cos)])

    told = {m.name: [] for m in modalities}
    for b in range(len(data["state"])):
        tokens, seen, last, dim = [], [], {}, w["encoder.norm.weight"].shape[0]
        for m in modalities:
            x, before = data[m.name][b], torch.zeros(m.size)
            if m.kind != "index":
                x = (x - w[f"{m.name}_mean"]) / w[f"{m.name}_std"]
            for t in range(len(x)):
                before = x[t] if m.kind == "continuous" and visible[m.name][b, t, 0] else before
                last[m.name, t] = before
                for p in range(m.tokens):
                    feature = x[t]
                    if m.residual:
                        seen_at = [i for i in range(len(x)) if visible[m.name][b, i, 0]]
                        earlier, later = [i for i in seen_at if i < t][-1:], [i for i in seen_at if i > t][:1]
                        changes = [(x[t] - x[i]) / (t - i) for i in earlier] or [torch.zeros(m.size)]
                        changes += [(x[i] - x[t]) / (i - t) for i in later] or [torch.zeros(m.size)]
                        feature = torch.cat([x[t], *(change / w[f"{m.name}_change"] for change in changes)])
                    if m.kind != "continuous":
                        index = int(x[t]) if m.kind == "index" else int((x[t, p] + 4) / 8 * m.classes)
                        feature = torch.eye(m.classes)[min(max(index, 0), m.classes - 1)]
                    mark = w[f"encoder_mark.{m.name}"][p] + place(t, dim)
                    tokens.append((m, t, p, linear(f"embed.{m.name}", feature) + mark))
                    seen.append(bool(visible[m.name][b, t, p]))
        shown = [x for (*_, x), s in zip(tokens, seen, strict=True) if s]
        encoded, full, used = stack("encoder", torch.stack(shown)) if shown else None, [], 0
        for (m, t, p, _), s in zip(tokens, seen, strict=True):
            mark = w[f"decoder_mark.{m.name}"][p] + place(t, dim)
            full.append((encoded[used] if s else w[f"hidden.{m.name}"]) + mark)
            used += s
        decoded = stack("decoder", torch.stack(full))
        for (m, t, _, _), y in zip(tokens, decoded, strict=True):
            at = f"heads.{m.name}"
            y = linear(f"{at}.3", gelu(linear(f"{at}.1", norm(f"{at}.0", y))))
            if m.residual:
                whole, change = y[: m.size], y[m.size :] * w[f"{m.name}_change"]
                y = last[m.name, t] + change if bool(visible[m.name][b, : t + 1, 0].any()) else whole
            told[m.name].append(y)
    return {m.name: torch.stack(told[m.name]).unflatten(0, (-1, len(x), m.tokens)) for m in modalities}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_what_the_reference_says(kind):
    model, data = build(KINDS[kind]), values(KINDS[kind])
    for visible in (pattern(model), pattern(model, name="full_random"), nothing(model)):
        visible["state"][0] = False  # and a sample that knows nothing of states
        wanted = reference(model.state_dict(), KINDS[kind], 2, data, visible)
        assert close(model(data, visible), wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_values_have_no_influence(kind):
    model, data = build(KINDS[kind]), values(KINDS[kind])
    for name in PATTERNS:
        visible = pattern(model, name=name, batch=9)
        changed = {}
        assert any(of.logical_not().any() for of in visible.values()) or name == "id"
        for m in KINDS[kind]:
            seen = visible[m.name].any(2, keepdim=True) if m.kind != "bins" else visible[m.name]
            other = (data[m.name] + 1) % 5 if m.kind == "index" else torch.full_like(data[m.name], torch.nan)
            changed[m.name] = torch.where(seen, data[m.name], other)
        told = model(data, visible)
        assert all(torch.equal(of, model(changed, visible)[name]) for name, of in told.items())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_visible_of_the_future_changes_what_is_told_of_the_past(kind):
    # Random weights through which it shows well above rounding.
    model, data = build(KINDS[kind], seed=3), values(KINDS[kind])
    visible = nothing(model)
    visible["state"][:, 3] = True
    told = model(data, visible)
    data["state"][:, 3] += 3
    again = model(data, visible)
    for name in model.modalities:
        assert ((told[name] - again[name]).abs().amax((2, 3)) > 1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["changes", "bins"])
def test_an_answer_depends_on_no_other_sample_of_the_batch(kind):
    model, data = build(KINDS[kind]), values(KINDS[kind], 23)
    visible = pattern(model, 23)
    for of in visible.values():
        of[5] = False
    whole = model(data, visible)
    for rows in ([5], [7], [22, 5, 3], list(range(0, 23, 2))):
        some = model({k: v[rows] for k, v in data.items()}, {k: v[rows] for k, v in visible.items()})
        assert close(some, {name: of[rows] for name, of in whole.items()})


@pytest.mark.parametrize("seen", [0, 1, 3])
def test_samples_that_see_nothing_do_no_harm(seen):
    # In training mode, among others that see something, and alone.
    model, data = build(CHANGES).train(), values(CHANGES)
    visible = nothing(model)
    visible["state"][:seen, 1:3] = True
    told = model(data, visible)
    loss, _ = masked_loss(model, told, model.targets(data), {name: ~of for name, of in visible.items()})
    loss.backward()
    assert all(torch.isfinite(of).all() for of in told.values())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is None or torch.isfinite(g).all() for g in gradients.values())
    used = [g for name, g in gradients.items() if name.startswith("encoder.")]
    assert all(g is not None and g.abs().sum() > 0 for g in used) == (seen > 0)
    assert gradients["hidden.state"].abs().sum() > 0


def test_the_loss_by_hand_counts_what_it_is_told_to_count():
    modalities = [Modality(name="state", size=2), RETURN, Modality(name="action", size=1, kind="index", classes=3)]
    model = MaskedTrajectoryModel(modalities, SIZES)
    told = {
        "state": torch.tensor([[1.0, 2.0], [0.0, 4.0]])[None, :, None].requires_grad_(),
        "return": torch.full((1, 2, 1, 1), 9.0, requires_grad=True),
        "action": torch.tensor([[0.0, 0.0, 0.0], [5.0, 1.0, 1.0]])[None, :, None].requires_grad_(),
    }
    targets = {name: torch.zeros(1, 2, 1, size) for name, size in (("state", 2), ("return", 1))}
    targets["action"] = torch.tensor([[[1], [0]]])
    yes, no = torch.ones(1, 2, 1, dtype=torch.bool), torch.zeros(1, 2, 1, dtype=torch.bool)
    total, parts = masked_loss(model, told, targets, {"state": yes, "return": no, "action": yes})
    wrong = (math.log(3) + math.log(1 + 2 * math.exp(-4))) / 2
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(
        {"state": ((1 + 4) / 2 + 16 / 2) / 2, "return": 0.0, "action": wrong}, rel=1e-5
    )
    assert total.item() == pytest.approx(5.25 + wrong, rel=1e-5)
    total.backward()
    assert not told["return"].grad.any()
    second = yes & torch.tensor([False, True])[:, None]
    _, parts = masked_loss(model, told, targets, {"state": second, "return": yes, "action": second})
    assert [v.item() for v in parts.values()] == pytest.approx([8.0, 81.0, math.log(1 + 2 * math.exp(-4))], rel=1e-5)


def test_bins_and_indices_come_back():
    model = build(KINDS["bins"])
    mean, std = model.state_mean, model.state_std
    inside = mean + std * torch.linspace(-3.9, 3.9, 4 * 50).reshape(50, 4, 1)
    found = model.targets({**values(KINDS["bins"], 50), "state": inside})["state"]
    again = model.values("state", torch.eye(7)[found])
    assert ((again - inside).abs() <= std * 8 / 7 / 2 + 1e-5).all()
    far = mean + std * torch.tensor([-1e9, -4.1, 4.1, 1e9])[None, :, None]
    found = model.targets({**values(KINDS["bins"], 1), "state": far})["state"]
    assert found[0, :, 0].tolist() == [0, 0, 6, 6]
    discrete = build(KINDS["discrete"])
    actions = values(KINDS["discrete"])["action"]
    logits = torch.eye(5)[discrete.targets(values(KINDS["discrete"]))["action"]]
    assert torch.equal(discrete.values("action", logits), actions.float())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "changes", "bins"])
def test_a_constant_is_told_exactly_and_what_stands_there_later_has_no_influence(kind):
    model, data = build(KINDS[kind]), values(KINDS[kind])
    for name in ("state", "action"):
        mean, std = model.get_buffer(f"{name}_mean").clone(), model.get_buffer(f"{name}_std").clone()
        mean[1], std[1] = 0.1, 0.0
        model.standardise(name, mean, std)
    visible = pattern(model)
    told = model(data, visible)
    for name in ("state", "action"):
        of = model.values(name, told[name])
        assert (of[..., 1] == torch.tensor(0.1)).all()
        assert of[..., 0].std() > 0 or kind == "bins"
    data["state"][..., 1] += 1e6
    assert close(model(data, visible), told, 0)


@torch.no_grad()
def test_units_do_not_matter():
    model, data = build(CHANGES), values(CHANGES)
    visible = pattern(model)
    told = {name: model.values(name, of) for name, of in model(data, visible).items()}
    scaled = {name: of * 50 - 7 for name, of in data.items()}
    for name in data:
        model.standardise(name, model.get_buffer(f"{name}_mean") * 50 - 7, model.get_buffer(f"{name}_std") * 50)
    again = {name: model.values(name, of) for name, of in model(scaled, visible).items()}
    assert close({name: (of + 7) / 50 for name, of in again.items()}, told, 1e-4)


@torch.no_grad()
def test_the_encoder_tells_of_visible_tokens_alone():
    model, data = build(CHANGES), values(CHANGES)
    visible = pattern(model)
    found = model.encode(data, visible)
    for name, of in found.items():
        assert of.shape == (9, 4, 1, 16)
        assert torch.equal(of.abs().sum(3) > 0, visible[name])
    data["state"] = torch.where(visible["state"], data["state"], -9.0)
    assert close(model.encode(data, visible), found, 0)
    assert not any(of.any() for of in model.encode(data, nothing(model)).values())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["changes", "bins"])
def test_a_state_alone_is_encoded_as_the_first_of_a_window(kind):
    model, data = build(KINDS[kind]), values(KINDS[kind])
    visible = nothing(model)
    visible["state"][:, 0] = True
    found = model.encode(data, visible)["state"][:, 0].flatten(1)
    assert torch.allclose(model.encode_state(data["state"][:, 0]), found, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40).filter(any))
def test_every_sample_lies_whole_in_one_row(counts):
    place, ids = packed(torch.tensor(counts))
    assert ids.shape[1] == max(counts)
    assert len(place) == len(set(place.tolist())) == sum(counts) == int((ids >= 0).sum())
    of = [sample for sample, count in enumerate(counts) for _ in range(count)]
    assert ids.flatten()[place].tolist() == of
    for sample, where in enumerate(torch.split(place, counts)):
        assert where.tolist() == list(range(int(where[0]), int(where[0]) + len(where))) if len(where) else not (
            ids == sample).any()  # fmt: skip
        assert len(set((where // ids.shape[1]).tolist())) <= 1
    assert not (ids < 0).all(1).any()


def test_the_last_visible_value_is_carried_on():
    x = torch.arange(1.0, 13).reshape(1, 6, 2, 1)
    seen = torch.tensor([[0, 0], [1, 0], [0, 1], [0, 0], [1, 0], [0, 0]]).bool()[None]
    assert last_visible(x, seen)[0, :, :, 0].tolist() == [[0, 0], [3, 0], [3, 6], [3, 6], [9, 6], [9, 6]]
    pairs = torch.arange(8.0).reshape(1, 4, 1, 2)
    kept = last_visible(pairs, torch.tensor([False, True, False, True])[None, :, None])
    assert kept[0, :, 0].tolist() == [[0, 0], [2, 3], [2, 3], [6, 7]]


@torch.no_grad()
def test_shorter_windows_are_fine_and_longer_ones_refused():
    model = build(CHANGES)
    for length in (1, 3):
        visible = {name: torch.ones(2, length, 1, dtype=torch.bool) for name in model.modalities}
        assert model(values(CHANGES, 2, length), visible)["state"].shape == (2, length, 1, 3)
    visible = {name: torch.ones(2, 5, 1, dtype=torch.bool) for name in model.modalities}
    with pytest.raises(ConfigError, match="windows: expected at most 4 steps, got 5; cut the windows"):
        model(values(CHANGES, 2, 5), visible)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_builds_the_like(kind):
    model = build(KINDS[kind])
    again = MaskedTrajectoryModel.from_record(model.record())
    again.load_state_dict(model.state_dict())
    visible, data = pattern(model), values(KINDS[kind])
    assert close(again.eval()(data, visible), model(data, visible), 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0}, {"size": 2, "kind": "index", "classes": 3}, {"classes": 3}, {"kind": "bins", "classes": 1},
        {"kind": "index", "size": 1}, {"kind": "bins", "classes": 3, "residual": True}, {"size": 10**9},
    ],
)  # fmt: skip
def test_modalities_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="modality 'x', "):
        Modality(**{"name": "x", "size": 2, **wrong})


@pytest.mark.parametrize("wrong", [{"length": 1}, {"dim": 15}, {"dim": 6, "heads": 2}, {"heads": 0}, {"encoder": 0},
                                   {"decoder": 65}, {"dropout": 1.0}, {"dim": 10**9}])  # fmt: skip
def test_sizes_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=f"--model.{next(iter(wrong))}: expected"):
        Sizes(**wrong)
