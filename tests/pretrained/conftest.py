"""What the tests of pretrained/ share: a trained tokenizer, and folders of small models."""
import json
from pathlib import Path

import pytest
from helpers import tiny

from model import LanguageModel
from pretrained import export
from pretrained.tokenizer import LLAMA3
from tokenizer import EOS, TEMPLATES, Tokenizer, train_tokenizer

QUESTION = "\n\nHuman: How long is the river number {}, really?"
ANSWER = "\n\nAssistant: It's {} km long,\tthey'll say.\n"
OTHER_TEXTS = [
    "  indented   code:\r\n\r\n    x = 12345;  y += 6.78",
    "Überraschung: naïve café, 北京 2024年, привет мир, e\u0301, 😀👍🏽",
    "WE'LL THEY'RE don'T",
    "\u00a0\u3000\u2003 blanks",
]


MARKERS = {
    "hh": [],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"],
}


@pytest.fixture(scope="session")
def texts():
    dialogues = [QUESTION.format(i) + ANSWER.format(i * i) for i in range(60)]
    return dialogues + OTHER_TEXTS


@pytest.fixture(scope="session")
def own(texts):
    """A tokenizer of 400 tokens, trained here"""
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="session")
def with_markers(own):
    """with_markers(template) -> a trained tokenizer that has the markers of the template"""
    def make(template):
        special = {EOS: 399}
        for marker in MARKERS[template]:
            special[marker] = len(special) + 399
        if template == "hh":
            return own
        eos = TEMPLATES[template][1]
        if template == "chatml":
            return Tokenizer(own.pattern, own.ranks, special, eos, "", template)
        return Tokenizer(LLAMA3, own.ranks, special, eos, "<|begin_of_text|>", template)

    return make


@pytest.fixture(scope="session")
def write_model(own):
    """write_model(folder, kind, **changes of its shape) -> a random model, its folder"""
    def write(folder, kind=LanguageModel, **changes):
        shape = {"vocab": own.vocab_size, "tied": False, "kv_heads": 2} | changes
        model = tiny(kind, **shape)
        export.save(folder, model, own)
        return model, Path(folder)

    return write


@pytest.fixture(scope="session")
def edit():
    """edit(path, change): change is a function of the JSON, or a dictionary put over it; ... as a
    value removes the key"""
    def edit_json(path, change):
        table = json.loads(path.read_text())
        if isinstance(change, dict):
            table |= change
            table = {key: value for key, value in table.items() if value is not ...}
        else:
            change(table)
        path.write_text(json.dumps(table))

    return edit_json
