"""python -m tools.rewardbench: its scores against independent ones and against sums by hand."""
import json
import math

import numpy as np
import pytest
from helpers import one_line, random_rows

import data
import sample
from common import load_model
from evaluate import bootstrap
from model import RewardModel
from pretrained import export
from tools import benchmark_scores as scores
from tools import rewardbench, score
from tools.benchmark_scores import Example, score_table

HI = "\n\nHuman: Hi\n\nAssistant:"


def example(i, subset, num_correct=1, num_wrong=1, id="", tie=0.0, prompt=None):
    """An Example whose answers have random lengths"""
    rng = np.random.default_rng(i)
    answers = ["x" * n for n in rng.integers(1, 5, num_correct + num_wrong)]
    return Example(f"f:{i}", id, subset, prompt or f"prompt {i}", answers, num_correct, tie)


def random_rewards(examples, seed):
    """Rewards of which many are equal, -> [(k,)]"""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 6, len(e.answers)) / 2 for e in examples]


def table_of(benchmark, examples, rewards, **options):
    """-> {name: row}, names without blanks"""
    rows = score_table(benchmark, examples, rewards, **{"resamples": 20} | options)
    return {row["name"].strip(): row for row in rows}


def column(table, key="score"):
    return {name: row[key] for name, row in table.items()}


# --------------------------------------------------------------------------------------------------
# The public definitions, written down again one by one


def accuracy(wins):
    return sum(wins) / len(wins)


def rewardbench_1(examples, rewards):
    """Accuracy of each subset, then sections weighted by counts -> {name: score}"""
    counts = {}
    for section in scores.SECTIONS.values():
        counts |= section
    out = {}
    for subset in {e.subset for e in examples}:
        own = [r for e, r in zip(examples, rewards) if e.subset == subset]
        out[subset] = accuracy([1 if right > wrong else 0 for right, wrong in own])
    sections = []
    for section, subsets in scores.SECTIONS.items():
        there = [s for s in subsets if s in out]
        if there:
            total = sum(out[s] * counts[s] for s in there)
            out[section] = total / sum(counts[s] for s in there)
            sections.append(out[section])
    out["mean of sections"] = sum(sections) / len(sections)
    return out


def best_of_n(rewards):
    """A share of 1 if the first answer is among the best"""
    top = max(rewards)
    return 1 / list(rewards).count(top) if rewards[0] == top else 0


def ties_score(examples, rewards):
    """RewardBench 2's score of the subset Ties, from dictionaries by question"""
    stats = {"ref": {}, "tied": {}}
    for e, r in zip(examples, rewards):
        kind, number = e.id.split(":")
        right, wrong = list(r[:e.num_correct]), list(r[e.num_correct:])
        gap = min(right) - max(wrong)
        stats[kind][int(number)] = (gap > 0, max(right) - min(right), gap)
    both = sorted(stats["ref"].keys() & stats["tied"].keys())
    preferred, hard, margins = [], [], []
    for number in both:
        _, spread, tied_gap = stats["tied"][number]
        least = min(tied_gap, stats["ref"][number][2])
        preferred.append(tied_gap > spread)
        hard.append(least > spread)
        if spread > 0:
            margins.append(math.tanh(least / spread - 1))
        else:
            margins.append(float(np.sign(least)))  # tanh at infinity
    return (
        0.3 * accuracy([s[0] for s in stats["tied"].values()])
        + 0.3 * accuracy([s[0] for s in stats["ref"].values()])
        + 0.2 * accuracy(preferred) + 0.2 * accuracy(hard) + 0.01 * accuracy(margins)
    )


def rm_bench(rewards):
    """One domain's rewards, (n, 6) -> matrix, {level: accuracy} by triangles"""
    matrix = np.zeros((3, 3))
    for r in rewards:
        for i in range(3):
            for j in range(3):
                matrix[i, j] += r[i] > r[3 + j]
    matrix /= len(rewards)
    return matrix, {
        "hard": np.triu(matrix, 1).sum() / 3,
        "normal": np.diag(matrix).mean(),
        "easy": np.tril(matrix, -1).sum() / 3,
    }


