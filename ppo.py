"""Proximal policy optimisation of a language model against a reward model.
arXiv 1707.06347; PPO-max of Part I, arXiv 2307.04964.

    repeat:
        sample a response to each prompt from the policy
        score = reward model at the response's last token, normalised by running moments, clipped
        reward_t = -kl_coef (log pi - log ref) at every token, plus the score at the last one
        advantages, returns = GAE(reward, critic)
        for each epoch, each minibatch:
            step the policy on the clipped surrogate, the critic on the clipped squared error

The policy starts from the SFT model, which stays as reference; the critic starts from the reward
model.  Dropout is off throughout, because load_model returns models in eval mode and nothing here
calls train(): two passes over the same tokens must give the same probabilities.  Responses are
sampled from softmax(logits / temperature) and scored under that same distribution, so that the
ratio is one before the first step; ppo.top_p and ppo.repetition_penalty change the sampling alone.
Every other option is one setting of [ppo], named with its source in config.py.  Only the present
rollout is replayed, for num_ppo_epochs passes: PPO-max's small buffer is no larger.

Shapes: B responses, N tokens of prompt and response, T response tokens, then padding.
"""
import time
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import world
from common import (
    embed_rows,
    load_model,
    make_optimizer,
    make_sampling,
    member_names,
    policy_prompts,
    score_rows,
    seed_from,
    set_lr,
    sft_rows,
    training_prompts,
)
from data import Row, chunk, collate, length_groups, response_tokens
from generate import Generation, Sampling, generate
from losses import kl_penalty, masked_mean, policy_loss, value_loss
from model import LanguageModel, RewardModel

# What one more pass over rows costs, in tokens: padding up to so many is cheaper.  On CUDA a pass
# of a small model waits for its kernels to be launched.
PASS_COST = {"cpu": 64, "cuda": 8192}
# Responses to one prompt share a row, up to so many and to so many times the prompt's tokens: what
# attention costs grows with the square of the row's length.
MAX_BRANCHES = 8
MAX_SHARE = 4
VERIFIER_WEIGHT = 3.0  # of an accepted response beside a reward model, in standard deviations
PASS_TOKENS = 16384  # of one pass at most; logits are (tokens, vocabulary)

# ----------------------------------------------------------------------------------------------
# Pure parts


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.  arXiv 1506.02438, eq. 16.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   R_t = A_t + V_t

    rewards, values, mask: (B, T); mask is 1 on response tokens; other tokens are skipped, and the
    value after the last response token is 0
    -> advantages, returns, each (B, T); 0 outside the mask, even where the inputs are NaN there
    """
    mask = mask.bool()
    rewards = rewards.masked_fill(~mask, 0.0)
    values = values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        is_response = mask[:, t]
        advantages[:, t] = advantage.masked_fill(~is_response, 0.0)
        next_value = torch.where(is_response, values[:, t], next_value)
        next_advantage = torch.where(is_response, advantage, next_advantage)
    returns = (advantages + values).masked_fill(~mask, 0.0)
    return advantages, returns


@dataclass
class Moments:
    """Mean and population variance of all rewards so far (Chan's parallel update)."""
    count: float = 0.0
    mean: float = 0.0
    square: float = 0.0   # sum of squared deviations

    def add(self, x):
        n = len(x)
        mean = float(x.mean())
        delta = mean - self.mean
        total = self.count + n
        self.square += float(((x - mean) ** 2).sum()) + delta ** 2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self):
        if not self.count:
            return 1.0
        return max((self.square / self.count) ** 0.5, 1e-8)


def whiten(x, mask):
    """Mean 0 and std 1 where mask is set; 0 elsewhere.  x, mask: (B, T) -> (B, T)"""
    centred = x - masked_mean(x, mask)
    std = (masked_mean(centred ** 2, mask) + 1e-8).sqrt()
    return (centred / std).masked_fill(~mask.bool(), 0.0)


def adaptive_kl_coef(kl_coef, kl, target):
    """The next weight of the KL penalty.  arXiv 1909.08593, sec. 2.2.

        kl_coef (1 + 0.1 e),  e = (kl - target) / target, clipped to [-0.2, 0.2]

    kl, target: nats a response
    """
    error = (kl - target) / target
    return kl_coef * (1 + 0.1 * min(max(error, -0.2), 0.2))


