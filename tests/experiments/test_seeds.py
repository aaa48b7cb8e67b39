"""Means over seeds; seeds in worker processes, with a measurement that trains nothing."""
import json
import math
import os
import shutil

import pytest
from helpers import ROOT

import experiments.__main__ as cli
from experiments import seeds
from experiments.registry import EXPERIMENTS
from experiments.statistics import against
from runtime import signals, workers

RUNS = [
    {"a": {"x": 1.0, "curve": [0.0, 2.0]}, "b": {"x": 5.0}},
    {"a": {"x": 2.0, "curve": [0.0, 4.0]}, "b": {"x": 5.0}},
    {"a": {"x": 6.0, "curve": [3.0, 6.0]}, "b": {"x": 5.0}},
]


# --------------------------------------------------------------------------------------------------
# Over seeds

def test_a_summary_is_the_mean_and_its_standard_error_number_by_number():
    summary = seeds.summarize(RUNS)
    # deviations 2, 1, 3: squares 14, over 2 degrees of freedom, over 3 seeds
    assert summary["a"]["x"] == {"mean": 3.0, "se": pytest.approx(math.sqrt(7 / 3))}
    curve = {"mean": [1.0, 4.0], "se": pytest.approx([1.0, math.sqrt(4 / 3)])}
    assert summary["a"]["curve"] == curve
    assert summary["b"]["x"] == {"mean": 5.0, "se": 0.0}


def test_one_seed_has_no_standard_error():
    a = {"x": {"mean": 1.0, "se": None}, "curve": {"mean": [0.0, 2.0], "se": None}}
    assert seeds.summarize(RUNS[:1]) == {"a": a, "b": {"x": {"mean": 5.0, "se": None}}}


def test_a_number_that_a_seed_does_not_have_is_the_mean_of_the_others():
    """As where a kind of error does not occur."""
    runs = [{"a": {"x": 1.0}}, {"a": {"x": 3.0, "y": 4.0}}, {"a": {"x": 5.0, "y": 6.0}}]
    summary = seeds.summarize(runs)
    assert summary["a"]["x"]["mean"] == 3.0
    assert summary["a"]["y"] == {"mean": 5.0, "se": 1.0}
    summary = seeds.summarize([{"a": {}}, {"a": {"y": 4.0}}])
    assert summary["a"]["y"] == {"mean": 4.0, "se": None}


def test_points_of_a_picture_are_those_of_the_first_seed():
    runs = [{"a": {"points: x": [1.0, 2.0]}}, {"a": {"points: x": [3.0]}}]
    assert seeds.summarize(runs) == {"a": {"points: x": {"mean": [1.0, 2.0], "se": None}}}


# --------------------------------------------------------------------------------------------------
# A measurement that trains nothing

@pytest.fixture
def toy(monkeypatch):
    """An experiment "toy" of one number, and the calls of its measurement."""
    calls = []

    def measure(config, slot=0):
        """Nothing."""
        calls.append((config.seed, config.out_dir, slot))
        return {"row": {"x": float(config.seed)}}

    def extend(summary):
        summary["more"] = {"x": {"mean": 2 * summary["row"]["x"]["mean"], "se": None}}

    entry = seeds.load_experiments()["headline"]
    entry = entry._replace(
        name="toy", measure=measure, extend_summary=extend, comparisons=None
    )
    monkeypatch.setitem(EXPERIMENTS, "toy", entry)
    return calls


def test_every_seed_is_measured_in_its_folder_and_summarised(toy, tmp_path, capsys):
    words = ["toy", "--seeds=3,5", f"--out_dir={tmp_path}", "--train.workers=1"]
    assert cli.main(words) == 0
    assert toy == [(seed, f"{tmp_path}/tiny/seed_{seed}", 0) for seed in (3, 5)]
    results = json.loads((tmp_path / "results" / "toy.json").read_text())
    assert list(results) == ["experiment", "seeds", "settings", "summary", "runs", "versions"]
    assert results["experiment"] == "toy" and results["seeds"] == [3, 5]
    assert results["runs"] == {"3": {"row": {"x": 3.0}}, "5": {"row": {"x": 5.0}}}
    assert results["summary"] == {
        "row": {"x": {"mean": 4.0, "se": 1.0}},
        "more": {"x": {"mean": 8.0, "se": None}},
    }
    assert results["settings"]["out_dir"] == str(tmp_path)
    out = capsys.readouterr().out
    assert "toy, seeds 3, 5" in out and f"{tmp_path}/results/toy.json" in out


def test_seeds_are_shared_between_workers_with_a_share_of_the_threads(toy, tmp_path, monkeypatch):
    def parallel_map(work, jobs, num_workers, on_result):
        assert work is seeds.measure_seed
        assert work.__module__ == "experiments.seeds"  # a new process cannot import __main__
        for name, config, slot, threads in jobs:
            assert name == "toy" and threads == config.train.workers == 2
            slots.append(slot)
        assert num_workers == 2
        for i in reversed(range(len(jobs))):  # seeds end in any order
            on_result(i, {"row": {"x": float(i)}})

    slots = []
    monkeypatch.setattr(workers, "parallel_map", parallel_map)
    words = ["--seeds=3,4,5", f"--out_dir={tmp_path}", "--threads=4", "--train.workers=2"]
    assert cli.main(["toy", *words]) == 0
    assert slots == [1, 2, 1] and not toy
    assert numbers_of(tmp_path) == {3: 0.0, 4: 1.0, 5: 2.0}


