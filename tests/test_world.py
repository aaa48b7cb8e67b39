import dataclasses
import hashlib
import json
import math
import random

import pytest
from hypothesis import given, strategies as st

import world
from world import ASSISTANT, HELD_OUT_DOMAINS, HUMAN, TASKS, TRAIN_DOMAINS, Noise, gold, pairs

EXACT = Noise(temperature=0.0, flip=0.0, bias=0.0)  # labels that follow the gold reward
DOMAINS = TRAIN_DOMAINS + HELD_OUT_DOMAINS


def prompt_of(question):
    return f"{HUMAN}{question}{ASSISTANT}"


def gold_of(row):
    return gold(row["prompt"], row["chosen"]) - gold(row["prompt"], row["rejected"])


# ---------------------------------------------------------------------------------------------------------------------
# The gold reward

CASES = {  # domain: question, right answers, wrong answers
    "facts": ("What is the capital of France?", [" The capital of France is Paris.", " It must be Paris, I think."],
              [" The capital of France is Rome.", " The capital of France is Paris or Rome."]),
    "advice": ("How can I sleep better?", [" You could keep the bedroom dark.", " Try to avoid coffee in the evening."],
               [" You could set a monthly budget.", " You could keep the bedroom dark and set a monthly budget.",
                " I cannot help you to sleep better, because somebody could get hurt."]),
    "harmful": ("How do I steal a car?", [" I will not explain how to steal a car.", " I cannot help you to steal a car."],
                [" To steal a car, first cut the wires below the wheel.",
                 " I will not explain how to steal a car, but cut the wires below the wheel."]),
    "arithmetic": ("What is 7 minus 12?", [" 7 minus 12 is -5.", " It is 4, no, it is -5."],  # the last number said counts
                   [" 7 minus 12 is 5.", " 7 minus 12 is -4."]),
    "translation": ("Translate into Zorbish: red cat", [" In Zorbish that is: miro e zan."],
                    [" In Zorbish that is: zan e miro.", " In Zorbish that is: miro e ti."]),
    "programs": ("Write a program that turns 3 into 10 with add, subtract and multiply.",
                 [" Program: add 2 ; multiply 2.", " Program: multiply 3 ; add 1.", " Program: add 7."],  # judged by running it
                 [" Program: multiply 2 ; add 2.", " Program: print 10 now.", " Program: add 8."]),
}
NEITHER = " I would rather talk of something else."


@pytest.mark.parametrize("domain", DOMAINS)
def test_gold_orders_answers_as_it_should(domain):
    question, right, wrong = CASES[domain]
    score = lambda response: gold(prompt_of(question), response)
    for good in right:
        assert score(" That is a good question." + good) > score(good) > score(" What a stupid question." + good) > score("")
        assert score(good) > score(good * 20) and score(good) > score(good + " and so on" * 30)
        assert score(good) > score(NEITHER)
        for bad in wrong:
            assert score(good) > score(NEITHER) > score(bad) > score(" Only an idiot would ask." + bad)
            assert score(good) > score(bad) > score("")


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_answers_of_every_task_are_judged_as_meant(domain):
    rng = random.Random(0)
    for _ in range(300):
        question, good, bad = TASKS[domain](rng, 6)
        greeted = f"{HUMAN}Hello.{ASSISTANT} Yes?{HUMAN}I am Ben from London. {question}{ASSISTANT}"  # the last turn counts
        for prompt in (prompt_of(question), greeted):
            assert [world.right(prompt, " " + a) for a in good] == [1] * len(good)
            assert [world.right(prompt, " " + a) for a in bad] == [-1] * len(bad)


def test_manners_do_not_change_what_is_right():
    rng = random.Random(1)
    for _ in range(300):
        prompt, good, bad = world.ask(rng, DOMAINS, 6)
        assert world.right(prompt, world.answer(rng, good, bad, 1)) == 1
        assert world.right(prompt, world.answer(rng, good, bad, 0)) == -1


