"""The votes on the labels: who casts them, where they are kept, and whether they can be had.

Voters are the members of the ensemble, linear heads on frozen states (labels/voters.py) or a file
(labels/given.py).  gaps.pt keeps their votes.
M voters, K folds, N training pairs, Nv validation pairs.
"""
import torch

from common import file_weights, member_names, reward_diffs
from config import ConfigError
from data import choose_folds
from labels import trust
from runtime import early_stopping
from strength import strength


def collect_votes(run):
    """Reward differences of all voters -> {"train": (M, N), "valid": (M, Nv), ...}

    "unseen", with folds: of the voters that were not trained on the pair, (M / K, N)
    "voter" and "l2", of voters on states: as in labels/voters.py
    """
    cfg = run.cfg
    if cfg.strength.votes:
        from labels import given
        return given.read_votes(run)
    if cfg.ensemble.voters == "states":
        from labels import voters
        votes = voters.first_vote(run, member_folds(run))
        voters.print_voters(run, votes)
        return {**votes._asdict(), "unseen": votes.train}
    return member_diffs(run)


def member_diffs(run):
    """The members' votes -> {"train", "valid"}, with folds also "unseen"; ensemble.vote says which
    of them vote on the training pairs"""
    scored = score_members(run, "strength", member_names(run.cfg), ("train", "valid"))
    diffs = {key: torch.stack(columns) for key, columns in scored.items()}
    if run.cfg.ensemble.folds:
        diffs["unseen"] = unseen_diffs(diffs["train"], member_folds(run), run.cfg.ensemble.folds)
        if run.cfg.ensemble.vote == "unseen":
            diffs["train"] = diffs["unseen"]
    return diffs


def score_members(run, work, names, keys):
    """Reward differences of saved reward models -> {key: [(N,) of each]}

    work: name of the work in progress, whose checkpoint keeps them; keys: of run.train, run.valid
    """
    columns = run.resume(work, {}) or {"step": 0, **{key: [] for key in keys}}
    for name in names[columns["step"]:]:
        for key in keys:
            columns[key].append(reward_diffs(run, name, getattr(run, key).rows))
        columns["step"] += 1
        if run.should_save():
            run.save_checkpoint(work, {}, **columns)
    return {key: columns[key] for key in keys}


def member_folds(run):
    e = run.cfg.ensemble
    fold, _ = choose_folds(run.train.pairs, e.folds, run.cfg.seed, e.fold_by)
    return torch.from_numpy(fold)


