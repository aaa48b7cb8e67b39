"""python sample.py --run=out/tiny [--policy=NAME] [--reward=NAME] [--init=DIR] [--score=FILE.jsonl]

Answers prompts, typed or piped in, one a line, with a policy of a finished run, and prints the
reward of each answer by a reward model of the run.  A line becomes the prompt
"\\n\\nHuman: LINE\\n\\nAssistant:", unless it contains "\\n\\nHuman:" itself (\\n written as two
characters).  Sampling is that of the evaluation: evaluate.temperature, evaluate.top_p,
evaluate.repetition_penalty, ppo.max_new_tokens.

--policy=sft is the model before PPO.  By default the policy is that of the last of ppo.methods,
and the reward model the one it was trained with, or else the newest.  All settings are those
recorded with the run.  --init names the folder of the pretrained model, if the run has frozen
layers or adapters on it and it was moved.

--score reads no prompts: it scores the answers of a file, as python -m tools.score does.  Each
line, a pair in any layout that training reads or an answer (prompt, response), is written to
FILE.scored.jsonl with new columns: reward_chosen and reward_rejected, or reward.  A reward has no
zero point; only differences between answers to one prompt have a meaning.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import os
import sys
from collections import Counter

import numpy as np
import torch

import config
import data
from common import load_model, make_sampling, score_rows, strip_eos
from config import ConfigError
from data import ASSISTANT_MARKER, HUMAN_MARKER, DataError, Row
from formats.adapter import Reading
from formats.dialogue import answer_text, as_dialogue, read_turns, render
from formats.pairs import parse_record
from formats.records import read_records
from formats.values import check_copyable, check_strings
from generate import generate
from model import LanguageModel, RewardModel
from runtime import files
from runtime.cli import run_cli
from runtime.findings import joined_answers
from runtime.inputs import value_text, why_no_file
from runtime.run import open_run
from runtime.stages import read_record, record_path

OPTIONS = {
    "run": "FOLDER", "policy": "NAME", "reward": "NAME", "score": "FILE.jsonl", "init": "DIR",
}
NO_LIMIT = 2 ** 40
OTHER_PLACE = "put a copy of the file that is scored into another folder"

# --------------------------------------------------------------------------------------------------
# The run


def open_finished_run(
    folder, policy="", reward="", init="", scoring=False, reward_option="reward"
):
    """Open a run as it was configured when the policy (scoring: the reward model) was trained.

    policy, reward: names of models, "" for the default; reward_option: that gave the latter
    -> Run, name of the policy, name of the reward model.  Raises ConfigError.
    """
    records = finished_stages(folder)
    saved = [name for name in records if os.path.exists(os.path.join(folder, f"{name}.pt"))]
    policies = [name for name in saved if is_policy(name)]
    reward_models = []
    for name in saved:  # planted_…: trained on labels that the self-test has flipped
        if name not in policies and not name.startswith("planted_"):
            reward_models.append(name)
    if not scoring:
        check_name(folder, "policy", policy, policies)
    check_name(folder, "reward", reward, reward_models, reward_option)

    *_, newest = records
    methods = config_of(folder, records, newest).ppo.methods
    policy = policy or default_policy([name for name in records if is_policy(name)], methods)
    made = [name for name in records if not is_policy(name)]
    reward = reward or default_reward(reward_models, policy, made)
    for name in [reward] if scoring else [policy, reward]:
        check_tokenizer(folder, records, name)
    cfg = config_of(folder, records, reward if scoring else policy)
    models = [reward] if scoring else [policy, reward]
    for file in ("encoding.json", *[f"{name}.pt" for name in models]):
        path = os.path.join(folder, file)
        reason = why_no_file(path)
        if reason:
            raise ConfigError(f"{path}: {reason.partition(';')[0]}; delete it if it is there, and "
                              "run the training command again")
    cfg = config.assign(cfg, "out_dir", folder)  # the folder may have been moved
    cfg = config.assign(cfg, "device", "auto")
    if cfg.dtype == "fp16" and not torch.cuda.is_available():
        cfg = config.assign(cfg, "dtype", "float32")  # no CPU computes in it
    if init and cfg.model.init == "scratch":
        raise ConfigError(f"--init={init}: the run has no pretrained model below it; leave it out")
    if init:
        cfg = config.assign(cfg, "model.init", init)
    elif cfg.model.train_layers >= 0 or cfg.model.lora_rank:
        check_base(folder, cfg.model.init)
    return open_run(cfg), policy, reward


def check_base(folder, init):
    """Raise ConfigError unless the pretrained model that a run's models stand on is there."""
    from pretrained import hub
    try:
        hub.directory(init)
    except ConfigError as error:
        reason = str(error).partition(";")[0]
        raise ConfigError(f"--run={folder}: its models stand on a pretrained one ({reason}); name "
                          "its folder with --init=DIR") from None


def is_policy(name):
    return name == "sft" or name.startswith("policy_")