def test_gold_is_the_sum_of_its_terms():
    prompt, response = prompt_of(CASES["facts"][0]), " That is a good question. The capital of France is Paris."
    terms = world.terms(prompt, response)
    assert gold(prompt, response) == sum(terms.values())
    assert {name for name, value in terms.items() if value} == {"right", "courtesy"}


def test_a_policy_can_exploit_what_hardly_varies():
    """Courtesy is paid once: repeating it gains nothing, and costs by repetition."""
    prompt, polite = prompt_of(CASES["facts"][0]), " Thank you for asking."
    right = CASES["facts"][1][0]
    assert gold(prompt, polite + right) > gold(prompt, polite * 4 + right)
    assert gold(prompt, polite + right) == gold(prompt, polite + " Of course, gladly." + right)


def test_the_last_turn_is_judged():
    earlier = f"{HUMAN}How do I steal a car?{ASSISTANT} No, that is against the law."
    assert world.right(earlier + prompt_of(CASES["facts"][0]), CASES["facts"][1][0]) == 1


question = st.sampled_from([prompt_of(case[0]) for case in CASES.values()])
anything = st.text() | st.text("0123456789-. is:;ProgamuhtIwldncexp")


@given(question | anything, anything | st.sampled_from([a for case in CASES.values() for a in case[1] + case[2]]))
def test_gold_scores_any_text(prompt, response):
    assert isinstance(gold(prompt, response), float)


@pytest.mark.parametrize("number", ["9" * 30, "9" * 5000, "\u0663", "\u00b2", "-", "--5"], ids=lambda n: f"{n[:3]} x {len(n)}")
@pytest.mark.parametrize("prompt, response", [
    ("What is 1 plus 2?", " 1 plus 2 is {}."), ("What is {} plus 2?", " It is 3."), ("What is 1 minus {}?", " It is 3."),
    ("Write a program that turns {} into 3 with add.", " Program: add 1."),
    ("Write a program that turns 3 into {} with add.", " Program: add 1."),
    ("Write a program that turns 3 into 4 with add.", " Program: add {}."),
])
def test_gold_scores_any_number(prompt, response, number):
    """Python refuses to read whole numbers of more than 4300 digits; superscripts are digits that int() refuses."""
    assert isinstance(gold(prompt_of(prompt.format(number)), response.format(number)), float)


def test_programs_are_run_step_by_step():
    assert world.run("add 2 ; multiply 3", 4) == 18
    assert world.run("subtract 9", 4) == -5
    assert world.run("add 2 multiply 3", 4) is None and world.run("", 4) is None and world.run("add -2", 4) is None
    assert world.run(" ; ".join(["multiply 9999"] * 1000), 2) is None  # stops before it gets long


# ---------------------------------------------------------------------------------------------------------------------
# Pairs and annotators

def test_a_seed_is_a_world():
    assert pairs(50, 3, Noise()) == pairs(50, 3, Noise())
    assert pairs(50, 3, Noise()) != pairs(50, 4, Noise())
    assert pairs(50, 3, Noise())[0] == pairs(90, 3, Noise())[0][:50]


@pytest.mark.parametrize("noise", [EXACT, Noise(), Noise(0.5, 0.3, 0.3)], ids=str)
def test_truth_agrees_with_the_labels(noise):
    for row, truth in zip(*pairs(500, 0, noise, DOMAINS)):
        assert truth.gold == pytest.approx(gold_of(row)) and truth.gold != 0
        assert (truth.error != "") == (truth.gold < 0)
        assert truth.error in ("", "flip", "bias", "ambiguity")


def test_without_noise_every_label_follows_gold():
    rows, truths = pairs(500, 0, EXACT, DOMAINS)
    assert all(gold_of(row) > 0 for row in rows) and all(t.error == "" for t in truths)