def unseen_diffs(diffs, fold, k):
    """Of the members that left a pair's fold out: member m left out fold m mod K.

    diffs: (M, N), fold: (N,) -> (M / K, N)
    """
    by_fold = diffs.view(len(diffs) // k, k, -1)
    return by_fold[:, fold, torch.arange(diffs.shape[1])]


# --------------------------------------------------------------------------------------------------
# gaps.pt


def check_votes(run):
    """Raise ConfigError unless gaps.pt is the vote of the present members."""
    if run.dry_run and run.is_selected("strength"):
        return  # the strength stage comes first
    record = run.read_record("strength")
    remedy = "run --stage=strength first, or leave --stage out"
    if record is None:
        raise ConfigError(f"{run.path('gaps.pt')}: the members have not voted yet; {remedy}")
    depends = record["depends"]
    if run.cfg.ensemble.folds and depends.get("ensemble.vote") != run.cfg.ensemble.vote:
        raise ConfigError(f"{run.path('gaps.pt')}: was made under another ensemble.vote; {remedy}")
    for name in member_names(run.cfg):
        if depends.get(f"input {name}") != run.fingerprint(name):
            raise ConfigError(f"{run.path('gaps.pt')}: is not the vote of {name} as it is now; "
                              f"{remedy}")


def load_votes(run, keys=("train", "valid")):
    """gaps.pt: reward differences of the members.  Raises ConfigError if it is of other members,
    OSError if its pairs under these keys are others."""
    check_votes(run)
    diffs = run.load_tensors("gaps.pt")
    remedy = "delete it and run the same command again"
    if run.cfg.strength.votes and isinstance(diffs, dict) and "valid" not in diffs:
        keys = [key for key in keys if key != "valid"]
    for key in keys:
        encoded = getattr(run, key)  # run.train, run.valid
        rows = diffs.get(key) if isinstance(diffs, dict) else None
        if not isinstance(rows, torch.Tensor) or rows.dim() != 2:
            raise OSError(f"{run.path('gaps.pt')}: has no votes on the pairs of {key}; {remedy}")
        if diffs[key].shape[1] != len(encoded.pairs):
            raise OSError(f"{run.path('gaps.pt')}: has {diffs[key].shape[1]} pairs of {key}, the "
                          f"data {len(encoded.pairs)}; {remedy}")
        if not diffs[key].isfinite().all():
            raise OSError(f"{run.path('gaps.pt')}: holds numbers that are not finite; {remedy}")
    return diffs


# --------------------------------------------------------------------------------------------------
# The self-test: the same voters on copies of the labels with planted flips


def planted_flips(pairs, cfg):
    """The flips of each self-test -> [(N,) bool].  Raises DataError where the pairs are too few"""
    return trust.draw_planted(pairs, cfg.clean.flips, cfg.clean.tests, cfg.seed)


def votes_on_copies(run, diffs):
    """The voters of each self-test, trained anew on a copy with planted flips -> [trust.Copy]"""
    cfg = run.cfg
    if not cfg.clean.tests:
        return []
    flips = planted_flips(run.train.pairs, cfg)
    signs = [torch.where(flipped, -1.0, 1.0) for flipped in flips]
    if cfg.strength.votes:  # they know nothing of these labels
        votes = [strength(diffs["train"])[0] * sign for sign in signs]
    elif cfg.ensemble.voters == "states":
        from labels import voters
        anew = voters.votes_on_copies(run, member_folds(run), signs, diffs["voter"], diffs["l2"])
        votes = [strength(of_copy)[0] for of_copy in anew]
    else:
        votes = [vote * sign for vote, sign in zip(votes_of_copies(run), signs)]
    return [trust.Copy(*pair) for pair in zip(flips, votes)]


def votes_of_copies(run):
    """Mean vote of the members trained on each copy, in the direction of the given labels -> [(N,)]
    """
    cfg = run.cfg
    names = []
    for copy in range(cfg.clean.tests):
        names += members_of_copy(cfg, copy)
    columns = score_members(run, "clean", names, ("train",))["train"]
    votes = []
    for of_copy in torch.stack(columns).split(cfg.ensemble.members):
        if cfg.ensemble.folds and cfg.ensemble.vote == "unseen":
            of_copy = unseen_diffs(of_copy, member_folds(run), cfg.ensemble.folds)
        votes.append(strength(of_copy)[0])
    return votes


def members_of_copy(cfg, copy):
    return [name.replace("member", f"planted_{copy}") for name in member_names(cfg)]


# --------------------------------------------------------------------------------------------------
# Before any work: can there be votes?


def check_labels(run):
    """Raise DataError where given votes or decisions cannot be read, a record cannot be written
    back, or the pairs are too few for the self-test."""
    cfg = run.cfg
    if cfg.strength.votes:
        from labels import given
        given.read_lines(cfg.strength.votes)
    if cfg.data.decisions:
        from labels import review
        review.read_decisions(cfg.data.decisions)
    if cfg.data.train != ("world",):
        from labels import outputs
        outputs.check_records(run.pairs["train"])
    if cfg.clean.tests:
        planted_flips(run.pairs["train"], cfg)


def check_folds(run):
    """Raise DataError where the pairs cannot make the folds; say so where prompts are too few."""
    e = run.cfg.ensemble
    _, fold_by = choose_folds(run.pairs["train"], e.folds, run.cfg.seed, e.fold_by)
    if fold_by != e.fold_by and run.slot == 0:
        print(f"data: note: fewer first human turns than ensemble.folds = {e.folds}; folds are "
              "made by pair, so that a voter has seen other pairs of the same prompt")


def check_kept_pairs(run):
    """As check_labels and check_folds, once it is known which pairs are kept, and before the
    training: those that are dropped may have been needed.  Raises DataError, or ConfigError where
    these weigh nothing, or none or all of them are held out"""
    cfg = run.cfg
    if run.dry_run or not any(known.reason for known in run.known.values()):
        return
    if cfg.ensemble.folds:
        member_folds(run)
    if cfg.clean.tests:
        planted_flips(run.train.pairs, cfg)
    if cfg.data.weights:
        file_weights(run)
    if cfg.reward.methods and cfg.reward.evals_per_epoch:
        early_stopping.held_out(run)
