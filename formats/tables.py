"""Rows of Parquet and Arrow files, by pyarrow; a reward model trains without it."""
import base64
import contextlib
import datetime
import decimal
import math

from data import DataError
from formats.containers import check_columns
from formats.signatures import ARROW, PARQUET, STREAM

BATCH = 1000                 # rows that are Python objects at once


def kind_of(first_bytes):
    """What kind of table a file is by its first bytes, "" if it is none"""
    kinds = {PARQUET: "Parquet", ARROW: "Arrow", STREAM: "Arrow"}
    for magic, kind in kinds.items():
        if first_bytes.startswith(magic):
            return kind
    return ""


def read_table(path, where):
    """Yields (number of the row, record) of a Parquet or Arrow file.

    Raises DataError, in one line with a remedy, if it is damaged or pyarrow is not installed.
    """
    with open(path, "rb") as file:
        first_bytes = file.read(8)
    kind = kind_of(first_bytes)
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{where}: is a file of {kind}, which needs pyarrow; pip install pyarrow, "
                        "or convert it to JSONL") from None
    number = 0
    try:
        for batch in read_batches(path, first_bytes):
            check_columns(batch.schema.names, where)
            for start in range(0, batch.num_rows, BATCH):
                for record in batch.slice(start, BATCH).to_pylist():
                    number += 1
                    yield number, {key: json_value(value) for key, value in record.items()}
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{where}: cannot be read as {kind} ({ascii(reason)[1:-1]}); fetch or "
                        "write it again") from None


def read_batches(path, first_bytes):
    """Yields pyarrow.RecordBatch"""
    import pyarrow
    with contextlib.ExitStack() as stack:
        if first_bytes.startswith(PARQUET):
            from pyarrow import parquet
            file = stack.enter_context(parquet.ParquetFile(path))
            yield from file.iter_batches(BATCH, use_threads=False)
            return
        source = stack.enter_context(pyarrow.OSFile(path))
        if first_bytes.startswith(STREAM):
            yield from stack.enter_context(pyarrow.ipc.open_stream(source))
            return
        reader = stack.enter_context(pyarrow.ipc.open_file(source))
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)


def json_value(value):
    """A value of pyarrow -> the JSON value nearest to it"""
    if isinstance(value, (str, int, type(None))):  # also a boolean
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # pandas writes a missing number as nan
    if isinstance(value, dict):
        return {key: json_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(inner) for inner in value]
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value)
