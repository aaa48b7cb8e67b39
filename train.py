"""python train.py --config=configs/tiny.toml [--stage=NAME] [--section.key=value ...]

The stages, in order; each reads the files of the last and can be run alone:

    sft        a language model on demonstrations, or on the chosen answers      -> encoding.json, sft.pt
    ensemble   M reward models that differ by the order of the data alone        -> member_00.pt, ...
    strength   their vote on every label                                         -> strength.jsonl, cleaned.jsonl, gaps.pt
    reward     a reward model for each treatment of the labels                   -> reward_baseline.pt, ...
    ppo        a policy for each of these reward models                          -> policy_baseline.pt, rollouts_baseline.jsonl
    meta       in turns with ppo, meta.rounds times: samples, MetaRM on them     -> meta_1.pt, samples_meta_1.jsonl, policy_meta_1.pt
    evaluate   everything that can be said about them                            -> results.json, figures/
    export     only when asked for: Hugging Face directories of what is made     -> export/sft/, export/reward_flip/, ...

What is up to date is skipped; after Ctrl-C the same command goes on from where it stopped.
"""
import functools
import itertools
import json
import os
import signal
import sys
import textwrap
import time
from dataclasses import replace
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

import config as configuration
import data
import evaluate as evaluation
import files
import loop
import metarm
import plan
import ppo
import pretrained
import tokenizer
from config import ConfigError
from data import DataError
from files import Stopped
from model import LanguageModel, RewardModel, Shape, init_weights
from run import build, gaps_of, load_model, open_run, save_model, sft_rows
from strength import NEEDS, VERDICTS, groups, strength, treat, verdicts


# ---------------------------------------------------------------------------------------------------------------------
# The stages

def make_tokenizer(run, unit):
    started, pairs = time.time(), run.pairs["train"]
    texts = (text for p in pairs for text in (p.prompt, *sorted((p.chosen, p.rejected))))  # whatever the labels say
    m, template = run.config.model, run.config.data.template
    encoding = data.train_tokenizer(texts, m.vocab) if m.init == "scratch" else tokenizer.load(pretrained.directory(m.init), m.vocab, template)
    files.save_text(run.path("encoding.json"), data.encoding_to_json(encoding))
    run.__dict__.pop("encoding", None)
    loop.done(run, unit, started, {"tokens": encoding.n_vocab})


def make_audit(run, unit):
    started, context = time.time(), run.config.model.context
    sets = {name: pairs for name, pairs in run.pairs.items() if pairs}
    audit = {"sets": {name: data.audit(pairs, run.encoding, (context,)) for name, pairs in sets.items()}, "shared": data.shared(sets)}
    files.save_json(run.path("audit.json"), audit)
    loop.done(run, unit, started, {})
    if run.slot == 0:
        print(data.audit_table(*audit.values()))


def make_states(run, unit):
    started, sets = time.time(), (run.train, run.valid, *run.ood.values())
    loop.done(run, unit, started, {"pairs": sum(len(rows) for _, rows in sets)})


