"""formats/records.py and values.py: lines, containers, addresses; checks of values."""
import gzip
import hashlib
import http.client
import json
import os
import random

import pytest
from fake_network import URL, fake_network
from hypothesis import given
from hypothesis import strategies as st

import config
import data
from data import DataError
from formats import records
from formats.pairs import read_pairs
from formats.records import read_records
from formats.values import check_copyable, check_strings, json_type
from runtime import files

PAIR = {"prompt": "Which?", "chosen": " this", "rejected": " that"}
GOOD = (json.dumps(PAIR) + "\n").encode()


def write(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("compress", [False, True])
def test_records_come_with_their_line_numbers(tmp_path, compress):
    """A byte-order mark, CRLF and blank lines are no error; a value need not be an object."""
    content = '\ufeff{"a": 1}\r\n\n  \n[2]\n"é"'.encode()
    if compress:
        path = write(tmp_path / "a.jsonl.gz", gzip.compress(content))
    else:
        path = write(tmp_path / "a.jsonl", content)
    assert list(read_records(path)) == [(1, {"a": 1}), (4, [2]), (5, "é")]


def test_a_byte_order_mark_is_allowed_at_the_beginning_only(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n' + '\ufeff{"a": 1}\n'.encode())
    with pytest.raises(DataError, match=":2: broken JSON"):
        list(read_records(path))


def truncate(content):
    return content[:len(content) // 2]


def damage(content):
    return content[:20] + bytes(byte ^ 255 for byte in content[20:40]) + content[40:]


def long_gzip():
    lines = []
    for seed in range(200):
        lines.append(json.dumps(PAIR | {"prompt": str(random.Random(seed).random())}) + "\n")
    return gzip.compress("".join(lines).encode())


BAD_FILES = {  # name -> file, content, part of the error
    "no such file": ("a.jsonl", None, "no such file"),
    "empty": ("a.jsonl", b"", "empty"),
    "blank lines": ("a.jsonl", b"\n \n", "empty"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), "empty"),
    "truncated gzip": ("a.jsonl.gz", truncate(long_gzip()), "gzip"),
    "damaged gzip": ("a.jsonl.gz", damage(long_gzip()), "gzip"),
    "gzip in name only": ("a.jsonl.gz", GOOD, "is no gzip file in spite of its name.*take .gz off"),
    "image": ("a.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(100), "is a PNG image; convert it to JSONL"),
    "zip": ("a.jsonl", b"PK\x03\x04" + bytes(100), "is a zip archive"),
    "bzip2": ("a.jsonl.bz2", b"BZh9" + bytes(100), "is compressed by bzip2"),
    "PDF": ("a.jsonl", b"%PDF-1.7", "is a PDF document"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), ":1: not UTF-8.*convert"),
    "binary": ("a.jsonl", bytes(range(256)), ":1: .*"),
    "object over lines": ("a.jsonl", json.dumps(PAIR, indent=1).encode(), ":1: broken.*jq -c"),
    "text": ("a.jsonl", b"prompt,chosen,rejected\n", ":1: broken JSON"),
    "key twice": ("a.jsonl", GOOD + b'{"chosen": "a", "chosen": "b"}', ":2: key 'chosen' is given"),
    "many digits": ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ":1: a number has too many digits"),
    "large margin": (
        "a.jsonl", json.dumps(PAIR | {"margin": -10 ** 400}).encode(), ":1: 'margin' must be a"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name):
    file, content, message = BAD_FILES[name]
    path = str(tmp_path / file)
    if content is not None:
        write(tmp_path / file, content)
    with pytest.raises(DataError, match=message) as error:
        read_pairs(path)
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)


def test_a_compressed_file_is_read_whatever_its_name(tmp_path):
    path = write(tmp_path / "a.jsonl", gzip.compress(GOOD))
    assert [pair.chosen for pair in read_pairs(path)] == [" this"]


@pytest.mark.parametrize("name", ["a\nb.jsonl", "a\udcff.jsonl", "a\0.jsonl", "a\x1b[2J.jsonl"])
def test_a_name_that_no_message_can_hold_is_refused(name):
    with pytest.raises(DataError, match="rename it"):
        read_pairs(name)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/zero"):
        with pytest.raises(DataError, match="is a pipe or a device; write its content"):
            read_pairs(str(path))
    with pytest.raises(DataError, match="Too many levels of symbolic links"):
        read_pairs(str(tmp_path / "loop.jsonl"))


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.jsonl", GOOD)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match="cannot be read .Permission denied.; check its permis"):
        read_pairs(path)


def test_a_line_longer_than_any_pair_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 1000)
    path = write(tmp_path / "a.jsonl", GOOD + b'{"chosen": "' + b"x" * 1000 + b'"}')
    with pytest.raises(DataError, match=":2: the line has more than 1,000 bytes"):
        read_pairs(path)


