"""What becomes of each label without a self-test, and the printed words."""
import torch

from config import Config, assign
from labels import cleaning, trust
from labels.trust import Estimate
from strength import treat


def test_a_treatment_drops_or_exchanges_and_a_person_decides_first():
    swap = torch.tensor([True, True, False, False, False])
    p = torch.tensor([1.0, 1.0, torch.nan, torch.nan, 1.0])
    decided = ["", "right", "", "right", "wrong"]
    action = cleaning.treated_actions(swap, p, torch.zeros(5), decided)
    assert action == ["exchange", "keep", "drop", "keep", "exchange"]


def test_margins_are_in_the_direction_of_the_label_that_comes_out():
    mean = torch.tensor([-2.0, -1.0, 3.0, 4.0])
    labels = treat(mean, "flip_margin", q=0.25)  # exchanges the first
    action = ["exchange", "exchange", "keep", "drop"]
    assert cleaning.margins_after(labels, action).tolist() == [2.0, 1.0, 3.0, 4.0]
    assert cleaning.margins_after(labels, ["keep"] * 4).tolist() == mean.tolist()


def test_groups_that_stand_out_are_named_the_most_doubted_first():
    def group(value, doubted, stands_out):
        return {"column": "batch", "value": value, "pairs": 100, "doubted": doubted, "low": 0.1,
                "high": 0.5, "stands_out": stands_out}

    lines = cleaning.group_lines([group("a", 0.2, True), group("b", 0.4, True),
                                  group("c", 0.9, False)])
    assert [line.split(":")[0] for line in lines] == ["batch = b", "batch = a"]


def test_what_is_written_as_json_has_no_tensors():
    decision = trust.Decision(
        torch.ones(3), "drop", Estimate(0.5, 0.4, 0.6), Estimate(0.5, 0.4, 0.6), 0, "why",
        torch.ones(3), torch.ones(3))
    assert cleaning.as_json({"a": decision}) == {"a": {
        "action": "drop", "reviewed": 0, "reason": "why",
        "precision": {"value": 0.5, "low": 0.4, "high": 0.6},
        "tpr": {"value": 0.5, "low": 0.4, "high": 0.6},
    }}


def test_the_words_name_who_looked_for_flips_and_who_decided():
    one = Estimate(0.9, 0.8, 1.0)
    by_name = {"vote": one, "length": one, "words": one}
    test = trust.SelfTest(20, by_name, by_name, by_name, by_name, True)
    nothing = torch.zeros(2, dtype=torch.bool)
    decision = trust.Decision(nothing, "keep", one, one, 0, "why", nothing, torch.ones(2))
    found = cleaning.Assessment(torch.ones(2), torch.ones(2), torch.ones(2), one, test, decision,
                                ["", ""], ["keep", "keep"])
    first, *_, last = cleaning.trust_lines(found, Config())
    assert last.startswith("the suspects are listed for you to read")
    start = "self-test: 20 labels were flipped on copies, and "
    assert first.startswith(f"{start}voters trained anew find them surely better")
    found = found._replace(decided=["wrong", ""], action=["drop", "drop"])
    lines = cleaning.trust_lines(found, Config())
    assert lines[-1] == "cleaned.jsonl: 2 dropped, 1 of them by your decisions; why"
    given = assign(Config(), "strength.votes", "votes.jsonl")
    first = cleaning.trust_lines(found, given)[0]
    assert "flipped on copies, and the given votes find them surely" in first
