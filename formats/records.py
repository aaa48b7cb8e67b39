"""Records of a JSON-lines file, and the checks of single values that all layouts share."""
import gzip
import json
import math
import zlib

from data import DataError
from runtime import downloads
from runtime.inputs import A_FOLDER, NO_FILE, has_surrogate, why_no_file, why_unusable

JSON_TYPES = {
    type(None): "null", bool: "a boolean", int: "a number", float: "a number",
    str: "a string", list: "a list", dict: "an object",
}
GZIP = b"\x1f\x8b"
OTHER_FORMATS = {  # first bytes -> what they say that the file is
    b"\x89PNG": "a PNG image",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"%PDF": "a PDF document",
}
MAX_LINE = 2 ** 24       # bytes
MAX_MARGIN = 1e6         # in units of reward; float32 has 8 digits
MAX_DEPTH = 100          # of values inside values in a record that is written back
REMEDY = ("every line must be one JSON object (jq -c '.[]' makes lines of an array, jq -c . of "
          "objects over several lines)")


# --------------------------------------------------------------------------------------------------
# Files


def read_records(path):
    """Parse a .jsonl or .jsonl.gz file, or the file at an https:// address.

    Yields (line number, JSON value); blank lines are skipped, a byte-order mark is removed.
    Raises DataError, one line that names file, line and remedy; OSError if an address cannot be
    fetched.
    """
    if "://" in str(path):
        path = downloads.fetch(path)
    check_path(path)
    is_empty = True
    try:
        with open_lines(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
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
    """Raise DataError unless path is a file whose name can stand in a message."""
    reason = why_unusable(str(path)) or why_no_file(path)
    if reason == NO_FILE:
        raise DataError(
            f"{path}: no such file; give a preference file in JSONL, plain or .gz"
        )
    if reason == A_FOLDER:
        reason = "is a folder; name the files in it, separated by commas"
    if reason:
        raise DataError(f"{path}: {reason}")


def open_lines(path):
    """Open a file, decompressed if it begins as gzip does, whatever its name.  Raises DataError."""
    with open(path, "rb") as file:
        first_bytes = file.read(8)
    if first_bytes.startswith(GZIP):
        return gzip.open(path, "rb")
    for magic, kind in OTHER_FORMATS.items():
        if first_bytes.startswith(magic):
            raise DataError(f"{path}: is {kind}; convert it to JSONL, one preference pair a line")
    if first_bytes and str(path).endswith(".gz"):
        raise DataError(
            f"{path}: is no gzip file in spite of its name; fetch it again, or take .gz off the "
            "name if it is plain JSONL"
        )
    return open(path, "rb")


def parse_line(line, codec, where):
    """Bytes of one line -> JSON value.  Raises DataError."""
    if len(line) > MAX_LINE:
        raise DataError(f"{where}: the line has more than {MAX_LINE:,} bytes; {REMEDY}")
    try:
        return DECODER.decode(line.decode(codec))
    except UnicodeDecodeError as error:
        byte = error.start + 1
        raise DataError(
            f"{where}: not UTF-8 (byte {byte}); convert the file to UTF-8, or name another one if "
            "it is not text"
        ) from None
    except RepeatedKey as error:
        raise DataError(f"{where}: key {error} is given twice; remove one of the two") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON ({error.msg}); {REMEDY}") from None
    except RecursionError:
        raise DataError(f"{where}: broken JSON (nested too deeply); remove the line") from None
    except ValueError:  # of a JSON that is right, only this is refused
        raise DataError(f"{where}: a number has too many digits; write it as a string") from None


class RepeatedKey(ValueError):
    """An object has a key twice; the message is the key."""


def unique_keys(items):
    """[(key, value)] of a JSON object -> dictionary; raises RepeatedKey"""
    record = dict(items)
    if len(record) < len(items):
        keys = [key for key, _ in items]
        raise RepeatedKey(ascii(next(key for key in keys if keys.count(key) > 1))[:40])
    return record


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


# --------------------------------------------------------------------------------------------------
# Values


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
    if has_surrogate(value):
        raise DataError(
            f"{where}: {key!r} holds half of a surrogate pair, which is not text; "
            "correct or remove the line"
        )


def check_copyable(value, where, depth=0):
    """Raise DataError unless a JSON value can be written back as it was read."""
    if depth > MAX_DEPTH:
        raise DataError(f"{where}: nested more than {MAX_DEPTH} levels deep; remove that value")
    if isinstance(value, str) and has_surrogate(value):
        raise DataError(
            f"{where}: {ascii(value)[:40]} holds half of a surrogate pair, which is not text; "
            "correct or remove the line"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: the number {value} cannot be written as JSON; put null instead")
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for inner in value:
            check_copyable(inner, where, depth + 1)


def read_margin(record, where):
    """The optional margin of a record: a finite number, or None.  Raises DataError."""
    margin = record.get("margin")
    if margin is None:
        return None
    if isinstance(margin, float) and not math.isfinite(margin):
        raise DataError(f"{where}: 'margin' must be a finite number, not {margin}")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise DataError(f"{where}: 'margin' must be a finite number, not {json_type(margin)}")
    if abs(margin) > MAX_MARGIN:
        raise DataError(
            f"{where}: 'margin' must be a number from -{MAX_MARGIN:,.0f} to {MAX_MARGIN:,.0f}, in "
            "units of reward; correct it"
        )
    return margin
