"""What is written about N pairs and their labels: issues.csv, cleaned.jsonl, the review page.

`mean`, `std` (N,): of the vote; `score` (N,): probability that the label is the given one;
`action`: N of keep, drop and exchange; `decided`: N decisions of a person, "" for none;
`columns`: of group_columns.
"""
import csv
import io
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Pair
from formats import several_answers
from formats.adapter import SIDES, exchange_sides, negated
from formats.pairs import BY_NAME, exchange
from formats.values import check_copyable
from labels.trust import length_vote
from runtime.files import digest

TEXT_WIDTH = 200       # characters of a text in issues.csv
MAX_VALUE_LEN = 60     # characters of a value that names a group
MIN_GROUP = 20         # pairs
BINS = 25              # of the histogram
MAX_SUSPECTS = 1000    # pairs on the page; every one is there with its whole texts
MIN_SUSPECTS = 20
STARTS_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # also full-width
ISSUE_COLUMNS = (      # is_label_issue to predicted_label: the names of cleanlab
    "source", "key", "is_label_issue", "label_score", "given_label", "predicted_label", "mean",
    "std", "action", "decision", "prompt", "chosen", "rejected",
)


def pair_digest(pair: Pair) -> str:
    """Hash of the texts of a pair, 16 hexadecimal digits; another one where the label differs"""
    return digest([pair.prompt, pair.chosen, pair.rejected])


# --------------------------------------------------------------------------------------------------
# Columns of few values


def group_columns(pairs: Sequence[Pair], max_values: int = 20) -> dict[str, list[str]]:
    """Columns of the records that have few values -> {name: N values as text, "" for none}

    A column has 2 to max_values short texts, numbers or booleans as values, at least two of which
    are in 20 pairs or more.  A column inside another is "outer.inner".  What an exchange of the
    label changes belongs to the label and makes no groups.
    """
    records = [flat(pair.record or {}) for pair in pairs]
    names = dict.fromkeys(name for record in records for name in record)
    of_label = label_columns(pairs)
    columns = {}
    for name in names:
        if name not in of_label and not name.startswith("nanoreward_"):
            values = column_values(records, name, max_values)
            if values:
                columns[name] = values
    return columns


def flat(record):
    """Columns of a record, those inside an object under "outer.inner\""""
    out = {}
    for name, value in record.items():
        if isinstance(value, dict):
            out |= {f"{name}.{inner}": of_inner for inner, of_inner in value.items()}
        else:
            out[name] = value
    return out


def label_columns(pairs):
    """Columns with the texts of a pair, or with what an exchange of its label changes"""
    found = {"prompt", *SIDES, "margin"}
    for pair in pairs:
        other = exchange(pair) if pair.record is not None else None
        if other is not None:
            before = flat(pair.record)
            found |= {name for name, value in flat(other).items() if before.get(name) != value}
    return found


def column_values(records, name, max_values):
    """The values of one column as texts; [] if it makes no groups"""
    values = []
    counts: dict[str, int] = {}
    for record in records:
        value = record.get(name)
        text = value_text(value)
        if isinstance(value, (list, dict)) or len(text) > MAX_VALUE_LEN:
            return []
        values.append(text)
        if text:
            counts[text] = counts.get(text, 0) + 1
        if len(counts) > max_values:
            return []
    num_large = sum(count >= MIN_GROUP for count in counts.values())
    return values if num_large >= 2 else []


def value_text(value):
    """A plain JSON value as text; "" for null"""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


# --------------------------------------------------------------------------------------------------
# issues.csv


