"""Turn a file of questions and answers into training and validation data.

Reads   --input: a table (.csv .tsv .txt), JSON, JSON lines or parquet, also gzipped; rows or chats
Writes  --output: train.jsonl, val.jsonl, and rejected.jsonl with the rows that could not be used

  > python prepare_dataset.py --input data/raw_qa.csv --output data/prepared
    python lora_finetune.py --dataset data/prepared --output output/tinyllama-k8s-qlora
    python evaluate.py --adapter output/tinyllama-k8s-qlora --val-data data/prepared/val.jsonl
"""

import argparse
import csv
import gzip
import io
import json
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter
from hashlib import blake2b
from pathlib import Path

# ---------------------------------------------------------------------------------------------
# Edit here, or pass the flag of the same name.
# data
INPUT = "data/raw_qa.csv"  # a table, JSON, JSON lines or parquet, also gzipped
OUTPUT = "data/prepared"  # folder for train.jsonl and val.jsonl
COLUMNS = []  # names that are not in KNOWN below: ["instruction=title", "output=body"]
ENCODING = "utf-8"  # of the input; a byte order mark in the file wins
DELIMITER = "auto"  # of a table: auto, or one of , ; tab |
VAL_SPLIT = 0.1  # share of the rows held out for validation, 0 up to 1
SEED = 42  # same seed, same split
STRICT = False  # True: refuse the whole file if any row is unusable
# ---------------------------------------------------------------------------------------------

FIELDS = ["instruction", "input", "output"]
KNOWN = {  # column names that need no flag; where a row has several, the first counts
    "instruction": ["instruction", "prompt", "question", "query"],
    "input": ["input", "context"],
    "output": ["output", "completion", "response", "answer"],
    "messages": ["messages", "conversations"],  # a chat
}
DELIMITERS = {"auto": ",;\t|", ",": ",", ";": ";", "tab": "\t", "|": "|"}
MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # byte order
FILES = ["rejected.jsonl", "val.jsonl", "train.jsonl"]  # train.jsonl last: see write_files
REJECTED_LINE = '{"row": %d, "reason": "%s", "raw": %s}\n'
LINE = '{"instruction": %s, "input": %s, "output": %s}\n'  # of val.jsonl and train.jsonl
OTHER_KINDS = {  # how files begin that hold no text: what they are, and the way to a CSV
    rb"PK\x03\x04.*(xl/|word/|opendoc)|\xd0\xcf\x11\xe0": "an Excel or Word file; save it as CSV",
    rb"PK\x03\x04|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc|Rar!": "a zip or the like; unpack it first",
    rb"%PDF": "a PDF; copy its table to a spreadsheet, save that as CSV",
    rb"\x80[\x02-\x05]": "a pickle; if you trust it, pandas.read_pickle(...).to_csv(...)",
}


