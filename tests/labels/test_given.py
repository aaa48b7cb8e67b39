"""Votes given in a file."""
import json
from types import SimpleNamespace

import pytest
import torch

from config import Config, assign
from data import DataError, Pair
from labels import given
from strength import strength


def make_run(path, pairs, valid=(), **more):
    cfg = assign(assign(Config(), "strength.votes", str(path)), "data.train", "my.jsonl")
    for key, value in more.items():
        cfg = assign(cfg, key, value)
    return SimpleNamespace(
        cfg=cfg, pairs={"train": pairs, "valid": list(valid)},
        train=SimpleNamespace(pairs=pairs), valid=SimpleNamespace(pairs=list(valid)))


def make_pairs(n):
    return [Pair("q", f"c{i}", f"r{i}", source=f"my.jsonl:{i + 1}", index=i) for i in range(n)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_mean_and_std_come_back_exactly(tmp_path):
    path = write(tmp_path / "v.jsonl", [{"mean": 1.5, "std": 0.5}, {"mean": -2.0}])
    mean, std = strength(given.read_votes(make_run(path, make_pairs(2)))["train"])
    assert mean.tolist() == [1.5, -2.0] and std.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("blank", [" ", "_"])
def test_the_papers_score_lists_are_read(tmp_path, blank):
    record = {
        "chosen": ["Hi", "Hello"], "rejected": ["Hi", "No"], "GPT4 label": 1,
        f"chosen{blank}score{blank}list": [1.0, 2.0, 3.0],
        f"rejected{blank}score{blank}list": [0.5, 2.5, 1.0],
    }
    path = write(tmp_path / "v.jsonl", [record])
    votes = given.read_votes(make_run(path, make_pairs(1)))
    assert votes["train"].tolist() == [[0.5], [-0.5], [2.0]]


def test_votes_are_found_by_texts_in_any_order_and_either_direction(tmp_path):
    path = write(tmp_path / "v.jsonl", [
        {"prompt": "q", "chosen": "r1", "rejected": "c1", "votes": [3.0, 1.0]},
        {"prompt": "q", "chosen": "c0", "rejected": "r0", "votes": [2.0, 4.0]},
    ])
    votes = given.read_votes(make_run(path, make_pairs(2)))["train"]
    assert votes.tolist() == [[2.0, -3.0], [4.0, -1.0]]


@pytest.mark.parametrize("second, is_refused", [
    ({"chosen": "c0", "rejected": "r0", "mean": 1.0001}, False),
    ({"chosen": "r0", "rejected": "c0", "mean": -1.0}, False),
    ({"chosen": "c0", "rejected": "r0", "mean": 2.0}, True),
    ({"chosen": "r0", "rejected": "c0", "mean": 1.0}, True),
])
def test_two_records_of_one_pair_must_agree(tmp_path, second, is_refused):
    first = {"chosen": "c0", "rejected": "r0", "mean": 1.0}
    run = make_run(write(tmp_path / "v.jsonl", [first, second]), make_pairs(1))
    if is_refused:
        with pytest.raises(DataError, match=r"v.jsonl:2: other votes than an earlier record"):
            given.read_votes(run)
    else:
        assert given.read_votes(run)["train"].mean().item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("prompt", ["Hi?", [{"role": "user", "content": "Hi?"}]])
def test_votes_are_found_by_the_texts_of_the_users_own_file(tmp_path, prompt):
    records = [{"prompt": prompt, "chosen": f"yes {i}", "rejected": "no"} for i in range(2)]
    pairs = [Pair("\n\nHuman: Hi?\n\nAssistant:", f" yes {i}", " no", f"my.jsonl:{i + 1}", index=i,
                  record=record) for i, record in enumerate(records)]
    path = write(tmp_path / "v.jsonl", [
        records[1] | {"mean": 1.0},
        {"prompt": prompt, "chosen": "no", "rejected": "yes 0", "mean": 2.0},
    ])
    assert given.read_votes(make_run(path, pairs))["train"].mean(0).tolist() == [-2.0, 1.0]


def test_validation_pairs_have_votes_or_none(tmp_path):
    pairs = make_pairs(4)
    path = write(tmp_path / "v.jsonl", [{"mean": float(i)} for i in range(4)])
    votes = given.read_votes(make_run(path, pairs[:3], pairs[3:]))
    assert votes["train"].mean(0).tolist() == [0.0, 1.0, 2.0]
    assert votes["valid"].mean(0).tolist() == [3.0]
    few = write(tmp_path / "w.jsonl", [
        {"prompt": "q", "chosen": p.chosen, "rejected": p.rejected, "mean": 1.0} for p in pairs[:3]
    ])
    assert "valid" not in given.read_votes(make_run(few, pairs[:3], pairs[3:]))


@pytest.mark.parametrize("records, message", [
    ([{"mean": 1.0}], "1 records for 2 pairs"),
    ([{"mean": 1.0}, {"score": 2}], "v.jsonl:2: has no votes"),
    ([{"mean": 1.0}, {"mean": "high"}], "v.jsonl:2: mean and std holds 'high'"),
    ([{"votes": [1.0]}, {"votes": [1.0, 2.0]}], "v.jsonl:2: 2 votes, 1 in the first record"),
    ([{"votes": []}, {"votes": []}], "v.jsonl:1: votes must be a list of numbers"),
    ([{"votes": 3}, {"votes": [1.0]}], "v.jsonl:1: votes must be a list of numbers"),
    ([[1], [2]], "v.jsonl:1: a record must be an object"),
    ([{"chosen score list": [1.0], "rejected score list": [1.0, 2.0]}] * 2,
     "v.jsonl:1: 1 scores of chosen and 2 of rejected"),
    ([{"chosen": "c0", "rejected": "r0", "mean": 1.0}] * 2, "has no votes on this pair"),
    ([{"chosen": "c0", "rejected": "r0", "mean": 1.0}, {"mean": 1.0}],
     "v.jsonl:2: has no chosen and rejected"),
])
def test_what_is_wrong_is_one_line(tmp_path, records, message):
    path = write(tmp_path / "v.jsonl", records)
    with pytest.raises(DataError) as error:
        given.read_votes(make_run(path, make_pairs(2)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"mean": NaN}\n{"mean": 1.0}\n')
    with pytest.raises(DataError, match="finite"):
        given.read_votes(make_run(path, make_pairs(2)))


def test_several_files_need_texts(tmp_path):
    path = write(tmp_path / "v.jsonl", [{"mean": 1.0}])
    run = make_run(path, make_pairs(1))
    run.cfg = assign(run.cfg, "data.train", "a.jsonl,b.jsonl")
    with pytest.raises(DataError, match="give one file of pairs"):
        given.read_votes(run)


def test_a_votes_tensor_is_of_voters_by_pairs(tmp_path):
    path = write(tmp_path / "v.jsonl", [{"votes": [1, 2, 3]}, {"votes": [4, 5, 6]}])
    votes = given.read_votes(make_run(path, make_pairs(2)))["train"]
    assert votes.shape == (3, 2) and votes.dtype == torch.float32
