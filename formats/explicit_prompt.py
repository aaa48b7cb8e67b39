"""TRL's standard preference layout with an explicit prompt: three texts.

    {"prompt": "\\n\\nHuman: Hi\\n\\nAssistant:", "chosen": " Hello", "rejected": " No"}

A bare prompt, such as "Hi", becomes a human turn.  An optional number "margin" is kept.
RewardBench has this layout, with a column "subset".
Source: https://huggingface.co/docs/trl/dataset_formats
"""
from formats.adapter import Adapter, Texts, exchange_sides, has_prompt, is_plain
from formats.dialogue import as_dialogue
from formats.values import check_texts

KEYS = ("prompt", "chosen", "rejected")


def fits(record, settings):
    return has_prompt(record) and all(is_plain(record[key]) for key in KEYS)


def to_texts(record, where, reading):
    check_texts(record, KEYS, where)
    answers = [record["chosen"], record["rejected"]]
    prompt, answers = as_dialogue(record["prompt"], answers, reading.notes)
    return [Texts(prompt, *answers)]


ADAPTER = Adapter("explicit prompt", KEYS, to_texts, fits, exchange_sides)
