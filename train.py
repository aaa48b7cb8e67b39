"""python train.py --config=configs/tiny.toml [--stage=NAME] [--section.key=value ...]

The stages, in order; each reads the files of the last and can be run alone:

    sft        a language model on demonstrations, or on the chosen answers      -> encoding.json, sft.pt
    ensemble   M reward models that differ by the order of the data alone        -> member_00.pt, ...
    strength   their vote on every label                                         -> strength.jsonl, cleaned.jsonl, gaps.pt
    reward     a reward model for each treatment of the labels                   -> reward_baseline.pt, ...
    ppo        a policy for each of these reward models                          -> policy_baseline.pt, rollouts_baseline.jsonl
    meta       in turns with ppo, meta.rounds times: samples, MetaRM on them     -> meta_1.pt, samples_meta_1.jsonl, policy_meta_1.pt
    evaluate   everything that can be said about them                            -> results.json, figures/

What is up to date is skipped; after Ctrl-C the same command goes on from where it stopped.
"""
import functools
import itertools
import json
import math
import os
import signal
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing import get_context

import numpy as np
import torch
from tqdm import tqdm

import config as configuration
import data
import evaluate as evaluation
import files
import losses
import metarm
import ppo
import world
from config import ConfigError
from contrast import Contrast
from data import DataError
from files import Stopped
from model import LanguageModel, RewardModel, Shape, init_weights
from run import adamw, gaps_of, load_model, open_run, save_model, sft_rows
from strength import NEEDS, VERDICTS, groups, strength, treat, verdicts

STAGES = ("sft", "ensemble", "strength", "reward", "meta", "ppo", "evaluate")

stop_asked = False           # set by Ctrl-C; looked at between two steps
stop_everywhere = None       # the same for the processes that train members, an Event


def ask_to_stop(*_):
    global stop_asked
    if stop_asked:
        raise KeyboardInterrupt
    stop_asked = True
    if stop_everywhere is not None:
        stop_everywhere.set()
    print("\nstopping after this step (once more: at once)", file=sys.stderr)


def should_stop():
    return stop_asked or stop_everywhere is not None and stop_everywhere.is_set()


# ---------------------------------------------------------------------------------------------------------------------
# What is to be done, and what each piece depends on

def units(config):
    """unit -> (stage, settings it depends on, units it reads)"""
    training = ("train.warmup", "train.weight_decay", "train.clip", "train.accumulate")
    members = [f"member_{m:02d}" for m in range(config.ensemble.members)]
    of_world = lambda *names: tuple(f"world.{k}" for k in names) if config.data.train == ("world",) else ()
    out = {
        "tokenizer": ("sft", ("seed", "data.train", "data.valid", "data.valid_share", "data.limit", "model.vocab",
                              *of_world("pairs", "items", "temperature", "flip", "bias", "shared")), []),
        "audit": ("sft", ("model.context", *of_world("valid")), ["tokenizer"]),
        "sft": ("sft", ("dtype", *(f"model.{k}" for k in asdict(config.model)), "sft.epochs", "sft.batch", "sft.lr",
                        *of_world("demonstrations", "p_right"), *(("ppo.domains",) if config.ppo.domains else ()), *training), ["tokenizer"])}
    for m in members:
        out[m] = ("ensemble", ("ensemble.epochs", "ensemble.batch", "ensemble.lr", "ensemble.folds", *training), ["sft"])
    out["strength"] = ("strength", (*(("ensemble.vote",) if config.ensemble.folds else ()), "strength.method", *(f"strength.{s}" for s in NEEDS[config.strength.method]), "evaluate.groups", *of_world("valid")), members)
    contrast = [f"contrast.{k}" for k in asdict(config.contrast)] if config.contrast.term != "none" else []
    for method in config.reward.methods:
        out[f"reward_{method}"] = ("reward", ("reward.epochs", "reward.batch", "reward.lr", *contrast, *training, *(f"strength.{s}" for s in NEEDS[method])),
                                   ["sft"] if method == "baseline" else ["sft", *members])
    ppo_keys = (*(f"ppo.{k}" for k in asdict(config.ppo) if k not in ("methods", "show")), "train.clip")
    judges = members if config.ppo.reward in ppo.OF_MEMBERS else []
    for method in config.ppo.methods:
        out[f"policy_{method}"] = ("ppo", ppo_keys, ["sft", f"reward_{method}", *judges])
    of_ood = (*of_world("ood"), "data.ood") if config.meta.domain == "ood" else ()
    for r in metarm.rounds(config):
        if r.reward != r.start:
            here = [f"meta.{k}" for k in asdict(config.meta) if k not in ("rounds", "arms", "method")] if r.arm == "meta" else ["meta.epochs", "meta.batch", "meta.lr"]
            sampling = ["ppo.max_new", *of_ood] if r.arm == "meta" else []
            treated = [] if config.meta.method == "baseline" else members
            out[r.reward] = ("meta", (*here, *sampling, *training, *(f"strength.{s}" for s in NEEDS[config.meta.method])),
                             ["sft", r.start, *([r.latest] if r.arm == "meta" else []), *treated])
        out[r.policy] = ("ppo", (*ppo_keys, "meta.domain", *of_ood), list(dict.fromkeys(["sft", r.reward, r.latest, *judges])))
    out["evaluate"] = ("evaluate", ("data.ood", "ppo.methods", "reward.methods", "strength.q", *of_world("ood"), *(f"evaluate.{k}" for k in asdict(config.evaluate))),
                       [u for u in out if u not in ("tokenizer", "audit")])
    return out


