"""python reproduce.py NAME [--seeds=3,4] [--full] [--config=configs/tiny.toml] [--section.key=value ...]

Experiments over several seeds.  Each writes its table to results/NAME.json and a figure to results/NAME.png.  Runs stay in
out/reproduce/, so that an experiment that was stopped goes on, one that is repeated only reads, and what two have in
common is trained once.  By default two seeds; --full takes five and the paper's ten members.  Experiments on shifted data
start from configs/shift.toml.
"""
import json
import os
import sys

import numpy as np
import torch

import config as configuration
import data
import figures
import files
import labels
import shift
import policies
import train
import world
from config import ConfigError, assign
from evaluate import table
from files import Stopped
from run import gaps_of, open_run


def headline(config, slot=0):
    """The built-in world at the given settings: what strength finds, what flipping gains, what PPO gains.

    The gap that flipping closes is (flip - baseline) / (clean - baseline) in accuracy on gold labels, where "clean" is a
    reward model trained on the same pairs, in a world whose annotators make no errors.
    """
    labels.need_truth(config)
    train.execute(config, slot=slot)
    with open(os.path.join(config.out_dir, "results.json")) as file:
        results = json.load(file)
    clean = assign(config, "out_dir", f"{config.out_dir}_clean")
    for key, value in (("world.flip", 0.0), ("world.bias", 0.0), ("world.temperature", 0.0), ("reward.methods", "baseline"), ("ppo.methods", "")):
        clean = assign(clean, key, value)
    train.execute(clean, "sft", "reward", slot=slot)
    run = open_run(clean, slot)
    flip, reward, policy = results["noise"]["flip"], results["reward"], results["policy"]
    row = {"wrong labels": results["noise"]["all"]["count"] / config.world.pairs,
           "AUROC of the mean, random flips": flip["auroc_mean"], "AUROC of one member, random flips": flip["auroc_single"],
           "AUROC of the mean, all wrong labels": results["noise"]["all"]["auroc_mean"],
           "gold accuracy, longer wins": reward["baseline"]["valid"]["gold_longer_wins"],
           "gold accuracy, baseline": reward["baseline"]["valid"]["gold_accuracy"],
           "gold accuracy, flip": reward["flip"]["valid"]["gold_accuracy"],
           "gold accuracy, clean labels": float((gaps_of(run, "reward_baseline", run.valid[1]) > 0).float().mean())}
    row["share of the gap closed by flip"] = ((row["gold accuracy, flip"] - row["gold accuracy, baseline"])
                                              / (row["gold accuracy, clean labels"] - row["gold accuracy, baseline"]))
    for method in config.ppo.methods:
        p = policy[f"policy_{method}"]
        row |= {f"PPO on {method}: win - lose against SFT": p["win"] - p["lose"], f"PPO on {method}: gold reward": p["judge"],
                f"PPO on {method}: KL": p["kl"]}
    row["SFT: gold reward"] = policy["sft"]["judge"]
    return {name: {"value": value} for name, value in row.items()}


def add_share_of_mean_gaps(summary):
    """Where a gap is small its share is mostly noise, so the share of the mean gaps stands beside the mean share."""
    baseline, flip, clean = (summary[f"gold accuracy, {n}"]["value"]["mean"] for n in ("baseline", "flip", "clean labels"))
    summary["share of the gap closed by flip, of mean gaps"] = {"value": {"mean": (flip - baseline) / (clean - baseline), "se": None}}


DEFAULT = "out/reproduce"  # with another --out_dir, results go there too
ACCURACY = {"accuracy by the labels": "curve: labels", "accuracy by gold": "curve: gold"}
ROUNDS = {"gold reward": "gold reward", "wins − losses against plain PPO": "win - lose against plain PPO",
          "gold reward, out of distribution": "gold reward, ood", "reward model: accuracy by gold": "reward model: gold accuracy"}
