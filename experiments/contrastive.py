"""Reward models with contrastive terms on shifted data (the paper's Fig. 8 and 11 to 13).

Each term of TERMS trains one reward model, term_NAME.pt, once for all experiments of this file.
"gold" is accuracy by the true quality, "labels" by the data's labels.  A shift is any difference
from the training data: other domains, unseen requests, answers of a policy after PPO.
"""
import importlib.util
from typing import NamedTuple

import numpy as np
import torch

import train
import world
from common import embed_rows, load_model, member_names, reward_diffs, score_rows
from config import ConfigError, Contrast
from data import encode_row
from evaluate import evaluate_policies, gold_diffs, lengths_of, longer_wins
from experiments.registry import experiment
from experiments.shared import METHODS, need_truth, over_training, pair_diffs, plain_labels
from experiments.shift_shared import (
    best_of_k,
    distinct_pairs,
    gold_accuracy,
    held_out_sets,
    label_accuracies,
    ranking_accuracy,
    sample_gold_answers,
)
from experiments.statistics import against, couples
from labels.votes import load_votes
from model import RewardModel
from runtime import figures
from strength import strength

# Source: arXiv 2401.06080, sec. 4.  A batch of 16 pairs has 32 items, fewer than 50 prototypes, so
# that SwAV on pairs needs a queue.
TERMS = {
    "baseline": Contrast(),
    "simcse": Contrast(term="simcse"),
    "simcse-diff": Contrast(term="simcse", items="difference"),
    "swav": Contrast(term="swav", weight=0.1, queue=256),
    "swav-diff": Contrast(term="swav", items="difference", weight=0.5, prototypes=20),
}
NO_KL_PENALTY = {"ppo.kl_coef": 0.0, "ppo.adaptive_kl_target": 0.0}
NUM_PROMPTS = 300  # for which answers are sampled
NUM_PAIRS = 600    # drawn for each kind of shift
NUM_POINTS = 600   # shown in the figure


def train_contrastive(run, term):
    """Train the reward model term_TERM.pt, with the dropout of its term and no treatment.

    The baseline has the same dropout as the others, so that only the term differs.
    returns its reward differences on validation pairs after every epoch, (E, N)
    """
    settings = TERMS[term]
    labels = plain_labels(run)
    variant = train.RewardVariant(shape_changes={"dropout": settings.dropout}, contrast=settings)
    rewards = train.train_reward_variant(run, f"term_{term}", labels, run.valid.rows, variant)
    return pair_diffs(rewards)


# --------------------------------------------------------------------------------------------------
# Representations: Fig. 11


def require_sklearn():
    """Raise ConfigError, before anything is trained, if scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError("representations: needs scikit-learn; pip install scikit-learn")


def probe(x, y, train_share=0.5, decay=1e-3, max_iter=300):
    """Held-out accuracy of a logistic regression on standardised features.

    x: (N, C), y: (N,) bool; fitted to the first train_share of the points, which minimises
        mean log loss + decay |w|^2,  with no penalty on the intercept
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = round(train_share * len(x))
    regression = LogisticRegression(
        C=1 / (2 * n * decay),  # scikit-learn minimises C * summed log loss + |w|^2 / 2
        solver="newton-cholesky",
        tol=1e-8,
        max_iter=max_iter,
    )
    model = make_pipeline(StandardScaler(), regression)
    model.fit(x[:n], y[:n])
    return float(model.score(x[n:], y[n:]))


def silhouette(x, y):
    """Mean silhouette of two classes, Euclidean; 0: they overlap entirely.  Rousseeuw 1987

    x: (N, C), y: (N,) bool -> float in [-1, 1]
    """
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(x, y))


def principal_plane(x):
    """Projection on the first two principal components, and their share of the variance.

    x: (N, C) -> (N, 2), float
    """
    from sklearn.decomposition import PCA

    pca = PCA(n_components=2, svd_solver="full")
    plane = pca.fit_transform(x)
    return plane, float(pca.explained_variance_ratio_.sum())


def mean_cosine(vectors):
    """Mean cosine of two different vectors.  (N, C) -> float"""
    n = len(vectors)
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    sum_of_cosines = unit.sum(0).square().sum() - n  # over ordered pairs of different vectors
    return float(sum_of_cosines / (n * (n - 1)))


def representation_columns(hidden):
    """Columns of one reward model.  hidden: (N, 2, C) final states, chosen then rejected"""
    x = hidden.flatten(0, 1).double().numpy()  # (2N, C), chosen and rejected in turn
    is_chosen = np.tile([True, False], len(hidden))
    plane, variance_share = principal_plane(x)
    return {
        "probe: chosen or rejected": probe(x, is_chosen),
        "silhouette": silhouette(x, is_chosen),
        "variance in the plane": variance_share,
        "cosine of two differences": mean_cosine(hidden[:, 0] - hidden[:, 1]),
        "points: x": plane[:NUM_POINTS, 0].tolist(),
        "points: y": plane[:NUM_POINTS, 1].tolist(),
    }


