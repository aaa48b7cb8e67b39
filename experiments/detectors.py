"""Detectors of doubtful labels (open question 1), and errors that no vote finds (6).

The reward difference d = r(chosen) - r(rejected) makes a pair a two-class example whose label has
probability sigmoid(d) and margin d.  A signal scores each pair twice: suspicion is high for a wrong
label, doubt for an ambiguous pair.
M members, S passes, E evaluations during training, N pairs.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import train
from common import load_model, score_rows
from evaluate import gold_diffs, label_errors
from experiments.registry import experiment
from experiments.shared import change, final_diffs, need_truth, pair_diffs, restrict
from experiments.statistics import against, couples
from labels.votes import load_votes, unseen_diffs
from model import RewardModel
from runtime import figures
from strength import auroc, average_precision, strength
from train import RewardVariant

AMBIGUOUS = 0.51  # an ambiguous pair of the world has a gold difference below it: courtesy at most
DROPOUT = 0.1
DROPOUT_PASSES = 10


# -----------------------------------------------------------------------------------------------
# Signals from reward differences

def small_loss(trace):
    """Mean loss over training: wrong labels are learned late.  arXiv 1706.05394, 1804.06872

    trace: (E, N) reward differences of one model at E evaluations during training -> (N,)
    """
    return F.softplus(-trace).mean(0)


def area_under_margin(trace):
    """Mean margin over training, negated.  (E, N) -> (N,)

    arXiv 2001.10528; with two classes the margin of a label is the reward difference.
    """
    return -trace.mean(0)


def confident_learning(diffs, turned):
    """Labels contradicted with confidence out of sample.  arXiv 1911.00068, sec. 3 (cleanlab)

        1. label y of a pair: the side, in the order shown, that was chosen; p_j: probability of j
        2. threshold t_j: mean of p_j over the pairs labelled j; infinite without such a pair
        3. a pair belongs to the class of largest p_j among those with p_j >= t_j, if there is one
        4. it is an issue if that class is not its label and, as cleanlab adds, likelier than it

    With two classes: the other class is the likelier one and reaches its threshold.

    diffs: (N,) of a model that was not trained on the pair
    turned: (N,) bool, drawn at random: whether the two sides are shown in the other order; in one
    fixed order there would be one class only
    -> issue (N,) bool, suspicion (N,) = 1 - p of the label
    """
    p = torch.as_tensor(diffs).double().sigmoid()  # of the label
    turned = torch.as_tensor(turned)
    threshold = torch.where(turned, p[~turned].mean(), p[turned].mean())  # of the other class
    threshold = threshold.nan_to_num(torch.inf)
    reached = 1 - p >= threshold - 1e-6  # as cleanlab: a mean of equal numbers may exceed them
    return (p < 0.5) & reached, 1 - p


def vote_entropy(diffs):
    """Entropy of the members' votes in nats; ln 2 if half contradict the label.  (M, N) -> (N,)"""
    share = (diffs > 0).double().mean(0)
    return -(torch.special.xlogy(share, share) + torch.special.xlogy(1 - share, 1 - share))


def dropout_uncertainty(diffs):
    """Std over passes with different dropout masks.  arXiv 1506.02142.  (S, N) -> (N,)"""
    return diffs.std(0, correction=0)


# -----------------------------------------------------------------------------------------------
# Evidence: what the signals are computed from

class Evidence(NamedTuple):
    """Reward differences of the training pairs by several models."""

    votes: torch.Tensor       # (M, N) members, each trained on all pairs
    folded: torch.Tensor      # (M, N) members, member m trained without fold m mod K
    held_out: torch.Tensor    # (M / K, N) of them, those that were not trained on the pair
    num_folds: int            # K
    trace: torch.Tensor       # (E, N) one member during its training
    long_trace: torch.Tensor  # (E, N) a reward model during its longer training
    long_cost: float          # cost of that model, in trainings of a member
    passes: torch.Tensor      # (S, N) one model with dropout
    turned: torch.Tensor      # (N,) bool, the order in which the sides are shown
    lengths: torch.Tensor     # (N,) characters of chosen - rejected


