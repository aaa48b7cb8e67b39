"""Preference pairs of a file whose records have any of the known layouts, also mixed."""
import multiprocessing

from config import Data
from data import DataError, Pair
from formats import (
    conversations,
    explicit_prompt,
    hh_dialogue,
    implicit_prompt,
    several_answers,
    two_answers,
)
from formats.adapter import Reading
from formats.records import read_records
from formats.values import json_type, read_margin

ADAPTERS = (  # the first that fits a record reads it
    hh_dialogue.ADAPTER,
    explicit_prompt.ADAPTER,
    implicit_prompt.ADAPTER,
    conversations.SHAREGPT,
    conversations.EXPLICIT,
    conversations.IMPLICIT,
    conversations.ALTERNATION,
    two_answers.TLDR,
    two_answers.PKU_BETTER,
    two_answers.PKU_SAFER,
    two_answers.HELPSTEER2,
    two_answers.HELPSTEER3,
    two_answers.WEBGPT,
    two_answers.ARENA,
    several_answers.LISTS,
    several_answers.NECTAR,
    several_answers.SCORES,
)
BY_NAME = {adapter.name: adapter for adapter in ADAPTERS}
REMEDY = "a pair needs chosen and rejected (and prompt, unless both are whole dialogues)"
NOTES = {  # what Reading.notes counts -> the line that says it
    "bare": 'prompts without "\\n\\nHuman:" are read as human turns',
    "implicit": "prompts are what both texts begin with, up to a word's end",
    "ties": "ties of two answers make no pair",
}


# --------------------------------------------------------------------------------------------------
# Records -> pairs


def read_pairs(path, settings=Data(), say=print):
    """Preference pairs of what a name stands for: a file, an address, a folder, a set of the hub.

    settings: the section [data]; format, labels and min_score_diff say how records are read
    say: called with each line that there is to say of the file
    -> [Pair], each with its record and the name of its layout
    Raises DataError, one line that names file, line and remedy; OSError if an address cannot be
    fetched.
    """
    reading = Reading(settings)
    pairs = []
    for number, record in read_records(path):
        pairs += parse_record(record, f"{path}:{number}", reading, len(pairs))
    pairs += several_answers.pairs_of_answers(reading, len(pairs))
    if not pairs:
        raise DataError(f"{path}: makes no pair: all of its answers are ties, or no prompt has two "
                        "answers whose scores differ by data.min_score_diff; give another file")
    if multiprocessing.parent_process() is None:  # a worker's parent has said it
        for key, text in NOTES.items():
            if reading.notes[key]:
                say(f"data: note: {path}: {text} ({reading.notes[key]:,})")
    return pairs


def parse_record(record, where, reading, index=0, remedy=REMEDY):
    """One JSON value -> its pairs: one, several, or none of a tie or of an answer with a score.

    index: of the first of them
    Raises DataError: a value is no string, a margin no finite number, or no layout fits; then the
    message has the remedy given, the keys of the record and the nearest layout.
    """
    adapter = find_adapter(record, where, reading.settings, remedy)
    texts = adapter.to_texts(record, where, reading)
    has_margin = "chosen" in adapter.keys and len(texts) == 1
    margin = read_margin(record, where) if has_margin else None
    pairs = []
    for i, pair in enumerate(texts):
        pairs.append(Pair(*pair, margin, where, index + i, record, adapter.name))
    return pairs


# --------------------------------------------------------------------------------------------------
# Recognising a layout


def find_adapter(record, where, settings, remedy):
    """The adapter named by data.format, or the first that fits.  Raises DataError"""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record must be an object with chosen and rejected, not "
                        f"{json_type(record)}")
    if settings.format:
        return named_adapter(record, where, settings.format)
    for adapter in ADAPTERS:
        if not missing_keys(adapter, record) and adapter.fits(record, settings):
            return adapter
    nearest = nearest_adapter(record)
    missing = missing_keys(nearest, record)[0]
    raise DataError(
        f"{where}: key {missing!r} is missing; {remedy}; keys seen: {list_keys(record)}; "
        f"nearest layout: {nearest.name} ({', '.join(nearest.keys)}); docs/formats.md lists all"
    )


def named_adapter(record, where, name):
    """The adapter of that name.  Raises DataError unless the record has its keys."""
    if name not in BY_NAME:
        raise DataError(f"data.format = {ascii(name)[:100]}: no such layout; name one of "
                        f"{', '.join(BY_NAME)}, or leave it empty")
    missing = missing_keys(BY_NAME[name], record)
    if missing:
        raise DataError(f"{where}: key {missing[0]!r} is missing, which data.format = {name!r} "
                        f"needs; keys seen: {list_keys(record)}; correct the line, or leave "
                        "data.format empty")
    return BY_NAME[name]


def missing_keys(adapter, record):
    return [key for key in adapter.keys if key not in record]


def nearest_adapter(record):
    """The adapter that lacks the fewest keys, and of these one that has the most.

    A prompt alone says nothing: the first adapter is nearest to a record without any other key.
    """
    def distance(adapter):
        num_missing = len(missing_keys(adapter, record))
        num_there = len(adapter.keys) - num_missing
        says_nothing = not set(adapter.keys) & set(record) - {"prompt"}
        return says_nothing, num_missing, -num_there

    candidates = [adapter for adapter in ADAPTERS if missing_keys(adapter, record)]
    nearest = min(candidates, key=distance)
    return candidates[0] if distance(nearest)[0] else nearest


def list_keys(record, max_keys=8, max_len=40):
    """The keys of a record as one short line."""
    names = [ascii(key)[:max_len] for key in list(record)[:max_keys]]
    if len(record) > max_keys:
        names.append("…")
    return ", ".join(names) or "none"


# --------------------------------------------------------------------------------------------------
# Exchanging a label


def exchange(pair):
    """The record of a pair with the label exchanged, in its own layout -> a new dictionary

    None where a record makes several pairs or is less than one, and for pairs of the built-in world
    """
    adapter = BY_NAME.get(pair.layout)
    if adapter is None or adapter.exchanged is None:
        return None
    return adapter.exchanged(pair.record)
