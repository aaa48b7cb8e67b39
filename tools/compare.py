"""python -m tools.compare results/NAME.json

Prints the comparisons of an experiment's results: differences seed by seed, their 95 % intervals by
t, and p before and after Holm's correction for the number of comparisons in the file.  It reads the
numbers of each seed, and trains nothing.  More than one file can be named.
"""
import json
import sys

from config import ConfigError
from experiments.seeds import load_experiments
from experiments.statistics import compare_rows, comparison_table
from runtime.cli import run_cli
from runtime.inputs import escape_output, value_text


def read_results(path):
    """-> name of the experiment, [rows of each seed].  Raises ConfigError"""
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
        return results["experiment"], list(results["runs"].values())
    except OSError as error:
        raise ConfigError(f"{value_text(path)}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{value_text(path)}: is no file of results that python -m experiments "
                          "has written") from None


def compare_file(path):
    """The comparisons of one results file -> [as those of compare_rows]"""
    name, runs = read_results(path)
    entry = load_experiments().get(name)
    if entry is None or entry.comparisons is None:
        raise ConfigError(f"{value_text(path)}: experiment {value_text(name)} compares no rows")
    if len(runs) < 2:
        raise ConfigError(f"{value_text(path)}: has one seed, and a comparison needs two; add more "
                          "with --seeds=… --add")
    return compare_rows(runs, entry.comparisons)


def main(argv):
    escape_output()
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2

    def work():
        for path in argv:
            print(f"{path}\n{comparison_table(compare_file(path))}\n")

    return run_cli(work, trains=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
