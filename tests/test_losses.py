"""losses.py, the supervised and the PPO losses: loops, limits, closed forms, gradients.

The contrastive losses and MetaRM's are in test_contrast.py.
"""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losses import (
    bradley_terry,
    importance_weights,
    kl_penalty,
    language_model,
    masked_mean,
    policy_loss,
    redescending,
    reward_centering,
    value_loss,
)

EPS = torch.finfo(torch.float32).eps
finite = st.floats(-30, 30)


def double(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def log_sigmoid(x):
    if x > 0:
        return -math.log1p(math.exp(-x))
    return x - math.log1p(math.exp(x))


# ----------------------------------------------------------------------------------------------
# language_model


def test_language_model_is_a_loop_over_tokens():
    logits = torch.randn(3, 4, 7)
    target = torch.tensor([[0, 6, 2, -1], [3, -1, -1, -1], [5, 5, 1, 0]])
    loss = language_model(logits, target)
    assert loss.shape == (3, 4)
    # a sum over V = 7 exponentials, its logarithm and a difference, of numbers up to max |logit|
    tolerance = (7 + 3) * EPS * (logits.abs().max().item() + math.log(7))
    assert tolerance < 1e-5
    for b in range(3):
        for t in range(4):
            row = logits[b, t].tolist()
            nll = 0.0
            if target[b, t] >= 0:
                nll = math.log(sum(map(math.exp, row))) - row[target[b, t]]
            assert loss[b, t].item() == pytest.approx(nll, abs=tolerance)


def test_language_model_gives_no_gradient_where_target_is_padding():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    language_model(logits, torch.tensor([[1, -1, 2]])).sum().backward()
    assert (logits.grad[0, 1] == 0).all()
    assert (logits.grad[0, [0, 2]] != 0).all()


def test_language_model_is_computed_in_float32():
    logits = torch.randn(2, 3, 50).bfloat16()
    target = torch.randint(50, (2, 3))
    loss = language_model(logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, language_model(logits.float(), target))


# ----------------------------------------------------------------------------------------------
# bradley_terry


@given(finite, finite)
def test_full_trust_is_plain_bradley_terry(chosen, rejected):
    loss = bradley_terry(double(chosen), double(rejected))
    assert loss.item() == pytest.approx(-log_sigmoid(chosen - rejected), abs=1e-12)


@given(finite, finite)
def test_no_trust_is_the_reversed_pair(chosen, rejected):
    c = double(chosen)
    r = double(rejected)
    torch.testing.assert_close(bradley_terry(c, r, p=0.0), bradley_terry(r, c))


@given(finite, finite, finite, st.floats(0, 1))
def test_bradley_terry_by_its_formula(chosen, rejected, margin, p):
    d = chosen - rejected - margin
    loss = bradley_terry(double(chosen), double(rejected), double(margin), double(p))
    expected = -(p * log_sigmoid(d) + (1 - p) * log_sigmoid(-d))
    assert loss.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("margin", [0.5, torch.tensor(0.5), torch.full((3,), 0.5)], ids=str)
@pytest.mark.parametrize("p", [0.75, torch.tensor(0.75), torch.full((3,), 0.75)], ids=str)
def test_margin_and_p_are_a_number_or_one_a_pair(margin, p):
    chosen = double(1.0, 2.0, -3.0)
    rejected = double(0.0, 4.0, 1.0)
    loss = bradley_terry(chosen, rejected, margin, p)
    assert loss.shape == (3,)
    for i, d in enumerate((chosen - rejected - 0.5).tolist()):
        expected = -(0.75 * log_sigmoid(d) + 0.25 * log_sigmoid(-d))
        assert loss[i].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("chosen, rejected", [
    ((3, 1), (3,)),  # would broadcast to 3 x 3 pairs
    ((3,), (3, 1)),
    ((3, 1), (3, 1)),
    ((1,), (3,)),
    ((3,), (1,)),
    ((3,), (4,)),
    ((), ()),
    ((3,), ()),
    ((2, 3), (2, 3)),
])
def test_rewards_of_another_shape_than_one_a_pair_are_refused(chosen, rejected):
    with pytest.raises(ValueError, match="give two of one shape") as error:
        bradley_terry(torch.zeros(chosen), torch.zeros(rejected))
    message = str(error.value)
    assert message.startswith("bradley_terry: ") and "\n" not in message
    assert f"chosen is {chosen}, rejected is {rejected}" in message


@pytest.mark.parametrize("name", ["margin", "p"])
@pytest.mark.parametrize("shape", [(1,), (2,), (4,), (3, 1), (1, 3), (3, 3)])
def test_a_margin_or_p_of_another_shape_is_refused(name, shape):
    given = {name: torch.zeros(shape)}
    with pytest.raises(ValueError) as error:
        bradley_terry(torch.zeros(3), torch.zeros(3), **given)
    expected = f"bradley_terry: {name} is {shape}; give a number or (3,)"
    assert str(error.value) == expected


def test_the_gradient_stays_minus_one_on_the_most_wrongly_ranked_pairs():
    d = double(-20, -200, grad=True)  # log(sigmoid + 1e-5) would be flat here
    bradley_terry(d, torch.zeros_like(d)).sum().backward()
    torch.testing.assert_close(d.grad, double(-1, -1), atol=1e-6, rtol=0)


def test_the_margin_is_inside_the_sigmoid():
    chosen = double(1.0, grad=True)
    loss = bradley_terry(chosen, double(0.0), margin=3.0)
    assert loss.item() == pytest.approx(-log_sigmoid(-2.0))
    loss.backward()
    # outside the sigmoid the gradient would be -sigmoid(-1)
    assert chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(-2.0)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 0.99])
