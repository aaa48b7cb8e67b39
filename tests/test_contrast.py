"""The contrastive losses, MetaRM's difference loss, and the contrastive term of the reward stage.

losses.py: simcse, sinkhorn, swav, difference.  contrast.py: ContrastiveHead.  train.py: pair_loss.
"""
import json
import math
import shutil

import pytest
import torch
from helpers import go, random_rows, same, tensors, tiny_reward
from hypothesis import given
from hypothesis import strategies as st
from small_runs import stop_after

from config import Contrast
from contrast import ContrastiveHead, contrast_items
from data import collate
from losses import bradley_terry, difference, simcse, sinkhorn, swav
from train import pair_loss

EPS = torch.finfo(torch.float32).eps
HALF = [torch.float16, torch.bfloat16]
sizes = st.tuples(st.integers(1, 6), st.integers(1, 5))
seeds = st.integers(0, 10 ** 6)


def normal(*shape, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ----------------------------------------------------------------------------------------------
# simcse


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)


@given(sizes, seeds, st.floats(0.05, 2))
def test_simcse_is_a_loop(size, seed, temperature):
    view_s, view_t = normal(2, *size, seed=seed)
    losses = simcse(view_s, view_t, temperature).tolist()
    for i, loss in enumerate(losses):
        similarity = []
        for other in view_t.tolist():
            similarity.append(math.exp(cosine(view_s[i].tolist(), other) / temperature))
        assert loss == pytest.approx(-math.log(similarity[i] / sum(similarity)), abs=1e-9)


def test_simcse_by_hand():
    """cos of s_1 with t is 0 and 1, of s_2 0 and -1; the temperature is 0.05 unless given."""
    view_s = double([0, 2], [0, -3])
    view_t = double([5, 0], [0, 1])
    close(simcse(view_s, view_t, 1.0), double(math.log(1 + math.e), math.log(1 + math.e)))
    close(simcse(view_s, view_t), double(20, 20), 1e-8)  # ln(1 + e^20) - 20 = 2e-9


@given(sizes, seeds)
def test_simcse_depends_on_directions_alone(size, seed):
    view_s, view_t = normal(2, *size, seed=seed)
    loss = simcse(view_s, view_t)
    length_s, length_t = normal(2, size[0], 1, seed=seed + 1).exp()
    close(simcse(length_s * view_s, length_t * view_t), loss, 1e-9)
    rotation = torch.linalg.qr(normal(size[1], size[1], seed=seed)).Q
    close(simcse(view_s @ rotation, view_t @ rotation), loss, 1e-9)


@pytest.mark.parametrize("loss", [simcse, swav])
def test_the_order_of_the_items_does_not_matter(loss):
    view_s, view_t = normal(2, 7, 4)
    order = torch.randperm(7)
    close(loss(view_s[order], view_t[order]), loss(view_s, view_t)[order])


def test_simcse_of_one_item_has_no_negatives():
    view_s, view_t = normal(2, 1, 4, grad=True)
    loss = simcse(view_s, view_t)
    assert loss.tolist() == [0.0]
    for gradient in torch.autograd.grad(loss.sum(), (view_s, view_t)):
        assert (gradient == 0).all()


def test_a_row_of_zeros_is_similar_to_nothing_and_has_no_gradient():
    view_s, view_t = normal(2, 3, 4)
    view_s[1] = 0
    view_s.requires_grad_()
    loss = simcse(view_s, view_t)
    loss.sum().backward()
    assert loss[1].item() == pytest.approx(math.log(3))
    assert (view_s.grad[1] == 0).all()
    assert view_s.grad.isfinite().all()
    assert (view_s.grad[[0, 2]] != 0).any()


