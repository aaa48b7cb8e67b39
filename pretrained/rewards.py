"""Reward models made elsewhere: reward.init, a Hugging Face folder with a head of one label.

Members, reward models and rounds of MetaRM then start from it, head and all, in the place of the
SFT model with a new head.  Its token ids must mean what those of the policies mean.
"""
import os

from tqdm import tqdm

from config import ConfigError
from model import RewardModel
from pretrained import hub, tokenizer, weights


def load(run, **shape_changes):
    """-> RewardModel on the run's device.  Raises ConfigError, which names what does not fit"""
    folder = fitting_folder(run)
    changes = {"context": run.cfg.model.context, "dropout": run.cfg.model.dropout} | shape_changes
    return weights.load(folder, RewardModel, run.device, **changes)


def check(run):
    """Raise ConfigError unless the model of reward.init fits the run; say what is doubtful."""
    template = tokenizer.template_of(fitting_folder(run))
    if template != run.cfg.data.template:
        tqdm.write(f"reward.init = {run.cfg.reward.init}: its chat template is of the form "
                   f"{template}, and it reads dialogues of the form data.template = "
                   f"{run.cfg.data.template}")


def fitting_folder(run):
    """-> the folder of reward.init.  Raises ConfigError unless its model fits the run"""
    init = run.cfg.reward.init
    folder = hub.directory(init, "reward.init")
    shape = weights.shape_of(folder, RewardModel)
    if run.cfg.model.context > shape.context:
        raise ConfigError(f"model.context = {run.cfg.model.context}: must be at most "
                          f"{shape.context}, the longest that reward.init = {init} supports")
    theirs = tokenizer.load(folder, shape.vocab)
    ours = run.tokenizer
    same_text = (theirs.ranks, theirs.pattern, theirs.nfc) == (ours.ranks, ours.pattern, ours.nfc)
    if not same_text or not ours.special.items() <= theirs.special.items():
        policy = run.cfg.model.init
        whose = "the one trained on the data" if policy == "scratch" else f"that of {policy}"
        raise ConfigError(f"reward.init = {init}: its tokenizer is not {whose}, and token ids "
                          "would mean something else to it; give a model.init with the same one")
    return folder


def facts(run):
    """What records of models that start from reward.init depend on -> dictionary, {} without it"""
    init = run.cfg.reward.init
    if not init:
        return {}
    name = os.path.basename(os.path.realpath(init))
    return {"reward.init": name, "its weights": hub.digest(init, "reward.init")}
