"""python -m tools.audit FILE.jsonl [FILE.jsonl.gz ...]

Prints an audit of preference files: lengths, repeated and contradicting pairs, how often the longer
answer is chosen; what every two of the files have in common; the layouts found in each file.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import os
import sys
from collections import Counter

from formats.pairs import read_with_layout
from runtime.audit import audit, audit_table, shared
from runtime.cli import run_cli
from tokenizer import train_tokenizer

VOCAB_SIZE = 4096
CONTEXTS = (256, 512, 1024, 2048)


def audit_files(paths):
    """Print the audit.  Raises DataError, or OSError if an address cannot be fetched."""
    sets = {}
    layouts = {}
    for name, path in zip(column_names(paths), paths):
        records = list(read_with_layout(path))
        sets[name] = [pair for _, pair in records]
        layouts[name] = Counter(layout for layout, _ in records)
    tokenizer = train_tokenizer(texts_of(sets), VOCAB_SIZE)
    audits = {name: audit(pairs, tokenizer, CONTEXTS) for name, pairs in sets.items()}
    print(audit_table(audits, shared(sets)))
    for name, counts in layouts.items():
        print(f"layout of {name}: " + ", ".join(f"{k} ({n:,})" for k, n in counts.items()))
    print(f"(tokens by a vocabulary of {VOCAB_SIZE:,} trained on these files)")


def column_names(paths):
    """The names of the files, or their paths where two files have the same name."""
    names = [os.path.basename(path) for path in paths]
    return names if len(set(names)) == len(paths) else paths


def texts_of(sets):
    for pairs in sets.values():
        for pair in pairs:
            yield from (pair.prompt, pair.chosen, pair.rejected)


def main(argv):
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    return run_cli(lambda: audit_files(argv), trains=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
