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
from collections import Counter, namedtuple
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
UNSEEN = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"  # characters that nobody sees
quick = settings(max_examples=80, deadline=None, database=None)
Result = namedtuple("Result", ["counts", "train", "val", "rejected"])


def row(instruction, input="", output="an answer"):
    """A record, by its three texts."""
    return {"instruction": instruction, "input": input, "output": output}


def message(role, content):
    """What one says in a chat, as OpenAI has it."""
    return {"role": role, "content": content}


def user(content):
    """What the user says."""
    return message("user", content)


def assistant(content):
    """What the assistant says."""
    return message("assistant", content)


def chat(*messages):
    """A row that is a chat."""
    return {"messages": list(messages)}


def jsonl(items):
    """Items as JSON lines."""
    texts = [json.dumps(item) + "\n" for item in items]
    return "".join(texts)


def table(rows):
    """Rows as a CSV; what is no text stands in it as Python writes it."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def parquet(**columns):
    """The bytes of a parquet file with these columns."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def write(path, content):
    """Write bytes, text (line ends as they stand), items as JSON lines, or lists as a CSV."""
    if isinstance(content, list):
        is_table = isinstance(content[0], list)
        content = table(content) if is_table else jsonl(content)
    if isinstance(content, str):
        content = content.encode()
    Path(path).write_bytes(content)
    return str(path)


def lines(path):
    """The rows of a file of JSON lines, each of which ends in a line feed."""
    text = Path(path).read_bytes().decode()
    *whole, rest = text.split("\n")
    assert rest == ""
    return [json.loads(line) for line in whole]


def paths(source, output):
    """The flags that say what to read and where to write."""
    return ["--input", str(source), "--output", str(output)]


def prepare(source, folder, *flags):
    """Run main; return its counts and the rows of the three files, which must agree."""
    counts = prepare_dataset.main([*paths(source, folder), *flags])

    train = lines(Path(folder, "train.jsonl"))
    val = lines(Path(folder, "val.jsonl"))
    rejected = lines(Path(folder, "rejected.jsonl"))
    assert counts["train"] == len(train)
    assert counts["val"] == len(val)
    assert counts["rejected"] == len(rejected)
    written = len(train) + len(val) + len(rejected)
    assert counts["read"] == counts["duplicates"] + written
    return Result(counts, train, val, rejected)


def prepare_content(content, *flags):
    """What prepare() returns for a file of this content; a run that ends early writes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, "rows"), content)
        out = Path(folder, "out")
        try:
            return prepare(source, out, *flags)
        except SystemExit:
            assert not out.exists()
            raise


def kept(folder, content, *flags, name="rows"):
    """The records that come out of a file, all in train.jsonl, and the rejected rows."""
    source = write(folder / name, content)
    result = prepare(source, folder / "out", "--val-split", "0", *flags)
    assert result.val == []
    return result.train, result.rejected


def numbers_of(rejected):
    """The numbers of rejected rows."""
    return [item["row"] for item in rejected]


def reasons_of(rejected):
    """Why rows are rejected."""
    return [item["reason"] for item in rejected]


def shortened(text):
    """The name of a case in a table whose texts are long."""
    return text[:60]


def snapshot(folder):
    """What stands in a folder: the bytes of each file, None for a folder."""
    found = {}
    for path in Path(folder).rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = None
        if path.is_file():
            found[name] = path.read_bytes()
    return found


def error_of(capsys, source, output, *flags):
    """Run main with a mistake; return the line in which it ends. Nothing may be written."""
    folder = Path(source).parent
    before = snapshot(folder)
    with pytest.raises(SystemExit) as ended:
        prepare_dataset.main([*paths(source, output), *flags])
    assert snapshot(folder) == before

    code = ended.value.code
    if code == 2:  # of the parser of flags, which breaks its line
        told = capsys.readouterr().err
        assert told.startswith("usage:")
        assert told.count("error:") == 1
        message = told.partition("error:")[2]
        return " ".join(message.split())
    assert re.fullmatch("error: .+", code)
    assert len(code) < 900
    return code


def said_of_columns(capsys):
    """What the run printed of the columns: those it uses, and those that it does not."""
    printed = capsys.readouterr().out
    line = re.search("^columns.*", printed, re.MULTILINE)[0]
    used, _, unused = line.partition("; not used: ")
    return used, ast.literal_eval(unused)


# The oracles: what the script should make of texts, written independently of it.


def nfc(text):
    """Text in Unicode's form NFC."""
    return unicodedata.normalize("NFC", text)


def same(text):
    """Text as questions are compared."""
    words = nfc(text).casefold().split()
    return " ".join(words)


def question(record):
    """What a record asks, as it is compared."""
    return same(record["instruction"]), same(record["input"])


def questions_of(records):
    """All that records ask."""
    return {question(record) for record in records}


def trimmed(text):
    """Text as it is written: outer blanks go, but not the indentation of several lines."""
    seen = [char for char in text if char not in UNSEEN]
    if not "".join(seen).strip():
        return ""
    if "\n" not in text.strip():
        return text.strip()
    first, _, rest = text.partition("\n")
    while not first.strip():
        text = rest
        first, _, rest = text.partition("\n")
    return text.rstrip()


def usable(records):
    """The usable records, trimmed, each once, in order; and the number of the others."""
    found = {}
    unusable = 0
    for record in records:
        instruction = trimmed(record["instruction"])
        input = trimmed(record["input"])
        output = trimmed(record["output"])
        if not instruction:  # then the input is the question
            instruction = input
            input = ""
        if not instruction or not output or "\0" in instruction + input + output:
            unusable += 1
            continue
        texts = [instruction, input, output]
        compared = tuple(nfc(text).strip() for text in texts)
        found.setdefault(compared, row(*texts))
    return list(found.values()), unusable


def judged(turns):
    """The record that the turns (role, text) of a chat make, or None."""
    systems = []
    spoken = []
    roles = [""]
    for role, said in turns:
        if "\0" in said:
            return None
        text = trimmed(said)
        if not text:
            continue
        roles.append(role)
        if role != "system":
            spoken.append(text)
        elif text not in systems:
            systems.append(text)

    speakers = [role for role in roles[1:] if role != "system"]
    if speakers != ["user", "assistant"] or roles[-1] == "system":
        return None
    asked, answered = spoken
    asked = "\n\n".join([*systems, asked])
    return row(asked, output=answered)


# A text with markers for each form: a? is the question, x the answer.
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

STAND_IN = "\ue000"  # for NUL, which the csv module of Python 3.10 does not write
ALIKE = [
    "a",
    "A ",
    "b",
    "é",
    "e\u0301",
    "what?",
    "What ?",
    "",
    " ",
]
AWKWARD = ",;\t|\"\n\r \\'={}[]:\x00\x0b\x1c\x85\xa0\u2028\ufeffaAéßİ한😀e\u0301"
any_letter = st.characters(exclude_categories=["Cs"], exclude_characters=STAND_IN)
awkward_letter = st.sampled_from(AWKWARD)
awkward_text = st.text(awkward_letter | any_letter, max_size=12)
any_text = awkward_text | st.sampled_from(ALIKE)
any_record = st.builds(row, any_text, any_text, any_text)
any_records = st.lists(any_record, max_size=12)


def in_utf_16(text):
    """Text as Excel saves it."""
    return text.encode("utf-16")


def zipped(text):
    """Text with a byte order mark, gzipped."""
    return gzip.compress(text.encode("utf-8-sig"))


any_packing = st.sampled_from([str.encode, in_utf_16, zipped])


def check_round_trip(rows, content):
    """A file of these rows gives all that are usable, on two sides, in their order."""
    found, unusable = usable(rows)
    if not found:
        with pytest.raises(SystemExit, match="error: .*(unusable|no rows)"):
            prepare_content(content)
        return

    result = prepare_content(content)

    assert result.counts["read"] == len(rows)
    assert len(result.rejected) == unusable
    val = [record for record in found if record not in result.train]
    train = [record for record in found if record not in val]
    assert result.train == train
    assert result.val == val
    assert not questions_of(result.train) & questions_of(result.val)
    for record in result.train + result.val:
        assert list(record) == FIELDS


SPELLINGS = [str.lower, str.upper, " {}\n".format]


@quick
@given(
    rows=any_records,
    order=st.permutations(FIELDS),
    delimiter=st.sampled_from(",;\t|"),
    spell=st.sampled_from(SPELLINGS),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    pack=any_packing,
)
def test_every_table_comes_out_as_it_went_in(rows, order, delimiter, spell, quoting, pack):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting)
    writer.writerow([*map(spell, order), "note"])
    for record in rows:
        cells = [record[name] for name in order]
        cells = [cell.replace("\0", STAND_IN) for cell in cells]
        writer.writerow([*cells, "x"])
    raw = text.getvalue().replace(STAND_IN, "\0")

    check_round_trip(rows, pack(raw))


