"""The files of a run: each written completely or not at all; hashes of values and files."""
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, cast

import torch

from runtime import signals

PathLike = str | os.PathLike[str]

FORMAT = 1  # raise it when a change of the code makes old checkpoints wrong
CHECKSUM_CHARACTERS = 64   # of a sha256 in hexadecimal digits
CHUNK = 2 ** 24            # bytes read at once
LARGE = 2 ** 30            # bytes: of a larger file samples are hashed
SAMPLES = 64
SAMPLE_BYTES = 4096
OTHER_FOLDER = "name another folder with --out_dir"
OWN_FILES = re.compile(  # names of files in out_dir that a run writes
    r"(results|audit|encoding|trust)\.json|issues\.csv|report\.html"
    r"|(gaps|views|clean|sft|(member|planted|reward|policy|meta)_.*)\.(pt|ckpt)"
    r"|(strength|cleaned|answers|log|(rollouts|samples|dropped|watch)_.*)\.jsonl"
    r"|samples_.*\.md"
)


def cannot_write(path: PathLike, error: Exception, remedy: str = OTHER_FOLDER) -> OSError:
    """OSError that names the file and how to have it written elsewhere."""
    reason = "the write was incomplete, as on a full disk"
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return OSError(f"{path}: cannot be written ({reason}); free some space or {remedy}")


def check_writable(path: PathLike, remedy: str):
    """Raise before the work, and not after it, where its result could not be written."""
    part = part_path(path)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if not os.path.basename(path):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with open(part, "wb"):
            os.remove(part)
    except OSError as error:
        raise cannot_write(path, error, remedy) from None


def part_path(path: PathLike) -> str:
    """Name under which a file is written before it is renamed; no two processes share it, also of
    two machines with a common disk"""
    return f"{path}.nanoreward-{platform.node()}-{os.getpid()}.part"


LEFTOVER = re.compile(r".+\.nanoreward-.*\d+\.part")


def remove_leftovers(folder: str):
    """Remove what killed processes left in a folder and below.  Only for the holder of its lock."""
    for parent, folders, names in os.walk(folder):
        for name in names:
            if LEFTOVER.fullmatch(name):
                os.remove(os.path.join(parent, name))
        for name in folders:
            if LEFTOVER.fullmatch(name):  # of an export
                shutil.rmtree(os.path.join(parent, name))


def save(path: PathLike, write: Callable, remedy: str = OTHER_FOLDER):
    """Call write(file) on a temporary file and rename it to path, so that path is always complete.

    Raises OSError, naming path and remedy, if the disk is full or the folder cannot be written.
    """
    part = part_path(path)
    try:
        with signals.saving():
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise cannot_write(path, error, remedy) from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def save_text(path: PathLike, text: str, remedy: str = OTHER_FOLDER):
    save(path, lambda file: file.write(text.encode()), remedy)


