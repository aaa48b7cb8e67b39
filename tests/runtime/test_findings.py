"""Findings of the audit: reversed labels, marks that give a side away, contradictions; none on real
data or on the built-in world."""
import json
import random
from pathlib import Path

import pytest
from helpers import HH_SMALL, ROOT
from small_runs import opened

import train
import world
from data import Pair, pairs_of_world
from formats.pairs import read_pairs
from runtime import findings
from runtime.findings import (
    contradictions,
    find_all,
    joined_answers,
    marks,
    reversed_labels,
    wilson,
)
from tokenizer import EOS, Tokenizer, train_tokenizer

DATA = Path(ROOT).parent / "shared" / "data"
WORDS = "the a one two three red blue green cat dog runs sits eats sees over under with".split()


def sentence(rng, n=7):
    return " ".join(rng.choices(WORDS, k=n))


def plain_pairs(n, mark=lambda chosen, rejected, i: (chosen, rejected), seed=0):
    """n pairs of random words.  mark: (chosen, rejected, number) -> the texts of a pair"""
    rng = random.Random(seed)
    pairs = []
    for i in range(n):
        prompt = f"\n\nHuman: {sentence(rng)}\n\nAssistant:"
        chosen, rejected = mark(f" {sentence(rng)}.", f" {sentence(rng)}.", i)
        pairs.append(Pair(prompt, chosen, rejected, source=f"a:{i + 1}", index=i))
    return pairs


# --------------------------------------------------------------------------------------------------
# Labels reversed as a whole


def pairs_by_length(longer, shorter, equal=0):
    pairs = [Pair("p", "long", "a")] * longer + [Pair("p", "a", "long")] * shorter
    return pairs + [Pair("p", "a", "b")] * equal


def test_wilsons_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for count, n in ((0, 1), (1, 1), (3, 10), (450, 1000), (999, 1000)):
        interval = stats.binomtest(count, n).proportion_ci(0.95, "wilson")
        assert wilson(count, n) == pytest.approx((interval.low, interval.high))


def test_reversed_labels_are_one_line_where_the_share_is_surely_below_half():
    line, = reversed_labels(pairs_by_length(380, 620))
    assert "the longer answer is chosen in 38.0% of 1,000 pairs (95 %: 35.0% to 41.0%)" in line
    assert "chosen and rejected, or the sign of a preference, are not reversed" in line
    assert "refusals" in line
    assert reversed_labels(pairs_by_length(468, 532))  # up to 49.9 %
    assert not reversed_labels(pairs_by_length(470, 530))  # up to 50.1 %
    assert not reversed_labels(pairs_by_length(620, 380))


def test_answers_of_one_length_say_nothing_of_reversed_labels():
    assert not reversed_labels(pairs_by_length(470, 530, equal=1000))
    assert reversed_labels(pairs_by_length(468, 532, equal=1000))
    assert not reversed_labels(pairs_by_length(0, 0, equal=10))
    assert not reversed_labels([])


# --------------------------------------------------------------------------------------------------
# Marks of one side


@pytest.mark.parametrize("mark, expected", [
    (lambda c, r, i: (c, r[:-1] + "!"),
     ["chosen ends in '.' and rejected does not", "rejected ends in '!' and chosen does not"]),
    (lambda c, r, i: (c + "\n", r), ["chosen ends with the blanks '\\n' and rejected does not"]),
    (lambda c, r, i: (c, r[1:]), ["chosen begins with the blanks ' ' and rejected does not"]),
    (lambda c, r, i: (" <think></think>" + c, r),
     ["chosen begins with '<think></think>' and rejected does not"]),
    (lambda c, r, i: (c, f" <think>{i}</think>" + r),
     ["rejected contains '</think>' and chosen does not"]),
    (lambda c, r, i: (c, f" {i}\n```" + r), ["rejected contains '```' and chosen does not"]),
    (lambda c, r, i: (" Sure, I can help." + c, r),
     ["chosen begins with the sentence 'Sure, I can help.' and rejected does not"]),
    (lambda c, r, i: (c, r + " Is this fine?"),
     ["rejected ends with the sentence 'Is this fine?' and chosen does not"]),
    (lambda c, r, i: (f"{c} Then Kindly {i}.", r),
     ["chosen contains the word 'kindly' and rejected does not"]),
])
def test_a_mark_is_named(mark, expected):
    found = marks(plain_pairs(400, mark))
    text = "\n".join(found)
    for line in expected:
        assert f"{line}: 400 of 400 pairs where one of them does" in text


