import math

import pytest
import torch
from hypothesis import given, strategies as st

from losses import difference, simcse, sinkhorn, swav

sizes = st.tuples(st.integers(1, 6), st.integers(1, 5))
seeds = st.integers(0, 10 ** 6)
HALF = [torch.float16, torch.bfloat16]


def normal(*shape, seed=0, grad=False):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# simcse

def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)


@given(sizes, seeds, st.floats(0.05, 2))
def test_simcse_is_a_loop(size, seed, temperature):
    view_s, view_t = normal(2, *size, seed=seed)
    for i, loss in enumerate(simcse(view_s, view_t, temperature).tolist()):
        likeness = [math.exp(cosine(view_s[i].tolist(), other) / temperature) for other in view_t.tolist()]
        assert loss == pytest.approx(-math.log(likeness[i] / sum(likeness)), abs=1e-9)


def test_simcse_by_hand():
    """cos of s_1 with t is 0 and 1, of s_2 0 and -1; the temperature is 0.05 unless given."""
    view_s, view_t = double([0, 2], [0, -3]), double([5, 0], [0, 1])
    close(simcse(view_s, view_t, 1.0), double(math.log(1 + math.e), math.log(1 + math.e)))
    close(simcse(view_s, view_t), double(20, 20), 1e-6)


@given(sizes, seeds)
def test_simcse_sees_directions_alone(size, seed):
    view_s, view_t = normal(2, *size, seed=seed)
    lengths = normal(2, size[0], 1, seed=seed + 1).exp()
    close(simcse(lengths[0] * view_s, lengths[1] * view_t), simcse(view_s, view_t), 1e-9)
    turn = torch.linalg.qr(normal(size[1], size[1], seed=seed)).Q
    close(simcse(view_s @ turn, view_t @ turn), simcse(view_s, view_t), 1e-9)


@pytest.mark.parametrize("loss", [simcse, swav])
def test_the_order_of_the_items_does_not_matter(loss):
    view_s, view_t = normal(2, 7, 4)
    order = torch.randperm(7)
    close(loss(view_s[order], view_t[order]), loss(view_s, view_t)[order])


def test_simcse_of_one_item_has_nothing_to_be_told_from():
    view_s, view_t = normal(2, 1, 4, grad=True)
    loss = simcse(view_s, view_t)
    assert loss.tolist() == [0.0]
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), (view_s, view_t)))


def test_a_row_of_zeros_is_like_nothing_and_has_no_gradient():
    view_s, view_t = normal(2, 3, 4)
    view_s[1] = 0
    view_s.requires_grad_()
    loss = simcse(view_s, view_t)
    loss.sum().backward()
    assert loss[1].item() == pytest.approx(math.log(3))
    assert (view_s.grad[1] == 0).all() and view_s.grad.isfinite().all() and (view_s.grad[[0, 2]] != 0).any()