def finite(value: Any) -> Any:
    """Copy of a JSON value with nan and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def save_json(path: PathLike, value: Any, remedy: str = OTHER_FOLDER):
    save_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n", remedy)


def save_jsonl(path: PathLike, records: Iterable, remedy: str = OTHER_FOLDER):
    """One object a line; records may be a generator."""
    def write(file):
        for record in records:
            file.write(json.dumps(finite(record), ensure_ascii=False).encode() + b"\n")

    save(path, write, remedy)


def set_aside(path):
    """Rename NAME.jsonl to NAME.edited.jsonl, or NAME.edited-2.jsonl, …  -> the new path"""
    stem, ending = os.path.splitext(path)
    for number in itertools.count(1):
        kept = f"{stem}.edited{'' if number == 1 else f'-{number}'}{ending}"
        if not os.path.exists(kept):
            os.rename(path, kept)
            return kept


def same_content(path, other):
    return output_facts(path)["sha256"] == output_facts(other)["sha256"]


def load_json(path: PathLike) -> Any:
    """A JSON file of a run.  Raises OSError, naming file and remedy, if it is missing or damaged"""
    with open(path, "rb") as file:
        return parse(path, file.read())


def load_jsonl(path: PathLike) -> list:
    """A JSONL file of a run -> [record].  Raises OSError like load_json, naming the line"""
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                records.append(parse(f"{path}:{number}", line))
    return records


def parse(where, content):
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise OSError(f"{where}: broken JSON ({error}); delete the file and run the same command "
                      f"again") from None


def save_tensors(path: PathLike, state: Any):
    """A checkpoint: tensors, numbers, texts, lists and dictionaries of them."""
    save(path, lambda file: torch.save(state, file))


def load_tensors(path: PathLike, device: str | torch.device = "cpu") -> Any:
    """A checkpoint of save_tensors; unpickles tensors and plain data only.

    Raises OSError, naming file and remedy, if it is missing or no checkpoint.
    """
    with open(path, "rb"):
        pass  # raises an error of its own for a missing or unreadable file
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # broken zip, pickle with code, …: many types, one meaning
        reason = type(error).__name__
        raise OSError(f"{path}: not a readable checkpoint ({reason}); delete it and run the same "
                      f"command again") from None


def save_state(path: PathLike, state: Any):
    """A checkpoint that ends with the sha256 of what is before it."""
    def write(file):
        hashing = HashingFile(file)
        torch.save(state, cast(BinaryIO, hashing))  # which needs write and flush alone
        file.write(hashing.sha256.hexdigest().encode())

    save(path, write)


def load_state(path: PathLike, device: str | torch.device = "cpu") -> Any:
    """A checkpoint of save_state; None if it is missing, or not whole."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return None
    try:
        with open(path, "rb") as file:
            if not ends_with_checksum(file):
                return None
        return load_tensors(path, device)
    except OSError:
        return None


class HashingFile:
    """A file to write to that keeps the sha256 of what was written."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, content):
        self.sha256.update(content)
        return self.file.write(content)

    def flush(self):
        self.file.flush()


def ends_with_checksum(file):
    size = os.fstat(file.fileno()).st_size - CHECKSUM_CHARACTERS
    sha256 = hashlib.sha256()
    while size > 0:
        content = file.read(min(size, CHUNK))
        if not content:
            return False
        sha256.update(content)
        size -= len(content)
    return size == 0 and file.read() == sha256.hexdigest().encode()


def append_line(path: PathLike, record: Any):
    """Add one line by a single write, so that processes that share a log do not mix their lines."""
    try:
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps(finite(record)) + "\n").encode())
    except OSError as error:
        raise cannot_write(path, error) from None


def digest(value: Any) -> str:
    """Hash of a JSON value, 16 hexadecimal digits; seeds and fingerprints are made of it."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# What a record remembers of an output


def output_facts(path: str) -> dict:
    """-> {"bytes", "sha256"}, and of a file over LARGE {"time", "samples"}"""
    status = os.stat(path)
    size = status.st_size
    facts = {"bytes": size, "sha256": file_sha256(path, size, status.st_ctime_ns)}
    if size > LARGE:
        facts |= {"time": status.st_mtime_ns, "samples": samples_sha256(path, size)}
    return facts


def what_changed(path: str, facts: dict) -> str:
    """How a file differs from its facts, in words; "" if it does not.

    Every byte is compared, but of a large file whose time is unchanged samples alone.
    """
    if not os.path.isfile(path):
        return "is gone"
    status = os.stat(path)
    size = status.st_size
    if size != facts["bytes"]:
        return f"has {size:,} bytes, not {facts['bytes']:,}"
    if status.st_mtime_ns == facts.get("time") and samples_sha256(path, size) == facts["samples"]:
        return ""
    is_same = file_sha256(path, size, status.st_ctime_ns) == facts["sha256"]
    return "" if is_same else "is not as it was written"


@functools.cache
def file_sha256(path, size, changed):
    """size, changed: of the file and its last change; it is hashed again when they differ"""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def samples_sha256(path, size):
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            sha256.update(file.read(SAMPLE_BYTES))
    return sha256.hexdigest()


def versions() -> dict[str, str | int]:
    return {"python": platform.python_version(), "torch": torch.__version__, "format": FORMAT}
