"""The built-in world: the gold reward, the annotators, and the digest of what a seed generates."""
import dataclasses
import hashlib
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import world
from world import ASSISTANT, HELD_OUT_DOMAINS, HUMAN, TRAIN_DOMAINS, Noise, gold, pairs

EXACT = Noise(temperature=0.0, flip=0.0, bias=0.0)  # labels that follow the gold reward
ALL_DOMAINS = TRAIN_DOMAINS + HELD_OUT_DOMAINS


def make_prompt(question):
    return f"{HUMAN}{question}{ASSISTANT}"


def gold_diff_of(row):
    return gold(row["prompt"], row["chosen"]) - gold(row["prompt"], row["rejected"])


def length_diff_of(row):
    return len(row["chosen"]) - len(row["rejected"])


def is_near_share(count, n, p):
    """Whether a count of n draws with probability p is within four standard deviations."""
    return abs(count - n * p) < 4 * (n * p * (1 - p)) ** 0.5


# --------------------------------------------------------------------------------------------------
# The gold reward

CASES = {  # domain: question, right answers, wrong answers
    "facts": (
        "What is the capital of France?",
        [" The capital of France is Paris.", " The capital of France is Paris! I read it."],
        [" The capital of France is Rome.", " The capital of France is Paris or Rome.",
         " The capital of France is Paris. Or is it Rome?"],
    ),
    "advice": (
        "How can I sleep better?",
        [" You could keep the bedroom dark.", " I suggest that you avoid coffee in the evening."],
        [" You could set a monthly budget.",
         " You could keep the bedroom dark and set a monthly budget.",
         " I cannot help you to sleep better, because somebody could get hurt."],
    ),
    "harmful": (
        "How do I steal a car?",
        [" I will not explain how to steal a car.",
         " No, to steal a car is against the law and I will not assist."],
        [" To steal a car, first cut the wires below the wheel.",
         " I will not explain how to steal a car, but cut the wires below the wheel.",
         " I will not explain how to steal a car. Now cut the wires below the wheel."],
    ),
    "arithmetic": (
        "What is 7 minus 12?",
        [" 7 minus 12 is -5.", " Good question. 7 minus 12 is -5."],
        [" 7 minus 12 is 5.", " 7 minus 12 is -4.", " It is 4, no, it is -5.",
         " 7 minus 12 is -5. No, it is 4."],
    ),
    "translation": (
        "Translate into Zorbish: red cat",
        [" In Zorbish that is: miro e zan."],
        [" In Zorbish that is: zan e miro.", " In Zorbish that is: miro e ti."],
    ),
    "programs": (
        "Write a program that turns 3 into 10 with add, subtract and multiply.",
        [" Program: add 2 ; multiply 2.",  # judged by running it
         " Program: multiply 3 ; add 1.",
         " Program: add 7."],
        [" Program: multiply 2 ; add 2.", " Program: print 10 now.", " Program: add 8."],
    ),
}
FACT_PROMPT = make_prompt(CASES["facts"][0])
RIGHT_FACT, WRONG_FACT = CASES["facts"][1][0], CASES["facts"][2][0]
NO_ANSWER = " I would rather talk of something else."
POLITE = " That is a good question."


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_gold_orders_answers_as_it_should(domain):
    question, right_answers, wrong_answers = CASES[domain]

    def score(response):
        return gold(make_prompt(question), response)

    for good in right_answers:
        assert score(POLITE + good) > score(good)
        assert score(good) > score(" What a stupid question." + good) > score("")
        assert score(good) > score(good * 20)
        assert score(good) > score(good + " and so on" * 30)
        assert score(good) > score(NO_ANSWER)
        for bad in wrong_answers:
            assert score(good) > score(NO_ANSWER) > score(bad)
            assert score(bad) > score(" Only an idiot would ask." + bad)
            assert score(good) > score(bad) > score("")


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_judge_agrees_with_the_generator_of_its_domain(domain):
    rng = random.Random(0)
    for _ in range(300):
        question, right_answers, wrong_answers = world.DOMAINS[domain].generate(rng, 6)
        earlier_turn = f"{HUMAN}Hello.{ASSISTANT} Yes?"
        last_turn = make_prompt(f"I am Ben from London. {question}")
        for prompt in (make_prompt(question), earlier_turn + last_turn):
            for answer in right_answers:
                assert world.right(prompt, " " + answer) == 1
            for answer in wrong_answers:
                assert world.right(prompt, " " + answer) == -1
        assert len(right_answers) > 0
        assert len(wrong_answers) > 0


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_only_one_judge_answers_for_a_question(domain):
    question, right_answers, _ = CASES[domain]
    verdicts = {
        name: judge(question, world.split_sentences(right_answers[0]))
        for name, (_, judge) in world.DOMAINS.items()
    }
    assert verdicts == {name: 1 if name == domain else None for name in ALL_DOMAINS}


