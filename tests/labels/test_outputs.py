"""issues.csv, cleaned.jsonl and the dictionary of the review page."""
import csv
import io
import json

import pytest
import torch
from layout_examples import EXAMPLES, HI
from review_pages import HOSTILE

from config import Data
from data import DataError, Pair
from formats.adapter import Reading
from formats.pairs import parse_record, read_pairs
from labels import outputs
from labels.outputs import check_records, cleaned_lines, group_columns, issues_csv
from labels.review import page_html
from runtime import files

PAIRS = [
    Pair("\n\nHuman: Hi\n\nAssistant:", " Hello", " No", source="my.jsonl:1"),
    Pair("p", "=1+1", "@b", source="my.jsonl:2"),
    Pair("p", "a long answer", "b", source="my.jsonl:3"),
]
MEAN = torch.tensor([0.5, -2.0, -0.25])
STD = torch.tensor([0.1, 0.2, 0.3])
SCORE = torch.tensor([0.7, 0.1, 0.4], dtype=torch.float64)
KEEP = ["keep"] * 3
NO_REVIEW = [""] * 3


def clean(pairs, action, has_margin=False, margin=0.75):
    margins = torch.full((len(pairs),), margin)
    return list(cleaned_lines(pairs, [action] * len(pairs), margins, has_margin))


def read_back(folder, lines, settings):
    path = folder / "cleaned.jsonl"
    files.save_jsonl(path, lines)
    return read_pairs(str(path), Data(**settings), say=str)


# --------------------------------------------------------------------------------------------------
# cleaned.jsonl


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("action", ["keep", "exchange"])
@pytest.mark.parametrize("has_margin", [False, True])
def test_cleaned_records_are_read_back_as_what_became_of_them(tmp_path, name, action, has_margin):
    layout, record, expected, settings = EXAMPLES[name]
    pairs = parse_record(record, "my.jsonl:7", Reading(Data(**settings)))
    lines = clean(pairs, action, has_margin)
    again = read_back(tmp_path, lines, settings)
    if action == "exchange":
        expected = [(prompt, rejected, chosen) for prompt, chosen, rejected in expected]
    assert [(p.prompt, p.chosen, p.rejected) for p in again] == expected
    for line, pair, back in zip(lines, pairs, again):
        assert line["nanoreward_source"] == "my.jsonl:7"
        assert line["nanoreward_changed"] == {"keep": "kept", "exchange": "exchanged"}[action]
        if pair.margin is not None:
            assert back.margin == (pair.margin if action == "keep" else -pair.margin)
            assert line.get("nanoreward_margin") == (0.75 if has_margin else None)
        else:
            assert line.get("margin") == (0.75 if has_margin else None)
        if len(pairs) == 1:
            assert back.layout == layout and set(record) <= set(line)


@pytest.mark.parametrize("action", ["keep", "exchange"])
def test_point_wise_scores_become_pairs_with_the_columns_of_both_lines(tmp_path, action):
    path = tmp_path / "scores.jsonl"
    files.save_jsonl(path, [
        {"prompt": "Hi", "response": "Hello", "score": 2, "model": "x"},
        {"prompt": "Hi", "response": "No", "score": 1, "model": "y"},
    ])
    lines = clean(read_pairs(str(path)), action)
    again, = read_back(tmp_path, lines, {})
    answers = [" Hello", " No"]
    models = ["x", "y"]
    scores = [2, 1]
    if action == "exchange":
        for both in (answers, models, scores):
            both.reverse()
    assert (again.prompt, again.chosen, again.rejected) == (HI, *answers)
    assert [lines[0]["model_chosen"], lines[0]["model_rejected"]] == models
    assert [lines[0]["score_chosen"], lines[0]["score_rejected"]] == scores


def test_other_columns_of_several_pairs_are_kept():
    record = EXAMPLES["RewardBench 2"].record | {"margin": [1, 2], "note": {"deep": [None]}}
    lines = clean(parse_record(record, "f:1", Reading()), "exchange", True)
    for line in lines:
        assert line["subset"] == "Math" and line["note"] == {"deep": [None]}
        assert line["margin_of_record"] == [1, 2] and line["margin"] == 0.75
    nectar = clean(parse_record(EXAMPLES["Nectar"].record, "f:1", Reading()), "keep")
    assert nectar[0]["turns"] == 1 and "answers" not in nectar[0]


def test_a_margin_of_two_answers_without_sides_is_negated():
    record = EXAMPLES["PKU, better"].record | {"margin": 2}
    pairs = parse_record(record, "f:1", Reading())
    assert clean(pairs, "exchange")[0]["margin"] == -2
    assert clean(pairs, "keep")[0]["margin"] == 2


def test_pairs_of_the_built_in_world_have_a_margin():
    lines = list(cleaned_lines(
        PAIRS, ["keep", "drop", "exchange"], torch.tensor([0.5, 1.0, -1.5]), False))
    assert lines == [
        {"prompt": PAIRS[0].prompt, "chosen": " Hello", "rejected": " No", "margin": 0.5,
         "nanoreward_source": "my.jsonl:1", "nanoreward_changed": "kept"},
        {"prompt": "p", "chosen": "b", "rejected": "a long answer", "margin": -1.5,
         "nanoreward_source": "my.jsonl:3", "nanoreward_changed": "exchanged"},
    ]


