"""Records of a JSON-lines file, and the checks of single values that all layouts share."""
import gzip
import json
import math
import os
import zlib

from data import DataError
from runtime import downloads

JSON_TYPES = {
    type(None): "null", bool: "a boolean", int: "a number", float: "a number",
    str: "a string", list: "a list", dict: "an object",
}


def read_records(path):
    """Parse a .jsonl or .jsonl.gz file, or the file at an https:// address.

    Yields (line number, JSON value); blank lines are skipped, a byte-order mark is removed.
    Raises DataError, one line that names file, line and remedy; OSError if an address cannot be
    fetched.
    """
    if "://" in str(path):
        path = downloads.fetch(path)
    check_path(path)
    open_file = gzip.open if str(path).endswith(".gz") else open
    is_empty = True
    try:
        with open_file(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                is_empty = False
                codec = "utf-8-sig" if number == 1 else "utf-8"
                yield number, parse_line(line, codec, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file ({error}); fetch it again") from None
    except OSError as error:
        reason = error.strerror
        raise DataError(f"{path}: cannot be read ({reason}); check its permissions") from None
    if is_empty:
        raise DataError(f"{path}: the file is empty; give a file with one preference pair a line")


def check_path(path):
    """Raise DataError unless path is a file."""
    if not os.path.exists(path):
        remedy = "give a preference file in JSONL (plain or .gz), or 'world'"
        raise DataError(f"{path}: no such file; {remedy}")
    if os.path.isdir(path):
        raise DataError(f"{path}: is a folder; name the files in it, separated by commas")


def parse_line(line, codec, where):
    """Bytes of one line -> JSON value.  Raises DataError."""
    try:
        return json.loads(line.decode(codec))
    except UnicodeDecodeError as error:
        byte = error.start + 1
        raise DataError(f"{where}: not UTF-8 (byte {byte}); convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not readable"
        remedy = "every line must be one JSON object"
        raise DataError(f"{where}: broken JSON ({reason}); {remedy}") from None


def json_type(value):
    """JSON's name for the type of a parsed value, for error messages."""
    return JSON_TYPES[type(value)]


def check_strings(record, where, needed, remedy=""):
    """Check that a record is an object with the needed keys, and they and its prompt are text.

    Raises DataError.  The prompt may be absent unless it is needed.
    remedy: appended to the message about a missing key.
    """
    if not isinstance(record, dict):
        keys = " and ".join(needed)
        raise DataError(f"{where}: a line must be an object with {keys}, not {json_type(record)}")
    for key in needed:
        if key not in record:
            raise DataError(f"{where}: key {key!r} is missing{remedy}")
    for key in ("prompt", *needed):
        if key in record:
            check_text(record[key], key, where)


def check_text(value, key, where):
    """Raise DataError unless the value is a string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a string, not {json_type(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(
            f"{where}: {key!r} holds half of a surrogate pair, which is not text; "
            "correct or remove the line"
        )


def read_margin(record, where):
    """The optional margin of a record: a finite number, or None.  Raises DataError."""
    margin = record.get("margin")
    if margin is None:
        return None
    if isinstance(margin, float) and not math.isfinite(margin):
        raise DataError(f"{where}: 'margin' must be a finite number, not {margin}")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise DataError(f"{where}: 'margin' must be a finite number, not {json_type(margin)}")
    return margin
