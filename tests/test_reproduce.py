"""The experiments: their arithmetic by hand, and each on a world of a few pairs."""
import json
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import data
import labels
import loop
import ppo
import reproduce
import shift
import train
import world
from helpers import ROOT, SMALL, one_line

FEW = [s for s in SMALL if "ppo" not in s] + ["--ppo.methods="]


# ---------------------------------------------------------------------------------------------------------------------
# Over seeds

RUNS = [{"a": {"x": 1.0, "curve": [0.0, 2.0]}, "b": {"x": 5.0}}, {"a": {"x": 2.0, "curve": [0.0, 4.0]}, "b": {"x": 5.0}},
        {"a": {"x": 6.0, "curve": [3.0, 6.0]}, "b": {"x": 5.0}}]


def test_a_summary_is_the_mean_and_its_standard_error_number_by_number():
    summary = reproduce.summarise(RUNS)
    assert summary["a"]["x"] == {"mean": 3.0, "se": pytest.approx(math.sqrt(7 / 3))}  # deviations 2, 1, 3: 14 over 2, over 3 seeds
    assert summary["a"]["curve"] == {"mean": [1.0, 4.0], "se": pytest.approx([1.0, math.sqrt(4 / 3)])}
    assert summary["b"]["x"] == {"mean": 5.0, "se": 0.0}


def test_one_seed_has_no_standard_error():
    assert reproduce.summarise(RUNS[:1]) == {"a": {"x": {"mean": 1.0, "se": None}, "curve": {"mean": [0.0, 2.0], "se": None}},
                                             "b": {"x": {"mean": 5.0, "se": None}}}


def test_a_number_that_a_seed_does_not_have_is_the_mean_of_the_others():
    """As where a kind of error happens not to occur."""
    summary = reproduce.summarise([{"a": {"x": 1.0}}, {"a": {"x": 3.0, "y": 4.0}}, {"a": {"x": 5.0, "y": 6.0}}])
    assert summary["a"]["x"]["mean"] == 3.0 and summary["a"]["y"] == {"mean": 5.0, "se": 1.0}
    assert reproduce.summarise([{"a": {}}, {"a": {"y": 4.0}}])["a"]["y"] == {"mean": 4.0, "se": None}


def test_the_table_of_a_summary_leaves_curves_to_the_figure():
    table = reproduce.summary_table("name", reproduce.summarise(RUNS))
    assert table.splitlines() == ["name              x", "-------------------", "a     3.000 ± 1.528", "b     5.000 ± 0.000"]
    summary = {"a": {"x": {"mean": 1.0, "se": None}}, "b": {"y": {"mean": 2.0, "se": 0.5}}}
    assert [line.split() for line in reproduce.summary_table("name", summary).splitlines()[::2]] == [["name", "x", "y"], ["a", "1.000"]]


# ---------------------------------------------------------------------------------------------------------------------
# What the experiments compute

def test_accuracy_over_training_by_hand():
    gaps = np.array([[1.0, -1.0, -1.0, 1.0], [1.0, 2.0, -1.0, 1.0], [1.0, -1.0, 1.0, -1.0]])  # three epochs, four pairs
    gold = np.array([1.0, 0.5, -2.0, -1.0])  # the last two labels are wrong
    out = labels.over_training(gaps, gold)
    assert out["curve: labels"] == [0.5, 0.75, 0.5]
    assert out["curve: gold"] == [0.5, 0.75, 0.5]
    assert out["curve: intersection"] == [0.5, 1.0, 0.5]  # of the first two
    assert (out["labels, best epoch"], out["labels, end"], out["intersection, best epoch"], out["intersection, end"]) == (0.75, 0.5, 1.0, 0.5)
    loss = [np.mean([math.log(1 + math.exp(-g)) for g in row]) for row in gaps]
    assert out["curve: loss"] == pytest.approx(loss) and out["loss, end"] == pytest.approx(loss[-1])
    assert set(labels.over_training(gaps, None)) == {k for k in out if "gold" not in k and "intersection" not in k}