def test_simcse_is_computed_in_float32_under_autocast():
    view_s, view_t = normal(2, 8, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = simcse(view_s, view_t)
    assert torch.equal(loss, simcse(view_s, view_t))


# ---------------------------------------------------------------------------------------------------------------------
# sinkhorn

def loop_sinkhorn(scores, epsilon, iterations):
    """As it is printed: a K x B matrix whose total, rows and columns are normalised in turn, times B."""
    B, K = scores.shape
    Q = [[math.exp(scores[b, k].item() / epsilon) for b in range(B)] for k in range(K)]
    total = sum(map(sum, Q))
    Q = [[q / total for q in row] for row in Q]
    for _ in range(iterations):
        Q = [[q / sum(row) / K for q in row] for row in Q]
        columns = [sum(row[b] for row in Q) for b in range(B)]
        Q = [[q / column / B for q, column in zip(row, columns)] for row in Q]
    return double(*([Q[k][b] * B for k in range(K)] for b in range(B)))


@given(sizes, seeds, st.floats(0.05, 2), st.integers(1, 5))
def test_sinkhorn_is_a_loop(size, seed, epsilon, iterations):
    scores = normal(*size, seed=seed)
    close(sinkhorn(scores, epsilon, iterations), loop_sinkhorn(scores, epsilon, iterations), 1e-9)


def test_sinkhorn_by_hand():
    """Prototypes with totals 3 and 5 are brought to 1, then the items, which have 14/15 and 16/15."""
    scores = double([1, 3], [2, 2]).log()
    close(sinkhorn(scores, 1.0, 1), double([5 / 14, 9 / 14], [5 / 8, 3 / 8]))
    close(sinkhorn(0.05 * scores), sinkhorn(scores, 1.0, 3))  # the defaults


@pytest.mark.parametrize("N, K", [(8, 3), (3, 8), (5, 5), (6, 1)])
def test_many_iterations_give_both_marginals(N, K):
    codes = sinkhorn(normal(N, K), epsilon=0.5, iterations=2000)
    close(codes.sum(1), torch.ones(N, dtype=torch.float64))
    close(codes.sum(0), torch.full((K,), N / K, dtype=torch.float64), 1e-9)


def test_a_prototype_that_everything_likes_is_no_better_used():
    scores = normal(6, 4)
    close(sinkhorn(scores + double(100, 0, -100, 3)), sinkhorn(scores), 1e-9)


def test_one_item_is_spread_evenly():
    close(sinkhorn(normal(1, 5)), torch.full((1, 5), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4, 1e30])
def test_rows_sum_to_one_whatever_the_scores(scale):
    scores = normal(9, 6).float() * scale
    scores[:, 2] = -scale  # a prototype that nothing likes, and one that everything does
    scores[:, 3] = 10 * scale
    codes = sinkhorn(scores)
    assert (codes >= 0).all()
    close(codes.sum(1), torch.ones(9), 1e-5)


def test_sinkhorn_leaves_its_input_alone_and_has_no_gradient():
    scores = normal(5, 3, grad=True)
    before = scores.detach().clone()
    assert not sinkhorn(scores).requires_grad and torch.equal(scores, before)


# ---------------------------------------------------------------------------------------------------------------------
# swav

@given(sizes, seeds, st.floats(0.1, 2), st.floats(0.05, 2), st.integers(1, 4))
def test_swav_is_a_loop(size, seed, temperature, epsilon, iterations):
    scores = normal(2, *size, seed=seed)
    codes = [loop_sinkhorn(view, epsilon, iterations).tolist() for view in scores]
    for i, loss in enumerate(swav(*scores, temperature, epsilon, iterations).tolist()):
        expected = 0.0
        for view, other in ((0, 1), (1, 0)):
            row = [s / temperature for s in scores[view, i].tolist()]
            total = math.log(sum(map(math.exp, row)))
            expected -= sum(q * (s - total) for q, s in zip(codes[other][i], row))
        assert loss == pytest.approx(expected, abs=1e-9)


def test_swav_by_hand():
    """Codes as in the case above for s, one half each for t; t says ln 2 for sure, s by its scores."""
    s, t = double([1, 3], [2, 2]).log(), double([0, 0], [0, 0])
    expected = double(math.log(2) - (math.log(1 / 4) + math.log(3 / 4)) / 2, math.log(2) + math.log(2))
    close(swav(s, t, temperature=1.0, epsilon=1.0, iterations=1), expected)


def test_swav_is_swapped():
    """Views that disagree: each sure of another prototype.  Unswapped, both would be content with their own code."""
    s = 3 * torch.eye(2, dtype=torch.float64)
    assert swav(s, s.flip(1)).min() > 30 and swav(s, s).max() < 1e-9


def test_the_views_play_the_same_part():
    s, t = normal(2, 6, 4)
    close(swav(s, t), swav(t, s))


def test_collapsed_scores_stay_at_two_ln_k():
    close(swav(torch.full((5, 7), 0.3).double(), torch.full((5, 7), -0.8).double()), torch.full((5,), 2 * math.log(7)).double(), 1e-6)


def test_no_gradient_goes_through_the_codes():
    """With q fixed, -sum q log softmax(s / 0.1) has the gradient (softmax(s / 0.1) - q) / 0.1."""
    s, t = (normal(5, 4, seed=seed, grad=True) for seed in (1, 2))
    for view, other, g in zip((s, t), (t, s), torch.autograd.grad(swav(s, t).sum(), (s, t))):
        close(g, ((view / 0.1).softmax(1) - sinkhorn(other)) / 0.1, 1e-9)


def test_a_queue_helps_to_choose_the_codes_and_its_losses_can_be_left_out():
    scores, queue = normal(2, 3, 4, seed=1), normal(2, 20, 4, seed=2)
    whole = torch.cat((scores, queue), dim=1)
    loss, codes = swav(*whole)[:3], [sinkhorn(view)[:3] for view in whole]
    log_p = (scores / 0.1).log_softmax(2)
    close(loss, -(codes[0] * log_p[1] + codes[1] * log_p[0]).sum(1), 1e-9)
    assert ((loss - swav(*scores)).abs() > 0.1).any()


# ---------------------------------------------------------------------------------------------------------------------
# difference

rewards_of = lambda k: st.lists(st.floats(-1e4, 1e4), min_size=k, max_size=k)


@given(st.integers(1, 3), st.integers(2, 6), seeds)
def test_difference_is_a_loop_over_pairs(m, k, seed):
    rewards = 3 * normal(m, k, seed=seed)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    for row, J in zip(rewards.tolist(), difference(rewards).tolist()):
        assert J == pytest.approx(2 / k ** 2 * sum(sigmoid(abs(row[i] - row[j])) for i in range(k) for j in range(i + 1, k)), abs=1e-12)


def test_difference_by_hand():
    """k = 2: half of sigmoid(ln 3) = 3/4.  k = 3: gaps ln 3, ln 3 and 2 ln 3, so 2/9 (3/4 + 3/4 + 9/10)."""
    l = math.log(3)
    close(difference(double([5.0, 5 - l])), double(3 / 8))
    close(difference(double([l, -l, 0], [0, 0, 0])), double(2 / 9 * 2.4, 1 / 3))


@given(rewards_of(5))
def test_difference_of_five_lies_between_two_fifths_and_four(rewards):
    assert 0.4 - 1e-12 <= difference(double(rewards)).item() <= 0.8 + 1e-12


@pytest.mark.parametrize("k", [2, 3, 5, 9])
def test_the_bounds_of_difference_are_met(k):
    equal_and_far = torch.stack((torch.full((k,), 7.0), 1e4 * torch.arange(k)))
    close(difference(equal_and_far), torch.tensor([(k - 1) / (2 * k), (k - 1) / k]), 1e-6)


@given(rewards_of(4), st.permutations(range(4)), st.floats(-100, 100))
def test_difference_knows_no_order_and_no_origin(rewards, order, shift):
    close(difference(double([rewards[i] + shift for i in order])), difference(double(rewards)), 1e-9)


def test_a_step_up_the_difference_pushes_unequal_rewards_apart_and_leaves_ties():
    rewards = double([2.0, 1.0, 1.0, 0.0], [3.0, 3.0, 3.0, 3.0]).requires_grad_()
    difference(rewards).sum().backward()
    (top, tie_1, tie_2, bottom), ties = rewards.grad
    assert top > 0 > bottom and tie_1 == tie_2 and (ties == 0).all()
    assert (difference(rewards + 0.01 * rewards.grad) > difference(rewards))[0]


# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("loss", [simcse, swav, lambda s, t: sinkhorn(s), lambda s, t: difference(s)])
def test_half_precision_is_computed_in_float32(loss, dtype):
    s, t = (300 * normal(2, 6, 40)).to(dtype).requires_grad_()  # their squares overflow float16
    value = loss(s, t)
    assert value.dtype == torch.float32 and torch.equal(value, loss(s.float(), t.float()))
    if value.requires_grad:
        assert all(g.dtype == dtype and g.isfinite().all() for g in torch.autograd.grad(value.sum(), (s,)))


def test_nothing_is_made_on_another_device():
    """`meta` has no data, and refuses to be mixed with the CPU."""
    s, t = torch.zeros(2, 6, 4, device="meta", requires_grad=True)
    losses = torch.stack((simcse(s, t), swav(s, t), difference(s)))
    assert losses.device.type == "meta" and losses.shape == (3, 6)
    assert torch.autograd.grad(losses.sum(), (s,))[0].shape == (6, 4)


def test_gradients_against_finite_differences():
    check = torch.autograd.gradcheck
    view = lambda seed: normal(4, 3, seed=seed, grad=True)
    assert check(lambda s, t: simcse(s, t, 0.5), (view(1), view(2)))
    assert check(lambda s, t: swav(s, t, 0.5, epsilon=1e12), (view(3), view(4)))  # epsilon makes codes that no step can move
    assert check(difference, (normal(3, 5, grad=True),))
    assert torch.autograd.gradgradcheck(difference, (normal(3, 5, grad=True),))   # second-order MetaRM goes through it twice


@pytest.mark.parametrize("call, says", [
    (lambda: simcse(torch.ones(3, 4), torch.ones(2, 4)), r"\(3, 4\) and \(2, 4\); give two of one shape \(N, C\)"),
    (lambda: simcse(torch.ones(3, 4), torch.ones(3, 5)), r"\(3, 4\) and \(3, 5\)"),
    (lambda: simcse(torch.ones(4), torch.ones(4)), r"give two of one shape \(N, C\)"),
    (lambda: simcse(torch.ones(0, 4), torch.ones(0, 4)), "N >= 1"),
    (lambda: sinkhorn(torch.ones(4)), r"scores are \(4,\); give \(N, K\)"),
    (lambda: sinkhorn(torch.ones(0, 4)), "N >= 1 items"),
    (lambda: sinkhorn(torch.ones(4, 0)), "K >= 1 prototypes"),
    (lambda: sinkhorn(torch.ones(4, 2), iterations=0), "0 iterations .* use 1 or more"),
    (lambda: swav(torch.ones(3, 4), torch.ones(3, 5)), r"\(3, 4\) and \(3, 5\); give two of one shape \(N, K\)"),
    (lambda: swav(torch.ones(0, 4), torch.ones(0, 4)), "N >= 1 items"),
    (lambda: difference(torch.ones(3, 1)), r"\(3, 1\); give .* k >= 2"),
    (lambda: difference(torch.ones(5)), r"give \(m, k\)"),
    (lambda: difference(torch.ones(0, 5)), "m >= 1"),
])
def test_a_wrong_shape_is_refused_in_one_line(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
