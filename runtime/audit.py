"""Audit of preference data before training: sizes, lengths, duplicates, contradictory labels."""
import itertools
import re
from typing import Any

import numpy as np
from tqdm import tqdm

from data import ASSISTANT_MARKER, HUMAN_MARKER, SYSTEM_MARKER, Pair, pair_key, topic
from runtime import files


def audit(pairs: list[Pair], tokenizer: Any = None, contexts: tuple = ()) -> dict[str, float]:
    """Statistics of preference pairs -> {measure: number}

    tokenizer: token counts are left out without one
    contexts: context lengths, in tokens, to report the share of longer pairs for
    """
    chosen_of = {}  # pair_key -> answers chosen, one an occurrence of the pair
    for pair in pairs:
        chosen_of.setdefault(pair_key(pair), []).append(pair.chosen)
    out: dict[str, Any] = {
        "pairs": len(pairs),
        "different first human turns": len({topic(p) for p in pairs}),
        "characters of prompt (median)": median([len(p.prompt) for p in pairs]),
        "characters of chosen (median)": median([len(p.chosen) for p in pairs]),
        "characters of rejected (median)": median([len(p.rejected) for p in pairs]),
        "longer answer chosen": sum(map(longer_chosen, pairs)) / max(len(pairs), 1),
        "identical on both sides": sum(p.chosen == p.rejected for p in pairs),
        "the same pair again": len(pairs) - len(chosen_of),
        "the same pair with the opposite label": sum(map(contradictions, chosen_of.values())),
    }
    if tokenizer is not None:
        out |= token_statistics(pairs, tokenizer, contexts)
    out |= {
        "answers that differ in blanks alone": sum(map(differ_in_blanks, pairs)),
        "pairs with an empty answer": sum(map(has_empty_answer, pairs)),
        "pairs with an empty prompt": sum(not without_markers(p.prompt) for p in pairs),
    }
    return out


def median(values):
    return float(np.median(values)) if len(values) else 0.0


def longer_chosen(pair):
    """1 if the chosen answer is the longer one, 0 if the rejected is, 0.5 for equal lengths"""
    if len(pair.chosen) == len(pair.rejected):
        return 0.5
    return float(len(pair.chosen) > len(pair.rejected))


def contradictions(chosen):
    """Labels of one pair that must be wrong, the minority.  chosen: answer chosen by each label"""
    sides = set(chosen)
    if len(sides) == 1:
        return 0
    return min(chosen.count(side) for side in sides)


def differ_in_blanks(pair):
    """Whether two answers differ, and would not without their blanks and line ends."""
    if pair.chosen == pair.rejected:
        return False
    return "".join(pair.chosen.split()) == "".join(pair.rejected.split())


def has_empty_answer(pair):
    return not pair.chosen.strip() or not pair.rejected.strip()


def without_markers(prompt):
    """The texts of a prompt's turns, without the blanks around them"""
    for marker in (SYSTEM_MARKER, HUMAN_MARKER, ASSISTANT_MARKER):
        prompt = prompt.replace(marker, "")
    return prompt.strip()


def token_statistics(pairs, tokenizer, contexts):
    """Lengths of the rows that data.encode_row makes, before any prompt is truncated"""
    lengths = []
    for pair in tqdm(pairs, desc="tokens", delay=2, leave=False, disable=None):
        chosen = len(tokenizer.encode_text(pair.chosen))
        rejected = len(tokenizer.encode_text(pair.rejected))
        prompt = len(tokenizer.encode_text(pair.prompt))
        lengths.append(prompt + max(chosen, rejected) + 1)  # and eos
    totals = np.array(lengths)
    out = {"tokens of prompt and longer answer (median)": median(totals)}
    for context in contexts:
        share = float((totals > context).mean()) if len(totals) else 0.0
        out[f"share over {context} tokens (their oldest turns are cut)"] = share
    return out


def shared(sets: dict[str, list[Pair]]) -> dict[str, dict]:
    """Overlap of any two of {name: pairs} -> {"a and b": {"first human turns": n, "pairs": n}}"""
    turns = {name: {topic(p) for p in pairs} for name, pairs in sets.items()}
    keys = {name: {pair_key(p) for p in pairs} for name, pairs in sets.items()}
    out = {}
    for a, b in itertools.combinations(sets, 2):
        common_turns = len(turns[a] & turns[b])
        common_pairs = len(keys[a] & keys[b])
        out[f"{a} and {b}"] = {"first human turns": common_turns, "pairs": common_pairs}
    return out


def audit_table(sets, both={}, findings=()):
    """{name: audit(pairs)}, shared({name: pairs}) -> text; a column a set, a line for any two

    findings: further lines, of findings.find_all
    """
    names = list(sets)
    measures = list(sets[names[0]])
    cells = [["data", *names]]
    for measure in measures:
        cells.append([measure, *(number_text(sets[name][measure]) for name in names)])
    first = max(map(len, measures))
    widths = [max(map(len, column)) for column in zip(*cells)][1:]
    lines = []
    for row in cells:
        columns = [f"  {c.rjust(width)}" for c, width in zip(row[1:], widths)]
        lines.append(row[0].ljust(first) + "".join(columns))
    lines.insert(1, "-" * len(lines[0]))
    for pair_of_names, common in both.items():
        counts = ", ".join(f"{n:,} {unit}" for unit, n in common.items())
        lines.append(f"shared by {pair_of_names}: {counts}")
    return "\n".join([*lines, *findings])


def audit_text(result):
    """The audit as it is printed.  result: of audit.json, also one of an older version"""
    return audit_table(result["sets"], result["shared"], result.get("findings", []))


def number_text(value):
    return f"{value:.3f}" if isinstance(value, float) and value < 1 else f"{value:,.0f}"


def report_dropped(run, name, num_kept, dropped):
    """List dropped pairs, [(source, reason)], in dropped_NAME.jsonl; print a line a reason."""
    path = f"dropped_{name}.jsonl"
    lines = ({"source": source, "reason": reason} for source, reason in dropped)
    files.save_jsonl(run.path(path), lines)  # no output of the stage in work
    print(
        f"data: {name}: {num_kept:,} pairs kept, {len(dropped)} dropped, "
        f"all listed in {run.path(path)}"
    )
    by_reason = {}
    for source, reason in dropped:
        kind = re.sub(r"\d+", "n", reason)  # reasons differ by numbers alone
        by_reason.setdefault(kind, []).append((source, reason))
    for examples in by_reason.values():
        source, reason = examples[0]
        print(f"  {len(examples)} like {source}: {reason}")