@quick
@given(
    rows=any_records,
    form=st.sampled_from(["list", "wrapper", "objects", "lines"]),
    indent=st.sampled_from([None, 0, 2]),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    escaped=st.booleans(),
    pack=any_packing,
)
def test_every_json_comes_out_as_it_went_in(rows, form, indent, end, escaped, pack):
    if form == "lines":
        indent = None
    encoder = json.JSONEncoder(indent=indent, ensure_ascii=escaped)

    if form in ["objects", "lines"]:
        text = end.join(map(encoder.encode, rows))
    elif form == "wrapper" and rows:
        text = encoder.encode({"v": 1, "data": rows})
    else:
        text = encoder.encode(rows)

    check_round_trip(rows, pack(text))


@quick
@given(rows=any_records)
def test_every_parquet_comes_out_as_it_went_in(rows):
    columns = {}
    for name in FIELDS:
        texts = [record[name] for record in rows]
        columns[name] = pyarrow.array(texts, pyarrow.string())

    check_round_trip(rows, parquet(**columns))


# How a list of chats stands in a file; each chat is a list of turns (role, text).


def openai(turns):
    """The messages of a chat as OpenAI has them."""
    return [message(role, said) for role, said in turns]


SHAREGPT_NAMES = {
    "user": "human",
    "assistant": "gpt",
    "system": "system",
}


def sharegpt(turns):
    """The messages of a chat as ShareGPT has them."""
    messages = []
    for role, said in turns:
        name = SHAREGPT_NAMES[role]
        messages.append({"from": name, "value": said})
    return messages


def trl(turns):
    """A row of TRL: the completion begins where the assistant first speaks."""
    roles = [role for role, _ in turns]
    first = [*roles, "assistant"].index("assistant")
    messages = openai(turns)
    return {"prompt": messages[:first], "completion": messages[first:]}


def lines_of_openai(chats):
    """Chats as JSON lines."""
    return jsonl(chat(*openai(turns)) for turns in chats)


def list_of_sharegpt(chats):
    """Chats in one list of JSON."""
    rows = [{"conversations": sharegpt(turns)} for turns in chats]
    return json.dumps(rows)


def lines_of_trl(chats):
    """Chats as JSON lines, prompt and completion apart."""
    return jsonl(map(trl, chats))


def cells_of_json(chats):
    """Chats in the cells of a table, as JSON."""
    rows = [["chat"]]
    for turns in chats:
        cell = json.dumps(openai(turns))
        rows.append([cell])
    return table(rows)


def cells_of_python(chats):
    """Chats in the cells of a table, as Python writes them."""
    cells = [[sharegpt(turns)] for turns in chats]
    rows = [["chat"], *cells]
    return table(rows)


def parquet_of_openai(chats):
    """Chats in the column of a parquet file."""
    return parquet(messages=list(map(openai, chats)))


FORMS_OF_CHATS = [
    lines_of_openai,
    list_of_sharegpt,
    lines_of_trl,
    cells_of_json,
    cells_of_python,
    parquet_of_openai,
]
any_role = st.sampled_from(["user", "assistant", "system"])
any_turn = st.tuples(any_role, any_text)
any_turns = st.lists(any_turn, max_size=4)
any_question = st.tuples(st.just("user"), any_text)
any_answer = st.tuples(st.just("assistant"), any_text)
any_exchange = st.tuples(any_question, any_answer).map(list)
any_chats = st.lists(any_turns | any_exchange, max_size=6)


@quick
@given(chats=any_chats, form=st.sampled_from(FORMS_OF_CHATS))
def test_every_chat_is_judged_alike_whatever_its_form(chats, form):
    good = [("user", "a good one"), ("assistant", "an answer")]
    chats = [*chats, good]
    records = [judged(turns) for turns in chats]
    wanted, _ = usable(filter(None, records))

    result = prepare_content(form(chats), "--val-split", "0")

    assert result.train == wanted
    assert len(result.rejected) == records.count(None)
    assert result.counts["read"] == len(chats)


any_words = st.text("abc ,.:;!?#<>|é한\n", min_size=1).filter(str.strip)
any_form = st.sampled_from(list(TEXTS_OF_CHATS.values()))


@quick
@given(asked=any_words, answered=any_words, form=any_form)
def test_whatever_stands_between_markers_comes_out(asked, answered, form):
    before, _, rest = form.partition("a?")
    between, after = re.split(r"\bx\b", rest)
    item = {"text": before + asked + between + answered + after}

    result = prepare_content([item], "--val-split", "0")

    record = result.train[0]
    assert record["instruction"].strip() == asked.strip()
    assert record["output"].strip() == answered.strip()


any_string = any_text | st.text(max_size=3)
any_number = st.booleans() | st.integers() | st.floats()
any_scalar = any_string | any_number | st.none()


def values_of(inner):
    """Lists and objects of such values."""
    lists = st.lists(inner, max_size=3)
    objects = st.dictionaries(any_text, inner, max_size=3)
    return lists | objects


NAMES = [
    "instruction",
    "Prompt",
    "input",
    "context",
    "output",
    "ANSWER",
    "note",
]
any_value = st.recursive(any_scalar, values_of, max_leaves=6)
any_row = st.dictionaries(st.sampled_from(NAMES), any_value)
any_key = st.sampled_from(["role", "from", "content", "value"])
any_message = st.dictionaries(any_key, any_value)
any_messages = st.lists(any_message, max_size=3)
any_chat = st.fixed_dictionaries({"messages": any_messages | any_value})
any_items = st.lists(any_row | any_chat | any_value, max_size=8)


@quick
@given(items=any_items, data=st.data())
def test_of_any_json_lines_every_row_is_written_repeated_or_rejected(items, data):
    rows = [row("q"), row("r"), row("lone \ud800")]
    wrapped = [{"x": item} for item in items[:2]]
    mixed = data.draw(st.permutations(rows + wrapped + items))
    content = jsonl([row("q"), *mixed])

    result = prepare_content(content)

    assert result.counts["read"] >= content.count("\n")  # a list of objects is several rows
    for item in result.rejected:
        assert item["row"] >= 1
        assert item["reason"]
        assert "raw" in item


SCRAPS = [
    b'"',
    b'""',
    b",",
    b"\r",
    b"\n",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"\\u",
    b"\\ud800",
    b"\0",
    b"1e999",
    b'"output"',
    b'{"a": 1}\n',
    b"instruction",
    b"output,",
    b"a,x\n",
    b"instruction,output\n",
    b"\x1f\x8b",
    b"\xff\xfe",
    b"PAR1",
    b"PK\3\4",
    b'[{"instruction": "a", "input": null, "output": 1.5}, {"output": [[true]]}]',
]
SOME_FLAGS = [
    [],
    ["--strict"],
    ["--encoding", "utf-16"],
    ["--delimiter", "|"],
]
PACKED = gzip.compress(SCRAPS[-1], mtime=0)
any_scrap = st.sampled_from([*SCRAPS, PACKED]) | st.binary(max_size=5)
any_bytes = st.lists(any_scrap, max_size=9).map(b"".join)


@settings(quick, max_examples=300)
@given(
    head=st.sampled_from([b"", b"prompt,output\r\n"]),
    raw=any_bytes,
    cut=st.sampled_from([None, 0, 1, 3]),  # bytes that lack at the end of a gzip; None: no gzip
    flags=st.sampled_from(SOME_FLAGS),
)
def test_whatever_the_bytes_it_ends_well_or_in_one_line(head, raw, cut, flags):
    content = head + raw
    if cut is not None:
        packed = gzip.compress(content, mtime=0)
        content = packed[: len(packed) - cut]

    try:
        prepare_content(content, *flags)
    except SystemExit as ended:
        assert re.fullmatch("error: .+", ended.code)


# ----------------------------------------------------------------------------- files of all kinds

QA = [
    {"instruction": "a?", "input": "", "output": "x"},
    {"instruction": "b?", "input": "", "output": "y"},
]

