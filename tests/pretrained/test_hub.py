"""pretrained/hub.py: folders, names on the hub, fingerprints, JSON files."""
import os
import sys
from types import SimpleNamespace

import pytest

from config import ConfigError
from pretrained import hub

NAME = "Some-One/Model-1B"


@pytest.fixture(autouse=True)
def nothing_fetched():
    hub.directory.cache_clear()
    yield
    hub.directory.cache_clear()


def use_hub(monkeypatch, snapshot_download):
    """Replace the library huggingface_hub by a function; None: it is not installed"""
    module = None
    if snapshot_download is not None:
        module = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def message_of(init):
    with pytest.raises(ConfigError) as error:
        hub.directory(init)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    assert "model.init" in message
    return message


def test_a_folder_is_used_as_it_is(tmp_path):
    assert hub.directory(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("init", ["nowhere", "../up/there", "a/b/c", "/no/such", "a\nb/c"])
def test_what_is_no_folder_and_no_name_on_the_hub_is_refused(tmp_path, monkeypatch, init):
    monkeypatch.chdir(tmp_path)
    message = message_of(init)
    assert "no such folder" in message
    assert "OWNER/NAME" in message


def test_a_hub_name_without_the_library_says_how_to_fetch_it(monkeypatch):
    use_hub(monkeypatch, None)
    message = message_of(NAME)
    assert "huggingface_hub is not installed" in message
    assert f"hf download {NAME}" in message


def test_a_hub_that_does_not_answer_says_how_to_fetch_it(monkeypatch):
    def fail(name, allow_patterns):
        assert name == NAME
        assert "*.safetensors" in allow_patterns
        raise ConnectionError("no network\nat all")

    use_hub(monkeypatch, fail)
    message = message_of(NAME)
    for part in ("cannot be fetched", "ConnectionError", f"hf download {NAME}"):
        assert part in message


def test_a_hub_name_is_fetched_once(tmp_path, monkeypatch):
    fetched = []

    def fetch(name, allow_patterns):
        fetched.append(name)
        return str(tmp_path)

    use_hub(monkeypatch, fetch)
    for _ in range(2):
        assert hub.directory(NAME) == str(tmp_path)
    assert fetched == [NAME]


def test_the_digest_covers_small_files_whole_and_weights_by_samples(tmp_path, write_model):
    _, folder = write_model(tmp_path / "base", tied=True)
    before = hub.digest(str(folder))
    assert hub.digest(str(folder)) == before
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    for name in names:
        content = (folder / name).read_bytes()
        changed = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
        (folder / name).write_bytes(changed)
        is_covered = name != "model.safetensors" or len(content) < 64 * 4096
        assert (hub.digest(str(folder)) != before) == is_covered
        (folder / name).write_bytes(content)
    (folder / "model.safetensors").write_bytes(content + b"x")
    assert hub.digest(str(folder)) != before


def test_the_digest_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="model.safetensors: is a pipe"):
        hub.digest(str(tmp_path))


@pytest.mark.parametrize("content, part", [
    (None, "no such file"),
    (b'{"a": 1', "not readable as JSON"),
    (bytes(100), "not readable as JSON"),
    (b"[" * 100_000, "not readable as JSON"),
    (b"[1]", "must hold a JSON object, not [1]"),
])
def test_a_json_file_that_cannot_be_read_is_named(tmp_path, content, part):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        hub.read_json(path)
    assert str(error.value).startswith(f"{path}: ")
    assert part in str(error.value)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "config.json"
    path.write_text("{}")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match="config.json: cannot be read .Permission denied.; check"):
        hub.read_json(path)


def test_any_value_is_shown_in_one_short_line():
    assert hub.short_repr("a\nü") == r"'a\n\xfc'"
    assert hub.short_repr("x" * 200) == "'" + "x" * 99 + "..."
