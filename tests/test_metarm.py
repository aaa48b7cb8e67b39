"""MetaRM: the meta-gradient against closed forms and differences, its step in the training loop,
and rounds in a run of a few pairs."""
import contextlib
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import FakeRun, go, one_line, random_rows, same, tensors, tiny_reward
from small_runs import (
    change_times,
    copy_run,
    depends_on,
    forget,
    log_of,
    model_state,
    opened,
    read_lines,
    relative_distance,
    stop_after,
)

import config
import metarm
import train
from common import load_model
from data import Row, collate
from losses import bradley_terry, difference
from metarm import meta_gradient
from model import LanguageModel
from runtime.stages import stage_of

ORDERS = pytest.mark.parametrize("second_order", [False, True])


def parameter(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def rewards_in_float64(model, batch):
    """Rewards of the model without its head's cast to float32"""
    h = model.model(batch.tokens, batch.branch, batch.position, batch.last)
    return model.score(h).squeeze(-1)


class Mlp(nn.Sequential):
    def __init__(self, dropout=0.0):
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1))


def mlp_case(dropout=0.0, dtype=torch.float64):
    """-> model, J(model), L(model)"""
    model = Mlp(dropout).to(dtype)
    samples = torch.randn(4, 5, 3, dtype=dtype)
    pairs = torch.randn(6, 2, 3, dtype=dtype)

    def J(model):
        return difference(model(samples).squeeze(-1)).mean()

    def L(model):
        return bradley_terry(*model(pairs).squeeze(-1).unbind(1)).mean()

    return model, J, L


def transformer_case(dtype=torch.float64):
    """-> model, J(model), L(model)"""
    model = tiny_reward(layers=2, kv_heads=2).to(dtype)
    samples = collate(random_rows(3, 5, seed=1))
    pairs = collate(random_rows(4, 2, seed=2))

    def J(model):
        return difference(rewards_in_float64(model, samples)).mean()

    def L(model):
        return bradley_terry(*rewards_in_float64(model, pairs).unbind(1)).mean()

    return model, J, L


def gradient_of(case, eta, second_order=False, **more):
    """meta_gradient of a case (model, J, L)"""
    model, J, L = case
    parameters = model.parameters()
    return meta_gradient(parameters, lambda: J(model), lambda: L(model), eta, second_order, **more)


def stepped_copy(model, J, eta):
    """A copy of the model at theta + eta grad J(theta), by a plain backward pass"""
    model = copy.deepcopy(model)
    J(model).backward()
    with torch.no_grad():
        for p in model.parameters():
            p += eta * p.grad
    model.zero_grad()
    return model


# ----------------------------------------------------------------------------------------------
# Closed forms


@ORDERS
def test_a_line_and_a_parabola(second_order):
    """w = 2, J = 3w, L = w^2 / 2: the gradient is w' = 3.5; the step of 0.1 starts from 2.

    J has no curvature, so the second order is the same.
    """
    w = parameter(2.0)
    g, = meta_gradient(
        [w], lambda: (3 * w).sum(), lambda: (w ** 2 / 2).sum(), 0.5, second_order
    )
    assert g.tolist() == [3.5]
    assert (w - 0.1 * g).tolist() == [1.65]


@pytest.mark.parametrize("second_order, expected", [(False, 4.5), (True, 6.75)])
def test_two_parabolas(second_order, expected):
    """J = w^2: w' = w (1 + 2 eta), so L(w') = w^2 (1 + 2 eta)^2 / 2.

    w = 3, eta = 1/4: w' = 4.5 to first order, and 4.5 times 1.5.
    """
    w = parameter(3.0)
    g, = meta_gradient(
        [w], lambda: (w ** 2).sum(), lambda: (w ** 2 / 2).sum(), 0.25, second_order
    )
    assert g.tolist() == [expected]


@pytest.mark.parametrize("second_order, expected", [(False, [1.0, 0.0]), (True, [1.0, 0.5])])
def test_the_hessian_mixes_parameters(second_order, expected):
    """J = a b, L = a' at a' = a + eta b: the gradient is (1, eta), to first order (1, 0)."""
    a = parameter(2.0)
    b = parameter(5.0)
    g = meta_gradient([a, b], lambda: (a * b).sum(), lambda: a.sum(), 0.5, second_order)
    assert [v.item() for v in g] == expected


@ORDERS
def test_a_parameter_that_a_closure_does_not_use_has_a_gradient_of_zero(second_order):
    a = parameter(2.0)
    b = parameter(5.0, 1.0)
    c = parameter(1.0)
    g = meta_gradient(
        [a, b, c], lambda: (a ** 2).sum(), lambda: (b ** 2).sum(), 0.5, second_order
    )
    assert [v.tolist() for v in g] == [[0.0], [10.0, 2.0], [0.0]]


def test_stats_by_hand():
    """J = 3a + 4b, L = a' alone at a' = a + 3 eta: norms 5 and 1, cosine 3/5"""
    a = torch.tensor([2.0], requires_grad=True)
    b = torch.tensor([5.0], requires_grad=True)
    stats = {}
    meta_gradient([a, b], lambda: (3 * a + 4 * b).sum(), lambda: a.sum(), 0.5, stats=stats)
    values = {key: float(value) for key, value in stats.items()}
    assert values == pytest.approx(
        {"cosine": 0.6, "difference_norm": 5.0, "pair_norm": 1.0, "bf16_kept": 1.0}
    )


