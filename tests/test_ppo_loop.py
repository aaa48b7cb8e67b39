"""PPO's loop in a run of a few pairs: settings one at a time, resuming, samples, rewards; then a
task whose answers a program judges."""
import copy
import os
import random

import numpy as np
import pytest
import torch
from helpers import go, one_line, same, write_pairs
from ppo_models import stub_run
from small_runs import (
    copy_run,
    depends_on,
    log_of,
    opened,
    read_lines,
    stop_after,
)

import config
import ppo
import train
import world
from common import load_model, make_optimizer, save_model, score_rows, set_lr
from data import batches, collate, encode_prompt, encode_row, response_tokens
from generate import Sampling, generate
from losses import language_model
from model import LanguageModel, RewardModel, Shape, init_weights
from runtime.signals import Stopped
from tokenizer import train_tokenizer

BASELINE = ["--reward.methods=baseline", "--ppo.methods=baseline"]
EVERYTHING = {
    "iterations": 5, "critic_warmup_iters": 2, "ptx_coef": 0.5, "warmup": 0.5,
    "adaptive_kl_target": 0.5, "whiten": True, "missing_eos_penalty": 1.0, "target_kl": 0.5,
    "reset_reference": 3, "min_new_tokens": 2, "reward": "mean_minus_std", "sample_every": 2,
    "top_p": 0.9, "repetition_penalty": 1.1, "answers_per_prompt": 2,
}


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """An open run with SFT, two members and reward models"""
    folder = tmp_path_factory.mktemp("ppo") / "run"
    out = copy_run(finished, folder)
    run = opened(out, *BASELINE)
    assert run.train.rows and run.tokenizer  # read once, shared by all copies of the run
    return run


def with_ppo(run, **changes):
    """The run under other [ppo] settings"""
    return run.with_settings({f"ppo.{name}": value for name, value in changes.items()})


def train_policy(run, name, start="sft", pairs=None, **changes):
    """-> weights of the policy, metrics of every iteration, lines of all responses"""
    run = with_ppo(run, **changes)
    run.needs(name, train.ppo_settings(run.cfg), ["sft", "reward_baseline"])
    policy, _, lines = ppo.train_policy_loop(run, name, "reward_baseline", start, pairs)
    history = run.load_jsonl(f"watch_{name.removeprefix('policy_')}.jsonl")
    return policy.state_dict(), history, lines


# ----------------------------------------------------------------------------------------------
# The loop


def test_with_every_setting_on_stopped_and_resumed_equals_not_stopped(run, monkeypatch):
    """Stopped after three iterations, where the reference is reset next, and after one more"""
    for iterations in (3, 1):
        with monkeypatch.context() as patch:
            stop_after(patch, iterations)
            with pytest.raises(Stopped):
                train_policy(run, "policy_parts", **EVERYTHING)
    parts = train_policy(run, "policy_parts", **EVERYTHING)
    os.remove(run.path("policy_parts.ckpt"))
    whole = train_policy(run, "policy_parts", **EVERYTHING)
    assert same(parts[0], whole[0]) and parts[1:] == whole[1:]
    assert len(whole[1]) == 5 and len(whole[2]) == 40


def test_the_critic_trains_first_and_the_weight_of_the_kl_is_adapted(run):
    changes = EVERYTHING | {"lr": 1e-2, "target_kl": 0.0}
    _, history, _ = train_policy(run, "policy_steps", **changes)
    assert [m["policy_steps"] for m in history] == [0, 0, 1, 1, 1]
    kl = [m["kl"] for m in history]
    assert kl[:3] == [0, 0, 0] and kl[4] != 0
    assert kl[3] == 0  # the reference has just become the policy
    expected = [0.05, 0.05, 0.05, 0.05 * 0.98]
    assert [m["kl_coef"] for m in history[:4]] == pytest.approx(expected)


def test_the_adapted_weight_is_the_one_that_penalizes(run, monkeypatch):
    """The rollout of every iteration is made with the weight that the last one has left, and its
    metrics name that weight."""
    used = []
    make_rollout = ppo.make_rollout

    def recorded(run, models, prompts, moments, generator, cfg):
        used.append(cfg.kl_coef)
        return make_rollout(run, models, prompts, moments, generator, cfg)

    monkeypatch.setattr(ppo, "make_rollout", recorded)
    changes = {"iterations": 4, "lr": 1e-2, "kl_coef": 0.3, "adaptive_kl_target": 0.05}
    _, history, _ = train_policy(run, "policy_adapted", **changes)
    expected = [0.3]
    for metrics in history[:-1]:
        expected.append(ppo.adaptive_kl_coef(expected[-1], metrics["kl"], 0.05))
    assert used == expected == [metrics["kl_coef"] for metrics in history]
    assert len(set(used)) == 4


