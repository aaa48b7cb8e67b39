"""python sample.py --run=out/tiny [--policy=policy_flip] [--reward=reward_flip] [--score=FILE.jsonl] [--init=DIR]

Answers prompts, typed or piped in, one a line, with a policy of a finished run, and shows what a reward model of the run
thinks of each answer.  A line is wrapped as "\\n\\nHuman: LINE\\n\\nAssistant:", unless it has "\\n\\nHuman:" already (with \\n
written as two characters).  Answers are drawn as evaluation draws them: evaluate.temperature, evaluate.top_p, ppo.max_new.

With --score, no prompts are read: every line of the file, a pair (prompt, chosen, rejected; or whole dialogues) or an answer
(prompt, response), is written to FILE.scored.jsonl with what the reward model thinks: reward, or reward_chosen and
reward_rejected.  A reward has no zero; only differences between answers to one prompt mean something.

Everything else is the run's own recorded configuration.  --policy=sft is the model before PPO.  Unless they are named, the
policy is that of the last of ppo.methods, and the reward model the one it was trained on, or the newest.  --init names the pretrained
model that a run with frozen layers stands on, if it is no longer where it was.
"""
import os
import sys

import numpy as np
import torch

import config as configuration
import data
import files
from config import ConfigError, assign
from data import DataError, Row
from model import LanguageModel, RewardModel, sample
from run import load_model, open_run, rewards_of


def open_finished(folder, policy="", reward="", scoring=False, init=""):
    """-> Run, as it was configured when the policy (scoring: the reward model) was made; names of policy and reward model"""
    stages = os.path.join(folder, "stages")
    if not os.path.isdir(stages):
        raise ConfigError(f"--run={folder}: is no run's folder (it has no stages/); make one with python train.py --config=configs/tiny.toml")
    newest = sorted(os.listdir(stages), key=lambda f: os.path.getmtime(os.path.join(stages, f)))
    records = {f.removesuffix(".json"): r for f in newest if (r := files.read_record(folder, f.removesuffix(".json")))}
    made = [u for u in records if os.path.exists(os.path.join(folder, f"{u}.pt"))]
    models = {"policy": [u for u in made if u.startswith("policy_") or u == "sft"]}
    models["reward"] = [u for u in made if u not in models["policy"]]
    for kind, name in (("policy", policy), ("reward", reward)):
        if name and name not in models[kind]:
            raise ConfigError(f"--{kind}={name}: {folder} has no such model; it has {', '.join(models[kind]) or 'none of this kind'}")
        if not models[kind]:
            raise ConfigError(f"--run={folder}: has no {kind} model that is finished; run the training command again")
    methods = list(records.values())[-1]["config"]["ppo"]["methods"]
    policy = policy or [u for u in ["sft", *(f"policy_{m}" for m in methods)] if u in models["policy"]][-1]
    method = policy.removeprefix("policy_")
    reward = reward or [u for u in [*models["reward"], method, f"reward_{method}"] if u in models["reward"]][-1]
    config = configuration.from_dict(records[reward if scoring else policy]["config"])
    for key, value in (("out_dir", folder), ("device", "auto"), ("model.init", init or config.model.init)):
        config = assign(config, key, value)
    return open_run(config), policy, reward


def in_form(line):
    """What was typed -> the prompt, in HH's form"""
    text = line.replace("\\n", "\n") if "\\n\\nHuman:" in line else line
    return text if "\n\nHuman:" in text else f"\n\nHuman: {text.strip()}\n\nAssistant:"


def answer(run, policy, reward_model, prompt, seed):
    """-> the policy's answer to a prompt, its reward, and whether it ended by itself"""
    c, end = run.config, data.end_id(run.encoding)
    tokens = data.encode_prompt(run.encoding, prompt, c.model.context - c.ppo.max_new - 1)
    with run.autocast():
        drawn = sample(policy, [tokens], c.ppo.max_new, end, torch.Generator().manual_seed(seed), c.evaluate.temperature,
                       top_p=c.evaluate.top_p, min_new=c.ppo.min_new)
    reply = [t for t in drawn.tokens[0].tolist() if t >= 0 and t != end]
    reward = rewards_of(run, reward_model, [Row(np.array(tokens), (np.array([*reply, end]),))])
    return run.encoding.decode(reply), float(reward), bool(drawn.ended)


def converse(run, policy, reward, lines, show=print):
    """lines: bytes, one prompt each; blank ones are left out"""
    policy, reward_model, asked = load_model(run, LanguageModel, policy), load_model(run, RewardModel, reward), 0
    for number, line in enumerate(lines, 1):
        try:
            line = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"line {number} of the input: not UTF-8 (byte {error.start + 1})") from None
        if line.strip():
            text, value, ended = answer(run, policy, reward_model, in_form(line), run.config.seed + asked)
            show(f"{text.strip()}{'' if ended else ' …'}\n[{reward} {value:+.3f}]\n", flush=True)
            asked += 1


def score(run, reward, path):
    """Write FILE.scored.jsonl -> its name, how many lines"""
    stem = path.removesuffix(".gz")
    out = stem.removesuffix(".jsonl") + ".scored.jsonl"
    if os.path.exists(out):
        raise DataError(f"{out}: is there already; move it away, nothing is written over")
    records, rows, where = [], [], []
    for number, record in data.read_jsonl(path):
        place, pair = f"{path}:{number}", isinstance(record, dict) and "response" not in record
        names = ("chosen", "rejected") if pair else ("response",)
        data.check_texts(record, place, names, "; a line needs prompt and response, or chosen and rejected")
        columns = [f"reward_{n}" for n in names] if pair else ["reward"]
        if taken := [c for c in columns if c in record]:
            raise DataError(f"{place}: has a column {taken[0]!r} already; rename it, nothing is written over")
        prompt, answers = record.get("prompt"), [record[n] for n in names]
        if prompt is None:
            if not pair:
                raise DataError(f"{place}: key 'prompt' is missing; a response is scored as an answer to it")
            prompt, *answers = data.split_dialogues(*answers)
        try:
            rows += [data.encode(run.encoding, prompt, (a,), run.config.model.context) for a in answers]
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        where += [(len(records), column) for column in columns]
        records.append(dict(record))
    for (index, column), value in zip(where, rewards_of(run, load_model(run, RewardModel, reward), rows, "scores")[:, 0].tolist()):
        records[index][column] = value
    files.save_jsonl(out, records)
    return out, len(records)


def main(argv):
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    given = {}
    try:
        for word in argv:
            key, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or not equals or not value or key not in ("run", "policy", "reward", "score", "init"):
                raise ConfigError(f"{word!r}: must be --run=FOLDER, --policy=NAME, --reward=NAME, --score=FILE.jsonl or --init=DIR")
            given[key] = value
        if "run" not in given:
            raise ConfigError("--run=FOLDER is missing: the folder of a finished run, such as out/tiny")
        run, policy, reward = open_finished(given["run"], given.get("policy", ""), given.get("reward", ""), "score" in given, given.get("init", ""))
        if "score" in given:
            out, n = score(run, reward, given["score"])
            print(f"{out}: {n:,} lines, scored by {reward}")
            return 0
        if sys.stdin.isatty():
            print(f"{policy} answers, {reward} scores; a prompt a line, Ctrl-D ends", file=sys.stderr)
        converse(run, policy, reward, sys.stdin.buffer)
        return 0
    except (ConfigError, DataError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # who reads our output has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