def lr_factor(iteration, cfg):
    """Factor on the learning rates: linear decay to 0 over the run; linear warm-up at its start and
    again where the policy starts to train."""
    since_start = iteration
    if iteration >= cfg.critic_warmup_iters:
        since_start = iteration - cfg.critic_warmup_iters
    warmup = min((since_start + 1) / max(1, cfg.warmup * cfg.iterations), 1.0)
    return warmup * (1 - iteration / cfg.iterations)


def token_logprob(logits, target, step, sampling):
    """Log-probability of each target token under the policy, at the temperature of sampling.

    logits: (n, V), target: (n,) token ids, step: (n,) how many response tokens come before; the
    first sampling.min_new_tokens tokens of a response cannot be EOS -> (n,) float32
    """
    if sampling.min_new_tokens:
        too_early = step < sampling.min_new_tokens
        ends = torch.tensor(sampling.end_ids, device=logits.device)
        is_eos = torch.isin(torch.arange(logits.shape[1], device=logits.device), ends)
        logits = logits.masked_fill(too_early[:, None] & is_eos, -torch.inf)
    logits = logits.float() / sampling.temperature
    return -F.cross_entropy(logits, target, reduction="none")


def shape_rewards(score, logprob, ref_logprob, mask, cfg):
    """Reward of each token: minus kl_coef * KL everywhere, plus the score at the last token.

    score: (B,); the others (B, T); cfg: kl_coef and kl_estimator -> (B, T)
    """
    mask = mask.bool()
    penalty = cfg.kl_coef * kl_penalty(logprob, ref_logprob, cfg.kl_estimator)
    rewards = (-penalty).masked_fill(~mask, 0.0)
    row = torch.arange(len(score), device=score.device)
    last = mask.sum(1) - 1
    rewards[row, last] += score
    return rewards


# ----------------------------------------------------------------------------------------------
# What scores a response


def mean_reward(rewards, std_weight):
    return rewards.mean(0)


def worst_reward(rewards, std_weight):
    return rewards.amin(0)


def mean_minus_std(rewards, std_weight):
    return rewards.mean(0) - std_weight * rewards.std(0, correction=0)  # the std of strength.py


# ppo.reward: how the members' rewards (M, B) become one (B,); arXiv 2310.02743
ENSEMBLE_REDUCERS = {
    "mean": mean_reward,
    "worst": worst_reward,
    "mean_minus_std": mean_minus_std,
}


def make_reward_fn(run, reward_name):
    """-> function of [Row], each response ending with EOS, that returns rewards (B,)

    Only differences of a member's rewards are trained, so its zero is arbitrary.  Each member's
    mean on 500 training pairs is therefore subtracted; otherwise the worst member would be the one
    whose zero is lowest.
    """
    cfg = run.cfg.ppo
    if cfg.reward == "verifier":
        return make_verifier(run)
    if cfg.reward == "both":
        return make_sum_of_rewards(run, reward_name)
    is_ensemble = cfg.reward in ENSEMBLE_REDUCERS
    names = member_names(run.cfg) if is_ensemble else [reward_name]
    models = [run.shard(load_model(run, RewardModel, name)) for name in names]
    reward_offsets = [0.0] * len(models)
    if is_ensemble:
        rows = run.train.rows[:500]
        reward_offsets = [float(score_rows(run, model, rows).mean()) for model in models]

    @torch.no_grad()
    def reward_fn(rows):
        per_model = torch.zeros(len(models), len(rows), device=run.device)
        with run.autocast():
            for index in groups_of(run, rows):
                batch = collate(share_prompts([rows[i] for i in index])).to(run.device)
                for m, model in enumerate(models):
                    reward = model(
                        batch.tokens, batch.branch, batch.position, batch.last,
                        inputs_embeds=batch.inputs_embeds,
                    )
                    per_model[m, index] = reward[batch.last > 0] - reward_offsets[m]
        if is_ensemble:
            return ENSEMBLE_REDUCERS[cfg.reward](per_model, cfg.std_weight)
        return per_model[0]

    return reward_fn


def make_sum_of_rewards(run, reward_name):
    """The reward model, and VERIFIER_WEIGHT standard deviations of its rewards on training pairs
    where the world's program accepts the response -> function of [Row] -> (B,)"""
    model = run.shard(load_model(run, RewardModel, reward_name))
    scale = float(score_rows(run, model, run.train.rows[:500]).std())
    model_reward = make_reward_fn(run.with_settings({"ppo.reward": "model"}), reward_name)
    verify = make_verifier(run)

    def reward_fn(rows):
        return model_reward(rows) + VERIFIER_WEIGHT * scale * verify(rows)

    return reward_fn


