"""Two processes on gloo do what one does: gradients, weights, stopping, dying, resuming."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import rank_cases
import torch
from helpers import SMALL, go, tensors
from small_runs import copy_run, stop_after

from config import ConfigError
from experiments import seeds
from runtime import cli, distributed, heartbeat, signals
from runtime.run import Known, Run

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
GRADIENTS = 1e-12  # of numbers up to 4 in float64, summed in another order
WEIGHTS = 1e-9     # after ten to twelve steps of Adam, which magnifies what is near zero


def environment():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# --------------------------------------------------------------------------------------------------
# The same numbers


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    with rank_cases.in_float64():
        return rank_cases.run_cases(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """-> {"none": weights and gradients, "full": the same of models that are spread}"""
    folder = tmp_path_factory.mktemp("two")
    subprocess.run([*TORCHRUN, ROOT / "tests/rank_cases.py", folder], check=True, cwd=folder,
                   env=environment(), timeout=500)
    return torch.load(folder / "two_ranks.pt", weights_only=True)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize("shard", ["none", "full"])
def test_the_first_gradients_are_those_of_one_process(one_process, two_ranks, shard):
    _, expected = one_process
    _, found = two_ranks[shard]
    assert {"sft", "reward_baseline", "meta_1", "policy_baseline"} <= found.keys()
    if shard == "none":
        assert {"simcse", "swav", "second_order"} <= found.keys()
    for case, gradients in found.items():
        assert largest_difference(gradients, expected[case]) < GRADIENTS, case


@pytest.mark.parametrize("shard", ["none", "full"])
def test_the_weights_are_those_of_one_process(one_process, two_ranks, shard):
    expected, _ = one_process
    found, _ = two_ranks[shard]
    for case, weights in found.items():
        if case != "simcse_rank":
            assert largest_difference(weights, expected[case]) < WEIGHTS, case


@pytest.mark.parametrize("case", ["sft", "reward_baseline", "meta_1", "policy_baseline"])
def test_each_rank_holds_its_share_of_weights_and_gradients(two_ranks, case):
    whole = two_ranks["held, none"][case]
    head = 16  # a row of weights cannot be halved, and rank 0 has it
    assert two_ranks["held, full"][case] <= whole / 2 + head


def test_a_model_that_was_gathered_for_sampling_is_spread_again(two_ranks):
    held, total = two_ranks["held after a pass"]
    assert held <= total / 2 + 32  # a row of the head, as above


def test_negatives_of_the_rank_are_another_loss(one_process, two_ranks):
    expected, _ = one_process
    found, _ = two_ranks["none"]
    assert largest_difference(found["simcse_rank"], expected["simcse_rank"]) > 1e-4


def test_the_metrics_are_those_of_one_process(one_process, two_ranks, tmp_path_factory):
    lines = {}
    base = tmp_path_factory.getbasetemp()
    for name, folder in (("one", "one0/none_1"), ("two", "two0/none_2")):
        with open(base / folder / "log.jsonl") as file:
            lines[name] = [json.loads(line) for line in file]
    assert len(lines["one"]) == len(lines["two"]) > 50  # rank 0 alone writes
    for one, two in zip(lines["one"], lines["two"]):
        if one["stage"] == "reward_simcse_rank":
            continue
        for key in one.keys() - {"tokens_per_s", "samples"}:
            assert two[key] == pytest.approx(one[key], abs=2e-6), (one["stage"], key)


# --------------------------------------------------------------------------------------------------
# Stopping and dying


def start(out, *words):
    """A small run of two ranks, a checkpoint a step -> the process of the launcher"""
    words = [*SMALL, f"--out_dir={out}", "--device=cpu", "--model.dropout=0",
             "--train.checkpoint_minutes=0", *words]
    return subprocess.Popen([*TORCHRUN, ROOT / "train.py", *words], env=environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, is_there):
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None:
        if is_there():
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[0])


def wait_for_step(process, out, step):
    """Until SFT has logged this step"""
    def is_there():
        if not os.path.exists(f"{out}/log.jsonl"):
            return False
        with open(f"{out}/log.jsonl") as file:
            return any(json.loads(line)["step"] >= step for line in file)

    wait_for(process, is_there)


def kill_rank_1(process):
    """-> what the launcher and the ranks have printed"""
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    killed_at = time.time()
    text = process.communicate(timeout=100)[0]
    assert time.time() - killed_at < 60
    assert text.count("another rank has died (rank 1)") == 1, text
    return text


def ranks_of(process):
    """-> process ids of the ranks, by rank"""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    ids = {}
    for pid in children.stdout.split():
        values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = [value for value in values if value.startswith(b"RANK=")]
        if rank:
            ids[int(rank[0][5:])] = int(pid)
    return ids


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, capsys, monkeypatch):
    """Two ranks until SIGTERM, one until it is stopped, two until one is killed, one to the end: as
    without a stop"""
    out = tmp_path / "stopped"
    more = ["--stage=sft", "--sft.epochs=16", "--model.dropout=0"]
    process = start(out, *more)
    wait_for_step(process, out, 4)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=100)[0]
    assert text.count("the same command resumes") == 1, text

    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert go(out, *more, "--train.checkpoint_minutes=0") == 130
    assert "sft: resumes at step" in capsys.readouterr().out

    process = start(out, *more)
    wait_for_step(process, out, 24)
    text = kill_rank_1(process)
    assert text.count("sft: resumes at step") == 1, text

    assert go(out, *more) == 0
    assert "sft: resumes at step" in capsys.readouterr().out
    assert go(tmp_path / "whole", *more) == 0
    # 64 steps in float32; a step is at most lr = 0.002
    difference = largest_difference(tensors(out, "sft"), tensors(tmp_path / "whole", "sft"))
    assert difference < 0.01


def test_a_rank_that_dies_at_its_own_piece_is_named(finished, tmp_path):
    """Then torchrun's request to stop is all that the other rank sees of it."""
    out = copy_run(finished, tmp_path / "run")
    process = start(out, "--model.dropout=0.05", "--stage=ensemble", "--ensemble.epochs=300")
    wait_for(process, lambda: os.path.exists(f"{out}/member_01.ckpt"))
    kill_rank_1(process)


