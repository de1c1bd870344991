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
from pathlib import Path

import pytest
from conftest import llama_tokenizer
from transformers import AutoTokenizer

import evaluate
import lora_finetune
import prepare_dataset

ROOT = Path(lora_finetune.__file__).parent
THINGS = "Pod Service Node Ingress Secret Volume Job Probe Label Taint Quota Helm".split()
PROMISED = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_config.json",
    "training_log.jsonl",
}


def jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_csv(path, rows=30):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["instruction", "input", "output"])
        for n in range(rows):
            thing = THINGS[n % len(THINGS)]
            question = [f"What is {thing} {n}?", "Be brief." * (n % 4 == 0)]
            table.writerow([*question, f"{thing}, number {n} of a cluster.\n" + "Yes. " * (n % 9)])
    return str(path)


def write_jsonl(path, rows):
    records = [
        {"instruction": f"What is {n}?", "input": "", "output": f"Number {n}." + " Yes." * (n % 7)}
        for n in range(rows)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# ------------------------------------------------------------------------------- one process


@pytest.fixture(
    scope="module",
    params=["llama-zephyr", "llama-chatml", "llama-llama3", "llama-none", "phi-zephyr", "phi-none"],
)
def pipeline(request, tiny_models, tmp_path_factory):
    """The folder in which the three scripts ran, one after another, with what each returned."""
    folder = tmp_path_factory.mktemp("pipeline")
    model = tiny_models(*request.param.split("-"))
    source = write_csv(folder / "raw.csv")
    split = ["--val-split", "0.2", "--seed", "3"]
    prepared = prepare_dataset.main(
        ["--input", source, "--output", str(folder / "prepared"), *split]
    )
    flags = [
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--gradient-accumulation-steps",
        "2",
        "--learning-rate",
        "0.01",
    ]
    paths = ["--dataset", str(folder / "prepared"), "--output", str(folder / "adapter")]
    trained = lora_finetune.main([*flags, *paths, "--model", model])
    flags = ["--adapter", str(folder / "adapter"), "--max-new-tokens", "6"]
    paths = ["--val-data", str(folder / "prepared/val.jsonl"), "--output", str(folder / "e.json")]
    compared = evaluate.main([*flags, *paths])
    return folder, prepared, trained, compared, request.param


def test_each_stage_takes_what_the_one_before_wrote(pipeline):
    folder, prepared, trained, compared, _ = pipeline
    assert (prepared["train"], prepared["val"]) == (24, 6)
    assert trained["step"] == 6  # 2 epochs of 24 rows, 8 a step
    assert compared["perplexity"]["rows"] == 6
    assert PROMISED <= set(os.listdir(folder / "adapter"))
    assert not [name for name in os.listdir(folder / "adapter") if name.startswith("checkpoint")]
    assert (folder / "e.json").exists() and (folder / "e.html").exists()


def test_last_validation_loss_is_the_log_of_the_perplexity_evaluate_finds(pipeline):
    folder, _, trained, compared, _ = pipeline
    losses = [
        e["eval_loss"] for e in jsonl(folder / "adapter/training_log.jsonl") if "eval_loss" in e
    ]
    assert len(losses) == 3  # one before the first step, one an epoch
    written = json.loads((folder / "e.json").read_text(encoding="utf-8"))["perplexity"]
    assert losses[-1] == pytest.approx(math.log(written["finetuned"]), rel=1e-5)
    assert losses[-1] == pytest.approx(trained["eval_loss"], abs=1e-9)
    assert written == compared["perplexity"]


def test_training_helps_on_rows_it_never_saw(pipeline):
    folder, _, _, compared, _ = pipeline
    log = [entry for entry in jsonl(folder / "adapter/training_log.jsonl") if "loss" in entry]
    assert log[-1]["loss"] < log[0]["loss"]
    assert compared["perplexity"]["ratio"] < 1
    train = {(row["instruction"], row["input"]) for row in jsonl(folder / "prepared/train.jsonl")}
    val = {(row["instruction"], row["input"]) for row in jsonl(folder / "prepared/val.jsonl")}
    assert len(val) == 6 and not train & val


def test_adapter_folder_brings_the_chat_template_to_evaluate(pipeline):
    folder, _, _, _, model = pipeline
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    chat = [{"role": "user", "content": "Why?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    begin = {
        "zephyr": "<|user|>\nWhy?",
        "chatml": "<|im_start|>user\nWhy?",
        "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nWhy?",
        "none": "### Instruction:\nWhy?",
    }
    assert prompt.startswith(begin[model.split("-")[1]])


def test_the_base_is_computed_in_nf4_in_both(pipeline):
    folder = pipeline[0]
    trained = json.loads((folder / "adapter/training_config.json").read_text())
    compared = json.loads((folder / "e.json").read_text(encoding="utf-8"))
    assert trained["arguments"]["load_in_4bit"] is compared["settings"]["load_in_4bit"] is True
    assert trained["arguments"]["precision"] == compared["settings"]["precision"] == "fp32"


def test_adapter_holds_lora_weights_of_the_named_layers_only(pipeline):
    from safetensors.torch import load_file

    weights = load_file(pipeline[0] / "adapter/adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 2  # layers x modules x (A, B)
    assert all(re.search(r"\.(q_proj|v_proj)\.lora_[AB]\.", name) for name in weights)
    assert all(weight.isfinite().all() and weight.any() for weight in weights.values())


@pytest.mark.parametrize("legacy", [True, False])
def test_the_saved_tokenizer_splits_as_the_one_of_training(tiny, tmp_path, legacy):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "\n": 5, "\u2581a": 6}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tokenizer = llama_tokenizer(vocab, [("\u2581", "a")], legacy)
    tokenizer.chat_template = AutoTokenizer.from_pretrained(tiny).chat_template
    tokenizer.init_kwargs["legacy"] = legacy
    folder = shutil.copytree(tiny, tmp_path / "model")
    tokenizer.save_pretrained(folder)
    paths = ["--dataset", write_jsonl(tmp_path / "d.jsonl", 4), "--output", str(tmp_path / "out")]
    lora_finetune.main(["--model", str(folder), *paths, "--max-steps", "1"])
    text = "<s> a</s>\n a</s>a"
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder)(text) == tokenizer(text) == saved(text)


# ------------------------------------------------------------------------------- two processes


DISTURBED = """
import os, runpy, time, torch
step, look_up = torch.optim.AdamW.step, torch.nn.Embedding.forward
second = os.environ["RANK"] == "1"
{}
runpy.run_path({!r}, run_name="__main__")
"""


def two_processes(folder, *flags, disturbed=""):
    """Run lora_finetune.py in two processes over gloo, after some lines that disturb it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    script = folder / "disturbed.py"
    script.write_text(DISTURBED.format(disturbed, str(ROOT / "lora_finetune.py")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command = [sys.executable, *launch, str(script), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            stdout, stderr = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher then ends its two
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def run_flags(tiny, data, val, output):
    flags = "--lora-dropout 0 --epochs 2 --gradient-accumulation-steps 2"
    paths = ["--model", tiny, "--dataset", data, "--val-data", val, "--output", str(output)]
    return [*flags.split(), *paths]


def test_eight_answers_learned_by_heart_come_back_word_for_word_and_stop(able, tmp_path):
    answers = {
        f"What is a {thing}?": f"{thing}!\n  It is number {len(thing)}." for thing in THINGS[:8]
    }
    rows = [{"instruction": q, "input": "", "output": a} for q, a in answers.items()]
    (tmp_path / "eight.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.json").write_text(json.dumps(list(answers)))
    paths = ["--model", able, "--dataset", tmp_path / "eight.jsonl", "--output", tmp_path / "out"]
    learn = "--max-steps 80 --learning-rate 5e-3 --batch-size 4 --gradient-accumulation-steps 2"
    layers = "--target-modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    lora_finetune.main([*map(str, paths), *learn.split(), *layers.split()])
    ask = ["--adapter", tmp_path / "out", "--prompts", tmp_path / "prompts.json"]
    evaluate.main([*map(str, ask), "--output", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())["prompts"]
    assert {result["prompt"]: result["finetuned"] for result in results} == answers
    assert all(result["finetuned_stopped"] for result in results)


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


# of 8 rows a step, the last one of an epoch has 3 or 1
@pytest.mark.parametrize("rows, disturbed", [(19, NO_ROOM), (17, "")], ids=["no room", "1 row"])
def test_two_processes_give_the_loss_curve_of_one(tiny, tmp_path, rows, disturbed):
    data, val = write_jsonl(tmp_path / "d.jsonl", rows), write_jsonl(tmp_path / "v.jsonl", 5)
    one = run_flags(tiny, data, val, tmp_path / "one")
    lora_finetune.main([*one, "--batch-size", "4"])
    two = run_flags(tiny, data, val, tmp_path / "two")
    done = two_processes(tmp_path, *two, "--batch-size", "2", disturbed=disturbed)
    assert done.returncode == 0, done.stderr[-3000:]

    alone, together = (jsonl(tmp_path / name / "training_log.jsonl") for name in ("one", "two"))
    assert [entry["step"] for entry in together] == [0, 1, 2, 3, 3, 4, 5, 6, 6]  # one log
    for a, b in zip(alone, together, strict=True):
        assert set(a) == set(b)
        for key in {"step", "loss", "eval_loss", "learning_rate", "epoch"} & set(a):
            assert b[key] == pytest.approx(a[key], rel=1e-6)
        if "grad_norm" in a:
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    one, two = ({p.name for p in (tmp_path / n).glob("[!.]*")} for n in ("one", "two"))
    assert one == two  # one adapter
    # the first process alone speaks, and no library adds to it
    assert done.stdout.count("saved ") == done.stdout.count("next: python evaluate.py") == 1
    assert len(re.findall(r"^ +\d+ +\d\.\d\d +\d+\.\d{4} ", done.stdout, re.MULTILINE)) == 6
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "data, disturbed, says",
    [
        ("d.jsonl", HAD_ENOUGH, "had enough"),
        ("no.jsonl", "time.sleep(not second)", "no.jsonl"),
    ],
    ids=["in the second process alone", "in both, the first late"],
)
def test_an_error_ends_both_processes_and_is_told_once(tiny, tmp_path, data, disturbed, says):
    write_jsonl(tmp_path / "d.jsonl", 19)
    paths = tmp_path / data, tmp_path / "d.jsonl", tmp_path / "out"
    done = two_processes(tmp_path, *run_flags(tiny, *paths), disturbed=disturbed)
    assert done.returncode != 0
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert says in told and "saved " not in done.stdout
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
