"""What the strength stage writes and prints: strength.jsonl, suspect pairs."""
import json
import math
import os

from data import DataError, Pair, pair_key
from runtime.findings import opposite_labels
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


def print_verdicts(mean, std):
    """How many labels are suspected wrong, ambiguous and strong.  mean, std: (N,) of the vote"""
    counts = verdicts(mean, std).bincount(minlength=len(VERDICTS)).tolist()
    summary = ", ".join(f"{count:,} are {name}" for name, count in zip(VERDICTS, counts))
    print(
        f"strength: of {len(mean):,} labels {summary} "
        f"(mean strength below, within, above one std of zero)"
    )


def print_suspects(pairs, mean, std, n):
    """The n pairs of lowest mean strength.  mean, std: (N,) of the vote on the pairs"""
    for rank, i in enumerate(mean.argsort(stable=True)[:n].tolist(), 1):
        pair = pairs[i]
        texts = (pair.prompt, pair.chosen, pair.rejected)
        print(suspect_text(rank, pair.source, float(mean[i]), float(std[i]), *texts))


def suspect_text(rank, source, mean, std, prompt, chosen, rejected):
    """A suspect pair in three lines, its answers shortened around their first difference"""
    chosen, rejected = shorten_answers(chosen, rejected, 110)
    return (
        f"{rank:4}. {source}: mean {mean:+.2f}, std {std:.2f}, prompt: {shorten(prompt, 90)}\n"
        f"        chosen:   {chosen}\n"
        f"        rejected: {rejected}"
    )


def shorten(text, width):
    """The last human turn, or the whole text without one, on one line"""
    last_turn = text.rsplit("\n\nHuman:", 1)[-1].removesuffix("\n\nAssistant:")
    return cut(" ".join(last_turn.split()), 0, width)


def shorten_answers(chosen, rejected, width, before=40):
    """Two answers, each on one line of about `width` characters that shows their first difference.

    before: characters of what they share that are shown in front of it
    Blanks are shown as they are, and the ends of lines as \\n, only where nothing else differs.
    """
    lines = [" ".join(text.split()) for text in (chosen, rejected)]
    if lines[0] == lines[1]:
        lines = [repr(text)[1:-1] for text in (chosen, rejected)]
    shared = len(os.path.commonprefix(lines))
    start = max(0, shared - before)
    if start:
        word = lines[0].find(" ", start, shared) + 1
        start = word or start
    return cut(lines[0], start, width), cut(lines[1], start, width)


def cut(text, start, width):
    """text[start:], at most width characters, with … where something is left out"""
    opening = "… " if start else ""
    rest = text[start:]
    room = width - len(opening)
    if len(rest) <= room:
        return opening + rest
    stop = room - len(" …")
    blank = rest.rfind(" ", stop // 2, stop + 1)  # none in a long word, or in Chinese
    return f"{opening}{rest[:stop if blank < 0 else blank]} …"


# --------------------------------------------------------------------------------------------------
# The suspects of a finished run


def print_suspects_of_file(path, n):
    """Print the n pairs of lowest mean in a strength.jsonl, and where any pair has both labels.

    Raises DataError, one line, if the file is not as train.py writes it.
    """
    records = read_strength(path)
    order = sorted(range(len(records)), key=lambda i: records[i]["mean"])  # stable, as in a run
    print(f"{path}: the {min(n, len(records)):,} of {len(records):,} pairs of lowest mean strength")
    for rank, i in enumerate(order[:n], 1):
        r = records[i]
        texts = (r["prompt"], r["chosen"], r["rejected"])
        print(suspect_text(rank, r["source"], r["mean"], r["std"], *texts))
    keys = [pair_key(Pair(r["prompt"], r["chosen"], r["rejected"])) for r in records]
    both = opposite_labels(keys, [r["chosen"] for r in records])
    if both:
        print(f"pairs with opposite labels: {len(both):,}")
    for sides in both:
        places = []
        for side in sides:
            with_mean = [f"{records[i]['source']} (mean {records[i]['mean']:+.2f})" for i in side]
            places.append(", ".join(with_mean))
        print(f"  {places[0]} against {places[1]}")


def read_strength(path):
    """The lines of strength.jsonl -> [dictionary].  Raises DataError"""
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                texts = [record[key] for key in ("prompt", "chosen", "rejected", "source")]
                numbers = [record[key] for key in ("mean", "std")]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise damaged(f"{path}:{number}") from None
            is_whole = all(isinstance(text, str) for text in texts)
            if not is_whole or not all(is_finite(number) for number in numbers):
                raise damaged(f"{path}:{number}")
            records.append(record)
    if not records:
        raise damaged(path)
    return records


def is_finite(value):
    return type(value) in (int, float) and abs(value) < math.inf


def damaged(place):
    return DataError(f"{place}: is not as train.py wrote it; delete the file, and run the command "
                     "that made it again")
