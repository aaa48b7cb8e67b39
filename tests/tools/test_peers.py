"""python -m tools.peers: turns, table, crashes and missing environments with fake peers; equal
losses with the real ones where their environments are installed."""
import importlib.util
import os
import re
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, one_line, write_pairs

from model import LanguageModel, Shape
from runtime import signals
from tools import gpu_speed, peers, speed
from tools.peers import Loss, Sides, Work

FAKE = '''
import os
import sys
sys.path.insert(0, {scripts!r})
from peer_protocol import serve

class Peer:
    def __init__(self, turns, threads):
        print("a banner that is no JSON")
        self.turns = turns
        self.threads = threads

    def versions(self):
        os.write(1, b"a banner of a C library\\n")
        return {{"name": "Fake 1.0", "threads": self.threads}}

    def note(self, what):
        with open(self.turns, "a") as file:
            print(what, os.getpid(), file=file)

    def time(self, number):
        self.note(f"theirs {{number}}")
        if number == {crash}:
            print("a warning", file=sys.stderr)
            raise RuntimeError("the peer's own error")
        return {{"seconds": 10.0 if number == 0 else 3.0}}

    def losses(self):
        return {{"loss": 0.25}}

serve(Peer)
'''


def write_fake(folder, name="fake.py", crash=None):
    path = folder / name
    path.write_text(FAKE.format(scripts=str(peers.SCRIPTS), crash=crash))
    return path


def fake_work(script, turns, threads=1, ours=None):
    """A Work of 1, 2, 3 ... seconds beside the fake peer's 3; its turns are noted in a file"""
    def prepare(pairs, tokenizer, folder):
        def take_turn(number):
            with open(turns, "a") as file:
                print(f"ours {number} {os.getpid()}", file=file)
            return float(number)

        def request(number):
            return {"number": number}

        def compare(peer):
            return [Loss("loss", 0.25, peer.call(method="losses")["loss"])]

        settings = {"turns": str(turns), "threads": threads}
        return Sides(settings, ours or take_turn, request, compare, 6, "pairs/s")

    return Work("fake work", "reward", str(script), prepare)


@pytest.fixture
def turns(tmp_path):
    return tmp_path / "turns.txt"


@pytest.fixture
def use(monkeypatch):
    """-> function that makes these works all there are, in the environment of this Python"""
    def use(**works):
        monkeypatch.setattr(peers, "WORKS", works)
        monkeypatch.setattr(peers, "ENVIRONMENTS", {
            "reward": peers.ENVIRONMENTS["reward"]._replace(python=sys.executable),
            "ppo": peers.ENVIRONMENTS["ppo"]._replace(python="no-ppo/bin/python"),
        })
        monkeypatch.setattr(speed, "world_pairs", lambda count: [])
        monkeypatch.setattr(speed, "train_tokenizer", lambda texts, size: None)

    return use


def is_alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


# --------------------------------------------------------------------------------------------------
# Turns, table, crashes


def test_both_sides_take_turns_in_one_process_each(tmp_path, turns, use, capsys):
    use(fake=fake_work(write_fake(tmp_path), turns))
    peers.measure(names=["fake"], rounds=3)
    words = [line.split() for line in turns.read_text().splitlines()]
    expected = []
    for number in range(4):
        expected += [["ours", str(number)], ["theirs", str(number)]]
    assert [line[:2] for line in words] == expected
    pids = {side: {line[2] for line in words if line[0] == side} for side in ("ours", "theirs")}
    assert pids["ours"] == {str(os.getpid())}
    pid, = pids["theirs"]
    assert not is_alive(pid), "the peer goes on after the run"


def test_a_row_has_medians_ratio_and_quartiles_without_the_first_turn(
        tmp_path, turns, use, capsys):
    use(fake=fake_work(write_fake(tmp_path), turns))
    peers.measure(names=["fake"], rounds=3)  # 1, 2, 3 seconds beside 3: ratios 3, 1.5, 1
    head, titles, rule, row = capsys.readouterr().out.splitlines()
    assert head.startswith("cpu, float32, torch ") and "medians of 3 rounds" in head
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(titles.strip("|").split("|")) == len(rule.strip("|").split("|"))
    assert cells == [
        "fake work", "3.0 pairs/s", "Fake 1.0 2.0 pairs/s", "1.50", "1.25-2.25", "1",
        "loss 0.2500 / 0.2500"]


