"""What is to be done, and what each piece depends on: a change of a setting makes again just what was made with it.

A *unit* is the smallest piece of work that is skipped or done again: the tokenizer, sft, each member, each reward model and policy.
"""
import os
from dataclasses import asdict

import files
import metarm
import ppo
import pretrained
from strength import NEEDS

STAGES = ("sft", "ensemble", "strength", "reward", "meta", "ppo", "evaluate")


def units(config):
    """unit -> (stage, settings it depends on, units it reads)"""
    training = ("train.warmup", "train.weight_decay", "train.clip", "train.accumulate", "train.optimiser")
    members = [f"member_{m:02d}" for m in range(config.ensemble.members)]
    of_world = lambda *names: tuple(f"world.{k}" for k in names) if config.data.train == ("world",) else ()
    out = {
        "tokenizer": ("sft", ("seed", "data.train", "data.valid", "data.valid_share", "data.limit", "model.vocab",
                              *(("data.template",) if config.data.template != "hh" else ()), *of_world("pairs", "items", "temperature", "flip", "bias", "shared")), []),
        "audit": ("sft", ("model.context", *of_world("valid")), ["tokenizer"]),
        "sft": ("sft", ("dtype", *(f"model.{k}" for k in asdict(config.model) if k != "states"), "sft.epochs", "sft.batch", "sft.lr",
                        *of_world("demonstrations", "p_right"), *(("ppo.domains",) if config.ppo.domains else ()), *training), ["tokenizer"])}
    if config.model.train_layers >= 0 and config.model.states:
        out["states"] = ("sft", ("dtype", "model.states", "model.train_layers", "data.ood", *of_world("ood")), ["audit"])
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
            sampling = ["ppo.max_new", "ppo.min_new", *of_ood] if r.arm == "meta" else []
            treated = [] if config.meta.method == "baseline" else members
            out[r.reward] = ("meta", (*here, *sampling, *training, *(f"strength.{s}" for s in NEEDS[config.meta.method])),
                             ["sft", r.start, *([r.latest] if r.arm == "meta" else []), *treated])
        out[r.policy] = ("ppo", (*ppo_keys, "meta.domain", *of_ood), list(dict.fromkeys(["sft", r.reward, r.latest, *judges])))
    out["evaluate"] = ("evaluate", ("data.ood", "ppo.methods", "reward.methods", "strength.q", *of_world("ood"), *(f"evaluate.{k}" for k in asdict(config.evaluate))),
                       [u for u in out if u not in ("tokenizer", "audit", "states")])
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
        if unit == "tokenizer" and config.model.init != "scratch":
            depends["contents of model.init"] = pretrained.digest(config.model.init)
        group = {"tokenizer": "train", "audit": "valid", "strength": "valid", "evaluate": "ood"}.get(unit)
        for path in getattr(config.data, group) if group else ():
            if "://" in path:
                depends[f"contents of {path}"] = files.file_digest(files.fetch(path))
            elif os.path.isfile(path):
                depends[f"contents of {path}"] = files.file_digest(path)
        out[unit] = depends | {f"input {u}": files.digest(out[u]) for u in inputs}
    return out


def outputs(run, unit):
    """The files whose presence shows that a unit is done."""
    names = {"tokenizer": ["encoding.json"], "audit": ["audit.json"], "strength": ["strength.jsonl", "cleaned.jsonl", "gaps.pt"],
             "evaluate": ["results.json"], "states": []}
    if unit.startswith("policy_"):
        names[unit] = [f"{unit}.pt", unit.replace("policy_", "rollouts_") + ".jsonl"]
    if unit.startswith("meta_"):
        names[unit] = [f"{unit}.pt", f"samples_{unit}.jsonl"]
    return [run.path(name) for name in names.get(unit, [f"{unit}.pt"])]