def test_a_soft_label_has_its_minimum_at_the_logit_of_p(p):
    d = double(math.log(p / (1 - p)), grad=True)
    loss = bradley_terry(d, torch.zeros_like(d), p=p)
    loss.backward()
    assert abs(d.grad.item()) < 1e-12
    for step in (-0.1, 0.1):
        assert bradley_terry(d.detach() + step, double(0.0), p=p) > loss


# ----------------------------------------------------------------------------------------------
# PPO


def test_policy_loss_is_a_loop_over_the_clip_cases():
    ratios = (0.5, 0.8, 0.95, 1.0, 1.1, 1.2, 2.0)
    advantages = (-2.0, 0.0, 1.5)
    log_ratio = double(*map(math.log, ratios))[:, None].expand(7, 3)
    old_logprob = torch.full((7, 3), 0.3, dtype=torch.float64)
    advantage = double(*advantages).expand(7, 3)
    loss = policy_loss(log_ratio + 0.3, old_logprob, advantage, clip=0.2)
    for i, ratio in enumerate(ratios):
        for j, a in enumerate(advantages):
            clipped = min(max(ratio, 0.8), 1.2)
            expected = -min(ratio * a, clipped * a)
            assert loss[i, j].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ratio, advantage, has_gradient", [
    (1.5, 1.0, False),  # already moved in the direction of the advantage
    (0.5, -1.0, False),
    (1.5, -1.0, True),  # moved in the wrong direction
    (0.5, 1.0, True),
    (1.0, 1.0, True),   # not moved
])
def test_policy_loss_has_no_gradient_beyond_the_clip_range(ratio, advantage, has_gradient):
    logprob = double(math.log(ratio), grad=True)
    policy_loss(logprob, double(0.0), double(advantage), clip=0.2).backward()
    expected = -ratio * advantage if has_gradient else 0.0
    assert logprob.grad.item() == pytest.approx(expected)


