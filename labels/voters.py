"""Voters on frozen states: one linear head for every view of the answers.

Voters differ in what they see, and each pair gets the votes of heads that were not trained on it.
The view of ratings and that of the surface vote where the mean vote is better with them, by its
loss out of fold: the labels that were given decide, nothing else.
N training pairs, Nv validation pairs, M voters.
"""
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from labels import views
from labels.heads import L2S, mean_loss, out_of_fold, principal_axes


class Votes(NamedTuple):
    """Reward differences of M voters, and which voters they are."""
    train: Tensor  # (M, N) out of fold
    valid: Tensor  # (M, Nv)
    voter: Tensor  # (M,) int64, number among voter_names
    l2: Tensor     # (M,) of each voter's heads


def voter_names(num_layers: int) -> list[str]:
    """The names of all voters that there may be, in order"""
    names = [f"layer {v.layer}, {v.pooling}" for v in views.state_views(num_layers)]
    return [*names, "surface", "ratings"]


def differences(run, wanted=None):
    """Yields number and differences (N + Nv, D) of the voters' views, training pairs first.

    wanted: numbers of voters, by default of all; there are no ratings where no answers recur
    """
    saved = run.load_tensors("views.pt")
    num_states = saved["states"].shape[1]
    surface, ratings = num_states, num_states + 1
    wanted = range(num_states + 2) if wanted is None else wanted
    where = views.find_answers(saved["digests"], [*run.train.rows, *run.valid.rows])
    for v in range(num_states):
        if v in wanted:
            yield v, views.state_differences(saved["states"][:, v], where)
    pairs = [*run.train.pairs, *run.valid.pairs]
    if surface in wanted:
        with run.bar(len(pairs), "words of the answers") as bar:

            def shown(pairs):
                for pair in pairs:
                    yield pair
                    bar.update()

            yield surface, views.surface_differences(pairs, shown)
    if ratings in wanted:
        diff = views.rating_differences(pairs)
        if diff is not None:
            yield ratings, diff


def first_vote(run, fold: Tensor) -> Votes:
    """The votes on the labels of run.train.  fold: (N,) of its pairs"""
    names = voter_names(run.cfg.model.layers)
    with run.bar(len(names), "linear heads") as bar:
        columns = []
        l2s = []
        for _, diff in differences(run):
            votes, l2 = fit_view(diff, fold, [torch.ones(len(fold))], L2S)[0]
            columns.append(votes)
            l2s.append(l2)
            bar.update()
            run.stop_if_asked()
    kept = choose(torch.stack(columns)[:, :len(fold)], num_states=len(names) - 2)
    votes = torch.stack([columns[m] for m in kept]).float()
    return Votes(
        votes[:, :len(fold)], votes[:, len(fold):], torch.tensor(kept),
        torch.tensor([l2s[m] for m in kept]),
    )


def votes_on_copies(run, fold: Tensor, signs: list[Tensor], voter, l2) -> list[Tensor]:
    """The same voters, fitted anew to copies of the labels.

    signs: of each copy, (N,) 1 for a label as given and -1 where it is exchanged
    voter, l2: (M,) as in Votes -> (M, N) for each copy, in the direction of its labels
    """
    l2_of = dict(zip(voter.tolist(), l2.tolist()))
    columns = [[] for _ in signs]
    with run.bar(len(l2_of), "linear heads on planted flips") as bar:
        for m, diff in differences(run, l2_of):
            for column, (votes, _) in zip(columns, fit_view(diff, fold, signs, (l2_of[m],))):
                column.append(votes[:len(fold)])
            bar.update()
            run.stop_if_asked()
    return [torch.stack(column).float() for column in columns]


def fit_view(diff, fold, signs, l2s):
    """Heads of one view -> [(votes (N + Nv,), l2)], one for each copy of the labels"""
    features = principal_axes(diff)
    num_valid = len(diff) - len(fold)
    fold = torch.cat((fold, torch.full((num_valid,), -1)))
    out = []
    for sign in signs:
        sign = torch.cat((sign, torch.ones(num_valid)))
        votes, _, l2 = out_of_fold(features, sign, fold, l2s)
        out.append((votes, l2))
    return out


def choose(votes: Tensor, num_states: int) -> list[int]:
    """Which voters count: those of states, and each other one that lowers the loss of the mean.

    votes: (M, N), those of states first -> numbers of the voters
    """
    kept = list(range(num_states))
    for m in range(num_states, len(votes)):
        if mean_loss(votes[[*kept, m]].mean(0)) < mean_loss(votes[kept].mean(0)):
            kept.append(m)
    return kept


def print_voters(run, votes: Votes):
    """One line: who votes."""
    names = voter_names(run.cfg.model.layers)
    listed = ", ".join(names[m] for m in votes.voter.tolist())
    tqdm.write(f"strength: {len(votes.voter)} voters on states of {run.cfg.model.init}: {listed}")
