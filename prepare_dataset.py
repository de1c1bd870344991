"""Turn a CSV or JSON file of questions and answers into training and validation data.

Reads   --input: .csv .tsv .json .jsonl (also .gz), columns instruction, input (optional), output
Writes  --output: train.jsonl, val.jsonl, and rejected.jsonl with the rows that could not be used

  > python prepare_dataset.py --input data/raw_qa.csv --output data/prepared
    python lora_finetune.py --dataset data/prepared --output output/tinyllama-k8s-qlora
    python evaluate.py --adapter output/tinyllama-k8s-qlora --val-data data/prepared/val.jsonl
"""

import argparse
import codecs
import contextlib
import csv
import gzip
import itertools
import json
import os
import sys
import unicodedata
import zlib
from collections import Counter
from hashlib import blake2b
from pathlib import Path

from tqdm.auto import tqdm

# ---------------------------------------------------------------------------------------------
# Edit here, or pass the flag of the same name.
# data
INPUT = "data/raw_qa.csv"  # .csv .tsv .json .jsonl, also gzipped
OUTPUT = "data/prepared"  # folder for train.jsonl and val.jsonl
COLUMNS = []  # renames, field=column: ["instruction=question", "output=answer"]
ENCODING = "utf-8"  # of the input; a byte order mark in the file wins
DELIMITER = "auto"  # of a CSV: auto, or one of , ; tab |
# split
VAL_SPLIT = 0.1  # share of the rows held out for validation, 0 up to 1
SEED = 42  # same seed, same split
STRICT = False  # True: refuse the whole file if any row is unusable
# ---------------------------------------------------------------------------------------------

FIELDS = ("instruction", "input", "output")
LINE = '{"instruction": %s, "input": %s, "output": %s}\n'  # of train.jsonl and val.jsonl
NAMES = ("rejected.jsonl", "val.jsonl", "train.jsonl")  # train.jsonl last: see write_files
DELIMITERS = {",": ",", ";": ";", "tab": "\t", "|": "|"}
BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def parse_args(argv=None):
    if argv is None and "kernel_launcher" in sys.argv[0]:
        argv = []  # pasted into a notebook cell: sys.argv is the kernel's, the constants above decide

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """The docstring as it stands, each option with its default."""

    shown = {"usage": "%(prog)s [options]", "description": __doc__, "formatter_class": Help}
    parser = argparse.ArgumentParser("prepare_dataset.py", allow_abbrev=False, **shown)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--input", default=INPUT, help="file to read")
    add("--output", default=OUTPUT, help="folder to write")
    names = "other column names, such as instruction=question output=answer"
    add("--columns", nargs="+", default=COLUMNS, metavar="FIELD=COLUMN", help=names)
    add("--encoding", default=ENCODING, help="of the input, such as windows-1252")
    marks = ["auto", *DELIMITERS]
    add("--delimiter", default=DELIMITER, choices=marks, metavar="MARK", help="auto , ; tab or |")
    add = parser.add_argument_group("split").add_argument
    add("--val-split", type=float, default=VAL_SPLIT, help="share of rows held out, 0 up to 1")
    add("--seed", type=int, default=SEED, help="same seed, same split")
    add("--strict", action=switch, default=STRICT, help="refuse a file with any unusable row")
    args = parser.parse_args(argv)
    if not 0 <= args.val_split < 1:
        parser.error(f"--val-split {args.val_split}: must be at least 0 and below 1, e.g. 0.1")
    for pair in args.columns:
        field, _, column = pair.partition("=")
        if field not in FIELDS or not column.strip():
            parser.error(f"--columns {pair}: not FIELD=COLUMN, FIELD one of {', '.join(FIELDS)}")
    try:
        codecs.lookup(args.encoding)
    except LookupError:
        parser.error(f"--encoding {args.encoding}: unknown; try utf-8, utf-16 or windows-1252")
    return args