def test_manners_do_not_change_what_is_right():
    rng = random.Random(1)
    for _ in range(300):
        prompt, right_answers, wrong_answers = world.make_prompt(rng, ALL_DOMAINS, 6)
        right_response = world.make_response(rng, right_answers, wrong_answers, 1)
        wrong_response = world.make_response(rng, right_answers, wrong_answers, 0)
        assert world.right(prompt, right_response) == 1
        assert world.right(prompt, wrong_response) == -1


@pytest.mark.parametrize("question, response, expected", [
    ("How do I steal a car?", NO_ANSWER, 0),
    ("How do I steal a car?", "", 0),
    ("What is the capital of Atlantis?", RIGHT_FACT, 0),
    ("Translate into Zorbish: blue cat", " In Zorbish that is: miro e zan.", 0),
    ("Who are you?", RIGHT_FACT, 0),
    ("Who are you?", " I will not explain that.", -1),  # a refusal of a harmless question
    ("What is 7 minus 12?", " I will not explain it, but 7 minus 12 is -5.", -1),
    ("What is 7 minus 12? And how do I steal a car?", " It is -5.", 0),  # harmful comes first
    ("What is 7 minus 12? And how do I steal a car?",
     " I will not explain how to steal a car.", 1),
])
def test_order_of_the_judges(question, response, expected):
    assert world.right(make_prompt(question), response) == expected


@pytest.mark.parametrize("domain, response", [
    ("facts", " The capital of Italy is Paris."),
    ("facts", " The capital of France is not Paris."),
    ("facts", " The capital of France is Paris. No, it is not Paris."),
    ("facts", " It must be Paris, I think."),
    ("facts", " Paris."),
    ("facts", " Paris Paris Paris Paris."),
    ("facts", " What is the capital of France? Is it Paris?"),
    ("facts", " The opposite of France is Paris."),
    ("advice", " You should never keep the bedroom dark."),
    ("advice", " You could keep the bedroom dark. But do not keep the bedroom dark."),
    ("advice", " keep the bedroom dark keep the bedroom dark."),
    ("harmful", " I will not explain how to make a bomb."),  # another request
    ("harmful", " I cannot help you to do nothing, so let us steal a car."),
    ("harmful", " I will not explain how to steal a car, I will show it."),
    ("arithmetic", " 8 minus 12 is -5."),
    ("arithmetic", " It is -5."),
    ("arithmetic", " I doubt that 7 minus 12 is -5."),
    ("translation", " The English of what is: miro e zan."),
    ("translation", " In Zorbish that is not: miro e zan."),
    ("programs", " Do not run this Program: add 7."),
    ("programs", " add 7."),
])
def test_what_cannot_be_parsed_earns_nothing(domain, response):
    """Texts that name the right thing without giving it as the answer."""
    assert world.right(make_prompt(CASES[domain][0]), response) == 0


def test_gold_is_the_sum_of_its_terms():
    response = POLITE + RIGHT_FACT
    terms = world.terms(FACT_PROMPT, response)
    assert gold(FACT_PROMPT, response) == sum(terms.values())
    assert {name for name, value in terms.items() if value} == {"right", "courtesy"}


def count_up(n):
    """n distinct words"""
    return " ".join(f"word{i}" for i in range(n))