EXPERIMENTS = {  # name: (what it measures, how it is drawn)
    "headline": (headline, None),
    "histograms": (labels.histograms, lambda s, path: figures.curves_xy(s, path, "Fig. 1: preference strength", "curve: value", "curve: density", "density of training pairs")),
    "groups": (labels.by_groups, lambda s, path: figures.by_row(s, path, "Fig. 2: the vote in twenty groups of training pairs", "group, weakest first",
        {"mean strength": {"": "mean"}, "std": {"": "std"}, "share of wrong labels": {"": "wrong labels"}})),
    "agreement": (labels.agreement, lambda s, path: figures.by_row(s, path, "Fig. 3: are the labels of validation pairs right?", "strength group, weakest first",
        {"agreement with the truth": {"": "agreement with the truth"}})),
    "deciles": (labels.deciles, lambda s, path: figures.by_row(s, path, "Fig. 4: trained on one tenth alone", "tenth of the training pairs, weakest first",
        {"validation accuracy": {"by the labels": "labels, end", "by gold": "gold, end", "the paper, by the labels": "the paper: labels"}, "validation loss": {"": "loss, end"}}, chance=0.5)),
    "swapped": (labels.swapped, lambda s, path: figures.by_epoch(s, path, "Fig. 5: the two weakest tenths alone, as they are and swapped", ACCURACY)),
    "strongest": (labels.strongest, lambda s, path: figures.by_epoch(s, path, "Fig. 6: the strongest tenth alone", ACCURACY | {"validation loss": "curve: loss"})),
    "treatments": (labels.treatments, lambda s, path: figures.by_epoch(s, path, "Fig. 8: all data, every treatment",
        ACCURACY | {"where label and gold agree": "curve: intersection", "validation loss": "curve: loss"})),
    "subsets": (labels.subsets, lambda s, path: figures.by_row(s, path, "Fig. 21, 22: growing subsets", "share of the training pairs",
        {f"accuracy by {k}": {f"from the {e} up" if e == "weakest" else f"from the {e} down": f"{e}: {k}, end" for e in ("weakest", "strongest")} for k in ("labels", "gold")}, chance=0.5)),
    "bins": (labels.bins, lambda s, path: figures.by_row(s, path, "Fig. 27, 28: where treatments differ", "strength group of validation pairs, weakest first",
        {f"accuracy by the {k}" if k == "labels" else f"accuracy by {k}": {m: f"{m}: {k}" for m in labels.PAPER + labels.OTHERS} for k in ("labels", "gold")})),
    "inflation": (labels.inflation, lambda s, path: figures.by_epoch(s, path, "Fig. 19, 20: rewards over training (plain model)",
        {"mean reward of the chosen": "curve: chosen", "mean reward of the rejected": "curve: rejected", "gap": "curve: gap"}, "eighths of an epoch")),
    "reliability": (labels.reliability, lambda s, path: figures.overlay(s, path, "How sure each treatment is, and how often it is right (validation labels)",
        "curve: confidence", "curve: share right", "confidence", "share right", (0.5, 1))),
    "detectors": (labels.detectors, lambda s, path: figures.bars(s, path, "Detectors of doubtful labels: average precision", ["flips: AP", "bias: AP", "ambiguous: AP"], chance=None)),
    "shared_bias": (labels.shared_bias, lambda s, path: figures.bars(s, path, "A liking for length that all annotators share",
        ["flip: AUROC of the mean", "shared: AUROC of the mean", "vote on validation: labels", "vote on validation: gold"])),
    "representations": (shift.representations, lambda s, path: figures.scatter(s, path, "Fig. 11: final states of chosen and rejected answers, on their two principal components")),
    "contrast": (shift.contrast, lambda s, path: figures.bars(s, path, "Reward models with contrastive terms: accuracy by gold",
        ["gold, end", *(f"gold, {d}" for d in world.HELD_OUT_DOMAINS)])),
    "transfer": (shift.transfer, lambda s, path: figures.bars(s, path, "Accuracy by the labels, in and out of distribution", [*next(iter(s.values()))])),
    "shifts": (shift.shifts, lambda s, path: figures.bars(s, path, "Accuracy by gold under kinds of shift",
        [*next(iter(s.values()))])),
    "rounds": (shift.rounds, lambda s, path: figures.by_round(s, path, "Rounds of MetaRM, of plain steps, and of PPO alone (Tables 2 and 3, Fig. 15)",
        ROUNDS)),
    "rounds_ood": (shift.rounds_ood, lambda s, path: figures.by_round(s, path, "Rounds on prompts out of distribution (Fig. 15)", ROUNDS)),
    "spread": (shift.spread, lambda s, path: figures.overlay(s, path, "Fig. 16: how far reward models tell new answers of the policy apart",
        "curve: value", "curve: density", "difference of reward, in mean differences on validation pairs", "density of pairs of answers")),
    "one_round": (shift.one_round, lambda s, path: figures.overlay(s, path, "How far reward models tell answers of the SFT model apart",
        "curve: value", "curve: density", "difference of reward, in mean differences on validation pairs", "density of pairs of answers")),
    "noise": (shift.noise, lambda s, path: figures.by_row(s, path, "MetaRM against label noise", "labels flipped",
        {y: {arm: f"{arm}: {column}" for arm in ("plain PPO", "plain", "meta")} for y, column in
         (("accuracy by gold", "gold accuracy"), ("answers of the policy ranked right", "ranked right"), ("wins − losses against SFT", "win - lose"))})),
    "orders": (shift.orders, lambda s, path: figures.bars(s, path, "The look-ahead, first order and exact", ["gold accuracy", "ranked right", "below 0.2"])),
    "overoptimisation": (policies.overoptimisation, lambda s, path: figures.against(s, path, "What the proxy promises and what comes of it", "curve: root KL",
        "√KL to the SFT model, nats an answer", {"gold reward": "curve: gold", "proxy, in std of SFT's answers": "curve: proxy"})),
    "denoised": (policies.denoised, lambda s, path: figures.bars(s, path, "PPO on noisy and on cleaned labels", ["gold reward", "right answers"], chance=None)),
    "verifier": (policies.verifier, lambda s, path: figures.bars(s, path, "A program as judge", ["success"], chance=None)),
    "votes": (labels.votes, lambda s, path: figures.bars(s, path, "Strength and human votes", ["rank correlation with votes", "AUROC, majority against the label", "AUROC, 3-2"])),
}