def test_a_cleaned_file_can_be_cleaned_again(tmp_path):
    first = clean(parse_record(EXAMPLES["explicit"].record, "a:1", Reading()), "exchange", True)
    again = read_back(tmp_path, first, {})
    second, = clean(again, "exchange", True)
    assert second["chosen"] == EXAMPLES["explicit"].record["chosen"] and second["margin"] == 2
    assert second["nanoreward_source"] == f"{tmp_path}/cleaned.jsonl:1"


def test_no_record_of_the_user_is_changed():
    record = json.loads(json.dumps(EXAMPLES["UltraFeedback cleaned"].record))
    pairs = parse_record(record, "f:1", Reading())
    clean(pairs, "keep", True), clean(pairs, "exchange", True)
    assert record == EXAMPLES["UltraFeedback cleaned"].record


@pytest.mark.parametrize("value, reason", [
    (float("nan"), "the number nan cannot be written as JSON"),
    ([{"x": float("inf")}], "the number inf cannot be written as JSON"),
    ("half \ud83d", "half of a surrogate pair"),
    (b"x", "a value of type bytes cannot be written as JSON"),
    ({1, 2}, "a value of type set cannot"),
])
def test_a_value_that_json_lacks_is_named_with_file_line_and_column(value, reason):
    record = {"prompt": "p", "chosen": "a", "rejected": "b", "my column": value}
    pair = Pair("p", "a", "b", source="my.jsonl:7", record=record, layout="explicit prompt")
    with pytest.raises(DataError) as raised:
        check_records([PAIRS[0], pair])
    message = str(raised.value)
    assert message.startswith("my.jsonl:7: column 'my column': ") and reason in message
    assert "\n" not in message and len(message) < 250


def test_dates_and_bytes_of_parquet_are_written_as_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    import datetime
    table = pyarrow.table({
        "prompt": ["p"], "chosen": ["a"], "rejected": ["b"], "bytes": [b"\xff"],
        "day": [datetime.date(2024, 2, 29)], "number": [float("nan")],
    })
    parquet.write_table(table, tmp_path / "a.parquet")
    pairs = read_pairs(str(tmp_path / "a.parquet"), say=str)
    check_records(pairs)
    line, = clean(pairs, "exchange")
    files.save_jsonl(tmp_path / "out.jsonl", [line])
    assert line["day"] == "2024-02-29" and line["bytes"] == "/w==" and line["number"] is None


# --------------------------------------------------------------------------------------------------
# issues.csv


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_one_row_a_pair_in_input_order():
    rows = rows_of(issues_csv(
        PAIRS, MEAN, STD, SCORE, ["keep", "drop", "keep"], ["wrong", "", "right"],
        {"annotator": ["A", "-B", ""], "mean": ["x", "y", "z"]}))
    assert [row["source"] for row in rows] == ["my.jsonl:1", "my.jsonl:2", "my.jsonl:3"]
    assert [row["is_label_issue"] for row in rows] == ["True", "True", "False"]
    assert [row["given_label"] for row in rows] == ["chosen"] * 3
    assert [row["predicted_label"] for row in rows] == ["chosen", "rejected", "rejected"]
    assert [float(row["label_score"]) for row in rows] == [0.7, 0.1, 0.4]
    assert [float(row["mean"]) for row in rows] == [0.5, -2.0, -0.25]
    assert [row["action"] for row in rows] == ["keep", "drop", "keep"]
    assert [row["decision"] for row in rows] == ["wrong", "", "right"]
    assert [row["annotator"] for row in rows] == ["A", "'-B", ""]
    assert [row["record_mean"] for row in rows] == ["x", "y", "z"]
    assert rows[0]["key"] == outputs.pair_digest(PAIRS[0])


def test_called_labels_that_are_kept_are_issues():
    called = torch.tensor([False, True, True])
    decided = ["", "", "right"]
    rows = rows_of(issues_csv(PAIRS, MEAN, STD, SCORE, KEEP, decided, {}, called))
    assert [row["is_label_issue"] for row in rows] == ["False", "True", "False"]


@pytest.mark.parametrize("text", [
    "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r\n=1", "  =1", "\x00=1", "\uff1d1", *HOSTILE,
])
def test_no_text_is_a_formula_or_breaks_a_row(text):
    pair = Pair(text, text, text + "x" * 5000, source=text)
    content = issues_csv([pair], MEAN[:1], STD[:1], SCORE[:1], ["keep"], [""], {text: [text]})
    row, = list(csv.reader(io.StringIO(content)))[1:]
    assert len(content.splitlines()) == 2
    for value in row[:1] + row[10:]:
        assert not value.startswith(outputs.STARTS_FORMULA) and value.isprintable()
        assert len(value) <= outputs.TEXT_WIDTH + 3
    assert content.encode()


