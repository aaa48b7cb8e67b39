"""Settings: types, ranges, contradictions, files, old names, help."""
import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
from config import Config, ConfigError, load
from strength import TREATMENTS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
RESULTS = sorted((ROOT / "results").rglob("*.json"))


def write(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_text(text)
    return str(path)


def error_message(overrides=(), path=None):
    """The message of the ConfigError, which is one line."""
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    assert str(error.value).isprintable()
    return str(error.value)


def value_of(cfg, key):
    section, _, name = key.rpartition(".")
    return getattr(getattr(cfg, section) if section else cfg, name)


@pytest.fixture
def notes(monkeypatch, capsys):
    """What is printed to stderr, with no old name announced yet"""
    monkeypatch.setattr(config, "announced", set())
    return lambda: capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Values

def test_defaults_are_valid():
    assert load() == Config()
    for key, field in config.keys().items():
        assert config.checked(key, field.default, field) == field.default


def test_the_note_on_voters_is_for_voters_that_are_trained(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[pretrained]\nnote = "the voters know little"\n')
    said = []
    config.load(path, [("strength.votes", "votes.jsonl")], said.append)
    assert said == []
    config.load(path, [], said.append)
    assert said == ["note: the voters know little"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_file_in_configs_loads(path, notes):
    assert load(path) != Config()
    assert load(path).out_dir == f"out/{path.stem}"
    assert notes() == ""  # new names only


def test_there_are_files_in_configs():
    assert "tiny.toml" in [path.name for path in CONFIGS]


def test_the_file_overrides_defaults_and_overrides_override_the_file(tmp_path):
    path = write(tmp_path, 'seed = 4\n[ppo]\nlr = 1\nkl_estimator = "k3"\n'
                           '[data]\ntrain = ["a.jsonl", "b.jsonl"]\n[model]\ntied = false')
    c = load(path, [("ppo.lr", "1e-3"), ("strength.q", "0.25")])
    assert (c.seed, c.ppo.kl_estimator) == (4, "k3")
    assert (c.data.train, c.model.tied) == (("a.jsonl", "b.jsonl"), False)
    assert (c.ppo.lr, c.strength.q) == (1e-3, 0.25)
    assert c.ppo.cliprange == Config().ppo.cliprange and c.reward == Config().reward
    assert load(path).ppo.lr == 1.0 and isinstance(load(path).ppo.lr, float)


@pytest.mark.parametrize("key, text, value", [
    ("seed", "7", 7),
    ("ppo.lr", "1", 1.0),
    ("model.tied", "false", False),
    ("model.tied", "True", True),
    ("out_dir", "a b", "a b"),
    ("reward.methods", "baseline, soft_margin,flip", ("baseline", "soft_margin", "flip")),
    ("data.train", "a.jsonl", ("a.jsonl",)),
    ("data.ood", "", ()),
    ("data.ood", "a,,b,", ("a", "b")),
    ("data.weights", "", ()),
    ("strength.q", "0", 0.0),  # both ends belong to a range
    ("strength.q", "1", 1.0),
])
def test_a_text_of_the_command_line_gets_the_type_of_the_setting(key, text, value):
    found = value_of(load(None, [(key, text)]), key)
    assert found == value and type(found) is type(value)


def test_the_last_override_wins():
    assert load(None, [("seed", "1"), ("seed", "2")]).seed == 2


def test_methods_are_those_of_the_table_of_treatments():
    assert config.METHODS == tuple(TREATMENTS) and "baseline" in config.METHODS
    for key in ("strength.method", "reward.methods", "meta.method", "ppo.methods"):
        assert config.keys()[key].metadata["choices"] == config.METHODS


@pytest.mark.parametrize("key", ["ppo.top_p", "ppo.repetition_penalty",
                                 "evaluate.repetition_penalty"])
def test_truncated_sampling_is_off_by_default(key):
    assert value_of(Config(), key) == 1.0


def test_samples_of_metarm_are_drawn_as_in_the_paper():
    meta = Config().meta
    assert (meta.prompts, meta.k) == (0, 5)  # five answers to every prompt
    assert 0.8 < meta.temperature <= 1.0     # "slightly raised"
    assert (meta.top_p, meta.repetition_penalty) == (0.9, 1.1)
    assert (meta.start, meta.policy_start) == ("sft", "last")


def test_a_configuration_is_frozen():
    c = load()
    for section, name in ((c, "seed"), (c.ppo, "lr")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, name, 1)
    assert hash(c) == hash(load())  # usable as a dictionary key


# --------------------------------------------------------------------------------------------------
# Errors

@pytest.mark.parametrize("key", ["out_dir", "data.train", "data.ood", "model.init"])
@pytest.mark.parametrize("text, remedy", [
    ("a\udcff.jsonl", "is not valid UTF-8; rename"),
    ("a\0b", "control character; rename"),
    ("a\nb", "line break or another control character; rename"),
    ("a\u2028b", "line break"),
    ("a" * 5000, "has 5,000 characters"),
])
def test_a_path_that_no_message_can_hold_is_refused(key, text, remedy):
    message = error_message([(key, text)])
    assert message.startswith(f"{key} = ") and remedy in message
    assert message.isprintable() and len(message) < 400


@pytest.mark.parametrize("text", ["über den Fluß.jsonl", "全角\u3000空白", "a b", "it's"])
def test_names_of_all_languages_are_accepted(text):
    assert load(overrides=[("out_dir", text), ("data.train", text)]).out_dir == text


def test_a_password_in_a_value_is_not_printed():
    message = error_message([("data.train", "https://user:secret@host/a\n.jsonl")])
    assert "secret" not in message and "https://***@host/a" in message


def test_a_long_unknown_name_takes_no_time_and_no_space():
    message = error_message([("ppo." + "lr" * 100_000, "1")])
    assert "nearest is ppo." in message and len(message) < 400


@pytest.mark.parametrize("key, text, remedy", [
    ("reward.epoch", "3", "reward.epochs"),
    ("stregnth.q", "0.1", "strength.q"),
    ("sed", "1", "nearest is seed"),
    ("", "1", "nearest"),
    ("ppo.epoch", "1", "nearest is ppo.num_ppo_epochs"),  # by its old name
    ("model", "3", "no such setting"),
    ("seed", "1.5", "a whole number"),
    ("seed", "1.0", "a whole number"),
    ("seed", "x", "a whole number"),
    ("seed", "", "a whole number"),
    ("seed", "true", "a whole number"),
    ("ppo.lr", "fast", "a number"),
    ("model.tied", "1", "true or false"),
    ("model.tied", "yes", "true or false"),
    ("ppo.lr", "nan", "a number"),
    ("ppo.lr", "inf", "a number"),
    ("ppo.lr", "-inf", "a number"),
    ("seed", "nan", "a whole number"),
    ("seed", "-1", "from 0 to 2147483648"),
    ("strength.q", "1.01", "from 0.0 to 1.0"),
    ("strength.q", "-0.01", "from 0.0 to 1.0"),
    ("data.limit", "-3", "0 or more"),
    ("seed", "9" * 5000, "a whole number"),
    ("device", "gpu", "auto, cpu, cuda"),
    ("ppo.kl_estimator", "k4", "k1, k2, k3"),
    ("ppo.reward", "best", "mean_minus_std"),
    ("ppo.domains", "facts", "arithmetic, translation, programs"),
    ("reward.methods", "baseline,flop", "did you mean flip"),
    ("data.weights", "1,x", "a list of numbers"),
    ("data.weights", "1,,2", "a list of numbers"),
    ("data.weights", "1,nan", "a list of numbers"),
    ("reward.heldout_share", "0.0", "from 0.001 to 0.9"),
])
def test_a_bad_setting_is_one_line_with_key_value_and_remedy(key, text, remedy):
    message = error_message([(key, text)])
    bad = "flop" if "flop" in text else text
    assert message.startswith(f"{key} = ") and remedy in message
    assert repr(bad)[:200] in message or f" = {bad}:" in message
    assert len(message) < 400


@pytest.mark.parametrize("line, key", [
    ("seed = true", "seed"),
    ("seed = 1.0", "seed"),
    ("seed = [1]", "seed"),
    ("seed = 2020-01-01", "seed"),
    ("out_dir = 3", "out_dir"),
    ("[seed]\na = 1", "seed.a"),
    ("model = 3", "model"),
    ("[[model]]\nwidth = 64", "model"),
    ("[model]\ntied = 1", "model.tied"),
    ("[ppo]\nlr = true", "ppo.lr"),
    ("[ppo]\nlr = nan", "ppo.lr"),
    ("[ppo]\nlr = inf", "ppo.lr"),
    ("[data]\ntrain = [1]", "data.train"),
    ("[data]\ntrain = 1", "data.train"),
    ("[data]\nweights = 1", "data.weights"),
    ("[data]\nweights = [true]", "data.weights"),
    ("[data.train]\na = 1", "data.train"),
    ("[model.width]\na = 1", "model.width"),
    ("[modle]\nwidth = 64", "modle.width"),
    ("[modle]", "modle"),
    ('"a\\nb" = 1', "a"),
    ("[ppo]\nlr = 1" + "0" * 400, "ppo.lr"),
])
def test_a_bad_line_of_a_file_is_named(tmp_path, line, key):
    message = error_message(path=write(tmp_path, line))
    assert message.lstrip("'").startswith(key)  # a key that cannot be printed is quoted


@pytest.mark.parametrize("settings, parts", [
    ("model.width=30", ("model.width",)),
    ("model.width=12", ("model.width",)),  # heads of odd width have no rotary embedding
    ("model.kv_heads=3", ("model.kv_heads",)),
    ("ppo.max_new_tokens=256", ("ppo.max_new_tokens",)),
    ("ppo.num_minibatches=65", ("ppo.num_minibatches",)),
    ("reward.methods=baseline", ("ppo.methods",)),
    ("data.train=", ("data.train",)),
    ("data.train=world,a.jsonl", ("data.train",)),
    ("data.valid=a.jsonl", ("data.train",)),
    ("data.train=a.jsonl data.valid_share=0", ("data.valid_share",)),
    ("ensemble.folds=1", ("ensemble.folds",)),
    ("ensemble.folds=3", ("ensemble.folds",)),  # does not divide the four members
    ("out_dir=", ("out_dir", "name a folder")),
    ("data.template=chatml", ("data.template", "model.init")),
    ("model.train_layers=1", ("model.train_layers", "model.init")),
    ("model.init=DIR model.train_layers=0", ("model.train_layers", "sft.epochs=0")),
    ("ppo.reward=verifier", ("ppo.reward", "ppo.domains")),
    ("ppo.domains=arithmetic data.train=a.jsonl", ("ppo.domains", "data.train = world")),
    ("ppo.max_new_tokens=12 ppo.min_new_tokens=12",
     ("ppo.min_new_tokens", "ppo.max_new_tokens = 12")),
    ("ppo.iterations=2 ppo.critic_warmup_iters=2",
     ("ppo.critic_warmup_iters", "ppo.iterations = 2")),
    ("ppo.adaptive_kl_target=1 ppo.kl_coef=0",
     ("ppo.adaptive_kl_target", "ppo.kl_coef > 0", "ppo.target_kl")),
    ("train.shard=full meta.second_order=true", ("train.shard", "meta.second_order")),
    ("train.shard=full contrast.term=swav", ("train.shard", "contrast.term")),
    ("train.shard=full train.optimizer=adafactor", ("train.shard", "train.optimizer")),
    ("train.shard=full dtype=fp16", ("train.shard", "dtype")),
    ("train.shard=full reward.evals_per_epoch=1 reward.keep=best", ("train.shard", "reward.keep")),
    ("contrast.term=simcse contrast.dropout=0", ("contrast.dropout", "contrast.term=none")),
    ("contrast.term=swav contrast.prototypes=80", ("contrast.queue", "contrast.prototypes = 80")),
    ("meta.second_order=true train.gradient_checkpointing=true",
     ("train.gradient_checkpointing", "meta.second_order")),
    ("meta.rounds=1 meta.method=margin", ("meta.method", "reward.methods")),
    ("reward.keep=best", ("reward.evals_per_epoch", "reward.keep = best")),
    ("reward.patience=1", ("reward.evals_per_epoch", "reward.patience")),
    ("reward.evals_per_epoch=1 reward.epochs=0 reward.init=DIR",
     ("reward.evals_per_epoch", "reward.epochs of 1 or more")),
    ("data.weights=1", ("data.weights = '1'", "world")),
    ("data.train=a,b data.weights=1,2,3", ("data.weights = '1,2,3'", "must be 2 of them")),
    ("data.train=a,b data.weights=1,-0.5", ("data.weights = '1,-0.5'", "from 0 to 1e6")),
    ("data.train=a,b data.weights=1e7,1", ("data.weights = '1e+07,1'", "0 to 1e6")),
    ("data.train=a,b data.weights=0,0", ("data.weights = '0,0'", "not all 0")),
    ("data.train=a,b data.weights=1,2 model.init=DIR ppo.methods= ensemble.voters=states "
     "ensemble.folds=2", ("data.weights = '1,2'", "ensemble.voters=trained")),
])
def test_contradictory_settings_are_one_line_that_names_them(settings, parts):
    message = error_message([word.split("=", 1) for word in settings.split()])
    assert message.startswith(parts[0]) and message.startswith(f"{parts[0].split()[0]} = ")
    assert all(part in message for part in parts[1:])


def test_weights_of_files_are_numbers_from_text_or_toml(tmp_path):
    c = load(None, [("data.train", "a,b"), ("data.weights", "1, 0.5")])
    assert c.data.weights == (1.0, 0.5)
    path = write(tmp_path, '[data]\ntrain = ["a", "b"]\nweights = [1, 0.5]')
    assert load(path) == c == config.from_dict(json.loads(json.dumps(config.as_dict(c))))


def test_unreadable_files_are_named(tmp_path):
    assert "no such file" in error_message(path=str(tmp_path / "none.toml"))
    assert str(tmp_path) in error_message(path=str(tmp_path))
    assert "c.toml" in error_message(path=write(tmp_path, "seed = = 3"))
    (tmp_path / "d.toml").write_bytes(b'out_dir = "\xff"')
    assert "d.toml" in error_message(path=str(tmp_path / "d.toml"))
    too_long = "seed = " + "9" * 5000  # Python refuses to parse so long a number
    assert "c.toml" in error_message(path=write(tmp_path, too_long))


def test_what_is_no_file_of_settings_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe" in error_message(path=str(tmp_path / "pipe"))
    assert "is a pipe or a device" in error_message(path="/dev/zero")
    assert "is a folder" in error_message(path=str(tmp_path))
    assert "null byte" in error_message(path="a\0b")
    assert "1,500,000 bytes" in error_message(path=write(tmp_path, "#" * 1_500_000))


def test_a_file_of_settings_that_may_not_be_read_is_not_called_wrong(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "seed = 1")
    monkeypatch.setattr("builtins.open", refuse)
    assert "cannot be read (Permission denied); check its permissions" in error_message(path=path)


@pytest.mark.parametrize("text, part", [
    ("seed = " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    ("seed = 0x" + "f" * 9000, "seed = a int too large to print"),
    ("model.init = \"a\\u0000b\"", "control character"),
])
def test_extreme_values_of_a_file_are_one_line(tmp_path, text, part):
    assert part in error_message(path=write(tmp_path, text))


VALUES = ["0", "1", "-1", "1e9", "nan", "true", "world", ","]
KEYS = [*config.keys(), *config.RENAMED]


@given(st.sampled_from(KEYS) | st.text(), st.text() | st.sampled_from(VALUES))
def test_any_text_for_any_key_gives_a_config_or_a_one_line_error(key, text):
    try:
        assert isinstance(load(None, [(key, text)]), Config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


# --------------------------------------------------------------------------------------------------
# Old names

def test_the_table_of_old_names():
    known = config.keys()
    assert set(config.RENAMED.values()) <= set(known)
    assert not set(config.RENAMED) & set(known)  # no old name has a new meaning
    assert len(set(config.RENAMED.values())) == len(config.RENAMED)
    assert config.renamed("ppo.kl") == "ppo.kl_coef"
    assert config.renamed("ppo.kl_target") == "ppo.adaptive_kl_target"
    assert config.renamed("ppo.stop_kl") == "ppo.target_kl"
    assert config.renamed("seed") == "seed" and config.renamed("input sft") == "input sft"


@pytest.mark.parametrize("old, new", config.RENAMED.items())
def test_an_old_name_is_understood_and_the_new_one_printed_once(old, new, tmp_path, notes):
    field = config.keys()[new]
    text = str(other_value(field)).lower()
    c = load(None, [(old, text)])
    assert value_of(c, new) != field.default
    assert c == load(None, [(new, text)]) == config.assign(Config(), old, text)
    printed = notes()
    assert f"{old} is now {new}" in printed and printed.count("\n") == 1
    config.assign(Config(), old, text)
    assert notes() == ""

    section, name = old.split(".")
    toml = json.dumps(value_of(c, new))
    assert load(write(tmp_path, f"[{section}]\n{name} = {toml}")) == c
    assert config.from_dict({section: {name: value_of(c, new)}}) == c


def other_value(field):
    """A value that differs from the default and contradicts no other default"""
    if field.type is bool:
        return not field.default
    if field.metadata["choices"]:
        return field.metadata["choices"][-1]
    if field.type is str:
        return "elsewhere"
    return field.type(field.default + 1) if field.metadata["high"] > 1 else field.default / 2


def test_several_old_names_are_one_line(tmp_path, notes):
    load(write(tmp_path, "[ppo]\nepisodes = 32\nmax_new = 24\nlam = 0.9"), [("train.clip", "0.5")])
    first, second = notes().splitlines()
    assert "ppo.episodes is now ppo.rollout_batch_size, ppo.max_new is now" in first
    assert second == "note: train.clip is now train.grad_clip"


def test_the_two_kl_targets_are_told_apart(notes):
    assert load(None, [("ppo.kl_target", "3")]).ppo.adaptive_kl_target == 3
    assert "(not ppo.target_kl)" in notes()
    assert load(None, [("ppo.stop_kl", "0.1")]).ppo.target_kl == 0.1
    assert "ppo.adaptive_kl_target is another setting" in error_message([("ppo.target_kl", "-1")])
    assert "ppo.target_kl is another setting" in error_message([("ppo.kl_target", "x")])


def test_both_names_of_a_setting_at_once_are_an_error(tmp_path):
    parts = ("ppo.kl", "ppo.kl_coef", "keep ppo.kl_coef alone")
    both = [("ppo.kl", "0.1"), ("ppo.kl_coef", "0.2")]
    path = write(tmp_path, "[ppo]\nkl_coef = 0.1\nkl = 0.1")
    messages = [error_message(both), error_message(both[::-1]), error_message(path=path)]
    with pytest.raises(ConfigError) as error:
        config.from_dict({"ppo": {"kl": 0.1, "kl_coef": 0.1}})
    for message in [*messages, str(error.value)]:
        assert all(part in message for part in parts)


def test_the_command_line_overrides_the_file_under_either_name(tmp_path):
    path = write(tmp_path, "[ppo]\nkl = 0.1")
    assert load(path, [("ppo.kl_coef", "0.2")]).ppo.kl_coef == 0.2
    path = write(tmp_path, "[ppo]\nkl_coef = 0.1")
    assert load(path, [("ppo.kl", "0.2")]).ppo.kl_coef == 0.2


def test_a_dictionary_gives_the_configuration_back():
    table = json.loads(json.dumps(config.as_dict(Config(seed=4))))
    assert config.from_dict(table) == Config(seed=4)
    del table["ppo"]["top_p"]  # a setting that did not exist yet
    assert config.from_dict(table) == Config(seed=4)
    with pytest.raises(ConfigError, match="ppo.minimal_new"):
        config.from_dict(table | {"ppo": {"minimal_new": 3}})


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(ROOT / "results")))
def test_the_settings_of_committed_results_are_understood(path):
    settings = json.loads(path.read_text())["settings"]
    table = json.loads(json.dumps(config.as_dict(config.from_dict(settings))))
    given = config.flatten(settings)
    values = dict(config.flatten(table))
    assert {config.renamed(key): value for key, value in given}.items() <= values.items()
    for key in values.keys() - {config.renamed(key) for key, _ in given}:
        default = config.keys()[key].default
        assert values[key] == (list(default) if isinstance(default, tuple) else default)


def test_there_are_committed_results():
    assert len(RESULTS) >= 35


# --------------------------------------------------------------------------------------------------
# Help

def test_the_help_names_every_setting_and_its_default():
    text = config.help_text()
    assert "--ppo.kl_estimator=k1 " in text and "[k1 k2 k3]" in text
    assert "--reward.methods=baseline,flip" in text
    for key, field in config.keys().items():
        assert f"--{key}=" in text and field.metadata["help"] in text
