"""runtime/inputs.py: texts and paths that cannot be used, messages of one line."""
import io
import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime import inputs

any_text = st.text(st.characters(exclude_categories=()))


@given(any_text)
def test_any_message_becomes_one_line_that_utf8_can_write(text):
    line = inputs.one_line(text)
    assert len(line.splitlines()) <= 1
    line.encode()


@given(any_text)
def test_what_is_called_usable_stays_as_it_is_in_a_message(text):
    if not inputs.why_unusable(text) and "://" not in text:
        assert inputs.one_line(text) == text


def test_a_long_message_keeps_its_beginning_and_its_remedy():
    line = inputs.one_line("a.jsonl: " + "x" * 10_000 + "; rename it")
    assert line.startswith("a.jsonl: x") and line.endswith("x; rename it") and len(line) < 2100


@pytest.mark.parametrize("text, hidden", [
    ("https://user:secret@host/x: gone", "https://***@host/x: gone"),
    ("https://token@host/x", "https://***@host/x"),
    ("https://u:se@cret@host/x and ftp://a:b@c/d", "https://***@host/x and ftp://***@c/d"),
    ("https://u:se/cret@host/x", "https://***@host/x"),
    ("https://host/@name/x", "https://host/@name/x"),
    ("me@host", "me@host"),
    ("'https://u:secret@h/x' and 'https://v:secret@h/y'", "'https://***@h/x' and 'https://***@h/y'"),
])
def test_a_password_is_hidden(text, hidden):
    assert inputs.hide_password(text) == hidden
    assert inputs.one_line(text) == hidden


def test_only_regular_files_are_files(tmp_path):
    file = tmp_path / "file"
    file.write_text("12345")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("file")
    assert inputs.why_no_file(file) == inputs.why_no_file(tmp_path / "link") == ""
    assert inputs.why_no_file(file, max_bytes=5) == ""
    assert "has 5 bytes" in inputs.why_no_file(file, max_bytes=4)
    assert inputs.why_no_file(tmp_path / "none") == "no such file"
    assert "is a folder" in inputs.why_no_file(tmp_path)
    assert "is a pipe or a device" in inputs.why_no_file(tmp_path / "pipe")
    assert "is a pipe or a device" in inputs.why_no_file("/dev/null")
    for path in (tmp_path / "loop", file / "inside", "a\0b", "x" * 5000):
        assert inputs.why_no_file(path).startswith("cannot be read (")


def test_output_escapes_what_the_terminal_lacks(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    inputs.escape_output()
    print("naïve 北京 \udcff", flush=True)
    assert out.buffer.getvalue() == b"na\\xefve \\u5317\\u4eac \\udcff\n"


@pytest.mark.parametrize("error, expected", [
    (MemoryError(), True),
    (torch.OutOfMemoryError("CUDA out of memory"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                  "allocate memory: you tried to allocate 4000000000000 bytes."), True),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (ValueError("not enough memory"), False),
])
def test_errors_of_memory_are_recognised(error, expected):
    assert inputs.is_out_of_memory(error) == expected


def test_torch_reports_a_lack_of_memory_as_expected():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2 ** 55)
    assert inputs.is_out_of_memory(caught.value)
