"""What an adapter is: how the records of one layout become pairs, and how a label is exchanged."""
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from config import Data
from data import DataError
from formats.values import MAX_MARGIN, json_type, to_number

SIDES = ("chosen", "rejected")


class Texts(NamedTuple):
    """A pair before it has its place in a file; the prompt is in this project's dialogue form."""
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Reading:
    """What is known while a file is read: the settings, and what adapters note for the end."""
    settings: Data = Data()
    notes: Counter = field(default_factory=Counter)     # what was done -> number of records
    answers: dict = field(default_factory=dict)         # prompt -> its answers with scores


class Adapter(NamedTuple):
    """One layout of preference data.

    name: in messages, and for data.format
    keys: that every record of the layout has
    to_texts: (record, where, reading) -> [Texts], one for each pair; none for a tie.  Raises
        DataError, which begins with where, for any record that has the keys and is not sound
    fits: (record, settings) -> whether a record that has the keys has this layout
    exchanged: record that is one pair -> copy with the label exchanged, in the same layout; None
        if a record of the layout can be several pairs or less than one
    """
    name: str
    keys: tuple[str, ...]
    to_texts: Callable
    fits: Callable
    exchanged: Callable | None = None


def always(record, settings):
    """The fits of a layout whose keys no other layout has."""
    return True


def has_prompt(record):
    """Whether a record has a prompt of its own: null, "" and [] count as none."""
    return record.get("prompt") not in (None, "", [])


def is_plain(value):
    """Whether a JSON value is not made of others; a text, unless the record is wrong."""
    return not isinstance(value, (list, dict))


def is_text_list(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


# --------------------------------------------------------------------------------------------------
# The better of two answers


def order(first, second, sign, reading):
    """[(better, worse)] of two answers; [] for a tie, which is counted.

    sign: above zero if the first is the better one, zero for a tie, below zero else
    """
    if sign == 0:
        reading.notes["ties"] += 1
        return []
    return [(first, second) if sign > 0 else (second, first)]


def order_by_score(first, second, score_diff, reading):
    """As order; a difference of scores below data.min_score_diff is a tie."""
    if abs(score_diff) < reading.settings.min_score_diff:
        score_diff = 0
    return order(first, second, score_diff, reading)


def read_number(record, key, where, low=-MAX_MARGIN, high=MAX_MARGIN):
    """A finite number of a record, perhaps written as text, as CSV has it.  Raises DataError"""
    value = to_number(record[key])
    if value is None:
        is_number = isinstance(record[key], (int, float))
        shown = "nan or infinite" if is_number else json_type(record[key])
        raise DataError(f"{where}: {key!r} must be a number, not {shown}; correct the line")
    if not low <= value <= high:  # not for nan either
        raise DataError(
            f"{where}: {key!r} must be a number from {low:,.0f} to {high:,.0f}, not {value:g}; "
            "correct the line"
        )
    return value


def check_keys(value, keys, what, where):
    """Raise DataError unless a value inside a record is an object with these keys."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: {what} must be an object, not {json_type(value)}")
    for key in keys:
        if key not in value:
            raise DataError(f"{where}: {what} has no {key!r}; add it or remove the line")


# --------------------------------------------------------------------------------------------------
# Exchanging a label


def exchange_sides(record):
    """Exchange every column named after the chosen answer with its counterpart; negate the margin.

    "chosen" and "rejected", "score_chosen" and "score_rejected", "chosen-model" and
    "rejected-model", ...  "messages" follows the chosen answer where it repeats it.
    """
    out = dict(record)
    for key in record:
        other = key.replace("chosen", "rejected")
        if other != key and other in record:
            out[key] = record[other]
            out[other] = record[key]
    if "messages" in record and record["messages"] == record["chosen"]:
        out["messages"] = out["chosen"]
    if "margin" in record:
        out["margin"] = negated(record["margin"])
    return out


def exchange_columns(record, first, second):
    """Copy of a record with the values of two columns exchanged"""
    return record | {first: record[second], second: record[first]}


def other_id(value):
    """0 <-> 1, of the same type: a number, a boolean or, in CSV, text"""
    return type(value)(1 - int(float(value)))


def negated(value):
    """A number with the other sign; text that is a number, as in CSV, stays text."""
    if not to_number(value):  # 0 or no number
        return value
    if isinstance(value, str):
        return value[1:] if value.startswith("-") else f"-{value}"
    return -value
