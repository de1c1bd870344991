"""prepare_dataset.py: what goes in comes out, on the right side, or is named and kept aside."""

import codecs
import csv
import errno
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from conftest import without_privileges
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_dataset

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ["instruction", "input", "output"]
quick = settings(max_examples=100, deadline=None, database=None)


def row(instruction, input="", output="an answer"):
    return {"instruction": instruction, "input": input, "output": output}


def write(path, content):
    """Write text (utf-8, line ends as they stand), bytes, or a list of records as JSONL."""
    if isinstance(content, list):
        content = "".join(json.dumps(item) + "\n" for item in content)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(path):
    text = Path(path).read_bytes().decode() if Path(path).exists() else ""
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def prepare(source, folder, *flags):
    """Run main; return (counts, train, val, rejected) as they stand in the files."""
    counts = prepare_dataset.main(["--input", str(source), "--output", str(folder), *flags])
    files = [lines(Path(folder) / f"{name}.jsonl") for name in ("train", "val", "rejected")]
    assert [counts[name] for name in ("train", "val", "rejected")] == [len(rows) for rows in files]
    assert counts["read"] == counts["duplicates"] + sum(len(rows) for rows in files)
    return counts, *files


def kept(tmp_path, name, content, *flags):
    """The records that come out of a file, all in train.jsonl, and the rejected rows."""
    source = write(tmp_path / name, content)
    _, train, val, rejected = prepare(source, tmp_path / "out", "--val-split", "0", *flags)
    assert val == []
    return train, rejected


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in Path(folder).rglob("*")
    }


