"""python -m tools.rewardbench FILE --run=DIR [--model=NAME] [--init=DIR]
python -m tools.rewardbench FILE --model=FOLDER [--template=chatml]

Scores a reward model on RewardBench, RewardBench 2, RM-Bench or JudgeBench, which the keys of the
file tell apart, or on pairs in any layout that training reads.  Each file that is named gets a
table: the scores by the benchmark's own definition, 95 % intervals, what preferring the longer
answer scores, and chance.

The reward model is NAME of a finished run, by default that of its last policy, or that of a Hugging
Face folder or OWNER/NAME of the hub; --init and --template are those of tools.score.
--out=FILE.json writes the tables and --scores=FILE.jsonl the rewards of all answers, both when all
is scored; neither overwrites a file.

No example is left out.  A dialogue that is too long for the model loses its beginning, and an
answer that is too long alone its own: public runners cut texts at the left as well.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import os
import sys

import numpy as np

from common import SCORE_BATCH, load_model, score_rows
from config import ConfigError
from data import DataError, Row, encode_prompt, encode_row
from formats.adapter import Reading, is_text_list
from formats.dialogue import as_dialogue
from formats.pairs import read_pairs
from formats.records import read_records
from formats.several_answers import read_lists
from formats.values import check_text, check_texts
from model import RewardModel
from ppo import rows_by_prompt, share_prompts
from runtime import files
from runtime.cli import run_cli
from runtime.report import table
from sample import NO_LIMIT, open_finished_run, parse_options
from tools.benchmark_scores import (
    JUDGEBENCH,
    OWN_NAMES,
    PAIRS,
    REWARDBENCH,
    REWARDBENCH_2,
    RM_BENCH,
    SECTIONS,
    Example,
    is_ties,
    score_table,
)
from tools.score import open_folder, refuse

OPTIONS = {
    "run": "FOLDER", "model": "NAME", "init": "DIR", "template": "NAME", "out": "FILE.json",
    "scores": "FILE.jsonl",
}
REMEDIES = {key: f"name another file with --{key}" for key in ("out", "scores")}
JUDGEBENCH_KEYS = ("question", "response_A", "response_B", "label")
NO_SUBSET = "no subset"
MAX_SUBSETS = 100  # of a file of pairs; more are no subsets
CELLS = 2 ** 25    # rows of a pass times the square of its longest row, as an attention mask has


# --------------------------------------------------------------------------------------------------
# Reading


def read_examples(path):
    """-> name of the benchmark, [Example].  Raises DataError; OSError if it cannot be fetched"""
    records = list(read_records(path))
    benchmark = recognize(records[0][1])
    for number, record in records:
        if recognize(record) != benchmark:
            raise DataError(f"{path}:{number}: has the keys of {recognize(record)}, and the first "
                            f"record those of {benchmark}; put it into a file of its own")
    if benchmark == PAIRS:
        return examples_of_pairs(read_pairs(path))
    examples = []
    ids = set()
    for number, record in records:
        where = f"{path}:{number}"
        read = pair_example if benchmark == JUDGEBENCH else lists_example
        example = read(record, where, benchmark)
        if benchmark == REWARDBENCH_2 and is_ties(example):
            check_id(example, ids)
        examples.append(example)
    return benchmark, examples


def recognize(record):
    """Name of the benchmark that has the keys of a record; pairs for all without keys of its own"""
    if not isinstance(record, dict):
        return PAIRS
    if all(key in record for key in JUDGEBENCH_KEYS):
        return JUDGEBENCH
    sides = [record.get(key) for key in ("chosen", "rejected")]
    if record.get("prompt") is None or not all(map(is_text_list, sides)):
        return PAIRS
    is_of_ties = str(record.get("subset")).lower() == "ties"
    is_matrix = [len(side) for side in sides] == [3, 3]
    is_of_domain = "domain" in record and "subset" not in record
    return RM_BENCH if (is_matrix or is_of_domain) and not is_of_ties else REWARDBENCH_2


def name_of(record, key, where):
    """A subset's or an id's text, in one line.  "" where there is none; raises DataError"""
    text = str(record.get(key) or "")
    check_text(text, key, where)
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())


def subset_of(record, key, where):
    """-> a name that no row of a table has for something else"""
    name = name_of(record, key, where) or NO_SUBSET
    if name.lower() == "ties":
        return "Ties"
    return f"{name} (subset)" if name in OWN_NAMES else name


def examples_of_pairs(pairs):
    """-> name of the benchmark, RewardBench if a subset has a name of its; [Example]"""
    examples = []
    for pair in pairs:
        key = "subset" if pair.record.get("subset") else "source"
        subset = subset_of(pair.record, key, pair.source)
        pair_id = name_of(pair.record, "id", pair.source)
        answers = [pair.chosen, pair.rejected]
        examples.append(Example(pair.source, pair_id, subset, pair.prompt, answers))
    subsets = {example.subset for example in examples}
    if any(not subsets.isdisjoint(section) for section in SECTIONS.values()):
        return REWARDBENCH, examples
    if len(subsets) > MAX_SUBSETS:
        examples = [example._replace(subset=NO_SUBSET) for example in examples]
    return PAIRS, examples


def pair_example(record, where, benchmark):
    """A record of JudgeBench -> Example"""
    check_texts(record, JUDGEBENCH_KEYS, where)
    label = record["label"]
    if label not in ("A>B", "B>A"):
        raise DataError(f"{where}: 'label' must be A>B or B>A, not {ascii(label)[:40]}; "
                        "correct the line")
    answers = [record["response_A"], record["response_B"]]
    prompt, answers = as_dialogue(record["question"], answers, Reading().notes)
    tie = 0.0
    if label == "B>A":
        answers.reverse()
        tie = 1.0  # the public code takes equal rewards for B>A
    source = subset_of(record, "source", where)
    return Example(where, name_of(record, "pair_id", where), source, prompt, answers, tie=tie)


def lists_example(record, where, benchmark):
    """A record of RewardBench 2 or RM-Bench -> Example"""
    prompt, chosen, rejected = read_lists(record, where, Reading())
    key = "domain" if benchmark == RM_BENCH else "subset"
    subset = subset_of(record, key, where)
    if benchmark == RM_BENCH:
        subset = subset.partition("-")[0]  # safety-refuse and safety-response are one domain
        needed = "three chosen and three rejected answers"
        is_sound = len(chosen) == len(rejected) == 3
    else:
        needed = "one chosen answer, unless its subset is Ties"
        is_sound = len(chosen) == 1 or subset == "Ties"
    if not is_sound:
        raise DataError(f"{where}: a record of {benchmark} has {needed}, not {len(chosen)} and "
                        f"{len(rejected)}; correct the line")
    record_id = name_of(record, "id", where)
    return Example(where, record_id, subset, prompt, chosen + rejected, len(chosen))


def check_id(example, ids):
    """Raise DataError unless the id is ref:N or tied:N and none of ids, to which it is added."""
    kind, _, number = example.id.partition(":")
    if kind not in ("ref", "tied") or not number or ":" in number or example.id in ids:
        raise DataError(f"{example.where}: 'id' in the subset Ties must be ref:N or tied:N, each "
                        f"there once, not {ascii(example.id)[:40]}; correct the line")
    ids.add(example.id)


# --------------------------------------------------------------------------------------------------
# Rewards


def encode_answer(run, prompt, answer):
    """-> Row; of an answer that is too long alone its end, without a prompt"""
    context = run.cfg.model.context
    try:
        return encode_row(run.tokenizer, prompt, (answer,), context)
    except DataError:
        response, = encode_row(run.tokenizer, prompt, (answer,), NO_LIMIT).responses
        bos = [run.tokenizer.bos_id] if run.tokenizer.bos else []
        return Row(np.array(bos, response.dtype), (response[len(bos) - context:],))


def passes(rows, size):
    """The rows of each pass: of similar length, at most `size`, within CELLS -> [index array]"""
    lengths = np.array([len(row) for row in rows])
    is_shared = [len(row.responses) > 1 for row in rows]  # a pass of others needs no mask
    out = [[]]
    for i in np.lexsort((lengths, is_shared)):
        index = [*out[-1], i]
        if len(index) > size or len(index) > 1 and len(index) * lengths[index].max() ** 2 > CELLS:
            out.append([])
        out[-1].append(i)
    return [np.array(index) for index in out]


def rewards_of(run, model, examples):
    """Rewards of all answers; a row has several answers to its prompt where that saves work.

    Equal answers to equal prompts are computed once, so that rounding decides no tie.
    -> [(k,)] of each example, number of answers before which the dialogue lost its beginning
    """
    rows = []
    num_cut = 0
    places = {}     # prompt and answer -> index of its row
    row_of = []     # of each answer
    with run.bar(len(examples), "tokens") as bar:
        for example in examples:
            prompt_len = len(encode_prompt(run.tokenizer, example.prompt, NO_LIMIT))
            for answer in example.answers:
                place = places.setdefault((example.prompt, answer), len(rows))
                if place == len(rows):
                    rows.append(encode_answer(run, example.prompt, answer))
                row_of.append(place)
                num_cut += len(rows[place].prompt) < prompt_len
            bar.update()
    parts = rows_by_prompt(rows)
    shared = []
    for part in parts:
        shared += share_prompts([rows[i] for i in part])
    index_batches = passes(shared, SCORE_BATCH[run.device.type])
    rewards = score_rows(run, model, shared, "rewards", index_batches=index_batches)
    flat = np.zeros(len(rows))
    for part, values in zip(parts, rewards.numpy()):
        flat[part] = values[:len(part)]
    ends = np.cumsum([len(example.answers) for example in examples])
    return np.split(flat[row_of], ends[:-1]), num_cut


# --------------------------------------------------------------------------------------------------
# The command


def open_model(given):
    """-> Run, model, its name.  Raises ConfigError"""
    if "run" not in given:
        refuse(given, ("init",), "--run=FOLDER")
        return *open_folder(given), given["model"]
    refuse(given, ("template",), "--model=FOLDER")
    run, _, name = open_finished_run(
        given["run"], reward=given.get("model", ""), init=given.get("init", ""), scoring=True,
        reward_option="model",
    )
    return run, load_model(run, RewardModel, name), name


def table_text(rows):
    lines = []
    for row in rows:
        low, high = row["interval"]
        lines.append([row["name"], f"{row['examples']:,}", row["score"], f"{low:.3f}-{high:.3f}",
                      row["longer"], row["chance"]])
    return table(["", "examples", "score", "95 %", "longer", "chance"], lines)


def reward_lines(path, examples, rewards):
    for example, r in zip(examples, rewards):
        yield {
            "file": path, "where": example.where, "id": example.id, "subset": example.subset,
            "num_correct": example.num_correct, "rewards": r.tolist(),
        }


def check_outputs(given):
    """Raise ConfigError or OSError where what is asked for could not be written after all."""
    paths = [os.path.realpath(given[key]) for key in REMEDIES if key in given]
    if len(set(paths)) < len(paths):
        raise ConfigError("--out and --scores name the same file; give another one for --out")
    for key, remedy in REMEDIES.items():
        path = given.get(key)
        if path is None:
            continue
        if os.path.exists(path):
            raise ConfigError(f"--{key}={path}: exists already; move it away, nothing is "
                              "overwritten")
        files.check_writable(path, remedy)


def main(argv):
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0

    def work():
        paths = [word for word in argv if not word.startswith("--")]
        given = parse_options([word for word in argv if word.startswith("--")], OPTIONS)
        if not paths:
            raise ConfigError("no file is given; give one, such as python -m tools.rewardbench "
                              "my_pairs.jsonl --run=out/tiny")
        check_outputs(given)
        sets = {path: read_examples(path) for path in paths}
        run, model, name = open_model(given)
        tables = []
        lines = []
        for path, (benchmark, examples) in sets.items():
            rewards, num_cut = rewards_of(run, model, examples)
            rows = score_table(benchmark, examples, rewards)
            print(f"{path}: {benchmark}, scored by {name}")
            print(table_text(rows))
            if num_cut:
                print(f"note: {num_cut:,} answers of {sum(map(len, rewards)):,} and their prompts "
                      f"are longer than {run.cfg.model.context:,} tokens; their ends are scored")
            tables.append({"file": path, "benchmark": benchmark, "cut": num_cut, "scores": rows})
            lines += reward_lines(path, examples, rewards)
        if "scores" in given:
            files.save_jsonl(given["scores"], lines, REMEDIES["scores"])
        if "out" in given:
            result = {"model": name, "files": tables} | files.versions()
            files.save_json(given["out"], result, REMEDIES["out"])

    return run_cli(work, trains=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