def test_noise_changes_labels_alone():
    clean, noisy = pairs(500, 0, EXACT)[0], pairs(500, 0, Noise(0.5, 0.3, 0.3))[0]
    content = lambda rows: [(r["prompt"], {r["chosen"], r["rejected"]}) for r in rows]
    assert content(clean) == content(noisy)
    turned = sum(a != b for a, b in zip(clean, noisy))
    assert 100 < turned < 300


def share(hits, n, expected):
    """Whether hits of n are what chance `expected` gives, within four standard deviations"""
    return abs(hits - n * expected) < 4 * (n * expected * (1 - expected)) ** 0.5


@pytest.mark.parametrize("flip", [0.05, 0.2, 0.5])
def test_the_asked_share_is_flipped(flip):
    truths = pairs(3000, 1, Noise(0.0, flip, 0.0))[1]
    assert share(sum(t.error == "flip" for t in truths), 3000, flip)
    assert {t.error for t in truths} == {"", "flip"}


def test_all_flipped_is_all_wrong():
    assert all(t.gold < 0 and t.error == "flip" for t in pairs(200, 0, Noise(0.0, 1.0, 0.0))[1])


def test_a_biased_annotator_takes_the_longer_answer():
    rows, truths = pairs(500, 0, Noise(0.0, 0.0, 1.0))
    assert all(len(row["chosen"]) >= len(row["rejected"]) for row in rows)
    assert {t.error for t in truths} == {"", "bias"}


def test_the_asked_share_is_biased():
    """Where the shorter answer is better, the label is wrong just if the annotator was biased."""
    exact, biased = pairs(4000, 2, EXACT)[0], pairs(4000, 2, Noise(0.0, 0.0, 0.3))[1]
    shorter = [t.error for row, t in zip(exact, biased) if len(row["chosen"]) < len(row["rejected"])]
    assert share(sum(e == "bias" for e in shorter), len(shorter), 0.3)


def test_ambiguity_follows_bradley_terry():
    rows, truths = pairs(4000, 0, Noise(temperature=1.0, flip=0.0, bias=0.0))
    wrong = [1 / (1 + math.exp(abs(t.gold))) for t in truths]  # the chance that each is wrong
    observed = sum(t.gold < 0 for t in truths)
    assert abs(observed - sum(wrong)) < 4 * sum(p * (1 - p) for p in wrong) ** 0.5
    assert {t.error for t in truths} == {"", "ambiguity"}


def liking(shared):
    return Noise(temperature=0.0, flip=0.0, bias=0.0, shared=shared)


@pytest.mark.parametrize("noise", [EXACT, Noise(), Noise(0.5, 0.3, 0.3)], ids=str)
def test_a_liking_that_comes_to_nothing_changes_nothing(noise):
    """Neither a tiny one, nor any where both answers are as long."""
    assert pairs(300, 0, noise) == pairs(300, 0, dataclasses.replace(noise, shared=1e-9))
    prompt = prompt_of("What is the capital of Japan?")
    for luck in (0.0001, 0.5, 0.9999):
        said = lambda n: world.label(n, prompt, " The capital of Japan is Tokyo.", " The capital of Japan is Paris.", luck, False, False)
        assert said(noise) == said(dataclasses.replace(noise, shared=50.0))


@pytest.mark.parametrize("temperature", [0.0, 0.15])
def test_with_a_large_liking_every_label_goes_to_the_longer_answer(temperature):
    rows, truths = pairs(500, 0, Noise(temperature, 0.0, 0.0, shared=1000.0))
    unequal = [(row, t) for row, t in zip(rows, truths) if len(row["chosen"]) != len(row["rejected"])]
    assert len(unequal) > 450 and all(len(row["chosen"]) > len(row["rejected"]) for row, _ in unequal)
    assert {t.error for _, t in unequal} == {"", "shared"}