def setting(config, key):
    section, _, name = key.rpartition(".")
    value = getattr(getattr(config, section) if section else config, name)
    return list(value) if isinstance(value, tuple) else value


def dependencies(config):
    """unit -> {what it depends on: its present value}, fit to be hashed and to be shown"""
    out = {}
    for unit, (_, keys, inputs) in units(config).items():
        depends = {key: setting(config, key) for key in keys} | {"format": files.FORMAT}
        group = {"tokenizer": "train", "audit": "valid", "strength": "valid", "evaluate": "ood"}.get(unit)
        for path in getattr(config.data, group) if group else ():
            if os.path.isfile(path):
                depends[f"contents of {path}"] = files.file_digest(path)
        out[unit] = depends | {f"input {u}": files.digest(out[u]) for u in inputs}
    return out


def outputs(run, unit):
    """The files whose presence shows that a unit is done."""
    names = {"tokenizer": ["encoding.json"], "audit": ["audit.json"], "strength": ["strength.jsonl", "cleaned.jsonl", "gaps.pt"],
             "evaluate": ["results.json"]}
    if unit.startswith("policy_"):
        names[unit] = [f"{unit}.pt", unit.replace("policy_", "rollouts_") + ".jsonl"]
    if unit.startswith("meta_"):
        names[unit] = [f"{unit}.pt", f"samples_{unit}.jsonl"]
    return [run.path(name) for name in names.get(unit, [f"{unit}.pt"])]


# ---------------------------------------------------------------------------------------------------------------------
# Models and the loop

def reward_model_from_sft(run, **changes):
    """The SFT model with a fresh reward head; the same head for all members and treatments of a run.  changes: to its Shape"""
    language_model = load_model(run, LanguageModel, "sft")
    model = init_weights(RewardModel(replace(language_model.shape, **changes)), torch.Generator().manual_seed(run.config.seed))
    model.model.load_state_dict(language_model.model.state_dict())
    return model.to(run.device)


def sft_loss(model, rows):
    """-> sum over response tokens of the next-token loss, and nothing more to log"""
    device = model.get_parameter("model.norm.weight").device
    batch = data.collate(rows)
    read, target = (part.to(device, non_blocking=True) for part in data.response_tokens(rows))
    return losses.language_model(model(batch.tokens.to(device, non_blocking=True), read=read), target).sum(), {}


def pair_loss(model, rows, margin, p, contrast=None):
    """-> sum over pairs of the Bradley-Terry loss, and how many of them the model orders like their labels

    With a contrastive term every pair is there twice, under two dropout masks: the mean of both losses, and the term's mean over its items.
    """
    device, views = model.get_parameter("model.norm.weight").device, 1 if contrast is None else 2
    batch = data.collate(rows).to(device)
    batch = data.Batch(*(part.repeat(views, 1) for part in batch))
    rewards, h = model(*batch[:3], read=batch.last, features=True)  # (views B, 2), (views B, 2, C)
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
    optimiser, scaler = adamw(model, s.lr, t.weight_decay, besides), run.scaler()
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
            if should_stop() or time.time() - saved > 60 * t.checkpoint_minutes:
                saved = time.time()
                files.save_tensors(checkpoint, {"fingerprint": fingerprint, "step": step, "last": last, "watched": watched,
                                                **{name: part.state_dict() for name, part in parts.items()}})
                if should_stop():
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


# ---------------------------------------------------------------------------------------------------------------------
# The stages