def parse_args(argv=None):
    if argv is None and "kernel_launcher" in sys.argv[0]:
        argv = []  # pasted into a notebook cell: sys.argv is the kernel's, the constants above decide
    parser = argparse.ArgumentParser("prepare_dataset.py", None, __doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # the docstring as it stands
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--input", default=INPUT, help=f"file to read {default}")
    add("--output", default=OUTPUT, help=f"folder to write {default}")
    add("--columns", nargs="+", default=COLUMNS, metavar="FIELD=COLUMN", help=f"renames {default}")
    add("--encoding", default=ENCODING, help=f"of the input, such as windows-1252 {default}")
    add("--delimiter", default=DELIMITER, choices=DELIMITERS, help=f"of a table {default}")
    add("--val-split", type=float, default=VAL_SPLIT, help=f"share held out, 0 up to 1 {default}")
    add("--seed", type=int, default=SEED, help=f"same seed, same split {default}")
    switch = argparse.BooleanOptionalAction
    add("--strict", action=switch, default=STRICT, help=f"refuse a file with bad rows {default}")
    args = parser.parse_args(argv)
    if not 0 <= args.val_split < 1:
        parser.error(f"--val-split {args.val_split}: must be at least 0 and below 1, e.g. 0.1")
    if wrong := [p for p in args.columns if not re.match(rf"({'|'.join(FIELDS)})=\s*\S", p)]:
        parser.error(f"--columns {wrong[0]}: not FIELD=COLUMN, FIELD one of {', '.join(FIELDS)}")
    return args


def fold(text: str) -> str:
    """Text as compared: Unicode NFC, without regard to case and white space."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def find_columns(names, known: dict) -> dict:
    """Return {field: column} as far as there is one among names; for a chat, its messages alone."""
    columns = {}
    for field, candidates in known.items():
        there = [name for name in candidates if name in names and name not in columns.values()]
        columns |= {field: there[0]} if there else {}
    chat = columns.pop("messages", None)
    return {"messages": chat} if chat and "output" not in columns else columns


def read_table(text, head: str, delimiter: str, known: dict):
    """Yield the rows of a table like read_rows; the delimiter is what finds most columns."""
    csv.field_size_limit(2**31 - 1)  # else a long cell is an error
    marks, number = DELIMITERS[delimiter], 0
    if own := re.match('"?sep=([^"\r\n])"?(\r\n|\r|\n)', head, re.IGNORECASE):  # Excel's first line
        marks, head = own[1], head[own.end() :]
        text.readline()

    def header(mark):
        cells = next(filter(any, csv.reader(io.StringIO(head, newline=""), delimiter=mark)), [])
        return [fold(cell) for cell in cells]

    try:
        mark = max(marks, key=lambda mark: len(find_columns(header(mark), known)))
        names = header(mark)
        # of columns with one name none is taken unasked: each is told by its position
        names = [
            f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)
        ]
        rows = enumerate(csv.reader(text, delimiter=mark, strict=True, skipinitialspace=True), 1)
        number = next((place for place, cells in rows if any(cells)), 0)  # of the header
        for number, cells in rows:
            if any(map(str.strip, cells[len(names) :])):
                yield number, cells, "more cells than columns"
            elif cells:  # a blank line is no row
                yield number, dict(zip(names, cells)), ""
    except csv.Error as error:  # where the next row begins can't be known
        cause = f"row {number + 1}: broken quotes, {error}"
        raise ValueError(f'{cause}; inside a quoted cell a quote is written twice, ""') from None


def by_name(pairs: list):
    """Return a JSON object by folded names, or its pairs where two names are alike: no row then."""
    row = {fold(name): value for name, value in pairs}
    return row if len(row) == len(pairs) else tuple(pairs)


AS_WRITTEN = {"parse_float": str, "parse_int": str, "parse_constant": lambda name: None}
DECODER = json.JSONDecoder(object_pairs_hook=by_name, **AS_WRITTEN)  # 1e5 is "1e5"; NaN is None


def read_json(text, head: str, known: dict):
    """Yield the rows of JSON like read_rows: objects, a list, or a wrapper with one list in it."""
    first = head.strip().partition("\n")[0].strip()
    one_a_line = first.startswith("{") and (first.endswith("},") or first[-1] not in "{[:,")
    # else over many lines: inside a value no } is followed by a { on a new line
    pieces = text if one_a_line else re.split(r"(?<=\})\s*\n\s*(?=\{)", text.read())
    for number, piece in enumerate(pieces, 1):
        try:
            value = DECODER.decode(piece.rstrip())
        except (json.JSONDecodeError, RecursionError) as error:
            if piece.strip():  # not a blank line
                yield number + getattr(error, "lineno", 1) - 1, piece.strip(), "not valid JSON"
            continue
        if number == 1 and isinstance(value, dict) and not find_columns(value, known):
            lists = [items for items in value.values() if isinstance(items, list)]
            value = lists[0] if len(lists) == 1 and lists[0] else value
        whole = number == 1 and isinstance(value, list)
        for place, row in enumerate(value, 1) if whole else [(number, value)]:
            yield place, row, "" if isinstance(row, dict) else "not an object with each name once"


def read_parquet(file):
    """Yield the rows of a parquet file like read_rows, by way of JSON: values become text alike."""
    import pyarrow.parquet  # here, because no other form needs it

    def plain(value):  # dates and the like; bytes that are no text end as lone surrogates
        return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)

    batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
    for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
        yield number, DECODER.decode(json.dumps(row, default=plain)), ""


def read_rows(path: Path, encoding: str, delimiter: str, known: dict):
    """Yield (row number, raw row {folded name: value}, what is wrong with its form or "")."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rb") as file:
        start = file.read(2**16)
        file.seek(0)
        for pattern, kind in OTHER_KINDS.items():
            if re.match(pattern, start, re.DOTALL):
                raise ValueError(f"this is {kind}")
        encoding = next((MARKS[mark] for mark in MARKS if start.startswith(mark)), encoding)
        text, head = io.TextIOWrapper(file, encoding, newline=""), start.decode(encoding, "ignore")
        if start.startswith(b"PAR1"):
            yield from read_parquet(file)
        elif head.lstrip().startswith(("{", "[")):
            yield from read_json(text, head, known)
        else:
            yield from read_table(text, head, delimiter, known)


