"""HH-RLHF: two whole dialogues that share their beginning.

    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello",
     "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: No"}

An optional number "margin" is kept.
Source: arXiv 2204.05862, https://huggingface.co/datasets/Anthropic/hh-rlhf
"""
import os

ASSISTANT_MARKER = "\n\nAssistant:"
NAME = "HH dialogues"
KEYS = ("chosen", "rejected")


def matches(record):
    return "prompt" not in record and all(key in record for key in KEYS)


def to_texts(record):
    """-> prompt, chosen response, rejected response"""
    return split_dialogues(record["chosen"], record["rejected"])


def split_dialogues(chosen, rejected):
    """Split two dialogues after the last "\\n\\nAssistant:" of their common beginning.

    -> prompt, chosen response, rejected response.  Without a common assistant turn the prompt
    is empty and each response is its whole dialogue.
    """
    common = os.path.commonprefix((chosen, rejected))
    marker = common.rfind(ASSISTANT_MARKER)
    end = 0 if marker < 0 else marker + len(ASSISTANT_MARKER)
    return chosen[:end], chosen[end:], rejected[end:]