# What stands in a file; each holds the two records of QA.
TABLES = {
    "a comma": "instruction,output\na?,x\nb?,y\n",
    "a semicolon": "Question;Answer\na?;x\nb?;y\n",
    "a tab": " QUERY \tResponse\na?\tx\nb?\ty\n",
    "a bar": "prompt|completion\na?|x\nb?|y\n",
    "blanks after the commas": 'question, answer\n"a?", "x"\nb?, y\n',
    "empty cells beyond the header": "question,answer\na?,x,\nb?,y,,,\n",
    "blank cells beyond the header": "question,answer,\t\na?,x,\t\nb?,y,\t,\t\n",
    "blank lines": "\n\nquestion,answer\n\na?,x\n\n\nb?,y\n\n",
    "CR alone": "question,answer\ra?,x\rb?,y\r",
    "a mark twice": "\ufeff\ufeffquestion,answer\na?,x\nb?,y\n",
    "Excel's sep line": "sep=;\r\nquestion;answer\r\na?;x\r\nb?;y\r\n",
    "Excel's sep line, a strange mark": '"sep=^"\nquestion^answer\na?^x\nb?^y\n',
    "names in the plural": "Questions,ANSWERS\na?,x\nb?,y\n",
    "a plural of its own": "queries,answers\na?,x\nb?,y\n",
    "the question in input": "instruction,input,output\n,a?,x\n,b?,y\n",
    "no instruction at all": "Context,Response\na?,x\nb?,y\n",
}
JSONS = {
    "a list": (
        '[{"instruction": "a?", "input": "", "output": "x"}, '
        '{"instruction": "b?", "input": "", "output": "y"}]'
    ),
    "a list, an item a line": (
        '[\n{"instruction": "a?", "output": "x"},\n{"instruction": "b?", "output": "y"}\n]'
    ),
    "lines": '{"prompt": "a?", "completion": "x"}\n{"prompt": "b?", "completion": "y"}\n',
    "lines with BOM and CRLF": '\ufeff{"q": "a?", "a": "x"}\r\n{"q": "b?", "a": "y"}\r\n',
    "lines, joined, each with its mark": (
        '\ufeff{"q": "a?", "a": "x"}\n\ufeff{"q": "b?", "a": "y"}\n'
    ),
    "objects over many lines": '{\n  "q": "a?",\n  "a": "x"\n}\n{\n  "q": "b?",\n  "a": "y"\n}',
    "objects broken by hand": '{ "q": "a?",\n  "a": "x" }\n{ "q": "b?",\n  "a": "y" }\n',
    "objects without a break": '{"q": "a?", "a": "x"}{"q": "b?", "a": "y"}',
    "lists one after another": '[{"q": "a?", "a": "x"}]\n[{"q": "b?", "a": "y"}]\n',
    "lists without a break": '[{"q": "a?", "a": "x"}][{"q": "b?", "a": "y"}]',
    "a wrapper": '{"version": 1, "data": [{"q": "a?", "a": "x"}, {"q": "b?", "a": "y"}]}',
    "a wrapper over many lines": (
        '{\n "train": [\n  {\n   "q": "a?",\n   "a": "x"\n  },\n'
        '  {\n   "q": "b?",\n   "a": "y"\n  }\n ]\n}'
    ),
    "a wrapper, an item a line": (
        '{"data": [\n{"q": "a?", "a": "x"},\n{"q": "b?", "a": "y"}\n]}\n'
    ),
    "a list in pages": (
        '{"page": 0, "pairs": [{"q": "a?", "a": "x"}]}\n'
        '{"page": 1, "pairs": [{"q": "b?", "a": "y"}]}\n'
    ),
    "wrappers in wrappers": (
        '{"v": 1, "data": [{"title": "T", "qas": [{"q": "a?", "a": "x"}, {"q": "b?", "a": "y"}]}]}'
    ),
    "problem and solution": (
        '{"problem": "a?", "solution": "x"}\n{"problem": "b?", "solution": "y"}\n'
    ),
    "user and assistant": '{"user": "a?", "assistant": "x"}\n{"user": "b?", "assistant": "y"}\n',
    "the better of two answers": (
        '{"prompt": "a?", "chosen": "x", "rejected": "-"}\n'
        '{"prompt": "b?", "chosen": "y", "rejected": "-"}\n'
    ),
    "rows beside no chat": (
        '{"messages": null, "prompt": "a?", "completion": "x"}\n'
        '{"messages": null, "prompt": "b?", "completion": "y"}\n'
    ),
    "rows beside an empty chat": (
        '{"messages": [], "prompt": "a?", "completion": "x"}\n'
        '{"messages": [], "prompt": "b?", "completion": "y"}\n'
    ),
}

ASKS = [user("a?"), user("b?")]
SAYS = [assistant("x"), assistant("y")]
CHATS = [
    [user("a?"), assistant("x")],
    [user("b?"), assistant("y")],
]
CHATS_OF_NUMPY = [
    "[{'role': 'user', 'content': 'a?'}\n {'role': 'assistant', 'content': 'x'}]",
    "[{'role': 'user', 'content': 'b?'}\n {'role': 'assistant', 'content': 'y'}]",
]
SHAREGPT = [
    [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "x"}],
    [{"from": "human", "value": "b?"}, {"from": "gpt", "value": "y"}],
]
CHATS_IN_FILES = {
    "chats of OpenAI": [
        {"messages": CHATS[0]},
        {"messages": CHATS[1]},
    ],
    "chats of ShareGPT": [
        {"conversations": SHAREGPT[0], "id": 7},
        {"conversations": SHAREGPT[1], "id": 7},
    ],
    "chats beside a prompt": [
        {"prompt": "-", "messages": CHATS[0]},
        {"prompt": "-", "messages": CHATS[1]},
    ],
    "a chat beside an answer": [
        {"answer": "-", "messages": CHATS[0]},
        {"answer": "-", "messages": CHATS[1]},
    ],
    "turns of TRL": [
        {"prompt": ASKS[:1], "completion": SAYS[:1]},
        {"prompt": ASKS[1:], "completion": SAYS[1:]},
    ],
    "turns of TRL, the better ones": [
        {"chosen": CHATS[0], "rejected": []},
        {"chosen": CHATS[1], "rejected": []},
    ],
    "turns of TRL in cells": [
        ["prompt", "completion"],
        [ASKS[:1], SAYS[:1]],
        [ASKS[1:], SAYS[1:]],
    ],
    "chats in cells, JSON": [
        ["messages"],
        [json.dumps(CHATS[0])],
        [json.dumps(CHATS[1])],
    ],
    "chats in cells, Python": [
        ["conversation"],
        [CHATS[0]],
        [CHATS[1]],
    ],
    "chats in cells, numpy": [
        ["dialogue"],
        [CHATS_OF_NUMPY[0]],
        [CHATS_OF_NUMPY[1]],
    ],
    "chats in some cells": [
        ["chat", "q", "a"],
        ["", "a?", "x"],
        [CHATS[1], "", ""],
    ],
}

PLAIN = "question,answer\na?,x\nb?,y\n"
TABBED = "sep=\t\r\nquestion\tanswer\r\na?\tx\r\nb?\ty\r\n"
BINARY = {
    "UTF-16 of Excel": TABBED.encode("utf-16"),
    "UTF-32 with its mark": PLAIN.encode("utf-32"),
    "JSON, gzipped": gzip.compress(json.dumps(QA).encode()),
    "two gzips in one": gzip.compress(b"q,a\na?,x\n") + gzip.compress(b"b?,y\n"),
    "parquet": parquet(
        question=["a?", "b?"],
        answer=["x", "y"],
        n=[1, 2],
    ),
    "parquet of bytes": parquet(
        question=[b"a?", b"b?"],
        answer=[b"x", b"y"],
    ),
    "parquet of chats": parquet(messages=CHATS),
}
FORMS = {**TABLES, **JSONS, **CHATS_IN_FILES, **BINARY}