def test_an_adapted_weight_changes_what_is_trained(run):
    """The controller moves the weight by up to 2 % an iteration; both policies have sampled the
    same responses up to its second change."""
    changes = {"iterations": 3, "lr": 1e-2, "kl_coef": 50.0, "reward_clip": 0.01}
    fixed, fixed_history, _ = train_policy(run, "policy_weight", **changes)
    adapted, history, _ = train_policy(
        run, "policy_weight", adaptive_kl_target=1e-3, **changes
    )
    assert [m["kl_coef"] for m in fixed_history] == [50.0] * 3
    assert [m["kl_coef"] for m in history[:2]] == pytest.approx([50.0, 49.0])
    assert history[1]["kl"] == fixed_history[1]["kl"] != 0
    assert history[1]["value_loss"] < fixed_history[1]["value_loss"]
    assert not same(fixed, adapted)


def test_learning_rates_of_both_models_follow_the_schedule(run, monkeypatch):
    used = []
    update_policy = ppo.update_policy

    def recorded(run, learners, *arguments, **more):
        optimizers = (learners.policy_optimizer, learners.critic_optimizer)
        for optimizer in optimizers:
            assert len({group["lr"] for group in optimizer.param_groups}) == 1
        used.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        return update_policy(run, learners, *arguments, **more)

    monkeypatch.setattr(ppo, "update_policy", recorded)
    changes = {"iterations": 4, "warmup": 0.5, "lr": 3e-4, "critic_lr": 1e-3}
    train_policy(run, "policy_rates", **changes)
    factors = [0.5, 0.75, 0.5, 0.25]
    expected = [[3e-4 * factor, 1e-3 * factor] for factor in factors]
    assert np.array(used) == pytest.approx(np.array(expected))


def test_perplexity_is_under_sft_also_where_the_reference_is_reset(run):
    histories = []
    for interval in (0, 1):
        _, history, _ = train_policy(
            run, "policy_reset", iterations=4, kl_coef=0.0, lr=1e-2, reset_reference=interval
        )
        histories.append(history)
    fixed, reset = histories
    assert [m["perplexity_sft"] for m in fixed] == [m["perplexity_sft"] for m in reset]
    assert fixed[3]["kl"] != 0 and all(m["kl"] == 0 for m in reset)


def test_a_policy_starts_from_the_given_one_on_the_given_prompts(run):
    state, _, _ = train_policy(run, "policy_first", lr=1e-2)
    policy = load_model(run, LanguageModel, "sft")
    policy.load_state_dict(state)
    save_model(run, "policy_first", policy)
    pairs = run.train.pairs[:3]
    _, history, lines = train_policy(
        run, "policy_second", start="policy_first", pairs=pairs, lr=0.0
    )
    assert abs(history[0]["kl"]) > 1e-3  # the reference is still the SFT model
    assert {line["prompt"] for line in lines} <= {pair.prompt for pair in pairs}


def test_truncated_sampling_runs_without_the_check_of_probabilities(run):
    _, plain, _ = train_policy(run, "policy_plain")
    _, truncated, _ = train_policy(run, "policy_truncated", top_p=0.5)
    assert plain[0]["logprob_mismatch_max"] < 1e-4 < truncated[0]["logprob_mismatch_max"]


def test_a_rollout_can_have_several_answers_to_each_prompt(run):
    _, _, lines = train_policy(run, "policy_several", answers_per_prompt=4)
    prompts = [line["prompt"] for line in lines if line["iteration"] == 0]
    assert len(prompts) == 8 and len(set(prompts)) == 2
    assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4
    assert len({line["response"] for line in lines if line["iteration"] == 0}) > 2
    with pytest.raises(config.ConfigError, match="must be a multiple of ppo.answers_per_prompt"):
        config.load(None, [("ppo.answers_per_prompt", "3")])


