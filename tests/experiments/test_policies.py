"""Best-of-n against brute force; the experiments on policies on a world of a few pairs."""
import itertools
import math

import numpy as np
import pytest
from helpers import one_line
from hypothesis import given
from hypothesis import strategies as st

import world
from common import sample_answers
from experiments import policies
from experiments.best_of_n import best_of_n, best_of_n_kl
from runtime import files, stages

SETTINGS = ["--ppo.methods="]
VARIANTS = [
    "PPO on baseline",
    "PPO on baseline, no KL penalty",
    "PPO on flip",
    "PPO on flip, no KL penalty",
]

# --------------------------------------------------------------------------------------------------
# Best of n

value = st.integers(-3, 3).map(float)  # ties are common


def mean_over_subsets(proxy, gold, n):
    """Of each subset the best by the proxy, the mean of those that share the first place."""
    best_gold = []
    for subset in itertools.combinations(range(len(proxy)), n):
        highest = max(proxy[i] for i in subset)
        best_gold.append(np.mean([gold[i] for i in subset if proxy[i] == highest]))
    return np.mean(best_gold)


@given(st.lists(st.tuples(value, value), min_size=1, max_size=8), st.data())
def test_best_of_n_is_the_mean_over_all_subsets(answers, draw):
    proxy, gold = zip(*answers)
    n = draw.draw(st.integers(1, len(answers)))
    assert best_of_n(proxy, gold, n) == pytest.approx(mean_over_subsets(proxy, gold, n))


def test_the_best_of_one_is_the_mean_and_of_all_the_best():
    rng = np.random.default_rng(0)
    proxy = rng.normal(size=300)
    gold = rng.normal(size=300)
    assert best_of_n(proxy, gold, 1) == pytest.approx(gold.mean())
    assert best_of_n(proxy, gold, 300) == pytest.approx(gold[proxy.argmax()])
    assert best_of_n(np.zeros(300), gold, 17) == pytest.approx(gold.mean())  # a constant proxy
    for n in (0, 301):
        with pytest.raises(ValueError, match="best_of_n: n ="):
            best_of_n(proxy, gold, n)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_kl_of_best_of_n_is_exact_for_distinct_answers_and_else_a_bound(n):
    """M equally likely answers: that of rank r is the best of n with probability

    (r^n - (r - 1)^n) / M^n.
    """
    def kl(M):
        p = [(r ** n - (r - 1) ** n) / M ** n for r in range(1, M + 1)]
        return sum(x * math.log(x * M) for x in p)

    assert kl(20_000) == pytest.approx(best_of_n_kl(n), abs=1e-3)
    assert all(kl(M) < best_of_n_kl(n) for M in (1, 2, 5, 50))
    assert best_of_n_kl(1) == 0


# --------------------------------------------------------------------------------------------------
# Curves

def test_a_curve_names_its_best_point_and_what_is_lost_after_it():
    kl = np.array([-0.1, 1.0, 4.0])
    gold = np.array([0.5, 2.0, 1.25])
    proxy = np.array([0.0, 1.0, 3.0])
    assert policies.curve_columns(kl, gold, proxy) == {
        "gold, best": 2.0,
        "KL there": 1.0,
        "gold, end": 1.25,
        "KL, end": 4.0,
        "lost after the best": 0.75,
        "proxy, end": 3.0,
        "curve: root KL": [0.0, 1.0, 2.0],
        "curve: gold": [0.5, 2.0, 1.25],
        "curve: proxy": [0.0, 1.0, 3.0],
    }


def test_smoothing_keeps_a_mean_and_shortens_a_curve():
    assert policies.smooth(np.arange(24.0)).tolist() == [0.5 + i for i in range(23)]
    assert policies.smooth(np.array([3.0, 1.0])).tolist() == [3.0, 1.0]


def test_rollouts_are_averaged_over_an_iteration_and_the_proxy_is_scaled():
    lines = []
    for kl, reward in ((0.0, 3.0), (0.0, 5.0), (1.0, 7.0), (7.0, 9.0)):
        lines.append({"kl": kl, "reward": reward, "prompt": "", "response": "a"})
    row = policies.rollout_columns(lines, iterations=2, mean=4.0, std=2.0)
    assert row["curve: root KL"] == [0.0, 2.0]
    assert row["curve: proxy"] == [0.0, 2.0]
    assert row["curve: gold"] == pytest.approx([world.gold("", "a")] * 2)


# --------------------------------------------------------------------------------------------------
# The experiments

