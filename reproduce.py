"""python reproduce.py headline [--seeds=3,4,5,6,7] [--config=configs/tiny.toml] [--section.key=value ...]

Experiments over several seeds, each a function that returns a table; every one writes results/NAME.json.  Runs stay in
out/NAME/, so that an experiment that was stopped goes on, and one that is repeated only reads.
"""
import json
import os
import sys

import numpy as np

import files
import train
from config import ConfigError, assign
from evaluate import standard_error, table
from run import gaps_of, open_run


def headline(config, seeds):
    """The built-in world at the given settings: what strength finds, what flipping gains, what PPO gains.

    The gap that flipping closes is (flip - baseline) / (clean - baseline) in accuracy on gold labels, where "clean" is a
    reward model trained on the same pairs, in a world whose annotators make no errors.
    """
    rows = {}
    for seed in seeds:
        noisy = assign(assign(config, "seed", seed), "out_dir", f"out/headline/seed_{seed}")
        train.execute(noisy)
        with open(os.path.join(noisy.out_dir, "results.json")) as file:
            results = json.load(file)
        clean = assign(noisy, "out_dir", f"out/headline/seed_{seed}_clean")
        for key, value in (("world.flip", 0.0), ("world.bias", 0.0), ("world.temperature", 0.0), ("reward.methods", "baseline"), ("ppo.methods", "")):
            clean = assign(clean, key, value)
        for stage in ("sft", "reward"):
            train.execute(clean, stage)
        run = open_run(clean)
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
        rows[seed] = row
    return rows


EXPERIMENTS = {"headline": headline}


def experiment(argv):
    if not argv or argv[0] not in EXPERIMENTS:
        raise ConfigError(f"name an experiment: {', '.join(EXPERIMENTS)}")
    named = [word.removeprefix("--seeds=") for word in argv if word.startswith("--seeds=")]
    seeds = named[-1] if named else "3,4,5,6,7"
    if not all(s.isdigit() for s in seeds.split(",")):
        raise ConfigError(f"--seeds={seeds}: must be whole numbers separated by commas")
    seeds = [int(s) for s in seeds.split(",")]
    config, _ = train.parse(["--config=configs/tiny.toml", *(word for word in argv[1:] if not word.startswith("--seeds="))])
    rows = EXPERIMENTS[argv[0]](config, seeds)
    names = list(rows[seeds[0]])
    summary = {n: {"mean": float(np.mean([rows[s][n] for s in seeds])), "se": standard_error([rows[s][n] for s in seeds]) if len(seeds) > 1 else None}
               for n in names}
    if argv[0] == "headline":  # where a gap is small its share is mostly noise, so the share of the mean gaps stands beside the mean share
        baseline, flip, clean = (summary[f"gold accuracy, {n}"]["mean"] for n in ("baseline", "flip", "clean labels"))
        summary["share of the gap closed by flip, of mean gaps"] = {"mean": (flip - baseline) / (clean - baseline), "se": None}
    files.save_json(f"results/{argv[0]}.json", {"seeds": seeds, "summary": summary, "runs": rows, "versions": files.versions()})
    print("\n" + table(["over seeds " + ", ".join(map(str, seeds)), "mean", "± s.e."], [[n, v["mean"], v["se"]] for n, v in summary.items()]))


if __name__ == "__main__":
    sys.exit(train.guarded(lambda: experiment(sys.argv[1:])))