@pytest.mark.parametrize("eta, share", [
    (0.0, 0.0),
    (2.0 ** -10, 0.0),  # less than half of the spacing of bf16 above 1, which is 2^-7
    (2.0 ** -7, 0.5),   # a whole spacing above 1, a quarter above 4
    (2.0 ** -5, 1.0),
])
def test_what_bf16_keeps_of_a_look_ahead(eta, share):
    """grad J = 1 at a weight of 1 and at a weight of 4"""
    a = torch.tensor([1.0, 4.0], requires_grad=True)
    stats = {}
    meta_gradient([a], lambda: a.sum(), lambda: (a ** 2).sum(), eta, stats=stats)
    assert float(stats["bf16_kept"]) == share


def test_a_precondition_changes_the_directions_of_the_look_ahead():
    """J = 3a, L = a'^2: with the sign in the place of 3, a' = 2 + .5 and g = 5"""
    a = torch.tensor([2.0], requires_grad=True)
    g, = meta_gradient([a], lambda: (3 * a).sum(), lambda: (a ** 2).sum(), 0.5,
                       precondition=lambda gradients: [g.sign() for g in gradients])
    assert g.tolist() == [5.0] and a.tolist() == [2.0]
    with pytest.raises(ValueError, match="second order is derived for a plain look-ahead"):
        meta_gradient([a], lambda: a.sum(), lambda: a.sum(), 0.5, second_order=True,
                      precondition=lambda gradients: gradients)


def test_the_directions_of_adam_are_those_of_its_step():
    """An AdamW step without momentum and decay moves by lr times gradient / root mean square."""
    torch.manual_seed(0)
    w = torch.randn(20, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=0.01, betas=(0.0, 0.95), weight_decay=0.0)
    first = torch.randn(20)
    signs, = metarm.adam_directions(optimizer, [w], [first])
    torch.testing.assert_close(signs, first.sign())  # before the first step
    for _ in range(3):
        before = w.detach().clone()
        w.grad = torch.randn(20)
        optimizer.step()
        moved = (before - w.detach()) / 0.01
        directions, = metarm.adam_directions(optimizer, [w], [w.grad])
        torch.testing.assert_close(directions, moved, rtol=1e-3, atol=1e-3)


def test_the_directions_of_adam_need_adam():
    w = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    w.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match="keeps no mean square; use AdamW"):
        metarm.adam_directions(optimizer, [w], [w.grad])


# ----------------------------------------------------------------------------------------------
# Losses in pieces


def sum_of(pieces):
    """A closure that adds up the losses of a generator function"""
    return lambda: sum(pieces())


@pytest.mark.parametrize("second_order, expected", [
    (False, [11.0, 2.9]), (True, [11.0 + 2.49, 2.9 + 1.1]),
])
def test_a_generator_of_pieces_is_their_sum(second_order, expected):
    """J = a b + a^2 and L = a^2 + a b, each in two pieces; a = 2, b = 5, eta = 0.1.

    grad J = (b + 2a, a) = (9, 2), so a' = 2.9, b' = 5.2 and g = (2a' + b', a') = (11, 2.9).
    The Hessian of J is ((2, 1), (1, 0)): H g = (24.9, 11).
    """
    a = parameter(2.0)
    b = parameter(5.0)

    def J():
        yield (a * b).sum()
        yield (a ** 2).sum()

    def L():
        yield (a ** 2).sum()
        yield (b * a).sum()

    pieces = meta_gradient([a, b], J, L, 0.1, second_order)
    whole = meta_gradient([a, b], sum_of(J), sum_of(L), 0.1, second_order)
    assert [g.item() for g in pieces] == pytest.approx(expected, rel=1e-12)
    assert [g.item() for g in whole] == pytest.approx(expected, rel=1e-12)


def test_pieces_of_a_model_are_of_second_order_too():
    """Each piece of J keeps its graph: the second order of two pieces is that of their sum."""
    model, J, L = transformer_case()
    other = collate(random_rows(3, 5, seed=3))

    def pieces():
        yield J(model)
        yield difference(rewards_in_float64(model, other)).mean()

    def pair_loss():
        return L(model)

    parameters = list(model.parameters())
    by_pieces = meta_gradient(parameters, pieces, pair_loss, 2.0, second_order=True)
    whole = meta_gradient(parameters, sum_of(pieces), pair_loss, 2.0, second_order=True)
    first = meta_gradient(parameters, pieces, pair_loss, 2.0)
    torch.testing.assert_close(by_pieces, whole, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(a, b, rtol=0.1) for a, b in zip(by_pieces, first))


# ----------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("case", [mlp_case, transformer_case])
def test_first_order_is_the_gradient_of_a_copy_that_has_made_the_step(case):
    model, J, L = case(dtype=torch.float32)
    stepped = stepped_copy(model, J, eta=0.3)
    L(stepped).backward()
    g = gradient_of((model, J, L), eta=0.3)
    for p, mine in zip(stepped.parameters(), g, strict=True):
        torch.testing.assert_close(mine, p.grad)
    plain = torch.autograd.grad(L(model), model.parameters())
    assert not torch.allclose(g[0], plain[0], rtol=1e-2, atol=0)  # the step was not negligible


