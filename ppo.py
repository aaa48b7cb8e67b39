"""Proximal policy optimisation of a language model against a reward model.  arXiv 1707.06347; Part I, arXiv 2307.04964

    repeat:
        sample an answer to each prompt from the policy
        score = reward model at the answer's last token, normalised by running moments, clipped
        reward_t = -kl (log pi - log ref) at every token, plus the score at the last one
        advantages, returns = GAE(reward, critic)
        for each epoch, each minibatch:  step the policy on the clipped surrogate, the critic on the clipped squared error

The policy starts from the SFT model, which stays as reference; the critic starts from the reward model.  Dropout is off
throughout: two passes over the same tokens must give the same probabilities.  Answers are drawn from softmax(logits /
temperature) without truncation, and scored under that very distribution, so that the ratio is one before the first step.
All that Part I and others add to this is off or on by one line of config.py's [ppo], which names its source.  Only the present
rollout is replayed, for ppo.epochs passes: PPO-max's small buffer is no larger.
Shapes: B answers, T tokens (a row's response tokens come first, padding last).
"""
import os
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import figures
import files
import states
import world
from data import Pair, Row, collate, end_id, read_jsonl, response_tokens
from losses import kl_penalty, language_model, masked_mean, policy_loss, value_loss
from model import LanguageModel, RewardModel, sample
from run import load_model, optimiser_of, policy_prompts, rewards_of, sft_rows

OF_MEMBERS = {  # ppo.reward: what becomes of the members' rewards, (M, B) -> (B,); arXiv 2310.02743
    "mean": lambda rewards, weight: rewards.mean(0),
    "worst": lambda rewards, weight: rewards.amin(0),
    "mean_minus_std": lambda rewards, weight: rewards.mean(0) - weight * rewards.std(0, correction=0),  # strength's std
}


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation.  arXiv 1506.02438, eq. 16

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   return_t = A_t + V_t

    rewards, values, mask: (B, T); mask is 1 on response tokens; others are skipped, and after the last one the value is 0
    -> advantages, returns, each (B, T), 0 outside the mask, whatever stands there (even NaN)
    """
    mask = mask.bool()
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    next_value, next_advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        here = mask[:, t]
        advantages[:, t] = advantage.masked_fill(~here, 0.0)
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


@dataclass
class Moments:
    """Mean and variance of everything seen so far (Chan's parallel update), population form."""
    count: float = 0.0
    mean: float = 0.0
    square: float = 0.0   # sum of squared deviations

    def add(self, x):
        n, mean = len(x), float(x.mean())
        delta, total = mean - self.mean, self.count + n
        self.square += float(((x - mean) ** 2).sum()) + delta ** 2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self):
        return max((self.square / self.count) ** 0.5, 1e-8) if self.count else 1.0


def whiten(x, mask):
    """To mean 0 and std 1 over the entries where mask is set; 0 elsewhere, whatever stands there.  (B, T), (B, T) -> (B, T)"""
    x = x - masked_mean(x, mask)
    return (x / (masked_mean(x ** 2, mask) + 1e-8).sqrt()).masked_fill(~mask.bool(), 0.0)


def steered(kl, measured, target):
    """The next weight of the KL penalty.  arXiv 1909.08593, sec. 2.2

        kl (1 + 0.1 e),  e = (measured - target) / target, clipped to [-0.2, 0.2]

    measured, target: nats an answer
    """
    return kl * (1 + 0.1 * min(max((measured - target) / target, -0.2), 0.2))


def schedule(iteration, s):
    """Factor on the learning rates: linear down to 0; linear up where the run, and where the policy, sets out."""
    since = iteration - s.critic_pretrain if iteration >= s.critic_pretrain else iteration
    return min((since + 1) / max(1, s.warmup * s.iterations), 1.0) * (1 - iteration / s.iterations)


def token_logprob(logits, target, temperature, end=None, min_new=0):
    """Log-probability of each target under softmax(logits / temperature); 0 where target is -1.  (B, T, V), (B, T) -> (B, T)

    The first min_new columns are the tokens that could not be `end`.
    """
    if min_new:
        logits = logits.clone()
        logits[:, :min_new, end] = -torch.inf
    logp = (logits.float() / temperature).log_softmax(-1)
    return logp.gather(-1, target.clamp(min=0)[..., None])[..., 0].masked_fill(target < 0, 0.0)


def shape_rewards(score, logprob, ref_logprob, mask, kl, kind):
    """Per-token rewards: the KL penalty everywhere, the score on the last token.  (B,), (B, T) x 3 -> (B, T)"""
    mask = mask.bool()
    rewards = (-kl * kl_penalty(logprob, ref_logprob, kind)).masked_fill(~mask, 0.0)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(score), device=score.device), last] += score
    return rewards


