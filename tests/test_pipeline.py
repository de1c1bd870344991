"""prepare -> finetune -> evaluate through files only: NF4 on the CPU, one process and two."""

import csv
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import namedtuple

import pytest
from conftest import (
    LAYERS,
    ROOT,
    argv,
    llama_tokenizer,
    llama_vocab,
    read_json,
    read_jsonl,
    write_jsonl,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer

import evaluate
import lora_finetune
import prepare_dataset

THINGS = [
    "Pod",
    "Service",
    "Node",
    "Ingress",
    "Secret",
    "Volume",
    "Job",
    "Probe",
    "Label",
    "Taint",
    "Quota",
    "Helm",
]
PROMISED = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_config.json",
    "training_log.jsonl",
}


def names_in(folder):
    """Names of what lies in a folder, but for hidden files such as a lock."""
    return {path.name for path in folder.glob("[!.]*")}


def questions_in(path):
    """The set of what a JSONL file asks."""
    return {(row["instruction"], row["input"]) for row in read_jsonl(path)}


def write_csv(path):
    """Write 30 questions, a quarter with an input, and answers of many lengths."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["instruction", "input", "output"])
        for n in range(30):
            thing = THINGS[n % len(THINGS)]
            about = "Be brief." if n % 4 == 0 else ""
            answer = f"{thing}, number {n} of a cluster.\n" + "Yes. " * (n % 9)
            table.writerow([f"What is {thing} {n}?", about, answer])


def write_records(path, count):
    """Write so many records, with answers of many lengths."""
    records = []
    for n in range(count):
        answer = f"Number {n}." + " Yes." * (n % 7)
        records.append({"instruction": f"What is {n}?", "input": "", "output": answer})
    write_jsonl(path, records)


# ------------------------------------------------------------------------------- one process

# what the three scripts returned, one after another, and the folder they wrote to
Pipeline = namedtuple("Pipeline", ["folder", "template", "prepared", "trained", "compared"])
MODELS = [
    ("llama", "zephyr"),
    ("llama", "chatml"),
    ("llama", "llama3"),
    ("llama", "none"),
    ("phi", "zephyr"),
    ("phi", "none"),
]
BEGINNINGS = {  # of a prompt by these templates
    "zephyr": "<|user|>\nWhy?",
    "chatml": "<|im_start|>user\nWhy?",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nWhy?",
    "none": "### Instruction:\nWhy?",
}


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def pipeline(request, tiny_models, tmp_path_factory):
    """The three scripts, run one after another on a tiny model."""
    architecture, template = request.param
    folder = tmp_path_factory.mktemp("pipeline")
    write_csv(folder / "raw.csv")

    prepare = argv(
        input=folder / "raw.csv",
        output=folder / "prepared",
        val_split=0.2,
        seed=3,
    )
    prepared = prepare_dataset.main(prepare)

    train = argv(
        model=tiny_models(architecture, template),
        dataset=folder / "prepared",
        output=folder / "adapter",
        epochs=2,
        batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
    )
    trained = lora_finetune.main(train)

    compare = argv(
        adapter=folder / "adapter",
        val_data=folder / "prepared/val.jsonl",
        output=folder / "results.json",
        max_new_tokens=6,
    )
    compared = evaluate.main(compare)
    return Pipeline(folder, template, prepared, trained, compared)


def test_each_stage_takes_what_the_one_before_wrote(pipeline):
    assert pipeline.prepared["train"] == 24
    assert pipeline.prepared["val"] == 6
    assert pipeline.trained["step"] == 6  # 2 epochs of 24 rows, 8 a step
    assert pipeline.compared["perplexity"]["rows"] == 6

    in_adapter = os.listdir(pipeline.folder / "adapter")
    assert PROMISED <= set(in_adapter)
    assert not [name for name in in_adapter if name.startswith("checkpoint")]
    assert (pipeline.folder / "results.json").exists()
    assert (pipeline.folder / "results.html").exists()


def test_last_validation_loss_is_the_log_of_the_perplexity_evaluate_finds(pipeline):
    log = read_jsonl(pipeline.folder / "adapter/training_log.jsonl")
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    last = losses[-1]
    written = read_json(pipeline.folder / "results.json")["perplexity"]

    assert len(losses) == 3  # one before the first step, one an epoch
    assert last == pytest.approx(math.log(written["finetuned"]), rel=1e-5)
    assert last == pytest.approx(pipeline.trained["eval_loss"], abs=1e-9)
    assert written == pipeline.compared["perplexity"]


def test_training_helps_on_rows_it_never_saw(pipeline):
    log = read_jsonl(pipeline.folder / "adapter/training_log.jsonl")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    trained_on = questions_in(pipeline.folder / "prepared/train.jsonl")
    held_out = questions_in(pipeline.folder / "prepared/val.jsonl")

    assert losses[-1] < losses[0]
    assert pipeline.compared["perplexity"]["ratio"] < 1
    assert len(held_out) == 6
    assert not trained_on & held_out


def test_adapter_folder_brings_the_chat_template_to_evaluate(pipeline):
    tokenizer = AutoTokenizer.from_pretrained(pipeline.folder / "adapter")
    chat = [{"role": "user", "content": "Why?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith(BEGINNINGS[pipeline.template])


def test_the_base_is_computed_in_nf4_in_both(pipeline):
    trained = read_json(pipeline.folder / "adapter/training_config.json")["arguments"]
    compared = read_json(pipeline.folder / "results.json")["settings"]
    for settings in [trained, compared]:
        assert settings["load_in_4bit"] is True
        assert settings["precision"] == "fp32"


def test_adapter_holds_lora_weights_of_the_named_layers_only(pipeline):
    weights = load_file(pipeline.folder / "adapter/adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 2  # layers x modules x (A, B)
    for name, weight in weights.items():
        assert re.search(r"\.(q_proj|v_proj)\.lora_[AB]\.", name)
        assert weight.isfinite().all()
        assert weight.any()


@pytest.mark.parametrize("legacy", [True, False])
def test_the_saved_tokenizer_splits_as_the_one_of_training(tiny, tmp_path, legacy):
    vocab = llama_vocab("▁", "a", "\n", "▁a")
    tokenizer = llama_tokenizer(vocab, [("▁", "a")], legacy)
    tokenizer.chat_template = AutoTokenizer.from_pretrained(tiny).chat_template
    tokenizer.init_kwargs["legacy"] = legacy
    model = shutil.copytree(tiny, tmp_path / "model")
    tokenizer.save_pretrained(model)
    data = tmp_path / "data.jsonl"
    write_records(data, 4)

    lora_finetune.main(argv(model=model, dataset=data, output=tmp_path / "out", max_steps=1))

    text = "<s> a</s>\n a</s>a"
    wanted = tokenizer(text)
    for folder in [model, tmp_path / "out"]:
        assert AutoTokenizer.from_pretrained(folder)(text) == wanted


def test_eight_answers_learned_by_heart_come_back_word_for_word_and_stop(able, tmp_path):
    answers = {}
    for thing in THINGS[:8]:
        answers[f"What is a {thing}?"] = f"{thing}!\n  It is number {len(thing)}."
    records = [{"instruction": asked, "output": answer} for asked, answer in answers.items()]
    write_jsonl(tmp_path / "eight.jsonl", records)
    (tmp_path / "prompts.json").write_text(json.dumps(list(answers)))

    train = argv(
        model=able,
        dataset=tmp_path / "eight.jsonl",
        output=tmp_path / "out",
        max_steps=80,
        learning_rate=5e-3,
        batch_size=4,
        gradient_accumulation_steps=2,
        target_modules=LAYERS,
    )
    lora_finetune.main(train)
    compare = argv(
        adapter=tmp_path / "out",
        prompts=tmp_path / "prompts.json",
        output=tmp_path / "results.json",
    )
    evaluate.main(compare)

    results = read_json(tmp_path / "results.json")["prompts"]
    assert {each["prompt"]: each["finetuned"] for each in results} == answers
    assert all(each["finetuned_stopped"] for each in results)


# ------------------------------------------------------------------------------- two processes

BEFORE = """
import os
import runpy
import time
import torch
step = torch.optim.AdamW.step
look_up = torch.nn.Embedding.forward
second = os.environ["RANK"] == "1"
"""
NO_ROOM = """
def no_room(self, ids):
    if second and torch.is_grad_enabled() and len(ids) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return look_up(self, ids)
