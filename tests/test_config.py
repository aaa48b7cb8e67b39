import dataclasses
import glob
import os

import pytest
from hypothesis import given, strategies as st

import config
from config import Config, ConfigError, load

HERE = os.path.dirname(os.path.abspath(__file__))
FILES = sorted(glob.glob(os.path.join(HERE, "..", "configs", "*.toml")))


def write(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_text(text)
    return str(path)


def refusal(overrides=(), path=None):
    """The message of the ConfigError, which is one line."""
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    assert str(error.value).isprintable()
    return str(error.value)


def test_defaults_are_valid():
    assert load() == Config()
    for key, field in config.keys().items():
        assert config.checked(key, field.default, field) == field.default


@pytest.mark.parametrize("path", FILES, ids=os.path.basename)
def test_every_file_in_configs_loads(path):
    assert load(path) != Config()


def test_there_are_files_in_configs():
    assert "tiny.toml" in map(os.path.basename, FILES)


def test_the_file_goes_over_defaults_and_overrides_over_the_file(tmp_path):
    path = write(tmp_path, 'seed = 4\n[ppo]\nlr = 1\nkl_kind = "k3"\n[data]\ntrain = ["a.jsonl", "b.jsonl"]\n[model]\ntied = false')
    c = load(path, [("ppo.lr", "1e-3"), ("strength.q", "0.25")])
    assert (c.seed, c.ppo.kl_kind, c.data.train, c.model.tied) == (4, "k3", ("a.jsonl", "b.jsonl"), False)
    assert (c.ppo.lr, c.strength.q) == (1e-3, 0.25)
    assert c.ppo.clip == Config().ppo.clip and c.reward == Config().reward
    assert load(path).ppo.lr == 1.0 and isinstance(load(path).ppo.lr, float)  # a whole number is a number


@pytest.mark.parametrize("key, text, value", [
    ("seed", "7", 7), ("ppo.lr", "1", 1.0), ("model.tied", "false", False), ("model.tied", "True", True), ("out_dir", "a b", "a b"),
    ("reward.methods", "baseline, soft_margin,flip", ("baseline", "soft_margin", "flip")), ("data.train", "a.jsonl", ("a.jsonl",)),
    ("data.ood", "", ()), ("data.ood", "a,,b,", ("a", "b")),
    ("strength.q", "0", 0.0), ("strength.q", "1", 1.0),  # the ends of a range belong to it
])
def test_a_text_from_the_command_line_becomes_the_setting_type(key, text, value):
    section, _, name = key.rpartition(".")
    c = load(None, [(key, text)])
    got = getattr(getattr(c, section) if section else c, name)
    assert got == value and type(got) is type(value)


def test_a_later_override_wins():
    assert load(None, [("seed", "1"), ("seed", "2")]).seed == 2


@pytest.mark.parametrize("key, text, remedy", [
    ("reward.epoch", "3", "reward.epochs"), ("stregnth.q", "0.1", "strength.q"), ("sed", "1", "nearest is seed"), ("", "1", "nearest"),
    ("model", "3", "no such setting"), ("seed", "1.5", "a whole number"), ("seed", "1.0", "a whole number"),
    ("seed", "x", "a whole number"), ("seed", "", "a whole number"), ("seed", "true", "a whole number"),
    ("ppo.lr", "fast", "a number"), ("model.tied", "1", "true or false"), ("model.tied", "yes", "true or false"),
    ("ppo.lr", "nan", "a number"), ("ppo.lr", "inf", "a number"), ("ppo.lr", "-inf", "a number"), ("seed", "nan", "a whole number"),
    ("seed", "-1", "from 0 to 2147483648"), ("strength.q", "1.01", "from 0.0 to 1.0"), ("strength.q", "-0.01", "from 0.0 to 1.0"),
    ("data.limit", "-3", "0 or more"), ("seed", "9" * 5000, "a whole number"),
    ("device", "gpu", "auto, cpu, cuda"), ("ppo.kl_kind", "k4", "k1, k2, k3"), ("reward.methods", "baseline,flop", "did you mean flip"),
])
def test_a_bad_setting_is_one_line_with_key_value_and_remedy(key, text, remedy):
    message = refusal([(key, text)])
    bad = "flop" if "flop" in text else text
    assert message.startswith(f"{key} = ") and remedy in message
    assert repr(bad) in message or f" = {bad}:" in message


@pytest.mark.parametrize("line, key", [
    ("seed = true", "seed"), ("seed = 1.0", "seed"), ('seed = [1]', "seed"), ("seed = 2020-01-01", "seed"), ("out_dir = 3", "out_dir"),
    ("[seed]\na = 1", "seed.a"), ("model = 3", "model"), ("[[model]]\nwidth = 64", "model"), ("[model]\ntied = 1", "model.tied"),
    ("[ppo]\nlr = true", "ppo.lr"), ("[ppo]\nlr = nan", "ppo.lr"), ("[ppo]\nlr = inf", "ppo.lr"), ("[data]\ntrain = [1]", "data.train"),
    ("[data]\ntrain = 1", "data.train"), ("[data.train]\na = 1", "data.train"), ("[model.width]\na = 1", "model.width"),
    ("[modle]\nwidth = 64", "modle.width"), ("[modle]", "modle"), ('"a\\nb" = 1', "a"), ("[ppo]\nlr = 1" + "0" * 400, "ppo.lr"),
])
def test_a_bad_line_of_a_file_is_named(tmp_path, line, key):
    assert refusal(path=write(tmp_path, line)).lstrip("'").startswith(key)  # a key may be quoted, if it has to be


@pytest.mark.parametrize("overrides, named", [
    (dict(model_width="30"), "model.width"), (dict(model_width="12"), "model.width"),  # heads of odd width cannot be rotated
    (dict(model_kv_heads="3"), "model.kv_heads"), (dict(ppo_max_new="256"), "ppo.max_new"), (dict(ppo_minibatches="65"), "ppo.minibatches"),
    (dict(reward_methods="baseline"), "ppo.methods"), (dict(data_train=""), "data.train"),
    (dict(data_train="world,a.jsonl"), "data.train"), (dict(data_valid="a.jsonl"), "data.train"),
    (dict(data_train="a.jsonl", data_valid_share="0"), "data.valid_share"), (dict(ensemble_folds="1"), "ensemble.folds"),
    (dict(ensemble_folds="3"), "ensemble.folds"),  # must divide the four members
])
def test_settings_that_contradict_each_other_are_refused(overrides, named):
    message = refusal([(key.replace("_", ".", 1), text) for key, text in overrides.items()])
    assert message.startswith(f"{named} = ")


def test_bad_files_are_refused(tmp_path):
    assert "no such file" in refusal(path=str(tmp_path / "none.toml"))
    assert str(tmp_path) in refusal(path=str(tmp_path))
    assert "c.toml" in refusal(path=write(tmp_path, "seed = = 3"))
    (tmp_path / "d.toml").write_bytes(b'out_dir = "\xff"')
    assert "d.toml" in refusal(path=str(tmp_path / "d.toml"))
    assert "c.toml" in refusal(path=write(tmp_path, "seed = " + "9" * 5000))  # Python refuses to read so long a number


def test_a_configuration_is_frozen():
    c = load()
    for section, name in ((c, "seed"), (c.ppo, "lr")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, name, 1)
    assert hash(c) == hash(load())  # so it can be a key


@given(st.sampled_from(list(config.keys())) | st.text(), st.text() | st.sampled_from(["0", "1", "-1", "1e9", "nan", "true", "world", ","]))
def test_any_text_for_any_key_is_accepted_or_refused_in_one_line(key, text):
    try:
        assert isinstance(load(None, [(key, text)]), Config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


def test_the_help_names_every_setting_and_its_default():
    text = config.help_text()
    assert "--ppo.kl_kind=k1 " in text and "[k1 k2 k3]" in text and "--reward.methods=baseline,flip" in text
    assert all(f"--{key}=" in text and field.metadata["help"] in text for key, field in config.keys().items())