class Rollout(NamedTuple):
    tokens: torch.Tensor       # (B, N) prompt and answer, -1 in the padding
    read: torch.Tensor         # (B, T) index before each response token: the state in which it was chosen
    target: torch.Tensor       # (B, T) the response tokens, -1 in the padding
    logprob: torch.Tensor      # (B, T) under the policy that sampled
    value: torch.Tensor        # (B, T)
    advantage: torch.Tensor    # (B, T)
    returns: torch.Tensor      # (B, T)
    states: torch.Tensor = None  # (B, N, C) what the frozen layers, which all four models share, make of the tokens


@torch.no_grad()
def rollout(policy, reference, critic, score_rows, prompts, end, moments, generator, s, autocast, with_states=lambda rows: rows, sft=None):
    """Sample one answer to each prompt and prepare the update.

    score_rows: function of [Row] -> (B,) rewards on the policy's device, each response ending with `end`
    prompts: B lists of token ids; s: the [ppo] settings; moments: of the rewards so far, updated here
    with_states: function of [Row], which adds what the frozen layers make of them, if there are any
    sft: the SFT model, where it is no longer the reference; perplexity is measured under it
    -> Rollout, metrics (averages over answers; "kl" is nats an answer), responses as lists of token ids, their reward and KL
    """
    with autocast:
        drawn = sample(policy, prompts, s.max_new, end, generator, s.temperature, min_new=s.min_new)
    lengths = (drawn.tokens >= 0).sum(1).tolist()
    responses = [row[:n] for row, n in zip(drawn.tokens.tolist(), lengths)]
    closed = with_states([Row(np.asarray(p), (np.asarray(r if r[-1] == end else [*r, end]),)) for p, r in zip(prompts, responses)])
    rows = [Row(c.prompt, (c.responses[0][:n],), c.states and (c.states[0], c.states[1][:n])) for c, n in zip(closed, lengths)]
    score = score_rows(closed)  # (B,)
    moments.add(score.double())
    normalised = ((score - moments.mean) / moments.std).clamp(-s.reward_clip, s.reward_clip) if s.normalise else score
    if s.no_end_penalty:
        normalised = normalised - s.no_end_penalty * (~drawn.ended).to(normalised)

    batch = collate(rows).to(score.device)
    tokens, position, below = batch.tokens, batch.position, batch.states
    read, target = (part.to(score.device) for part in response_tokens(rows))
    mask = target >= 0
    with autocast:
        logprob, ref_logprob = (token_logprob(m(tokens, read=read, states=below), target, s.temperature, end, s.min_new) for m in (policy, reference))
        sft_logprob = ref_logprob if sft is None else token_logprob(sft(tokens, read=read, states=below), target, s.temperature, end, s.min_new)
        value = critic(tokens, None, position, read, states=below).masked_fill(~mask, 0.0)
    gap = (drawn.logprob[:, :target.shape[1]] - logprob).abs()
    rewards = shape_rewards(normalised, logprob, ref_logprob, mask, s.kl, s.kl_kind)
    advantage, returns = gae(rewards, value, mask, s.gamma, s.lam)
    variance = returns[mask].var(correction=0)
    if s.whiten:
        advantage = whiten(advantage, mask)
    metrics = {
        "reward": float(score.mean()), "reward_normalised": float(normalised.mean()),
        "kl": float(kl_penalty(logprob, ref_logprob, "k1").sum(1).mean()),
        "perplexity_sft": float(masked_mean(-sft_logprob, mask).exp()),
        "length": sum(lengths) / len(lengths), "ended": float(drawn.ended.float().mean()),
        "explained_variance": float(1 - (returns - value)[mask].var(correction=0) / variance.clamp(min=1e-8)),
        "sampled_scored_gap": float(gap.max()), "sampled_scored_mean": float(masked_mean(gap, mask)),
    }
    scores = [dict(reward=r, kl=k) for r, k in zip(score.tolist(), (logprob - ref_logprob).sum(1).tolist())]
    return Rollout(tokens, read, target, logprob, value, advantage, returns, below), metrics, responses, scores