@ORDERS
def test_eta_zero_is_the_plain_gradient(second_order):
    model, J, L = transformer_case()
    plain = torch.autograd.grad(L(model), model.parameters())
    g = gradient_of((model, J, L), 0.0, second_order)
    assert all(torch.equal(a, b) for a, b in zip(g, plain, strict=True))


def slope(case, eta, direction, seed, h=1e-5):
    """Slope of L(theta + eta grad J(theta)) along a direction, by central differences"""
    model, J, L = case
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, v in zip(moved.parameters(), direction):
                p += sign * h * v
        torch.manual_seed(seed)  # J, then L, as in meta_gradient: the same dropout masks
        values.append(L(stepped_copy(moved, J, eta)).item())
    return (values[0] - values[1]) / (2 * h)


def along(gradient, direction):
    return sum((a * v).sum().item() for a, v in zip(gradient, direction, strict=True))


def dropout_case():
    return mlp_case(dropout=0.5)


@pytest.mark.parametrize("make_case", [mlp_case, dropout_case, transformer_case])
def test_second_order_is_the_derivative_of_the_whole(make_case):
    case = make_case()
    eta = 2.0
    torch.manual_seed(7)
    g = gradient_of(case, eta, second_order=True)
    torch.manual_seed(7)
    first = gradient_of(case, eta)
    first_order_is_off = False
    for _ in range(4):
        direction = [torch.randn_like(p) for p in case[0].parameters()]
        exact = slope(case, eta, direction, seed=7)
        assert along(g, direction) == pytest.approx(exact, rel=1e-5, abs=1e-7)
        first_order_is_off |= abs(along(first, direction) - exact) > 1e-2 * abs(exact)
    assert first_order_is_off


def test_second_order_by_every_coordinate_of_a_small_network():
    case = mlp_case()
    g = gradient_of(case, 2.0, second_order=True)
    zero = [torch.zeros_like(v) for v in g]
    for i, v in enumerate(g):
        for j in range(v.numel()):
            unit = torch.zeros(v.numel(), dtype=v.dtype)
            unit[j] = 1.0
            direction = [*zero[:i], unit.view_as(v), *zero[i + 1:]]
            exact = slope(case, 2.0, direction, seed=0)
            assert v.view(-1)[j].item() == pytest.approx(exact, abs=1e-8)


# ----------------------------------------------------------------------------------------------
# What stays unchanged


def snapshot(model):
    """The bits of all parameters"""
    return [p.detach().clone().view(torch.int32) for p in model.parameters()]


def unchanged(model, before):
    pairs = zip(model.parameters(), before, strict=True)
    return all(torch.equal(p.detach().view(torch.int32), old) for p, old in pairs)


@ORDERS
def test_parameters_are_restored_bit_for_bit(second_order):
    model, J, L = transformer_case(torch.float32)
    with torch.no_grad():
        model.score.weight[0, 0] = -0.0
    before = snapshot(model)
    storage = [p.data_ptr() for p in model.parameters()]
    seen = []

    def pair_loss():
        seen.append(unchanged(model, before))
        return L(model)

    meta_gradient(model.parameters(), lambda: J(model), pair_loss, 0.3, second_order)
    assert seen == [False]  # L was computed at other parameters
    assert unchanged(model, before)
    assert storage == [p.data_ptr() for p in model.parameters()]


@ORDERS
@pytest.mark.parametrize("where, message", [
    ("J", "in J"), ("L", "in L"), ("backward of L", "scalar"),
])
def test_parameters_are_restored_when_a_closure_fails(where, message, second_order):
    model, J, L = mlp_case(dtype=torch.float32)
    before = snapshot(model)

    def difference_loss():
        if where != "J":
            return J(model)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        raise RuntimeError("in J")

    def pair_loss():
        if where == "L":
            raise RuntimeError("in L")
        return L(model).expand(2) if where == "backward of L" else L(model)

    with pytest.raises(RuntimeError, match=message):
        meta_gradient(model.parameters(), difference_loss, pair_loss, 0.3, second_order)
    assert unchanged(model, before)


@ORDERS
def test_grad_is_not_changed(second_order):
    model, J, L = mlp_case()
    first, *others = model.parameters()
    grad = torch.full_like(first, 5.0)
    first.grad = grad
    gradient_of((model, J, L), 0.3, second_order)
    assert first.grad is grad and (grad == 5).all()
    assert all(p.grad is None for p in others)


@ORDERS
def test_closures_are_called_once_and_in_order(second_order):
    model, J, L = mlp_case()
    calls = []

    def difference_loss():
        calls.append("J")
        return J(model)

    def pair_loss():
        calls.append("L")
        return L(model)

    meta_gradient(model.parameters(), difference_loss, pair_loss, 0.3, second_order)
    assert calls == ["J", "L"]


@ORDERS
def test_gradients_have_no_graph_and_memory_of_their_own(second_order):
    """Autograd returns the gradient of a sum as one tensor for both terms; clipping is in place."""
    a = parameter(1.0, 2.0)
    b = parameter(3.0, 4.0)
    g = meta_gradient([a, b], lambda: (a * b).sum(), lambda: (a + b).sum(), 0.0, second_order)
    assert not any(v.requires_grad for v in g)
    for v in g:
        v.mul_(0.5)
    assert [v.tolist() for v in g] == [[0.5, 0.5], [0.5, 0.5]]


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


