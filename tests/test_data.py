"""The rows in data/ are whole, different, of the promised length, and their code is valid."""

import ast
import csv
import hashlib
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml

import prepare_dataset

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ["instruction", "input", "output"]
with open(ROOT / "data/sample_dataset.jsonl", encoding="utf-8") as file:
    SAMPLE = list(map(json.loads, file))
with open(ROOT / "data/raw_qa.csv", encoding="utf-8", newline="") as file:
    RAW = list(csv.DictReader(file, strict=True))
ROWS = [(f"sample {n}", row) for n, row in enumerate(SAMPLE, 1)]
ROWS += [(f"raw {n}", row) for n, row in enumerate(RAW, 2)]
# versions that current clusters no longer serve
REMOVED = re.compile(
    r"(?<![\w.])(extensions/v1beta1|apps/v1beta[12]|autoscaling/v2beta[12]|batch/v(1beta|2alpha)1"
    r"|policy/v1beta1|flowcontrol\.apiserver\.k8s\.io/v1beta|rbac\.authorization\.k8s\.io/v1(alpha|beta)1"
    r"|(admissionregistration|api(extensions|registration)|authentication|authorization|certificates"
    r"|coordination|discovery|events|networking|node|scheduling|(snapshot\.)?storage)\.k8s\.io/v1beta1)"
)


def blocks(language):
    """(where, text) of every fenced block of this language in an answer or an input."""
    return [
        (name, field, block)
        for name, row in ROWS
        for field in ("output", "input")
        for block in re.findall(rf"^```{language}\n(.*?)^```", row[field], re.DOTALL | re.MULTILINE)
    ]


def folded(text):
    return " ".join(re.findall(r"\w+", text.casefold()))


def test_the_sample_has_25_rows_and_the_raw_file_200_of_which_50_bring_an_input():
    assert (len(SAMPLE), len(RAW)) == (25, 200)
    assert sum(bool(row["input"]) for row in RAW) >= 50
    assert len(blocks("yaml")) >= 10 and len(blocks("bash")) >= 3


@pytest.mark.parametrize("name, row", ROWS)
def test_a_row_is_stripped_has_25_to_150_words_closed_fences_and_no_removed_api(name, row):
    assert list(row) == FIELDS and row["instruction"]
    assert all(value == value.strip() for value in row.values())
    assert 25 <= len(row["output"].split()) <= 150
    assert len(re.findall(r"^```", row["output"], re.MULTILINE)) % 2 == 0
    assert not REMOVED.search(row["output"])


def test_no_row_stands_twice_across_both_files():
    asked = Counter((folded(row["instruction"]), folded(row["input"])) for _, row in ROWS)
    answered = Counter(folded(row["output"]) for _, row in ROWS)
    assert [key for key, count in asked.items() if count > 1] == []
    assert [key for key, count in answered.items() if count > 1] == []


def test_no_row_asks_what_the_evaluation_asks():
    tree = ast.parse((ROOT / "evaluate.py").read_text(encoding="utf-8"))
    questions = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "QUESTIONS"
    )
    assert len(questions) == 10
    assert not {*map(folded, questions)} & {folded(row["instruction"]) for _, row in ROWS}


@pytest.mark.parametrize("name, field, block", blocks("yaml"))
def test_a_yaml_block_parses(name, field, block):
    documents = list(yaml.safe_load_all(block))
    assert documents and all(isinstance(document, dict | list) for document in documents)


@pytest.mark.parametrize("name, field, block", blocks("bash"))
def test_a_bash_block_parses(name, field, block):
    ended = subprocess.run(["bash", "-n"], check=False, input=block, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("name, rows", [("sample_dataset.jsonl", 25), ("raw_qa.csv", 200)])
def test_every_row_is_usable_and_none_conflicts(tmp_path, name, rows):
    counts = prepare_dataset.main(["--input", str(ROOT / "data" / name), "--output", str(tmp_path)])
    assert (counts["read"], counts["train"] + counts["val"]) == (rows, rows)
    assert (counts["rejected"], counts["duplicates"], counts["conflicts"]) == (0, 0, 0)


def test_the_split_of_the_raw_file_is_the_one_that_was_measured(tmp_path):
    prepare_dataset.main(["--input", str(ROOT / "data/raw_qa.csv"), "--output", str(tmp_path)])
    digest = hashlib.sha256((tmp_path / "val.jsonl").read_bytes()).hexdigest()
    assert digest == "158737f8cc132f586b41c9f58c82c3d3970daedf258acb769da9e8e0ad1e7d1d"
