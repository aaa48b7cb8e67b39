"""TRL's standard preference layout with an explicit prompt; the prompt is text, used as it is.

    {"prompt": "\\n\\nHuman: Hi\\n\\nAssistant:", "chosen": " Hello", "rejected": " No"}

An optional number "margin" is kept.  Source: https://huggingface.co/docs/trl/dataset_formats
"""
NAME = "explicit prompt"
KEYS = ("prompt", "chosen", "rejected")


def matches(record):
    return all(key in record for key in KEYS)


def to_texts(record):
    """-> prompt, chosen response, rejected response"""
    return record["prompt"], record["chosen"], record["rejected"]