def test_every_stage_of_two_ranks_ends_as_one_process_does(tmp_path, capsys):
    process = start(tmp_path / "two")
    assert go(tmp_path / "one", "--model.dropout=0") == 0
    text = process.communicate(timeout=200)[0]
    assert process.returncode == 0, text
    names = [set(os.listdir(tmp_path / n / "stages")) for n in ("one", "two")]
    assert names[0] == names[1]
    one = json.loads((tmp_path / "one/results.json").read_text())
    two = json.loads((tmp_path / "two/results.json").read_text())
    for method, scores in one["reward"].items():
        for key in ("accuracy", "gold_accuracy", "nll"):  # float32: rounding may move one pair
            found = two["reward"][method]["valid"][key]
            assert found == pytest.approx(scores["valid"][key], abs=0.03), key
    assert one["policy"].keys() == two["policy"].keys()
    capsys.readouterr()
    assert go(tmp_path / "two", "--model.dropout=0") == 0
    assert "up to date" in capsys.readouterr().out


def test_ranks_that_read_different_checkpoints_are_told_so(tmp_path, monkeypatch):
    run = Run.__new__(Run)
    run.cfg = rank_cases.load_config(f"--out_dir={tmp_path}")
    monkeypatch.setattr(distributed, "of_each_rank", lambda step: [step, 10.0])
    with pytest.raises(ConfigError, match="steps 0, 10.; put out_dir on a disk"):
        run.resume("sft", {})


def test_waiting_for_a_rank_at_its_own_piece_does_not_end_after_half_an_hour(monkeypatch):
    given = {}

    def init(backend, **settings):
        given.update(settings)
        raise InterruptedError

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "init_process_group", init)
    module = sys.modules["torch.distributed.rendezvous"]
    monkeypatch.setattr(module, "rendezvous", lambda url: iter([(None, 1, 2)]))
    with pytest.raises(InterruptedError):
        distributed.join()
    assert given["timeout"].days >= 7


