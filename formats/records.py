"""Records of a preference file, whatever it is packed in."""
import io
import json
import re

from data import DataError
from formats.containers import (
    compression_of,
    is_damage,
    numbered_lines,
    open_decompressed,
    read_rows,
)
from formats.sources import files_of
from formats.tables import kind_of, read_table
from formats.values import DECODER, RepeatedKey

MAX_LINE = 2 ** 24       # bytes of a line, characters of a record in an array
CHUNK = 2 ** 20          # characters of an array that are read at once
REMEDY = ("every line must be one JSON object (jq -c . makes lines of objects over several lines)")
ARRAY_REMEDY = "the file must be one JSON array of objects, with commas between them"
BLANKS = re.compile(r"[ \t\r\n]*")


# --------------------------------------------------------------------------------------------------
# Files


def read_records(name):
    """Records of what a name stands for: a file, an https:// address, a folder, a set of the hub.

    A file is JSON lines, a JSON array or CSV, plain or compressed, or a Parquet or Arrow table; its
    content says which, its name only that it is CSV.  Blank lines are skipped, a byte-order mark is
    removed.  Yields (number, JSON value): the number of the line, in an array or a table that of
    the record, behind the name of the file where the name stands for several.
    Raises DataError, one line that names file, line and remedy; OSError if an address cannot be
    fetched.
    """
    is_empty = True
    for file in files_of(name):
        where = f"{name}:{file.label}" if file.label else file.path
        for number, value in read_file(file.path, where):
            is_empty = False
            yield (f"{file.label}:{number}" if file.label else number), value
    if is_empty:
        raise DataError(f"{name}: the file is empty; give a file with one preference pair a line")


def read_file(path, where):
    """Yields (number of the line or record, JSON value) of one file.  Raises DataError"""
    first_bytes = b""
    try:
        with open(path, "rb") as file:
            first_bytes = file.read(8)
        if kind_of(first_bytes):
            yield from read_table(path, where)
            return
        with open_decompressed(path) as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        with open_decompressed(path) as file:
            if start.startswith(b"["):
                yield from read_array(file, where)
            elif is_csv(path) and not start.startswith(b"{"):
                yield from read_rows(file, where)
            else:
                yield from read_lines(file, where)
    except Exception as error:  # that of zstandard has no other base
        if is_damage(error):
            kind = compression_of(first_bytes)
            raise DataError(f"{where}: not a complete {kind} file ({error}); fetch it again"
                            ) from None
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise DataError(f"{where}: cannot be read ({reason}); check its permissions") from None
        raise


def is_csv(path):
    return re.search(r"\.csv(\.gz|\.xz|\.zst)?$", str(path).lower()) is not None


def read_lines(file, where):
    """Yields (number of the line, JSON value) of a binary file of JSON lines.  Raises DataError"""
    for number, line in numbered_lines(file, MAX_LINE):
        if line.strip():
            codec = "utf-8-sig" if number == 1 else "utf-8"
            yield number, parse_line(line, codec, f"{where}:{number}")


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
    except (ValueError, RecursionError) as error:
        raise json_error(error, where, REMEDY) from None


def json_error(error, where, remedy):
    """What the decoder has raised -> DataError.  remedy: for JSON that is broken"""
    if isinstance(error, RepeatedKey):
        return DataError(f"{where}: key {error} is given twice; remove one of the two")
    if isinstance(error, json.JSONDecodeError):
        return DataError(f"{where}: broken JSON ({error.msg}); {remedy}")
    if isinstance(error, RecursionError):
        return DataError(f"{where}: broken JSON (nested too deeply); remove the line")
    # of a JSON that is right, only this is refused
    return DataError(f"{where}: a number has too many digits; write it as a string")


# --------------------------------------------------------------------------------------------------
# JSON arrays


def read_array(file, where):
    """Yields (number of the record, JSON value) of a binary file that holds one array.

    A part of it is in memory at a time.  Raises DataError.
    """
    text = LongText(file)
    number = 1
    try:
        text.skip("[")
        while text.next_character() != "]":
            if number > 1:
                text.skip(",")
            text.next_character()
            yield number, text.next_value()
            number += 1
        text.skip("]")
        if text.next_character():
            text.skip("end of the file")
    except UnicodeDecodeError:
        raise DataError(f"{where}:{number}: not UTF-8; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise json_error(error, f"{where}:{number}", ARRAY_REMEDY) from None


class LongText:
    """JSON of which only a part is in memory."""

    def __init__(self, file):
        """file: binary; blanks at its beginning and a byte-order mark are skipped"""
        self.file = io.TextIOWrapper(file, "utf-8-sig")
        self.buffer = ""
        self.position = 0

    def read_on(self):
        """Read more, at least as much as there is left -> False at the end of the file"""
        rest = self.buffer[self.position:]
        chunk = self.file.read(max(CHUNK, len(rest)))
        if chunk:
            self.buffer = rest + chunk
            self.position = 0
        return bool(chunk)

    def next_character(self):
        """Skip blanks -> the next character, "" at the end"""
        while True:
            self.position = BLANKS.match(self.buffer, self.position).end()
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self.read_on():
                return ""

    def skip(self, expected):
        if self.next_character() != expected:
            raise json.JSONDecodeError(f"Expecting {expected!r}", "", 0)
        self.position += 1

    def next_value(self):
        """Decode the value that begins here; raises what the decoder raises"""
        while True:
            try:
                value, end = DECODER.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError:  # perhaps because the rest is not read yet
                if len(self.buffer) - self.position > MAX_LINE:
                    reason = f"in a record of more than {MAX_LINE:,} characters"
                    raise json.JSONDecodeError(reason, "", 0) from None
                if not self.read_on():
                    raise
                continue
            if end + len("e+") >= len(self.buffer) and self.read_on():
                continue  # a number may go on
            self.position = end
            return value
