"""Views of answers, and voters on them, through a small pretrained model."""
import json

import numpy as np
import pytest
import torch
from helpers import go, one_line
from small_runs import STATES, opened, read_lines, words_of, write_base

import train
from data import Pair, Row, collate
from labels import views, voters
from labels.heads import mean_loss
from runtime import files
from runtime.run import open_run
from strength import auroc


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a pretrained model in hf/, and 120 pairs, of which ten are wrong, in mine.jsonl
    """
    return write_base(tmp_path_factory.mktemp("base"))


def words(base, *more):
    return [f"--data.train={base}/mine.jsonl", f"--model.init={base}/hf", *more]


@pytest.fixture(scope="module")
def voted(base, tmp_path_factory):
    """The folder of a run up to the vote"""
    out = tmp_path_factory.mktemp("voted")
    for stage in ("sft", "ensemble", "strength"):
        assert go(out, *words(base, f"--stage={stage}"), small=STATES) == 0
    return out


# ----------------------------------------------------------------------------------------------
# Answers and their states


def test_every_answer_to_a_prompt_is_computed_once():
    def row(prompt, *responses):
        return Row(np.array([prompt], np.uint16), tuple(np.array([r, 0], np.uint16)
                                                        for r in responses))

    rows = [row(1, 5, 6), row(2, 5, 6), row(1, 6, 7), row(1, 8, 5), row(1, 9, 5), row(1, 5, 10)]
    different, digests = views.different_answers(rows)
    computed = []
    for r in different:
        assert len(r.responses) <= views.MAX_BRANCHES
        computed += [(int(r.prompt[0]), int(response[0])) for response in r.responses]
    assert len(computed) == len(set(computed)) == 8
    for r, (chosen, rejected) in zip(rows, views.find_answers(digests, rows).tolist()):
        assert computed[chosen] == (int(r.prompt[0]), int(r.responses[0][0]))
        assert computed[rejected] == (int(r.prompt[0]), int(r.responses[1][0]))


def test_views_lie_at_shares_of_the_depth():
    assert views.state_views(30) == [
        (6, "last"), (9, "last"), (12, "last"), (15, "last"),
        (9, "mean"), (12, "mean"), (15, "mean"), (18, "mean"),
    ]
    assert {view.layer for view in views.state_views(2)} == {1}


def test_states_are_those_of_the_whole_model(voted, base):
    """Each answer alone after its prompt, in the whole model: what its blocks give."""
    run = opened(voted, *words(base), small=STATES)
    saved = files.load_tensors(voted / "views.pt")
    where = views.find_answers(saved["digests"], run.train.rows)
    from pretrained import weights
    whole = weights.load(f"{base}/hf", device="cpu", context=96).model
    seen = {}

    def keep(number):
        def hook(block, inputs, output):
            seen[number] = output[0]
        return hook

    for number, block in enumerate(whole.layers.values(), 1):
        block.register_forward_hook(keep(number))
    for i in (0, 5, 119):
        row = run.train.rows[i]
        for side in (0, 1):
            alone = collate([row.branches(side)])
            with torch.no_grad():
                whole(alone.tokens, None, alone.position)
            states = saved["states"][where[i, side]].float()
            for v, view in enumerate(views.state_views(whole.shape.layers)):
                answer = seen[view.layer][len(row.prompt):]
                expected = answer[-1] if view.pooling == "last" else answer.mean(0)
                # float16 keeps 11 bits; bf16, where the processor has it, 8
                tolerance = 2 ** -6 * float(expected.abs().max())
                torch.testing.assert_close(states[v], expected, rtol=0, atol=tolerance)


def test_an_answer_alone_has_the_states_it_has_beside_another(voted, base):
    """A row of one answer has no branches, and its prompt is no part of the mean."""
    run = opened(voted, *words(base), small=STATES)
    of_model = views.state_views(3)
    trunk = views.load_trunk(run, max(view.layer for view in of_model))
    rows = run.train.rows[:3]
    both = views.states_of_batch(run, trunk, rows, of_model)
    for side in (0, 1):
        alone = views.states_of_batch(run, trunk, [r.branches(side) for r in rows], of_model)
        tolerance = 2 ** -6 * float(both.abs().max())
        torch.testing.assert_close(alone[:, 0], both[:, side], rtol=0, atol=tolerance)


def test_states_are_computed_up_to_the_highest_view_only(base):
    """Of the model's three blocks, two."""
    run = opened("out/none", *words(base), small=STATES)
    trunk = views.load_trunk(run, max(v.layer for v in views.state_views(3)))
    assert len(trunk.layers) == 2


def test_batches_hold_all_rows_of_equal_numbers_of_answers():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(50):
        answers = tuple(np.zeros(rng.integers(1, 900), np.uint16)
                        for _ in range(rng.integers(1, 4)))
        rows.append(Row(np.zeros(5, np.uint16), answers))
    found = views.batches_of_rows(rows)
    assert sorted(np.concatenate(found).tolist()) == list(range(50))
    for index in found:
        assert len({len(rows[i].responses) for i in index}) == 1
        padded = len(index) * max(len(rows[i]) for i in index)
        assert padded <= views.BATCH_TOKENS or len(index) == 1


