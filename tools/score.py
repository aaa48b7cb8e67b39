"""python -m tools.score --run=DIR [--reward=NAME] [--init=DIR] FILE.jsonl

Scores the answers of a file with a reward model of a finished run.  Each line, a pair in any layout
that training reads or an answer (prompt, response), is written to FILE.scored.jsonl with new
columns: reward_chosen and reward_rejected, or reward.  A reward has no zero point; only differences
between answers to one prompt have a meaning.

By default the reward model is the one that the last policy of the run was trained with.  --init
names the folder of the pretrained model, if the run has frozen layers of it and it was moved.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import sys

from config import ConfigError
from runtime.cli import run_cli
from sample import parse_options, score_and_report

OPTIONS = {"run": "FOLDER", "reward": "NAME", "init": "DIR"}


def main(argv):
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0

    def work():
        paths = [word for word in argv if not word.startswith("--")]
        given = parse_options([word for word in argv if word.startswith("--")], OPTIONS)
        if len(paths) != 1:
            raise ConfigError(
                f"{len(paths)} files are given; give one, such as "
                "python -m tools.score --run=out/tiny my_pairs.jsonl"
            )
        score_and_report(given | {"score": paths[0]})

    return run_cli(work, trains=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