@pytest.mark.parametrize("seed", range(3))
def test_rewardbench_is_as_an_independent_implementation_says(seed):
    names = [name for section in scores.SECTIONS.values() for name in section][seed::2]
    names.append("unknown")
    examples = [example(i, names[i % len(names)]) for i in range(200)]
    rewards = random_rewards(examples, seed)
    got = column(table_of(scores.REWARDBENCH, examples, rewards))
    assert got == pytest.approx(rewardbench_1(examples, rewards))


@pytest.mark.parametrize("seed", range(3))
def test_rewardbench_2_is_as_an_independent_implementation_says(seed):
    examples = [example(i, ("Math", "Focus")[i % 2], 1, 3) for i in range(60)]
    for number in range(12):  # one question without ref, one without tied
        if number != 3:
            examples.append(example(100 + number, "Ties", 1, 4, f"ref:{number}"))
        if number != 5:
            examples.append(example(200 + number, "Ties", 2 + number % 3, 2, f"tied:{number}"))
    rewards = random_rewards(examples, seed)
    for i, e in enumerate(examples):  # most orders of many answers earn nothing
        if e.subset == "Ties" and i % 3:
            rewards[i][:e.num_correct] += 2
    got = column(table_of(scores.REWARDBENCH_2, examples, rewards))
    expected = {}
    for subset in ("Math", "Focus"):
        own = [r for e, r in zip(examples, rewards) if e.subset == subset]
        expected[subset] = accuracy([best_of_n(r) for r in own])
    ties = [(e, r) for e, r in zip(examples, rewards) if e.subset == "Ties"]
    expected["Ties"] = ties_score(*zip(*ties))
    assert 0.1 < expected["Ties"] < 0.9
    expected["mean of subsets"] = sum(expected.values()) / 3
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_rm_bench_is_as_an_independent_implementation_says(seed):
    domains = ("chat", "code", "safety")
    examples = [example(i, domains[i * i % 3 or i % 2], 3, 3) for i in range(60)]
    rewards = random_rewards(examples, seed)
    got = column(table_of(scores.RM_BENCH, examples, rewards))
    expected = {}
    matrices = []
    for domain in sorted({e.subset for e in examples}):
        own = [r for e, r in zip(examples, rewards) if e.subset == domain]
        matrix, levels = rm_bench(own)
        matrices.append(matrix)
        expected[domain] = np.mean(list(levels.values()))
        expected |= {f"{domain} {level}": value for level, value in levels.items()}
    for level in ("easy", "normal", "hard"):
        expected[level] = np.mean([v for k, v in expected.items() if k.endswith(f" {level}")])
    expected["all"] = np.mean([expected[level] for level in ("easy", "normal", "hard")])
    for i, right in enumerate(scores.STYLES):
        for j, wrong in enumerate(scores.STYLES):
            expected[f"{right} > {wrong}"] = np.mean(matrices, 0)[i, j]
    assert got == pytest.approx(expected)


def test_judgebench_is_as_an_independent_implementation_says():
    """Equal rewards are the decision B>A, which is right where the label says so."""
    names = ("mmlu-pro-law", "mmlu-pro-math", "livebench-math", "livecodebench", "mine")
    examples = [example(i, names[i % 5], tie=float(i % 3 == 0)) for i in range(100)]
    rewards = random_rewards(examples, 0)
    got = column(table_of(scores.JUDGEBENCH, examples, rewards))
    right = []
    for e, (of_right, of_wrong) in zip(examples, rewards):
        a, b = (of_wrong, of_right) if e.tie else (of_right, of_wrong)
        decision = "A>B" if a > b else "B>A"
        right.append(decision == ("B>A" if e.tie else "A>B"))
    assert got.keys() == {*names, "mmlu-pro", "all"}
    for name in got:
        prefix = "" if name == "all" else name
        own = [win for e, win in zip(examples, right) if e.subset.startswith(prefix)]
        assert got[name] == pytest.approx(accuracy(own))


def test_the_weights_of_rewardbench_are_those_of_its_examples():
    """2,985 examples in 23 subsets; math-prm has 447 of them and the weight of the code."""
    counts = {section: sum(subsets.values()) for section, subsets in scores.SECTIONS.items()}
    assert counts == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 2 * 984}
    assert sum(counts.values()) - 984 + 447 == 2985
    assert sum(len(subsets) for subsets in scores.SECTIONS.values()) == 23


# --------------------------------------------------------------------------------------------------
# By hand