def test_a_stopped_computation_is_resumed(base, tmp_path, monkeypatch, voted, capsys):
    monkeypatch.setattr(views, "BATCH_TOKENS", 300)
    from runtime.run import Run
    calls = []

    def should_save(run):
        calls.append(1)
        from runtime import signals
        if len(calls) == 3:
            signals.stop_signal = 2
        return len(calls) == 3

    monkeypatch.setattr(Run, "should_save", should_save)
    assert go(tmp_path / "out", *words(base, "--stage=sft"), small=STATES) == 0
    assert go(tmp_path / "out", *words(base, "--stage=ensemble"), small=STATES) == 130
    assert (tmp_path / "out" / "views.ckpt").exists()
    monkeypatch.undo()
    monkeypatch.setattr(views, "BATCH_TOKENS", 300)
    assert go(tmp_path / "out", *words(base, "--stage=ensemble"), small=STATES) == 0
    assert "views: resumes at step 3" in capsys.readouterr().out
    ours = files.load_tensors(tmp_path / "out" / "views.pt")["states"]
    theirs = files.load_tensors(voted / "views.pt")["states"]
    # other batches round otherwise, by the precision in which states are computed
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2 ** -6, atol=0.1)


# ----------------------------------------------------------------------------------------------
# Surface and ratings


def test_surface_differences_change_sign_with_the_label():
    pairs = [Pair("q", *words_of(i)) for i in range(30)]
    turned = [Pair("q", *reversed(words_of(i))) for i in range(30)]
    ours = views.surface_differences(pairs)
    torch.testing.assert_close(views.surface_differences(turned), -ours)
    assert ours.shape[0] == 30 and ours.isfinite().all()


def test_words_tell_kind_from_rude():
    pairs = [Pair("q", *words_of(i)) for i in range(30)]
    diff = views.surface_differences(pairs)
    assert any((column > 0).all() for column in diff.T)


def test_ratings_need_answers_that_recur():
    assert views.rating_differences([Pair("q", f"a{i}", f"b{i}") for i in range(50)]) is None
    pairs = [Pair("q", f"a{i % 7}", f"b{i % 6}") for i in range(60)]
    diff = views.rating_differences(pairs)
    assert diff.shape == (60, 13)
    assert (diff.sum(1) == 0).all() and (diff.abs().sum(1) == 2).all()
    other_prompts = [Pair(f"q{i}", f"a{i % 7}", f"b{i % 6}") for i in range(60)]
    assert views.rating_differences(other_prompts) is None


# ----------------------------------------------------------------------------------------------
# The vote


def test_the_vote_finds_the_wrong_labels(voted):
    lines = read_lines(voted / "strength.jsonl")
    mean = torch.tensor([line["mean"] for line in lines])
    wrong = torch.tensor([i % 12 == 5 for i in range(120)])
    assert auroc(-mean, wrong) > 0.95
    gaps = files.load_tensors(voted / "gaps.pt")
    assert gaps["train"].shape == (len(gaps["voter"]), 120)
    torch.testing.assert_close(gaps["train"].mean(0), mean, rtol=1e-5, atol=1e-5)


def test_no_model_is_trained(voted):
    assert not {"sft.pt", "member_00.pt"} & {path.name for path in voted.iterdir()}


def test_a_label_does_not_move_its_own_vote(base, voted, tmp_path):
    """With the opposite labels in one fold, the votes on it are the opposite."""
    run = opened(voted, *words(base), small=STATES)
    from labels.votes import member_folds
    fold = member_folds(run)
    gaps = files.load_tensors(voted / "gaps.pt")
    sign = torch.where(fold == 1, -1.0, 1.0)
    again, = voters.votes_on_copies(run, fold, [sign], gaps["voter"], gaps["l2"])
    # the heads of other folds decide after how many steps all are done
    tolerance = 0.02 * float(gaps["train"].abs().max())
    torch.testing.assert_close(
        again[:, fold == 1], -gaps["train"][:, fold == 1], rtol=0, atol=tolerance)
    assert not torch.allclose(again[:, fold == 0], gaps["train"][:, fold == 0], atol=tolerance)


def test_voters_other_than_states_count_where_the_loss_is_lower():
    generator = torch.Generator().manual_seed(0)
    good = torch.rand(3, 200, generator=generator)
    better = 3 * torch.rand(1, 200, generator=generator)
    worse = -5 * torch.ones(1, 200)
    assert voters.choose(torch.cat((good, better, worse)), 3) == [0, 1, 2, 3]
    assert voters.choose(torch.cat((good, worse, better)), 3) == [0, 1, 2, 4]
    assert mean_loss(torch.zeros(5)) == pytest.approx(np.log(2))


def test_validation_pairs_get_the_mean_vote_of_all_heads(base, tmp_path):
    out = tmp_path / "out"
    more = ["--data.valid_share=0.3"]
    assert go(out, *words(base, *more), small=STATES) == 0
    gaps = files.load_tensors(out / "gaps.pt")
    run = opened(out, *words(base, *more), small=STATES)
    assert gaps["valid"].shape == (len(gaps["voter"]), len(run.valid.pairs))
    results = json.loads((out / "results.json").read_text())
    assert results["vote"]["valid"]["accuracy"] > 0.8


def test_states_are_kept_where_labels_or_folds_change(base, voted):
    found = reasons_of(voted, *words(base, "--ensemble.folds=3"))
    assert found["views"] == "" and "ensemble.folds" in found["strength"]
    found = reasons_of(voted, *words(base, "--model.context=80"))
    assert "model.context" in found["views"]


def reasons_of(out, *more):
    config, _ = train.parse_args([*STATES, *more, f"--out_dir={out}"])
    run = open_run(config)
    train.check_stages(run)
    return {name: known.reason for name, known in run.known.items()}


@pytest.mark.parametrize("change, message", [
    ("--model.init=scratch", "ensemble.voters = 'states': needs a pretrained model.init"),
    ("--ensemble.folds=0", "ensemble.folds = 0: ensemble.voters = states needs 2 or more"),
])
def test_settings_that_make_no_vote_are_one_line(base, tmp_path, capsys, change, message):
    assert go(tmp_path / "out", *words(base, change), small=STATES) == 2
    one_line(capsys, message)
