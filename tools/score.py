"""python -m tools.score --run=DIR [--reward=NAME] [--init=DIR] FILE.jsonl
python -m tools.score --model=FOLDER [--template=chatml] FILE.jsonl

Scores the answers of a file with a reward model of a finished run.  Each line, a pair in any layout
that training reads, an answer (prompt, response) or a dialogue (messages), is written to
FILE.scored.jsonl with new columns: reward_chosen and reward_rejected, or reward.  A reward has no
zero point; only differences between answers to one prompt have a meaning.

By default the reward model is the one that the last policy of the run was trained with.  --init
names the folder of the pretrained model, if the run has frozen layers or adapters on it and it was
moved.
--model scores with the reward model of a Hugging Face folder, or OWNER/NAME of the hub, instead of
a run's.  Between the turns stand the markers that its chat template has; --template=hh, chatml or
llama3 says otherwise.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import sys

from config import Config, ConfigError, assign
from model import RewardModel
from runtime.cli import run_cli
from runtime.run import open_run
from sample import parse_options, score_and_report, score_file
from tokenizer import TEMPLATES

OPTIONS = {"run": "FOLDER", "reward": "NAME", "init": "DIR", "model": "FOLDER", "template": "NAME"}
LONGEST = 4096  # tokens of prompt and answer, where the model supports as many


def open_folder(given):
    """Open the reward model of the folder given["model"] -> Run, model.  Raises ConfigError"""
    from pretrained import hub, tokenizer, weights
    template = given.get("template", "")
    if template not in ("", "hh", *TEMPLATES):
        raise ConfigError(f"--template={template}: must be one of hh, {', '.join(TEMPLATES)}")
    folder = hub.directory(given["model"], "model")
    if not template:
        template = tokenizer.template_of(folder)
        if template != "hh":
            print(f"note: dialogues are scored with the markers of {template}, as the chat "
                  f"template of {given['model']} has them; --template=hh leaves them out")
    shape = weights.shape_of(folder, RewardModel)
    run = open_run(assign(Config(), "model.context", min(shape.context, LONGEST)))
    run.__dict__["tokenizer"] = tokenizer.load(folder, shape.vocab, template)
    return run, weights.load(folder, RewardModel, run.device)


def refuse(given, keys, owner):
    """Raise ConfigError for an option that would change nothing."""
    for key in keys:
        if key in given:
            raise ConfigError(f"--{key} is of {owner}; leave it out")


def score_with_folder(given):
    """Score given["score"] by the reward model of given["model"].  Raises ConfigError, DataError"""
    run, model = open_folder(given)
    out, count = score_file(run, model, given["score"])
    print(f"{out}: {count:,} lines, scored by {given['model']}")


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
        given["score"] = paths[0]
        if "run" in given and "model" in given:
            raise ConfigError("--run and --model are both given; give one of them")
        if "model" in given:
            refuse(given, ("reward", "init"), "--run=FOLDER")
            score_with_folder(given)
        else:
            refuse(given, ("template",), "--model=FOLDER")
            score_and_report(given)

    return run_cli(work, trains=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
