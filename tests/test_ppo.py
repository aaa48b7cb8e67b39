import contextlib
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import config
import ppo
from helpers import random_rows, tiny, tiny_reward
from losses import kl_penalty
from ppo import Moments, check_first_step, gae, shape_rewards, token_logprob

END = 23
SETTINGS = config.Ppo(max_new=7, lr=1e-2, critic_lr=1e-2)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Advantages

def explicit_gae(rewards, values, gamma, lam):
    """One answer: A_t = sum over l of (gamma lam)^l delta_{t + l}"""
    after = values[1:] + [0.0]
    delta = [r + gamma * v2 - v for r, v, v2 in zip(rewards, values, after)]
    return [sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, len(delta))) for t in range(len(delta))]


def padded(rows, total, value):
    """[(zeros before, list)] -> (B, total)"""
    return double(*([value] * before + row + [value] * (total - before - len(row)) for before, row in rows))


number = st.floats(-5, 5)
answer = st.tuples(st.integers(0, 3), st.lists(st.tuples(number, number), min_size=1, max_size=6))


@given(st.lists(answer, min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_sum(answers, gamma, lam):
    """Answers stand anywhere between masked tokens, which hold NaN."""
    r, v = ([(before, [x[part] for x in pairs]) for before, pairs in answers] for part in (0, 1))
    mask = padded([(before, [1.0] * len(pairs)) for before, pairs in answers], 10, 0.0)
    advantages, returns = gae(padded(r, 10, torch.nan), padded(v, 10, torch.nan), mask, gamma, lam)
    expected = [(before, explicit_gae(rewards, values, gamma, lam)) for (before, rewards), (_, values) in zip(r, v)]
    torch.testing.assert_close(advantages, padded(expected, 10, 0.0))
    torch.testing.assert_close(returns, padded([(b, [a + x for a, x in zip(e, values)]) for (b, e), (_, values) in zip(expected, v)], 10, 0.0))


def test_lambda_one_is_return_minus_value():
    rewards, values = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    advantages, returns = gae(rewards, values, torch.ones(3, 6), 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, to_go - values)
    torch.testing.assert_close(returns, to_go)


def test_lambda_zero_is_the_one_step_error():
    rewards, values = double([1, 2, 4]), double([0.5, 0.25, 3])
    advantages, _ = gae(rewards, values, torch.ones(1, 3), 0.5, 0.0)
    torch.testing.assert_close(advantages, double([1 + 0.125 - 0.5, 2 + 1.5 - 0.25, 4 - 3]))


def test_masked_tokens_between_others_are_left_out():
    rewards, values, mask = torch.randn(2, 6), torch.randn(2, 6), torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 1]])
    gaps = gae(rewards, values, mask, 0.9, 0.8)
    for b in range(2):
        here = mask[b] == 1
        for whole, part in zip(gaps, gae(rewards[b, here][None], values[b, here][None], torch.ones(1, int(here.sum())), 0.9, 0.8)):
            torch.testing.assert_close(whole[b, here], part[0])
            assert (whole[b, ~here] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Rewards and probabilities

@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=8), min_size=1, max_size=6))
def test_moments_are_those_of_everything_seen(chunks):
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
def test_the_score_stands_on_the_last_token_and_the_penalty_on_all(kind):
    logprob, ref = torch.randn(3, 4), torch.randn(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    logprob[mask == 0] = torch.nan
    rewards = shape_rewards(torch.tensor([10.0, 20.0, 30.0]), logprob, ref, mask, 0.3, kind)
    expected = (-0.3 * kl_penalty(logprob, ref, kind)).where(mask == 1, 0.0)
    expected[0, 3] += 10
    expected[1, 1] += 20
    expected[2, 0] += 30
    torch.testing.assert_close(rewards, expected)


def test_token_logprob_is_a_loop():
    logits, target = torch.randn(2, 3, 5), torch.tensor([[4, 0, -1], [2, -1, -1]])
    logprob = token_logprob(logits, target, 0.7)
    for b in range(2):
        for t in range(3):
            wanted = torch.softmax(logits[b, t] / 0.7, -1)[target[b, t]].log() if target[b, t] >= 0 else torch.tensor(0.0)
            torch.testing.assert_close(logprob[b, t], wanted)


@pytest.mark.parametrize("fault, message", [
    (dict(ratio=1.01), "ratio"), (dict(ratio=0.99), "ratio"), (dict(kl=0.01), "KL"), (dict(kl=-0.01), "KL"),
    (dict(gap=0.01), "sampling and scoring"), (dict(ratio=torch.nan), "ratio"), (dict(kl=torch.nan), "KL"),
])
def test_a_first_step_that_moves_is_refused(fault, message):
    check = lambda ratio=1.0, kl=0.0, gap=0.0: check_first_step({"kl": kl, "sampled_scored_gap": gap}, ratio, 1e-3)
    check()
    check(ratio=1.0005, kl=-0.0005, gap=0.0005)
    with pytest.raises(RuntimeError, match=f"PPO's first step: .*{message}"):
        check(**fault)


def test_in_half_precision_one_token_may_be_off_but_not_all():
    check = lambda mean, *gap: check_first_step({"kl": 0.0, "sampled_scored_gap": 0.23, "sampled_scored_mean": mean}, 1.0, 0.1, *gap)
    check(0.03, "sampled_scored_mean")
    for fault in ((0.2, "sampled_scored_mean"), (torch.nan, "sampled_scored_mean"), (0.03,)):
        with pytest.raises(RuntimeError, match="sampling and scoring"):
            check(*fault)


# ---------------------------------------------------------------------------------------------------------------------
# The first step: nothing has moved yet

def players(**shape):
    policy = tiny(tied=False, seed=1, **shape)
    critic = tiny_reward(seed=2, **shape)
    optimisers = [torch.optim.AdamW(model.parameters(), weight_decay=0.0) for model in (policy, critic)]
    return policy, copy.deepcopy(policy), critic, optimisers


def roll(policy, reference, critic, prompts, score_rows, s=SETTINGS, moments=None, seed=0, end=END):
    return ppo.rollout(policy, reference, critic, score_rows, prompts, end, moments or Moments(),
                       torch.Generator().manual_seed(seed), s, contextlib.nullcontext())


def step(policy, critic, optimisers, data, s=SETTINGS, factor=1.0, **more):
    return ppo.update(policy, critic, optimisers, factor, data, END, s, 1.0, torch.Generator().manual_seed(0),
                      contextlib.nullcontext(), torch.amp.GradScaler("cpu", enabled=False), **more)


def prompts(n=40):
    return [row.prompt.tolist() for row in random_rows(n, 1, 0)]


def answer_length(rows):
    return torch.tensor([float(len(row.responses[0])) for row in rows])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_before_the_first_step_the_ratio_is_one_and_the_kl_zero(temperature):
    policy, reference, critic, optimisers = players()
    s = config.Ppo(max_new=7, temperature=temperature)
    data, metrics, _, _ = roll(policy, reference, critic, prompts(), answer_length, s)
    updated = step(policy, critic, optimisers, data, s)
    assert abs(updated["first_ratio"] - 1) < 1e-5
    assert metrics["kl"] == 0 and 0 < metrics["sampled_scored_mean"] < metrics["sampled_scored_gap"] < 1e-4
    check_first_step(metrics, updated["first_ratio"], 1e-4)
    moved = step(policy, critic, optimisers, data, s)
    assert abs(moved["first_ratio"] - 1) > 1e-3  # the measure does measure


def test_a_rollout_holds_what_was_sampled():
    policy, reference, critic, _ = players()
    with torch.no_grad():
        reference.lm_head.weight.add_(0.05 * torch.randn(reference.lm_head.weight.shape))
    shown, asked = [], prompts()
    data, metrics, responses, scores = roll(policy, reference, critic, asked, lambda rows: shown.extend(rows) or answer_length(rows))
    assert {len(r) for r in responses} > {7} and 0 < metrics["ended"] < 1  # some end, some are cut
    kl = []
    for b, (prompt, response, row) in enumerate(zip(asked, responses, shown)):
        n = len(response)
        assert row.prompt.tolist() == prompt and row.responses[0].tolist() == response + [END] * (response[-1] != END)
        assert END not in response[:-1] and (response[-1] == END or n == 7)
        assert data.tokens[b].tolist() == prompt + response + [-1] * (data.tokens.shape[1] - len(prompt) - n)
        assert data.target[b].tolist() == response + [-1] * (data.target.shape[1] - n)
        with torch.no_grad():
            logp, ref = (m(torch.tensor([prompt + response]))[0].log_softmax(-1) for m in (policy, reference))
        at = range(len(prompt) - 1, len(prompt) - 1 + n)
        logp, ref = (torch.stack([x[i, t] for i, t in zip(at, response)]) for x in (logp, ref))
        torch.testing.assert_close(data.logprob[b, :n], logp, atol=1e-5, rtol=0)
        for part in (data.logprob, data.value, data.advantage, data.returns):
            assert (part[b, n:] == 0).all()
        kl.append(float((logp - ref).sum()))
    assert metrics["kl"] == pytest.approx(np.mean(kl), abs=1e-4) and abs(metrics["kl"]) > 1e-3
    assert [s["kl"] for s in scores] == pytest.approx(kl, abs=1e-4)
    assert [s["reward"] for s in scores] == answer_length(shown).tolist()
    assert metrics["length"] == pytest.approx(np.mean([len(r) for r in responses]))
    assert metrics["reward"] == pytest.approx(answer_length(shown).mean().item())


def test_the_advantages_of_a_rollout_come_from_normalised_clipped_scores():
    policy, reference, critic, _ = players()
    s, moments = config.Ppo(max_new=7, gamma=1.0, lam=1.0, reward_clip=0.5), Moments()
    data, _, responses, scores = roll(policy, reference, critic, prompts(), answer_length, s, moments)
    reward = np.array([x["reward"] for x in scores])
    assert (moments.mean, moments.std) == (pytest.approx(reward.mean()), pytest.approx(reward.std()))
    expected = ((reward - reward.mean()) / reward.std()).clip(-0.5, 0.5)
    for b, response in enumerate(responses):  # kl is 0 and nothing is discounted, so every return is the score
        torch.testing.assert_close(data.returns[b, :len(response)], torch.full((len(response),), expected[b], dtype=torch.float32))


def test_the_schedule_scales_both_learning_rates():
    policy, reference, critic, optimisers = players()
    data = roll(policy, reference, critic, prompts(), answer_length)[0]
    before = [copy.deepcopy(model.state_dict()) for model in (policy, critic)]
    step(policy, critic, optimisers, data, factor=0.0)
    for model, old in zip((policy, critic), before):
        assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    step(policy, critic, optimisers, data, factor=0.25)
    assert [o.param_groups[0]["lr"] for o in optimisers] == [0.25 * SETTINGS.lr, 0.25 * SETTINGS.critic_lr]
    for model, old in zip((policy, critic), before):
        assert all(not torch.equal(value, old[name]) for name, value in model.state_dict().items())


def test_the_critic_learns_the_returns():
    policy, reference, critic, optimisers = players()
    data = roll(policy, reference, critic, prompts(), answer_length)[0]
    s = config.Ppo(max_new=7, lr=0.0, critic_lr=1e-2, epochs=20, value_clip=100.0)
    first, last = (step(policy, critic, optimisers, data, s)["value_loss"] for _ in range(2))
    assert last < 0.5 * first


def test_padding_does_not_move_an_update():
    """Three more columns of padding, poisoned where the update may not look."""
    results = []
    for extra in (0, 3):
        policy, reference, critic, optimisers = players()
        data = roll(policy, reference, critic, prompts(), answer_length)[0]
        pad = lambda x, value: torch.nn.functional.pad(x, (0, extra), value=value)
        wider = ppo.Rollout(pad(data.tokens, -1), pad(data.read, 0), pad(data.target, -1),
                            *(pad(x, 1e6) for x in (data.logprob, data.value, data.advantage, data.returns)))
        metrics = step(policy, critic, optimisers, wider)
        results.append((metrics, policy.lm_head.weight.detach(), critic.score.weight.detach()))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    torch.testing.assert_close(results[0][1:], results[1][1:], atol=1e-4, rtol=0)


def test_a_bandit_with_a_known_optimum_is_solved():
    """The reward asks for token 5 first, whatever follows; its answers are up to three tokens long."""
    policy, reference, critic, optimisers = players(vocab=8, layers=2, width=16)
    s = config.Ppo(max_new=3, lr=1e-2, critic_lr=1e-2, kl=0.0, minibatches=2)
    score = lambda rows: torch.tensor([float(row.responses[0][0] == 5) for row in rows])
    asked, moments = [[1], [2, 3], [4, 5, 6]] * 16, Moments()
    share = lambda model: min(float(model(torch.tensor([p]))[0, -1].softmax(-1)[5].detach()) for p in asked[:3])
    assert share(policy) < 0.5
    for i in range(25):
        data = roll(policy, reference, critic, asked, score, s, moments, seed=i, end=7)[0]
        step(policy, critic, optimisers, data, s)
    assert share(policy) > 0.9
    assert share(reference) < 0.5  # which nothing has moved


def test_the_kl_penalty_holds_the_policy_back():
    """The same bandit with a heavy penalty: the policy gains less, and stays nearer to the reference."""
    far = {}
    for kl in (0.0, 5.0):
        policy, reference, critic, optimisers = players(vocab=8, layers=2, width=16)
        s = config.Ppo(max_new=3, lr=1e-2, critic_lr=1e-2, kl=kl, minibatches=2)
        score = lambda rows: torch.tensor([float(row.responses[0][0] == 5) for row in rows])
        moments = Moments()
        for i in range(15):
            data, metrics, _, _ = roll(policy, reference, critic, [[1], [2, 3]] * 24, score, s, moments, seed=i, end=7)
            step(policy, critic, optimisers, data, s)
        far[kl] = metrics["kl"]
    assert abs(far[5.0]) < 0.2 * far[0.0]