def test_only_leaves_the_other_pairs_without_p():
    swap, p, margin = torch.tensor([True, False, True]), torch.tensor([1.0, 0.8, math.nan]), torch.tensor([0.1, 0.2, 0.3])
    out = labels.only((swap, p, margin), torch.tensor([False, True, True]))
    assert out[0] is swap and out[2] is margin
    np.testing.assert_array_equal(out[1], np.float32([math.nan, 0.8, math.nan]))  # what was left out already stays so
    assert p[0] == 1.0


def ranks(x):
    """Places from 1 on; equal ones share their mean place."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def spearman(a, b):
    a, b = ([r - sum(x) / len(x) for r in x] for x in (ranks(a), ranks(b)))
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


few = st.integers(0, 4)  # ties are common


@given(st.lists(st.tuples(few, few), min_size=3, max_size=30).filter(lambda v: all(len(set(x)) > 1 for x in zip(*v))))
def test_rank_correlation_is_its_definition(values):
    a, b = (np.array(x, float) for x in zip(*values))
    with np.errstate(invalid="ignore"):  # of three values, a resample may be one value only
        rho, _, _ = labels.rank_correlation(a, b, resamples=1)
        assert rho == pytest.approx(spearman(a, b))
        assert labels.rank_correlation(np.exp(a), -b ** 3, resamples=1)[0] == pytest.approx(-rho)  # only the order counts


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=200), rng.integers(0, 6, 200)
    assert labels.rank_correlation(a, b, 1)[0] == pytest.approx(stats.spearmanr(a, b).statistic)


def test_the_interval_of_a_rank_correlation_covers_it_and_depends_on_its_seed():
    rng = np.random.default_rng(0)
    a = rng.normal(size=400)
    b = a + rng.normal(size=400)
    rho, low, high = labels.rank_correlation(a, b, 500)
    assert low < rho < high
    z = 1.96 * 1.06 ** 0.5 / math.sqrt(400 - 3)  # Fisher's, for ranks
    assert (low, high) == (pytest.approx(math.tanh(math.atanh(rho) - z), abs=0.02), pytest.approx(math.tanh(math.atanh(rho) + z), abs=0.02))
    assert (rho, low, high) == labels.rank_correlation(a, b, 500) != labels.rank_correlation(a, b, 500, seed=1)


# ---------------------------------------------------------------------------------------------------------------------
# Every experiment, small

@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Experiments begin from configs/tiny.toml or configs/shift.toml."""
    monkeypatch.chdir(ROOT)


def run(out, name, *more):
    return train.guarded(lambda: reproduce.experiment([name, "--seeds=3", *FEW, f"--out_dir={out}", *more]))


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return len(value) > 0 and all(map(finite, value))
    return isinstance(value, float) and math.isfinite(value)


