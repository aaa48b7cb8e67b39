"""The files of a run: written whole or not at all, and the record of what each was made from; how Ctrl-C stops a run.

A *unit* is the smallest piece of work that is skipped or done again: the tokenizer, sft, each member of the ensemble,
strength, and the reward model and policy of each treatment.  What a unit depends on, settings and other units, is hashed;
`stages/UNIT.json` keeps that hash, the resolved configuration and the versions beside the unit's own file.
"""
import hashlib
import http.client
import json
import math
import os
import platform
import sys
import time
import urllib.parse
import urllib.request

import torch
from tqdm import tqdm

FORMAT = 1  # raise it when a change of the code makes old checkpoints wrong


class Stopped(Exception):
    """Ctrl-C: the state is saved, the same command goes on from there."""


stop_asked = False           # set by Ctrl-C; looked at between two steps
stop_everywhere = None       # the same for the processes that train members, an Event


def ask_to_stop(*_):
    global stop_asked
    if stop_asked:
        raise KeyboardInterrupt
    stop_asked = True
    if stop_everywhere is not None:
        stop_everywhere.set()
    print("\nstopping after this step (once more: at once)", file=sys.stderr)


def should_stop():
    return stop_asked or stop_everywhere is not None and stop_everywhere.is_set()


def cannot_write(path, error, setting="--out_dir"):
    reason = isinstance(error, OSError) and error.strerror or "the write broke off, as on a full disk"
    return OSError(f"{path}: cannot be written ({reason}); free some space or name another folder with {setting}")


def open_folder(path):
    """Make a run's folder and see that it can be written to, before any work is done."""
    save_text(os.path.join(path, ".write_test"), "")
    os.remove(os.path.join(path, ".write_test"))
    for name in os.listdir(path):
        if name.endswith(".part"):  # of a process that was killed while it saved
            os.remove(os.path.join(path, name))


def save(path, write, setting="--out_dir"):
    """Call write(file) on a temporary file and rename it to path, so that nothing half-written ever has that name.

    Raises OSError, naming path and remedy, if the disk is full or the folder, which `setting` names, cannot be written.
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
    """The same without nan and infinity, which JSON does not have: they become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_json(path, value):
    save_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n")


def save_jsonl(path, records):
    """One object a line; records may be a generator."""
    save(path, lambda file: file.writelines(json.dumps(finite(r), ensure_ascii=False).encode() + b"\n" for r in records))


def save_tensors(path, state):
    """A checkpoint: tensors, numbers, texts, lists and dictionaries of them."""
    save(path, lambda file: torch.save(state, file))


def load_tensors(path, device="cpu"):
    """Raises OSError, naming file and remedy, if it is no checkpoint.  Never unpickles anything but tensors and plain data."""
    with open(path, "rb"):
        pass  # a file that is missing or may not be read says so itself
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a broken zip, a pickle with code in it: many types, one meaning
        raise OSError(f"{path}: not a readable checkpoint ({type(error).__name__}); delete it and run the same command again") from None


def resume(path, fingerprint, device):
    """The state of an unfinished unit, or None if there is none, or one of other settings."""
    state = load_tensors(path, device) if os.path.exists(path) else None
    return state if state is not None and state["fingerprint"] == fingerprint else None


def fetch(address):
    """https://… or https://…#sha256=… -> the file of this user's cache that holds it, downloaded if it is not there yet

    Raises OSError, in one line with a remedy, if it cannot be had or is not the file that the checksum means.
    """
    url, _, wanted = address.partition("#sha256=")
    by_hand = "fetch it by hand and give the name of your file instead"
    if not url.startswith("https://"):
        raise OSError(f"{url}: only https:// is fetched; {by_hand}")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(cache, "nanoreward", f"{digest(url)}-{os.path.basename(urllib.parse.urlsplit(url).path)}")
    if is_new := not os.path.exists(path):
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                size, content = int(answer.headers.get("Content-Length") or 0), bytearray()
                with tqdm(total=size or None, desc=url, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                    while piece := answer.read(2 ** 20):
                        content += piece
                        bar.update(len(piece))
            if size and len(content) != size:
                raise OSError(f"{len(content):,} of {size:,} bytes came")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise OSError(f"{url}: cannot be fetched ({getattr(error, 'reason', None) or error}); {by_hand}") from None
        found = hashlib.sha256(content).hexdigest()
    else:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if wanted and found != wanted.lower():
        raise OSError(f"{url}: its sha256 is {found}, not {wanted}: it has changed or is damaged; " + (by_hand if is_new else f"delete {path} to fetch it again"))
    if is_new:
        save(path, lambda file: file.write(content), "XDG_CACHE_HOME, a variable of the environment")
        print(f"data: {url} is now {path}" + ("" if wanted else f"; to make sure of the same file next time, add #sha256={found}"))
    return path


def append_line(path, record):
    """Add one line; a single write, so that processes that share a log do not mix their lines."""
    try:
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps(finite(record)) + "\n").encode())
    except OSError as error:
        raise cannot_write(path, error) from None


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "format": FORMAT}


def record_path(out_dir, unit):
    return os.path.join(out_dir, "stages", f"{unit}.json")


def read_record(out_dir, unit):
    """What is known of a finished unit, or None"""
    try:
        with open(record_path(out_dir, unit)) as file:
            record = json.load(file)
        return record if {"fingerprint", "depends"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def finish(out_dir, unit, depends, config, seconds, metrics):
    save_json(record_path(out_dir, unit), {
        "unit": unit, "fingerprint": digest(depends), "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 2), "metrics": metrics, "versions": versions(), "depends": depends, "config": config})


def why_again(record, depends, made):
    """Why a unit has to be made, as words; "" if it is up to date.  made: whether all its files are there"""
    if record is None:
        return "new"
    if record["fingerprint"] == digest(depends):
        return "" if made else "again: its file is gone"
    old = record["depends"]
    for key in {**old, **depends}:
        if old.get(key) != depends.get(key):
            if key.startswith("input "):
                return f"again: {key.removeprefix('input ')} is no longer the same"
            return f"again: {key} was {old.get(key)!r}, is {depends.get(key)!r}"
    return "again"