def read_rows(small, out, name):
    rows, = small.read_runs(out, name)
    return rows


def test_over_optimisation_on_a_small_world(small, out):
    assert small.run(out, "overoptimisation", *SETTINGS) == 0
    rows = read_rows(small, out, "overoptimisation")
    assert list(rows) == ["best of n on baseline", "best of n on flip", *VARIANTS]
    for name, row in rows.items():
        if name in VARIANTS:
            assert len(row["curve: gold"]) == 2 and row["curve: root KL"][0] == 0
            continue
        kl = [best_of_n_kl(2 ** i) for i in range(7)]
        np.testing.assert_allclose(np.square(row["curve: root KL"]), kl, atol=1e-9)
        assert row["curve: proxy"][0] == pytest.approx(0, abs=1e-6)
        assert (np.diff(row["curve: proxy"]) > 0).all()
    one_answer = rows["best of n on baseline"]["curve: gold"][0]
    assert one_answer == pytest.approx(rows["best of n on flip"]["curve: gold"][0])  # both: SFT's

    folder = out / "labels" / "seed_3"
    lines = files.load_jsonl(folder / "rollouts_over_flip.jsonl")
    gold = [world.gold(line["prompt"], line["response"]) for line in lines[8:]]
    assert rows["PPO on flip"]["curve: gold"][1] == pytest.approx(np.mean(gold))
    for name, kl_coef in (("over_flip", 0.05), ("over_flip_free", 0.0)):
        depends = stages.read_record(folder, f"policy_{name}")["depends"]
        assert depends["ppo.kl_coef"] == kl_coef

    small.forbid_training()
    before = (out / "results" / "overoptimisation.json").read_bytes()
    assert small.run(out, "overoptimisation", *SETTINGS) == 0
    assert (out / "results" / "overoptimisation.json").read_bytes() == before


def test_policies_are_trained_again_where_their_settings_change(small, out):
    assert small.run(out, "denoised", *SETTINGS) == 0
    path = out / "labels" / "seed_3" / "policy_over_flip.pt"
    before = path.read_bytes()
    assert small.run(out, "denoised", *SETTINGS, "--ppo.lr=0.01") == 0
    assert path.read_bytes() != before


def test_cleaned_against_noisy_labels_on_a_small_world(small, out):
    assert small.run(out, "denoised", *SETTINGS) == 0
    rows = read_rows(small, out, "denoised")
    differences = ["flip - baseline", "flip - baseline, no KL penalty"]
    assert list(rows) == ["SFT", *VARIANTS, *differences]
    for suffix in ("", ", no KL penalty"):
        flip = rows[f"PPO on flip{suffix}"]
        baseline = rows[f"PPO on baseline{suffix}"]
        for column, difference in rows[f"flip - baseline{suffix}"].items():
            assert difference == pytest.approx(flip[column] - baseline[column])
    for name in ("SFT", *VARIANTS):
        terms = [rows[name][term] for term in world.terms("", "a")]
        assert rows[name]["gold reward"] == pytest.approx(sum(terms))


def test_a_verifier_on_a_small_world(small, out, monkeypatch):
    test_prompts = []

    def sample(run, name, prompts, *arguments):
        test_prompts.extend(text for text, _ in prompts)
        assert len(prompts) == run.cfg.evaluate.prompts
        return sample_answers(run, name, prompts, *arguments)

    monkeypatch.setattr(policies, "sample_answers", sample)
    assert small.run(out, "verifier", *SETTINGS) == 0
    rows = read_rows(small, out, "verifier")
    assert list(rows) == ["SFT", "PPO"] and all(0 <= row["success"] <= 1 for row in rows.values())
    lines = files.load_jsonl(out / "labels" / "seed_3_verifier" / "rollouts_verifier.jsonl")
    assert {line["reward"] for line in lines} <= {0.0, 1.0}
    assert all("Translate into Zorbish" in line["prompt"] for line in lines)
    assert not {line["prompt"] for line in lines} & set(test_prompts)


@pytest.mark.parametrize("name", ["overoptimisation", "denoised", "verifier"])
def test_a_file_is_refused_before_anything_is_trained(small, name, tmp_path, capsys):
    path = small.write_lines(tmp_path / "mine.jsonl", small.debates())
    assert small.run(tmp_path / "out", name, f"--data.train={path}", *SETTINGS) == 2
    one_line(capsys, "needs a known truth")
    assert not list(tmp_path.rglob("*.pt"))
