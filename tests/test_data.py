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
    SAMPLE = [json.loads(line) for line in file]
with open(ROOT / "data/raw_qa.csv", encoding="utf-8", newline="") as file:
    RAW = list(csv.DictReader(file, strict=True))

ROWS = {}  # by file and line
for number, row in enumerate(SAMPLE, 1):
    ROWS[f"sample {number}"] = row
for number, row in enumerate(RAW, 2):
    ROWS[f"raw {number}"] = row

REMOVED_APIS = [  # versions that current clusters no longer serve
    "extensions/v1beta1",
    "apps/v1beta1",
    "apps/v1beta2",
    "autoscaling/v2beta1",
    "autoscaling/v2beta2",
    "batch/v1beta1",
    "batch/v2alpha1",
    "policy/v1beta1",
    "admissionregistration.k8s.io/v1beta1",
    "apiextensions.k8s.io/v1beta1",
    "apiregistration.k8s.io/v1beta1",
    "authentication.k8s.io/v1beta1",
    "authorization.k8s.io/v1beta1",
    "certificates.k8s.io/v1beta1",
    "coordination.k8s.io/v1beta1",
    "discovery.k8s.io/v1beta1",
    "events.k8s.io/v1beta1",
    "flowcontrol.apiserver.k8s.io/v1beta",
    "networking.k8s.io/v1beta1",
    "node.k8s.io/v1beta1",
    "rbac.authorization.k8s.io/v1alpha1",
    "rbac.authorization.k8s.io/v1beta1",
    "scheduling.k8s.io/v1beta1",
    "snapshot.storage.k8s.io/v1beta1",
    "storage.k8s.io/v1beta1",
]


def blocks(language):
    """The fenced blocks of a language in all answers and inputs, each with its row and field."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    found = []
    for name, row in ROWS.items():
        for field in ["output", "input"]:
            for block in fence.findall(row[field]):
                found.append((name, field, block))
    return found


def folded(text):
    """The words of a text, without regard to case and marks."""
    words = re.findall(r"\w+", text.casefold())
    return " ".join(words)


def repeated(items):
    """The items that stand more than once in a list."""
    counts = Counter(items)
    return [item for item in counts if counts[item] > 1]


def test_the_sample_has_25_rows_and_the_raw_file_200_of_which_50_bring_an_input():
    inputs = [row["input"] for row in RAW if row["input"]]

    assert len(SAMPLE) == 25
    assert len(RAW) == 200
    assert len(inputs) >= 50
    assert len(blocks("yaml")) >= 10
    assert len(blocks("bash")) >= 3


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_stripped_has_25_to_150_words_closed_fences_and_no_removed_api(name):
    row = ROWS[name]
    output = row["output"]

    assert list(row) == FIELDS
    assert row["instruction"]
    for value in row.values():
        assert value == value.strip()
    assert 25 <= len(output.split()) <= 150
    fences = re.findall(r"^```", output, re.MULTILINE)
    assert len(fences) % 2 == 0
    for api in REMOVED_APIS:
        assert not re.search(r"(?<![\w.])" + re.escape(api), output)


def test_no_row_stands_twice_across_both_files():
    asked = []
    answered = []
    for row in ROWS.values():
        question = folded(row["instruction"])
        asked.append((question, folded(row["input"])))
        answered.append(folded(row["output"]))

    assert repeated(asked) == []
    assert repeated(answered) == []


def test_no_row_asks_what_the_evaluation_asks():
    source = (ROOT / "evaluate.py").read_text(encoding="utf-8")
    constants = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            constants[node.targets[0].id] = node.value
    questions = ast.literal_eval(constants["QUESTIONS"])

    assert len(questions) == 10
    asked = {folded(question) for question in questions}
    for row in ROWS.values():
        assert folded(row["instruction"]) not in asked


@pytest.mark.parametrize("name, field, block", blocks("yaml"))
def test_a_yaml_block_parses(name, field, block):
    documents = list(yaml.safe_load_all(block))

    assert documents
    for document in documents:
        assert isinstance(document, dict | list)


@pytest.mark.parametrize("name, field, block", blocks("bash"))
def test_a_bash_block_parses(name, field, block):
    ended = subprocess.run(
        ["bash", "-n"],
        check=False,
        input=block,
        capture_output=True,
        text=True,
    )

    assert ended.returncode == 0
    assert ended.stderr == ""


FILES = [("sample_dataset.jsonl", 25), ("raw_qa.csv", 200)]


@pytest.mark.parametrize("name, rows", FILES)
def test_every_row_is_usable_and_none_conflicts(tmp_path, name, rows):
    flags = ["--input", str(ROOT / "data" / name), "--output", str(tmp_path)]

    counts = prepare_dataset.main(flags)

    assert counts["read"] == rows
    assert counts["train"] + counts["val"] == rows
    assert counts["rejected"] == 0
    assert counts["duplicates"] == 0
    assert counts["conflicts"] == 0


def test_the_split_of_the_raw_file_is_the_one_that_was_measured(tmp_path):
    flags = ["--input", str(ROOT / "data/raw_qa.csv"), "--output", str(tmp_path)]

    prepare_dataset.main(flags)

    val = (tmp_path / "val.jsonl").read_bytes()
    digest = hashlib.sha256(val).hexdigest()
    assert digest == "158737f8cc132f586b41c9f58c82c3d3970daedf258acb769da9e8e0ad1e7d1d"
