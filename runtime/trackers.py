"""Trackers beside log.jsonl, for people who watch runs: --log.tracker=tensorboard or wandb.

Each piece of work (sft, member_00, policy_flip) is a run of the tracker.  It gets the numbers of
its lines of log.jsonl under the same names, at the same steps.
"""
import contextlib
import importlib
import json
import math
import os
from dataclasses import asdict

from config import ConfigError
from runtime import files, inputs

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
NO_METRICS = ("stage", "step", "steps")  # they say where a line belongs


def check(cfg):
    """Raise ConfigError unless the library of log.tracker can be imported."""
    name = cfg.log.tracker
    if name == "none":
        return
    try:
        importlib.import_module(MODULES[name])
    except ImportError as error:
        raise ConfigError(f"log.tracker = {name!r}: {error}; pip install {name}") from None


@contextlib.contextmanager
def opened(run, name, start):
    """run.tracker within it, for the steps of NAME after `start`; closed also after Ctrl-C"""
    if run.cfg.log.tracker == "none" or run.rank > 0:
        yield
        return
    check(run.cfg)
    make = TensorBoard if run.cfg.log.tracker == "tensorboard" else Wandb
    run.tracker = make(run, name, start)
    try:
        yield
    finally:
        run.tracker.close()
        run.tracker = None


def numbers_of(record):
    """A line of log.jsonl -> its finite numbers, {name: value}"""
    return {
        name: value for name, value in record.items()
        if name not in NO_METRICS and isinstance(value, (int, float)) and math.isfinite(value)
    }


class TensorBoard:
    """OUT_DIR/tensorboard/NAME; points of later steps, of a run that was killed, are hidden."""

    def __init__(self, run, name, start):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(run.path(f"tensorboard/{name}"), purge_step=start + 1)

    def log(self, record, step):
        for name, value in numbers_of(record).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a process that is killed loses nothing

    def close(self):
        self.writer.close()


class Wandb:
    """Run NAME, in a group for the output folder, resumed by an id that depends on the settings.

    wandb takes no step twice: those of a run that was killed are there already and stay.
    """

    def __init__(self, run, name, start):
        import wandb
        folder = os.path.realpath(run.cfg.out_dir)
        settings = json.loads(inputs.hide_password(json.dumps(asdict(run.cfg))))
        try:
            self.run = wandb.init(
                project=run.cfg.log.project, group=os.path.basename(folder), name=name,
                id=files.digest([folder, name, run.fingerprint(name)]), resume="allow",
                dir=folder, config=settings, settings=wandb.Settings(console="off", quiet=True),
            )
        except wandb.Error as error:
            raise ConfigError(f"log.tracker = 'wandb': {' '.join(str(error).split())}; run `wandb "
                              "login`, or set WANDB_MODE=offline") from None

    def log(self, record, step):
        if step >= self.run.starting_step:
            self.run.log(numbers_of(record), step=step)

    def close(self):
        self.run.finish()
