"""What an audit finds besides numbers, a line each: reversed labels, marks, contradictions, and
answers whose tokens depend on whether they are read with their prompt.

A mark is a feature of the text that gives the side of an answer away, such as a full stop at the
end of every chosen answer: a reward model learns it and little else.
"""
import math
import random
import re
from collections import Counter
from statistics import NormalDist
from typing import Any

from tqdm import tqdm

from data import ASSISTANT_MARKER, Pair, pair_key
from tokenizer import marked_pieces

LEVEL = 0.95          # of intervals and tests
MAX_LINES = 5         # of marks, and of contradictions

# A mark separates the answers of at least MARK_PAIRS pairs and MARK_COVERAGE of all, and in surely
# more than MARK_SHARE of these it is on one and the same side
MARK_PAIRS = 20
MARK_COVERAGE = 0.05
WORD_COVERAGE = 0.25  # in place of MARK_COVERAGE, for a word anywhere: rarer ones have a meaning
MARK_SHARE = 0.95

# Marks are looked for in a sample of SAMPLE pairs, by limits that are lower by SLACK, and those
# found are then counted in all pairs
SAMPLE = 20_000
SLACK = 0.05
MAX_CANDIDATES = 100

BORDER = 16           # characters at the end of a prompt, and at the beginning of an answer
SAME_PAIRS = 0.9      # two features are one mark if this share of one's pairs has the other, too
MAX_CHARACTERS = 80   # of the texts that are features
MARKUP = re.compile(r"</?[A-Za-z|][^<>\s]{0,40}>|```|\*\*|\[/?[A-Z]+\]")
WORD = re.compile(r"\w+")
FIRST_SENTENCE = re.compile(r"[^\n.!?]*[.!?]*")
LAST_SENTENCE = re.compile(r"[^\n.!?]*[.!?]*$")

# Kinds of features.  Of those that name one mark the earlier is kept, if it is listed here:
IMPLIED_BY: dict[str, tuple[str, ...]] = {
    "begins with the blanks": (),
    "ends with the blanks": (),
    "begins with the sentence": (),
    "begins with": ("begins with the sentence",),
    "ends with the sentence": (),
    "ends in": ("ends with the sentence",),
}
IMPLIED_BY["contains"] = ("contains", *IMPLIED_BY)
IMPLIED_BY["contains the word"] = ("contains the word", *IMPLIED_BY)
KINDS = list(IMPLIED_BY)


def find_all(name: str, pairs: list[Pair], tokenizer: Any = None) -> list[str]:
    """The findings of one set, in lines that begin with its name.  Time is linear in the texts

    tokenizer: joined_answers are left out without one
    """
    found = [*reversed_labels(pairs), *marks(pairs), *contradictions(pairs)]
    if tokenizer is not None:
        texts = []
        for pair in pairs:
            texts += [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]
        found += joined_answers(texts, tokenizer)
    return [f"{name}: {line}" for line in found]


# --------------------------------------------------------------------------------------------------
# Labels reversed as a whole


def reversed_labels(pairs):
    """-> [] or one line, where the longer answer is chosen in surely less than half of the pairs

    Pairs of answers of one length are left out.
    """
    longer = 0
    shorter = 0
    for pair in pairs:
        longer += len(pair.chosen) > len(pair.rejected)
        shorter += len(pair.chosen) < len(pair.rejected)
    n = longer + shorter
    if not n:
        return []
    low, high = wilson(longer, n)
    if high >= 0.5:
        return []
    return [
        f"the longer answer is chosen in {longer / n:.1%} of {n:,} pairs (95 %: {low:.1%} to "
        f"{high:.1%}); check that chosen and rejected, or the sign of a preference, are not "
        "reversed; refusals among harmless answers look so as well"
    ]


def wilson(count, n, level=LEVEL):
    """Wilson's two-sided interval of a share, count of n > 0 -> low, high"""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = count / n
    centre = share + z ** 2 / (2 * n)
    half = z * (share * (1 - share) / n + z ** 2 / (4 * n ** 2)) ** 0.5
    scale = 1 + z ** 2 / n
    return (centre - half) / scale, (centre + half) / scale


# --------------------------------------------------------------------------------------------------
# Marks of one side