def test_one_mark_is_one_line():
    """Its words, its parts and its sentence are not listed again."""
    found = marks(plain_pairs(400, lambda c, r, i: (" Sure, I can help." + c, r)))
    assert len(found) == 1
    found = marks(plain_pairs(400, lambda c, r, i: (" <think> </think>" + c, r)))
    assert found == ["chosen begins with '<think>' and rejected does not: 400 of 400 pairs where "
                     "one of them does"]


def test_marks_of_the_beginning_and_of_the_end_are_two_lines():
    found = marks(plain_pairs(400, lambda c, r, i: (" Sure, I can help." + c[:-1], r)))
    assert [line.split(" '")[0] for line in found] == [
        "chosen begins with the sentence", "rejected ends in"]
    found = marks(plain_pairs(400, lambda c, r, i: (f" Sure, I can help.{c}\n", r)))
    assert [line.split(" '")[0] for line in found] == [
        "chosen ends with the blanks", "chosen begins with the sentence"]


def with_mark(total, marked, wrong=0):
    """The first `marked` pairs have a mark on one side, the rejected side in `wrong` of them."""
    def mark(chosen, rejected, i):
        if i < wrong:
            return chosen, rejected + " ok"
        return (chosen + " ok" if i < marked else chosen), rejected
    return marks(plain_pairs(total, mark))


def test_a_mark_decides_nearly_always():
    text = "\n".join(with_mark(400, marked=382, wrong=2))
    assert "chosen ends in 'k' and rejected does not: 380 of 382 pairs" in text
    assert with_mark(1000, marked=1000, wrong=20)
    assert not with_mark(1000, marked=1000, wrong=40)  # .96 is not surely above .95


def test_a_mark_covers_a_share_of_the_pairs():
    assert with_mark(4000, marked=210)
    assert not with_mark(4000, marked=190)


def test_a_word_anywhere_may_have_a_meaning_and_covers_more():
    def mark(share):
        def with_word(chosen, rejected, i):
            return (f"{chosen} Kindly {i}." if i < 1000 * share else chosen), f"{rejected} {i}."
        return with_word

    assert "chosen contains the word 'kindly'" in "".join(marks(plain_pairs(1000, mark(0.27))))
    assert not marks(plain_pairs(1000, mark(0.23)))


def test_few_pairs_show_no_mark():
    """20 of 20 are nothing, when many features were looked at."""
    assert not with_mark(40, marked=40)
    assert with_mark(200, marked=200)


def test_the_bound_is_the_exact_one_for_all_features_tested():
    stats = pytest.importorskip("scipy.stats")
    for count, n, num_tested in ((200, 200, 1), (380, 382, 50), (96, 100, 1), (120, 120, 100)):
        level = 1 - 0.05 / num_tested
        low = stats.binomtest(count, n).proportion_ci(level, "exact").low
        assert findings.surely_above(count, n, num_tested) == (low > 0.95)


def test_marks_are_counted_in_all_pairs_and_looked_for_in_some(monkeypatch):
    monkeypatch.setattr(findings, "SAMPLE", 300)
    calls = []
    features = findings.features

    def counted(text, *more):
        calls.append(text)
        return features(text, *more)

    monkeypatch.setattr(findings, "features", counted)
    pairs = plain_pairs(1000, lambda c, r, i: (c, r[:-1] + "!"))
    assert any("1,000 of 1,000 pairs" in line for line in marks(pairs))
    calls.clear()
    assert not marks(plain_pairs(1000))
    assert len(calls) == 600


def test_no_more_than_a_few_marks_are_listed():
    def several(chosen, rejected, i):
        words = [f"w{j}x" for j in range(40) if (i * 7 + j * 3) % 10 < 3]
        return f"{chosen} {i} {' '.join(words)} {i}", f"{rejected} {i} z {i}"

    found = marks(plain_pairs(3000, several))
    assert len(found) == findings.MAX_LINES + 1
    assert found[-1].endswith("more marks like these")


@pytest.mark.parametrize("texts", [("", "a."), (" ", "a."), ("", ""), ("\n", " ")])
def test_answers_without_text_are_no_error(texts):
    assert isinstance(marks([Pair("p", *texts)] * 200), list)
    assert marks([]) == []


# --------------------------------------------------------------------------------------------------
# The same pair with both labels