def test_value_loss_is_a_loop_over_the_clip_cases():
    cases = []
    for v in (-1.0, 0.1, 0.5, 3.0):
        for old in (0.0, 0.4):
            for r in (-2.0, 0.3, 1.0):
                cases.append((v, old, r))
    value, old_value, returns = (double(*column) for column in zip(*cases))
    losses = value_loss(value, old_value, returns, clip=0.2).tolist()
    for loss, (v, old, r) in zip(losses, cases):
        clipped = old + min(max(v - old, -0.2), 0.2)
        assert loss == pytest.approx(0.5 * max((v - r) ** 2, (clipped - r) ** 2))


def test_value_loss_of_a_small_move_is_half_the_squared_error():
    loss = value_loss(double(0.1), double(0.0), double(1.0), clip=0.2)
    assert loss.item() == pytest.approx(0.5 * 0.9 ** 2)


# ----------------------------------------------------------------------------------------------
# kl_penalty


def expected_penalty(pi, ref, kind):
    """-> exact expectation of the estimator over actions drawn from pi, and the exact KL"""
    expectation = (pi * kl_penalty(pi.log(), ref.log(), kind)).sum().item()
    kl = (pi * (pi / ref).log()).sum().item()
    return expectation, kl


def distributions(spread, seed):
    """-> two distributions over six actions"""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, 6, dtype=torch.float64, generator=generator)
    return logits.softmax(-1)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_k1_and_k3_are_unbiased(kind, spread):
    for seed in range(5):
        expectation, kl = expected_penalty(*distributions(spread, seed), kind)
        assert expectation == pytest.approx(kl, abs=1e-12)


def test_k2_is_near_for_close_distributions_and_biased_for_distant_ones():
    for seed in range(5):
        expectation, kl = expected_penalty(*distributions(0.05, seed), "k2")
        assert expectation == pytest.approx(kl, rel=0.05)
        expectation, kl = expected_penalty(*distributions(3.0, seed), "k2")
        assert abs(expectation - kl) > 0.1 * kl


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_the_expected_gradient_of_each_estimator(spread):
    """Over actions drawn from pi: of k1 it is 0, of k2 KL(pi || ref)'s, of k3 KL(ref || pi)'s."""
    for seed in range(5):
        pi, ref = distributions(spread, seed)
        x = pi.log().requires_grad_()
        logp = x.log_softmax(-1)

        def gradient(loss):
            return torch.autograd.grad(loss, x, retain_graph=True)[0]

        expected = {
            "k1": torch.zeros_like(pi),
            "k2": gradient((logp.exp() * (logp - ref.log())).sum()),
            "k3": gradient((ref * (ref.log() - logp)).sum()),
        }
        for kind in expected:
            estimate = gradient((pi * kl_penalty(logp, ref.log(), kind)).sum())
            torch.testing.assert_close(estimate, expected[kind])


@given(finite, finite)
def test_k2_and_k3_are_never_negative_and_k1_is_the_difference(logprob, ref):
    estimate = {}
    for kind in ("k1", "k2", "k3"):
        estimate[kind] = kl_penalty(double(logprob), double(ref), kind).item()
    assert estimate["k1"] == logprob - ref
    assert estimate["k2"] >= 0
    assert estimate["k3"] >= -1e-12


@pytest.mark.parametrize("d", [-2.0, -0.1, 0.3, 4.0])
def test_the_estimators_by_their_formulas(d):
    expected = {"k1": d, "k2": d ** 2 / 2, "k3": math.exp(-d) - 1 + d}
    for kind in expected:
        estimate = kl_penalty(double(d - 5.0), double(-5.0), kind).item()
        assert estimate == pytest.approx(expected[kind], abs=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_equal_probabilities_have_no_penalty(kind):
    assert kl_penalty(double(-1.5), double(-1.5), kind).item() == 0


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="k1, k2 or k3, not 'k4'"):
        kl_penalty(double(0.0), double(0.0), "k4")


# ----------------------------------------------------------------------------------------------
# masked_mean, gradients