def same(text):
    """Text as it is compared, written independently of the script."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def question(record):
    return same(record["instruction"]), same(record["input"])


def expected(records):
    """Usable records, stripped, each once, in order; and the number of unusable ones."""
    usable, seen, unusable = [], set(), 0
    for record in records:
        record = {field: record[field].strip() for field in FIELDS}
        if not record["instruction"] or not record["output"] or "\0" in "".join(record.values()):
            unusable += 1
            continue
        key = *question(record), same(record["output"])
        if key not in seen:
            usable.append(record)
        seen.add(key)
    return usable, unusable


# ------------------------------------------------------------------------- what goes in comes out

awkward = ",;\t|\"\n\r \\'=\x00\x0b\x1c\x85\xa0\u2028\ufeffaAéßİ한😀e\u0301"
text = st.text(
    st.one_of(st.sampled_from(awkward), st.characters(exclude_categories=["Cs"])), max_size=12
)
short = st.sampled_from(["a", "A ", "b", "é", "e\u0301", "what?", "What ?", "", " "])
record = st.fixed_dictionaries({field: st.one_of(text, short) for field in FIELDS})
records = st.lists(record, max_size=12)
header_case = st.sampled_from([str, str.upper, str.title, lambda name: f" {name} "])


def as_csv(rows, columns, delimiter, quote_all, end):
    """CSV by the rules of RFC 4180, written here: csv.writer does not quote every line end."""

    def cell(value):
        if quote_all or set(value) & set(delimiter + '"\r\n') or value != value.strip():
            return '"' + value.replace('"', '""') + '"'
        return value

    # a line that is empty would be no row at all: more than one column, so there is none
    return "".join(delimiter.join(map(cell, values)) + end for values in [columns, *rows])


def check_round_trip(rows, name, raw, *flags):
    usable, unusable = expected(rows)
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, name), raw)
        if not usable:
            with pytest.raises(SystemExit, match="error: .*no usable row"):
                prepare_dataset.main(["--input", source, "--output", f"{folder}/out", *flags])
            assert not Path(folder, "out").exists()
            return
        counts, train, val, rejected = prepare(source, f"{folder}/out", *flags)
    assert counts["read"] == len(rows)
    assert len(rejected) == unusable
    assert counts["duplicates"] == len(rows) - unusable - len(usable)
    assert sorted(map(str, train + val)) == sorted(map(str, usable))
    order = [str(record) for record in usable]
    for side in (train, val):
        places = [order.index(str(record)) for record in side]
        assert places == sorted(places)
        assert all(list(record) == FIELDS for record in side)
    assert not {*map(question, train)} & {*map(question, val)}


@quick
@given(
    rows=records,
    order=st.permutations(FIELDS),
    case=header_case,
    extra=st.booleans(),
    delimiter=st.sampled_from(",;\t|"),
    named=st.booleans(),
    quote_all=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    zipped=st.booleans(),
)
def test_every_csv_comes_out_as_it_went_in(
    rows, order, case, extra, delimiter, named, quote_all, end, encoding, zipped
):
    columns = [case(name) for name in order] + ["note"] * extra
    cells = [[record[name] for name in order] + ["x"] * extra for record in rows]
    raw = as_csv(cells, columns, delimiter, quote_all, end).encode(encoding)
    name = "tsv" if delimiter == "\t" else "csv"
    flags = ["--delimiter", delimiter.replace("\t", "tab")] if named else []
    raw, name = (gzip.compress(raw), f"rows.{name}.gz") if zipped else (raw, f"rows.{name}")
    check_round_trip(rows, name, raw, *flags)


@quick
@given(
    rows=records,
    indent=st.sampled_from([None, 2]),
    ascii=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    zipped=st.booleans(),
)
def test_every_json_list_comes_out_as_it_went_in(rows, indent, ascii, encoding, zipped):
    raw = json.dumps(rows, indent=indent, ensure_ascii=ascii).encode(encoding)
    check_round_trip(rows, "rows.json" + ".gz" * zipped, gzip.compress(raw) if zipped else raw)


@quick
@given(
    rows=records,
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\r"]),
    last=st.booleans(),
    ascii=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    zipped=st.booleans(),
)
def test_every_jsonl_comes_out_as_it_went_in(rows, end, last, ascii, encoding, zipped):
    raw = end.join(json.dumps(record, ensure_ascii=ascii) for record in rows) + end * last
    raw = raw.encode(encoding)
    check_round_trip(rows, "rows.jsonl" + ".gz" * zipped, gzip.compress(raw) if zipped else raw)


@quick
@given(rows=records)
def test_a_csv_written_by_the_csv_module_comes_out_as_it_went_in(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
        raw = path.read_bytes()
    check_round_trip(rows, "rows.csv", raw)


@quick
@given(
    rows=records,
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(-(2**70), 2**70),
)
def test_the_same_seed_gives_the_same_bytes(rows, share, seed):
    rows = [*rows, row("one usable question")]
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, "rows.jsonl"), rows)
        for name in ("a", "b"):
            prepare(source, f"{folder}/{name}", "--val-split", str(share), "--seed", str(seed))
        assert snapshot(f"{folder}/a") == snapshot(f"{folder}/b")


def test_another_process_gives_the_same_bytes(tmp_path):
    rows = [row(f"question {n // 2}", output=f"{n} é") for n in range(200)] + [row("")]
    source = write(tmp_path / "rows.jsonl", rows)
    prepare(source, tmp_path / "a", "--seed", "7")
    script = [sys.executable, ROOT / "prepare_dataset.py", "--seed", "7", "--input", source]
    subprocess.run(
        [*script, "--output", tmp_path / "b"],
        env={**os.environ, "PYTHONHASHSEED": "1", "LC_ALL": "C", "PYTHONUTF8": "0"},
        check=True,
        capture_output=True,
    )
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@quick
@given(st.lists(text, max_size=30))
def test_text_is_folded_without_regard_to_form_and_white_space(words):
    one = "\n ".join(words)
    other = "\t".join(unicodedata.normalize("NFD", word) for word in words)
    assert prepare_dataset.fold(one) == prepare_dataset.fold(f"  {other}\r\n") == same(one)


whole = '[{"instruction": "a", "input": null, "output": 1.5}, {"output": [[true]]}]'
scraps = st.lists(
    st.one_of(
        st.sampled_from(['"', '""', ",", "\r", "\n", "{", "}", "[", "]", ":", "\\u", "\\ud800"]),
        st.sampled_from(["instruction", '"instruction"', "output,", "a,x\n", whole, "\0", "1e999"]),
        st.text(max_size=5),
    ).map(str.encode)
    | st.binary(max_size=5)
    | st.sampled_from([b"\x1f\x8b", b"\xff\xfe", codecs.BOM_UTF8, gzip.compress(whole.encode())]),
    max_size=8,
).map(b"".join)


@quick
@given(
    raw=scraps,
    head=st.sampled_from([b"", b"instruction,output\n", b"instruction\toutput,note\r\n"]),
    zipped=st.booleans(),
    cut=st.integers(0, 60),
    spoiled=st.one_of(st.none(), st.integers(0, 200)),
    name=st.sampled_from(["rows.csv", "rows.json", "rows.jsonl", "rows.tsv.gz"]),
    flags=st.sampled_from([[], ["--strict"], ["--encoding", "utf-16"], ["--delimiter", "|"]]),
)
def test_whatever_the_bytes_it_ends_well_or_in_one_line(
    raw, head, zipped, cut, spoiled, name, flags
):
    raw = gzip.compress(head + raw, mtime=0) if zipped else head + raw
    raw = raw[: len(raw) - cut] if cut < 20 else raw
    if spoiled is not None and raw:
        place = spoiled % len(raw)
        raw = raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, name), raw)
        try:
            prepare(source, f"{folder}/out", *flags)
        except SystemExit as ended:
            assert re.fullmatch("error: .+", ended.code)
            assert not Path(folder, "out").exists()


# -------------------------------------------------------------------------------------- the split


@quick
@given(
    keys=st.lists(st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f", b"g"]), max_size=40),
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 9),
)
def test_a_question_never_falls_on_both_sides(keys, share, seed):
    held_out = prepare_dataset.split_rows(keys, share, seed)
    groups = Counter(keys)
    assert len(held_out) == len(keys)
    val = {key for key, side in zip(keys, held_out, strict=True) if side}
    train = {key for key, side in zip(keys, held_out, strict=True) if not side}
    assert not val & train
    if keys:
        assert train
        assert abs(sum(held_out) - round(len(keys) * share)) <= max(groups.values())
    if share and len(groups) > 1:
        assert val
    if not share:
        assert not val


@quick
@given(
    count=st.integers(2, 300),
    share=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**32),
)
def test_exactly_the_rounded_share_of_different_questions_is_held_out(count, share, seed):
    held_out = prepare_dataset.split_rows([b"%d" % n for n in range(count)], share, seed)
    assert sum(held_out) == min(max(1, round(count * share)), count - 1)


@pytest.mark.parametrize("share, val", [("0", 0), ("0.1", 20), ("0.25", 50), ("0.999", 199)])
def test_the_rounded_share_of_rows_stands_in_val(tmp_path, share, val):
    source = write(tmp_path / "rows.jsonl", [row(f"question {n}") for n in range(200)])
    counts, *_ = prepare(source, tmp_path / "out", "--val-split", share)
    assert (counts["train"], counts["val"]) == (200 - val, val)


def test_no_val_split_writes_an_empty_val_file(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row("a"), row("b")])
    prepare(source, tmp_path / "out", "--val-split", "0")
    assert (tmp_path / "out/val.jsonl").read_bytes() == b""


def test_a_tiny_split_still_holds_out_one_row(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row("a"), row("b")])
    counts, *_ = prepare(source, tmp_path / "out", "--val-split", "0.0001")
    assert (counts["train"], counts["val"]) == (1, 1)


def test_one_question_alone_is_trained_on(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row("a", output=str(n)) for n in range(5)])
    counts, *_ = prepare(source, tmp_path / "out", "--val-split", "0.5")
    assert (counts["train"], counts["val"], counts["conflicts"]) == (5, 0, 5)


def test_another_seed_gives_another_split(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row(f"question {n}") for n in range(100)])
    vals = [prepare(source, tmp_path / seed, "--seed", seed)[2] for seed in ("1", "2", "3")]
    assert vals[0] != vals[1] != vals[2] != vals[0]


def test_the_order_of_the_file_does_not_decide_the_split(tmp_path):
    rows = [row(f"question {n}") for n in range(100)]
    source = write(tmp_path / "a.jsonl", rows)
    random.Random(0).shuffle(rows)
    other = write(tmp_path / "b.jsonl", rows)
    one, two = prepare(source, tmp_path / "a")[2], prepare(other, tmp_path / "b")[2]
    assert one != two
    assert sorted(map(str, one)) == sorted(map(str, two))


def test_more_rows_move_few_old_ones(tmp_path):
    rows = [row(f"question {n}") for n in range(220)]
    old = prepare(write(tmp_path / "a.jsonl", rows[:200]), tmp_path / "a")[2]
    new = prepare(write(tmp_path / "b.jsonl", rows), tmp_path / "b")[2]
    old, new = {r["instruction"] for r in old}, {r["instruction"] for r in new}
    moved = (old ^ new) & {r["instruction"] for r in rows[:200]}
    assert (len(old), len(new)) == (20, 22)
    assert len(moved) <= 8


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", "instruction,Context\x1b,output,label\nq,c,a,l\n"),
        ("a.jsonl", [{"instruction": "q", "Context\x1b": "c", "output": "a", "label": "l"}]),
    ],
)
def test_columns_that_are_left_out_are_named(tmp_path, capsys, name, content):
    kept(tmp_path, name, content)
    assert "columns    not used: 'context\\x1b', 'label'; see --columns" in capsys.readouterr().out
    kept(tmp_path, "b.jsonl", [row("q")])
    assert "not used" not in capsys.readouterr().out


def test_a_reader_of_the_output_that_leaves_early_does_no_harm(tmp_path):
    source = write(tmp_path / "a.jsonl", [row("q")])
    command = [sys.executable, str(ROOT / "prepare_dataset.py"), "--input", source]
    command += ["--output", str(tmp_path / "out")]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(lines(tmp_path / "out/train.jsonl")) == 1


def test_conflicting_answers_are_counted_and_stay_on_one_side(tmp_path):
    rows = [row(f"Question {n // 4}", input="x" * (n % 2), output=f"answer {n}") for n in range(80)]
    rows += [row("question   3 ", output="ANSWER 12"), row("alone")]
    for seed in range(5):
        counts, train, val, _ = prepare(
            write(tmp_path / "rows.jsonl", rows),
            tmp_path / "out",
            "--seed",
            str(seed),
            "--val-split",
            "0.3",
        )
        assert counts["conflicts"] == 80
        assert counts["duplicates"] == 1
        assert not {*map(question, train)} & {*map(question, val)}
        assert len(val) in (23, 24)  # round(81 x 0.3), as near as pairs allow


def test_the_same_question_with_another_input_is_another_question(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row("a", "x"), row("a", "y"), row("ax")])
    counts, *_ = prepare(source, tmp_path / "out")
    assert (counts["duplicates"], counts["conflicts"]) == (0, 0)


def test_the_same_letters_in_other_fields_are_another_row(tmp_path):
    rows = [row("a", "b", "cd"), row("a", "bc", "d"), row("ab", "", "cd"), row("ab", "cd", "cd")]
    counts, *_ = prepare(write(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert (counts["duplicates"], counts["conflicts"]) == (0, 0)


def test_repeats_are_found_across_case_white_space_and_unicode_form(tmp_path):
    rows = [
        row("Où  est\nle Pod?", "Ä", "LÀ"),
        row(unicodedata.normalize("NFD", " où est le pod? "), "A\u0308", "là\t"),
        row("STRASSE"),
        row("straße"),
    ]
    counts, train, val, _ = prepare(write(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert counts["duplicates"] == 2
    first = row("Où  est\nle Pod?", "Ä", "LÀ")
    assert first in train + val and row("STRASSE") in train + val


# ----------------------------------------------------------------------------- files of all kinds


def test_windows_1252_is_read_when_named(tmp_path):
    raw = "instruction;output\nCafé – 5 €?;“ja”\n".encode("windows-1252")
    train, _ = kept(tmp_path, "rows.csv", raw, "--encoding", "windows-1252")
    assert train == [row("Café – 5 €?", output="“ja”")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_read_when_named(tmp_path, encoding):
    raw = "instruction\toutput\nCafé 😀?\t한국\n".encode(encoding)
    train, _ = kept(tmp_path, "rows.tsv", raw, "--encoding", encoding)
    assert train == [row("Café 😀?", output="한국")]


@pytest.mark.parametrize(
    "mark, encoding",
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_a_byte_order_mark_wins_over_the_named_encoding(tmp_path, mark, encoding):
    raw = mark + "instruction,output\né,ü\n".encode(encoding)
    train, _ = kept(tmp_path, "rows.csv", raw, "--encoding", "windows-1252")
    assert train == [row("é", output="ü")]


def test_a_cell_of_300000_characters_comes_out_whole(tmp_path):
    long = "wörter, " * 37_500 + "end"
    train, _ = kept(tmp_path, "rows.csv", f'instruction,output\na,"{long}"\n')
    assert len(long) > 300_000
    assert train == [row("a", output=long)]


def test_csv_cells_stay_text(tmp_path):
    cells = ["None", "NA", "NaN", "null", "007", "1e5", "1.0", "True", "-", "=1+1", "2024-01-02"]
    raw = "instruction,output\n" + "".join(f"{cell},{cell}\n" for cell in cells)
    train, _ = kept(tmp_path, "rows.csv", raw)
    assert train == [row(cell, output=cell) for cell in cells]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_numbers_and_booleans_keep_their_text(tmp_path, name):
    values = ["1e5", "1.0", "100000000000000000000000", "-0", "0.10", "1E+2", "true", "false"]
    values += ["9" * 5000, '"007"', "NaN"]
    items = [f'{{"instruction": "q{n}", "output": {value}}}' for n, value in enumerate(values)]
    raw = "\n".join(items) if name == "rows.jsonl" else f"[{', '.join(items)}]"
    train, _ = kept(tmp_path, name, raw)
    assert train == [row(f"q{n}", output=value.strip('"')) for n, value in enumerate(values)]


def test_a_null_or_missing_input_is_empty(tmp_path):
    train, _ = kept(tmp_path, "a.jsonl", '{"instruction": "a", "input": null, "output": "x"}\n'
                    '{"output": "y", "instruction": "b", "source": ["web"]}')  # fmt: skip
    assert train == [row("a", output="x"), row("b", output="y")]
    train, _ = kept(tmp_path, "b.csv", "instruction,input,output\na,,x\n")
    assert train == [row("a", output="x")]


def test_outer_white_space_goes_and_inner_stays(tmp_path):
    train, _ = kept(tmp_path, "rows.jsonl", [row("\n a  b\t", "  - x\n    - y ", "\u00a0c\n\n d ")])
    assert train == [row("a  b", "- x\n    - y", "c\n\n d")]


def test_the_output_is_utf_8_and_not_escaped(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row("é 한 😀", "\u2028", 'a "b"\n')])
    prepare(source, tmp_path / "out", "--val-split", "0")
    assert (tmp_path / "out/train.jsonl").read_bytes() == (
        '{"instruction": "é 한 😀", "input": "", "output": "a \\"b\\""}\n'.encode()
    )


def test_quoted_line_ends_stay_and_rows_are_numbered_as_in_a_spreadsheet(tmp_path):
    raw = 'instruction,output\r\n"a\nb\r\nc",x\r\n,\r\n"d\re",y\r\n,no question\r\n'
    train, rejected = kept(tmp_path, "rows.csv", raw)
    assert train == [row("a\nb\r\nc", output="x"), row("d\re", output="y")]
    assert [(item["row"], item["reason"]) for item in rejected] == [
        (3, "no instruction"),
        (5, "no instruction"),
    ]


def test_line_ends_of_cr_alone_are_line_ends(tmp_path):
    train, _ = kept(tmp_path, "rows.csv", "instruction,output\ra,x\rb,y\r")
    assert train == [row("a", output="x"), row("b", output="y")]


def test_blank_lines_are_no_rows(tmp_path):
    source = write(tmp_path / "rows.csv", "instruction,output\n\na,x\n\n\nb,y\n\n")
    counts, *_ = prepare(source, tmp_path / "out")
    assert (counts["read"], counts["rejected"]) == (2, 0)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_in_the_header_whatever_the_cells_hold(tmp_path, delimiter):
    cells = ["a,;|,;|", "x;;,,||"] if delimiter == "\t" else ['"a,;\t|,;|"', '"x;;,,||"']
    raw = f"Instruction{delimiter} OUTPUT \n" + delimiter.join(cells) + "\n"
    train, _ = kept(tmp_path, "rows.csv", raw)
    assert [record["output"] for record in train] == ["x;;,,||"]


def test_a_gzipped_file_is_known_by_its_bytes_not_its_name(tmp_path):
    raw = b"instruction,output\na,x\n"
    assert kept(tmp_path, "zipped.csv", gzip.compress(raw))[0] == [row("a", output="x")]
    assert kept(tmp_path, "plain.csv.gz", raw)[0] == [row("a", output="x")]
    assert kept(tmp_path, "LOUD.CSV.GZ", gzip.compress(raw))[0] == [row("a", output="x")]


def test_columns_of_dolly_are_mapped(tmp_path):
    item = {"instruction": "a", "context": "c", "response": "r", "category": "qa"}
    flags = ["--columns", "input=context", "output=response"]
    assert kept(tmp_path, "dolly.jsonl", [item], *flags)[0] == [row("a", "c", "r")]
    raw = "CATEGORY;Response;Context;Instruction\nqa;r;c;a\n"
    assert kept(tmp_path, "dolly.csv", raw, *flags)[0] == [row("a", "c", "r")]


def test_a_mapped_column_hides_the_one_of_the_usual_name(tmp_path):
    raw = "instruction,question,output\nold,new,x\n"
    train, _ = kept(tmp_path, "rows.csv", raw, "--columns", "instruction= Question ")
    assert train == [row("new", output="x")]


# ------------------------------------------------------------------- rows that can't be used


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"instruction": "a"}', "no output"),
        ('{"instruction": " \\n", "output": "x"}', "no instruction"),
        ('{"instruction": null, "output": "x"}', "no instruction"),
        ('{"instruction": "a", "output": ["x"]}', "output is not text"),
        ('{"instruction": "a", "input": {"k": 1}, "output": "x"}', "input is not text"),
        ('{"instruction": "a\\u0000", "output": "x"}', "instruction has a NUL character"),
        ('{"instruction": "a", "output": "\\ud83d"}', "output has a lone surrogate"),
        ('{"instruction": "a", "output": "x", "Output ": "y"}', "output is not text"),
        ('{"instruction": "a", "output": "x", "output": "y"}', "output is not text"),
        ('["a", "x"]', "not an object"),
        ("null", "not an object"),
        ('{"instruction": "a", "output": "x"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_an_unusable_json_row_is_kept_aside_with_number_and_reason(tmp_path, line, reason):
    good = json.dumps(row("good"))
    train, rejected = kept(tmp_path, "rows.jsonl", f"{good}\n\n{line}\n")
    assert train == [row("good")]
    assert [(item["row"], item["reason"]) for item in rejected] == [(3, reason)]
    assert rejected[0]["raw"] is not None or line == "null"


@pytest.mark.parametrize(
    "line, reason",
    [
        ("a", "no output"),
        ("a,", "no output"),
        (",x", "no instruction"),
        ("a,x,more", "too many fields"),
        ("a,x,", "too many fields"),
        ('"a"b,x', "broken quotes"),
        ("a\0,x", "instruction has a NUL character"),
    ],
)
def test_an_unusable_csv_row_is_kept_aside_with_number_and_reason(tmp_path, line, reason):
    raw = f"instruction,output\ngood,an answer\n{line}\nbetter,an answer\n"
    train, rejected = kept(tmp_path, "rows.csv", raw)
    assert train == [row("good"), row("better")]
    assert [(item["row"], item["reason"]) for item in rejected] == [(3, reason)]


@pytest.mark.parametrize("other", ["output", " Output"])
def test_both_values_of_a_field_named_twice_are_kept_aside(tmp_path, other):
    item = f'{{"instruction": "a", "output": "x", "{other}": {{"k": 1}}}}'
    _, rejected = kept(tmp_path, "rows.json", f"[{item}, {json.dumps(row('good'))}]")
    raw = {"instruction": "a", "output": ["x", {"k": "1"}]}
    assert rejected == [{"row": 1, "reason": "output is not text", "raw": raw}]


def test_the_position_in_a_json_list_is_the_row_number(tmp_path):
    _, rejected = kept(tmp_path, "rows.json", json.dumps([row("a"), 7, row(""), row("b")]))
    assert [(item["row"], item["reason"]) for item in rejected] == [
        (2, "not an object"),
        (3, "no instruction"),
    ]


def test_deeply_nested_values_are_kept_aside_at_any_depth(tmp_path):
    for depth in [10, 300, 900, 990, 1000, 3000, 9000, 30_000]:
        value = "[" * depth + "]" * depth
        line = f'{{"instruction": "a", "output": {value}}}'
        train, rejected = kept(tmp_path, "rows.jsonl", f"{json.dumps(row('good'))}\n{line}\n")
        assert (train, len(rejected)) == ([row("good")], 1)


def test_a_later_run_leaves_no_rejected_rows_of_an_earlier_one(tmp_path):
    _, rejected = kept(tmp_path, "rows.jsonl", [row("a"), row("")])
    assert len(rejected) == 1
    _, rejected = kept(tmp_path, "rows.jsonl", [row("a"), row("b")])
    assert rejected == []


def test_strict_takes_a_file_without_a_fault(tmp_path):
    assert len(kept(tmp_path, "rows.jsonl", [row("a"), row("a"), row("b")], "--strict")[0]) == 2


def test_no_strict_is_the_default_said_aloud(tmp_path):
    assert len(kept(tmp_path, "rows.jsonl", [row("a"), row("")], "--no-strict")[0]) == 1


def test_the_summary_says_what_the_files_hold(tmp_path, capsys):
    rows = [row(f"question {n}", output="one two three") for n in range(10)]
    rows += [row("question 1", output="one two"), row("QUESTION 2", output="one two three")]
    rows += [row("", output="x"), row("x", output=""), row("y", output="")]
    source = write(tmp_path / "rows.jsonl", rows)
    counts, *_ = prepare(source, tmp_path / "out", "--val-split", "0.2")
    assert counts == {
        "read": 15, "rejected": 3, "duplicates": 1, "conflicts": 2, "train": 9, "val": 2,
    }  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    figures = {line.split()[0]: line for line in out}
    for name, count in counts.items():
        assert figures[name].split()[1] == str(count)
    assert "no output: 2" in figures["rejected"] and "no instruction: 1" in figures["rejected"]
    assert str(tmp_path / "out/train.jsonl") in figures["train"]
    assert "median 5" in figures["length"] and "max 5 " in figures["length"]
    assert out[-1] == f"next: python lora_finetune.py --dataset {tmp_path / 'out'}"


# ---------------------------------------------------------------- the old pair stays, or the new


@pytest.fixture
def old(tmp_path):
    """A folder that an earlier run wrote, a new source, and what stood there."""
    source = write(tmp_path / "old.jsonl", [row(f"old {n}") for n in range(20)] + [row("")])
    prepare(source, tmp_path / "out")
    source = write(tmp_path / "new.jsonl", [row(f"new {n}") for n in range(30)] + [row("")])
    return tmp_path / "out", source, snapshot(tmp_path / "out")


def fail_at(monkeypatch, function, call, error):
    """Let the given call of a function of os raise an error, and only that one."""
    real, calls = getattr(os, function), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, function, failing)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("function", ["fsync", "rename", "replace"])
def test_a_full_disk_leaves_the_old_files(old, monkeypatch, function, call):
    folder, source, before = old
    fail_at(monkeypatch, function, call, FULL)
    with pytest.raises(SystemExit, match="^error: .*No space left on device"):
        prepare(source, folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("function", ["fsync", "rename", "replace"])
def test_an_interrupted_run_leaves_the_old_files(old, monkeypatch, function, call):
    folder, source, before = old
    fail_at(monkeypatch, function, call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare(source, folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_a_new_folder_empty(tmp_path, monkeypatch, function, call):
    source = write(tmp_path / "rows.jsonl", [row("a"), row("b")])
    fail_at(monkeypatch, function, call, FULL)
    with pytest.raises(SystemExit, match="^error: .*No space left on device"):
        prepare(source, tmp_path / "out")
    assert snapshot(tmp_path / "out") == {}


def test_a_folder_in_the_place_of_val_leaves_the_old_train_file(tmp_path):
    folder = tmp_path / "out"
    (folder / "val.jsonl").mkdir(parents=True)
    write(folder / "train.jsonl", [row("old")])
    before = snapshot(folder)
    source = write(tmp_path / "new.jsonl", [row(f"new {n}") for n in range(30)])
    with pytest.raises(SystemExit, match="^error: "):
        prepare_dataset.main(["--input", source, "--output", str(folder)])
    assert snapshot(folder) == before


def test_a_file_that_may_not_grow_leaves_the_old_files(old):
    folder, _, before = old
    source = write(folder.parent / "big.jsonl", [row(f"q {n}", "x" * 99) for n in range(900)])
    command = 'ulimit -f 8; exec "$@"'
    script = [sys.executable, ROOT / "prepare_dataset.py", "--input", source, "--output", folder]
    ended = subprocess.run(
        ["bash", "-c", command, "-", *script], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert re.fullmatch("error: .*File too large.*\n", ended.stderr)
    assert snapshot(folder) == before


def test_a_read_only_folder_leaves_the_old_files(old):
    folder, source, before = old
    folder.chmod(0o555)
    try:
        with pytest.raises(SystemExit, match="^error: .*Permission denied"):
            without_privileges(lambda: prepare(source, folder))
    finally:
        folder.chmod(0o755)
    assert snapshot(folder) == before


def test_a_run_that_was_killed_leaves_the_old_pair_and_the_next_run_cleans_up(old):
    folder, source, before = old
    killed = (
        "import os, sys; os.fsync = lambda file: os._exit(9); import prepare_dataset; "
        "prepare_dataset.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", killed, "--input", source, "--output", str(folder)]
    assert subprocess.run(command, check=False, cwd=ROOT, capture_output=True).returncode == 9
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before
    prepare(source, folder)
    assert snapshot(folder).keys() == before.keys()


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("function", ["rename", "replace"])
def test_a_run_killed_between_two_moves_leaves_no_train_file_beside_another_val_file(
    old, function, call
):
    folder, source, before = old
    prepare(source, folder.parent / "wanted")
    wanted = snapshot(folder.parent / "wanted")
    killed = (
        f"import itertools, os, sys; real, calls = os.{function}, itertools.count(1)\n"
        f"os.{function} = lambda *args: os._exit(9) if next(calls) == {call} else real(*args)\n"
        "import prepare_dataset; prepare_dataset.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", killed, "--input", source, "--output", str(folder)]
    assert subprocess.run(command, check=False, cwd=ROOT, capture_output=True).returncode == 9
    pair = [(folder / name).read_bytes() for name in ("train.jsonl", "val.jsonl")
            if (folder / "train.jsonl").exists()]  # fmt: skip
    assert pair in [[files["train.jsonl"], files["val.jsonl"]] for files in (before, wanted)] + [[]]
    prepare(source, folder)
    assert snapshot(folder) == wanted


def test_the_source_may_stand_in_the_output_folder(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row("a"), row("b")])
    raw = Path(source).read_bytes()
    prepare(source, tmp_path)
    assert Path(source).read_bytes() == raw


def test_missing_parents_of_the_output_folder_are_made(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row("a"), row("b")])
    assert prepare(source, tmp_path / "a/b/c")[0]["train"] == 1


def test_other_files_in_the_folder_stay(old):
    folder, source, _ = old
    write(folder / "notes.txt", "mine")
    write(folder / ".hidden", "mine too")
    prepare(source, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / ".hidden").read_text() == "mine too"


# --------------------------------------------------------------------------------- user's mistakes

GOOD = "instruction,input,output\na,,x\nb,,y\n"
ZIPPED = gzip.compress(os.urandom(20_000))


def spoiled(raw):
    return raw[:5000] + bytes(255 - byte for byte in raw[5000:5100]) + raw[5100:]


# what stands in the file, its name, flags, what the message must name
MISTAKES = {
    "no such file": (None, "rows.csv", [], "rows.csv.*no such file"),
    "a folder": ("folder", "rows.csv", [], "rows.csv.*no such file"),
    "a spreadsheet": (b"PK\3\4", "rows.xlsx", [], r"rows.xlsx.*\.csv"),
    "no suffix": (GOOD, "rows", [], r"rows.*\.csv"),
    "an empty csv": ("", "rows.csv", [], "rows.csv.*first line"),
    "an empty json": ("", "rows.json", [], "rows.json.*not valid JSON"),
    "an empty jsonl": ("", "rows.jsonl", [], "rows.jsonl.*no usable row"),
    "an empty gzip": (gzip.compress(b""), "rows.csv.gz", [], "rows.csv.gz.*first line"),
    "a header alone": ("instruction,output\n", "rows.csv", [], "rows.csv.*no usable row"),
    "a blank first line": ("\n" + GOOD, "rows.csv", [], "first line"),
    "other columns": ("question,answer\na,x\n", "rows.csv", [], "question,answer.*--columns"),
    "one endless line": ("x" * 200_000, "rows.csv", [], "first line.*--columns"),
    "no header": ("a,,x\nb,,y\n", "rows.csv", [], "first line.*--columns"),
    "a column is missing": ("instruction,input\na,x\n", "rows.csv", [], "output.*--columns"),
    "a column twice": ("instruction,output,Output\na,x,y\n", "rows.csv", [], "two columns.*output"),
    "another delimiter": (GOOD, "rows.csv", ["--delimiter", ";"], "no columns"),
    "a quote never closed": (GOOD + 'c,,"z\nd,,w\n', "rows.csv", [], "row 4.*quote"),
    "binary": (bytes(range(256)) * 9, "rows.csv", [], "rows.csv.*--encoding"),
    "latin text": ("instruction,output\né,x".encode("latin-1"), "rows.csv", [], "--encoding"),
    "latin json": ('[{"instruction": "é"}]'.encode("latin-1"), "rows.json", [], "--encoding"),
    "not utf-16": (GOOD + "z", "rows.csv", ["--encoding", "utf-16"], "rows.csv"),
    "broken json": ('[\n{"instruction": "a",\n}]', "rows.json", [], "rows.json.*line [23]"),
    "json lines in a json": ('{"a": 1}\n{"a": 2}\n', "rows.json", [], "line 2"),
    "a json object": ('{"data": []}', "rows.json", [], "list of objects"),
    "a json number": ("7", "rows.json", [], "list of objects"),
    "an empty list": ("[]", "rows.json", [], "no usable row"),
    "other keys": ('[{"q": "a", "a": "x"}]', "rows.json", [], "no instruction: 1.*--columns"),
    "a csv in a json": (GOOD, "rows.json", [], "line 1.*not valid JSON"),
    "a csv in a jsonl": (GOOD, "rows.jsonl", [], "not valid JSON: 3"),
    "a bottomless json": ("[" * 200_000, "rows.json", [], "rows.json"),
    "a gzip cut short": (ZIPPED[:9000], "rows.csv.gz", [], "rows.csv.gz"),
    "a gzip gone bad": (
        spoiled(gzip.compress(GOOD.encode() + random.Random(0).randbytes(9000).hex().encode())),
        "rows.csv.gz",
        [],
        "rows.csv.gz",
    ),
    "no usable row": ("instruction,output\na,\n,x\n", "rows.csv", [], "no output: 1.*"),
    "strict and a bad row": (GOOD + "c,,\n", "rows.csv", ["--strict"], "row 4.*--strict"),
    "split of one": (GOOD, "rows.csv", ["--val-split", "1"], "--val-split 1"),
    "split below nought": (GOOD, "rows.csv", ["--val-split", "-0.1"], "--val-split -0.1"),
    "split of nan": (GOOD, "rows.csv", ["--val-split", "nan"], "--val-split nan"),
    "split of infinity": (GOOD, "rows.csv", ["--val-split", "inf"], "--val-split inf"),
    "split of a word": (GOOD, "rows.csv", ["--val-split", "ten"], "--val-split.*ten"),
    "a broken seed": (GOOD, "rows.csv", ["--seed", "1.5"], "--seed.*1.5"),
    "a strange delimiter": (GOOD, "rows.csv", ["--delimiter", "x"], "--delimiter.*x"),
    "unknown encoding": (GOOD, "rows.csv", ["--encoding", "klingon"], "--encoding klingon"),
    "no text encoding": (GOOD, "rows.csv", ["--encoding", "hex"], "hex"),
    "a column without field": (GOOD, "rows.csv", ["--columns", "q=a"], "--columns q=a"),
    "a field without column": (GOOD, "rows.csv", ["--columns", "output="], "--columns output="),
    "columns without =": (GOOD, "rows.csv", ["--columns", "question"], "--columns question"),
    "columns with nothing": (GOOD, "rows.csv", ["--columns"], "--columns"),
    "one column for two": (GOOD, "rows.csv", ["--columns", "instruction=output"], "--columns"),
    "an unknown option": (GOOD, "rows.csv", ["--colums", "output=x"], "--colums"),
    "half an option": (GOOD, "rows.csv", ["--val", "0.2"], "--val"),
    "a stray word": (GOOD, "rows.csv", ["more.csv"], "more.csv"),
    "a name too long": (None, "x" * 300 + ".csv", [], "x.csv"),
}


def error_of(argv, capsys):
    """Run main with a mistake; return its one error line and check how it ends."""
    with pytest.raises(SystemExit) as ended:
        prepare_dataset.main(argv)
    if ended.value.code == 2:
        message = capsys.readouterr().err
        assert message.count("error:") == 1
        return message.partition("error:")[2]
    assert isinstance(ended.value.code, str) and ended.value.code.startswith("error: ")
    assert "\n" not in ended.value.code
    return ended.value.code


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(tmp_path, capsys, mistake):
    content, name, flags, named = MISTAKES[mistake]
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        write(tmp_path / name, content)
    before = snapshot(tmp_path)
    csv.field_size_limit(131_072)  # as in a fresh process
    argv = ["--input", str(tmp_path / name), "--output", str(tmp_path / "out"), *flags]
    message = error_of(argv, capsys)
    assert re.search(named, " ".join(message.split())), message
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("output", ["taken", "taken/out", "taken/deep/out", "x" * 300])
def test_an_output_that_can_not_be_a_folder_ends_in_one_line(tmp_path, capsys, output):
    source = write(tmp_path / "rows.csv", GOOD)
    write(tmp_path / "taken", "mine")
    before = snapshot(tmp_path)
    message = error_of(["--input", source, "--output", str(tmp_path / output)], capsys)
    assert output in message
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["train.jsonl", "val.jsonl", "rejected.jsonl"])
@pytest.mark.parametrize("way", ["", "./deep/..", "link"])
def test_an_input_that_would_be_overwritten_is_refused(tmp_path, capsys, name, way):
    source = write(tmp_path / name, [row("a"), row("b")])
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    before = snapshot(tmp_path)
    message = error_of(["--input", source, "--output", str(tmp_path / way)], capsys)
    assert name in message and "--output" in message
    assert snapshot(tmp_path) == before


def test_a_mistake_leaves_the_old_files(old, capsys):
    folder, _, before = old
    source = write(folder.parent / "bad.csv", GOOD + "c,,\n")
    error_of(["--input", source, "--output", str(folder), "--strict"], capsys)
    assert snapshot(folder) == before


def test_a_mistake_at_the_shell_shows_no_traceback(tmp_path):
    ended = subprocess.run(
        [sys.executable, ROOT / "prepare_dataset.py", "--input", "none.csv"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: none.csv") and ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
