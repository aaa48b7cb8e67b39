"""What PPO has beyond its plain form, a setting at a time: what it does, that it is off by default, that all go together."""
import contextlib
import copy
import json
import math
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import config
import data
import files
import plan
import ppo
import world
from helpers import SMALL, go, one_line, random_rows, same, write_pairs
from losses import language_model
from model import LanguageModel, RewardModel, Shape, init_weights, sample
from ppo import Moments, schedule, steered, token_logprob, warnings_of, whiten
from run import load_model, open_run, optimiser_of, rewards_of
from test_ppo import END, answer_length, players, prompts, roll, step

PLAIN = config.Ppo(max_new=7, lr=1e-2, critic_lr=1e-2)
ON = replace(PLAIN, temperature=0.7, kl_kind="k3", critic_pretrain=1, ptx=0.5, warmup=0.5, kl_target=1.0, whiten=True, no_end_penalty=1.0,
             stop_kl=0.5, reset_reference=2, min_new=3, normalise=False)
SHOWN = random_rows(20, 1, 5)


def weights(model):
    return copy.deepcopy(model.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Pure functions

@given(st.lists(st.lists(st.floats(-50, 50), min_size=1, max_size=6), min_size=1, max_size=5))
def test_whitening_is_that_of_the_response_tokens_alone(rows):
    T = max(map(len, rows)) + 2
    x = torch.tensor([row + [math.nan] * (T - len(row)) for row in rows], dtype=torch.float64)
    mask = ~x.isnan()
    out, flat = whiten(x, mask), np.concatenate(rows)
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out[mask], torch.from_numpy((flat - flat.mean()) / np.sqrt(flat.var() + 1e-8)))


@pytest.mark.parametrize("measured, factor", [(6.0, 1.0), (6.6, 1.01), (600.0, 1.02), (-5.0, 0.98), (0.0, 0.98), (5.4, 0.99)])
def test_the_weight_of_the_kl_follows_the_measured_kl_by_two_per_cent_at_most(measured, factor):
    assert steered(0.5, measured, 6.0) == pytest.approx(0.5 * factor)


def test_a_steered_weight_holds_a_process_at_its_target():
    kl, weight = 0.0, 1.0
    for _ in range(600):
        kl = 3.0 / weight  # whatever is penalised more is less
        weight = steered(weight, kl, 0.5)
    assert kl == pytest.approx(0.5, rel=0.05)


def test_the_schedule_falls_to_zero_and_rises_where_run_and_policy_set_out():
    assert [schedule(i, config.Ppo(iterations=4)) for i in range(4)] == [1 - i / 4 for i in range(4)]
    s = config.Ppo(iterations=10, warmup=0.2, critic_pretrain=3)
    assert [schedule(i, s) for i in range(6)] == pytest.approx([0.5, 0.9, 0.8, 0.5 * 0.7, 0.6, 0.5])


def test_end_has_no_probability_before_the_shortest_answer():
    logits = torch.randn(2, 5, 6)
    kept = logits.clone()
    p = torch.stack([token_logprob(logits, torch.full((2, 5), t), 0.7, end=2, min_new=3).exp() for t in range(6)], -1)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 5))
    assert (p[:, :3, 2] == 0).all() and (p[:, 3:, 2] > 0).all()
    torch.testing.assert_close(p[:, 3:], (logits[:, 3:] / 0.7).softmax(-1))
    assert torch.equal(logits, kept)


# ---------------------------------------------------------------------------------------------------------------------
# One setting in one rollout and update

def test_with_everything_on_the_first_ratio_is_one_and_the_kl_zero():
    policy, reference, critic, optimisers = players()
    rolled, metrics, _, _ = roll(policy, reference, critic, prompts(), answer_length, ON)
    updated = step(policy, critic, optimisers, rolled, ON, shown=SHOWN)
    assert abs(updated["first_ratio"] - 1) < 1e-5 and metrics["kl"] == 0 and metrics["sampled_scored_gap"] < 1e-5
    ppo.check_first_step(metrics, updated["first_ratio"], 1e-5)
    assert abs(step(policy, critic, optimisers, rolled, ON, shown=SHOWN)["first_ratio"] - 1) > 1e-3  # the measure does measure