def checked(out, name, seeds=1):
    """-> rows of the first seed, after a look at all that every experiment leaves"""
    results = json.loads((out / "results" / f"{name}.json").read_text())
    assert results["experiment"] == name and len(results["runs"]) == seeds and results["settings"]["world"]["pairs"] == 60
    rows = next(iter(results["runs"].values()))
    assert rows and finite(rows)
    assert results["summary"] == json.loads(json.dumps(reproduce.summarise(list(results["runs"].values()))))
    assert (out / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return rows


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


def curves_end_in_their_numbers(rows):
    for row in rows.values():
        for name in ("labels", "gold", "loss"):
            if f"curve: {name}" in row:
                assert row[f"{name}, end"] == row[f"curve: {name}"][-1]


def check_histograms(rows):
    for row in rows.values():
        assert row["quantile 5%"] < row["quantile 50%"] < row["quantile 95%"]
        width = np.diff(row["curve: value"]).mean()
        assert sum(row["curve: density"]) * width == pytest.approx(1)
    assert rows["std"]["below zero"] == 0


def check_groups(rows):
    assert len(rows) == 20 and (np.diff([row["mean"] for row in rows.values()]) >= 0).all()
    assert sum(row["wrong labels"] for row in rows.values()) / 20 == pytest.approx(wrong_labels())


def wrong_labels():
    """Share of them in the small world of seed 3"""
    return sum(t.error != "" for t in world.pairs(60, 3, world.Noise(0.15, 0.09, 0.02), items=4)[1]) / 60


def check_agreement(rows):
    assert len(rows) == 20 and (np.diff([row["strength"] for row in rows.values()]) >= 0).all()
    assert all(row["agreement with the truth"] in (0.0, 0.5, 1.0) for row in rows.values())  # of two pairs each


def check_deciles(rows):
    assert list(rows) == [str(t) for t in range(1, 11)]
    assert sum(row["wrong labels"] for row in rows.values()) / 10 == pytest.approx(wrong_labels())
    curves_end_in_their_numbers(rows)


def check_swapped(rows):
    assert list(rows) == ["1", "1 swapped", "2", "2 swapped"]
    for t in "12":
        assert rows[t]["wrong labels"] + rows[f"{t} swapped"]["wrong labels"] == pytest.approx(1)
    curves_end_in_their_numbers(rows)


def check_strongest(rows):
    assert list(rows) == ["baseline", "margin", "smooth", "smooth_margin"]
    assert len({row["loss, end"] for row in rows.values()}) == 4
    curves_end_in_their_numbers(rows)


def check_treatments(rows):
    assert list(rows) == [*labels.PAPER, *labels.OTHERS, "longer answer wins"]
    assert set(rows["longer answer wins"]) == {"labels, end", "gold, end", "intersection, end"}
    curves_end_in_their_numbers(rows)


def check_subsets(rows):
    assert list(rows) == ["30 %", "60 %", "90 %"]
    assert all({"weakest: labels, end", "strongest: gold, end"} <= row.keys() for row in rows.values())


def check_bins(rows):
    assert len(rows) == 10 and set(rows["1"]) == {f"{m}: {k}" for m in labels.PAPER + labels.OTHERS for k in ("labels", "gold")}


def check_inflation(rows):
    for row in rows.values():
        np.testing.assert_allclose(np.subtract(row["curve: chosen"], row["curve: rejected"]), row["curve: gap"], atol=1e-6)
        assert row["gap at the end"] == row["curve: gap"][-1]
        assert row["curve: chosen"][0] + row["curve: rejected"][0] == pytest.approx(0, abs=1e-6)  # counted from the first look


def check_reliability(rows):
    assert list(rows) == list(labels.PAPER + labels.OTHERS)
    for row in rows.values():
        assert len(row["curve: confidence"]) == len(row["curve: share right"]) == 10 and row["curve: confidence"] == sorted(row["curve: confidence"])
        assert 0.5 <= row["confidence"] <= 1 and np.mean(row["curve: share right"]) == pytest.approx(row["accuracy"]) and row["nll"] > 0


def check_transfer(rows):
    assert list(rows) == ["vote of the members", *labels.PAPER, *labels.OTHERS, "baseline, dropout", *[t for t in shift.TERMS if t != "baseline"], "longer answer wins"]
    assert all(set(row) == {"held out", "arithmetic", "translation", "programs"} and all(0 <= x <= 1 for x in row.values()) for row in rows.values())


def check_one_round(rows):
    assert list(rows) == ["before", "plain", "meta"] and len({row["J"] for row in rows.values()}) == 3 and len({row["mean difference"] for row in rows.values()}) == 3
    assert all({"held out", "arithmetic", "ranked right"} <= set(row) for row in rows.values())


def check_detectors(rows):
    assert rows["chance"]["flips: AUROC"] == rows["chance"]["ambiguous: AUROC"] == 0.5
    assert [row["runs"] for name, row in rows.items() if "members" in name] == [2.0] * 2
    assert rows["longer answer wins"]["runs"] == 0 and rows["confident learning, 2 folds"]["runs"] == 1
    assert all(0 <= v <= 1 for row in rows.values() for k, v in row.items() if k != "runs")
    assert rows["mean of 2 members"]["called"] == 0.1


def check_shared_bias(rows):
    assert list(rows) == ["liking 0.0", "liking 1.5"]
    assert "shared: share" not in rows["liking 0.0"] and rows["liking 1.5"]["shared: share"] > 0
    assert all(row["flip: share"] + row.get("shared: share", 0) <= row["wrong labels"] for row in rows.values())


def check_representations(rows):
    assert list(rows) == list(shift.TERMS)
    for row in rows.values():
        assert 0 <= row["probe: chosen or rejected"] <= 1 and -1 <= row["silhouette"] <= 1 and 0 < row["variance in the plane"] <= 1
        assert len(row["points: x"]) == len(row["points: y"]) == 80  # both answers of 40 pairs
    assert len({row["silhouette"] for row in rows.values()}) == 5  # no two terms left the same model


def check_contrast(rows):
    assert list(rows) == list(shift.TERMS) and len({row["one answer"] for row in rows.values()}) == 1
    assert all(0 <= row["gold, arithmetic"] <= 1 and -1 <= row["PPO: win - lose"] <= 1 and row["PPO: KL"] >= 0 for row in rows.values())


def check_shifts(rows):
    assert list(rows) == [*shift.TERMS, "longer answer wins"] and len(rows["baseline"]) == 8
    assert all(0 <= v <= 1 for row in rows.values() for v in row.values())


def check_rounds(rows):
    assert list(rows) == ["plain PPO", *(f"{arm} {n}" for arm in ("meta", "plain", "none") for n in (1, 2))]
    for row in rows.values():
        for where in ("", ", ood"):
            assert row[f"win{where}"] + row[f"tie{where}"] + row[f"lose{where}"] == pytest.approx(1)
            if row is not rows["plain PPO"]:
                win, tie, lose = (row[f"{k} against plain PPO{where}"] for k in ("win", "tie", "lose"))
                assert win + tie + lose == pytest.approx(1) and row[f"win - lose against plain PPO{where}"] == pytest.approx(win - lose)
    assert rows["none 2"]["reward model: gold accuracy"] == rows["plain PPO"]["reward model: gold accuracy"]  # the old one


def check_rounds_ood(rows):
    check_rounds(rows)


def check_spread(rows):
    assert list(rows) == ["before", "meta, round 2", "plain, round 2"]
    for row in rows.values():
        assert 3 / 8 <= row["J"] <= 3 / 4 and sum(row["curve: density"]) / 10 == pytest.approx(1)  # J of k = 4; bins of a tenth
    assert len({row["J"] for row in rows.values()}) == 3


def check_noise(rows):
    assert list(rows) == ["0%", "10%", "20%", "30%"]
    assert all(0 <= row[f"{arm}: gold accuracy"] <= 1 for row in rows.values() for arm in ("meta", "plain", "plain PPO"))


def check_orders(rows):
    assert list(rows) == ["plain steps", *(f"eta {eta}, {order} order" for eta in ("0.1", "1") for order in ("first", "second"))]
    assert rows["plain steps"]["time, of plain steps"] == 1 and len({row["J"] for row in rows.values()}) == 5


@pytest.mark.parametrize("name", [name for name in reproduce.EXPERIMENTS if name not in ("headline", "votes", "overoptimisation", "denoised", "verifier")])  # tests/test_policies.py
def test_an_experiment_on_a_small_world(out, name, monkeypatch, capsys):
    more = {"detectors": ["--world.bias=0.1"], "groups": ["--seeds=3,4"], "shared_bias": ["--seeds=3,4"]}.get(name, [])
    if reproduce.EXPERIMENTS[name][0].__module__ == "shift":
        more = [s for s in SMALL if "ppo" in s] + ["--ppo.methods=baseline", "--ppo.critic_pretrain=1", "--meta.rounds=2", "--meta.prompts=16", "--meta.k=4"]
    assert run(out, name, *more) == 0
    globals()[f"check_{name}"](checked(out, name, 1 + ("--seeds=3,4" in more)))
    assert f"{name}, seed" in capsys.readouterr().out
    before = (out / "results" / f"{name}.json").read_bytes()
    monkeypatch.setattr(loop, "fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(ppo, "train_policy", lambda *_, **__: pytest.fail("trained again"))
    assert run(out, name, *more) == 0
    assert (out / "results" / f"{name}.json").read_bytes() == before


def test_experiments_share_what_they_have_in_common(tmp_path, monkeypatch):
    """The tenths of Fig. 5 and 6 are those of Fig. 4."""
    config, _ = train.parse([*FEW, f"--out_dir={tmp_path}"])
    trained, fit = [], loop.fit
    monkeypatch.setattr(loop, "fit", lambda run, unit, *a, **k: trained.append(unit) or fit(run, unit, *a, **k))
    fourth, fifth, sixth = labels.deciles(config), labels.swapped(config), labels.strongest(config)
    assert len(trained) == len(set(trained)) == 3 + 10 + 2 + 3  # SFT and two members, ten tenths, two of them swapped, one in three more ways
    assert fourth["2"] == fifth["2"] and fourth["10"]["loss, end"] == sixth["baseline"]["loss, end"]


@pytest.mark.parametrize("words, said", [
    ([], "name an experiment: headline, "), (["nothing"], "name an experiment"), (["groups", "--seeds=3,x"], "--seeds=3,x"),
    (["groups", "--stage=sft"], "an experiment has no stages"), (["groups", "--seeds=3", "--no.such=1"], "no.such")])
def test_a_mistake_is_one_line(words, said, capsys):
    assert train.guarded(lambda: reproduce.experiment(words)) == 2
    one_line(capsys, said)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def debates():
    """Twelve debates of five pairs; the chosen answer has i % 6 of five votes, so that sometimes the label is not the majority's."""
    pairs = [{"prompt": f"Debate {i // 5}\nround {i % 5}\n\nHuman: {i}?\n\nAssistant:", "chosen": " yes" * (1 + i % 3), "rejected": " no no"}
             for i in range(60)]
    return [p | {"votes_chosen": i % 6, "votes_rejected": 5 - i % 6 - (i % 6 == 1), "votes_equal": int(i % 6 == 1)} for i, p in enumerate(pairs)]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name, columns", [("transfer", {"held out", "more"}), ("one_round", {"held out", "more", "J", "below 0.2", "mean difference"}),
                                           ("one_round --meta.method=flip --reward.methods=baseline,flip", {"held out", "more"}), ("representations", {"silhouette"})])
