import copy

import pytest
import torch
import torch.nn as nn

from data import collate
from helpers import random_rows, tiny_reward
from losses import bradley_terry, difference
from metarm import meta_gradient

ORDERS = pytest.mark.parametrize("second_order", [False, True])


def parameter(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def rewards(model, batch):
    """As RewardModel gives them, without its float32 head, so that float64 stays."""
    return model.score(model.model(*batch[:3], batch.last)).squeeze(-1)


class Mlp(nn.Sequential):
    def __init__(self, dropout=0.0):
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1))


def mlp_case(dropout=0.0, dtype=torch.float64):
    """model, J(model), L(model)"""
    model = Mlp(dropout).to(dtype)
    samples, pairs = torch.randn(4, 5, 3, dtype=dtype), torch.randn(6, 2, 3, dtype=dtype)
    J = lambda model: difference(model(samples).squeeze(-1)).mean()
    L = lambda model: bradley_terry(*model(pairs).squeeze(-1).unbind(1)).mean()
    return model, J, L


def transformer_case(dtype=torch.float64):
    model = tiny_reward(layers=2, kv_heads=2).to(dtype)
    samples, pairs = collate(random_rows(3, 5, seed=1)), collate(random_rows(4, 2, seed=2))
    J = lambda model: difference(rewards(model, samples)).mean()
    L = lambda model: bradley_terry(*rewards(model, pairs).unbind(1)).mean()
    return model, J, L


def looked_ahead(model, J, eta):
    """A copy of the model at theta + eta grad J(theta), by plain backward."""
    model = copy.deepcopy(model)
    J(model).backward()
    with torch.no_grad():
        for p in model.parameters():
            p += eta * p.grad
    model.zero_grad()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms

def test_a_line_and_a_parabola():
    """w = 2, J = 3w, L = w^2 / 2: w' = 3.5 is the gradient, and the step of 0.1 starts from 2."""
    w = parameter(2.0)
    g, = meta_gradient([w], lambda: (3 * w).sum(), lambda: (w ** 2 / 2).sum(), eta=0.5)
    assert g.tolist() == [3.5] and (w - 0.1 * g).tolist() == [1.65]


def test_the_second_order_of_a_line_is_its_first():
    w = parameter(2.0)
    g, = meta_gradient([w], lambda: (3 * w).sum(), lambda: (w ** 2 / 2).sum(), eta=0.5, second_order=True)
    assert g.tolist() == [3.5]


def test_two_parabolas():
    """J = w^2: w' = w (1 + 2 eta), so L(w') = w^2 (1 + 2 eta)^2 / 2.  w = 3, eta = 1/4: 4.5, and 4.5 times 1.5."""
    w = parameter(3.0)
    of = lambda second_order: meta_gradient([w], lambda: (w ** 2).sum(), lambda: (w ** 2 / 2).sum(), 0.25, second_order)[0].tolist()
    assert of(False) == [4.5] and of(True) == [6.75]


def test_the_hessian_mixes_parameters():
    """J = a b, L = a' at a' = a + eta b: the gradient is (1, eta), of which the first order sees (1, 0)."""
    a, b = parameter(2.0), parameter(5.0)
    of = lambda second_order: [g.item() for g in meta_gradient([a, b], lambda: (a * b).sum(), lambda: a.sum(), 0.5, second_order)]
    assert of(False) == [1.0, 0.0] and of(True) == [1.0, 0.5]


@ORDERS
def test_what_a_closure_does_not_use_has_a_gradient_of_zero(second_order):
    a, b, c = parameter(2.0), parameter(5.0, 1.0), parameter(1.0)
    g = meta_gradient([a, b, c], lambda: (a ** 2).sum(), lambda: (b ** 2).sum(), 0.5, second_order)
    assert [v.tolist() for v in g] == [[0.0], [10.0, 2.0], [0.0]]


# ---------------------------------------------------------------------------------------------------------------------
# Models

@pytest.mark.parametrize("case", [mlp_case, transformer_case])
def test_first_order_is_the_gradient_of_a_copy_that_has_made_the_step(case):
    model, J, L = case(dtype=torch.float32)
    ahead = looked_ahead(model, J, eta=0.3)
    L(ahead).backward()
    g = meta_gradient(model.parameters(), lambda: J(model), lambda: L(model), eta=0.3)
    for p, mine in zip(ahead.parameters(), g, strict=True):
        torch.testing.assert_close(mine, p.grad)
    plain = torch.autograd.grad(L(model), model.parameters())
    assert not torch.allclose(g[0], plain[0], rtol=1e-2, atol=0)  # so the step was large enough to be seen


@ORDERS
def test_eta_zero_is_the_plain_gradient(second_order):
    model, J, L = transformer_case()
    plain = torch.autograd.grad(L(model), model.parameters())
    g = meta_gradient(model.parameters(), lambda: J(model), lambda: L(model), 0.0, second_order)
    assert all(torch.equal(a, b) for a, b in zip(g, plain, strict=True))


def slope(model, J, L, eta, direction, seed, h=1e-5):
    """Of L(theta + eta grad J(theta)) along a direction, by central differences."""
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, v in zip(moved.parameters(), direction):
                p += sign * h * v
        torch.manual_seed(seed)  # J and then L, as meta_gradient does: the same dropout masks
        values.append(L(looked_ahead(moved, J, eta)).item())
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("case", [mlp_case, lambda: mlp_case(dropout=0.5), transformer_case], ids=["mlp", "dropout", "transformer"])
def test_second_order_is_the_derivative_of_the_whole(case):
    model, J, L = case()
    eta, first_order_is_off = 2.0, False
    torch.manual_seed(7)
    g = meta_gradient(model.parameters(), lambda: J(model), lambda: L(model), eta, second_order=True)
    torch.manual_seed(7)
    first = meta_gradient(model.parameters(), lambda: J(model), lambda: L(model), eta)
    along = lambda gradient, direction: sum((a * v).sum().item() for a, v in zip(gradient, direction, strict=True))
    for _ in range(4):
        direction = [torch.randn_like(p) for p in model.parameters()]
        exact = slope(model, J, L, eta, direction, seed=7)
        assert along(g, direction) == pytest.approx(exact, rel=1e-5, abs=1e-7)
        first_order_is_off |= abs(along(first, direction) - exact) > 1e-2 * abs(exact)
    assert first_order_is_off


