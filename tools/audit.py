"""python -m tools.audit FILE.jsonl [FILE.jsonl.gz ...] [--data.format=NAME ...]
python -m tools.audit FOLDER --show=40

Prints an audit of preference files: lengths, repeated and contradicting pairs, how often the longer
answer is chosen; what every two of the files have in common; the layouts found in each file, and
what was done to read them.  A file is named, and the settings --data.format, --data.labels and
--data.min_score_diff are given, as for train.py.

With --show=N, FOLDER is that of a finished run, or its strength.jsonl: prints the N pairs of lowest
mean strength, and the places of all pairs that have both labels, after what trust.json says of how
far to trust them.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import json
import os
import sys
from collections import Counter

from config import ConfigError
from formats.pairs import read_pairs
from runtime.audit import audit, audit_table, shared
from runtime.cli import parse_args, run_cli
from runtime.findings import find_all
from runtime.stages import read_record
from runtime.vote_files import print_suspects_of_file
from tokenizer import train_tokenizer

VOCAB_SIZE = 4096
CONTEXTS = (256, 512, 1024, 2048)
VOTE_FILE = "strength.jsonl"
MAX_LINE = 2 ** 24  # bytes of a first line that are looked at


def audit_files(paths, settings):
    """Print the audit.  settings: the section [data]

    Raises DataError, or OSError if an address cannot be fetched.
    """
    sets = {}
    layouts = {}
    notes = []
    for name, path in zip(column_names(paths), paths):
        sets[name] = read_pairs(path, settings, notes.append)
        layouts[name] = Counter(pair.layout for pair in sets[name])
    tokenizer = train_tokenizer(texts_of(sets), VOCAB_SIZE)
    audits = {name: audit(pairs, tokenizer, CONTEXTS) for name, pairs in sets.items()}
    findings = []
    for name, pairs in sets.items():
        findings += find_all(name, pairs)
    print(audit_table(audits, shared(sets), findings))
    for name, counts in layouts.items():
        print(f"layout of {name}: " + ", ".join(f"{k} ({n:,})" for k, n in counts.items()))
    for note in notes:
        print(note)
    print(f"(tokens by a vocabulary of {VOCAB_SIZE:,} trained on these files)")


def show_suspects(paths, value):
    """Print the most suspect pairs of a finished run.  value: of --show, as text

    Raises ConfigError or DataError, one line.
    """
    if not value.isascii() or not value.isdigit() or len(value) > 9 or int(value) == 0:
        raise ConfigError(f"--show={ascii(value)[1:-1][:40]}: must be a number of pairs, from 1 "
                          "to 999999999, such as --show=40")
    if len(paths) != 1:
        raise ConfigError(f"--show: {len(paths)} runs are named; name one, such as "
                          "python -m tools.audit out/clean --show=40")
    path = paths[0]
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such run; name the folder of a finished run, or its "
                          "strength.jsonl")
    if os.path.isdir(path):
        path = os.path.join(path, VOTE_FILE)
        if not os.path.isfile(path):
            raise ConfigError(f"{path}: no such file; run train.py to the end of its stage "
                              "strength first, with this --out_dir")
    elif not is_vote_file(path):
        raise ConfigError(f"{path}: is no {VOTE_FILE} of a run, which --show needs; python "
                          f"train.py --config=configs/clean.toml --data.train={path} makes one, "
                          f"in out/clean")
    if os.path.basename(path) == VOTE_FILE:
        print_trust(os.path.dirname(path))
    print_suspects_of_file(path, int(value))


def print_trust(folder):
    """Print how far to trust the suspects of a run, where this is known of its present vote."""
    clean, vote = read_record(folder, "clean"), read_record(folder, "strength")
    if clean is None or vote is None:
        return
    try:
        with open(os.path.join(folder, "trust.json"), encoding="utf-8") as file:
            lines = [str(line) for line in json.load(file)["text"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        lines = None
    if lines is None or clean["depends"].get("input strength") != vote["fingerprint"]:
        lines = ["trust.json is not of this vote; run train.py with this --out_dir to the end"]
    for line in lines:
        print(f"clean: {line}")


def is_vote_file(path):
    """Whether a file has the name that a run gives it, or a first line as a run writes it."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return False
    if os.path.basename(path) == VOTE_FILE:
        return True
    with open(path, "rb") as file:
        first = file.readline(MAX_LINE)
    return all(f'"{key}": '.encode() in first for key in ("mean", "std", "group", "swap"))


def column_names(paths):
    """The names of the files, or their paths where two files have the same name."""
    names = [os.path.basename(path.rstrip("/")) for path in paths]
    return names if len(set(names)) == len(paths) else paths


def texts_of(sets):
    for pairs in sets.values():
        for pair in pairs:
            yield from (pair.prompt, pair.chosen, pair.rejected)


def main(argv):
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0

    def work():
        paths = [word for word in argv if not word.startswith("--")]
        options = [word for word in argv if word.startswith("--")]
        show = [word for word in options if word.partition("=")[0] == "--show"]
        config, _ = parse_args([word for word in options if word not in show])
        if show:
            show_suspects(paths, show[-1].partition("=")[2])
            return
        if not paths:
            raise ConfigError("no file is given; give one, such as python -m tools.audit my.jsonl")
        for path in paths:
            if os.path.isfile(os.path.join(path, VOTE_FILE)):
                raise ConfigError(f"{path}: is the folder of a run; add --show=40 for its suspects")
        audit_files(paths, config.data)

    return run_cli(work, trains=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
