"""What a name of data.train stands for: a file, an https:// address, a folder, a set of the hub."""
import fnmatch
import functools
import json
import os
import re
from typing import NamedTuple

from data import DataError
from runtime import downloads
from runtime.inputs import A_FOLDER, NO_FILE, why_no_file, why_unusable

MAX_NAME = 50  # characters of the name of a set, which is part of the names of files
MAX_STATE = 2 ** 24  # bytes of a JSON file that datasets.save_to_disk writes
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w-][\w./-]*)?")
KINDS = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".feather")
PACKED = ("", ".gz", ".xz", ".zst")
ENDINGS = tuple(kind + packed for kind in KINDS for packed in PACKED)
NO_DATA = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")


class File(NamedTuple):
    path: str    # on this machine
    label: str   # its name among several files, for messages; "" for one alone


def files_of(name: str) -> list[File]:
    """Files on this machine that a name stands for; downloads them if need be.

    Raises DataError; OSError if an address cannot be fetched.
    """
    name = str(name)
    if "://" in name:
        return [File(downloads.fetch(name), "")]
    if os.path.isdir(name) and not why_unusable(name):
        return files_of_folder(name)
    if is_hub_name(name):
        return files_of_hub(name)
    check_path(name)
    return [File(name, "")]


def is_there(name: str) -> bool:
    """Whether a name stands for something, as far as can be told without fetching it."""
    return "://" in name or is_hub_name(name) or os.path.isfile(name) or os.path.isdir(name)


def check_path(path):
    """Raise DataError unless path is a file whose name can stand in a message."""
    reason = why_unusable(str(path)) or why_no_file(path)
    if reason == NO_FILE:
        raise DataError(f"{path}: no such file; give a preference file, such as JSONL, or "
                        "OWNER/NAME of the Hugging Face hub")
    if reason == A_FOLDER:
        reason = "is a folder; name the files in it, separated by commas"
    if reason:
        raise DataError(f"{path}: {reason}")


# --------------------------------------------------------------------------------------------------
# A folder of datasets.save_to_disk


def files_of_folder(folder):
    """The Arrow files of a folder, in order.  Raises DataError for any other folder."""
    dictionary = os.path.join(folder, "dataset_dict.json")
    if os.path.exists(dictionary):
        splits = ascii(read_state(dictionary).get("splits"))[:200]
        raise DataError(f"{folder}: holds the splits {splits}; name the folder of one of them")
    path = os.path.join(folder, "state.json")
    if not os.path.exists(path):
        check_path(folder)
    state = read_state(path)
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: its rows have another order than its files; load it with "
                        "datasets, call flatten_indices() and save it again")
    try:
        names = [table["filename"] for table in state["_data_files"]]
        plain = all(os.path.basename(name) == name != "" for name in names)
    except (KeyError, TypeError):
        plain = False
    if not plain or not names:
        raise DataError(f"{path}: names no data files; save the folder again with datasets")
    files = [File(os.path.join(folder, name), name) for name in names]
    for file in files:
        check_path(file.path)
    return files


def read_state(path):
    """A JSON object that datasets wrote -> dictionary.  Raises DataError"""
    reason = why_no_file(path, MAX_STATE)
    if reason:
        raise DataError(f"{path}: {reason}")
    try:
        with open(path, "rb") as file:
            state = json.loads(file.read())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions"
                        ) from None
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise DataError(f"{path}: is no JSON object; save the folder again with datasets")
    return state


# --------------------------------------------------------------------------------------------------
# OWNER/NAME[:SPLIT] of the Hugging Face hub


def is_hub_name(name):
    """Whether a name that is no file here can be a set of the hub: it ends like no data file."""
    if os.path.lexists(name) or not HUB_NAME.fullmatch(name):
        return False
    return not name.partition(":")[0].endswith((*ENDINGS, ".gz", ".xz", ".zst", ".txt"))


def files_of_hub(name):
    """The data files of a split, or of a file's path in the set; the split is train unless given.

    Raises DataError, which names the remedy.
    """
    repository, _, split = name.partition(":")
    patterns = split_patterns(split or "train")
    folder = download(repository, patterns)
    files = []
    for parent, _, names in sorted(os.walk(folder)):
        for file in sorted(names):
            path = os.path.join(parent, file)
            label = os.path.relpath(path, folder)
            is_data = any(fnmatch.fnmatch(label, pattern) for pattern in patterns)
            if is_data and file not in NO_DATA:
                files.append(File(path, label))
    if not files:
        raise DataError(f"{name}: has no data files of that name; write {repository}:SPLIT or "
                        f"{repository}:PATH, as its page on the hub lists them")
    return files


def split_patterns(split):
    """Names of the files that a split is kept in, with * for any text.

    train.jsonl.gz, data/train-00000-of-00002.parquet, train/0000.parquet; the split itself where it
    is the path of a file
    """
    if split.endswith(ENDINGS):
        return (split,)
    patterns = []
    for ending in ENDINGS:
        for stem in (split, f"{split}-*", f"{split}/*"):
            patterns += [f"{stem}{ending}", f"*/{stem}{ending}"]
    return tuple(patterns)


@functools.cache
def download(repository, patterns):
    """Fetch the files of a set that match the patterns, if they are new -> folder of the set"""
    remedy = (
        f"on a machine with a network, `hf download {repository} --repo-type dataset --local-dir "
        "DIR` fetches it; then name its files"
    )
    try:
        return downloads.fetch_from_hub(
            repository, repo_type="dataset", allow_patterns=list(patterns),
            ignore_patterns=[f"*{name}" for name in NO_DATA],
        )
    except downloads.HubError as error:
        raise DataError(f"{repository}: no such file, and {error} {remedy}") from None


# --------------------------------------------------------------------------------------------------
# Names of files


def short_name(path):
    """Name of a file in tables: up to its first dot.

    The name of an address includes its folder, because the file is often called just "test".
    """
    folder, _, file = path.partition("#")[0].rstrip("/").rpartition("/")
    name = file.partition(".")[0].replace(":", "-")  # of a split of the hub
    if "://" in path:
        return f"{folder.rpartition('/')[2]}-{name}"
    return name


def unique_name(path, taken):
    """A name for the file in tables and results that is not empty and none of those taken"""
    name = short_name(path)[:MAX_NAME]
    if name and name not in taken:
        return name
    whole = re.sub(r"\W", "_", path)[-MAX_NAME:]
    name = whole
    number = 2
    while name in taken:
        name = f"{whole}_{number}"
        number += 1
    return name
