"""The experiment that plants label errors in a person's file, with both kinds of voters."""
import json

import pytest
from small_runs import HH_SMALL, STATES, write_base

import experiments.__main__ as cli


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("voters", ["states", "trained"])
def test_planted_errors_are_found_and_left_out(base, tmp_path, voters):
    words = STATES + [f"--model.init={base}/hf"] if voters == "states" else HH_SMALL
    words = [word for word in words if not word.startswith(("--data.", "--reward.", "--ppo."))]
    words = [word for word in words if "members" not in word] + ["--ensemble.members=4"]
    words += [f"--data.train={base}/mine.jsonl", "--seeds=3", f"--out_dir={tmp_path}"]
    assert cli.main(["planted", *words]) == 0
    run, = json.loads((tmp_path / "results" / "planted.json").read_text())["runs"].values()
    detectors = {"vote", "length", "words and length"}
    if voters == "states":
        detectors.add("one head on all states")
    for share, wrong in ((5, 6), (10, 12), (20, 24)):
        rows = {name.partition(": ")[2]: row for name, row in run.items()
                if name.startswith(f"{share}% flipped")}
        assert set(rows) >= detectors
        assert rows["vote"]["AUROC"] > 0.5  # chance
        assert rows["cleaned by drop"]["wrong before"] == pytest.approx(wrong / 120)
