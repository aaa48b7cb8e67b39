"""The audit of preference pairs: by hand, and against the rows that training makes of them."""
import functools
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import dialogue

from data import Pair, encode_row
from runtime import files
from runtime.audit import audit, audit_table, report_dropped, shared
from tokenizer import train_tokenizer

TEXTS = [
    "\n\nHuman: What is the capital of France?\n\nAssistant: The capital of France is Paris.",
    "\n\nHuman: How can I sleep better?\n\nAssistant: You could go to bed at the same hour.",
] * 3
HI, HO = "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Ho\n\nAssistant:"
PAIRS = [
    Pair(HI, " abc", " d"),  # the longer answer: chosen three times, rejected once
    Pair(HI, " abc", " d"),
    Pair(HI, " d", " abc"),
    Pair(HI, " abc", " d"),
    Pair(HO, " same", " same"),
    Pair("", " x", " y"),
]


@functools.cache
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_an_audit_by_hand():
    assert audit(PAIRS) == {
        "pairs": 6,
        "different first human turns": 3,
        "characters of prompt (median)": 23.0,
        "characters of chosen (median)": 4.0,
        "characters of rejected (median)": 2.0,
        "longer answer chosen": (3 + 0 + 0.5 + 0.5) / 6,
        "identical on both sides": 1,
        "the same pair again": 3,
        "the same pair with the opposite label": 1,  # three against one: one has to be wrong
        "answers that differ in blanks alone": 0,
        "pairs with an empty answer": 0,
        "pairs with an empty prompt": 1,
    }


@pytest.mark.parametrize("pair, measure", [
    (Pair(HI, " a b", " a  b"), "answers that differ in blanks alone"),
    (Pair(HI, "a", " a\n"), "answers that differ in blanks alone"),
    (Pair(HI, "", " a"), "pairs with an empty answer"),
    (Pair(HI, " a", " \n"), "pairs with an empty answer"),
    (Pair(HI, " \n", " a"), "pairs with an empty answer"),
    (Pair(" ", " a", " b"), "pairs with an empty prompt"),
    (Pair("\n\nHuman: \n\nAssistant:", " a", " b"), "pairs with an empty prompt"),
    (Pair("\n\nSystem:\n\nHuman:\n\nAssistant:", " a", " b"), "pairs with an empty prompt"),
])
def test_pairs_that_teach_nothing_have_rows(pair, measure):
    good = Pair("\n\nSystem: be kind\n\nHuman:\n\nAssistant:", " yes", " no")
    same = Pair(HI, " a b", " a b")
    found = audit([good, pair, same])
    rows = {"answers that differ in blanks alone", "pairs with an empty answer",
            "pairs with an empty prompt"}
    assert {name: found[name] for name in rows} == {name: name == measure for name in rows}


@pytest.mark.parametrize("chosen, count", [("aa", 0), ("ab", 1), ("abb", 1), ("abba", 2)])
def test_contradictions_are_counted_once(chosen, count):
    pairs = [Pair("p", side, {"a": "b", "b": "a"}[side]) for side in chosen]
    assert audit(pairs)["the same pair with the opposite label"] == count


def test_an_audit_of_nothing_is_all_zero():
    assert set(audit([], tokenizer(), (64,)).values()) == {0}


def test_the_audit_counts_as_truncated_what_encode_row_truncates():
    pairs = [Pair(dialogue(turns), " The answer.", " No.") for turns in range(1, 7)]
    lengths = [len(tokenizer().encode_text(p.prompt)) for p in pairs]
    for context in range(lengths[0] + 5, lengths[-1] + 30):
        truncated = []
        for pair, length in zip(pairs, lengths):
            answers = (pair.chosen, pair.rejected)
            row = encode_row(tokenizer(), pair.prompt, answers, context)
            truncated.append(len(row.prompt) < length)
        measure = f"share over {context} tokens (their oldest turns are cut)"
        share = audit(pairs, tokenizer(), (context,))[measure]
        assert share == pytest.approx(np.mean(truncated))


def test_the_audit_counts_tokens_as_rows_have_them():
    row = encode_row(tokenizer(), "Which?", (" this one",), 1000)
    found = audit([Pair("Which?", " this one", " a")], tokenizer())
    assert found["tokens of prompt and longer answer (median)"] == len(row)


def test_shared_counts_topics_and_pairs_in_either_orientation():
    a = [Pair("p", "a", "b"), Pair("q", "a", "b"), Pair("q", "a", "c")]
    b = [Pair("p", "b", "a"), Pair("q", "x", "y"), Pair("r", "a", "b")]
    assert shared({"A": a, "B": b, "C": []}) == {
        "A and B": {"first human turns": 2, "pairs": 1},
        "A and C": {"first human turns": 0, "pairs": 0},
        "B and C": {"first human turns": 0, "pairs": 0},
    }
    assert shared({"A": a}) == {}


def test_the_table_by_hand():
    sets = {"train": {"pairs": 12345, "share": 0.25}, "valid": {"pairs": 7, "share": 0.0}}
    text = audit_table(sets, {"train and valid": {"pairs": 1000, "turns": 2}})
    assert text.splitlines() == [
        "data    train  valid",
        "--------------------",
        "pairs  12,345      7",
        "share   0.250  0.000",
        "shared by train and valid: 1,000 pairs, 2 turns",
    ]


def test_dropped_pairs_are_listed_and_counted_by_reason(tmp_path, capsys):
    run = SimpleNamespace(path=lambda name: str(tmp_path / name))
    dropped = [("a:1", "identical"), ("a:2", "300 tokens"), ("a:9", "412 tokens")]
    report_dropped(run, "train", 1234, dropped)
    lines = files.load_jsonl(tmp_path / "dropped_train.jsonl")
    assert lines[2] == {"source": "a:9", "reason": "412 tokens"}
    assert capsys.readouterr().out.splitlines() == [
        "data: train: 1,234 pairs kept, 3 dropped, "
        f"all listed in {tmp_path}/dropped_train.jsonl",
        "  1 like a:1: identical",
        "  2 like a:2: 300 tokens",
    ]
