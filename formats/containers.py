"""What a file is packed in: compressed by gzip, xz or zstd; rows of CSV."""
import csv
import gzip
import io
import lzma
import sys
import zlib

from data import DataError
from formats.signatures import COMPRESSIONS

NAMES = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}  # ending of a name -> its compression
OTHER_FORMATS = {  # first bytes -> what they say that the file is
    b"\x89PNG": "a PNG image",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed by bzip2",
    b"%PDF": "a PDF document",
}
ZSTD_CHUNK = 2 ** 10  # bytes decompressed at once: they can become 30,000 times as many
MAX_LINE = 2 ** 24    # bytes of a line of CSV, and characters of a cell


def compression_of(first_bytes):
    """Name of the compression that a file begins like, "" if none"""
    for name, magic in COMPRESSIONS.items():
        if first_bytes.startswith(magic):
            return name
    return ""


def open_decompressed(path):
    """Open a file, decompressed if it begins as compressed files do, whatever its name.

    -> binary file.  Raises DataError.
    """
    with open(path, "rb") as file:
        first_bytes = file.read(8)
    compression = compression_of(first_bytes)
    if compression == "gzip":
        return gzip.open(path, "rb")
    if compression == "xz":
        return lzma.open(path, "rb")
    if compression == "zstd":
        return open_zstd(path)
    for magic, kind in OTHER_FORMATS.items():
        if first_bytes.startswith(magic):
            raise DataError(f"{path}: is {kind}; convert it to JSONL, one preference pair a line")
    for ending, name in NAMES.items():
        if first_bytes and str(path).endswith(ending):
            raise DataError(
                f"{path}: is no {name} file in spite of its name; fetch it again, or take {ending} "
                "off the name if it is plain JSONL"
            )
    return open(path, "rb")


def is_damage(error):
    """Whether an exception says that a compressed file is not whole."""
    if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)):
        return True
    modules = (sys.modules.get("zstandard"), sys.modules.get("compression.zstd"))
    return any(module and isinstance(error, module.ZstdError) for module in modules)


def open_zstd(path):
    """Open by Python 3.14's own module, or by the library zstandard.  Raises DataError"""
    try:
        from compression import zstd
        return zstd.open(path, "rb")
    except ImportError:
        pass
    try:
        import zstandard  # noqa: F401
    except ImportError:
        raise DataError(f"{path}: is compressed by zstd; pip install zstandard, or decompress it "
                        "first") from None
    return io.BufferedReader(ZstdFile(path), 2 ** 16)


class ZstdFile(io.RawIOBase):
    """A file that the library zstandard decompresses.  Its own reader does not say when a file ends
    too early."""

    def __init__(self, path):
        self.file = open(path, "rb")
        self.frame = None   # the frame that is read
        self.packed = b""   # bytes behind the end of the last frame
        self.ready = b""    # decompressed and not read yet

    def readable(self):
        return True

    def readinto(self, buffer):
        """Raises EOFError where the file ends inside a frame."""
        while not self.ready:
            packed = self.packed or self.file.read(ZSTD_CHUNK)
            if not packed:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("it ends too early")
                return 0
            self.decompress(packed)
        size = min(len(buffer), len(self.ready))
        buffer[:size] = self.ready[:size]
        self.ready = self.ready[size:]
        return size

    def decompress(self, packed):
        import zstandard
        if self.frame is None or self.frame.eof:
            self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.ready = self.frame.decompress(packed)
        self.packed = self.frame.unused_data if self.frame.eof else b""

    def close(self):
        self.file.close()
        super().close()


# --------------------------------------------------------------------------------------------------
# CSV


def read_rows(file, where):
    """Rows of a CSV file whose first line has the names of the columns.

    file: binary.  Yields (number of the row's first line, {column: text}).  Cells stay text; the
    margin becomes a number, and is left out where it is empty.  Raises DataError.
    """
    csv.field_size_limit(MAX_LINE)
    rows = csv.reader(text_lines(file, where), strict=True)
    header = None
    number = 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{where}:{number}: broken CSV ({error}); correct the quotes, or "
                            "convert the file to JSONL") from None
        if row is None:
            return
        if row and header is None:
            header = row
            check_columns(header, f"{where}:{number}")
        elif row:
            yield number, named_cells(header, row, f"{where}:{number}")
        number = rows.line_num + 1


def numbered_lines(file, max_len):
    """Yields (number, line) of a binary file; a longer line is cut one byte behind max_len."""
    number = 0
    while line := file.readline(max_len + 1):
        number += 1
        yield number, line


def text_lines(file, where):
    """Yields the lines of a binary file as text.  Raises DataError"""
    for number, line in numbered_lines(file, MAX_LINE):
        if len(line) > MAX_LINE:
            raise DataError(f"{where}:{number}: the line has more than {MAX_LINE:,} bytes; convert "
                            "the file to JSONL")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}:{number}: not UTF-8 (byte {error.start + 1}); convert the "
                            "file to UTF-8") from None


def check_columns(names, where):
    """Raise DataError if a column is there twice: a record has one value of that name."""
    seen = set()
    for name in names:
        if name in seen:
            raise DataError(f"{where}: column {ascii(name)[:40]} is there twice; rename one")
        seen.add(name)


def named_cells(header, row, where):
    if len(row) != len(header):
        raise DataError(f"{where}: has {len(row)} cells, the first line has {len(header)}; put "
                        "texts with commas or line breaks in quotes")
    record = dict(zip(header, row))
    margin = record.pop("margin", "")
    if margin.strip():
        try:
            record["margin"] = float(margin)
        except ValueError:
            record["margin"] = margin
    return record
