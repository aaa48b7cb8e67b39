"""python -m experiments NAME [--seeds=3,4] [--full] [--add] [--config=FILE] [--section.key=value …]

Runs one experiment over several seeds; writes its table to OUT_DIR/results/NAME.json and a figure
to OUT_DIR/results/NAME.png.  Runs stay in OUT_DIR, out/reproduce unless given: a stopped experiment
resumes, a repeated one only reads, and models that two experiments have in common are trained once.
The default is two seeds; --full takes five, and the paper's ten members; --add keeps the seeds that
NAME.json already has under the same settings, and measures the others.  results/ holds those that
the documents speak of.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import json
import os
import re
import sys

import train
from config import Config, ConfigError, as_dict, flatten
from experiments.seeds import load_experiments, measure_seeds, summarize
from experiments.statistics import compare_rows, comparison_table
from runtime import distributed, figures, files
from runtime.cli import run_cli
from runtime.inputs import escape_output, value_text
from runtime.report import table

DEFAULT_DIR = "out/reproduce"


# -----------------------------------------------------------------------------------------------
# Command line

def help_text():
    lines = [__doc__]
    for entry in load_experiments().values():
        first_line = entry.measure.__doc__.splitlines()[0]
        figure = f"{entry.figure}: " if entry.figure else ""
        lines.append(f"    {entry.name:17} {figure}{first_line}")
    return "\n".join(lines)


def parse_seeds(text):
    """The text of --seeds, such as 3,4 -> [3, 4]"""
    if not re.fullmatch("[0-9]{1,10}(,[0-9]{1,10})*", text):
        raise ConfigError(
            f"--seeds={value_text(text)}: must be whole numbers separated by commas"
        )
    seeds = [int(seed) for seed in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds={value_text(text)}: names a seed twice; name each once")
    return seeds


def parse_args(argv):
    """-> Experiment, seeds, Config, whether results of other seeds are kept"""
    names = load_experiments()
    if not argv or argv[0] not in names:
        raise ConfigError(f"name an experiment: {', '.join(names)}")
    entry = names[argv[0]]
    full = "--full" in argv
    seeds = "3,4,5,6,7" if full else "3,4"
    words = [f"--config=configs/{entry.base}.toml", f"--out_dir={DEFAULT_DIR}"]
    if full and entry.base == "labels":
        words.append("--ensemble.members=10")
    for word in argv[1:]:
        if word.startswith("--seeds="):
            seeds = word.removeprefix("--seeds=")
        elif word not in ("--full", "--add"):
            words.append(word)
    config, stage = train.parse_args(words)
    if stage:
        raise ConfigError(f"--stage={stage}: an experiment has no stages")
    return entry, parse_seeds(seeds), config, "--add" in argv


# -----------------------------------------------------------------------------------------------
# Results

def summary_table(title, summary):
    """Numbers as mean ± standard error; curves are left to the figure."""
    columns = {}
    for row in summary.values():
        columns |= {name: None for name in row if not isinstance(row[name]["mean"], list)}
    lines = []
    for name, row in summary.items():
        lines.append([name, *(cell(row.get(column)) for column in columns)])
    return table([title, *columns], lines)


def cell(value):
    if value is None:
        return None
    if value["se"] is None:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} ± {value['se']:.3f}"


# Settings that change no number, or name a place
WITHOUT_EFFECT = ("seed", "out_dir", "threads", "device", "train.workers",
                  "train.checkpoint_minutes", "log.figures", "log.tracker", "log.project")


def plain_settings(config):
    """-> {dotted name: value}, with values as a results file has them"""
    return dict(flatten(json.loads(json.dumps(as_dict(config)))))


def kept_runs(path, config):
    """Seeds of an older results file of the same settings -> {seed: rows}

    Raises ConfigError where a setting differs.
    """
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        old = json.load(file)
    old_settings = plain_settings(Config()) | dict(flatten(old["settings"]))
    for name, value in plain_settings(config).items():
        old_value = old_settings.get(name)
        if name not in WITHOUT_EFFECT and old_value != value:
            raise ConfigError(f"--add: {path} was measured with {name} = {value_text(old_value)}, "
                              f"not {value_text(value)}; leave out --add to replace it")
    return {int(seed): rows for seed, rows in old["runs"].items()}


def save_results(path, entry, config, runs):
    """Write OUT_DIR/results/NAME.json.  runs: {seed: rows} -> the same with the summary"""
    runs = dict(sorted(runs.items()))
    summary = summarize(list(runs.values()))
    if entry.extend_summary:
        entry.extend_summary(summary)
    results = {
        "experiment": entry.name,
        "seeds": list(runs),
        "settings": as_dict(config),
        "summary": summary,
        "runs": runs,
        "versions": files.versions(),
    }
    if entry.comparisons:
        results["comparisons"] = compare_rows(list(runs.values()), entry.comparisons)
    files.save_json(path, results)
    return results


def run_experiment(argv):
    """Measure, summarise, save, print and draw one experiment.

    A results file grows seed by seed; an older one is replaced when the last seed has ended.
    """
    entry, seeds, config, add = parse_args(argv)
    path = os.path.join(config.out_dir, "results", entry.name)
    runs = kept_runs(f"{path}.json", config) if add else {}
    replaces_others = not add and os.path.exists(f"{path}.json")

    def on_seed(seed, rows):
        runs[seed] = rows
        if not replaces_others and distributed.rank() == 0:
            save_results(f"{path}.json", entry, config, runs)

    measure_seeds(entry, [seed for seed in seeds if seed not in runs], config, on_seed)
    if distributed.rank() > 0:
        return
    results = save_results(f"{path}.json", entry, config, runs)
    title = f"{entry.name}, seeds {', '.join(map(str, results['seeds']))}"
    written = [f"{path}.json"]
    print("\n" + summary_table(title, results["summary"]))
    if results.get("comparisons"):
        print("\n" + comparison_table(results["comparisons"]))
        picture = f"{path}_differences.png"
        if figures.draw(figures.forest, results["comparisons"], picture, title):
            written.append(picture)
    if entry.plot and figures.draw(entry.plot, results["summary"], f"{path}.png"):
        written.append(f"{path}.png")
    print("\n" + ", ".join(written))


def main(argv):
    escape_output()
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    return run_cli(lambda: run_experiment(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