def test_no_answer_ends_before_min_new():
    policy, reference, critic, _ = players()
    policy.lm_head.weight.data[END] = 30 * torch.randn(32).sign()  # where it may, every other answer ends at once
    shortest = {}
    for n in (0, 4):
        rolled, metrics, responses, _ = roll(policy, reference, critic, prompts(), answer_length, replace(PLAIN, min_new=n))
        assert all(END not in r[:n] for r in responses) and metrics["sampled_scored_gap"] < 1e-4
        shortest[n] = min(map(len, responses))
    assert shortest == {0: 1, 4: 5}  # the end itself is the fifth


def test_the_penalty_is_for_answers_that_do_not_end():
    policy, reference, critic, _ = players()
    s = replace(PLAIN, gamma=1.0, lam=1.0)
    plain, _, responses, _ = roll(policy, reference, critic, prompts(), answer_length, s)
    other, _, _, _ = roll(policy, reference, critic, prompts(), answer_length, replace(s, no_end_penalty=3.0))
    ended = torch.tensor([r[-1] == END for r in responses])
    assert ended.any() and not ended.all()
    torch.testing.assert_close(plain.returns[:, 0] - other.returns[:, 0], torch.where(ended, 0.0, 3.0))


def test_rewards_that_are_not_normalised_are_as_they_are():
    policy, reference, critic, _ = players()
    s = replace(PLAIN, gamma=1.0, lam=1.0, reward_clip=0.01, normalise=False)
    score = lambda rows: 100 + answer_length(rows)
    rolled, metrics, _, scores = roll(policy, reference, critic, prompts(), score, s)
    torch.testing.assert_close(rolled.returns[:, 0], torch.tensor([x["reward"] for x in scores]))
    assert metrics["reward_normalised"] == metrics["reward"] > 100


def test_whitened_advantages_leave_the_returns():
    policy, reference, critic, _ = players()
    plain, other = (roll(policy, reference, critic, prompts(), answer_length, replace(PLAIN, whiten=on))[0] for on in (False, True))
    mask = plain.target >= 0
    assert other.advantage[mask].mean().abs() < 1e-5 and other.advantage[mask].std(correction=0) == pytest.approx(1, abs=1e-4)
    assert plain.advantage[mask].std(correction=0) != pytest.approx(1, abs=1e-2)
    assert torch.equal(plain.returns, other.returns)


def test_while_the_critic_learns_alone_the_policy_keeps_its_bits():
    policy, reference, critic, optimisers = players()
    rolled = roll(policy, reference, critic, prompts(), answer_length)[0]
    before = weights(policy), weights(critic)
    metrics = step(policy, critic, optimisers, rolled, replace(ON, stop_kl=0.0), shown=SHOWN, moves=False)
    assert same(before[0], policy.state_dict()) and not same(before[1], critic.state_dict())
    assert metrics["policy_steps"] == 0 and not optimisers[0].state