def marks(pairs):
    """-> a line for each feature that nearly always tells chosen and rejected apart"""
    size = min(SAMPLE, len(pairs))
    numbers = sorted(random.Random(0).sample(range(len(pairs)), size))
    candidates, num_tested = find_candidates(pairs, numbers)
    if not candidates:
        return []
    separated = separated_pairs(pairs, candidates)
    found = []  # (feature, side, numbers of its pairs)
    lines = []
    for feature in candidates:
        counts = [len(part) for part in separated[feature]]
        side = int(counts[1] > counts[0])
        n = sum(counts)
        if n < fewest_pairs(feature, len(pairs)) or not surely_above(counts[side], n, num_tested):
            continue
        with_it = set(separated[feature][side])
        if not is_implied(feature, side, with_it, found):
            found.append((feature, side, with_it))
            lines.append(mark_text(feature, side, counts))
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"{len(lines) - MAX_LINES} more marks like these"]
    return lines


def find_candidates(pairs, numbers):
    """Features that may be marks, in order of KINDS -> list, number of features that were tested

    numbers: of the pairs that are looked at
    """
    counts = (Counter(), Counter())  # pairs in which the chosen, the rejected answer alone has it
    for i in progress(numbers):
        chosen, rejected = features(pairs[i].chosen), features(pairs[i].rejected)
        counts[0].update(chosen - rejected)
        counts[1].update(rejected - chosen)
    num_tested = 0
    candidates = []  # (rank of its kind, -pairs, feature)
    for feature in counts[0].keys() | counts[1].keys():
        n = counts[0][feature] + counts[1][feature]
        if n < (1 - SLACK) * fewest_pairs(feature, len(numbers)):
            continue
        num_tested += 1
        larger = max(counts[0][feature], counts[1][feature])
        if larger / n > MARK_SHARE - SLACK:
            candidates.append((KINDS.index(feature[0]), -n, feature))
    return [feature for _, _, feature in sorted(candidates)[:MAX_CANDIDATES]], num_tested


def fewest_pairs(feature, n):
    """The number of pairs, of n, that a mark has to separate"""
    coverage = WORD_COVERAGE if feature[0] == "contains the word" else MARK_COVERAGE
    return max(MARK_PAIRS, coverage * n)


def features(text, with_words=True):
    """-> {(kind, value)} of an answer.  with_words: also the words anywhere, which take longest"""
    body = text.strip()
    if not body:
        return {("begins with the blanks", text[:MAX_CHARACTERS])} if text else set()
    found = {
        ("begins with", body.split(None, 1)[0][:MAX_CHARACTERS]),
        ("ends in", body[-1]),
    }
    leading = text[:len(text) - len(text.lstrip())]
    if leading:
        found.add(("begins with the blanks", leading[:MAX_CHARACTERS]))
    trailing = text[len(text.rstrip()):]
    if trailing:
        found.add(("ends with the blanks", trailing[:MAX_CHARACTERS]))
    first = matched(FIRST_SENTENCE.match(body))[:MAX_CHARACTERS]
    if " " in first:
        found.add(("begins with the sentence", first))
    last = matched(LAST_SENTENCE.search(body[-MAX_CHARACTERS:]))
    if " " in last:
        found.add(("ends with the sentence", last))
    found.update([("contains", token) for token in MARKUP.findall(text)])
    if with_words:
        found.update([("contains the word", word) for word in WORD.findall(text.lower())])
    return found


def matched(match):
    return match.group().strip() if match else ""


def separated_pairs(pairs, candidates):
    """-> {feature: (numbers of pairs whose chosen answer alone has it, and the rejected alone)}"""
    out = {feature: ([], []) for feature in candidates}
    wanted = set(candidates)
    with_words = any(kind == "contains the word" for kind, _ in candidates)
    for i in progress(range(len(pairs))):
        chosen = features(pairs[i].chosen, with_words) & wanted
        rejected = features(pairs[i].rejected, with_words) & wanted
        for feature in chosen - rejected:
            out[feature][0].append(i)
        for feature in rejected - chosen:
            out[feature][1].append(i)
    return out


def progress(numbers):
    """A bar, where the loop takes more than two seconds"""
    return tqdm(numbers, desc="audit", delay=2, leave=False, disable=None)


