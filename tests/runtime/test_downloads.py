"""Files from the network; a substitute of urlopen or a server of this machine answers."""
import gzip
import hashlib
import http.client
import lzma
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_network import URL, fake_network
from local_server import Page, local_server

from runtime import downloads
from runtime.downloads import fetch

CONTENT = b'{"chosen": "a", "rejected": "b"}\n'
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()
SECRET = "https://user:hunter2@example.org/a.jsonl"


@pytest.fixture
def server(tmp_path, monkeypatch):
    with local_server(monkeypatch, tmp_path / "cache") as running:
        yield running


def read(path):
    with open(path, "rb") as file:
        return file.read()


def files_in(folder):
    return [path.name for path in folder.rglob("*") if path.is_file()]


def error_of(address, *parts):
    """The message of the OSError of an address, one line with all the parts"""
    with pytest.raises(OSError) as caught:
        fetch(address)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_an_address_is_fetched_once_and_checked_every_time(tmp_path, monkeypatch, capsys):
    requests = fake_network(monkeypatch, tmp_path, CONTENT)
    path = fetch(URL)
    assert read(path) == CONTENT and path.endswith("-test.jsonl.gz")
    assert f"add #sha256={CHECKSUM}" in capsys.readouterr().out
    for pin in (f"#sha256={CHECKSUM}", f"#sha256={CHECKSUM.upper()}", f"#SHA256={CHECKSUM}"):
        assert fetch(URL + pin) == path
    assert requests == [URL] and capsys.readouterr().out == ""
    cached = next((tmp_path / "cache/nanoreward").iterdir())
    assert str(cached) == path
    cached.write_bytes(CONTENT[:-1])
    error_of(f"{URL}#sha256={CHECKSUM}", f"not {CHECKSUM}", "delete ", cached.name)
    assert read(fetch(URL)) == CONTENT[:-1]  # without a checksum there is nothing to compare with


def test_a_file_with_the_right_checksum_needs_no_advice(tmp_path, monkeypatch, capsys):
    fake_network(monkeypatch, tmp_path, CONTENT)
    fetch(f"{URL}#sha256={CHECKSUM}")
    assert "#sha256" not in capsys.readouterr().out


@pytest.mark.parametrize("error, headers, words", [
    (OSError("no route to host"), None, "no route to host"),
    (http.client.IncompleteRead(b""), None, "IncompleteRead"),
    (OverflowError("port must be 0-65535"), None, "port"),
    (None, {"Content-Length": "70"}, "of 70 bytes"),
], ids=["offline", "interrupted", "port", "short"])
def test_a_failed_download_is_one_line_and_leaves_nothing(
        tmp_path, monkeypatch, error, headers, words):
    fake_network(monkeypatch, tmp_path, CONTENT, headers, error)
    error_of(URL, "cannot be fetched", words, "by hand")
    assert files_in(tmp_path) == []


def test_a_file_with_another_checksum_is_not_kept(tmp_path, monkeypatch):
    fake_network(monkeypatch, tmp_path, CONTENT)
    error_of(URL + "#sha256=" + "0123" * 16, "its sha256 is", "not 0123", "by hand")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("fragment", [
    "sha256=", "sha256=0123", "md5=" + "0" * 32, "sha-256=" + "0" * 64, "sha256=" + "g" * 64, "",
    "part2", "sha256=" + "0" * 64 + "#sha256=" + "1" * 64,
])
def test_a_fragment_that_pins_nothing_is_refused(tmp_path, monkeypatch, fragment):
    requests = fake_network(monkeypatch, tmp_path, CONTENT)
    error_of(f"{URL}#{fragment}", "write #sha256= and 64 hexadecimal digits")
    assert requests == []


@pytest.mark.parametrize("address, part", [
    ("http://example.org/x.jsonl", "only https://"),
    ("ftp://x/y", "only https://"),
    ("file:///etc/passwd", "only https://"),
    ("https:///x.jsonl", "names no server"),
    ("https://[::1/x", "is not a valid address"),
    ("https://example.org:99999/x", "is not a valid address"),
    ("https://example.org/a\nb", "correct the address"),
    ("https://example.org/\udcff", "correct the address"),
    (SECRET, "https://***@example.org/a.jsonl"),
])
def test_what_is_no_address_to_fetch_is_refused(tmp_path, monkeypatch, address, part):
    requests = fake_network(monkeypatch, tmp_path, CONTENT)
    message = error_of(address, part)
    assert requests == [] and "hunter2" not in message


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    fake_network(monkeypatch, tmp_path, CONTENT)
    (tmp_path / "cache").write_text("")
    error_of(URL, "cannot be written", "XDG_CACHE_HOME")


