"""Containers: compressed files, JSON arrays, CSV, tables, folders, sets of the hub."""
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_examples import ARENA, EXAMPLES, HI, PKU

from data import DataError
from formats import containers, records, sources
from formats.pairs import read_pairs
from formats.records import read_records

PAIR = {"prompt": HI, "chosen": " Hello", "rejected": " No"}
RECORDS = [PAIR | {"id": i, "text": "é\n" * i, "list": [1, {"a": None}]} for i in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def zstd_compress(content):
    return pytest.importorskip("zstandard").compress(content)


COMPRESS = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstd_compress}


def write(path, content):
    path.write_bytes(content)
    return str(path)


def values(name):
    return [value for _, value in read_records(name)]


def fails(name, message):
    """Check that a name is one line of error."""
    with pytest.raises(DataError, match=message) as error:
        list(read_records(name))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


# --------------------------------------------------------------------------------------------------
# Compressed files


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl.{}", "a.jsonl"])
def test_a_compressed_file_is_known_by_its_content(tmp_path, kind, name):
    compress = COMPRESS[kind]
    path = write(tmp_path / name.format(kind), compress(LINES))
    assert list(read_records(path)) == list(enumerate(RECORDS, 1))
    several = write(tmp_path / "b", compress(LINES) + compress(LINES))
    assert values(several) == RECORDS + RECORDS
    array = write(tmp_path / "c.json", compress(json.dumps(RECORDS, indent=2).encode()))
    assert values(array) == RECORDS


@pytest.mark.parametrize("kind, word", [("gz", "gzip"), ("xz", "xz"), ("zst", "zstd")])
def test_a_damaged_file_is_one_line(tmp_path, kind, word):
    content = COMPRESS[kind](b"".join(b'{"a": "%d"}\n' % (i * i) for i in range(2000)))
    for size in (8, len(content) // 2, len(content) - 1):
        path = write(tmp_path / f"{size}.jsonl", content[:size])
        fails(path, f"{path}: not a complete {word} file .*; fetch it again")
    middle = len(content) // 2
    flipped = bytes(byte ^ 255 for byte in content[middle:middle + 20])
    path = write(tmp_path / "b.jsonl", content[:middle] + flipped + content[middle + 20:])
    with pytest.raises(DataError):
        list(read_records(path))
    path = write(tmp_path / f"c.jsonl.{kind}", LINES)
    fails(path, f"is no {word} file in spite of its name.*take .{kind} off")


def test_a_long_file_of_zstd_is_read_in_parts(tmp_path):
    long = [PAIR | {"text": str(i) * 1000} for i in range(3000)]
    content = "".join(json.dumps(record) + "\n" for record in long).encode()
    assert values(write(tmp_path / "a", zstd_compress(content))) == long


def test_without_the_library_zstd_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(10))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    fails(path, f"{path}: is compressed by zstd; pip install zstandard")


# --------------------------------------------------------------------------------------------------
# JSON arrays


@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n \r\n", "\ufeff\n"])
def test_an_array_is_read_record_by_record(tmp_path, indent, before):
    text = before + json.dumps(RECORDS, indent=indent, ensure_ascii=False) + "\n \n"
    path = write(tmp_path / "a.json", text.replace("\n", "\r\n").encode())
    assert list(read_records(path)) == list(enumerate(RECORDS, 1))
    assert [pair.source for pair in read_pairs(path)] == [f"{path}:{i}" for i in range(1, 6)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.lists(json_values, min_size=1, max_size=6), st.integers(1, 20), st.booleans())
