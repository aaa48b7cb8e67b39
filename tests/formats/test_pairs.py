"""formats/pairs.py: recognition, mixed files, settings, a bad line is named.

The layouts are in test_layouts.py, exchanged labels in test_exchange.py, files in test_records.py
and test_containers.py.
"""
import gzip
import json

import pytest

from data import DataError, Pair
from formats import hh_dialogue
from formats.adapter import Reading
from formats.pairs import parse_record, read_pairs
from formats.sources import short_name

WHICH = "\n\nHuman: Which?\n\nAssistant:"
PAIR = {"prompt": WHICH, "chosen": " this", "rejected": " that"}
DIALOGUE = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
    "rejected": "\n\nHuman: Hi\n\nAssistant: No",
}
GOOD = (json.dumps(PAIR) + "\n").encode()


def write(folder, content, compress=False):
    if compress:
        path = folder / "a.jsonl.gz"
        path.write_bytes(gzip.compress(content))
    else:
        path = folder / "a.jsonl"
        path.write_bytes(content)
    return str(path)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("compress", [False, True])
def test_both_layouts_are_read_plain_and_compressed(tmp_path, compress):
    content = "\ufeff" + lines(PAIR) + "\n" + lines(DIALOGUE, PAIR | {"margin": 2})
    path = write(tmp_path, content.encode(), compress)
    assert read_pairs(path) == [
        Pair(WHICH, " this", " that", None, f"{path}:1", 0),
        Pair("\n\nHuman: Hi\n\nAssistant:", " Hello", " No", None, f"{path}:3", 1),
        Pair(WHICH, " this", " that", 2, f"{path}:4", 2)]


def test_every_pair_comes_with_its_layout_and_its_whole_record(tmp_path):
    records = [PAIR | {"id": [3]}, DIALOGUE, DIALOGUE | {"margin": -0.5, "note": None}]
    pairs = read_pairs(write(tmp_path, lines(*records).encode()))
    assert [pair.layout for pair in pairs] == ["explicit prompt", "HH dialogues", "HH dialogues"]
    assert [pair.record for pair in pairs] == records
    assert [pair.margin for pair in pairs] == [None, None, -0.5]


def test_record_and_layout_are_no_part_of_what_a_pair_is():
    plain = Pair("p", "a", "b")
    read = Pair("p", "a", "b", record={"prompt": "p"}, layout="explicit prompt")
    assert plain == read and hash(plain) == hash(read)
    assert "record" not in repr(read)
    assert Pair("p", "a", "b").record is None