# --------------------------------------------------------------------------------------------------
# Shares


class Ranks:
    """Instead of torch.distributed: this process is one of n."""

    def __init__(self, rank, n):
        self.rank = rank
        self.n = n

    def is_initialized(self):
        return True

    def get_rank(self):
        return self.rank

    def get_world_size(self):
        return self.n


@pytest.mark.parametrize("num_items", [3, 4, 11])
def test_every_item_is_in_one_share(monkeypatch, num_items):
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "dist", Ranks(rank, 3))
        own, copies = distributed.share(range(num_items))
        assert copies == 1
        shares += own
    assert sorted(shares) == list(range(num_items))


def test_too_few_items_belong_to_all(monkeypatch):
    monkeypatch.setattr(distributed, "dist", Ranks(2, 3))
    assert distributed.share([5, 6]) == ([5, 6], 3)
    own, share = distributed.share_of_counts([5, 6])
    assert [5, 6][own] == [5, 6] and share == 1 / 3


def test_shares_of_counts_are_neighbours_and_add_up_to_one(monkeypatch):
    counts = [4, 1, 1, 7, 2]
    items = []
    total = 0.0
    for rank in range(2):
        monkeypatch.setattr(distributed, "dist", Ranks(rank, 2))
        own, share = distributed.share_of_counts(counts)
        assert share == sum(counts[own]) / 15
        items += counts[own]
        total += share
    assert items == counts and total == pytest.approx(1)


def test_a_single_item_has_a_share():
    own, share = distributed.share_of_counts(torch.tensor([7, 5])[torch.tensor([1])])
    assert [5][own] == [5] and share == 1.0


def test_alone_a_rank_is_the_only_one(monkeypatch):
    monkeypatch.setattr(distributed, "dist", Ranks(1, 2))
    assert (distributed.rank(), distributed.world_size()) == (1, 2)
    with distributed.alone():
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        assert distributed.share([1, 2, 3]) == ([1, 2, 3], 1)
        assert distributed.true_rank() == 1
    assert distributed.rank() == 1


def test_on_one_process_nothing_changes():
    x = torch.arange(3.0)
    assert distributed.merge(x, range(3), 3) is x and distributed.gather(x) is x
    assert distributed.count_once(x) is x and distributed.divide_gradient(x) is x
    assert distributed.agree({"a": (1,)}) == {"a": (1,)}
    assert distributed.total([1.5]) == [1.5] and distributed.of_each_rank(2.5) == [2.5]
    assert distributed.any_rank(True, False) == [True, False]
    own, share = distributed.share_of_counts([3, 4])
    assert [3, 4][own] == [3, 4] and share == 1.0


def test_large_lists_are_added_in_buckets(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 10)
    tensors = [torch.zeros(n) for n in (4, 6, 1, 30, 2, 3)]
    sizes = [[len(x) for x in bucket] for bucket in distributed.buckets(tensors)]
    assert sizes == [[4, 6], [1], [30], [2, 3]]


# --------------------------------------------------------------------------------------------------
# Pieces that are dealt out


def test_what_would_leave_ranks_idle_is_made_by_all(monkeypatch, tmp_path):
    made = []

    def work(run, item):
        made.append((item, run.world_size))

    run = Run.__new__(Run)
    run.cfg = rank_cases.load_config(*rank_cases.CASE, small=())
    run.known = {}
    monkeypatch.setattr(distributed, "dist", Ranks(1, 2))
    monkeypatch.setattr(distributed, "wait", lambda: None)
    monkeypatch.setattr(Run, "stale_work", lambda run, function, items: None)
    monkeypatch.setattr(Run, "read_rows", lambda run: None)
    names = {}
    for i in range(5):
        names[i] = f"member_{i:02d}"
        run.known[names[i]] = Known({}, "new", "")
    run.deal_out(work, names)
    assert made == [(1, 1), (3, 1), (4, 2)]
    made.clear()
    monkeypatch.setattr(Run, "shards", True)
    run.deal_out(work, names)
    assert made == [(i, 2) for i in range(5)]


