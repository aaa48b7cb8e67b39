"""Evaluation of a reward model while it trains: early stopping, and the best weights kept.

The pairs that it is evaluated on are training pairs, held out from this reward model by first human
turn; validation pairs, whose accuracy is reported, decide nothing.  Held-out labels are treated as
those trained on are: flipped, softened or given a margin, and left out where they are dropped.  So
no label that the treatment takes for wrong chooses the model.  The vote, which treats them, has
read them, so that these numbers are no measure of a treatment.

The best evaluation has the highest accuracy, and of equal ones the lowest loss.  The loss alone
rises with the confidence in labels that stay wrong, while the ranking still improves.
"""
import torch
from tqdm import tqdm

from common import file_weights, score_rows
from config import ConfigError
from data import is_held_out, treated_rows
from losses import bradley_terry
from runtime import distributed

FEW = 50  # pairs: the standard error of an accuracy is .07
SETTINGS = ("reward.evals_per_epoch", "reward.heldout_share", "reward.keep", "reward.patience")


def held_out(run):
    """Which training pairs no reward model is trained on -> (N,) bool

    Raises ConfigError where these are none, or all.
    """
    share = run.cfg.reward.heldout_share
    seed = f"{run.cfg.seed} heldout"
    is_out = torch.tensor([is_held_out(pair, share, seed) for pair in run.train.pairs])
    if not is_out.any() or is_out.all():
        change = "lower" if is_out.any() else "raise"
        raise ConfigError(f"reward.heldout_share = {share}: holds out {int(is_out.sum())} of the "
                          f"{len(is_out)} training pairs; {change} it, or set "
                          "reward.evals_per_epoch=0")
    return is_out


def hold_out(run, name, labels, variant):
    """Leave the held-out pairs out of a training, and evaluate it on them.

    labels: swap, p, margin of every training pair; variant: train.RewardVariant -> both, changed
    """
    swap, p, margin = labels
    is_out = held_out(run)
    num_out = int(is_out.sum())
    tqdm.write(f"{name}: {num_out:,} of {len(is_out):,} training pairs are held out for its "
               "evaluation")
    if num_out < FEW:
        tqdm.write(f"warning: {name}: chance decides much on fewer than {FEW} pairs; raise "
                   "reward.heldout_share")
    remaining = swap, torch.where(is_out, torch.nan, p), margin
    stopping = EarlyStopping(run, name, labels, is_out & ~p.isnan())
    variant = variant._replace(
        eval_fn=stopping.score, evals_per_epoch=run.cfg.reward.evals_per_epoch, stopping=stopping,
    )
    return remaining, variant


class EarlyStopping:
    """What the evaluations of one training have shown so far.

    It is a part of the checkpoint, so that a resumed training keeps what one that was not stopped
    keeps.
    """

    def __init__(self, run, name, labels, is_used):
        """labels: swap, p, margin of every training pair; is_used: (N,) bool, those evaluated on"""
        self.run = run
        self.name = name
        self.settings = run.cfg.reward
        index = is_used.nonzero()[:, 0]
        swap, p, margin = labels
        weight = file_weights(run)
        self.weight = torch.ones(len(index)) if weight is None else weight[index]
        if not self.weight.any():
            raise ConfigError(f"{name}: no held-out pair has a label and a weight; raise "
                              "reward.heldout_share, or set reward.evals_per_epoch=0")
        self.p = p[index]
        self.margin = margin[index]
        self.rows = treated_rows(run.train.rows, index, swap)
        self.last = {}       # the last evaluation, as the record has it
        self.best = {}
        self.best_weights = {}
        self.num_worse = 0   # evaluations since the best one

    def score(self, model):
        """-> rewards of the held-out pairs, (n, 2)"""
        return score_rows(self.run, model, self.rows, f"{self.name} held out")

    def update(self, step, model, rewards):
        """Note the evaluation after a step.  rewards: of score"""
        if self.run.world_size > 1:  # one rounding must not end the training of one rank alone
            rewards = torch.tensor(distributed.agree(rewards.tolist()))
        chosen, rejected = rewards.unbind(1)
        is_right = torch.where(self.p < 0.5, chosen < rejected, chosen > rejected)
        self.last = {
            "kept_step": step,
            "heldout_loss": self.mean(bradley_terry(chosen, rejected, self.margin, self.p)),
            "heldout_accuracy": self.mean(is_right.float()),
        }
        is_best = not self.best or quality(self.last) > quality(self.best)
        self.num_worse = 0 if is_best else self.num_worse + 1
        if is_best:
            self.best = self.last
        if is_best and self.settings.keep == "best":
            self.best_weights = on_cpu(model.state_dict())
        numbers = {key: value for key, value in self.last.items() if key != "kept_step"}
        self.run.log(stage=self.name, step=step, **numbers)
        text = ", ".join(f"{key.replace('_', ' ')} {x:.3f}" for key, x in numbers.items())
        tqdm.write(f"{self.name}: step {step}, {text}{', the best so far' if is_best else ''}")

    def mean(self, values):
        """(n,) -> weighted mean"""
        return float((values * self.weight).sum() / self.weight.sum())

    @property
    def is_over(self):
        return 0 < self.settings.patience <= self.num_worse

    def finish(self, model):
        """Put the weights that are kept into the model.  -> what the record says of them"""
        if self.settings.keep == "last":
            return self.last
        model.load_state_dict(self.best_weights)
        tqdm.write(f"{self.name}: keeps the weights of step {self.best['kept_step']}, after "
                   f"{self.last['kept_step']} steps")
        return self.best

    # ------------------------------------------------------------------------------------------
    # Of the checkpoint

    STATE = ("last", "best", "best_weights", "num_worse")

    def state_dict(self):
        return {key: getattr(self, key) for key in self.STATE}

    def load_state_dict(self, state):
        for key in self.STATE:
            setattr(self, key, state[key])
        self.best_weights = on_cpu(self.best_weights)  # resume has put them on the device


def quality(evaluation):
    return evaluation["heldout_accuracy"], -evaluation["heldout_loss"]


def on_cpu(weights):
    """A copy of a state dict in memory that is not the device's"""
    return {key: x.to("cpu", copy=True) for key, x in weights.items()}
