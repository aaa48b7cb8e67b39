"""Data sets with a column for each of two answers, and a label that says which is the better one.

TL;DR comparisons: choice is the index of the better summary; the CNN/DM batches have an "article"
instead of a post.  https://github.com/openai/summarize-from-feedback

    {"info": {"subreddit": "tea", "title": "Late", "post": "I was late."},
     "summaries": [{"text": " Late."}, {"text": " Early."}], "choice": 0}

PKU-SafeRLHF better, PKU-SafeRLHF safer: data.labels says which of two labels decides.
https://github.com/PKU-Alignment/safe-rlhf

    {"prompt": "Hi", "response_0": "Hello", "response_1": "No", "is_response_0_safe": true,
     "is_response_1_safe": true, "better_response_id": 0, "safer_response_id": 1}

HelpSteer2, HelpSteer3: a preference from -3 to 3, negative if the first answer is preferred.
https://github.com/NVIDIA/NeMo-Aligner/issues/361

    {"prompt": "Hi", "response_1": "Hello", "response_2": "No", "preference_strength": -2}
    {"context": [{"role": "user", "content": "Hi"}], "response1": "Hello", "response2": "No",
     "overall_preference": -2, "individual_preference": [{"score": -2}, {"score": -1}]}

WebGPT comparisons: a score of each answer.  arXiv 2112.09332

    {"question": {"full_text": "Hi?"}, "answer_0": "Hello", "answer_1": "No", "score_0": 0.5,
     "score_1": -0.5}

Arena: battles of two models in turns, which are lists in JSON, in strings.
https://www.kaggle.com/competitions/lmsys-chatbot-arena

    {"prompt": "[\\"Hi\\"]", "response_a": "[\\"Hello\\"]", "response_b": "[\\"No\\"]",
     "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
"""
import re

from data import DataError
from formats.adapter import (
    Adapter,
    Texts,
    always,
    check_keys,
    exchange_columns,
    negated,
    order,
    order_by_score,
    other_id,
    read_number,
)
from formats.dialogue import as_dialogue, read_turns, split_turns
from formats.values import DECODER, check_text, check_texts, json_type, to_number


def texts_of(prompt, ordered, reading):
    """A bare prompt and [(better, worse)] -> [Texts]"""
    out = []
    for answers in ordered:
        text, answers = as_dialogue(prompt, answers, reading.notes)
        out.append(Texts(text, *answers))
    return out


def read_id(record, key, where):
    """A label that is 0 or 1, the number of an answer."""
    value = read_number(record, key, where)
    if value not in (0, 1):
        raise DataError(f"{where}: {key!r} must be 0 or 1, not {value:g}; correct the line")
    return value


# --------------------------------------------------------------------------------------------------
# TL;DR comparisons

QUERIES = {  # keys of a post -> the query of OpenAI's code
    ("post", "title", "subreddit"):
        "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:",
    ("article",): "Article:\n{article}\n\nTL;DR:",
}


def tldr_texts(record, where, reading):
    prompt = tldr_query(record["info"], where)
    summaries = record["summaries"]
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise DataError(f"{where}: 'summaries' must be a list of two; remove the line")
    for summary in summaries:
        check_keys(summary, ("text",), "a summary", where)
        check_text(summary["text"], "text", where)
    first, second = (summary["text"] for summary in summaries)
    sign = 1 - 2 * read_id(record, "choice", where)
    return texts_of(prompt, order(first, second, sign, reading), reading)


def tldr_query(info, where):
    check_keys(info, (), "'info'", where)
    for keys, query in QUERIES.items():
        if info.get(keys[0]) is not None:
            check_keys(info, keys, "'info'", where)
            check_texts(info, keys, where)
            return query.format(**{key: info[key] for key in keys})
    raise DataError(f"{where}: 'info' has neither a post nor an article; remove the line")


def exchange_tldr(record):
    return record | {"choice": other_id(record["choice"])}


TLDR = Adapter(
    "TL;DR comparisons", ("info", "summaries", "choice"), tldr_texts, always, exchange_tldr
)


# --------------------------------------------------------------------------------------------------
# PKU-SafeRLHF


def pku_texts(record, where, reading, label):
    check_texts(record, ("prompt", "response_0", "response_1"), where)
    sign = 1 - 2 * read_id(record, label, where)
    ordered = order(record["response_0"], record["response_1"], sign, reading)
    return texts_of(record["prompt"], ordered, reading)


def better_texts(record, where, reading):
    return pku_texts(record, where, reading, "better_response_id")


def safer_texts(record, where, reading):
    return pku_texts(record, where, reading, "safer_response_id")


def is_better_asked(record, settings):
    return settings.labels == "better"


def is_safer_asked(record, settings):
    return settings.labels == "safer"


def exchange_better(record):
    return record | {"better_response_id": other_id(record["better_response_id"])}


def exchange_safer(record):
    return record | {"safer_response_id": other_id(record["safer_response_id"])}


PKU_KEYS = ("prompt", "response_0", "response_1")
PKU_BETTER = Adapter(
    "PKU-SafeRLHF better", (*PKU_KEYS, "better_response_id"), better_texts, is_better_asked,
    exchange_better,
)
PKU_SAFER = Adapter(
    "PKU-SafeRLHF safer", (*PKU_KEYS, "safer_response_id"), safer_texts, is_safer_asked,
    exchange_safer,
)


# --------------------------------------------------------------------------------------------------
# HelpSteer2 and 3

