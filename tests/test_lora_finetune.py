"""What lora_finetune.py learns from, how it computes, what it keeps, and what it refuses."""

import contextlib
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import ROOT, largest_file, llama_tokenizer, without_privileges, write_jsonl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import evaluate
import lora_finetune as lf

torch.set_num_threads(1)  # models this small are no faster with more

RECORDS = [
    {"instruction": "What is a Pod?", "input": "", "output": "The smallest deployable unit."},
    {"instruction": "Name  it", "input": "kubectl get pods -A", "output": "lists\n\n  all Pods"},
    {"instruction": "Ünïcode?", "input": "日本語 🚀", "output": "ja, naïve – 한국어 🎉"},
    {"instruction": "### Response:", "input": "### Instruction:", "output": "### Response:\nx"},
    {"instruction": "a", "input": "", "output": "b"},
    {"instruction": "ends in <", "input": "<|im", "output": "|> both ends <"},
]
BOMB = b"cos\nsystem\n(S'touch exploded'\ntR."  # unpickling this makes a file
ADAPTER = "adapter_model.safetensors"
TWELVE_STEPS = "--max-steps 12 --batch-size 2 --gradient-accumulation-steps 2"


def make_row(i):
    """A row of its own text and length."""
    repeats = 1 + (i * 5) % 7
    return {
        "instruction": f"Question {i}: what does object {i * 7} do?",
        "input": "kind: Pod\n" * (i % 3),
        "output": f"It does {i} things " * repeats,
    }


ROWS = [make_row(i) for i in range(16)]


# a run and what it leaves ------------------------------------------------------------------------


def flags(model, data, output, *more):
    """The arguments of a run; what begins with "--" may hold values, as in "--max-steps 2"."""
    options = []
    for part in more:
        text = str(part)
        if text.startswith("--"):
            options += text.split()
        else:
            options.append(text)
    if "--load-in-4bit" not in options:
        options.insert(0, "--no-load-in-4bit")  # faster
    paths = ["--model", str(model), "--dataset", str(data), "--output", str(output)]
    return paths + options


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of fourteen rows."""
    folder = tmp_path_factory.mktemp("data")
    return write_jsonl(folder / "rows.jsonl", ROWS[:14])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A file of other rows, as validation data."""
    folder = tmp_path_factory.mktemp("records")
    return write_jsonl(folder / "records.jsonl", RECORDS)


@pytest.fixture
def out(tmp_path):
    """The output folder."""
    return tmp_path / "out"


@pytest.fixture
def run(tiny, data, out):
    """A function (options) -> arguments that train the tiny model on `data`; a later flag wins."""
    return partial(flags, tiny, data, out)


@pytest.fixture
def train(run):
    """A function (options) that trains so; returns what main does."""
    return lambda *options: lf.main(run(*options))


@pytest.fixture
def refusal(run, capsys):
    """A function (options) -> the line in which main refuses to train so."""
    return lambda *options: error_line(run(*options), capsys)


@pytest.fixture
def twelve_steps(run, data):
    """A function (options) -> arguments of twelve steps, with dropout and validation."""
    return partial(run, TWELVE_STEPS, "--val-data", data)


@pytest.fixture(scope="module")
def undisturbed(tiny, data, tmp_path_factory):
    """Folder of such a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    lf.main(flags(tiny, data, folder, TWELVE_STEPS, "--val-data", data))
    return folder


@pytest.fixture(scope="module")
def unfinished(tiny, data, tmp_path_factory):
    """Folder of such a run, without validation, that was stopped after step 4."""
    folder = tmp_path_factory.mktemp("unfinished") / "out"
    stopped(flags(tiny, data, folder, TWELVE_STEPS), 4)
    return folder


def read_log(folder):
    """Entries of training_log.jsonl; a NaN or Infinity in it is no JSON and fails."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = Path(folder, "training_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def logged(folder, key):
    """What the log says of this key, step by step."""
    return [entry[key] for entry in read_log(folder) if key in entry]


def read_config(folder):
    """What training_config.json says."""
    return json.loads(Path(folder, "training_config.json").read_text(encoding="utf-8"))


def adapter(folder):
    """The adapter, byte for byte."""
    return Path(folder, ADAPTER).read_bytes()


def tensors(folder):
    """{name: weight} of the adapter."""
    return load_file(Path(folder, ADAPTER))


def has_adapter(folder):
    """Was an adapter saved there?"""
    return Path(folder, ADAPTER).exists()


def snapshot(folder):
    """Each file under a folder with its content and its time; a lock file may come and go."""
    found = {}
    for path in Path(folder).rglob("*"):
        if path.name == ".lock":
            continue
        found[path] = None
        if path.is_file():
            found[path] = (path.stat().st_mtime_ns, path.read_bytes())
    return found


def files(folder):
    """Names of the files under a folder, but for a lock's."""
    return sorted(path.name for path, content in snapshot(folder).items() if content)


def assert_same_run(folder, other):
    """Two finished folders hold the same: the adapter, the log but for its times, the files."""
    assert adapter(folder) == adapter(other)
    assert files(folder) == files(other)
    assert not list(Path(folder).glob("checkpoint*"))

    for one, two in zip(read_log(folder), read_log(other), strict=True):
        assert one.keys() == two.keys()
        for measured in ["tokens_per_second", "memory_mib"]:
            one.pop(measured, None)
            two.pop(measured, None)
        assert one == two


