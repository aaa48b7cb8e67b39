"""The stage `clean`: self-test, share of wrong labels, what becomes of each label, and the files.

trust.json holds what is printed and its numbers, issues.csv a row a pair, cleaned.jsonl the pairs
as they come out, report.html the page on which a person reviews the suspects.
"""
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data import choose_folds
from labels import outputs, review, trust, views
from labels.heads import L2S, out_of_fold, principal_axes
from runtime import files
from runtime.audit import audit_text
from runtime.vote_files import print_suspects, print_verdicts
from strength import TREATMENTS, strength

Labels = tuple[Tensor, Tensor, Tensor]  # swap, p, margin of each pair

WORD_FOLDS = 5  # of the baseline on words, where the ensemble has no folds


class Assessment(NamedTuple):
    """What is known of the labels of N pairs, and what becomes of them."""
    mean: Tensor                       # (N,) of the vote
    std: Tensor                        # (N,)
    score: Tensor                      # (N,) probability that the label is the given one
    share: trust.Estimate              # of wrong labels
    test: trust.SelfTest | None        # None: no self-test
    decision: trust.Decision | None
    decided: list                      # by a person: "wrong", "right", "unsure" or ""
    action: list                       # "keep", "drop" or "exchange"


def assess(run, diffs: dict, copies: list[trust.Copy], labels: Labels) -> Assessment:
    """diffs: as in gaps.pt; copies: of the self-test, none where there is no self-test
    labels: (swap, p, margin) of strength.method, which decides where there is no self-test

    Raises DataError for decisions that are no file of the review page.
    """
    settings = run.cfg.clean
    pairs = run.train.pairs
    mean, std = strength(diffs["train"])
    score = trust.label_scores(mean)
    share = trust.share_wrong(score)
    decided = decisions_of_pairs(run)
    if not copies:
        action = treated_actions(*labels, decided)
        return Assessment(mean, std, score, share, None, None, decided, action)
    group = trust.groups_of_pairs(pairs)
    test = test_voters(run, copies, group)
    decision = trust.decide(
        mean, copies, test, share, settings.action, settings.drop_precision,
        trust.share_from_repeats(pairs), group)
    decision = trust.review(decision, decided, share, settings.action)
    action = trust.actions(decision, decided, settings.action)
    return Assessment(mean, std, score, share, test, decision, decided, action)


def write(run, found: Assessment, labels: Labels):
    """Write trust.json, issues.csv, cleaned.jsonl and report.html, and print what they say.

    Raises DataError for a record that JSON cannot hold.
    """
    cfg = run.cfg
    pairs = run.train.pairs
    columns = outputs.group_columns(pairs)
    groups = trust.doubt_by_group(found.mean, columns)
    lines = [*trust_lines(found, cfg), *group_lines(groups)]
    run.save_json("trust.json", {
        "text": lines,
        "self_test": as_json(found.test),
        "share_wrong": as_json(found.share),
        "decision": as_json(found.decision),
        "actions": {name: found.action.count(name) for name in trust.ACTIONS},
        "groups": groups,
    })
    called = found.decision.called if found.decision else None
    run.save_text("issues.csv", outputs.issues_csv(
        pairs, found.mean, found.std, found.score, found.action, found.decided, columns, called))
    has_margin = TREATMENTS[cfg.strength.method].margin
    margin = margins_after(labels, found.action)
    run.save_editable(
        "cleaned.jsonl", outputs.cleaned_lines(pairs, found.action, margin, has_margin))
    summary = [
        {"title": "How far to trust the suspects", "text": "\n".join(lines)},
        {"title": "Audit", "text": audit_text(run.load_json("audit.json"))},
    ]
    page = outputs.page(
        f"Labels of {', '.join(cfg.data.train)}",
        files.digest([outputs.pair_digest(pair) for pair in pairs]),
        pairs, found.mean, found.std, found.score, found.action, columns, groups, summary)
    run.save(review.write_page, "report.html", page)
    if run.slot == 0:
        for line in lines:
            tqdm.write(f"clean: {line}")
        if found.test is None:
            print_verdicts(found.mean, found.std)
        print_suspects(pairs, found.mean, found.std, cfg.strength.show)


# --------------------------------------------------------------------------------------------------
# The self-test


def test_voters(run, copies, group):
    """-> trust.SelfTest, with length and words as baselines.  group: of trust.groups_of_pairs"""
    baselines = {"length": trust.length_vote(run.train.pairs), "words": word_votes(run, copies)}
    return trust.self_test(copies, baselines, group, run.cfg.seed)


def word_votes(run, copies) -> list[Tensor]:
    """Votes out of fold of linear heads on length and words, fitted to each copy -> [(N,)]"""
    pairs = run.train.pairs
    e = run.cfg.ensemble
    folds = e.folds or WORD_FOLDS
    fold = torch.from_numpy(choose_folds(pairs, folds, run.cfg.seed, e.fold_by)[0])
    features = principal_axes(views.surface_differences(pairs))
    _, _, l2 = out_of_fold(features, torch.ones(len(pairs)), fold, L2S)
    out = []
    for copy in copies:
        sign = torch.where(copy.planted, -1.0, 1.0)
        out.append(out_of_fold(features, sign, fold, (l2,))[0].float())
    return out