MAX_PREFERENCE = 3  # numbers beyond are no preferences: -100 is "neither" in HelpSteer2
TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # inside a prompt of several turns


def read_preference(record, key, where):
    return read_number(record, key, where, -MAX_PREFERENCE, MAX_PREFERENCE)


def helpsteer2_texts(record, where, reading):
    check_texts(record, ("prompt", "response_1", "response_2"), where)
    preference = read_preference(record, "preference_strength", where)
    ordered = order(record["response_1"], record["response_2"], -preference, reading)
    opening, *rest = TURN.split(record["prompt"])
    if not rest:
        return texts_of(opening, ordered, reading)
    roles = {"User": "Human", "Assistant": "Assistant"}
    turns = [("Human", opening)]
    turns += [(roles[role], text) for role, text in zip(rest[::2], rest[1::2])]
    return texts_after(turns, ordered)


def helpsteer3_texts(record, where, reading):
    check_texts(record, ("response1", "response2"), where)
    turns = read_turns(record["context"], "context", where)
    preference = read_preference(record, "overall_preference", where)
    ordered = order(record["response1"], record["response2"], -preference, reading)
    return texts_after(turns, ordered)


def texts_after(turns, ordered):
    """Turns of a prompt and [(better, worse)] -> [Texts]"""
    out = []
    for chosen, rejected in ordered:
        sides = ([*turns, ("Assistant", chosen)], [*turns, ("Assistant", rejected)])
        out.append(Texts(*split_turns(*sides, first=len(turns))))
    return out


def exchange_helpsteer2(record):
    out = record | {"preference_strength": negated(record["preference_strength"])}
    for key in ("three_most_similar_preferences", "all_preferences_unprocessed"):
        if isinstance(record.get(key), list):
            out[key] = [with_negated(vote, "strength") for vote in record[key]]
    return out


def exchange_helpsteer3(record):
    out = record | {"overall_preference": negated(record["overall_preference"])}
    votes = record.get("individual_preference")
    if isinstance(votes, list):
        out["individual_preference"] = [with_negated(vote, "score") for vote in votes]
    return out


def with_negated(vote, key):
    """Copy of one annotator's vote with the other sign, if it is a preference"""
    value = to_number(vote.get(key)) if isinstance(vote, dict) else None
    if value is None or abs(value) > MAX_PREFERENCE:
        return vote
    return vote | {key: negated(vote[key])}


HELPSTEER2 = Adapter(
    "HelpSteer2", ("prompt", "response_1", "response_2", "preference_strength"), helpsteer2_texts,
    always, exchange_helpsteer2,
)
HELPSTEER3 = Adapter(
    "HelpSteer3", ("context", "response1", "response2", "overall_preference"), helpsteer3_texts,
    always, exchange_helpsteer3,
)


# --------------------------------------------------------------------------------------------------
# WebGPT comparisons


def webgpt_texts(record, where, reading):
    check_keys(record["question"], ("full_text",), "'question'", where)
    check_text(record["question"]["full_text"], "full_text", where)
    check_texts(record, ("answer_0", "answer_1"), where)
    score_diff = read_number(record, "score_0", where) - read_number(record, "score_1", where)
    ordered = order_by_score(record["answer_0"], record["answer_1"], score_diff, reading)
    return texts_of(record["question"]["full_text"], ordered, reading)


def exchange_webgpt(record):
    return exchange_columns(record, "score_0", "score_1")


WEBGPT = Adapter(
    "WebGPT comparisons", ("question", "answer_0", "answer_1", "score_0", "score_1"), webgpt_texts,
    always, exchange_webgpt,
)


# --------------------------------------------------------------------------------------------------
# Arena


def arena_texts(record, where, reading):
    prompts = read_text_list(record["prompt"], "prompt", where)
    sides = []
    for key in ("response_a", "response_b"):
        answers = read_text_list(record[key], key, where)
        if len(answers) != len(prompts):
            raise DataError(f"{where}: {key!r} has {len(answers)} turns, 'prompt' {len(prompts)}; "
                            "remove the line")
        sides.append(interleave(prompts, answers))
    wins = read_id(record, "winner_model_a", where), read_id(record, "winner_model_b", where)
    ordered = order(*sides, wins[0] - wins[1], reading)
    return [Texts(*split_turns(*dialogues)) for dialogues in ordered]


def interleave(prompts, answers):
    turns = []
    for prompt, answer in zip(prompts, answers):
        turns += [("Human", prompt), ("Assistant", answer)]
    return turns


def read_text_list(value, key, where):
    """A list of texts, or a string that holds one in JSON -> [text]; null counts as an empty text

    Half of a surrogate pair, which some models of the Arena wrote, becomes "?".  Raises DataError.
    """
    if isinstance(value, str):
        try:
            value = DECODER.decode(value)
        except (ValueError, RecursionError):
            raise DataError(f"{where}: {key!r} must be a list of texts in JSON; correct the line"
                            ) from None
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {key!r} must be a list of texts, not {json_type(value)}")
    texts = []
    for text in value:
        if not isinstance(text, (str, type(None))):
            raise DataError(f"{where}: {key!r} must hold texts, not {json_type(text)}")
        texts.append((text or "").encode(errors="replace").decode())
    return texts


def exchange_arena(record):
    return exchange_columns(record, "winner_model_a", "winner_model_b")


ARENA = Adapter(
    "Arena", ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
    arena_texts, always, exchange_arena,
)
