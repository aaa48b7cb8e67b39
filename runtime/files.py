"""The files of a run: each written completely or not at all; hashes of values and files."""
import hashlib
import json
import math
import os
import platform

import torch

FORMAT = 1  # raise it when a change of the code makes old checkpoints wrong


def cannot_write(path, error, setting="--out_dir"):
    """OSError that names the file and the setting that chooses its folder."""
    reason = "the write was incomplete, as on a full disk"
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return OSError(f"{path}: cannot be written ({reason}); free some space or name another folder "
                   f"with {setting}")


def open_folder(path):
    """Create a run's folder, check that it is writable, and remove what killed processes left."""
    probe = os.path.join(path, ".write_test")
    save_text(probe, "")
    os.remove(probe)
    for name in os.listdir(path):
        if name.endswith(".part"):
            os.remove(os.path.join(path, name))


def save(path, write, setting="--out_dir"):
    """Call write(file) on a temporary file and rename it to path, so that path is always complete.

    Raises OSError, naming path and remedy, if the disk is full or the folder, which `setting`
    names, cannot be written.
    """
    part = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise cannot_write(path, error, setting) from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def save_text(path, text):
    save(path, lambda file: file.write(text.encode()))


def finite(value):
    """Copy of a JSON value with nan and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def save_json(path, value):
    save_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n")


def save_jsonl(path, records):
    """One object a line; records may be a generator."""
    def write(file):
        for record in records:
            file.write(json.dumps(finite(record), ensure_ascii=False).encode() + b"\n")

    save(path, write)


def load_json(path):
    """A JSON file of a run.  Raises OSError, naming file and remedy, if it is missing or damaged"""
    with open(path, "rb") as file:
        return parse(path, file.read())


def load_jsonl(path):
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


def save_tensors(path, state):
    """A checkpoint: tensors, numbers, texts, lists and dictionaries of them."""
    save(path, lambda file: torch.save(state, file))


def load_tensors(path, device="cpu"):
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


def append_line(path, record):
    """Add one line by a single write, so that processes that share a log do not mix their lines."""
    try:
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps(finite(record)) + "\n").encode())
    except OSError as error:
        raise cannot_write(path, error) from None


def digest(value):
    """Hash of a JSON value, 16 hexadecimal digits; seeds and fingerprints are made of it."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "format": FORMAT}