def to_exchange(messages):
    """Return the values of FIELDS in a chat with one exchange, or why (a str) there are none."""
    try:
        roles = [(turn.get("role") or turn.get("from")).casefold() for turn in messages]
        texts = [(turn.get("content") or turn.get("value") or "").strip() for turn in messages]
    except (AttributeError, TypeError):
        return "messages are not texts with roles"
    spoken = " ".join(roles)
    if re.fullmatch("((system|developer) )*(user|human) (assistant|gpt)", spoken):
        *system, question, answer = texts
        return question and "\n\n".join(filter(None, [*system, question])), "", answer
    if re.match("((system|developer) )*(assistant|gpt)", spoken):
        return "the assistant speaks first"
    return "more than one exchange" if len(re.findall("user|human", spoken)) > 1 else "no exchange"


def to_record(raw: dict, columns: dict):
    """Return the texts of FIELDS of a raw row as a tuple, or why (a str) there are none."""
    values = [raw.get(columns.get(field)) for field in FIELDS]
    if "messages" in columns:
        values = to_exchange(raw[columns["messages"]])
    if isinstance(values, str):
        return values
    record = []
    for field, value in zip(FIELDS, values):
        value = json.dumps(value) if isinstance(value, bool) else value or ""
        if not isinstance(value, str):
            return f"{field} is not text"
        if "\0" in value or not value.isascii() and value.encode(errors="ignore").decode() != value:
            return f"{field} has a NUL character or a lone surrogate"
        record.append(value.strip())
    instruction, input, output = record if record[0] else (record[1], "", record[2])
    missing = "output" if instruction else "instruction"
    return (instruction, input, output) if instruction and output else f"no {missing}"


def read_records(rows, known: dict):
    """Return a frame of records, (row, reason, raw) of the rest, {names: columns} of all rows."""
    import pandas as pd  # here, because --help must answer at once

    records, rejected, columns = [], [], {}
    for number, raw, reason in rows:
        names = () if reason else tuple(raw)
        if names not in columns:
            columns[names] = find_columns(names, known)
        record = reason or to_record(raw, columns[names])
        if isinstance(record, str):
            rejected.append((number, record, json.dumps(raw)))
        else:
            records.append(record)
    return pd.DataFrame(records, columns=FIELDS, dtype=object), rejected, columns


def drop_repeats(frame):
    """Return the rows that do not repeat an earlier one, each with its question's key (bytes)."""
    pairs = zip(frame["instruction"], frame["input"])
    texts = ("\0".join(map(fold, pair)).encode() for pair in pairs)
    frame = frame.assign(question=[blake2b(text, digest_size=16).digest() for text in texts])
    again = frame[frame.duplicated("question", keep=False)]  # only their answers are compared
    repeats = again.assign(output=again["output"].map(fold)).duplicated(["question", "output"])
    return frame.drop(again.index[repeats])


def split_rows(questions, share: float, seed: int):
    """Hold out whole questions in the order of a seeded hash: more rows then move few old ones."""
    groups, salt = Counter(questions), b"%d:" % seed
    ranked = sorted(groups, key=lambda key: blake2b(salt + key, digest_size=8).digest())
    held_out, room = set(), round(len(questions) * share)
    for key in ranked[:-1]:
        if groups[key] <= room:
            held_out.add(key)
            room -= groups[key]
    if share and not held_out and len(ranked) > 1:
        held_out.add(min(ranked, key=groups.get))
    return questions.map(lambda key: key in held_out)


