"""Data files from https:// addresses, downloaded once into the user's cache."""
import gzip
import hashlib
import http.client
import os
import re
import tempfile
import time
import urllib.parse
import urllib.request
import zlib
from typing import Any

from tqdm import tqdm

from formats.signatures import ARROW, COMPRESSIONS, PARQUET
from runtime import files
from runtime.inputs import hide_password, why_unusable

BY_HAND = "fetch it by hand and give the name of your file instead"
SCHEMES = ("https",)       # tests add http, for a server of their own
MAX_BYTES = 10 * 2 ** 30
MAX_SECONDS = 3600         # for a whole file
STALL_SECONDS = 60         # without a byte
MAX_NAME = 100             # characters of a file's name that are kept in the cache
CONTAINERS = (COMPRESSIONS["xz"], COMPRESSIONS["zstd"], PARQUET, ARROW)
CSV = (".csv", ".csv.gz")
OTHER_CACHE = "name another folder with XDG_CACHE_HOME, a variable of the environment"


def fetch(address: str) -> str:
    """https://… or https://…#sha256=… -> path of the file in this user's cache; downloads it if new

    Raises OSError, in one line with a remedy, if the file cannot be downloaded, is no preference
    file or its checksum is not the one given.
    """
    url, expected = check_address(address)
    path = cache_path(url)
    if os.path.exists(path):
        with open(path, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        remedy = f"delete {path} to fetch it again"
        compare_checksums(url, checksum, expected, remedy)
        check_content(url, path, remedy)
        return path
    part = open_part(path)
    try:
        with part:
            checksum = download(url, part)
        compare_checksums(url, checksum, expected, BY_HAND)
        check_content(url, part.name, BY_HAND)
        os.replace(part.name, path)  # two processes may fetch the same file: each writes its own
    finally:
        if os.path.exists(part.name):
            os.remove(part.name)
    remark = "" if expected else f"; to pin this version, add #sha256={checksum}"
    print(f"data: {url} is now {path}{remark}")
    return path


def check_address(address: str) -> tuple[str, str]:
    """-> URL without its fragment, the sha256 in the fragment or ""; raises OSError"""
    shown = hide_password(address)
    reason = why_unusable(address)
    if reason:
        raise OSError(f"{ascii(shown)[:200]}: {reason.partition(';')[0]}; correct the address")
    url, has_fragment, fragment = address.partition("#")
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise OSError(f"{shown}: is not a valid address; correct it") from None
    if parts.scheme not in SCHEMES:
        raise OSError(f"{shown}: only https:// is fetched; {BY_HAND}")
    if "@" in parts.netloc:
        raise OSError(f"{shown}: an address with a name or password is not fetched, as records "
                      f"would keep it; {BY_HAND}")
    if not host:
        raise OSError(f"{shown}: names no server; write https://SERVER/FILE")
    checksum = re.fullmatch("sha256=([0-9a-f]{64})", fragment.lower())
    if has_fragment and not checksum:
        raise OSError(f"{shown}: #{fragment[:20]} pins nothing; write #sha256= and 64 hexadecimal "
                      "digits, or leave # and what follows out")
    return url, checksum[1] if checksum else ""


def cache_path(url):
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = os.path.basename(urllib.parse.urlsplit(url).path)[-MAX_NAME:]
    return os.path.join(cache, "nanoreward", f"{files.digest(url)}-{name}")


def open_part(path):
    """A new file beside path to download to, of this process alone.  Raises OSError"""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
        return tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False)
    except OSError as error:
        raise files.cannot_write(path, error, OTHER_CACHE) from None


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follow a redirect only to an address that could be given: to http:// content can be changed
    on its way."""

    def redirect_request(self, request, response, code, message, headers, url):
        scheme = urllib.parse.urlsplit(url).scheme
        if scheme not in SCHEMES:
            raise OSError(f"the server redirects to {scheme}://, and only https:// is fetched")
        return super().redirect_request(request, response, code, message, headers, url)


def download(url, file):
    """Copy the file at an address to an open file, with a progress bar -> its sha256"""
    hasher = hashlib.sha256()
    for chunk in received_chunks(url):
        hasher.update(chunk)
        try:
            file.write(chunk)
        except OSError as error:
            raise files.cannot_write(file.name, error, OTHER_CACHE) from None
    return hasher.hexdigest()


def received_chunks(url):
    """Yields the content of the file at an address.  Raises OSError where it is not complete."""
    urllib.request.install_opener(urllib.request.build_opener(SafeRedirects))
    deadline = time.monotonic() + MAX_SECONDS
    received = 0
    try:
        with urllib.request.urlopen(url, timeout=STALL_SECONDS) as response:
            size = expected_size(response.headers)
            bar = tqdm(total=size, desc=url, unit="B", unit_scale=True, disable=None, leave=False)
            with bar:
                while chunk := response.read1(2 ** 20):
                    received += len(chunk)
                    if max(received, size or 0) > MAX_BYTES:
                        raise OSError(f"it has more than {MAX_BYTES:,} bytes")
                    if time.monotonic() > deadline:
                        raise OSError(f"it takes more than {MAX_SECONDS:,} seconds")
                    bar.update(len(chunk))
                    yield chunk
        if size is not None and received != size:
            raise OSError(f"{received:,} of {size:,} bytes arrived")
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise OSError(f"{url}: cannot be fetched ({reason}); {BY_HAND}") from None


def expected_size(headers):
    """Content-Length -> number of bytes, None where the server does not give one"""
    text = headers.get("Content-Length") or ""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def compare_checksums(url, checksum, expected, remedy):
    if expected and checksum != expected:
        raise OSError(f"{url}: its sha256 is {checksum}, not {expected}: it has changed or is "
                      f"damaged; {remedy}")


def check_content(url, path, remedy):
    """Raise OSError unless the file begins as preference files do: JSON, CSV, or a container.

    Servers send web pages, of a login or an error, as if they were the file.
    """
    try:
        with gzip.open(path) as file:
            start = file.read(1000)
    except (OSError, EOFError, zlib.error):  # not compressed
        with open(path, "rb") as file:
            start = file.read(1000)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    name = urllib.parse.urlsplit(url).path
    is_csv = name.endswith(CSV) and text and not text.startswith(b"<")
    if not text.startswith((b"{", b"[")) and not start.startswith(CONTAINERS) and not is_csv:
        raise OSError(f"{url}: holds no JSON lines (it begins with {start[:30]!r}); {remedy}")


# --------------------------------------------------------------------------------------------------
# The Hugging Face hub


class HubError(Exception):
    """Why something of the hub cannot be had: a part of a message that a remedy follows."""


def fetch_from_hub(repository: str, **options: Any) -> str:
    """Fetch the files of a repository that are new -> its folder.  Raises HubError

    options: of huggingface_hub.snapshot_download
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise HubError("huggingface_hub is not installed to fetch it from the hub; pip install "
                       "huggingface_hub, or") from None
    try:
        return snapshot_download(repository, **options)
    except Exception as error:  # no network, unknown name, licence not accepted: many types
        reason = type(error).__name__
        raise HubError(f"it cannot be fetched from the hub ({reason});") from None