def make_verifier(run):
    """-> function of [Row] that returns 1 where the world's program accepts the response"""

    def verify(rows):
        verdicts = []
        for row in rows:
            prompt = run.tokenizer.decode(row.prompt.tolist())
            response = run.tokenizer.decode(row.responses[0][:-1].tolist())
            verdicts.append(float(world.right(prompt, response) == 1))
        return torch.tensor(verdicts, device=run.device)

    return verify


# ----------------------------------------------------------------------------------------------
# Rollout


class Models(NamedTuple):
    """The models of PPO; sft is set where the reference is no longer the SFT model."""
    policy: LanguageModel
    critic: RewardModel | None     # None: ppo.advantage = group
    reference: LanguageModel
    reward_fn: Callable            # of make_reward_fn
    sft: LanguageModel | None = None  # perplexity is measured under it


class Rollout(NamedTuple):
    rows: list           # B Row, prompt and sampled response
    mask: Tensor         # (B, T) bool, the response tokens; not the padding
    logprob: Tensor      # (B, T) under the policy that sampled
    value: Tensor        # (B, T)
    advantage: Tensor    # (B, T)
    returns: Tensor      # (B, T)

    def select(self, index):
        """The minibatch of these rows, cut to its longest response; 0 in the padding.

        The padding may hold anything, and NaN times a mask of 0 is still NaN in the gradient.
        """
        mask = self.mask[index.to(self.mask.device)]
        T = int(mask.sum(1).max())
        mask = mask[:, :T]
        cut = {}
        for name in ("logprob", "value", "advantage", "returns"):
            x = getattr(self, name)[index.to(mask.device), :T]
            cut[name] = x.masked_fill(~mask, 0.0)
        return Rollout([self.rows[i] for i in index.tolist()], mask, **cut)


class TokenBatch(NamedTuple):
    """One pass of a model over rows of similar length; n response tokens in all, row after row.

    Rows of one prompt are branches of one of the b shared rows: see share_prompts.
    """
    tokens: Tensor       # (b, N) prompt and responses, -1 in the padding
    branch: Tensor | None
    position: Tensor     # (b, N)
    out_pos: Tensor      # (b, T) where each response token is predicted
    mask: Tensor         # (b, T) bool
    target: Tensor       # (n,) the response tokens
    row: Tensor          # (n,) index into the rows given of each response token
    step: Tensor         # (n,) how many tokens of its response come before it
    inputs_embeds: Tensor | None  # (b, N, C) of the frozen blocks that all models share


def make_token_batch(rows, device):
    """rows: those of one of groups_of, in its order"""
    shared = share_prompts(rows)
    batch = collate(shared).to(device)
    out_pos, target = (x.to(device) for x in response_tokens(shared))
    mask = target >= 0
    lengths = [len(row.responses[0]) for row in rows]
    row = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths)).to(device)
    step = torch.cat([torch.arange(n) for n in lengths]).to(device)
    return TokenBatch(batch.tokens, batch.branch, batch.position, out_pos, mask, target[mask], row,
                      step, batch.inputs_embeds)


def has_room(row, response):
    """Whether the response can be one more branch of a row of the same prompt"""
    num_tokens = len(row) - len(row.prompt) + len(response)
    return len(row.responses) < MAX_BRANCHES and num_tokens <= MAX_SHARE * len(row.prompt)


def add_branch(row, other):
    """The row with the responses of another row of the same prompt as further branches"""
    embeds = row.inputs_embeds + other.inputs_embeds[1:]
    return Row(row.prompt, row.responses + other.responses, embeds)


def share_prompts(rows):
    """One row for neighbours of one prompt, their responses its branches -> [Row]

    So the prompt is computed once for several responses, and the order remains.
    """
    shared = rows[:1]
    for row in rows[1:]:
        same_prompt = np.array_equal(shared[-1].prompt, row.prompt)
        if same_prompt and has_room(shared[-1], row.responses[0]):
            shared[-1] = add_branch(shared[-1], row)
        else:
            shared.append(row)
    return shared


