"""Tables and the report of results.json."""
from runtime.report import report, table

SCORES = {"pairs": 2, "accuracy": 0.5, "chance": 0.5, "longer_wins": 0.5, "nll": 0.75, "ece": 0.25,
          "accuracy_interval": (0.1, 0.9)}
COMPARED = {"win": 0.5, "tie": 0.375, "lose": 0.125}


def detection(count):
    signals = ("mean", "std", "single")
    measures = {"auroc": 0.875, "ap": 0.5, "precision": 0.25, "recall": 0.125}
    scores = {f"{m}_{s}": value for m, value in measures.items() for s in signals}
    return {"count": count, **scores}


RESULTS = {
    "reward": {"flip": {"valid": SCORES}},
    "noise": {"all": detection(4), "bias": detection(2)},
    "judge": "gold reward",
    "policy": {
        "sft": {"judge": 1.5, "kl": 0.0, "length": 9.0},
        "policy_flip": {"judge": 2.5, "kl": 3.25, "length": 8.0, **COMPARED},
    },
}


def test_a_table_is_aligned_and_leaves_unknown_numbers_empty():
    text = table(["name", "a", "bb"], [["x", 0.12345, 12], ["longer", None, -1.0]])
    assert text.splitlines() == [
        "name        a      bb",
        "---------------------",
        "x       0.123      12",
        "longer         -1.000",
    ]


def test_a_table_without_rows_is_its_head():
    assert table(["a", "b"], []) == "a  b\n----"


def test_the_report_shows_what_there_is():
    text = report(RESULTS)
    for part in ("flip on valid", "bias (2)", "policy_flip", "3.250", "judged by gold reward"):
        assert part in text
    only_rewards = report({"reward": RESULTS["reward"]})
    assert "policy" not in only_rewards and "wrong labels" not in only_rewards


def test_numbers_stand_in_the_row_of_their_name():
    lines = {line.split("  ")[0]: line.split() for line in report(RESULTS).splitlines() if line}
    expected = ["0.875", "0.875", "0.875", "0.250", "0.125", "0.250/0.125", "0.250/0.125"]
    assert lines["bias (2)"][2:] == expected
    expected = ["2", "0.500", "0.100-0.900", "0.500", "0.750", "0.250"]  # no gold accuracy
    assert lines["flip on valid"][3:] == expected
    assert lines["sft"][1:] == ["1.500", "0.000", "9.000"]
    expected = ["2.500", "0.500", "0.375", "0.125", "0.375", "3.250", "8.000"]
    assert lines["policy_flip"][1:] == expected


def test_a_vote_no_better_than_length_is_a_warning():
    low = SCORES | {"longer_wins": 0.7, "accuracy_interval": (0.6, 0.9)}
    text = report({"vote": {"valid": low}, "reward": {}})
    assert "vote on valid" in text and "warning: on valid, the vote agrees with 50.0%" in text
    assert "less than half" not in text
    sure = SCORES | {"longer_wins": 0.59, "accuracy_interval": (0.6, 0.9)}
    assert "warning" not in report({"vote": {"valid": sure}, "reward": {}})


def test_a_vote_that_most_labels_contradict_is_a_second_warning():
    low = SCORES | {"accuracy": 0.45, "accuracy_interval": (0.41, 0.499)}
    text = report({"vote": {"valid": low}})
    assert text.count("warning: on valid") == 2
    assert ("warning: on valid, the vote agrees with surely less than half of the labels, which it "
            "has not seen (95 %: 41.0% to 49.9%); check that chosen and rejected") in text
    unsure = low | {"accuracy_interval": (0.41, 0.5)}
    assert report({"vote": {"valid": unsure}}).count("warning") == 1


def test_rounds_are_compared_with_plain_ppo():
    policy = {"judge": 2.0, "kl": 1.0, "length": 8.0, **COMPARED}
    compared = {"policy_meta_1": policy | {"against policy_flip": COMPARED}}
    results = RESULTS | {"policy": RESULTS["policy"] | compared, "policy_ood": compared}
    text = report(results)
    block = text[text.index("rounds, against plain PPO"):].splitlines()
    assert block[2].startswith("policy_meta_1 ") and block[2].split()[-1] == "0.375"
    assert block[3].startswith("policy_meta_1, out of distribution") and len(block) == 4
