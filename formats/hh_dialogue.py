"""HH-RLHF: two whole dialogues that share their beginning.

    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello",
     "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: No"}

An optional number "margin" is kept.
Source: arXiv 2204.05862, https://huggingface.co/datasets/Anthropic/hh-rlhf
"""
import os

from data import ASSISTANT_MARKER
from formats.adapter import SIDES, Adapter, Texts, exchange_sides, has_prompt, is_plain
from formats.dialogue import is_dialogue
from formats.values import check_texts


def fits(record, settings):
    sides = [record[key] for key in SIDES]
    if has_prompt(record) or not all(map(is_plain, sides)):
        return False
    return any(isinstance(side, str) and is_dialogue(side) for side in sides)


def to_texts(record, where, reading):
    check_texts(record, SIDES, where)
    return [Texts(*split_dialogues(record["chosen"], record["rejected"]))]


def split_dialogues(chosen, rejected):
    """Split two dialogues after the last "\\n\\nAssistant:" of their common beginning.

    -> prompt, chosen response, rejected response.  Without a common assistant turn the prompt
    is empty and each response is its whole dialogue.
    """
    common = os.path.commonprefix((chosen, rejected))
    marker = common.rfind(ASSISTANT_MARKER)
    end = 0 if marker < 0 else marker + len(ASSISTANT_MARKER)
    return chosen[:end], chosen[end:], rejected[end:]


ADAPTER = Adapter("HH dialogues", SIDES, to_texts, fits, exchange_sides)
