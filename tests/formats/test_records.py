"""formats/records.py: lines, containers and addresses; the checks of single values."""
import gzip
import hashlib
import http.client
import json
import random

import pytest
from fake_network import URL, fake_network

import config
import data
from data import DataError
from formats.pairs import read_pairs
from formats.records import check_strings, json_type, read_records

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
    "gzip in name only": ("a.jsonl.gz", GOOD, "gzip"),
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
    assert [pair.chosen for pair in read_pairs(URL)] == ["a"]
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
    (None, {"Content-Length": "7"}, "of 7 bytes"),
], ids=["offline", "interrupted", "short"])
def test_a_failed_download_is_one_line_and_leaves_nothing(
        tmp_path, monkeypatch, error, headers, words):
    fake_network(monkeypatch, tmp_path, b"abc", headers, error)
    with pytest.raises(OSError, match=f"cannot be fetched.*{words}.*by hand") as caught:
        read_pairs(URL)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_download_with_another_checksum_is_not_kept(tmp_path, monkeypatch):
    fake_network(monkeypatch, tmp_path, b"another file")
    with pytest.raises(OSError, match="its sha256 is .*, not 0123"):
        read_pairs(URL + "#sha256=0123")
    assert not (tmp_path / "cache").exists()


def test_ood_sets_of_addresses_are_named_by_folder_and_file(tmp_path, monkeypatch):
    record = {"prompt": "p", "chosen": "a", "rejected": "b"}
    fake_network(monkeypatch, tmp_path, gzip.compress(json.dumps(record).encode()))
    overrides = [("data.train", "x.jsonl"), ("data.ood", URL + "#sha256=")]
    assert list(data.load_ood(config.load(overrides=overrides), [])) == ["helpful-test"]


@pytest.mark.parametrize("address", [
    "http://example.org/x.jsonl", "ftp://x/y", "file:///etc/passwd",
])
def test_only_https_is_downloaded(tmp_path, monkeypatch, address):
    fake_network(monkeypatch, tmp_path, b"another file")
    with pytest.raises(OSError, match="only https://"):
        read_pairs(address)
