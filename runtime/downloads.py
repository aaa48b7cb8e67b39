"""Data files from https:// addresses, downloaded once into the user's cache."""
import hashlib
import http.client
import os
import urllib.parse
import urllib.request

from tqdm import tqdm

from runtime import files

BY_HAND = "fetch it by hand and give the name of your file instead"


def fetch(address):
    """https://… or https://…#sha256=… -> path of the file in this user's cache; downloads it if new

    Raises OSError, in one line with a remedy, if the file cannot be downloaded or its checksum is
    not the one given.
    """
    url, _, expected = address.partition("#sha256=")
    if not url.startswith("https://"):
        raise OSError(f"{url}: only https:// is fetched; {BY_HAND}")
    path = cache_path(url)
    if os.path.exists(path):
        with open(path, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        compare_checksums(url, checksum, expected, f"delete {path} to fetch it again")
        return path
    content = download(url)
    checksum = hashlib.sha256(content).hexdigest()
    compare_checksums(url, checksum, expected, BY_HAND)
    variable = "XDG_CACHE_HOME, a variable of the environment"
    files.save(path, lambda file: file.write(content), variable)
    remark = "" if expected else f"; to pin this version, add #sha256={checksum}"
    print(f"data: {url} is now {path}{remark}")
    return path


def cache_path(url):
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = os.path.basename(urllib.parse.urlsplit(url).path)
    return os.path.join(cache, "nanoreward", f"{files.digest(url)}-{name}")


def download(url):
    """Content of the file at an address -> bytes, with a progress bar"""
    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers.get("Content-Length") or 0)
            bar = tqdm(total=size or None, desc=url, unit="B", unit_scale=True, disable=None,
                       leave=False)
            with bar:
                while chunk := response.read(2 ** 20):
                    content += chunk
                    bar.update(len(chunk))
        if size and len(content) != size:
            raise OSError(f"{len(content):,} of {size:,} bytes arrived")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(f"{url}: cannot be fetched ({reason}); {BY_HAND}") from None
    return content


def compare_checksums(url, checksum, expected, remedy):
    if expected and checksum != expected.lower():
        raise OSError(f"{url}: its sha256 is {checksum}, not {expected}: it has changed or is "
                      f"damaged; {remedy}")
