"""What the tests of whole runs do with a small run."""
import itertools
import json
import os
import shutil
import signal

import torch
from helpers import SMALL

import config
import train
from runtime import figures, files, signals
from runtime.run import Run, open_run


def copy_run(folder, out):
    """Copy a run with the times of its files -> the new folder"""
    return shutil.copytree(folder, out, dirs_exist_ok=True)


def settings_of(words):
    """["--section.key=value"] -> [(key, value)]"""
    pairs = []
    for word in words:
        key, _, value = word.removeprefix("--").partition("=")
        pairs.append((key, value))
    return pairs


def load_config(*words, small=SMALL):
    """-> Config of the words as train.py reads them"""
    return config.load(None, settings_of([*small, *words]))


def opened(out, *words, small=SMALL):
    """-> Run of the folder"""
    return open_run(load_config(*words, f"--out_dir={out}", small=small))


def checked(out, *words):
    """-> {name: what is known} of all the work of a configuration, without doing any"""
    run = opened(out, *words)
    train.check_stages(run)
    return run.known


def depends_on(out, *words):
    """-> {name: what it depends on}"""
    return {name: known.depends for name, known in checked(out, *words).items()}


def reasons(out, *words):
    """-> {name: why it has to be made, "" if it is up to date}"""
    return {name: known.reason for name, known in checked(out, *words).items()}


def read_lines(path):
    """A JSON Lines file -> [record]"""
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(run, name):
    """Lines of log.jsonl of one piece of work"""
    with open(run.path("log.jsonl")) as file:
        return [line for line in map(json.loads, file) if line["stage"] == name]


def forget(out, *names):
    """Remove the records of finished work, so that it has to be done again."""
    for name in names:
        os.remove(out / "stages" / f"{name}.json")


def change_times(out, pattern="*.pt"):
    """-> {name: time of the last change} of files of a run"""
    return {path.name: path.stat().st_mtime_ns for path in out.glob(pattern)}


def stop_after(patch, steps):
    """Step number `steps` of a training loop is the last: then a signal comes.

    patch: of pytest's monkeypatch.  The loops call should_save() once a step.
    """
    should_save = Run.should_save
    num_calls = itertools.count(1)

    def signal_in_last_step(run):
        if next(num_calls) == steps:
            patch.setattr(signals, "stop_signal", signal.SIGINT)
        return should_save(run)

    patch.setattr(Run, "should_save", signal_in_last_step)


def relative_distance(a, b, start):
    """Distance of two trained models, in units of how far the first one has moved from the start.

    a, b, start: state dicts; 0 if a equals b, 1 if b is still the start
    """
    apart = sum(float((a[key].double() - b[key].double()).square().sum()) for key in a)
    moved = sum(float((a[key].double() - start[key].double()).square().sum()) for key in a)
    return (apart / moved) ** 0.5


def model_state(run, name):
    """Weights of NAME.pt -> state dict"""
    return files.load_tensors(run.path(f"{name}.pt"))["model"]


def clone(model):
    """A copy of a model's state dict that training does not change"""
    return {key: torch.clone(value) for key, value in model.state_dict().items()}


def without_figures(patch):
    """Leave figures out, which take longer than the training of small runs."""
    patch.setattr(figures, "draw", lambda *arguments, **options: False)
