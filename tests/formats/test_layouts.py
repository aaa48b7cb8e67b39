"""The adapters: the record of each layout becomes exact pairs; orientation, ties, odd records."""
import json
import random

import pytest
from faults import mutations
from hypothesis import given
from hypothesis import strategies as st
from layout_examples import (
    ARENA,
    EXAMPLES,
    FIVE,
    FOUR,
    HELPSTEER2,
    HELPSTEER3,
    HI,
    PKU,
    SUM,
    TLDR,
    USER,
    WEBGPT,
)

from config import Data
from data import DataError
from formats.adapter import Reading
from formats.implicit_prompt import split_at_word
from formats.pairs import ADAPTERS, BY_NAME, parse_record, read_pairs
from formats.two_answers import read_text_list


def texts(pairs):
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


def parse(record, **settings):
    return texts(parse_record(record, "f:1", Reading(Data(**settings))))


def write(folder, *records):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_record_of_each_layout_becomes_its_pairs(name):
    layout, record, expected, settings = EXAMPLES[name]
    before = json.dumps(record)
    pairs = parse_record(record, "f:1", Reading(Data(**settings)), index=5)
    assert texts(pairs) == expected
    assert {pair.layout for pair in pairs} == {layout}
    assert all(pair.record is record for pair in pairs)
    assert [pair.index for pair in pairs] == list(range(5, 5 + len(pairs)))
    assert json.dumps(record) == before


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_layout_may_be_named(name):
    layout, record, expected, settings = EXAMPLES[name]
    assert parse(record, format=layout, **settings) == expected


def test_there_is_an_example_of_every_layout():
    assert {example.layout for example in EXAMPLES.values()} == set(BY_NAME) - {"point-wise scores"}
    assert len(BY_NAME) == len(ADAPTERS)


# --------------------------------------------------------------------------------------------------
# Orientation and ties


@pytest.mark.parametrize("record, first_wins, second_wins, tie", [
    (HELPSTEER2, {"preference_strength": -1}, {"preference_strength": 3},
     {"preference_strength": 0}),
    (HELPSTEER3, {"overall_preference": -3}, {"overall_preference": 1}, {"overall_preference": 0}),
    (WEBGPT, {"score_0": 1, "score_1": 0}, {"score_0": -1, "score_1": 1},
     {"score_0": 0.0, "score_1": 0.0}),
    (ARENA, {}, {"winner_model_a": 0, "winner_model_b": 1},
     {"winner_model_a": 0, "winner_tie": 1}),
    (PKU, {"better_response_id": 0}, {"better_response_id": 1}, None),
    (TLDR, {"choice": 0}, {"choice": 1}, None),
])
def test_the_label_says_which_answer_is_chosen(tmp_path, record, first_wins, second_wins, tie):
    (prompt, first, second), = parse(record | first_wins)
    assert "Hello" in first or "late" in first
    assert parse(record | second_wins) == [(prompt, second, first)]
    if tie is not None:
        said = []
        path = write(tmp_path, record, record | tie, record | second_wins, record | tie)
        pairs = read_pairs(path, say=said.append)
        assert [(pair.source, pair.index) for pair in pairs] == [(f"{path}:1", 0), (f"{path}:3", 1)]
        assert f"data: note: {path}: ties of two answers make no pair (2)" in said


def test_a_file_of_ties_alone_is_one_line(tmp_path):
    path = write(tmp_path, HELPSTEER2 | {"preference_strength": 0})
    with pytest.raises(DataError, match="makes no pair: all of its answers are ties"):
        read_pairs(path)


def test_data_labels_chooses_between_the_labels_of_safe_rlhf():
    assert parse(PKU, labels="better") == [(HI, " Hello", " No")]
    assert parse(PKU, labels="safer") == [(HI, " No", " Hello")]
    only_better = {key: value for key, value in PKU.items() if key != "safer_response_id"}
    assert parse(only_better) == [(HI, " Hello", " No")]
    with pytest.raises(DataError, match="'safer_response_id' is missing"):
        parse(only_better, labels="safer")


# --------------------------------------------------------------------------------------------------
# Several answers


def scored(prompt, response, score):
    return {"prompt": prompt, "response": response, "score": score, "by": "me"}


