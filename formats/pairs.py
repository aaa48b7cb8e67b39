"""Preference pairs of a file whose lines have any of the known layouts, also mixed."""
import re

from data import DataError, Pair
from formats import explicit_prompt, hh_dialogue
from formats.records import check_strings, json_type, read_margin, read_records

ADAPTERS = (explicit_prompt, hh_dialogue)  # the first that matches a record reads it
MAX_NAME = 50  # characters of the name of a set, which is part of the names of files
REMEDY = "a pair needs chosen and rejected (and prompt, unless both are whole dialogues)"


def read_pairs(path):
    """Preference pairs of a JSON-lines file, plain or .gz, or of an https:// address -> [Pair].

    Raises DataError, one line that names file, line and remedy; OSError if an address cannot be
    fetched.
    """
    return [pair for _, pair in read_with_layout(path)]


def read_with_layout(path):
    """Yields (name of the layout, Pair) for every record of the file; raises as read_pairs does."""
    for index, (number, record) in enumerate(read_records(path)):
        yield parse_record(record, f"{path}:{number}", index)


def parse_record(record, where, index=0, remedy=REMEDY):
    """One JSON value -> name of its layout, Pair.

    Raises DataError: a value is no string, a margin no finite number, or no layout matches; then
    the message has the remedy given, the keys of the record and the nearest layout.
    """
    if not isinstance(record, dict):
        remedy = "; jq -c '.[]' FILE makes lines of an array" if isinstance(record, list) else ""
        raise DataError(
            f"{where}: a line must be an object with chosen and rejected, not {json_type(record)}"
            f"{remedy}"
        )
    for adapter in ADAPTERS:
        if adapter.matches(record):
            check_strings(record, where, adapter.KEYS)
            margin = read_margin(record, where)
            prompt, chosen, rejected = adapter.to_texts(record)
            return adapter.NAME, Pair(prompt, chosen, rejected, margin, where, index)
    nearest = min(ADAPTERS, key=lambda adapter: len(missing_keys(adapter, record)))
    missing = missing_keys(nearest, record)[0]
    raise DataError(
        f"{where}: key {missing!r} is missing; {remedy}; keys seen: {list_keys(record)}; "
        f"nearest layout: {nearest.NAME} ({', '.join(nearest.KEYS)})"
    )


def missing_keys(adapter, record):
    return [key for key in adapter.KEYS if key not in record]


def list_keys(record, max_keys=8, max_len=40):
    """The keys of a record as one short line."""
    names = [ascii(key)[:max_len] for key in list(record)[:max_keys]]
    if len(record) > max_keys:
        names.append("…")
    return ", ".join(names) or "none"


def short_name(path):
    """Name of a file in tables: up to its first dot.

    The name of an address includes its folder, because the file is often called just "test".
    """
    folder, _, file = path.partition("#")[0].rpartition("/")
    name = file.partition(".")[0]
    if "://" in path:
        return f"{folder.rpartition('/')[2]}-{name}"
    return name


def unique_name(path, taken):
    """A name for the file in tables and results that is not empty and none of those taken"""
    name = short_name(path)[:MAX_NAME]
    if name and name not in taken:
        return name
    whole = re.sub(r"\W", "_", path)[-MAX_NAME:]
    name = whole
    number = 2
    while name in taken:
        name = f"{whole}_{number}"
        number += 1
    return name