def test_past_stop_kl_the_policy_stays_and_the_critic_goes_on():
    """The first step cannot be stopped, as nothing has moved before it; with the least threshold the second is."""
    ends = {}
    for name, s, parts in (("stopped", replace(PLAIN, stop_kl=1e-12), slice(None)), ("one step", replace(PLAIN, epochs=1), slice(0, 1))):
        policy, reference, critic, optimisers = players()
        rolled = roll(policy, reference, critic, prompts(), answer_length)[0]
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tensor_split(4)[0]
        if name == "one step":
            rolled, s = ppo.Rollout(*(x[order] for x in rolled[:-1])), replace(s, minibatches=1)
        metrics = step(policy, critic, optimisers, rolled, s)
        ends[name] = weights(policy), weights(critic), metrics
    assert ends["stopped"][2]["policy_steps"] == 1 / 8 and ends["one step"][2]["policy_steps"] == 1
    for a, b in zip(ends["stopped"][0].values(), ends["one step"][0].values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (ends["stopped"][1]["score.weight"] - ends["one step"][1]["score.weight"]).abs().max() > 1e-3


def test_ptx_teaches_what_sft_was_shown():
    loss = {}
    for ptx in (0.0, 5.0):
        policy, reference, critic, optimisers = players()
        rolled = roll(policy, reference, critic, prompts(), answer_length)[0]
        metrics = step(policy, critic, optimisers, rolled, replace(PLAIN, ptx=ptx, epochs=4), shown=SHOWN)
        read, target = data.response_tokens(SHOWN)
        with torch.no_grad():
            loss[ptx] = float(language_model(policy(data.collate(SHOWN).tokens, read=read), target).sum() / (target >= 0).sum())
        assert ("ptx_loss" in metrics) == (ptx > 0)
    assert loss[5.0] < loss[0.0] - 0.5


def test_the_ptx_loss_is_a_mean_over_the_tokens_of_the_rows_drawn():
    policy, reference, critic, optimisers = players()
    rolled = roll(policy, reference, critic, prompts(), answer_length)[0]
    one = [random_rows(1, 1, 9)[0]]
    read, target = data.response_tokens(one)
    with torch.no_grad():
        expected = float(language_model(policy(data.collate(one).tokens, read=read), target).mean())
    metrics = step(policy, critic, optimisers, rolled, replace(PLAIN, lr=0.0, ptx=1.0), shown=one)
    assert metrics["ptx_loss"] == pytest.approx(expected, abs=1e-5)


def test_an_update_is_blind_to_nan_in_the_padding():
    results = []
    for extra, poison in ((0, 0.0), (3, torch.nan)):
        policy, reference, critic, optimisers = players()
        rolled = roll(policy, reference, critic, prompts(), answer_length, ON)[0]
        pad = lambda x, value: torch.nn.functional.pad(x, (0, extra), value=value)
        target = pad(rolled.target, -1)
        wider = ppo.Rollout(pad(rolled.tokens, -1), pad(rolled.read, 0), target,
                            *(pad(x, 0.0).masked_fill(target < 0, poison) for x in (rolled.logprob, rolled.value, rolled.advantage, rolled.returns)))
        metrics = step(policy, critic, optimisers, wider, ON, shown=SHOWN)
        results.append((metrics, policy.lm_head.weight.detach(), critic.score.weight.detach()))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    torch.testing.assert_close(results[0][1:], results[1][1:], atol=1e-4, rtol=0)


def test_what_is_watched_is_an_average_over_response_tokens():
    policy, reference, critic, _ = players()
    rolled, metrics, responses, _ = roll(policy, reference, critic, prompts(), answer_length)
    assert len({len(r) for r in responses}) > 3
    nll, returns, errors = [], [], []
    for b, (prompt, response) in enumerate(zip(prompts(), responses)):
        with torch.no_grad():
            logp = reference(torch.tensor([prompt + response]))[0].log_softmax(-1)
        nll += [-float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(response)]
        returns += rolled.returns[b, :len(response)].tolist()
        errors += (rolled.returns - rolled.value)[b, :len(response)].tolist()
    assert metrics["perplexity_sft"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert metrics["explained_variance"] == pytest.approx(1 - np.var(errors) / np.var(returns), rel=1e-4)
    assert metrics["ended"] == pytest.approx(np.mean([r[-1] == END for r in responses])) and metrics["length"] == np.mean([len(r) for r in responses])


# ---------------------------------------------------------------------------------------------------------------------
# What a person is warned of

HEALTHY = {"kl": 2.0, "length": 20.0, "ended": 0.9, "perplexity_sft": 3.0, "first_ratio": 1.00001, "value_loss": 0.2}


def history(n=20, **change):
    """n healthy iterations, then ten in which something is otherwise"""
    return [HEALTHY] * n + [HEALTHY | change] * 10


@pytest.mark.parametrize("change, name, cause", [
    (dict(kl=-0.5), "kl", "another distribution"), (dict(length=47.5, ended=0.3), "length", "no_end_penalty"), (dict(ended=0.0), "length", "ppo.max_new = 48"),
    (dict(perplexity_sft=1.1), "perplexity", "ppo.kl"), (dict(first_ratio=1.5), "ratio", "1.5, not 1"), (dict(first_ratio=0.5), "ratio", "dropout"),
    (dict(first_ratio=math.nan), "ratio", "nan"), (dict(value_loss=9.0), "value_loss", "critic_lr"), (dict(value_loss=math.nan), "value_loss", "nan"),
])
def test_a_known_failure_is_named_with_its_cause_in_one_line(change, name, cause):
    found = warnings_of(history(**change), config.Ppo())
    assert list(found) == [name] and cause in found[name] and "\n" not in found[name]


@pytest.mark.parametrize("change", [dict(), dict(kl=-0.05), dict(kl=40.0), dict(length=40.0), dict(ended=0.2), dict(perplexity_sft=1.5),
                                    dict(perplexity_sft=30.0), dict(first_ratio=1.05), dict(value_loss=1.0), dict(value_loss=0.0)])
def test_nobody_is_warned_of_what_is_usual(change):
    assert warnings_of(history(**change), config.Ppo()) == {}


def test_one_bad_iteration_is_not_yet_a_habit():
    for change in (dict(kl=-5.0), dict(length=48.0), dict(ended=0.0), dict(perplexity_sft=1.0), dict(value_loss=90.0)):
        assert warnings_of(history()[:-1] + [HEALTHY | change], config.Ppo()) == {}
        assert warnings_of([HEALTHY | change], config.Ppo()) == {}
    assert warnings_of(history(kl=-5.0)[:-1] + [HEALTHY | dict(kl=0.1)], config.Ppo()) == {}  # nine in a row


# ---------------------------------------------------------------------------------------------------------------------
# The loop, in a run of a few pairs

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> an open run with SFT, two members and a reward model"""
    out = tmp_path_factory.mktemp("run")
    for stage in ("sft", "ensemble", "reward"):
        assert go(out, "--reward.methods=baseline", "--ppo.methods=baseline", f"--stage={stage}") == 0
    words = [s[2:].split("=", 1) for s in SMALL] + [("out_dir", str(out)), ("reward.methods", "baseline"), ("ppo.methods", "baseline")]
    return open_run(config.load(None, words))


def trained(run, unit, stop=lambda: False, start="sft", pairs=None, **changes):
    """-> policy, metrics of every iteration, answers"""
    policy, _, lines = ppo.train_policy(run, unit, "reward_baseline", "any", stop, start, pairs, replace(run.config.ppo, **changes))
    with open(run.path(f"watch_{unit.removeprefix('policy_')}.jsonl")) as file:
        return policy, [json.loads(line) for line in file], lines


EVERYTHING = dict(iterations=5, critic_pretrain=2, ptx=0.5, warmup=0.5, kl_target=0.5, whiten=True, no_end_penalty=1.0, stop_kl=0.5, reset_reference=3,
                  min_new=2, reward="mean_minus_std", show=2)


def test_with_everything_on_a_policy_stopped_and_resumed_is_as_if_not_stopped(made):
    for left in (3, 1):  # stopped after three iterations, when the reference is about to be reset, and after one more
        asked = iter(range(100))
        with pytest.raises(files.Stopped):
            trained(made, "policy_parts", lambda: next(asked) >= left - 1, **EVERYTHING)  # asked once an iteration
    parts = trained(made, "policy_parts", **EVERYTHING)
    os.remove(made.path("policy_parts.ckpt"))
    whole = trained(made, "policy_parts", **EVERYTHING)
    assert same(parts[0].state_dict(), whole[0].state_dict()) and parts[1:] == whole[1:]
    assert len(whole[1]) == 5 and len(whole[2]) == 40


def test_the_critic_goes_first_and_the_weight_of_the_kl_is_steered(made):
    _, watched, _ = trained(made, "policy_steps", **EVERYTHING | dict(lr=1e-2, stop_kl=0.0))
    assert [w["policy_steps"] for w in watched] == [0, 0, 1, 1, 1]
    assert [w["kl"] for w in watched[:3]] == [0, 0, 0] and watched[4]["kl"] != 0
    assert watched[3]["kl"] == 0  # the reference has just become the policy
    assert [w["kl_weight"] for w in watched[:4]] == pytest.approx([0.05, 0.05, 0.05, 0.05 * 0.98])


def test_perplexity_stays_under_sft_when_the_reference_is_reset(made):
    (_, fixed, _), (_, moving, _) = (trained(made, "policy_reset", iterations=4, kl=0.0, lr=1e-2, reset_reference=n) for n in (0, 1))
    assert [w["perplexity_sft"] for w in fixed] == [w["perplexity_sft"] for w in moving]
    assert fixed[3]["kl"] != 0 and all(w["kl"] == 0 for w in moving)


def test_a_policy_begins_where_it_is_told_and_asks_what_it_is_told(made):
    policy, _, _ = trained(made, "policy_first", lr=1e-2)
    files.save_tensors(made.path("policy_first.pt"), {"shape": files.load_tensors(made.path("sft.pt"))["shape"], "model": policy.state_dict()})
    pairs = made.train[0][:3]
    _, watched, lines = trained(made, "policy_second", start="policy_first", pairs=pairs, lr=0.0)
    assert abs(watched[0]["kl"]) > 1e-3  # SFT is still the reference
    assert {line["prompt"] for line in lines} <= {p.prompt for p in pairs}


def test_samples_are_shown_with_their_rewards(made):
    _, _, lines = trained(made, "policy_shown", iterations=5, show=2)
    with open(made.path("samples_shown.md")) as file:
        text = file.read()
    for i, line in enumerate(lines):
        shown = i // 8 in (0, 2, 4) and i % 8 < 3
        heading = f"Iteration {line['iteration']}: reward {line['reward']:.3f}, KL {line['kl']:.2f}"
        assert (heading in text) == shown
        if shown:
            said = text.split(heading)[1].split("Iteration")[0]
            assert "".join(part[4:] + "\n" for part in said.strip("\n").split("\n")).strip() == (line["prompt"].strip() + " >>>" + line["response"]).strip()
    with open(made.path("log.jsonl")) as file:
        logged = [r for r in map(json.loads, file) if r["stage"] == "policy_shown"]
    assert [len(r.get("samples", ())) for r in logged] == [3, 0, 3, 0, 3] and logged[2]["samples"] == lines[16:19]
    trained(made, "policy_silent", show=0)
    assert not os.path.exists(made.path("samples_silent.md"))


def test_a_log_line_has_all_that_is_watched_and_the_figure_is_drawn(made):
    trained(made, "policy_watched")
    with open(made.path("log.jsonl")) as file:
        last = [r for r in map(json.loads, file) if r["stage"] == "policy_watched"][-1]
    assert {"reward", "reward_normalised", "kl", "perplexity_sft", "length", "clip_fraction", "explained_variance", "ended"} <= last.keys()
    with open(made.path("figures/ppo_watch.png"), "rb") as file:
        assert file.read().startswith(b"\x89PNG")


def test_a_warning_is_given_once(made, capsys):
    trained(made, "policy_warned", iterations=7, max_new=2)
    assert capsys.readouterr().out.count("warning: policy_warned, iteration 5: answers run into ppo.max_new = 2") == 1


# ---------------------------------------------------------------------------------------------------------------------
# What scores an answer

def test_the_ensemble_scores_by_mean_worst_or_mean_minus_std(made):
    rows = [data.Row(r.prompt, r.responses[:1]) for r in made.valid[1][:20]]
    members = []
    for m in range(2):
        model = load_model(made, RewardModel, f"member_{m:02d}")
        members.append(rewards_of(made, model, rows)[:, 0] - rewards_of(made, model, made.train[1]).mean())
    a, b = members
    for name, expected in (("mean", (a + b) / 2), ("worst", torch.minimum(a, b)), ("mean_minus_std", (a + b) / 2 - 0.7 * (a - b).abs() / 2)):
        score = ppo.reward_source(made, replace(made.config.ppo, reward=name, std_weight=0.7), "reward_baseline")
        torch.testing.assert_close(score(rows), expected, atol=1e-5, rtol=0)
    score = ppo.reward_source(made, made.config.ppo, "reward_baseline")
    torch.testing.assert_close(score(rows), rewards_of(made, load_model(made, RewardModel, "reward_baseline"), rows)[:, 0], atol=1e-5, rtol=0)


def test_the_verifier_runs_the_program(made):
    rng, rows, right = random.Random(0), [], []
    for domain in world.HELD_OUT_DOMAINS * 5:
        prompt, good, bad = world.ask(rng, (domain,), 4)
        rows += [data.encode(made.encoding, prompt, (" " + core,), 256) for core in (good[0], bad[0], "I do not know.")]
        right += [1.0, 0.0, 0.0]
    assert ppo.reward_source(made, replace(made.config.ppo, reward="verifier"), None)(rows).tolist() == right


def test_domains_change_the_prompts_and_what_sft_is_shown(tmp_path):
    small = ["--reward.methods=baseline", "--ppo.methods=baseline", "--ppo.domains=programs", "--ppo.reward=verifier"]
    for stage in ("sft", "reward", "ppo"):
        assert go(tmp_path, *small, f"--stage={stage}") == 0
    with open(tmp_path / "rollouts_baseline.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert lines and all("Write a program" in line["prompt"] for line in lines) and {line["reward"] for line in lines} <= {0.0, 1.0}
    words = [s[2:].split("=", 1) for s in SMALL + small]
    told = plan.dependencies(config.load(None, words))["sft"]
    assert told["ppo.domains"] == ["programs"] and "ppo.domains" not in plan.dependencies(config.load(None, words[:-2]))["sft"]


@pytest.mark.parametrize("given, parts", [
    (["--ppo.reward=verifier"], ("ppo.reward", "ppo.domains")), (["--ppo.domains=arithmetic", "--data.train=FILE"], ("ppo.domains", "data.train = world")),
    (["--ppo.domains=facts"], ("ppo.domains", "arithmetic, translation, programs")), (["--ppo.min_new=12"], ("ppo.min_new", "ppo.max_new = 12")),
    (["--ppo.critic_pretrain=2"], ("ppo.critic_pretrain", "ppo.iterations = 2")), (["--ppo.kl_target=1", "--ppo.kl=0"], ("ppo.kl_target", "ppo.kl > 0")),
    (["--ppo.reward=best"], ("ppo.reward", "mean_minus_std")),
])
def test_settings_that_do_not_go_together_are_one_line(given, parts, tmp_path, capsys):
    path = write_pairs(tmp_path / "pairs.jsonl")
    assert go(tmp_path / "out", *(word.replace("FILE", str(path)) for word in given)) == 2
    one_line(capsys, *parts)


def test_a_policy_depends_on_the_members_where_they_score(made):
    c = made.config
    for reward, read in (("model", False), ("worst", True)):
        here = plan.dependencies(config.assign(c, "ppo.reward", reward))["policy_baseline"]
        assert ("input member_00" in here) == read and here["ppo.reward"] == reward and "ppo.show" not in here


def test_a_verifier_task_goes_to_more_than_twice_its_sft_success():
    """Fifty sums of which SFT has seen right answers a fifth of the time; the reward is 1 where the program says so."""
    rng = random.Random(0)
    tasks = [world.arithmetic(rng, 6) for _ in range(50)]
    asked = [f"{world.HUMAN}{question}{world.ASSISTANT}" for question, _, _ in tasks]
    shown = [(i, " " + world.pick(rng, good if rng.random() < 0.2 else bad)) for i in (int(rng.random() * 50) for _ in range(3000)) for _, good, bad in (tasks[i],)]
    encoding = data.train_tokenizer((asked[i] + text for i, text in shown), 300)
    end = encoding._special_tokens[data.END]
    rows = [data.encode(encoding, asked[i], (text,), 64) for i, text in shown]
    shape = Shape(encoding.n_vocab, 2, 4, 4, 64, 128, 64)
    policy = init_weights(LanguageModel(shape), torch.Generator().manual_seed(0))
    optimiser = optimiser_of(policy, "adamw", 3e-3, 0.1)
    for index in [b for epoch in range(4) for b in data.batches([len(r) for r in rows], 64, str(epoch))]:
        read, target = data.response_tokens([rows[i] for i in index])
        loss = language_model(policy(data.collate([rows[i] for i in index]).tokens, read=read), target).sum() / (target >= 0).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    reference, critic = copy.deepcopy(policy), init_weights(RewardModel(shape), torch.Generator().manual_seed(1))
    critic.model.load_state_dict(policy.model.state_dict())
    text = lambda tokens: encoding.decode([int(t) for t in tokens if t not in (end, -1)])
    verifier = lambda rows: torch.tensor([float(world.right(text(r.prompt), text(r.responses[0])) == 1) for r in rows])
    prompt = [data.encode_prompt(encoding, p, 40) for p in asked]

    def success(model):
        drawn = sample(model, prompt * 4, 20, end, torch.Generator().manual_seed(5)).tokens.tolist()
        return np.mean([world.right(text(p), text(answer)) == 1 for p, answer in zip(prompt * 4, drawn)])
    before = success(policy)
    s = config.Ppo(max_new=20, lr=5e-4, critic_lr=1e-3, kl=0.02, reward_clip=10.0, whiten=True, iterations=15)
    optimisers, moments = (optimiser_of(policy, "adamw", s.lr, 0.0), optimiser_of(critic, "adamw", s.critic_lr, 0.0)), Moments()
    for i in range(s.iterations):
        generator = torch.Generator().manual_seed(i)
        picked = [prompt[j] for j in torch.randint(50, (128,), generator=generator).tolist()]
        rolled = ppo.rollout(policy, reference, critic, verifier, picked, end, moments, generator, s, contextlib.nullcontext())[0]
        ppo.update(policy, critic, optimisers, schedule(i, s), rolled, end, s, 1.0, generator, contextlib.nullcontext(),
                   torch.amp.GradScaler("cpu", enabled=False))
    after = success(policy)
    assert before > 0.02 and after > 2 * before and after > 0.15