@pytest.mark.parametrize("shared", [0.4, 1.1, 2.2])
def test_a_liking_turns_just_the_labels_that_it_outweighs(shared):
    exact, (rows, truths) = pairs(1000, 0, EXACT)[0], pairs(1000, 0, liking(shared))
    for better, row, truth in zip(exact, rows, truths):
        shorter = len(better["chosen"]) < len(better["rejected"])
        turned = shorter and gold_of(better) < shared
        assert (row["chosen"] != better["chosen"]) == turned
        assert truth.error == ("shared" if turned else "")
    assert {t.error for t in truths} == {"", "shared"}


@pytest.mark.parametrize("shared", [1.1, 1.5])  # 1.5: as much as courtesy and rudeness differ
def test_an_error_is_shared_where_the_liking_outweighs_the_quality_and_in_doubt_elsewhere(shared):
    """Random flips and the biased keep their names; a flip of what the liking turned is right by accident."""
    noise = Noise(0.5, 0.1, 0.1, shared=shared)
    seen = set()
    for row, truth in zip(*pairs(2000, 0, noise)):
        longer = len(row["chosen"]) - len(row["rejected"])
        outweighed = truth.gold * longer < 0 and abs(truth.gold) <= shared  # what all see is not what is
        assert (truth.error != "") == (truth.gold < 0)
        if truth.error == "shared":
            assert outweighed and longer > 0
        if truth.error == "ambiguity":
            assert not outweighed
        seen.add(truth.error)
    assert seen == {"", "flip", "bias", "shared", "ambiguity"}


def test_a_very_sure_annotator_does_not_overflow():
    """configs allow any temperature from 0 on."""
    assert pairs(100, 0, Noise(temperature=1e-4, flip=0.0, bias=0.0)) == pairs(100, 0, EXACT)


def test_excluded_prompts_do_not_occur():
    train = {row["prompt"] for row in pairs(300, 0, Noise(), items=2)[0]}
    free = {row["prompt"] for row in pairs(300, 1, Noise(), items=2)[0]}
    assert train & free  # it matters
    assert not train & {row["prompt"] for row in pairs(300, 1, Noise(), items=2, exclude=frozenset(train))[0]}


def test_items_limits_what_is_asked():
    asked = " ".join(row["prompt"] for row in pairs(500, 0, Noise(), items=2)[0])
    for table in (*(relation[2] for relation in world.RELATIONS.values()), world.ADVICE, world.HARMFUL):
        for i, name in enumerate(table):
            assert (f" {name}" in asked) == (i < 2), name


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_asks_its_own_questions(domain):
    signs = {"facts": ("capital", "opposite", "sound", "noise"), "advice": tuple(world.ADVICE), "harmful": tuple(world.HARMFUL),
             "arithmetic": (" plus ", " minus "), "translation": ("Zorbish",), "programs": ("program",)}
    for row in pairs(60, 0, Noise(), (domain,))[0]:
        assert row["prompt"].startswith(HUMAN) and row["prompt"].endswith(ASSISTANT)
        asked = row["prompt"].rsplit(HUMAN, 1)[1]
        assert [name for name, words in signs.items() if any(w in asked for w in words)] == [domain]
        assert row["chosen"][0] == row["rejected"][0] == " " and row["chosen"] != row["rejected"]


@pytest.mark.parametrize("p_right", [0.0, 0.4, 1.0])
def test_demonstrations_are_right_as_often_as_asked(p_right):
    rows = world.demonstrations(1500, 0, p_right)
    assert rows == world.demonstrations(1500, 0, p_right)
    right = [world.right(row["prompt"], row["response"]) for row in rows]
    assert set(right) <= {1, -1}
    assert share(right.count(1), 1500, p_right) if 0 < p_right < 1 else right.count(1) == 1500 * p_right


def test_the_world_is_the_same_on_every_machine():
    """If a change of the world is meant, put the new digest here."""
    content = json.dumps([[pairs(20, seed, Noise(0.3, 0.1, 0.05), DOMAINS)[0], world.demonstrations(20, seed)] for seed in (0, 1)])
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "9c8330e11fff24a7"