def test_seconds_are_printed_where_there_is_no_unit():
    assert Sides({}, None, None, None).text(1.234) == "1.23 s"
    assert Sides({}, None, None, None, 5000, "tokens/s").text(2.0) == "2,500.0 tokens/s"


def test_a_peer_that_ends_is_one_line_and_the_next_work_is_measured(tmp_path, turns, use, capsys):
    use(broken=fake_work(write_fake(tmp_path, "broken.py", crash=2), turns),
        fake=fake_work(write_fake(tmp_path), turns))
    assert peers.main([]) == 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[3] == ("broken FAILED: Fake 1.0 has ended with exit code 1: "
                        "RuntimeError: the peer's own error")
    assert lines[4].startswith("| fake work |") and len(lines) == 5
    assert err.startswith("error: ") and "not measured: broken" in err and err.count("\n") == 1
    for line in turns.read_text().splitlines():
        side, _, pid = line.split()
        assert side == "ours" or not is_alive(pid)


def test_a_peer_that_cannot_be_imported_is_one_line(tmp_path, turns, use, capsys):
    script = tmp_path / "broken.py"
    script.write_text("import no_such_library\n")
    use(fake=fake_work(script, turns))
    assert peers.main([]) == 2
    out = capsys.readouterr().out
    assert "the peer has ended with exit code 1: ModuleNotFoundError: No module named 'no_" in out


def test_a_peer_that_says_nothing_is_one_line(tmp_path, turns, use, capsys):
    script = tmp_path / "silent.py"
    script.write_text("import sys\nsys.exit(3)\n")
    use(fake=fake_work(script, turns))
    assert peers.main([]) == 2
    assert "has ended with exit code 3: it printed no error" in capsys.readouterr().out


def test_another_number_of_threads_is_no_comparison(tmp_path, turns, use, capsys):
    script = write_fake(tmp_path)
    script.write_text(script.read_text().replace("self.threads}", "9}"))
    use(fake=fake_work(script, turns))
    assert peers.main([]) == 2
    assert "Fake 1.0 runs 9 threads, not 1" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [signals.Stopped, KeyboardInterrupt, RuntimeError])
def test_no_peer_is_left_behind(tmp_path, turns, use, stop):
    def ours(number):
        if number == 1:
            raise stop
        return 1.0

    use(fake=fake_work(write_fake(tmp_path), turns, ours=ours))
    with pytest.raises(stop):
        peers.measure(names=["fake"])
    _, _, pid = turns.read_text().split()
    assert not is_alive(pid)


def test_a_peer_ends_by_itself_when_nobody_asks_any_more(tmp_path, turns):
    """So that none is left behind where this process is killed."""
    with peers.start_peer(sys.executable, write_fake(tmp_path)) as peer:
        peer.call(turns=str(turns), threads=1)
        peer.process.stdin.close()
        assert peer.process.wait(timeout=30) == 0


def test_a_peer_imports_from_its_own_environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    variables = peers.peer_environment()
    assert "PYTHONPATH" not in variables and variables["HF_HUB_OFFLINE"] == "1"


# --------------------------------------------------------------------------------------------------
# Environments and arguments


def test_a_missing_environment_is_one_line_and_the_others_are_measured(
        tmp_path, turns, use, capsys):
    work = fake_work(write_fake(tmp_path), turns)
    use(fake=work, other=work._replace(environment="ppo"), third=work._replace(environment="ppo"))
    assert peers.main([]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        "left out: there is no no-ppo/bin/python, for other, third: python3 -m venv no-ppo && "
        "no-ppo/bin/pip install -q -r requirements-bench-ppo.txt; or name another with "
        "--ppo-python=PATH")
    assert rest[-1].startswith("| fake work |") and len(rest) == 4