# --------------------------------------------------------------------------------------------------
# Decisions and actions


def report_unused_decisions(run):
    """One line where the last run knew decisions that this one is not given."""
    record = run.read_record("clean")
    before = record["settings"].get("data.decisions") if record else ""
    if before and not run.cfg.data.decisions:
        tqdm.write(f"clean: note: your decisions in {before} are not used; add "
                   f"--data.decisions={before} to use them")


def decisions_of_pairs(run) -> list[str]:
    """A person's decision on each pair, "" where there is none; those of no pair are counted."""
    pairs = run.train.pairs
    path = run.cfg.data.decisions
    if not path:
        return [""] * len(pairs)
    by_key = {key: decision for (_, key), decision in review.read_decisions(path).items()}
    keys = [outputs.pair_digest(pair) for pair in pairs]
    missing = len(by_key.keys() - set(keys))
    if missing:
        tqdm.write(f"clean: warning: {missing} of {len(by_key)} decisions in {path} are about no "
                   "pair of these data")
    return [by_key.get(key, "") for key in keys]


def treated_actions(swap, p, margin, decided) -> list[str]:
    """What strength.method makes of each pair, where no person has decided"""
    out = []
    for is_swapped, is_dropped, decision in zip(swap.tolist(), p.isnan().tolist(), decided):
        action = "drop" if is_dropped else "exchange" if is_swapped else "keep"
        if decision in ("right", "wrong"):
            action = "keep" if decision == "right" else "exchange"
        out.append(action)
    return out


def margins_after(labels, action) -> Tensor:
    """Margins in the direction of the labels that come out -> (N,)"""
    swap, _, margin = labels
    as_given = torch.where(swap, -margin, margin)
    exchanged = torch.tensor([a == "exchange" for a in action])
    return torch.where(exchanged, -as_given, as_given)


# --------------------------------------------------------------------------------------------------
# In words


def trust_lines(found: Assessment, cfg) -> list[str]:
    """The self-test first, then how many labels are wrong, then what becomes of them"""
    test, share, decision, action = found.test, found.share, found.decision, found.action
    if test is None or decision is None:
        return ["no self-test (clean.tests = 0), so nothing says how far to trust the vote; "
                f"cleaned.jsonl follows strength.method = {cfg.strength.method}: "
                f"{count_text(action)}"]
    finder = "the given votes" if cfg.strength.votes else "voters trained anew"
    verdict = "surely better than length" if test.finds_flips else "NOT surely better than length"
    lines = [
        f"self-test: {test.flips:,} labels were flipped on copies, and {finder} find them "
        f"{verdict}, by an AUROC larger by {test.better['length']}",
        "  {:8}{:21}{:21}{}".format("", "AUROC", "average precision", "precision"),
    ]
    for name in ("vote", "length", "words"):
        numbers = (str(column[name]) for column in (test.auroc, test.ap, test.precision))
        lines.append("  {:8}{:21}{:21}{}".format(name, *numbers))
    lines.append(f"share of wrong labels: about {share.value:.1%}, between {share.low:.1%} and "
                 f"{share.high:.1%}; less where the voters share a bias, more where people err on "
                 "hard pairs")
    called = int(decision.called.sum())
    if called:
        bound = "" if decision.reviewed >= trust.MIN_REVIEWED else " at most"
        lines.append(f"{called:,} labels are called wrong; their precision is{bound} about "
                     f"{decision.precision.value:.2f} ({decision.precision.low:.2f}-"
                     f"{decision.precision.high:.2f})"
                     + ("" if not bound else ": people's errors are harder to see than flips"))
    num_decided = sum(
        decided == "wrong" and taken != "keep" for decided, taken in zip(found.decided, action))
    yours = f", {num_decided:,} of them by your decisions" if num_decided else ""
    lines.append(f"cleaned.jsonl: {count_text(action)}{yours}; {decision.reason}")
    if not called and not num_decided:
        lines.append("the suspects are listed for you to read: their votes alone do not say surely "
                     "enough that they are wrong")
    return lines


def count_text(action) -> str:
    changed = [f"{action.count(name):,} {past}" for name, past in
               (("drop", "dropped"), ("exchange", "exchanged")) if name in action]
    return ", ".join(changed) or "no label is changed"


def group_lines(groups, show=5) -> list[str]:
    """The groups that stand out, the most doubted first"""
    standing_out = [group for group in groups if group["stands_out"]]
    standing_out.sort(key=lambda group: -group["doubted"])
    lines = []
    for g in standing_out[:show]:
        lines.append(f"{g['column']} = {g['value']}: {g['doubted']:.1%} of {g['pairs']:,} labels "
                     f"are doubted ({g['low']:.1%}-{g['high']:.1%}), unlike the others")
    return lines


def as_json(value):
    """NamedTuples and dictionaries of them -> what JSON holds; tensors are left out"""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items() if not isinstance(v, Tensor)}
    return value