def test_where_an_array_is_cut_for_reading_does_not_matter(array, chunk, indented):
    text = json.dumps(array, indent=1 if indented else None, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        found = list(records.read_array(io.BytesIO(text.encode()), "a"))
    assert found == list(enumerate(array, 1))


BAD_ARRAYS = {
    "empty": (b"[]", "the file is empty"),
    "open": (b'[{"a": 1}', ":2: broken JSON .Expecting ','"),
    "two arrays": (b'[{"a": 1}]\n[{"a": 1}]', ":2: broken JSON"),
    "no comma": (b'[{"a": 1} {"a": 1}]', ":2: broken JSON .Expecting ','"),
    "comma at the end": (b'[{"a": 1},]', ":2: broken JSON"),
    "broken record": (b'[{"a": 1}, {"a" 1}]', ":2: broken JSON.*one JSON array of objects"),
    "key twice": (b'[{"a": 1, "a": 2}]', ":1: key 'a' is given twice"),
    "digits": (b'[{"a": ' + b"9" * 5000 + b"}]", ":1: a number has too many digits"),
    "deep": (b"[" * 100_000, ":1: broken JSON .nested too deeply"),
    "latin-1": ('[{"a": "é"}]'.encode("latin-1"), ":1: not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_a_bad_array_is_one_line_that_names_the_record(tmp_path, name):
    content, message = BAD_ARRAYS[name]
    path = write(tmp_path / "a.json", content)
    fails(path, f"^{path}.*{message}")


def test_a_record_of_an_array_must_be_an_object(tmp_path):
    path = write(tmp_path / "a.json", b'[["a"], ["b"]]')
    with pytest.raises(DataError, match=":1: a record must be an object .* not a list"):
        read_pairs(path)


def test_a_record_longer_than_any_pair_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 1000)
    monkeypatch.setattr(records, "CHUNK", 100)
    path = write(tmp_path / "a.json", b'[{"a": "' + b"x" * 10 ** 6 + b'"}]')
    fails(path, ":1: broken JSON .in a record of more than 1,000 characters")


# --------------------------------------------------------------------------------------------------
# CSV


def csv_text(rows, **options):
    file = io.StringIO()
    csv.writer(file, **options).writerows(rows)
    return file.getvalue()


ROWS = [
    ["prompt", "chosen", "rejected", "margin", "note"],
    ["Hi", 'a, "b"\nc', "No", "0.5", "x"],
    ["Hi", "d", "e", "", ""],
]


@pytest.mark.parametrize("change", [
    str.encode, lambda text: text.encode("utf-8-sig"), lambda text: gzip.compress(text.encode()),
    lambda text: text.replace("\r\n", "\n").encode(), lambda text: ("\n" + text + "\n").encode(),
])
def test_rows_of_csv_become_pairs_with_all_their_columns(tmp_path, change):
    text = csv_text(ROWS)
    gap = text.startswith("\n")
    path = write(tmp_path / "a.csv", change(text))
    pairs = read_pairs(path)
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        (HI, ' a, "b"\nc', " No"), (HI, " d", " e")]
    assert [pair.margin for pair in pairs] == [0.5, None]
    assert pairs[0].record == {
        "prompt": "Hi", "chosen": 'a, "b"\nc', "rejected": "No", "margin": 0.5, "note": "x"}
    assert pairs[1].record == {"prompt": "Hi", "chosen": "d", "rejected": "e", "note": ""}
    first, second = (int(pair.source.rpartition(":")[2]) for pair in pairs)
    assert second == first + 2 and not gap  # a row is named by its first line


@pytest.mark.parametrize("name", ["Arena", "PKU, better"])
def test_numbers_of_csv_are_read_from_their_text(tmp_path, name):
    layout, record, expected, _ = EXAMPLES[name]
    record = {"Arena": ARENA, "PKU, better": PKU}[name]
    path = write(tmp_path / "a.csv", csv_text([list(record), list(record.values())]).encode())
    pair, = read_pairs(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == expected[0]
    assert pair.layout == layout


def test_content_goes_before_the_name(tmp_path):
    assert values(write(tmp_path / "a.csv", LINES)) == RECORDS
    assert values(write(tmp_path / "b.csv", json.dumps(RECORDS).encode())) == RECORDS
    fails(write(tmp_path / "c.jsonl", csv_text(ROWS).encode()), ":1: broken JSON")


@pytest.mark.parametrize("content, message", [
    (b"", "the file is empty"),
    (b"a,b\n", "the file is empty"),
    (b"a,b\n1\n", ":2: has 1 cells, the first line has 2; put texts with commas"),
    (b"a,b\n1,2\n1,2,3\n", ":3: has 3 cells"),
    (b"a,a\n1,2\n", ":1: column 'a' is there twice"),
    (b'a,b\n1,"2\n3,4\n', ":2: broken CSV .unexpected end of data"),
    (b'a,b\n"1"x,2\n', ":2: broken CSV"),
    ("a,b\n1,é\n".encode("latin-1"), ":2: not UTF-8"),
])
def test_bad_csv_is_one_line(tmp_path, content, message):
    path = write(tmp_path / "a.csv", content)
    fails(path, f"^{path}.*{message}")


def test_a_long_cell_is_read_and_a_longer_line_is_not(tmp_path, monkeypatch):
    row = ["x" * 200_000, "y"]
    path = write(tmp_path / "a.csv", csv_text([["a", "b"], row]).encode())
    assert values(path) == [{"a": row[0], "b": "y"}]
    monkeypatch.setattr(containers, "MAX_LINE", 1000)
    fails(path, ":2: the line has more than 1,000 bytes")


def test_a_margin_that_is_no_number_is_one_line(tmp_path):
    path = write(tmp_path / "a.csv", csv_text([*ROWS[:1], ["Hi", "a", "b", "much", ""]]).encode())
    with pytest.raises(DataError, match=":2: 'margin' must be a finite number, not a string"):
        read_pairs(path)


# --------------------------------------------------------------------------------------------------
# Tables


def table(rows=RECORDS):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.Table.from_pylist(rows)


def write_parquet(path, rows=RECORDS):
    content = table(rows)
    from pyarrow import parquet
    parquet.write_table(content, str(path), row_group_size=2)


def write_feather(path, rows=RECORDS):
    content = table(rows)
    from pyarrow import feather
    feather.write_feather(content, str(path))


def write_stream(path, rows=RECORDS):
    content = table(rows)
    import pyarrow
    with pyarrow.OSFile(str(path), "wb") as file:
        with pyarrow.ipc.new_stream(file, content.schema) as writer:
            writer.write_table(content, max_chunksize=2)


TABLES = {"parquet": write_parquet, "arrow": write_feather, "stream": write_stream}
FLAT = [PAIR | {"id": i, "text": "é\n" * i, "list": [{"a": None}]} for i in range(5)]


@pytest.mark.parametrize("kind", TABLES)
def test_rows_of_a_table_are_records(tmp_path, kind):
    path = tmp_path / "a.jsonl"  # the name does not matter
    TABLES[kind](path, FLAT)
    assert list(read_records(path)) == list(enumerate(FLAT, 1))
    assert [pair.record for pair in read_pairs(str(path))] == FLAT


@pytest.mark.parametrize("kind", TABLES)
def test_a_damaged_table_is_one_line(tmp_path, kind):
    path = tmp_path / "a"
    TABLES[kind](path, FLAT)
    content = path.read_bytes()
    for size in (8, len(content) // 2, len(content) - 4):
        damaged = write(tmp_path / f"b{size}", content[:size])
        try:
            assert values(damaged) == FLAT  # a stream may lack its last mark
        except DataError as error:
            assert str(error).startswith(damaged) and "\n" not in str(error)
    path.write_bytes(content[:len(content) // 2] + b"\xff" * 40 + content[len(content) // 2 + 40:])
    try:
        values(str(path))
    except DataError as error:
        assert "\n" not in str(error)


def test_values_that_json_lacks_become_the_nearest(tmp_path):
    row = {
        "time": datetime.datetime(2024, 1, 2, 3), "bytes": b"\0", "number": decimal.Decimal("1.5"),
        "missing": float("nan"), "flag": True, "nested": [{"day": datetime.date(2024, 1, 2)}],
    }
    path = tmp_path / "a.parquet"
    write_parquet(path, [row])
    assert values(path) == [{
        "time": "2024-01-02T03:00:00", "bytes": "AA==", "number": 1.5, "missing": None,
        "flag": True, "nested": [{"day": "2024-01-02"}],
    }]


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    path = tmp_path / "a.parquet"
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["x", "x"]), str(path))
    fails(path, "column 'x' is there twice; rename one")


def test_a_table_without_rows_is_empty(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [])
    fails(path, "the file is empty")


@pytest.mark.parametrize("content", [b"PAR1" + bytes(100), b"ARROW1\0\0" + bytes(100)])
def test_without_pyarrow_a_table_is_one_line(tmp_path, monkeypatch, content):
    path = write(tmp_path / "a", content)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(path, f"^{path}: is a file of (Parquet|Arrow), which needs pyarrow; pip install pyarrow")


# --------------------------------------------------------------------------------------------------
# A folder of datasets.save_to_disk


def save_to_disk(folder, **state):
    """As datasets writes a split in two files"""
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    write_stream(folder / names[0], FLAT[:3])
    write_stream(folder / names[1], FLAT[3:])
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"} | state
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_folder_of_datasets_is_read_in_order(tmp_path):
    save_to_disk(tmp_path / "set")
    name = f"{tmp_path}/set"
    assert values(name) == FLAT
    pairs = read_pairs(name)
    assert [pair.index for pair in pairs] == list(range(5))
    assert pairs[0].source == f"{name}:data-00000-of-00002.arrow:1"
    assert pairs[4].source == f"{name}:data-00001-of-00002.arrow:2"


def test_a_folder_of_several_splits_names_them(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    fails(tmp_path, r"holds the splits \['train', 'test'\]; name the folder of one of them")


@pytest.mark.parametrize("state, message", [
    ("{", "is no JSON object"),
    ("[]", "is no JSON object"),
    ("{}", "names no data files"),
    ('{"_data_files": []}', "names no data files"),
    ('{"_data_files": [{"filename": "../x"}]}', "names no data files"),
    ('{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow: no such file"),
    ('{"_indices_data_files": [{"filename": "x"}]}', r"call flatten_indices\(\)"),
])
def test_a_damaged_folder_is_one_line(tmp_path, state, message):
    (tmp_path / "state.json").write_text(state)
    fails(tmp_path, message)


# --------------------------------------------------------------------------------------------------
# The hub; a stand-in downloads nothing


def fake_hub(monkeypatch, folder, error=None):
    """-> list of the calls of snapshot_download, which answers with the folder"""
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        if error:
            raise error
        return str(folder)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    sources.download.cache_clear()
    return calls


@pytest.fixture
def snapshot(tmp_path):
    """A set as its folder in the cache of the hub"""
    for name in (
        "train.jsonl", "base/train.jsonl.gz", "base/test.jsonl", "data/train-00000-of-00001.jsonl",
        "data/train_sft-00000-of-00001.jsonl", "test/0000.jsonl", "test/state.json", "README.md",
    ):
        path = tmp_path / "snapshot" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(PAIR | {"file": name}).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return tmp_path / "snapshot"


@pytest.mark.parametrize("name, files", [
    ("owner/set", ["train.jsonl", "base/train.jsonl.gz", "data/train-00000-of-00001.jsonl"]),
    ("owner/set:train", ["train.jsonl", "base/train.jsonl.gz", "data/train-00000-of-00001.jsonl"]),
    ("owner/set-v1.0:test", ["base/test.jsonl", "test/0000.jsonl"]),
    ("owner/set:train_sft", ["data/train_sft-00000-of-00001.jsonl"]),
    ("owner/set:base/test.jsonl", ["base/test.jsonl"]),
])
def test_a_split_of_the_hub_is_all_its_files(monkeypatch, tmp_path, snapshot, name, files):
    monkeypatch.chdir(tmp_path)
    calls = fake_hub(monkeypatch, snapshot)
    pairs = read_pairs(name)
    assert [pair.record["file"] for pair in pairs] == files
    assert [pair.source for pair in pairs] == [f"{name}:{file}:1" for file in files]
    read_pairs(name)
    (repository, options), = calls  # once a process
    assert repository == name.partition(":")[0]
    assert options["repo_type"] == "dataset"


def test_what_is_no_split_of_the_hub_is_one_line(monkeypatch, tmp_path, snapshot):
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, snapshot)
    fails("owner/set:valid", "owner/set:valid: has no data files of that name; write owner/set:SPL")
    fake_hub(monkeypatch, snapshot, OSError("no\nroute"))
    fails("owner/set", "no such file, and it cannot be fetched from the hub .OSError.; on a mach")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    sources.download.cache_clear()
    fails("owner/set", "huggingface_hub is not installed to fetch it.*pip install huggingface_hub")


@pytest.mark.parametrize("name", [
    "data/mine.jsonl", "data/mine.json.gz", "data/mine.csv", "mine", "a/b/c", "/a/b", "./a",
    "a/b:", "-a/b c", "a\n/b",
])
def test_a_name_of_a_file_is_not_looked_for_on_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    assert not sources.is_hub_name(name)


def test_a_folder_of_this_machine_goes_before_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sources.is_hub_name("owner/set")
    (tmp_path / "owner").mkdir()
    save_to_disk(tmp_path / "owner/set")
    assert values("owner/set") == FLAT


# --------------------------------------------------------------------------------------------------
# What a run depends on


def test_work_depends_on_every_file_behind_a_name(tmp_path, monkeypatch, snapshot):
    from runtime.run import Run
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, snapshot)
    first = Run.contents_of(None, ["owner/set", "gone.jsonl", "world"])
    assert list(first) == ["contents of owner/set"]
    (snapshot / "data/train-00000-of-00001.jsonl").write_text("{}")
    assert Run.contents_of(None, ["owner/set"]) != first
