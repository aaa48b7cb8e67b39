"""python -m tools.audit FILE.jsonl [FILE.jsonl.gz ...] [--data.format=NAME ...]

Prints an audit of preference files: lengths, repeated and contradicting pairs, how often the longer
answer is chosen; what every two of the files have in common; the layouts found in each file, and
what was done to read them.  A file is named, and the settings --data.format, --data.labels and
--data.min_score_diff are given, as for train.py.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import os
import sys
from collections import Counter

from config import ConfigError
from formats.pairs import read_pairs
from runtime.audit import audit, audit_table, shared
from runtime.cli import parse_args, run_cli
from tokenizer import train_tokenizer

VOCAB_SIZE = 4096
CONTEXTS = (256, 512, 1024, 2048)


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
    print(audit_table(audits, shared(sets)))
    for name, counts in layouts.items():
        print(f"layout of {name}: " + ", ".join(f"{k} ({n:,})" for k, n in counts.items()))
    for note in notes:
        print(note)
    print(f"(tokens by a vocabulary of {VOCAB_SIZE:,} trained on these files)")


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
        config, _ = parse_args([word for word in argv if word.startswith("--")])
        if not paths:
            raise ConfigError("no file is given; give one, such as python -m tools.audit my.jsonl")
        audit_files(paths, config.data)

    return run_cli(work, trains=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
