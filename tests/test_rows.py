"""Rows in = rows out: for every kind of file, prepared and streamed, against readers that are written here."""

import csv
import gzip
import io
import itertools
import json
import os
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ONLINE, run_program
from hub_server import HubServer
from hypothesis import HealthCheck, assume, given, settings, target
from hypothesis import strategies as st

from train_loop.data import sources
from train_loop.data.rows import load_rows
from train_loop.data.sources import load_source
from train_loop.report.sample import Samples
from train_loop.settings.command_line import read_settings
from train_loop.settings.settings import Settings

BOM = b"\xef\xbb\xbf"
NULLS = ["", "#N/A", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "<NA>", "-nan", "none", "Null", "-", "?"]
LOOKS_LIKE = ["007", "1,000", "1e5", "0x1F", "inf", "True", "2020-01-01", "2020-01-01T00:00:00Z", "# no comment", "1_0"]
SEPARATORS = [
    "a\x0bb",
    "a\x0cb",
    "a\x1cb\x1db\x1eb",
    "a\x85b",
    "a\u2028b\u2029",
    "\ufeffa",
    "a\x00b",
    "\t",
    " ",
    "\\",
    "'",
]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text("a,;\t\"'\\\r\n \ufeff\u2028\x00é😀", max_size=12),
    st.sampled_from(NULLS + LOOKS_LIKE + SEPARATORS),
)
ROWS = st.lists(TEXTS, min_size=1, max_size=8)


def prepared(path, **more):
    return [row["text"] for row in load_rows(Settings(train_file=str(path), validation_file=str(path), **more))[0]]


def streamed(path, **more):
    """The rows of a stream; from each of its places on they are the same."""
    source = load_source(Settings(train_file=str(path), validation_file=str(path), streaming=True, **more))[0]
    return rows_from_every_place(source)


def rows_from_every_place(source):
    chunks = [(place, source.texts(place, chunk)) for place, chunk in source.chunks(None)]
    for i, (place, _) in enumerate(chunks):
        place = json.loads(json.dumps(place))
        assert [source.texts(*chunk) for chunk in source.chunks(place)] == [texts for _, texts in chunks[i:]]
    return list(itertools.chain.from_iterable(texts for _, texts in chunks))


def folder_rows(folder, streaming):
    more = SimpleNamespace(dataset_name=str(folder), dataset_config_name=None, text_column=None, eval_only=False)
    if not streaming:
        return [row["text"] for row in load_rows(more)[0]]
    return rows_from_every_place(load_source(more)[0])


# -- writers: the file's bytes for rows of text; and the rows that a reader of that format must find


def write_txt(rows):
    return "".join(rows).encode()


def read_txt(content):
    """By hand: a line ends with \\n, \\r\\n or \\r, and with nothing else."""
    rows = content.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [f"{row}\n" for row in rows[:-1]] + rows[-1:] * bool(rows[-1])


