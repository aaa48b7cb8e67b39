"""The headline numbers: their arithmetic, with trained models replaced by their results."""
import types

import pytest
import torch
from helpers import one_line

import train
from config import Config
from experiments import headline
from experiments.shared import change

RESULTS = {
    "noise": {
        "all": {"count": 450, "auroc_mean": 0.8},
        "flip": {"count": 400, "auroc_mean": 0.9, "auroc_single": 0.7},
    },
    "reward": {
        "baseline": {"valid": {"gold_longer_wins": 0.55, "gold_accuracy": 0.8}},
        "flip": {"valid": {"gold_accuracy": 0.85}},
    },
    "policy": {
        "sft": {"judge": 1.0, "kl": 0.0},
        "policy_baseline": {"win": 0.4, "lose": 0.3, "judge": 1.5, "kl": 7.0},
        "policy_flip": {"win": 0.6, "lose": 0.2, "judge": 2.0, "kl": 5.0},
    },
}


@pytest.fixture
def rows(monkeypatch):
    """The rows, where the model on clean labels ranks nine of ten pairs right."""
    asked = []

    def ensure_stages(config, *stages, slot):
        asked.append((config, stages))
        valid = types.SimpleNamespace(rows="rows")
        return types.SimpleNamespace(load_json={"results.json": RESULTS}.get, valid=valid)

    def reward_diffs(run, name, encoded):
        assert (name, encoded) == ("reward_baseline", "rows")
        return torch.tensor([1.0] * 9 + [-1.0])

    monkeypatch.setattr(train, "ensure_stages", ensure_stages)
    monkeypatch.setattr(headline, "reward_diffs", reward_diffs)
    config = change(Config(), {"world.pairs": 5000, "out_dir": "out/x"})
    rows = headline.headline(config)
    (full, all_stages), (clean, stages) = asked
    assert full == config and all_stages == ()
    assert stages == ("sft", "reward") and clean.out_dir == "out/x_clean"
    assert (clean.world.flip, clean.world.bias, clean.world.temperature) == (0, 0, 0)
    assert clean.reward.methods == ("baseline",) and clean.ppo.methods == ()
    return rows


def test_the_rows_by_hand(rows):
    values = {name: row["value"] for name, row in rows.items()}
    assert values == pytest.approx({
        "wrong labels": 0.09,
        "AUROC of the mean, random flips": 0.9,
        "AUROC of one member, random flips": 0.7,
        "AUROC of the mean, all wrong labels": 0.8,
        "gold accuracy, longer wins": 0.55,
        "gold accuracy, baseline": 0.8,
        "gold accuracy, flip": 0.85,
        "gold accuracy, clean labels": 0.9,
        "share of the gap closed by flip": 0.5,
        "PPO on baseline: win - lose against SFT": 0.1,
        "PPO on baseline: gold reward": 1.5,
        "PPO on baseline: KL": 7.0,
        "PPO on flip: win - lose against SFT": 0.4,
        "PPO on flip: gold reward": 2.0,
        "PPO on flip: KL": 5.0,
        "SFT: gold reward": 1.0,
    })


def test_the_share_of_the_mean_gaps_is_not_the_mean_share():
    summary = {
        "gold accuracy, baseline": {"value": {"mean": 0.8, "se": 0.01}},
        "gold accuracy, flip": {"value": {"mean": 0.83, "se": 0.01}},
        "gold accuracy, clean labels": {"value": {"mean": 0.9, "se": 0.01}},
        "share of the gap closed by flip": {"value": {"mean": 0.7, "se": 0.3}},
    }
    headline.extend_with_mean_gap(summary)
    row = summary["share of the gap closed by flip, of mean gaps"]
    assert row["value"] == {"mean": pytest.approx(0.3), "se": None}


def test_a_file_is_refused_before_anything_is_trained(small, tmp_path, capsys):
    path = small.write_lines(tmp_path / "mine.jsonl", small.debates())
    assert small.run(tmp_path / "out", "headline", f"--data.train={path}") == 2
    one_line(capsys, "needs a known truth")
    assert not list(tmp_path.rglob("*.pt"))
