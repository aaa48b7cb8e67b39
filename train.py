"""python train.py --config=configs/tiny.toml [--stage=NAME] [--section.key=value ...]

The stages, in order; each reads the files of earlier stages and can be run alone:

    sft        language model on demonstrations, or on the chosen answers -> encoding.json, sft.pt
    ensemble   M reward models on the same pairs in different orders      -> member_00.pt, ...
    strength   their vote on every label           -> strength.jsonl, cleaned.jsonl, gaps.pt
    reward     a reward model for each treatment of the labels            -> reward_baseline.pt, ...
    ppo        a policy for each of these          -> policy_baseline.pt, rollouts_baseline.jsonl
    meta       in turns with ppo, meta.rounds times: samples, and MetaRM on them
                                                   -> meta_1.pt, samples_meta_1.jsonl
    evaluate   accuracy, calibration, noise detection, win rates          -> results.json, figures/
    export     only when asked for: Hugging Face folders of the models    -> export/sft/, ...

What is up to date is skipped; after Ctrl-C the same command resumes.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import hashlib
import os
import sys
from dataclasses import asdict
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import config as configuration
import losses
import metarm
import ppo
from common import (
    compile_blocks,
    file_weights,
    load_model,
    make_optimizer,
    member_names,
    reward_model_from_sft,
    save_model,
    score_rows,
    seed_from,
    set_lr,
    sft_rows,
)
from config import ConfigError
from contrast import ContrastiveHead
from data import Batch, batches, collate, response_tokens, treated_rows
from evaluate import (
    evaluate_policies,
    evaluate_rewards,
    evaluate_strength,
    evaluate_vote,
    label_errors,
    noise_detection,
    ppo_curves,
)
from labels.votes import (
    check_folds,
    check_kept_pairs,
    check_labels,
    check_votes,
    collect_votes,
    load_votes,
    member_folds,
    members_of_copy,
    planted_flips,
    votes_on_copies,
)
from model import LanguageModel, RewardModel, Shape, init_weights
from runtime import cli, early_stopping, figures, files, lock, monitor
from runtime.audit import audit, audit_text, shared
from runtime.early_stopping import EarlyStopping
from runtime.findings import find_all
from runtime.report import report
from runtime.run import open_run
from runtime.vote_files import strength_lines
from strength import needs_vote, strength, treat, treatment_settings
from tokenizer import train_tokenizer

# ----------------------------------------------------------------------------------------------
# Losses


def sft_loss(model, rows, weight=None):
    """-> sum over response tokens of the next-token loss, and nothing more to log

    weight: (B,) of each row in the sum; None: 1
    """
    device = device_of(model)
    batch = collate(rows).to(device)
    out_pos, target = response_tokens(rows)
    logits = model(batch.tokens, out_pos=out_pos.to(device), inputs_embeds=batch.inputs_embeds)
    target = target.to(device, non_blocking=True)
    loss = losses.language_model(logits, target)  # (B, R)
    if weight is not None:
        loss = loss * weight.to(device, non_blocking=True)[:, None]
    return loss.sum(), {}


def pair_loss(
    model, rows, margin, p, aux_loss=None, weight=None, loss_of=losses.bradley_terry, centering=0.0
):
    """-> sum over pairs of the Bradley-Terry loss, and the number of correctly ranked pairs.

    margin, p: (B,) of the treatment; aux_loss: a ContrastiveHead, or None
    weight: (B,) of each pair in the sum; None: 1; loss_of: another loss of (chosen, rejected,
    margin, p); centering: coefficient of losses.reward_centering
    With aux_loss every pair is computed twice, under two dropout masks: the sum of
    L_rm + beta L_cl, where L_rm is the mean over both views and L_cl the mean over the items.
    """
    device = device_of(model)
    views = 1 if aux_loss is None else 2
    batch = collate(rows).to(device)
    if views == 2:
        batch = Batch._make(part if part is None else torch.cat((part, part)) for part in batch)
    rewards, h = model(
        batch.tokens, batch.branch, batch.position, batch.last,
        features=True, inputs_embeds=batch.inputs_embeds,
    )  # (views B, 2), (views B, 2, C)
    chosen, rejected = rewards.unbind(1)
    margin = margin.to(device, non_blocking=True).repeat(views)  # a copy that blocks would wait
    p = p.to(device, non_blocking=True).repeat(views)            # for the forward pass to end
    loss = loss_of(chosen, rejected, margin, p)
    if centering:
        loss = loss + centering * losses.reward_centering(chosen, rejected)
    if weight is not None:
        loss = loss * weight.to(device, non_blocking=True).repeat(views)
    loss = loss.sum() / views
    sums = {"accuracy": (chosen > rejected).sum() / views}
    if aux_loss is not None:
        items = aux_loss(h)  # of all ranks
        sums["contrast"] = items.mean() * (len(items) // 2)
        loss = loss + aux_loss.settings.weight * sums["contrast"]
    return loss, sums


def device_of(model):
    return model.model.norm.weight.device


# ----------------------------------------------------------------------------------------------
# The training loop of SFT, members, reward models and MetaRM


class TrainingData(NamedTuple):
    """What the training loop needs of its data, and how a stage departs from a plain loop."""
    lengths: list                 # tokens of each example, for batches of similar length
    counts: list                  # weight of each example in the mean loss: 1 a pair, tokens in SFT
    seed_key: str                 # seed of the order of the data and of dropout
    aux_loss: torch.nn.Module | None = None  # contrastive head: trained with the model, not saved
    eval_fn: Callable | None = None    # function of the model -> tensor, saved as NAME_watched.pt
    evals_per_epoch: int = 1      # 0: once, at the end
    meta_step: Callable | None = None  # MetaRM's step, in place of a plain backward pass
    stopping: EarlyStopping | None = None  # is given what eval_fn returns


def get_lr(step, total, peak, warmup):
    """Linear warm-up over a share of the steps, then linear decay to 0."""
    rising = (step + 1) / max(1, warmup * total)
    falling = (total - step) / max(1, (1 - warmup) * total)
    return peak * min(rising, 1.0, falling)


def fit(run, name, model, loss_fn, cfg, data):
    """Train `model` for cfg.epochs passes over the data; save it as NAME.pt.

    loss_fn(model, index array) -> sum of the loss over these examples, sums to log
    cfg: the stage's section (epochs, batch, lr); data: TrainingData
    """
    train = run.cfg.train
    schedule = make_schedule(data, cfg)
    model = run.shard(model)
    extra_params = list(data.aux_loss.parameters()) if data.aux_loss else []
    parameters = [*model.parameters(), *extra_params]
    optimizer = make_optimizer(model, train.optimizer, cfg.lr, train.weight_decay, extra_params)
    scaler = run.make_scaler()
    model.model.gradient_checkpointing = train.gradient_checkpointing
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    parts |= {"aux_loss": data.aux_loss} if data.aux_loss else {}
    parts |= {"stopping": data.stopping} if data.stopping else {}
    state = run.resume(name, parts) or {"step": 0, "last": {}, "watched": []}
    averages = state["last"]
    eval_outputs = [output.cpu() for output in state["watched"]]  # resume puts them on the device
    eval_steps = steps_of_evals(data, cfg, len(schedule))

    model.train()
    compiled_model = compile_blocks(model) if run.compile and not run.shards else model
    for step in run.steps(name, state["step"], len(schedule)):
        if data.stopping and data.stopping.is_over:
            break
        index = schedule[step]
        torch.manual_seed(seed_from(f"{data.seed_key} {step}") + run.rank)  # same masks if resumed
        lr = set_lr(optimizer, get_lr(step, len(schedule), cfg.lr, train.warmup))
        count = sum(data.counts[i] for i in index)
        run.add(count=count, tokens=sum(data.lengths[i] for i in index))

        def micro_losses():  # shares of the mean loss; one graph in memory at a time
            for micro_batch in np.array_split(index, min(train.accumulate, len(index))):
                own, copies = run.share(micro_batch)  # of this rank, where there are several
                with run.autocast():
                    loss, sums = loss_fn(compiled_model, own)
                sums = {"loss": loss, **sums}
                run.add(**{key: x.detach() / copies for key, x in sums.items()})
                yield scaler.scale(loss / (count * copies))

        optimizer.zero_grad(set_to_none=True)
        if data.meta_step is None:
            for loss in micro_losses():
                loss.backward()
            run.add_up([p.grad for p in parameters if p.grad is not None])
        else:
            gradients, stats = data.meta_step(
                compiled_model, optimizer, step, micro_losses, scaler
            )
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            run.add(**{key: value * count / run.world_size for key, value in stats.items()})
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        run.check_step(name, step, grad_norm, parameters)

        averages = log_step(run, name, step, data, lr=lr, grad_norm=grad_norm) or averages
        if step + 1 in eval_steps:
            eval_outputs.append(data.eval_fn(model.eval()))
            model.train()
            if data.stopping:
                data.stopping.update(step + 1, model, eval_outputs[-1])
        if run.should_save():
            run.save_checkpoint(name, parts, step=step + 1, last=averages, watched=eval_outputs)
    if data.stopping:
        averages = averages | data.stopping.finish(model)
    save_model(run, name, model.eval())
    if data.eval_fn:
        run.save_tensors(f"{name}_watched.pt", torch.stack(eval_outputs))
    run.record_finished(name, averages)


def log_step(run, name, step, data, **values):
    """Log the averages, if a line is due, and warn of a collapsed contrastive term -> averages"""
    averages = run.log_step(name, step, **values)
    if averages and data.aux_loss:
        warning = data.aux_loss.collapse_warning(averages["contrast"])
        if warning:
            tqdm.write(f"{name}: {warning}")
    return averages


def make_schedule(data, cfg):
    """The batches of all epochs -> list of index arrays"""
    schedule = []
    for epoch in range(cfg.epochs):
        schedule += batches(data.lengths, cfg.batch, f"{data.seed_key} epoch {epoch}")
    return schedule


def steps_of_evals(data, cfg, total):
    """After which steps eval_fn is called -> set"""
    if data.eval_fn is None:
        return set()
    num_evals = cfg.epochs * data.evals_per_epoch or 1
    return {round(total * (i + 1) / num_evals) for i in range(num_evals)}


class RewardVariant(NamedTuple):
    """How a reward model departs from the plain one."""
    seed_key: str = "reward"      # the order of the data; members and rounds have their own
    start: str | None = None      # reward model to continue from, instead of the SFT model
    shape_changes: dict = {}      # to the model's Shape
    contrast: object = None       # the [contrast] section, for a contrastive term
    eval_fn: Callable | None = None  # as in TrainingData
    evals_per_epoch: int = 1
    meta_step: Callable | None = None
    weight: Tensor | None = None  # (N,) of each training pair in the loss
    loss_of: Callable = losses.bradley_terry
    language_model: str = "sft"   # that it is made of, where it does not start from a reward model
    head_seed: int | None = None  # None: the head that all reward models of a run share
    stopping: EarlyStopping | None = None  # as in TrainingData


def fit_reward_model(run, name, cfg, labels, variant):
    """Train a reward model on the training pairs.  labels: (swap, p, margin) of each pair"""
    swap, p, margin = labels
    keep_idx = (~p.isnan()).nonzero()[:, 0]  # a dropped pair has no p
    p = p[keep_idx]
    margin = margin[keep_idx]
    weight = pair_weights(run, variant.weight)
    weight = None if weight is None else weight[keep_idx]
    rows = treated_rows(run.train.rows, keep_idx, swap)
    if not rows:
        raise ConfigError(f"{name}: no pair is left to train on; lower strength.q, which drops "
                          "pairs, or reward.heldout_share")

    contrast = variant.contrast
    has_contrast = contrast is not None and contrast.term != "none"
    dropout = {"dropout": contrast.dropout} if has_contrast else {}
    if variant.start:
        model = load_model(run, RewardModel, variant.start)
    else:
        model = reward_model_from_sft(
            run, variant.language_model, variant.head_seed, **dropout | variant.shape_changes
        )
    aux_loss = None
    if has_contrast:
        generator = torch.Generator().manual_seed(run.cfg.seed)
        total = 2 * cfg.epochs * len(rows)
        ranks = run.ranks if contrast.term == "swav" or contrast.negatives == "all" else None
        head = ContrastiveHead(contrast, model.shape.width, generator, total, ranks)
        aux_loss = head.to(run.device)

    def loss_fn(model, index):
        pairs = [rows[i] for i in index]
        weights = None if weight is None else weight[index]
        return pair_loss(
            model, pairs, margin[index], p[index], aux_loss, weights, variant.loss_of,
            run.cfg.reward.centering,
        )

    lengths = [len(row) for row in rows]
    seed_key = f"{run.cfg.seed} {variant.seed_key}"
    data = TrainingData(lengths, [1] * len(rows), seed_key, aux_loss, variant.eval_fn,
                        variant.evals_per_epoch, variant.meta_step, variant.stopping)
    fit(run, name, model, loss_fn, cfg, data)


def pair_weights(run, weight):
    """Weight of each training pair in the loss: its file's, times one given -> (N,); None: 1"""
    of_file = file_weights(run)
    if weight is None or of_file is None:
        return of_file if weight is None else weight
    return weight * of_file


