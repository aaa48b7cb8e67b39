"""The contrastive term in the reward stage, MetaRM's stage, rounds, and the arithmetic of the experiments on shifted data."""
import json
import math

import numpy as np
import pytest
import torch

import config
import files
import loop
import losses
import metarm
import plan
import shift
import train
from config import Contrast as Settings
from contrast import Contrast, items_of
from data import collate
from helpers import SMALL, go, one_line, random_rows, same, tensors, tiny_reward
from run import open_run

ROUNDS = ["--meta.rounds=2", "--meta.prompts=20", "--meta.k=3", "--ppo.methods=", "--reward.methods=baseline"]


def term(**changes):
    return Contrast(Settings(**{"term": "swav", "prototypes": 4} | changes), width=8, generator=torch.Generator().manual_seed(0), total=100)


# ---------------------------------------------------------------------------------------------------------------------
# The term

def test_items_by_hand():
    h = torch.tensor([[[1.0, 2.0], [3.0, 5.0]], [[4.0, 4.0], [0.0, 1.0]]])  # two pairs
    assert items_of(h, "pairs").tolist() == [[1, 2], [3, 5], [4, 4], [0, 1]]
    assert items_of(h, "difference").tolist() == [[-2, -3], [4, 3], [2, 3], [-4, -3]]


@pytest.mark.parametrize("items", ["pairs", "difference"])
def test_the_views_are_the_two_halves_of_the_batch(items):
    h = torch.randn(6, 2, 8)
    s, t = items_of(h[:3], items), items_of(h[3:], items)
    torch.testing.assert_close(term(term="simcse", items=items)(h), losses.simcse(s, t, 0.05))
    swav = term(items=items, temperature=0.2, epsilon=0.3, iterations=2)
    scores = [torch.nn.functional.normalize(x, dim=1) @ swav.prototypes.T for x in (s, t)]
    torch.testing.assert_close(swav(h), losses.swav(*scores, 0.2, 0.3, 2))


def test_weight_zero_and_no_dropout_is_the_plain_loss_and_its_gradient():
    model, rows = tiny_reward(), random_rows(5, 2, seed=3)
    margin, p = torch.rand(5), torch.rand(5)
    gradients = {}
    for name, contrast in (("plain", None), ("term", Contrast(Settings(term="simcse", weight=0.0), 32, torch.Generator()))):
        loss, sums = loop.pair_loss(model, rows, margin, p, contrast)
        gradients[name] = [loss.detach(), sums["accuracy"], *torch.autograd.grad(loss, list(model.parameters()))]
    for a, b in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=1e-5, rtol=1e-4)


def test_the_term_is_added_once_a_pair_with_its_weight():
    model, rows = tiny_reward(), random_rows(5, 2, seed=3)
    plain, _ = loop.pair_loss(model, rows, torch.zeros(5), torch.ones(5))
    contrast = Contrast(Settings(term="simcse", weight=3.0, items="difference", temperature=2.0), 32, torch.Generator())  # far from 0
    loss, sums = loop.pair_loss(model, rows, torch.zeros(5), torch.ones(5), contrast)
    batch = collate(rows)
    _, h = model(*batch[:3], read=batch.last, features=True)
    items = items_of(h, "difference")
    torch.testing.assert_close(sums["contrast"], 5 * losses.simcse(items, items, 2.0).mean())  # dropout is off: the views are equal
    torch.testing.assert_close(loss, plain + 3 * sums["contrast"])


def test_two_masks_make_two_views():
    model, seen = tiny_reward(dropout=0.3).train(), {}
    def watch(h):
        seen["h"] = h
        return h.sum((1, 2))
    watch.s = Settings()
    loop.pair_loss(model, random_rows(4, 2, seed=1), torch.zeros(4), torch.ones(4), watch)
    s, t = seen["h"].chunk(2)
    assert s.shape == (4, 2, 32) and not torch.allclose(s, t, atol=1e-2)
    assert torch.nn.functional.cosine_similarity(s, t, dim=-1).min() > 0  # of the same answers, in the same order