@pytest.mark.parametrize("name", ["rows.csv", "rows.json.gz", "rows"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_read_by_what_is_in_it_whatever_its_name(tmp_path, form, name):
    records, rejected = kept(tmp_path, FORMS[form], name=name)

    assert records == QA
    assert rejected == []


NAMED = {  # what stands in the file, and what --columns says
    "columns": (
        "FRAGE,Antwort,question\na?,x,-\nb?,y,-\n",
        ["instruction=Frage", "output= antwort "],
    ),
    "a name with a line break": (
        '"Question\n","My\r\nanswer"\na?,x\nb?,y\n',
        ["output=my answer"],
    ),
    "columns beside a chat": (
        [
            {"frage": "a?", "antwort": "x", "chat": CHATS[0]},
            {"frage": "b?", "antwort": "y", "chat": CHATS[0]},
        ],
        ["instruction=frage", "output=antwort"],
    ),
    "a chat": (
        [
            {"thread": CHATS[0], "q": "-", "a": "-"},
            {"thread": CHATS[1], "q": "-", "a": "-"},
        ],
        ["messages=thread"],
    ),
    "a text": (
        [
            {"body": "### Human: a?### Assistant: x", "q": "-", "a": "-"},
            {"body": "### Human: b?### Assistant: y", "q": "-", "a": "-"},
        ],
        ["text=body"],
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_columns_that_are_named_win_over_those_that_are_known(tmp_path, case):
    content, columns = NAMED[case]

    records, rejected = kept(tmp_path, content, "--columns", *columns)

    assert records == QA
    assert rejected == []


def test_the_columns_that_are_taken_and_the_others_are_said(tmp_path, capsys):
    item = {
        "prompt": "a",
        "context": "c",
        "completion": "b",
        "id": 1,
    }

    records, _ = kept(tmp_path, [item])

    assert records == [row("a", "c", "b")]
    used, unused = said_of_columns(capsys)
    assert re.search("prompt.*instruction.*context.*input.*completion.*output", used)
    assert unused == ["id"]


CELLS = [
    "None",
    "NA",
    "NaN",
    "null",
    "007",
    "1e5",
    "1.0",
    "True",
    "-",
    "=1+1",
    'a 5" disk',
]


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_of_a_table_stays_the_text_that_it_is(tmp_path, cell):
    records, rejected = kept(tmp_path, f"prompt,answer\n{cell},{cell}\n")

    assert records == [row(cell, output=cell)]
    assert rejected == []


NUMBERS = [
    "1e5",
    "1.0",
    "111111111111111111111111",
    "-0",
    "0.10",
    "1E+2",
    "true",
    "false",
]


@pytest.mark.parametrize("layout", ["{}", "[{}]"])
@pytest.mark.parametrize("number", [*NUMBERS, "9" * 5000], ids=shortened)
def test_a_number_of_json_stays_as_it_is_written(tmp_path, number, layout):
    item = '{"prompt": "a", "answer": ' + number + "}"

    records, rejected = kept(tmp_path, layout.format(item))

    assert records == [row("a", output=number)]
    assert rejected == []


NOTHING = ["null", "NaN", '""', '" "']


@pytest.mark.parametrize("nothing", NOTHING)
def test_null_and_nan_are_empty(tmp_path, nothing):
    item = '{"prompt": "a", "input": ' + nothing + ', "output": "x"}'

    records, rejected = kept(tmp_path, item)

    assert records == [row("a", output="x")]
    assert rejected == []


def test_a_number_of_a_parquet_is_written_as_json_has_it(tmp_path):
    content = parquet(
        prompt=["a", "b", "c", "d"],
        answer=[1.5, 2.0, float("nan"), None],
    )

    records, rejected = kept(tmp_path, content)

    assert records == [
        row("a", output="1.5"),
        row("b", output="2.0"),
    ]
    assert reasons_of(rejected) == ["no output", "no output"]


def test_outer_white_space_goes_and_inner_white_space_stays(tmp_path):
    item = row("\n a  b\t", "", "- x\n  - y ")

    records, _ = kept(tmp_path, [item])

    assert records == [row("a  b", "", "- x\n  - y")]


def test_a_very_long_cell_comes_out_whole(tmp_path):
    csv.field_size_limit(131_072)  # as in a fresh process
    long = "wörter, " * 37_500 + "end"

    records, _ = kept(tmp_path, f'prompt,answer\na,"{long}"\n')

    assert records == [row("a", output=long)]


@pytest.mark.parametrize(
    "encoding, told",
    [
        ("windows-1252", "windows-1252"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16", "windows-1252"),  # the mark in the file wins
    ],
)
def test_every_text_comes_out_as_it_stands(tmp_path, encoding, told):
    content = "prompt;answer\nCafé – 5 €?;“ja”\n".encode(encoding)

    records, rejected = kept(tmp_path, content, "--encoding", told)

    assert records == [row("Café – 5 €?", output="“ja”")]
    assert rejected == []


def test_the_output_is_utf_8_and_the_rejected_rows_are_strict_json(tmp_path):
    columns = {
        "prompt": ["é  한\n😀\u2028", ""],
        "answer": ['a "b"', "x"],
        "n": [1, float("nan")],
    }

    kept(tmp_path, parquet(**columns))

    line = '{"instruction": "é  한\\n😀", "input": "", "output": "a \\"b\\""}\n'
    assert (tmp_path / "out/train.jsonl").read_bytes() == line.encode()
    rejected = (tmp_path / "out/rejected.jsonl").read_text()
    assert "NaN" not in rejected


# ------------------------------------------------------------------------ rows that can't be used

# A line between two good ones, and why it is no use.
REJECTED_IN_TABLES = {
    "a": "no output",
    ",x": "no instruction",
    "a,x,more": "more cells than columns",
    "a\0,x": "instruction has a NUL",
    "question,answer": "the header again",
    "\ufeffQuestion ,ANSWER,,": "the header again",
    '\ufeff"question","answer"': "the header again",
}
REJECTED_IN_JSON = {
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
    '{"q": "a", "a": "\\u200b"}': "no output",
    '{"prompt": "\\n\\nHuman: a?\\n\\nAssistant:", "output": "b"}': "the question holds markers",
    '{"chat": [{"from": "user", "value": "a"}, {"from": "bot", "value": "b"}], "kto_tag": false}': (
        "marked as a bad answer"
    ),
}
REJECTED_IN_JSON["[" * 100_000] = "not valid JSON"
REJECTED = {**REJECTED_IN_TABLES, **REJECTED_IN_JSON}


@pytest.mark.parametrize("line", REJECTED, ids=shortened)
def test_an_unusable_row_is_kept_aside_with_number_and_reason(tmp_path, line):
    before = json.dumps(row("two\nlines")) + "\n\n"
    after = json.dumps(row("better")) + "\n"
    if line in REJECTED_IN_TABLES:
        before = 'question,answer\n"two\nlines",an answer\n'
        after = "better,an answer\n"

    train, rejected = kept(tmp_path, before + line + "\n" + after)

    assert train == [row("two\nlines"), row("better")]
    assert numbers_of(rejected) == [3]
    assert re.match(REJECTED[line], rejected[0]["reason"])
    assert rejected[0]["raw"] or line == "null"


# The turns of a chat, and why they make no record.
REJECTED_CHATS = {
    "two exchanges": (
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        "more than one exchange",
    ),
    "one more question": (
        [("user", "a"), ("assistant", "b"), ("user", "c")],
        "more than one exchange",
    ),
    "the answer first": (
        [("assistant", "a"), ("user", "b")],
        "the assistant speaks first, or another one last",
    ),
    "no answer": (
        [("user", "a")],
        "no output",
    ),
    "an answer that is null": (
        [("user", "a"), ("assistant", None)],
        "no output",
    ),
    "an empty question": (
        [("user", ""), ("assistant", "b")],
        "no instruction",
    ),
    "a system message and an empty question": (
        [("system", "s"), ("user", " "), ("assistant", "b")],
        "no instruction",
    ),
    "unknown speakers": (
        [("customer", "a"), ("agent", "b")],
        "unknown role: customer",
    ),
    "a picture beside a text": (
        [("user", [{"text": "a", "image": "c.png"}]), ("assistant", "b")],
        "a picture",
    ),
    "a tool": (
        [("user", "a"), ("tool", "5"), ("assistant", "b")],
        "a call of a tool",
    ),
    "a function": (
        [("user", "a"), ("function", "5"), ("assistant", "b")],
        "a call of a tool",
    ),
    "a call of a function": (
        [("user", "a"), ("function_call", "5"), ("assistant", "b")],
        "a call of a tool",
    ),
    "what a tool showed": (
        [("user", "a"), ("observation", "5"), ("assistant", "b")],
        "a call of a tool",
    ),
    "the tool of Llama 3": (
        [("user", "a"), ("ipython", "5"), ("assistant", "b")],
        "a call of a tool",
    ),
}


@pytest.mark.parametrize("case", REJECTED_CHATS)
def test_a_chat_that_is_no_exchange_of_two_is_kept_aside_with_its_reason(tmp_path, case):
    turns, reason = REJECTED_CHATS[case]
    item = chat(*openai(turns))

    train, rejected = kept(tmp_path, [row("good"), item])

    assert train == [row("good")]
    assert numbers_of(rejected) == [2]
    assert rejected[0]["reason"].startswith(reason)


# What an answer holds beside its role, and why it is no use.
UNUSABLE = {
    "a call of a tool": (
        {"content": "b", "tool_calls": [{"id": 1}]},
        "a call of a tool",
    ),
    "a call of a function": (
        {"content": None, "function_call": {"name": "f"}},
        "a call of a tool",
    ),
    "a picture": (
        {"content": [{"type": "text", "text": "b"}, {"type": "image_url"}]},
        "a picture",
    ),
    "a picture by its key": (
        {"content": [{"image": "c.png"}]},
        "a picture",
    ),
    "a sound": (
        {"content": [{"type": "input_audio"}]},
        "a sound",
    ),
    "a film": (
        {"content": [{"type": "video", "video": "c"}]},
        "a film",
    ),
    "a part that is no text": (
        {"content": ["b", {"type": "file"}]},
        "a part that is no text",
    ),
    "marked, OpenAI": (
        {"content": "b", "weight": 0},
        "marked as a bad answer, or as not to be trained",
    ),
    "marked, LLaMA-Factory": (
        {"content": "b", "loss_weight": 0.0},
        "marked as a bad answer, or as not to be trained",
    ),
    "marked, axolotl": (
        {"content": "b", "train": False},
        "marked as a bad answer, or as not to be trained",
    ),
    "an object": (
        {"content": {"a": 1}},
        "output is not text",
    ),
    "thoughts alone": (
        {"content": [{"type": "thinking", "thinking": "c"}]},
        "no output",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_a_message_holds_that_no_record_can_rejects_the_row_for_that_reason(tmp_path, case):
    held, reason = UNUSABLE[case]
    answer = {"role": "assistant", **held}
    item = chat(user("a"), answer)

    train, rejected = kept(tmp_path, [row("good"), item])

    assert train == [row("good")]
    assert reasons_of(rejected) == [reason]


# A row that looks suspicious and is good: a is the question, b the answer.
GOOD_ROWS = [
    {"q": "a", "a": "b", "label": 0},  # a class
    {"q": "a", "a": "b", "label": True},
    {"prompt": "a", "completion": "b", "label": "1"},
    {"q": "a", "a": "b", "images": [], "audio": None, "history": []},
    {"q": "a", "a": "b", "image": "nginx:1.25", "history": "[]"},
    {"query": "a", "answer": "b", "text": "a page"},
    {"messages": "USER: a ASSISTANT: b</s>"},
    {"text": "USER: a ASSISTANT: b</s>", "label": True},
    {"text": "USER: a ASSISTANT: b</s>", "images": [], "audio": None, "history": []},
]
# A chat that does.
GOOD_CHATS = [
    [
        {"role": "user", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "weight": 1, "tool_calls": None},
    ],
    [
        {"role": "user", "content": ["a"]},
        {"role": "assistant", "content": [{"text": "b"}]},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "text", "value": "b"}]},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "reasoning_text", "text": "hm"}, "b"]},
    ],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ],
    [
        {"role": "Human", "content": "a"},
        {"role": "Chatgpt", "content": "b"},
    ],
    [
        {"role": "prompter", "content": "a"},
        {"role": "model", "content": "b"},
    ],
]