def error_line(arguments, capsys):
    """Run main, which must refuse; returns the one line that the user sees."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        lf.main([str(part) for part in arguments])

    line = caught.value.code
    if line == 2:  # of argparse, which has printed it below its usage
        last = capsys.readouterr().err.strip().splitlines()[-1]
        line = last[last.index("error:") :]
    assert isinstance(line, str), line
    assert line.startswith("error: "), line
    assert "\n" not in line, line
    return line


def on_each_batch(patch, call):
    """Have call(ids) called for each micro-batch that is trained on; it may raise.

    Any loop must look ids up in the embedding table. A number that call returns multiplies them.
    """
    embed = torch.nn.Embedding.forward

    def embedding(self, ids):
        factor = None
        if torch.is_grad_enabled():
            factor = call(ids)
        if factor is None:
            return embed(self, ids)
        return embed(self, ids) * factor

    patch.setattr(torch.nn.Embedding, "forward", embedding)


def on_each_step(patch, call):
    """Have call(number, weights) called before each step of AdamW, the first with number 1."""
    advance = torch.optim.AdamW.step
    numbers = itertools.count(1)

    def step(self, *args, **kwargs):
        call(next(numbers), self.param_groups[0]["params"])
        return advance(self, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", step)


def steps_done(patch):
    """A list of the numbers of the steps that are done, which grows with them."""
    done = []
    on_each_step(patch, lambda number, weights: done.append(number))
    return done


def stopped(arguments, steps, signum=signal.SIGTERM):
    """Run main, with the signal amid the last of so many steps; returns what it says at the end."""
    sent = []

    def send(ids):
        if sent or len(done) < steps - 1:
            return
        sent.append(signum)
        handler = signal.getsignal(signum)
        assert handler not in [signal.SIG_DFL, signal.default_int_handler]
        signal.raise_signal(signum)

    with pytest.MonkeyPatch.context() as patch:
        done = steps_done(patch)
        on_each_batch(patch, send)
        with pytest.raises(SystemExit) as caught:
            lf.main(arguments)

    said = caught.value.code
    assert " of 12" in said
    assert "--resume" in said
    return said


def resumed(arguments):
    """Go on with a stopped run; returns the number of steps that were made."""
    with pytest.MonkeyPatch.context() as patch:
        done = steps_done(patch)
        lf.main([*arguments, "--resume"])
    return len(done)


# labels ------------------------------------------------------------------------------------------

END_OF_TURN = {  # of each chat template
    "zephyr": "</s>",
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "none": "</s>",
}
TYPED = [  # what a person may type
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
    "Pod",
    " ",
    "<",
    "\n",
    "é",
]
TYPED_TEXTS = st.lists(st.sampled_from(TYPED)).map("".join).map(str.strip).filter(bool)
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
DATED = "{{ '<s>Today is ' + strftime_now('%d %b %Y') + '\n' }}"

each_template = pytest.mark.parametrize("template", END_OF_TURN)


@pytest.fixture
def tokenizer(tiny_models, template):
    """That of the tiny model with this template."""
    return AutoTokenizer.from_pretrained(tiny_models(template=template))


def chat_text(tokenizer, template, record):
    """(prompt, whole text up to the end of turn) by the tokenizer's own template."""
    message = record["instruction"]
    if record["input"]:
        message += "\n\n" + record["input"]
    answer = record["output"]
    if template == "none":
        prompt = f"### Instruction:\n{message}\n\n### Response:\n"
        return prompt, f"{prompt}{answer}</s>"

    turns = [{"role": "user", "content": message}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns.append({"role": "assistant", "content": answer})
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole.startswith(prompt)

    end_of_turn = END_OF_TURN.get(template, "</s>")
    end = whole.index(end_of_turn, len(prompt) + len(answer))
    return prompt, whole[:end] + end_of_turn


def brute_force(tokenizer, template, record, max_length=None):
    """(input_ids, labels) for a record without control tokens in it."""
    prompt, whole = chat_text(tokenizer, template, record)
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = made["input_ids"]
    labels = []
    for id, (start, _) in zip(ids, made["offset_mapping"]):
        if start < len(prompt):
            labels.append(-100)
        else:
            labels.append(id)
    return ids[:max_length], labels[:max_length]


def encoded(tokenizer, record, max_length=4096):
    """The row that the script makes of a record."""
    return lf.encode(record, tokenizer, lf.chat_frame(tokenizer), max_length)


def trained_ids(row):
    """The ids that a row teaches."""
    return [id for id in row["labels"] if id != -100]


def with_template(folder, source, template):
    """Copy a model folder, with another chat template; {old} in it stands for the one it had."""
    shutil.copytree(source, folder)
    path = folder / "chat_template.jinja"
    path.write_text(template.replace("{old}", path.read_text()))
    return folder


@each_template
@pytest.mark.parametrize("record", RECORDS + ROWS[:3], ids=range(9))
def test_labels_equal_a_brute_force_computation(tokenizer, template, record):
    if template == "llama3":  # whose template trims what is said
        record = {name: text.strip() for name, text in record.items()}

    row = encoded(tokenizer, record)

    ids, labels = brute_force(tokenizer, template, record)
    assert row["input_ids"] == ids
    assert row["labels"] == labels
    assert row["length"] == len(ids)
    trained = trained_ids(row)
    end_of_turn = END_OF_TURN[template]
    assert trained[-1] == tokenizer.convert_tokens_to_ids(end_of_turn)
    if record == RECORDS[0]:
        assert tokenizer.decode(trained) == record["output"] + end_of_turn


@each_template
def test_only_a_row_that_fits_trains_its_end_token(tokenizer, template):
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN[template])

    whole = encoded(tokenizer, ROWS[5])
    size = len(whole["input_ids"])
    assert whole["labels"].count(end) == 1
    assert whole["length"] == size

    for length in range(1, size + 1):
        row = encoded(tokenizer, ROWS[5], length)
        fits = length == size
        assert row["labels"].count(end) == fits
        assert row["input_ids"] == whole["input_ids"][:length]
        assert row["labels"] == whole["labels"][:length]
        assert row["length"] == size


@each_template
@pytest.mark.parametrize("adds_bos", [False, True])
def test_there_is_never_a_doubled_bos(tokenizer, tmp_path, template, adds_bos):
    bos = tokenizer.bos_token_id
    if adds_bos:  # as the tokenizers of Llama do
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A",
            pair="<s> $A $B",
            special_tokens=[("<s>", bos)],
        )
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    first = saved("a")["input_ids"][0]
    assert (first == bos) == adds_bos

    ids = encoded(saved, RECORDS[0])["input_ids"]

    wanted = template == "llama3" or (template == "none" and adds_bos)
    assert ids.count(bos) == wanted
    assert (ids[0] == bos) == wanted


@each_template
@given(instruction=TYPED_TEXTS, extra=TYPED_TEXTS, output=TYPED_TEXTS)
@example(instruction="</s>", extra="<|user|>", output="<|im_end|>")
@example(instruction="<s>", extra="<s></s>", output="</s>")
@example(instruction="a <|im_end|>", extra="x <|eot_id|>", output="<|eot_id|> y </s>")
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_control_tokens_typed_in_a_record_stay_text(
    tokenizer, template, instruction, extra, output
):
    control = set(tokenizer.all_special_ids)
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            control.add(id)

    def controls(ids):
        return [id for id in ids if id in control]

    record = {"instruction": instruction, "input": extra, "output": output}
    row = encoded(tokenizer, record)

    plain = encoded(tokenizer, {"instruction": "a", "input": "b", "output": "c"})
    assert controls(row["input_ids"]) == controls(plain["input_ids"])
    assert controls(row["labels"]) == controls(plain["labels"])
    prompt, _ = chat_text(tokenizer, template, record)
    answer = output + END_OF_TURN[template]
    assert tokenizer.decode(row["input_ids"]) == prompt + answer
    assert tokenizer.decode(trained_ids(row)) == answer


def test_a_thinking_template_trains_after_the_empty_thoughts(tiny_models, tmp_path):
    chatml = tiny_models(template="chatml")
    folder = with_template(tmp_path / "model", chatml, THINKING)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    row = encoded(tokenizer, RECORDS[0])

    trained = trained_ids(row)
    read = tokenizer.decode(row["input_ids"][: -len(trained)])
    assert tokenizer.decode(trained) == RECORDS[0]["output"] + "<|im_end|>"
    assert read.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    frame = lf.chat_frame(tokenizer)  # what evaluate.py prompts with
    assert frame.head + RECORDS[0]["instruction"] + frame.tail == read


def test_a_template_that_tells_the_date_tells_one_that_stays(tiny_models, train, out, tmp_path):
    llama3 = tiny_models(template="llama3")
    folder = with_template(tmp_path / "model", llama3, DATED + "{old}")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    row = encoded(tokenizer, RECORDS[0])
    read = tokenizer.decode(row["input_ids"])
    train("--max-steps 1", "--model", folder)

    assert re.match(r"<s>Today is \d\d \w{3} \d{4}\n", read)
    this_year = datetime.now().strftime("%Y")
    assert this_year not in read.splitlines()[0]
    saved = AutoTokenizer.from_pretrained(out)
    prompt, _ = chat_text(saved, "llama3", RECORDS[0])
    assert read.startswith(prompt)


# one optimizer step ------------------------------------------------------------------------------

ONE_STEP = "--max-steps 1 --warmup-ratio 0 --lora-dropout 0 --lora-r 8 --lora-alpha 16"
SPLITS = [  # batch size, accumulation steps, rows
    (4, 4, 16),
    (8, 2, 16),
    (16, 1, 16),
    (1, 16, 16),
    (4, 4, 7),
]
SHAPE = [  # what a model of another kind takes over from the tiny one
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
]
each_precision = pytest.mark.parametrize("switch", ["--load-in-4bit", "--no-load-in-4bit"])
MODELS = {  # kind: what it has of its own
    "llama": {},
    "phi": {},
    "qwen2": {"num_key_value_heads": 2, "vocab_size": 131072},  # the head in parts of 128 tokens
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 1.0,
    },
    "granite": {"num_key_value_heads": 2, "logits_scaling": 3.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.3},
}


def near(figure):
    """Equal but for what float32 rounds."""
    return pytest.approx(figure, rel=1e-5)


def copies(tensors):
    """Copies of tensors, which stay as they are."""
    return [tensor.detach().clone() for tensor in tensors]


def trainable(model):
    """The weights of a model that are trained."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def reference_model(folder, in_4bit=False):
    """The base alone, float32, plain attention, as its library computes it."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if in_4bit:
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        options["quantization_config"] = nf4
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "compute_dtype"):  # of a base that comes quantised
            module.compute_dtype = torch.float32
    return model


