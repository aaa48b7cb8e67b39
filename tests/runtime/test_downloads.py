"""Files from the network; a substitute of urlopen answers."""
import hashlib
import http.client

import pytest
from fake_network import URL, fake_network

from runtime.downloads import fetch


def read(path):
    with open(path, "rb") as file:
        return file.read()


def test_an_address_is_fetched_once_and_checked_every_time(tmp_path, monkeypatch, capsys):
    content = b"some pairs"
    checksum = hashlib.sha256(content).hexdigest()
    requests = fake_network(monkeypatch, tmp_path, content)
    path = fetch(URL)
    assert read(path) == content and path.endswith("-test.jsonl.gz")
    assert f"add #sha256={checksum}" in capsys.readouterr().out
    assert fetch(f"{URL}#sha256={checksum}") == fetch(f"{URL}#sha256={checksum.upper()}") == path
    assert requests == [URL] and capsys.readouterr().out == ""
    cached = next((tmp_path / "cache/nanoreward").iterdir())
    assert str(cached) == path
    cached.write_bytes(content[:-1])
    with pytest.raises(OSError, match=f"not {checksum}.*delete .*{cached.name}"):
        fetch(f"{URL}#sha256={checksum}")
    assert read(fetch(URL)) == content[:-1]  # without a checksum there is nothing to compare with


def test_a_file_with_the_right_checksum_needs_no_advice(tmp_path, monkeypatch, capsys):
    fake_network(monkeypatch, tmp_path, b"some pairs")
    fetch(f"{URL}#sha256={hashlib.sha256(b'some pairs').hexdigest()}")
    assert "#sha256" not in capsys.readouterr().out


@pytest.mark.parametrize("error, headers, words", [
    (OSError("no route to host"), None, "no route to host"),
    (http.client.IncompleteRead(b""), None, "IncompleteRead"),
    (None, {"Content-Length": "7"}, "of 7 bytes"),
], ids=["offline", "interrupted", "short"])
def test_a_failed_download_is_one_line_and_leaves_nothing(
        tmp_path, monkeypatch, error, headers, words):
    fake_network(monkeypatch, tmp_path, b"abc", headers, error)
    with pytest.raises(OSError, match=f"cannot be fetched.*{words}.*by hand") as caught:
        fetch(URL)
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()


def test_a_file_with_another_checksum_is_not_kept(tmp_path, monkeypatch):
    fake_network(monkeypatch, tmp_path, b"another file")
    with pytest.raises(OSError, match="its sha256 is .*, not 0123"):
        fetch(URL + "#sha256=0123")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("address", [
    "http://example.org/x.jsonl", "ftp://x/y", "file:///etc/passwd",
])
def test_only_https_is_fetched(tmp_path, monkeypatch, address):
    requests = fake_network(monkeypatch, tmp_path, b"")
    with pytest.raises(OSError, match="only https://"):
        fetch(address)
    assert requests == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    fake_network(monkeypatch, tmp_path, b"abc")
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match="cannot be written.*XDG_CACHE_HOME"):
        fetch(URL)