def check_first_step(metrics, ratio, tolerance, gap="sampled_scored_gap"):
    """What must hold before the policy has moved; a bug in sampling, scoring or masks shows here.  Raises RuntimeError.

    gap: the measure of what sampling and scoring differ by, the largest difference of a token; in half precision "sampled_scored_mean",
    since through 30 layers one token of 1,500 was off by 0.23 nats in bf16 where nothing was wrong
    """
    facts = (("the ratio of new to old probabilities differs from 1", abs(ratio - 1)),
             ("the KL to the SFT model, in nats an answer, is not 0", abs(metrics["kl"])),
             ("log-probabilities differ between sampling and scoring", metrics[gap]))
    for what, by in facts:
        if not by <= tolerance:
            raise RuntimeError(f"PPO's first step: {what} (by {by:.2g}, allowed {tolerance:.2g}); sampling and scoring "
                               f"must use one model, one temperature and no dropout")


def update(policy, critic, optimisers, factor, data, end, s, clip_norm, generator, autocast, scaler, shown=(), moves=True):
    """Epochs of minibatch steps on one rollout -> metrics; "first_ratio" is the ratio farthest from 1 before the first step

    optimisers: of policy and critic; factor: on both learning rates; shown: SFT rows, for s.ptx; moves: False if only the critic does
    """
    for optimiser, lr in zip(optimisers, (s.lr, s.critic_lr)):
        for group in optimiser.param_groups:
            group["lr"] = lr * factor
    B, seen, first_ratio = len(data.tokens), {}, None
    for _ in range(s.epochs):
        for index in torch.randperm(B, generator=generator).tensor_split(s.minibatches):
            part = Rollout(*(x if x is None else x[index.to(x.device)] for x in data))
            mask = part.target >= 0
            part = part._replace(**{name: getattr(part, name).masked_fill(~mask, 0.0) for name in ("logprob", "value", "advantage", "returns")})
            position = torch.arange(part.tokens.shape[1], device=mask.device).expand_as(part.tokens)
            with autocast:
                logprob = token_logprob(policy(part.tokens, read=part.read, states=part.states), part.target, s.temperature, end, s.min_new)
                value = critic(part.tokens, None, position, part.read, states=part.states).masked_fill(~mask, 0.0)
            policy_term = masked_mean(policy_loss(logprob, part.logprob, part.advantage, s.clip), mask)
            value_term = masked_mean(value_loss(value, part.value, part.returns, s.value_clip), mask)
            with torch.no_grad():
                difference = logprob - part.logprob  # 0 in the padding
                ratio = difference.exp()
                if first_ratio is None:
                    first_ratio = float(ratio.flatten()[(ratio - 1).abs().argmax()])
                now = {"policy_loss": policy_term.detach(), "value_loss": value_term.detach(),
                       "clip_fraction": masked_mean(((ratio - 1).abs() > s.clip).float(), mask),
                       "kl_old": masked_mean(torch.expm1(difference) - difference, mask)}
            moves = moves and not (s.stop_kl and float(now["kl_old"]) > s.stop_kl)  # the critic goes on, as in Spinning Up
            now["policy_steps"], loss = float(moves), policy_term
            if s.ptx and moves:
                drawn = [shown[i] for i in torch.randint(len(shown), (len(index),), generator=generator).tolist()]
                batch, (read, target) = collate(drawn).to(mask.device), (x.to(mask.device) for x in response_tokens(drawn))
                with autocast:
                    nll = language_model(policy(batch.tokens, read=read, states=batch.states), target)
                ptx_term = masked_mean(nll, target >= 0)
                now["ptx_loss"], loss = ptx_term.detach(), policy_term + s.ptx * ptx_term
            for model, optimiser, loss in ((policy, optimisers[0], loss), (critic, optimisers[1], value_term))[0 if moves else 1:]:
                optimiser.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimiser)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
                scaler.step(optimiser)
            scaler.update()
            for name, x in now.items():
                seen.setdefault(name, []).append(float(x))
    return {name: sum(x) / len(x) for name, x in seen.items()} | {"first_ratio": first_ratio}  # over the steps that have it


def reward_source(run, s, reward_name):
    """-> function of [Row], each response ending with end-of-text, that scores them: (B,) on the run's device

    A member's reward has no zero, as only differences are trained, so that each is counted from its mean on the first training
    answers: else the worst member would be the one whose zero is lowest.
    """
    if s.reward == "verifier":
        text = lambda tokens: run.encoding.decode(tokens.tolist())
        right = lambda row: world.right(text(row.prompt), text(row.responses[0][:-1])) == 1
        return lambda rows: torch.tensor([float(right(row)) for row in rows], device=run.device)
    ensemble = s.reward in OF_MEMBERS
    names = [f"member_{m:02d}" for m in range(run.config.ensemble.members)] if ensemble else [reward_name]
    models = [load_model(run, RewardModel, name) for name in names]
    zeros = [float(rewards_of(run, model, run.train[1][:500]).mean()) if ensemble else 0.0 for model in models]

    @torch.no_grad()
    def score(rows):
        batch = collate(rows).to(run.device)
        with run.autocast():
            rewards = torch.stack([model(*batch[:3], read=batch.last, states=batch.states)[:, 0] - zero for model, zero in zip(models, zeros)])  # (M, B)
        return OF_MEMBERS[s.reward](rewards, s.std_weight) if ensemble else rewards[0]
    return score