def test_scores_of_one_prompt_make_pairs_wherever_they_are_in_the_file(tmp_path):
    records = [
        scored("p", "low", 0.1), scored("q", "alone", 1), scored("p", "high", 0.9),
        scored("p", "low too", 0.1),
    ]
    path = write(tmp_path, *records)
    said = []
    pairs = read_pairs(path, say=said.append)
    prompt = "\n\nHuman: p\n\nAssistant:"
    assert texts(pairs) == [(prompt, " high", " low"), (prompt, " high", " low too")]
    assert [(pair.source, pair.index) for pair in pairs] == [(f"{path}:3", 0), (f"{path}:3", 1)]
    assert pairs[0].record == {"chosen": records[2], "rejected": records[0]}
    assert {pair.layout for pair in pairs} == {"point-wise scores"}
    assert said == [
        f'data: note: {path}: prompts without "\\n\\nHuman:" are read as human turns (2)',
        f"data: note: {path}: ties of two answers make no pair (1)",
    ]


@given(st.lists(st.tuples(st.sampled_from("pq"), st.integers(0, 8)), max_size=12),
       st.sampled_from([0.0, 1.0, 2.5, 8.0]))
def test_pairs_of_scores_are_those_that_differ_enough(tmp_path_factory, answers, least):
    path = write(
        tmp_path_factory.mktemp("s"),
        *[scored(prompt, str(i), score) for i, (prompt, score) in enumerate(answers)],
        scored("r", "a", 0), scored("r", "b", 100),  # a file needs a pair
    )
    expected = []
    for i, (prompt, score) in enumerate(answers):
        for j, (other, lower) in enumerate(answers):
            if prompt == other and score > lower and score - lower >= least:
                expected.append((f"\n\nHuman: {prompt}\n\nAssistant:", f" {i}", f" {j}"))
    found = texts(read_pairs(path, Data(min_score_diff=least), [].append))
    assert sorted(found[:-1]) == sorted(expected)


@pytest.mark.parametrize("least, expected", [
    (0.0, 3), (1.0, 3), (1.5, 1), (2.0, 1), (2.5, 0),
])
def test_ranks_make_pairs_that_differ_enough(least, expected):
    record = EXAMPLES["Nectar"].record
    reading = Reading(Data(min_score_diff=least))
    assert len(parse_record(record, "f:1", reading)) == expected
    assert reading.notes["ties"] == 3 - expected


def test_the_minimum_difference_holds_for_webgpt():
    assert parse(WEBGPT, min_score_diff=1.0)
    assert not parse(WEBGPT, min_score_diff=1.5)


def test_too_many_answers_to_one_prompt_are_refused(tmp_path):
    path = write(tmp_path, *[scored("p", "a", i) for i in range(101)])
    with pytest.raises(DataError, match=r":101: its prompt has 101 answers, more than 100; keep"):
        read_pairs(path)