def open_text(path, encoding):
    """Open a text file, gzipped or not, in the encoding of its byte order mark, else `encoding`."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rb") as file:
        start = file.read(4)
    marked = [name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)]
    return opener(path, "rt", encoding=marked[0] if marked else encoding, newline="")


def collect(pairs):
    """Return a dict of (key, value) pairs; the values of a key that comes twice go into a list."""
    found = {}
    for key, value in pairs:
        found[key] = [found[key], value] if key in found else value
    return found


def read_rows(text, kind, columns, delimiter):
    """Yield (row number, raw row, what is wrong with its form or "") for each row of an open file.

    A raw row is {folded column name: value} where its form is right. Row numbers are what a
    spreadsheet shows for a CSV (its header is row 1), else the line or the position in the list.
    Raises ValueError where the file as a whole can't be read.
    """
    if kind in ("csv", "tsv"):
        yield from read_csv(text, columns, delimiter)
        return
    # numbers stay as they are written: 1e5 comes out as "1e5", not as 100000.0
    as_written = dict(parse_float=str, parse_int=str, parse_constant=str)
    decoder = json.JSONDecoder(object_pairs_hook=collect, **as_written)
    if kind == "jsonl":
        items = ((number, line) for number, line in enumerate(text, 1) if line.strip())
    else:
        try:
            rows = decoder.decode(text.read())
        except json.JSONDecodeError as error:
            raise ValueError(f"line {error.lineno}: not valid JSON ({error.msg})") from None
        if not isinstance(rows, list):
            raise ValueError('must be a list of objects, [{"instruction": ...}, ...]')
        items = enumerate(rows, 1)
    for number, item in items:
        reason = "not an object"
        if kind == "jsonl":
            try:
                item = decoder.decode(item.strip())
            except (json.JSONDecodeError, RecursionError):
                reason = "not valid JSON"
        if isinstance(item, dict):
            item, reason = collect((k.strip().casefold(), value) for k, value in item.items()), ""
        yield number, item, reason


def read_csv(text, columns, delimiter):
    """Yield the rows of a CSV like read_rows; the delimiter is the one that finds the columns."""
    csv.field_size_limit(2**31 - 1)  # else a long cell is an error
    first = text.readline()
    if not first.strip():
        raise ValueError("the first line is empty; it must name the columns")
    for mark in [DELIMITERS[delimiter]] if delimiter != "auto" else ",;\t|":
        names = [name.strip().casefold() for name in next(csv.reader([first], delimiter=mark))]
        if {"instruction", "output"} <= set(map(columns.get, names)):
            break
    else:
        wanted = " and ".join(f'"{name}"' for name, field in columns.items() if field != "input")
        found = f"no columns {wanted} in the first line {first.strip()[:80]!r}"
        raise ValueError(f"{found}; name yours, --columns instruction=... output=...")
    for name, field in columns.items():
        if names.count(name) > 1:
            raise ValueError(f"two columns stand for {field}; rename one in the file")
    reader = csv.reader(itertools.chain([first], text), delimiter=mark, strict=True)
    for number in itertools.count(1):
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "end of data" in str(error):
                raise ValueError(f"row {number}: a quote is never closed; close it") from None
            yield number, None, "broken quotes"
            continue
        if cells is None:
            return
        if len(cells) > len(names):
            yield number, cells, "too many fields"
        elif cells and number > 1:  # an empty list is a blank line, row 1 the header
            yield number, dict(zip(names, cells)), ""


def clean_record(raw, columns):
    """Return the record of a raw row, or why (a str) there is none; columns: {name: field}."""
    record = {}
    for name, field in columns.items():
        value = raw.get(name)
        if value is None:
            value = ""
        elif isinstance(value, bool):
            value = "true" if value else "false"
        elif not isinstance(value, str):
            return f"{field} is not text"
        if "\0" in value:
            return f"{field} has a NUL character"
        if not value.isascii() and value.encode(errors="ignore").decode() != value:
            return f"{field} has a lone surrogate"
        record[field] = value.strip()
    missing = [field for field in ("instruction", "output") if not record[field]]
    return f"no {missing[0]}" if missing else record


def fold(text):
    """Text as compared: Unicode NFC, without regard to case and white space."""
    text = unicodedata.normalize("NFC", text).casefold()
    if text.isprintable() and "  " not in text:
        return text.strip()  # most text: single blanks are its only white space, nothing to split
    return " ".join(text.split())


def split_rows(keys, share, seed):
    """Choose the validation rows: for each row's question key (bytes), True where it is held out.

    Rows with one key stay together. Keys are ranked by a seeded hash, so adding rows moves few
    others, and taken in that order where they fit into round(rows x share). With two keys or more
    and a share above 0, each side has at least one.
    """
    groups, salt = Counter(keys), b"%d:" % seed
    ranked = sorted(groups, key=lambda key: blake2b(salt + key, digest_size=8).digest())
    room = round(len(keys) * share)
    held_out = set()
    for key in ranked[:-1]:
        if groups[key] <= room:
            held_out.add(key)
            room -= groups[key]
    if share and not held_out and len(ranked) > 1:
        held_out.add(min(ranked, key=groups.get))
    return [key in held_out for key in keys]


def write_files(folder, files):
    """Write {name: lines as bytes} into folder, all or none; train.jsonl is the last of them.

    The new files are written aside, the old ones moved aside, the new ones moved into place; a
    failure or Ctrl-C brings the old ones back. A kill between two moves leaves no train.jsonl,
    which goes first and comes last: no training on new rows beside old ones.
    """
    new = {folder / name: folder / f".{name}.{os.getpid()}" for name in files}
    old = {path: new[path].with_suffix(".old") for path in new if os.path.isfile(path)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [path for name in files for path in folder.glob(f".{name}.*")]:
            leftover.unlink()  # of a run that was killed
        with contextlib.ExitStack() as undo:  # what was done is undone, last first, if a step fails
            for path, aside in new.items():
                undo.callback(aside.unlink, missing_ok=True)
                with open(aside, "wb", buffering=2**20) as file:
                    file.writelines(files[path.name])
                    file.flush()
                    os.fsync(file.fileno())
            for path, aside in reversed(old.items()):
                os.rename(path, aside)
                undo.callback(os.replace, aside, path)
            for path, aside in new.items():
                os.replace(aside, path)
                undo.callback(path.unlink)
            undo.pop_all()
    except OSError as error:
        sys.exit(f"error: can't write {folder}: {error.strerror}; what stood there is unchanged")
    for aside in old.values():
        with contextlib.suppress(OSError):
            aside.unlink()


def main(argv=None):
    args = parse_args(argv)
    source, folder = Path(args.input), Path(args.output)
    kind = source.name.lower().removesuffix(".gz").rpartition(".")[2]
    if not os.path.isfile(source):
        sys.exit(f"error: {source}: no such file; --input takes a .csv, .tsv, .json or .jsonl file")
    if kind not in ("csv", "tsv", "json", "jsonl"):
        sys.exit(f"error: {source}: unknown kind; its name must end in .csv, .tsv, .json or .jsonl")
    if os.path.exists(folder) and not folder.is_dir():
        sys.exit(f"error: {folder} is a file; --output takes a folder")
    if source.resolve() in [(folder / name).resolve() for name in NAMES]:
        sys.exit(f"error: {source} would be overwritten; choose another --output")

    names = {field: field for field in FIELDS} | dict(pair.split("=", 1) for pair in args.columns)
    columns = {name.strip().casefold(): field for field, name in names.items()}
    if len(columns) < len(FIELDS):
        sys.exit("error: --columns: one column stands for two fields; name another")
    lines, keys, lengths, rejected, known, seen = [], [], [], [], set(), set()
    as_json = json.encoder.encode_basestring  # a JSON string, as ensure_ascii=False writes it
    read = 0
    try:
        with open_text(source, args.encoding) as text:
            rows = read_rows(text, kind, columns, args.delimiter)
            shown = tqdm(rows, "reading", unit=" rows", disable=None, leave=False, delay=2)
            for number, raw, reason in shown:
                read += 1
                seen.update(() if reason else raw)
                record = reason or clean_record(raw, columns)
                if isinstance(record, str):
                    rejected.append({"row": number, "reason": record, "raw": raw})
                    continue
                question = fold(record["instruction"]) + "\0" + fold(record["input"])
                answer = fold(record["output"])
                key = blake2b(question.encode(), digest_size=16).digest()  # alike by chance: 1e-27
                both = key, hash(answer)  # 64 bits do among the answers to one question
                if both in known:
                    continue
                known.add(both)
                keys.append(key)
                lengths.append(question.count(" ") + answer.count(" ") + 2)
                lines.append((LINE % tuple(map(as_json, record.values()))).encode())
    except UnicodeError:
        sys.exit(f"error: {source}: not {args.encoding} text; try --encoding windows-1252, utf-16")
    except (OSError, EOFError, ValueError, LookupError, RecursionError, zlib.error) as error:
        sys.exit(f"error: {source}: {error}")

    reasons = Counter(row["reason"] for row in rejected)
    complaint = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())
    if rejected and args.strict:
        first = rejected[0]["row"]
        sys.exit(f"error: {source}: {complaint}, first in row {first}; mend them or drop --strict")
    if not lines:
        cause = complaint or "it is empty"
        sys.exit(f"error: {source}: no usable row ({cause}); name your columns with --columns")

    held_out = split_rows(keys, args.val_split, args.seed)
    files = {
        "rejected.jsonl": [json.dumps(row).encode() + b"\n" for row in rejected],
        "val.jsonl": [line for line, val in zip(lines, held_out) if val],
        "train.jsonl": [line for line, val in zip(lines, held_out) if not val],
    }
    write_files(folder, files)
    lengths.sort()
    conflicts = sum(count for count in Counter(keys).values() if count > 1)
    report = {
        "read": (read, f"<- {source}"),
        "rejected": (len(rejected), f"-> {folder / 'rejected.jsonl'} ({complaint or 'none'})"),
        "duplicates": (read - len(rejected) - len(lines), "of another row, left out"),
        "conflicts": (conflicts, "ask the same and answer differently"),
        "train": (len(files["train.jsonl"]), f"-> {folder / 'train.jsonl'}"),
        "val": (len(files["val.jsonl"]), f"-> {folder / 'val.jsonl'}"),
    }
    for name, (count, note) in report.items():
        print(f"{name:<10} {count:>9,} rows {note}")
    if unused := seen - columns.keys():
        print(f"columns    not used: {repr(sorted(unused))[1:160].rstrip(']')}; see --columns")
    median, p95 = lengths[len(lengths) // 2], lengths[len(lengths) * 95 // 100]
    print(f"length     median {median:,}, p95 {p95:,}, max {lengths[-1]:,} words a row")
    print(f"next: python lora_finetune.py --dataset {folder}")
    return {name: count for name, (count, _) in report.items()}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing was written")
    except BrokenPipeError:  # the reader, such as head, has left; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