def issues_csv(
    pairs: Sequence[Pair], mean: Tensor, std: Tensor, score: Tensor, action: Sequence[str],
    decided: Sequence[str], columns: Mapping[str, Sequence[str]], called: Tensor | None = None,
) -> str:
    """The content of issues.csv: one row for each pair in input order.

    called: (N,) bool, labels called wrong, for those that are kept all the same
    is_label_issue: True where the label is called wrong or changed, unless a person finds it right
    given_label is the column `chosen` for every pair; predicted_label is `rejected` where the vote
    contradicts the label.  Texts are cut, on one line, and never the formula of a spreadsheet.
    """
    is_called = [False] * len(pairs) if called is None else called.tolist()
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [name if name not in ISSUE_COLUMNS else f"record_{name}" for name in columns]
    writer.writerow([*ISSUE_COLUMNS, *map(cell, names)])
    keys = [pair_digest(pair) for pair in pairs]
    numbers = zip(mean.tolist(), std.tolist(), score.tolist())
    for i, (pair, (m, s, p)) in enumerate(zip(pairs, numbers)):
        is_issue = decided[i] != "right" and (
            is_called[i] or action[i] != "keep" or decided[i] == "wrong")
        writer.writerow([
            cell(pair.source), keys[i], is_issue, f"{p:.6g}", "chosen",
            "chosen" if p >= 0.5 else "rejected", f"{m:.6g}", f"{s:.6g}", action[i], decided[i],
            cell(pair.prompt), *map(cell, from_difference(pair.chosen, pair.rejected)),
            *(cell(values[i]) for values in columns.values()),
        ])
    return out.getvalue()