def rows_by_prompt(rows):
    """Which rows one shared row has room for -> [list of indices], in the order of their first"""
    parts = []
    shared = []
    part_of = {}  # prompt -> its last part
    for i, row in enumerate(rows):
        part = part_of.get(row.prompt.tobytes())
        if part is not None and has_room(shared[part], row.responses[0]):
            parts[part].append(i)
            shared[part] = add_branch(shared[part], row)
        else:
            part_of[row.prompt.tobytes()] = len(parts)
            parts.append([i])
            shared.append(row)
    return parts


def groups_of(run, rows):
    """The rows in groups of similar length, each for one pass, those of a shared row together.

    -> [index tensor]; one group where the models are spread over ranks, whose passes go together
    """
    parts = rows_by_prompt(rows)
    if run.shards:
        return [torch.tensor([i for part in parts for i in part])]
    lengths = [len(share_prompts([rows[i] for i in part])[0]) for part in parts]
    groups = []
    for group in length_groups(lengths, PASS_COST[run.device.type]):
        for piece in chunk(group, max(1, PASS_TOKENS // lengths[group[-1]])):
            groups.append(torch.tensor([i for part in piece for i in parts[part]]))
    return groups


def token_batches(run, rows):
    """The passes over the rows -> pairs of a TokenBatch and (rows, steps), where its tokens belong
    in a (B, T) tensor"""
    for index in groups_of(run, rows):
        batch = make_token_batch([rows[i] for i in index], run.device)
        yield batch, (index.to(run.device)[batch.row], batch.step)


def response_logprob(policy, batch, sampling):
    """-> (n,) log-probabilities of the response tokens; logits are computed for these alone"""
    logits = policy(
        batch.tokens, batch.branch, batch.position, batch.out_pos,
        inputs_embeds=batch.inputs_embeds, mask=batch.mask,
    )
    return token_logprob(logits, batch.target, batch.step, sampling)


def response_value(critic, batch):
    """-> (n,) values of the critic where the response tokens are predicted"""
    value = critic(
        batch.tokens, batch.branch, batch.position, batch.out_pos,
        inputs_embeds=batch.inputs_embeds,
    )
    return value[batch.mask]


@torch.no_grad()
def make_rollout(run, models, prompts, moments, generator, cfg):
    """Sample one response to each prompt, score it, and prepare the update.

    prompts: B lists of token ids; moments: of the rewards so far, updated here; cfg: [ppo]
    -> Rollout, metrics (means over responses), token ids of the responses, [{"reward", "kl"}]
    """
    sampling = make_sampling(run, cfg)
    # 1. sample; of several processes each has its own prompts
    own = own_rows(run, len(prompts), cfg.answers_per_prompt)
    with run.autocast(), run.gathered(models.policy):
        generation = generate(models.policy, prompts, sampling, generator, own=own)
    generation = Generation(*(run.merge(x, own, len(prompts)) for x in generation))
    lengths = (generation.tokens >= 0).sum(1).tolist()
    responses = [row[:n] for row, n in zip(generation.tokens.tolist(), lengths)]

    # 2. score
    rows_with_eos = embed_rows(run, append_eos(prompts, responses, sampling))
    rows = [cut_response(row, n) for row, n in zip(rows_with_eos, lengths)]
    score = models.reward_fn([rows_with_eos[i] for i in own])
    score = run.merge(score, own, len(prompts))  # (B,)
    moments.add(score.double())
    normalized = normalize_scores(score, moments, generation.ended, cfg)

    # 3. log-probabilities and values of the sampled tokens
    mask = generation.tokens[:, :max(lengths)] >= 0
    shape = (len(own), mask.shape[1])
    columns = torch.zeros(4, *shape, device=score.device)
    logprob, ref_logprob, sft_logprob, value = columns
    with run.autocast():
        for batch, place in token_batches(run, [rows[i] for i in own]):
            logprob[place] = response_logprob(models.policy, batch, sampling)
            ref_logprob[place] = response_logprob(models.reference, batch, sampling)
            if models.sft is not None:
                sft_logprob[place] = response_logprob(models.sft, batch, sampling)
            if models.critic is not None:
                value[place] = response_value(models.critic, batch)
    merged = [run.merge(x, own, len(prompts)) for x in columns]
    logprob, ref_logprob, sft_logprob, value = merged  # (B, T)
    if models.sft is None:
        sft_logprob = ref_logprob

    # 4. rewards of tokens, advantages, returns
    rewards = shape_rewards(normalized, logprob, ref_logprob, mask, cfg)
    if cfg.advantage == "group":
        advantage = returns = group_advantage(rewards, mask, cfg.answers_per_prompt)
    else:
        advantage, returns = gae(rewards, value, mask, cfg.gamma, cfg.gae_lambda)
    if cfg.whiten:
        advantage = whiten(advantage, mask)

    kl = kl_penalty(logprob, ref_logprob, "k1").sum(1)  # nats a response
    mismatch = (generation.logprob[:, :mask.shape[1]] - logprob).abs()
    metrics = {
        "reward": float(score.mean()),
        "reward_normalised": float(normalized.mean()),
        "kl": float(kl.mean()),
        "perplexity_sft": float(masked_mean(-sft_logprob, mask).exp()),
        "length": sum(lengths) / len(lengths),
        "eos_rate": float(generation.ended.float().mean()),
        "explained_variance": explained_variance(value[mask], returns[mask]),
        "logprob_mismatch_max": float(mismatch.max()),
        "logprob_mismatch_mean": float(masked_mean(mismatch, mask)),
    }
    scores = [{"reward": r, "kl": k} for r, k in zip(score.tolist(), kl.tolist())]
    return Rollout(rows, mask, logprob, value, advantage, returns), metrics, responses, scores


def own_rows(run, num_rows, answers_per_prompt):
    """Rows that this process computes, those of one prompt together; all, if it is the only one

    -> list of indices
    """
    first_rows, _ = run.share(range(0, num_rows, answers_per_prompt))
    return [first + i for first in first_rows for i in range(answers_per_prompt)]


def normalize_scores(score, moments, ended, cfg):
    """Scores by the running moments, clipped, less a penalty for a response without EOS.  (B,)"""
    if cfg.normalize:
        score = (score - moments.mean) / moments.std
        score = score.clamp(-cfg.reward_clip, cfg.reward_clip)
    if cfg.missing_eos_penalty:
        score = score - cfg.missing_eos_penalty * (~ended).to(score)
    return score


def group_advantage(rewards, mask, size):
    """Reward of a response less the mean over its group, over the group's std.  arXiv 2402.03300

    rewards, mask: (B, T), responses to one prompt next to each other, `size` to each
    -> (B, T), the same at every token; 0 where a group is rewarded alike
    """
    total = rewards.masked_fill(~mask, 0.0).sum(1).view(-1, size)
    centred = total - total.mean(1, keepdim=True)
    normalized = centred / (total.std(1, correction=0, keepdim=True) + 1e-6)
    return normalized.flatten()[:, None] * mask


def explained_variance(value, returns):
    """1 - Var(returns - value) / Var(returns), of all response tokens: 1 is a perfect critic"""
    variance = returns.var(correction=0).clamp(min=1e-8)
    return float(1 - (returns - value).var(correction=0) / variance)


def append_eos(prompts, responses, sampling):
    """Rows whose responses end with EOS, or another end of the model, whether or not the policy
    sampled it.

    The reward model has learned rewards at EOS alone, so a response that was cut at the length
    limit is scored with EOS appended.  The policy did not choose that EOS: cut_response takes it
    off again, and the reward is credited to the last token that the policy chose.
    """
    rows = []
    for prompt, response in zip(prompts, responses):
        has_ended = response[-1] in sampling.end_ids
        closed = response if has_ended else [*response, sampling.eos_id]
        rows.append(Row(np.asarray(prompt), (np.asarray(closed),)))
    return rows


def cut_response(row, length):
    """The row without an EOS that was appended after `length` sampled tokens"""
    embeds = row.inputs_embeds
    if embeds:
        embeds = (embeds[0], embeds[1][:length])
    return Row(row.prompt, (row.responses[0][:length],), embeds)


# ----------------------------------------------------------------------------------------------
# Update


class Learners(NamedTuple):
    """What an update trains."""
    policy: LanguageModel
    critic: RewardModel | None
    policy_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler


def update_policy(run, learners, rollout, cfg, generator, demonstrations=(), policy_stopped=False):
    """num_ppo_epochs of minibatch steps on one rollout -> metrics, averages over the steps.

    demonstrations: SFT rows for the ptx term; policy_stopped: True trains the critic alone
    "first_ratio" is the probability ratio farthest from 1 before the first step.
    """
    policy, critic, policy_optimizer, critic_optimizer, scaler = learners
    sampling = make_sampling(run, cfg)
    history = {}
    first_ratio = None
    lengths = torch.tensor([len(row.responses[0]) for row in rollout.rows])
    for _ in range(cfg.num_ppo_epochs):
        order = shuffle_prompts(rollout.rows, generator)
        for index in order.tensor_split(cfg.num_minibatches):
            own, share = run.share_of_counts(lengths[index])  # of this of several processes
            mb = rollout.select(index[own])
            mask = mb.mask
            logprob, value = evaluate_tokens(run, policy, critic, mb, sampling, policy_stopped)
            log_ratio = logprob - mb.logprob  # 0 in the padding
            ratio = log_ratio.exp()
            with torch.no_grad():
                if first_ratio is None:
                    first_ratio = float(ratio.flatten()[(ratio - 1).abs().argmax()])
                approx_kl = share * masked_mean(kl_penalty(mb.logprob, logprob, "k3"), mask)
                is_clipped = (ratio - 1).abs() > cfg.cliprange
                clipfrac = share * masked_mean(is_clipped.float(), mask)
            if cfg.target_kl and run.total([float(approx_kl)])[0] > cfg.target_kl:
                policy_stopped = True  # the critic continues, as in Spinning Up

            token_loss = policy_loss(logprob, mb.logprob, mb.advantage, cfg.cliprange)
            pg_loss = share * masked_mean(token_loss, mask)
            v_loss = torch.zeros(())
            if critic is not None:
                value_error = value_loss(value, mb.value, mb.returns, cfg.cliprange_value)
                v_loss = share * masked_mean(value_error, mask)
            metrics: dict[str, float | Tensor] = {
                "policy_loss": pg_loss.detach(),
                "value_loss": v_loss.detach(),
                "clipfrac": clipfrac,
                "approx_kl": approx_kl,
                "policy_steps": float(not policy_stopped) / run.world_size,
            }
            if not policy_stopped:
                loss = pg_loss
                if cfg.ptx_coef:
                    rows = draw_rows(demonstrations, len(index), generator)
                    ptx_loss = language_modelling_loss(run, policy, rows)
                    loss = pg_loss + cfg.ptx_coef * ptx_loss
                    metrics["ptx_loss"] = ptx_loss.detach()
                optimizer_step(run, policy, policy_optimizer, scaler, loss)
            if critic is not None:
                optimizer_step(run, critic, critic_optimizer, scaler, v_loss)
            scaler.update()
            for name, x in metrics.items():
                history.setdefault(name, []).append(float(x))
    averages = run.total([sum(x) / len(x) for x in history.values()])
    first_ratio = max(run.of_each_rank(first_ratio), key=distance_to_one)
    return dict(zip(history, averages)) | {"first_ratio": first_ratio}


def distance_to_one(ratio):
    return abs(ratio - 1) if ratio == ratio else np.inf  # NaN is the farthest


def shuffle_prompts(rows, generator):
    """-> (B,) a random order of the rows in which those that can share a row stay together"""
    parts = rows_by_prompt(rows)
    order = torch.randperm(len(parts), generator=generator)
    return torch.tensor([i for part in order for i in parts[part]])


def evaluate_tokens(run, policy, critic, mb, sampling, policy_stopped=False):
    """Log-probabilities and values of a minibatch's response tokens -> (B, T), (B, T)

    policy_stopped: the log-probabilities are for the metrics alone, and keep no graph
    """
    logprob = torch.zeros_like(mb.logprob)
    value = torch.zeros_like(mb.value)
    with run.autocast():
        for batch, place in token_batches(run, mb.rows):
            with torch.set_grad_enabled(not policy_stopped):
                logprob[place] = response_logprob(policy, batch, sampling)
            if critic is not None:
                value[place] = response_value(critic, batch)
    return logprob, value


def optimizer_step(run, model, optimizer, scaler, loss):
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    run.add_up([p.grad for p in model.parameters() if p.grad is not None])
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), run.cfg.train.grad_clip)
    scaler.step(optimizer)