def test_what_needs_no_truth_runs_on_files_too(name, columns, tmp_path):
    train_file, more = write(tmp_path / "mine.jsonl", debates()), write(tmp_path / "more.jsonl", [p | {"prompt": f"Other {i}"} for i, p in enumerate(debates())])
    few = ["--data.valid_share=0.3", "--meta.prompts=8", "--meta.k=3", "--ppo.max_new=6", "--ppo.methods="]
    name, *words = name.split()
    assert run(tmp_path / "out", name, f"--data.train={train_file}", f"--data.ood={more}", *few, *words) == 0
    rows = json.loads((tmp_path / f"out/results/{name}.json").read_text())["runs"]["3"]
    for row in rows.values():
        assert columns <= set(row) and "ranked right" not in row and "best of k" not in row
    if name == "transfer":
        lengths = [(len(p["chosen"]), len(p["rejected"])) for p in debates()]
        assert rows["longer answer wins"]["more"] == pytest.approx(np.mean([0.5 if c == r else c > r for c, r in lengths]))


@pytest.mark.parametrize("name", ["headline", "agreement", "detectors", "shared_bias", "contrast", "rounds", "noise"])
def test_what_needs_the_truth_refuses_a_file_before_it_trains(name, tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", debates())
    assert run(tmp_path / "out", name, f"--data.train={path}") == 2
    one_line(capsys, "needs a known truth")
    assert not list(tmp_path.rglob("*.pt"))


def test_human_votes_are_compared_with_strength(tmp_path, monkeypatch):
    """By members that together say just what the votes say."""
    lines = debates()
    share = {(l["prompt"], l["chosen"]): (l["votes_chosen"] + l["votes_equal"] / 2) / 5 for l in lines}
    seen = {}

    def voted(config, slot):
        seen.update({name: data.read_pairs(getattr(config.data, name)[0]) for name in ("train", "valid")})
        assert all("votes" not in line for _, line in data.read_jsonl(config.data.train[0]))  # no member can see them
        said = {name: torch.tensor([share[p.prompt, p.chosen] - 0.5 for p in pairs]) for name, pairs in seen.items()}
        gaps = {name: torch.stack((2 * s, 0 * s)) for name, s in said.items()}
        return types.SimpleNamespace(train=(seen["train"], None), valid=(seen["valid"], None)), gaps["train"], gaps["valid"]

    monkeypatch.setattr(labels, "voted", voted)
    config, _ = train.parse([f"--data.train={write(tmp_path / 'votes.jsonl', lines)}", f"--out_dir={tmp_path}/out"])
    rows = labels.votes(config)
    first = [{p.prompt.split("\n")[0] for p in seen[name]} for name in ("train", "valid")]
    assert len(first[0]) == 9 and len(first[1]) == 3 and not first[0] & first[1]  # a quarter of the debates
    assert list(rows) == [f"{part}: {signal}" for part in ("trained on", "held-out debates") for signal in ("strength", "length")]
    for name, pairs in (("trained on", seen["train"]), ("held-out debates", seen["valid"])):
        row, close = rows[f"{name}: strength"], np.array([share[p.prompt, p.chosen] == 0.6 for p in pairs])
        assert row["pairs"] == len(pairs) == {"trained on": 45, "held-out debates": 15}[name]
        assert row["rank correlation with votes"] == pytest.approx(1) and row["AUROC, majority against the label"] == 1
        assert row["accuracy"] == pytest.approx(np.mean([share[p.prompt, p.chosen] > 0.5 for p in pairs]))
        assert row["share "] == pytest.approx(np.mean([share[p.prompt, p.chosen] < 0.5 for p in pairs]))  # 3 to 2 at most, so no ties
        strengths = np.array([share[p.prompt, p.chosen] for p in pairs])
        assert row["share"] == pytest.approx(close.mean())
        assert row["AUROC, 3-2"] == pytest.approx((strengths[~close] > 0.6).mean())  # all three to two have the same strength
        length = rows[f"{name}: length"]
        assert length["accuracy"] == pytest.approx(np.mean([len(p.chosen) > len(p.rejected) for p in pairs]))
        assert length["low"] <= length["rank correlation with votes"] <= length["high"] < 1


def test_votes_on_a_small_file(tmp_path, capsys):
    path = write(tmp_path / "votes.jsonl", debates())
    assert run(tmp_path / "out", "votes", f"--data.train={path}", "--model.vocab=300") == 0
    rows = checked(tmp_path / "out", "votes")
    assert [row["pairs"] for row in rows.values()] == [45, 45, 15, 15]
    assert "votes, seeds 3" in capsys.readouterr().out
    for bad in ({"votes_equal": None}, {"votes_chosen": "3"}):
        write(path, [*debates(), debates()[0] | bad])
        assert run(tmp_path / "out", "votes", f"--data.train={path}") == 2
        one_line(capsys, f"{path}:61: a line needs prompt, chosen, rejected and votes_chosen")
    assert run(tmp_path / "out", "votes") == 2
    one_line(capsys, "name a file with human votes")