def test_a_disk_that_fills_up_is_not_blamed_on_the_server(tmp_path, monkeypatch):
    class FullDisk:
        name = "some.part"

        def write(self, chunk):
            raise OSError(28, "No space left on device")

    fake_network(monkeypatch, tmp_path, CONTENT)
    with pytest.raises(OSError, match="some.part: cannot be written .No space left.*XDG_CACHE"):
        downloads.download(URL, FullDisk())


@pytest.mark.parametrize("content", [
    b"<!DOCTYPE html><html>Sign in</html>", gzip.compress(b"<html>"), b"", b"not found",
    gzip.compress(CONTENT)[:12], b"\x89PNG\r\n\x1a\n",
], ids=["page", "compressed page", "nothing", "text", "broken gzip", "image"])
def test_what_is_no_preference_file_is_not_kept(tmp_path, monkeypatch, content):
    fake_network(monkeypatch, tmp_path, content)
    error_of(URL, "holds no JSON lines", "by hand")
    assert files_in(tmp_path) == []


def test_what_an_older_version_has_kept_is_checked(tmp_path, monkeypatch):
    fake_network(monkeypatch, tmp_path, CONTENT)
    path = fetch(URL)
    with open(path, "wb") as file:
        file.write(b"<html>")
    error_of(URL, "holds no JSON lines", f"delete {path}")


@pytest.mark.parametrize("content", [
    CONTENT, b"\xef\xbb\xbf\n " + CONTENT, gzip.compress(CONTENT), b"[" + CONTENT,
    lzma.compress(CONTENT), b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1\0\0",
], ids=["plain", "byte-order mark", "gzip", "array", "xz", "zstd", "Parquet", "Arrow"])
def test_json_lines_are_kept(tmp_path, monkeypatch, content):
    fake_network(monkeypatch, tmp_path, content)
    assert read(fetch(URL)) == content


# --------------------------------------------------------------------------------------------------
# A server of this machine


def test_a_server_is_asked_once(server):
    server.pages["/a.jsonl"] = Page(CONTENT)
    for _ in range(2):
        assert read(fetch(f"{server.url}/a.jsonl")) == CONTENT
    assert server.requests == ["/a.jsonl"]


def test_a_redirect_is_followed_to_https_only(server, monkeypatch):
    server.pages["/a"] = Page(status=302, headers={"Location": "/b"})
    server.pages["/b"] = Page(CONTENT)
    assert read(fetch(f"{server.url}/a")) == CONTENT
    monkeypatch.setattr(downloads, "SCHEMES", ("https",))
    monkeypatch.setattr(downloads, "check_address", lambda address: (address, ""))
    server.pages["/c"] = Page(status=302, headers={"Location": f"{server.url}/b"})
    server.requests.clear()
    error_of(f"{server.url}/c", "redirects to http://, and only https:// is fetched", "by hand")
    assert server.requests == ["/c"]


def test_a_redirect_that_never_ends_is_one_line(server):
    server.pages["/a"] = Page(status=302, headers={"Location": "/a"})
    error_of(f"{server.url}/a", "cannot be fetched", "by hand")


@pytest.mark.parametrize("status", [401, 404, 500])
def test_an_error_of_the_server_is_one_line(server, tmp_path, status):
    server.pages["/a"] = Page(CONTENT, status=status)
    error_of(f"{server.url}/a", "cannot be fetched", "by hand")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("headers", [{}, {"Content-Length": None}], ids=["size given", "no size"])
def test_a_file_that_is_too_large_is_not_kept(server, tmp_path, monkeypatch, headers):
    monkeypatch.setattr(downloads, "MAX_BYTES", len(CONTENT) * 3 - 1)
    server.pages["/a"] = Page(CONTENT * 3, headers)
    error_of(f"{server.url}/a", "it has more than 98 bytes", "by hand")
    assert files_in(tmp_path) == []


def test_a_server_that_sends_a_byte_at_a_time_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_SECONDS", 0.1)
    server.pages["/a"] = Page(CONTENT, pause=0.05)
    error_of(f"{server.url}/a", "it takes more than 0.1 seconds", "by hand")
    assert files_in(tmp_path) == []


def test_a_server_that_stops_sending_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "STALL_SECONDS", 0.1)
    server.pages["/a"] = Page(CONTENT, pause=1)
    error_of(f"{server.url}/a", "timed out", "by hand")
    assert files_in(tmp_path) == []


def test_the_same_address_can_be_fetched_by_many_at_once(server, tmp_path):
    content = CONTENT * 10_000
    server.pages["/a.jsonl"] = Page(content)
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(fetch, [f"{server.url}/a.jsonl"] * 8))
    assert read(paths.pop()) == content and not paths
    assert len(files_in(tmp_path)) == 1