def draw_rows(rows, n, generator):
    return [rows[i] for i in torch.randint(len(rows), (n,), generator=generator).tolist()]


def language_modelling_loss(run, policy, rows):
    """Mean next-token loss on the responses of SFT rows (the ptx term of InstructGPT) -> scalar;
    of several processes each has a part of it"""
    own, share = run.share_of_counts([len(row.responses[0]) for row in rows])
    batch = make_token_batch(rows[own], run.device)
    with run.autocast():
        logprob = response_logprob(policy, batch, Sampling(1, run.tokenizer.eos_id))
    return -share * logprob.mean()


def check_first_step(metrics, tolerance, mismatch="logprob_mismatch_max"):
    """What must hold before the policy has moved: a bug in sampling, scoring or masks shows here.

    metrics: of the first rollout and its update; raises RuntimeError
    mismatch: how the difference between sampling and scoring is measured.  "logprob_mismatch_max"
    is that of the worst token; in half precision use "logprob_mismatch_mean", since through 30
    layers one token of 1,500 differed by 0.23 nats in bf16 where nothing was wrong; None: truncated
    sampling differs from scoring by intention.
    """
    facts = {
        "the ratio of new to old probabilities differs from 1": abs(metrics["first_ratio"] - 1),
        "the KL to the SFT model, in nats a response, is not 0": abs(metrics["kl"]),
    }
    if mismatch is not None:
        what = "log-probabilities differ between sampling and scoring"
        facts[what] = metrics[mismatch]
    for what, amount in facts.items():
        if not amount <= tolerance:
            raise RuntimeError(f"PPO's first step: {what} (by {amount:.2g}, allowed "
                               f"{tolerance:.2g}); sampling and scoring must use one model, one "
                               "temperature and no dropout")