def test_prototypes_have_length_one_and_move_once_they_are_no_longer_frozen():
    swav, h = term(frozen=0.1), torch.randn(6, 2, 8, requires_grad=True)  # 10 of 100 items
    assert not torch.autograd.grad(swav(h).sum(), swav.prototypes, allow_unused=True, materialize_grads=True)[0].any()
    swav(h)
    assert torch.autograd.grad(swav(h).sum(), swav.prototypes)[0].abs().sum() > 0  # 12 seen
    with torch.no_grad():
        swav.prototypes.mul_(7)
    swav(h)
    torch.testing.assert_close(swav.prototypes.norm(dim=1), torch.ones(4))


def test_the_queue_holds_the_newest_items_of_each_view_and_shares_in_the_codes():
    swav, plain = term(queue=8), term()
    first, second = torch.randn(2, 6, 2, 8)
    torch.testing.assert_close(swav(first), plain(first))  # nothing in it as yet
    views = [torch.nn.functional.normalize(items_of(x, "pairs"), dim=1) for x in first.chunk(2)]
    torch.testing.assert_close(swav.past[:, :6], torch.stack(views))
    now = [torch.nn.functional.normalize(items_of(x, "pairs"), dim=1) for x in second.chunk(2)]
    loss = swav(second)
    both = [torch.cat(x) @ swav.prototypes.T for x in zip(now, views)]
    torch.testing.assert_close(loss, losses.swav(*both)[:6])
    assert not torch.allclose(loss, plain(second))
    torch.testing.assert_close(swav.past, torch.cat((torch.stack(now), torch.stack(views)), 1)[:, :8])  # the oldest four are gone


def test_collapse_is_said_once_when_it_lasts():
    swav, h = term(), torch.ones(6, 2, 8)
    loss = float(swav(h).mean().detach())
    with torch.no_grad():
        swav.prototypes.copy_(swav.prototypes[:1].expand(4, 8))
    collapsed = float(swav(h).mean().detach())
    assert collapsed == pytest.approx(2 * math.log(4)) and loss > collapsed  # items alike: uniform codes, which no softmax meets but a flat one
    assert [bool(swav.stuck(x)) for x in (collapsed, 2.0, collapsed, collapsed, collapsed, collapsed)] == [False, False, False, False, True, False]
    assert not any(swav.stuck(x) for x in (4.0, 4.0, 4.0))
    assert not any(term(term="simcse").stuck(collapsed) for _ in range(5))


def test_a_step_with_a_term_on_the_meta_device():
    """No tensor is made on the wrong device."""
    model = tiny_reward(dropout=0.1).to("meta").train()
    for settings in (Settings(term="simcse"), Settings(term="swav", prototypes=4, queue=4)):
        contrast = Contrast(settings, 32, torch.Generator()).to("meta")
        loss, _ = loop.pair_loss(model, random_rows(4, 2, seed=1), torch.zeros(4), torch.ones(4), contrast)
        loss.backward()
        assert loss.device.type == "meta" and model.score.weight.grad.device.type == "meta"


@pytest.mark.parametrize("given, said", [
    (["--contrast.term=simcse", "--contrast.dropout=0"], "both views would be the same"),
    (["--contrast.term=swav", "--reward.batch=16"], "contrast.queue = 0: a step has 32 items for contrast.prototypes = 50"),
    (["--contrast.term=swav", "--reward.batch=32", "--train.accumulate=2"], "set it to 18 or more"),
    (["--meta.rounds=1", "--meta.method=margin"], "must be one of reward.methods"),
    (["--meta.arms=both"], "must be one of meta, plain, none")])
def test_what_cannot_work_is_refused_before_anything_is_done(given, said, tmp_path, capsys):
    assert go(tmp_path, *given) == 2
    one_line(capsys, said)