@ORDERS
def test_one_autocast_around_the_call_does_not_hide_the_step(second_order):
    """Autocast keeps the weights that it has cast until it ends, even if they change meanwhile."""
    model = Mlp()
    samples = torch.randn(4, 5, 3)
    pairs = torch.randn(6, 2, 3)

    def J():
        return difference(model(samples).squeeze(-1)).mean()

    def L():
        return bradley_terry(*model(pairs).squeeze(-1).float().unbind(1)).mean()

    def J_alone():
        with bf16():
            return J()

    def L_alone():
        with bf16():
            return L()

    expected = meta_gradient(model.parameters(), J_alone, L_alone, 5.0, second_order)
    with bf16():
        before = L()
        g = meta_gradient(model.parameters(), J, L, 5.0, second_order)
        assert torch.equal(L(), before)  # the step does not outlive the call either
    for a, b in zip(g, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=1e-4)
    plain = torch.autograd.grad(L_alone(), model.parameters())
    assert any(not torch.allclose(a, b, rtol=0.3) for a, b in zip(g, plain))


@pytest.mark.parametrize("name", ["frozen", "twice"])
def test_frozen_or_repeated_parameters_are_refused(name):
    w = parameter(2.0)
    given = {"frozen": [w, torch.ones(1)], "twice": [w, w]}[name]
    message = "frozen or listed twice; give those that require a gradient, each once"
    with pytest.raises(ValueError, match=message):
        meta_gradient(given, lambda: w.sum(), lambda: w.sum(), 0.5)


# ----------------------------------------------------------------------------------------------
# The step of the training loop

PLAIN_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def stub_run(accumulate=1, autocast=contextlib.nullcontext):
    """What make_meta_step reads of a Run"""
    cfg = config.Config(train=config.Train(accumulate=accumulate))
    return FakeRun(cfg=cfg, device=torch.device("cpu"), autocast=autocast)


def one_step(model, run, cfg, scaler=PLAIN_SCALER, step=0, adam=False):
    """One meta step on 12 rows of 3 samples and 4 pairs -> gradients, stats"""
    samples = random_rows(12, 3, seed=1)
    pairs = collate(random_rows(4, 2, seed=2))

    def pair_loss():
        with run.autocast():
            rewards = model(pairs.tokens, pairs.branch, pairs.position, pairs.last)
        yield scaler.scale(bradley_terry(*rewards.unbind(1)).mean())

    meta_step = metarm.make_meta_step(run, samples, cfg, "key", adam)
    return meta_step(model, adamw_after_a_step(model), step, pair_loss, scaler)


def adamw_after_a_step(model):
    """An AdamW for the model that has seen one gradient, as large as a weight; it moved nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer


def gradient_distance(a, b):
    """Distance of two lists of gradients, relative to the norm of the second"""
    apart = sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True))
    norm = sum(float(y.double().square().sum()) for y in b)
    return (apart / norm) ** 0.5


def losses_of_step(model):
    """J over the samples and L over the pairs of one_step, each as one batch"""
    samples = collate(random_rows(12, 3, seed=1))
    pairs = collate(random_rows(4, 2, seed=2))

    def J():
        rewards = model(samples.tokens, samples.branch, samples.position, samples.last)
        return difference(rewards).mean()

    def L():
        rewards = model(pairs.tokens, pairs.branch, pairs.position, pairs.last)
        return bradley_terry(*rewards.unbind(1)).mean()

    return J, L


@ORDERS
def test_a_step_is_the_meta_gradient_of_the_mean_over_its_prompts(second_order):
    model = tiny_reward()
    cfg = config.Meta(batch=12, eta=0.5, second_order=second_order)  # all samples in one batch
    J, L = losses_of_step(model)

    stats = {}
    expected = meta_gradient(model.parameters(), J, L, 0.5, second_order, stats)
    g, step_stats = one_step(model, stub_run(), cfg)
    # The rows stand in another order, so sums of float32 are rounded differently.
    assert gradient_distance(g, expected) < 1e-5
    assert float(step_stats["J"]) == pytest.approx(J().item(), rel=1e-5)
    for name, value in stats.items():
        assert float(step_stats[name]) == pytest.approx(float(value), rel=1e-4)
    plain = torch.autograd.grad(L(), list(model.parameters()))
    assert gradient_distance(g, plain) > 1e-2


@ORDERS
@pytest.mark.parametrize("accumulate", [2, 5, 30])
def test_accumulation_changes_a_step_by_rounding_alone(accumulate, second_order):
    """12 prompts in 2, 5 (unequal) and 12 pieces"""
    model = tiny_reward()
    cfg = config.Meta(batch=12, eta=0.5, second_order=second_order)
    whole, stats = one_step(model, stub_run(), cfg)
    pieces, piece_stats = one_step(model, stub_run(accumulate), cfg)
    assert gradient_distance(pieces, whole) < 1e-5
    assert float(piece_stats["J"]) == pytest.approx(float(stats["J"]), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_step_with_the_look_ahead_of_adam(scale):
    """The optimizer's mean square is of unscaled gradients, whatever the scale of J is."""
    model = tiny_reward()
    cfg = config.Meta(batch=12, adam_eta=0.01)
    J, L = losses_of_step(model)

    def by_weight(gradients):  # the mean square after the step is that of the weight itself
        weights = [p.detach() for p in model.parameters()]
        return [g / (w.abs() + 1e-8) for g, w in zip(gradients, weights)]

    expected = meta_gradient(model.parameters(), J, L, 0.01, precondition=by_weight)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    g, _ = one_step(model, stub_run(), cfg, scaler, adam=True)
    assert gradient_distance([v / scale for v in g], expected) < 1e-4
    plain, _ = one_step(model, stub_run(), config.Meta(batch=12, eta=0.01))
    assert gradient_distance(plain, expected) > 1e-2