def make_sft(run, unit):
    c = run.config
    m = c.model
    if m.init == "scratch":
        hidden = m.hidden or (8 * m.width // 3 + 7) // 8 * 8
        shape = Shape(run.encoding.n_vocab, m.layers, m.heads, m.kv_heads, m.width, hidden, m.context, m.dropout, m.tied)
        model = init_weights(LanguageModel(shape), torch.Generator().manual_seed(c.seed)).to(run.device)
    else:
        model = pretrained.load(pretrained.directory(m.init), LanguageModel, run.device, context=m.context, dropout=m.dropout)
        if m.train_layers >= 0:
            weights = model.state_dict()
            model = build(run, LanguageModel, replace(model.shape, frozen=m.layers - m.train_layers))
            model.load_state_dict({name: weights[name] for name in model.state_dict()})
            del weights
    rows = sft_rows(run)
    loop.fit(run, unit, model, rows, lambda model, index: loop.sft_loss(model, [rows[i] for i in index]),
        lambda index: sum(len(rows[i].responses[0]) for i in index), c.sft, f"{c.seed} {unit}")


def make_member(run, unit):
    """Members differ by the order of the data alone: the seed of the order holds the unit's name."""
    swap, p, margin = treat(torch.zeros(len(run.train[1])), "baseline")
    if k := run.config.ensemble.folds:
        p[torch.from_numpy(data.folds(run.train[0], k, run.config.seed)) == member_number(unit) % k] = torch.nan
    loop.fit_reward_model(run, unit, run.config.ensemble, swap, p, margin, f"{run.config.seed} {unit}")


def member_number(unit):
    return int(unit.removeprefix("member_"))


@functools.cache
def run_of_this_process(config, slot):
    return open_run(config, slot)


def prepare_worker(event):
    files.stop_everywhere = event
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
    context = get_context("spawn")
    files.stop_everywhere = context.Event()
    try:
        with ProcessPoolExecutor(workers, context, prepare_worker, (files.stop_everywhere,)) as pool:
            results = [job.result() for job in [pool.submit(work, *job) for job in jobs]]
    except BrokenProcessPool:
        raise OSError("a process was ended from outside, perhaps for lack of memory; try --train.workers=1") from None
    finally:
        files.stop_everywhere = None
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
    loop.done(run, unit, started, {"doubted": float((mean < 0).float().mean()), "mean": float(mean.mean()), "std": float(std.mean())})
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
    loop.fit_reward_model(run, unit, run.config.reward, *labels, f"{run.config.seed} reward", contrast=run.config.contrast)


def make_meta(run, unit):
    """The reward model of a round: the last one goes on, by MetaRM or, in arm plain, by the same number of plain steps."""
    r, s, order, look = round_of(run, unit), run.config.meta, f"{run.config.seed} {unit}", None
    if r.arm == "meta":
        rows, lines = metarm.sample_responses(run, r.latest, metarm.practice(run), int(files.digest(order), 16) % 2 ** 63)
        files.save_jsonl(run.path(f"samples_{unit}.jsonl"), lines)
        look = metarm.look_ahead(run, rows, s, order)
    loop.fit_reward_model(run, unit, s, *treated_labels(run, s.method), f"{run.config.seed} round {r.number}", start=r.start,
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
    started, depends = time.time(), plan.dependencies(run.config)[unit] if depends is None else depends
    policy, metrics, lines = ppo.train_policy(run, unit, reward_name, files.digest(depends), files.should_stop, **more)
    files.save_jsonl(run.path(unit.replace("policy_", "rollouts_") + ".jsonl"), lines)
    save_model(run, unit, policy)
    loop.done(run, unit, started, {k: metrics[k] for k in ("reward", "kl", "length", "clip_fraction", "explained_variance")}, depends)


def make_evaluation(run, unit):
    started = time.time()
    evaluation.evaluate(run)
    loop.done(run, unit, started, {})


def export(run, state):
    """Write every policy and reward model that is up to date.  state: unit -> why it would have to be made, "" if it need not be"""
    if all(state.values()):
        raise ConfigError(f"--stage=export: {run.config.out_dir} has no model of this configuration; run the same command without --stage first")
    for unit, why in state.items():
        if why:
            print(f"export: {unit} is left out ({'not made yet' if why == 'new' else why})")
            continue
        kind = LanguageModel if unit == "sft" or unit.startswith("policy_") else RewardModel
        pretrained.save(run.path(f"export/{unit}"), load_model(run, kind, unit), run.encoding)
        print(f"export: {run.path(f'export/{unit}')}, {pretrained.ARCHITECTURE[kind]}")


# ---------------------------------------------------------------------------------------------------------------------

MAKE = {"tokenizer": make_tokenizer, "audit": make_audit, "states": make_states, "sft": make_sft, "strength": make_strength, "evaluate": make_evaluation}
MAKE_STAGE = {"ensemble": make_member, "reward": make_reward, "meta": make_meta, "ppo": make_policy}


def execute(config, *only, slot=0):
    """Make everything, or the stages named, that is missing or out of date.  slot: the terminal's line for progress bars"""
    run, every, depends = open_run(config, slot), plan.units(config), plan.dependencies(config)
    files.open_folder(config.out_dir)
    state = {}
    for unit in every:
        made = all(os.path.exists(path) for path in plan.outputs(run, unit))
        state[unit] = files.why_again(files.read_record(config.out_dir, unit), depends[unit], made)
    if only == ("export",):
        return export(run, {unit: why for unit, why in state.items() if unit == "sft" or unit.startswith(("reward_", "meta_", "policy_"))})
    if any(state.values()):
        run.ood_pairs  # read every file now: a mistake in one should not show only after hours of training
        if config.ensemble.folds:
            data.folds(run.pairs["train"], config.ensemble.folds, config.seed)
    for stage in set(only) - {stage for stage, _, _ in every.values()}:
        print(f"{stage}: nothing to do, " + ("meta.rounds is 0" if stage == "meta" else f"{stage}.methods is empty"))
    for stage, here in itertools.groupby(every, lambda unit: every[unit][0]):  # rounds: meta and ppo take turns
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
            for needed in every[unit][2]:
                if state[needed] and every[needed][0] != stage:
                    raise ConfigError(f"--stage={stage}: needs {needed}, which is {state[needed].replace('new', 'missing')}; run --stage={every[needed][0]} first, or leave --stage out")
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
            if value not in (*plan.STAGES, "export"):
                raise ConfigError(f"--stage={value}: must be one of {', '.join(plan.STAGES)}, export")
            stage = value
        else:
            overrides.append((key, value))
    return pretrained.sized(configuration.load(path, overrides)), stage


def guarded(work):
    """Call work(); Ctrl-C and every mistake of the user's become one line.  -> exit code"""
    files.stop_asked = False
    signal.signal(signal.SIGINT, files.ask_to_stop)
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
