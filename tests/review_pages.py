"""Review pages for the tests: small ones, and one of the built-in world, made without training."""
import json
import math
import random
from itertools import groupby

import numpy as np

import world
from data import Pair
from labels.review import write_page
from runtime.audit import audit, audit_table
from runtime.files import digest

HOSTILE = [
    "</script><script>window.hacked = 1; alert(1)</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!--<script>",
    "]]></style><svg onload=window.hacked=1>",
    "&lt;b&gt; &amp; \u2028 \u2029 \x00 \\u003c {{page}} {{policy}} $& $'",
    "emoji 😀, half a pair \ud83d",
]


def make_pair(i, **change):
    pair = {
        "source": f"my_pairs.jsonl:{i + 1}",
        "key": f"{i:016x}",
        "prompt": f"\n\nHuman: question {i}?\n\nAssistant:",
        "chosen": f" The answer is {i}, and it is short.",
        "rejected": f" The answer is {i + 1}, and it is long.",
        "score": i / 1000,
        "mean": -1.5,
        "std": 0.25,
        "suggestion": "exchange" if i % 2 == 0 else "drop",
        "length_says": "keep",
        "columns": {"annotator": "AB"[i % 2]},
    }
    return pair | change


def make_page(pairs, run="a run", **change):
    page = {
        "title": "Labels of my_pairs.jsonl",
        "run": run,
        "summary": [{"title": "Audit", "text": "pairs  10\nwrong   3"}],
        "histogram": {"edges": [0.0, 0.5, 1.0], "kept": [0, 7], "suspect": [3, 0], "label": "s"},
        "groups": [
            {"column": "annotator", "value": "A", "pairs": 6, "doubted": 0.1, "low": 0.0,
             "high": 0.2, "stands_out": False},
            {"column": "annotator", "value": "B", "pairs": 4, "doubted": 0.3, "low": 0.2,
             "high": 0.5, "stands_out": True},
        ],
        "columns": ["annotator"],
        "pairs": pairs,
    }
    return page | change


def write_lines(path, *lines):
    """lines: dictionaries, or text as it is"""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def line_of(source="a.jsonl:1", key="k", decision="wrong", **more):
    return {"source": source, "key": key, "decision": decision, **more}


# --------------------------------------------------------------------------------------------------
# A page of the built-in world

CARELESS = "E"  # a third of its labels are exchanged on purpose
COLUMNS = ("annotator", "domain")
DOMAINS = ("facts", "advice")


def demo_page(n=1200, num_suspects=160):
    """The `page` of labels.review.write_page for n pairs, of which the most suspect are listed

    The mean is the true quality behind noise, and of a few pairs its opposite: a stand-in for the
    vote of an ensemble.
    """
    rng = random.Random(0)
    pairs = [scored(row, rng) for row in labelled_rows(n, rng)]
    pairs.sort(key=score_of)
    suspects = pairs[:num_suspects]
    for pair in suspects:
        pair["suggestion"] = "exchange" if pair["score"] < 0.15 else "drop"
    return {
        "title": "Which labels of world.jsonl are wrong?",
        "run": "demo",
        "summary": summary(pairs, suspects),
        "histogram": histogram(pairs),
        "groups": groups(pairs),
        "columns": list(COLUMNS),
        "pairs": suspects,
    }


def labelled_rows(n, rng):
    """World pairs of two domains with invented annotators, in random order"""
    rows = []
    for domain in DOMAINS:
        for row in world.pairs(n // 2, f"demo {domain}", world.Noise(flip=0.03), (domain,))[0]:
            annotator = "ABCDEF"[rng.randrange(6)]
            if annotator == CARELESS and rng.random() < 1 / 3:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            rows.append({**row, "columns": {"annotator": annotator, "domain": domain}})
    rng.shuffle(rows)
    for i, row in enumerate(rows, 1):
        row["source"] = f"world.jsonl:{i}"
    return rows


def scored(row, rng):
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    is_mistaken = rng.random() < 0.04
    mean = (-1 if is_mistaken else 1) * gold_diff(row) / 2 + rng.gauss(0, 0.8)
    return {
        **row,
        "key": digest([prompt, chosen, rejected]),
        "mean": mean,
        "std": abs(rng.gauss(0.3, 0.1)),
        "score": 1 / (1 + math.exp(-1.5 * mean)),
        "suggestion": "keep",
        "length_says": "keep" if len(chosen) > len(rejected) else "exchange",
    }


def score_of(pair):
    return pair["score"]


def is_doubted(pair):
    return pair["suggestion"] != "keep"


def gold_diff(pair):
    return world.gold(pair["prompt"], pair["chosen"]) - world.gold(pair["prompt"], pair["rejected"])


def is_wrong(pair):
    return gold_diff(pair) < 0


def summary(pairs, suspects):
    texts = []
    for pair in pairs:
        texts.append(Pair(pair["prompt"], pair["chosen"], pair["rejected"]))
    num_wrong = sum(map(is_wrong, suspects))
    trust = (
        f"Of these {len(suspects)} suspects {num_wrong} are wrong by the true quality,\n"
        "which the built-in world knows and your file does not."
    )
    return [
        {"title": "Audit", "text": audit_table({"world.jsonl": audit(texts)})},
        {"title": "How far to trust the suspects", "text": trust},
    ]


def histogram(pairs, bins=25):
    edges = np.linspace(0, 1, bins + 1)
    kept = [pair["score"] for pair in pairs if not is_doubted(pair)]
    suspect = [pair["score"] for pair in pairs if is_doubted(pair)]
    return {
        "edges": edges.tolist(),
        "kept": np.histogram(kept, edges)[0].tolist(),
        "suspect": np.histogram(suspect, edges)[0].tolist(),
        "label": "Label score: low is suspect",
    }


def groups(pairs):
    rows = []
    share = sum(map(is_doubted, pairs)) / len(pairs)
    for column in COLUMNS:
        def value_of(pair):
            return pair["columns"][column]

        for value, members in groupby(sorted(pairs, key=value_of), value_of):
            doubts = [is_doubted(pair) for pair in members]
            low, high = wilson(sum(doubts), len(doubts))
            rows.append({
                "column": column, "value": value, "pairs": len(doubts),
                "doubted": sum(doubts) / len(doubts), "low": low, "high": high,
                "stands_out": low > share,
            })
    return rows


def wilson(successes, trials, z=1.96):
    """95 % interval of a share, as scipy's binomtest(…).proportion_ci(method="wilson")"""
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials ** 2)) / scale
    return centre - half, centre + half


# --------------------------------------------------------------------------------------------------
# assets/review.png


def take_picture(browser, folder):
    """The page with some decisions, by the true quality -> bytes of assets/review.png"""
    page = demo_page()
    write_page(folder / "report.html", page)
    browser.resize(1280, 900)
    browser.open(folder / "report.html")
    browser.press("o")
    for i, pair in enumerate(page["pairs"]):
        if i > 30 and browser.run(WORTH_SHOWING):
            break
        browser.press(key_for(pair))
    return browser.screenshot()


WORTH_SHOWING = """
    document.querySelector("#chosen mark") && document.querySelector("#rejected mark") &&
    !byId("unfold").hidden
"""


def key_for(pair):
    if abs(gold_diff(pair)) < 1.5:
        return "u"
    return "w" if is_wrong(pair) else "r"