# ----------------------------------------------------------------------------------------------
# The loop


@dataclass
class State:
    """What a checkpoint holds beside the models."""
    kl_coef: float
    step: int = 0                                      # iterations done
    moments: tuple = ()                                # of the rewards so far
    history: list = field(default_factory=list)        # metrics, one an iteration
    lines: list = field(default_factory=list)          # all responses, with reward and KL


def train_policy_loop(run, name, reward_name, start="sft", pairs=None):
    """The loop of this file's docstring, from the policy START.pt and the
    reward model REWARD_NAME.pt.

    pairs: pairs whose prompts are sampled from, the training pairs unless given
    -> policy, metrics of the last iteration, lines of all responses sampled
    """
    from runtime import monitor
    cfg = run.cfg.ppo
    models = load_models(run, reward_name, start)
    learners = make_learners(run, models)
    prompts = policy_prompts(run, training_prompts(run) if pairs is None else pairs)
    demonstrations = sft_rows(run) if cfg.ptx_coef else ()
    parts = {name: part for name, part in learners._asdict().items() if part is not None}
    if cfg.reset_reference:
        parts["reference"] = models.reference
    saved = run.resume(name, parts)
    state = State(**saved) if saved else State(kl_coef=cfg.kl_coef)
    moments = Moments(*state.moments)
    warned = monitor.warned_before(state.history, cfg)

    for iteration in run.steps(name, state.step, cfg.iterations):
        start_time = time.time()
        generator = torch.Generator()
        generator.manual_seed(seed_from(f"{run.cfg.seed} {name} {iteration}"))
        if cfg.reset_reference and iteration and iteration % cfg.reset_reference == 0:
            models.reference.load_state_dict(models.policy.state_dict())
        drawn = draw_rows(prompts, cfg.rollout_batch_size // cfg.answers_per_prompt, generator)
        picked = [prompt for prompt in drawn for _ in range(cfg.answers_per_prompt)]
        step_cfg = replace(cfg, kl_coef=state.kl_coef)
        rollout, metrics, responses, scores = make_rollout(
            run, models, [ids for _, ids in picked], moments, generator, step_cfg
        )
        check_rollout(run, name, iteration, rollout, metrics)
        set_lr(learners.policy_optimizer, cfg.lr * lr_factor(iteration, cfg))
        if learners.critic_optimizer is not None:
            set_lr(learners.critic_optimizer, cfg.critic_lr * lr_factor(iteration, cfg))
        critic_only = iteration < cfg.critic_warmup_iters
        metrics |= update_policy(
            run, learners, rollout, cfg, generator, demonstrations, policy_stopped=critic_only
        )
        metrics["kl_coef"] = state.kl_coef
        check_update(run, name, iteration, learners, metrics)
        if iteration == 0:  # after the update, which is where the first ratio is measured
            check_start(run, metrics, start)
        if cfg.adaptive_kl_target and not critic_only:
            state.kl_coef = adaptive_kl_coef(state.kl_coef, metrics["kl"],
                                             cfg.adaptive_kl_target)
        add_lines(run, state, picked, responses, scores)
        state.history.append(metrics)
        state.moments = astuple(moments)
        state.step += 1
        tokens_per_s = metrics["length"] * len(picked) / (time.time() - start_time)
        monitor.after_iteration(run, name, state, warned, tokens_per_s)
        run.progress.set_postfix(
            reward=f"{metrics['reward']:.2f}", kl=f"{metrics['kl']:.2f}",
            length=f"{metrics['length']:.0f}", refresh=False,
        )
        if run.should_save():
            run.save_checkpoint(name, parts, **asdict(state))
    monitor.save_results(run, name.removeprefix("policy_"), state)
    return models.policy, state.history[-1], state.lines


def check_rollout(run, name, iteration, rollout, metrics):
    """Raise ConfigError if a reward or an advantage is not finite."""
    advantage = rollout.advantage[rollout.mask]
    run.check_finite(
        name, iteration + 1, a_reward=metrics["reward"], the_KL=metrics["kl"],
        an_advantage=float(advantage.abs().sum()),
    )


def check_update(run, name, iteration, learners, metrics):
    """Raise ConfigError if a loss of an update, or a weight after it, is not finite."""
    norms = {}
    for role, model in (("policy", learners.policy), ("critic", learners.critic)):
        if model is not None:
            norm = torch.nn.utils.get_total_norm(list(model.parameters()))
            norms[f"a_weight_of_the_{role}"] = float(run.whole(norm))
    run.check_finite(
        name, iteration + 1, the_loss_of_the_policy=metrics["policy_loss"],
        the_loss_of_the_critic=metrics["value_loss"], **norms,
    )


def load_models(run, reward_name, start):
    """Policy from START.pt, reference from sft.pt, critic from the reward model.

    The critic starts as the reward model, as in Part I, because its body has learned what makes a
    response good.  Its head has learned to read EOS alone: at other tokens its first values are on
    the scale of raw rewards, so the critic trains alone for ppo.critic_warmup_iters iterations.
    """

    def load(kind, name):
        return run.shard(load_model(run, kind, name))

    has_critic = run.cfg.ppo.advantage == "gae"
    return Models(
        policy=load(LanguageModel, start),
        critic=load(RewardModel, reward_name) if has_critic else None,
        reference=load(LanguageModel, "sft"),
        reward_fn=make_reward_fn(run, reward_name),
        sft=load(LanguageModel, "sft") if run.cfg.ppo.reset_reference else None,
    )


def make_learners(run, models):
    cfg = run.cfg.ppo
    train = run.cfg.train
    policy_optimizer = make_optimizer(models.policy, train.optimizer, cfg.lr, 0.0)
    models.policy.model.gradient_checkpointing = train.gradient_checkpointing
    critic_optimizer = None
    if models.critic is not None:
        critic_optimizer = make_optimizer(models.critic, train.optimizer, cfg.critic_lr, 0.0)
        models.critic.model.gradient_checkpointing = train.gradient_checkpointing
    return Learners(
        models.policy, models.critic, policy_optimizer, critic_optimizer, run.make_scaler()
    )


def check_start(run, metrics, start):
    """The checks of the first step, with what may differ from zero in this run left out."""
    cfg = run.cfg.ppo
    if start != "sft":
        metrics = metrics | {"kl": 0.0}  # a later round does not start from the reference
    # CUDA multiplies float32 matrices in TF32, which rounds to 10 bits of mantissa
    is_exact = run.dtype == torch.float32 and run.device.type == "cpu"
    mismatch = "logprob_mismatch_max" if is_exact else "logprob_mismatch_mean"
    is_sampled_plainly = cfg.top_p == 1.0 and cfg.repetition_penalty == 1.0
    check_first_step(metrics, 1e-4 if is_exact else 0.1, mismatch if is_sampled_plainly else None)


def add_lines(run, state, picked, responses, scores):
    for (prompt, _), response, score in zip(picked, responses, scores):
        text = run.tokenizer.decode([t for t in response if t not in run.tokenizer.end_ids])
        line = {"iteration": state.step, "prompt": prompt, "response": text}
        state.lines.append(line | score)