def test_a_reward_model_with_a_term_resumes_and_repeats_bit_for_bit(tmp_path, monkeypatch):
    more = ["--contrast.term=swav", "--contrast.prototypes=8", "--contrast.queue=40", "--contrast.frozen=0.4", "--reward.batch=8",
            "--reward.methods=baseline", "--ppo.methods="]
    assert go(tmp_path / "whole", *more, "--stage=sft") == 0 and go(tmp_path / "parts", *more, "--stage=sft") == 0
    assert go(tmp_path / "whole", *more, "--stage=reward") == 0
    plain = go(tmp_path / "plain", "--stage=sft", *more) or go(tmp_path / "plain", "--stage=reward", *more[5:])
    assert plain == 0 and not same(tensors(tmp_path / "plain", "reward_baseline"), tensors(tmp_path / "whole", "reward_baseline"))
    steps = iter([False] * 4 + [True] * 2)
    monkeypatch.setattr(files, "should_stop", lambda: next(steps, False))
    assert go(tmp_path / "parts", *more, "--stage=reward") == 130
    assert go(tmp_path / "parts", *more, "--stage=reward") == 0
    assert same(tensors(tmp_path / "parts", "reward_baseline"), tensors(tmp_path / "whole", "reward_baseline"))
    assert "prototypes" not in " ".join(tensors(tmp_path / "whole", "reward_baseline"))
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all("contrast" in line for line in log if line["stage"] == "reward_baseline")


# ---------------------------------------------------------------------------------------------------------------------
# MetaRM's stage

def test_a_generator_of_pieces_is_their_sum():
    a, b = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (2.0, 5.0))
    def J():
        yield (a * b).sum()
        yield (a ** 2).sum()
    def L():
        yield (a ** 2).sum()
        yield (b * a).sum()
    for second_order in (False, True):
        whole = metarm.meta_gradient([a, b], lambda: sum(J()), lambda: sum(L()), 0.3, second_order)
        pieces = metarm.meta_gradient([a, b], J, L, 0.3, second_order)
        assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(whole, pieces))


def test_notes_by_hand():
    """J = 3a + 4b, L = a' alone at a' = a + 3 eta: norms 5 and 1, cosine 3/5."""
    a, b, notes = *(torch.tensor([x], requires_grad=True) for x in (2.0, 5.0)), {}
    metarm.meta_gradient([a, b], lambda: (3 * a + 4 * b).sum(), lambda: a.sum(), 0.5, notes=notes)
    assert {k: float(v) for k, v in notes.items()} == pytest.approx({"cosine": 0.6, "difference_norm": 5.0, "pair_norm": 1.0})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("rounds")
    assert go(out, *ROUNDS, "--meta.arms=meta,plain,none") == 0
    return out


def test_rounds_take_up_where_the_last_one_ended():
    c = config.load(None, [("meta.rounds", "2"), ("meta.arms", "meta,none")])
    assert metarm.rounds(c) == [("meta", 1, "reward_baseline", "meta_1", "sft", "policy_meta_1"), ("meta", 2, "meta_1", "meta_2", "policy_meta_1", "policy_meta_2"),
                                ("none", 1, "reward_baseline", "reward_baseline", "sft", "policy_none_1"),
                                ("none", 2, "reward_baseline", "reward_baseline", "policy_none_1", "policy_none_2")]
    assert metarm.rounds(config.load()) == []


def test_every_round_leaves_its_files_and_is_judged(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results["reward"]) == ["baseline", "meta_1", "meta_2", "plain_1", "plain_2"]
    policies = ["sft", *(f"policy_{arm}_{n}" for arm in ("meta", "plain", "none") for n in (1, 2))]
    assert list(results["policy"]) == list(results["policy_ood"]) == policies
    for line in (json.loads(line) for line in (finished / "samples_meta_2.jsonl").read_text().splitlines()):
        assert len(line["responses"]) == 3
    assert len((finished / "samples_meta_1.jsonl").read_text().splitlines()) == 20
    assert (finished / "samples_meta_1.jsonl").read_bytes() != (finished / "samples_meta_2.jsonl").read_bytes()
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    meta = [line for line in log if line["stage"] == "meta_1" and "step" in line]
    assert {"loss", "J", "cosine", "difference_norm", "pair_norm", "accuracy"} <= meta[0].keys()
    assert all(1 / 3 <= line["J"] <= 2 / 3 and -1 <= line["cosine"] <= 1 for line in meta)  # J of k = 3
    assert sum("valid_accuracy" in line for line in log if line["stage"] == "plain_2") == 4
    assert not same(tensors(finished, "meta_1"), tensors(finished, "plain_1"))


