"""Tables of numbers as plain text, and the report of results.json."""


def table(head: list, rows: list[list]) -> str:
    """Plain text with aligned columns; floats to three digits, None as an empty cell."""
    cells = [[str(c) for c in head]]
    for row in rows:
        cells.append([cell_text(c) for c in row])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0])]
        padded += [c.rjust(width) for c, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def cell_text(value):
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def report(results: dict) -> str:
    """The final tables -> text.  results: the dictionary of results.json, also of an older run"""
    blocks = [
        noise_block(results.get("noise", {})),
        reward_block(results),
        *vote_warnings(results.get("vote", {})),
        policy_block(results),
        rounds_block(results),
    ]
    return "\n".join(block for block in blocks if block)


def noise_block(noise):
    """Detection of wrong labels, a row a kind of error"""
    if not noise:
        return ""
    rows = []
    for name, n in noise.items():
        row = [f"{name} ({n['count']})", n["auroc_mean"], n["auroc_std"], n["auroc_single"]]
        row += [n["precision_mean"], n["recall_mean"]]
        row += [f"{n[f'precision_{s}']:.3f}/{n[f'recall_{s}']:.3f}" for s in ("std", "single")]
        rows.append(row)
    head = ["wrong labels found", "by mean", "by std", "by one model", "precision", "recall",
            "of std", "of one model"]
    note = ("(AUROC of mean strength, std and one member; then precision and recall in the share q "
            "most suspected by each)\n")
    if any(n["auroc_mean"] is None for n in noise.values()):
        note += "(AUROC is empty where all labels are right, or all wrong)\n"
    return f"{table(head, rows)}\n{note}"


def reward_block(results):
    """Accuracy and calibration of the vote and of each reward model, a row a data set"""
    rows = []
    for name, sets in {"vote": results.get("vote", {}), **results.get("reward", {})}.items():
        for where, r in sets.items():
            low, high = r["accuracy_interval"]
            rows.append([f"{name} on {where}", r["pairs"], r["accuracy"], f"{low:.3f}-{high:.3f}",
                         r["longer_wins"], r.get("gold_accuracy"), r["nll"], r["ece"]])
    if not rows:
        return ""
    head = ["reward model", "pairs", "accuracy", "95 %", "longer", "gold acc.", "nll", "ece"]
    note = ("(accuracy by the data's labels; chance is 0.5; longer: always preferring the longer "
            "answer; gold acc.: by the true quality)\n")
    return f"{table(head, rows)}\n{note}"


def vote_warnings(vote):
    """One text for each data set on which the vote may be no better than length or chance"""
    warnings = []
    for where, r in vote.items():
        baseline = max(r["chance"], r["longer_wins"])
        if r["accuracy_interval"][0] > baseline:
            continue
        warnings.append(
            f"warning: on {where}, the vote agrees with {r['accuracy']:.1%} of the labels, not "
            f"significantly more than length alone ({r['longer_wins']:.1%}) or chance:\n"
            f"low strength then says more about the voters than about the labels. More pairs, more "
            f"ensemble.epochs or a larger model may help.\n")
        low, high = r["accuracy_interval"]
        if high < r["chance"]:
            warnings.append(
                f"warning: on {where}, the vote agrees with surely less than half of the labels, "
                f"which it has not seen (95 %: {low:.1%} to {high:.1%}); check that chosen and "
                f"rejected, or the sign of a preference, are not reversed there\n")
    return warnings


def policy_block(results):
    """Judge's score of each policy, and its comparison with the SFT model"""
    if not results.get("policy"):
        return ""
    rows = []
    for name, p in results["policy"].items():
        win, lose = p.get("win"), p.get("lose")
        net = None if win is None else win - lose
        rows.append([name, p["judge"], win, p.get("tie"), lose, net, p["kl"], p["length"]])
    head = [f"policy, judged by {results['judge']}", "score", "win", "tie", "lose", "win - lose",
            "kl", "length"]
    note = ("(against the SFT model's answer to the same prompt; kl in nats an answer, length in "
            "tokens)")
    return f"{table(head, rows)}\n{note}"


def rounds_block(results):
    """Comparison of each round's policy with plain PPO, in and out of distribution"""
    rows = []
    for key, where in (("policy", ""), ("policy_ood", ", out of distribution")):
        for name, p in results.get(key, {}).items():
            for other, w in p.items():
                if other.startswith("against "):
                    net = w["win"] - w["lose"]
                    rows.append([f"{name}{where}", w["win"], w["tie"], w["lose"], net])
    if not rows:
        return ""
    return "\n" + table(["rounds, against plain PPO", "win", "tie", "lose", "win - lose"], rows)