def collect_evidence(run, votes):
    """Train the models that the signals need.  votes: (M, N) -> Evidence"""
    cfg = run.cfg
    labels = train.treat_pairs(run, "baseline", votes.mean(0))
    num_folds = 5 if cfg.ensemble.members % 5 == 0 else cfg.ensemble.members
    fold = torch.from_numpy(data.assign_folds(run.train.pairs, num_folds, cfg.seed))
    folded = train_folded(run, labels, fold, num_folds)
    shuffle = torch.Generator().manual_seed(cfg.seed)
    lengths = [len(pair.chosen) - len(pair.rejected) for pair in run.train.pairs]
    return Evidence(
        votes=votes,
        folded=folded,
        held_out=unseen_diffs(folded, fold, num_folds),
        num_folds=num_folds,
        trace=train_traced(run, "traced", labels, cfg.ensemble, evals_per_epoch=4),
        long_trace=train_traced(run, "traced_long", labels, cfg.reward, evals_per_epoch=1),
        long_cost=cfg.reward.epochs / cfg.ensemble.epochs,
        passes=dropout_passes(run, labels),
        turned=torch.rand(len(lengths), generator=shuffle) < 0.5,
        lengths=torch.tensor(lengths, dtype=torch.float32),
    )


def train_folded(run, labels, fold, num_folds):
    """Members that leave out one fold each, as fold_MM.pt.  fold: (N,) -> (M, N)"""
    diffs = []
    for m in range(run.cfg.ensemble.members):
        repeat = m // num_folds
        seed_key = f"reward {repeat}" if repeat else "reward"
        kept = restrict(labels, fold != m % num_folds)
        diffs.append(final_diffs(
            run, f"fold_{m:02d}", kept, run.train.rows, run.cfg.ensemble, seed_key=seed_key
        ))
    return torch.from_numpy(np.stack(diffs))


def train_traced(run, name, labels, cfg, evals_per_epoch):
    """A reward model evaluated on its training pairs while it trains.  -> (E, N)"""
    variant = RewardVariant(evals_per_epoch=evals_per_epoch)
    rewards = train.train_reward_variant(run, name, labels, run.train.rows, variant, cfg)
    return torch.from_numpy(pair_diffs(rewards))


def dropout_passes(run, labels):
    """A model trained with dropout, evaluated under different dropout masks.  -> (S, N)"""
    variant = RewardVariant(evals_per_epoch=0, shape_changes={"dropout": DROPOUT})
    rows = run.train.rows[:1]
    train.train_reward_variant(run, "dropout", labels, rows, variant, run.cfg.ensemble)
    model = load_model(run, RewardModel, "dropout").train()
    torch.manual_seed(run.cfg.seed)
    passes = [score_rows(run, model, run.train.rows) for _ in range(DROPOUT_PASSES)]
    return torch.from_numpy(pair_diffs(torch.stack(passes)))


# -----------------------------------------------------------------------------------------------
# One function a signal

class Signal(NamedTuple):
    name: str
    cost: float               # in trainings of one member
    suspicion: torch.Tensor   # (N,) high: the label is likely wrong
    doubt: torch.Tensor       # (N,) high: the pair is likely ambiguous
    issue: torch.Tensor | None = None  # (N,) bool, the labels that a method calls wrong


def signed(name, cost, diffs):
    """A signal of reward differences (N,): negative is suspicious, near zero is doubtful."""
    return Signal(name, cost, -diffs, -diffs.abs())


def unsigned(name, cost, score):
    """A signal whose score (N,) is both suspicion and doubt."""
    return Signal(name, cost, score, score)