@pytest.mark.parametrize("item", GOOD_ROWS, ids=str)
def test_a_row_that_only_looks_unusable_is_used(tmp_path, item):
    records, rejected = kept(tmp_path, [item])

    assert records == [row("a", output="b")]
    assert rejected == []


@pytest.mark.parametrize("messages", GOOD_CHATS, ids=str)
def test_a_chat_that_only_looks_unusable_is_used(tmp_path, messages):
    records, rejected = kept(tmp_path, [{"messages": messages}])

    assert records == [row("a", output="b")]
    assert rejected == []


ANSWERS_IN_JSON = [
    '[{"from": "a", "to": "b"}]',
    '[{"name": "A", "value": "1"}]',
    '[{"role": "admin", "verbs": ["get"]}]',
    '{"role": "x"}',
    "{'text': 'b'}",
    "[1]",
]


@pytest.mark.parametrize("answer", ANSWERS_IN_JSON)
def test_an_answer_that_is_json_stays_the_text_that_it_is(tmp_path, answer):
    wanted = row("a", output=answer)

    records, _ = kept(tmp_path, [wanted])
    assert records == [wanted]

    records, _ = kept(tmp_path, [["question", "answer"], ["a", answer]])
    assert records == [wanted]


def test_what_messages_hold_beside_their_text_is_said_to_be_not_used(tmp_path, capsys):
    answer = {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "c"},
            {"type": "text", "text": "b"},
        ],
        "reasoning_content": "d",
        "name": "",
    }
    item = {
        "messages": [user("a"), answer],
        "id": 1,
        "input": "",
    }

    records, _ = kept(tmp_path, [item])

    assert records == [row("a", output="b")]
    _, unused = said_of_columns(capsys)
    assert sorted(unused) == [
        "id",
        "reasoning_content of a message",
        "thinking of a message",
    ]


@pytest.mark.parametrize("form", TEXTS_OF_CHATS)
def test_one_text_with_markers_is_a_question_and_its_answer(tmp_path, form):
    text = TEXTS_OF_CHATS[form]
    wanted = row("a?", output="x")

    records, _ = kept(tmp_path, [{"text": text, "id": 1}])
    assert records == [wanted]

    records, _ = kept(tmp_path, [["messages"], [text]])
    assert records == [wanted]


LLAMA_2 = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\na? [/INST] x </s>"
LLAMA_3 = (
    "<|begin_of_text|>"
    "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\na?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nx<|eot_id|>"
)
ALPACA = (
    "### Instruction:\na?\n\n### Input:\nb\n\n"
    "### Response:\n  x\n    <s>y</s> ### Human: z"
)  # fmt: skip
RICH_TEXTS = {
    "Llama 2": (LLAMA_2, row("Be brief.\n\na?", output="x")),
    "Llama 3": (LLAMA_3, row("Be brief.\n\na?", output="x")),
    "Alpaca": (ALPACA, row("a?", "b", "  x\n    <s>y</s> ### Human: z")),
}


@pytest.mark.parametrize("form", RICH_TEXTS)
def test_a_text_may_have_a_system_prompt_an_input_and_markers_of_other_forms(tmp_path, form):
    text, wanted = RICH_TEXTS[form]

    records, rejected = kept(tmp_path, [{"text": text}])

    assert records == [wanted]
    assert rejected == []


# What a row holds beside question and answer, its turns, and the question of its record.
SYSTEM_PROMPTS = [
    (
        {"system": "s"},
        [("user", "a"), ("assistant", "b")],
        "s\n\na",
    ),
    (
        {},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
        "s\n\na",
    ),
    (
        {"system": "s"},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
        "s\n\na",
    ),
    (
        {"system": ""},
        [("system", "t"), ("system", "u"), ("user", "a"), ("assistant", "b")],
        "t\n\nu\n\na",
    ),
    (
        {},
        [("developer", "s"), ("user", "a"), ("assistant", "b")],
        "s\n\na",
    ),
    (
        {},
        [("developer", ""), ("User", "a"), ("Assistant", "b")],
        "a",
    ),
]


@pytest.mark.parametrize("beside, turns, asked", SYSTEM_PROMPTS)
def test_a_system_prompt_beside_question_or_chat_goes_before_the_question_once(
    tmp_path, beside, turns, asked
):
    messages = openai(turns)

    records, rejected = kept(tmp_path, [{**beside, "messages": messages}])

    assert records == [row(asked, output="b")]
    assert rejected == []


def test_a_system_prompt_beside_a_question_goes_before_it(tmp_path):
    item = {
        "System Prompt": "s",
        "question": "a",
        "context": "c",
        "answer": "b",
    }

    records, _ = kept(tmp_path, [item])

    assert records == [row("s\n\na", "c", "b")]


def test_system_prompt_and_history_may_be_named(tmp_path):
    rows = [
        {"q": "a", "a": "b", "persona": "s"},
        {"q": "c", "a": "d", "log": [["e", "f"]]},
    ]

    train, rejected = kept(tmp_path, rows, "--columns", "system=Persona", "history=log")

    assert train == [row("s\n\na", output="b")]
    assert rejected[0]["reason"].startswith("more than one exchange")


def test_the_names_that_the_readme_calls_known_are_known():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cell = re.search(r"^\| other names([^|]*)\|", readme, re.MULTILINE)[1]
    told = cell.split(";")
    for field, part in zip(["instruction", "output", "input"], told):
        names = re.findall(r"`(\w+)`", part)
        assert names
        assert set(names) <= set(prepare_dataset.KNOWN[field])


def test_the_ruler_of_a_markdown_table_is_a_rejected_row(tmp_path):
    text = "| n | Question | Answer |\n|:--|:-:|---|\n| 1 | an answer? | - |\n"

    train, rejected = kept(tmp_path, text)

    assert train == [row("an answer?", output="-")]
    assert numbers_of(rejected) == [2]
    assert rejected[0]["reason"] == "the ruler of a Markdown table"


OBJECT = '{\n  "prompt": "%s",\n  "output": "an answer"\n}\n'
EXTRA_COMMA = 8
if sys.version_info >= (3, 13):  # it points at the comma, no longer behind it
    EXTRA_COMMA = 7
BROKEN_OBJECTS = {  # one among objects over many lines, and the line of its fault
    '{\n  "prompt": "b",\n  "output": "x",\n}\n': EXTRA_COMMA,
    '{\n  "prompt": "b"\n  "output": "x"\n}\n': 7,
    '{\n  "prompt": "b",\n  "output": "x\n}\n': 7,
    '{\n  "prompt": "b",\n  "output": "x"\n': 8,
    '{\n  "prompt": "b",\n  "output": "x"\n},\n': 8,
    "# a remark\n": 5,
}


@pytest.mark.parametrize("broken", BROKEN_OBJECTS, ids=repr)
def test_one_broken_object_among_objects_over_many_lines_costs_itself_alone(tmp_path, broken):
    text = OBJECT % "a" + broken + OBJECT % "c" + OBJECT % "d"

    train, rejected = kept(tmp_path, text)

    assert train == [row("a"), row("c"), row("d")]
    assert len(rejected) == 1
    assert rejected[0]["row"] == BROKEN_OBJECTS[broken]
    assert rejected[0]["reason"] == "not valid JSON"
    assert rejected[0]["raw"] == broken.rstrip()