def write_files(folder: Path, files: dict):
    """Write {name: lines}: all aside; then the old train.jsonl goes first, the new comes last."""
    aside = {folder / name: folder / f".{name}.new" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, new in aside.items():
            with open(new, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(files[path.name])
        for path in reversed(aside):
            path.unlink(missing_ok=True)
        for path, new in aside.items():
            os.replace(new, path)
    except OSError as error:
        sys.exit(f"error: can't write {folder}: {error.strerror}; make room, or choose an --output")
    finally:
        for new in filter(os.path.isfile, aside.values()):
            new.unlink()


def check(frame, rejected: list, names: list, args) -> str:
    """Return the reasons for rejection; ValueError where too little of the file can be used."""
    reasons, total = Counter(reason for _, reason, _ in rejected), len(frame) + len(rejected)
    lost = {fold(pair.partition("=")[2]) for pair in args.columns} - {*names}
    if lost or frame.empty or 2 * reasons["not valid JSON"] > total or args.strict and rejected:
        cause = f"no column {', '.join(lost)}" if lost else "no rows in it"
        if rejected and not lost:
            row, reason, raw = rejected[0]
            cause = f"{len(rejected)} of {total} rows unusable: row/line {row}: {reason}: {raw:.80}"
        raise ValueError(f"{cause}; found {str(names)[:300]}; try --columns instruction=A output=B")
    return ", ".join(f"{reason}: {n:,}" for reason, n in reasons.most_common()) or "none"


def main(argv=None):
    args = parse_args(argv)
    source, folder = Path(args.input), Path(args.output)
    if not (os.path.isfile(source) and os.path.getsize(source)):
        sys.exit(f"error: {source}: no such file, or no rows in it; --input takes one file of rows")
    if source.resolve() in [(folder / name).resolve() for name in FILES]:
        sys.exit(f"error: {source} would be overwritten; choose another --output")
    asked = {pair.partition("=")[0]: [fold(pair.partition("=")[2])] for pair in args.columns}
    known = KNOWN | asked
    try:
        rows = read_rows(source, args.encoding, args.delimiter, known)
        frame, rejected, columns = read_records(rows, known)
        names = list(dict.fromkeys(name for names in columns for name in names))
        reasons = check(frame, rejected, names, args)
    except UnicodeError:
        sys.exit(f"error: {source}: not {args.encoding} text; try --encoding windows-1252, utf-16")
    except (OSError, EOFError, ValueError, LookupError, ImportError, zlib.error) as error:
        sys.exit(f"error: {source}: {' '.join(str(error).split())}")
    kept = drop_repeats(frame)
    held_out = split_rows(kept["question"], args.val_split, args.seed)
    train, val = kept[~held_out], kept[held_out]
    quoted = json.encoder.encode_basestring  # a JSON string, as ensure_ascii=False writes it
    sides = [zip(*(map(quoted, side[field]) for field in FIELDS)) for side in (val, train)]
    texts = [map(REJECTED_LINE.__mod__, rejected), *(map(LINE.__mod__, side) for side in sides)]
    write_files(folder, dict(zip(FILES, texts)))
    conflicts = sum(kept.duplicated("question", keep=False))
    alone = " (all rows ask the same question)" if args.val_split and val.empty else ""
    report = {
        "read": (len(frame) + len(rejected), f"<- {source}"),
        "rejected": (len(rejected), f"-> {folder / FILES[0]} ({reasons})"),
        "duplicates": (len(frame) - len(kept), "of another row, left out"),
        "conflicts": (conflicts, "ask the same and answer differently"),
        "train": (len(train), f"-> {folder / FILES[2]}"),
        "val": (len(val), f"-> {folder / FILES[1]}{alone}"),
    }
    for name, (count, note) in report.items():
        print(f"{name:<10} {count:>9,} rows {note}")
    taken = {name: field for fields in columns.values() for field, name in fields.items()}
    print(f"columns    {taken}; not used: {str([n for n in names if n not in taken])[:160]}")
    some = kept[:: len(kept) // 100_000 + 1]  # of a large file not every row is measured
    words = sum(some[field].map(lambda text: len(text.split())) for field in FIELDS)
    sizes = *words.quantile([0.5, 0.95, 1], interpolation="higher"), len(some)
    print("length     median {:,}, p95 {:,}, max {:,} words, of {:,} rows".format(*sizes))
    print(f"next: python lora_finetune.py --dataset {folder}")
    return {name: count for name, (count, _) in report.items()}


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit("error: interrupted; run it again")