def test_a_look_ahead_of_nothing_is_the_plain_arm_bit_for_bit(tmp_path):
    more = [*ROUNDS, "--meta.rounds=1", "--meta.arms=meta,plain", "--meta.eta=0", "--model.dropout=0"]  # dropout would draw for J as well
    for stage in ("sft", "reward", "meta"):
        assert go(tmp_path, *more, f"--stage={stage}") == 0
    assert same(tensors(tmp_path, "meta_1"), tensors(tmp_path, "plain_1"))
    assert not same(tensors(tmp_path, "meta_1"), tensors(tmp_path, "reward_baseline"))


@pytest.mark.parametrize("extra, tolerance", [(["--train.accumulate=3"], 2e-4), (["--dtype=bf16"], 5e-3), (["--meta.second_order=true"], None)])
def test_accumulation_and_bf16_change_little_and_the_second_order_something(finished, tmp_path, extra, tolerance):
    more = [*ROUNDS, "--meta.rounds=1", "--meta.lr=1e-5", "--model.dropout=0"]
    for folder in ("a", "b"):
        for stage in ("sft", "reward"):
            assert go(tmp_path / folder, *more, f"--stage={stage}") == 0
    assert go(tmp_path / "a", *more, "--stage=meta") == 0
    run_b = [*more, *extra]
    if "dtype" in extra[0] or "accumulate" in extra[0]:  # sft and reward would be made again: take them as they are
        c = train.parse([*SMALL, f"--out_dir={tmp_path / 'b'}", *run_b])[0]
        train.make_meta(open_run(c), "meta_1")
    else:
        assert go(tmp_path / "b", *run_b, "--stage=meta") == 0
    a, b, start = tensors(tmp_path / "a", "meta_1"), tensors(tmp_path / "b", "meta_1"), tensors(tmp_path / "a", "reward_baseline")
    assert not same(a, start) and not same(a, b)
    if tolerance:
        assert all(torch.allclose(a[k], b[k], atol=tolerance) for k in a)


def test_up_to_date_rounds_are_skipped_and_a_change_reruns_only_what_follows(finished, capsys):
    assert go(finished, *ROUNDS, "--meta.arms=meta,plain,none") == 0
    assert "meta: up to date" in capsys.readouterr().out
    names = {name for name in plan.units(train.parse([*SMALL, *ROUNDS])[0])}
    c = [plan.dependencies(train.parse([*SMALL, *ROUNDS, "--meta.arms=meta,plain,none", f"--meta.eta={eta}"])[0]) for eta in (0.1, 0.2)]
    assert {"meta_1", "policy_meta_2"} <= names
    assert {u for u in c[0] if c[0][u] != c[1][u]} == {"meta_1", "policy_meta_1", "meta_2", "policy_meta_2", "evaluate"}


def test_a_round_that_was_stopped_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch):
    for stage in ("sft", "reward"):
        assert go(tmp_path, *ROUNDS, f"--stage={stage}") == 0
    steps = iter([False] * 2 + [True] * 2)
    with monkeypatch.context() as patch:
        patch.setattr(files, "should_stop", lambda: next(steps, False))
        assert go(tmp_path, *ROUNDS, "--stage=meta") == 130
    assert go(tmp_path, *ROUNDS, "--meta.rounds=1", "--stage=meta") == 0
    assert same(tensors(tmp_path, "meta_1"), tensors(finished, "meta_1"))