def test_the_order_matters_in_a_step():
    model = tiny_reward()
    first, _ = one_step(model, stub_run(), config.Meta(batch=12, eta=0.5))
    second, _ = one_step(model, stub_run(), config.Meta(batch=12, eta=0.5, second_order=True))
    assert gradient_distance(first, second) > 1e-2


@ORDERS
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_scaled_loss_takes_the_same_inner_step(accumulate, second_order):
    """J is scaled like L, so eta is divided by the scale.  Powers of two change no digits: the
    gradients are those without a scaler, times the scale, bit for bit."""
    model = tiny_reward()
    cfg = config.Meta(batch=12, eta=0.5, second_order=second_order)
    run = stub_run(accumulate)
    plain, stats = one_step(model, run, cfg)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, scaled_stats = one_step(model, run, cfg, scaler)
    for a, b in zip(plain, scaled, strict=True):
        assert torch.equal(1024 * a, b)
    assert torch.equal(stats["J"], scaled_stats["J"])


@ORDERS
def test_half_precision_changes_a_step_little(second_order):
    """bf16 rounds each product to 2^-9.  A gradient goes through some ten of them here and rewards
    are differences of similar numbers, so a tenth is allowed; without the inner step it is off by
    more than that."""
    model = tiny_reward()
    cfg = config.Meta(batch=12, eta=0.5, second_order=second_order)
    exact, _ = one_step(model, stub_run(), cfg)
    rounded, _ = one_step(model, stub_run(autocast=bf16), cfg)
    without, _ = one_step(model, stub_run(), config.Meta(batch=12, eta=0.0))
    assert all(g.dtype == torch.float32 for g in rounded)
    assert 0 < gradient_distance(rounded, exact) < 0.1 < gradient_distance(without, exact)


class Recorder(nn.Module):
    """A reward model of one weight that keeps the first tokens of the rows it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.batches = []

    def forward(self, tokens, branch, position, out_pos, inputs_embeds=None):
        self.batches.append(tokens[:, 0].tolist())
        return self.weight * out_pos.float()


def sample_order(seed_key, epochs=3, accumulate=1, size=4):
    """Which of 40 samples each step reads -> an epoch a list of batches"""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(40):
        responses = tuple(np.zeros(rng.integers(1, 9), int) for _ in range(2))
        samples.append(Row(np.array([i]), responses))
    model = Recorder()
    cfg = config.Meta(batch=size)
    meta_step = metarm.make_meta_step(stub_run(accumulate), samples, cfg, seed_key)
    out = []
    for epoch in range(epochs):
        for step in range(epoch * 10, epoch * 10 + 10):
            meta_step(model, None, step, lambda: (model.weight ** 2).sum(), PLAIN_SCALER)
        out.append(model.batches)
        model.batches = []
    return out


def test_every_epoch_reads_all_samples_once_in_an_order_of_its_own():
    epochs = sample_order("key")
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == list(range(40))
    assert len({json.dumps(epoch) for epoch in epochs}) == 3
    contents = {json.dumps(sorted(sorted(batch) for batch in epoch)) for epoch in epochs}
    assert len(contents) == 3  # not the same batches in another order
    assert epochs == sample_order("key")
    assert epochs[0] not in sample_order("another key")


def test_a_batch_of_samples_is_split_into_micro_batches():
    whole = sample_order("key", epochs=1)[0]
    pieces = sample_order("key", epochs=1, accumulate=3)[0]
    assert [len(piece) for piece in pieces[:3]] == [2, 1, 1]
    assert sum(pieces, []) == sum(whole, [])


# ----------------------------------------------------------------------------------------------
# Rounds

ROUNDS = [
    "--meta.rounds=2", "--meta.start=last", "--meta.prompts=20", "--meta.k=3", "--ppo.methods=",
    "--reward.methods=baseline",
]
ALL_ARMS = [*ROUNDS, "--meta.arms=meta,plain,none"]


@pytest.fixture(scope="module")
def finished(finished, tmp_path_factory):
    """The finished small run, with two rounds of each arm on top of it"""
    out = copy_run(finished, tmp_path_factory.mktemp("rounds") / "run")
    (out / "log.jsonl").unlink()
    assert go(out, *ALL_ARMS) == 0
    return out


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run without dropout, up to its reward model"""
    out = tmp_path_factory.mktemp("start")
    for stage in ("sft", "reward"):
        assert go(out, *ROUNDS, "--model.dropout=0", f"--stage={stage}") == 0
    return out


def rounds_with(*settings):
    words = [("meta.rounds", "2"), ("meta.arms", "meta,none"), *settings]
    return metarm.meta_rounds(config.load(None, words))