def test_sections_by_hand():
    """Chat: easy 1 of 2 (weight 100), medium 1 of 1 (40); Reasoning: math 0 of 1 (984), go (164)"""
    subsets = ["alpacaeval-easy", "alpacaeval-easy", "mt-bench-med", "math-prm", "hep-go"]
    examples = [example(i, subset) for i, subset in enumerate(subsets)]
    rewards = [np.array(r) for r in ([2, 1], [1, 1], [0, -1], [1, 2], [5, 1])]
    table = table_of(scores.REWARDBENCH, examples, rewards)
    assert table["Chat"]["score"] == pytest.approx((50 + 40) / 140)
    assert table["Reasoning"]["score"] == pytest.approx(164 / 1148)
    assert table["mean of sections"]["score"] == pytest.approx((90 / 140 + 164 / 1148) / 2)
    assert column(table, "examples") == {
        "Chat": 3, "alpacaeval-easy": 2, "mt-bench-med": 1, "Reasoning": 2, "math-prm": 1,
        "hep-go": 1, "mean of sections": 5,
    }
    assert set(column(table, "chance").values()) == {0.5}


def test_best_of_four_by_hand():
    """First alone, first of two equal, not first"""
    examples = [example(i, "Math", 1, 3) for i in range(3)]
    rewards = [np.array(r) for r in ([3, 1, 2, 0], [3, 3, 0, 0], [1, 2, 0, 0])]
    table = table_of(scores.REWARDBENCH_2, examples, rewards)
    assert table["Math"]["score"] == pytest.approx(1.5 / 3)
    assert table["Math"]["chance"] == pytest.approx(0.25)


def test_ties_by_hand():
    """Question 0: leads 3 and 2, spread 1: all conditions, tanh(2 / 1 - 1).
    Question 1: ref wrong by 1, lead 1 above spread 0.5 in tied alone, tanh(-1 / 0.5 - 1)."""
    examples = [
        example(0, "Ties", 1, 2, "ref:0"), example(1, "Ties", 2, 2, "tied:0"),
        example(2, "Ties", 1, 2, "ref:1"), example(3, "Ties", 2, 2, "tied:1"),
    ]
    rewards = [np.array(r) for r in ([4, 1, 0], [5, 4, 2, 1], [0, 1, 0], [2, 2.5, 1, 0])]
    score = table_of(scores.REWARDBENCH_2, examples, rewards)["Ties"]["score"]
    margin = (math.tanh(1) + math.tanh(-3)) / 2
    assert score == pytest.approx(0.3 * 0.5 + 0.3 * 1 + 0.2 * 1 + 0.2 * 0.5 + 0.01 * margin)


def test_equal_right_answers_in_ties_divide_by_zero():
    """A spread of 0: tanh is 1 for a lead, and 0 / 0 counts as 0"""
    examples = [example(0, "Ties", 1, 1, "ref:0"), example(1, "Ties", 2, 1, "tied:0")]
    for wrong, margin, right in ((0, 1, 1), (1, 0, 0)):
        rewards = [np.array([1, wrong]), np.array([1, 1, wrong])]
        score = table_of(scores.REWARDBENCH_2, examples, rewards)["Ties"]["score"]
        assert score == pytest.approx(right + 0.01 * margin)


def test_levels_of_rm_bench_by_hand():
    """A model that loves markdown: the fancier answer wins, right or wrong; equals are wrong"""
    examples = [example(0, "chat", 3, 3)]
    table = table_of(scores.RM_BENCH, examples, [np.array([0, 1, 2, 0, 1, 2])])
    levels = {name: table[name]["score"] for name in ("easy", "normal", "hard", "chat", "all")}
    assert levels == pytest.approx({"easy": 1, "normal": 0, "hard": 0, "chat": 1 / 3, "all": 1 / 3})
    assert table["markdown > concise"]["score"] == 1
    assert table["concise > markdown"]["score"] == 0


# --------------------------------------------------------------------------------------------------
# Beside the scores