def finished_stages(folder):
    """Records of the finished stages of a run, the newest last -> {name: record}"""
    stages = os.path.join(folder, "stages")
    if not os.path.isdir(stages):
        raise ConfigError(
            f"--run={folder}: is not the folder of a run (it has no stages/); make one with "
            "python train.py --config=configs/tiny.toml"
        )

    def modified(file):
        return os.path.getmtime(os.path.join(stages, file))

    records = {}
    found = [file for file in os.listdir(stages) if os.path.isfile(os.path.join(stages, file))]
    for file in sorted(found, key=modified):
        name = file.removesuffix(".json")
        record = read_record(folder, name)
        if record:
            records[name] = record
    return records


def config_of(folder, records, name):
    """The configuration that a piece of work was made with.  Raises ConfigError"""
    table = records[name].get("config")
    try:
        if not isinstance(table, dict):
            raise ConfigError("it has no configuration")
        return config.from_dict(table)
    except ConfigError as error:
        raise ConfigError(f"{record_path(folder, name)}: {error}; delete it and run the training "
                          "command again") from None


def check_tokenizer(folder, records, name):
    """Raise ConfigError if the tokenizer of the folder is another than the model was trained with.

    Its token ids would mean something else to the model.  Records of older versions do not say.
    """
    expected = records[name].get("tokenizer")
    path = os.path.join(folder, "encoding.json")
    if expected and os.path.isfile(path) and files.output_facts(path)["sha256"] != expected:
        raise ConfigError(f"--run={folder}: {name} was trained with another tokenizer than "
                          "encoding.json is now; run the training command again")


def check_name(folder, kind, name, names, option=None):
    """Raise ConfigError unless the run has models of this kind, the named one among them."""
    if name and name not in names:
        existing = ", ".join(names) or "none of this kind"
        raise ConfigError(
            f"--{option or kind}={name}: {folder} has no such model; it has {existing}"
        )
    if not names:
        raise ConfigError(
            f"--run={folder}: has no {kind} model that is finished; run the training command again"
        )


def default_policy(policies, methods):
    """The policy of the last treatment that has one, else the SFT model."""
    candidates = ["sft"] + [f"policy_{method}" for method in methods]
    existing = [name for name in candidates if name in policies]
    return (existing or policies or [""])[-1]


def default_reward(reward_models, policy, made):
    """The reward model that the policy was trained with, also if its file is gone; where there was
    none, the newest.  made: what the run has made beside policies
    """
    method = policy.removeprefix("policy_")
    for name in (f"reward_{method}", method):  # a round of MetaRM: policy_meta_1 and meta_1
        if name in made:
            return name
    return reward_models[-1]


# --------------------------------------------------------------------------------------------------
# Answers


def wrap_prompt(line):
    """A line of input -> the prompt in HH's form."""
    if "\\n\\nHuman:" in line:
        line = line.replace("\\n", "\n")
    if HUMAN_MARKER in line:
        return line
    return f"\n\nHuman: {line.strip()}\n\nAssistant:"


def answer_prompt(run, policy, reward_model, prompt, seed):
    """Sample one answer -> its text, its reward, whether it ended with EOS."""
    sampling = make_sampling(run, run.cfg.evaluate)
    max_len = run.cfg.model.context - sampling.max_new_tokens - 1
    prompt_ids = data.encode_prompt(run.tokenizer, prompt, max_len)
    generator = torch.Generator().manual_seed(seed)
    with run.autocast():
        generation = generate(policy, [prompt_ids], sampling, generator)
    answer_ids, = strip_eos(generation.tokens, sampling)
    # the reward is computed at EOS, also where the answer was cut at max_new_tokens
    row = Row(np.array(prompt_ids), (np.array([*answer_ids, sampling.eos_id]),))
    reward = score_rows(run, reward_model, [row])
    return run.tokenizer.decode(answer_ids), float(reward), bool(generation.ended)


def converse(run, policy, reward, lines, show=print):
    """Answer one prompt a line.

    policy, reward: names of the models; lines: bytes, blank lines are skipped.  Raises DataError.
    """
    policy_model = load_model(run, LanguageModel, policy)
    reward_model = load_model(run, RewardModel, reward)
    seed = run.cfg.seed
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"line {number} of the input: not UTF-8 (byte {error.start + 1})"
            ) from None
        if not text.strip():
            continue
        prompt = wrap_prompt(text)
        answer, value, ended = answer_prompt(run, policy_model, reward_model, prompt, seed)
        cut = "" if ended else " …"
        show(f"{answer.strip()}{cut}\n[{reward} {value:+.3f}]\n", flush=True)
        seed += 1


# --------------------------------------------------------------------------------------------------
# Scores