def reference_loss(model, tokenizer, template, rows, max_length=None):
    """The mean of -log p over all trained tokens of the rows, from full logits, one row at once."""
    nll = []
    for row in rows:
        ids, labels = brute_force(tokenizer, template, row, max_length)
        outputs = model(input_ids=torch.tensor([ids]))
        log_p = outputs.logits[0, :-1].float().log_softmax(-1)
        targets = torch.tensor(labels[1:])  # the first is never predicted
        counts = targets != -100
        nll.append(-log_p[counts, targets[counts]])
    return torch.cat(nll).mean()


def saved_loss(base, folder, rows, max_length=None):
    """That of the adapter in a folder."""
    model = peft.PeftModel.from_pretrained(reference_model(base), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return reference_loss(model, tokenizer, "zephyr", rows, max_length).item()


def make_one_step(arguments):
    """Run a step of the script; returns the weights before, and the gradients it steps by."""
    weights = []
    gradients = []
    make = peft.get_peft_model

    def make_random(*args, **kwargs):
        model = make(*args, **kwargs)
        generator = torch.Generator().manual_seed(3)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero in a fresh adapter, and then lora_A has no gradient
                weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
        weights.extend(copies(trainable(model)))
        return model

    def keep(number, trained):
        gradients.extend(copies(weight.grad for weight in trained))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft, "get_peft_model", make_random)
        on_each_step(patch, keep)
        lf.main(arguments)
    return weights, gradients


def assert_one_step_equals_reference(folder, rows, out, *more, template="zephyr"):
    """Run one optimizer step; its loss and its clipped gradients must be the reference's."""
    data = write_jsonl(f"{out}.jsonl", rows)

    weights, gradients = make_one_step(flags(folder, data, out, ONE_STEP, *more))

    base = reference_model(folder, "--load-in-4bit" in more)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
    )
    model = peft.get_peft_model(base, lora)
    for weight, value in zip(trainable(model), weights, strict=True):
        weight.data.copy_(value)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loss = reference_loss(model, tokenizer, template, rows)
    loss.backward()
    expected = [weight.grad for weight in trainable(model)]
    norm = torch.nn.utils.get_total_norm(expected).item()

    assert logged(out, "loss") == [near(loss.item())]
    assert logged(out, "grad_norm") == [near(norm)]
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.norm() > 0
        wanted = wanted * min(1, 1 / norm)
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()
    return norm


def write_model(folder, source, kind):
    """Write a tiny random model of that kind, with the tokenizer of another one."""
    shutil.copytree(source, folder)
    config = AutoConfig.from_pretrained(folder).to_dict()
    shape = {key: config[key] for key in SHAPE}
    shape.update(MODELS[kind])
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape, tie_word_embeddings=False, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data *= 20  # so that a softcap or a scale matters
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch, accumulation, count", SPLITS)
@each_precision
def test_one_step_equals_a_reference_by_hand(tiny, out, switch, batch, accumulation, count):
    split = f"--batch-size {batch} --gradient-accumulation-steps {accumulation}"
    assert_one_step_equals_reference(tiny, ROWS[:count], out, split, switch)


@pytest.mark.parametrize("switch", ["--gradient-checkpointing", "--no-gradient-checkpointing"])
@pytest.mark.parametrize("kind", MODELS)
def test_one_step_equals_a_reference_for_other_models(tiny, out, tmp_path, kind, switch):
    folder = write_model(tmp_path / "model", tiny, kind)
    norm = assert_one_step_equals_reference(folder, ROWS[:6], out, switch)
    assert norm > 1  # so that it was clipped


def test_no_micro_batch_takes_more_room_than_batch_size_of_the_longest(
    train, out, tmp_path, monkeypatch
):
    shapes = []
    on_each_batch(monkeypatch, lambda ids: shapes.append(ids.shape))
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)

    train("--max-steps 1", "--dataset", data)

    counts = [rows for rows, length in shapes]
    assert sum(counts) == 16
    assert max(counts) > 4
    longest = max(length for rows, length in shapes)
    for rows, length in shapes:
        assert rows * length <= 4 * longest
    for weight in tensors(out).values():
        assert weight.any()  # warmup leaves the one step


@pytest.mark.parametrize("more", [[], ["--group-by-length"]])
def test_each_epoch_takes_each_row_once_in_even_steps_and_an_order_of_its_own(
    tiny, train, tmp_path, monkeypatch, more
):
    end = AutoTokenizer.from_pretrained(tiny).eos_token_id
    steps = [set()]

    def note_rows(ids):
        for row in ids.tolist():
            while row[-2:] == [end, end]:  # padding
                row.pop()
            steps[-1].add(tuple(row))

    on_each_batch(monkeypatch, note_rows)
    on_each_step(monkeypatch, lambda number, weights: steps.append(set()))
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS[:13])
    more = [*more, "--dataset", data, "--epochs 2 --batch-size 2 --gradient-accumulation-steps 2"]
    train(*more, "--seed 1", "--output", tmp_path / "out1")
    train(*more, "--seed 7", "--output", tmp_path / "out7")

    epochs = []
    for start in [0, 4, 8, 12]:
        epoch = steps[start : start + 4]
        sizes = [len(step) for step in epoch]
        assert sorted(sizes) == [3, 3, 3, 4]  # no small one at the end
        assert len(set.union(*epoch)) == 13
        assert epoch not in epochs
        epochs.append(epoch)


# what is asked later is what was trained ---------------------------------------------------------

FORMS = {  # (prompt, answer) of a template; a blank between the two belongs to the answer
    "mistral": ("[INST] {q} [/INST]", " {a}</s>"),
    "llama2": ("<s>[INST] {q} [/INST]", " {a} </s>"),
    "vicuna": ("USER: {q} ASSISTANT:", " {a}</s>"),
    "chatml": ("<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", "{a}<|im_end|>"),
    "zephyr": ("<|user|>\n{q}</s>\n<|assistant|>\n", "{a}</s>"),
    "two lines": ("Q: {q}\n\n", "{a}</s>"),
    "no border": ("{q}>", "{a}</s>"),
}
ANSWERS = {
    "a word": "A Pod runs containers.",
    "one letter": "I",
    "a digit": "3 Pods",
    "indented code": "    def pod():\n        return 1",
    "an empty line": "\n\nPod",
    "a sign": "> yes",
    "another script": "日本語 🚀",
    "a typed control token": "</s> Pod",
}
VOCABULARIES = ["byte-level", "byte-level, over the border", "SentencePiece"]
MERGES = [
    ("▁", "A"),
    ("▁", "P"),
    ("▁P", "o"),
    ("▁Po", "d"),
    ("▁", "▁"),
    ("▁▁", "▁▁"),
]


def template_of(form):
    """The chat template of a form."""
    prompt, answer = FORMS[form]
    prompt = prompt.replace("{q}", "{{ m.content }}")
    answer = answer.replace("{a}", "{{ m.content }}")
    turn = "{% if m.role == 'user' %}" + prompt + "{% else %}" + answer + "{% endif %}"
    return "{% for m in messages %}" + turn + "{% endfor %}"


def over_the_border(tokenizer):
    """That tokenizer with tokens that reach over the border of prompt and answer."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = parts["model"]["vocab"]
    merges = parts["model"]["merges"]
    for pair in [["Ċ", "Ġ"], [">", ">"]]:
        vocab["".join(pair)] = len(tokenizer) + len(merges)
        merges.insert(0, pair)
    backend = Tokenizer.from_str(json.dumps(parts))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def sentencepiece():
    """A tokenizer as Llama's."""
    pieces = ["<unk>", "<s>", "</s>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁"]
    pieces += [chr(code) for code in range(33, 127)]
    pieces += ["".join(pair) for pair in MERGES]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    return llama_tokenizer(vocab, MERGES, legacy=False)