def test_contradictions_name_every_line():
    pairs = [
        Pair("p", "a", "b", source="f:1"), Pair("p", "b", "a", source="f:3"),
        Pair("q", "a", "b", source="f:4"), Pair("q", "a", "b", source="f:5"),
        Pair("p", "a", "b", source="g:7"), Pair("r", "a", "a", source="g:8"),
    ]
    assert contradictions(pairs) == [
        "the same pair with opposite labels: f:1, g:7 against f:3",
    ]
    assert find_all("train", pairs)[-1].startswith("train: the same pair with opposite labels")


def test_the_first_contradictions_are_listed_and_the_others_counted():
    pairs = []
    for i in range(9):
        pairs += [Pair(f"p{i}", "a", "b", source=f"f:{2 * i}")] * (7 if i == 0 else 1)
        pairs += [Pair(f"p{i}", "b", "a", source=f"f:{2 * i + 1}")]
    lines = contradictions(pairs)
    assert lines[0].endswith("f:0, f:0, f:0 and 4 more against f:1")
    assert len(lines) == 6 and lines[-1] == "4 more pairs with opposite labels"


# --------------------------------------------------------------------------------------------------
# No false alarm

REAL = [*sorted((DATA / "hh").glob("*.jsonl.gz")), DATA / "ukp_votes.jsonl.gz"]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_data_have_no_marks(path):
    if not path.exists():
        pytest.skip("real data are not here")
    pairs = read_pairs(str(path), say=lambda line: None)
    assert marks(pairs) == []
    marked = [Pair(p.prompt, p.chosen, f"{p.rejected.rstrip('.!')}!") for p in pairs]
    assert any("rejected ends in '!'" in line for line in marks(marked))


def test_real_labels_that_are_reversed_are_found():
    path = DATA / "hh" / "helpful-base.jsonl.gz"
    if not path.exists():
        pytest.skip("real data are not here")
    pairs = read_pairs(str(path))
    assert not reversed_labels(pairs)
    assert reversed_labels([Pair(p.prompt, p.rejected, p.chosen) for p in pairs])


@pytest.mark.parametrize("noise", [world.Noise(), world.Noise(flip=0.0)])
def test_the_built_in_world_has_no_marks_and_is_not_reversed(noise):
    rows, _ = world.pairs(3000, "0", noise)
    pairs = pairs_of_world(rows, "world")
    assert marks(pairs) == [] and reversed_labels(pairs) == []


# --------------------------------------------------------------------------------------------------
# Prompt and answer as one text


@pytest.mark.parametrize("template", ["hh", "chatml"])
def test_answers_whose_tokens_depend_on_the_prompt_are_counted(template):
    """Against the tokens of every whole text"""
    hi = "\n\nHuman: Hi"
    ends = ("\n\nAssistant:", "\n\nAssistant: Well", "\n\nAssistant: Well\n", "")
    answers = (" Yes.", "Yes.", "!", "  Yes.", "\nYes.", "", "s it is.")
    texts = [(hi + end, answer) for end in ends for answer in answers]
    more = ["Wells", "WellYes", "a\n  b"] * 99
    ours = train_tokenizer([prompt + answer for prompt, answer in texts] * 9 + more, 330)
    special = {EOS: ours.eos_id, "<|im_start|>": 330, "<|im_end|>": 331}
    ours = Tokenizer(ours.pattern, ours.ranks, special, EOS, "", template)
    count = 0
    for prompt, answer in texts:
        answer = answer if template == "hh" else answer.strip()
        tokens = ours.encode_dialogue(prompt) + ours.encode_text(answer)
        text = ours.decode(ours.encode_dialogue(prompt)) + answer
        count += ours.encoding.encode(text, allowed_special="all") != tokens
    assert 0 < count < len(texts) - 2
    line, = joined_answers([*texts, ("", "Yes")], ours)
    assert line.startswith(f"{count} of {len(texts) + 1} answers ")
    assert joined_answers(texts[:1], ours) == []


def test_the_audit_of_a_run_counts_them_by_its_own_tokenizer(tmp_path):
    lines = []
    for i in range(30):
        prompt = f"\n\nHuman: answer:yes or no, {i}?\n\nAssistant:"
        lines.append(json.dumps({"prompt": prompt, "chosen": "yes", "rejected": " no"}) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(lines))
    run = opened(tmp_path / "out", f"--data.train={tmp_path / 'a.jsonl'}", small=HH_SMALL)
    train.make_tokenizer(run)
    train.audit_data(run)
    found = run.load_json("audit.json")["findings"]
    n = len(run.pairs["valid"])
    assert found[-1].startswith(f"valid: {n} of {2 * n} answers have other tokens where prompt and")