def plot_representations(summary, path):
    title = "Fig. 11: final states of chosen and rejected answers, two principal components"
    figures.scatter(summary, path, title)


@experiment(
    "representations", figure="Fig. 11", base="shift", plot=plot_representations,
    comparisons=against("baseline", "probe: chosen or rejected", "silhouette"),
)
def compare_representations(config, slot=0):
    """Final states of chosen and rejected answers under each term: projection, overlap."""
    require_sklearn()
    run = train.ensure_stages(config, "sft", slot=slot)
    rows = {}
    for term in TERMS:
        train_contrastive(run, term)
        model = load_model(run, RewardModel, f"term_{term}")
        hidden = score_rows(run, model, run.valid.rows[:1000], features=True)  # (N, 2, C)
        rows[term] = representation_columns(hidden)
    return rows


# --------------------------------------------------------------------------------------------------
# Accuracy and PPO: Fig. 12 and 13


def ppo_columns(run, term):
    """Columns of the policy that PPO trains on term_TERM.pt without a KL penalty."""
    train.train_policy_once(run.with_settings(NO_KL_PENALTY), term, f"term_{term}")
    policy = f"policy_{term}"
    scores = evaluate_policies(run, ["sft", policy], run.valid.pairs)[policy]
    return {
        "PPO: gold reward": scores["judge"],
        "PPO: win - lose": scores["win"] - scores["lose"],
        "PPO: KL": scores["kl"],
        "PPO: length": scores["length"],
    }


def plot_terms(summary, path):
    title = "Reward models with contrastive terms: accuracy by gold"
    columns = ["gold, end"]
    columns += [f"gold, {domain}" for domain in world.HELD_OUT_DOMAINS]
    figures.bars(summary, path, title, columns)


@experiment(
    "contrast", figure="Fig. 12, 13", base="shift", plot=plot_terms,
    comparisons=against(
        "baseline", "gold, end", "PPO: win - lose", "PPO: gold reward", "PPO: KL"
    ),
)
def compare_terms(config, slot=0):
    """Accuracy of each term in and out of distribution; best of k; PPO without a KL penalty."""
    need_truth(config)
    run = train.ensure_stages(config, "sft", slot=slot)
    gold = gold_diffs(run, "valid")
    answers, answers_gold = sample_gold_answers(run, "sft", run.valid.pairs, NUM_PROMPTS)
    rows = {}
    for term in TERMS:
        scores = over_training(train_contrastive(run, term), gold)
        row = {column: scores[column] for column in ("labels, end", "gold, end", "loss, end")}
        model = load_model(run, RewardModel, f"term_{term}")
        for domain, encoded in run.ood.items():
            domain_gold = gold_diffs(run, domain)
            row[f"gold, {domain}"] = gold_accuracy(run, model, encoded.rows, domain_gold)
        rewards = score_rows(run, model, answers)
        row[f"best of {config.meta.k}"], row["one answer"] = best_of_k(rewards, answers_gold)
        rows[term] = row | ppo_columns(run, term)
    return rows


# --------------------------------------------------------------------------------------------------
# Kinds of shift (open question 3)


class GoldPairs(NamedTuple):
    """New pairs of the built-in world, labelled by their true quality."""
    rows: list         # N rows of two branches, chosen and rejected
    gold: np.ndarray   # (N,) differences of gold reward, chosen - rejected


def encode_gold_pairs(run, pairs):
    """Encode pairs of world.pairs.  [{"prompt", "chosen", "rejected"}] -> GoldPairs"""
    rows = []
    gold = []
    for pair in pairs:
        prompt = pair["prompt"]
        responses = (pair["chosen"], pair["rejected"])
        rows.append(encode_row(run.tokenizer, prompt, responses, run.cfg.model.context))
        gold.append(world.gold(prompt, pair["chosen"]) - world.gold(prompt, pair["rejected"]))
    return GoldPairs(embed_rows(run, rows), np.array(gold))


def has_unknown_request(prompt, items):
    """Whether a prompt has a goal or a request that a world of so many items does not draw."""
    requests = [*list(world.ADVICE)[items:], *list(world.HARMFUL)[items:]]
    return any(request in prompt for request in requests)


def kinds_of_shift(run, n):
    """Draw n new pairs for each kind of shift, without label noise -> {kind: GoldPairs}

    Fewer for unknown requests: pairs of known ones are left out.
    """
    items = run.cfg.world.items
    no_noise = world.Noise(0, 0, 0)

    def draw_pairs(name, **settings):
        settings = {"items": items} | settings
        pairs, _ = world.pairs(n, f"{run.cfg.seed} {name}", no_noise, **settings)
        return pairs

    unknown = []
    for pair in draw_pairs("unknown", items=6):
        if has_unknown_request(pair["prompt"], items):
            unknown.append(pair)
    pairs = {
        "none": draw_pairs("shift"),
        "unknown requests": unknown,
        "manners alone": draw_pairs("manners", contrast=0.0),
    }
    for domain in world.HELD_OUT_DOMAINS:
        pairs[domain] = draw_pairs("ood", domains=(domain,))
    return {kind: encode_gold_pairs(run, pairs_of_kind) for kind, pairs_of_kind in pairs.items()}