def test_by_default_a_round_trains_the_reward_model_anew_and_the_policy_on():
    old = "reward_baseline"
    assert rounds_with() == [
        ("meta", 1, "sft", "meta_1", "sft", "sft", "policy_meta_1"),
        ("meta", 2, "sft", "meta_2", "policy_meta_1", "policy_meta_1", "policy_meta_2"),
        ("none", 1, "sft", old, "sft", "sft", "policy_none_1"),
        ("none", 2, "sft", old, "policy_none_1", "policy_none_1", "policy_none_2"),
    ]
    assert metarm.meta_rounds(config.load()) == []


def test_a_round_can_start_where_the_last_one_ended_and_the_policy_from_sft():
    rounds = rounds_with(("meta.start", "last"))
    assert [r.start for r in rounds[:2]] == ["reward_baseline", "meta_1"]
    rounds = rounds_with(("meta.policy_start", "sft"))
    assert rounds[1] == ("meta", 2, "sft", "meta_2_from_sft", "policy_meta_1_from_sft", "sft",
                         "policy_meta_2_from_sft")
    assert [r.policy_start for r in rounds] == ["sft"] * 4
    assert rounds[3].reward == "reward_baseline"  # which both kinds of rounds have in common


def test_every_round_leaves_its_files_and_is_judged(finished):
    results = json.loads((finished / "results.json").read_text())
    rewards = ["baseline", "meta_1", "meta_2", "plain_1", "plain_2"]
    assert list(results["reward"]) == rewards
    policies = ["sft"]
    for arm in ("meta", "plain", "none"):
        policies += [f"policy_{arm}_1", f"policy_{arm}_2"]
    assert list(results["policy"]) == list(results["policy_ood"]) == policies
    lines = read_lines(finished / "samples_meta_2.jsonl")
    assert all(len(line["responses"]) == 3 for line in lines)
    assert len(read_lines(finished / "samples_meta_1.jsonl")) == 20
    first = (finished / "samples_meta_1.jsonl").read_bytes()
    assert first != (finished / "samples_meta_2.jsonl").read_bytes()
    assert not same(tensors(finished, "meta_1"), tensors(finished, "plain_1"))


def test_the_log_of_a_round(finished):
    run = opened(finished, *ALL_ARMS)
    steps = [line for line in log_of(run, "meta_1") if "step" in line]
    logged = {"loss", "J", "cosine", "difference_norm", "pair_norm", "accuracy"}
    assert logged <= steps[0].keys()
    for line in steps:
        assert 1 / 3 <= line["J"] <= 2 / 3  # the range of J for k = 3
        assert -1 <= line["cosine"] <= 1
    assert sum("valid_accuracy" in line for line in log_of(run, "plain_2")) == 4


def test_eta_zero_is_the_plain_arm_bit_for_bit(start, tmp_path):
    """Without dropout, which would draw masks for J as well"""
    out = copy_run(start, tmp_path / "run")
    words = [*ROUNDS, "--meta.rounds=1", "--meta.arms=meta,plain", "--meta.eta=0"]
    assert go(out, *words, "--model.dropout=0", "--stage=meta") == 0
    assert same(tensors(out, "meta_1"), tensors(out, "plain_1"))
    assert not same(tensors(out, "meta_1"), tensors(out, "reward_baseline"))


@pytest.fixture(scope="module")
def one_round(start, tmp_path_factory):
    """one_round(*words) -> weights of meta_1 trained under these settings from the same start"""
    def train_one(*words):
        out = copy_run(start, tmp_path_factory.mktemp("round") / "run")
        run = opened(out, *ROUNDS, "--model.dropout=0", *words)
        round_ = metarm.meta_rounds(run.cfg)[0]
        train.train_round_reward(run, round_)
        return model_state(run, round_.reward)

    return train_one


@pytest.fixture(scope="module")
def usual_round(one_round):
    return one_round()


def test_accumulation_changes_a_round_by_rounding_alone(start, one_round, usual_round):
    """The movements of four steps are compared: the weights hardly move.  AdamW magnifies
    the rounding of small gradients to some 1e-5 of the movement; eta of 0.97 in the place of 1 is
    more than 1,000 times as much."""
    initial = tensors(start, "reward_baseline")
    pieces = one_round("--train.accumulate=3")
    assert relative_distance(usual_round, pieces, initial) < 2e-3
    less = one_round("--meta.eta=0.97")
    assert relative_distance(usual_round, less, initial) > 0.01


def test_the_second_order_and_the_plain_arm_are_other_movements(start, one_round, usual_round):
    initial = tensors(start, "reward_baseline")
    second = one_round("--meta.second_order=true")
    plain = one_round("--meta.arms=plain")
    for a, b in ((usual_round, second), (usual_round, plain), (second, plain)):
        assert relative_distance(a, b, initial) > 0.2


def test_the_second_order_is_the_same_in_pieces(start, one_round):
    initial = tensors(start, "reward_baseline")
    whole = one_round("--meta.second_order=true")
    pieces = one_round("--meta.second_order=true", "--train.accumulate=3")
    assert relative_distance(whole, pieces, initial) < 2e-3


def test_a_round_in_half_precision_is_nearer_than_one_without_samples(
    start, one_round, usual_round
):
    """AdamW magnifies the rounding of small gradients, so the movements agree roughly."""
    initial = tensors(start, "reward_baseline")
    rounded = one_round("--dtype=bf16")
    plain = one_round("--meta.arms=plain")
    assert all(value.dtype == torch.float32 for value in rounded.values())
    distance = relative_distance(usual_round, rounded, initial)
    assert 0 < distance < 0.7 * relative_distance(usual_round, plain, initial)