def asked(run, s):
    """The pairs whose prompts a policy is asked: the training pairs, or new ones of s.domains."""
    if not s.domains:
        return run.train[0]
    return [Pair(d["prompt"], "", "") for d in world.demonstrations(run.config.world.pairs, f"{run.config.seed} asked", domains=s.domains)]


def warnings_of(history, s):
    """Known failures of PPO -> {name: one line with the likely cause}, of those that show at the end of the history

    history: [metrics], one an iteration; s: the [ppo] settings
    """
    last = lambda name, n: np.array([h[name] for h in history[-n:]], float)
    mean = lambda name, n: float(last(name, n).mean())
    out = {}
    if len(history) >= 10 and (last("kl", 10) < 0).all() and mean("kl", 10) < -0.1:
        out["kl"] = (f"KL has been below 0 for 10 iterations ({mean('kl', 10):.2f}): answers are drawn from another distribution than they are "
                     f"scored under (temperature, truncation, min_new, dropout), or the reference is not what the policy began as")
    if len(history) >= 5 and (mean("length", 5) > 0.95 * s.max_new or mean("ended", 5) < 0.05):
        out["length"] = (f"answers run into ppo.max_new = {s.max_new} (length {mean('length', 5):.0f}, {mean('ended', 5):.0%} end by themselves): the reward "
                         f"model likes length, or SFT has taught no end; raise ppo.max_new, or set ppo.no_end_penalty")
    nats = np.log(np.maximum([h["perplexity_sft"] for h in history], 1.0))
    if len(history) >= 10 and nats[-5:].mean() < 0.2 * nats[:5].mean():
        out["perplexity"] = (f"perplexity under SFT has fallen from {np.exp(nats[:5].mean()):.2f} to {np.exp(nats[-5:].mean()):.2f}: the policy says the same "
                             f"likely words over and over (Part I: collapse); raise ppo.kl or ppo.ptx, lower ppo.lr, and read the samples")
    if not abs(history[-1]["first_ratio"] - 1) < 0.2:
        out["ratio"] = (f"before the first step of an update, the ratio of new to old probabilities is {history[-1]['first_ratio']:.3g}, not 1: sampling "
                        f"and scoring differ (dropout, temperature, precision, another model)")
    before = [h["value_loss"] for h in history[:-3]]
    if not np.isfinite(history[-1]["value_loss"]) or len(before) >= 5 and (last("value_loss", 3) > 10 * max(float(np.median(before)), 0.1)).all():
        out["value_loss"] = (f"the critic's loss is {history[-1]['value_loss']:.3g}, of {np.median(before or [0.0]):.3g} before: lower ppo.critic_lr, keep "
                             f"ppo.normalise on, or let the critic learn first (ppo.critic_pretrain)")
    return out


def samples_text(lines, s):
    """The first three answers of every s.show iterations as Markdown.  lines: as of train_policy, those of whole iterations"""
    out = ["# Samples", ""]
    for start in range(0, len(lines), s.episodes * s.show):
        for line in lines[start:start + min(3, s.episodes)]:
            shown = "".join(f"    {part}\n" for part in (line["prompt"].strip() + " >>>" + line["response"]).split("\n"))  # what follows >>> is the policy's
            out += [f"Iteration {line['iteration']}: reward {line['reward']:.3f}, KL {line['kl']:.2f}", "", shown]
    return "\n".join(out)


def watch(run, name, history):
    """watch_NAME.jsonl, a line an iteration, and the picture of all policies of the folder that have one"""
    files.save_jsonl(run.path(f"watch_{name}.jsonl"), history)
    names = [f[len("watch_"):-len(".jsonl")] for f in sorted(os.listdir(run.config.out_dir)) if f.startswith("watch_") and f.endswith(".jsonl")]
    figures.ppo_watch({n: [line for _, line in read_jsonl(run.path(f"watch_{n}.jsonl"))] for n in names}, run.path("figures/ppo_watch.png"))


