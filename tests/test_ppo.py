"""PPO: its pure parts, then one rollout and one update of tiny models, a setting at a time."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import FakeRun, random_rows, same, tiny_reward
from hypothesis import given
from hypothesis import strategies as st
from ppo_models import (
    EOS,
    PLAIN,
    make_learners,
    make_models,
    make_prompts,
    pad_columns,
    response_length,
    roll,
    sgd,
    stub_run,
    update,
)
from small_runs import clone

import config
import ppo
from data import Row, collate, response_tokens
from generate import Sampling, sampling_probs
from losses import kl_penalty, language_model
from ppo import (
    Moments,
    adaptive_kl_coef,
    check_first_step,
    gae,
    lr_factor,
    shape_rewards,
    token_logprob,
    whiten,
)

EVERYTHING = replace(
    PLAIN, temperature=0.7, kl_estimator="k3", critic_warmup_iters=1, ptx_coef=0.5, warmup=0.5,
    adaptive_kl_target=1.0, whiten=True, missing_eos_penalty=1.0, target_kl=0.5, reset_reference=2,
    min_new_tokens=3, normalize=False,
)
DEMONSTRATIONS = random_rows(20, 1, 5)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------
# Advantages


def explicit_gae(rewards, values, gamma, lam):
    """One response: A_t = sum over l of (gamma lam)^l delta_{t + l}"""
    after = values[1:] + [0.0]
    delta = [r + gamma * v2 - v for r, v, v2 in zip(rewards, values, after)]
    advantages = []
    for t in range(len(delta)):
        advantages.append(sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, len(delta))))
    return advantages


def padded(rows, total, fill):
    """[(number of places before, list)] -> (B, total)"""
    out = []
    for before, row in rows:
        out.append([fill] * before + row + [fill] * (total - before - len(row)))
    return double(*out)


number = st.floats(-5, 5)
steps = st.lists(st.tuples(number, number), min_size=1, max_size=6)  # reward and value of a token


@given(
    st.lists(st.tuples(st.integers(0, 3), steps), min_size=1, max_size=4),
    st.floats(0, 1), st.floats(0, 1),
)
def test_gae_is_the_double_sum(responses, gamma, lam):
    """Responses begin anywhere; the tokens around them are masked and hold NaN."""
    rewards = []
    values = []
    ones = []
    expected = []
    expected_returns = []
    for before, tokens in responses:
        r, v = (list(column) for column in zip(*tokens))
        advantages = explicit_gae(r, v, gamma, lam)
        rewards.append((before, r))
        values.append((before, v))
        ones.append((before, [1.0] * len(r)))
        expected.append((before, advantages))
        expected_returns.append((before, [a + x for a, x in zip(advantages, v)]))
    mask = padded(ones, 10, 0.0)
    advantages, returns = gae(
        padded(rewards, 10, torch.nan), padded(values, 10, torch.nan), mask, gamma, lam
    )
    torch.testing.assert_close(advantages, padded(expected, 10, 0.0))
    torch.testing.assert_close(returns, padded(expected_returns, 10, 0.0))


def test_lambda_one_is_return_minus_value():
    rewards = torch.randn(3, 6).double()
    values = torch.randn(3, 6).double()
    advantages, returns = gae(rewards, values, torch.ones(3, 6), 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, to_go - values)
    torch.testing.assert_close(returns, to_go)


def test_lambda_zero_is_the_one_step_error():
    rewards = double([1, 2, 4])
    values = double([0.5, 0.25, 3])
    advantages, _ = gae(rewards, values, torch.ones(1, 3), 0.5, 0.0)
    torch.testing.assert_close(advantages, double([1 + 0.125 - 0.5, 2 + 1.5 - 0.25, 4 - 3]))


def test_masked_tokens_between_others_are_skipped():
    rewards = torch.randn(2, 6)
    values = torch.randn(2, 6)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 1]])
    whole = gae(rewards, values, mask, 0.9, 0.8)
    for b in range(2):
        is_response = mask[b] == 1
        ones = torch.ones(1, int(is_response.sum()))
        parts = gae(rewards[b, is_response][None], values[b, is_response][None], ones, 0.9, 0.8)
        for x, part in zip(whole, parts, strict=True):
            torch.testing.assert_close(x[b, is_response], part[0])
            assert (x[b, ~is_response] == 0).all()


@given(st.lists(st.lists(st.floats(-50, 50), min_size=1, max_size=6), min_size=1, max_size=5))
def test_whitening_reads_response_tokens_alone(rows):
    T = max(map(len, rows)) + 2
    x = double(*(row + [math.nan] * (T - len(row)) for row in rows))
    mask = ~x.isnan()
    out = whiten(x, mask)
    flat = np.concatenate(rows)
    expected = (flat - flat.mean()) / np.sqrt(flat.var() + 1e-8)
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out[mask], torch.from_numpy(expected))


# ----------------------------------------------------------------------------------------------
# Rewards and probabilities


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=8), min_size=1, max_size=6))
def test_moments_are_those_of_all_values(chunks):
    moments = Moments()
    for chunk in chunks:
        moments.add(double(*chunk))
    everything = np.concatenate(chunks)
    assert moments.count == len(everything)
    assert moments.mean == pytest.approx(everything.mean(), abs=1e-9)
    assert moments.std == pytest.approx(max(everything.std(), 1e-8), abs=1e-6)


def test_moments_of_large_numbers_keep_their_digits():
    moments = Moments()
    for chunk in double([1e9, 1e9 + 1], [1e9 + 2, 1e9 + 3]):
        moments.add(chunk)
    assert moments.std == pytest.approx(np.std([0, 1, 2, 3]))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_score_is_on_the_last_token_and_the_penalty_on_all(kind):
    logprob = torch.randn(3, 4)
    ref_logprob = torch.randn(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    logprob[mask == 0] = torch.nan
    cfg = config.Ppo(kl_coef=0.3, kl_estimator=kind)
    score = torch.tensor([10.0, 20.0, 30.0])
    rewards = shape_rewards(score, logprob, ref_logprob, mask, cfg)
    expected = (-0.3 * kl_penalty(logprob, ref_logprob, kind)).where(mask == 1, 0.0)
    expected[0, 3] += 10
    expected[1, 1] += 20
    expected[2, 0] += 30
    torch.testing.assert_close(rewards, expected)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_token_logprob_is_a_loop(temperature):
    logits = torch.randn(4, 5)
    target = torch.tensor([4, 0, 2, 2])
    sampling = Sampling(9, 1, temperature=temperature)
    logprob = token_logprob(logits, target, torch.tensor([0, 1, 0, 2]), sampling)
    for i in range(4):
        expected = torch.softmax(logits[i] / temperature, -1)[target[i]].log()
        torch.testing.assert_close(logprob[i], expected)


def test_logits_in_half_precision_are_divided_in_float32_as_in_sampling():
    logits = (4 * torch.randn(200, 50)).bfloat16()
    target = torch.randint(50, (200,))
    sampling = Sampling(9, 1, temperature=0.7)
    logprob = token_logprob(logits, target, torch.zeros(200, dtype=torch.int64), sampling)
    p = sampling_probs(logits, temperature=0.7)
    torch.testing.assert_close(logprob, p.gather(1, target[:, None])[:, 0].log())


def test_eos_has_probability_zero_before_the_shortest_response():
    logits = torch.randn(5, 6)
    before = logits.clone()
    step = torch.tensor([3, 0, 2, 1, 4])
    sampling = Sampling(9, eos_id=2, temperature=0.7, min_new_tokens=3)
    columns = []
    for token in range(6):
        columns.append(token_logprob(logits, torch.full((5,), token), step, sampling).exp())
    p = torch.stack(columns, -1)
    torch.testing.assert_close(p.sum(-1), torch.ones(5))
    assert ((p[:, 2] == 0) == (step < 3)).all()
    both = sampling._replace(more_eos=(4,))
    assert token_logprob(logits, torch.full((5,), 4), step, both).isneginf().tolist() == (
        step < 3).tolist()
    torch.testing.assert_close(p[step >= 3], (logits[step >= 3] / 0.7).softmax(-1))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("measured, factor", [
    (6.0, 1.0), (6.6, 1.01), (600.0, 1.02), (-5.0, 0.98), (0.0, 0.98), (5.4, 0.99),
])
def test_the_weight_of_the_kl_follows_the_measured_kl_by_two_per_cent_at_most(measured, factor):
    assert adaptive_kl_coef(0.5, measured, 6.0) == pytest.approx(0.5 * factor)


def test_an_adaptive_weight_keeps_a_process_at_its_target():
    kl = 0.0
    kl_coef = 1.0
    for _ in range(600):
        kl = 3.0 / kl_coef  # a larger penalty leaves less KL
        kl_coef = adaptive_kl_coef(kl_coef, kl, 0.5)
    assert kl == pytest.approx(0.5, rel=0.05)


def test_learning_rates_fall_to_zero_and_rise_where_run_and_policy_start():
    plain = config.Ppo(iterations=4)
    assert [lr_factor(i, plain) for i in range(4)] == [1 - i / 4 for i in range(4)]
    cfg = config.Ppo(iterations=10, warmup=0.2, critic_warmup_iters=3)
    expected = [0.5, 0.9, 0.8, 0.5 * 0.7, 0.6, 0.5]
    assert [lr_factor(i, cfg) for i in range(6)] == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------
# The check of the first step


def first_metrics(**changes):
    good = {"first_ratio": 1.0, "kl": 0.0, "logprob_mismatch_max": 0.0}
    return good | changes


@pytest.mark.parametrize("fault, message", [
    ({"first_ratio": 1.01}, "ratio"),
    ({"first_ratio": 0.99}, "ratio"),
    ({"kl": 0.01}, "KL"),
    ({"kl": -0.01}, "KL"),
    ({"logprob_mismatch_max": 0.01}, "between sampling and scoring"),
    ({"first_ratio": torch.nan}, "ratio"),
    ({"kl": torch.nan}, "KL"),
])
def test_a_first_step_that_has_moved_is_refused(fault, message):
    check_first_step(first_metrics(), 1e-3)
    small = first_metrics(first_ratio=1.0005, kl=-0.0005, logprob_mismatch_max=0.0005)
    check_first_step(small, 1e-3)
    with pytest.raises(RuntimeError, match=f"PPO's first step: .*{message}"):
        check_first_step(first_metrics(**fault), 1e-3)


def test_in_half_precision_one_token_may_be_off_but_not_all():
    def check(mean, *mismatch):
        metrics = first_metrics(logprob_mismatch_max=0.23, logprob_mismatch_mean=mean)
        check_first_step(metrics, 0.1, *mismatch)

    check(0.03, "logprob_mismatch_mean")
    for fault in (
        (0.2, "logprob_mismatch_mean"), (torch.nan, "logprob_mismatch_mean"), (0.03,),
    ):
        with pytest.raises(RuntimeError, match="sampling and scoring"):
            check(*fault)


def run_for_check(dtype=torch.float32, device="cpu", **settings):
    cfg = config.Config(ppo=config.Ppo(**settings))
    return FakeRun(cfg=cfg, dtype=dtype, device=torch.device(device))


def test_the_check_allows_what_differs_by_intention():
    """A later round starts away from SFT; truncated sampling is not what is scored."""
    far = first_metrics(kl=3.0)
    ppo.check_start(run_for_check(), far, start="policy_meta_1")
    with pytest.raises(RuntimeError, match="KL"):
        ppo.check_start(run_for_check(), far, start="sft")
    truncated = first_metrics(logprob_mismatch_max=3.0)
    for settings in ({"top_p": 0.9}, {"repetition_penalty": 1.1}):
        ppo.check_start(run_for_check(**settings), truncated, start="sft")
        with pytest.raises(RuntimeError, match="ratio"):
            ppo.check_start(run_for_check(**settings), truncated | {"first_ratio": 2.0}, "sft")
    with pytest.raises(RuntimeError, match="sampling and scoring"):
        ppo.check_start(run_for_check(), truncated, start="sft")


def test_the_check_allows_the_rounding_of_tf32_on_cuda():
    """CUDA multiplies float32 matrices in TF32; an H200 gave a ratio off by 7e-4."""
    metrics = first_metrics(first_ratio=1 + 7e-4, logprob_mismatch_mean=2e-4)
    ppo.check_start(run_for_check(device="cuda"), metrics, "sft")
    with pytest.raises(RuntimeError, match="ratio"):
        ppo.check_start(run_for_check(), metrics, "sft")


def test_the_check_in_half_precision_reads_the_mean():
    metrics = first_metrics(logprob_mismatch_max=0.23, logprob_mismatch_mean=0.03)
    ppo.check_start(run_for_check(torch.bfloat16), metrics, "sft")
    with pytest.raises(RuntimeError, match="sampling and scoring"):
        ppo.check_start(run_for_check(), metrics, "sft")


# ----------------------------------------------------------------------------------------------
# A rollout


def test_a_rollout_holds_what_was_sampled():
    models = make_models()
    with torch.no_grad():
        noise = torch.randn(models.reference.lm_head.weight.shape)
        models.reference.lm_head.weight.add_(0.05 * noise)
    scored = []

    def reward_fn(rows):
        scored.extend(rows)
        return response_length(rows)

    prompts = make_prompts()
    rollout, metrics, responses, scores = roll(models._replace(reward_fn=reward_fn))
    assert {len(r) for r in responses} > {7} and 0 < metrics["eos_rate"] < 1
    kl = []
    for b, (prompt, response, row) in enumerate(zip(prompts, responses, scored, strict=True)):
        n = len(response)
        assert row.prompt.tolist() == prompt
        assert row.responses[0].tolist() == response + [EOS] * (response[-1] != EOS)
        assert EOS not in response[:-1] and (response[-1] == EOS or n == 7)
        assert rollout.rows[b].prompt.tolist() == prompt
        assert rollout.rows[b].responses[0].tolist() == response
        assert rollout.mask[b].tolist() == [t < n for t in range(rollout.mask.shape[1])]
        logp = response_logprob(models.policy, prompt, response)
        ref_logp = response_logprob(models.reference, prompt, response)
        torch.testing.assert_close(rollout.logprob[b, :n], logp, atol=1e-5, rtol=0)
        for part in (rollout.logprob, rollout.value, rollout.advantage, rollout.returns):
            assert (part[b, n:] == 0).all()
        kl.append(float((logp - ref_logp).sum()))
    assert metrics["kl"] == pytest.approx(np.mean(kl), abs=1e-4) and abs(metrics["kl"]) > 1e-3
    assert [s["kl"] for s in scores] == pytest.approx(kl, abs=1e-4)
    assert [s["reward"] for s in scores] == response_length(scored).tolist()
    assert metrics["length"] == pytest.approx(np.mean([len(r) for r in responses]))
    assert metrics["reward"] == pytest.approx(response_length(scored).mean().item())


@torch.no_grad()
def response_logprob(model, prompt, response):
    """Log-probability of each token of a response, computed alone -> (n,)"""
    logp = model(torch.tensor([prompt + response]))[0].log_softmax(-1)
    first = len(prompt) - 1
    return torch.stack([logp[first + i, token] for i, token in enumerate(response)])


def test_advantages_come_from_normalized_clipped_scores():
    moments = Moments()
    cfg = config.Ppo(max_new_tokens=7, gamma=1.0, gae_lambda=1.0, reward_clip=0.5)
    rollout, _, responses, scores = roll(make_models(), cfg, moments=moments)
    reward = np.array([score["reward"] for score in scores])
    assert moments.mean == pytest.approx(reward.mean())
    assert moments.std == pytest.approx(reward.std())
    expected = ((reward - reward.mean()) / reward.std()).clip(-0.5, 0.5)
    for b, response in enumerate(responses):  # no KL, no discount: every return is the score
        n = len(response)
        returns = torch.full((n,), expected[b], dtype=torch.float32)
        torch.testing.assert_close(rollout.returns[b, :n], returns)


def test_rewards_that_are_not_normalized_are_neither_shifted_nor_clipped():
    cfg = replace(PLAIN, gamma=1.0, gae_lambda=1.0, reward_clip=0.01, normalize=False)
    models = make_models(reward_fn=lambda rows: 100 + response_length(rows))
    rollout, metrics, _, scores = roll(models, cfg)
    rewards = torch.tensor([score["reward"] for score in scores])
    torch.testing.assert_close(rollout.returns[:, 0], rewards)
    assert metrics["reward_normalised"] == metrics["reward"] > 100


def test_no_response_ends_before_min_new_tokens():
    models = make_models()
    models.policy.lm_head.weight.data[EOS] = 30 * torch.randn(32).sign()
    shortest = {}
    for n in (0, 4):
        _, metrics, responses, _ = roll(models, replace(PLAIN, min_new_tokens=n))
        assert all(EOS not in response[:n] for response in responses)
        assert metrics["logprob_mismatch_max"] < 1e-4
        shortest[n] = min(map(len, responses))
    assert shortest == {0: 1, 4: 5}  # with EOS itself


def test_the_penalty_is_for_responses_without_eos():
    models = make_models()
    cfg = replace(PLAIN, gamma=1.0, gae_lambda=1.0)
    plain, _, responses, _ = roll(models, cfg)
    penalized, _, _, _ = roll(models, replace(cfg, missing_eos_penalty=3.0))
    ended = torch.tensor([response[-1] == EOS for response in responses])
    assert ended.any() and not ended.all()
    lost = plain.returns[:, 0] - penalized.returns[:, 0]
    torch.testing.assert_close(lost, torch.where(ended, 0.0, 3.0))


def test_whitened_advantages_leave_the_returns_unchanged():
    models = make_models()
    plain = roll(models)[0]
    whitened = roll(models, replace(PLAIN, whiten=True))[0]
    mask = plain.mask
    advantage = whitened.advantage[mask]
    assert advantage.mean().abs() < 1e-5
    assert advantage.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert plain.advantage[mask].std(correction=0) != pytest.approx(1, abs=1e-2)
    assert torch.equal(plain.returns, whitened.returns)


def test_metrics_are_averages_over_response_tokens():
    models = make_models()
    rollout, metrics, responses, _ = roll(models)
    assert len({len(response) for response in responses}) > 3
    nll = []
    returns = []
    errors = []
    residual = rollout.returns - rollout.value
    for b, (prompt, response) in enumerate(zip(make_prompts(), responses)):
        nll += (-response_logprob(models.reference, prompt, response)).tolist()
        returns += rollout.returns[b, :len(response)].tolist()
        errors += residual[b, :len(response)].tolist()
    assert metrics["perplexity_sft"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    explained = 1 - np.var(errors) / np.var(returns)
    assert metrics["explained_variance"] == pytest.approx(explained, rel=1e-4)
    ended = np.mean([response[-1] == EOS for response in responses])
    assert metrics["eos_rate"] == pytest.approx(ended)
    assert metrics["length"] == np.mean([len(response) for response in responses])


@pytest.mark.parametrize("settings", [{"top_p": 0.5}, {"repetition_penalty": 3.0}])
def test_truncated_responses_are_scored_under_the_whole_distribution(settings):
    models = make_models()
    plain = roll(models)
    rollout, metrics, responses, _ = roll(models, replace(PLAIN, **settings))
    assert responses != plain[2]
    assert metrics["logprob_mismatch_max"] > 1e-2
    for b, (prompt, response) in enumerate(zip(make_prompts(), responses)):
        logp = response_logprob(models.policy, prompt, response)
        torch.testing.assert_close(rollout.logprob[b, :len(response)], logp, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------
# An update


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_before_the_first_step_the_ratio_is_one_and_the_kl_zero(temperature):
    models = make_models()
    learners = make_learners(models)
    cfg = replace(PLAIN, temperature=temperature)
    rollout, metrics, _, _ = roll(models, cfg)
    metrics |= update(learners, rollout, cfg)
    assert abs(metrics["first_ratio"] - 1) < 1e-5
    assert metrics["kl"] == 0
    assert 0 < metrics["logprob_mismatch_mean"] < metrics["logprob_mismatch_max"] < 1e-4
    check_first_step(metrics, 1e-4)
    second = update(learners, rollout, cfg)
    assert abs(second["first_ratio"] - 1) > 1e-3  # the measure notices a policy that has moved


def test_with_every_setting_on_the_first_ratio_is_one_and_the_kl_zero():
    models = make_models()
    learners = make_learners(models)
    rollout, metrics, _, _ = roll(models, EVERYTHING)
    metrics |= update(learners, rollout, EVERYTHING, demonstrations=DEMONSTRATIONS)
    assert abs(metrics["first_ratio"] - 1) < 1e-5 and metrics["kl"] == 0
    assert metrics["logprob_mismatch_max"] < 1e-5
    check_first_step(metrics, 1e-5)
    second = update(learners, rollout, EVERYTHING, demonstrations=DEMONSTRATIONS)
    assert abs(second["first_ratio"] - 1) > 1e-3


def test_a_learning_rate_of_zero_moves_nothing_and_another_moves_both():
    models = make_models()
    learners = make_learners(models)
    rollout = roll(models)[0]
    before = clone(models.policy), clone(models.critic)
    update(learners, rollout, replace(PLAIN, lr=0.0, critic_lr=0.0))
    for model, old in zip((models.policy, models.critic), before):
        assert same(old, model.state_dict())
    update(learners, rollout, replace(PLAIN, lr=0.25e-2, critic_lr=0.25e-2))
    for model, old in zip((models.policy, models.critic), before):
        new = model.state_dict()
        assert all(not torch.equal(new[key], old[key]) for key in old)


@torch.no_grad()
def movement(model, before):
    """Change of all weights since a state dict -> (n,)"""
    state = model.state_dict()
    return torch.cat([(state[key] - before[key]).double().flatten() for key in before])


def test_both_gradients_are_clipped_to_train_grad_clip():
    """One step of plain SGD moves by lr times the clipped gradient: its norm is lr grad_clip, and
    its direction that of the gradient."""
    cfg = replace(PLAIN, lr=0.5, critic_lr=2.0, num_ppo_epochs=1, num_minibatches=1)
    moved = {}
    for grad_clip in (1e-3, 1e6):
        models = make_models()
        learners = make_learners(models, sgd)
        rollout = roll(models, cfg)[0]
        before = clone(models.policy), clone(models.critic)
        update(learners, rollout, cfg, grad_clip)
        moved[grad_clip] = [
            movement(models.policy, before[0]) / cfg.lr,
            movement(models.critic, before[1]) / cfg.critic_lr,
        ]
    for clipped, whole in zip(moved[1e-3], moved[1e6]):
        assert whole.norm() > 0.01
        assert clipped.norm() == pytest.approx(1e-3, rel=1e-3)
        assert float(clipped @ whole / clipped.norm() / whole.norm()) > 0.999


def test_a_minibatch_may_be_one_response():
    cfg = replace(PLAIN, num_ppo_epochs=1, num_minibatches=3)
    models = make_models()
    learners = make_learners(models, sgd)
    rollout = roll(models, cfg, make_prompts(3))[0]
    before = clone(models.policy)
    metrics = update(learners, rollout, cfg)
    assert metrics["policy_steps"] == 1.0 and movement(models.policy, before).norm() > 0


def test_a_scaled_loss_moves_both_models_the_same():
    """A scale of 1024 changes no digit of a gradient, which is unscaled before it is clipped."""
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        models = make_models()
        learners = make_learners(models, sgd, scaler)
        rollout = roll(models)[0]
        update(learners, rollout, grad_clip=0.1)
        ends.append((models.policy.state_dict(), models.critic.state_dict()))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])


def test_the_critic_learns_the_returns():
    models = make_models()
    learners = make_learners(models)
    rollout = roll(models)[0]
    cfg = replace(PLAIN, critic_lr=1e-2, num_ppo_epochs=20, cliprange_value=100.0)
    first = update(learners, rollout, cfg, policy_stopped=True)["value_loss"]
    last = update(learners, rollout, cfg, policy_stopped=True)["value_loss"]
    assert last < 0.5 * first


@pytest.mark.parametrize("name, fill", [
    ("plain", 1e6), ("everything", torch.nan),
])
def test_padding_does_not_change_an_update(name, fill):
    """Three more columns of padding, filled with what must not be read.

    Wider tensors are added up in another order.  Float32 rounds a gradient, whose norm is clipped
    to 1, by 2^-24 an addition, here some 100 of them one after the other: 1e-5.  Eight plain steps
    of 0.1 add up to 0.8 of that.
    """
    plain = replace(PLAIN, lr=0.1, critic_lr=0.1)
    everything = replace(EVERYTHING, lr=0.1, critic_lr=0.1)
    cfg = {"plain": plain, "everything": everything}[name]
    results = []
    for extra in (0, 3):
        models = make_models()
        learners = make_learners(models, sgd)
        rollout = pad_columns(roll(models, cfg)[0], extra, fill if extra else 0.0)
        before = clone(models.policy), clone(models.critic)
        metrics = update(learners, rollout, cfg, demonstrations=DEMONSTRATIONS)
        assert movement(models.policy, before[0]).abs().max() > 1e-3
        assert movement(models.critic, before[1]).abs().max() > 1e-3
        results.append((metrics, clone(models.policy), clone(models.critic)))
    first, second = results
    assert first[0] == pytest.approx(second[0], abs=1e-5)
    for a, b in zip(first[1:], second[1:]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_groups_of_similar_length_do_not_change_a_rollout_or_an_update(monkeypatch):
    """The tolerance is that of padding, above."""
    prompts = [prompt[:1 + 2 * (i % 4)] for i, prompt in enumerate(make_prompts())]
    cfg = replace(PLAIN, lr=0.1, critic_lr=0.1)
    results = []
    for pass_cost, fewest in ((0, 6), (10 ** 6, 1)):
        monkeypatch.setitem(ppo.PASS_COST, "cpu", pass_cost)
        models = make_models()
        rollout, metrics, _, _ = roll(models, cfg, prompts)
        assert len(ppo.groups_of(stub_run(cfg), rollout.rows)) >= fewest
        metrics |= update(make_learners(models, sgd), rollout, cfg)
        results.append((metrics, torch.stack(rollout[2:]), clone(models.policy)))
    first, second = results
    assert first[0] == pytest.approx(second[0], abs=1e-5)
    for a, b in zip(first[1:], second[1:]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_prompt_that_its_responses_share_changes_neither_rollout_nor_update(monkeypatch):
    """The tolerance is that of padding, above.  One minibatch: the order of the rows differs."""
    prompts = [make_prompts()[i % 10] for i in range(40)]
    cfg = replace(PLAIN, lr=0.1, critic_lr=0.1, num_minibatches=1)
    reward_model = tiny_reward(seed=3)
    monkeypatch.setattr(ppo, "MAX_SHARE", 100)
    results = []
    for max_branches in (1, 3, 8):
        monkeypatch.setattr(ppo, "MAX_BRANCHES", max_branches)
        reward_fn = loaded_reward_fn(monkeypatch, cfg, reward_model)
        models = make_models(reward_fn)
        rollout, metrics, _, _ = roll(models, cfg, prompts)
        groups = ppo.groups_of(stub_run(cfg), rollout.rows)
        batch = ppo.make_token_batch([rollout.rows[i] for i in groups[-1]], torch.device("cpu"))
        assert (batch.branch is None) == (max_branches == 1)
        metrics |= update(make_learners(models, sgd), rollout, cfg)
        results.append((metrics, torch.stack(rollout[2:]), clone(models.policy)))
    first, *others = results
    for other in others:
        assert first[0] == pytest.approx(other[0], abs=1e-5)
        for a, b in zip(first[1:], other[1:]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def loaded_reward_fn(monkeypatch, cfg, model):
    """make_reward_fn with this model in the place of a saved one"""
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "load_model", lambda run, kind, name: model)
        return ppo.make_reward_fn(stub_run(cfg), "reward_flip")


def make_row(prompt_len, *response_lens):
    return Row(np.arange(prompt_len), tuple(np.arange(n) for n in response_lens))


def test_responses_share_a_prompt_while_they_are_short():
    """Up to eight, and up to four times as many tokens as the prompt has"""
    assert ppo.has_room(make_row(5, 9, 9), np.arange(2))
    assert not ppo.has_room(make_row(5, 9, 9), np.arange(3))
    assert ppo.has_room(make_row(50, *[2] * 7), np.arange(2))
    assert not ppo.has_room(make_row(50, *[2] * 8), np.arange(2))
    rows = [make_row(5, 9), make_row(6, 30), make_row(5, 9), make_row(5, 9), make_row(6, 1)]
    assert ppo.rows_by_prompt(rows) == [[0, 2], [1], [3], [4]]


def test_a_pass_has_a_limit_of_tokens(monkeypatch):
    rows = [make_row(5 + i, 5) for i in range(12)]  # twelve prompts of 10 to 21 tokens with answers
    run = FakeRun(device=torch.device("cpu"))
    assert len(ppo.groups_of(run, rows)) == 1
    monkeypatch.setattr(ppo, "PASS_TOKENS", 45)
    groups = ppo.groups_of(run, rows)
    assert sorted(torch.cat(groups).tolist()) == list(range(12))
    for group in groups:
        assert len(group) * max(len(rows[i]) for i in group) <= 45
    monkeypatch.setattr(ppo, "PASS_TOKENS", 1)
    assert [len(group) for group in ppo.groups_of(run, rows)] == [1] * 12


def test_minibatches_are_drawn_by_prompt(monkeypatch):
    monkeypatch.setattr(ppo, "MAX_SHARE", 100)
    distinct = roll(make_models())[0].rows[:6]
    rows = [distinct[i] for i in (0, 1, 0, 2, 1, 0, 3)]
    orders = set()
    for seed in range(20):
        order = ppo.shuffle_prompts(rows, torch.Generator().manual_seed(seed)).tolist()
        assert sorted(order) == list(range(7))
        assert len(ppo.share_prompts([rows[i] for i in order])) == 4
        orders.add(tuple(order))
    assert len(orders) > 5
    expected = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    order = ppo.shuffle_prompts(distinct, torch.Generator().manual_seed(0))
    assert torch.equal(order, expected)


def test_logits_are_computed_for_response_tokens_alone(monkeypatch):
    models = make_models()
    rollout = roll(models)[0]
    batch = ppo.make_token_batch(rollout.rows, torch.device("cpu"))
    seen = []
    models.policy.lm_head.register_forward_hook(lambda head, inputs, out: seen.append(out.shape))
    ppo.response_logprob(models.policy, batch, Sampling(7, EOS))
    assert [shape[0] for shape in seen] == [int(rollout.mask.sum())]


def test_the_advantage_within_a_group_by_hand():
    """Totals 1 and 3, then 5 and 5: -1 and 1 in standard deviations, then 0"""
    rewards = torch.tensor([[1.0, torch.nan], [1.0, 2.0], [5.0, 9.0], [2.0, 3.0]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 0], [1, 1]], dtype=torch.bool)
    advantage = ppo.group_advantage(rewards, mask, 2)
    expected = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(advantage, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stopped", [False, True])
def test_while_the_critic_trains_alone_the_policy_keeps_no_graph(stopped):
    models = make_models()
    mb = roll(models)[0]
    logprob, value = ppo.evaluate_tokens(
        stub_run(PLAIN), models.policy, models.critic, mb, Sampling(7, EOS), stopped
    )
    assert logprob.requires_grad != stopped
    assert value.requires_grad
    torch.testing.assert_close(logprob, mb.logprob, atol=1e-5, rtol=0)


def test_while_the_critic_trains_alone_the_policy_keeps_its_bits():
    models = make_models()
    learners = make_learners(models)
    rollout = roll(models)[0]
    before = clone(models.policy), clone(models.critic)
    cfg = replace(EVERYTHING, target_kl=0.0)
    metrics = update(
        learners, rollout, cfg, demonstrations=DEMONSTRATIONS, policy_stopped=True
    )
    assert same(before[0], models.policy.state_dict())
    assert not same(before[1], models.critic.state_dict())
    assert metrics["policy_steps"] == 0 and not learners.policy_optimizer.state


def test_above_target_kl_the_policy_stays_and_the_critic_goes_on():
    """With the least threshold the policy makes one step: before it nothing has moved.

    It is compared with an update of this one step, on the rows of the first minibatch.  The
    tolerance is 0.  It used to be 1e-5, which other processors exceeded: the rows came in another
    order, so gradients were rounded differently, and AdamW's first step, lr g / (|g| + 1e-8), turns
    an error of 1e-11 in a gradient near 0 into lr 1e-11 / 1e-8 = 1e-5.  Here the rows are put where
    the permutation of the second update takes them from: both do the same operations on the same
    numbers in the same order.
    """
    stopped = make_models()
    rollout = roll(stopped)[0]
    first = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tensor_split(4)[0]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    index = torch.empty_like(first)
    index[order] = first  # so that index[order], which the update takes, is the minibatch
    learners = make_learners(stopped)
    metrics = update(learners, rollout, replace(PLAIN, target_kl=1e-12))
    assert metrics["policy_steps"] == 1 / 8

    single = make_models()
    rows = [rollout.rows[i] for i in index]
    minibatch = ppo.Rollout(rows, *(x[index] for x in rollout[1:]))
    one_step = replace(PLAIN, num_ppo_epochs=1, num_minibatches=1)
    assert update(make_learners(single), minibatch, one_step)["policy_steps"] == 1
    assert same(stopped.policy.state_dict(), single.policy.state_dict())
    heads = [models.critic.score.weight for models in (stopped, single)]
    assert (heads[0] - heads[1]).abs().max() > 1e-3


def language_modelling_loss(model, rows):
    """-> (B, R), and which of them are tokens"""
    out_pos, target = response_tokens(rows)
    with torch.no_grad():
        logits = model(collate(rows).tokens, out_pos=out_pos)
    return language_model(logits, target), target >= 0


def test_ptx_lowers_the_loss_on_demonstrations():
    loss = {}
    for ptx_coef in (0.0, 5.0):
        models = make_models()
        rollout = roll(models)[0]
        cfg = replace(PLAIN, ptx_coef=ptx_coef, num_ppo_epochs=4)
        metrics = update(make_learners(models), rollout, cfg, demonstrations=DEMONSTRATIONS)
        losses, mask = language_modelling_loss(models.policy, DEMONSTRATIONS)
        loss[ptx_coef] = float(losses[mask].mean())
        assert ("ptx_loss" in metrics) == (ptx_coef > 0)
    assert loss[5.0] < loss[0.0] - 0.5


def test_the_ptx_loss_is_a_mean_over_the_tokens_of_the_rows_drawn():
    models = make_models()
    rollout = roll(models)[0]
    row = random_rows(1, 1, 9)
    losses, _ = language_modelling_loss(models.policy, row)
    cfg = replace(PLAIN, lr=0.0, ptx_coef=1.0)
    metrics = update(make_learners(models), rollout, cfg, demonstrations=row)
    assert metrics["ptx_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)


# ----------------------------------------------------------------------------------------------
# A task with a known optimum

BANDIT = replace(PLAIN, max_new_tokens=3, kl_coef=0.0, num_minibatches=2)


def first_token_is_five(rows):
    return torch.tensor([float(row.responses[0][0] == 5) for row in rows])


def bandit_models():
    return make_models(first_token_is_five, vocab=8, layers=2, width=16)


def train_bandit(models, prompts, cfg, iterations):
    """-> metrics of the last rollout"""
    learners = make_learners(models)
    moments = Moments()
    for i in range(iterations):
        rollout, metrics, _, _ = roll(models, cfg, prompts, moments, seed=i, eos_id=7)
        update(learners, rollout, cfg, eos_id=7)
    return metrics


@torch.no_grad()
def least_share(model, prompts):
    """The least probability of the token 5 after these prompts"""
    return min(float(model(torch.tensor([p]))[0, -1].softmax(-1)[5]) for p in prompts)


def test_a_bandit_with_a_known_optimum_is_solved():
    """The first token should be 5; what follows does not matter.  Responses have up to 3 tokens."""
    models = bandit_models()
    prompts = [[1], [2, 3], [4, 5, 6]]
    assert least_share(models.policy, prompts) < 0.5
    train_bandit(models, prompts * 16, BANDIT, iterations=15)
    assert least_share(models.policy, prompts) > 0.9
    assert least_share(models.reference, prompts) < 0.5  # the reference is not trained


def test_the_kl_penalty_holds_the_policy_back():
    """With a heavy penalty the policy stays near the reference."""
    kl = {}
    for kl_coef in (0.0, 5.0):
        cfg = replace(BANDIT, kl_coef=kl_coef)
        metrics = train_bandit(bandit_models(), [[1], [2, 3]] * 24, cfg, iterations=10)
        kl[kl_coef] = metrics["kl"]
    assert abs(kl[5.0]) < 0.2 * kl[0.0]