@pytest.mark.parametrize("value, part", [
    ({"a": ["\ud800"]}, "half of a surrogate pair"),
    ({"\udfff": 1}, "half of a surrogate pair"),
    ([float("nan")], "the number nan cannot be written"),
    ({"a": 1e999}, "the number inf cannot be written"),
    (json.loads("[" * 500 + "]" * 500), "nested more than 100 levels"),
])
def test_what_cannot_be_written_back_is_named(value, part):
    with pytest.raises(DataError, match=f"^f:3: .*{part}"):
        check_copyable(value, "f:3")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(json_values)
def test_what_can_be_written_back_is_the_same_afterwards(value):
    try:
        check_copyable(value, "f:1")
    except DataError:
        return
    text = json.dumps(files.finite(value), ensure_ascii=False)
    assert records.DECODER.decode(text.encode().decode()) == value


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder; name the files"):
        read_pairs(str(tmp_path))


@pytest.mark.parametrize("text, name", [
    ("null", "null"), ("true", "a boolean"), ("1", "a number"), ("1.5", "a number"),
    ('"a"', "a string"), ("[]", "a list"), ("{}", "an object"),
])
def test_types_have_the_names_of_json(text, name):
    assert json_type(json.loads(text)) == name


@pytest.mark.parametrize("record, message", [
    ([1], "f:1: a line must be an object with a and b, not a list"),
    ({"a": ""}, "f:1: key 'b' is missing; add it"),
    ({"a": "", "b": 1}, "f:1: 'b' must be a string, not a number"),
    ({"a": "", "b": "", "prompt": None}, "f:1: 'prompt' must be a string, not null"),
    ({"a": "\udc00", "b": ""}, "f:1: 'a' holds half of a surrogate pair"),
])
def test_needed_keys_and_the_prompt_must_be_text(record, message):
    with pytest.raises(DataError) as error:
        check_strings(record, "f:1", ("a", "b"), "; add it")
    assert str(error.value).startswith(message)


def test_other_keys_are_not_checked():
    assert check_strings({"a": "x", "b": "", "c": 3}, "f:1", ("a", "b")) is None


# --------------------------------------------------------------------------------------------------
# Addresses; a stand-in answers instead of the network

def test_an_address_is_downloaded_once_and_verified_every_time(tmp_path, monkeypatch, capsys):
    content = gzip.compress(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode())
    checksum = hashlib.sha256(content).hexdigest()
    requested = fake_network(monkeypatch, tmp_path, content)
    assert [pair.chosen for pair in read_pairs(URL)] == [" a"]
    assert f"add #sha256={checksum}" in capsys.readouterr().out

    with_checksum = f"{URL}#sha256={checksum}"
    assert [pair.source for pair in read_pairs(with_checksum)] == [f"{with_checksum}:1"]
    assert requested == [URL]

    cached = next((tmp_path / "cache/nanoreward").iterdir())
    cached.write_bytes(content[:-1])
    with pytest.raises(OSError, match=f"not {checksum}.*delete .*{cached.name}"):
        read_pairs(with_checksum)


@pytest.mark.parametrize("error, headers, words", [
    (OSError("no route to host"), None, "no route to host"),
    (http.client.IncompleteRead(b""), None, "IncompleteRead"),
    (None, {"Content-Length": "700"}, "of 700 bytes"),
], ids=["offline", "interrupted", "short"])
def test_a_failed_download_is_one_line_and_leaves_nothing(
        tmp_path, monkeypatch, error, headers, words):
    fake_network(monkeypatch, tmp_path, GOOD, headers, error)
    with pytest.raises(OSError, match=f"cannot be fetched.*{words}.*by hand") as caught:
        read_pairs(URL)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache/nanoreward").iterdir())


def test_a_download_with_another_checksum_is_not_kept(tmp_path, monkeypatch):
    fake_network(monkeypatch, tmp_path, GOOD)
    with pytest.raises(OSError, match="its sha256 is .*, not 0123"):
        read_pairs(URL + "#sha256=" + "0123" * 16)
    assert not list((tmp_path / "cache/nanoreward").iterdir())


def test_ood_sets_of_addresses_are_named_by_folder_and_file(tmp_path, monkeypatch):
    record = {"prompt": "p", "chosen": "a", "rejected": "b"}
    content = gzip.compress(json.dumps(record).encode())
    fake_network(monkeypatch, tmp_path, content)
    address = f"{URL}#sha256={hashlib.sha256(content).hexdigest()}"
    overrides = [("data.train", "x.jsonl"), ("data.ood", address)]
    assert list(data.load_ood(config.load(overrides=overrides), [])) == ["helpful-test"]


@pytest.mark.parametrize("address", [
    "http://example.org/x.jsonl", "ftp://x/y", "file:///etc/passwd",
])
def test_only_https_is_downloaded(tmp_path, monkeypatch, address):
    fake_network(monkeypatch, tmp_path, b"another file")
    with pytest.raises(OSError, match="only https://"):
        read_pairs(address)