def test_without_a_critic_answers_to_one_prompt_are_compared(run, tmp_path):
    group = {"advantage": "group", "answers_per_prompt": 4, "critic_warmup_iters": 0}
    models = ppo.load_models(with_ppo(run, **group), "reward_baseline", "sft")
    assert models.critic is None
    state, history, _ = train_policy(run, "policy_group", lr=1e-2, iterations=3, **group)
    assert all(m["value_loss"] == 0 and m["policy_steps"] == 1 for m in history)
    assert abs(history[2]["kl"]) > 1e-3  # it learns
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train_policy(run, "policy_group_stopped", lr=1e-2, iterations=3, **group)


@pytest.mark.parametrize("changes", [
    {"answers_per_prompt": 1, "critic_warmup_iters": 0},
    {"answers_per_prompt": 4, "critic_warmup_iters": 1},
])
def test_a_group_needs_answers_to_compare_and_has_no_critic(changes):
    words = [("ppo.advantage", "group")]
    words += [(f"ppo.{name}", str(value)) for name, value in changes.items()]
    with pytest.raises(config.ConfigError, match="needs ppo.answers_per_prompt of 2 or more"):
        config.load(None, words)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_both_optimizers_are_those_of_train_without_weight_decay(run, name):
    changes = {"train.optimizer": name, "train.gradient_checkpointing": name == "adamw"}
    run = run.with_settings(changes | {"train.weight_decay": 0.5})
    models = ppo.load_models(run, "reward_baseline", "sft")
    learners = ppo.make_learners(run, models)
    for optimizer, model, lr in (
        (learners.policy_optimizer, learners.policy, run.cfg.ppo.lr),
        (learners.critic_optimizer, learners.critic, run.cfg.ppo.critic_lr),
    ):
        assert type(optimizer).__name__.lower() == name
        groups = optimizer.param_groups
        assert {(group["weight_decay"], group["lr"]) for group in groups} == {(0.0, lr)}
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        assert model.model.gradient_checkpointing == (name == "adamw")
        assert not model.training
    assert not models.reference.training and models.sft is None


# ----------------------------------------------------------------------------------------------
# What a run leaves to be read


def test_samples_are_written_with_their_rewards(run):
    _, _, lines = train_policy(run, "policy_samples", iterations=5, sample_every=2)
    with open(run.path("samples_samples.md")) as file:
        text = file.read()
    for i, line in enumerate(lines):
        heading = f"Iteration {line['iteration']}: reward {line['reward']:.3f}, KL {line['kl']:.2f}"
        is_written = i // 8 in (0, 2, 4) and i % 8 < 3
        assert (heading in text) == is_written
        if is_written:
            block = text.split(heading)[1].split("Iteration")[0].strip("\n")
            unindented = "".join(part[4:] + "\n" for part in block.split("\n"))
            expected = line["prompt"].strip() + " >>>" + line["response"]
            assert unindented.strip() == expected.strip()
    logged = log_of(run, "policy_samples")
    assert [len(line.get("samples", ())) for line in logged] == [3, 0, 3, 0, 3]
    assert logged[2]["samples"] == lines[16:19]
    train_policy(run, "policy_silent", sample_every=0)
    assert not os.path.exists(run.path("samples_silent.md"))


def test_a_log_line_has_every_metric(run):
    train_policy(run, "policy_logged")
    metrics = {
        "reward", "reward_normalised", "kl", "perplexity_sft", "length", "clipfrac",
        "explained_variance", "eos_rate",
    }
    assert metrics <= log_of(run, "policy_logged")[-1].keys()


def test_a_warning_is_given_once(run, capsys):
    train_policy(run, "policy_warned", iterations=7, max_new_tokens=2)
    warning = (
        "warning: policy_warned, iteration 5: answers run into ppo.max_new_tokens = 2"
    )
    assert capsys.readouterr().out.count(warning) == 1


# ----------------------------------------------------------------------------------------------
# What scores a response