def test_without_any_environment_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert peers.main([]) == 2
    one_line(capsys, "requirements-bench.txt", "requirements-bench-ppo.txt", "python3 -m venv")


@pytest.mark.parametrize("words, part", [
    (["--only=reward,training"], "must be one or more of reward, sampling"),
    (["--rounds=3"], "must be --only="),
    (["--ppo-python="], "--ppo-python=PATH"),
    (["a.jsonl", "b.jsonl"], "there is one FILE already"),
    (["--ppo-python=no/python"], "--ppo-python: there is no no/python"),
])
def test_wrong_words_are_one_line(words, part, capsys):
    assert peers.main(words) == 2
    one_line(capsys, part)


def test_a_missing_or_small_file_is_one_line(tmp_path, use, capsys):
    python = f"--reward-python={sys.executable}"
    assert peers.main(["--only=reward", python, str(tmp_path / "none.jsonl")]) == 2
    one_line(capsys, "none.jsonl")
    path = write_pairs(tmp_path / "few.jsonl")
    assert peers.main(["--only=reward", python, str(path)]) == 2
    one_line(capsys, "there are 30 usable pairs, and 20 steps need 320")


def test_help_says_how_to_make_the_environments(capsys):
    assert peers.main(["--help"]) == 0
    out = capsys.readouterr().out
    for environment in peers.ENVIRONMENTS.values():
        folder = environment.python.split("/")[0]
        assert f"python3 -m venv {folder} && {folder}/bin/pip install" in out
        assert environment.requirements in out and environment.option in out
    for name in peers.WORKS:
        assert re.search(rf"\b{name}\b", out)


# --------------------------------------------------------------------------------------------------
# Our side


def tiny_policy(eos_id=99):
    shape = Shape(vocab=100, layers=2, heads=2, kv_heads=1, width=32, hidden=40, context=64)
    return gpu_speed.random_model(LanguageModel, shape, torch.device("cpu")), eos_id


@pytest.mark.parametrize("p", [0.5, 0.04])
def test_eos_has_its_probability_on_any_tokens(p):
    policy, eos_id = tiny_policy()
    peers.set_eos_probability(policy, eos_id, p)
    with torch.no_grad():
        chance = policy(torch.randint(eos_id, (64, 40))).softmax(-1)[..., eos_id]
    assert chance.mean() == pytest.approx(p, rel=0.05)
    assert chance.std() < 0.5 * p


def test_eos_never_comes_in_answers_of_full_length():
    policy, eos_id = tiny_policy()
    peers.set_eos_probability(policy, eos_id, 0.0)
    with torch.no_grad():
        chance = policy(torch.randint(eos_id, (64, 40))).softmax(-1)[..., eos_id]
    assert chance.max() < 1e-6


def test_half_of_the_answers_of_a_real_rollout_end_within_its_median(tmp_path):
    tokenizer = speed.train_tokenizer(speed.texts_of(speed.world_pairs(40)), 300)
    work = peers.PpoWork(tokenizer, tmp_path, 1, 128, peers.REAL)
    _, models, _ = work.timed
    prompts = peers.REAL.draw(0, tokenizer.eos_id)
    lengths = (work.sample_answers(models.policy, prompts) >= 0).sum(1)
    assert 8 <= lengths.median() <= 24 and lengths.max() == peers.REAL.max_new_tokens


def test_prompts_have_several_answers_and_differ_in_length():
    prompts = peers.REAL.draw(0, 100)
    assert len(prompts) == 64
    for start in range(0, 64, 4):
        assert prompts[start:start + 4] == 4 * [prompts[start]]
    lengths = {len(prompt) for prompt in prompts}
    assert len(lengths) > 8 and min(lengths) >= 8 and max(lengths) <= 64
    assert peers.REAL.draw(0, 100) == prompts != peers.REAL.draw(1, 100)
    assert {len(prompt) for prompt in peers.FULL.draw(0, 100)} == {32}


class Echo:
    """A peer that finds the same losses"""
    def __init__(self):
        self.requests = []

    def call(self, **request):
        self.requests.append(request)
        return {"policy": 0.0, "value": 0.0, "losses": [0.0], "tokens": [[1, 2, 3]] * 2}