def test_length_is_the_score_of_the_number_of_characters():
    pairs = [("aaa", "b"), ("a", "bb"), ("a", "b"), ("aa", "b")]
    examples = [Example("f", "", "s", str(i), pair) for i, pair in enumerate(pairs)]
    table = table_of(scores.PAIRS, examples, [np.array([0, 1])] * 4)
    assert table["all"]["longer"] == (1 + 0 + 0.5 + 1) / 4
    assert table["all"]["score"] == 0
    four = Example("f", "", "Math", "p", ["aa", "b", "cc", "d"])
    assert table_of(scores.REWARDBENCH_2, [four], [np.zeros(4)])["Math"]["longer"] == 0.5


def test_chance_of_ties_is_that_of_random_rewards():
    """One right answer of two: the lead is positive in half of all orders"""
    examples = [example(0, "Ties", 1, 1, "ref:0"), example(1, "Ties", 2, 1, "tied:0")]
    chance = table_of(scores.REWARDBENCH_2, examples, [np.zeros(2), np.zeros(3)])["Ties"]["chance"]
    rng = np.random.default_rng(1)
    drawn = [ties_score(examples, [rng.normal(size=2), rng.normal(size=3)]) for _ in range(4000)]
    assert chance == pytest.approx(np.mean(drawn), abs=5 * np.std(drawn) / 200 ** 0.5)
    assert 0.2 < chance < 0.4


def test_the_interval_of_one_subset_resamples_its_prompts():
    examples = [example(i, "s", prompt=f"prompt {i // 3}") for i in range(90)]
    rewards = random_rewards(examples, 0)
    row = table_of(scores.PAIRS, examples, rewards, resamples=300)["all"]
    wins = [right > wrong for right, wrong in rewards]
    prompts = [e.prompt for e in examples]
    own_seed = scores.seed_from("0 s")
    assert row["interval"] == pytest.approx(bootstrap(wins, prompts, 300, own_seed))


def test_the_interval_of_a_section_is_that_of_a_weighted_sum():
    """Variance by theory: the sum of weight^2 p (1 - p) / n"""
    names = list(scores.SECTIONS["Chat"])
    examples = [example(i, names[i % 5]) for i in range(1000)]
    rewards = random_rewards(examples, 0)
    table = table_of(scores.REWARDBENCH, examples, rewards, resamples=2000)
    variance = 0
    for name, weight in scores.SECTIONS["Chat"].items():
        p = table[name]["score"]
        variance += (weight / 358) ** 2 * p * (1 - p) / 200
    low, high = table["Chat"]["interval"]
    assert high - low == pytest.approx(2 * 1.96 * variance ** 0.5, rel=0.1)
    assert low < table["Chat"]["score"] < high


# --------------------------------------------------------------------------------------------------
# Files

PAIR = {"prompt": "Hi", "chosen": "Well, hello.", "rejected": "No."}
LISTS = {"id": "7", "prompt": "2+2?", "chosen": ["4"], "rejected": ["5", "3", "no"],
         "num_correct": 1, "subset": "Math"}
MATRIX = {"id": "1", "prompt": "2+2?", "chosen": ["4", "It is 4.", "# 4"],
          "rejected": ["5", "It is 5.", "# 5"], "domain": "safety-refuse"}
JUDGE = {"pair_id": "x", "source": "mmlu-pro-law", "question": "2+2?", "response_A": "It is 5.",
         "response_B": "4", "label": "B>A"}
FILES = {
    scores.REWARDBENCH: [PAIR | {"subset": "hep-go", "id": 3}, PAIR | {"subset": "mt-bench-easy"}],
    scores.REWARDBENCH_2: [
        LISTS, LISTS | {"subset": "Ties", "id": "ref:0"},
        LISTS | {"subset": "Ties", "id": "tied:0", "chosen": ["4", "four"]},
    ],
    scores.RM_BENCH: [MATRIX, MATRIX | {"domain": "chat", "prompt": "Why?"}],
    scores.JUDGEBENCH: [JUDGE, JUDGE | {"label": "A>B", "source": "livebench-math"}],
    scores.PAIRS: [PAIR, {"chosen": HI + " Yes?", "rejected": HI + " What."}],
}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("benchmark", FILES)
def test_a_benchmark_is_known_by_its_keys(benchmark, tmp_path):
    name, examples = rewardbench.read_examples(write(tmp_path / "a.jsonl", FILES[benchmark]))
    assert (name, len(examples)) == (benchmark, len(FILES[benchmark]))