def test_second_order_by_every_coordinate_of_a_small_network():
    model, J, L = mlp_case()
    g = meta_gradient(model.parameters(), lambda: J(model), lambda: L(model), 2.0, second_order=True)
    zero = [torch.zeros_like(p) for p in model.parameters()]
    for i, v in enumerate(g):
        for j in range(v.numel()):
            unit = torch.zeros_like(v).view(-1).index_fill(0, torch.tensor(j), 1.0).view_as(v)
            exact = slope(model, J, L, 2.0, zero[:i] + [unit] + zero[i + 1:], seed=0)
            assert v.view(-1)[j].item() == pytest.approx(exact, abs=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# What it leaves as it was

def snapshot(model):
    return [p.detach().clone().view(torch.int32) for p in model.parameters()]


def unchanged(model, before):
    return all(torch.equal(p.detach().view(torch.int32), old) for p, old in zip(model.parameters(), before, strict=True))


@ORDERS
def test_parameters_are_restored_bit_for_bit(second_order):
    model, J, L = transformer_case(torch.float32)
    with torch.no_grad():
        model.score.weight[0, 0] = -0.0
    before, storage = snapshot(model), [p.data_ptr() for p in model.parameters()]
    seen = []
    meta_gradient(model.parameters(), lambda: J(model), lambda: seen.append(unchanged(model, before)) or L(model), 0.3, second_order)
    assert seen == [False]  # L did see other parameters
    assert unchanged(model, before) and storage == [p.data_ptr() for p in model.parameters()]


@ORDERS
@pytest.mark.parametrize("where", ["J", "L", "backward of L"])
def test_parameters_are_restored_when_a_closure_fails(where, second_order):
    model, J, L = mlp_case(dtype=torch.float32)
    before = snapshot(model)

    def fail(message):
        raise RuntimeError(message)

    def damage_and_fail():
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        fail("in J")

    difference_loss = damage_and_fail if where == "J" else lambda: J(model)
    pair_loss = {"L": lambda: fail("in L"), "backward of L": lambda: L(model).expand(2)}.get(where, lambda: L(model))
    with pytest.raises(RuntimeError, match={"J": "in J", "L": "in L"}.get(where, "scalar")):
        meta_gradient(model.parameters(), difference_loss, pair_loss, 0.3, second_order)
    assert unchanged(model, before)


@ORDERS
def test_grad_is_not_touched(second_order):
    model, J, L = mlp_case()
    first, *others = model.parameters()
    first.grad = kept = torch.full_like(first, 5.0)
    meta_gradient(model.parameters(), lambda: J(model), lambda: L(model), 0.3, second_order)
    assert first.grad is kept and (kept == 5).all() and all(p.grad is None for p in others)


@ORDERS
def test_closures_are_called_once_and_in_order(second_order):
    model, J, L = mlp_case()
    calls = []
    meta_gradient(model.parameters(), lambda: calls.append("J") or J(model), lambda: calls.append("L") or L(model), 0.3, second_order)
    assert calls == ["J", "L"]


@ORDERS
def test_gradients_have_no_graph_and_memory_of_their_own(second_order):
    """The gradient of a sum is one tensor for both terms, and one number in memory; clipping multiplies it in place."""
    a, b = parameter(1.0, 2.0), parameter(3.0, 4.0)
    g = meta_gradient([a, b], lambda: (a * b).sum(), lambda: (a + b).sum(), 0.0, second_order)
    assert not any(v.requires_grad for v in g)
    for v in g:
        v.mul_(0.5)
    assert [v.tolist() for v in g] == [[0.5, 0.5], [0.5, 0.5]]


@ORDERS
def test_one_autocast_around_it_all_does_not_hide_the_step(second_order):
    """Autocast keeps the weights it has cast until it ends, whatever becomes of the weights."""
    model, samples, pairs = Mlp(), torch.randn(4, 5, 3), torch.randn(6, 2, 3)
    J = lambda: difference(model(samples).squeeze(-1)).mean()
    L = lambda: bradley_terry(*model(pairs).squeeze(-1).float().unbind(1)).mean()
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)

    def each(closure):
        with autocast():
            return closure()

    expected = meta_gradient(model.parameters(), lambda: each(J), lambda: each(L), 5.0, second_order)
    with autocast():
        before = L()
        g = meta_gradient(model.parameters(), J, L, 5.0, second_order)
        assert torch.equal(L(), before)  # nor does the step outlive the call
    for a, b in zip(g, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=1e-4)
    plain = torch.autograd.grad(each(L), model.parameters())
    assert any(not torch.allclose(a, b, rtol=0.3) for a, b in zip(g, plain))


@pytest.mark.parametrize("name", ["frozen", "twice"])
def test_frozen_or_repeated_parameters_are_refused(name):
    w = parameter(2.0)
    given = {"frozen": [w, torch.ones(1)], "twice": [w, w]}[name]
    with pytest.raises(ValueError, match="frozen or listed twice; give those that require a gradient, each once"):
        meta_gradient(given, lambda: w.sum(), lambda: w.sum(), 0.5)