def test_the_ensemble_scores_by_mean_worst_or_mean_minus_std(run):
    rows = [row.branches(0) for row in run.valid.rows[:20]]
    members = []
    for m in range(2):
        model = load_model(run, RewardModel, f"member_{m:02d}")
        offset = score_rows(run, model, run.train.rows).mean()
        members.append(score_rows(run, model, rows)[:, 0] - offset)
    a, b = members
    expected = {
        "mean": (a + b) / 2,
        "worst": torch.minimum(a, b),
        "mean_minus_std": (a + b) / 2 - 0.7 * (a - b).abs() / 2,
    }
    for name, scores in expected.items():
        judged = with_ppo(run, reward=name, std_weight=0.7)
        reward_fn = ppo.make_reward_fn(judged, "reward_baseline")
        torch.testing.assert_close(reward_fn(rows), scores, atol=1e-5, rtol=0)
    model = load_model(run, RewardModel, "reward_baseline")
    reward_fn = ppo.make_reward_fn(run, "reward_baseline")
    scores = score_rows(run, model, rows)[:, 0]
    torch.testing.assert_close(reward_fn(rows), scores, atol=1e-5, rtol=0)


def test_the_verifier_runs_the_program(run):
    rng = random.Random(0)
    rows = []
    right = []
    for domain in world.HELD_OUT_DOMAINS * 5:
        prompt, good, bad = world.make_prompt(rng, (domain,), 4)
        for answer in (good[0], bad[0], "I do not know."):
            rows.append(encode_row(run.tokenizer, prompt, (" " + answer,), 256))
        right += [1.0, 0.0, 0.0]
    verify = ppo.make_reward_fn(with_ppo(run, reward="verifier"), None)
    assert verify(rows).tolist() == right


def test_the_reward_model_and_the_verifier_are_added(run):
    """An accepted answer earns three standard deviations of the rewards on training pairs more."""
    rng = random.Random(0)
    rows = []
    for _ in range(5):
        prompt, good, bad = world.make_prompt(rng, ("translation",), 4)
        for answer in (good[0], bad[0]):
            rows.append(encode_row(run.tokenizer, prompt, (" " + answer,), 256))
    both = ppo.make_reward_fn(with_ppo(run, reward="both"), "reward_baseline")(rows)
    model = ppo.make_reward_fn(run, "reward_baseline")(rows)
    scale = score_rows(run, load_model(run, RewardModel, "reward_baseline"), run.train.rows).std()
    expected = 3.0 * scale * torch.tensor([1.0, 0.0] * 5)
    torch.testing.assert_close(both - model, expected, atol=1e-5, rtol=0)


def test_domains_change_the_prompts_and_what_sft_is_trained_on(tmp_path):
    words = [*BASELINE, "--ppo.reward=verifier", "--ppo.domains=programs"]
    for stage in ("sft", "reward", "ppo"):
        assert go(tmp_path, *words, f"--stage={stage}") == 0
    lines = read_lines(tmp_path / "rollouts_baseline.jsonl")
    assert lines and all("Write a program" in line["prompt"] for line in lines)
    assert {line["reward"] for line in lines} <= {0.0, 1.0}
    assert depends_on(tmp_path, *words)["sft"]["ppo.domains"] == ["programs"]
    assert depends_on(tmp_path, *BASELINE)["sft"]["ppo.domains"] == []


@pytest.mark.parametrize("words, parts", [
    (["--ppo.reward=verifier"], ("ppo.reward", "ppo.domains")),
    (["--ppo.reward=both"], ("ppo.reward", "ppo.domains")),
    (["--ppo.domains=arithmetic", "--data.train=FILE"], ("ppo.domains", "data.train = world")),
    (["--ppo.domains=facts"], ("ppo.domains", "arithmetic, translation, programs")),
    (["--ppo.min_new_tokens=12"], ("ppo.min_new_tokens", "ppo.max_new_tokens = 12")),
    (["--ppo.critic_warmup_iters=2"], ("ppo.critic_warmup_iters", "ppo.iterations = 2")),
    (["--ppo.adaptive_kl_target=1", "--ppo.kl_coef=0"],
     ("ppo.adaptive_kl_target", "ppo.kl_coef > 0")),
    (["--ppo.reward=best"], ("ppo.reward", "mean_minus_std")),
])
def test_contradictory_settings_are_one_line(words, parts, tmp_path, capsys):
    path = write_pairs(tmp_path / "pairs.jsonl")
    words = [word.replace("FILE", str(path)) for word in words]
    assert go(tmp_path / "out", *words) == 2
    one_line(capsys, *parts)


