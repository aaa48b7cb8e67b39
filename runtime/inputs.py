"""What the user hands in: texts, paths, files; and what is wrong with them, in one line."""
import os
import re
import stat
import sys
import unicodedata
from typing import Any

import torch

MAX_TEXT = 4096    # characters of a setting: the longest path of Linux
MAX_SHOWN = 200    # characters of a value in a message
MAX_MESSAGE = 2000
NO_FILE = "no such file"
A_FOLDER = "is a folder; name a file in it"
NOT_IN_A_LINE = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, line breaks
USER_INFO = re.compile(r"(?<=://)[^\s'\"]*@")  # of an address, perhaps with a part of its path
OUT_OF_MEMORY = re.compile(
    "DefaultCPUAllocator|not enough memory|can't allocate memory"
    "|CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"  # not by torch's allocator
)
MEMORY_ERRORS = (MemoryError, RuntimeError)  # torch's allocator raises RuntimeError


# --------------------------------------------------------------------------------------------------
# Texts


def why_unusable(text: str) -> str:
    """Why a text cannot be a setting or a path, with the remedy; "" if it can"""
    categories = set(map(unicodedata.category, text))
    if "Cs" in categories:
        return "is not valid UTF-8; rename it"
    if categories.intersection(NOT_IN_A_LINE):
        return "has a line break or another control character; rename it"
    if len(text) > MAX_TEXT:
        return f"has {len(text):,} characters; give a path of at most {MAX_TEXT:,}"
    return ""


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def hide_password(text: str) -> str:
    """https://user:password@host/x -> https://***@host/x, anywhere in a text"""
    def hide(match):
        is_path = "/" in match[0] and ":" not in match[0]  # https://host/@name
        return match[0] if is_path else "***@"

    return USER_INFO.sub(hide, text) if "@" in text else text


def value_text(value: Any) -> str:
    """repr(value) for a message: without a password, not longer than a line or two"""
    try:
        text = hide_password(repr(value))
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, or deep nesting
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


# --------------------------------------------------------------------------------------------------
# Files


def why_no_file(path: str | os.PathLike, max_bytes: int | None = None) -> str:
    """Why a path is no file that can be read, with the remedy; "" if it is one.

    A pipe could be read only once, and a pipe or a device may never end.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return NO_FILE
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        return f"cannot be read ({reason}); check its name and permissions"
    if stat.S_ISDIR(status.st_mode):
        return A_FOLDER
    if not stat.S_ISREG(status.st_mode):
        return "is a pipe or a device; write its content to a file and name that"
    if max_bytes is not None and status.st_size > max_bytes:
        return f"has {status.st_size:,} bytes, more than such a file can have; name another file"
    return ""


# --------------------------------------------------------------------------------------------------
# Messages


def one_line(text: str) -> str:
    """A message as one line that every terminal can show, without passwords"""
    characters = []
    for character in hide_password(text):
        is_plain = unicodedata.category(character) not in NOT_IN_A_LINE
        characters.append(character if is_plain else repr(character)[1:-1])
    line = "".join(characters)
    if len(line) <= MAX_MESSAGE:
        return line
    half = MAX_MESSAGE // 2
    return f"{line[:half]} … {line[-half:]}"


def error_text(error: BaseException) -> str:
    """An exception with a message for the user -> the line to print"""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # of Python's own, without a remedy
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}; check the path and its permissions"
    return f"error: {one_line(text)}"


def escape_output():
    """Write what the terminal's encoding lacks as \\x.. instead of failing on it.

    A stream that is closed (`>&-`) takes what is printed and loses it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory, of the CPU or the GPU, does not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))