def test_lines_above_and_among_json_lines_are_rejected_rows(tmp_path):
    first = jsonl([row("a")])
    second = jsonl([row("b")])

    train, rejected = kept(tmp_path, "// a remark\n" + first + "# another\n" + second)

    assert train == [row("a"), row("b")]
    assert numbers_of(rejected) == [1, 3]


def test_what_stands_beside_a_list_of_rows_is_of_each_row(tmp_path):
    page = {
        "context": "c",
        "title": "t",
        "qas": [
            {"question": "a", "answer": "b"},
            {"question": "a", "answer": "b", "context": "its own"},
            {"question": "d"},
        ],
    }

    train, rejected = kept(tmp_path, [page])

    assert train == [row("a", "c", "b"), row("a", "its own", "b")]
    assert rejected[0]["raw"] == {
        "context": "c",
        "title": "t",
        "question": "d",
    }


NO_WRAPPERS = [
    {"prompt": "p", "pairs": [{"q": "a", "a": "x"}]},
    {"first": [{"q": "a", "a": "x"}], "second": [{"q": "b", "a": "y"}]},
]


@pytest.mark.parametrize("item", NO_WRAPPERS, ids=str)
def test_an_object_that_is_a_row_or_has_two_lists_is_not_read_by_its_lists(tmp_path, item):
    train, rejected = kept(tmp_path, [row("good"), item])

    assert train == [row("good")]
    assert len(rejected) == 1


BROKEN_LINES = [
    '{"prompt": "a", "outp',
    '{"prompt": "a", "output": "x"},',
]


@pytest.mark.parametrize("first", BROKEN_LINES)
def test_a_broken_first_line_costs_that_line_alone(tmp_path, first):
    rest = jsonl([row("a"), row("b")])

    train, rejected = kept(tmp_path, first + "\n" + rest)

    assert train == [row("a"), row("b")]
    assert numbers_of(rejected) == [1]


AROUND_THE_LIMIT = range(900, 1000, 4)


@pytest.mark.parametrize("depth", [10, 300, *AROUND_THE_LIMIT, 3000, 30_000])
def test_deeply_nested_values_are_kept_aside_at_any_depth(tmp_path, depth):
    nested = '{"prompt": "a", "output": ' + "[" * depth + "]" * depth + "}\n"

    good = jsonl([row("good")])

    train, rejected = kept(tmp_path, good + nested)

    assert train == [row("good")]
    assert len(rejected) == 1


def test_a_list_counts_by_position_and_a_later_run_leaves_no_rows_of_an_earlier_one(tmp_path):
    rows = [row("a"), 7, row(""), row("b")]

    _, rejected = kept(tmp_path, json.dumps(rows))
    assert numbers_of(rejected) == [2, 3]

    _, rejected = kept(tmp_path, [row("a")], "--strict")
    assert rejected == []


MEANT = {  # the file, (question, answer) of each record, reasons of the rejected rows
    "an indented chat in a cell": (
        [
            ["prompt", "completion"],
            ["a?", '[\n {\n  "role": "assistant",\n  "content": "l1\\nl2"\n }\n]'],
        ],
        [("a?", "l1\nl2")],
        [],
    ),
    "a chat in a cell, with a line break in a text": (
        [
            ["prompt", "completion"],
            ["a?", '[{"role": "assistant", "content": "l1\nl2"}]'],
        ],
        [("a?", "l1\nl2")],
        [],
    ),
    "a chat in a cell that is cut off": (
        [
            ["prompt", "completion"],
            ["a?", '[{"role": "assistant", "content'],
            ["b?", "c"],
        ],
        [("b?", "c")],
        ["a chat that is cut off or broken"],
    ),
    "SQuAD's answers, written by pandas": (
        [
            ["question", "answers"],
            ["a?", "{'text': array(['b'], dtype=object), 'answer_start': array([1])}"],
            ["c?", "{'text': ['d', 'e'], 'answer_start': [1, 2]}"],
            ["What does it print?", "{'text': 'b'}"],
        ],
        [("What does it print?", "{'text': 'b'}")],
        ["output is an object, not text", "output is an object, not text"],
    ),
    "columns without a name at the end": (
        "question,answer,,\na?,b,,\nc?,d, and e,\n",
        [("a?", "b")],
        ["more cells than columns"],
    ),
    "columns with a blank name at the end": (
        "question,answer,\t\na?,b,\nc?,d, and e\n",
        [("a?", "b")],
        ["more cells than columns"],
    ),
    "a prompt that is told again in chosen": (
        [
            {
                "prompt": "a?",
                "chosen": [
                    {"role": "user", "content": "a?"},
                    {"role": "assistant", "content": "b"},
                ],
                "rejected": [
                    {"role": "user", "content": "a?"},
                    {"role": "assistant", "content": "c"},
                ],
            }
        ],
        [("a?", "b")],
        [],
    ),
}


@pytest.mark.parametrize("kind", MEANT)
def test_what_people_bring_is_read_as_it_is_meant(tmp_path, kind):
    content, wanted, reasons = MEANT[kind]

    records, rejected = kept(tmp_path, content)

    pairs = [(record["instruction"], record["output"]) for record in records]
    assert pairs == wanted
    assert reasons_of(rejected) == reasons


def test_a_column_used_in_some_rows_alone_is_said_to_be_not_used_in_others(tmp_path, capsys):
    task = "Answer the question."
    rows = [
        {"instruction": "", "question": "a?", "answer": "b"},
        {"instruction": task, "question": "c?", "answer": "d"},
        {"instruction": task, "question": "e?", "answer": "f"},
    ]

    kept(tmp_path, rows)

    _, unused = said_of_columns(capsys)
    assert "question (in some rows)" in unused


CHOICES = "question,A,B,C,correct\na?,x,y,z,z\n"


def test_the_first_of_several_choices_is_no_answer(tmp_path):
    with pytest.raises(SystemExit, match="correct"):
        kept(tmp_path, CHOICES)


def test_of_several_choices_the_column_that_is_named_is_the_answer(tmp_path):
    records, _ = kept(tmp_path, CHOICES, "--columns", "output=correct")
    assert records == [row("a?", output="z")]

    records, _ = kept(tmp_path, CHOICES, "--columns", "output=A")
    assert records == [row("a?", output="x")]


# ------------------------------------------------------------------------- repeats and the split


def test_repeats_are_found_across_unicode_form_and_outer_blanks_and_case_counts(tmp_path):
    first = row("Où  est\nle Pod?", "Ä", "LÀ")
    again = row(unicodedata.normalize("NFD", " Où  est\nle Pod? "), "A\u0308", "LÀ\t")
    others = [
        row("git branch -d"),
        row("git branch -D"),
        row("git  branch -d"),
    ]

    records, _ = kept(tmp_path, [first, again, *others])

    assert records == [first, *others]


def test_the_same_letters_in_other_fields_are_no_repeat(tmp_path):
    rows = [
        row("a", "b", "cd"),
        row("a", "bc", "d"),
        row("ab", "", "cd"),
        row("ab", "cd", "cd"),
    ]

    records, _ = kept(tmp_path, rows)

    assert records == rows


def differing_rows(numbers):
    """Rows that ask the questions of these numbers and answer all differently."""
    return [row(f"q {asked}", output=str(n)) for n, asked in enumerate(numbers)]


any_numbers = st.lists(st.integers(0, 7), min_size=1, max_size=40)
rows_of_few_questions = any_numbers.map(differing_rows)
any_seed = st.integers(-(2**70), 2**70)


@quick
@given(
    rows=rows_of_few_questions,
    share=st.floats(0, 1, exclude_max=True),
    seed=any_seed,
)
def test_a_question_never_falls_on_both_sides_and_val_has_its_share(rows, share, seed):
    sizes = Counter(map(question, rows)).values()
    largest = max(sizes)
    repeated = [size for size in sizes if size > 1]
    flags = ["--val-split", str(share), "--seed", str(seed)]

    counts, train, val, _ = prepare_content(rows, *flags)

    assert train
    assert not questions_of(train) & questions_of(val)
    assert counts["conflicts"] == sum(repeated)
    assert bool(val) == (share > 0 and len(sizes) > 1)
    wanted = round(len(rows) * share)
    assert abs(len(val) - wanted) <= largest
    if val and largest == 1:
        at_least_one = max(wanted, 1)
        assert len(val) == min(at_least_one, len(rows) - 1)


@quick
@given(rows=rows_of_few_questions, seed=any_seed)
def test_the_same_seed_writes_the_same_files(rows, seed):
    flags = ["--val-split", "0.5", "--seed", str(seed)]

    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, "rows"), rows)
        prepare(source, f"{folder}/a", *flags)
        prepare(source, f"{folder}/b", *flags)
        assert snapshot(f"{folder}/a") == snapshot(f"{folder}/b")