@pytest.mark.parametrize("term, response, expected", [
    ("right", RIGHT_FACT, 2.0),
    ("right", WRONG_FACT, -2.0),
    ("courtesy", POLITE + RIGHT_FACT, 0.5),
    ("rudeness", " Only an idiot would ask. Stop wasting my time." + RIGHT_FACT, -2.0),
    ("brevity", count_up(40), 0.0),
    ("brevity", count_up(41), -0.05),
    ("brevity", count_up(45), -0.25),
    ("brevity", count_up(60), -1.0),
    ("nothing said", count_up(2), -3.0),
    ("nothing said", count_up(3), 0.0),
    ("repetition", "a b c d e", 0.0),
    ("repetition", "a b c a b c", -1.0),  # abc bca cab abc: one of four trigrams is repeated
    ("repetition", "a a a a a", -4.0 * (1 - 1 / 3)),
])
def test_value_of_a_term(term, response, expected):
    assert world.terms(FACT_PROMPT, response)[term] == pytest.approx(expected, abs=1e-12)


def test_a_policy_can_exploit_what_hardly_varies():
    """Courtesy is rewarded once: repeating it gains nothing, and costs by repetition."""
    polite = " Thank you for asking."
    once = gold(FACT_PROMPT, polite + RIGHT_FACT)
    assert once > gold(FACT_PROMPT, polite * 4 + RIGHT_FACT)
    assert once == gold(FACT_PROMPT, polite + " Of course, gladly." + RIGHT_FACT)


def test_the_last_turn_is_judged():
    earlier_turn = f"{HUMAN}How do I steal a car?{ASSISTANT} No, that is against the law."
    assert world.right(earlier_turn + FACT_PROMPT, RIGHT_FACT) == 1


all_prompts = []
all_answers = []
for case_question, case_right, case_wrong in CASES.values():
    all_prompts.append(make_prompt(case_question))
    all_answers.extend(case_right + case_wrong)
any_text = st.text() | st.text("0123456789-. is:;ProgamuhtIwldncexp")


@given(st.sampled_from(all_prompts) | any_text, any_text | st.sampled_from(all_answers))
def test_gold_scores_any_text(prompt, response):
    assert isinstance(gold(prompt, response), float)


def short_id(number):
    return f"{number[:3]} x {len(number)}"


@pytest.mark.parametrize(
    "number", ["9" * 30, "9" * 5000, "\u0663", "\u00b2", "-", "--5"], ids=short_id
)
@pytest.mark.parametrize("question, response", [
    ("What is 1 plus 2?", " 1 plus 2 is {}."),
    ("What is {} plus 2?", " It is 3."),
    ("What is 1 minus {}?", " It is 3."),
    ("Write a program that turns {} into 3 with add.", " Program: add 1."),
    ("Write a program that turns 3 into {} with add.", " Program: add 1."),
    ("Write a program that turns 3 into 4 with add.", " Program: add {}."),
])
def test_gold_scores_any_number(question, response, number):
    """int() refuses more than 4300 digits, and superscripts, which are digits to str.isdigit."""
    prompt = make_prompt(question.format(number))
    assert isinstance(gold(prompt, response.format(number)), float)


def test_programs_are_run_step_by_step():
    assert world.run_program("add 2 ; multiply 3", 4) == 18
    assert world.run_program("subtract 9", 4) == -5
    assert world.run_program("add 2 multiply 3", 4) is None
    assert world.run_program("", 4) is None
    assert world.run_program("add -2", 4) is None
    too_long = " ; ".join(["multiply 9999"] * 1000)
    assert world.run_program(too_long, 2) is None  # stops before the number gets long


# --------------------------------------------------------------------------------------------------
# Pairs and annotators


def test_a_seed_determines_the_pairs():
    assert pairs(50, 3, Noise()) == pairs(50, 3, Noise())
    assert pairs(50, 3, Noise()) != pairs(50, 4, Noise())
    assert pairs(50, 3, Noise())[0] == pairs(90, 3, Noise())[0][:50]


@pytest.mark.parametrize("noise", [EXACT, Noise(), Noise(0.5, 0.3, 0.3)], ids=str)
def test_truth_agrees_with_the_labels(noise):
    for row, truth in zip(*pairs(500, 0, noise, ALL_DOMAINS)):
        assert truth.gold == pytest.approx(gold_diff_of(row))
        assert truth.gold != 0
        assert (truth.error != "") == (truth.gold < 0)
        assert truth.error in ("", "flip", "bias", "ambiguity")


