"""Votes from elsewhere, in place of trained voters: strength.votes=FILE.

FILE has one record for each pair, JSON lines or any other container that train.py reads.  A record
has one of

    mean, std                                of the reward differences (std: 0 where it is missing)
    votes                                    list of M reward differences, chosen - rejected
    chosen score list, rejected score list   M scores of each answer, as in hh-rlhf-strength-cleaned

"mean preference difference" and "std preference difference" are understood as mean and std, and _
or a blank between the words.  A record belongs to the pair with the same chosen and rejected, or
the same two exchanged (and prompt, if it has one), as they are in the file of data.train or in
strength.jsonl; a file whose records have no such texts has one record for every pair of data.train,
in the same order.
"""
import json
import math

import torch

from data import DataError
from formats.records import read_records
from formats.values import json_type

NAMES = {
    "mean": ("mean", "mean preference difference"),
    "std": ("std", "std preference difference"),
    "votes": ("votes",),
    "chosen": ("chosen score list", "chosen scores"),
    "rejected": ("rejected score list", "rejected scores"),
}


def read_votes(run) -> dict:
    """-> {"train": (M, N), "valid": (M, Nv)} reward differences; without "valid" where the file has
    no votes on the validation pairs

    Raises DataError, one line that names file, line and remedy.
    """
    path = run.cfg.strength.votes
    lines = read_lines(path)
    find = by_texts(lines) if texts_of(lines[0][1]) else by_order(run, lines, path)
    out = {"train": stack([find(pair) for pair in run.train.pairs], run.train.pairs, path)}
    valid = [find(pair) for pair in run.valid.pairs]
    if valid and all(votes is not None for votes in valid):
        out["valid"] = stack(valid, run.valid.pairs, path)
    elif not valid:
        out["valid"] = torch.zeros(len(out["train"]), 0)
    return out


def read_lines(path):
    """-> [(place, record, its votes)].  Raises DataError"""
    lines = []
    for number, record in read_records(path):
        where = f"{path}:{number}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: a record must be an object, not {json_type(record)}")
        lines.append((where, record, votes_of(record, where)))
    if not lines:
        raise DataError(f"{path}: holds no votes; give a record for each pair")
    check_voters(lines)
    return lines


def votes_of(record, where):
    """A record's reward differences -> [M floats]; two, mean - std and mean + std, for a mean"""
    found = {}
    for key, value in record.items():
        for name, spellings in NAMES.items():
            if key.replace("_", " ") in spellings:
                found[name] = value
    if "votes" in found:
        return numbers(found["votes"], where, "votes")
    if "chosen" in found and "rejected" in found:
        chosen = numbers(found["chosen"], where, "chosen score list")
        rejected = numbers(found["rejected"], where, "rejected score list")
        if len(chosen) != len(rejected):
            raise DataError(f"{where}: {len(chosen)} scores of chosen and {len(rejected)} of "
                            "rejected; correct the line")
        return [a - b for a, b in zip(chosen, rejected)]
    if "mean" in found:
        mean, std = numbers([found["mean"], found.get("std", 0.0)], where, "mean and std")
        return [mean - std, mean + std]  # whose mean and population std are these
    raise DataError(f"{where}: has no votes; give mean (and std), votes, or chosen score list and "
                    "rejected score list")


def numbers(values, where, name):
    """A list of finite numbers -> [float]"""
    if not isinstance(values, list) or not values:
        raise DataError(f"{where}: {name} must be a list of numbers, not {json_type(values)}")
    for value in values:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise DataError(f"{where}: {name} holds {ascii(value)[:40]}; must be finite numbers")
    return [float(value) for value in values]


def check_voters(lines):
    """Raise DataError unless every record has equally many votes."""
    first = len(lines[0][2])
    for where, _, votes in lines:
        if len(votes) != first:
            raise DataError(f"{where}: {len(votes)} votes, {first} in the first record; every "
                            "record needs the same voters")


def texts_of(record):
    """(prompt or None, chosen, rejected) of a record that has them as texts, else None

    A prompt that is a list of messages is written as JSON.
    """
    prompt, chosen, rejected = (record.get(key) for key in ("prompt", "chosen", "rejected"))
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return None
    if prompt is not None and not isinstance(prompt, str):
        prompt = json.dumps(prompt, sort_keys=True)
    return prompt, chosen, rejected


def by_texts(lines):
    """-> function of a pair -> its votes in the direction of its label, or None"""
    votes_by_texts = {}
    for where, record, votes in lines:
        texts = texts_of(record)
        if texts is None:
            raise DataError(f"{where}: has no chosen and rejected, unlike the first record")
        prompt, chosen, rejected = texts
        directions = {(prompt, rejected, chosen): [-vote for vote in votes], texts: votes}
        for key, own in directions.items():
            if chosen != rejected and not are_close(votes_by_texts.get(key, own), own):
                raise DataError(f"{where}: other votes than an earlier record on the same answers; "
                                "keep one of the two")
        votes_by_texts |= directions

    def find(pair):
        own = texts_of(pair.record or {})  # as the file has them: a bare prompt, no leading blanks
        for texts in ((pair.prompt, pair.chosen, pair.rejected), own):
            if texts is None:
                continue
            prompt, chosen, rejected = texts
            for prompt_or_none in (prompt, None):
                votes = votes_by_texts.get((prompt_or_none, chosen, rejected))
                if votes is not None:
                    return votes
        return None

    return find


def are_close(a, b):
    """Whether two records of one pair agree, as those of strength.jsonl do up to rounding"""
    return all(math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-3) for x, y in zip(a, b))


def by_order(run, lines, path):
    """-> function of a pair -> the votes of the line with its number"""
    files = run.cfg.data.train
    num_pairs = len(run.pairs["train"]) + (0 if run.cfg.data.valid else len(run.pairs["valid"]))
    if len(files) != 1 or files == ("world",) and run.valid.pairs:
        raise DataError(f"{path}: its records have no chosen and rejected, by which they could be "
                        "found; add these texts, or give one file of pairs")
    if len(lines) != num_pairs and not run.cfg.data.limit:
        raise DataError(f"{path}: {len(lines)} records for {num_pairs} pairs; give one for each "
                        "pair, in the same order, or add the texts chosen and rejected")
    is_own = {pair.source.rpartition(":")[0] for pair in run.train.pairs}

    def find(pair):
        if pair.source.rpartition(":")[0] not in is_own or pair.index >= len(lines):
            return None
        return lines[pair.index][2]

    return find


def stack(votes, pairs, path):
    """[M votes of each pair] -> (M, N)"""
    for pair, own in zip(pairs, votes):
        if own is None:
            raise DataError(f"{pair.source}: {path} has no votes on this pair; add a record with "
                            "its chosen and rejected")
    return torch.tensor(votes, dtype=torch.float32).T.contiguous()
