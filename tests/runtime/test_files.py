"""Files of a run: complete or absent, readable as written, errors of one line with a remedy."""
import errno
import hashlib
import json
import math
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime import files

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


@given(values)
def test_json_is_read_as_written(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("json")
    files.save_json(folder / "a.json", value)
    files.save_jsonl(folder / "a.jsonl", (v for v in [value, 1]))
    assert files.load_json(folder / "a.json") == value
    assert files.load_jsonl(folder / "a.jsonl") == [value, 1]
    lines = (folder / "a.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 3 and lines[2] == b""


def test_the_form_of_json_files(tmp_path):
    files.save_json(tmp_path / "a.json", {"ü": [1, math.nan], "b": (-math.inf, 2.5)})
    expected = '{\n "ü": [\n  1,\n  null\n ],\n "b": [\n  null,\n  2.5\n ]\n}\n'
    assert (tmp_path / "a.json").read_text() == expected
    files.save_jsonl(tmp_path / "a.jsonl", [{"ü": math.nan}, {"b": "x\ny"}])
    assert (tmp_path / "a.jsonl").read_text() == '{"ü": null}\n{"b": "x\\ny"}\n'
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}')  # blank lines, no newline at the end
    assert files.load_jsonl(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]


def test_damaged_json_is_named_with_its_line(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(OSError, match="a.json: broken JSON .*delete the file"):
        files.load_json(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(OSError, match="a.jsonl:2: broken JSON"):
        files.load_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_bytes(b'"\xff"')
    with pytest.raises(OSError, match="b.json: broken JSON"):
        files.load_json(tmp_path / "b.json")
    for load in (files.load_json, files.load_jsonl, files.load_tensors):
        with pytest.raises(OSError, match="none"):
            load(tmp_path / "none")


def test_tensors_are_read_as_written(tmp_path):
    state = {"model": {"w": torch.rand(2, 3)}, "step": 3, "lr": 0.5, "names": ["a", "b"]}
    files.save_tensors(tmp_path / "deep" / "a.pt", state)  # makes the folder
    loaded = files.load_tensors(tmp_path / "deep" / "a.pt")
    assert torch.equal(loaded.pop("model")["w"], state.pop("model")["w"]) and loaded == state


def test_damaged_and_hostile_checkpoints_are_refused(tmp_path):
    files.save_tensors(tmp_path / "whole.pt", {"w": torch.rand(5000)})
    (tmp_path / "broken.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    with pytest.raises(OSError, match="broken.pt: not a readable checkpoint"):
        files.load_tensors(tmp_path / "broken.pt")
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(os.getcwd, protocol=2))
    with pytest.raises(OSError, match="hostile.pt: not a readable checkpoint"):
        files.load_tensors(tmp_path / "hostile.pt")


@pytest.mark.parametrize("error, reason", [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (RuntimeError("unexpected pos 64 vs 0"), "incomplete, as on a full disk"),  # torch's
])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, error, reason):
    def write_half(state, file):
        file.write(b"half of it")
        raise error

    files.save_tensors(tmp_path / "old.pt", {"w": 1})
    monkeypatch.setattr(torch, "save", write_half)
    for name in ("new.pt", "old.pt"):
        match = rf"{name}: cannot be written \(.*{reason}\).*--out_dir"
        with pytest.raises(OSError, match=match) as caught:
            files.save_tensors(tmp_path / name, {"w": 2})
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["old.pt"]
    assert files.load_tensors(tmp_path / "old.pt") == {"w": 1}


def test_a_failure_while_records_are_made_leaves_nothing(tmp_path):
    def records():
        yield {"a": 1}
        raise ValueError

    with pytest.raises(ValueError):
        files.save_jsonl(tmp_path / "a.jsonl", records())
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written.*MY_FOLDER"):
        files.save(tmp_path / "file" / "x", None, "name MY_FOLDER")
    with pytest.raises(OSError, match="log.jsonl: cannot be written"):
        files.append_line(tmp_path / "file" / "log.jsonl", {})


def test_a_checkpoint_is_read_as_written_and_not_where_a_byte_differs(tmp_path):
    path = tmp_path / "sft.ckpt"
    state = {"step": 3, "model": {"w": torch.arange(1000.0)}, "lines": [{"text": "ä"}]}
    files.save_state(path, state)
    content = path.read_bytes()
    loaded = files.load_state(path)
    assert torch.equal(loaded.pop("model")["w"], state["model"]["w"])
    assert loaded == {"step": 3, "lines": [{"text": "ä"}]}
    for position in range(0, len(content), 97):
        flipped = bytearray(content)
        flipped[position] ^= 16
        path.write_bytes(flipped)
        assert files.load_state(path) is None
    for part in (b"", content[:30], content[:-1], content[:-64], content + b"0"):
        path.write_bytes(part)
        assert files.load_state(path) is None
    assert files.load_state(tmp_path / "missing.ckpt") is None


def test_facts_of_a_file_tell_every_change(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"abcd")
    facts = files.output_facts(path)
    assert facts == {"bytes": 4, "sha256": hashlib.sha256(b"abcd").hexdigest()}
    assert files.what_changed(path, facts) == ""
    path.write_bytes(b"abce")
    assert files.what_changed(path, facts) == "is not as it was written"
    path.write_bytes(b"abc")
    assert files.what_changed(path, facts) == "has 3 bytes, not 4"
    path.unlink()
    assert files.what_changed(path, facts) == "is gone"


def test_of_a_large_file_samples_are_read_while_its_time_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 100)
    monkeypatch.setattr(files, "SAMPLE_BYTES", 2)
    path = tmp_path / "a.pt"
    content = bytes(1000)
    path.write_bytes(content)
    facts = files.output_facts(path)
    time = facts["time"]

    def change(position):
        path.write_bytes(content[:position] + b"1" + content[position + 1:])

    change(999)  # the last byte is in the last sample
    os.utime(path, ns=(time, time))
    assert files.what_changed(path, facts) == "is not as it was written"
    change(500)  # between two samples
    assert files.what_changed(path, facts) == "is not as it was written"
    os.utime(path, ns=(time, time))
    assert files.what_changed(path, facts) == ""
    path.write_bytes(content)  # a copy has another time
    assert files.what_changed(path, facts) == ""


def test_an_edited_file_is_kept_under_a_new_name(tmp_path):
    for name in ("a.edited.jsonl", "a.edited-2.jsonl"):
        path = tmp_path / "a.jsonl"
        path.write_text(name)
        assert files.set_aside(path) == str(tmp_path / name)
        assert (tmp_path / name).read_text() == name and not path.exists()


def test_lines_are_appended(tmp_path):
    files.append_line(tmp_path / "log.jsonl", {"loss": math.nan})
    files.append_line(tmp_path / "log.jsonl", {"step": 2})
    assert files.load_jsonl(tmp_path / "log.jsonl") == [{"loss": None}, {"step": 2}]


def test_digests_do_not_change_between_versions(tmp_path):
    """They are part of records, and random seeds are made of them."""
    assert files.digest("0 reward") == "1bb9bd04ea326374"
    assert files.digest({"b": [1, 2.5, None], "a": "ü"}) == "b7f18cc940079559"
    assert files.digest({"a": 1, "b": 2}) == files.digest({"b": 2, "a": 1})
    (tmp_path / "a").write_bytes(b"content")
    assert files.file_digest(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()[:16]


def test_versions_are_json():
    assert json.loads(json.dumps(files.versions())) == files.versions()
    assert files.versions()["torch"] == torch.__version__
    assert files.versions()["format"] == files.FORMAT == 1