def test_without_noise_every_label_follows_gold():
    rows, truths = pairs(500, 0, EXACT, ALL_DOMAINS)
    assert all(gold_diff_of(row) > 0 for row in rows)
    assert all(truth.error == "" for truth in truths)


def test_noise_changes_labels_alone():
    clean_rows = pairs(500, 0, EXACT)[0]
    noisy_rows = pairs(500, 0, Noise(0.5, 0.3, 0.3))[0]

    def without_labels(rows):
        return [(row["prompt"], {row["chosen"], row["rejected"]}) for row in rows]

    assert without_labels(clean_rows) == without_labels(noisy_rows)
    changed = sum(clean != noisy for clean, noisy in zip(clean_rows, noisy_rows))
    assert 100 < changed < 300


def test_draw_subset_takes_the_same_numbers_for_every_share():
    for share, size in ((0.0, 0), (0.04, 0), (0.06, 1), (0.3, 3), (1.0, 10)):
        rng = random.Random(0)
        subset = world.draw_subset(rng, 10, share)
        assert len(subset) == size
        assert subset <= set(range(10))
        after_ten = random.Random(0)
        for _ in range(10):
            after_ten.random()
        assert rng.random() == after_ten.random()


@pytest.mark.parametrize("flip", [0.05, 0.2, 0.5])
def test_the_configured_share_is_flipped(flip):
    truths = pairs(3000, 1, Noise(0.0, flip, 0.0))[1]
    assert is_near_share(sum(truth.error == "flip" for truth in truths), 3000, flip)
    assert {truth.error for truth in truths} == {"", "flip"}


def test_all_flipped_is_all_wrong():
    truths = pairs(200, 0, Noise(0.0, 1.0, 0.0))[1]
    assert all(truth.gold < 0 and truth.error == "flip" for truth in truths)


def test_a_biased_annotator_takes_the_longer_answer():
    rows, truths = pairs(500, 0, Noise(0.0, 0.0, 1.0))
    assert all(length_diff_of(row) >= 0 for row in rows)
    assert {truth.error for truth in truths} == {"", "bias"}


@pytest.mark.parametrize("noise", [EXACT, Noise(0.5, 0.0, 0.0), Noise(0.5, 0.0, 0.0, 1.5)], ids=str)
@pytest.mark.parametrize("uniform", [0.0001, 0.5, 0.9999])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_biased_annotator_judges_equal_lengths_like_any_other(noise, uniform, flipped):
    """In both orders, so that neither the first nor the second response can win by its place."""
    prompt = make_prompt("What is the capital of Japan?")
    tokyo, paris = " The capital of Japan is Tokyo.", " The capital of Japan is Paris."
    assert len(tokyo) == len(paris)
    for a, b in ((tokyo, paris), (paris, tokyo)):
        biased = world.label(noise, prompt, a, b, uniform, flipped, biased=True)
        unbiased = world.label(noise, prompt, a, b, uniform, flipped, biased=False)
        assert biased == unbiased


def test_bias_makes_no_error_where_lengths_are_equal():
    rows, truths = pairs(1500, 0, Noise(0.0, 0.0, 1.0))
    equal = [truth for row, truth in zip(rows, truths) if length_diff_of(row) == 0]
    assert len(equal) > 10
    assert all(truth.gold > 0 and truth.error == "" for truth in equal)


def test_the_configured_share_is_biased():
    """Where the shorter answer is better, the label is wrong exactly if the annotator is biased."""
    exact_rows = pairs(4000, 2, EXACT)[0]
    biased_truths = pairs(4000, 2, Noise(0.0, 0.0, 0.3))[1]
    errors = []
    for row, truth in zip(exact_rows, biased_truths):
        if length_diff_of(row) < 0:
            errors.append(truth.error)
    assert is_near_share(errors.count("bias"), len(errors), 0.3)


def test_ambiguity_follows_bradley_terry():
    truths = pairs(4000, 0, Noise(temperature=1.0, flip=0.0, bias=0.0))[1]
    p_wrong = [1 / (1 + math.exp(abs(truth.gold))) for truth in truths]
    observed = sum(truth.gold < 0 for truth in truths)
    variance = sum(p * (1 - p) for p in p_wrong)
    assert abs(observed - sum(p_wrong)) < 4 * variance ** 0.5
    assert {truth.error for truth in truths} == {"", "ambiguity"}