def test_examples_have_their_right_answers_first(tmp_path):
    path = tmp_path / "a.jsonl"
    expected = {
        scores.REWARDBENCH: Example("1", "3", "hep-go", HI, [" Well, hello.", " No."]),
        scores.REWARDBENCH_2: Example(
            "1", "7", "Math", HI.replace("Hi", "2+2?"), [" 4", " 5", " 3", " no"]),
        scores.RM_BENCH: Example(
            "1", "1", "safety", HI.replace("Hi", "2+2?"),
            [" 4", " It is 4.", " # 4", " 5", " It is 5.", " # 5"], 3),
        scores.JUDGEBENCH: Example(
            "1", "x", "mmlu-pro-law", HI.replace("Hi", "2+2?"), [" 4", " It is 5."], tie=1.0),
        scores.PAIRS: Example("1", "", "no subset", HI, [" Well, hello.", " No."]),
    }
    for benchmark, wanted in expected.items():
        _, examples = rewardbench.read_examples(write(path, FILES[benchmark]))
        assert examples[0] == wanted._replace(where=f"{path}:1")
    _, examples = rewardbench.read_examples(write(path, FILES[scores.JUDGEBENCH]))
    assert examples[1].answers == [" It is 5.", " 4"] and examples[1].tie == 0


def test_files_of_one_domain_need_not_name_it(tmp_path):
    unnamed = {key: value for key, value in MATRIX.items() if key != "domain"}
    name, examples = rewardbench.read_examples(write(tmp_path / "a.jsonl", [unnamed]))
    assert name == scores.RM_BENCH and examples[0].subset == "no subset"


def test_an_empty_prompt_and_a_further_column_hide_no_benchmark(tmp_path):
    path = write(tmp_path / "a.jsonl", [LISTS | {"prompt": ""}, LISTS | {"domain": "x"}])
    name, examples = rewardbench.read_examples(path)
    assert name == scores.REWARDBENCH_2 and [e.subset for e in examples] == ["Math", "Math"]
    ties = LISTS | {"subset": "ties", "id": "tied:1", "chosen": ["4"] * 3}
    name, examples = rewardbench.read_examples(write(tmp_path / "b.jsonl", [ties]))
    assert name == scores.REWARDBENCH_2 and examples[0].subset == "Ties"


def test_a_subset_takes_no_name_of_another_row(tmp_path):
    records = [PAIR | {"subset": name} for name in ("hep-go", "Chat", "all", "a\n b")]
    _, examples = rewardbench.read_examples(write(tmp_path / "a.jsonl", records))
    names = [example.subset for example in examples]
    assert names == ["hep-go", "Chat (subset)", "all (subset)", "a b"]
    rows = scores.score_table(scores.REWARDBENCH, examples, [np.array([1.0, 0.0])] * 4)
    assert len({row["name"] for row in rows}) == len(rows)


def test_equal_answers_have_equal_rewards(finished, by_run):
    """Which they have not where one of them shares its row with others."""
    run, _, name = sample.open_finished_run(str(finished), scoring=True)
    model = load_model(run, RewardModel, name)
    examples = [Example("1", "", "x", HI, [" Well, hello there.", " No.", " Well, hello there."])]
    examples += [Example("2", "", "x", HI + f" {i}?", [" Yes."] * 4) for i in range(9)]
    rewards, _ = rewardbench.rewards_of(run, model, examples)
    assert all(np.ptp(r) == 0 for r in rewards[1:])
    assert rewards[0][0] == rewards[0][2] != rewards[0][1]


def test_a_source_that_names_each_pair_is_no_subset(tmp_path):
    records = [PAIR | {"prompt": f"{i}?", "source": f"page {i}"} for i in range(101)]
    name, examples = rewardbench.read_examples(write(tmp_path / "a.jsonl", records))
    assert name == scores.PAIRS and {e.subset for e in examples} == {"no subset"}
    _, examples = rewardbench.read_examples(write(tmp_path / "b.jsonl", records[:100]))
    assert len({e.subset for e in examples}) == 100


