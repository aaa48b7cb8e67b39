"""formats.pairs.exchange: a label is exchanged in its own layout; twice is the same record."""
import copy
import json

import pytest
from layout_examples import ARENA, EXAMPLES, FIVE, FOUR, HELPSTEER2, HELPSTEER3, PKU, TLDR, USER

from config import Data
from data import Pair
from formats.adapter import Reading
from formats.pairs import exchange, parse_record

SEVERAL = ("Nectar", "RewardBench 2", "RM-Bench")
SINGLE = [name for name in EXAMPLES if name not in SEVERAL]


def parse_one(record, settings=None):
    pair, = parse_record(record, "f:1", Reading(Data(**settings or {})))
    return pair


def as_csv(record):
    """Numbers and booleans as CSV has them"""
    out = {}
    for key, value in record.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        out[key] = str(value) if is_number and key != "margin" else value
    return out


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("change", [dict, as_csv])
def test_the_exchanged_record_is_read_as_the_exchanged_pair(name, change):
    layout, record, _, settings = EXAMPLES[name]
    record = change(record)
    before = copy.deepcopy(record)
    pair = parse_one(record, settings)
    other = exchange(pair)
    assert record == before and other != record and list(other) == list(record)
    again = parse_one(other, settings)
    assert (again.prompt, again.chosen, again.rejected) == (pair.prompt, pair.rejected, pair.chosen)
    assert again.layout == layout
    assert again.margin == (None if pair.margin is None else -pair.margin)
    assert json.dumps(exchange(again)) == json.dumps(record)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_record_of_several_pairs_is_not_exchanged(name):
    layout, record, _, _ = EXAMPLES[name]
    for pair in parse_record(record, "f:1", Reading()):
        assert exchange(pair) is None


def test_a_pair_without_a_record_is_not_exchanged():
    assert exchange(Pair("p", "a", "b")) is None


def test_columns_of_an_answer_go_with_it():
    record = EXAMPLES["UltraFeedback cleaned"].record
    other = exchange(parse_one(record | {"margin": 0.25, "note": "chosen", "chosen-only": 1}))
    assert (other["chosen-rating"], other["rejected-rating"]) == (2, 5)
    assert (other["chosen-model"], other["rejected-model"]) == ("b", "a")
    assert (other["margin"], other["note"], other["chosen-only"]) == (-0.25, "chosen", 1)


def test_messages_repeat_the_chosen_side():
    record = EXAMPLES["UltraFeedback binarized"].record
    other = exchange(parse_one(record))
    assert other["messages"] == other["chosen"] == [USER, FIVE]
    assert (other["score_chosen"], other["score_rejected"]) == (6.5, 8.0)
    kept = exchange(parse_one(record | {"messages": [USER]}))
    assert kept["messages"] == [USER] and kept["rejected"] == [USER, FOUR]


@pytest.mark.parametrize("margin", [0, None, 0.0])
def test_a_margin_of_zero_stays(margin):
    record = EXAMPLES["explicit"].record | {"margin": margin}
    assert str(exchange(parse_one(record))["margin"]) == str(margin)


def test_given_votes_change_sides():
    other = exchange(parse_one(EXAMPLES["hh-rlhf-strength-cleaned"].record))
    assert other["mean preference difference"] == -0.4
    assert other["std preference difference"] == 0.1
    assert other["GPT4 label"] == 0
    assert other["chosen score list"] == [0.9, 0.9]
    copied = {"chosen": ["a", "b"], "rejected": ["a", "c"], "GPT4 label": -1,
              "chosen_score_list": [1], "rejected_score_list": [2]}
    other = exchange(parse_one(copied))
    assert other["GPT4 label"] == -1 and other["chosen_score_list"] == [2]


@pytest.mark.parametrize("record, settings, change", [
    (TLDR, {}, {"choice": 1}),
    (PKU, {}, {"better_response_id": 1}),
    (PKU, {"labels": "safer"}, {"safer_response_id": 0}),
    (ARENA, {}, {"winner_model_a": 0, "winner_model_b": 1}),
    (HELPSTEER2, {}, {
        "preference_strength": 2,
        "all_preferences_unprocessed": [{"strength": 2}, {"strength": -1}, {"strength": -100}]}),
    (HELPSTEER3, {}, {
        "overall_preference": 2,
        "individual_preference": [{"score": 2, "reasoning": "x"}, {"score": 0}, {"score": -1}]}),
])
def test_only_the_label_changes(record, settings, change):
    assert exchange(parse_one(record, settings)) == record | change