def surely_above(count, n, num_tested):
    """Whether the lower bound of the share, count of n, is above MARK_SHARE.

    The bound is exact and two-sided, at LEVEL for all num_tested features together (Bonferroni):
    so high a count must be rare where the share is MARK_SHARE.
    """
    if count <= MARK_SHARE * n:
        return False
    terms = []
    for misses in range(n - count + 1):
        log_ways = math.lgamma(n + 1) - math.lgamma(misses + 1) - math.lgamma(n - misses + 1)
        log_p = misses * math.log(1 - MARK_SHARE) + (n - misses) * math.log(MARK_SHARE)
        terms.append(math.exp(log_ways + log_p))
    return math.fsum(terms) < (1 - LEVEL) / 2 / num_tested


def is_implied(feature, side, with_it, found):
    """Whether marks found before are on this side of nearly all pairs that have this one there."""
    for (kind, _), other_side, others in found:
        in_both = len(with_it & others) >= SAME_PAIRS * len(with_it)
        if side == other_side and kind in IMPLIED_BY[feature[0]] and in_both:
            return True
    return False


def mark_text(feature, side, counts):
    kind, value = feature
    this, other = ("rejected", "chosen") if side else ("chosen", "rejected")
    return (f"{this} {kind} {value!r} and {other} does not: {counts[side]:,} of {sum(counts):,} "
            "pairs where one of them does")


# --------------------------------------------------------------------------------------------------
# The same pair with both labels


def contradictions(pairs):
    """-> a line for each of the first pairs that have both labels, with the places of all of them
    """
    lines = []
    for first, second in opposite_labels([pair_key(p) for p in pairs], [p.chosen for p in pairs]):
        sources = [list_sources([pairs[i].source for i in side]) for side in (first, second)]
        lines.append(f"the same pair with opposite labels: {sources[0]} against {sources[1]}")
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"{len(lines) - MAX_LINES} more pairs with opposite labels"]
    return lines


def opposite_labels(keys, chosen):
    """Pairs that have both labels -> [(numbers of its first label, numbers of the opposite)]

    keys: pair_key of each pair; chosen: the answer chosen
    """
    sides = {}  # pair_key -> {answer chosen: [number]}
    for i, (key, answer) in enumerate(zip(keys, chosen)):
        sides.setdefault(key, {}).setdefault(answer, []).append(i)
    return [tuple(labels.values()) for labels in sides.values() if len(labels) == 2]


def list_sources(sources, most=3):
    more = f" and {len(sources) - most} more" if len(sources) > most else ""
    return ", ".join(sources[:most]) + more


# --------------------------------------------------------------------------------------------------
# Prompt and answer as one text


def joined_answers(texts, tokenizer):
    """-> [] or one line, where the tokens of prompt and answer are not those of the whole text

    texts: [(prompt, answer)].  They differ where a word, such as ":Yes", begins in the prompt and
    goes on in the answer, never behind a blank that follows another character.
    """
    found = {}  # border -> whether it is joined
    count = 0
    for prompt, answer in tqdm(texts, desc="borders", delay=2, leave=False, disable=None):
        end, beginning = border_of(prompt, answer, tokenizer)
        if (end, beginning) not in found:
            found[end, beginning] = is_joined(end, beginning, tokenizer)
        count += found[end, beginning]
    if not count:
        return []
    return [
        f"{count:,} of {len(texts):,} answers have other tokens where prompt and answer are read "
        "as one text, as by transformers and vLLM, than here, where they are read apart; begin "
        "answers with a blank"
    ]


def border_of(prompt, answer, tokenizer):
    """-> end of the prompt, beginning of the answer, between two special tokens"""
    if tokenizer.template != "hh" and prompt:
        last = prompt[max(0, prompt.rfind(ASSISTANT_MARKER)):]
        written = "".join(piece for piece, _ in marked_pieces(last, tokenizer.template))
        prompt = re.split(r"<\|\w+\|>", written)[-1]
        answer = answer.strip()
    return prompt[-BORDER:], answer[:BORDER]


def is_joined(end, beginning, tokenizer):
    if not end or beginning[:1] == " " and not end[-1].isspace():
        return False
    apart = tokenizer.encode_text(end) + tokenizer.encode_text(beginning)
    return tokenizer.encode_text(end + beginning) != apart
