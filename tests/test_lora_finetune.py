"""What lora_finetune.py learns from, how it computes, what it keeps, and what it refuses."""

import contextlib
import gc
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import offline_model
import peft
import pytest
import torch
from conftest import ROOT, largest_file, without_privileges
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaTokenizer,
)

import lora_finetune as lf

END_OF_TURN = {"zephyr": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "none": "</s>"}
CONTROL_TOKENS = [
    "</s>",
    "<s>",
    "<unk>",
    "<|user|>",
    "<|assistant|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
]
RECORDS = [
    {"instruction": "What is a Pod?", "input": "", "output": "The smallest deployable unit."},
    {"instruction": "Name  it", "input": "kubectl get pods -A", "output": "lists\n\n  all Pods"},
    {"instruction": "Ünïcode?", "input": "日本語 🚀", "output": "ja, naïve – 한국어 🎉"},
    {"instruction": "### Response:", "input": "### Instruction:", "output": "### Response:\nx"},
    {"instruction": "a", "input": "", "output": "b"},
    {"instruction": "ends in <", "input": "<|im", "output": "|> both ends <"},
]
ROWS = [
    {
        "instruction": f"Question {i}: what does object {i * 7} do?",
        "input": "kind: Pod\n" * (i % 3),
        "output": f"It does {i} things " * (1 + (i * 5) % 7),
    }
    for i in range(16)
]
STRIPPED = [{key: text.strip() for key, text in row.items()} for row in ROWS]


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_log(folder):
    """Entries of training_log.jsonl; a NaN or Infinity in it is no JSON and fails."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = Path(folder, "training_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def flags(model, data, output, *more):
    fast = ["--no-load-in-4bit"] * ("--load-in-4bit" not in more)
    paths = ["--model", model, "--dataset", data, "--output", output, *fast, *more]
    return [str(part) for part in paths]


def adapter(folder):
    return Path(folder, "adapter_model.safetensors").read_bytes()


def snapshot(folder):
    """Each file under a folder with its content and its time."""
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in [Path(folder), *Path(folder).rglob("*")]
    }


def same_weights(one, other, tolerance):
    one, other = (load_file(Path(folder, "adapter_model.safetensors")) for folder in (one, other))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (weight - other[name]).norm() <= tolerance * weight.norm(), name


def error_line(arguments, capsys):
    """Run main, which must refuse; returns the one line that the user sees."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        lf.main([str(part) for part in arguments])
    if caught.value.code == 2:
        line = capsys.readouterr().err.strip().splitlines()[-1]
        line = line[line.index("error:") :]
    else:
        line = caught.value.code
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line, line
    return line


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS[:14])


# labels ------------------------------------------------------------------------------------------


def chat_text(tokenizer, template, record):
    """(prompt, whole text up to the end of turn) by the tokenizer's own template."""
    message = record["instruction"] + ("\n\n" + record["input"] if record["input"] else "")
    if template == "none":
        prompt = f"### Instruction:\n{message}\n\n### Response:\n"
        return prompt, prompt + record["output"] + "</s>"
    turns = [{"role": "user", "content": message}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns.append({"role": "assistant", "content": record["output"]})
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole.startswith(prompt)
    end = whole.index(END_OF_TURN[template], len(prompt) + len(record["output"]))
    return prompt, whole[: end + len(END_OF_TURN[template])]


def brute_force(tokenizer, template, record, max_length=10**9):
    """(input_ids, labels) for a record without control tokens in it."""
    prompt, whole = chat_text(tokenizer, template, record)
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = made["input_ids"], []
    for position, (left, _) in enumerate(made["offset_mapping"]):
        labels.append(ids[position] if left >= len(prompt) else -100)
    return ids[:max_length], labels[:max_length]


def encoded(folder, record, max_length=4096):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lf.encode(record, tokenizer, lf.chat_frame(tokenizer), max_length)


@pytest.mark.parametrize("template", END_OF_TURN)
@pytest.mark.parametrize("record", RECORDS + ROWS[:3], ids=range(len(RECORDS) + 3))
def test_labels_equal_a_brute_force_computation(tiny_models, template, record):
    record = {name: value.strip() for name, value in record.items()}
    folder = tiny_models(template=template)
    row = encoded(folder, record)
    ids, labels = brute_force(AutoTokenizer.from_pretrained(folder), template, record)
    assert row["input_ids"] == ids
    assert row["labels"] == labels
    assert row["length"] == len(ids)


@pytest.mark.parametrize("template", END_OF_TURN)
def test_what_is_trained_reads_answer_and_end_of_turn_and_nothing_else(tiny_models, template):
    folder = tiny_models(template=template)
    row = encoded(folder, RECORDS[0])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained = [id for id in row["labels"] if id != -100]
    assert tokenizer.decode(trained) == RECORDS[0]["output"] + END_OF_TURN[template]
    assert trained[-1] == tokenizer.convert_tokens_to_ids(END_OF_TURN[template])
    assert row["input_ids"][-len(trained) :] == trained


@pytest.mark.parametrize("template", END_OF_TURN)
def test_a_cut_row_trains_no_end_token(tiny_models, template):
    folder = tiny_models(template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN[template])
    whole = encoded(folder, ROWS[5])
    assert whole["labels"].count(end) == 1
    for length in range(1, len(whole["input_ids"])):
        row = encoded(folder, ROWS[5], length)
        assert end not in row["labels"]
        assert row["input_ids"] == whole["input_ids"][:length]
        assert row["labels"] == whole["labels"][:length]
        assert row["length"] == len(whole["input_ids"])


@pytest.mark.parametrize("template", END_OF_TURN)
def test_a_row_that_just_fits_trains_its_end_token(tiny_models, template):
    folder = tiny_models(template=template)
    whole = encoded(folder, ROWS[5])
    assert encoded(folder, ROWS[5], len(whole["input_ids"]))["labels"] == whole["labels"]


@pytest.mark.parametrize("template", END_OF_TURN)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_there_is_never_a_doubled_bos(tiny_models, tmp_path, template, adds_bos):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models(template=template))
    bos = tokenizer.bos_token_id
    if adds_bos:  # as the tokenizers of Llama do
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer("a")["input_ids"][0] == bos) == adds_bos
    wanted = template == "llama3" or (template == "none" and adds_bos)
    row = encoded(tmp_path, RECORDS[0])
    assert row["input_ids"].count(bos) == wanted
    assert (row["input_ids"][0] == bos) == wanted


TYPED = st.lists(st.sampled_from([*CONTROL_TOKENS, "Pod", " ", "<", "\n", "é"]), min_size=1)
TYPED = TYPED.map("".join).map(str.strip).filter(bool)


