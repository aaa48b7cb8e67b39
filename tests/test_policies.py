"""Best-of-n against brute force; the experiments on policies on a world of a few pairs."""
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

import data
import files
import policies
import ppo
import reproduce
import train
import world
from evaluate import best_of_n, best_of_n_kl
from helpers import ROOT, SMALL, one_line

value = st.integers(-3, 3).map(float)  # ties are common


def every_subset(proxy, gold, n):
    """Of each subset the best by the proxy; the mean of those that share its place"""
    total = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        total.append(np.mean([gold[i] for i in subset if proxy[i] == best]))
    return np.mean(total)


@given(st.lists(st.tuples(value, value), min_size=1, max_size=8), st.data())
def test_best_of_n_is_the_mean_over_all_subsets(answers, draw):
    proxy, gold = zip(*answers)
    n = draw.draw(st.integers(1, len(answers)))
    assert best_of_n(proxy, gold, n) == pytest.approx(every_subset(proxy, gold, n))


def test_the_best_of_one_is_the_mean_and_of_all_the_best():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=300), rng.normal(size=300)
    assert best_of_n(proxy, gold, 1) == pytest.approx(gold.mean())
    assert best_of_n(proxy, gold, 300) == pytest.approx(gold[proxy.argmax()])
    assert best_of_n(np.zeros(300), gold, 17) == pytest.approx(gold.mean())  # a proxy without an opinion
    for n in (0, 301):
        with pytest.raises(ValueError, match="best_of_n: n ="):
            best_of_n(proxy, gold, n)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_kl_of_best_of_n_is_reached_where_no_two_answers_are_alike_and_a_bound_elsewhere(n):
    """M equally likely answers: the one of rank r is the best of n with probability (r^n - (r - 1)^n) / M^n."""
    def kl(M):
        p = [(r ** n - (r - 1) ** n) / M ** n for r in range(1, M + 1)]
        return sum(x * math.log(x * M) for x in p)
    assert kl(20_000) == pytest.approx(best_of_n_kl(n), abs=1e-3)
    assert all(kl(M) < best_of_n_kl(n) for M in (1, 2, 5, 50))
    assert best_of_n_kl(1) == 0


def test_a_curve_names_its_best_point_and_what_is_lost_after_it():
    row = policies.curve(np.array([-0.1, 1.0, 4.0]), np.array([0.5, 2.0, 1.25]), np.array([0.0, 1.0, 3.0]))
    assert row == {"gold, best": 2.0, "KL there": 1.0, "gold, end": 1.25, "KL, end": 4.0, "lost after the best": 0.75, "proxy, end": 3.0,
                   "curve: root KL": [0.0, 1.0, 2.0], "curve: gold": [0.5, 2.0, 1.25], "curve: proxy": [0.0, 1.0, 3.0]}


def test_smoothing_keeps_a_mean_and_shortens_a_curve():
    assert policies.smooth(np.arange(24.0)).tolist() == [0.5 + i for i in range(23)]
    assert policies.smooth(np.array([3.0, 1.0])).tolist() == [3.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# The experiments

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


def run(out, name, *more):
    words = [name, f"--config={ROOT}/configs/tiny.toml", *SMALL, "--ppo.methods=", f"--out_dir={out}", "--seeds=3", *more]
    return train.guarded(lambda: reproduce.experiment(words))


def summary(out, name):
    assert (out / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((out / "results" / f"{name}.json").read_text())["runs"]["3"]
    assert all(math.isfinite(v) for row in rows.values() for column in row.values() for v in (column if isinstance(column, list) else [column]))
    return rows


FOUR = ["PPO on baseline", "PPO on baseline, no KL penalty", "PPO on flip", "PPO on flip, no KL penalty"]


def test_over_optimisation_on_a_small_world(out, monkeypatch):
    assert run(out, "overoptimisation") == 0
    rows = summary(out, "overoptimisation")
    assert list(rows) == ["best of n on baseline", "best of n on flip", *FOUR]
    for name, row in rows.items():
        if "best of n" in name:
            np.testing.assert_allclose(np.square(row["curve: root KL"]), [best_of_n_kl(2 ** i) for i in range(7)], atol=1e-9)
            assert row["curve: proxy"][0] == pytest.approx(0, abs=1e-6) and (np.diff(row["curve: proxy"]) > 0).all()
        else:
            assert len(row["curve: gold"]) == 2 and row["curve: root KL"][0] == 0
    assert rows["best of n on baseline"]["curve: gold"][0] == pytest.approx(rows["best of n on flip"]["curve: gold"][0])  # SFT's answers, both
    folder = out / "labels" / "seed_3"
    lines = [line for _, line in data.read_jsonl(folder / "rollouts_over_flip.jsonl")]
    assert rows["PPO on flip"]["curve: gold"][1] == pytest.approx(np.mean([world.gold(l["prompt"], l["response"]) for l in lines[8:]]))
    for name in ("over_flip", "over_flip_free"):
        depends = files.read_record(folder, f"policy_{name}")["depends"]
        assert depends["ppo.kl"] == (0.0 if name.endswith("free") else 0.05)
    monkeypatch.setattr(ppo, "train_policy", lambda *_, **__: pytest.fail("trained again"))
    before = (out / "results" / "overoptimisation.json").read_bytes()
    assert run(out, "overoptimisation") == 0 and (out / "results" / "overoptimisation.json").read_bytes() == before


def test_policies_are_trained_again_where_their_settings_change(out):
    assert run(out, "denoised") == 0
    files_before = (out / "labels" / "seed_3" / "policy_over_flip.pt").read_bytes()
    assert run(out, "denoised", "--ppo.lr=0.01") == 0
    assert (out / "labels" / "seed_3" / "policy_over_flip.pt").read_bytes() != files_before


def test_cleaned_against_noisy_labels_on_a_small_world(out):
    assert run(out, "denoised") == 0
    rows = summary(out, "denoised")
    assert list(rows) == ["SFT", *(FOUR[i] for i in (0, 1, 2, 3)), "flip - baseline", "flip - baseline, no KL penalty"]
    for words in ("", ", no KL penalty"):
        for column, difference in rows[f"flip - baseline{words}"].items():
            assert difference == pytest.approx(rows[f"PPO on flip{words}"][column] - rows[f"PPO on baseline{words}"][column])
    for name in ("SFT", *FOUR):
        assert rows[name]["gold reward"] == pytest.approx(sum(rows[name][t] for t in world.terms("", "a")))


def test_a_verifier_on_a_small_world(out):
    assert run(out, "verifier") == 0
    rows = summary(out, "verifier")
    assert list(rows) == ["SFT", "PPO"] and all(0 <= row["success"] <= 1 for row in rows.values())
    lines = [line for _, line in data.read_jsonl(out / "labels" / "seed_3_verifier" / "rollouts_verifier.jsonl")]
    assert {line["reward"] for line in lines} <= {0.0, 1.0} and all("Translate into Zorbish" in line["prompt"] for line in lines)


@pytest.mark.parametrize("name", ["overoptimisation", "denoised", "verifier"])
def test_a_file_is_refused_before_anything_is_trained(name, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    assert run(tmp_path / "out", name, f"--data.train={path}") == 2
    one_line(capsys, "needs a known truth")
    assert not list(tmp_path.rglob("*.pt"))
