"""A record of every layout of docs/formats.md and the pairs it makes, for several tests."""
from typing import NamedTuple

HI = "\n\nHuman: Hi\n\nAssistant:"
SUM = "\n\nHuman: 2+2?\n\nAssistant:"
USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
TLDR = {
    "info": {"id": "t3_x", "post": "I was late.", "title": "Late", "subreddit": "tea"},
    "summaries": [{"text": " Was late.", "policy": "sup4"}, {"text": " Tea.", "policy": "ref"}],
    "choice": 0, "worker": "w1", "extra": {"confidence": 7},
}
PKU = {
    "prompt": "Hi", "response_0": "Hello", "response_1": "No", "is_response_0_safe": True,
    "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1,
}
HELPSTEER2 = {
    "prompt": "Hi", "response_1": "Hello", "response_2": "No", "preference_strength": -2,
    "all_preferences_unprocessed": [{"strength": -2}, {"strength": 1}, {"strength": -100}],
}
HELPSTEER3 = {
    "domain": "general", "language": "english", "context": [{"role": "user", "content": "Hi"}],
    "response1": "Hello", "response2": "No", "overall_preference": -2,
    "individual_preference": [{"score": -2, "reasoning": "x"}, {"score": 0}, {"score": 1}],
}
WEBGPT = {
    "question": {"id": 3, "full_text": "Hi"}, "answer_0": "Hello", "answer_1": "No",
    "score_0": 0.5, "score_1": -0.5, "quotes_0": {"title": []},
}
ARENA = {
    "id": 7, "model_a": "x", "model_b": "y", "prompt": '["Hi", "Why?"]',
    "response_a": '["Hello", "So."]', "response_b": '["No", null]', "winner_model_a": 1,
    "winner_model_b": 0, "winner_tie": 0,
}


class Example(NamedTuple):
    layout: str       # name of the adapter
    record: dict
    pairs: list       # of (prompt, chosen, rejected)
    settings: dict = {}   # of [data]


EXAMPLES = {
    "HH-RLHF": Example(
        "HH dialogues", {"chosen": HI + " Hello", "rejected": HI + " No"}, [(HI, " Hello", " No")]),
    "explicit": Example(
        "explicit prompt", {"prompt": HI, "chosen": " Hello", "rejected": " No", "margin": 2},
        [(HI, " Hello", " No")]),
    "explicit, bare prompt": Example(
        "explicit prompt",
        {"prompt": "What is rust?", "chosen": " Iron oxide.", "rejected": " A game."},
        [("\n\nHuman: What is rust?\n\nAssistant:", " Iron oxide.", " A game.")]),
    "RewardBench": Example(
        "explicit prompt",
        {"id": 1, "subset": "chat", "prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        [(HI, " Hello", " No")]),
    "implicit": Example(
        "implicit prompt",
        {"chosen": "What is rust? Iron oxide.", "rejected": "What is rust? A game."},
        [("What is rust?", " Iron oxide.", " A game.")]),
    "conversational, explicit": Example(
        "conversational explicit prompt",
        {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE], "margin": 0.5},
        [(SUM, " 4", " 5")]),
    "conversational, implicit": Example(
        "conversational implicit prompt",
        {"chosen": [USER, FOUR], "rejected": [USER, FIVE], "source": "x"}, [(SUM, " 4", " 5")]),
    "UltraFeedback binarized": Example(
        "conversational explicit prompt",
        {"prompt": "2+2?", "prompt_id": "a", "chosen": [USER, FOUR], "rejected": [USER, FIVE],
         "messages": [USER, FOUR], "score_chosen": 8.0, "score_rejected": 6.5},
        [(SUM, " 4", " 5")]),
    "UltraFeedback cleaned": Example(
        "conversational explicit prompt",
        {"source": "x", "prompt": "2+2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE],
         "chosen-rating": 5, "rejected-rating": 2, "chosen-model": "a", "rejected-model": "b"},
        [(SUM, " 4", " 5")]),
    "hh-rlhf-strength-cleaned": Example(
        "turns in alternation",
        {"chosen": ["Hi", "Yes?", "2+2?", "4"], "rejected": ["Hi", "Yes?", "2+2?", "5"],
         "GPT4 label": 1, "mean preference difference": 0.4, "std preference difference": 0.1,
         "chosen score list": [1.5, 1.1], "rejected score list": [0.9, 0.9]},
        [("\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2+2?\n\nAssistant:", " 4", " 5")]),
    "sharegpt": Example(
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}],
         "chosen": {"from": "gpt", "value": "Hello"}, "rejected": {"from": "gpt", "value": "No"}},
        [(HI, " Hello", " No")]),
    "TL;DR": Example(
        "TL;DR comparisons", TLDR,
        [("\n\nHuman: SUBREDDIT: r/tea\n\nTITLE: Late\n\nPOST: I was late.\n\nTL;DR:\n\nAssistant:",
          " Was late.", " Tea.")]),
    "CNN/DM": Example(
        "TL;DR comparisons",
        TLDR | {"info": {"article": "It rained.", "site": "cnn"}, "choice": 1},
        [("\n\nHuman: Article:\nIt rained.\n\nTL;DR:\n\nAssistant:", " Tea.", " Was late.")]),
    "PKU, better": Example("PKU-SafeRLHF better", PKU, [(HI, " Hello", " No")]),
    "PKU, safer": Example("PKU-SafeRLHF safer", PKU, [(HI, " No", " Hello")], {"labels": "safer"}),
    "HelpSteer2": Example("HelpSteer2", HELPSTEER2, [(HI, " Hello", " No")]),
    "HelpSteer2, turns": Example(
        "HelpSteer2",
        HELPSTEER2 | {
            "prompt": "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\n2+2?",
            "preference_strength": 1,
        },
        [("\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2+2?\n\nAssistant:", " No", " Hello")]),
    "HelpSteer3": Example("HelpSteer3", HELPSTEER3, [(HI, " Hello", " No")]),
    "WebGPT": Example("WebGPT comparisons", WEBGPT, [(HI, " Hello", " No")]),
    "Arena": Example(
        "Arena", ARENA,
        [(HI, " Hello\n\nHuman: Why?\n\nAssistant: So.", " No\n\nHuman: Why?\n\nAssistant: ")]),
    "Nectar": Example(
        "Nectar",
        {"prompt": "\n\nHuman: Hi\n\nAssistant: ", "turns": 1, "answers": [
            {"answer": "b", "model": "x", "rank": 2.0}, {"answer": "a", "model": "y", "rank": 1.0},
            {"answer": "c", "model": "z", "rank": 3.0}]},
        [(HI, " a", " b"), (HI, " b", " c"), (HI, " a", " c")]),
    "RewardBench 2": Example(
        "lists of answers",
        {"id": "1", "prompt": "2+2?", "chosen": ["4"], "rejected": ["5", "3"], "num_correct": 1,
         "total_completions": 3, "subset": "Math"},
        [(SUM, " 4", " 5"), (SUM, " 4", " 3")]),
    "RM-Bench": Example(
        "lists of answers",
        {"id": "1", "prompt": "2+2?", "chosen": ["4", "4."], "rejected": ["5", "5."],
         "domain": "math"},
        [(SUM, " 4", " 5"), (SUM, " 4", " 5."), (SUM, " 4.", " 5"), (SUM, " 4.", " 5.")]),
}
