"""Monitoring of PPO: warnings of known failures, samples as text, the history of metrics."""
import os

import numpy as np
from tqdm import tqdm

OLD_METRICS = {  # names in the histories of older runs -> names now
    "clip_fraction": "clipfrac",
    "kl_old": "approx_kl",
    "sampled_scored_gap": "logprob_mismatch_max",
    "sampled_scored_mean": "logprob_mismatch_mean",
    "ended": "eos_rate",
    "kl_weight": "kl_coef",
}


def rename_metrics(line):
    """The metrics of one iteration, perhaps under old names -> the same under new names"""
    return {OLD_METRICS.get(name, name): value for name, value in line.items()}


# --------------------------------------------------------------------------------------------------
# Warnings

def collapse_warnings(history, cfg):
    """Known failures of PPO at the end of the history -> {name: one line with the likely cause}

    history: [metrics], one an iteration; cfg: the [ppo] settings
    """
    checks = {
        "kl": kl_warning,
        "length": length_warning,
        "perplexity": perplexity_warning,
        "ratio": ratio_warning,
        "value_loss": value_loss_warning,
    }
    texts = {name: check(history, cfg) for name, check in checks.items()}
    return {name: text for name, text in texts.items() if text}


def last_values(history, name, n):
    """A metric of the last n iterations -> (n,)"""
    return np.array([line[name] for line in history[-n:]], float)


def kl_warning(history, cfg):
    """A negative KL estimate that lasts: the log-probabilities are not of the sampling policy."""
    kl = last_values(history, "kl", 10)
    if len(kl) < 10 or not ((kl < 0).all() and kl.mean() < -0.1):
        return ""
    return (f"KL has been below 0 for 10 iterations ({kl.mean():.2f}): answers are sampled from "
            f"another distribution than their log-probabilities are computed under (temperature, "
            f"truncation, min_new_tokens, dropout), or the reference is not the initial policy")


def length_warning(history, cfg):
    """Answers of maximum length, or without eos"""
    recent = [rename_metrics(line) for line in history[-5:]]
    if len(recent) < 5:
        return ""
    length = last_values(recent, "length", 5).mean()
    eos_rate = last_values(recent, "eos_rate", 5).mean()
    if not (length > 0.95 * cfg.max_new_tokens or eos_rate < 0.05):
        return ""
    return (f"answers run into ppo.max_new_tokens = {cfg.max_new_tokens} (length {length:.0f}, "
            f"{eos_rate:.0%} end with eos): the reward model prefers long answers, or SFT has not "
            f"learned eos; raise ppo.max_new_tokens, or set ppo.missing_eos_penalty")


def perplexity_warning(history, cfg):
    """Mode collapse: the answers' perplexity under the SFT model, in nats, falls to a fifth."""
    if len(history) < 10:
        return ""
    first = mean_nats(history[:5])
    last = mean_nats(history[-5:])
    if not last < 0.2 * first:
        return ""
    return (f"perplexity under SFT has fallen from {np.exp(first):.2f} to {np.exp(last):.2f}: the "
            f"policy repeats the same likely words (Part I: collapse); raise ppo.kl_coef or "
            f"ppo.ptx_coef, lower ppo.lr, and read the samples")


def mean_nats(history):
    """Mean log perplexity under the SFT model, not below 0"""
    return np.log(np.maximum([line["perplexity_sft"] for line in history], 1.0)).mean()


def ratio_warning(history, cfg):
    """A probability ratio before the first step of an update that is not 1"""
    ratio = history[-1]["first_ratio"]
    if abs(ratio - 1) < 0.2:  # False for nan
        return ""
    return (f"before the first step of an update, the ratio of new to old probabilities is "
            f"{ratio:.3g}, not 1: sampling and scoring differ (dropout, temperature, precision, "
            f"another model)")


def value_loss_warning(history, cfg):
    """A critic's loss that is not finite, or ten times its median for three iterations"""
    losses = [line["value_loss"] for line in history]
    before = losses[:-3]
    median = float(np.median(before or [0.0]))
    limit = 10 * max(median, 0.1)
    diverged = len(before) >= 5 and (np.array(losses[-3:], float) > limit).all()
    if np.isfinite(losses[-1]) and not diverged:
        return ""
    return (f"the critic's loss is {losses[-1]:.3g}, after a median of {median:.3g}: lower "
            f"ppo.critic_lr, keep ppo.normalize on, or train the critic first "
            f"(ppo.critic_warmup_iters)")


# --------------------------------------------------------------------------------------------------
# Samples and history

def samples_text(lines, cfg):
    """The first three answers of every cfg.sample_every iterations, as Markdown.

    lines: [{"iteration", "prompt", "response", "reward", "kl"}] of all answers of the iterations
    """
    out = ["# Samples", ""]
    for start in range(0, len(lines), cfg.rollout_batch_size * cfg.sample_every):
        for line in lines[start:start + min(3, cfg.rollout_batch_size)]:
            text = line["prompt"].strip() + " >>>" + line["response"]  # >>>: the answer begins here
            indented = [f"    {part}\n" for part in text.split("\n")]
            measures = f"reward {line['reward']:.3f}, KL {line['kl']:.2f}"
            out += [f"Iteration {line['iteration']}: {measures}", "", "".join(indented)]
    return "\n".join(out)


def save_results(run, name, state):
    """Write samples_NAME.md, watch_NAME.jsonl, a line an iteration, and a picture of it."""
    from runtime import figures

    if run.cfg.ppo.sample_every:
        run.save_text(f"samples_{name}.md", samples_text(state.lines, run.cfg.ppo))
    run.save_jsonl(f"watch_{name}.jsonl", state.history)
    run.draw(f"ppo_{name}", figures.ppo_history, {name: state.history})


def load_histories(run, names):
    """watch_NAME.jsonl of these policies, where there is one -> {NAME: [metrics]}"""
    histories = {}
    for name in names:
        file_name = f"watch_{name}.jsonl"
        if os.path.exists(run.path(file_name)):  # no policy of an older version has one
            lines = run.load_jsonl(file_name)
            histories[name] = [rename_metrics(line) for line in lines]
    return histories


def warned_before(history, cfg):
    """Names of the warnings that earlier iterations of a resumed run have given."""
    names = set()
    for n in range(1, len(history) + 1):
        names |= collapse_warnings(history[:n], cfg).keys()
    return names


def after_iteration(run, name, state, warned, tokens_per_s):
    """Log one PPO iteration, write samples, print warnings that are new.  state: of ppo.State"""
    cfg = run.cfg.ppo
    metrics = state.history[-1]
    is_sampled = bool(cfg.sample_every) and (state.step - 1) % cfg.sample_every == 0
    more = {}
    if is_sampled:
        more["samples"] = state.lines[-cfg.rollout_batch_size:][:3]
    run.log(
        stage=name, step=state.step, steps=cfg.iterations, **metrics,
        tokens_per_s=tokens_per_s, **more,
    )
    if is_sampled:
        method = name.removeprefix("policy_")
        run.save_text(f"samples_{method}.md", samples_text(state.lines, cfg))
    for kind, text in collapse_warnings(state.history, cfg).items():
        if kind not in warned:
            tqdm.write(f"warning: {name}, iteration {state.step}: {text}")
            warned.add(kind)
