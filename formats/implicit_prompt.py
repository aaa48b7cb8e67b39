"""TRL's standard preference layout with an implicit prompt: two texts that begin alike.

    {"chosen": "What is rust? Iron oxide.", "rejected": "What is rust? A game."}

The common beginning, up to a word's end, is the prompt.  Both texts stay as they are: the prompt
becomes no human turn, since it may have the markers of another dialogue form.  An optional number
"margin" is kept.  Source: https://huggingface.co/docs/trl/dataset_formats
"""
import os

from formats.adapter import SIDES, Adapter, Texts, exchange_sides, has_prompt, is_plain
from formats.values import check_texts


def fits(record, settings):
    return not has_prompt(record) and all(is_plain(record[key]) for key in SIDES)


def to_texts(record, where, reading):
    check_texts(record, SIDES, where)
    texts = Texts(*split_at_word(record["chosen"], record["rejected"]))
    if texts.prompt:
        reading.notes["implicit"] += 1
    return [texts]


def split_at_word(chosen, rejected):
    """Split two texts before the last blanks of their common beginning.

    -> prompt, chosen response, rejected response.  The prompt is empty where they have no whole
    word in common.
    """
    common = os.path.commonprefix((chosen, rejected))
    if common[-1:].isspace():
        prompt = common.rstrip()
    else:  # without the word in which the texts may differ
        prompt = "".join(common.rsplit(maxsplit=1)[:-1])
    end = len(prompt)
    return chosen[:end], chosen[end:], rejected[end:]


ADAPTER = Adapter("implicit prompt", SIDES, to_texts, fits, exchange_sides)