def test_simcse_is_computed_in_float32_under_autocast():
    view_s, view_t = normal(2, 8, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = simcse(view_s, view_t)
    assert torch.equal(loss, simcse(view_s, view_t))


# ----------------------------------------------------------------------------------------------
# sinkhorn


def loop_sinkhorn(scores, epsilon, iterations):
    """As the paper prints it: a K x B matrix whose total, rows and columns are normalised in turn,
    times B."""
    B, K = scores.shape
    Q = []
    for k in range(K):
        Q.append([math.exp(scores[b, k].item() / epsilon) for b in range(B)])
    total = sum(map(sum, Q))
    for row in Q:
        for b in range(B):
            row[b] /= total
    for _ in range(iterations):
        for row in Q:
            row_sum = sum(row)
            for b in range(B):
                row[b] /= row_sum * K
        for b in range(B):
            column_sum = sum(row[b] for row in Q)
            for row in Q:
                row[b] /= column_sum * B
    return double(*Q).T * B


@given(sizes, seeds, st.floats(0.05, 2), st.integers(1, 5))
def test_sinkhorn_is_a_loop(size, seed, epsilon, iterations):
    scores = normal(*size, seed=seed)
    codes = sinkhorn(scores, epsilon, iterations)
    close(codes, loop_sinkhorn(scores, epsilon, iterations), 1e-9)


def test_sinkhorn_by_hand():
    """Prototypes with totals 3 and 5 are brought to 1, then the items, which have 14/15 and 16/15.
    """
    scores = double([1, 3], [2, 2]).log()
    close(sinkhorn(scores, 1.0, 1), double([5 / 14, 9 / 14], [5 / 8, 3 / 8]))
    close(sinkhorn(0.05 * scores), sinkhorn(scores, 1.0, 3))  # the defaults


@pytest.mark.parametrize("N, K", [(8, 3), (3, 8), (5, 5), (6, 1)])
def test_many_iterations_give_both_marginals(N, K):
    codes = sinkhorn(normal(N, K), epsilon=0.5, iterations=2000)
    close(codes.sum(1), torch.ones(N, dtype=torch.float64))
    close(codes.sum(0), torch.full((K,), N / K, dtype=torch.float64), 1e-9)


def test_a_score_common_to_all_items_does_not_change_the_codes():
    scores = normal(6, 4)
    close(sinkhorn(scores + double(100, 0, -100, 3)), sinkhorn(scores), 1e-9)


def test_one_item_has_a_uniform_code():
    close(sinkhorn(normal(1, 5)), torch.full((1, 5), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4, 1e30])
def test_rows_sum_to_one_whatever_the_scores(scale):
    scores = normal(9, 6).float() * scale
    scores[:, 2] = -scale  # a prototype that no item prefers, and one that every item does
    scores[:, 3] = 10 * scale
    codes = sinkhorn(scores)
    assert (codes >= 0).all()
    # K = 6 exponentials and their sum; the logarithms, up to ln 6, are rounded twice
    close(codes.sum(1), torch.ones(9), (6 + 2 + 2 * math.log(6)) * EPS)


def test_sinkhorn_does_not_change_its_input_and_has_no_gradient():
    scores = normal(5, 3, grad=True)
    before = scores.detach().clone()
    assert not sinkhorn(scores).requires_grad
    assert torch.equal(scores, before)


# ----------------------------------------------------------------------------------------------
# swav


@given(sizes, seeds, st.floats(0.1, 2), st.floats(0.05, 2), st.integers(1, 4))
def test_swav_is_a_loop(size, seed, temperature, epsilon, iterations):
    scores = normal(2, *size, seed=seed)
    codes = [loop_sinkhorn(view, epsilon, iterations).tolist() for view in scores]
    losses = swav(*scores, temperature, epsilon, iterations).tolist()
    for i, loss in enumerate(losses):
        expected = 0.0
        for view, other in ((0, 1), (1, 0)):
            row = [s / temperature for s in scores[view, i].tolist()]
            log_total = math.log(sum(map(math.exp, row)))
            expected -= sum(q * (s - log_total) for q, s in zip(codes[other][i], row))
        assert loss == pytest.approx(expected, abs=1e-9)


def test_swav_by_hand():
    """The codes of s are those of the case above, of t one half each; t predicts with ln 2 for
    either, s by its scores."""
    s = double([1, 3], [2, 2]).log()
    t = double([0, 0], [0, 0])
    first = math.log(2) - (math.log(1 / 4) + math.log(3 / 4)) / 2
    loss = swav(s, t, temperature=1.0, epsilon=1.0, iterations=1)
    close(loss, double(first, math.log(2) + math.log(2)))


def test_swav_is_swapped():
    """Views that contradict each other, each sure of another prototype: unswapped, both would agree
    with their own code."""
    s = 3 * torch.eye(2, dtype=torch.float64)
    assert swav(s, s.flip(1)).min() > 30
    assert swav(s, s).max() < 1e-9


def test_swav_is_symmetric_in_its_views():
    s, t = normal(2, 6, 4)
    close(swav(s, t), swav(t, s))


def test_collapsed_scores_give_two_ln_k():
    s = torch.full((5, 7), 0.3, dtype=torch.float64)
    t = torch.full((5, 7), -0.8, dtype=torch.float64)
    close(swav(s, t), torch.full((5,), 2 * math.log(7), dtype=torch.float64))


def test_codes_have_no_gradient():
    """With q fixed, -sum q log softmax(s / 0.1) has the gradient (softmax(s / 0.1) - q) / 0.1."""
    s = normal(5, 4, seed=1, grad=True)
    t = normal(5, 4, seed=2, grad=True)
    gradient_s, gradient_t = torch.autograd.grad(swav(s, t).sum(), (s, t))
    close(gradient_s, ((s / 0.1).softmax(1) - sinkhorn(t)) / 0.1, 1e-9)
    close(gradient_t, ((t / 0.1).softmax(1) - sinkhorn(s)) / 0.1, 1e-9)


def test_a_queue_takes_part_in_the_codes_and_its_losses_can_be_left_out():
    scores = normal(2, 3, 4, seed=1)
    queue = normal(2, 20, 4, seed=2)
    whole = torch.cat((scores, queue), dim=1)
    loss = swav(*whole)[:3]
    code_s, code_t = (sinkhorn(view)[:3] for view in whole)
    log_p_s, log_p_t = (scores / 0.1).log_softmax(2)
    close(loss, -(code_s * log_p_t + code_t * log_p_s).sum(1), 1e-9)
    assert ((loss - swav(*scores)).abs() > 0.1).any()


# ----------------------------------------------------------------------------------------------
# difference


def rewards_of_k(k):
    return st.lists(st.floats(-1e4, 1e4), min_size=k, max_size=k)


@given(st.integers(1, 3), st.integers(2, 6), seeds)
def test_difference_is_a_loop_over_pairs(m, k, seed):
    rewards = 3 * normal(m, k, seed=seed)
    for row, J in zip(rewards.tolist(), difference(rewards).tolist()):
        total = 0.0
        for i in range(k):
            for j in range(i + 1, k):
                total += 1 / (1 + math.exp(-abs(row[i] - row[j])))
        assert J == pytest.approx(2 / k ** 2 * total, abs=1e-12)


def test_difference_by_hand():
    """k = 2: half of sigmoid(ln 3) = 3/4.  k = 3: distances ln 3, ln 3 and 2 ln 3, so
    2/9 (3/4 + 3/4 + 9/10)."""
    ln3 = math.log(3)
    close(difference(double([5.0, 5 - ln3])), double(3 / 8))
    close(difference(double([ln3, -ln3, 0], [0, 0, 0])), double(2 / 9 * 2.4, 1 / 3))


@given(rewards_of_k(5))
def test_difference_of_five_lies_between_two_and_four_fifths(rewards):
    assert 0.4 - 1e-12 <= difference(double(rewards)).item() <= 0.8 + 1e-12


@pytest.mark.parametrize("k", [2, 3, 5, 9])
def test_the_bounds_of_difference_are_reached(k):
    equal = torch.full((k,), 7.0, dtype=torch.float64)
    distant = 1e4 * torch.arange(k, dtype=torch.float64)
    bounds = difference(torch.stack((equal, distant)))
    close(bounds, double((k - 1) / (2 * k), (k - 1) / k))


@given(rewards_of_k(4), st.permutations(range(4)), st.floats(-100, 100))
def test_difference_does_not_depend_on_order_or_origin(rewards, order, shift):
    moved = [rewards[i] + shift for i in order]
    close(difference(double(moved)), difference(double(rewards)), 1e-9)


def test_a_step_up_the_difference_separates_unequal_rewards_and_not_ties():
    rewards = double([2.0, 1.0, 1.0, 0.0], [3.0, 3.0, 3.0, 3.0]).requires_grad_()
    difference(rewards).sum().backward()
    (top, tie_1, tie_2, bottom), ties = rewards.grad
    assert top > 0 > bottom
    assert tie_1 == tie_2
    assert (ties == 0).all()
    stepped = rewards + 0.01 * rewards.grad
    assert (difference(stepped) > difference(rewards))[0]


# ----------------------------------------------------------------------------------------------
# All four


def sinkhorn_of_one(s, t):
    return sinkhorn(s)


def difference_of_one(s, t):
    return difference(s)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("loss", [simcse, swav, sinkhorn_of_one, difference_of_one])
def test_half_precision_is_computed_in_float32(loss, dtype):
    s, t = (300 * normal(2, 6, 40)).to(dtype).requires_grad_()  # their squares overflow float16
    value = loss(s, t)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(s.float(), t.float()))
    if value.requires_grad:
        gradient, = torch.autograd.grad(value.sum(), (s,))
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