BAD_LINES = {  # name -> line 2 of the file, part of the error
    "broken JSON": (b'{"prompt": "a", \n', "broken JSON"),
    "no JSON at all": (b"chosen,rejected\n", "broken JSON"),
    "deep nesting": (b"[" * 100_000 + b"\n", "broken JSON"),
    "list": (b'["a", "b"]\n', "object .* not a list"),
    "text": (b'"a"\n', "object .* not a string"),
    "number line": (b"3\n", "object .* not a number"),
    "missing chosen": (b'{"prompt": "a", "rejected": "b"}\n', "'chosen' is missing"),
    "missing rejected": (b'{"prompt": "a", "chosen": "b"}\n', "'rejected' is missing"),
    "null": (
        b'{"prompt": "a", "chosen": null, "rejected": "b"}\n',
        "'chosen' must be a string, not null"),
    "number": (
        b'{"prompt": "a", "chosen": "b", "rejected": 3.5}\n',
        "'rejected' must be a string, not a number"),
    "number without prompt": (
        b'{"chosen": "b", "rejected": 3.5}\n',
        "'rejected' must be a string, not a number"),
    "number prompt": (
        b'{"prompt": 3, "chosen": "b", "rejected": "c"}\n',
        "'prompt' must be a string, not a number"),
    "message without content": (
        b'{"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}\n',
        "'prompt' must hold messages with role and content"),
    "latin-1": (
        '{"prompt": "\u00e9", "chosen": "b", "rejected": "c"}\n'.encode("latin-1"),
        "not UTF-8"),
    "half a surrogate pair": (
        b'{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}\n',
        "surrogate"),
    "NaN margin": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}\n',
        "'margin' must be a finite number, not nan"),
    "infinite margin": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e999}\n',
        "'margin' must be a finite number, not inf"),
    "true margin": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": true}\n',
        "'margin' must be a finite number, not a boolean"),
    "text margin": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}\n',
        "'margin' must be a finite number, not a string"),
    "margin of a dialogue": (
        b'{"chosen": "b", "rejected": "c", "margin": "1"}\n',
        "'margin' must be a finite number, not a string"),
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("compress", [False, True])
def test_a_bad_line_is_one_line_that_names_it(tmp_path, name, compress):
    line, message = BAD_LINES[name]
    path = write(tmp_path, GOOD + line + GOOD, compress)
    with pytest.raises(DataError, match=message) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("record, missing, keys, nearest", [
    ({"prompt": "a", "rejected": "b"}, "chosen", "'prompt', 'rejected'", "explicit prompt"),
    ({"chosen": "b", "Rejected": "c"}, "rejected", "'chosen', 'Rejected'", "HH dialogues"),
    ({}, "chosen", "none", "HH dialogues"),
    ({"a\nb\u00e9": 1}, "chosen", r"'a\nb\xe9'", "HH dialogues"),
    ({"prompt": "a"}, "chosen", "'prompt'", "HH dialogues"),
    ({"prompt": "a", "response": "b"}, "score", "'prompt', 'response'", "point-wise scores"),
    ({"answer_0": "a", "answer_1": "b", "score_0": 1}, "question",
     "'answer_0', 'answer_1', 'score_0'", "WebGPT comparisons"),
])
def test_an_unknown_layout_is_refused_with_its_keys_and_the_nearest_layout(
        record, missing, keys, nearest):
    with pytest.raises(DataError) as error:
        parse_record(record, "f:1", Reading())
    message = str(error.value)
    assert message.startswith(f"f:1: key '{missing}' is missing; a pair needs chosen and rejected")
    assert f"; keys seen: {keys}; nearest layout: {nearest} (" in message
    assert "\n" not in message


def test_the_error_stays_short_whatever_the_keys():
    with pytest.raises(DataError) as error:
        parse_record({str(i) * 1000: i for i in range(1000)}, "f:1", Reading())
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("chosen, rejected, prompt", [
    ("\n\nHuman: Hi\n\nAssistant: a", "\n\nHuman: Hi\n\nAssistant: b",
     "\n\nHuman: Hi\n\nAssistant:"),
    # whole turns before the last are shared
    ("\n\nHuman: Hi\n\nAssistant: a\n\nHuman: and?\n\nAssistant: b",
     "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: and?\n\nAssistant: c",
     "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: and?\n\nAssistant:"),
    # the dialogues differ from the first answer on
    ("\n\nHuman: Hi\n\nAssistant: a\n\nHuman: x\n\nAssistant: b",
     "\n\nHuman: Hi\n\nAssistant: c\n\nHuman: y\n\nAssistant: d",
     "\n\nHuman: Hi\n\nAssistant:"),
    # the responses begin alike, or one is a prefix of the other
    ("\n\nHuman: Hi\n\nAssistant: Well", "\n\nHuman: Hi\n\nAssistant: Well, no",
     "\n\nHuman: Hi\n\nAssistant:"),
    ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: no",
     "\n\nHuman: Hi\n\nAssistant:"),
    ("\n\nHuman: Hi\n\nAssistant: a", "\n\nHuman: Ho\n\nAssistant: b", ""),
])
def test_dialogues_are_split_at_the_last_shared_assistant_turn(chosen, rejected, prompt):
    for a, b in ((chosen, rejected), (rejected, chosen)):
        expected = (prompt, a[len(prompt):], b[len(prompt):])
        assert hh_dialogue.split_dialogues(a, b) == expected


@pytest.mark.parametrize("path, name", [
    ("a/b.c/mine.jsonl.gz", "mine"),
    ("mine.jsonl", "mine"),
    ("https://h.org/v1.0/base/train.jsonl.gz#sha256=1.2/3", "base-train"),
    ("owner/set:test", "set-test"),
    ("saved/set/", "set"),
])
def test_a_file_is_named_up_to_its_first_dot_and_an_address_with_its_folder(path, name):
    assert short_name(path) == name