def score_file(run, model, path):
    """Score the answers of a file with a reward model.

    -> FILE.scored.jsonl, number of lines.  Raises DataError; nothing is overwritten.
    """
    if "://" in path:
        raise DataError(f"{path}: the scores are written beside the file, which an address has no "
                        "place for; fetch it by hand and give the name of your file instead")
    out = path.removesuffix(".gz").removesuffix(".jsonl") + ".scored.jsonl"
    if os.path.exists(out):
        raise DataError(f"{out}: exists already; move it away, nothing is overwritten")
    files.check_writable(out, OTHER_PLACE)
    records = []
    rows = []
    targets = []  # record and column of each row's reward
    texts = []    # prompt and answer of each row
    num_cut = 0   # dialogues that lost their beginning
    for number, record in read_records(path):
        where = f"{path}:{number}"
        prompt, responses = texts_to_score(record, where)
        check_copyable(record, where)
        for column, response in responses.items():
            rows.append(encode_answer(run, prompt, response, where))
            if len(rows[-1]) == run.cfg.model.context:
                whole = data.encode_prompt(run.tokenizer, prompt, NO_LIMIT)
                num_cut += len(rows[-1].prompt) < len(whole)
            targets.append((len(records), column))
            texts.append((prompt, response))
        records.append(dict(record))
    for line in joined_answers(texts, run.tokenizer):
        print(f"note: {path}: {line}")
    if num_cut:
        print(f"note: {path}: {num_cut:,} of {len(rows):,} prompts and answers are longer than "
              f"{run.cfg.model.context:,} tokens; their ends are scored")
    rewards = score_rows(run, model, rows, "scores")[:, 0]  # (answers,)
    for (index, column), value in zip(targets, rewards.tolist()):
        records[index][column] = value
    files.save_jsonl(out, records, OTHER_PLACE)
    return out, len(records)


def texts_to_score(record, where):
    """One line of a file -> prompt, {new column: response}.  Raises DataError."""
    if isinstance(record, dict) and "messages" in record and "chosen" not in record:
        prompt, answer = last_answer(record["messages"], where)
        responses = {"reward": answer}
    elif isinstance(record, dict) and "response" in record:
        if "chosen" in record:
            raise DataError(f"{where}: has a response and a pair, and one of them is scored; keep "
                            "one of them")
        needed = ("response", "prompt")
        check_strings(record, where, needed, "; a response is scored as an answer to it")
        prompt, answers = as_dialogue(record["prompt"], [record["response"]], Counter())
        responses = {"reward": answers[0]}
    else:
        remedy = "a line needs prompt and response, messages, or chosen and rejected"
        pairs = parse_record(record, where, Reading(), remedy=remedy)
        if len(pairs) != 1:
            raise DataError(f"{where}: makes {len(pairs)} pairs, and a line has one pair or one "
                            "answer to score; remove it, or write its answers in lines of their "
                            "own")
        prompt = pairs[0].prompt
        responses = {"reward_chosen": pairs[0].chosen, "reward_rejected": pairs[0].rejected}
    for column in responses:
        if column in record:
            raise DataError(
                f"{where}: has a column {column!r} already; rename it, nothing is overwritten"
            )
    return prompt, responses


def last_answer(messages, where):
    """A dialogue as a list of messages -> prompt, its last turn.  Raises DataError"""
    turns = read_turns(messages, "messages", where)
    if not turns or turns[-1][0] != "Assistant":
        raise DataError(f"{where}: the last of 'messages' must be the assistant's, which is "
                        "scored; add it or remove the line")
    return render(turns[:-1]) + ASSISTANT_MARKER, answer_text(turns[-1:])


def encode_answer(run, prompt, response, where):
    try:
        return data.encode_row(run.tokenizer, prompt, (response,), run.cfg.model.context)
    except DataError as error:  # the context of a finished model cannot be raised
        reason = str(error).partition(";")[0]
        raise DataError(f"{where}: {reason}; shorten the response or remove the line") from None


# --------------------------------------------------------------------------------------------------
# The command


def parse_options(argv, options):
    """["--key=value", …] -> {key: value}.  options: {key: what stands for the value in messages}

    Raises ConfigError for any other word.
    """
    given = {}
    for word in argv:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals or not value or key not in options:
            *others, last = [f"--{name}={example}" for name, example in options.items()]
            raise ConfigError(f"{value_text(word)}: must be {', '.join(others)} or {last}")
        given[key] = value
    if "run" not in given and "model" not in given:
        raise ConfigError("--run=FOLDER is missing: the folder of a finished run, such as out/tiny")
    return given


def score_and_report(given):
    """given: parsed options with "run" and "score" among them."""
    run, _, reward = open_finished_run(
        given["run"], given.get("policy", ""), given.get("reward", ""), given.get("init", ""),
        scoring=True,
    )
    model = load_model(run, RewardModel, reward)
    out, count = score_file(run, model, given["score"])
    print(f"{out}: {count:,} lines, scored by {reward}")


def main(argv):
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0

    def work():
        given = parse_options(argv, OPTIONS)
        if "score" in given:
            score_and_report(given)
            return
        run, policy, reward = open_finished_run(
            given["run"], given.get("policy", ""), given.get("reward", ""), given.get("init", "")
        )
        if sys.stdin.isatty():
            print(
                f"{policy} answers, {reward} scores; one prompt a line, Ctrl-D ends",
                file=sys.stderr,
            )
        converse(run, policy, reward, sys.stdin.buffer)

    return run_cli(work, trains=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