@pytest.mark.parametrize("template", END_OF_TURN)
@given(instruction=TYPED, extra=TYPED, output=TYPED)
@example(instruction="</s>", extra="<|user|>", output="<|im_end|>")
@example(instruction="<s>", extra="<s></s>", output="</s>")
@example(instruction="a <|im_end|>", extra="x <|eot_id|>", output="<|eot_id|> y </s>")
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_control_tokens_typed_in_a_record_stay_text(
    tiny_models, template, instruction, extra, output
):
    folder = tiny_models(template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    record = {"instruction": instruction, "input": extra, "output": output}
    row = encoded(folder, record)
    control = {tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}
    control |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    plain = encoded(folder, {"instruction": "a", "input": "b", "output": "c"})

    def controls(ids):
        return [id for id in ids if id in control]

    assert controls(row["input_ids"]) == controls(plain["input_ids"])
    assert controls(row["labels"]) == controls(plain["labels"])
    prompt, _ = chat_text(tokenizer, template, record)
    assert tokenizer.decode(row["input_ids"]) == prompt + output + END_OF_TURN[template]
    trained = [id for id in row["labels"] if id != -100]
    assert tokenizer.decode(trained) == output + END_OF_TURN[template]


# one optimizer step ------------------------------------------------------------------------------


def reference_model(folder, nf4):
    """The base alone, float32, plain attention, as its library computes it."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=config if nf4 else None,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def reference_nll(model, tokenizer, template, record, max_length=10**9):
    """(sum of -log p over the trained tokens, their number) from full logits."""
    ids, labels = brute_force(tokenizer, template, record, max_length)
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    log_p = logits.float().log_softmax(-1)
    picked = [-log_p[i - 1, label] for i, label in enumerate(labels) if label != -100]
    return torch.stack(picked).sum(), len(picked)


@pytest.fixture(scope="module")
def reference_steps(tiny_models):
    """A function (template, rows, nf4, weights) -> (loss, gradients) of one step by hand."""
    made = {}

    def step(folder, template, rows, nf4, weights):
        key = folder, len(rows), nf4
        if key not in made:
            model = peft.get_peft_model(
                reference_model(folder, nf4),
                peft.LoraConfig(
                    r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
                ),
            )
            peft.set_peft_model_state_dict(model, weights)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            parts = [reference_nll(model, tokenizer, template, row) for row in rows]
            loss = sum(nll for nll, _ in parts) / sum(count for _, count in parts)
            loss.backward()
            gradients = {
                name: weight.grad.clone()
                for name, weight in model.named_parameters()
                if weight.requires_grad
            }
            made[key] = loss.item(), gradients
        return made[key]

    return step


def one_step(monkeypatch, arguments):
    """Run one optimizer step; returns its loss, its gradients and the adapter it began with."""
    losses, gradients, weights = [], {}, {}
    put_adapter, compute_loss = lf.put_adapter, lf.ResponseTrainer.compute_loss

    def put(*args, **kwargs):
        model = put_adapter(*args, **kwargs)
        generator = torch.Generator().manual_seed(3)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero in a fresh adapter, and then lora_A has no gradient
                weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
        state = peft.get_peft_model_state_dict(model)
        weights.update({name: weight.detach().clone() for name, weight in state.items()})
        return model

    def compute(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        losses.append(loss.item())
        return loss

    def catch(self, args, state, control, model=None, **kwargs):
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                gradients[name] = weight.grad.detach().clone()

    monkeypatch.setattr(lf, "put_adapter", put)
    monkeypatch.setattr(lf, "MAX_GRAD_NORM", 1e9)
    monkeypatch.setattr(lf.ResponseTrainer, "compute_loss", compute)
    monkeypatch.setattr(lf.TrainingLog, "on_pre_optimizer_step", catch, raising=False)
    one = ["--max-steps", 1, "--warmup-ratio", 0, "--lora-dropout", 0]
    lf.main([str(part) for part in [*arguments, *one, "--lora-r", 8, "--lora-alpha", 16]])
    return losses, gradients, weights


def assert_equals_reference(losses, gradients, reference):
    loss, expected = reference
    assert sum(losses) == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert expected[name].norm() > 0
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("batch, accumulation", [(4, 4), (8, 2), (16, 1), (1, 16)])
@pytest.mark.parametrize(
    "precision, count",
    [("--no-load-in-4bit", 16), ("--load-in-4bit", 16), ("--no-load-in-4bit", 7)],
)
def test_one_step_equals_a_reference_by_hand(
    tiny, tmp_path, monkeypatch, reference_steps, batch, accumulation, precision, count
):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS[:count])
    split = ["--batch-size", batch, "--gradient-accumulation-steps", accumulation]
    losses, gradients, weights = one_step(
        monkeypatch, flags(tiny, data, tmp_path / "out", precision, *split)
    )
    nf4 = precision == "--load-in-4bit"
    loss, _ = reference = reference_steps(tiny, "zephyr", STRIPPED[:count], nf4, weights)
    assert len(losses) == 1 if accumulation == 1 else 1 < len(losses) <= accumulation
    assert read_log(tmp_path / "out")[0]["loss"] == pytest.approx(loss, rel=1e-4)
    assert_equals_reference(losses, gradients, reference)


@pytest.mark.parametrize("switch", ["--gradient-checkpointing", "--no-gradient-checkpointing"])
@pytest.mark.parametrize("architecture, template", [("phi", "none"), ("llama", "llama3")])
def test_one_step_equals_a_reference_for_other_models(
    tiny_models, tmp_path, monkeypatch, reference_steps, architecture, template, switch
):
    folder = tiny_models(architecture, template)
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    losses, gradients, weights = one_step(
        monkeypatch, flags(folder, data, tmp_path / "out", switch)
    )
    reference = reference_steps(folder, template, STRIPPED, False, weights)
    assert_equals_reference(losses, gradients, reference)


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_table_leaves_the_model_unless_the_head_needs_it(tmp_path, tied):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    model = lf.load_base(str(tmp_path), "cpu", "fp32", load_in_4bit=False).eval()
    names = dict(model.named_parameters())
    assert ("model.embed_tokens.weight" in names) == tied
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_the_scales_of_nf4_are_decoded_once_and_the_model_stays_the_same(tiny):
    plain = reference_model(tiny, nf4=True)
    model = lf.load_base(str(tiny), "cpu", "fp32", load_in_4bit=True)
    model.set_attn_implementation("eager")  # as the reference
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers and not any(layer.weight.quant_state.nested for layer in layers)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("precision", ["--no-load-in-4bit", "--load-in-4bit"])
def test_compiled_layers_share_one_graph_and_the_step_equals_the_reference(
    tmp_path, monkeypatch, reference_steps, precision
):
    folder = str(tmp_path / "model")
    offline_model.write_tiny(folder, layers=4)
    compile_with = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_with)  # the same graphs, without a C++ compiler
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    losses, gradients, weights = one_step(
        monkeypatch, flags(folder, data, tmp_path / "out", "--compile", precision)
    )
    # the first layer's input takes no gradient, so it has one of its own
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    reference = reference_steps(folder, "zephyr", STRIPPED, precision == "--load-in-4bit", weights)
    assert_equals_reference(losses, gradients, reference)


def test_compiled_layers_drop_the_same_values_as_others(tiny, data, tmp_path, monkeypatch):
    torch._dynamo.reset()
    # the default backend has a dropout of its own, which must not be used
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for name, compiled in ("plain", []), ("compiled", ["--compile"]):
        lf.main(flags(tiny, data, tmp_path / name, "--lora-dropout", "0.5", *compiled))
    plain, compiled = (
        [entry["loss"] for entry in read_log(tmp_path / name) if "loss" in entry]
        for name in ("plain", "compiled")
    )
    assert len(plain) > 1 and compiled == pytest.approx(plain, rel=1e-5)


def test_compiling_without_a_compiler_ends_in_one_line(tiny, data, tmp_path, monkeypatch):
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/no/such/compiler"))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    with pytest.raises(SystemExit) as end:
        lf.main(flags(tiny, data, tmp_path / "out", "--compile"))
    assert end.value.code.startswith("error: --compile does not work here (")
    assert "\n" not in end.value.code and "leave it out" in end.value.code


@pytest.mark.parametrize("legacy", [True, False])
def test_the_saved_tokenizer_splits_as_the_one_of_training(tiny, data, tmp_path, legacy):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "\n": 5, "\u2581a": 6}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[("\u2581", "a")], legacy=legacy)
    tokenizer.chat_template = AutoTokenizer.from_pretrained(tiny).chat_template
    tokenizer.init_kwargs["legacy"] = legacy
    folder = shutil.copytree(tiny, tmp_path / "model")
    tokenizer.save_pretrained(folder)
    lf.main(flags(folder, data, tmp_path / "out"))
    text = "<s> a</s>\n a</s>a"
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder)(text) == tokenizer(text) == saved(text)


def test_a_folder_that_another_process_writes_to_is_left_alone(tiny, data, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = folder / lf.PID
    mark.write_text(str(other.pid))
    os.utime(mark, (time.time() + 1, time.time() + 1))
    with pytest.raises(SystemExit) as end:
        lf.main(flags(tiny, data, folder))
    assert end.value.code.startswith(f"error: process {other.pid} is writing to {folder}; ")
    assert list(folder.iterdir()) == [mark]
    os.utime(mark, (1, 1))  # older than that process: its number was given anew
    lf.main(flags(tiny, data, folder))
    mark.write_text(str(other.pid))
    other.kill()
    time.sleep(0.1)  # a zombie by then
    lf.main(flags(tiny, data, folder, "--overwrite"))
    assert not mark.exists()
    other.wait()


def test_gradients_are_clipped_to_norm_one(tiny, tmp_path, monkeypatch):
    norms = []

    def catch(self, args, state, control, model=None, **kwargs):
        weights = [weight.grad for weight in model.parameters() if weight.requires_grad]
        norms.append(torch.nn.utils.get_total_norm(weights).item())

    monkeypatch.setattr(lf.TrainingLog, "on_pre_optimizer_step", catch, raising=False)
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    more = ["--max-steps", 2, "--lora-alpha", 20000]
    lf.main(flags(tiny, data, tmp_path / "out", *more))
    logged = [entry["grad_norm"] for entry in read_log(tmp_path / "out")]
    assert len(norms) == 2 and min(logged) > 2
    assert norms == pytest.approx([1, 1], abs=1e-4)


def test_a_single_step_with_the_default_warmup_learns(tiny, data, tmp_path):
    lf.main(flags(tiny, data, tmp_path / "out", "--max-steps", 1))
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(weight.any() for weight in weights.values())


# stopping and going on ---------------------------------------------------------------------------

RUN = ["--max-steps", 12, "--batch-size", 2, "--gradient-accumulation-steps", 2]


@pytest.fixture(scope="module")
def undisturbed(tiny, data, tmp_path_factory):
    """Folder of a run of twelve steps, with dropout and validation, that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    lf.main(flags(tiny, data, folder, *RUN, "--val-data", data))
    return folder


def stop_at(monkeypatch, step, signum=signal.SIGTERM):
    """Have the signal come at the end of this step."""
    on_step_end = lf.TrainingLog.on_step_end

    def stopping(self, args, state, control, **kwargs):
        if state.global_step == step:
            assert signal.getsignal(signum) not in (signal.SIG_DFL, signal.default_int_handler)
            signal.raise_signal(signum)
        return on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(lf.TrainingLog, "on_step_end", stopping)


def stopped(monkeypatch, arguments, step, signum=signal.SIGTERM):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        stop_at(patch, step, signum)
        lf.main(arguments)
    assert f"step {step} of 12" in caught.value.code and "--resume" in caught.value.code


def comparable(folder):
    timed = {"tokens_per_second", "memory_mib"}
    return [{k: v for k, v in entry.items() if k not in timed} for entry in read_log(folder)]


def assert_same_run(folder, other):
    assert adapter(folder) == adapter(other)
    assert comparable(folder) == comparable(other)
    steps = [entry["step"] for entry in read_log(folder) if "loss" in entry]
    assert steps == list(range(1, len(steps) + 1))
    assert not list(Path(folder).glob("checkpoint-*"))


@pytest.mark.parametrize("step, signum", [(1, signal.SIGINT), (5, signal.SIGTERM)])
def test_a_stopped_run_resumed_equals_one_undisturbed(
    tiny, data, undisturbed, tmp_path, monkeypatch, signum, step
):
    arguments = flags(tiny, data, tmp_path / "out", *RUN, "--val-data", data)
    before = signal.getsignal(signum)
    stopped(monkeypatch, arguments, step, signum)
    assert signal.getsignal(signum) == before
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    lf.main([*arguments, "--resume"])
    assert_same_run(tmp_path / "out", undisturbed)


def test_a_run_stopped_twice_equals_one_undisturbed(tiny, data, undisturbed, tmp_path, monkeypatch):
    arguments = flags(tiny, data, tmp_path / "out", *RUN, "--val-data", data)
    stopped(monkeypatch, arguments, 3)
    stopped(monkeypatch, [*arguments, "--resume"], 8)
    lf.main([*arguments, "--resume"])
    assert_same_run(tmp_path / "out", undisturbed)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(
    tiny, data, undisturbed, tmp_path
):
    lf.main(flags(tiny, data, tmp_path / "same", *RUN, "--val-data", data))
    assert_same_run(tmp_path / "same", undisturbed)
    lf.main(flags(tiny, data, tmp_path / "other", *RUN, "--seed", 7))
    assert adapter(tmp_path / "other") != adapter(undisturbed)


def test_resume_without_a_checkpoint_begins_at_the_start(tiny, data, undisturbed, tmp_path):
    arguments = flags(tiny, data, tmp_path / "out", *RUN, "--val-data", data)
    lf.main([*arguments, "--resume"])
    assert_same_run(tmp_path / "out", undisturbed)


@pytest.fixture(scope="module")
def stopped_at_six(tiny, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("six") / "out"
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, flags(tiny, data, folder, *RUN, "--val-data", data), 6)
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "seal.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_checkpoint_cut_short_is_passed_over_for_the_one_before(
    tiny, data, undisturbed, stopped_at_six, tmp_path, name, damage
):
    shutil.copytree(stopped_at_six, tmp_path / "out")
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert len(checkpoints) == 2
    assert lf.find_checkpoint(tmp_path / "out", {}) == checkpoints[-1]
    path = checkpoints[-1] / name
    content = path.read_bytes()
    half = len(content) // 2
    flipped = content[:half] + bytes([content[half] ^ 255]) + content[half + 1 :]
    path.write_bytes({"truncated": content[:half], "flipped": flipped, "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    assert lf.find_checkpoint(tmp_path / "out", {}) == checkpoints[-2]
    if (name, damage) == ("adapter_model.safetensors", "truncated"):
        lf.main(flags(tiny, data, tmp_path / "out", *RUN, "--val-data", data, "--resume"))
        assert_same_run(tmp_path / "out", undisturbed)


def run_forked(arguments, says):
    """Run main in a process that was forked with all imports made; what it says goes to a file."""
    torch.set_num_threads(1)
    gc.freeze()  # else each collection goes through all that was imported
    lf.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which outlives a kill
    sys.stdout = sys.stderr = open(says, "w", buffering=1)
    lf.main(arguments)


def wait_for(words, says, process):
    """Wait until a process has said these words, or ended."""
    while process.is_alive() and words not in says.read_text(encoding="utf-8"):
        time.sleep(0.002)
    return time.monotonic()


def test_twenty_kills_at_random_moments_lose_nothing(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the server that forks must have no threads
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_lora_finetune"])
    says = tmp_path / "says"
    long = ["--max-steps", 40, "--batch-size", 2, "--gradient-accumulation-steps", 2]
    first, last = "time left", "\n    40 "  # said before the first step, and after the last one

    def start(folder):
        says.write_text("")
        arguments = flags(tiny, data, folder, *long, "--val-data", data, "--resume")
        process = server.Process(target=run_forked, args=(arguments, says))
        process.start()
        return process

    process = start(tmp_path / "undisturbed")
    began, trained = (wait_for(words, says, process) for words in (first, last))
    process.join()
    assert process.exitcode == 0, says.read_text(encoding="utf-8")
    spans = {first: (trained - began) / 3, last: time.monotonic() - trained}

    seed, kills = random.randrange(10**6), int(os.environ.get("KILLS", 20))
    print("seed of the moments:", seed)
    moments, out = random.Random(seed), tmp_path / "out"
    while kills:
        shutil.rmtree(out, ignore_errors=True)
        while not (out / "adapter_model.safetensors").exists() or list(out.glob("checkpoint-*")):
            words = moments.choice([first, first, last])
            process = start(out)
            wait_for(words, says, process)
            process.join(moments.uniform(0, spans[words]))
            killed = kills > 0 and process.is_alive()
            if killed:
                signum = moments.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.kill(process.pid, signum)
                kills -= 1
            process.join()
            assert killed or process.exitcode == 0, says.read_text(encoding="utf-8")
        assert_same_run(out, tmp_path / "undisturbed")
        assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "undisturbed"))


# what stands in the output folder ----------------------------------------------------------------

CHANGED = [
    ["--learning-rate", "1e-3"],
    ["--lora-r", "4"],
    ["--lora-alpha", "3"],
    ["--lora-dropout", "0.5"],
    ["--target-modules", "k_proj"],
    ["--max-steps", "13"],
    ["--epochs", "2"],
    ["--warmup-ratio", "0.5"],
    ["--seed", "1"],
    ["--batch-size", "1"],
    ["--gradient-accumulation-steps", "3"],
    ["--max-seq-length", "100"],
    ["--load-in-4bit"],
]


@pytest.fixture(scope="module")
def unfinished(tiny, data, tmp_path_factory):
    """Folder of a run that was stopped after step 4."""
    folder = tmp_path_factory.mktemp("unfinished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, flags(tiny, data, folder, *RUN), 4)
    return folder


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change[0])
def test_resume_with_a_changed_option_is_refused_and_nothing_touched(
    tiny, data, unfinished, capsys, change
):
    before = snapshot(unfinished)
    line = error_line(flags(tiny, data, unfinished, *RUN, *change, "--resume"), capsys)
    assert change[0][2:].replace("-", "_") in line.replace("-", "_")
    assert "--overwrite" in line
    assert snapshot(unfinished) == before


def test_resume_with_changed_data_is_refused_and_nothing_touched(
    tiny, unfinished, tmp_path, capsys
):
    before = snapshot(unfinished)
    other = write_jsonl(tmp_path / "rows.jsonl", ROWS[:13] + ROWS[14:15])
    line = error_line(flags(tiny, other, unfinished, *RUN, "--resume"), capsys)
    assert "dataset" in line
    assert snapshot(unfinished) == before


def test_resume_with_another_model_is_refused_and_nothing_touched(
    tiny_models, data, unfinished, capsys
):
    before = snapshot(unfinished)
    other = tiny_models("llama", "chatml")
    line = error_line(flags(other, data, unfinished, *RUN, "--resume"), capsys)
    assert "model" in line
    assert snapshot(unfinished) == before


def test_an_unfinished_run_without_a_flag_is_refused_and_nothing_touched(
    tiny, data, unfinished, capsys
):
    before = snapshot(unfinished)
    line = error_line(flags(tiny, data, unfinished, *RUN), capsys)
    assert "--resume" in line and "--overwrite" in line
    assert snapshot(unfinished) == before


@pytest.mark.parametrize("flag", [[], ["--resume"]])
def test_a_finished_run_without_overwrite_is_refused_and_nothing_touched(
    tiny, data, undisturbed, capsys, flag
):
    before = snapshot(undisturbed)
    line = error_line(flags(tiny, data, undisturbed, *RUN, *flag), capsys)
    assert "finished" in line and "--overwrite" in line
    assert snapshot(undisturbed) == before


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_overwrite_replaces_an_earlier_run(tiny, data, undisturbed, unfinished, tmp_path, state):
    folder = tmp_path / "out"
    shutil.copytree({"finished": undisturbed, "unfinished": unfinished}[state], folder)
    new = ["--max-steps", 2, "--lora-r", 4]
    lf.main(flags(tiny, data, folder, *new, "--overwrite"))
    lf.main(flags(tiny, data, tmp_path / "fresh", *new))
    assert_same_run(folder, tmp_path / "fresh")
    assert len(read_log(folder)) == 2


def test_overwriting_a_finished_run_can_itself_be_stopped_and_resumed(
    tiny, data, undisturbed, tmp_path, monkeypatch
):
    shutil.copytree(undisturbed, tmp_path / "out")
    arguments = flags(tiny, data, tmp_path / "out", *RUN, "--lora-r", 4)
    stopped(monkeypatch, [*arguments, "--overwrite"], 5)
    assert [entry["step"] for entry in read_log(tmp_path / "out")] == [1, 2, 3, 4, 5]
    lf.main([*arguments, "--resume"])
    lf.main(flags(tiny, data, tmp_path / "fresh", *RUN, "--lora-r", 4))
    assert_same_run(tmp_path / "out", tmp_path / "fresh")


def test_the_finished_folder_says_what_was_done(tiny, data, undisturbed):
    config = json.loads((undisturbed / "training_config.json").read_text(encoding="utf-8"))
    assert config["arguments"]["lora_r"] == 16 and config["arguments"]["precision"] == "fp32"
    assert config["data"]["sha256"] == hashlib.sha256(Path(data).read_bytes()).hexdigest()
    assert config["data"]["rows"] == 14
    assert config["versions"]["torch"] == torch.__version__
    names = {path.name for path in undisturbed.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert AutoTokenizer.from_pretrained(undisturbed).chat_template


def test_the_adapter_is_not_pickled_and_holds_lora_weights_alone(undisturbed):
    pickled = {".bin", ".pt", ".pth", ".pkl"}
    assert not [path for path in undisturbed.rglob("*") if path.suffix in pickled]
    weights = load_file(undisturbed / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 2  # layers x modules x (A, B)
    assert all(
        "lora_" in name and weight.dtype == torch.float32 for name, weight in weights.items()
    )


# out of memory -----------------------------------------------------------------------------------


def out_of_memory(monkeypatch, tokens, first_step=0, parts_before=0):
    """Micro-batches of more than so many tokens don't fit; returns the (rows, length) that were tried."""
    compute_loss, tried = lf.ResponseTrainer.compute_loss, []

    def compute(self, model, inputs, *args, **kwargs):
        tried.append(tuple(inputs["input_ids"].shape))
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        late = self.state.global_step >= first_step and len(tried) > parts_before
        if math.prod(tried[-1]) > tokens and late:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    monkeypatch.setattr(lf.ResponseTrainer, "compute_loss", compute)
    return tried


@pytest.fixture
def alike(tmp_path):
    """Sixteen rows of one length, so that micro-batches are counted in rows."""
    rows = [{**ROWS[3], "instruction": f"Question {i:02}?"} for i in range(16)]
    return write_jsonl(tmp_path / "alike.jsonl", rows)


def row_tokens(tiny, data):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    row = lf.read_jsonl(data)[0]
    return len(lf.encode(row, tokenizer, lf.chat_frame(tokenizer), 10**6)["input_ids"])


def test_micro_batches_take_each_row_once_within_their_room():
    lengths = [9, 7, 7, 4, 3, 1, 1]
    parts = [lengths[part] for part in lf.micro_batches(lengths, 14)]
    assert parts == [[9], [7, 7], [4, 3, 1], [1]]


def test_no_micro_batch_takes_more_room_than_batch_size_of_the_longest_rows(
    tiny, tmp_path, monkeypatch
):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    tried = out_of_memory(monkeypatch, 10**9)
    lf.main(flags(tiny, data, tmp_path / "out", "--max-steps", 1))
    longest = max(length for _, length in tried)
    assert sum(rows for rows, _ in tried) == 16
    assert max(rows for rows, _ in tried) > 4
    assert all(rows * length <= 4 * longest for rows, length in tried)


@pytest.mark.parametrize("parts_before", [0, 2])
def test_out_of_memory_gives_the_run_that_began_with_smaller_batches(
    tiny, alike, tmp_path, monkeypatch, capsys, parts_before
):
    more = ["--max-steps", 3]
    began = ["--batch-size", 2, "--gradient-accumulation-steps", 8]
    lf.main(flags(tiny, alike, tmp_path / "began", *more, *began))
    tokens = row_tokens(tiny, alike)
    tried = out_of_memory(monkeypatch, 2 * tokens, parts_before=parts_before)
    capsys.readouterr()
    lf.main(flags(tiny, alike, tmp_path / "out", *more))
    assert [rows for rows, _ in tried] == [4] * (parts_before + 1) + [2] * 24
    assert "out of memory" in capsys.readouterr().out
    assert_same_run(tmp_path / "out", tmp_path / "began")


def test_each_epoch_and_each_seed_has_an_order_of_its_own(tiny, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    collate, steps = lf.collate, []

    def watch(rows, pad_id):
        steps.append({tuple(row["input_ids"]) for row in rows})
        return collate(rows, pad_id)

    monkeypatch.setattr(lf, "collate", watch)
    more = ["--epochs", 2, "--batch-size", 2, "--gradient-accumulation-steps", 2]
    for seed in 1, 7:  # the order comes from seed + epoch
        lf.main(flags(tiny, data, tmp_path / f"out{seed}", *more, "--seed", seed))
    epochs = [steps[start : start + 4] for start in range(0, 16, 4)]
    assert all(len(set.union(*epoch)) == 16 for epoch in epochs)
    assert all(epoch not in epochs[:i] for i, epoch in enumerate(epochs))


def test_out_of_memory_in_the_middle_keeps_the_rows_of_a_step(tiny, alike, tmp_path, monkeypatch):
    more = ["--max-steps", 5, "--lora-dropout", 0]
    lf.main(flags(tiny, alike, tmp_path / "calm", *more))
    tried = out_of_memory(monkeypatch, 2 * row_tokens(tiny, alike), first_step=3)
    lf.main(flags(tiny, alike, tmp_path / "out", *more))
    assert [rows for rows, _ in tried] == [4] * 13 + [2] * 16
    steps = [entry["step"] for entry in read_log(tmp_path / "out")]
    assert steps == [1, 2, 3, 4, 5]
    for one, other in zip(read_log(tmp_path / "out"), read_log(tmp_path / "calm")):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    same_weights(tmp_path / "out", tmp_path / "calm", 1e-3)


def test_out_of_memory_at_one_row_ends_in_one_line_of_advice(
    tiny, alike, tmp_path, monkeypatch, capsys
):
    tried = out_of_memory(monkeypatch, 0)
    line = error_line(flags(tiny, alike, tmp_path / "out"), capsys)
    assert [rows for rows, _ in tried] == [4, 2, 1]
    assert "out of memory" in line and "--max-seq-length" in line
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_auto_batch_size_starts_at_the_full_step_and_keeps_its_rows(
    tiny, alike, tmp_path, monkeypatch
):
    more = ["--max-steps", 2, "--batch-size", 3, "--gradient-accumulation-steps", 4]
    tried = out_of_memory(monkeypatch, 10**9)
    lf.main(flags(tiny, alike, tmp_path / "all", *more, "--auto-batch-size"))
    assert [rows for rows, _ in tried] == [12, 12]
    monkeypatch.undo()
    tried = out_of_memory(monkeypatch, 4 * row_tokens(tiny, alike))
    lf.main(flags(tiny, alike, tmp_path / "out", *more, "--auto-batch-size"))
    assert [rows for rows, _ in tried] == [12, 6] + [3] * 8


# NaN ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_says_why(
    tiny, data, undisturbed, tmp_path, monkeypatch, capsys
):
    arguments = flags(tiny, data, tmp_path / "out", *RUN, "--val-data", data)
    compute_loss = lf.ResponseTrainer.compute_loss

    def compute(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 4 else loss

    with monkeypatch.context() as patch:
        patch.setattr(lf.ResponseTrainer, "compute_loss", compute)
        line = error_line(arguments, capsys)
    assert "finite" in line and "--learning-rate" in line and "--precision" in line
    assert read_log(tmp_path / "out")[-1]["loss"] is None
    assert read_log(tmp_path / "out")[-1]["step"] == 5
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    lf.main([*arguments, "--resume"])
    assert_same_run(tmp_path / "out", undisturbed)


def test_weights_that_are_not_finite_are_no_checkpoint_between_log_lines(
    tiny, data, undisturbed, tmp_path, monkeypatch, capsys
):
    arguments = flags(tiny, data, tmp_path / "out", *RUN, "--val-data", data)
    on_step_end = lf.TrainingLog.on_step_end

    def poison(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            next(w for w in model.parameters() if w.requires_grad).data[0, 0] = math.inf
        return on_step_end(self, args, state, control, model=model, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(lf.TrainingLog, "on_step_end", poison)
        line = error_line([*arguments, "--logging-steps", "100"], capsys)
    assert "finite" in line
    whole = lf.find_checkpoint(tmp_path / "out", {})
    assert whole is not None and int(whole.name.rpartition("-")[2]) < 4
    lf.main([*arguments, "--resume"])
    assert adapter(tmp_path / "out") == adapter(undisturbed)


def test_resume_follows_the_logging_steps_it_is_given(tiny, data, tmp_path, monkeypatch):
    arguments = flags(tiny, data, tmp_path / "out", *RUN)
    stopped(monkeypatch, [*arguments, "--logging-steps", "3"], 7)
    lf.main([*arguments, "--logging-steps", "2", "--resume"])
    assert [entry["step"] for entry in read_log(tmp_path / "out")] == [3, 6, 8, 10, 12]


def test_more_steps_between_log_lines_than_steps_is_no_mistake(tiny, data, tmp_path):
    result = lf.main(flags(tiny, data, tmp_path / "out", *RUN, "--logging-steps", 100))
    assert result["steps"] == 12
    assert (tmp_path / "out/training_config.json").is_file()


# validation and the whole way --------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_validation_loss_equals_a_token_weighted_computation(tiny, tmp_path, batch):
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    held_out = [*RECORDS, *ROWS[3:9]]
    val = write_jsonl(tmp_path / "held_out.jsonl", held_out)
    more = ["--val-data", val, "--batch-size", batch, "--epochs", 2, "--learning-rate", 0.01]
    more += ["--max-seq-length", 120]
    result = lf.main(flags(tiny, train, tmp_path / "out", *more))
    measured = [entry for entry in read_log(tmp_path / "out") if "eval_loss" in entry]
    assert [entry["epoch"] for entry in measured] == [1, 2]

    model = peft.PeftModel.from_pretrained(reference_model(tiny, False), tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [{k: v.strip() for k, v in row.items()} for row in held_out]
    with torch.no_grad():
        parts = [reference_nll(model, tokenizer, "zephyr", row, 120) for row in rows]
    expected = sum(nll.item() for nll, _ in parts) / sum(count for _, count in parts)
    assert measured[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["eval_loss"] == measured[-1]["eval_loss"]


def test_a_folder_brings_its_own_validation_rows(tiny, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "val.jsonl", ROWS[:2])
    lf.main(flags(tiny, tmp_path, tmp_path / "out", "--max-steps", 2))
    assert [entry for entry in read_log(tmp_path / "out") if "eval_loss" in entry]


def test_an_empty_val_jsonl_in_the_folder_is_no_mistake(tiny, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "val.jsonl", [])
    lf.main(flags(tiny, tmp_path, tmp_path / "out", "--max-steps", 2))
    assert [entry["step"] for entry in read_log(tmp_path / "out")] == [1, 2]
    assert not [entry for entry in read_log(tmp_path / "out") if "eval_loss" in entry]


@pytest.mark.parametrize(
    "architecture, template, four_bit",
    [("llama", "zephyr", True), ("phi", "none", False)],
)
def test_eight_rows_learned_by_heart_come_back_word_for_word_and_stop(
    tiny_models, tmp_path, architecture, template, four_bit
):
    folder = tiny_models(architecture, template)
    answers = "red apple,blue sky </s> x,green,four by four,kubectl get,a Pod,nothing,last one"
    rows = [
        {"instruction": f"q{i}", "input": "", "output": answer}
        for i, answer in enumerate(answers.split(","))
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    names = "q_proj k_proj v_proj " + ("dense fc1 fc2" if architecture == "phi" else "")
    names += "" if architecture == "phi" else "o_proj gate_proj up_proj down_proj"
    more = ["--target-modules", *names.split(), "--lora-r", 64, "--lora-dropout", 0]
    more += ["--learning-rate", 0.005, "--max-steps", 200, "--batch-size", 8]
    more += ["--gradient-accumulation-steps", 1, "--no-gradient-checkpointing"]
    more += ["--load-in-4bit"] * four_bit
    lf.main(flags(folder, data, tmp_path / "out", *more))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = peft.PeftModel.from_pretrained(reference_model(folder, four_bit), tmp_path / "out")
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN[template])
    for row in rows:
        turns = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )[0, ids.shape[1] :].tolist()
        assert written[-1] == end
        assert tokenizer.decode(written[:-1]) == row["output"]


@pytest.mark.parametrize(
    "template, four_bit", [("none", "--load-in-4bit"), ("chatml", "--no-load-in-4bit")]
)
def test_phi_trains_with_a_template_and_without(tiny_models, data, tmp_path, template, four_bit):
    folder = tiny_models("phi", template)
    more = ["--max-steps", 8, "--learning-rate", 0.01, four_bit, "--val-data", data]
    lf.main(flags(folder, data, tmp_path / "out", *more))
    losses = [entry["loss"] for entry in read_log(tmp_path / "out") if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_no_four_bit_layer_repacks_its_weights_for_bf16(tiny):
    model = lf.load_base(str(tiny), "cpu", "fp32", True)
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(layers) == 2 * 7
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_gradients_stay_alive_after_a_validation_in_four_bits(tiny, data, tmp_path):
    more = ["--load-in-4bit", "--val-data", data, "--epochs", 4, "--learning-rate", 0.01]
    lf.main(flags(tiny, data, tmp_path / "out", *more))
    log = read_log(tmp_path / "out")
    assert all(entry["grad_norm"] > 1e-4 for entry in log if "loss" in entry)
    measured = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(measured) == 4 and measured == sorted(measured, reverse=True)


def test_the_base_model_folder_stays_as_it_was(tiny, data, tmp_path):
    before = snapshot(tiny)
    lf.main(flags(tiny, data, tmp_path / "out", "--max-steps", 2))
    assert snapshot(tiny) == before


# mistakes ----------------------------------------------------------------------------------------

GOOD = json.dumps(ROWS[0]).encode() + b"\n"
FILES = {  # content of the data file, what the line must say
    "empty": (b"", "no records"),
    "blank lines": (b"\n \n\n", "no records"),
    "binary": (bytes(range(256)) * 9, "UTF-8"),
    "latin-1": ('{"instruction": "é", "output": "b"}'.encode("latin-1"), "UTF-8"),
    "broken at line 3": (GOOD + b"\n" + GOOD[:-9], ":3: not valid JSON"),
    "csv": (b"instruction,input,output\na,b,c\n", ":1: not valid JSON"),
    "a list in line 2": (GOOD + b"[1, 2]\n", ":2: not an object"),
    "a whole JSON list": (b"[\n" + GOOD + b"]\n", ":1: not valid JSON"),
    "a number": (b'{"instruction": "a", "output": 3}', ':1: "output" is not text'),
    "a list as input": (b'{"instruction": "a", "input": [], "output": "b"}', '"input" is not text'),
    "no output": (GOOD + b'{"instruction": "a"}', ':2: "output" is missing'),
    "null": (b'{"instruction": null, "output": "b"}', '"instruction" is missing'),
    "blank output": (b'{"instruction": "a", "output": " \\n"}', '"output" is empty'),
    "half a character": (GOOD + b'{"instruction": "a", "output": "\\ud800"}', ':2: "output" has'),
    "a number too long": (b'{"instruction": ' + b"9" * 5000 + b"}", ":1: not valid JSON"),
    "nested too deep": (b"[" * 100_000, ":1: not valid JSON"),
}
OPTIONS = [
    line.split()
    for line in """--lora-r 0|--lora-r -1|--lora-r 1.5|--lora-r 99999999|--lora-r abc|--lora-r
        --lora-alpha 0|--lora-alpha nan|--lora-alpha inf|--lora-alpha -3
        --lora-dropout 1|--lora-dropout -0.1|--lora-dropout nan
        --learning-rate nan|--learning-rate inf|--learning-rate 0|--learning-rate -1e-4
        --learning-rate 1e9|--learning-rate x
        --epochs 0|--epochs nan|--epochs inf|--epochs -1|--epochs 1e99
        --max-steps 0|--max-steps -2|--max-steps 1.5
        --warmup-ratio -0.1|--warmup-ratio 1.1|--warmup-ratio nan
        --batch-size 0|--batch-size -4|--batch-size 1000000000|--batch-size nan
        --gradient-accumulation-steps 0|--gradient-accumulation-steps 1000000000
        --max-seq-length 0|--max-seq-length -1|--max-seq-length 7
        --seed -1|--seed 4294967296|--seed 0.5|--logging-steps 0|--logging-steps -1
        --precision fp8|--target-modules|--load-in-8bit|--batch 4|--resume --overwrite""".replace(
        "\n", "|"
    ).split("|")
]


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("option", ["--dataset", "--val-data"])
def test_a_data_file_with_a_mistake_is_refused(tiny, data, tmp_path, capsys, kind, option):
    content, says = FILES[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    line = error_line(flags(tiny, data, tmp_path / "out", option, path), capsys)
    assert says in line and str(path) in line and "prepare_dataset.py" in line
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("option", OPTIONS, ids=" ".join)
def test_an_option_out_of_range_is_refused(tiny, data, tmp_path, capsys, option):
    line = error_line(flags(tiny, data, tmp_path / "out", *option), capsys)
    assert option[0] in line
    assert not os.listdir(tmp_path)


def without(name):
    def damage(folder):
        for path in Path(folder).glob(name):
            path.unlink()

    return damage


def rewrite(name, change):
    def damage(folder):
        path = Path(folder, name)
        path.write_bytes(change(path.read_bytes()))

    return damage


def drop_a_tensor(folder):
    path = Path(folder, "model.safetensors")
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def pickle_weights(folder):
    Path(folder, "model.safetensors").unlink()
    bomb = Bomb(Path(folder).parent / "exploded")
    Path(folder, "pytorch_model.bin").write_bytes(pickle.dumps(bomb))


def bring_code(name, **settings):
    def damage(folder):
        path, bomb = Path(folder, name), Path(folder).parent / "exploded"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        Path(folder, "code.py").write_text(f"open({str(bomb)!r}, 'w')")

    return damage


def template(text):
    def damage(folder):
        bomb = str(Path(folder).parent / "exploded")
        path = Path(folder, "chat_template.jinja")
        path.write_text(text.replace("BOMB", repr(bomb)) + path.read_text())

    return damage


DAMAGES = {
    "no config": without("config.json"),
    "no weights": without("model.safetensors"),
    "no tokenizer": without("tokenizer*"),
    "nothing at all": without("*"),
    "weights cut short": rewrite("model.safetensors", lambda content: content[: len(content) // 2]),
    "weights empty": rewrite("model.safetensors", lambda content: b""),
    "weights are text": rewrite("model.safetensors", lambda content: b"version https://git-lfs\n"),
    "config broken": rewrite("config.json", lambda content: content[:-20]),
    "config of no known kind": rewrite(
        "config.json", lambda content: content.replace(b'"llama"', b'"lama"')
    ),
    "config of another width": rewrite(
        "config.json", lambda content: content.replace(b'"hidden_size": 64', b'"hidden_size": 32')
    ),
    "tokenizer broken": rewrite("tokenizer.json", lambda content: content[:99]),
    "a tensor is missing": drop_a_tensor,
    "weights pickled": pickle_weights,
    "code in the config": bring_code(
        "config.json", model_type="own", auto_map={"AutoConfig": "code.Config"}
    ),
    "code in the tokenizer": bring_code(
        "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["code.T", None]}
    ),
    "template looks for classes": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template looks for modules": template("{{ lipsum.__globals__['os'].mkdir(BOMB) }}"),
    "template clears the messages": template("{{ messages.clear() }}"),
    "template reads a file": template("{% include '/etc/passwd' %}"),
    "template counts for long": template("{% for x in range(10**9) %}{% endfor %}"),
    "template fills the memory": template("{{ 'a' * 10**17 }}"),
    "template divides by zero": template("{{ 1 / 0 }}"),
    "template calls itself": template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    "template refuses in two lines": template("{{ raise_exception('system\n\nfirst') }}"),
    "template refuses": template("{{ raise_exception('system first') }}"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_model_folder_is_refused(tiny, data, tmp_path, capsys, kind):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    DAMAGES[kind](model)
    line = error_line(flags(model, data, tmp_path / "out"), capsys)
    assert str(model) in line or "--model" in line
    assert os.listdir(tmp_path) == ["model"]


MISTAKES = {
    "no such data": (["--dataset", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "a folder without train.jsonl": (["--dataset", "{tmp}/empty"], "train.jsonl: no such file"),
    "no such validation data": (["--val-data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "a folder as validation data": (["--val-data", "{tmp}/empty"], "empty: no such file"),
    "an empty path": (["--dataset", ""], "no such file"),
    "no such model": (["--model", "nobody/no-such-model"], "nobody/no-such-model"),
    "no such model folder": (["--model", "./no/such/folder"], "./no/such/folder"),
    "a file as model": (["--model", "{tmp}/file"], "file"),
    "an empty model": (["--model", ""], "--model"),
    "layers that are not there": (["--target-modules", "query"], "query: no such layer"),
    "one layer that is not there": (["--target-modules", "q_proj", "x"], "x: no such layer"),
    "part of a layer's name": (["--target-modules", "proj"], "proj: no such layer"),
    "a norm as layer": (["--target-modules", "norm"], "norm: no such layer"),
    "the head as layer": (["--target-modules", "lm_head"], "lm_head: no such layer"),
    "an empty layer name": (["--target-modules", ""], "--target-modules"),
    "output is a file": (["--output", "{tmp}/file"], "file; choose another --output"),
    "output is under a file": (["--output", "{tmp}/file/out"], "file; choose another --output"),
    "no room for an answer": (["--max-seq-length", "8"], "raise --max-seq-length"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_refused_in_one_line(tiny, data, tmp_path, capsys, monkeypatch, kind):
    more, says = MISTAKES[kind]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    monkeypatch.chdir(tmp_path)
    more = [part.replace("{tmp}", str(tmp_path)) for part in more]
    line = error_line(flags(tiny, data, tmp_path / "out", *more), capsys)
    assert says in line
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_read_only_output_is_refused_before_a_model_is_loaded(data, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o555)
    arguments = flags("nowhere/model", data, tmp_path / "locked/new/out")
    line = without_privileges(lambda: error_line(arguments, capsys))
    assert line == f"error: can't write to {tmp_path}/locked; choose another --output"


@pytest.mark.parametrize(
    "size", [20_000, 50_000, 64_600], ids=["adapter", "optimizer", "its last bytes"]
)
def test_a_full_disk_ends_in_one_line_and_resume_goes_on(
    tiny, data, undisturbed, tmp_path, capsys, size
):
    arguments = flags(tiny, data, tmp_path / "out", *RUN, "--val-data", data)
    with largest_file(size):
        line = error_line(arguments, capsys)
    assert line.startswith(f"error: can't write to {tmp_path}/out") and "--resume" in line
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    lf.main([*arguments, "--resume"])
    assert_same_run(tmp_path / "out", undisturbed)


def test_control_characters_in_a_row_do_not_reach_the_terminal(tiny, tmp_path, capsys):
    rows = [{**row, "output": "red \x1b[31m bell \a end"} for row in ROWS]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    lf.main(flags(tiny, data, tmp_path / "out", "--max-steps", 1))
    shown = capsys.readouterr().out
    assert "red ?[31m bell ? end" in shown
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


def test_rows_without_room_for_an_answer_are_dropped_and_counted(tiny, tmp_path, capsys):
    long = {"instruction": "word " * 200, "input": "", "output": "never seen"}
    data = write_jsonl(tmp_path / "rows.jsonl", [*ROWS[:3], long])
    lf.main(flags(tiny, data, tmp_path / "out", "--max-steps", 2, "--max-seq-length", 150))
    assert "3 rows <- " in capsys.readouterr().out
    config = json.loads((tmp_path / "out/training_config.json").read_text(encoding="utf-8"))
    assert config["data"]["rows"] == 3


def test_one_row_is_shown_as_the_model_sees_it_in_80_columns(tiny, tmp_path, capsys):
    row = {"instruction": "why " * 40, "input": "", "output": "because " * 20}
    data = write_jsonl(tmp_path / "rows.jsonl", [row])
    lf.main(flags(tiny, data, tmp_path / "out", "--max-steps", 1))
    shown = capsys.readouterr().out.split("the model reads:\n")[1].split("  step")[0]
    reads, written = shown.split("the model learns to write:\n")
    assert reads.count("why") == 40 and "because" not in reads
    assert written.count("because") == 20 and "why" not in written
    assert max(map(len, shown.splitlines())) <= 80
