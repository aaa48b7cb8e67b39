"""Layouts whose texts are lists of messages, or lists of turns.

conversational explicit prompt: the prompt is a list of messages or a text, the answers are messages
or texts; sides that begin with a user's turn are whole dialogues.  TRL, UltraFeedback binarized
(whose prompt is a bare text beside lists), argilla's UltraFeedback.

    {"prompt": [{"role": "user", "content": "2+2?"}],
     "chosen": [{"role": "assistant", "content": "4"}],
     "rejected": [{"role": "assistant", "content": "5"}]}

conversational implicit prompt: two dialogues whose shared turns are the prompt.  TRL, RLHFlow,
Skywork.

    {"chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
     "rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]}

sharegpt: LLaMA-Factory's preference layout, an optional text "system" before the turns.

    {"conversations": [{"from": "human", "value": "2+2?"}],
     "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}

turns in alternation: lists of texts, the last one the assistant's.  fnlp/hh-rlhf-strength-cleaned,
whose scores by ten reward models and whose label by GPT-4 are votes on the pair.

    {"chosen": ["2+2?", "4"], "rejected": ["2+2?", "5"], "GPT4 label": 1,
     "mean preference difference": 0.4, "std preference difference": 0.1,
     "chosen score list": [1.5, 1.1], "rejected score list": [0.9, 0.9]}

A system turn is kept.  Sources: https://huggingface.co/docs/trl/dataset_formats,
https://github.com/hiyouga/LLaMA-Factory, https://github.com/OpenLMLab/MOSS-RLHF
"""
from data import DataError
from formats.adapter import (
    SIDES,
    Adapter,
    Texts,
    always,
    exchange_sides,
    has_prompt,
    is_plain,
    is_text_list,
    negated,
    other_id,
)
from formats.dialogue import answer_text, is_dialogue, read_turns, split_turns
from formats.values import check_text, json_type, to_number


def has_lists(record):
    """Whether a side is a list or a message; else the record is one of texts."""
    return not all(is_plain(record[key]) for key in SIDES)


def read_side(value, key, where):
    """An answer as text, as a message or as a list of messages -> [(role, text)]"""
    if isinstance(value, str):
        check_text(value, key, where)
        return [("Assistant", value)]
    turns = read_turns(value, key, where)
    if not turns:
        raise DataError(f"{where}: {key!r} is an empty list; remove the line")
    return turns


def pair_of_turns(prompt, chosen, rejected):
    """Three lists of (role, text) -> [Texts].  A side that repeats the prompt is taken as it is."""
    sides = []
    for turns in (chosen, rejected):
        repeats = turns[:len(prompt)] == prompt
        sides.append(turns if repeats else prompt + turns)
    return [Texts(*split_turns(*sides, first=len(prompt)))]


# --------------------------------------------------------------------------------------------------
# Messages


def fits_explicit(record, settings):
    is_list = has_lists(record) or not is_plain(record["prompt"])
    return has_prompt(record) and is_list and not is_text_list(record["chosen"])


def explicit_texts(record, where, reading):
    prompt = record["prompt"]
    chosen, rejected = (read_side(record[key], key, where) for key in SIDES)
    if not isinstance(prompt, str):
        return pair_of_turns(read_turns(prompt, "prompt", where), chosen, rejected)
    check_text(prompt, "prompt", where)
    if chosen[0][0] != "Assistant" and rejected[0][0] != "Assistant":  # whole dialogues
        return pair_of_turns([], chosen, rejected)
    if is_dialogue(prompt):
        return [Texts(prompt.rstrip(" "), answer_text(chosen), answer_text(rejected))]
    reading.notes["bare"] += 1
    return pair_of_turns([("Human", prompt)], chosen, rejected)


def fits_implicit(record, settings):
    return not has_prompt(record) and has_lists(record) and not is_text_list(record["chosen"])


def implicit_texts(record, where, reading):
    chosen, rejected = (read_side(record[key], key, where) for key in SIDES)
    return pair_of_turns([], chosen, rejected)


# --------------------------------------------------------------------------------------------------
# sharegpt


def sharegpt_texts(record, where, reading):
    prompt = read_turns(record["conversations"], "conversations", where)
    if record.get("system"):
        check_text(record["system"], "system", where)
        prompt = [("System", record["system"]), *prompt]
    chosen, rejected = (read_side(record[key], key, where) for key in SIDES)
    return pair_of_turns(prompt, chosen, rejected)


# --------------------------------------------------------------------------------------------------
# Turns in alternation


def fits_alternation(record, settings):
    return not has_prompt(record) and any(is_text_list(record[key]) for key in SIDES)


def alternation_texts(record, where, reading):
    chosen, rejected = (alternate(record[key], key, where) for key in SIDES)
    return pair_of_turns([], chosen, rejected)


def alternate(texts, key, where):
    """[text], the last one an answer -> [(role, text)]"""
    if not is_text_list(texts):
        raise DataError(f"{where}: {key!r} must be a list of texts, not {json_type(texts)}")
    turns = []
    for i, text in enumerate(texts):
        check_text(text, key, where)
        is_answer = (len(texts) - i) % 2 == 1
        turns.append(("Assistant" if is_answer else "Human", text))
    return turns


def exchange_alternation(record):
    """As exchange_sides; the mean difference changes its sign, GPT-4's label its side."""
    out = exchange_sides(record)
    for key, value in record.items():
        name = key.replace("_", " ")
        if name == "mean preference difference":
            out[key] = negated(value)
        if name == "GPT4 label" and to_number(value) in (0, 1):  # -1: none
            out[key] = other_id(value)
    return out


EXPLICIT = Adapter(
    "conversational explicit prompt", ("prompt", *SIDES), explicit_texts, fits_explicit,
    exchange_sides,
)
IMPLICIT = Adapter(
    "conversational implicit prompt", SIDES, implicit_texts, fits_implicit, exchange_sides
)
SHAREGPT = Adapter("sharegpt", ("conversations", *SIDES), sharegpt_texts, always, exchange_sides)
ALTERNATION = Adapter(
    "turns in alternation", SIDES, alternation_texts, fits_alternation, exchange_alternation
)