@pytest.fixture(scope="module")
def vocabularies(tiny_models):
    """Tokenizers that merge a blank with the letter after it."""
    chatml = AutoTokenizer.from_pretrained(tiny_models(template="chatml"))
    return {
        "byte-level": chatml,
        "byte-level, over the border": over_the_border(chatml),
        "SentencePiece": sentencepiece(),
    }


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_an_answer_is_learned_whole_after_the_ids_that_are_asked(
    vocabularies, vocabulary, form, answer
):
    tokenizer = vocabularies[vocabulary]
    tokenizer.chat_template = template_of(form)
    frame = lf.chat_frame(tokenizer)
    record = {**RECORDS[0], "output": ANSWERS[answer]}

    row = lf.encode(record, tokenizer, frame, 4096)

    border = row["prompt_tokens"]
    read = row["input_ids"][:border]
    learned = row["input_ids"][border:]
    assert row["labels"] == [-100] * len(read) + learned

    question = [{"role": "user", "content": record["instruction"]}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)
    assert read == asked["input_ids"]
    asked = evaluate.encode({**record, "output": ""}, tokenizer, frame, 4096)
    assert read == asked["input_ids"][: asked["prompt_tokens"]]

    told = tokenizer.decode(learned)
    wanted = FORMS[form][1].replace("{a}", record["output"])
    if vocabulary == "SentencePiece":  # its decoder takes a blank away
        told = told.strip(" ")
        wanted = wanted.strip(" ")
        if form == "chatml":  # <|im_end|> is none of its control tokens
            wanted += "</s>"
    assert told == wanted


@pytest.mark.parametrize("form", ["mistral", "llama2", "vicuna"])
def test_one_step_learns_the_first_word_after_a_blank(tiny, out, tmp_path, form):
    folder = with_template(tmp_path / "model", tiny, template_of(form))
    rows = [{**row, "output": "A Pod " * 3} for row in ROWS[:3]]
    assert_one_step_equals_reference(folder, rows, out, template=form)


# the optimizer and the log -----------------------------------------------------------------------

PRECISIONS = [  # asked, used, the numbers' type
    ("fp16", "fp32", torch.float32),
    ("fp32", "fp32", torch.float32),
    ("bf16", "bf16", torch.bfloat16),
]
CPUS = [  # what it knows, how often bf16 is advised
    ("amx_bf16", 1),
    ("avx512_bf16", 1),
    ("avx2", 0),
]
TOO_FAST = "--learning-rate 0.05 --warmup-ratio 0 --epochs 5"  # it gets better first, then worse


def test_the_rate_rises_evenly_then_falls_by_half_a_cosine(train, out):
    train("--max-steps 10 --warmup-ratio 0.2 --learning-rate 0.01")

    rates = [0, 0.005]
    for step in range(8):
        cosine = math.cos(math.pi * step / 8)
        rates.append(0.005 * (1 + cosine))
    assert logged(out, "learning_rate") == pytest.approx(rates)


def test_two_updates_are_those_of_adamw_without_decay(train, out, monkeypatch):
    """By hand: Loshchilov and Hutter 2019, betas 0.9 and 0.999, epsilon 1e-8."""
    weights = {}  # number of the step: those before it, layer by layer
    gradients = {}

    def keep(number, trained):
        weights[number] = copies(trained)
        gradients[number] = copies(weight.grad for weight in trained)

    on_each_step(monkeypatch, keep)
    train("--max-steps 3 --learning-rate 0.01 --warmup-ratio 0")

    rates = logged(out, "learning_rate")
    for layer in range(len(weights[1])):
        mean = 0
        square = 0
        for number in [1, 2]:
            gradient = gradients[number][layer]
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            fair_mean = mean / (1 - 0.9**number)
            fair_square = square / (1 - 0.999**number)
            change = fair_mean / (fair_square.sqrt() + 1e-8)
            before = weights[number][layer]
            after = weights[number + 1][layer]
            wanted = before - rates[number - 1] * change
            assert torch.allclose(after, wanted, rtol=1e-5, atol=1e-8)


def test_a_log_line_tells_the_mean_of_its_steps(train, out, tmp_path):
    more = "--max-steps 7 --learning-rate 0.01"
    train(more, "--output", tmp_path / "each")
    train(more, "--logging-steps 5")

    each = logged(tmp_path / "each", "loss")
    mean_of_five = sum(each[:5]) / 5
    mean_of_two = sum(each[5:]) / 2
    assert logged(out, "step") == [5, 7]
    assert logged(out, "loss") == pytest.approx([mean_of_five, mean_of_two])


def test_the_tokens_of_a_second_are_those_that_were_read(tiny, train, out, monkeypatch):
    clock = itertools.count(0, 0.5)  # each look at it half a second later
    monkeypatch.setattr(lf.time, "perf_counter", lambda: next(clock))

    train("--epochs 2")

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokens = 0
    for row in ROWS[:14]:
        ids, labels = brute_force(tokenizer, "zephyr", row)
        tokens += len(ids)
    assert logged(out, "tokens_per_second") == [2 * tokens, 2 * tokens]


def test_keep_best_saves_the_epoch_of_the_lowest_validation_loss(
    tiny, train, records, out, tmp_path, capsys
):
    more = [TOO_FAST, "--val-data", records]
    last = train(*more, "--output", tmp_path / "last")
    assert "lowest after epoch" in capsys.readouterr().out

    result = train(*more, "--keep-best")

    measured = logged(out, "eval_loss")
    assert measured == logged(tmp_path / "last", "eval_loss")
    assert last["eval_loss"] == measured[-1]
    lowest = min(measured[1:])
    epoch = measured.index(lowest)
    assert epoch < 5
    assert result["eval_loss"] == lowest
    assert result["kept_epoch"] == epoch
    assert read_config(out)["result"] == result
    assert saved_loss(tiny, out, RECORDS) == near(lowest)


def test_a_run_that_keeps_its_best_keeps_it_when_stopped(run, train, records, out, tmp_path):
    more = [TWELVE_STEPS, "--learning-rate 0.05 --keep-best", "--val-data", records]
    train(*more, "--output", tmp_path / "whole")

    stopped(run(*more), 9)
    resumed(run(*more))

    assert_same_run(out, tmp_path / "whole")


def test_keep_best_needs_validation_rows(refusal, out):
    line = refusal("--keep-best")
    assert "--val-data" in line
    assert not files(out)


@pytest.mark.parametrize("asked, used, dtype", PRECISIONS)
def test_a_cpu_computes_in_bf16_only_where_asked(
    train, out, capsys, monkeypatch, asked, used, dtype
):
    seen = set()
    embed = torch.nn.Embedding.forward

    def embedding(self, ids):
        seen.add(self.weight.dtype)
        return embed(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", embedding)
    train("--max-steps 2 --precision", asked)

    assert seen == {dtype}
    assert f"training on the CPU in {used}" in capsys.readouterr().out
    for weight in tensors(out).values():
        assert weight.dtype == torch.float32
    assert logged(out, "loss")[0] == pytest.approx(5.89, abs=0.3)


@pytest.mark.parametrize("name, told", CPUS)
def test_a_cpu_that_knows_bf16_is_said_to(train, capsys, monkeypatch, name, told):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True}, raising=False)
    train("--max-steps 1")
    assert capsys.readouterr().out.count("--precision bf16 is") == told


# stopping and going on ---------------------------------------------------------------------------

SIGNALS = [  # most kills are of the kind that no program can heed
    signal.SIGKILL,
    signal.SIGKILL,
    signal.SIGKILL,
    signal.SIGTERM,
    signal.SIGINT,
]
BEGUN = "time left"  # said before the first step
TRAINED = "\n    12 "  # said after the last one


@pytest.mark.parametrize("steps, signum", [(1, signal.SIGINT), (5, signal.SIGTERM)])
def test_a_stopped_run_resumed_equals_another(twelve_steps, undisturbed, out, steps, signum):
    handler = signal.getsignal(signum)

    said = stopped(twelve_steps(), steps, signum)

    assert f"step {steps} of 12" in said
    assert signal.getsignal(signum) == handler
    assert not has_adapter(out)
    assert resumed(twelve_steps()) == 12 - steps
    assert_same_run(out, undisturbed)
    validated_too = [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]
    assert logged(out, "step") == validated_too


def test_a_run_stopped_twice_between_log_lines_leaves_the_same_log(twelve_steps, out, tmp_path):
    lf.main(twelve_steps("--logging-steps 5", "--output", tmp_path / "undisturbed"))
    arguments = twelve_steps("--logging-steps 5")

    assert "step 3 of 12" in stopped(arguments, 3)
    assert "step 8 of 12" in stopped([*arguments, "--resume"], 5)
    assert resumed(arguments) == 4

    assert logged(out, "step") == [0, 4, 5, 8, 10, 12, 12]
    assert_same_run(out, tmp_path / "undisturbed")