@pytest.mark.parametrize("records, parts", [
    ([{"chosen": "a", "x": "b"}], (":1: key 'rejected' is missing", "keys seen: 'chosen', 'x'")),
    ([JUDGE, PAIR], (":2: has the keys of pairs, and the first record those of JudgeBench",)),
    ([JUDGE | {"label": "A=B"}], (":1: 'label' must be A>B or B>A", "'A=B'")),
    ([JUDGE | {"question": 4}], (":1: 'question' must be a string",)),
    ([MATRIX | {"chosen": ["4"]}], (":1: a record of RM-Bench has three", "not 1 and 3")),
    ([LISTS | {"chosen": ["4", "four"]}], (":1: a record of RewardBench 2 has one", "not 2")),
    ([LISTS | {"rejected": ["5", 3]}], (":1: 'rejected' must be a string",)),
    ([LISTS | {"subset": "Ties"}], (":1: 'id' in the subset Ties must be ref:N", "'7'")),
    ([PAIR, LISTS], (":2: has the keys of RewardBench 2, and the first record those of pairs",)),
    ([PAIR | {"subset": "a\ud800"}], (":1: 'subset' holds half of a surrogate pair",)),
    ([LISTS | {"id": "\ud800"}], (":1: 'id' holds half of a surrogate pair",)),
    ([FILES[scores.REWARDBENCH_2][1]] * 2, (":2: 'id' in the subset Ties", "'ref:0'")),
])
def test_what_is_wrong_with_a_file_is_one_line(records, parts, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", records)
    assert rewardbench.main([path, "--run=/nowhere"]) == 2  # before the run is opened
    one_line(capsys, path, *parts)


# --------------------------------------------------------------------------------------------------
# Rewards


@pytest.fixture(scope="module")
def by_run(finished, tmp_path_factory):
    """Files of all benchmarks scored by a finished run -> folder, printed text"""
    folder = tmp_path_factory.mktemp("benchmarks")
    paths = [write(folder / f"{i}.jsonl", records) for i, records in enumerate(FILES.values())]
    options = [f"--run={finished}", "--model=reward_baseline", f"--out={folder / 'out.json'}",
               f"--scores={folder / 'scores.jsonl'}"]
    assert rewardbench.main([*paths, *options]) == 0
    return folder


def test_rewards_are_those_of_score(by_run, finished, tmp_path):
    """Answer by answer, whatever rows they share"""
    lines = [json.loads(line) for line in (by_run / "scores.jsonl").read_text().splitlines()]
    answers = []
    rewards = []
    for i in range(len(FILES)):
        path = str(by_run / f"{i}.jsonl")
        _, examples = rewardbench.read_examples(path)
        own = [line for line in lines if line["file"] == path]
        assert [line["where"] for line in own] == [e.where for e in examples]
        for e, line in zip(examples, own, strict=True):
            answers += [{"prompt": e.prompt, "response": answer} for answer in e.answers]
            rewards += line["rewards"]
    path = write(tmp_path / "answers.jsonl", answers)
    assert score.main([path, f"--run={finished}", "--reward=reward_baseline"]) == 0
    scored = (tmp_path / "answers.scored.jsonl").read_text().splitlines()
    assert rewards == pytest.approx([json.loads(line)["reward"] for line in scored], abs=1e-5)
    assert len(set(rewards)) > len(rewards) / 2


def test_the_written_table_is_that_of_the_written_rewards(by_run):
    out = json.loads((by_run / "out.json").read_text())
    assert out["model"] == "reward_baseline"
    assert [table["benchmark"] for table in out["files"]] == list(FILES)
    lines = [json.loads(line) for line in (by_run / "scores.jsonl").read_text().splitlines()]
    for table in out["files"]:
        benchmark, examples = rewardbench.read_examples(table["file"])
        rewards = [np.array(x["rewards"]) for x in lines if x["file"] == table["file"]]
        assert table["scores"] == score_table(benchmark, examples, rewards)


def test_an_exported_folder_has_the_scores_of_its_run(by_run, finished, tmp_path, capsys):
    run, _, name = sample.open_finished_run(str(finished), reward="reward_baseline", scoring=True)
    export.save(tmp_path / "hf", load_model(run, RewardModel, name), run.tokenizer)
    path = str(by_run / "1.jsonl")
    out = tmp_path / "out.json"
    assert rewardbench.main([path, f"--model={tmp_path / 'hf'}", f"--out={out}"]) == 0
    rows = json.loads(out.read_text())["files"][0]["scores"]
    expected = json.loads((by_run / "out.json").read_text())["files"][1]["scores"]
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine["name"] == theirs["name"]
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)
    printed = capsys.readouterr().out
    assert f"{path}: RewardBench 2, scored by {tmp_path / 'hf'}" in printed
    assert "Ties" in printed and "note" not in printed