# ----------------------------------------------------------------------------------------------
# Other arms


def train_arm(start, out, arm, *words):
    """The reward model of round 1 of an arm, trained from the SFT model -> Run, Round"""
    out = copy_run(start, out)
    run = opened(out, *ROUNDS, "--meta.start=sft", f"--meta.arms={arm}", "--model.dropout=0",
                 *words)
    round_ = metarm.meta_rounds(run.cfg)[0]
    train.train_round_reward(run, round_)
    return run, round_


def test_a_round_from_sft_is_another_order_of_the_first_reward_model(start, tmp_path):
    """Plain steps with the settings of [reward] from the same start and the same head"""
    words = ["--meta.epochs=3", "--meta.batch=8", "--meta.lr=0.002"]
    words += ["--reward.epochs=3", "--reward.batch=8", "--reward.lr=0.002"]
    run, round_ = train_arm(start, tmp_path / "run", "plain", *words)
    assert round_.start == "sft"
    variant = train.RewardVariant(seed_key="round 1")
    train.train_reward_variant(run, "again", train.treated_labels(run, "baseline"),
                               run.valid.rows, variant)
    assert same(model_state(run, "plain_1"), model_state(run, "again"))


def test_the_first_round_of_weighted_pairs_is_plain(start, tmp_path):
    """Its policy is SFT, so every weight is 1."""
    run, _ = train_arm(start, tmp_path / "a", "ocrm")
    assert torch.equal(metarm.policy_weights(run, "sft"), torch.ones(len(run.train.rows)))
    plain, _ = train_arm(start, tmp_path / "b", "plain")
    assert same(model_state(run, "ocrm_1"), model_state(plain, "plain_1"))


def test_pairs_are_weighted_by_the_policy_of_the_round_before(finished, tmp_path):
    run = opened(copy_run(finished, tmp_path / "run"), *ROUNDS, "--meta.arms=ocrm")
    seen = []
    weights = metarm.policy_weights(run, "policy_meta_1")
    assert weights.mean() == pytest.approx(1) and weights.std() > 0.01
    fit = train.fit_reward_model

    def recorded(run, name, cfg, labels, variant):
        seen.append(variant.weight)
        fit(run, name, cfg, labels, variant)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit_reward_model", recorded)
        round_ = metarm.meta_rounds(run.cfg)[1]._replace(
            latest="policy_meta_1", start="reward_baseline")
        train.train_round_reward(run, round_)
    assert torch.equal(seen[0], weights)


def test_the_likelihood_of_a_response_token_by_token(finished):
    run = opened(finished, *ROUNDS)
    rows = run.train.rows[:5]
    found = metarm.response_likelihoods(run, "sft", rows)
    model = load_model(run, LanguageModel, "sft")
    for row, values in zip(rows, found, strict=True):
        for response, value in zip(row.responses, values, strict=True):
            text = np.concatenate([row.prompt, response]).astype(np.int64)
            logits = model(torch.from_numpy(text)[None])[0].detach()
            total = 0.0
            for t in range(len(row.prompt), len(text)):
                total += float(logits[t - 1].log_softmax(0)[text[t]])
            assert float(value) == pytest.approx(total, abs=1e-3)


def test_the_look_ahead_of_adam_is_an_arm_of_its_own(start, tmp_path):
    run, round_ = train_arm(start, tmp_path / "a", "meta-adam")
    assert round_.reward == "meta-adam_1" and (tmp_path / "a/samples_meta-adam_1.jsonl").exists()
    plain, _ = train_arm(start, tmp_path / "b", "meta")
    assert not same(model_state(run, "meta-adam_1"), model_state(plain, "meta_1"))
    first = depends_on(tmp_path / "c", *ROUNDS, "--meta.arms=meta,meta-adam,ocrm")
    for setting, changed in (("adam_eta", "meta-adam_1"), ("eta", "meta_1"),
                             ("weight_clip", "ocrm_1")):
        words = ["--meta.arms=meta,meta-adam,ocrm", f"--meta.{setting}=3"]
        second = depends_on(tmp_path / "c", *ROUNDS, *words)
        names = {name for name in first if first[name] != second[name]}
        assert changed in names
        assert names <= {name for name in first if changed[:-1] in name} | {"evaluate"}


def test_the_look_ahead_of_adam_needs_adam():
    words = [("meta.rounds", "1"), ("meta.arms", "meta-adam"), ("train.optimizer", "sgd")]
    with pytest.raises(config.ConfigError, match="meta.arms = 'meta-adam': needs train.optimizer"):
        config.load(None, words)


def test_every_arm_is_made_by_the_stages_of_a_run(finished, tmp_path):
    out = copy_run(finished, tmp_path / "run")
    arms = [arm for arm in config.keys()["meta.arms"].metadata["choices"] if arm != "none"]
    assert {stage_of(f"{arm}_1") for arm in arms} == {"meta"}
    assert go(out, *ROUNDS, "--meta.rounds=1", "--meta.arms=meta-adam,ocrm") == 0
    results = json.loads((out / "results.json").read_text())
    assert {"meta-adam_1", "ocrm_1"} < set(results["reward"])
    assert {"policy_meta-adam_1", "policy_ocrm_1"} < set(results["policy"])


