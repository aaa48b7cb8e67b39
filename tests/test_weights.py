"""data.weights: from the files to the losses of the SFT model, members and reward models."""
import json

import pytest
import torch
from helpers import HH_SMALL, go, random_rows, tiny, write_pairs
from small_runs import depends_on, opened

import train
from common import file_weights
from config import ConfigError
from data import load_pairs

NO_VALIDATION = ["--data.valid_share=0", "--reward.methods=", "--ppo.methods="]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with an SFT model on two files: 6 pairs and one that is dropped, and 2 pairs"""
    folder = tmp_path_factory.mktemp("weights")
    with write_pairs(folder / "a.jsonl", 6).open("a") as file:
        file.write(json.dumps({"prompt": "a", "chosen": " b", "rejected": " b"}) + "\n")
    write_pairs(folder / "b.jsonl", 2, chosen=" c", rejected=" d")
    words = [f"--data.train={folder}/a.jsonl,{folder}/b.jsonl", *NO_VALIDATION, "--stage=sft"]
    assert go(folder / "run", *words, small=HH_SMALL) == 0
    return folder


def run_with(folder, *words):
    data = f"--data.train={folder}/a.jsonl,{folder}/b.jsonl"
    return opened(folder / "run", data, *NO_VALIDATION, *words, small=HH_SMALL)


OF_MEAN_ONE = 6 * [1 / 1.5] + 2 * [2.0]  # of weights 1 and 3


def test_every_pair_has_the_weight_of_its_file(folder, tmp_path):
    words = ["--data.weights=2,0.5", "--data.valid_share=0.4"]
    sets = load_pairs(run_with(folder, *words).cfg)
    assert {pair.weight for pair in sets["train"]} == {2.0, 0.5}
    for pair in sets["train"] + sets["valid"]:
        assert pair.weight == (0.5 if "b.jsonl:" in pair.source else 2.0)
    plain = load_pairs(run_with(folder, "--data.valid_share=0.4").cfg)
    assert plain == sets and {pair.weight for pair in plain["train"]} == {1.0}
    other = write_pairs(tmp_path / "c.jsonl", 4, chosen=" e")
    beside = load_pairs(run_with(folder, "--data.weights=2,0.5", f"--data.valid={other}").cfg)
    assert [pair.weight for pair in beside["train"]] == 7 * [2.0] + 2 * [0.5]
    assert {pair.weight for pair in beside["valid"]} == {1.0}


def test_the_mean_weight_of_the_pairs_that_are_left_is_one(folder):
    assert file_weights(run_with(folder, "--data.weights=1,3")).tolist() == (
        pytest.approx(OF_MEAN_ONE))
    assert file_weights(run_with(folder, "--data.weights=0,3")).tolist() == 6 * [0] + 2 * [4]
    for even in ("--data.weights=", "--data.weights=0.3,0.3"):
        assert file_weights(run_with(folder, even)) is None


def test_pairs_that_weigh_nothing_are_an_error_before_training(folder, tmp_path, capsys):
    run = run_with(folder, "--data.weights=0,1", "--data.limit=6")
    with pytest.raises(ConfigError, match="^data.weights: every training pair that is left has"):
        file_weights(run)
    words = [f"--data.train={folder}/a.jsonl,{folder}/b.jsonl", *NO_VALIDATION, "--data.limit=6"]
    assert go(tmp_path, *words, "--data.weights=0,1", small=HH_SMALL) == 2
    assert "error: data.weights: every" in capsys.readouterr().err
    assert not (tmp_path / "sft.pt").exists()


@pytest.mark.parametrize("function, item", [
    (train.train_member, 0), (train.train_reward, "baseline"),
])
def test_weights_reach_the_loss_of_members_and_reward_models(
    folder, monkeypatch, function, item
):
    run = run_with(folder, "--data.weights=1,3")
    seen = {}

    def recorded(model, rows, margin, p, aux_loss, weight, loss_of, centering):
        seen.update(zip(map(id, rows), weight.tolist(), strict=True))
        return model.score.weight.sum(), {}

    monkeypatch.setattr(train, "pair_loss", recorded)
    run.fingerprint("sft")
    function(run, item)
    assert [seen[id(row)] for row in run.train.rows] == pytest.approx(OF_MEAN_ONE)


def test_weights_of_files_multiply_those_that_a_stage_gives(folder):
    given = torch.arange(8.0)
    weight = train.pair_weights(run_with(folder, "--data.weights=1,3"), given)
    torch.testing.assert_close(weight, given * torch.tensor(OF_MEAN_ONE))
    assert train.pair_weights(run_with(folder), given) is given
    assert train.pair_weights(run_with(folder), None) is None


@pytest.mark.parametrize("answers, num_rows", [("chosen", 8), ("both", 16)])
def test_weights_reach_the_loss_of_sft(folder, monkeypatch, answers, num_rows):
    run = run_with(folder, "--data.weights=1,3", f"--sft.answers={answers}")
    seen = {}

    def recorded(model, rows, weight):
        for row, w in zip(rows, weight.tolist(), strict=True):
            seen[row.prompt.tobytes(), row.responses[0].tobytes()] = w
        return model.lm_head.weight.sum(), {}

    monkeypatch.setattr(train, "sft_loss", recorded)
    run.fingerprint("tokenizer")
    train.train_sft(run)
    assert len(seen) == num_rows
    for row, weight in zip(run.train.rows, OF_MEAN_ONE):
        for response in row.responses[:num_rows // 8]:
            assert seen[row.prompt.tobytes(), response.tobytes()] == pytest.approx(weight)


def test_the_weighted_sft_loss_is_a_sum_over_rows():
    model = tiny()
    rows = random_rows(3, 1, seed=4)
    weight = torch.tensor([2.0, 0.0, 0.5])
    loss, _ = train.sft_loss(model, rows, weight)
    expected = sum(w * train.sft_loss(model, [row])[0] for row, w in zip(rows, weight))
    torch.testing.assert_close(loss, expected)


def test_weights_are_depended_on_only_where_they_differ(folder):
    data = f"--data.train={folder}/a.jsonl,{folder}/b.jsonl"

    def depends(*words):
        return depends_on(folder / "run", data, "--ppo.methods=", *words)

    plain = depends()
    assert depends("--data.weights=2,2") == depends("--data.weights=1,1") == plain
    weighted = depends("--data.weights=2,1")
    for name in ("sft", "member_00", "reward_flip"):
        assert weighted[name]["data.weights"] == [2.0, 1.0]
    assert weighted["tokenizer"] == plain["tokenizer"]