def test_our_side_of_ppo_takes_the_answers_and_minibatches_that_the_peer_gets(
        tmp_path, monkeypatch):
    tokenizer = speed.train_tokenizer(speed.texts_of(speed.world_pairs(40)), 300)
    rollouts = peers.Rollouts(4, 3, 6, answers=2, max_new_tokens=5, median=0)
    sides = peers.prepare_ppo(1, 128, rollouts)([], tokenizer, tmp_path)
    assert (tmp_path / "policy/config.json").exists()
    assert (tmp_path / "reward/config.json").exists()
    assert sides.ours(0) > 0
    peer = Echo()
    losses = sides.compare(peer)
    assert [loss.name for loss in losses] == ["policy", "value"]
    assert all(np.isfinite(loss.ours) and loss.ours != 0 for loss in losses)
    request, = peer.requests
    assert len(request["orders"]) == request["epochs"] == peers.STEPS // 4
    assert all(sorted(order) == list(range(8)) for order in request["orders"])
    responses = np.array(request["responses"])
    assert responses.shape == (8, 5) and (responses[:, -1] == tokenizer.eos_id).all()
    assert (responses[:, :-1] != tokenizer.eos_id).all()
    assert request["prompts"] == sides.request(0)["prompts"]


def test_our_side_of_sampling_has_the_peers_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "SAMPLING_TOKENS", (2, 4, 3))
    tokenizer = speed.train_tokenizer(speed.texts_of(speed.world_pairs(40)), 300)
    sides = peers.prepare_sampling([], tokenizer, tmp_path / "policy")
    assert sides.ours(0) > 0
    peer = Echo()
    loss, = sides.compare(peer)
    assert 1 < loss.ours < 20 and 1 < loss.theirs < 20
    assert np.shape(peer.requests[0]["prompts"]) == (2, 4)


# --------------------------------------------------------------------------------------------------
# The real peers


def python_with(key):
    """The python of an environment; skips the test where it is not installed"""
    python = ROOT / peers.ENVIRONMENTS[key].python
    if python.is_file():
        return str(python)
    if key == "reward" and importlib.util.find_spec("trl"):
        return sys.executable
    pytest.skip(f"there is no {python}")


def small_sides(work, python, folder):
    """-> losses of both sides, seconds (1, 2) of a work on few pairs"""
    pairs = speed.world_pairs(60)
    tokenizer = speed.train_tokenizer(speed.texts_of(pairs), 300)
    with peers.start_peer(python, peers.SCRIPTS / work.script) as peer:
        sides = work.prepare(pairs, tokenizer, str(folder))
        facts = peer.call(**sides.settings)
        assert facts["threads"] == torch.get_num_threads()
        losses = sides.compare(peer)
        return losses, peers.take_turns(sides, peer, 1)


@pytest.mark.parametrize("name, tolerance", [("reward", 1e-4), ("sampling", 0.5)])
def test_training_and_sampling_are_those_of_the_peer(name, tolerance, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "BATCH", 2)
    monkeypatch.setattr(peers, "TIMED_STEPS", 2)
    monkeypatch.setattr(peers, "SAMPLING_TOKENS", (8, 4, 6))
    losses, seconds = small_sides(peers.WORKS[name], python_with("reward"), tmp_path / "model")
    for loss in losses:
        assert loss.ours == pytest.approx(loss.theirs, abs=tolerance), loss
    assert seconds.shape == (1, 2) and (seconds > 0).all()


def test_ppo_is_that_of_the_peer(tmp_path):
    rollouts = peers.Rollouts(4, 6, 6, answers=2, max_new_tokens=8, median=0)
    work = Work("", "ppo", "trl_ppo.py", peers.prepare_ppo(1, 128, rollouts))
    losses, seconds = small_sides(work, python_with("ppo"), tmp_path)
    for loss in losses:
        # TRL whitens by the unbiased variance: by 1 / 128 of 64 tokens
        assert loss.ours == pytest.approx(loss.theirs, rel=0.02, abs=1e-4), loss
    assert (seconds > 0).all()
