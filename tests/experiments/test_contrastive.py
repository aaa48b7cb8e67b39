"""Contrastive terms on shifted data: the measurements by hand, each experiment on a small world."""
import importlib.util

import numpy as np
import pytest
import torch
from helpers import SMALL, one_line

import train
import world
from config import ConfigError
from data import Row
from experiments import contrastive, shift_shared
from experiments.shared import METHODS

SETTINGS = [
    "--ppo.methods=baseline", "--ppo.critic_warmup_iters=1", "--meta.prompts=16", "--meta.k=4",
]


# --------------------------------------------------------------------------------------------------
# Answers of a policy

def test_ranking_accuracy_and_best_of_k_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [5.0, 4.0, 4.5]])
    gold = torch.tensor([[1.0, 3.0, 2.0], [7.0, 7.0, 0.0]])
    # right: 12 and 13 of the first, 13 of the second; wrong: 23, 23; one pair has equal gold
    assert shift_shared.ranking_accuracy(rewards, gold) == pytest.approx(3 / 5)
    best, mean = shift_shared.best_of_k(rewards, gold)
    assert best == pytest.approx((2 + 7) / 2)
    assert mean == pytest.approx((2 + 14 / 3) / 2)


def test_the_longer_of_several_answers_by_hand():
    """Answers of 2, 3 and 3 tokens; where the gold of two is equal, their pair is left out."""
    answers = [Row(np.array([0]), (np.arange(2), np.arange(3), np.arange(3)))]
    gold = torch.tensor([[0.0, 1.0, 2.0]])
    row = contrastive.length_columns({}, {"answers": (answers, gold)})
    assert row == {"answers": pytest.approx(2.5 / 3)}
    equal = torch.tensor([[0.0, 1.0, 1.0]])
    assert contrastive.length_columns({}, {"answers": (answers, equal)}) == {"answers": 1.0}


def test_spread_columns_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 10.0], [0.0, 0.1, 0.2]])
    row = shift_shared.spread_columns(rewards, scale=2.0)
    distance = [0.5, 5.0, 4.5, 0.05, 0.1, 0.05]
    assert row["below 0.2"] == pytest.approx(3 / 6)
    assert row["mean difference"] == pytest.approx(np.mean(distance))
    density = np.array(row["curve: density"])
    width = np.diff(row["curve: value"]).mean()
    assert width == pytest.approx(0.1) and (density * width).sum() == pytest.approx(1)
    assert density[-1] * width == pytest.approx(2 / 6)  # all that is larger is in the last bin
    assert "ranked right" not in row and "best of k" not in row
    gold = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    with_gold = shift_shared.spread_columns(rewards, 2.0, gold)
    assert with_gold["ranked right"] == 0.5 and with_gold["best of k"] == 1.0


# --------------------------------------------------------------------------------------------------
# Representations, against the functions that scikit-learn replaced

def old_probe(x, y, train_share=0.5, steps=300, decay=1e-3):
    """-> w, b, standardised held-out features and labels; features are divided by the sample std"""
    x = torch.as_tensor(x).double()
    y = torch.as_tensor(y).double()
    n = round(train_share * len(x))
    x = (x - x[:n].mean(0)) / x[:n].std(0).clamp(min=1e-8)
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=steps)

    def loss():
        optimizer.zero_grad()
        logits = x[:n] @ w + b
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[:n])
        value = value + decay * (w ** 2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach(), b.detach(), x, y > 0.5, n


def old_silhouette(x, y):
    x = torch.as_tensor(x).double()
    y = torch.as_tensor(y).bool()
    d = torch.cdist(x, x)
    own = y[:, None] == y
    other = y[:, None] != y
    a = (d * own).sum(1) / (own.sum(1) - 1).clamp(min=1)
    b = (d * other).sum(1) / other.sum(1)
    return float(((b - a) / torch.maximum(a, b)).mean())


def random_classes(seed, n, width):
    """Correlated features and labels that one of them predicts in part -> (n, width), (n,) bool"""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)) @ rng.normal(size=(width, width))
    return x, x[:, 0] + width ** 0.5 * rng.normal(size=n) > 0