def write_jsonl(rows):
    lines = [json.dumps({"id": i, "text": row, "none": None}, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    return "\n".join(lines).encode()


def write_json(rows):
    return json.dumps([{"text": row, "n": {"a": [1]}} for row in rows], indent=1, ensure_ascii=False).encode()


def write_csv(rows, quoting=csv.QUOTE_MINIMAL, end="\r\n"):
    if sys.version_info < (3, 11):  # its csv module neither writes nor reads one: such a file is refused
        assume(not any("\0" in row for row in rows))
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=quoting, lineterminator=end)
    writer.writerows([["id", "text", "date"], *([i, row, ""] for i, row in enumerate(rows))])
    return file.getvalue().encode()


def write_parquet(rows):
    file = io.BytesIO()
    table = pa.table({"id": range(len(rows)), "text": pa.array(rows, pa.string())})
    pq.write_table(table, file, row_group_size=3)
    return file.getvalue()


WRITERS = {"txt": write_txt, "jsonl": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 20)


many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", WRITERS)
@many
@given(rows=ROWS, compressed=st.booleans(), with_bom=st.booleans())
def test_the_rows_of_a_file_are_those_that_were_written(kind, small_chunks, tmp_path, rows, compressed, with_bom):
    content = BOM * (with_bom and kind != "parquet") + WRITERS[kind](rows)
    expected = read_txt(content) if kind == "txt" else rows
    if not expected:
        return
    target(len(content))
    path = tmp_path / f"rows.{kind}{'.gz' * compressed}"
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert prepared(path) == expected
    if kind == "json":
        with pytest.raises(ValueError, match="is one JSON array; streaming reads JSON of one object a line"):
            streamed(path)
    else:
        assert streamed(path) == expected


@many
@given(rows=ROWS, compressed=st.booleans(), with_bom=st.booleans())
def test_each_file_of_a_folder_is_one_row_in_the_order_of_their_names(
    small_chunks, tmp_path_factory, rows, compressed, with_bom
):
    folder = tmp_path_factory.mktemp("texts")
    for i, row in enumerate(rows):
        content = BOM * with_bom + row.encode()
        path = folder / f"{i}.{'txt.gz' if compressed else 'md'}"
        path.write_bytes(gzip.compress(content) if compressed else content)
    expected = ["".join(read_txt(BOM * with_bom + row.encode())) for row in rows]
    assert prepared(folder) == expected and streamed(folder) == expected
    assert prepared(folder / "*") == expected and streamed(folder / "**" / "*") == expected


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
@settings(many, max_examples=12)
@given(rows=ROWS)
def test_the_rows_of_a_data_set_folder_are_those_of_its_files(kind, small_chunks, tmp_path_factory, rows):
    content = WRITERS[kind](rows)
    expected = read_txt(content) if kind == "txt" else rows
    if not expected or content == b"":
        return
    folder = tmp_path_factory.mktemp("set")
    for name in ("train", "validation"):
        (folder / f"{name}.{kind}").write_bytes(content)
    assert folder_rows(folder, streaming=False) == expected
    assert folder_rows(folder, streaming=True) == expected


# Python's writer leaves \n and \r without quotes where they do not end its lines
ENDS = [(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_ALL, "\n"), (csv.QUOTE_ALL, "\r")]


@many
@given(rows=ROWS, how=st.sampled_from(ENDS))
def test_a_csv_cell_is_the_text_that_stands_there(small_chunks, tmp_path, rows, how):
    path = tmp_path / "rows.csv"
    path.write_bytes(write_csv(rows, *how))
    assert prepared(path) == rows and streamed(path) == rows


# -- what datasets, pandas, glob and JSON do by default


HUB_ROWS = [*NULLS, *LOOKS_LIKE, "a row", "another\u2028one"]


def test_rows_of_a_data_set_on_the_hub_are_those_of_its_files_and_are_found_again_without_it(tmp_path):
    rows = [row for row in HUB_ROWS if row]
    wanted = {kind: rows for kind in ("jsonl", "csv", "parquet")} | {"txt": [f"{row}\n" for row in rows]}
    names = [f"me/{kind}" for kind in wanted]
    with HubServer(tmp_path / "hub", {}) as hub:
        for kind in wanted:
            content = BOM * (kind != "parquet") + WRITERS[kind](wanted[kind])
            hub.add("datasets", f"me/{kind}", {f"{split}.{kind}": content for split in ("train", "validation")})
        environment = hub.environment(tmp_path / "cache")
        done = run_program("rows_on_the_hub.py", *names, launcher=(*ONLINE, sys.executable), **environment)
        assert done.returncode == 0, done.stderr
    again = run_program("rows_on_the_hub.py", *names, **environment, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    for output in (done, again):
        assert json.loads(output.stdout) == {f"me/{kind}": [wanted[kind]] * 2 for kind in wanted}


def test_a_column_of_digits_is_text_if_it_is_the_only_one_or_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "007\n" * 3000 + "a cat\n")
    assert prepared(path) == ["007"] * 3000 + ["a cat"]
    path.write_text("id,text\n1,007\n2,008\n")
    assert prepared(path) == streamed(path) == ["007", "008"]
    path.write_text("id,body\n1,a\n2,b\n")
    assert prepared(path) == ["a", "b"]
    path.write_text("id,body\n1,2\n2,3\n")
    assert prepared(path, text_column=["body"]) == ["2", "3"]
    with pytest.raises(ValueError, match="not just one column of text; text_column may be one of: id, body"):
        prepared(path)


@pytest.mark.parametrize("read", [prepared, streamed])
def test_a_column_of_text_is_read_whatever_stands_beside_it(read, tmp_path):
    columns = {
        "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        "list_view": pa.array([[1], []], pa.list_view(pa.int64())),
        "null": pa.nulls(2),
        "text": pa.array(["one", "two"]),
        "text.x": pa.array([1, 2]),
    }
    twice = pa.Table.from_arrays([pa.array([1, 2])] * 2 + [columns["text"]], names=["n", "n", "text"])
    path = tmp_path / "rows.parquet"
    # a parquet file with two columns of one name is read by index
    for table in (pa.table(columns), twice):
        pq.write_table(table, path)
        assert read(path) == ["one", "two"]
    kinds = (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
    for kind in kinds:
        pq.write_table(pa.table({"text": pa.array(["one", "two"]).cast(kind)}), path)
        assert read(path) == ["one", "two"], kind
    pq.write_table(pa.Table.from_arrays([columns["text"]] * 2, names=["text", "text"]), path)
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read as parquet: it has 2 columns .* 'text'"):
        read(path)


@pytest.mark.parametrize("read", [prepared, streamed])
@pytest.mark.parametrize(
    "line, said",
    [
        (rb'{"text": "a \ud800 b"}', r"'text' has one half of a surrogate pair, \\ud800"),
        (b'{"text": "a", "text": "b"}', "the key 'text' is given twice"),
        (b'{"text": "cut off', "Unterminated string"),
        (b'{"body": "a"}', "the key 'text' is missing"),
        (b'{"text": 7}', "'text' is no text"),
        (b'["text"]', "the line is not a JSON object"),
        (b'{"text": "\xff"}', "it is not UTF-8 text"),
        (b'{"text": "a", "n": ' + b"[" * 100_000, "recursion"),
    ],
)
def test_a_line_of_json_that_cannot_be_read_is_named_blank_ones_counted(line, said, read, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n \r\n{"text": "two"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(ValueError, match=rf"rows\.jsonl(,| cannot be read as json:) line 5: .*{said}"):
        read(path)


def test_broken_values_in_other_columns_do_not_matter(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one", "n": %s, "other": "\\ud800", "x": NaN}\n' % ("9" * 5000))
    assert prepared(path, text_column=["text"]) == streamed(path, text_column=["text"]) == ["one"]


@pytest.mark.parametrize("read", [prepared, streamed])
@pytest.mark.parametrize(
    "content, said",
    [
        ("id,text\n1,a\n2,b, and c\n", "line 3: the record has 3 cells, the header has 2"),
        ("id,text\n1,a\n2\n", "line 3: the record has 1 cells, the header has 2"),
        ('id,text\n1,"a\nb"\n2,"c\n', "in the record at line 4: unexpected end of data"),
        ('id,text\n1,"a"b\n', "in the record at line 2: ',' expected after '\"'"),
        ("text,text\na,b\n", "it has 2 columns that are named 'text'"),
    ],
)
def test_a_csv_whose_cells_would_be_cut_or_shifted_is_refused(content, said, read, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"rows\.csv cannot be read as csv: {said}"):
        read(path)


def test_a_cell_may_be_as_large_as_a_document(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f'text\n"{"a b " * 100_000}"\n')
    assert prepared(path) == ["a b " * 100_000]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_pattern_means_files_at_any_depth_one_or_many(kind, tmp_path):
    for i, folder in enumerate(["", "a", "b", "b/c"]):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"x.{kind}").write_bytes(WRITERS[kind]([f"row {i}"]))
    pattern = tmp_path / "**" / f"*.{kind}"
    assert prepared(pattern) == streamed(pattern) == ["row 1", "row 3", "row 2", "row 0"]  # a/x, b/c/x, b/x, x
    (tmp_path / "plain.jsonl").write_bytes(write_jsonl(["a row"]))
    for path in (pattern, tmp_path / "a" / f"*.{kind}"):  # of four files, and of one
        words = [f"--train_file={path}", f"--validation_file={tmp_path}/plain.jsonl", "--tokenizer_name=t"]
        read_settings([*words, "--model_type=gpt2", "--streaming", "--max_train_steps=1", "--output_dir=o"])
        read_settings([*words, "--model_type=gpt2", "--output_dir=o"])


def test_files_that_a_folder_leaves_out_are_counted_in_a_message(tmp_path, capsys):
    for name in ("a.txt", "b.pdf", "c.jsonl", "d/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert prepared(tmp_path) == ["text"]
    assert f"warning: {tmp_path}: 3 of its files are not text files and are left out" in capsys.readouterr().err


def test_a_prompt_that_is_no_utf8_is_refused_in_a_sentence():
    settings = Settings(sample_prompt=[os.fsdecode(b"caf\xe9")], block_size=8)
    with pytest.raises(ValueError, match=r"sample_prompt 'caf\\udce9' is not UTF-8 text"):
        Samples(settings, tokenizer=None)