def test_resume_with_nothing_to_go_on_from_starts_at_step_1(twelve_steps, undisturbed, out, capsys):
    assert resumed(twelve_steps()) == 12
    said = capsys.readouterr().out
    assert re.search(r"^resume .*starting at step 1$", said, re.MULTILINE)
    assert_same_run(out, undisturbed)


def test_another_seed_gives_another_adapter(twelve_steps, undisturbed, out):
    lf.main(twelve_steps("--seed 7"))
    assert adapter(out) != adapter(undisturbed)


def write_in_halves(path, text, encoding=None):
    """Path.write_text, but slow enough to be killed amid a file."""
    middle = len(text) // 2
    with open(path, "w", encoding=encoding) as file:
        file.write(text[:middle])
        file.flush()
        time.sleep(0.02)
        file.write(text[middle:])


def run_forked(arguments, says):
    """Run main in a process that was forked with all imports made; what it says goes to a file."""
    torch.set_num_threads(1)
    gc.freeze()  # else each collection goes through all that was imported
    lf.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which outlives a kill
    Path.write_text = write_in_halves
    sys.stdout = open(says, "w", buffering=1)
    sys.stderr = sys.stdout
    lf.main(arguments)


def wait_for(words, says, process):
    """Wait until a process has said these words, or ended."""
    while process.is_alive() and words not in says.read_text(encoding="utf-8"):
        time.sleep(0.002)
    return time.monotonic()


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """A function (arguments) -> (a new process that runs main with them, file of what it says)."""
    says = tmp_path_factory.mktemp("forked") / "says"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_lora_finetune"])

    def start(arguments):
        says.write_text("")
        process = server.Process(target=run_forked, args=(arguments, says))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
            patch.setenv("OMP_NUM_THREADS", "1")  # the server that forks must have no threads
            process.start()
        return process, says

    return start


def measure_spans(process, says):
    """{words: seconds in which a run may be killed after it has said them}, of a run left alone."""
    began = wait_for(BEGUN, says, process)
    trained = wait_for(TRAINED, says, process)
    process.join()
    ended = time.monotonic()
    assert process.exitcode == 0, says.read_text(encoding="utf-8")
    return {BEGUN: (trained - began) / 2, TRAINED: ended - trained}


def wait_for_a_checkpoint(process, folder):
    """Wait until a process writes a checkpoint, or has ended."""
    while process.is_alive() and not (folder / "checkpoint.new").exists():
        time.sleep(0.001)


def is_finished(folder):
    """Is the folder that of a run that came to its end?"""
    return has_adapter(folder) and not list(folder.glob("checkpoint*"))


def test_twenty_kills_at_random_moments_lose_nothing(
    twelve_steps, undisturbed, out, tmp_path, forked
):
    process, says = forked(twelve_steps("--output", tmp_path / "calm"))
    spans = measure_spans(process, says)
    seed = random.randrange(10**6)
    print("seed of the moments:", seed)
    moments = random.Random(seed)

    kills = int(os.environ.get("KILLS", 20))
    while kills > 0:
        shutil.rmtree(out, ignore_errors=True)
        while not is_finished(out):
            process, says = forked(twelve_steps("--resume"))
            words = moments.choice([BEGUN, BEGUN, TRAINED])
            wait_for(words, says, process)
            if words == BEGUN and kills % 3 == 0:
                wait_for_a_checkpoint(process, out)
                process.join(moments.uniform(0, 0.05))
            else:
                process.join(moments.uniform(0, spans[words]))

            if kills > 0 and process.is_alive():
                kills -= 1
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.kill(process.pid, moments.choice(SIGNALS))
                process.join()
            else:
                process.join()
                assert process.exitcode == 0, says.read_text(encoding="utf-8")
        assert_same_run(out, undisturbed)


def test_a_second_run_on_one_folder_is_refused(twelve_steps, undisturbed, out, capsys, forked):
    first, says = forked(twelve_steps())
    wait_for(BEGUN, says, first)
    os.kill(first.pid, signal.SIGSTOP)  # else it may end before the second has begun

    try:
        line = error_line(twelve_steps("--overwrite"), capsys)
    finally:
        os.kill(first.pid, signal.SIGCONT)

    assert first.is_alive()
    assert "another run that writes there" in line
    assert "--output" in line
    first.join()
    assert_same_run(out, undisturbed)


def test_resume_goes_by_the_rows_of_a_step_not_by_how_they_are_cut(run, train, out, tmp_path):
    one_by_one = "--max-steps 12 --lora-dropout 0 --batch-size 1"
    in_pairs = "--max-steps 12 --lora-dropout 0 --batch-size 2 --gradient-accumulation-steps 2"
    train(one_by_one, "--output", tmp_path / "whole")

    stopped(run(one_by_one), 5)
    assert resumed(run(in_pairs)) == 7

    losses = logged(tmp_path / "whole", "loss")
    assert logged(out, "loss") == near(losses)


# what stands in the output folder ----------------------------------------------------------------

CHANGES = [  # of what makes a run what it is; what is named as changed
    ("--learning-rate 1e-3", "learning_rate"),
    ("--lora-r 4", "lora_r"),
    ("--lora-alpha 3", "lora_alpha"),
    ("--lora-dropout 0.5", "lora_dropout"),
    ("--target-modules k_proj", "target_modules"),
    ("--max-steps 13", "max_steps"),
    ("--epochs 2", "epochs"),
    ("--warmup-ratio 0.5", "warmup_ratio"),
    ("--seed 1", "seed"),
    ("--batch-size 1", "rows_per_step"),
    ("--gradient-accumulation-steps 3", "rows_per_step"),
    ("--max-seq-length 100", "max_seq_length"),
    ("--load-in-4bit", "load_in_4bit"),
    ("--group-by-length", "group_by_length"),
    ("--model other", "model"),
    ("--dataset other.jsonl", "dataset"),
]
EARLIER_RUNS = [  # the folder, a flag
    ("unfinished", []),
    ("undisturbed", []),
    ("undisturbed", ["--resume"]),
]


@pytest.mark.parametrize("change, name", CHANGES)
def test_resume_of_another_run_touches_nothing(
    tiny_models, run, unfinished, tmp_path, capsys, monkeypatch, change, name
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_models(template="chatml"), "other")
    write_jsonl("other.jsonl", ROWS[:13] + ROWS[14:15])
    before = snapshot(unfinished)

    arguments = run(TWELVE_STEPS, change, "--resume", "--output", unfinished)
    line = error_line(arguments, capsys)

    assert f", {name} " in line
    assert "--overwrite" in line
    assert snapshot(unfinished) == before


@pytest.mark.parametrize("state, more", EARLIER_RUNS)
def test_an_earlier_run_is_not_replaced_without_a_flag(refusal, request, state, more):
    folder = request.getfixturevalue(state)
    before = snapshot(folder)

    line = refusal(TWELVE_STEPS, *more, "--output", folder)

    assert "finished run" in line
    assert "--overwrite" in line
    assert ("--resume" in line) == (state == "unfinished")
    assert snapshot(folder) == before


@pytest.mark.parametrize("state", ["unfinished", "undisturbed"])
def test_overwrite_replaces_an_earlier_run_also_if_stopped(run, request, out, tmp_path, state):
    shutil.copytree(request.getfixturevalue(state), out)
    arguments = run(TWELVE_STEPS, "--lora-r 4")

    stopped([*arguments, "--overwrite"], 5)

    assert logged(out, "step") == [1, 2, 3, 4, 5]
    assert not has_adapter(out)  # of another run
    assert resumed(arguments) == 7
    lf.main([*arguments, "--output", str(tmp_path / "fresh")])
    assert_same_run(out, tmp_path / "fresh")