def mean_vote(evidence, q):
    """The paper's strength; the q lowest are called wrong."""
    num_members, n = evidence.votes.shape
    mean = evidence.votes.mean(0)
    issue = torch.zeros(n, dtype=torch.bool)
    issue[mean.argsort()[:round(q * n)]] = True
    signal = signed(f"mean of {num_members} members", num_members, mean)
    return signal._replace(issue=issue)


def mean_of_half(evidence):
    half = len(evidence.votes) // 2
    return signed(f"mean of {half}", half, evidence.votes[:half].mean(0))


def one_member(evidence):
    return signed("one member", 1, evidence.votes[0])


def std_of_vote(evidence):
    num_members = len(evidence.votes)
    std = evidence.votes.std(0, correction=0)
    return unsigned(f"std of {num_members} members", num_members, std)


def entropy_of_votes(evidence):
    num_members = len(evidence.votes)
    entropy = vote_entropy(evidence.votes)
    return unsigned(f"entropy of {num_members} votes", num_members, entropy)


def folds_cost(evidence):
    k = evidence.num_folds
    return len(evidence.folded) * (k - 1) / k


def held_out_mean(evidence):
    num_members = len(evidence.held_out)
    name = f"mean of {num_members} that have not seen the pair, {evidence.num_folds} folds"
    return signed(name, folds_cost(evidence), evidence.held_out.mean(0))


def folded_mean(evidence):
    num_members = len(evidence.folded)
    name = f"mean of all {num_members}, each blind to one of {evidence.num_folds} folds"
    return signed(name, folds_cost(evidence), evidence.folded.mean(0))


def cross_validated_issues(evidence):
    k = evidence.num_folds
    diffs = evidence.held_out[0]
    issue, suspicion = confident_learning(diffs, evidence.turned)
    return Signal(f"confident learning, {k} folds", k - 1, suspicion, -diffs.abs(), issue)


def mean_loss(evidence):
    return unsigned("mean loss over training", 1, small_loss(evidence.trace))


def mean_margin(evidence):
    doubt = -evidence.trace.mean(0).abs()
    return Signal("area under the margin", 1, area_under_margin(evidence.trace), doubt)


def long_mean_loss(evidence):
    loss = small_loss(evidence.long_trace)
    return unsigned("mean loss over long training", evidence.long_cost, loss)


def long_mean_margin(evidence):
    name = "area under the margin, long training"
    suspicion = area_under_margin(evidence.long_trace)
    doubt = -evidence.long_trace.mean(0).abs()
    return Signal(name, evidence.long_cost, suspicion, doubt)


def std_of_passes(evidence):
    name = f"dropout: std of {DROPOUT_PASSES} passes"
    return unsigned(name, 1, dropout_uncertainty(evidence.passes))


def mean_of_passes(evidence):
    return signed(f"dropout: mean of {DROPOUT_PASSES} passes", 1, evidence.passes.mean(0))


def longer_wins(evidence):
    return signed("longer answer wins", 0, evidence.lengths)


def chance(evidence):
    return unsigned("chance", 0, torch.zeros(len(evidence.lengths)))


SIGNALS = (  # after mean_vote, which needs strength.q
    mean_of_half,
    one_member,
    std_of_vote,
    entropy_of_votes,
    held_out_mean,
    folded_mean,
    cross_validated_issues,
    mean_loss,
    mean_margin,
    long_mean_loss,
    long_mean_margin,
    std_of_passes,
    mean_of_passes,
    longer_wins,
    chance,
)


# -----------------------------------------------------------------------------------------------
# The experiments

def plot_detectors(summary, path):
    title = "Detectors of doubtful labels: average precision"
    figures.bars(summary, path, title, ["flips: AP", "bias: AP", "ambiguous: AP"], None)


