"""JSON values: a decoder that refuses a key given twice, and the checks that all layouts share."""
import json
import math

from data import DataError
from runtime.inputs import has_surrogate

JSON_TYPES = {
    type(None): "null", bool: "a boolean", int: "a number", float: "a number",
    str: "a string", list: "a list", dict: "an object",
}
MAX_MARGIN = 1e6         # in units of reward; float32 has 8 digits
MAX_DEPTH = 100          # of values inside values in a record that is written back


class RepeatedKey(ValueError):
    """An object has a key twice; the message is the key."""


def unique_keys(items):
    """[(key, value)] of a JSON object -> dictionary; raises RepeatedKey"""
    record = dict(items)
    if len(record) < len(items):
        keys = [key for key, _ in items]
        raise RepeatedKey(ascii(next(key for key in keys if keys.count(key) > 1))[:40])
    return record


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


# --------------------------------------------------------------------------------------------------
# Checks


def json_type(value):
    """JSON's name for the type of a parsed value, for error messages."""
    return JSON_TYPES[type(value)]


def check_strings(record, where, needed, remedy=""):
    """Check that a record is an object with the needed keys, and they and its prompt are text.

    Raises DataError.  The prompt may be absent unless it is needed.
    remedy: appended to the message about a missing key.
    """
    if not isinstance(record, dict):
        keys = " and ".join(needed)
        raise DataError(f"{where}: a line must be an object with {keys}, not {json_type(record)}")
    for key in needed:
        if key not in record:
            raise DataError(f"{where}: key {key!r} is missing{remedy}")
    check_texts(record, [key for key in ("prompt", *needed) if key in record], where)


def to_number(value):
    """A number, or text that is one, as CSV has it -> finite float; None for any other value"""
    if not isinstance(value, (int, float, str)):
        return None
    try:
        value = float(value)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def check_text(value, key, where):
    """Raise DataError unless the value is a string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a string, not {json_type(value)}")
    if has_surrogate(value):
        raise DataError(
            f"{where}: {key!r} holds half of a surrogate pair, which is not text; "
            "correct or remove the line"
        )


def check_texts(record, keys, where):
    """Raise DataError unless the values of these keys are texts."""
    for key in keys:
        check_text(record[key], key, where)


def check_copyable(value, where, depth=0):
    """Raise DataError unless a JSON value can be written back as it was read."""
    if depth > MAX_DEPTH:
        raise DataError(f"{where}: nested more than {MAX_DEPTH} levels deep; remove that value")
    if isinstance(value, str) and has_surrogate(value):
        raise DataError(
            f"{where}: {ascii(value)[:40]} holds half of a surrogate pair, which is not text; "
            "correct or remove the line"
        )
    if type(value) not in JSON_TYPES:
        raise DataError(f"{where}: a value of type {type(value).__name__} cannot be written as "
                        "JSON; write it as text")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: the number {value} cannot be written as JSON; put null instead")
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for inner in value:
            check_copyable(inner, where, depth + 1)


def read_margin(record, where):
    """The optional margin of a record: a finite number, or None.  Raises DataError."""
    margin = record.get("margin")
    if margin is None:
        return None
    if isinstance(margin, float) and not math.isfinite(margin):
        raise DataError(f"{where}: 'margin' must be a finite number, not {margin}")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise DataError(f"{where}: 'margin' must be a finite number, not {json_type(margin)}")
    if abs(margin) > MAX_MARGIN:
        raise DataError(
            f"{where}: 'margin' must be a number from -{MAX_MARGIN:,.0f} to {MAX_MARGIN:,.0f}, in "
            "units of reward; correct it"
        )
    return margin