def test_a_probe_finds_what_is_linear_and_nothing_in_noise():
    x = torch.randn(600, 5, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(600, generator=torch.Generator().manual_seed(1)) < 0.5
    assert contrastive.probe(x.numpy(), (x[:, 0] + x[:, 1] > 0).numpy()) > 0.95
    assert abs(contrastive.probe(x.numpy(), noise.numpy()) - 0.5) < 0.1


@pytest.mark.parametrize("seed, n, width", [(0, 600, 5), (1, 200, 20), (2, 80, 32), (3, 1000, 64)])
def test_the_probe_is_the_one_written_by_hand(seed, n, width):
    """Features divided by the population std are larger by c, c^2 = m / (m - 1), for m points.

    With v = c w the two problems differ in the penalty alone: decay |v|^2 (m - 1) / m.  At its
    minimum the gradient of the old objective is 2 decay v / m, so that the two solutions differ by
    at most its norm over the least curvature; and so do logits, times the norm of (x, 1).  Twice
    that, for the curvature is taken at one end.  Only points within it may change sides.
    """
    x, y = random_classes(seed, n, width)
    w, b, features, is_positive, m = old_probe(x, y)
    features = torch.cat((features, torch.ones(n, 1, dtype=torch.float64)), 1)  # (n, width + 1)
    logits = features @ torch.cat((w, b[None]))
    old = float(((logits[m:] > 0) == is_positive[m:]).double().mean())

    p = logits[:m].sigmoid()
    hessian = features[:m].T @ (features[:m] * (p * (1 - p))[:, None]) / m
    hessian[range(width), range(width)] += 2e-3
    curvature = torch.linalg.eigvalsh(hessian)[0]
    bound = 2 * (2e-3 * w.norm() / m) / curvature * features[m:].norm(dim=1)
    doubtful = float((logits[m:].abs() < bound).double().mean())
    assert doubtful < 0.2  # or else the test would say nothing
    assert abs(contrastive.probe(x, y) - old) <= doubtful + 1e-12


def test_silhouette_by_hand():
    """Points 0, 1 against 10, 12 on a line: a = 1, 1, 2, 2; b = 11, 10, 9.5, 11.5."""
    expected = np.mean([10 / 11, 9 / 10, 7.5 / 9.5, 9.5 / 11.5])
    points = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    assert contrastive.silhouette(points, [True, True, False, False]) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_silhouette_is_the_one_written_by_hand(seed):
    """Distances come from |x|^2 + |y|^2 - 2 xy: in float64 their squares are off by 1e-16 |x|^2

    times a few, the distances by the root of that, 1e-7, only where two points coincide.
    """
    x, y = random_classes(seed, 200, 20)
    assert contrastive.silhouette(x, y) == pytest.approx(old_silhouette(x, y), abs=1e-7)


@pytest.mark.parametrize("seed, n, width", [(0, 50, 6), (1, 300, 40)])
def test_the_principal_plane_is_that_of_the_singular_vectors(seed, n, width):
    x, _ = random_classes(seed, n, width)
    x += 5
    centred = x - x.mean(0)
    vectors = np.linalg.svd(centred, full_matrices=False)[2][:2]
    expected = centred @ vectors.T
    plane, share = contrastive.principal_plane(x)
    assert share == pytest.approx(expected.var(0).sum() / centred.var(0).sum())
    np.testing.assert_allclose(np.abs(plane), np.abs(expected), atol=1e-9 * np.abs(expected).max())


def test_the_mean_cosine_is_that_of_all_pairs_of_different_vectors():
    vectors = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    cosines = []
    for i in range(7):
        for j in range(7):
            if i != j:
                cosines.append(torch.cosine_similarity(vectors[i], vectors[j], dim=0))
    expected = float(torch.stack(cosines).mean())
    assert contrastive.mean_cosine(vectors) == pytest.approx(expected, abs=1e-6)


def test_points_of_the_figure_are_chosen_and_rejected_in_turn():
    """Chosen answers at +3, rejected ones at -3 of the first coordinate."""
    hidden = torch.randn(40, 2, 5, generator=torch.Generator().manual_seed(0))
    hidden[:, 0, 0] += 3
    hidden[:, 1, 0] -= 3
    row = contrastive.representation_columns(hidden)
    assert row["probe: chosen or rejected"] > 0.95 and row["silhouette"] > 0.3
    chosen_side = np.sign(row["points: x"][0::2])
    rejected_side = np.sign(row["points: x"][1::2])
    assert abs(chosen_side.sum()) == 40 and (chosen_side == -rejected_side).all()


def test_without_scikit_learn_one_line_says_so_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(train, "ensure_stages", lambda *_, **__: pytest.fail("trained"))
    config, _ = train.parse_args([*SMALL, f"--out_dir={tmp_path}"])
    with pytest.raises(ConfigError, match="pip install scikit-learn") as error:
        contrastive.compare_representations(config)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Kinds of shift

def test_the_kinds_of_shift_are_what_they_are_called(tmp_path):
    config, _ = train.parse_args([*SMALL, f"--out_dir={tmp_path}"])
    run = train.ensure_stages(config, "sft")
    kinds = contrastive.kinds_of_shift(run, n=60)
    domains = ["arithmetic", "translation", "programs"]
    assert list(kinds) == ["none", "unknown requests", "manners alone", *domains]
    for rows, gold in kinds.values():
        assert len(rows) == len(gold) > 0
        assert (gold > 0).all()  # annotators who never err
    unknown = [*list(world.ADVICE)[4:], *list(world.HARMFUL)[4:]]

    def has_unknown(row):
        text = run.tokenizer.decode(row.prompt.tolist())
        return any(request in text for request in unknown)

    assert all(has_unknown(row) for row in kinds["unknown requests"].rows)
    assert not any(has_unknown(row) for row in kinds["none"].rows)


# --------------------------------------------------------------------------------------------------
# Every experiment on a small world

def check_representations(rows):
    assert list(rows) == list(contrastive.TERMS)
    for row in rows.values():
        assert 0 <= row["probe: chosen or rejected"] <= 1 and -1 <= row["silhouette"] <= 1
        assert 0 < row["variance in the plane"] <= 1
        assert len(row["points: x"]) == len(row["points: y"]) == 80  # both answers of 40 pairs
    assert len({row["silhouette"] for row in rows.values()}) == 5  # all models differ


def check_contrast(rows):
    assert list(rows) == list(contrastive.TERMS)
    assert len({row["one answer"] for row in rows.values()}) == 1
    for row in rows.values():
        assert 0 <= row["gold, arithmetic"] <= 1 and -1 <= row["PPO: win - lose"] <= 1
        assert row["PPO: KL"] >= 0


def check_shifts(rows):
    assert list(rows) == [*contrastive.TERMS, "longer answer wins"] and len(rows["baseline"]) == 8
    for row in rows.values():
        assert list(row) == list(rows["baseline"])
        assert all(0 <= value <= 1 for value in row.values())


def check_transfer(rows):
    terms = [term for term in contrastive.TERMS if term != "baseline"]
    first, last = "vote of the members", "longer answer wins"
    assert list(rows) == [first, *METHODS, "baseline, dropout", *terms, last]
    for row in rows.values():
        assert set(row) == {"held out", "arithmetic", "translation", "programs"}
        assert all(0 <= value <= 1 for value in row.values())


def test_a_term_is_compared_with_the_baseline_that_has_its_dropout():
    names = ("vote of the members", "baseline", "flip", "baseline, dropout", "simcse", "swav-diff",
             "longer answer wins")
    rows = {name: {"held out": 0.6, "any other set": 0.5} for name in names}
    found = contrastive.transfer_comparisons(rows)
    for column in ("held out", "any other set"):
        assert {c.row: c.reference for c in found if c.column == column} == {
            "vote of the members": "baseline",
            "flip": "baseline",
            "simcse": "baseline, dropout",
            "swav-diff": "baseline, dropout",
            "longer answer wins": "baseline",
        }
    assert len(found) == 10


CHECKS = {
    "representations": check_representations,
    "contrast": check_contrast,
    "shifts": check_shifts,
    "transfer": check_transfer,
}


@pytest.mark.parametrize("name", CHECKS)
def test_an_experiment_on_a_small_world(small, out, name, capsys, monkeypatch):
    monkeypatch.setattr(contrastive, "NUM_PAIRS", 60)
    small.check_twice(out, name, CHECKS[name], capsys, *SETTINGS)


# --------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("name, columns", [
    ("transfer", {"held out", "more"}),
    ("representations", {"silhouette"}),
])
def test_what_needs_no_truth_runs_on_files_too(small, name, columns, tmp_path):
    pairs = small.debates()
    others = [pair | {"prompt": f"Other {i}"} for i, pair in enumerate(pairs)]
    train_file = small.write_lines(tmp_path / "mine.jsonl", pairs)
    ood_file = small.write_lines(tmp_path / "more.jsonl", others)
    words = [
        f"--data.train={train_file}", f"--data.ood={ood_file}", "--data.valid_share=0.3",
        "--ppo.methods=",
    ]
    assert small.run(tmp_path / "out", name, *words) == 0
    rows, = small.read_runs(tmp_path / "out", name)
    for row in rows.values():
        assert columns <= set(row)
        assert "ranked right" not in row and "best of k" not in row
    if name == "transfer":
        longer = []
        for pair in pairs:
            chosen, rejected = len(pair["chosen"]), len(pair["rejected"])
            longer.append(0.5 if chosen == rejected else chosen > rejected)
        assert rows["longer answer wins"]["more"] == pytest.approx(np.mean(longer))


@pytest.mark.parametrize("name", ["contrast", "shifts"])
def test_what_needs_the_truth_refuses_a_file_before_it_trains(small, name, tmp_path, capsys):
    path = small.write_lines(tmp_path / "mine.jsonl", small.debates())
    assert small.run(tmp_path / "out", name, f"--data.train={path}", *SETTINGS) == 2
    one_line(capsys, "needs a known truth")
    assert not list(tmp_path.rglob("*.pt"))