def test_no_tensor_is_made_on_another_device():
    """`meta` has no data, and refuses to be mixed with the CPU."""
    s, t = torch.zeros(2, 6, 4, device="meta", requires_grad=True)
    losses = torch.stack((simcse(s, t), swav(s, t), difference(s)))
    assert losses.device.type == "meta"
    assert losses.shape == (3, 6)
    assert torch.autograd.grad(losses.sum(), (s,))[0].shape == (6, 4)


def test_gradients_against_finite_differences():
    check = torch.autograd.gradcheck

    def view(seed):
        return normal(4, 3, seed=seed, grad=True)

    assert check(simcse, (view(1), view(2), 0.5))
    # with this epsilon no step can change the codes
    assert check(swav, (view(3), view(4), 0.5, 1e12))
    assert check(difference, (normal(3, 5, grad=True),))
    # second-order MetaRM differentiates it twice
    assert torch.autograd.gradgradcheck(difference, (normal(3, 5, grad=True),))


def ones(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize("loss, inputs, message", [
    (simcse, (ones(3, 4), ones(2, 4)), r"\(3, 4\) and \(2, 4\); give two of one shape \(N, C\)"),
    (simcse, (ones(3, 4), ones(3, 5)), r"\(3, 4\) and \(3, 5\)"),
    (simcse, (ones(4), ones(4)), r"give two of one shape \(N, C\)"),
    (simcse, (ones(0, 4), ones(0, 4)), "N >= 1"),
    (sinkhorn, (ones(4),), r"scores are \(4,\); give \(N, K\)"),
    (sinkhorn, (ones(0, 4),), "N >= 1 items"),
    (sinkhorn, (ones(4, 0),), "K >= 1 prototypes"),
    (sinkhorn, (ones(4, 2), 0.05, 0), "0 iterations .* use 1 or more"),
    (swav, (ones(3, 4), ones(3, 5)), r"\(3, 4\) and \(3, 5\); give two of one shape \(N, K\)"),
    (swav, (ones(0, 4), ones(0, 4)), "N >= 1 items"),
    (difference, (ones(3, 1),), r"\(3, 1\); give .* k >= 2"),
    (difference, (ones(5),), r"give \(m, k\)"),
    (difference, (ones(0, 5),), "m >= 1"),
])
def test_a_wrong_shape_is_refused_in_one_line(loss, inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        loss(*inputs)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------
# ContrastiveHead, in float64


def head(**settings):
    """A head for hidden states of width 8; SwAV unless another term is given"""
    settings = Contrast(**{"term": "swav", "prototypes": 4} | settings)
    generator = torch.Generator().manual_seed(0)
    return ContrastiveHead(settings, width=8, generator=generator, total=100).double()


def unit(x):
    return torch.nn.functional.normalize(x, dim=1)


def test_items_by_hand():
    h = torch.tensor([[[1.0, 2.0], [3.0, 5.0]], [[4.0, 4.0], [0.0, 1.0]]])  # two pairs
    assert contrast_items(h, "pairs").tolist() == [[1, 2], [3, 5], [4, 4], [0, 1]]
    assert contrast_items(h, "difference").tolist() == [[-2, -3], [4, 3], [2, 3], [-4, -3]]


@pytest.mark.parametrize("items", ["pairs", "difference"])
def test_the_views_are_the_two_halves_of_the_batch(items):
    h = normal(6, 2, 8)
    s = contrast_items(h[:3], items)
    t = contrast_items(h[3:], items)
    close(head(term="simcse", items=items)(h), simcse(s, t, 0.05))
    swav_head = head(items=items, temperature=0.2, epsilon=0.3, iterations=2)
    prototypes = unit(swav_head.prototypes)  # float32 has normalised them coarsely
    scores_s = unit(s) @ prototypes.T
    scores_t = unit(t) @ prototypes.T
    close(swav_head(h), swav(scores_s, scores_t, 0.2, 0.3, 2))


def test_the_default_temperature_is_that_of_each_paper():
    h = normal(6, 2, 8)
    for term, temperature in (("simcse", 0.05), ("swav", 0.1)):
        given = head(term=term, temperature=temperature)
        assert torch.equal(head(term=term)(h), given(h))


def test_prototypes_have_length_one_and_move_once_they_are_not_frozen():
    swav_head = head(frozen=0.1)  # 10 of 100 items
    h = normal(6, 2, 8, grad=True)
    gradient, = torch.autograd.grad(
        swav_head(h).sum(), swav_head.prototypes, allow_unused=True, materialize_grads=True
    )
    assert (gradient == 0).all()
    swav_head(h)
    assert swav_head.items_seen == 12
    gradient, = torch.autograd.grad(swav_head(h).sum(), swav_head.prototypes)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        swav_head.prototypes.mul_(7)
    swav_head(h)
    close(swav_head.prototypes.norm(dim=1), double(1, 1, 1, 1))


def test_the_queue_holds_the_newest_items_of_each_view_and_takes_part_in_the_codes():
    swav_head = head(queue=8)
    plain = head()
    first, second = normal(2, 6, 2, 8)
    close(swav_head(first), plain(first))  # the queue is still empty
    old = torch.stack([unit(contrast_items(view, "pairs")) for view in first.chunk(2)])
    close(swav_head.queue[:, :6], old)
    new = torch.stack([unit(contrast_items(view, "pairs")) for view in second.chunk(2)])
    loss = swav_head(second)
    scores = torch.cat((new, old), dim=1) @ swav_head.prototypes.T
    close(loss, swav(*scores)[:6])
    assert not torch.allclose(loss, plain(second))
    newest_first = torch.cat((new, old), dim=1)
    close(swav_head.queue, newest_first[:, :8])  # the oldest four are gone


def test_a_collapse_is_reported_once_when_it_lasts():
    swav_head = head()
    h = torch.ones(6, 2, 8, dtype=torch.float64)
    loss = float(swav_head(h).mean().detach())
    with torch.no_grad():
        swav_head.prototypes.copy_(swav_head.prototypes[:1].expand(4, 8))
    collapsed = float(swav_head(h).mean().detach())
    assert collapsed == pytest.approx(2 * math.log(4))
    # items alike have uniform codes, which only a uniform softmax predicts
    assert loss > collapsed
    warnings = []
    for value in (collapsed, 2.0, collapsed, collapsed, collapsed, collapsed):
        warnings.append(swav_head.collapse_warning(value))
    assert [bool(warning) for warning in warnings] == [False] * 4 + [True, False]
    assert "swav's loss is stuck at 2.773, 2 ln K = 2.773" in warnings[4]
    assert "\n" not in warnings[4]
    for _ in range(5):
        assert not swav_head.collapse_warning(4.0)
        assert not head(term="simcse").collapse_warning(collapsed)


def test_a_saved_head_continues_where_it_was():
    """The number of items seen decides when the prototypes move and how much of the queue counts.
    """
    swav_head = head(queue=20, frozen=0.1)
    swav_head(normal(6, 2, 8, seed=1))
    copy = head(queue=20, frozen=0.1)
    copy.load_state_dict(swav_head.state_dict())
    assert copy.items_seen == 6
    h = normal(6, 2, 8, seed=2)
    assert torch.equal(copy(h), swav_head(h))
    assert torch.equal(copy.queue, swav_head.queue)


# ----------------------------------------------------------------------------------------------
# pair_loss.  The transformer computes in float64, the rewards in float32.


def reward_model(**shape):
    model = tiny_reward(**shape)
    model.model.double()
    return model


def model_head(width=32, **settings):
    return ContrastiveHead(Contrast(**settings), width, torch.Generator())


def hidden_of(model, rows):
    batch = collate(rows)
    return model(batch.tokens, batch.branch, batch.position, batch.last, features=True)


def rewards_rounding(model, rows):
    """Difference to expect between two float32 evaluations of a reward

    A sum of C products of rounded numbers: C + 1 roundings of either sign, eps / 2 of the sum of
    absolute values each, in both evaluations.
    """
    with torch.no_grad():
        _, h = hidden_of(model, rows)
        sums = h.abs() @ model.score.weight[0].abs().double()
    return (h.shape[-1] + 1) ** 0.5 * EPS * sums.max().item()


def test_pair_loss_sums_bradley_terry_over_the_pairs():
    model = reward_model()
    rows = random_rows(6, 2, 1)
    margin = torch.randn(6)
    p = torch.rand(6)
    loss, sums = pair_loss(model, rows, margin, p)
    rewards, _ = hidden_of(model, rows)
    chosen, rejected = rewards.unbind(1)
    expected = bradley_terry(chosen, rejected, margin, p)
    # the same rewards, of a batch of the same shape; the sum is rounded 6 times
    close(loss, expected.sum(), 6 * EPS * expected.sum().item())
    assert sums == {"accuracy": (chosen > rejected).sum()}
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad.abs().sum() > 0


def test_weight_zero_without_dropout_is_the_plain_loss_and_its_gradient():
    model = reward_model()
    rows = random_rows(5, 2, seed=3)
    margin = torch.rand(5)
    p = torch.rand(5)
    parameters = list(model.parameters())
    plain, plain_sums = pair_loss(model, rows, margin, p)
    aux_loss = model_head(term="simcse", weight=0.0)
    loss, sums = pair_loss(model, rows, margin, p, aux_loss)
    rounding = rewards_rounding(model, rows)
    # The loss changes by at most 1 with each of 10 rewards: three standard deviations of the sum.
    close(loss.float(), plain, 3 * 10 ** 0.5 * rounding)
    assert sums["accuracy"] == plain_sums["accuracy"]
    # A gradient is linear in the slopes of the 10 losses.  They are up to 1 and change by a quarter
    # of their rewards' difference and by 2 eps of their own; some may cancel in the sum.
    relative = 10 * (3 * rounding / 4 + 2 * EPS)
    for a, b in zip(torch.autograd.grad(plain, parameters), torch.autograd.grad(loss, parameters)):
        close(a, b, relative * a.abs().max().item())


def test_the_term_is_added_once_a_pair_with_its_weight():
    model = reward_model()
    rows = random_rows(5, 2, seed=3)
    margin = torch.zeros(5)
    p = torch.ones(5)
    plain, _ = pair_loss(model, rows, margin, p)
    # a temperature at which the term is far from 0
    aux_loss = model_head(term="simcse", weight=3.0, items="difference", temperature=2.0)
    loss, sums = pair_loss(model, rows, margin, p, aux_loss)
    _, h = hidden_of(model, rows)
    items = contrast_items(h, "difference")
    expected = 5 * simcse(items, items, 2.0).mean()  # dropout is off: the views are equal
    close(sums["contrast"], expected)
    tolerance = 3 * 10 ** 0.5 * rewards_rounding(model, rows)  # as in the test above
    close(loss - 3 * sums["contrast"], plain.double(), tolerance)
    assert sums["contrast"] > 1


def test_two_dropout_masks_make_two_views():
    model = tiny_reward(dropout=0.05).train()  # with .3 views of one response may well be opposed
    seen = {}

    def aux_loss(h):
        seen["h"] = h
        return h.sum((1, 2))

    aux_loss.settings = Contrast()
    pair_loss(model, random_rows(4, 2, seed=1), torch.zeros(4), torch.ones(4), aux_loss)
    s, t = seen["h"].chunk(2)
    assert s.shape == (4, 2, 32)
    assert not torch.allclose(s, t, atol=1e-2)
    # of the same responses, in the same order
    assert torch.nn.functional.cosine_similarity(s, t, dim=-1).min() > 0


@pytest.mark.parametrize("settings", [
    dict(term="simcse"), dict(term="swav", prototypes=4, queue=4),
], ids=str)
def test_a_step_with_a_term_makes_no_tensor_on_another_device(settings):
    model = tiny_reward(dropout=0.1).to("meta").train()
    aux_loss = model_head(**settings).to("meta")
    rows = random_rows(4, 2, seed=1)
    loss, _ = pair_loss(model, rows, torch.zeros(4), torch.ones(4), aux_loss)
    loss.backward()
    assert loss.device.type == "meta"
    assert model.score.weight.grad.device.type == "meta"


# ----------------------------------------------------------------------------------------------
# In a run

WITH_TERM = [
    "--reward.methods=baseline",
    "--reward.batch=8",
    "--ppo.methods=",
    "--world.demonstrations=10",
    "--contrast.term=swav",
    "--contrast.prototypes=8",
    "--contrast.queue=40",
    "--contrast.frozen=0.4",
]
PLAIN = [*WITH_TERM, "--contrast.term=none"]


def test_a_reward_model_with_a_term_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    assert go(whole, *WITH_TERM, "--stage=sft") == 0
    shutil.copytree(whole, parts)
    shutil.copytree(whole, tmp_path / "plain")
    assert go(whole, *WITH_TERM, "--stage=reward") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert go(parts, *WITH_TERM, "--stage=reward") == 130
    assert (parts / "reward_baseline.ckpt").exists()
    assert go(parts, *WITH_TERM, "--stage=reward") == 0
    model = tensors(whole, "reward_baseline")
    assert same(tensors(parts, "reward_baseline"), model)
    assert "prototypes" not in " ".join(model)  # the head is not saved
    for line in (whole / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert "contrast" in record or record["stage"] != "reward_baseline"
    assert go(tmp_path / "plain", *PLAIN, "--stage=reward") == 0
    assert not same(tensors(tmp_path / "plain", "reward_baseline"), model)