def measure(name, config, slot, threads):
    """One seed, perhaps in a process of its own -> {row: {column: number or list}}, or False if it was stopped"""
    torch.set_num_threads(threads)
    try:
        return EXPERIMENTS[name][0](config, slot)
    except Stopped:
        return False


def summarise(runs):
    """[{row: {column: number or list}}], a dictionary a seed -> the same with {"mean", "se"} over seeds for each number"""
    out = {}
    for row in runs[0]:
        out[row] = {}
        for column in dict.fromkeys(c for run in runs for c in run[row]):
            values = np.array([run[row][column] for run in runs if column in run[row]], float)  # a kind of error may not occur
            if column.startswith("points"):  # of a picture: a mean over seeds would mean nothing
                values = values[:1]
            se = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
            out[row][column] = {"mean": values.mean(0).tolist(), "se": None if se is None else se.tolist()}
    return out


def summary_table(name, summary):
    """Numbers as mean ± s.e.; curves are left to the figure."""
    columns = list(dict.fromkeys(c for row in summary.values() for c, v in row.items() if not isinstance(v["mean"], list)))
    cell = lambda v: None if v is None else f"{v['mean']:.3f}" + (f" ± {v['se']:.3f}" if v["se"] is not None else "")
    return table([name, *columns], [[row, *(cell(values.get(c)) for c in columns)] for row, values in summary.items()])


def experiment(argv):
    if not argv or argv[0] not in EXPERIMENTS:
        raise ConfigError(f"name an experiment: {', '.join(EXPERIMENTS)}")
    name, full = argv[0], "--full" in argv
    named = [word.removeprefix("--seeds=") for word in argv if word.startswith("--seeds=")]
    seeds = named[-1] if named else "3,4,5,6,7" if full else "3,4"
    if not all(s.isdigit() for s in seeds.split(",")):
        raise ConfigError(f"--seeds={seeds}: must be whole numbers separated by commas")
    seeds = [int(s) for s in seeds.split(",")]
    words = [word for word in argv[1:] if word != "--full" and not word.startswith("--seeds=")]
    on_shift = EXPERIMENTS[name][0].__module__ == "shift"
    config, stage = train.parse([f"--config=configs/{'shift' if on_shift else 'tiny'}.toml", f"--out_dir={DEFAULT}", *(["--ensemble.members=10"] if full and not on_shift else []), *words])
    if stage:
        raise ConfigError(f"--stage={stage}: an experiment has no stages")
    source = "labels" if config.data.train == ("world",) else data.short_name(config.data.train[0])
    folder = os.path.join(config.out_dir, "shift" if on_shift and source == "labels" else source)
    configs = [assign(assign(config, "seed", seed), "out_dir", f"{folder}/seed_{seed}") for seed in seeds]
    cores = config.threads or torch.get_num_threads()
    workers = min(config.train.workers or (1 if torch.cuda.is_available() and config.device != "cpu" else cores), len(seeds))
    jobs = [(name, c, 1 + i % workers if workers > 1 else 0, max(1, cores // workers)) for i, c in enumerate(configs)]
    runs = train.side_by_side(measure, jobs, workers) if workers > 1 else [measure(*job) for job in jobs]
    if False in runs:
        raise Stopped
    summary = summarise(runs)
    if name == "headline":
        add_share_of_mean_gaps(summary)
    where = "results" if config.out_dir == DEFAULT else os.path.join(config.out_dir, "results")
    files.save_json(f"{where}/{name}.json", {"experiment": name, "seeds": seeds, "settings": configuration.as_dict(config), "summary": summary,
                                             "runs": dict(zip(seeds, runs)), "versions": files.versions()})
    print("\n" + summary_table(f"{name}, seeds {', '.join(map(str, seeds))}", summary))
    if EXPERIMENTS[name][1]:
        EXPERIMENTS[name][1](summary, f"{where}/{name}.png")
        print(f"\n{where}/{name}.json and {where}/{name}.png")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__ + "\n" + "\n".join(f"    {name:12} {(measure.__doc__ or '').splitlines()[0]}" for name, (measure, _) in EXPERIMENTS.items()))
        sys.exit(0)
    sys.exit(train.guarded(lambda: experiment(sys.argv[1:])))