def train_policy(run, unit, reward_name, fingerprint, should_stop, start="sft", pairs=None, s=None):
    """The loop of this file's docstring, from the policy START.pt and the reward model NAME.pt; sft.pt is the reference.

    pairs: those whose prompts are asked, the training pairs unless given; s: [ppo] settings, the run's own unless given
    -> policy, metrics of the last iteration, [{"iteration", "prompt", "response", "reward", "kl"}] of all answers sampled
    """
    c, s = run.config, s or run.config.ppo
    policy, reference = (load_model(run, LanguageModel, name) for name in (start, "sft"))
    score_rows, critic = reward_source(run, s, reward_name), load_model(run, RewardModel, reward_name)
    prompts, end = policy_prompts(run, asked(run, s) if pairs is None else pairs, s.max_new), end_id(run.encoding)
    sft = load_model(run, LanguageModel, "sft") if s.reset_reference else None
    optimisers, scaler = tuple(optimiser_of(model, c.train.optimiser, lr, 0.0) for model, lr in ((policy, s.lr), (critic, s.critic_lr))), run.scaler()
    for model in (policy, critic):
        model.model.checkpointing = c.train.checkpointing
    moments, lines, iteration, history, kl = Moments(), [], 0, [], s.kl
    shown = sft_rows(run) if s.ptx else ()
    parts = {"policy": policy, "critic": critic, "policy_optimiser": optimisers[0], "critic_optimiser": optimisers[1], "scaler": scaler,
             **({"reference": reference} if s.reset_reference else {})}
    checkpoint, saved = run.path(f"{unit}.ckpt"), time.time()
    if (state := files.resume(checkpoint, fingerprint, run.device)) is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        moments, (lines, iteration, history, kl) = Moments(*state["moments"]), (state[k] for k in ("lines", "iteration", "history", "kl"))
        print(f"{unit}: goes on from iteration {iteration} of {s.iterations}")
    warned = {name for i in range(len(history)) for name in warnings_of(history[:i + 1], s)}

    with run.bar(s.iterations, unit, iteration) as bar:
        while iteration < s.iterations:
            begun, generator = time.time(), torch.Generator().manual_seed(int(files.digest(f"{c.seed} {unit} {iteration}"), 16))
            picked = [prompts[i] for i in torch.randint(len(prompts), (s.episodes,), generator=generator).tolist()]
            if s.reset_reference and iteration and iteration % s.reset_reference == 0:
                reference.load_state_dict(policy.state_dict())
            batch, rolled, responses, scores = rollout(policy, reference, critic, score_rows, [ids for _, ids in picked], end,
                                                       moments, generator, replace(s, kl=kl), run.autocast(), lambda rows: states.compute(run, rows), sft)
            moves = iteration >= s.critic_pretrain
            updated = update(policy, critic, optimisers, schedule(iteration, s), batch, end, s, c.train.clip, generator, run.autocast(), scaler,
                             shown, moves)
            if iteration == 0:
                check_first_step(rolled if start == "sft" else rolled | {"kl": 0.0}, updated["first_ratio"],
                                 *((1e-4,) if run.dtype == torch.float32 else (0.1, "sampled_scored_mean")))
            metrics = rolled | updated | {"kl_weight": kl}
            if s.kl_target and moves:
                kl = steered(kl, metrics["kl"], s.kl_target)
            lines += [{"iteration": iteration, "prompt": text, "response": run.encoding.decode([t for t in response if t != end]), **score}
                      for (text, _), response, score in zip(picked, responses, scores)]
            history.append(metrics)
            showing = s.show and iteration % s.show == 0
            samples = {"samples": lines[-s.episodes:][:3]} if showing else {}
            iteration += 1
            run.log(stage=unit, step=iteration, steps=s.iterations, **metrics, tokens_per_s=metrics["length"] * s.episodes / (time.time() - begun), **samples)
            if showing:
                files.save_text(run.path(f"samples_{unit.removeprefix('policy_')}.md"), samples_text(lines, s))
            for name, text in warnings_of(history, s).items():
                if name not in warned:
                    tqdm.write(f"warning: {unit}, iteration {iteration}: {text}")
                    warned.add(name)
            bar.set_postfix(reward=f"{metrics['reward']:.2f}", kl=f"{metrics['kl']:.2f}", length=f"{metrics['length']:.0f}", refresh=False)
            bar.update()
            if should_stop() or time.time() - saved > 60 * c.train.checkpoint_minutes:
                saved = time.time()
                files.save_tensors(checkpoint, {"fingerprint": fingerprint, "iteration": iteration, "history": history, "lines": lines, "kl": kl,
                                                "moments": [moments.count, moments.mean, moments.square],
                                                **{name: part.state_dict() for name, part in parts.items()}})
                if should_stop():
                    raise files.Stopped
    watch(run, unit.removeprefix("policy_"), history)
    return policy, history[-1], lines