def test_the_end_of_what_is_too_long_is_scored(finished, tmp_path, capsys, monkeypatch):
    """An answer of more tokens than the context, and a dialogue whose beginning is cut"""
    run, _, name = sample.open_finished_run(str(finished), scoring=True)
    context = run.cfg.model.context
    long = " ".join(f"well {i}" for i in range(context))
    records = [PAIR | {"chosen": long}, PAIR | {"prompt": long}, PAIR]
    path = write(tmp_path / "a.jsonl", records)
    lines = tmp_path / "scores.jsonl"
    assert rewardbench.main([path, f"--run={finished}", f"--scores={lines}"]) == 0
    printed = capsys.readouterr().out
    assert f"note: 3 answers of 6 and their prompts are longer than {context:,} tokens" in printed
    _, examples = rewardbench.read_examples(path)
    model = load_model(run, RewardModel, name)
    for e, line in zip(examples, lines.read_text().splitlines(), strict=True):
        for answer, reward in zip(e.answers, json.loads(line)["rewards"], strict=True):
            prompt = run.tokenizer.encode_dialogue(e.prompt)
            response = run.tokenizer.encode_text(answer) + [run.tokenizer.eos_id]
            whole = (prompt + response)[-context:]
            row = data.Row(np.array(whole[:-1]), (np.array(whole[-1:]),))
            assert reward == pytest.approx(
                float(rewardbench.score_rows(run, model, [row])), abs=1e-5)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_passes_hold_every_row_and_bound_the_memory(size, monkeypatch):
    monkeypatch.setattr(rewardbench, "CELLS", 2000)
    rows = random_rows(40, 3, 0) + random_rows(40, 1, 1)
    passes = rewardbench.passes(rows, size)
    assert sorted(np.concatenate(passes)) == list(range(80))
    for index in passes:
        longest = max(len(rows[i]) for i in index)
        assert len(index) <= size
        assert len(index) == 1 or len(index) * longest ** 2 <= 2000
    if size > 1:
        assert len(passes) < 40
        mixed = [index for index in passes if len({len(rows[i].responses) for i in index}) > 1]
        assert len(mixed) <= 1


# --------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("argv, parts", [
    (["RUN"], ("no file is given",)),
    (["FILE"], ("--run=FOLDER is missing",)),
    (["FILE", "RUN", "--model=sft"], ("--model=sft", "reward_baseline")),
    (["FILE", "RUN", "--out=FILE/x.json"], ("cannot be written", "another file with --out")),
    (["FILE", "RUN", "--scores=FILE/x"], ("cannot be written", "another file with --scores")),
    (["FILE", "--model=/no/such"], ("model = '/no/such': no such folder",)),
    (["FILE", "RUN", "--template=chatml"], ("--template is of --model=FOLDER",)),
    (["FILE", "RUN", "--policy=sft"], ("'--policy=sft'", "--scores=FILE.jsonl")),
    (["FILE", "RUN", "--out=x", "--scores=./x"], ("name the same file",)),
    (["FILE", "RUN", "--out=new/"], ("new/: cannot be written",)),
    (["FILE", "--model=/no/such", "--init=a"], ("--init is of --run=FOLDER",)),
    (["FILE", "RUN", "--init=/no/such"], ("--init=/no/such: the run has no pretrained model",)),
    (["FILE", "RUN", "--out=FILE"], ("--out=", "exists already")),
    (["FILE", "RUN", "--scores=FILE"], ("--scores=", "exists already")),
    (["/no/such.jsonl", "RUN"], ("/no/such.jsonl", "no such file")),
])
def test_bad_arguments_are_one_line(finished, argv, parts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl", [PAIR])
    words = [word.replace("RUN", f"--run={finished}").replace("FILE", path) for word in argv]
    assert rewardbench.main(words) == 2
    one_line(capsys, *parts)


def test_without_arguments_the_usage_is_printed(capsys):
    assert rewardbench.main([]) == 0
    assert "python -m tools.rewardbench FILE --run=DIR" in capsys.readouterr().out