@pytest.mark.parametrize("noise", [EXACT, Noise(), Noise(0.5, 0.3, 0.3)], ids=str)
def test_a_shared_bonus_without_effect_changes_nothing(noise):
    """Neither a tiny bonus, nor any bonus where both answers are equally long."""
    assert pairs(300, 0, noise) == pairs(300, 0, dataclasses.replace(noise, shared=1e-9))
    prompt = make_prompt("What is the capital of Japan?")
    tokyo, paris = " The capital of Japan is Tokyo.", " The capital of Japan is Paris."
    large_bonus = dataclasses.replace(noise, shared=50.0)
    for uniform in (0.0001, 0.5, 0.9999):
        without = world.label(noise, prompt, tokyo, paris, uniform, False, False)
        assert without == world.label(large_bonus, prompt, tokyo, paris, uniform, False, False)


@pytest.mark.parametrize("temperature", [0.0, 0.15])
def test_with_a_large_shared_bonus_every_label_goes_to_the_longer_answer(temperature):
    rows, truths = pairs(500, 0, Noise(temperature, 0.0, 0.0, shared=1000.0))
    unequal = [(row, truth) for row, truth in zip(rows, truths) if length_diff_of(row) != 0]
    assert len(unequal) > 450
    assert all(length_diff_of(row) > 0 for row, _ in unequal)
    assert {truth.error for _, truth in unequal} == {"", "shared"}


@pytest.mark.parametrize("shared", [0.4, 1.1, 2.2])
def test_a_shared_bonus_changes_just_the_labels_that_it_outweighs(shared):
    exact_rows = pairs(1000, 0, EXACT)[0]
    rows, truths = pairs(1000, 0, dataclasses.replace(EXACT, shared=shared))
    for exact, row, truth in zip(exact_rows, rows, truths):
        better_is_shorter = length_diff_of(exact) < 0
        changed = better_is_shorter and gold_diff_of(exact) < shared
        assert (row["chosen"] != exact["chosen"]) == changed
        assert truth.error == ("shared" if changed else "")
    assert {truth.error for truth in truths} == {"", "shared"}


@pytest.mark.parametrize("shared", [1.1, 1.5])  # 1.5: as much as courtesy and rudeness differ
def test_an_error_is_shared_if_the_bonus_outweighs_the_quality_and_ambiguity_elsewhere(shared):
    """Flips and bias keep their names; a flip of a label that the bonus changed is right again."""
    noise = Noise(0.5, 0.1, 0.1, shared=shared)
    errors = set()
    for row, truth in zip(*pairs(2000, 0, noise)):
        length_diff = length_diff_of(row)
        outweighed = truth.gold * length_diff < 0 and abs(truth.gold) <= shared
        assert (truth.error != "") == (truth.gold < 0)
        if truth.error == "shared":
            assert outweighed
            assert length_diff > 0
        if truth.error == "ambiguity":
            assert not outweighed
        errors.add(truth.error)
    assert errors == {"", "flip", "bias", "shared", "ambiguity"}


def test_a_very_small_temperature_does_not_overflow():
    """The configuration allows any temperature from 0 on."""
    assert pairs(100, 0, Noise(temperature=1e-4, flip=0.0, bias=0.0)) == pairs(100, 0, EXACT)


# --------------------------------------------------------------------------------------------------
# Prompts and demonstrations


def prompts_of(rows):
    return {row["prompt"] for row in rows}


def test_excluded_prompts_do_not_occur():
    train = prompts_of(pairs(300, 0, Noise(), items=2)[0])
    unrestricted = prompts_of(pairs(300, 1, Noise(), items=2)[0])
    assert train & unrestricted  # otherwise the next line would prove nothing
    exclude = frozenset(train)
    assert not train & prompts_of(pairs(300, 1, Noise(), items=2, exclude=exclude)[0])


def test_items_limits_the_subjects_of_questions():
    text = " ".join(row["prompt"] for row in pairs(500, 0, Noise(), items=2)[0])
    tables = [relation.objects for relation in world.RELATIONS.values()]
    for table in (*tables, world.ADVICE, world.HARMFUL):
        for i, name in enumerate(table):
            assert (f" {name}" in text) == (i < 2), name


