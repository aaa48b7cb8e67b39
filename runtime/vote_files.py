"""What the strength stage writes and prints: strength.jsonl, suspect pairs."""
import textwrap

from strength import VERDICTS, groups, verdicts


def strength_lines(run, mean, std, labels):
    """Lines of strength.jsonl, one a training pair in input order; p of a dropped pair is null"""
    group = groups(mean, run.cfg.evaluate.groups)
    columns = [column.tolist() for column in (mean, std, group, *labels)]
    for pair, m, s, g, swap, p, margin in zip(run.train.pairs, *columns):
        line = {
            "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected,
            "mean": m, "std": s, "group": g, "method": run.cfg.strength.method,
            "swap": swap, "p": p, "margin": margin,
        }
        if pair.margin is not None:
            line["given_margin"] = pair.margin
        line["source"] = pair.source
        yield line


def print_suspects(pairs, mean, std, n):
    """Count the verdicts and print the n pairs of lowest mean strength.

    mean, std: (N,) of the vote on the pairs
    """
    counts = verdicts(mean, std).bincount(minlength=len(VERDICTS)).tolist()
    summary = ", ".join(f"{count:,} are {name}" for name, count in zip(VERDICTS, counts))
    print(
        f"strength: of {len(pairs):,} labels {summary} "
        f"(mean strength below, within, above one std of zero)"
    )
    for rank, i in enumerate(mean.argsort(stable=True)[:n].tolist(), 1):
        pair = pairs[i]
        print(
            f"{rank:4}. {pair.source}: mean {mean[i]:+.2f}, std {std[i]:.2f}, "
            f"prompt: {shorten(pair.prompt, 90)}"
        )
        print(f"        chosen:   {shorten(pair.chosen, 110)}")
        print(f"        rejected: {shorten(pair.rejected, 110)}")


def shorten(text, width):
    """The last human turn, or the whole text without one, on one line"""
    last_turn = text.rsplit("\n\nHuman:", 1)[-1].removesuffix("\n\nAssistant:")
    return textwrap.shorten(last_turn, width, placeholder=" …")
