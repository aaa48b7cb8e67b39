"""Folders of pretrained models, on disk or from the Hugging Face hub, and their JSON files."""
import functools
import glob
import hashlib
import json
import os
import re

from config import ConfigError
from runtime import downloads
from runtime.inputs import NO_FILE, why_no_file

NEEDED = [  # of a model's folder: what the digest covers
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
FETCHED = [*NEEDED, "chat_template.jinja"]
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
MAX_JSON = 2 ** 28  # bytes of a JSON file
SAMPLES = 64        # of a weights file that the digest reads
SAMPLE_BYTES = 4096


@functools.cache
def directory(init, setting="model.init"):
    """model.init, a folder or OWNER/NAME on the hub -> folder, downloaded if need be.

    setting: its name in messages

    Raises ConfigError, which names the remedy.
    """
    if os.path.isdir(init):
        return init
    if os.path.exists(init) or not HUB_NAME.fullmatch(init):
        scratch = "scratch, " if setting == "model.init" else ""
        raise ConfigError(
            f"{setting} = {short_repr(init)}: no such folder; give {scratch}a folder with "
            "config.json, model.safetensors and tokenizer.json, or OWNER/NAME on the Hugging Face "
            "hub"
        )
    remedy = (
        f"on a machine with a network, `hf download {init} --local-dir DIR` fetches it; "
        f"then give --{setting}=DIR"
    )
    try:
        return downloads.fetch_from_hub(init, allow_patterns=FETCHED)
    except downloads.HubError as error:
        raise ConfigError(f"{setting} = {init!r}: no such folder, and {error} {remedy}") from None


def digest(init, setting="model.init"):
    """Fingerprint of a model's folder: 16 hexadecimal digits.

    It covers the small files whole, and of each weights file the size, the header and 64 samples:
    reading gigabytes at every start would take too long.
    """
    folder = directory(init, setting)
    paths = []
    for pattern in NEEDED:
        paths += glob.glob(os.path.join(glob.escape(folder), pattern))
    hasher = hashlib.sha256()
    for path in sorted(paths):
        check_file(path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            hasher.update(f"{os.path.basename(path)} {size}".encode())
            if not path.endswith(".safetensors"):
                hasher.update(file.read())
                continue
            for i in range(SAMPLES):
                file.seek(size * i // SAMPLES)
                hasher.update(file.read(SAMPLE_BYTES))
    return hasher.hexdigest()[:16]


def short_repr(value, max_len=100):
    """One short ASCII line for any value, for error messages"""
    try:
        text = ascii(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= max_len else text[:max_len] + "..."


def check_file(path, max_bytes=None):
    """Raise ConfigError unless path is a file: a pipe would be waited for."""
    reason = why_no_file(path, max_bytes)
    if reason == NO_FILE:
        raise ConfigError(
            f"{path}: no such file; the folder of a model has config.json, model.safetensors and "
            "tokenizer.json"
        )
    if reason:
        raise ConfigError(f"{path}: {reason}")


def read_json(path):
    """The JSON object in a file -> dict.  Raises ConfigError, which names file and remedy."""
    check_file(path, MAX_JSON)
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = type(error).__name__
        raise ConfigError(f"{path}: not readable as JSON ({reason}); fetch it again") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: must hold a JSON object, not {short_repr(value)}; fetch it again"
        )
    return value