def test_a_text_of_one_long_word_is_cut_not_lost():
    assert outputs.cell("x" * 5000) == "x" * outputs.TEXT_WIDTH + " …"
    assert outputs.cell("") == "" and outputs.cell(" \n ") == ""


def test_pandas_reads_it():
    pandas = pytest.importorskip("pandas")
    text = issues_csv(PAIRS, MEAN, STD, SCORE, KEEP, NO_REVIEW, {})
    frame = pandas.read_csv(io.StringIO(text))
    assert frame["is_label_issue"].dtype == bool and len(frame) == 3


# --------------------------------------------------------------------------------------------------
# Columns of few values


def with_records(records):
    return [Pair("p", "a", f"b{i}", record=record) for i, record in enumerate(records)]


def test_columns_of_few_values_make_groups():
    pairs = with_records([
        {"prompt": "pq"[i % 2], "chosen": "ab"[i % 2], "annotator": "AB"[i % 2], "flag": i % 2 == 0,
         "rating": [1, 2.5][i % 2], "number": i, "one": "x", "list": [i % 2], "note": "n" * 99,
         "some": "AB"[i % 2] if i < 50 else None, "rare": "y" if i < 19 else "x",
         "nanoreward_changed": ["kept", "exchanged"][i % 2]}
        for i in range(100)
    ])
    columns = group_columns(pairs)
    assert list(columns) == ["annotator", "flag", "rating", "some"]
    assert columns["flag"][:2] == ["true", "false"] and columns["rating"][:2] == ["1", "2.5"]
    assert columns["some"].count("") == 50 and len(columns["some"]) == 100
    assert group_columns(PAIRS) == {}


def test_a_column_of_many_values_makes_no_groups():
    pairs = with_records([{"worker": f"w{i % 21}"} for i in range(1000)])
    assert group_columns(pairs) == {}
    assert list(group_columns(pairs, 21)) == ["worker"]


# --------------------------------------------------------------------------------------------------
# The page


def make_page(n=60, action=None, **change):
    pairs = [Pair(f"p{i}", "a" * (i % 3 + 1), "aa", source=f"f:{i + 1}") for i in range(n)]
    mean = torch.linspace(-1, 1, n)
    action = action or ["drop" if i < 5 else "keep" for i in range(n)]
    return outputs.page(
        "title", "run", pairs, mean, mean.abs(), mean.sigmoid(), action, {"c": ["x"] * n}, [],
        [{"title": "Audit", "text": "…"}], **change)


def test_the_most_suspect_pairs_come_first():
    page = make_page()
    assert [pair["source"] for pair in page["pairs"]] == [f"f:{i + 1}" for i in range(30)]
    assert [pair["suggestion"] for pair in page["pairs"][:6]] == ["drop"] * 5 + ["keep"]
    assert page["pairs"][0]["columns"] == {"c": "x"} and page["columns"] == ["c"]
    assert len(make_page(max_suspects=7)["pairs"]) == 7
    assert set(page) == {
        "title", "run", "summary", "histogram", "groups", "columns", "pairs"}
    assert page_html(page)


def test_a_page_without_suspects_has_the_lowest_votes():
    pairs = PAIRS * 20
    page = outputs.page("t", "r", pairs, torch.ones(60), torch.ones(60), torch.full((60,), 0.9),
                        ["keep"] * 60, {}, [], [])
    assert len(page["pairs"]) == outputs.MIN_SUSPECTS


def test_length_says_what_it_would_do():
    page = make_page()
    says = {len(pair["chosen"]): pair["length_says"] for pair in page["pairs"]}
    assert says == {1: "exchange", 2: "", 3: "keep"}


def test_the_histogram_counts_every_pair_once():
    histogram = make_page()["histogram"]
    assert len(histogram["edges"]) == outputs.BINS + 1
    assert sum(histogram["kept"]) == 55 and sum(histogram["suspect"]) == 5


# ----------------------------------------------------------------------------------------------
# What belongs to the label, and where two answers differ


def test_what_says_which_answer_is_better_makes_no_groups(tmp_path):
    records = [EXAMPLES["TL;DR"].record | {"choice": i % 2, "worker": f"w{i % 2}"}
               for i in range(44)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert list(outputs.group_columns(read_pairs(path))) == ["worker"]


def test_columns_inside_a_column_make_groups():
    pairs = []
    for i in range(44):
        record = {"prompt": "q", "chosen": "a", "rejected": "b", "info": {"by": i % 2, "id": i}}
        pairs.append(Pair("q", "a", "b", record=record, layout="explicit prompt"))
    columns = outputs.group_columns(pairs)
    assert list(columns) == ["info.by"] and columns["info.by"][:3] == ["0", "1", "0"]


def test_texts_begin_a_little_before_they_differ():
    a = "x" * 500 + "A" + "y" * 500
    b = "x" * 500 + "B" + "y" * 500
    for text, letter in zip(outputs.from_difference(a, b), "AB"):
        assert text.startswith("… " + "x" * 50 + letter)
    assert outputs.from_difference("ab", "ac") == ("ab", "ac")