def test_the_seed_decides_the_split_and_not_the_order_of_the_file():
    rows = [row(f"question {n}") for n in range(100)]
    mixed = random.Random(0).sample(rows, 100)

    val = prepare_content(rows, "--seed", "1").val
    val_of_mixed = prepare_content(mixed, "--seed", "1").val
    val_of_other_seed = prepare_content(rows, "--seed", "2").val

    assert questions_of(val) == questions_of(val_of_mixed)
    assert questions_of(val) != questions_of(val_of_other_seed)
    assert val != val_of_mixed  # each in the order of its file


def test_more_rows_move_few_old_ones():
    rows = [row(f"question {n}") for n in range(220)]
    old = questions_of(prepare_content(rows[:200]).val)
    new = questions_of(prepare_content(rows).val)

    assert len(old) == 20
    assert len(new) == 22
    moved = (old ^ new) & questions_of(rows[:200])
    assert len(moved) <= 8


def test_a_question_whose_key_ends_in_nul_bytes_is_held_out_like_any_other():
    rows = [row(f"question {n}") for n in range(2000)]  # of 2,000 keys some end in a zero byte

    counts = prepare_content(rows, "--val-split", "0.5").counts

    assert counts["train"] == 1000
    assert counts["val"] == 1000


def test_val_left_empty_by_one_question_is_said(capsys):
    rows = differing_rows([0, 0, 0, 0, 0])

    result = prepare_content(rows, "--val-split", "0.5")

    assert result.val == []
    assert result.counts["conflicts"] == 5
    assert "all rows ask the same question" in capsys.readouterr().out


def test_the_summary_says_what_the_files_hold(tmp_path, capsys):
    rows = [row(f"question {n}", output="one two three") for n in range(10)]
    conflict = row("question 1", output="one two")
    repeat = row(" question 2", output="one two three")
    bad = [
        row("", output="x"),
        row("x", output=""),
        row("y", output=""),
    ]
    source = write(tmp_path / "rows", [*rows, conflict, repeat, *bad])

    counts = prepare(source, tmp_path / "out", "--val-split", "0.2").counts

    assert list(counts.items()) == [
        ("read", 15),
        ("rejected", 3),
        ("duplicates", 1),
        ("conflicts", 2),
        ("train", 9),
        ("val", 2),
    ]
    told = capsys.readouterr().out.splitlines()
    line_of = {}
    for line in told:
        first_word = line.split()[0]
        line_of[first_word] = line
    for name, count in counts.items():
        assert line_of[name].split()[1] == str(count)
    assert "no output: 2" in line_of["rejected"]
    assert "no instruction: 1" in line_of["rejected"]
    assert str(tmp_path / "out/train.jsonl") in line_of["train"]
    assert "median 5" in line_of["length"]
    assert "max 5 " in line_of["length"]
    assert told[-1] == f"next: python lora_finetune.py --dataset {tmp_path / 'out'}"


# ------------------------------------------------------- never new rows beside those of an old run

OldRun = namedtuple("OldRun", ["folder", "source", "before"])


@pytest.fixture
def old(tmp_path):
    """A folder that an earlier run wrote, a new source, and what stood in the folder before."""
    folder = tmp_path / "out"
    old_rows = [row(f"old {n}") for n in range(20)]
    source = write(tmp_path / "old.jsonl", [*old_rows, row("")])
    prepare(source, folder)

    new_rows = [row(f"new {n}", "x" * 99) for n in range(900)]
    source = write(tmp_path / "new.jsonl", new_rows)
    return OldRun(folder, source, snapshot(folder))


def test_a_full_disk_leaves_the_old_files(old):
    with pytest.raises(SystemExit, match="^error: .*File too large"), largest_file(8192):
        prepare(old.source, old.folder)

    assert snapshot(old.folder) == old.before


# Runs main, and dies when so many files of the folder were opened, removed or renamed.
KILLED = """
import os
import sys
import prepare_dataset

step, folder, *flags = sys.argv[1:]
left = int(step)

def die(event, args):
    global left
    if event not in ["open", "os.remove", "os.rename"]:
        return
    if not str(args[0]).startswith(folder):
        return
    if left == 0:
        os._exit(9)
    left -= 1

sys.addaudithook(die)
prepare_dataset.main(flags)
"""


@pytest.mark.parametrize("step", range(10))  # the lock, three files to open, to remove, to rename
def test_a_killed_run_leaves_no_new_rows_beside_old_ones_and_the_next_run_cleans_up(old, step):
    prepare(old.source, old.folder.parent / "wanted")
    wanted = snapshot(old.folder.parent / "wanted")

    script = [sys.executable, "-c", KILLED]
    arguments = [str(step), str(old.folder), *paths(old.source, old.folder)]
    ended = subprocess.run([*script, *arguments], check=False, cwd=ROOT)

    assert ended.returncode == 9
    after = snapshot(old.folder)
    if after.get("train.jsonl") is not None:
        assert after["train.jsonl"] == old.before["train.jsonl"]
        assert after["val.jsonl"] == old.before["val.jsonl"]

    prepare(old.source, old.folder)
    assert snapshot(old.folder) == wanted


def test_two_runs_on_one_folder_write_one_after_the_other(old):
    with ThreadPoolExecutor(1) as thread:
        with filelock.FileLock(old.folder / ".lock"):  # as another run has it while it writes
            run = thread.submit(prepare, old.source, old.folder)
            assert wait([run], timeout=1.5).not_done
            assert snapshot(old.folder) == old.before
        assert run.result().counts["train"] == 810


def test_a_read_only_folder_leaves_the_old_files(old):
    old.folder.chmod(0o555)
    try:
        with pytest.raises(SystemExit, match="^error: .*Permission denied"):
            without_privileges(lambda: prepare(old.source, old.folder))
    finally:
        old.folder.chmod(0o755)

    assert snapshot(old.folder) == old.before


def test_other_files_in_the_folder_stay_the_source_among_them(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row("a"), row("b")])
    before = snapshot(tmp_path)

    prepare(source, tmp_path)
    prepare(source, tmp_path / "a/b/c")  # parents are made

    assert before.items() <= snapshot(tmp_path).items()


# --------------------------------------------------------------------------------- user's mistakes

WRONG_TEXTS = {  # what stands in the file, and what the message must name
    "an empty file": ("", "no rows"),
    "a header alone": ("question,answer\n", "no rows"),
    "a PDF": ("%PDF-1.7\n", "PDF.*CSV"),
    "other columns": ("id,text\n1,x\n", "'id', 'text'.*--columns instruction="),
    "other keys": (
        [{"frage": "a", "antwort": "x"}],
        "'frage', 'antwort'.*--columns instruction=",
    ),
    "no answers": ("question,reply\na,x\n", "no output.*'question', 'reply'.*--columns"),
    "two columns of a name": ("question,answer,Answer\na,x,y\n", "'answer', 'Answer'.*rename"),
    "text above the header": ("# of the desk\nquestion,answer\na,x\n", "of the desk.*header"),
    "no header": ("What is it?,An editor.\nAnd that?,A shell.\n", "What is it.*header"),
    "a page of HTML": ("<html><body>question, answer</body></html>", "<html>"),
    "prose": ("Once upon a time, there was\na line.\n", "Once upon.*--columns"),
    "one text": ([{"id": 1, "text": "a page"}], "'id', 'text'.*--columns"),
    "only pictures": ([{"q": "a", "a": "b", "image": [1]}], "1 of 1.*a picture"),
    "two lists of rows": (
        '{"a": [{"q": "a", "a": "x"}], "b": [{"q": "b", "a": "y"}]}',
        "'a', 'b'",
    ),
    "commas between objects": ('{\n"q": "a"\n},\n{\n"q": "b"\n}', "not valid JSON"),
    "an inner quote": (
        'question,answer\na,x\nb,y\nc,"It prints "ready" and\nthen, "d",\n',
        "row 4.*quote",
    ),
    "an inner quote in row 2": ('question,answer\n"a "b" c",x\n', "row 2.*quote"),
    "a quote with a backslash": ('question,answer\na,x\nb,"say \\"hi\\""\n', "row 3.*quote"),
    "a quote never closed": ('question,answer\na,x\nb,"z\nd,w\n', "row 3.*quote"),
    "a broken list": (
        '[\n{"question": "a"},\n{"question": "b",}]',
        "line 3: not valid JSON",
    ),
    "a list cut short": (
        '[{"question": "a", "answer": "x"}, {"question": "b", "an',
        "line 1: not valid JSON",
    ),
    "lines with commas": (
        '{"q": "a", "a": "x"},\n{"q": "b", "a": "y"},\n',
        "2 of 2.*line 1: not valid JSON",
    ),
    "mostly broken lines": ('{"q": "a", "a": "x"}\n{\n{\n', "2 of 3.*line 2: not valid JSON"),
    "a comma too many": ('{"q": "a", "a": "b",}\n', "not valid JSON.*look for comments"),
    "a comment": ('{"q": "a" /* x */, "a": "b"}\n', "not valid JSON.*look for comments"),
    "single quotes": ("{'q': 'a', 'a': 'b'}\n", "not valid JSON.*look for comments"),
}