def test_a_policy_depends_on_the_members_where_they_score(run):
    for reward, reads_members in (("model", False), ("worst", True)):
        depends = depends_on(run.cfg.out_dir, *BASELINE, f"--ppo.reward={reward}")
        depends = depends["policy_baseline"]
        assert ("input member_00" in depends) == reads_members
        assert depends["ppo.reward"] == reward and "ppo.sample_every" not in depends


# ----------------------------------------------------------------------------------------------
# A task whose answers a program judges

NUM_TASKS = 50


def make_task():
    """Fifty sums, and SFT answers of which a fifth are right -> prompts, [(prompt index, text)]"""
    rng = random.Random(0)
    tasks = [world.generate_arithmetic(rng, 6) for _ in range(NUM_TASKS)]
    prompts = [f"{world.HUMAN}{question}{world.ASSISTANT}" for question, _, _ in tasks]
    demonstrations = []
    for _ in range(2000):
        i = int(rng.random() * NUM_TASKS)
        _, good, bad = tasks[i]
        answer = world.pick(rng, good if rng.random() < 0.2 else bad)
        demonstrations.append((i, " " + answer))
    return prompts, demonstrations


def train_on_demonstrations(policy, rows):
    """Four plain epochs of SFT"""
    optimizer = make_optimizer(policy, "adamw", 3e-3, 0.1)
    for epoch in range(4):
        for index in batches([len(row) for row in rows], 64, str(epoch)):
            micro_batch = [rows[i] for i in index]
            out_pos, target = response_tokens(micro_batch)
            logits = policy(collate(micro_batch).tokens, out_pos=out_pos)
            loss = language_model(logits, target).sum() / (target >= 0).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_a_verifier_task_reaches_more_than_twice_its_sft_success():
    """The reward is 1 where the program accepts the answer; SFT is right a fifth of the time."""
    prompts, demonstrations = make_task()
    tokenizer = train_tokenizer((prompts[i] + text for i, text in demonstrations), 300)
    rows = []
    for i, text in demonstrations:
        rows.append(encode_row(tokenizer, prompts[i], (text,), 64))
    shape = Shape(tokenizer.vocab_size, 2, 4, 4, 64, 128, 64)
    policy = init_weights(LanguageModel(shape), torch.Generator().manual_seed(0))
    train_on_demonstrations(policy, rows)
    critic = init_weights(RewardModel(shape), torch.Generator().manual_seed(1))
    critic.model.load_state_dict(policy.model.state_dict())
    prompt_ids = [encode_prompt(tokenizer, prompt, 40) for prompt in prompts]

    def is_right(prompt, response):
        words = [int(t) for t in response if t not in (tokenizer.eos_id, -1)]
        prompt = tokenizer.decode([int(t) for t in prompt])
        return float(world.right(prompt, tokenizer.decode(words)) == 1)

    def verify(rows):
        return torch.tensor([is_right(row.prompt, row.responses[0]) for row in rows])

    def success(model):
        sampling = Sampling(20, tokenizer.eos_id)
        generator = torch.Generator().manual_seed(5)
        responses = generate(model, prompt_ids * 4, sampling, generator).tokens.tolist()
        return np.mean([is_right(p, r) for p, r in zip(prompt_ids * 4, responses)])

    before = success(policy)
    cfg = config.Ppo(
        max_new_tokens=20, lr=5e-4, critic_lr=1e-3, kl_coef=0.02, reward_clip=10.0, whiten=True,
        iterations=8,
    )
    run = stub_run(cfg, tokenizer.eos_id)
    models = ppo.Models(policy, critic, copy.deepcopy(policy), verify)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    learners = ppo.Learners(
        policy, critic, make_optimizer(policy, "adamw", 0.0, 0.0),
        make_optimizer(critic, "adamw", 0.0, 0.0), scaler,
    )
    moments = ppo.Moments()
    for i in range(cfg.iterations):
        set_lr(learners.policy_optimizer, cfg.lr * ppo.lr_factor(i, cfg))
        set_lr(learners.critic_optimizer, cfg.critic_lr * ppo.lr_factor(i, cfg))
        generator = torch.Generator().manual_seed(i)
        index = torch.randint(NUM_TASKS, (128,), generator=generator).tolist()
        picked = [prompt_ids[j] for j in index]
        rollout = ppo.make_rollout(run, models, picked, moments, generator, cfg)[0]
        ppo.update_policy(run, learners, rollout, cfg, generator)
    after = success(policy)
    assert before > 0.02 and after > 2 * before and after > 0.15
