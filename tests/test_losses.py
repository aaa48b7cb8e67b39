import math

import pytest
import torch
from hypothesis import given, strategies as st

from losses import bradley_terry, kl_penalty, language_model, masked_mean, policy_loss, value_loss

finite = st.floats(-30, 30)


def double(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


# ---------------------------------------------------------------------------------------------------------------------
# language_model

def test_language_model_is_a_loop_over_tokens():
    logits = torch.randn(3, 4, 7)
    target = torch.tensor([[0, 6, 2, -1], [3, -1, -1, -1], [5, 5, 1, 0]])
    loss = language_model(logits, target)
    assert loss.shape == (3, 4)
    for b in range(3):
        for t in range(4):
            row = logits[b, t].tolist()
            nll = math.log(sum(map(math.exp, row))) - row[target[b, t]] if target[b, t] >= 0 else 0.0
            assert loss[b, t].item() == pytest.approx(nll, abs=1e-5)


def test_language_model_gives_no_gradient_where_target_is_padding():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    language_model(logits, torch.tensor([[1, -1, 2]])).sum().backward()
    assert (logits.grad[0, 1] == 0).all() and (logits.grad[0, [0, 2]] != 0).all()


def test_language_model_is_computed_in_float32():
    logits = torch.randn(2, 3, 50).bfloat16()
    target = torch.randint(50, (2, 3))
    assert language_model(logits, target).dtype == torch.float32
    assert torch.equal(language_model(logits, target), language_model(logits.float(), target))


# ---------------------------------------------------------------------------------------------------------------------
# bradley_terry

@given(finite, finite)
def test_full_trust_is_plain_bradley_terry(chosen, rejected):
    assert bradley_terry(double(chosen), double(rejected)).item() == pytest.approx(-log_sigmoid(chosen - rejected), abs=1e-12)


@given(finite, finite)
def test_no_trust_is_the_reversed_pair(chosen, rejected):
    c, r = double(chosen), double(rejected)
    torch.testing.assert_close(bradley_terry(c, r, p=0.0), bradley_terry(r, c))


@given(finite, finite, finite, st.floats(0, 1))
def test_bradley_terry_by_its_formula(chosen, rejected, margin, p):
    d = chosen - rejected - margin
    loss = bradley_terry(double(chosen), double(rejected), double(margin), double(p))
    assert loss.item() == pytest.approx(-(p * log_sigmoid(d) + (1 - p) * log_sigmoid(-d)), abs=1e-10)


def test_the_slope_stays_minus_one_where_the_model_is_most_wrong():
    d = double(-20, -200, grad=True)  # log(sigmoid + 1e-5) would be flat here
    bradley_terry(d, torch.zeros_like(d)).sum().backward()
    torch.testing.assert_close(d.grad, double(-1, -1), atol=1e-6, rtol=0)


def test_the_margin_stands_inside_the_sigmoid():
    chosen = double(1.0, grad=True)
    loss = bradley_terry(chosen, double(0.0), margin=3.0)
    assert loss.item() == pytest.approx(-log_sigmoid(-2.0))
    loss.backward()
    assert chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(-2.0)))  # outside it would be sigmoid(-1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 0.99])
def test_a_soft_label_is_best_met_at_its_logit(p):
    d = double(math.log(p / (1 - p)), grad=True)
    loss = bradley_terry(d, torch.zeros_like(d), p=p)
    loss.backward()
    assert abs(d.grad.item()) < 1e-12
    for step in (-0.1, 0.1):
        assert bradley_terry(d.detach() + step, double(0.0), p=p) > loss


# ---------------------------------------------------------------------------------------------------------------------
# PPO

def test_policy_loss_is_a_loop_over_the_clip_cases():
    ratios, advantages = (0.5, 0.8, 0.95, 1.0, 1.1, 1.2, 2.0), (-2.0, 0.0, 1.5)
    logprob = double(*map(math.log, ratios))[:, None].expand(7, 3)
    loss = policy_loss(logprob + 0.3, torch.full((7, 3), 0.3, dtype=torch.float64), double(*advantages).expand(7, 3), clip=0.2)
    for i, ratio in enumerate(ratios):
        for j, advantage in enumerate(advantages):
            clipped = min(max(ratio, 0.8), 1.2)
            assert loss[i, j].item() == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-12)


@pytest.mark.parametrize("ratio, advantage, moves", [
    (1.5, 1.0, False), (0.5, -1.0, False),                  # already moved as the advantage asks: no further
    (1.5, -1.0, True), (0.5, 1.0, True), (1.0, 1.0, True),  # moved the wrong way, or not at all
])
def test_policy_loss_has_no_gradient_where_clipping_has_given_enough(ratio, advantage, moves):
    logprob = double(math.log(ratio), grad=True)
    policy_loss(logprob, double(0.0), double(advantage), clip=0.2).backward()
    assert logprob.grad.item() == pytest.approx(-ratio * advantage if moves else 0.0)