def answer_lengths(rows):
    """Number of tokens of every branch.  N rows of k branches -> (N, k)"""
    lengths = []
    for row in rows:
        lengths.append([float(len(response)) for response in row.responses])
    return torch.tensor(lengths)


def length_columns(pair_sets, answer_sets):
    """Columns of the rule that the answer of more tokens wins; arguments as in compare_shifts."""
    row = {}
    for kind, pairs in pair_sets.items():
        row[kind] = float(longer_wins(answer_lengths(pairs.rows), pairs.gold).mean())
    for kind, (answers, gold) in answer_sets.items():
        lengths, gold_diff = distinct_pairs(answer_lengths(answers), gold)
        row[kind] = float(longer_wins(lengths, gold_diff).mean())
    return row


def plot_shifts(summary, path):
    columns = list(summary["baseline"])
    figures.bars(summary, path, "Accuracy by gold under kinds of shift", columns)


@experiment(
    "shifts", base="shift", plot=plot_shifts,
    comparisons=against(
        "baseline", "none", "unknown requests", "manners alone", "arithmetic", "translation",
        "programs", "answers of SFT", "answers after PPO", without=["longer answer wins"],
    ),
)
def compare_shifts(config, slot=0):
    """Open question 3: accuracy by gold of each term under kinds of shift, and after PPO."""
    need_truth(config)
    run = train.ensure_stages(config, "sft", slot=slot)
    pair_sets = kinds_of_shift(run, NUM_PAIRS)
    for term in TERMS:
        train_contrastive(run, term)
    train.train_policy_once(run.with_settings(NO_KL_PENALTY), "baseline", "term_baseline")
    pairs = run.valid.pairs
    answer_sets = {
        "answers of SFT": sample_gold_answers(run, "sft", pairs, NUM_PROMPTS),
        "answers after PPO": sample_gold_answers(run, "policy_baseline", pairs, NUM_PROMPTS),
    }
    rows = {}
    for term in TERMS:
        model = load_model(run, RewardModel, f"term_{term}")
        rows[term] = row = {}
        for kind, pairs in pair_sets.items():
            row[kind] = gold_accuracy(run, model, pairs.rows, pairs.gold)
        for kind, (answers, gold) in answer_sets.items():
            row[kind] = ranking_accuracy(score_rows(run, model, answers), gold)
    rows["longer answer wins"] = length_columns(pair_sets, answer_sets)
    return rows


# --------------------------------------------------------------------------------------------------
# Accuracy by the labels: Fig. 8 and 13


def vote_columns(run, valid_votes):
    """Accuracy of the members' mean by the labels of every held-out set -> {set: float}

    valid_votes: (M, N) reward differences on validation pairs
    """
    row = {"held out": float((valid_votes.mean(0) > 0).float().mean())}
    for domain, encoded in run.ood.items():
        votes = [reward_diffs(run, name, encoded.rows) for name in member_names(run.cfg)]
        row[domain] = float((torch.stack(votes).mean(0) > 0).float().mean())
    return row


def plot_transfer(summary, path):
    columns = list(summary["vote of the members"])
    title = "Accuracy by the labels, in and out of distribution"
    figures.bars(summary, path, title, columns)


def transfer_comparisons(rows):
    """Terms against the baseline with their dropout, all others against the plain one, by every set
    """
    reference_of = {}
    for row in rows:
        reference_of[row] = "baseline, dropout" if row in TERMS else "baseline"
    for reference in ("baseline", "baseline, dropout"):
        del reference_of[reference]
    return couples(reference_of, *rows["baseline"])(rows)


@experiment(
    "transfer", figure="Fig. 8, 13", base="shift", plot=plot_transfer,
    comparisons=transfer_comparisons,
)
def compare_transfer(config, slot=0):
    """Accuracy by the labels of every treatment and term, in and out of distribution.

    Also the vote of the members and the rule that the longer answer wins.  Also on files.
    """
    run = train.ensure_stages(config, "sft", "ensemble", "strength", slot=slot)
    votes = load_votes(run)
    mean, _ = strength(votes["train"])
    rows = {"vote of the members": vote_columns(run, votes["valid"])}
    for method in METHODS:
        labels = train.treat_pairs(run, method, mean)
        train.train_reward_variant(run, f"treated_{method}", labels, run.valid.rows)
        rows[method] = label_accuracies(run, f"treated_{method}")
    for term in TERMS:
        train_contrastive(run, term)
        label = "baseline, dropout" if term == "baseline" else term
        rows[label] = label_accuracies(run, f"term_{term}")
    rows["longer answer wins"] = row = {}
    for where, encoded in held_out_sets(run).items():
        row[where] = float(longer_wins(lengths_of(encoded.pairs)).mean())
    return rows
