"""Layouts with several answers to one prompt: pairs of those that differ enough.

lists of answers: every chosen answer against every rejected one.  RewardBench 2, RM-Bench.

    {"prompt": "2+2?", "chosen": ["4"], "rejected": ["5", "3"], "subset": "Math"}

Nectar: ranked answers, the best has rank 1; the prompt is a dialogue that ends in a blank.
https://huggingface.co/datasets/berkeley-nest/Nectar

    {"prompt": "\\n\\nHuman: 2+2?\\n\\nAssistant: ",
     "answers": [{"answer": "4", "rank": 1.0}, {"answer": "5", "rank": 2.0}]}

point-wise scores: a line an answer; answers of one prompt, in any place of the file, make pairs.

    {"prompt": "2+2?", "response": "4", "score": 0.9}

data.min_score_diff is the least difference of two ranks or scores that makes a pair.
"""
import itertools
from typing import NamedTuple

from data import ASSISTANT_MARKER, DataError, Pair
from formats.adapter import (
    SIDES,
    Adapter,
    Texts,
    always,
    check_keys,
    has_prompt,
    is_text_list,
    order_by_score,
    read_number,
)
from formats.dialogue import answer_text, as_dialogue, read_turns, render
from formats.values import check_text

MAX_ANSWERS = 100  # to one prompt: they make up to 4,950 pairs


def check_count(count, where):
    if count > MAX_ANSWERS:
        raise DataError(f"{where}: its prompt has {count:,} answers, more than {MAX_ANSWERS}; keep "
                        "fewer of them, or give them prompts of their own")


# --------------------------------------------------------------------------------------------------
# Lists of answers


def fits_lists(record, settings):
    return has_prompt(record) and any(is_text_list(record[key]) for key in SIDES)


def list_texts(record, where, reading):
    prompt, *sides = read_lists(record, where, reading)
    return [Texts(prompt, *answers) for answers in itertools.product(*sides)]


def read_lists(record, where, reading):
    """-> prompt, [chosen answer], [rejected answer]"""
    chosen, rejected = (read_answers(record[key], key, where) for key in SIDES)
    check_count(len(chosen) + len(rejected), where)
    if isinstance(record["prompt"], list):
        prompt = render(read_turns(record["prompt"], "prompt", where)) + ASSISTANT_MARKER
        answers = [answer_text([("Assistant", text)]) for text in chosen + rejected]
    else:
        check_text(record["prompt"], "prompt", where)
        prompt, answers = as_dialogue(record["prompt"], chosen + rejected, reading.notes)
    return prompt, answers[:len(chosen)], answers[len(chosen):]


def read_answers(value, key, where):
    """A list of texts, or one text -> [text]"""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise DataError(f"{where}: {key!r} is an empty list; remove the line")
    for text in texts:
        check_text(text, key, where)
    return texts


LISTS = Adapter("lists of answers", ("prompt", *SIDES), list_texts, fits_lists)


# --------------------------------------------------------------------------------------------------
# Ranks


def nectar_texts(record, where, reading):
    check_text(record["prompt"], "prompt", where)
    ranked = record["answers"]
    if not isinstance(ranked, list):
        raise DataError(f"{where}: 'answers' must be a list; correct the line")
    check_count(len(ranked), where)
    scores = []
    for answer in ranked:
        check_keys(answer, ("answer", "rank"), "an answer", where)
        check_text(answer["answer"], "answer", where)
        scores.append(-read_number(answer, "rank", where))
    texts = [answer["answer"] for answer in ranked]
    prompt, texts = as_dialogue(record["prompt"], texts, reading.notes)
    out = []
    for i, j in itertools.combinations(range(len(texts)), 2):
        for chosen, rejected in order_by_score(i, j, scores[i] - scores[j], reading):
            out.append(Texts(prompt, texts[chosen], texts[rejected]))
    return out


NECTAR = Adapter("Nectar", ("prompt", "answers"), nectar_texts, always)


# --------------------------------------------------------------------------------------------------
# Point-wise scores


class ScoredAnswer(NamedTuple):
    text: str
    score: float
    where: str
    record: dict


def keep_answer(record, where, reading):
    """Keep an answer until all of its prompt are read; it is no pair yet.  -> []"""
    check_text(record["prompt"], "prompt", where)
    check_text(record["response"], "response", where)
    answers = reading.answers.setdefault(record["prompt"], [])
    answers.append(
        ScoredAnswer(record["response"], read_number(record, "score", where), where, record)
    )
    check_count(len(answers), where)
    return []


def pairs_of_answers(reading, index=0):
    """Pairs of the answers that were kept, prompt by prompt -> [Pair]

    The record of a pair is {"chosen": record of that answer, "rejected": of the other}.
    index: of the first pair
    """
    pairs = []
    for prompt, answers in reading.answers.items():
        prompt, texts = as_dialogue(prompt, [answer.text for answer in answers], reading.notes)
        for i, j in itertools.combinations(range(len(answers)), 2):
            score_diff = answers[i].score - answers[j].score
            for chosen, rejected in order_by_score(i, j, score_diff, reading):
                pairs.append(Pair(
                    prompt, texts[chosen], texts[rejected],
                    source=answers[chosen].where, index=index + len(pairs),
                    record={
                        "chosen": answers[chosen].record, "rejected": answers[rejected].record,
                    },
                    layout=SCORES.name,
                ))
    return pairs


SCORES = Adapter("point-wise scores", ("prompt", "response", "score"), keep_answer, always)