torch.nn.Embedding.forward = no_room
"""
HAD_ENOUGH = """
def faulty(self, *args, **kwargs):
    if second:
        raise SystemExit("error: the second process has had enough")
    return step(self, *args, **kwargs)
torch.optim.AdamW.step = faulty
"""
FIRST_LATE = "time.sleep(not second)"
SAME = ["step", "loss", "eval_loss", "learning_rate", "epoch"]  # of a line of the log


def two_processes(folder, arguments, disturbed=""):
    """Run lora_finetune.py in two processes over gloo, after some lines that disturb it."""
    script = folder / "disturbed.py"
    path = str(ROOT / "lora_finetune.py")
    start = f"runpy.run_path({path!r}, run_name='__main__')"
    script.write_text(f"{BEFORE}\n{disturbed}\n{start}\n")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += argv(nproc_per_node=2, master_port=port)
    command += [str(script), *arguments]
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = "1"
    environment["HF_HUB_OFFLINE"] = "1"
    environment["CUDA_VISIBLE_DEVICES"] = ""

    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher then ends its two
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def two_epochs(model, data, val_data, output, batch_size=4):
    """The command line of a run whose losses do not depend on the number of processes."""
    return argv(
        model=model,
        dataset=data,
        val_data=val_data,
        output=output,
        lora_dropout=0,
        epochs=2,
        batch_size=batch_size,
        gradient_accumulation_steps=2,
    )


# of 8 rows a step, the last one of an epoch has 3 or 1
@pytest.mark.parametrize("rows, disturbed", [(19, NO_ROOM), (17, "")], ids=["no room", "1 row"])
def test_two_processes_give_the_loss_curve_of_one(tiny, tmp_path, rows, disturbed):
    data = tmp_path / "data.jsonl"
    val_data = tmp_path / "val.jsonl"
    write_records(data, rows)
    write_records(val_data, 5)
    one = tmp_path / "one"
    two = tmp_path / "two"

    lora_finetune.main(two_epochs(tiny, data, val_data, one, batch_size=4))
    arguments = two_epochs(tiny, data, val_data, two, batch_size=2)
    done = two_processes(tmp_path, arguments, disturbed)
    assert done.returncode == 0, done.stderr[-3000:]

    log_of_one = read_jsonl(one / "training_log.jsonl")
    log_of_two = read_jsonl(two / "training_log.jsonl")
    assert [entry["step"] for entry in log_of_two] == [0, 1, 2, 3, 3, 4, 5, 6, 6]  # one log
    for alone, together in zip(log_of_one, log_of_two, strict=True):
        assert set(alone) == set(together)
        for key in set(SAME) & set(alone):
            assert together[key] == pytest.approx(alone[key], rel=1e-6)
        if "grad_norm" in alone:
            assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert names_in(one) == names_in(two)  # one adapter

    # the first process alone speaks, and no library adds to it
    lines_of_steps = re.findall(r"^ +\d+ +\d\.\d\d +\d+\.\d{4} ", done.stdout, re.MULTILINE)
    assert len(lines_of_steps) == 6
    for said in ["saved ", "next: python evaluate.py"]:
        assert done.stdout.count(said) == 1
    for unwanted in ["Warning", "Traceback"]:
        assert unwanted not in done.stderr


@pytest.mark.parametrize(
    "data, disturbed, says",
    [
        ("data.jsonl", HAD_ENOUGH, "had enough"),
        ("none.jsonl", FIRST_LATE, "none.jsonl"),
    ],
    ids=["in the second process alone", "in both, the first late"],
)
def test_an_error_ends_both_processes_and_is_told_once(tiny, tmp_path, data, disturbed, says):
    val_data = tmp_path / "data.jsonl"
    write_records(val_data, 19)
    out = tmp_path / "out"

    done = two_processes(tmp_path, two_epochs(tiny, tmp_path / data, val_data, out), disturbed)

    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0
    assert len(errors) == 1
    assert says in errors[0]
    assert "saved " not in done.stdout
    assert not (out / "adapter_model.safetensors").exists()