# ----------------------------------------------------------------------------------------------
# What the stages depend on

TRAINING_SETTINGS = [
    "train.warmup", "train.weight_decay", "train.grad_clip", "train.accumulate", "train.optimizer",
]
LORA_SETTINGS = ("lora_rank", "lora_alpha")  # of [model]; older records have none


def start_facts(run):
    """What reward models depend on beside the SFT model, where it is not the default"""
    reward = run.cfg.reward
    facts = weight_facts(run.cfg)
    facts |= {"reward.centering": reward.centering} if reward.centering else {}
    if reward.init:
        from pretrained import rewards
        facts |= rewards.facts(run)
    return facts


def weight_facts(cfg):
    """data.weights where they change anything: older records have no such setting"""
    weights = list(cfg.data.weights)
    return {"data.weights": weights} if len(set(weights)) > 1 else {}


def section_settings(cfg, section, without=()):
    """Every setting of a section but some -> dotted names"""
    names = asdict(getattr(cfg, section))
    return [f"{section}.{name}" for name in names if name not in without]


def world_settings(cfg, *names):
    """Settings of the built-in world, where the data come from it"""
    return [f"world.{name}" for name in names] if cfg.data.train == ("world",) else []


def strength_settings(method, cfg):
    """Settings that the treatment of the labels depends on, besides the members themselves"""
    settings = [f"strength.{name}" for name in treatment_settings(method)]
    if cfg.ensemble.folds and needs_vote(method):
        settings.append("ensemble.vote")
    return settings


