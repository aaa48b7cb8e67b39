"""The training loop of every supervised stage: SFT, members, reward models, MetaRM."""
import math
import os
import time
from dataclasses import asdict, replace

import numpy as np
import torch
from tqdm import tqdm

import data
import files
import losses
from config import ConfigError
from contrast import Contrast
from files import Stopped
from model import LanguageModel, RewardModel, init_weights
from plan import dependencies
from run import build, load_model, optimiser_of, save_model

# ---------------------------------------------------------------------------------------------------------------------
# Losses and the loop

def reward_model_from_sft(run, **changes):
    """The SFT model with a fresh reward head; the same head for all members and treatments of a run.  changes: to its Shape"""
    language_model = load_model(run, LanguageModel, "sft")
    model = init_weights(build(run, RewardModel, replace(language_model.shape, **changes)), torch.Generator().manual_seed(run.config.seed))
    model.model.load_state_dict(language_model.model.state_dict())
    return model


def sft_loss(model, rows):
    """-> sum over response tokens of the next-token loss, and nothing more to log"""
    device = model.get_parameter("model.norm.weight").device
    batch = data.collate(rows)
    read, target = (part.to(device, non_blocking=True) for part in data.response_tokens(rows))
    batch = batch.to(device)
    return losses.language_model(model(batch.tokens, read=read, states=batch.states), target).sum(), {}


def pair_loss(model, rows, margin, p, contrast=None):
    """-> sum over pairs of the Bradley-Terry loss, and how many of them the model orders like their labels

    With a contrastive term every pair is there twice, under two dropout masks: the mean of both losses, and the term's mean over its items.
    """
    device, views = model.get_parameter("model.norm.weight").device, 1 if contrast is None else 2
    batch = data.collate(rows).to(device)
    if contrast is not None:
        batch = data.Batch(*(part if part is None else torch.cat((part,) * views) for part in batch))
    rewards, h = model(*batch[:3], read=batch.last, features=True, states=batch.states)  # (views B, 2), (views B, 2, C)
    chosen, rejected = rewards.unbind(1)
    loss = losses.bradley_terry(chosen, rejected, margin.to(device).repeat(views), p.to(device).repeat(views)).sum() / views
    sums = {"accuracy": (chosen > rejected).sum() / views}
    if contrast is not None:
        sums["contrast"] = contrast(h).mean() * len(rows)
        loss = loss + contrast.s.weight * sums["contrast"]
    return loss, sums