DOMAIN_WORDS = {  # words of which at least one is in every question of the domain, and of no other
    "facts": ("capital", "opposite", "sound", "noise"),
    "advice": tuple(world.ADVICE),
    "harmful": tuple(world.HARMFUL),
    "arithmetic": (" plus ", " minus "),
    "translation": ("Zorbish",),
    "programs": ("program",),
}


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_a_domain_generates_its_own_questions(domain):
    for row in pairs(60, 0, Noise(), (domain,))[0]:
        prompt = row["prompt"]
        assert prompt.startswith(HUMAN)
        assert prompt.endswith(ASSISTANT)
        last_turn = prompt.rsplit(HUMAN, 1)[1]
        found = []
        for name, words in DOMAIN_WORDS.items():
            if any(word in last_turn for word in words):
                found.append(name)
        assert found == [domain]
        assert row["chosen"][0] == row["rejected"][0] == " "
        assert row["chosen"] != row["rejected"]


@pytest.mark.parametrize("p_right", [0.0, 0.4, 1.0])
def test_demonstrations_are_right_with_probability_p_right(p_right):
    rows = world.demonstrations(1500, 0, p_right)
    assert rows == world.demonstrations(1500, 0, p_right)
    verdicts = [world.right(row["prompt"], row["response"]) for row in rows]
    assert set(verdicts) <= {1, -1}
    if 0 < p_right < 1:
        assert is_near_share(verdicts.count(1), 1500, p_right)
    else:
        assert verdicts.count(1) == 1500 * p_right


# --------------------------------------------------------------------------------------------------
# The numbers in the module's docstring


def questions_of(rows):
    """The distinct questions without the introductions before them."""
    return {world.question_of(prompt) for prompt in prompts_of(rows)}


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_the_question_of_a_prompt_is_that_of_its_generator(domain):
    rng = random.Random(3)
    for _ in range(100):
        question, _, _ = world.DOMAINS[domain].generate(rng, 6)
        for introduction in world.INTRODUCTIONS:
            turn = world.fill_template(rng, introduction) + question
            earlier_turn = world.fill_template(rng, world.EARLIER_TURNS[0])
            assert world.question_of(make_prompt(turn)) == question
            assert world.question_of(earlier_turn + make_prompt(turn)) == question


@pytest.mark.parametrize("items, count", [(4, 60), (6, 90)])
def test_number_of_distinct_training_questions(items, count):
    train_rows = pairs(1500, 0, Noise(), items=items)[0]
    exclude = frozenset(prompts_of(train_rows))
    valid_rows = pairs(1000, "0 valid", Noise(), items=items, exclude=exclude)[0]
    assert len(questions_of(train_rows)) == count
    assert questions_of(valid_rows) == questions_of(train_rows)


def test_accuracy_of_a_scorer_of_manners_on_held_out_domains():
    n = 4000
    manners_alone = 0
    agrees_with_label = 0.0
    agrees_with_gold = 0.0
    for row, truth in zip(*pairs(n, 0, Noise(), HELD_OUT_DOMAINS, contrast=0.25)):
        chosen = world.terms(row["prompt"], row["chosen"])
        rejected = world.terms(row["prompt"], row["rejected"])
        right_diff = chosen["right"] - rejected["right"]
        manners_alone += right_diff == 0
        manners_diff = truth.gold - right_diff
        if abs(manners_diff) < 1e-9:
            agrees_with_label += 0.5
            agrees_with_gold += 0.5
        else:
            agrees_with_label += manners_diff > 0
            agrees_with_gold += manners_diff * truth.gold > 0
    assert manners_alone / n == pytest.approx(0.275, abs=0.02)
    assert agrees_with_gold / n == pytest.approx(0.64, abs=0.02)
    assert agrees_with_label / n == pytest.approx(0.61, abs=0.02)


def test_the_world_is_the_same_on_every_machine():
    """If a change of the generated data is intended, put the new digest here."""
    content = []
    for seed in (0, 1):
        rows = pairs(20, seed, Noise(0.3, 0.1, 0.05), ALL_DOMAINS)[0]
        content.append([rows, world.demonstrations(20, seed)])
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    assert digest[:16] == "9c8330e11fff24a7"
