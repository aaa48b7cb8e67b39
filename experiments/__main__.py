"""python -m experiments NAME [--seeds=3,4] [--full] [--config=FILE] [--section.key=value …]

Runs one experiment over several seeds; writes its table to results/NAME.json and a figure to
results/NAME.png.  Runs stay in out/reproduce/: a stopped experiment resumes, a repeated one only
reads, and models that two experiments have in common are trained once.  The default is two seeds;
--full takes five, and the paper's ten members.  Experiments on shifted data start from
configs/shift.toml.  With an --out_dir, results go to OUT_DIR/results/.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import os
import re
import sys

import train
from config import ConfigError, as_dict
from experiments.seeds import load_experiments, measure_seeds, summarize
from runtime import figures, files
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
    return [int(seed) for seed in text.split(",")]


def parse_args(argv):
    """-> Experiment, seeds, Config"""
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
        elif word != "--full":
            words.append(word)
    config, stage = train.parse_args(words)
    if stage:
        raise ConfigError(f"--stage={stage}: an experiment has no stages")
    return entry, parse_seeds(seeds), config


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


def run_experiment(argv):
    """Measure, summarise, save, print and draw one experiment."""
    entry, seeds, config = parse_args(argv)
    runs = measure_seeds(entry, seeds, config)
    summary = summarize(runs)
    if entry.extend_summary:
        entry.extend_summary(summary)
    folder = "results" if config.out_dir == DEFAULT_DIR else os.path.join(config.out_dir, "results")
    path = f"{folder}/{entry.name}"
    files.save_json(f"{path}.json", {
        "experiment": entry.name,
        "seeds": seeds,
        "settings": as_dict(config),
        "summary": summary,
        "runs": dict(zip(seeds, runs)),
        "versions": files.versions(),
    })
    title = f"{entry.name}, seeds {', '.join(map(str, seeds))}"
    print("\n" + summary_table(title, summary))
    if entry.plot and figures.draw(entry.plot, summary, f"{path}.png"):
        print(f"\n{path}.json and {path}.png")
    else:
        print(f"\n{path}.json")


def main(argv):
    escape_output()
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    return run_cli(lambda: run_experiment(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