GOOD = "question,answer\na,x\nb,y\n"
CHINESE = "question,answer\n什么是污点?,一个标记。\n什么是探针?,它重启容器。\n"
JAPANESE = "question,answer\nポッドとは何ですか?,コンテナの集まりです。\n"
RUSSIAN = "question,answer\nЧто такое узел?,Машина для подов.\n"
GARBAGE = random.Random(0).randbytes(9000).hex()
ONE_ROW = {"question": ["a"], "answer": ["x"]}
FAR_BELOW = GOOD * 9000 + CHINESE * 9000
ZIPPED = gzip.compress((GOOD + GARBAGE).encode())
WRONG_BYTES = {
    "an empty parquet": (
        parquet(question=[], answer=[]),
        "no rows",
    ),
    "two columns of a name in parquet": (
        parquet(**ONE_ROW, Answer=["y"]),
        "'answer', 'Answer'.*rename",
    ),
    "a parquet cut short": (
        parquet(**ONE_ROW)[:-9],
        "arquet",
    ),
    "a parquet with a damaged footer": (
        b"PAR1\x0f\1\0\0\0PAR1",
        "damaged parquet",
    ),
    "Excel": (b"PK\3\4.[Content_Types].xml.xl/workbook.xml", "Excel.*CSV"),
    "Word": (b"PK\3\4.[Content_Types].xml.word/document.xml", "Word.*CSV"),
    "a zip": (b"PK\3\4rows.csv", "zip.*unpack"),
    "a tar": (b"rows.csv".ljust(257, b"\0") + b"ustar", "tar.*unpack"),
    "a pickle": (pickle.dumps(GOOD), "pickle.*to_csv"),
    "a pickle, gzipped": (gzip.compress(pickle.dumps(GOOD)), "pickle"),
    "feather": (b"ARROW1\0\0", "feather.*to_csv"),
    "an arrow stream": (b"\xff\xff\xff\xff\x10\0", "arrow.*to_csv"),
    "SQLite": (b"SQLite format 3\0", "SQLite.*-csv"),
    "ORC": (b"ORC\n", "ORC.*to_csv"),
    "binary": (bytes(range(1, 256)) * 9, "--encoding"),
    "a gzip cut short": (ZIPPED[:3000], "end-of-stream"),
    "a gzip gone bad": (
        ZIPPED[:5000] + bytes(99) + ZIPPED[5099:],
        "rows",
    ),
    "UTF-16 without mark": (GOOD.encode("utf-16-le"), "--encoding utf-16-le"),
    "UTF-16 without mark, the other": (GOOD.encode("utf-16-be"), "--encoding utf-16-be"),
    "gb18030": (CHINESE.encode("gb18030"), "line 2.*--encoding gb18030"),
    "gb18030, far below": (FAR_BELOW.encode("gb18030"), "gb18030"),
    "shift_jis": (JAPANESE.encode("shift_jis"), "line 2.*--encoding cp932"),
    "Cyrillic": (RUSSIAN.encode("windows-1251"), "line 2.*-1251 .Cyrillic"),
    "latin text": ("question,answer\né,x".encode("latin-1"), "--encoding windows-1252"),
}
WRONG_FILES = {**WRONG_TEXTS, **WRONG_BYTES}


@pytest.mark.parametrize("mistake", WRONG_FILES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(tmp_path, capsys, mistake):
    content, named = WRONG_FILES[mistake]
    source = write(tmp_path / "rows", content)

    message = error_of(capsys, source, tmp_path / "out")

    assert re.search(named, message)


@pytest.mark.parametrize("source", ["none.csv", "folder"])
def test_an_input_that_is_no_file_ends_in_one_line(tmp_path, capsys, source):
    (tmp_path / "folder").mkdir()

    message = error_of(capsys, tmp_path / source, tmp_path / "out")

    assert f"{source}: no such file" in message


WRONG_FLAGS = [  # the flags, and what the message must name
    (["--strict"], "row/line 4: no output"),
    (["--encoding", "base64"], "--encoding base64"),
    (["--encoding", "utf-16"], "rows: .*not utf-16 text"),
    (["--columns", "input=notes"], "no column .'notes'.*'question'"),
    (["--columns", "instruction=answer"], "no output.*--columns"),
    (["--columns", "output= "], "--columns output="),
    (["--val-split", "1"], "--val-split 1"),
    (["--colums", "output=x"], "--colums"),
]


@pytest.mark.parametrize("flags, named", WRONG_FLAGS, ids=str)
def test_a_mistaken_flag_ends_in_one_line_and_writes_nothing(tmp_path, capsys, flags, named):
    source = write(tmp_path / "rows", "question,answer\na,x\nb,y\nc,\n")

    message = error_of(capsys, source, tmp_path / "out", *flags)

    assert re.search(named, message)


BAD_BYTE = {  # where ~ is the one byte that is no UTF-8, and its line
    "question,answer\nWhat?,a caf~\nGröße?,Über 5 €\nWo?,Überall\n": 2,
    'question,answer\nGröße?,Über 5 €\n"Où\n?",là\nWhat?,a caf~': 5,
    "question,answer\nWas?,ein caf~\nGröße?,egal\n": 2,
    "question,answer\nWo?,Überall\n" + "a,x\n" * 50_000 + "What?,a caf~\n": 50_003,
    '{"question": "Größe?", "answer": "Übergröße"}\n{"question": "~", "answer": "x"}\n': 2,
}


@pytest.mark.parametrize("text", BAD_BYTE, ids=shortened)
def test_one_bad_byte_in_utf_8_leads_to_its_line_and_to_no_other_encoding(tmp_path, capsys, text):
    content = text.encode().replace(b"~", b"\xe9")
    source = write(tmp_path / "rows", content)

    message = error_of(capsys, source, tmp_path / "out")

    assert f"line {BAD_BYTE[text]}: not utf-8" in message
    assert "windows" not in message


# Texts that several encodings fit: to name one would send people to a wrong one.
UNSURE = [
    ("란?,모든.", "cp949"),
    ("一個?,節點標記.", "big5"),
    ("узел?,сервис.", "koi8_r"),
]


@pytest.mark.parametrize("text, encoding", UNSURE)
def test_no_encoding_is_named_that_is_not_sure(tmp_path, capsys, text, encoding):
    source = write(tmp_path / "rows", f"question,answer\n{text}\n".encode(encoding))

    message = error_of(capsys, source, tmp_path / "out")

    assert "how was it saved?" in message
    assert "seems" not in message


def test_without_charset_normalizer_the_line_does_without_a_guess(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    source = write(tmp_path / "rows", CHINESE.encode("gb18030"))

    message = error_of(capsys, source, tmp_path / "out")

    assert "line 2: not utf-8" in message
    assert "gb18030" not in message


TOO_LONG = "x" * 300


@pytest.mark.parametrize("output", ["taken", "taken/out", "taken/deep/out", TOO_LONG])
def test_an_output_that_can_not_be_a_folder_ends_in_one_line(tmp_path, capsys, output):
    source = write(tmp_path / "rows.csv", GOOD)
    write(tmp_path / "taken", "mine")

    message = error_of(capsys, source, tmp_path / output)

    assert output in message


@pytest.mark.parametrize("name", ["train.jsonl", "val.jsonl", "rejected.jsonl"])
@pytest.mark.parametrize("way", ["", "./deep/..", "link"])
def test_an_input_that_would_be_overwritten_is_refused(tmp_path, capsys, name, way):
    source = write(tmp_path / name, [row("a"), row("b")])
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)

    message = error_of(capsys, source, tmp_path / way)

    assert name in message
    assert "--output" in message


def run_script(*flags, cwd):
    """Run the script as at the shell; -X importtime tells on stderr what it loads."""
    command = [sys.executable, "-X", "importtime", ROOT / "prepare_dataset.py", *flags]
    return subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True)


def test_a_mistake_at_the_shell_shows_no_traceback_and_help_loads_no_pandas(tmp_path):
    ended = run_script("--input", "none.csv", cwd=tmp_path)
    told = re.sub("^import time:.*\n", "", ended.stderr, flags=re.MULTILINE)
    assert ended.returncode == 1
    assert re.fullmatch("error: none.csv.*\n", told)

    ended = run_script("--help", cwd=tmp_path)
    assert "import time:" in ended.stderr
    assert not re.search(r"\b(pandas|pyarrow|torch|transformers)\b", ended.stderr)
