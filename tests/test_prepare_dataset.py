"""prepare_dataset.py: what goes in comes out, on the right side, or is named and kept aside."""

import ast
import csv
import gzip
import io
import json
import pickle
import random
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import filelock
import pyarrow
import pyarrow.parquet
import pytest
from conftest import largest_file, without_privileges
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_dataset

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ["instruction", "input", "output"]
quick = settings(max_examples=80, deadline=None, database=None)


def row(instruction, input="", output="an answer"):
    return {"instruction": instruction, "input": input, "output": output}


def jsonl(items):
    return "".join(json.dumps(item) + "\n" for item in items)


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def chat(*turns):
    return {"messages": [{"role": speaker, "content": text} for speaker, text in turns]}


def parquet(**columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def cells(names, rows):
    """A CSV; what is no text stands in it as Python writes it."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([names, *rows])
    return text.getvalue()


def write(path, content):
    """Write text (utf-8, line ends as they stand), bytes, or a list of items as JSON lines."""
    content = jsonl(content) if isinstance(content, list) else content
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(path):
    text = Path(path).read_bytes().decode()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def prepare(source, folder, *flags):
    """Run main; return (counts, train, val, rejected) as they stand in the files."""
    counts = prepare_dataset.main(["--input", str(source), "--output", str(folder), *flags])
    files = [lines(Path(folder) / f"{name}.jsonl") for name in ("train", "val", "rejected")]
    assert [counts[name] for name in ("train", "val", "rejected")] == [len(rows) for rows in files]
    assert counts["read"] == counts["duplicates"] + sum(len(rows) for rows in files)
    return counts, *files


def kept(folder, content, *flags, name="rows"):
    """The records that come out of a file, all in train.jsonl, and the rejected rows."""
    source = write(folder / name, content)
    _, train, val, rejected = prepare(source, folder / "out", "--val-split", "0", *flags)
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


def trimmed(text):
    """Text as it is written: outer blanks go, but not the indentation of several lines."""
    while "\n" in text and not text.partition("\n")[0].strip():
        text = text.partition("\n")[2]
    return text.rstrip() if "\n" in text.strip() else text.strip()


def usable(records):
    """Usable records, stripped, each once, in order; and the number of unusable ones."""
    found, seen, unusable = [], set(), 0
    for record in records:
        record = {field: trimmed(record[field]) for field in FIELDS}
        if not record["instruction"]:
            record["instruction"], record["input"] = record["input"], ""
        if not record["instruction"] or not record["output"] or "\0" in "".join(record.values()):
            unusable += 1
            continue
        key = tuple(unicodedata.normalize("NFC", text).strip() for text in record.values())
        found += [] if key in seen else [record]
        seen.add(key)
    return found, unusable


# a text with markers, and what it asks and answers
TEXTS_OF_CHATS = {
    "guanaco": "### Human: a?### Assistant: x ",
    "guanaco, a break": "### Human:\na?\n\n### Assistant:\nx\n",
    "Alpaca": "Below is an instruction.\n\n### Instruction:\na?\n\n### Response:\nx</s>",
    "Alpaca without a colon": "### Instruction\na?\n### Response\nx",
    "question, answer": "### Question: a?\n### Answer: x",
    "ChatML": "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n",
    "Mistral": "<s>[INST] a? [/INST] x</s>",
    "Gemma": "<bos><start_of_turn>user\na?<end_of_turn>\n<start_of_turn>model\nx<end_of_turn>\n",
    "OpenAssistant": "<|prompter|>a?<|endoftext|><|assistant|>x<|endoftext|>",
    "Zephyr": "<|user|>\na?</s>\n<|assistant|>\nx</s>\n",
    "Phi": "<|user|>\na?<|end|>\n<|assistant|>\nx<|end|>",
    "Vicuna": "USER: a? ASSISTANT: x</s>",
    "Human, Assistant": "\n\nHuman: a?\n\nAssistant: x",
}

# --------------------------------------------------------------- what goes in comes out, whatever

awkward = ",;\t|\"\n\r \\'={}[]:\x00\x0b\x1c\x85\xa0\u2028\ufeffaAéßİ한😀e\u0301"
anything = st.one_of(st.sampled_from(awkward), st.characters(exclude_categories=["Cs"]))
short = st.sampled_from(["a", "A ", "b", "é", "e\u0301", "what?", "What ?", "", " "])
text = st.one_of(st.text(anything, max_size=12), short)
records = st.lists(st.fixed_dictionaries(dict.fromkeys(FIELDS, text)), max_size=12)
packed = st.sampled_from(
    [
        str.encode,
        lambda raw: raw.encode("utf-16"),
        lambda raw: gzip.compress(raw.encode("utf-8-sig")),
    ]
)


def check_round_trip(rows, raw, *flags):
    found, unusable = usable(rows)
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, "rows"), raw)
        if not found:
            with pytest.raises(SystemExit, match="error: .*(unusable|no rows)"):
                prepare(source, f"{folder}/out", *flags)
            assert not Path(folder, "out").exists()
            return
        counts, train, val, rejected = prepare(source, f"{folder}/out", *flags)
    assert (counts["read"], len(rejected)) == (len(rows), unusable)
    assert sorted(map(str, train + val)) == sorted(map(str, found))
    order = list(map(str, found))
    for side in (train, val):
        places = [order.index(str(record)) for record in side]
        assert places == sorted(places)
        assert all(list(record) == FIELDS for record in side)
    assert not {*map(question, train)} & {*map(question, val)}


@quick
@given(records, st.permutations(FIELDS), st.sampled_from(",;\t|"), st.data(), packed)
def test_every_table_comes_out_as_it_went_in(rows, order, delimiter, data, pack):
    case = data.draw(st.sampled_from([str.lower, str.upper, " {}\n".format]))
    quoting = data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="\r\n")
    writer.writerow([*map(case, order), "note"])
    for record in rows:  # the csv module of Python 3.10 writes no NUL
        writer.writerow([*(record[name].replace("\0", "\ue000") for name in order), "x"])
    check_round_trip(rows, pack(text.getvalue().replace("\ue000", "\0")))


@quick
@given(records, st.sampled_from(["list", "lines", "objects", "wrapper"]), st.data(), packed)
def test_every_json_comes_out_as_it_went_in(rows, form, data, pack):
    one_line = [None] if form == "lines" else [None, 0, 2]
    look = {
        "indent": data.draw(st.sampled_from(one_line)),
        "ensure_ascii": data.draw(st.booleans()),
    }
    raw = json.dumps({"v": 1, "data": rows} if form == "wrapper" and rows else rows, **look)
    if form in ("lines", "objects"):
        end = data.draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
        raw = end.join(json.dumps(item, **look) for item in rows)
    check_round_trip(rows, pack(raw))


@quick
@given(rows=records)
def test_every_parquet_comes_out_as_it_went_in(rows):
    columns = {name: pyarrow.array([r[name] for r in rows], pyarrow.string()) for name in FIELDS}
    check_round_trip(rows, parquet(**columns))


def openai(turns):
    return [{"role": role, "content": said} for role, said in turns]


def sharegpt(turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": said} for role, said in turns]


def of_trl(turns):
    """A row of TRL: the completion begins where the assistant first speaks."""
    roles = [role for role, _ in turns] + ["assistant"]
    first = roles.index("assistant")
    return {"prompt": openai(turns[:first]), "completion": openai(turns[first:])}


CHATS_IN = {  # how a list of chats stands in a file
    "lines": lambda chats: jsonl([{"messages": openai(turns)} for turns in chats]),
    "a list": lambda chats: json.dumps([{"conversations": sharegpt(turns)} for turns in chats]),
    "TRL": lambda chats: jsonl(map(of_trl, chats)),
    "cells, JSON": lambda chats: cells(["chat"], [[json.dumps(openai(turns))] for turns in chats]),
    "cells, Python": lambda chats: cells(["chat"], [[sharegpt(turns)] for turns in chats]),
    "parquet": lambda chats: parquet(messages=[openai(turns) for turns in chats]),
}


def judged(turns):
    """The record that turns make, or None; written independently of the script."""
    if "\0" in "".join(said for _, said in turns):
        return None
    turns = [(role, trimmed(said)) for role, said in turns if said.strip()]
    system = list(dict.fromkeys(said for role, said in turns if role == "system"))
    spoken = [said for role, said in turns if role != "system"]
    roles = [role for role, _ in turns if role != "system"]
    if roles != ["user", "assistant"] or turns[-1][0] == "system":
        return None
    return row("\n\n".join([*system, spoken[0]]), output=spoken[1])


speech = st.tuples(st.sampled_from(["user", "assistant", "system"]), text)
exchange = st.tuples(st.tuples(st.just("user"), text), st.tuples(st.just("assistant"), text))
chats_of_all_kinds = st.lists(st.lists(speech, max_size=4) | exchange.map(list), max_size=6)


@quick
@given(chats_of_all_kinds, st.sampled_from([*CHATS_IN]))
def test_every_chat_is_judged_alike_whatever_its_form(chats, form):
    chats = [*chats, [("user", "a good one"), ("assistant", "an answer")]]
    records = [judged(turns) for turns in chats]
    wanted, _ = usable(filter(None, records))
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, "rows"), CHATS_IN[form](chats))
        counts, train, _, rejected = prepare(source, f"{folder}/out", "--val-split", "0")
    assert (train, len(rejected)) == (wanted, records.count(None))
    assert counts["read"] == len(chats)


words = st.text("abc ,.:;!?#<>|é한\n", min_size=1).filter(str.strip)


@quick
@given(question=words, answer=words, form=st.data())
def test_whatever_stands_between_markers_comes_out(question, answer, form):
    template = form.draw(st.sampled_from([*TEXTS_OF_CHATS.values()]))
    before, middle = template.partition("a?")[::2]
    middle, after = re.split(r"\bx\b", middle)
    with tempfile.TemporaryDirectory() as folder:
        item = {"text": before + question + middle + answer + after}
        records, rejected = kept(Path(folder), [item])
    assert records[0]["instruction"].strip() == question.strip()
    assert records[0]["output"].strip() == answer.strip()


value = st.recursive(
    st.one_of(text, st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["instruction", "Prompt", "input", "context", "output", "ANSWER", "note"])
turns = st.dictionaries(st.sampled_from(["role", "from", "content", "value"]), value)
chats = st.fixed_dictionaries({"messages": st.lists(turns, max_size=3) | value})


@quick
@given(items=st.lists(st.dictionaries(names, value) | chats | value, max_size=8), data=st.data())
def test_of_any_json_lines_every_row_is_written_repeated_or_rejected(items, data):
    good = [row("q"), row("q"), row("lone \ud800"), row("r")]
    items = data.draw(st.permutations([*good, *({"x": item} for item in items[:2]), *items]))
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, "rows"), jsonl([good[0], *items]))
        counts, _, _, rejected = prepare(source, f"{folder}/out")
    assert counts["read"] >= len(items) + 1  # a list of objects is several rows
    assert all(item["row"] >= 1 and item["reason"] and "raw" in item for item in rejected)


whole = b'[{"instruction": "a", "input": null, "output": 1.5}, {"output": [[true]]}]'
scraps = [b'"', b'""', b",", b"\r", b"\n", b"{", b"}", b"[", b"]", b":", b"\\u", b"\\ud800", b"\0"]
scraps += [b"instruction", b'"output"', b"output,", b"a,x\n", b"1e999", whole, gzip.compress(whole)]
scraps += [b"\x1f\x8b", b"\xff\xfe", b"PAR1", b"PK\3\4", b"instruction,output\n", b'{"a": 1}\n']
scraps = st.lists(st.sampled_from(scraps) | st.binary(max_size=5), max_size=9).map(b"".join)
flags = st.sampled_from([[], ["--strict"], ["--encoding", "utf-16"], ["--delimiter", "|"]])


@settings(quick, max_examples=300)
@given(scraps, st.sampled_from([b"", b"prompt,output\r\n"]), st.sampled_from([0, 1, 3, 99]), flags)
def test_whatever_the_bytes_it_ends_well_or_in_one_line(raw, head, cut, flags):
    raw = head + raw if cut == 99 else gzip.compress(head + raw, mtime=0)[: -cut or None]
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, "rows"), raw)
        try:
            prepare(source, f"{folder}/out", *flags)
        except SystemExit as ended:
            assert re.fullmatch("error: .+", ended.code)
            assert not Path(folder, "out").exists()


# ----------------------------------------------------------------------------- files of all kinds

QA = [row("a?", output="x"), row("b?", output="y")]
PAIRS = [{"prompt": "a?", "completion": "x"}, {"prompt": "b?", "completion": "y"}]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}], "id": 7}
    for q, _, a in map(dict.values, QA)
]
ASKED = [("a?", "x"), ("b?", "y")]
CHATS = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ASKED]
GUANACO = [{"body": f"### Human: {q}### Assistant: {a}", "q": "-", "a": "-"} for q, a in ASKED]
CHATS_OF_NUMPY = [[str(messages).replace("},", "}\n")] for messages in CHATS]
BOM = "\ufeff"
OPENAI = [chat(("user", r["instruction"]), ("assistant", r["output"])) for r in QA]

# what stands in the file and the flags; each holds the two records of QA
FORMS = {
    "a comma": ("instruction,output\na?,x\nb?,y\n",),
    "a semicolon": ("Question;Answer\na?;x\nb?;y\n",),
    "a tab": (" QUERY \tResponse\na?\tx\nb?\ty\n",),
    "a bar": ("prompt|completion\na?|x\nb?|y\n",),
    "blanks after the commas": ('question, answer\n"a?", "x"\nb?, y\n',),
    "empty cells beyond the header": ("question,answer\na?,x,\nb?,y,,,\n",),
    "blank lines": ("\n\nquestion,answer\n\na?,x\n\n\nb?,y\n\n",),
    "line breaks in the header": ('"Question\n","My\r\nanswer"\na?,x\nb?,y\n', "output=my answer"),
    "Excel's sep line": ("sep=;\r\nquestion;answer\r\na?;x\r\nb?;y\r\n",),
    "Excel's sep line, a strange mark": ('"sep=^"\nquestion^answer\na?^x\nb?^y\n',),
    "UTF-16 of Excel": ("sep=\t\r\nquestion\tanswer\r\na?\tx\r\nb?\ty\r\n".encode("utf-16"),),
    "columns that are named": ("FRAGE,Antwort,question\na?,x,-\nb?,y,-\n",
                               "instruction=Frage", "output= antwort "),
    "the question in input": ("instruction,input,output\n,a?,x\n,b?,y\n",),
    "no instruction at all": ("Context,Response\na?,x\nb?,y\n",),
    "a list": (json.dumps(QA),),
    "a list, an item a line": ("[\n" + ",\n".join(map(json.dumps, QA)) + "\n]",),
    "lines": (jsonl(PAIRS),),
    "lines with BOM and CRLF": (b"\xef\xbb\xbf" + jsonl(PAIRS).replace("\n", "\r\n").encode(),),
    "objects over many lines": ("\n".join(json.dumps(item, indent=2) for item in PAIRS),),
    "objects broken by hand": ('{ "prompt": "a?",\n  "answer": "x" }\n{ "prompt": "b?",\n'
                               '  "answer": "y" }\n',),
    "a wrapper": (json.dumps({"version": 1, "data": QA}),),
    "a wrapper over many lines": (json.dumps({"train": PAIRS}, indent=1),),
    "a wrapper, an item a line": ('{"data": [\n' + ",\n".join(map(json.dumps, QA)) + "\n]}\n",),
    "parquet": (parquet(question=["a?", "b?"], answer=["x", "y"], when=[1, 2]),),
    "parquet of bytes": (parquet(question=[b"a?", b"b?"], answer=[b"x", b"y"]),),
    "parquet of chats": (parquet(messages=[item["messages"] for item in OPENAI]),),
    "JSON, gzipped": (gzip.compress(json.dumps(QA).encode()),),
    "chats of ShareGPT": (json.dumps(SHAREGPT),),
    "chats of OpenAI": (jsonl(OPENAI),),
    "chats beside a prompt": (jsonl([{"prompt": "-", **item} for item in OPENAI]),),
    "rows beside no chat": (jsonl([{"messages": None, **item} for item in PAIRS]),),
    "a chat beside an answer": (jsonl([{"answer": "-", **item} for item in OPENAI]),),
    "objects without a break": ("".join(map(json.dumps, PAIRS)),),
    "lines, joined, each with its mark": (BOM + jsonl(PAIRS[:1]) + BOM + jsonl(PAIRS[1:]),),
    "a mark twice": (BOM * 2 + "question,answer\na?,x\nb?,y\n",),
    "UTF-32 with its mark": ("question,answer\na?,x\nb?,y\n".encode("utf-32"),),
    "CR alone": ("question,answer\ra?,x\rb?,y\r",),
    "two gzips in one": (gzip.compress(b"q,a\na?,x\n") + gzip.compress(b"b?,y\n"),),
    "names in the plural": ("Questions,ANSWERS\na?,x\nb?,y\n",),
    "problem and solution": (jsonl([{"problem": q, "solution": a} for q, a in ASKED]),),
    "user and assistant": (jsonl([{"user": q, "assistant": a} for q, a in ASKED]),),
    "the better of two answers": (
        jsonl([{"prompt": q, "chosen": a, "rejected": "-"} for q, a in ASKED]),
    ),
    "turns of TRL": (jsonl([{"prompt": c[:1], "completion": c[1:]} for c in CHATS]),),
    "turns of TRL, the better ones": (jsonl([{"chosen": c, "rejected": []} for c in CHATS]),),
    "turns of TRL in cells": (cells(["prompt", "completion"], [(c[:1], c[1:]) for c in CHATS]),),
    "chats in cells, JSON": (cells(["messages"], [(json.dumps(c),) for c in CHATS]),),
    "chats in cells, Python": (cells(["conversation"], [(c,) for c in CHATS]),),
    "chats in cells, numpy": (cells(["dialogue"], CHATS_OF_NUMPY),),
    "chats in some cells": (cells(["chat", "q", "a"], [("", "a?", "x"), (CHATS[1], "", "")]),),
    "rows beside an empty chat": (jsonl([{"messages": [], **item} for item in PAIRS]),),
    "columns that are named beside a chat": (
        jsonl([{"frage": q, "antwort": a, "chat": CHATS[0]} for q, a in ASKED]),
        "instruction=frage", "output=antwort",
    ),
    "a chat that is named": (jsonl([{"thread": c, "q": "-", "a": "-"} for c in CHATS]),
                             "messages=thread"),
    "a text that is named": (jsonl(GUANACO), "text=body"),
    "a list in pages": (jsonl([{"page": n, "pairs": [PAIRS[n]]} for n in (0, 1)]),),
    "wrappers in wrappers": (json.dumps({"v": 1, "data": [{"title": "T", "qas": QA}]}),),
}  # fmt: skip


@pytest.mark.parametrize("name", ["rows.csv", "rows.json.gz", "rows"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_read_by_what_is_in_it_whatever_its_name(tmp_path, form, name):
    content, *columns = FORMS[form]
    flags = ["--columns", *columns] if columns else []
    assert kept(tmp_path, content, *flags, name=name) == (QA, [])


def test_the_columns_that_are_taken_and_the_others_are_said(tmp_path, capsys):
    item = {"prompt": "a", "context": "c", "completion": "b", "id": 1}
    assert kept(tmp_path, [item]) == ([row("a", "c", "b")], [])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("columns")]
    taken = "prompt.*instruction.*context.*input.*completion.*output.*not used.*id"
    assert re.search(taken, " ".join(said))


GERMAN = "prompt;answer\nCafé – 5 €?;“ja”\n"
CELLS = ["None", "NA", "NaN", "null", "007", "1e5", "1.0", "True", "-", "=1+1", 'a 5" disk']
NUMBERS = ["1e5", "1.0", "1" * 24, "-0", "0.10", "1E+2", "true", "false", "9" * 5000]
OBJECTS = [f'{{"prompt": "{n}", "answer": {n}}}' for n in NUMBERS]
EMPTY = [f'{{"prompt": "a", "input": {e}, "output": "x"}}' for e in ("null", "NaN", '""', '" "')]
LONG = "wörter, " * 37_500 + "end"
FLOATS = [1.5, 2.0, float("nan"), None]

# what stands in the file, (instruction, output) of what comes out, flags
TEXTS = {
    "cells": ("prompt,answer\n" + "".join(f"{c},{c}\n" for c in CELLS), zip(CELLS, CELLS)),
    "numbers of lines": ("\n".join(OBJECTS), zip(NUMBERS, NUMBERS)),
    "numbers of a list": (f"[{','.join(OBJECTS)}]", zip(NUMBERS, NUMBERS)),
    "null and NaN are empty": ("\n".join(EMPTY), [("a", "x")]),
    "a parquet's numbers": (parquet(prompt=[*"abcd"], answer=FLOATS), [("a", "1.5"), ("b", "2.0")]),
    "outer white space goes": ([row("\n a  b\t", "", "- x\n  - y ")], [("a  b", "- x\n  - y")]),
    "a very long cell": (f'prompt,answer\na,"{LONG}"\n', [("a", LONG)]),
    "windows-1252": (GERMAN.encode("windows-1252"), [("Café – 5 €?", "“ja”")], "windows-1252"),
    "UTF-16 without mark": (GERMAN.encode("utf-16-le"), [("Café – 5 €?", "“ja”")], "utf-16-le"),
    "the mark wins": (GERMAN.encode("utf-16"), [("Café – 5 €?", "“ja”")], "windows-1252"),
    "a system message": (
        [chat(("system", "Be brief."), ("user", "a?"), ("assistant", "x"))]
        + [chat(("developer", ""), ("User", "b?"), ("Assistant", "y"))],
        [("Be brief.\n\na?", "x"), ("b?", "y")],
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_every_text_comes_out_as_it_stands(tmp_path, case):
    content, wanted, *encoding = TEXTS[case]
    csv.field_size_limit(131_072)  # as in a fresh process
    train, _ = kept(tmp_path, content, *(["--encoding", *encoding] if encoding else []))
    assert train == [row(instruction, output=output) for instruction, output in wanted]


def test_the_output_is_utf_8_and_the_rejected_rows_are_strict_json(tmp_path):
    kept(tmp_path, parquet(prompt=["é  한\n😀\u2028", ""], answer=['a "b"', "x"], n=[1, FLOATS[2]]))
    assert (tmp_path / "out/train.jsonl").read_bytes() == (
        '{"instruction": "é  한\\n😀", "input": "", "output": "a \\"b\\""}\n'.encode()
    )
    assert "NaN" not in (tmp_path / "out/rejected.jsonl").read_text()


# ------------------------------------------------------------------------ rows that can't be used

# a line of JSON or of a table between two good ones, and why it is no use
REJECTED = {
    "a": "no output",
    ",x": "no instruction",
    "a,x,more": "more cells than columns",
    "a\0,x": "instruction has a NUL",
    '{"prompt": "a"}': "no output",
    '{"prompt": " \\n", "output": "x"}': "no instruction",
    '{"output": "x"}': "no instruction",
    '{"prompt": "a", "output": ["x"]}': "output is not text",
    '{"prompt": "a", "input": {"k": 1}, "output": "x"}': "input is not text",
    '{"prompt": "a\\u0000", "output": "x"}': "instruction has a NUL",
    '{"prompt": "a", "output": "\\ud83d"}': "output has a .* lone surrogate",
    '{"prompt": "a", "output": "x", "Output ": "y"}': "not an object with each name once",
    '["a", "x"]': "not an object",
    "null": "not an object",
    '{"prompt": "a", "output": "x"},': "not valid JSON",
    '{"prompt": "a", "output": "x': "not valid JSON",
    "[" * 100_000: "not valid JSON",
    json.dumps(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))): (
        "more than one exchange"
    ),
    json.dumps(chat(("assistant", "a"), ("user", "b"))): "the assistant speaks first",
    json.dumps(chat(("user", "a"))): "no output",
    json.dumps(chat(("user", ""), ("assistant", "b"))): "no instruction",
    json.dumps(chat(("system", "s"), ("user", " "), ("assistant", "b"))): "no instruction",
    json.dumps(chat(("user", "a"), ("assistant", None))): "no output",
    json.dumps(chat(("user", "a"), ("assistant", "b"), ("user", "c"))): "more than one exchange",
    json.dumps(chat(("customer", "a"), ("agent", "b"))): "unknown role: customer",
    '{"messages": "hi"}': "a text without markers",
    '{"messages": true}': "messages is no list",
    '{"messages": ["hi"]}': "messages without roles",
    '{"question": "a", "answers": {"text": ["x"]}}': "output is not text",
    '{"question": "a", "rejected": "x"}': "no output",
    '{"text": "a long text"}': "a text without markers",
    '{"text": "### Human: a### Assistant: b### Human: c"}': "more than one exchange",
    '{"text": "### Instruction: a\\n### Response: b\\n### Input: c"}': "the assistant speaks first",
    '{"q": "a", "a": "b", "history": [["c", "d"]]}': "more than one exchange",
    '{"q": "a", "a": "b", "history": "[[\'c\', \'d\']]"}': "more than one exchange",
    '{"q": "a", "a": "b", "history": "you: c, bot: d"}': "more than one exchange",
    '{"q": "a", "a": "b", "images": ["c.png"]}': "a picture",
    '{"q": "a", "a": "b", "image": "c.png"}': "a picture",
    '{"q": "a", "a": "b", "image": {"bytes": "c"}}': "a picture",
    '{"q": "a", "a": "b", "audio": "c.mp3"}': "a sound",
    '{"q": "a", "a": "b", "videos": ["c"]}': "a film",
    '{"q": "a", "a": "b", "label": false}': "marked as a bad answer",
    '{"q": "a", "a": "b", "label": "False"}': "marked as a bad answer",
    '{"prompt": "a", "completion": "b", "label": 0}': "marked as a bad answer",
    '{"q": "q", "a": "A"}': "the header again",
    "question,answer": "the header again",
    "\ufeffQuestion ,ANSWER,,": "the header again",
    '\ufeff"question","answer"': "the header again",
}

# what the second of two messages holds beside its role, and why it is no use
UNUSABLE = {
    "a call of a tool": {"content": "b", "tool_calls": [{"id": 1}]},
    "a call of a function": {"content": None, "function_call": {"name": "f"}},
    "a picture": {"content": [{"type": "text", "text": "b"}, {"type": "image_url"}]},
    "a picture by its key": {"content": [{"image": "c.png"}]},
    "a sound": {"content": [{"type": "input_audio"}]},
    "a film": {"content": [{"type": "video", "video": "c"}]},
    "a part that is no text": {"content": ["b", {"type": "file"}]},
    "marked, OpenAI": {"content": "b", "weight": 0},
    "marked, LLaMA-Factory": {"content": "b", "loss_weight": 0.0},
    "marked, axolotl": {"content": "b", "train": False},
    "output is not text": {"content": {"a": 1}},
    "no output": {"content": [{"type": "thinking", "thinking": "c"}]},
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_what_a_message_holds_that_no_record_can_rejects_the_row_for_that_reason(tmp_path, reason):
    answer = {"role": "assistant", **UNUSABLE[reason]}
    item = {"messages": [{"role": "user", "content": "a"}, answer]}
    train, rejected = kept(tmp_path, [row("good"), item])
    assert train == [row("good")]
    kind = {"a call of a function": "a call of a tool", "a picture by its key": "a picture"}
    assert rejected[0]["reason"].startswith(kind.get(reason, reason).partition(",")[0])


@pytest.mark.parametrize("role", ["tool", "function", "function_call", "observation", "ipython"])
def test_a_turn_of_a_tool_rejects_the_row(tmp_path, role):
    item = chat(("user", "a"), (role, "5"), ("assistant", "b"))
    assert kept(tmp_path, [row("good"), item])[1][0]["reason"] == "a call of a tool"


# a row that looks suspicious and is good: what comes out is row("a", output="b")
GOOD_ROWS = [
    {"messages": CHAT, "images": [], "audio": None, "history": []},
    {"messages": CHAT, "label": True},
    {"q": "a", "a": "b", "label": 0},  # a class
    {"prompt": "a", "completion": "b", "label": "1"},
    {"q": "a", "a": "b", "image": "nginx:1.25", "history": "[]"},
    {"messages": [{**CHAT[0], "weight": 0}, {**CHAT[1], "weight": 1, "tool_calls": None}]},
    {"messages": [{**CHAT[0], "content": ["a"]}, {**CHAT[1], "content": [{"text": "b"}]}]},
    {"messages": [CHAT[0], {**CHAT[1], "content": [{"type": "text", "value": "b"}]}]},
    {"messages": [{"role": "system", "content": ""}, *CHAT]},
    {"messages": [{**CHAT[0], "role": "Human"}, {**CHAT[1], "role": "Chatgpt"}]},
    {"messages": [{**CHAT[0], "role": "prompter"}, {**CHAT[1], "role": "model"}]},
    {"messages": "USER: a ASSISTANT: b</s>"},
    {"query": "a", "answer": "b", "text": "a page"},
]


@pytest.mark.parametrize("item", GOOD_ROWS, ids=str)
def test_a_row_that_only_looks_unusable_is_used(tmp_path, item):
    assert kept(tmp_path, [item]) == ([row("a", output="b")], [])


def test_an_answer_that_is_json_stays_the_text_that_it_is(tmp_path):
    answers = [
        '[{"from": "a", "to": "b"}]',
        '[{"name": "A", "value": "1"}]',
        '{"role": "x"}',
        "[1]",
    ]
    rows = [row(f"q {n}", output=answer) for n, answer in enumerate(answers)]
    assert kept(tmp_path, rows) == (rows, [])


def test_what_messages_hold_beside_their_text_is_said_to_be_not_used(tmp_path, capsys):
    parts = [{"type": "thinking", "thinking": "c"}, {"type": "text", "text": "b"}]
    answer = {"role": "assistant", "content": parts, "reasoning_content": "d", "name": ""}
    item = {"messages": [CHAT[0], answer], "id": 1, "input": ""}
    assert kept(tmp_path, [item]) == ([row("a", output="b")], [])
    said = capsys.readouterr().out.partition("not used: ")[2].partition("\n")[0]
    used = ["id", "reasoning_content of a message", "thinking of a message"]
    assert sorted(ast.literal_eval(said)) == used


LLAMA_3 = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
LLAMA_2 = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\na? [/INST] x </s>"


@pytest.mark.parametrize("form", TEXTS_OF_CHATS)
def test_one_text_with_markers_is_a_question_and_its_answer(tmp_path, form):
    item = {"text": TEXTS_OF_CHATS[form], "id": 1}
    assert kept(tmp_path, [item]) == ([row("a?", output="x")], [])
    chat_in_cell = cells(["messages"], [[item["text"]]])
    assert kept(tmp_path, chat_in_cell) == ([row("a?", output="x")], [])


def test_a_text_may_have_a_system_prompt_an_input_and_markers_of_other_forms(tmp_path):
    alpaca = (
        "### Instruction:\na?\n\n### Input:\nb\n\n### Response:\n  x\n    <s>y</s> ### Human: z"
    )
    wanted = [
        row("Be brief.\n\na?", output="x"),
        row("a?", "b", "  x\n    <s>y</s> ### Human: z"),
    ]
    llama_3 = LLAMA_3("system", "Be brief.") + LLAMA_3("user", "a?") + LLAMA_3("assistant", "x")
    texts = [LLAMA_2, "<|begin_of_text|>" + llama_3, alpaca]
    source = write(tmp_path / "rows", [{"text": text} for text in texts])
    counts, train, _, rejected = prepare(source, tmp_path / "out", "--val-split", "0")
    assert (train, rejected, counts["duplicates"]) == (wanted, [], 1)


def test_a_system_prompt_beside_question_or_chat_goes_before_the_question_once(tmp_path):
    rows = [
        {"System Prompt": "s", "question": "a", "context": "c", "answer": "b"},
        {"system": "s", "messages": chat(("user", "d"), ("assistant", "b"))["messages"]},
        {"system": "s", **chat(("system", "s"), ("user", "e"), ("assistant", "b"))},
        {"system": "", **chat(("system", "t"), ("system", "u"), ("user", "f"), ("assistant", "b"))},
    ]
    wanted = [row("s\n\na", "c", "b"), row("s\n\nd", output="b"), row("s\n\ne", output="b")]
    wanted += [row("t\n\nu\n\nf", output="b")]
    assert kept(tmp_path, rows) == (wanted, [])


def test_system_prompt_and_history_may_be_named(tmp_path):
    rows = [{"q": "a", "a": "b", "persona": "s"}, {"q": "c", "a": "d", "log": [["e", "f"]]}]
    named = ["--columns", "system=Persona", "history=log"]
    train, rejected = kept(tmp_path, rows, *named)
    assert train == [row("s\n\na", output="b")]
    assert rejected[0]["reason"].startswith("more than one exchange")


def test_the_names_that_the_readme_calls_known_are_known():
    table = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    names = next(line for line in table if line.startswith("| other names")).split("|")[1]
    for field, group in zip(["instruction", "output", "input"], names.split(";")):
        assert {*re.findall(r"`(\w+)`", group)} <= {*prepare_dataset.KNOWN[field]}


def test_the_ruler_of_a_markdown_table_is_a_rejected_row(tmp_path):
    table = "| n | Question | Answer |\n|:--|:-:|---|\n| 1 | an answer? | - |\n"
    train, rejected = kept(tmp_path, table)
    assert train == [row("an answer?", output="-")]
    assert [(item["row"], item["reason"]) for item in rejected] == [
        (2, "the ruler of a Markdown table")
    ]


@pytest.mark.parametrize("line", REJECTED, ids=lambda line: line[:60])
def test_an_unusable_row_is_kept_aside_with_number_and_reason(tmp_path, line):
    good, better = row("two\nlines"), row("better")
    raw = f"{json.dumps(good)}\n\n{line}\n{json.dumps(better)}\n"
    if line[0] not in "{[n":
        raw = f'question,answer\n"two\nlines",an answer\n{line}\nbetter,an answer\n'
    train, rejected = kept(tmp_path, raw)
    assert train == [good, better]
    assert [item["row"] for item in rejected] == [3]
    assert re.match(REJECTED[line], rejected[0]["reason"])
    assert rejected[0]["raw"] or line == "null"


OBJECT = '{{\n  "prompt": "{}",\n  "output": "an answer"\n}}\n'.format
BROKEN_OBJECTS = {  # one among objects over many lines, and the line of its fault
    '{\n  "prompt": "b",\n  "output": "x",\n}\n': 8,
    '{\n  "prompt": "b"\n  "output": "x"\n}\n': 7,
    '{\n  "prompt": "b",\n  "output": "x\n}\n': 7,
    '{\n  "prompt": "b",\n  "output": "x"\n': 8,
    '{\n  "prompt": "b",\n  "output": "x"\n},\n': 8,
    "# a remark\n": 5,
}


@pytest.mark.parametrize("broken", BROKEN_OBJECTS, ids=repr)
def test_one_broken_object_among_objects_over_many_lines_costs_itself_alone(tmp_path, broken):
    train, rejected = kept(tmp_path, OBJECT("a") + broken + OBJECT("c") + OBJECT("d"))
    assert train == [row("a"), row("c"), row("d")]
    assert [(item["row"], item["reason"]) for item in rejected] == [
        (BROKEN_OBJECTS[broken], "not valid JSON")
    ]
    assert rejected[0]["raw"] == broken.rstrip()


def test_lines_above_and_among_json_lines_are_rejected_rows(tmp_path):
    text = "// a remark\n" + jsonl([row("a")]) + "# another\n" + jsonl([row("b")])
    train, rejected = kept(tmp_path, text)
    assert (train, [item["row"] for item in rejected]) == ([row("a"), row("b")], [1, 3])


def test_what_stands_beside_a_list_of_rows_is_of_each_row(tmp_path):
    page = {
        "context": "c",
        "title": "t",
        "qas": [{"question": "a", "answer": "b"}, {"question": "d"}],
    }
    train, rejected = kept(tmp_path, [page])
    assert train == [row("a", "c", "b")]
    assert rejected[0]["raw"] == {"context": "c", "title": "t", "question": "d"}
    for whole in ({"prompt": "p", "pairs": [row("a")]}, {"a": [row("a")], "b": [row("b")]}):
        assert kept(tmp_path, [row("good"), whole])[0] == [row("good")]  # never by one of its rows


def test_a_broken_first_line_costs_that_line_alone(tmp_path):
    for first in ('{"prompt": "a", "outp', '{"prompt": "a", "output": "x"},'):
        train, rejected = kept(tmp_path, f"{first}\n{jsonl([row('a'), row('b')])}")
        assert (train, [item["row"] for item in rejected]) == ([row("a"), row("b")], [1])


def test_deeply_nested_values_are_kept_aside_at_any_depth(tmp_path):
    for depth in [10, 300, *range(900, 1000, 4), 3000, 30_000]:
        nested = '{"prompt": "a", "output": ' + "[" * depth + "]" * depth + "}"
        train, rejected = kept(tmp_path, f"{json.dumps(row('good'))}\n{nested}\n")
        assert (train, len(rejected)) == ([row("good")], 1)


def test_a_list_counts_by_position_and_a_later_run_leaves_no_rows_of_an_earlier_one(tmp_path):
    _, rejected = kept(tmp_path, json.dumps([row("a"), 7, row(""), row("b")]))
    assert [item["row"] for item in rejected] == [2, 3]
    assert kept(tmp_path, [row("a"), row("b")], "--strict")[1] == []


# ------------------------------------------------------------------------- repeats and the split


def test_repeats_are_found_across_unicode_form_and_outer_blanks_and_case_counts(tmp_path):
    first = row("Où  est\nle Pod?", "Ä", "LÀ")
    again = row(unicodedata.normalize("NFD", " Où  est\nle Pod? "), "A\u0308", "LÀ\t")
    others = [row("git branch -d"), row("git branch -D"), row("git  branch -d")]
    assert kept(tmp_path, [first, again, *others])[0] == [first, *others]
    rows = [row("a", "b", "cd"), row("a", "bc", "d"), row("ab", "", "cd"), row("ab", "cd", "cd")]
    assert kept(tmp_path, rows)[0] == rows  # the same letters in other fields


@quick
@given(
    questions=st.lists(st.integers(0, 7), min_size=1, max_size=40),
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(-(2**70), 2**70),
)
def test_a_question_never_falls_on_both_sides_and_val_has_its_share(questions, share, seed):
    rows = [row(f"q {q}", output=f"{n}") for n, q in enumerate(questions)]
    groups = Counter(questions)
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, "rows"), rows)
        flags = ["--val-split", str(share), "--seed", str(seed)]
        counts, train, val, _ = prepare(source, f"{folder}/a", *flags)
        prepare(source, f"{folder}/b", *flags)
        assert snapshot(f"{folder}/a") == snapshot(f"{folder}/b")
    assert train and not {*map(question, train)} & {*map(question, val)}
    assert abs(len(val) - round(len(rows) * share)) <= max(groups.values())
    assert bool(val) == (share > 0 and len(groups) > 1) or not val and len(groups) == 1
    assert counts["conflicts"] == sum(count for count in groups.values() if count > 1)
    if max(groups.values()) == 1 and share and len(rows) > 1:
        assert len(val) == min(max(1, round(len(rows) * share)), len(rows) - 1)


def test_the_seed_decides_the_split_and_not_the_order_of_the_file(tmp_path):
    rows = [row(f"question {n}") for n in range(100)]
    source, mixed = write(tmp_path / "a", rows), random.Random(0).sample(rows, 100)
    one, other = (prepare(source, tmp_path / "out", "--seed", seed)[2] for seed in "12")
    two = prepare(write(tmp_path / "b", mixed), tmp_path / "out", "--seed", "1")[2]
    assert sorted(map(str, one)) == sorted(map(str, two)) != sorted(map(str, other))
    assert one != two


def test_more_rows_move_few_old_ones(tmp_path):
    rows = [row(f"question {n}") for n in range(220)]
    old = prepare(write(tmp_path / "a.jsonl", rows[:200]), tmp_path / "a")[2]
    new = prepare(write(tmp_path / "b.jsonl", rows), tmp_path / "b")[2]
    old, new = {r["instruction"] for r in old}, {r["instruction"] for r in new}
    moved = (old ^ new) & {r["instruction"] for r in rows[:200]}
    assert (len(old), len(new)) == (20, 22) and len(moved) <= 8


def test_a_question_whose_key_ends_in_nul_bytes_is_held_out_like_any_other(tmp_path):
    rows = [row(f"question {n}") for n in range(2000)]  # of 2,000 keys some end in a zero byte
    counts, *_ = prepare(write(tmp_path / "rows", rows), tmp_path / "out", "--val-split", "0.5")
    assert (counts["train"], counts["val"]) == (1000, 1000)


def test_val_left_empty_by_one_question_is_said(tmp_path, capsys):
    source = write(tmp_path / "rows", [row("a", output=str(n)) for n in range(5)])
    counts, _, val, _ = prepare(source, tmp_path / "out", "--val-split", "0.5")
    assert (counts["conflicts"], val) == (5, [])
    assert "all rows ask the same question" in capsys.readouterr().out


def test_the_summary_says_what_the_files_hold(tmp_path, capsys):
    rows = [row(f"question {n}", output="one two three") for n in range(10)]
    rows += [row("question 1", output="one two"), row(" question 2", output="one two three")]
    source = write(
        tmp_path / "rows", [*rows, row("", output="x"), row("x", output=""), row("y", "", "")]
    )
    counts, *_ = prepare(source, tmp_path / "out", "--val-split", "0.2")
    assert list(counts) == ["read", "rejected", "duplicates", "conflicts", "train", "val"]
    assert list(counts.values()) == [15, 3, 1, 2, 9, 2]
    out = capsys.readouterr().out.splitlines()
    figures = {line.split()[0]: line for line in out}
    assert all(figures[name].split()[1] == str(count) for name, count in counts.items())
    assert "no output: 2" in figures["rejected"] and "no instruction: 1" in figures["rejected"]
    assert str(tmp_path / "out/train.jsonl") in figures["train"]
    assert "median 5" in figures["length"] and "max 5 " in figures["length"]
    assert out[-1] == f"next: python lora_finetune.py --dataset {tmp_path / 'out'}"


# ------------------------------------------------------- never new rows beside those of an old run


@pytest.fixture
def old(tmp_path):
    """A folder that an earlier run wrote, a new source, and what stood there."""
    source = write(tmp_path / "old.jsonl", [row(f"old {n}") for n in range(20)] + [row("")])
    prepare(source, tmp_path / "out")
    source = write(tmp_path / "new.jsonl", [row(f"new {n}", "x" * 99) for n in range(900)])
    return tmp_path / "out", source, snapshot(tmp_path / "out")


def test_a_full_disk_leaves_the_old_files(old):
    folder, source, before = old
    with pytest.raises(SystemExit, match="^error: .*File too large"), largest_file(8192):
        prepare(source, folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("step", range(10))  # the lock, three files to open, to remove, to rename
def test_a_killed_run_leaves_no_new_rows_beside_old_ones_and_the_next_run_cleans_up(old, step):
    folder, source, before = old
    prepare(source, folder.parent / "wanted")
    wanted = snapshot(folder.parent / "wanted")
    killed = f"""import itertools, os, sys, prepare_dataset
steps = itertools.count()
def kill(event, args):
    if event in ("open", "os.remove", "os.rename") and str(args[0]).startswith({str(folder)!r}):
        next(steps) == {step} and os._exit(9)
sys.addaudithook(kill)
prepare_dataset.main(sys.argv[1:])"""
    command = [sys.executable, "-c", killed, "--input", source, "--output", str(folder)]
    assert subprocess.run(command, check=False, cwd=ROOT, capture_output=True).returncode == 9
    after = snapshot(folder)
    pair = after.get("train.jsonl"), after.get("val.jsonl")
    assert pair[0] is None or pair == (before["train.jsonl"], before["val.jsonl"])
    prepare(source, folder)
    assert snapshot(folder) == wanted


def test_two_runs_on_one_folder_write_one_after_the_other(old):
    folder, source, before = old
    with ThreadPoolExecutor(1) as thread:
        with filelock.FileLock(folder / ".lock"):  # as another run has it while it writes
            run = thread.submit(prepare, source, folder)
            assert wait([run], timeout=1.5).not_done
            assert snapshot(folder) == before
        assert run.result()[0]["train"] == 810


def test_a_read_only_folder_leaves_the_old_files(old):
    folder, source, before = old
    folder.chmod(0o555)
    try:
        with pytest.raises(SystemExit, match="^error: .*Permission denied"):
            without_privileges(lambda: prepare(source, folder))
    finally:
        folder.chmod(0o755)
    assert snapshot(folder) == before


def test_other_files_in_the_folder_stay_the_source_among_them(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row("a"), row("b")])
    before = snapshot(tmp_path)
    prepare(source, tmp_path)
    prepare(source, tmp_path / "a/b/c")  # parents are made
    assert before.items() <= snapshot(tmp_path).items()


# --------------------------------------------------------------------------------- user's mistakes

GOOD = "question,answer\na,x\nb,y\n"
CHINESE = "question,answer\n什么是污点?,一个标记。\n什么是探针?,它重启容器。\n"
JAPANESE = "question,answer\nポッドとは何ですか?,コンテナの集まりです。\n"
RUSSIAN = "question,answer\nЧто такое узел?,Машина для подов.\n"
BROKEN = random.Random(0).randbytes(9000).hex().encode()
SPOILED = gzip.compress(GOOD.encode() + BROKEN)

# what stands in the file, flags, what the message must name
MISTAKES = {
    "no such file": (None, [], "no such file"),
    "a folder": ("folder", [], "no such file"),
    "an empty file": ("", [], "no rows"),
    "a header alone": ("question,answer\n", [], "no rows"),
    "an empty parquet": (parquet(question=[], answer=[]), [], "no rows"),
    "Excel": (b"PK\3\4.[Content_Types].xml.xl/workbook.xml", [], "Excel.*CSV"),
    "Word": (b"PK\3\4.[Content_Types].xml.word/document.xml", [], "Word.*CSV"),
    "a PDF": ("%PDF-1.7\n", [], "PDF.*CSV"),
    "a pickle": (pickle.dumps(GOOD), [], "pickle.*to_csv"),
    "binary": (bytes(range(1, 256)) * 9, [], "--encoding"),
    "other columns": ("id,text\n1,x\n", [], "'id', 'text'.*--columns instruction="),
    "other keys": (
        [{"frage": "a", "antwort": "x"}],
        [],
        "'frage', 'antwort'.*--columns instruction=",
    ),
    "no answers": ("question,reply\na,x\n", [], "no output.*'question', 'reply'.*--columns"),
    "two columns of a name": ("question,answer,Answer\na,x,y\n", [], "'answer', 'Answer'.*rename"),
    "the same in parquet": (parquet(question=["a"], answer=["x"], Answer=["y"]), [], "'Answer'"),
    "text above the header": ("# of the desk\nquestion,answer\na,x\n", [], "of the desk.*header"),
    "no header": ("What is it?,An editor.\nAnd that?,A shell.\n", [], "What is it.*header"),
    "a page of HTML": ("<html><body>question, answer</body></html>", [], "<html>"),
    "one text": ([{"id": 1, "text": "a page"}], [], "'id', 'text'.*--columns"),
    "only pictures": ([{"q": "a", "a": "b", "image": [1]}], [], "1 of 1.*a picture"),
    "two lists of rows": (json.dumps({"a": QA, "b": QA}), [], "'a', 'b'"),
    "commas between objects": ('{\n"q": "a"\n},\n{\n"q": "b"\n}', [], "not valid JSON"),
    "a zip": (b"PK\3\4rows.csv", [], "zip.*unpack"),
    "a tar": (b"rows.csv".ljust(257, b"\0") + b"ustar", [], "tar.*unpack"),
    "feather": (b"ARROW1\0\0", [], "feather.*to_csv"),
    "an arrow stream": (b"\xff\xff\xff\xff\x10\0", [], "arrow.*to_csv"),
    "SQLite": (b"SQLite format 3\0", [], "SQLite.*-csv"),
    "ORC": (b"ORC\n", [], "ORC.*to_csv"),
    "a pickle, gzipped": (gzip.compress(pickle.dumps(GOOD)), [], "pickle"),
    "UTF-16 without mark": (GOOD.encode("utf-16-le"), [], "--encoding utf-16-le"),
    "UTF-16 without mark, the other": (GOOD.encode("utf-16-be"), [], "--encoding utf-16-be"),
    "gb18030": (CHINESE.encode("gb18030"), [], "line 2.*--encoding gb18030"),
    "gb18030, far below": ((GOOD * 9000 + CHINESE * 9000).encode("gb18030"), [], "gb18030"),
    "shift_jis": (JAPANESE.encode("shift_jis"), [], "line 2.*--encoding cp932"),
    "Cyrillic": (RUSSIAN.encode("windows-1251"), [], "line 2.*-1251 .Cyrillic"),
    "an encoding that is none": (GOOD, ["--encoding", "base64"], "--encoding base64"),
    "prose": ("Once upon a time, there was\na line.\n", [], "Once upon.*--columns"),
    "a column that lacks": (GOOD, ["--columns", "input=notes"], "no column .'notes'.*'question'"),
    "one column for two": (GOOD, ["--columns", "instruction=answer"], "no output.*--columns"),
    "an inner quote": (GOOD + 'c,"It prints "ready" and\nthen, "d",\n', [], "row 4.*quote"),
    "an inner quote in row 2": ('question,answer\n"a "b" c",x\n', [], "row 2.*quote"),
    "a quote with a backslash": (GOOD + 'c,"say \\"hi\\""\n', [], "row 4.*quote"),
    "a quote never closed": (GOOD + 'c,"z\nd,w\n', [], "row 4.*quote"),
    "latin text": ("question,answer\né,x".encode("latin-1"), [], "--encoding windows-1252"),
    "not utf-16": (GOOD + "z", ["--encoding", "utf-16"], "rows"),
    "a broken list": ('[\n{"question": "a"},\n{"question": "b",}]', [], "line 3: not valid JSON"),
    "a list cut short": (json.dumps(QA)[:-9], [], "line 1: not valid JSON"),
    "lines with commas": (jsonl(QA).replace("}\n", "},\n"), [], "2 of 2.*line 1: not valid JSON"),
    "mostly broken lines": (jsonl(QA[:1]) + "{\n{\n", [], "2 of 3.*line 2: not valid JSON"),
    "a gzip cut short": (SPOILED[:3000], [], "end-of-stream"),
    "a gzip gone bad": (SPOILED[:5000] + bytes(99) + SPOILED[5099:], [], "rows"),
    "a parquet cut short": (parquet(question=["a"], answer=["x"])[:-9], [], "arquet"),
    "strict and a bad row": (GOOD + "c,\n", ["--strict"], "row/line 4: no output"),
    "split of one": (GOOD, ["--val-split", "1"], "--val-split 1"),
    "a field without column": (GOOD, ["--columns", "output= "], "--columns output="),
    "an unknown option": (GOOD, ["--colums", "output=x"], "--colums"),
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
    assert "\n" not in ended.value.code and len(ended.value.code) < 900
    return ended.value.code


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(tmp_path, capsys, mistake):
    content, flags, named = MISTAKES[mistake]
    if content == "folder":
        (tmp_path / "rows").mkdir()
    elif content is not None:
        write(tmp_path / "rows", content)
    before = snapshot(tmp_path)
    argv = ["--input", str(tmp_path / "rows"), "--output", str(tmp_path / "out"), *flags]
    message = error_of(argv, capsys)
    assert re.search(named, " ".join(message.split())), message
    assert snapshot(tmp_path) == before


BAD_BYTE = {  # where ~ is the one byte that is no UTF-8, and its line
    "question,answer\nWhat?,a caf~\nGröße?,Über 5 €\nWo?,Überall\n": 2,
    'question,answer\nGröße?,Über 5 €\n"Où\n?",là\nWhat?,a caf~': 5,
    "question,answer\nWas?,ein caf~\nGröße?,egal\n": 2,
    "question,answer\nWo?,Überall\n" + "a,x\n" * 50_000 + "What?,a caf~\n": 50_003,
    '{"question": "Größe?", "answer": "Übergröße"}\n{"question": "~", "answer": "x"}\n': 2,
}


@pytest.mark.parametrize("text", BAD_BYTE, ids=lambda text: text[-30:])
def test_one_bad_byte_in_utf_8_leads_to_its_line_and_to_no_other_encoding(tmp_path, capsys, text):
    source = write(tmp_path / "rows", text.encode().replace(b"~", b"\xe9"))
    message = error_of(["--input", source, "--output", str(tmp_path / "out")], capsys)
    assert f"line {BAD_BYTE[text]}: not utf-8" in message and "windows" not in message


# texts that several encodings fit: to name one would send people to a wrong one
UNSURE = [("란?,모든.", "cp949"), ("一個?,節點標記.", "big5"), ("узел?,сервис.", "koi8_r")]


@pytest.mark.parametrize("text, encoding", UNSURE)
def test_no_encoding_is_named_that_is_not_sure(tmp_path, capsys, text, encoding):
    source = write(tmp_path / "rows", f"question,answer\n{text}\n".encode(encoding))
    message = error_of(["--input", source, "--output", str(tmp_path / "out")], capsys)
    assert "how was it saved?" in message and "seems" not in message


def test_without_charset_normalizer_the_line_does_without_a_guess(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    source = write(tmp_path / "rows", CHINESE.encode("gb18030"))
    message = error_of(["--input", source, "--output", str(tmp_path / "out")], capsys)
    assert "line 2: not utf-8" in message and "gb18030" not in message


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


def test_a_mistake_at_the_shell_shows_no_traceback_and_help_loads_no_pandas(tmp_path):
    script = [sys.executable, "-X", "importtime", ROOT / "prepare_dataset.py"]
    look = {"capture_output": True, "text": True, "check": False, "cwd": tmp_path}
    ended = subprocess.run([*script, "--input", "none.csv"], **look)
    said = [line for line in ended.stderr.splitlines() if not line.startswith("import time:")]
    assert ended.returncode == 1 and len(said) == 1 and said[0].startswith("error: none.csv")
    loaded = subprocess.run([*script, "--help"], **look).stderr
    assert not re.search(r"\b(pandas|pyarrow|torch|transformers)\b", loaded)


# what people bring, read as it is meant

SAID = [{"role": "assistant", "content": "l1\nl2"}]
BROKEN_LINE = '[{"role": "assistant", "content": "l1\nl2"}]'
WHOLE_CHAT = [{"role": "user", "content": "a?"}, *SAID]
MEANT = {  # the file, (question, answer) of each record, reasons of the rejected rows
    "an indented chat in a cell": (
        cells(["prompt", "completion"], [["a?", json.dumps(SAID, indent=1)]]),
        [("a?", "l1\nl2")],
        [],
    ),
    "a chat in a cell, with a line break in a text": (
        cells(["prompt", "completion"], [["a?", BROKEN_LINE]]),
        [("a?", "l1\nl2")],
        [],
    ),
    "a chat in a cell that is cut off": (
        cells(["prompt", "completion"], [["a?", BROKEN_LINE[:30]], ["b?", "c"]]),
        [("b?", "c")],
        ["a chat that is cut off or broken"],
    ),
    "a list that is an answer": (
        cells(["prompt", "completion"], [["a?", '[{"role": "admin", "verbs": ["get"]}]']]),
        [("a?", '[{"role": "admin", "verbs": ["get"]}]')],
        [],
    ),
    "SQuAD's answers, written by pandas": (
        cells(
            ["question", "answers"],
            [
                ["a?", "{'text': array(['b'], dtype=object), 'answer_start': array([1])}"],
                ["c?", "{'text': ['d', 'e'], 'answer_start': [1, 2]}"],
                ["What does it print?", "{'text': 'b'}"],
            ],
        ),
        [("What does it print?", "{'text': 'b'}")],
        ["output is an object, not text"] * 2,
    ),
    "columns without a name at the end": (
        "question,answer,,\na?,b,,\nc?,d, and e,\n",
        [("a?", "b")],
        ["more cells than columns"],
    ),
    "a prompt with marks of turns": (
        [{"prompt": "\n\nHuman: a?\n\nAssistant:", "completion": "b"}, {"q": "c?", "a": "d"}],
        [("c?", "d")],
        ["the question holds markers of turns"],
    ),
    "LLaMA-Factory's mark of a bad answer": (
        [{**chat(("user", "a?"), ("assistant", "b")), "kto_tag": False}, {"q": "c?", "a": "d"}],
        [("c?", "d")],
        ["marked as a bad answer, or as not to be trained"],
    ),
    "an answer that nobody sees": (
        [{"q": "a?", "a": "\u200b"}, {"q": "c?", "a": "d"}],
        [("c?", "d")],
        ["no output"],
    ),
    "a prompt that is told again in chosen": (
        [{"prompt": "a?", "chosen": WHOLE_CHAT, "rejected": CHAT}],
        [("a?", "l1\nl2")],
        [],
    ),
    "a picture beside a text": (
        [
            chat(("user", [{"text": "a?", "image": "x.png"}]), ("assistant", "b")),
            {"q": "c", "a": "d"},
        ],
        [("c", "d")],
        ["a picture"],
    ),
    "thoughts beside an answer": (
        [
            chat(
                ("user", "a?"),
                ("assistant", [{"type": "reasoning_text", "text": "hm"}, {"text": "b"}]),
            )
        ],
        [("a?", "b")],
        [],
    ),
}


@pytest.mark.parametrize("kind", MEANT)
def test_what_people_bring_is_read_as_it_is_meant(tmp_path, kind):
    content, wanted, reasons = MEANT[kind]
    records, rejected = kept(tmp_path, content)
    assert [(record["instruction"], record["output"]) for record in records] == wanted
    assert [row["reason"] for row in rejected] == reasons


def test_a_column_used_in_some_rows_alone_is_said_to_be_not_used_in_others(tmp_path, capsys):
    task = "Answer the question."
    rows = [{"instruction": "", "question": "a?", "answer": "b"}]
    rows += [{"instruction": task, "question": f"{n}?", "answer": "c"} for n in range(3)]
    kept(tmp_path, rows)
    assert "question (in some rows)" in capsys.readouterr().out.partition("not used: ")[2]


@pytest.mark.parametrize("flags, answer", [([], None), (["--columns", "output=correct"], "z")])
def test_the_first_of_several_choices_is_no_answer(tmp_path, capsys, flags, answer):
    content = cells(["question", "A", "B", "C", "correct"], [["a?", "x", "y", "z", "z"]])
    if answer:
        records, _ = kept(tmp_path, content, *flags)
        assert records[0]["output"] == answer
    else:
        with pytest.raises(SystemExit, match="correct"):
            kept(tmp_path, content)


@pytest.mark.parametrize(
    "text", ["{'q': 'a', 'a': 'b'}\n", '{"q": "a", "a": "b",}\n', '{"q": "a" /* x */, "a": "b"}\n']
)
def test_broken_json_is_told_what_to_look_for(tmp_path, text):
    with pytest.raises(SystemExit, match="^error: .*not valid JSON.*look for comments"):
        kept(tmp_path, text * 3)