def test_seeds_are_dealt_out_whatever_the_number_of_threads(monkeypatch):
    config = rank_cases.load_config("--train.workers=4", "--data.train=world")
    measured = []
    monkeypatch.setattr(distributed, "dist", Ranks(1, 2))
    monkeypatch.setattr(distributed, "agree", lambda rows, source: rows)

    def measure(name, config, slot, threads):
        measured.append(config.seed)

    monkeypatch.setattr(seeds, "measure_seed", measure)
    seeds.measure_seeds(SimpleNamespace(name="x", base="tiny"), [3, 4, 5], config, lambda *_: None)
    assert measured == [4]


def test_a_stop_asked_for_by_torchrun_hides_no_death(monkeypatch):
    monkeypatch.setattr(signals, "stop_signal", signal.SIGTERM)
    error = RuntimeError("gloo: closed\nby a peer")
    monkeypatch.setattr(heartbeat, "dead_ranks", lambda: [1])
    assert "another rank has died (rank 1)" in cli.lost_text(error)
    monkeypatch.setattr(heartbeat, "dead_ranks", lambda: [])
    assert cli.lost_text(error).startswith("stopped")
    monkeypatch.setattr(signals, "stop_signal", 0)
    assert "the ranks have lost each other (gloo: closed);" in cli.lost_text(error)


class Store(dict):
    """Instead of torchrun's; one rank beats, one has ended, one is silent"""

    def get(self, key):
        if key == "beat 0":
            self[key] += 1
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)

    def set(self, key, value):
        self[key] = value

    def add(self, key, amount):
        self[key] = self.get(key) + amount if key in self else amount
        return self[key]


def test_dead_are_those_that_neither_beat_nor_ended(monkeypatch):
    store = Store({"beat 0": 1, "beat 1": 7, "beat 2": 3, "ended 1": ""})
    monkeypatch.setattr(heartbeat, "store", store)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0)
    monkeypatch.setattr(heartbeat, "num_ranks", 3)
    assert heartbeat.dead_ranks() == [2]


def test_without_the_store_an_error_is_its_own_line(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("Broken pipe")

    monkeypatch.setattr(heartbeat, "store", SimpleNamespace(set=fail, add=fail, get=fail))
    monkeypatch.setattr(heartbeat, "num_ranks", 2)
    assert heartbeat.failure_text("error: no such file") == "error: no such file"
    assert heartbeat.dead_ranks() == []


def test_the_signal_flag_of_any_rank_stops_all(monkeypatch):
    run = Run.__new__(Run)
    run.cfg = rank_cases.load_config("--train.checkpoint_minutes=1000")
    run.saved_at = time.time()
    run.save_seconds = 0.0
    monkeypatch.setattr(signals, "stop_signal", 0)
    assert not run.should_save()
    monkeypatch.setattr(distributed, "any_rank", lambda *flags: [True, False])
    assert run.should_save()


def test_an_error_that_all_ranks_have_is_printed_once(monkeypatch, capsys):
    monkeypatch.setattr(heartbeat, "store", Store())
    for rank in (1, 0):
        monkeypatch.setattr(heartbeat, "rank", rank)
        cli.say_once("error: none.jsonl: no such file")
    assert capsys.readouterr().err == "rank 1: error: none.jsonl: no such file\n"
    assert heartbeat.store.check(["ended 0", "ended 1"])


def test_signs_of_life_end_before_the_process_does(monkeypatch):
    """Otherwise some ranks abort at the end of their work, and torchrun calls the run failed."""
    registered = []
    for name in ("store", "rank", "num_ranks"):
        monkeypatch.setattr(heartbeat, name, getattr(heartbeat, name))  # put back at the end
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat.atexit, "register", lambda *call: registered.append(call))
    heartbeat.start(Store(), 0, 1)
    (stop, thread, *arguments), = registered
    assert thread.is_alive()
    stop(thread, *arguments)
    assert not thread.is_alive()
