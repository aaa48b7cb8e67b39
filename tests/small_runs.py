"""What the tests of whole runs do with a small run."""
import itertools
import json
import os
import shutil
import signal

import torch
from helpers import HH_SMALL, SMALL, tiny

import config
import train
from pretrained import export
from runtime import files, signals
from runtime.run import Run, open_run
from tokenizer import train_tokenizer


def without(words, *names):
    """The words but for these settings of the model"""
    settings = tuple(f"--model.{name}=" for name in names)
    return [word for word in words if not word.startswith(settings)]


# Small runs on a pretrained model, which sets its own sizes
PRETRAINED = without(HH_SMALL, "layers", "width", "heads", "kv_heads", "vocab")
STATES = without(PRETRAINED, "dropout")
STATES += ["--ensemble.voters=states", "--ensemble.folds=4", "--ensemble.fold_by=pair",
           "--reward.methods=", "--ppo.methods=", "--data.valid_share=0"]


def words_of(i):
    """-> a good and a bad answer of about the same length"""
    return f" kind and warm {i % 7}", f" rude and cold {i % 5}"


def write_base(folder):
    """A pretrained model in hf/, and 120 pairs, of which ten are wrong, in mine.jsonl -> folder"""
    texts = [f"\n\nHuman: question {i}?\n\nAssistant:{a}{b}" for i in range(40)
             for a, b in [words_of(i)]]
    tokenizer = train_tokenizer(texts, 300)
    model = tiny(vocab=tokenizer.vocab_size, kv_heads=2, context=96)
    export.save(folder / "hf", model, tokenizer)
    with open(folder / "mine.jsonl", "w") as file:
        for i in range(120):
            good, bad = words_of(i)
            record = {"prompt": f"\n\nHuman: question {i // 2}?\n\nAssistant:", "chosen": good,
                      "rejected": bad, "batch": "ab"[i % 2]}
            if i % 12 == 5:
                record |= {"chosen": bad, "rejected": good}
            file.write(json.dumps(record) + "\n")
    return folder


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