def reading_settings(cfg):
    """How files are read, where it is not the default: older records have no such settings"""
    changed = []
    for name in ("format", "labels", "min_score_diff"):
        if getattr(cfg.data, name) != getattr(configuration.Data(), name):
            changed.append(f"data.{name}")
    return changed


def ppo_settings(cfg):
    return [*section_settings(cfg, "ppo", without=("methods", "sample_every")), "train.grad_clip"]


def reward_judges(cfg):
    """Members whose rewards PPO reads besides its reward model"""
    return member_names(cfg) if cfg.ppo.reward in ppo.ENSEMBLE_REDUCERS else []


# ----------------------------------------------------------------------------------------------
# Stages: each begins with what it depends on


def make_tokenizer(run):
    cfg = run.cfg
    name = "tokenizer"
    settings = [
        "seed", "data.train", "data.valid", "data.valid_share", "data.limit", "data.template",
        "model.vocab",
        *reading_settings(cfg),
        *world_settings(cfg, "pairs", "items", "temperature", "flip", "bias", "shared"),
    ]
    extra = run.contents_of(cfg.data.train)
    if cfg.model.init != "scratch":
        from pretrained import hub
        extra["contents of model.init"] = hub.digest(cfg.model.init)
    if not run.needs(name, settings, outputs=["encoding.json"], extra=extra):
        return
    if cfg.model.init == "scratch":
        tokenizer = train_tokenizer(texts_of(run.pairs["train"]), cfg.model.vocab)
    else:
        from pretrained import hub
        from pretrained import tokenizer as pretrained_tokenizer
        folder = hub.directory(cfg.model.init)
        tokenizer = pretrained_tokenizer.load(folder, cfg.model.vocab, cfg.data.template)
    run.save_text("encoding.json", tokenizer.to_json())
    run.__dict__.pop("tokenizer", None)  # read it anew
    run.record_finished(name, {"tokens": tokenizer.vocab_size})


