"""What the harnesses share: small runs with every optional state, and whether two are equal."""
import argparse
import hashlib
import json
import os
from pathlib import Path

from helpers import HH_SMALL, SMALL
from small_runs import STATES, write_base

EVERYTHING = [  # of a run: simcse's and swav's queues, folds, rounds, all that PPO keeps
    *SMALL,
    "--ensemble.folds=2",
    "--reward.methods=baseline,flip",
    "--reward.batch=8",
    "--contrast.term=swav",
    "--contrast.prototypes=8",
    "--contrast.queue=40",
    "--contrast.frozen=0.4",
    "--meta.rounds=1",
    "--meta.prompts=16",
    "--meta.k=3",
    "--ppo.adaptive_kl_target=0.5",
    "--ppo.reset_reference=2",
    "--ppo.ptx_coef=0.1",
    "--ppo.iterations=4",
    "--ppo.critic_warmup_iters=1",
    "--ppo.sample_every=2",
    "--train.checkpoint_minutes=0",
]
FEW = [  # the fewest writes that a run with every stage makes
    *SMALL,
    "--world.pairs=24",
    "--world.demonstrations=12",
    "--reward.methods=flip",
    "--ppo.iterations=1",
    "--evaluate.prompts=4",
]
LABELS = [  # of the audit of a file: a self-test by members that are trained anew
    *HH_SMALL,
    "--data.valid_share=0",
    "--sft.answers=both",
    "--ensemble.members=2",
    "--ensemble.folds=2",
    "--clean.tests=1",
    "--reward.methods=",
    "--ppo.methods=",
    "--train.checkpoint_minutes=0",
]
ON_STATES = [*STATES, "--clean.tests=2", "--train.checkpoint_minutes=0"]
STAGES = {  # of each run, with the records that end them
    "everything": {
        "sft": ["sft"],
        "ensemble": ["member_00", "member_01"],
        "strength": ["strength"],
        "reward": ["reward_baseline", "reward_flip"],
        "ppo": ["policy_flip"],
        "meta": ["meta_1", "policy_meta_1"],
        "evaluate": ["evaluate"],
    },
    "labels": {
        "sft": ["sft"],
        "ensemble": ["member_00", "member_01"],
        "strength": ["strength"],
        "self-test": ["planted_0_00", "planted_0_01"],
        "clean": ["clean"],
        "evaluate": ["evaluate"],
    },
    "states": {
        "states": ["views"],
        "strength": ["strength"],
        "clean": ["clean"],
        "evaluate": ["evaluate"],
    },
}
VOLATILE = ("log.jsonl", "run.lock", "run.lock.holder")  # no outputs
OF_A_RECORD = ("finished", "seconds", "checksum")        # that differ between equal runs


def contents(folder):
    """-> {file: sha256}, of records without what differs between equal runs"""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in VOLATILE:
            found[name] = hashlib.sha256(comparable(path)).hexdigest()
    return found


def comparable(path):
    content = path.read_bytes()
    if path.parent.name != "stages":
        return content
    record = json.loads(content)
    for key in OF_A_RECORD:
        record.pop(key, None)
    return json.dumps(record, sort_keys=True).encode()


def difference(folder, expected):
    """How a folder differs from expected contents, in words; "" if it does not."""
    found = contents(folder)
    names = sorted(found.keys() ^ expected.keys())
    if names:
        return f"other files: {', '.join(names)}"
    changed = [name for name in found if found[name] != expected[name]]
    return f"other contents: {', '.join(changed)}" if changed else ""


def words_of_run(name, folder):
    """Settings of a run of STAGES; folder: where its data and its pretrained model are written"""
    if name == "everything":
        return EVERYTHING
    write_base(folder)
    words = LABELS if name == "labels" else [*ON_STATES, f"--model.init={folder}/hf"]
    return [*words, f"--data.train={folder}/mine.jsonl"]


def work_in_progress(folder, stages=STAGES["everything"]):
    """The stage whose work has no record yet, by the records that are there"""
    records = Path(folder) / "stages"
    done = {path.stem for path in records.glob("*.json")} if records.is_dir() else set()
    if not os.path.exists(os.path.join(folder, "run.lock")):
        return "imports"
    for stage, names in stages.items():
        if not done.issuperset(names):
            return stage
    return "end"


def parse_args(argv, cases=0):
    """Arguments of a harness; cases: the default of --cases, 0 for all there are"""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=cases)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--run", choices=list(STAGES), default="everything")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)