def test_value_loss_is_a_loop_over_the_clip_cases():
    cases = [(v, old, r) for v in (-1.0, 0.1, 0.5, 3.0) for old in (0.0, 0.4) for r in (-2.0, 0.3, 1.0)]
    value, old, returns = (double(*column) for column in zip(*cases))
    for loss, (v, o, r) in zip(value_loss(value, old, returns, clip=0.2).tolist(), cases):
        clipped = o + min(max(v - o, -0.2), 0.2)
        assert loss == pytest.approx(0.5 * max((v - r) ** 2, (clipped - r) ** 2))


def test_value_loss_of_a_small_move_is_half_the_squared_error():
    assert value_loss(double(0.1), double(0.0), double(1.0), clip=0.2).item() == pytest.approx(0.5 * 0.9 ** 2)


# ---------------------------------------------------------------------------------------------------------------------
# kl_penalty

def expected_penalty(pi, ref, kind):
    """Its exact expectation over all actions drawn from pi, beside the exact KL."""
    return (pi * kl_penalty(pi.log(), ref.log(), kind)).sum().item(), (pi * (pi / ref).log()).sum().item()


def distributions(spread, seed):
    logits = spread * torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return logits.softmax(-1)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_k1_and_k3_are_unbiased(kind, spread):
    for seed in range(5):
        expected, exact = expected_penalty(*distributions(spread, seed), kind)
        assert expected == pytest.approx(exact, abs=1e-12)


def test_k2_is_near_for_close_distributions_and_biased_for_far_ones():
    for seed in range(5):
        expected, exact = expected_penalty(*distributions(0.05, seed), "k2")
        assert expected == pytest.approx(exact, rel=0.05)
        expected, exact = expected_penalty(*distributions(3.0, seed), "k2")
        assert abs(expected - exact) > 0.1 * exact


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_what_each_estimator_says_of_the_gradient(spread):
    """Averaged over actions drawn from pi, the slope of k2 is that of KL(pi || ref), the slope of k3 that of KL(ref || pi), of k1 nothing."""
    for seed in range(5):
        pi, ref = distributions(spread, seed)
        slope = lambda loss: torch.autograd.grad(loss(x), x)[0]
        x = pi.log().requires_grad_()
        estimate = lambda kind: slope(lambda x: (pi * kl_penalty(x.log_softmax(-1), ref.log(), kind)).sum())
        torch.testing.assert_close(estimate("k1"), torch.zeros_like(pi))
        torch.testing.assert_close(estimate("k2"), slope(lambda x: (x.softmax(-1) * (x.log_softmax(-1) - ref.log())).sum()))
        torch.testing.assert_close(estimate("k3"), slope(lambda x: (ref * (ref.log() - x.log_softmax(-1))).sum()))


@given(finite, finite)
def test_k2_and_k3_are_never_negative_and_k1_is_the_difference(logprob, ref):
    of = lambda kind: kl_penalty(double(logprob), double(ref), kind).item()
    assert of("k1") == logprob - ref
    assert of("k2") >= 0 and of("k3") >= -1e-12


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_equal_probabilities_cost_nothing(kind):
    assert kl_penalty(double(-1.5), double(-1.5), kind).item() == 0


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="k1, k2 or k3, not 'k4'"):
        kl_penalty(double(0.0), double(0.0), "k4")


# ---------------------------------------------------------------------------------------------------------------------

def test_masked_mean_is_blind_to_what_is_masked():
    x = torch.tensor([[1.0, 5.0, torch.nan], [torch.inf, -torch.nan, 3.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    mean = masked_mean(x, mask)
    mean.backward()
    assert mean.item() == 3.0
    torch.testing.assert_close(x.grad, mask / 3)


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.full((2, 2), torch.nan), torch.zeros(2, 2)).item() == 0


def test_gradients_against_finite_differences():
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    chosen, margin, p = r(5), r(5), torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert check(bradley_terry, (chosen, r(5), margin, p))
    assert check(lambda new, old, a: policy_loss(new, old, a, 0.2), (r(3, 4), r(3, 4), r(3, 4)))
    assert check(lambda v, old, returns: value_loss(v, old, returns, 0.2), (r(3, 4), r(3, 4), r(3, 4)))
    for kind in ("k1", "k2", "k3"):
        assert check(lambda new, ref: kl_penalty(new, ref, kind), (r(3, 4), r(3, 4)))
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    assert check(lambda x: masked_mean(x, mask), (r(2, 4),))
    # cross-entropy is computed in float32 on purpose, so finite differences are coarse there
    target = torch.tensor([[1, 0, -1], [2, 4, 3]])
    assert check(lambda logits: language_model(logits, target), (r(2, 3, 5),), eps=1e-2, atol=1e-3)