def from_difference(a: str, b: str, before: int = TEXT_WIDTH // 4) -> tuple[str, str]:
    """Both texts from a little before they differ"""
    start = max(0, len(os.path.commonprefix([a, b])) - before)
    mark = "… " if start else ""
    return mark + a[start:], mark + b[start:]


def cell(text):
    """A text on one line and cut, which no spreadsheet takes for a formula"""
    printable = "".join(c if c.isprintable() else " " for c in text[:4 * TEXT_WIDTH])
    line = textwrap.shorten(printable, TEXT_WIDTH, placeholder=" …")
    if line == "…":  # the first word is too long
        line = printable.strip()[:TEXT_WIDTH] + " …"
    return f"'{line}" if line.startswith(STARTS_FORMULA) else line


# --------------------------------------------------------------------------------------------------
# cleaned.jsonl


def check_records(pairs: Sequence[Pair]):
    """Raise DataError, one line that names file, line and column, if JSON cannot hold a value.

    To be called before the training: cleaned.jsonl is written at its end.
    """
    seen = None
    for pair in pairs:
        if pair.record is not None and pair.record is not seen:  # several pairs of one record
            for key, value in pair.record.items():
                check_copyable(key, pair.source)
                check_copyable(value, f"{pair.source}: column {ascii(key)[:60]}")
        seen = pair.record


def cleaned_lines(
    pairs: Sequence[Pair], action: Sequence[str], margin: Tensor, has_margin: bool
) -> Iterator[dict[str, Any]]:
    """Lines of cleaned.jsonl: what is kept or exchanged, each in the layout of its own record.

    margin: (N,) of the treatment, in the direction of the labels that come out; has_margin: whether
    the treatment makes margins.  They are the key "margin" where the record has none of its own,
    and else "nanoreward_margin".
    A record that makes several pairs becomes a line {"prompt", "chosen", "rejected"} for each, with
    its other columns.  nanoreward_source is the file and line, nanoreward_changed "kept" or
    "exchanged".
    """
    for pair, taken, new_margin in zip(pairs, action, margin.tolist()):
        if taken == "drop":
            continue
        is_exchanged = taken == "exchange"
        line = exchanged_record(pair) if is_exchanged else record_of(pair)
        if line.get("margin") is not None:
            if has_margin:
                line["nanoreward_margin"] = new_margin
        elif has_margin or pair.record is None:
            line["margin"] = new_margin
        line["nanoreward_source"] = pair.source
        line["nanoreward_changed"] = "exchanged" if is_exchanged else "kept"
        yield line


def record_of(pair):
    """A copy of the record if it is this one pair, else an explicit pair of its columns"""
    if is_one_pair(pair):
        return dict(pair.record)
    line: dict[str, Any] = {
        "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected,
    }
    return line | other_columns(pair)


def is_one_pair(pair):
    adapter = BY_NAME.get(pair.layout)
    return adapter is not None and adapter.exchanged is not None


def exchanged_record(pair):
    """As record_of with the label exchanged; a margin of the record's own is negated."""
    if not is_one_pair(pair):
        return exchange_sides(record_of(pair))
    line = exchange(pair)
    if "margin" in line and line["margin"] == pair.record["margin"]:  # of two answers without sides
        line["margin"] = negated(line["margin"])
    return line


def other_columns(pair):
    """The columns of a record of several pairs, besides the texts.

    Those of the two lines of point-wise scores get the names score_chosen, score_rejected, …
    A margin that was not that of this pair becomes margin_of_record.
    """
    record = pair.record or {}
    columns = {}
    if pair.layout == several_answers.SCORES.name:
        for side in SIDES:
            for key, value in record[side].items():
                if key not in ("prompt", "response"):
                    columns[f"{key}_{side}"] = value
        return columns
    for key, value in record.items():
        if key == "margin" and pair.margin is None:
            columns["margin_of_record"] = value
        elif key not in ("prompt", *SIDES) and not is_text_of(pair.layout, key):
            columns[key] = value
    return columns


def is_text_of(layout, key):
    """Whether a column holds the answers of all pairs of a record"""
    return layout == several_answers.NECTAR.name and key == "answers"


# --------------------------------------------------------------------------------------------------
# The review page


def page(
    title: str, run_id: str, pairs: Sequence[Pair], mean: Tensor, std: Tensor, score: Tensor,
    action: Sequence[str], columns: Mapping[str, Sequence[str]], groups: list[dict],
    summary: list[dict], max_suspects: int = MAX_SUSPECTS,
) -> dict[str, Any]:
    """The dictionary of labels/review.py: title, summary, histogram, groups, the suspect pairs.

    Suspects are labels that are to be changed or that the vote contradicts, most suspect first, at
    most max_suspects; and the twenty of lowest vote in any case.
    length_says: keep where length agrees with the label, in the direction in which it agrees with
    the given labels on the whole, exchange where it contradicts it; "" for equal lengths
    """
    is_changed = torch.tensor([taken != "keep" for taken in action])
    is_suspect = is_changed | (mean < 0)
    order = mean.argsort(stable=True)
    suspects = order[is_suspect[order]][:max_suspects]
    if len(suspects) < MIN_SUSPECTS:
        suspects = order[:min(MIN_SUSPECTS, max_suspects)]
    by_length = length_vote(list(pairs)).sign().tolist()
    says = {1.0: "keep", -1.0: "exchange", 0.0: ""}
    shown = []
    for i in suspects.tolist():
        pair = pairs[i]
        shown.append({
            "source": pair.source, "key": pair_digest(pair), "prompt": pair.prompt,
            "chosen": pair.chosen, "rejected": pair.rejected, "score": float(score[i]),
            "mean": float(mean[i]), "std": float(std[i]), "suggestion": action[i],
            "length_says": says[by_length[i]],
            "columns": {name: values[i] for name, values in columns.items()},
        })
    return {
        "title": title, "run": run_id, "summary": summary,
        "histogram": histogram(score, is_changed), "groups": groups, "columns": list(columns),
        "pairs": shown,
    }


def histogram(score: Tensor, is_changed: Tensor) -> dict[str, Any]:
    """Numbers of pairs by label score, those to be changed apart"""
    edges = np.linspace(0, 1, BINS + 1)
    return {
        "edges": edges.tolist(),
        "kept": np.histogram(score[~is_changed].numpy(), edges)[0].tolist(),
        "suspect": np.histogram(score[is_changed].numpy(), edges)[0].tolist(),
        "label": "Label score: low is suspect",
    }