def test_the_meta_stage_alone_says_what_it_needs(tmp_path, capsys):
    assert go(tmp_path, "--stage=meta") == 0 and "meta: nothing to do, meta.rounds is 0" in capsys.readouterr().out
    assert go(tmp_path, *ROUNDS, "--stage=meta") == 2
    one_line(capsys, "--stage=meta: needs sft, which is missing; run --stage=sft first")


def test_out_of_distribution_half_of_the_prompts_is_practised_on_and_the_other_half_judged(tmp_path):
    assert go(tmp_path, *ROUNDS, "--meta.rounds=1", "--meta.domain=ood", "--world.ood=30") == 0
    read = lambda name: {json.loads(line)["prompt"] for line in (tmp_path / name).read_text().splitlines()}
    practised, judged = read("samples_meta_1.jsonl") | read("rollouts_meta_1.jsonl"), read("answers_ood.jsonl")
    assert practised and judged and not practised & judged
    assert all(any(word in p for word in ("plus", "minus", "Zorbish", "program")) for p in practised | judged)


def test_samples_are_rows_of_k_branches_that_end(finished):
    c = train.parse([*SMALL, *ROUNDS, f"--out_dir={finished}"])[0]
    run = open_run(c)
    rows, lines = metarm.sample_responses(run, "sft", run.train[0], seed=5)
    end = run.encoding._special_tokens["<|endoftext|>"]
    assert all(len(row.responses) == 3 and all(r[-1] == end and (r == end).sum() == 1 for r in row.responses) for row in rows)
    assert [[run.encoding.decode(r[:-1].tolist()) for r in row.responses] for row in rows] == [line["responses"] for line in lines]
    again, _ = metarm.sample_responses(run, "sft", run.train[0], seed=5)
    assert all(np.array_equal(x, y) for a, b in zip(rows, again) for x, y in zip(a.responses, b.responses))
    assert any(not np.array_equal(*row.responses[:2]) for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic of the experiments

def test_ranked_and_best_of_n_by_hand():
    rewards, gold = torch.tensor([[1.0, 2.0, 3.0], [5.0, 4.0, 4.5]]), torch.tensor([[1.0, 3.0, 2.0], [7.0, 7.0, 0.0]])
    assert shift.ranked(rewards, gold) == pytest.approx(3 / 5)  # right 12, 13, 13; wrong 23, 23; two of equal gold
    assert shift.best_of_n(rewards, gold) == (pytest.approx((2 + 7) / 2), pytest.approx((2 + 14 / 3) / 2))


def test_a_probe_finds_what_is_linear_and_nothing_in_noise():
    x = torch.randn(600, 5, generator=torch.Generator().manual_seed(0))
    assert shift.probe(x, x[:, 0] + x[:, 1] > 0) > 0.95
    assert abs(shift.probe(x, torch.rand(600, generator=torch.Generator().manual_seed(1)) < 0.5) - 0.5) < 0.1


def test_silhouette_by_hand():
    """Points 0, 1 against 10, 12 on a line: a = 1, 1, 2, 2; b = 11, 10, 9.5, 11.5."""
    expected = np.mean([10 / 11, 9 / 10, 7.5 / 9.5, 9.5 / 11.5])
    assert shift.silhouette(torch.tensor([[0.0], [1.0], [10.0], [12.0]]), [True, True, False, False]) == pytest.approx(expected)


def test_the_kinds_of_shift_are_what_they_are_called(finished):
    run = open_run(train.parse([*SMALL, *ROUNDS, f"--out_dir={finished}"])[0])
    kinds = shift.kinds_of_shift(run, n=60)
    assert list(kinds) == ["none", "unknown requests", "manners alone", "arithmetic", "translation", "programs"]
    assert all(len(rows) == len(gold) > 0 and (gold > 0).all() for rows, gold in kinds.values())  # annotators who never err
    text = lambda row: run.encoding.decode(row.prompt.tolist())
    unknown = [*list(shift.world.ADVICE)[4:], *list(shift.world.HARMFUL)[4:]]
    assert all(any(x in text(row) for x in unknown) for row in kinds["unknown requests"][0])
    assert not any(any(x in text(row) for x in unknown) for row in kinds["none"][0])