def texts_of(pairs):
    """All texts, in an order that does not depend on the labels"""
    for pair in pairs:
        yield pair.prompt
        yield from sorted((pair.chosen, pair.rejected))


def audit_data(run):
    cfg = run.cfg
    settings = ["model.context", *world_settings(cfg, "valid")]
    extra = run.contents_of(cfg.data.valid)
    if not run.needs("audit", settings, ["tokenizer"], ["audit.json"], extra):
        return
    sets = {name: pairs for name, pairs in run.pairs.items() if pairs}
    tables = {}
    findings = []
    for name, pairs in sets.items():
        tables[name] = audit(pairs, run.tokenizer, (cfg.model.context,))
        findings += find_all(name, pairs, run.tokenizer)
    result = {"sets": tables, "shared": shared(sets), "findings": findings}
    run.save_json("audit.json", result)
    run.record_finished("audit", {})
    if run.slot == 0:
        print(audit_text(result))


def train_sft(run):
    cfg = run.cfg
    settings = [
        "dtype", *section_settings(cfg, "model", without=("embeds_dir", *LORA_SETTINGS)),
        "sft.epochs", "sft.batch", "sft.lr", "ppo.domains",
        *world_settings(cfg, "demonstrations", "p_right"), *TRAINING_SETTINGS,
    ]
    if cfg.model.lora_rank:
        settings += [f"model.{name}" for name in LORA_SETTINGS]
    if cfg.data.train != ("world",):
        settings.append("sft.answers")
    if not run.needs("sft", settings, ["tokenizer"], extra=weight_facts(cfg)):
        return
    rows = sft_rows(run)
    weight = file_weights(run)
    if weight is not None:
        weight = weight.repeat(len(rows) // len(weight))  # sft.answers: of one answer, or of both
    fit_language_model(run, "sft", init_sft_model(run), rows, weight)


def fit_language_model(run, name, model, rows, weight=None):
    """Train `model` on the responses of the rows by [sft]; save it as NAME.pt.

    rows: Rows of one response each; weight: (N,) of each in the loss; None: 1
    """

    def loss_fn(model, index):
        weights = None if weight is None else weight[index]
        return sft_loss(model, [rows[i] for i in index], weights)

    lengths = [len(row) for row in rows]
    counts = [len(row.responses[0]) for row in rows]
    data = TrainingData(lengths, counts, seed_key=f"{run.cfg.seed} {name}")
    fit(run, name, model, loss_fn, run.cfg.sft, data)


def init_sft_model(run):
    """A new language model, or the pretrained one of model.init"""
    m = run.cfg.model
    if m.init != "scratch":
        from pretrained import frozen
        return frozen.load_language_model(run)
    hidden = m.hidden or (8 * m.width // 3 + 7) // 8 * 8
    shape = Shape(run.tokenizer.vocab_size, m.layers, m.heads, m.kv_heads, m.width, hidden,
                  m.context, m.dropout, m.tied)
    generator = torch.Generator().manual_seed(run.cfg.seed)
    return init_weights(LanguageModel(shape), generator).to(run.device)


def compute_embeds(run):
    """The frozen trunk's output for all pairs, computed once and kept in model.embeds_dir."""
    cfg = run.cfg
    if cfg.model.train_layers < 0 or not cfg.model.embeds_dir:
        return
    settings = [
        "dtype", "model.embeds_dir", "model.train_layers", "data.ood",
        *world_settings(cfg, "ood"),
    ]
    if not run.needs("states", settings, ["audit"], outputs=[]):
        return
    sets = (run.train, run.valid, *run.ood.values())  # encoding a set computes its embeddings
    run.record_finished("states", {"pairs": sum(len(encoded.rows) for encoded in sets)})


def trains_language_model(cfg):
    """Whether anything reads the SFT model; voters on frozen states and given votes do not."""
    return bool(member_names(cfg) or cfg.reward.methods)


def compute_views(run):
    """States of all answers, for voters on a frozen model."""
    cfg = run.cfg
    if cfg.ensemble.voters != "states" or cfg.strength.votes:
        return
    from labels import views
    settings = ["dtype", "model.context", *world_settings(cfg, "valid")]
    extra = run.contents_of(cfg.data.valid)
    extra["views"] = str(views.state_views(cfg.model.layers))
    if not run.needs("views", settings, ["tokenizer"], ["views.pt"], extra):
        return
    rows, digests = views.different_answers([*run.train.rows, *run.valid.rows])
    states = views.compute_states(run, rows)
    run.save_tensors("views.pt", {"states": states, "digests": digests})
    run.record_finished("views", {"answers": len(states)})


def train_member(run, m):
    """Member m of the ensemble; all start from the same SFT model and the same reward head."""
    fit_member(run, f"member_{m:02d}", m)


def train_on_copy(run, i):
    """A member, trained anew on a copy of the labels with planted flips: all of the first copy,
    then all of the second, ..."""
    copy, m = divmod(i, run.cfg.ensemble.members)
    fit_member(run, f"planted_{copy}_{m:02d}", m, copy)


def fit_member(run, name, m, copy=None):
    """copy: number of the copy of the labels whose flips it is trained on; None: labels as given"""
    cfg = run.cfg
    settings = [
        "ensemble.epochs", "ensemble.batch", "ensemble.lr", "ensemble.folds", "ensemble.fold_by",
        *TRAINING_SETTINGS,
    ]
    if copy is not None:
        settings += ["clean.tests", "clean.flips"]
    if not run.needs(name, settings, ["sft"], extra=start_facts(run)):
        return
    swap, p, margin = treat(torch.zeros(len(run.train.rows)), "baseline")
    if cfg.ensemble.folds:
        left_out = member_folds(run) == m % cfg.ensemble.folds
        p[left_out] = torch.nan
    if copy is not None:
        swap = planted_flips(run.train.pairs, cfg)[copy]
    variant = RewardVariant(seed_key=f"member_{m:02d}")
    fit_reward_model(run, name, cfg.ensemble, (swap, p, margin), variant)


def vote(run):
    """The voters' vote on every label, and what strength.method makes of it."""
    cfg = run.cfg
    settings = [
        "strength.method", *strength_settings(cfg.strength.method, cfg), "evaluate.groups",
        "strength.votes", *world_settings(cfg, "valid"),
    ]
    if cfg.ensemble.folds and "ensemble.vote" not in settings:
        settings.append("ensemble.vote")
    inputs = member_names(cfg)
    if cfg.ensemble.voters == "states" and not cfg.strength.votes:
        settings += ["ensemble.folds", "ensemble.fold_by"]
        inputs = ["views"]
    elif not inputs:
        inputs = ["tokenizer"]
    extra = run.contents_of((*cfg.data.valid, *votes_files(cfg)))
    if not run.needs("strength", settings, inputs, ["strength.jsonl", "gaps.pt"], extra):
        return
    diffs = collect_votes(run)
    mean, std = strength(diffs["train"])
    labels = treat_pairs(run, cfg.strength.method, mean)
    run.save_tensors("gaps.pt", diffs)
    run.save_editable("strength.jsonl", strength_lines(run, mean, std, labels))
    if mean.max() == mean.min():
        print("strength: warning: every label has the same strength, so the vote says nothing; "
              "raise ensemble.epochs or ensemble.lr")
    if run.draw("vote", figures.strength_histogram, mean.numpy(), errors=None):  # not the truth
        tqdm.write(f"strength: {run.path('figures/vote.png')} shows the vote on every label")
    doubted = float((mean < 0).float().mean())
    run.record_finished("strength", {
        "doubted": doubted, "mean": float(mean.mean()), "std": float(std.mean()),
    })


def votes_files(cfg):
    return (cfg.strength.votes,) if cfg.strength.votes else ()


def clean(run):
    """What becomes of doubted labels: the self-test, cleaned.jsonl, the review page."""
    cfg = run.cfg
    settings = [
        "strength.method", *strength_settings(cfg.strength.method, cfg),
        *section_settings(cfg, "clean"),
    ]
    inputs = ["strength"]
    for copy in range(cfg.clean.tests):
        inputs += members_of_copy(cfg, copy)
    extra = run.contents_of((cfg.data.decisions,) if cfg.data.decisions else ())
    outputs = ["trust.json", "issues.csv", "cleaned.jsonl", "report.html"]
    if not run.needs("clean", settings, inputs, outputs, extra, check=check_votes):
        return
    from labels import cleaning
    cleaning.report_unused_decisions(run)
    diffs = load_votes(run)
    mean, _ = strength(diffs["train"])
    labels = treat_pairs(run, cfg.strength.method, mean)
    found = cleaning.assess(run, diffs, votes_on_copies(run, diffs), labels)
    cleaning.write(run, found, labels)
    run.record_finished("clean", {})


def treat_pairs(run, method, mean):
    """Treatment of each pair under the [strength] settings -> swap, p, margin

    Raises ConfigError where the data's own margins are asked for and no pair has one.
    """
    cfg = run.cfg.strength
    arguments = {name: getattr(cfg, name) for name in treatment_settings(method)}
    swap, p, margin = treat(mean, method, **arguments)
    if method == "given":
        margins = [pair.margin for pair in run.train.pairs]
        if all(m is None for m in margins):
            raise ConfigError("reward.methods = 'given': no pair of the data has a number margin; "
                              "use another treatment")
        margin = torch.tensor([m or 0.0 for m in margins], dtype=torch.float32)
    return swap, p, margin


def vote_inputs(cfg):
    """What a treatment by the vote reads: the members, or the vote itself where there are none"""
    return member_names(cfg) or ["strength"]


def treated_labels(run, method):
    """The treatment of every training pair; the baseline needs no vote."""
    if needs_vote(method):
        mean, _ = strength(load_votes(run, ["train"])["train"])  # validation is not read here
    else:
        mean = torch.zeros(len(run.train.rows))
    return treat_pairs(run, method, mean)


def train_reward(run, method):
    cfg = run.cfg
    name = f"reward_{method}"
    settings = [
        "reward.epochs", "reward.batch", "reward.lr", *TRAINING_SETTINGS,
        *strength_settings(method, cfg),
    ]
    if cfg.contrast.term != "none":
        settings += section_settings(cfg, "contrast")
    if cfg.reward.evals_per_epoch:
        settings += early_stopping.SETTINGS
    voters = vote_inputs(cfg) if needs_vote(method) else []
    check = check_votes if voters else None
    if not run.needs(name, settings, ["sft", *voters], extra=start_facts(run), check=check):
        return
    labels = treated_labels(run, method)
    variant = RewardVariant(contrast=cfg.contrast)
    if cfg.reward.evals_per_epoch:
        labels, variant = early_stopping.hold_out(run, name, labels, variant)
    fit_reward_model(run, name, cfg.reward, labels, variant)


def train_policy(run, method):
    inputs = ["sft", f"reward_{method}", *reward_judges(run.cfg)]
    name = f"policy_{method}"
    if run.needs(name, ppo_settings(run.cfg), inputs, policy_outputs(name)):
        run_ppo(run, name, f"reward_{method}")


def policy_outputs(name):
    return [f"{name}.pt", f"{name.replace('policy_', 'rollouts_')}.jsonl"]


def run_ppo(run, name, reward_name, start="sft", pairs=None):
    """PPO against the reward model REWARD_NAME.pt; start, pairs: as in ppo.train_policy_loop"""
    policy, metrics, lines = ppo.train_policy_loop(run, name, reward_name, start, pairs)
    model_file, rollouts_file = policy_outputs(name)
    run.save_jsonl(rollouts_file, lines)
    save_model(run, name, policy)
    shown = ("reward", "kl", "length", "clipfrac", "explained_variance")
    run.record_finished(name, {key: metrics[key] for key in shown})


def train_round_reward(run, round_):
    """The reward model of a round, trained by MetaRM or, in arms plain and ocrm, by as many plain
    steps.  In arm none there is nothing to do."""
    cfg = run.cfg
    name = round_.reward
    if round_.arm == "none":
        return
    method = cfg.meta.method
    settings = ["meta.epochs", "meta.batch", "meta.lr"]
    inputs = list(dict.fromkeys(["sft", round_.start]))
    outputs = [f"{name}.pt"]
    if round_.arm in metarm.SAMPLING_ARMS:
        without = ["rounds", "arms", "method", "start", "policy_start", "weight_clip"]
        without.append("eta" if round_.arm == "meta-adam" else "adam_eta")
        settings = section_settings(cfg, "meta", without)
        settings += ["ppo.max_new_tokens", "ppo.min_new_tokens", *ood_settings(cfg)]
        inputs.append(round_.latest)
        outputs.append(f"samples_{name}.jsonl")
    if round_.arm == "ocrm":
        settings.append("meta.weight_clip")
        inputs.append(round_.latest)
    settings += [*TRAINING_SETTINGS, *strength_settings(method, cfg)]
    inputs += vote_inputs(cfg) if needs_vote(method) else []
    check = check_votes if needs_vote(method) else None
    if not run.needs(name, settings, inputs, outputs, start_facts(run), check=check):
        return
    meta_step = None
    if round_.arm in metarm.SAMPLING_ARMS:
        key = f"{cfg.seed} {name}"
        pairs = metarm.round_prompts(run)
        seed = seed_from(key) % 2 ** 63
        samples, lines = metarm.sample_responses(run, round_.latest, pairs, seed)
        run.save_jsonl(f"samples_{name}.jsonl", lines)
        meta_step = metarm.make_meta_step(
            run, samples, cfg.meta, key, adam=round_.arm == "meta-adam"
        )
    variant = RewardVariant(
        seed_key=f"round {round_.number}",
        start=None if round_.start == "sft" else round_.start,
        eval_fn=metarm.make_validation_fn(run, name),
        evals_per_epoch=4,
        meta_step=meta_step,
        weight=metarm.policy_weights(run, round_.latest) if round_.arm == "ocrm" else None,
    )
    fit_reward_model(run, name, cfg.meta, treated_labels(run, method), variant)


def ood_settings(cfg):
    return [*world_settings(cfg, "ood"), "data.ood"] if cfg.meta.domain == "ood" else []


def train_round_policy(run, round_):
    settings = [*ppo_settings(run.cfg), "meta.domain", *ood_settings(run.cfg)]
    inputs = dict.fromkeys(["sft", round_.reward, round_.policy_start, *reward_judges(run.cfg)])
    name = round_.policy
    if run.needs(name, settings, list(inputs), policy_outputs(name)):
        pairs = metarm.round_prompts(run)
        run_ppo(run, name, round_.reward, round_.policy_start, pairs)


def evaluate_models(run):
    cfg = run.cfg
    rounds = metarm.meta_rounds(cfg)
    rewards = [f"reward_{method}" for method in cfg.reward.methods]
    rewards += [r.reward for r in rounds if r.arm != "none"]
    policies = [f"policy_{method}" for method in cfg.ppo.methods] + [r.policy for r in rounds]
    settings = [
        "data.ood", "ppo.methods", "reward.methods", "strength.q", *world_settings(cfg, "ood"),
        *section_settings(cfg, "evaluate"),
    ]
    inputs = [*member_names(cfg), "strength", "clean", *rewards, *policies]
    if trains_language_model(cfg):
        inputs.insert(0, "sft")
    extra = run.contents_of(cfg.data.ood) | {"definition of kl": "on untruncated answers"}
    if not run.needs("evaluate", settings, inputs, ["results.json"], extra):
        return
    diffs = load_votes(run)
    errors = label_errors(run)
    results = {
        "config": asdict(cfg),
        "seed": cfg.seed,
        "versions": files.versions(),
        "audit": run.load_json("audit.json"),
        "trust": run.load_json("trust.json"),
        "judge": "the ensemble (a proxy)" if errors is None else "gold reward",
        "vote": evaluate_vote(run, diffs),
        "strength": evaluate_strength(run, diffs, errors),
    }
    if errors is not None:
        results["noise"] = noise_detection(diffs["train"], errors, cfg.strength.q)
    results["reward"], results["groups"] = evaluate_rewards(run, diffs, rewards)
    results["policy"] = {}
    if policies:
        results |= evaluate_all_policies(run, policies, rounds)
    run.save_json("results.json", results)
    mean, _ = strength(diffs["train"])
    methods = [name.removeprefix("policy_") for name in policies]
    histories = monitor.load_histories(run, methods)
    figures.draw_results(run, results, mean.numpy(), errors, histories)
    run.record_finished("evaluate", {})


def evaluate_all_policies(run, policies, rounds):
    """On held-out prompts, with rounds also out of distribution, and over PPO's iterations"""
    cfg = run.cfg
    plain = f"policy_{cfg.meta.method}"
    against = {r.policy: plain for r in rounds if plain in policies}
    names = ["sft", *policies]
    out = {}
    out["policy"] = evaluate_policies(run, names, run.valid.pairs, against, "answers.jsonl")
    if rounds:
        pairs = metarm.split_ood_prompts(run)[1]
        if pairs:
            judge = "ensemble" if cfg.data.ood else None  # the world cannot judge files
            out["policy_ood"] = evaluate_policies(
                run, names, pairs, against, "answers_ood.jsonl", judge
            )
    out["ppo"] = ppo_curves(run, policies)
    return out


# ----------------------------------------------------------------------------------------------
# For experiments: trained once under a name of its own


def train_reward_variant(run, name, labels, eval_rows, variant=RewardVariant(), cfg=None):
    """A reward model of any treatment.  -> its rewards of eval_rows over training, (E, n, 2)

    labels: (swap, p, margin) of each training pair
    cfg: the section with epochs, batch and lr; [reward] unless given
    """
    cfg = cfg or run.cfg.reward
    joined = b"".join(column.numpy().tobytes() for column in labels)
    extra = {
        "treatment": hashlib.sha256(joined).hexdigest()[:16],
        "watched": len(eval_rows),
        "watches": variant.evals_per_epoch,
        "epochs": cfg.epochs,
        "batch": cfg.batch,
        "lr": cfg.lr,
        "order": variant.seed_key,
        "contrast": str(variant.contrast),
        **variant.shape_changes,
        **start_facts(run),
    }
    if variant.loss_of is not losses.bradley_terry:
        extra["loss"] = variant.loss_of.__qualname__
    if variant.head_seed is not None:
        extra["head seed"] = variant.head_seed
    output = f"{name}_watched.pt"
    if run.needs(name, TRAINING_SETTINGS, [variant.language_model], [output], extra):

        def eval_fn(model):
            return score_rows(run, model, eval_rows)

        fit_reward_model(run, name, cfg, labels, variant._replace(eval_fn=eval_fn))
    return run.load_tensors(output)


def train_policy_once(run, name, reward_name):
    """PPO under run.cfg.ppo as policy_NAME.pt -> lines of all responses sampled"""
    name = f"policy_{name}"
    outputs = policy_outputs(name)
    inputs = ["sft", reward_name, *reward_judges(run.cfg)]
    if run.needs(name, ppo_settings(run.cfg), inputs, outputs):
        run_ppo(run, name, reward_name)
    return run.load_jsonl(outputs[1])


# ----------------------------------------------------------------------------------------------
# Running the stages


def all_stages(run):
    """Every stage in order; each returns at once if it is up to date or not selected."""
    make_tokenizer(run)
    audit_data(run)
    check_kept_pairs(run)
    if run.cfg.reward.init and not run.dry_run:
        from pretrained import rewards
        rewards.check(run)
    if trains_language_model(run.cfg):
        train_sft(run)
        compute_embeds(run)
    compute_views(run)
    run.parallel(train_member, range(len(member_names(run.cfg))))
    vote(run)
    run.parallel(train_on_copy, range(run.cfg.clean.tests * len(member_names(run.cfg))))
    clean(run)
    run.parallel(train_reward, run.cfg.reward.methods)
    run.parallel(train_policy, run.cfg.ppo.methods)
    for round_ in metarm.meta_rounds(run.cfg):
        train_round_reward(run, round_)
        train_round_policy(run, round_)
    evaluate_models(run)


def run_stages(run, *selected):
    """Make everything, or the stages named, that is missing or out of date."""
    lock.claim(run.cfg.out_dir)
    run.selected = selected
    check_stages(run)
    if run.cfg.data.decisions:  # a name with a typing error counts as no file and leaves all as is
        from labels import review
        review.check_path(run.cfg.data.decisions)
    run.report_skipped()
    if any(known.reason for known in run.known.values()):
        run.read_inputs()
        check_labels(run)
        if run.cfg.ensemble.folds:
            check_folds(run)
    all_stages(run)
    if run.is_selected("evaluate"):
        print("\n" + report(run.load_json("results.json")))
        what = "figures and results.json are" if run.cfg.log.figures else "results.json is"
        print(f"\n{what} in {run.cfg.out_dir}/")
        if os.path.exists(run.path("report.html")):
            print(f"the suspected labels: open {run.path('report.html')} and decide; "
                  "--data.decisions=decisions.jsonl reads what it saves")
    run.selected = ()


def check_stages(run):
    """Dry run: note in run.known what is out of date."""
    run.dry_run = True
    all_stages(run)
    run.dry_run = False


def ensure_stages(config, *selected, slot=0):
    """Open a run and make these stages where they are missing or out of date -> Run

    Waits until no other process works in the folder.
    """
    lock.claim(config.out_dir, wait=True)
    run = open_run(config, slot)
    run_stages(run, *selected)
    return run


def parse_args(argv):
    """-> Config, stage or None"""
    config, stage = cli.parse_args(argv)
    if config.model.init != "scratch":
        from pretrained import weights
        config = weights.sized(config)
    return config, stage


def export_models(run):
    """Write the SFT model, every policy and every reward model that is up to date."""
    from pretrained import export
    lock.claim(run.cfg.out_dir)
    check_stages(run)
    export.export_models(run)


def print_help(words):
    """What this file does, and every setting with its value under these other words"""
    config, _ = cli.parse_args(words)
    print(__doc__ + "\n" + configuration.help_text(config))


def main(argv):
    others = [word for word in argv if word not in ("--help", "-h")]
    if not argv or len(others) < len(argv):
        return cli.run_cli(lambda: print_help(others), trains=False)

    def work():
        config, stage = parse_args(argv)
        run = open_run(config)
        if stage == "export":
            export_models(run)
        else:
            run_stages(run, *([stage] if stage else []))

    return cli.run_cli(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