# --------------------------------------------------------------------------------------------------
# Messages and turns

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("prompt, expected", [
    ([SYSTEM, USER], "\n\nSystem: Be brief." + SUM),
    ([USER, FOUR, USER], "\n\nHuman: 2+2?\n\nAssistant: 4" + SUM),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "sum"}]},
      {"role": "tool", "content": "4"}],
     '\n\nHuman: 2+2?\n\nAssistant: [{"name": "sum"}]\n\nTool: 4\n\nAssistant:'),
    ([{"role": "user", "content": [
        {"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}], SUM),
    ([{"role": "User", "content": "2+2?"}], SUM),
    ([{"from": "human", "value": "2+2?"}], SUM),
    ("2+2?", SUM),
    (SUM, SUM),
    (SUM + " ", SUM),
    ([], ""),
])
def test_every_role_becomes_a_turn(prompt, expected):
    record = {"prompt": prompt, "chosen": [FOUR], "rejected": [FIVE]}
    if expected:
        assert parse(record) == [(expected, " 4", " 5")]
    else:  # no prompt: two dialogues
        assert parse(record) == [("\n\nAssistant:", " 4", " 5")]


@pytest.mark.parametrize("chosen, rejected", [
    ("4", "5"), (FOUR, FIVE), ([FOUR], [FIVE]), ([USER, FOUR], [USER, FIVE]), ("4", [FIVE]),
])
def test_an_answer_is_a_text_a_message_or_a_list_and_may_repeat_the_prompt(chosen, rejected):
    record = {"prompt": [USER], "chosen": chosen, "rejected": rejected}
    assert parse(record) == [(SUM, " 4", " 5")]


@pytest.mark.parametrize("chosen, rejected, expected", [
    # they differ from the first answer on
    ([USER, FOUR, USER, FOUR], [USER, FIVE, USER, FOUR],
     (SUM, " 4" + SUM + " 4", " 5" + SUM + " 4")),
    # one goes on longer
    ([USER, FOUR, USER, FOUR], [USER, FOUR], (SUM, " 4" + SUM + " 4", " 4")),
    # both are equal: dropped later, like two equal texts
    ([USER, FOUR], [USER, FOUR], (SUM, " 4", " 4")),
    # nothing in common
    ([USER, FOUR], [SYSTEM, USER, FIVE], ("", SUM + " 4", "\n\nSystem: Be brief." + SUM + " 5")),
])
def test_dialogues_are_split_where_an_answer_differs(chosen, rejected, expected):
    assert parse({"chosen": chosen, "rejected": rejected}) == [expected]


def test_sharegpt_may_have_system_instructions():
    record = EXAMPLES["sharegpt"].record
    expected = [("\n\nSystem: Be brief." + HI, " Hello", " No")]
    assert parse(record | {"system": "Be brief."}) == expected
    assert parse(record | {"system": ""}) == [(HI, " Hello", " No")]


def test_half_a_surrogate_pair_inside_json_of_the_arena_is_replaced():
    assert read_text_list('["a\\ud83d", null]', "prompt", "f:1") == ["a?", ""]


# --------------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize("prompt, chosen, expected", [
    ("Hi", " Hello", (HI, " Hello")),
    ("Hi", "Hello", (HI, " Hello")),
    (" Hi \n", "Hello", (HI, " Hello")),
    ("Hi", "\nHello", (HI, "\nHello")),
    (HI, "Hello", (HI, "Hello")),          # a dialogue stays as it is ...
    (HI + "  ", "Hello", (HI, "  Hello")),  # ... but for a blank at its end
    (HI + " ", " Hello", (HI, "  Hello")),
    (HI + "\n", "Hello", (HI + "\n", "Hello")),
])
def test_a_bare_prompt_is_a_human_turn_and_a_blank_at_the_end_moves(prompt, chosen, expected):
    (prompt, chosen, rejected), = parse({"prompt": prompt, "chosen": chosen, "rejected": chosen})
    assert (prompt, chosen) == expected
    assert rejected == chosen


def test_a_blank_on_one_side_alone_is_kept():
    """It gives a side away, which the audit has to see."""
    record = {"prompt": "Hi", "chosen": " Hello", "rejected": "No"}
    assert parse(record) == [(HI, " Hello", "No")]


@pytest.mark.parametrize("prompt", [None, ""])
def test_an_empty_prompt_counts_as_none(prompt):
    dialogues = EXAMPLES["HH-RLHF"].record | {"prompt": prompt}
    assert parse(dialogues) == [(HI, " Hello", " No")]
    messages = EXAMPLES["conversational, implicit"].record | {"prompt": prompt}
    assert parse(messages) == [(SUM, " 4", " 5")]


@pytest.mark.parametrize("chosen, rejected, prompt", [
    ("What is rust? Iron", "What is rust? It is", "What is rust?"),
    ("What is rust?  a", "What is rust?  b", "What is rust?"),
    ("yes", "yes sir", ""),
    ("a b", "a b c", "a"),
    ("a b", "a b", "a"),
    (" this", " that", ""),
    ("", "", ""),
    ("x\ny", "x\nz", "x"),
])
def test_an_implicit_prompt_ends_with_a_word(chosen, rejected, prompt):
    for a, b in ((chosen, rejected), (rejected, chosen)):
        assert split_at_word(a, b) == (prompt, a[len(prompt):], b[len(prompt):])


@given(st.text("ab \n"), st.text("ab \n"), st.text("ab \n"))
def test_an_implicit_prompt_loses_no_character(common, chosen, rejected):
    prompt, a, b = split_at_word(common + chosen, common + rejected)
    assert (prompt + a, prompt + b) == (common + chosen, common + rejected)
    assert prompt == prompt.rstrip()
    assert not prompt or a[:1].isspace() and b[:1].isspace()


def test_what_was_done_to_the_prompts_is_said_once(tmp_path):
    bare = EXAMPLES["explicit, bare prompt"].record
    path = write(tmp_path, bare, EXAMPLES["implicit"].record, EXAMPLES["explicit"].record, bare)
    said = []
    read_pairs(path, say=said.append)
    assert said == [
        f'data: note: {path}: prompts without "\\n\\nHuman:" are read as human turns (2)',
        f"data: note: {path}: prompts are what both texts begin with, up to a word's end (1)",
    ]
    said.clear()
    read_pairs(write(tmp_path, EXAMPLES["explicit"].record, EXAMPLES["HH-RLHF"].record),
               say=said.append)
    assert not said


# --------------------------------------------------------------------------------------------------
# Records that are wrong

BAD = {
    "unknown role": (
        {"chosen": [{"role": "x\ny", "content": ""}], "rejected": [FOUR]},
        r"'chosen' has a message of role 'x\\ny'; known are user, human"),
    "image": (
        {"chosen": [{"role": "user", "content": [{"type": "image"}]}], "rejected": [FOUR]},
        r"'chosen' has a part that is no text \('image'\)"),
    "no messages": ({"chosen": [], "rejected": [FOUR]}, "'chosen' is an empty list"),
    "content of a number": (
        {"chosen": [{"role": "user", "content": 3}], "rejected": [FOUR]},
        "'chosen' must be a string, not a number"),
    "number among texts": (
        {"chosen": ["a", 3], "rejected": ["a", "b"]}, "'chosen' must be a string, not a number"),
    "texts on one side": (
        {"chosen": ["a"], "rejected": "b"}, "'rejected' must be a list of texts, not a string"),
    "choice": (TLDR | {"choice": 2}, "'choice' must be 0 or 1, not 2"),
    "summaries": (TLDR | {"summaries": [{"text": "a"}]}, "'summaries' must be a list of two"),
    "no post": (TLDR | {"info": {}}, "'info' has neither a post nor an article"),
    "no title": (TLDR | {"info": {"post": "a"}}, "'info' has no 'title'"),
    "id": (PKU | {"better_response_id": -1}, "'better_response_id' must be 0 or 1, not -1"),
    "no id": (
        PKU | {"better_response_id": None}, "'better_response_id' must be a number, not null"),
    "strength": (
        HELPSTEER2 | {"preference_strength": -100},
        "'preference_strength' must be a number from -3 to 3, not -100"),
    "nan": (WEBGPT | {"score_0": float("nan")}, "'score_0' must be a number, not nan or infinite"),
    "question": (WEBGPT | {"question": "Hi"}, "'question' must be an object, not a string"),
    "arena": (ARENA | {"prompt": "Hi"}, "'prompt' must be a list of texts in JSON"),
    "arena turns": (ARENA | {"response_a": '["a"]'}, "'response_a' has 1 turns, 'prompt' 2"),
    "rank": (
        {"prompt": "p", "answers": [{"answer": "a", "rank": None}]}, "'rank' must be a number"),
    "no rank": ({"prompt": "p", "answers": [{"answer": "a"}]}, "an answer has no 'rank'"),
    "answers": ({"prompt": "p", "answers": "a"}, "'answers' must be a list"),
    "score": (scored("p", "a", "high"), "'score' must be a number, not a string"),
    "response": (scored("p", ["a"], 1), "'response' must be a string, not a list"),
    "no rejected": (
        {"prompt": "p", "chosen": ["a"], "rejected": []}, "'rejected' is an empty list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_record_is_one_line(name):
    record, message = BAD[name]
    with pytest.raises(DataError, match=f"^f:1: .*{message}"):
        parse(record)


def test_a_named_layout_is_not_guessed():
    record = {"chosen": "\n\nHuman: a b", "rejected": "\n\nHuman: a c"}
    assert parse(record) == [("", record["chosen"], record["rejected"])]
    assert parse(record, format="implicit prompt") == [("\n\nHuman: a", " b", " c")]
    with pytest.raises(DataError, match="'prompt' is missing, which data.format = 'explicit prom"):
        parse(record, format="explicit prompt")
    with pytest.raises(DataError, match="no such layout; name one of HH dialogues, explicit pro"):
        parse(record, format="TRL")


@given(st.integers(0, 10 ** 6), st.sampled_from(sorted(EXAMPLES)))
def test_any_other_record_is_pairs_or_one_line(seed, name):
    """Every adapter, asked by name too, where a value or a key of its record was changed"""
    layout, record, _, settings = EXAMPLES[name]
    try:
        record = json.loads(mutations.mutate_json(random.Random(seed), record))
    except (ValueError, RecursionError):
        return
    for form in ("", layout):
        try:
            pairs = parse_record(record, "f:1", Reading(Data(format=form, **settings)))
        except DataError as error:
            assert str(error).startswith("f:1: ") and "\n" not in str(error)
            continue
        for text in texts(pairs):
            assert [part.encode().decode() for part in text] == list(text)
