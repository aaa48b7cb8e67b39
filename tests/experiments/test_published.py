"""The published votes on invented files of their layout."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import one_line

from experiments import published

# configs/clean.toml cuts folds, whose number the members of a small run do not fit
SETTINGS = ["--ppo.methods=", "--ensemble.members=4"]


def record(i, chosen, rejected, label):
    """A record of fnlp/hh-rlhf-strength-cleaned; some copies write _ for the blanks"""
    return {
        "chosen": [f"question {i}?", f"yes {i}"], "rejected": [f"question {i}?", f"no {i}"],
        "GPT4 label": label,
        "mean preference difference": float(np.mean(np.subtract(chosen, rejected))),
        "std preference difference": float(np.std(np.subtract(chosen, rejected))),
        "chosen score list": chosen, "rejected score list": rejected,
    }


def write_files(folder, n=60, num_models=10):
    rng = np.random.default_rng(0)
    paths = []
    means = []
    for name, has_labels in (("train", False), ("valid", True)):
        records = []
        for i in range(n):
            rejected = rng.normal(size=num_models).round(3)
            chosen = (rejected + (i - n // 4) / 10 + rng.normal(0, 0.1, num_models)).round(3)
            means.append((chosen - rejected).mean())
            label = int(chosen.mean() > rejected.mean()) if has_labels else -1
            records.append(record(f"{name} {i}", chosen.tolist(), rejected.tolist(), label))
        if has_labels:
            records[5]["GPT4 label"] = -1  # none
            records = [{key.replace(" ", "_"): value for key, value in r.items()} for r in records]
        path = folder / f"{name}.json"
        path.write_text(json.dumps(records))
        paths.append(str(path))
    return paths, np.array(means)


def test_figures_one_to_three_of_an_invented_file(small, tmp_path, capsys):
    (train, valid), means = write_files(tmp_path)
    words = [*SETTINGS, f"--data.train={train}", f"--data.valid={valid}"]
    assert small.run(tmp_path / "out", "published", *words) == 0
    rows, = small.read_runs(tmp_path / "out", "published")
    own = np.sort(means[:60])
    assert rows["training pairs"]["pairs"] == 60.0
    assert rows["training pairs"]["below zero"] == pytest.approx((own < 0).mean())
    for g in range(20):
        assert rows[str(g + 1)]["mean"] == pytest.approx(own[3 * g:3 * g + 3].mean(), abs=1e-5)
    assert rows["1"]["the paper: mean"] == -1.22 and rows["20"]["the paper: mean"] == 3.43
    lowest, highest = rows["lowest 19"], rows["highest 19"]  # 59 pairs have GPT-4's label
    assert highest["agreement"] == 1.0 and lowest["agreement"] < 0.5
    assert lowest["strength"] < rows["nearest zero 19"]["strength"] < highest["strength"]


def test_groups_of_validation_pairs_by_hand():
    mean = torch.tensor([-2.0, -1.5, 0.1, -0.2, 3.0, 2.0, 9.0])
    labels = np.array([0, 1, 1, 0, 1, 1, -1])
    rows = published.agreement_rows(mean, labels)
    assert {name: row["agreement"] for name, row in rows.items()} == {
        "lowest 2": 0.5, "nearest zero 2": 0.5, "highest 2": 1.0,
    }
    assert rows["highest 2"]["strength"] == 2.5
    assert published.agreement_rows(mean, np.full(7, -1)) == {}


def test_our_vote_is_compared_where_a_model_is_named(small, tmp_path, monkeypatch):
    (train, valid), means = write_files(tmp_path)
    seen = []

    def own_votes(config, slot):
        pairs = published.load_pairs(config)["train"]
        seen.append(len(pairs))
        votes = published.strength(published.votes_of_pairs(pairs))[0]
        run = SimpleNamespace(train=SimpleNamespace(pairs=pairs))
        return votes ** 3, run  # the same order

    monkeypatch.setattr(published, "own_votes", own_votes)
    config, _ = published.train.parse_args([
        "--config=configs/clean.toml", f"--data.train={train}", f"--data.valid={valid}",
        f"--out_dir={tmp_path / 'out'}",
    ])
    rows = published.published(config)
    assert "rank correlation with our vote" not in rows["training pairs"] and not seen
    object.__setattr__(config.model, "init", "somewhere")
    rows = published.published(config)
    assert rows["training pairs"]["rank correlation with our vote"] == pytest.approx(1.0)
    assert seen == [60]


def test_a_file_without_votes_is_one_line(small, tmp_path, capsys):
    path = small.write_lines(tmp_path / "mine.jsonl", small.debates())
    words = [*SETTINGS, f"--data.train={path}"]
    assert small.run(tmp_path / "out", "published", *words) == 2
    one_line(capsys, "mine.jsonl:1: has no votes; give mean (and std), votes")
    assert small.run(tmp_path / "out", "published", *SETTINGS, "--data.train=world") == 2
    one_line(capsys, "name the file of published votes")