def test_a_damaged_checkpoint_is_never_unpickled(
    twelve_steps, unfinished, out, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unfinished, out)
    (path,) = out.glob("checkpoint*")
    whole = path.read_bytes()
    half = whole[: len(whole) // 2]

    for content in [half, b"", BOMB]:
        path.write_bytes(content)
        line = error_line(twelve_steps("--resume"), capsys)
        assert str(path) in line
        assert "--overwrite" in line
        assert path.read_bytes() == content
        assert not (tmp_path / "exploded").exists()


def test_the_finished_folder_says_what_was_done(data, undisturbed):
    digest = hashlib.sha256(Path(data).read_bytes()).hexdigest()
    losses = logged(undisturbed, "eval_loss")
    config = read_config(undisturbed)
    assert config["arguments"]["lora_r"] == 16
    assert config["arguments"]["precision"] == "fp32"
    assert config["data"]["sha256"] == digest
    assert config["data"]["rows"] == 14
    assert config["device"] == "cpu"
    assert config["versions"]["torch"] == version("torch")
    assert config["result"]["step"] == 12
    assert config["result"]["eval_loss"] == losses[-1]


def test_the_finished_folder_holds_adapter_and_tokenizer_and_no_pickle(undisturbed):
    names = files(undisturbed)
    assert "adapter_config.json" in names
    assert "tokenizer.json" in names
    assert "training_log.jsonl" in names
    kinds = {Path(name).suffix for name in names}
    assert kinds == {".json", ".jsonl", ".jinja", ".safetensors"}

    assert AutoTokenizer.from_pretrained(undisturbed).chat_template
    weights = tensors(undisturbed)
    assert len(weights) == 2 * 2 * 2  # layers x modules x (A, B)
    for name, weight in weights.items():
        assert "lora_" in name
        assert weight.dtype == torch.float32


def test_a_run_that_gets_validation_rows_when_it_goes_on_comes_to_its_end(run, data, out):
    stopped(run(TWELVE_STEPS), 11)
    assert resumed(run(TWELVE_STEPS, "--val-data", data)) == 1
    assert len(logged(out, "eval_loss")) == 1


def test_keep_best_goes_on_with_the_same_validation_rows_alone(twelve_steps, records, capsys):
    stopped(twelve_steps("--keep-best"), 5)
    line = error_line(twelve_steps("--keep-best --resume", "--val-data", records), capsys)
    assert "val_data" in line


def test_overwrite_drops_the_checkpoint_of_a_stopped_run_at_once(
    run, train, unfinished, out, monkeypatch
):
    shutil.copytree(unfinished, out)

    def interrupt(ids):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        on_each_batch(patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(TWELVE_STEPS, "--overwrite")

    assert resumed(run(TWELVE_STEPS)) == 12


def test_files_of_the_users_own_stay_as_they_are(train, tmp_path):
    notes = tmp_path / "README.md"
    notes.write_text("my notes")
    train("--max-steps 1", "--output", tmp_path)
    assert notes.read_text() == "my notes"


# out of memory and NaN ---------------------------------------------------------------------------

FULL = [  # dropout, parts of four rows that fit before memory is full, parts of two rows then
    (0.5, 0, 24),
    (0.5, 2, 24),  # of the first step, which is run again
    (0, 4, 16),  # all of the first step
]


def out_of_memory(patch, rows, parts_before=0):
    """After so many micro-batches those of more rows don't fit; returns the numbers of rows tried."""
    tried = []

    def allocate(ids):
        tried.append(len(ids))
        if len(tried) > parts_before and len(ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    on_each_batch(patch, allocate)
    return tried


@pytest.fixture
def alike(tmp_path):
    """Sixteen rows of one length, so that micro-batches are counted in rows."""
    rows = [{**ROWS[3], "instruction": f"Question {i:02}?"} for i in range(16)]
    return write_jsonl(tmp_path / "alike.jsonl", rows)


@pytest.mark.parametrize("dropout, parts_before, twos", FULL)
def test_out_of_memory_gives_the_run_that_began_with_smaller_batches(
    train, alike, out, tmp_path, monkeypatch, capsys, dropout, parts_before, twos
):
    more = [f"--max-steps 3 --lora-dropout {dropout}", "--dataset", alike]
    began = tmp_path / "began"
    train(*more, "--batch-size 2 --gradient-accumulation-steps 8", "--output", began)
    capsys.readouterr()

    tried = out_of_memory(monkeypatch, 2, parts_before)
    train(*more)

    assert tried == [4] * parts_before + [4] + [2] * twos
    shown = capsys.readouterr().out.splitlines()
    said = [line for line in shown if "out of memory" in line]
    assert len(said) == 1
    assert len(said[0]) <= 80
    losses = logged(began, "loss")
    assert logged(out, "loss") == pytest.approx(losses, rel=1e-6)
    if parts_before < 4:  # so the first step, too, was made in parts of two
        assert_same_run(out, began)


def test_out_of_memory_at_one_row_gives_advice(refusal, alike, out, monkeypatch):
    tried = out_of_memory(monkeypatch, 0)
    line = refusal("--dataset", alike)
    assert tried == [4, 2, 1]
    assert "out of memory" in line
    assert "--max-seq-length" in line
    assert not has_adapter(out)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    twelve_steps, undisturbed, out, monkeypatch, capsys
):
    def break_the_sixth_step(ids):
        if len(done) == 5:
            return math.nan

    with monkeypatch.context() as patch:
        done = steps_done(patch)
        on_each_batch(patch, break_the_sixth_step)
        line = error_line(twelve_steps("--logging-steps 100"), capsys)

    assert "finite" in line
    assert "--learning-rate" in line
    assert "fp32" in line
    assert len(done) == 5
    assert read_log(out)  # of strict JSON
    assert not has_adapter(out)
    assert resumed(twelve_steps()) < 12
    assert adapter(out) == adapter(undisturbed)


# validation and what is shown --------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_validation_loss_equals_a_token_weighted_computation(tiny, train, out, tmp_path, batch):
    held_out = [*RECORDS, *ROWS[3:9]]
    data = write_jsonl(tmp_path / "train.jsonl", ROWS)
    val = write_jsonl(tmp_path / "held_out.jsonl", held_out)
    more = f"--batch-size {batch} --epochs 2 --learning-rate 0.01 --max-seq-length 120"

    result = train(more, "--dataset", data, "--val-data", val)

    measured = [entry for entry in read_log(out) if "eval_loss" in entry]
    assert [entry["epoch"] for entry in measured] == [0, 1, 2]
    loss = measured[-1]["eval_loss"]
    assert loss == near(saved_loss(tiny, out, held_out, 120))
    assert result["eval_loss"] == loss


@pytest.mark.parametrize("held_out, times", [(2, 3), (0, 0)])
def test_a_folder_under_home_brings_its_own_validation_rows(
    tiny, out, tmp_path, monkeypatch, held_out, times
):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = shutil.copytree(tiny, tmp_path / "model")
    before = snapshot(model)
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "val.jsonl", ROWS[:held_out])

    lf.main(flags("~/model", "~", "~/out", "--max-steps 2 --logging-steps 100"))

    assert len(logged(out, "loss")) == 1
    assert len(logged(out, "eval_loss")) == times
    assert snapshot(model) == before


def test_gradients_stay_alive_after_a_validation_in_four_bits(train, data, out):
    train("--load-in-4bit --epochs 4 --learning-rate 0.01", "--val-data", data)

    assert min(logged(out, "grad_norm")) > 1e-4
    measured = logged(out, "eval_loss")
    assert len(measured) == 5
    assert measured == sorted(measured, reverse=True)


def test_what_is_shown_fits_80_columns_and_obeys_no_control_character(train, out, tmp_path, capsys):
    answer = "red \x1b[31m bell \a end " + "because " * 20
    row = {"instruction": "why " * 40, "input": "", "output": answer}
    too_long = {"instruction": "word " * 400, "input": "", "output": "never seen"}
    data = write_jsonl(tmp_path / "rows.jsonl", [row, row, row, too_long])

    more = ["--dataset", data, "--val-data", data]
    train("--max-steps 3 --max-seq-length 400", *more)

    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.split("\n"))
    above, below = shown.split("the model reads:\n")
    assert re.search(r"\b3 rows <- .*\b1 cut, 1 dropped", above)
    assert read_config(out)["data"]["rows"] == 3

    example_row, table = below.split("  step")
    reads, written = example_row.split("the model learns to write:\n")
    assert reads.count("why") == 40
    assert "because" not in reads
    assert written.count("because") == 20
    assert "why" not in written
    assert "red ?[31m bell ? end" in written

    assert below.count("\nvalidation loss ") == 4
    training = below.partition("saved")[0]
    assert max(map(len, training.splitlines())) <= 80