def test_masked_mean_ignores_masked_entries():
    x = torch.tensor([[1.0, 5.0, torch.nan], [torch.inf, -torch.nan, 3.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    mean = masked_mean(x, mask)
    mean.backward()
    assert mean.item() == 3.0
    assert torch.equal(x.grad, mask / 3)


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.full((2, 2), torch.nan), torch.zeros(2, 2)).item() == 0


def test_centering_by_hand():
    centred = reward_centering(double(1.0, -3.0, 2.0), double(2.0, 3.0, -5.0))
    assert centred.tolist() == [9.0, 0.0, 9.0]


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_the_redescending_loss_by_its_formula_and_its_gradient(gamma):
    d = torch.linspace(-30, 30, 41, dtype=torch.float64, requires_grad=True)
    loss = redescending(d, torch.zeros_like(d), gamma)
    torch.testing.assert_close(loss, (1 - d.sigmoid() ** gamma) / gamma)
    gradient, = torch.autograd.grad(loss.sum(), d)
    torch.testing.assert_close(gradient, -d.sigmoid() ** gamma * (-d).sigmoid())
    assert gradient[0].abs() < 0.06  # of the pair that is contradicted most
    plain, = torch.autograd.grad(bradley_terry(d, torch.zeros_like(d)).sum(), d)
    assert plain[0] < -0.99


def test_with_a_small_gamma_the_redescending_loss_is_bradley_terry():
    chosen, rejected = 3 * torch.randn(2, 20, dtype=torch.float64)
    close = redescending(chosen, rejected, 1e-6)
    torch.testing.assert_close(close, bradley_terry(chosen, rejected), atol=1e-4, rtol=0)


def test_importance_weights_by_hand():
    """Ratios 2 * 3 = 6, 1 * 1 = 1, and 1/5 * 1/4 = 1/20; clipped to 1/4 .. 4: 4, 1, 1/4"""
    ratios = double([2.0, 3.0], [1.0, 1.0], [0.2, 0.25])
    sft = double([-3.0, -5.0], [-1.0, -2.0], [-4.0, -9.0])
    weights = importance_weights(sft + ratios.log(), sft, 4.0)
    mean = (4 + 1 + 0.25) / 3
    torch.testing.assert_close(weights, double(4 / mean, 1 / mean, 0.25 / mean))


def test_importance_weights_of_one_policy_are_one():
    logprob = -100 * torch.rand(7, 2)
    assert torch.equal(importance_weights(logprob, logprob, 10.0), torch.ones(7))
    assert torch.equal(importance_weights(logprob + 50, logprob, 1.0), torch.ones(7))


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradients_against_finite_differences():
    check = torch.autograd.gradcheck
    p = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert check(bradley_terry, (random(5), random(5), random(5), p))

    def clipped_policy_loss(logprob, old_logprob, advantage):
        return policy_loss(logprob, old_logprob, advantage, 0.2)

    def clipped_value_loss(value, old_value, returns):
        return value_loss(value, old_value, returns, 0.2)

    for loss in (clipped_policy_loss, clipped_value_loss):
        assert check(loss, (random(3, 4), random(3, 4), random(3, 4)))
    for kind in ("k1", "k2", "k3"):
        assert check(kl_penalty, (random(3, 4), random(3, 4), kind))
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    assert check(masked_mean, (random(2, 4), mask))


def test_the_gradient_of_the_language_model_loss_against_finite_differences():
    """The loss is computed in float32 on purpose, so its finite differences are coarse.

    Rounding is about 10 eps of a loss up to 5: over 2 steps of 0.01 that is 6e-4.  The error of a
    central difference, step^2 / 6 of a third derivative below 0.1, is 2e-6.
    """
    target = torch.tensor([[1, 0, -1], [2, 4, 3]])
    logits = random(2, 3, 5)
    assert torch.autograd.gradcheck(language_model, (logits, target), eps=1e-2, atol=1e-3)