def numbers_of(folder):
    """-> {seed: x} of the results of toy"""
    results = json.loads((folder / "results" / "toy.json").read_text())
    assert results["seeds"] == [int(seed) for seed in results["runs"]]
    return {int(seed): rows["row"]["x"] for seed, rows in results["runs"].items()}


def test_added_seeds_stand_beside_those_of_the_same_settings(toy, tmp_path, capsys):
    words = [f"--out_dir={tmp_path}", "--train.workers=1"]
    assert cli.main(["toy", "--seeds=5", *words]) == 0
    more = ["--threads=2", "--log.figures=false"]
    assert cli.main(["toy", "--seeds=3,5", "--add", *words, *more]) == 0
    assert [seed for seed, _, _ in toy] == [5, 3]  # 5 is not measured again
    assert numbers_of(tmp_path) == {3: 3.0, 5: 5.0}
    assert cli.main(["toy", "--seeds=7", "--add", *words, "--reward.epochs=99"]) == 2
    assert "was measured with reward.epochs = " in capsys.readouterr().err
    assert cli.main(["toy", "--seeds=7", *words]) == 0
    assert numbers_of(tmp_path) == {7: 7.0}


def test_a_setting_that_older_results_do_not_have_counts_as_its_default(toy, tmp_path, capsys):
    words = [f"--out_dir={tmp_path}", "--train.workers=1", "--add"]
    assert cli.main(["toy", "--seeds=5", *words]) == 0
    path = tmp_path / "results" / "toy.json"
    old = json.loads(path.read_text())
    del old["settings"]["meta"]["weight_clip"]
    path.write_text(json.dumps(old))
    assert cli.main(["toy", "--seeds=3", *words, "--meta.weight_clip=5"]) == 2
    assert "meta.weight_clip = 10.0, not 5.0" in capsys.readouterr().err
    assert cli.main(["toy", "--seeds=3", *words]) == 0
    assert numbers_of(tmp_path) == {3: 3.0, 5: 5.0}


def test_results_of_the_repository_are_not_written(toy, tmp_path, monkeypatch):
    for folder in ("configs", "results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*")}
    monkeypatch.chdir(tmp_path)
    assert cli.main(["toy", "--seeds=3", "--train.workers=1"]) == 0
    assert numbers_of(tmp_path / "out/reproduce") == {3: 3.0}
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*")}
    assert before == after


def test_results_grow_seed_by_seed_where_they_replace_none(toy, tmp_path, monkeypatch):
    def measure(config, slot=0):
        if config.seed == 5:
            raise signals.Stopped
        return {"row": {"x": float(config.seed)}}

    monkeypatch.setitem(EXPERIMENTS, "toy", EXPERIMENTS["toy"]._replace(measure=measure))
    words = [f"--out_dir={tmp_path}", "--train.workers=1"]
    assert cli.main(["toy", "--seeds=3,5", *words]) == 130
    assert numbers_of(tmp_path) == {3: 3.0}
    assert cli.main(["toy", "--seeds=4,5", *words]) == 130
    assert numbers_of(tmp_path) == {3: 3.0}  # results that are whole are not replaced by a part
    assert cli.main(["toy", "--seeds=4,5", "--add", *words]) == 130
    assert numbers_of(tmp_path) == {3: 3.0, 4: 4.0}


def test_comparisons_are_saved_and_printed(toy, tmp_path, monkeypatch, capsys):
    def measure(config, slot=0):
        return {"old": {"x": 1.0}, "new": {"x": 1.0 + config.seed}}

    entry = EXPERIMENTS["toy"]._replace(
        measure=measure, extend_summary=None, comparisons=against("old", "x")
    )
    monkeypatch.setitem(EXPERIMENTS, "toy", entry)
    words = [f"--out_dir={tmp_path}", "--train.workers=1"]
    assert cli.main(["toy", "--seeds=3,5", *words]) == 0
    results = json.loads((tmp_path / "results" / "toy.json").read_text())
    comparison, = results["comparisons"]
    assert comparison["row"] == "new" and comparison["difference"] == 4.0
    assert "95 % interval" in capsys.readouterr().out


def test_a_stopped_seed_stops_the_experiment_without_results(toy, tmp_path, monkeypatch, capsys):
    def stop(config, slot=0):
        raise signals.Stopped

    monkeypatch.setitem(EXPERIMENTS, "toy", EXPERIMENTS["toy"]._replace(measure=stop))
    words = ["toy", "--seeds=3", f"--out_dir={tmp_path}", "--train.workers=1"]
    assert cli.main(words) == 130
    assert "the same command" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