def test_rounds_from_sft_stand_beside_the_others(finished, tmp_path):
    out = copy_run(finished, tmp_path / "run")
    before = tensors(out, "policy_meta_1")
    words = [*ROUNDS, "--meta.rounds=1", "--meta.policy_start=sft", "--stage=meta"]
    assert go(out, *words) == 0
    assert same(tensors(out, "policy_meta_1"), before)
    assert (out / "meta_1_from_sft.pt").exists()


def test_finished_rounds_are_skipped(finished, capsys):
    before = change_times(finished)
    assert go(finished, *ALL_ARMS) == 0
    assert "meta: up to date" in capsys.readouterr().out
    assert change_times(finished) == before


def test_a_change_of_eta_concerns_only_what_follows_from_it(tmp_path):
    first = depends_on(tmp_path, *ALL_ARMS, "--meta.eta=0.1")
    second = depends_on(tmp_path, *ALL_ARMS, "--meta.eta=0.2")
    assert {"meta_1", "policy_meta_2"} <= first.keys()
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"meta_1", "policy_meta_1", "meta_2", "policy_meta_2", "evaluate"}


def test_a_round_stopped_and_resumed_equals_not_stopped(finished, tmp_path, monkeypatch):
    out = copy_run(finished, tmp_path / "run")
    forget(out, "meta_1")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert go(out, *ALL_ARMS, "--meta.rounds=1", "--stage=meta") == 130
    assert (out / "meta_1.ckpt").exists()
    (out / "meta_1.pt").unlink()
    assert go(out, *ALL_ARMS, "--meta.rounds=1", "--stage=meta") == 0
    assert same(tensors(out, "meta_1"), tensors(finished, "meta_1"))


def test_the_meta_stage_alone_names_what_it_needs(tmp_path, capsys):
    assert go(tmp_path, "--stage=meta") == 0
    assert "meta: nothing to do, meta.rounds is 0" in capsys.readouterr().out
    assert go(tmp_path, *ROUNDS, "--stage=meta") == 2
    one_line(capsys, "--stage=meta: needs sft, which is missing; run --stage=sft first")


def test_half_of_the_prompts_out_of_distribution_is_sampled_on_the_other_half_judged(
    finished, tmp_path
):
    out = copy_run(finished, tmp_path / "run")
    words = ["--meta.rounds=1", "--meta.domain=ood", "--world.ood=30"]
    assert go(out, *ROUNDS, *words) == 0

    def prompts_of(name):
        return {line["prompt"] for line in read_lines(out / name)}

    sampled = prompts_of("samples_meta_1.jsonl") | prompts_of("rollouts_meta_1.jsonl")
    judged = prompts_of("answers_ood.jsonl")
    assert sampled and judged and not sampled & judged
    for prompt in sampled | judged:
        assert any(word in prompt for word in ("plus", "minus", "Zorbish", "program"))


def test_samples_are_rows_of_k_branches_that_end_with_eos(finished):
    run = opened(finished, *ROUNDS)
    eos = run.tokenizer.eos_id
    rows, lines = metarm.sample_responses(run, "sft", run.train.pairs, seed=5)
    assert len(rows) == len(lines) == 20
    for row, line in zip(rows, lines, strict=True):
        assert len(row.responses) == 3
        for response, text in zip(row.responses, line["responses"], strict=True):
            assert response[-1] == eos and (response == eos).sum() == 1
            assert run.tokenizer.decode(response[:-1].tolist()) == text
    repeated, _ = metarm.sample_responses(run, "sft", run.train.pairs, seed=5)
    for row, other in zip(rows, repeated, strict=True):
        assert all(map(np.array_equal, row.responses, other.responses))
    assert any(not np.array_equal(*row.responses[:2]) for row in rows)


def test_prompts_out_of_distribution_are_split_without_repetition(finished):
    run = opened(finished, *ROUNDS, "--meta.domain=ood")
    sampled, judged = metarm.split_ood_prompts(run)
    texts = [pair.prompt for pair in [*sampled, *judged]]
    every = {pair.prompt for encoded in run.ood.values() for pair in encoded.pairs}
    assert len(texts) == len(set(texts)) and set(texts) == every
    assert metarm.round_prompts(run) == sampled
    assert metarm.round_prompts(opened(finished, *ROUNDS)) == run.train.pairs


def test_without_validation_pairs_nothing_is_validated():
    run = FakeRun(valid=SimpleNamespace(rows=[]))
    assert metarm.make_validation_fn(run, "meta_1") is None


def test_validation_logs_accuracy_and_loss(finished):
    run = opened(finished, *ROUNDS)
    logged = []
    run.log = lambda **record: logged.append(record)
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    run.valid.rows[3:] = []

    class Table(nn.Module):
        """Rewards of the three rows, in the order that score_rows asks for"""
        shape = SimpleNamespace(width=1)

        def forward(self, tokens, branch, position, out_pos, features, inputs_embeds):
            order = sorted(range(3), key=lambda i: len(run.valid.rows[i]))
            return rewards[order], None

    out = metarm.make_validation_fn(run, "meta_1")(Table())
    assert torch.equal(out, rewards)
    expected = bradley_terry(*rewards.unbind(1)).mean()
    assert logged == [{
        "stage": "meta_1",
        "valid_accuracy": pytest.approx(2 / 3),
        "valid_loss": pytest.approx(float(expected)),
    }]
