"""The table of experiments."""
import pytest

from experiments import registry
from experiments.seeds import load_experiments

ON_LABELS = {
    "histograms", "groups", "agreement", "deciles", "swapped", "strongest",
    "treatments", "subsets", "bins", "inflation", "reliability", "detectors", "shared_bias",
    "overoptimisation", "denoised", "verifier", "votes", "rivals", "diversity",
    "payoff", "verdicts", "members",
}
ON_SHIFT = {"representations", "contrast", "transfer", "shifts"}
ON_METARM = {
    "rounds", "rounds_from_sft", "rounds_ood", "picking", "spread", "one_round", "noise",
    "look_ahead", "ablation",
}


@pytest.fixture
def empty(monkeypatch):
    table = {}
    monkeypatch.setattr(registry, "EXPERIMENTS", table)
    return table


def test_the_decorator_enters_the_function_and_returns_it(empty):
    def plot(summary, path):
        pass

    def measure(config, slot=0):
        pass

    decorate = registry.experiment("a", figure="Fig. 1", base="shift", plot=plot)
    assert decorate(measure) is measure
    assert empty == {"a": registry.Experiment("a", measure, "Fig. 1", "shift", plot, None)}


def test_a_name_is_taken_once_and_a_base_is_a_known_one(empty):
    registry.experiment("a")(lambda config, slot=0: {})
    assert empty["a"].base == "labels" and empty["a"].figure == ""
    with pytest.raises(ValueError, match="'a' is registered twice"):
        registry.experiment("a")
    with pytest.raises(ValueError, match=r"base must be one of .*clean.*, not 'large'"):
        registry.experiment("b", base="large")


def test_every_experiment_is_found_and_starts_from_its_configuration():
    bases = {name: entry.base for name, entry in load_experiments().items()}
    expected = dict.fromkeys(ON_LABELS, "labels") | dict.fromkeys(ON_SHIFT, "shift")
    expected |= dict.fromkeys(ON_METARM, "metarm")
    assert bases == expected | {"planted": "clean", "published": "clean", "headline": "tiny",
                                "judges": "tiny"}


def test_every_experiment_says_in_one_line_what_it_measures():
    for name, entry in load_experiments().items():
        first, *rest = entry.measure.__doc__.splitlines()
        assert first.endswith("."), name
        assert not rest or not rest[0].strip(), name
        assert entry.plot is not None or name in ("headline", "picking")