# mistakes ----------------------------------------------------------------------------------------


def remove(folder, name):
    """Take the files of this name away."""
    for path in folder.glob(name):
        path.unlink()


def halve(folder, name):
    """Cut a file to its first half."""
    content = (folder / name).read_bytes()
    write(folder, name, content[: len(content) // 2])


def write(folder, name, content):
    """Write other bytes to a file."""
    remove(folder, name)
    (folder / name).write_bytes(content)


def change_settings(folder, name, settings):
    """Write other settings into JSON files of this name."""
    for path in folder.glob(name):
        held = json.loads(path.read_bytes())
        path.write_text(json.dumps({**held, **settings}))


def drop_a_tensor(folder):
    """Save the model without one of its weights."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def break_a_weight(folder, name, value):
    """Save the model with this value among a weight's last ones."""
    weights = load_file(folder / "model.safetensors")
    weights[f"{name}.weight"][-1, 0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickle_weights(folder):
    """Put a pickle in the place of the weights."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(BOMB)


def add_tokens(folder, tokens):
    """Add tokens to the tokenizer, and none to the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(folder)


def lose_the_vocabulary(folder, kind):
    """Leave a tokenizer of this kind without its tokens."""
    remove(folder, "tokenizer.json")
    change_settings(folder, "tokenizer_config.json", {"tokenizer_class": kind})


WEIGHTS = "model.safetensors"
LFS = b"version https://git-lfs\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2200119864\n"
KNOWN_BY_CODE = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
READ_BY_CODE = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.T", None]}}
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
DAMAGES = {
    "no config": (remove, "config.json"),
    "no weights": (remove, WEIGHTS),
    "no tokenizer": (remove, "tokenizer*"),
    "nothing at all": (remove, "*"),
    "half the weights": (halve, WEIGHTS),
    "half a config": (halve, "config.json"),
    "half a tokenizer": (halve, "tokenizer.json"),
    "weights of one byte": (write, WEIGHTS, b"x"),
    "weights are text": (write, WEIGHTS, LFS),
    "config of no known kind": (change_settings, "config.json", {"model_type": "lama"}),
    "config of another width": (change_settings, "config.json", {"hidden_size": 32}),
    "a short context": (change_settings, "config.json", {"max_position_embeddings": 256}),
    "quantised by GPTQ": (change_settings, "config.json", GPTQ),
    "code": (change_settings, "config.json", KNOWN_BY_CODE),
    "code in the tokenizer": (change_settings, "tokenizer_config.json", READ_BY_CODE),
    "a tensor is missing": (drop_a_tensor,),
    "weights pickled": (pickle_weights,),
    "tokens that the model lacks": (add_tokens, ["object"]),
}
TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].mkdir('exploded') }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% for x in range(10**9) %}{% endfor %}",
    "{{ 'a' * 10**17 }}",
    "{{ 1 / 0 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ raise_exception('system\\n\\nfirst') }}",
    "{{ strftime_now('%d'",
]
CAUSES = {  # what is done to the model's folder; the words that tell it
    "NaN in a layer": (
        [break_a_weight, "model.layers.0.mlp.up_proj", math.nan],
        ["not finite"],
    ),
    "inf in a layer": (
        [break_a_weight, "model.layers.1.mlp.down_proj", math.inf],
        ["not finite"],
    ),
    "NaN for a rare token": (
        [break_a_weight, "model.embed_tokens", math.nan],
        ["not finite"],
    ),
    "NaN in the head": (
        [break_a_weight, "lm_head", math.nan],
        ["not finite"],
    ),
    "an adapter": (
        [write, "adapter_config.json", b'{"base_model_name_or_path": "some/base"}'],
        ["is an adapter", "base_model_name_or_path"],
    ),
    "a pointer": (
        [write, WEIGHTS, POINTER],
        [WEIGHTS, "git lfs pull"],
    ),
    "a pointer there": (
        [write, "tokenizer.json", POINTER],
        ["tokenizer.json", "git lfs pull"],
    ),
    "no vocabulary": (
        [lose_the_vocabulary, "LlamaTokenizer"],
        ["tokenizer", "tokenizer.json"],
    ),
    "no vocabulary, GPT-2": (
        [lose_the_vocabulary, "GPT2Tokenizer"],
        ["tokenizer", "tokenizer.json"],
    ),
}
NO_FOLDERS = ["./model", "/no/model", "a/b/c", "~/no model", "a\\b", "D:/a", ".b"]


@pytest.fixture
def copied(tiny, tmp_path):
    """A copy of the tiny model, to change."""
    return shutil.copytree(tiny, tmp_path / "model")