def make_tokenizer(run, unit):
    started, pairs = time.time(), run.pairs["train"]
    texts = (text for p in pairs for text in (p.prompt, *sorted((p.chosen, p.rejected))))  # whatever the labels say
    encoding = data.train_tokenizer(texts, run.config.model.vocab)
    files.save_text(run.path("encoding.json"), data.encoding_to_json(encoding))
    run.__dict__.pop("encoding", None)
    done(run, unit, started, {"tokens": encoding.n_vocab})


def make_audit(run, unit):
    started, context = time.time(), run.config.model.context
    sets = {name: pairs for name, pairs in run.pairs.items() if pairs}
    audit = {"sets": {name: data.audit(pairs, run.encoding, (context,)) for name, pairs in sets.items()}, "shared": data.shared(sets)}
    files.save_json(run.path("audit.json"), audit)
    done(run, unit, started, {})
    if run.slot == 0:
        print(data.audit_table(*audit.values()))


def make_sft(run, unit):
    c = run.config
    m = c.model
    hidden = m.hidden or (8 * m.width // 3 + 7) // 8 * 8
    shape = Shape(run.encoding.n_vocab, m.layers, m.heads, m.kv_heads, m.width, hidden, m.context, m.dropout, m.tied)
    model = init_weights(LanguageModel(shape), torch.Generator().manual_seed(c.seed)).to(run.device)
    rows = sft_rows(run)
    fit(run, unit, model, rows, lambda model, index: sft_loss(model, [rows[i] for i in index]),
        lambda index: sum(len(rows[i].responses[0]) for i in index), c.sft, f"{c.seed} {unit}")


def fit_reward_model(run, unit, s, swap, p, margin, order, changes={}, contrast=None, start=None, **more):
    """swap, p, margin: the treatment of each training pair; s, order, more: as in fit; changes: to the model's Shape

    contrast: the [contrast] section, if there is to be a term; start: the reward model to go on from, instead of the SFT model
    """
    rows = [data.Row(r.prompt, r.responses[::-1]) if turn else r for r, turn in zip(run.train[1], swap.tolist())]
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


def make_member(run, unit):
    """Members differ by the order of the data alone: the seed of the order holds the unit's name."""
    swap, p, margin = treat(torch.zeros(len(run.train[1])), "baseline")
    if k := run.config.ensemble.folds:
        p[torch.from_numpy(data.folds(run.train[0], k, run.config.seed)) == member_number(unit) % k] = torch.nan
    fit_reward_model(run, unit, run.config.ensemble, swap, p, margin, f"{run.config.seed} {unit}")


def member_number(unit):
    return int(unit.removeprefix("member_"))


@functools.cache
def run_of_this_process(config, slot):
    return open_run(config, slot)


def prepare_worker(event):
    global stop_everywhere
    stop_everywhere = event
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent passes it on, through the event


def make_here(config, stage, unit, slot, threads):
    """In a process of its own -> False if it was stopped"""
    run = run_of_this_process(config, slot)
    torch.set_num_threads(threads)  # of config.threads, this process has only its share
    try:
        MAKE_STAGE[stage](run, unit)
    except Stopped:
        return False
    return True


def side_by_side(work, jobs, workers):
    """work(*job) for every job, in processes of their own -> results, in order.  Raises Stopped if one of them is False"""
    global stop_everywhere
    context = get_context("spawn")
    stop_everywhere = context.Event()
    try:
        with ProcessPoolExecutor(workers, context, prepare_worker, (stop_everywhere,)) as pool:
            results = [job.result() for job in [pool.submit(work, *job) for job in jobs]]
    except BrokenProcessPool:
        raise OSError("a process was ended from outside, perhaps for lack of memory; try --train.workers=1") from None
    finally:
        stop_everywhere = None
    if any(result is False for result in results):
        raise Stopped
    return results


def make_side_by_side(run, stage, todo):
    """Small models leave most of a CPU idle: several reward models are trained at once, in processes of fewer threads."""
    cores = torch.get_num_threads()
    workers = run.config.train.workers or (cores if run.device.type == "cpu" and not run.compile else 1)
    workers = min(workers, len(todo))
    if workers == 1:
        for unit in todo:
            MAKE_STAGE[stage](run, unit)
        return
    side_by_side(make_here, [(run.config, stage, unit, 1 + i % workers, max(1, cores // workers)) for i, unit in enumerate(todo)], workers)


def unseen(gaps, fold, k):
    """The gaps of each pair by the members that have not been trained on it.  (M, N), fold (N,) -> (M / K, N)"""
    return gaps.view(len(gaps) // k, k, -1)[:, fold, torch.arange(gaps.shape[1])]  # member m leaves out fold m mod K


def make_strength(run, unit):
    started, c = time.time(), run.config
    members = [f"member_{m:02d}" for m in range(c.ensemble.members)]
    pairs, rows = run.train
    gaps = {name: torch.stack([gaps_of(run, m, part) for m in members]) for name, part in (("train", rows), ("valid", run.valid[1]))}  # (M, N)
    if k := c.ensemble.folds:
        gaps["unseen"] = unseen(gaps["train"], torch.from_numpy(data.folds(pairs, k, c.seed)), k)
        gaps["train"] = gaps[{"unseen": "unseen", "all": "train"}[c.ensemble.vote]]
    mean, std = strength(gaps["train"])
    method = c.strength.method
    swap, p, margin = treatment(run, method, mean)
    columns = [x.tolist() for x in (mean, std, groups(mean, c.evaluate.groups), swap, p, margin)]
    files.save_tensors(run.path("gaps.pt"), gaps)
    files.save_jsonl(run.path("strength.jsonl"), (
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "mean": m, "std": s, "group": g, "method": method,
         "swap": w, "p": t, "margin": a, **({} if pair.margin is None else {"given_margin": pair.margin}), "source": pair.source}
        for pair, m, s, g, w, t, a in zip(pairs, *columns)))  # p of a dropped pair: null
    files.save_jsonl(run.path("cleaned.jsonl"), (  # what TRL's RewardTrainer reads; it knows margins, but no p
        {"prompt": pair.prompt, "chosen": pair.rejected if w else pair.chosen, "rejected": pair.chosen if w else pair.rejected, "margin": a}
        for pair, m, s, g, w, t, a in zip(pairs, *columns) if t == t))
    done(run, unit, started, {"doubted": float((mean < 0).float().mean()), "mean": float(mean.mean()), "std": float(std.mean())})
    if run.slot == 0:
        print_suspects(pairs, mean, std, c.strength.show)


def print_suspects(pairs, mean, std, n):
    counts = verdicts(mean, std).bincount(minlength=len(VERDICTS)).tolist()
    print("strength: of {:,} labels {} (a mean below, within, above one std of the vote from zero)".format(
        len(pairs), ", ".join(f"{count:,} are {name}" for name, count in zip(VERDICTS, counts))))
    short = lambda text, width: textwrap.shorten(text.rsplit("\n\nHuman:", 1)[-1].removesuffix("\n\nAssistant:"), width, placeholder=" …")
    for rank, i in enumerate(mean.argsort(stable=True)[:n].tolist(), 1):
        pair = pairs[i]
        print(f"{rank:4}. {pair.source}: mean {mean[i]:+.2f}, std {std[i]:.2f}, on: {short(pair.prompt, 90)}")
        print(f"        chosen:   {short(pair.chosen, 110)}\n        rejected: {short(pair.rejected, 110)}")


def treatment(run, method, mean):
    return treat(mean, method, **{name: getattr(run.config.strength, name) for name in NEEDS[method]})


def treated_labels(run, method):
    """The treatment of every training pair; only the baseline needs no vote."""
    mean = torch.zeros(len(run.train[1])) if method == "baseline" else strength(files.load_tensors(run.path("gaps.pt"))["train"])[0]
    return treatment(run, method, mean)


def make_reward(run, unit):
    labels = treated_labels(run, unit.removeprefix("reward_"))
    fit_reward_model(run, unit, run.config.reward, *labels, f"{run.config.seed} reward", contrast=run.config.contrast)


def make_meta(run, unit):
    """The reward model of a round: the last one goes on, by MetaRM or, in arm plain, by the same number of plain steps."""
    r, s, order, look = round_of(run, unit), run.config.meta, f"{run.config.seed} {unit}", None
    if r.arm == "meta":
        rows, lines = metarm.sample_responses(run, r.latest, metarm.practice(run), int(files.digest(order), 16) % 2 ** 63)
        files.save_jsonl(run.path(f"samples_{unit}.jsonl"), lines)
        look = metarm.look_ahead(run, rows, s, order)
    fit_reward_model(run, unit, s, *treated_labels(run, s.method), f"{run.config.seed} round {r.number}", start=r.start,
                     watch=metarm.validation(run, unit), watches=4, look_ahead=look)


def round_of(run, unit):
    return next((r for r in metarm.rounds(run.config) if unit in (r.policy, r.reward)), None)


def make_policy(run, unit):
    r = round_of(run, unit)
    if r is None:
        fit_policy(run, unit, unit.replace("policy_", "reward_"))
    else:
        fit_policy(run, unit, r.reward, start=r.latest, pairs=metarm.practice(run))


def fit_policy(run, unit, reward_name, depends=None, **more):
    """PPO against the reward model REWARD_NAME.pt; depends: as in fit; more: as in ppo.train_policy"""
    started, depends = time.time(), dependencies(run.config)[unit] if depends is None else depends
    policy, metrics, lines = ppo.train_policy(run, unit, reward_name, files.digest(depends), should_stop, **more)
    files.save_jsonl(run.path(unit.replace("policy_", "rollouts_") + ".jsonl"), lines)
    save_model(run, unit, policy)
    done(run, unit, started, {k: metrics[k] for k in ("reward", "kl", "length", "clip_fraction", "explained_variance")}, depends)


def make_evaluation(run, unit):
    started = time.time()
    evaluation.evaluate(run)
    done(run, unit, started, {})


# ---------------------------------------------------------------------------------------------------------------------

MAKE = {"tokenizer": make_tokenizer, "audit": make_audit, "sft": make_sft, "strength": make_strength, "evaluate": make_evaluation}
MAKE_STAGE = {"ensemble": make_member, "reward": make_reward, "meta": make_meta, "ppo": make_policy}


def execute(config, *only, slot=0):
    """Make everything, or the stages named, that is missing or out of date.  slot: the terminal's line for progress bars"""
    run, plan, depends = open_run(config, slot), units(config), dependencies(config)
    files.open_folder(config.out_dir)
    state = {}
    for unit in plan:
        made = all(os.path.exists(path) for path in outputs(run, unit))
        state[unit] = files.why_again(files.read_record(config.out_dir, unit), depends[unit], made)
    if any(state.values()):
        run.ood_pairs  # read every file now: a mistake in one should not show only after hours of training
        if config.ensemble.folds:
            data.folds(run.pairs["train"], config.ensemble.folds, config.seed)
    for stage in set(only) - {stage for stage, _, _ in plan.values()}:
        print(f"{stage}: nothing to do, " + ("meta.rounds is 0" if stage == "meta" else f"{stage}.methods is empty"))
    for stage, here in itertools.groupby(plan, lambda unit: plan[unit][0]):  # rounds: meta and ppo take turns
        here = list(here)
        if only and stage not in only:
            continue
        todo = [u for u in here if state[u]]
        skipped = [u for u in here if not state[u]]
        if skipped:
            print(f"{stage}: up to date" + (f" ({', '.join(skipped)})" if todo or len(skipped) > 1 else ""))
        if "audit" in skipped and slot == 0:
            with open(run.path("audit.json")) as file:
                print(data.audit_table(*json.load(file).values()))
        for unit in todo:
            for needed in plan[unit][2]:
                if state[needed] and plan[needed][0] != stage:
                    raise ConfigError(f"--stage={stage}: needs {needed}, which is {state[needed].replace('new', 'missing')}; run --stage={plan[needed][0]} first, or leave --stage out")
            if state[unit] != "new":
                print(f"{unit}: {state[unit]}")
        if stage in ("ensemble", "reward") and todo:
            make_side_by_side(run, stage, todo)
        else:
            for unit in todo:
                (MAKE.get(unit) or MAKE_STAGE[stage])(run, unit)
                state[unit] = ""
        state |= dict.fromkeys(todo, "")
        if stage == "evaluate":
            with open(run.path("results.json")) as file:
                print("\n" + evaluation.report(json.load(file)))
            print(f"\nfigures and results.json are in {config.out_dir}/")


def parse(argv):
    """-> Config, stage or None"""
    path, stage, overrides = None, None, []
    for word in argv:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals:
            raise ConfigError(f"{word!r}: every argument has the form --section.key=value; --help lists them")
        if key == "config":
            path = value
        elif key == "stage":
            if value not in STAGES:
                raise ConfigError(f"--stage={value}: must be one of {', '.join(STAGES)}")
            stage = value
        else:
            overrides.append((key, value))
    return configuration.load(path, overrides), stage


def guarded(work):
    """Call work(); Ctrl-C and every mistake of the user's become one line.  -> exit code"""
    global stop_asked
    stop_asked = False
    signal.signal(signal.SIGINT, ask_to_stop)
    try:
        work()
    except (Stopped, KeyboardInterrupt):
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:  # CUDA only: not run by CI
        print("error: the GPU's memory is full; raise --train.accumulate or lower the stage's batch", file=sys.stderr)
        return 2
    return 0


def main(argv):
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__ + "\n" + configuration.help_text())
        return 0

    def work():
        config, stage = parse(argv)
        execute(config, *([stage] if stage else []))

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
