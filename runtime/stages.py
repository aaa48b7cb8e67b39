"""Which work of a run is up to date: records, fingerprints, and reasons in words.

Each piece of work has a name: tokenizer, audit, states, sft, member_00, strength, reward_flip,
meta_1, policy_flip, evaluate.  Its record, stages/NAME.json, holds what it was made from (settings,
inputs, contents of files), the resolved configuration, and size and sha256 of every output.  It is
removed before the first output is written and written after the last.
"""
import json
import os
import time
from typing import Any

from config import Config
from runtime import files

STAGES = ("sft", "ensemble", "strength", "reward", "meta", "ppo", "evaluate")
STAGE_BY_PREFIX = {
    "tokenizer": "sft",
    "audit": "sft",
    "states": "sft",
    "sft": "sft",
    "member": "ensemble",
    "views": "ensemble",
    "strength": "strength",
    "planted": "strength",
    "clean": "strength",
    "reward": "reward",
    "meta": "meta",
    "meta-adam": "meta",
    "plain": "meta",
    "ocrm": "meta",
    "policy": "ppo",
    "evaluate": "evaluate",
}


def stage_of(name: str) -> str:
    """The --stage that makes NAME; "" for what an experiment trains under a name of its own."""
    return STAGE_BY_PREFIX.get(name.partition("_")[0], "")


def setting_value(config: Config, key: str) -> Any:
    """The value of a dotted setting, as JSON has it (a tuple becomes a list)."""
    section, _, name = key.rpartition(".")
    value = getattr(getattr(config, section) if section else config, name)
    return list(value) if isinstance(value, tuple) else value


def record_path(out_dir: str, name: str) -> str:
    return os.path.join(out_dir, "stages", f"{name}.json")


def read_record(out_dir: str, name: str) -> dict | None:
    """The record of finished work -> dict; None where there is none or it is damaged

    Records of older versions have neither outputs nor a checksum.
    """
    if not os.path.isfile(record_path(out_dir, name)):  # a pipe would be waited for
        return None
    try:
        with open(record_path(out_dir, name), encoding="utf-8") as file:
            record = json.load(file)
        checksum = record.pop("checksum", None)
        is_whole = "fingerprint" in record and isinstance(record["depends"], dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if "outputs" in record or checksum is not None:
        is_its_own = record.get("unit") == name
        is_whole = is_whole and is_its_own and checksum == files.digest(record)
    return record if is_whole else None


def has_record(out_dir: str, name: str) -> bool:
    """Whether there is a file, whole or damaged."""
    return os.path.exists(record_path(out_dir, name))


def record_names(out_dir: str) -> list[str]:
    """Names of all work that has a record, the newest last"""
    folder = os.path.join(out_dir, "stages")
    if not os.path.isdir(folder):
        return []
    names = []
    for file in os.listdir(folder):
        if file.endswith(".json"):
            names.append((os.path.getmtime(os.path.join(folder, file)), file))
    return [file.removesuffix(".json") for _, file in sorted(names)]


def remove_record(out_dir: str, name: str):
    path = record_path(out_dir, name)
    if os.path.exists(path):
        os.remove(path)


def write_record(out_dir, name, depends, config, seconds, metrics, facts):
    """config: the resolved configuration as a dictionary; metrics: the last averages

    facts: {"outputs": {file: its size and sha256}, "tokenizer": sha256 of the file used}
    """
    record = {
        "unit": name,
        "fingerprint": files.digest(depends),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 2),
        "metrics": metrics,
        "versions": files.versions(),
        "depends": depends,
        "config": config,
        **facts,
    }
    record = files.finite(record)
    record["checksum"] = files.digest(record)
    files.save_json(record_path(out_dir, name), record)


def stale_reason(record: dict | None, depends: dict, defaults: dict) -> str:
    """Why work has to be done, in words; "" if it is up to date.

    record: of the finished work, or None; depends: what the work depends on now
    defaults: {setting: default}.  A setting that the work did not depend on when the record was
    written counts as the value in the record's "settings", or as its default if it is not there.
    """
    if record is None:
        return "new"
    old = record["depends"]
    settings = record.get("settings", {})
    for key in {**old, **depends}:
        was = old.get(key, settings.get(key, defaults.get(key)))
        now = depends.get(key, defaults.get(key))
        if was == now:
            continue
        if key.startswith("input "):
            return f"again: {key.removeprefix('input ')} is no longer the same"
        return f"again: {key} was {was!r}, is {now!r}"
    return ""