def assert_refused_unharmed(arguments, model, folder, capsys):
    """Run main in this folder, which must name what is refused, run no code and write no file."""
    line = error_line(arguments, capsys)
    assert str(model) in line or "--m" in line or "tokenizer" in line
    assert not (folder / "exploded").exists()
    assert not files(folder / "out")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_model_folder_is_refused(copied, run, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (copied / "code.py").write_text("open('exploded', 'w')")
    damage, *details = DAMAGES[kind]
    damage(copied, *details)

    arguments = run("--load-in-4bit", "--model", copied)
    assert_refused_unharmed(arguments, copied, tmp_path, capsys)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails_or_harms_is_refused(
    tiny, run, tmp_path, capsys, monkeypatch, template
):
    monkeypatch.chdir(tmp_path)
    model = with_template(tmp_path / "model", tiny, template + "{old}")
    arguments = run("--load-in-4bit", "--model", model)
    assert_refused_unharmed(arguments, model, tmp_path, capsys)


@pytest.mark.parametrize("cause", CAUSES)
@each_precision
def test_what_is_wrong_with_a_model_is_named(copied, refusal, out, cause, switch):
    (damage, *details), words = CAUSES[cause]
    damage(copied, *details)

    line = refusal(switch, "--model", copied)

    assert str(copied) in line
    for word in words:
        assert word in line
    assert not files(out)


def test_a_read_only_output_is_refused_before_a_model_is_loaded(data, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    arguments = flags("nowhere/model", data, locked / "new/out")

    line = without_privileges(lambda: error_line(arguments, capsys))

    assert line.startswith(f"error: can't write to {locked}")
    assert "another --output" in line


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_full_disk_ends_in_one_line(twelve_steps, undisturbed, unfinished, out, capsys, share):
    (checkpoint,) = unfinished.glob("checkpoint*")
    size = checkpoint.stat().st_size

    with largest_file(int(size * share)):
        line = error_line(twelve_steps(), capsys)

    assert line.startswith(f"error: can't write to {out}")
    assert "free space" in line
    assert not has_adapter(out)
    lf.main(twelve_steps("--resume"))
    assert_same_run(out, undisturbed)


def test_a_disk_that_is_full_at_the_end_ends_in_one_line(copied, refusal, out):
    add_tokens(copied, [f"unused {number}" for number in range(2000)])
    size = (copied / "tokenizer.json").stat().st_size

    with largest_file(size // 2):
        line = refusal("--max-steps 1", "--model", copied)

    assert line.startswith(f"error: can't write to {out}")


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_a_path_that_is_no_folder_is_not_asked_of_the_hub(refusal, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    line = refusal("--model", name)
    assert "no folder" in line


# models that people bring ------------------------------------------------------------------------

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
}
SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MAMBA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
    "num_heads": 8,
    "head_dim": 16,
    "n_groups": 1,
    "chunk_size": 16,
    "vocab_size": 1000,
}


def write_with(folder, model, source):
    """A model folder with the tokenizer of another one."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def small(kind, source, **more):
    """The config of a tiny model of that kind with as many tokens as the source has."""
    tokens = len(AutoTokenizer.from_pretrained(source))
    return AutoConfig.for_model(kind, vocab_size=tokens, **TINY, **more)


def write_seeing(folder, kind, text, vision, source):
    """A model of pictures and texts."""
    text_config = small(text, source, num_key_value_heads=2, head_dim=16)
    vision_config = AutoConfig.for_model(vision, **SIGHT)
    config = AutoConfig.for_model(
        kind,
        text_config=text_config.to_dict(),
        vision_config=vision_config.to_dict(),
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    return write_with(folder, model, source)


def test_a_model_without_attention_names_its_layers_and_trains_one_of_them(
    tiny, run, out, tmp_path, capsys
):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **MAMBA))
    folder = write_with(tmp_path / "mamba", model, tiny)
    arguments = run("--max-steps 1", "--model", folder)

    line = error_line(arguments, capsys)
    assert line.endswith("no such layer; this model has in_proj, out_proj")
    line = error_line([*arguments, "--target-modules", "out_proj"], capsys)
    assert "out_proj" in line

    lf.main([*arguments, "--target-modules", "in_proj"])
    assert len(tensors(out)) == 2 * 2  # layers x (A, B)


def test_a_model_of_pictures_and_texts_gets_adapters_where_texts_are_read(
    tiny, train, out, tmp_path
):
    folder = tmp_path / "model"
    write_seeing(folder, "gemma3", "gemma3_text", "siglip_vision_model", tiny)

    train("--max-steps 2", "--model", folder)

    names = list(tensors(out))
    assert len(names) == 2 * 2 * 2
    assert not [name for name in names if "vision" in name]
    asked = ["--adapter", str(out), "--max-new-tokens", "2", "--no-load-in-4bit"]
    result = evaluate.main(asked)
    assert math.isfinite(result["general"]["ratio"])


def test_one_that_can_not_be_loaded_for_text_alone_is_named_as_that(tiny, refusal, tmp_path):
    folder = tmp_path / "model"
    write_seeing(folder, "mistral3", "mistral", "pixtral", tiny)
    line = refusal("--model", folder)
    assert "mistral3" in line
    assert "text alone" in line
    assert "-U" not in line


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_encoder_is_no_causal_language_model(tiny, refusal, out, tmp_path, kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small(kind, tiny))
    folder = write_with(tmp_path / "model", model, tiny)

    line = refusal("--target-modules query", "--model", folder)

    assert "no causal language model" in line
    assert not files(out)


@each_precision
def test_a_base_that_comes_quantised_is_trained_as_it_is(tiny, out, tmp_path, capsys, switch):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,  # of its maker: here fp32 counts
    )
    model = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=config)
    folder = write_with(tmp_path / "model-bnb-4bit", model, tiny)

    assert_one_step_equals_reference(folder, ROWS[:3], out, switch)

    assert "merge the adapter into its 16-bit original" in capsys.readouterr().out


def test_a_model_that_fails_in_training_alone_is_told_so(refusal, monkeypatch):
    forward = transformers.LlamaForCausalLM.forward

    def failing(self, *args, **kwargs):
        if self.training:
            raise RuntimeError("result type Float can't be cast to unsigned char")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", failing)
    line = refusal()

    assert "can't be trained on texts" in line
    assert "--no-load-in-4bit" in line


def test_a_model_without_chat_template_is_told_whose_is_used(tiny_models, train, capsys):
    train("--max-steps 1", "--model", tiny_models(template="none"))
    assert "no chat template: trained with that of Alpaca" in capsys.readouterr().out


@pytest.mark.parametrize(
    "template, ends",
    [("chatml", {"<|im_end|>", "</s>"}), ("zephyr", {"</s>"})],
)
def test_generation_config_stops_at_the_end_of_a_turn_also_where_the_base_does_not(
    tiny_models, train, out, tmp_path, template, ends
):
    folder = shutil.copytree(tiny_models(template=template), tmp_path / "model")
    change_settings(folder, "tokenizer_config.json", {"eos_token": "</s>"})
    change_settings(folder, "*config.json", {"eos_token_id": 2})

    train("--max-steps 1", "--model", folder)

    config = transformers.GenerationConfig.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert set(tokenizer.convert_ids_to_tokens(config.eos_token_id)) == ends
    assert not config.do_sample


@pytest.mark.parametrize("alpha", ["64", "7.5"])
def test_alpha_is_whole_where_it_is(train, out, alpha):
    train("--max-steps 1 --lora-alpha", alpha)
    text = (out / "adapter_config.json").read_text(encoding="utf-8")
    assert f'"lora_alpha": {alpha},' in text


# where it runs, and what it leaves alone ---------------------------------------------------------


def test_a_run_in_a_thread_leaves_signals_alone(run):
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(lf.main, run("--max-steps 2")).result()
    assert result["step"] == 2
    assert signal.getsignal(signal.SIGINT) == before


def test_what_another_launcher_left_in_the_environment_is_no_order():
    code = "import lora_finetune as lf; print(lf.RANK, lf.WORLD_SIZE)"
    left = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **left},
        capture_output=True,
        text=True,
    )
    assert found.stdout == "0 1\n", found.stderr


@pytest.mark.parametrize("slip", ["tokenize", "load_base", "micro_batches"])
def test_a_slip_in_the_script_is_not_told_as_something_else(train, monkeypatch, slip):
    def misspelt(*args):
        raise NameError("name 'tokeniser' is not defined")

    monkeypatch.setattr(lf, slip, misspelt)
    with pytest.raises(NameError):
        train("--max-steps 1")


def test_traceback_shows_the_whole_of_an_error(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(Exception, match="Unrecognized model"):
        train("--model", tmp_path)


# what is read, and where it is written ------------------------------------------------------------


def test_the_folder_of_a_model_is_no_output(tiny, data, tmp_path, capsys):
    model = shutil.copytree(tiny, tmp_path / "model")
    before = snapshot(model)
    line = error_line(flags(model, data, model, "--overwrite"), capsys)
    assert "holds a model; choose another --output" in line
    assert snapshot(model) == before


@pytest.mark.parametrize("option", ["--dataset", "--val-data"])
def test_data_that_can_be_read_only_once_is_refused(option, tiny, data, out, capsys):
    read_end, write_end = os.pipe()
    os.write(write_end, Path(data).read_bytes())
    os.close(write_end)
    line = error_line(flags(tiny, data, out, option, f"/dev/fd/{read_end}"), capsys)
    os.close(read_end)
    assert "read only once; write it into a file" in line


def test_the_noted_hash_is_that_of_the_rows_that_were_read(tiny, tmp_path, out, monkeypatch):
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS[:8])
    val = write_jsonl(tmp_path / "val.jsonl", RECORDS)
    hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in [rows, val]]
    load = lf.load_tokenizer

    def prepared_anew_meanwhile(name, record):
        write_jsonl(rows, RECORDS)
        write_jsonl(val, ROWS[:8])
        return load(name, record)

    monkeypatch.setattr(lf, "load_tokenizer", prepared_anew_meanwhile)
    lf.main(flags(tiny, rows, out, "--max-steps 1", "--val-data", val))
    noted = read_config(out)["data"]
    assert [noted["sha256"], noted["val_sha256"]] == hashes


def test_a_validation_row_of_unknown_tokens_is_refused_before_the_old_adapter_goes(
    tiny, data, out, tmp_path, capsys
):
    lf.main(flags(tiny, data, out, "--max-steps 1"))
    before = adapter(out)
    model = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["gizmo"])
    tokenizer.save_pretrained(model)
    val = write_jsonl(tmp_path / "val.jsonl", [{"instruction": "a?", "output": "gizmo"}])
    line = error_line(flags(model, data, out, "--overwrite", "--val-data", val), capsys)
    assert "lacks tokens of its tokenizer" in line
    assert adapter(out) == before


def test_a_run_whose_output_is_closed_ends_as_any_other(run, out, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    lf.main(run("--max-steps 1"))
    assert has_adapter(out)


def test_a_tokenizer_without_an_end_is_told(tiny_models, data, out, tmp_path, capsys):
    model = shutil.copytree(tiny_models(template="none"), tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    lf.main(flags(model, data, out, "--max-steps 1"))
    assert "no token ends an answer" in capsys.readouterr().out