def fit(run, unit, model, rows, loss_of, count, s, order, depends=None, watch=None, watches=1, beside=None, look_ahead=None):
    """The training loop of every supervised stage: s.epochs passes over the rows, then NAME.pt.

    loss_of(model, index array) -> sum of the loss, sums to log; count(index) -> what both are divided by
    s: the stage's section (epochs, batch, lr); order: seed of the data's order and of dropout
    depends: what the unit is made from, where the stages do not say (an experiment)
    watch(model) -> a tensor, taken `watches` times an epoch (0: once, at the end) and kept, stacked, in NAME_watched.pt
    beside: a Contrast, trained along with the model and not kept
    look_ahead(model, step, losses, scaler) -> gradients of the parameters, numbers to log: MetaRM's, in place of a plain backward pass
    """
    depends = dependencies(run.config)[unit] if depends is None else depends
    t, lengths, started = run.config.train, [len(r) for r in rows], time.time()
    schedule = [b for epoch in range(s.epochs) for b in data.batches(lengths, s.batch, f"{order} epoch {epoch}")]
    besides = [] if beside is None else list(beside.parameters())
    parameters = [*model.parameters(), *besides]
    optimiser, scaler = optimiser_of(model, t.optimiser, s.lr, t.weight_decay, besides), run.scaler()
    model.model.checkpointing = t.checkpointing
    parts = {"model": model, "optimiser": optimiser, "scaler": scaler} | ({} if beside is None else {"beside": beside})
    step, last, watched = 0, {}, []
    looks = s.epochs * watches or 1
    watch_at = {round(len(schedule) * (i + 1) / looks) for i in range(looks)} if watch else ()
    fingerprint, checkpoint = files.digest(depends), run.path(f"{unit}.ckpt")
    if (state := files.resume(checkpoint, fingerprint, run.device)) is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step, last, watched = state["step"], state["last"], state["watched"]
        tqdm.write(f"{unit}: goes on from step {step} of {len(schedule)}")
    hot = torch.compile(model, dynamic=True) if run.compile else model
    model.train()
    log_every, saved = max(1, len(schedule) // 100), time.time()
    sums, tokens, since = {}, 0, time.time()
    with run.bar(len(schedule), unit, step) as bar:
        while step < len(schedule):
            index = schedule[step]
            torch.manual_seed(int(files.digest(f"{order} {step}"), 16))  # dropout is a function of the step: resuming changes nothing
            lr = s.lr * min((step + 1) / max(1, t.warmup * len(schedule)), 1.0,  # linear up, linear down to 0
                            (len(schedule) - step) / max(1, (1 - t.warmup) * len(schedule)))
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.zero_grad(set_to_none=True)
            total = count(index)

            def pieces():
                for piece in np.array_split(index, min(t.accumulate, len(index))):
                    with run.autocast():
                        loss, extra = loss_of(hot, piece)
                    for name, value in {"loss": loss, **extra}.items():
                        sums[name] = sums.get(name, 0) + value.detach()
                    yield scaler.scale(loss / total)

            if look_ahead is None:
                for loss in pieces():
                    loss.backward()
            else:
                gradients, extra = look_ahead(hot, step, pieces, scaler)
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                for name, value in extra.items():
                    sums[name] = sums.get(name, 0) + value * total
            scaler.unscale_(optimiser)
            norm = torch.nn.utils.clip_grad_norm_(parameters, t.clip)
            scaler.step(optimiser)
            scaler.update()
            step += 1
            sums["count"] = sums.get("count", 0) + total
            tokens += sum(lengths[i] for i in index)
            if step % log_every == 0 or step == len(schedule):
                last = {name: float(value) / sums["count"] for name, value in sums.items() if name != "count"}
                if not math.isfinite(last["loss"]):
                    raise ConfigError(f"{unit}: the loss is {last['loss']} at step {step}; lower its lr, or use dtype=float32")
                speed = tokens / (time.time() - since)
                bar.set_postfix({k: f"{v:.3f}" for k, v in last.items()} | {"tokens/s": f"{speed:,.0f}"}, refresh=False)
                run.log(stage=unit, step=step, steps=len(schedule), **last, lr=lr, grad_norm=float(norm), tokens_per_s=speed)
                sums, tokens, since = {}, 0, time.time()
                if beside is not None and (warning := beside.stuck(last["contrast"])):
                    tqdm.write(f"{unit}: {warning}")
            bar.update()
            if step in watch_at:
                watched.append(watch(model.eval()))
                model.train()
            if files.should_stop() or time.time() - saved > 60 * t.checkpoint_minutes:
                saved = time.time()
                files.save_tensors(checkpoint, {"fingerprint": fingerprint, "step": step, "last": last, "watched": watched,
                                                **{name: part.state_dict() for name, part in parts.items()}})
                if files.should_stop():
                    raise Stopped
    save_model(run, unit, model.eval())
    if watch:
        files.save_tensors(run.path(f"{unit}_watched.pt"), torch.stack(watched))
    done(run, unit, started, last, depends)


def done(run, unit, started, metrics, depends=None):
    depends = dependencies(run.config)[unit] if depends is None else depends
    files.finish(run.config.out_dir, unit, depends, asdict(run.config), time.time() - started, metrics)
    if os.path.exists(run.path(f"{unit}.ckpt")):
        os.remove(run.path(f"{unit}.ckpt"))
    shown = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if isinstance(v, float))
    tqdm.write(f"{unit}: {time.time() - started:.1f} s" + (f", {shown}" if shown else ""))


def fit_reward_model(run, unit, s, swap, p, margin, order, changes={}, contrast=None, start=None, **more):
    """swap, p, margin: the treatment of each training pair; s, order, more: as in fit; changes: to the model's Shape

    contrast: the [contrast] section, if there is to be a term; start: the reward model to go on from, instead of the SFT model
    """
    rows = [r.branches(1, 0) if turn else r for r, turn in zip(run.train[1], swap.tolist())]
    kept = (~p.isnan()).nonzero()[:, 0].numpy()  # a pair without p is left out
    rows, margin, p = [rows[i] for i in kept], margin[kept], p[kept]
    beside = None
    if contrast is not None and contrast.term != "none":
        changes = {"dropout": contrast.dropout, **changes}
        beside = Contrast(contrast, load_model(run, LanguageModel, "sft").shape.width, torch.Generator().manual_seed(run.config.seed),
                          total=2 * s.epochs * len(rows)).to(run.device)
    model = load_model(run, RewardModel, start) if start else reward_model_from_sft(run, **changes)
    fit(run, unit, model, rows, lambda model, index: pair_loss(model, [rows[i] for i in index], margin[index], p[index], beside), len, s, order,
        beside=beside, **more)