@experiment(
    "detectors", plot=plot_detectors,
    comparisons=against("mean of 10 members", "flips: AUROC", "flips: AP"),
)
def detectors(config, slot=0):
    """AUROC, average precision and cost of every signal for flips, bias and ambiguous pairs.

    Cost is in trainings of one member.  Wrong labels of a kind are compared with right labels by
    suspicion, ambiguous pairs with all others by doubt.
    """
    need_truth(config)
    run = train.ensure_stages(config, "sft", "ensemble", "strength", slot=slot)
    evidence = collect_evidence(run, load_votes(run)["train"])
    signals = [mean_vote(evidence, config.strength.q)]
    signals += [signal_of(evidence) for signal_of in SIGNALS]
    errors = np.array(label_errors(run))
    ambiguous = torch.from_numpy(np.abs(gold_diffs(run, "train")) < AMBIGUOUS)
    return {signal.name: detection_scores(signal, errors, ambiguous) for signal in signals}


def of_kind(errors, kind):
    """-> pairs that count (N,) bool: right labels and those of the kind; which are of the kind"""
    positive = torch.from_numpy(errors == kind)
    return positive | torch.from_numpy(errors == ""), positive


def detection_scores(signal, errors, ambiguous):
    """errors: (N,) causes, "" for a right label; ambiguous: (N,) bool -> columns of a row"""
    row = {"runs": float(signal.cost)}
    for kind, title in (("flip", "flips"), ("bias", "bias")):
        counted, positive = of_kind(errors, kind)
        suspicion = signal.suspicion[counted]
        row[f"{title}: AUROC"] = auroc(suspicion, positive[counted])
        row[f"{title}: AP"] = average_precision(suspicion, positive[counted])
    row["ambiguous: AUROC"] = auroc(signal.doubt, ambiguous)
    row["ambiguous: AP"] = average_precision(signal.doubt, ambiguous)
    if signal.issue is not None:
        issue = signal.issue.numpy()
        row["called"] = float(issue.mean())
        row["precision"] = float((errors[issue] != "").mean()) if issue.any() else 0.0
    return row


def plot_shared_bias(summary, path):
    columns = [
        "flip: AUROC of the mean",
        "shared: AUROC of the mean",
        "vote on validation: labels",
        "vote on validation: gold",
    ]
    figures.bars(summary, path, "A liking for length that all annotators share", columns)


@experiment(
    "shared_bias", plot=plot_shared_bias,
    comparisons=couples(
        {"liking 1.5": "liking 0.0"},
        "flip: AUROC of the mean", "right: mean strength", "vote on validation: labels",
        "vote on validation: gold",
    ),
)
def shared_bias(config, slot=0):
    """Length bias that all annotators share: every member repeats its errors, so no vote helps."""
    need_truth(config)
    rows = {}
    for liking in (0.0, 1.5):
        settings = {
            "world.shared": liking,
            "world.bias": 0.0,
            "out_dir": f"{config.out_dir}_shared_{liking}",
        }
        rows[f"liking {liking}"] = biased_vote(change(config, settings), slot)
    return rows


def biased_vote(config, slot):
    """-> how well the vote finds flips and shared errors, columns of a row"""
    run = train.ensure_stages(config, "sft", "ensemble", "strength", slot=slot)
    votes = load_votes(run)
    mean, std = strength(votes["train"])
    valid_mean, _ = strength(votes["valid"])
    errors = np.array(label_errors(run))
    gold = gold_diffs(run, "valid")
    row = {"wrong labels": float((errors != "").mean())}
    for kind in ("flip", "shared"):
        counted, positive = of_kind(errors, kind)
        if not positive.any():
            continue
        row[f"{kind}: share"] = float(positive.double().mean())
        row[f"{kind}: AUROC of the mean"] = auroc(-mean[counted], positive[counted])
        row[f"{kind}: AUROC of the std"] = auroc(std[counted], positive[counted])
        row[f"{kind}: mean strength"] = float(mean[positive].mean())
    row["right: mean strength"] = float(mean[torch.from_numpy(errors == "")].mean())
    row["vote on validation: labels"] = float((valid_mean > 0).float().mean())
    row["vote on validation: gold"] = float((valid_mean.numpy() * gold > 0).mean())
    return row
