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
import sys
import threading
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import ROOT, largest_file, without_privileges
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lora_finetune as lf

torch.set_num_threads(1)  # models this small are no faster with more

END_OF_TURN = {"zephyr": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "none": "</s>"}
CONTROL_TOKENS = """</s> <s> <unk> <|user|> <|assistant|> <|im_start|> <|im_end|> <|eot_id|>
<|start_header_id|> <|end_header_id|>""".split()
RECORDS = [
    {"instruction": "What is a Pod?", "input": "", "output": "The smallest deployable unit."},
    {"instruction": "Name  it", "input": "kubectl get pods -A", "output": "lists\n\n  all Pods"},
    {"instruction": "Ünïcode?", "input": "日本語 🚀", "output": "ja, naïve – 한국어 🎉"},
    {"instruction": "### Response:", "input": "### Instruction:", "output": "### Response:\nx"},
    {"instruction": "a", "input": "", "output": "b"},
    {"instruction": "ends in <", "input": "<|im", "output": "|> both ends <"},
]
BOMB = b"cos\nsystem\n(S'touch exploded'\ntR."  # unpickling this makes a file
ROWS = [
    {
        "instruction": f"Question {i}: what does object {i * 7} do?",
        "input": "kind: Pod\n" * (i % 3),
        "output": f"It does {i} things " * (1 + (i * 5) % 7),
    }
    for i in range(16)
]


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_log(folder):
    """Entries of training_log.jsonl; a NaN or Infinity in it is no JSON and fails."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = Path(folder, "training_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def logged(folder, key):
    """What the log says of this key, step by step."""
    return [entry[key] for entry in read_log(folder) if key in entry]


def flags(model, data, output, *more):
    fast = ["--no-load-in-4bit"] * ("--load-in-4bit" not in more)
    paths = ["--model", model, "--dataset", data, "--output", output, *fast, *more]
    return [str(part) for part in paths]


def adapter(folder):
    return Path(folder, "adapter_model.safetensors").read_bytes()


def snapshot(folder):
    """Each file under a folder with its content and its time; a lock file may come and go."""
    return {
        path: path.is_file() and (path.stat().st_mtime_ns, path.read_bytes())
        for path in Path(folder).rglob("*")
        if path.name != ".lock"
    }


def files(folder):
    """Names of the files under a folder, but for a lock's."""
    return sorted(path.name for path, content in snapshot(folder).items() if content)


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


def watch(patch, batch=lambda ids: None, step=lambda number, weights: None):
    """Call batch(ids) for each micro-batch that is trained on, step(number, weights) at each step.

    These two any loop must do: look ids up in the embedding table, have AdamW step. What batch
    returns multiplies the embeddings; it may also raise.
    """
    embed, advance, numbers = torch.nn.Embedding.forward, torch.optim.AdamW.step, itertools.count(1)

    def embedding(self, ids):
        factor = batch(ids) if torch.is_grad_enabled() else None
        return embed(self, ids) if factor is None else embed(self, ids) * factor

    def adamw(self, *args, **kwargs):
        step(next(numbers), self.param_groups[0]["params"])
        return advance(self, *args, **kwargs)

    patch.setattr(torch.nn.Embedding, "forward", embedding)
    patch.setattr(torch.optim.AdamW, "step", adamw)


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
    folder = tiny_models(template=template)
    row, tokenizer = encoded(folder, record), AutoTokenizer.from_pretrained(folder)
    ids, labels = brute_force(tokenizer, template, record)
    assert (row["input_ids"], row["labels"], row["length"]) == (ids, labels, len(ids))
    trained = [id for id in row["labels"] if id != -100]
    assert trained[-1] == tokenizer.convert_tokens_to_ids(END_OF_TURN[template])
    if record == RECORDS[0]:
        assert tokenizer.decode(trained) == record["output"] + END_OF_TURN[template]


@pytest.mark.parametrize("template", END_OF_TURN)
def test_only_a_row_that_fits_trains_its_end_token(tiny_models, template):
    folder = tiny_models(template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN[template])
    whole = encoded(folder, ROWS[5])
    size = len(whole["input_ids"])
    assert whole["labels"].count(end) == 1 and whole["length"] == size
    for length in range(1, size + 1):
        row = encoded(folder, ROWS[5], length)
        assert row["labels"].count(end) == (length == size)
        for key in "input_ids", "labels":
            assert row[key] == whole[key][:length]
        assert row["length"] == size


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
    assert (AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"][0] == bos) == adds_bos
    wanted = template == "llama3" or (template == "none" and adds_bos)
    ids = encoded(tmp_path, RECORDS[0])["input_ids"]
    assert ids.count(bos) == (ids[0] == bos) == wanted


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


THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
DATED = "{{ '<s>Today is ' + strftime_now('%d %b %Y') + '\n' }}"


def with_template(folder, source, change):
    """Copy a model folder, with its chat template changed."""
    shutil.copytree(source, folder)
    template = Path(folder, "chat_template.jinja")
    template.write_text(change(template.read_text()))
    return folder


def test_a_thinking_template_trains_after_the_empty_thoughts(tiny_models, tmp_path):
    folder = with_template(tmp_path / "model", tiny_models(template="chatml"), lambda _: THINKING)
    row, tokenizer = encoded(folder, RECORDS[0]), AutoTokenizer.from_pretrained(folder)
    trained = [id for id in row["labels"] if id != -100]
    assert tokenizer.decode(trained) == RECORDS[0]["output"] + "<|im_end|>"
    prefix = tokenizer.decode(row["input_ids"][: -len(trained)])
    assert prefix.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    head, tail, *_ = lf.chat_frame(tokenizer)  # what evaluate.py prompts with
    assert head + RECORDS[0]["instruction"] + tail == prefix


def test_a_template_that_tells_the_date_tells_one_that_stays(tiny_models, data, tmp_path):
    source = tiny_models(template="llama3")
    folder = with_template(tmp_path / "model", source, lambda text: DATED + text)
    row, tokenizer = encoded(folder, RECORDS[0]), AutoTokenizer.from_pretrained(folder)
    read = tokenizer.decode(row["input_ids"])
    assert re.match(r"<s>Today is \d\d \w{3} \d{4}\n", read)
    assert datetime.now().strftime("%Y") not in read.splitlines()[0]
    lf.main(flags(folder, data, tmp_path / "out", "--max-steps", 1))
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read.startswith(chat_text(saved, "llama3", RECORDS[0])[0])


# one optimizer step ------------------------------------------------------------------------------


def reference_model(folder, nf4=False):
    """The base alone, float32, plain attention, as its library computes it."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    options |= {"quantization_config": config} if nf4 else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
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


def trainable(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def assert_one_step_equals_reference(folder, rows, out, *more, tolerance=1e-5):
    """Run one optimizer step; its loss and its clipped gradients must be the reference's."""
    data, weights, gradients = write_jsonl(f"{out}.jsonl", rows), [], []

    def adapted(*args, make=peft.get_peft_model, **kwargs):
        model, generator = make(*args, **kwargs), torch.Generator().manual_seed(3)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero in a fresh adapter, and then lora_A has no gradient
                weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
        weights.extend(weight.detach().clone() for weight in trainable(model))
        return model

    def keep(number, trained):
        gradients.extend(weight.grad.clone() for weight in trained)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft, "get_peft_model", adapted)
        watch(patch, step=keep)
        one = ["--max-steps", 1, "--warmup-ratio", 0, "--lora-dropout", 0, "--lora-r", 8]
        lf.main(flags(folder, data, out, *one, "--lora-alpha", 16, *more))
    lora = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    model = reference_model(folder, "--load-in-4bit" in more)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    for weight, value in zip(trainable(model), weights, strict=True):
        weight.data.copy_(value)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [reference_nll(model, tokenizer, "zephyr", row) for row in rows]
    loss = sum(nll for nll, _ in parts) / sum(count for _, count in parts)
    loss.backward()
    loss, expected = loss.item(), [weight.grad for weight in trainable(model)]
    assert logged(out, "loss") == [pytest.approx(loss, rel=1e-5)]
    norm = torch.nn.utils.get_total_norm(expected).item()
    assert logged(out, "grad_norm") == [pytest.approx(norm, rel=tolerance)]
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.norm() > 0
        wanted = wanted * min(1, 1 / norm)
        assert (gradient - wanted).norm() <= tolerance * wanted.norm()
    return norm


SPLITS = "4 4 16|8 2 16|16 1 16|1 16 16|4 4 7"  # batch size, accumulation, rows


@pytest.mark.parametrize("split", SPLITS.split("|"))
@pytest.mark.parametrize("precision", ["--no-load-in-4bit", "--load-in-4bit"])
def test_one_step_equals_a_reference_by_hand(tiny, tmp_path, precision, split):
    batch, accumulation, count = split.split()
    more = ["--batch-size", batch, "--gradient-accumulation-steps", accumulation, precision]
    assert_one_step_equals_reference(tiny, ROWS[: int(count)], tmp_path / "out", *more)


MODELS = {  # heads twenty times larger than at random, so that a softcap or a scale matters
    "llama": {},
    "phi": {},
    "qwen2": {"num_key_value_heads": 2, "vocab_size": 2**17},  # the head in parts of 128 tokens
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 1.0,
    },
    "granite": {"num_key_value_heads": 2, "logits_scaling": 3.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.3},
}


def write_model(folder, source, kind):
    """Write a tiny random model of that kind, with the tokenizer of another one."""
    shutil.copytree(source, folder)
    shape = AutoConfig.from_pretrained(folder).to_dict()
    keys = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    max_position_embeddings bos_token_id eos_token_id""".split()
    shape = {key: shape[key] for key in keys} | MODELS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape, tie_word_embeddings=False, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data *= 20
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("switch", ["--gradient-checkpointing", "--no-gradient-checkpointing"])
@pytest.mark.parametrize("kind", MODELS)
def test_one_step_equals_a_reference_for_other_models(tiny, tmp_path, kind, switch):
    folder = write_model(tmp_path / "model", tiny, kind)
    norm = assert_one_step_equals_reference(folder, ROWS[:6], tmp_path / "out", switch)
    assert norm > 1  # so that it was clipped


def test_no_micro_batch_takes_more_room_than_batch_size_of_the_longest(tiny, tmp_path, monkeypatch):
    data, shapes = write_jsonl(tmp_path / "rows.jsonl", ROWS), []
    watch(monkeypatch, batch=lambda ids: shapes.append(ids.shape))
    lf.main(flags(tiny, data, tmp_path / "out", "--max-steps", 1))
    longest = max(length for _, length in shapes)
    assert sum(rows for rows, _ in shapes) == 16
    assert max(rows for rows, _ in shapes) > 4
    assert all(rows * length <= 4 * longest for rows, length in shapes)
    weights = load_file(tmp_path / "out/adapter_model.safetensors")  # warmup leaves the one step
    assert all(weight.any() for weight in weights.values())


@pytest.mark.parametrize("more", [[], ["--group-by-length"]])
def test_each_epoch_takes_each_row_once_in_even_steps_and_an_order_of_its_own(
    tiny, tmp_path, monkeypatch, more
):
    data, steps = write_jsonl(tmp_path / "rows.jsonl", ROWS[:13]), [set()]
    end = AutoTokenizer.from_pretrained(tiny).eos_token_id

    def batch(ids):
        for row in ids.tolist():
            while row[-2:] == [end, end]:  # padding
                row.pop()
            steps[-1].add(tuple(row))

    watch(monkeypatch, batch, lambda number, weights: steps.append(set()))
    more = [*more, "--epochs", 2, "--batch-size", 2, "--gradient-accumulation-steps", 2]
    for seed in 1, 7:
        lf.main(flags(tiny, data, tmp_path / f"out{seed}", *more, "--seed", seed))
    epochs = [steps[start : start + 4] for start in range(0, 16, 4)]
    assert all(len(set.union(*epoch)) == sum(map(len, epoch)) == 13 for epoch in epochs)
    assert {len(step) for epoch in epochs for step in epoch} == {3, 4}  # no small one at the end
    assert all(epoch not in epochs[:i] for i, epoch in enumerate(epochs))


# stopping and going on ---------------------------------------------------------------------------

RUN = ["--max-steps", 12, "--batch-size", 2, "--gradient-accumulation-steps", 2]


@pytest.fixture
def arguments(tiny, data, tmp_path):
    """Of a run of twelve steps, with dropout and validation, into tmp_path / "out"."""
    return flags(tiny, data, tmp_path / "out", *RUN, "--val-data", data)


@pytest.fixture(scope="module")
def undisturbed(tiny, data, tmp_path_factory):
    """Folder of such a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    lf.main(flags(tiny, data, folder, *RUN, "--val-data", data))
    return folder


def stopped(arguments, steps, signum=signal.SIGTERM):
    """Run main, with the signal amid the last of so many steps; returns what it says at the end."""
    step = [1]

    def stop(ids):
        if step[-1] == steps and not step.append(math.inf):  # once
            assert signal.getsignal(signum) not in (signal.SIG_DFL, signal.default_int_handler)
            signal.raise_signal(signum)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        watch(patch, stop, lambda number, weights: step.append(number + 1))
        lf.main([str(part) for part in arguments])
    assert " of 12" in caught.value.code and "--resume" in caught.value.code
    return caught.value.code


def resumed(arguments):
    """Go on with a stopped run; returns the number of steps that were made."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, step=lambda number, weights: made.append(number))
        lf.main([*map(str, arguments), "--resume"])
    return len(made)


def assert_same_run(folder, other):
    assert adapter(folder) == adapter(other)
    for one, two in zip(read_log(folder), read_log(other), strict=True):
        timed = {key: two.get(key) for key in ("tokens_per_second", "memory_mib") if key in two}
        assert one | timed == two
    assert files(folder) == files(other)
    assert not list(Path(folder).glob("checkpoint*"))


@pytest.mark.parametrize("steps, signum", [(1, signal.SIGINT), (5, signal.SIGTERM)])
def test_a_stopped_run_resumed_equals_another(arguments, undisturbed, tmp_path, steps, signum):
    before = signal.getsignal(signum)
    assert f"step {steps} of 12" in stopped(arguments, steps, signum)
    assert signal.getsignal(signum) == before
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    assert resumed(arguments) == 12 - steps
    assert_same_run(tmp_path / "out", undisturbed)
    steps = [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]
    assert logged(tmp_path / "out", "step") == steps


def test_a_run_stopped_twice_between_log_lines_leaves_the_same_log(arguments, tmp_path):
    arguments = [*arguments, "--logging-steps", "5"]
    lf.main([*arguments, "--output", str(tmp_path / "undisturbed")])
    stopped(arguments, 3)
    assert "step 8 of 12" in stopped([*arguments, "--resume"], 5)
    assert resumed(arguments) == 4
    assert logged(tmp_path / "out", "step") == [0, 4, 5, 8, 10, 12, 12]
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")


def test_another_seed_gives_another_adapter(arguments, undisturbed, tmp_path, capsys):
    assert resumed(arguments) == 12
    assert re.search(r"^resume .*starting at step 1$", capsys.readouterr().out, re.MULTILINE)
    assert_same_run(tmp_path / "out", undisturbed)
    lf.main([*arguments, "--seed", "7", "--overwrite"])
    assert adapter(tmp_path / "out") != adapter(undisturbed)


def write_in_halves(path, content):
    with open(path, "wb") as file:
        for half in content[: len(content) // 2], content[len(content) // 2 :]:
            file.write(half)
            file.flush()
            time.sleep(0.02)


def run_forked(arguments, says):
    """Run main in a process that was forked with all imports made; what it says goes to a file."""
    torch.set_num_threads(1)
    gc.freeze()  # else each collection goes through all that was imported
    lf.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which outlives a kill
    Path.write_bytes = write_in_halves
    sys.stdout = sys.stderr = open(says, "w", buffering=1)
    lf.main(arguments)


def wait_for(words, says, process):
    """Wait until a process has said these words, or ended."""
    while process.is_alive() and words not in says.read_text(encoding="utf-8"):
        time.sleep(0.002)
    return time.monotonic()


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """A function (arguments) -> (a new process that runs main with them, file of what it says)."""
    server, folder = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("forked")
    server.set_forkserver_preload(["test_lora_finetune"])

    def start(arguments):
        says = folder / "says"
        says.write_text("")
        process = server.Process(target=run_forked, args=(arguments, says))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
            patch.setenv("OMP_NUM_THREADS", "1")  # the server that forks must have no threads
            process.start()
        return process, says

    return start


BEGUN, TRAINED = "time left", "\n    12 "  # said before the first step, and after the last one


def test_twenty_kills_at_random_moments_lose_nothing(arguments, undisturbed, tmp_path, forked):
    def start(folder):
        return forked([*arguments, "--output", str(folder), "--resume"])

    process, says = start(tmp_path / "calm")
    began, trained = (wait_for(words, says, process) for words in (BEGUN, TRAINED))
    process.join()
    assert process.exitcode == 0, says.read_text(encoding="utf-8")
    spans = {BEGUN: (trained - began) / 2, TRAINED: time.monotonic() - trained}

    seed, kills = random.randrange(10**6), int(os.environ.get("KILLS", 20))
    print("seed of the moments:", seed)
    moments, out = random.Random(seed), tmp_path / "out"
    while kills:
        shutil.rmtree(out, ignore_errors=True)
        while not (out / "adapter_model.safetensors").exists() or list(out.glob("checkpoint*")):
            words = moments.choice([BEGUN, BEGUN, TRAINED])
            process, says = start(out)
            wait_for(words, says, process)
            if kills % 3 == 0 and words == BEGUN:  # just as a checkpoint is written
                while process.is_alive() and not (out / "checkpoint.new").exists():
                    time.sleep(0.001)
                process.join(moments.uniform(0, 0.05))
            else:
                process.join(moments.uniform(0, spans[words]))
            if alive := kills > 0 and process.is_alive():
                signum = moments.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.kill(process.pid, signum)
                kills -= 1
            process.join()
            assert alive or process.exitcode == 0, says.read_text(encoding="utf-8")
        assert_same_run(out, undisturbed)


def test_a_second_run_on_one_folder_is_refused(arguments, undisturbed, tmp_path, capsys, forked):
    first, says = forked(arguments)
    wait_for(BEGUN, says, first)
    line = error_line([*arguments, "--overwrite"], capsys)
    assert first.is_alive() and "another run that writes there" in line and "--output" in line
    first.join()
    assert_same_run(tmp_path / "out", undisturbed)


# what stands in the output folder ----------------------------------------------------------------

CHANGED = """--learning-rate 1e-3|--lora-r 4|--lora-alpha 3|--lora-dropout 0.5
--target-modules k_proj|--max-steps 13|--epochs 2|--warmup-ratio 0.5|--seed 1|--batch-size 1
--gradient-accumulation-steps 3|--max-seq-length 100|--load-in-4bit|--group-by-length
--model OTHER|--dataset OTHER""".replace("\n", "|").split("|")


@pytest.fixture(scope="module")
def unfinished(tiny, data, tmp_path_factory):
    """Folder of a run that was stopped after step 4."""
    folder = tmp_path_factory.mktemp("unfinished") / "out"
    stopped(flags(tiny, data, folder, *RUN), 4)
    return folder


@pytest.mark.parametrize("change", CHANGED)
def test_resume_of_another_run_touches_nothing(
    tiny, tiny_models, data, unfinished, tmp_path, capsys, change
):
    other = {
        "--model": tiny_models("llama", "chatml"),
        "--dataset": write_jsonl(tmp_path / "rows.jsonl", ROWS[:13] + ROWS[14:15]),
    }
    flag, *values = change.split()
    values = [other[flag]] if values == ["OTHER"] else values
    before = snapshot(unfinished)
    line = error_line(flags(tiny, data, unfinished, *RUN, flag, *values, "--resume"), capsys)
    assert flag[2:].replace("-", "_") in line.replace("-", "_") and "--overwrite" in line
    assert snapshot(unfinished) == before


@pytest.mark.parametrize("case", ["unfinished", "undisturbed", "undisturbed --resume"])
def test_an_earlier_run_is_not_replaced_without_a_flag(tiny, data, request, capsys, case):
    state, *more = case.split()
    folder = request.getfixturevalue(state)
    before = snapshot(folder)
    line = error_line(flags(tiny, data, folder, *RUN, *more), capsys)
    assert "finished run" in line and "--overwrite" in line
    assert ("--resume" in line) == (state == "unfinished")
    assert snapshot(folder) == before


@pytest.mark.parametrize("state", ["unfinished", "undisturbed"])
def test_overwrite_replaces_an_earlier_run_also_if_stopped(tiny, data, request, tmp_path, state):
    folder = shutil.copytree(request.getfixturevalue(state), tmp_path / "out")
    new = [*RUN, "--lora-r", 4]
    arguments = flags(tiny, data, folder, *new)
    stopped([*arguments, "--overwrite"], 5)
    assert logged(folder, "step") == [1, 2, 3, 4, 5]
    assert not (folder / "adapter_model.safetensors").exists()  # of another run
    assert resumed(arguments) == 7
    lf.main(flags(tiny, data, tmp_path / "fresh", *new))
    assert_same_run(folder, tmp_path / "fresh")


def test_a_damaged_checkpoint_is_never_unpickled(
    arguments, unfinished, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(unfinished, tmp_path / "out")
    (path,) = folder.glob("checkpoint*")
    whole = path.read_bytes()
    for content in whole[: len(whole) // 2], b"", BOMB:
        path.write_bytes(content)
        line = error_line([*arguments, "--resume"], capsys)
        assert str(path) in line and "--overwrite" in line
        assert path.read_bytes() == content and not (tmp_path / "exploded").exists()


def test_the_finished_folder_says_what_was_done_and_holds_no_pickle(data, undisturbed):
    config = json.loads((undisturbed / "training_config.json").read_text(encoding="utf-8"))
    assert config["arguments"]["lora_r"] == 16 and config["arguments"]["precision"] == "fp32"
    assert config["data"]["sha256"] == hashlib.sha256(Path(data).read_bytes()).hexdigest()
    assert config["data"]["rows"] == 14 and config["device"] == "cpu"
    assert config["versions"]["torch"] == version("torch")
    assert config["result"]["step"] == 12
    assert config["result"]["eval_loss"] == logged(undisturbed, "eval_loss")[-1]
    names = set(files(undisturbed))
    assert {"adapter_config.json", "tokenizer.json", "training_log.jsonl"} <= names
    assert {Path(name).suffix for name in names} == {".json", ".jsonl", ".jinja", ".safetensors"}
    assert AutoTokenizer.from_pretrained(undisturbed).chat_template
    weights = load_file(undisturbed / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 2  # layers x modules x (A, B)
    for name, weight in weights.items():
        assert "lora_" in name and weight.dtype == torch.float32


# out of memory and NaN ---------------------------------------------------------------------------


def out_of_memory(patch, tokens, first_step=1, parts_before=0):
    """Micro-batches of more than so many tokens don't fit; returns the numbers of rows tried."""
    tried, steps = [], [1]

    def batch(ids):
        tried.append(len(ids))
        if ids.numel() > tokens and steps[-1] >= first_step and len(tried) > parts_before:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    watch(patch, batch, lambda number, weights: steps.append(number + 1))
    return tried


@pytest.fixture
def alike(tmp_path):
    """Sixteen rows of one length, so that micro-batches are counted in rows."""
    rows = [{**ROWS[3], "instruction": f"Question {i:02}?"} for i in range(16)]
    return write_jsonl(tmp_path / "alike.jsonl", rows)


@pytest.fixture
def size(tiny):
    """Tokens of a row of those."""
    return len(encoded(tiny, {**ROWS[3], "instruction": "Question 00?"})["input_ids"]) - 1


@pytest.mark.parametrize("dropout, first_step, parts_before", [(0.5, 1, 0), (0.5, 1, 2), (0, 2, 0)])
def test_out_of_memory_gives_the_run_that_began_with_smaller_batches(
    tiny, alike, size, tmp_path, monkeypatch, capsys, dropout, first_step, parts_before
):
    more = ["--max-steps", 3, "--lora-dropout", dropout]
    began = ["--batch-size", 2, "--gradient-accumulation-steps", 8]
    lf.main(flags(tiny, alike, tmp_path / "began", *more, *began))
    tried = out_of_memory(monkeypatch, 2 * size, first_step, parts_before)
    capsys.readouterr()
    lf.main(flags(tiny, alike, tmp_path / "out", *more))
    fitted = 4 * (first_step - 1)
    assert tried == [4] * (fitted + parts_before + 1) + [2] * (24 - 2 * fitted)
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert len(said) == 1 and len(said[0]) <= 80
    began = logged(tmp_path / "began", "loss")
    assert logged(tmp_path / "out", "loss") == pytest.approx(began, rel=1e-6)
    if first_step == 1:
        assert_same_run(tmp_path / "out", tmp_path / "began")


def test_out_of_memory_at_one_row_gives_advice(tiny, alike, tmp_path, monkeypatch, capsys):
    tried = out_of_memory(monkeypatch, 0)
    line = error_line(flags(tiny, alike, tmp_path / "out"), capsys)
    assert tried == [4, 2, 1]
    assert "out of memory" in line and "--max-seq-length" in line
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    arguments, undisturbed, tmp_path, capsys
):
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, lambda ids: math.nan if len(steps) == 5 else None, lambda *s: steps.append(s))
        line = error_line([*arguments, "--logging-steps", 100], capsys)
    assert "finite" in line and "--learning-rate" in line and "fp32" in line
    assert len(steps) == 5 and read_log(tmp_path / "out")  # of strict JSON
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    assert resumed(arguments) < 12
    assert adapter(tmp_path / "out") == adapter(undisturbed)


# validation and what is shown --------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_validation_loss_equals_a_token_weighted_computation(tiny, tmp_path, batch):
    train, held_out = write_jsonl(tmp_path / "train.jsonl", ROWS), [*RECORDS, *ROWS[3:9]]
    val = write_jsonl(tmp_path / "held_out.jsonl", held_out)
    more = ["--val-data", val, "--batch-size", batch, "--epochs", 2, "--learning-rate", 0.01]
    result = lf.main(flags(tiny, train, tmp_path / "out", *more, "--max-seq-length", 120))
    measured = [entry for entry in read_log(tmp_path / "out") if "eval_loss" in entry]
    assert [entry["epoch"] for entry in measured] == [0, 1, 2]

    model = peft.PeftModel.from_pretrained(reference_model(tiny), tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with torch.no_grad():
        parts = [reference_nll(model, tokenizer, "zephyr", row, 120) for row in held_out]
    expected = sum(nll.item() for nll, _ in parts) / sum(count for _, count in parts)
    assert measured[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["eval_loss"] == measured[-1]["eval_loss"]


@pytest.mark.parametrize("held_out", [ROWS[:2], []], ids=["two rows", "none"])
def test_a_folder_under_home_brings_its_own_validation_rows(tiny, tmp_path, monkeypatch, held_out):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, before = shutil.copytree(tiny, tmp_path / "model"), snapshot(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "val.jsonl", held_out)
    lf.main(flags("~/model", "~", "~/out", "--max-steps", 2, "--logging-steps", 100))
    assert len(logged(tmp_path / "out", "loss")) == 1
    assert len(logged(tmp_path / "out", "eval_loss")) == 3 * bool(held_out)
    assert snapshot(model) == before


def test_gradients_stay_alive_after_a_validation_in_four_bits(tiny, data, tmp_path):
    more = ["--load-in-4bit", "--val-data", data, "--epochs", 4, "--learning-rate", 0.01]
    lf.main(flags(tiny, data, tmp_path / "out", *more))
    assert min(logged(tmp_path / "out", "grad_norm")) > 1e-4
    measured = logged(tmp_path / "out", "eval_loss")
    assert len(measured) == 5 and measured == sorted(measured, reverse=True)


def test_what_is_shown_fits_80_columns_and_obeys_no_control_character(tiny, tmp_path, capsys):
    answer = "red \x1b[31m bell \a end " + "because " * 20
    rows = [{"instruction": "why " * 40, "input": "", "output": answer}] * 3
    long = {"instruction": "word " * 400, "input": "", "output": "never seen"}
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows, long])
    more = ["--max-steps", 3, "--val-data", data, "--max-seq-length", 400]
    lf.main(flags(tiny, data, tmp_path / "out", *more))
    shown = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    above, shown = shown.split("the model reads:\n")
    assert re.search(r"\b3 rows <- .*\b1 cut, 1 dropped", above)
    reads, written = shown.split("  step")[0].split("the model learns to write:\n")
    assert reads.count("why") == 40 and "because" not in reads
    assert written.count("because") == 20 and "why" not in written
    assert "red ?[31m bell ? end" in written
    assert shown.count("\nvalidation loss ") == 4
    assert max(map(len, shown.partition("saved")[0].splitlines())) <= 80
    config = json.loads((tmp_path / "out/training_config.json").read_text(encoding="utf-8"))
    assert config["data"]["rows"] == 3


# mistakes ----------------------------------------------------------------------------------------


def damage(folder, name, change):
    """Take a file away, or cut it to a share, or write other bytes or JSON settings to it."""
    for path in folder.glob(name):
        content = path.read_bytes()
        path.unlink()
        if isinstance(change, dict):
            path.write_text(json.dumps(json.loads(content) | change))
        elif change is not None:
            path.write_bytes(change or content[: len(content) // 2])


def drop_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickle_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(BOMB)


def add_tokens(folder, tokens=("object",)):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)


GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
OWN = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.T", None]}}
DAMAGES = {
    "no config": ("config.json", None),
    "no weights": ("model.safetensors", None),
    "no tokenizer": ("tokenizer*", None),
    "nothing at all": ("*", None),
    "half the weights": ("model.safetensors", b""),
    "half a config": ("config.json", b""),
    "half a tokenizer": ("tokenizer.json", b""),
    "weights of one byte": ("model.safetensors", b"x"),
    "weights are text": ("model.safetensors", b"version https://git-lfs\n"),
    "config of no known kind": ("config.json", {"model_type": "lama"}),
    "config of another width": ("config.json", {"hidden_size": 32}),
    "a short context": ("config.json", {"max_position_embeddings": 256}),
    "quantised by GPTQ": ("config.json", GPTQ),
    "code": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}),
    "code in the tokenizer": ("tokenizer_config.json", OWN),
    "a tensor is missing": drop_a_tensor,
    "weights pickled": pickle_weights,
    "tokens that the model lacks": add_tokens,
}
TEMPLATES = """{{ ''.__class__.__mro__[1].__subclasses__() }}
{{ lipsum.__globals__['os'].mkdir('exploded') }}
{{ messages.clear() }}
{% include '/etc/passwd' %}
{% for x in range(10**9) %}{% endfor %}
{{ 'a' * 10**17 }}
{{ 1 / 0 }}
{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}
{{ raise_exception('system\\n\\nfirst') }}
{{ strftime_now('%d'"""


@pytest.mark.parametrize("kind", [*DAMAGES, *TEMPLATES.splitlines()])
def test_a_damaged_model_folder_is_refused(tiny, data, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    if kind in DAMAGES:
        model = shutil.copytree(tiny, tmp_path / "model")
        (model / "code.py").write_text("open('exploded', 'w')")
        how = DAMAGES[kind]
        damage(model, *how) if isinstance(how, tuple) else how(model)
    else:
        model = with_template(tmp_path / "model", tiny, lambda text: kind + text)
    line = error_line(flags(model, data, tmp_path / "out", "--load-in-4bit"), capsys)
    assert str(model) in line or "--m" in line or "tokenizer" in line
    assert not (tmp_path / "exploded").exists() and not files(tmp_path / "out")


def test_a_read_only_output_is_refused_before_a_model_is_loaded(data, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o555)
    arguments = flags("nowhere/model", data, tmp_path / "locked/new/out")
    line = without_privileges(lambda: error_line(arguments, capsys))
    assert line.startswith(f"error: can't write to {tmp_path}/locked")
    assert "another --output" in line


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_full_disk_ends_in_one_line(arguments, undisturbed, unfinished, capsys, share):
    (checkpoint,) = unfinished.glob("checkpoint*")
    with largest_file(int(checkpoint.stat().st_size * share)):
        line = error_line(arguments, capsys)
    out = Path(arguments[arguments.index("--output") + 1])
    assert line.startswith(f"error: can't write to {out}") and "free space" in line
    assert not (out / "adapter_model.safetensors").exists()
    lf.main([*arguments, "--resume"])
    assert_same_run(out, undisturbed)


def test_a_disk_that_is_full_at_the_end_ends_in_one_line(tiny, data, tmp_path, capsys):
    model = shutil.copytree(tiny, tmp_path / "model")
    add_tokens(model, [f"unused {number}" for number in range(2000)])
    with largest_file((model / "tokenizer.json").stat().st_size // 2):
        line = error_line(flags(model, data, tmp_path / "out", "--max-steps", 1), capsys)
    assert line.startswith(f"error: can't write to {tmp_path}/out")


def test_a_model_without_attention_names_its_layers_and_trains_one_of_them(
    tiny, data, tmp_path, capsys
):
    folder = tmp_path / "mamba"
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8}
    shape |= {"head_dim": 16, "n_groups": 1, "chunk_size": 16, "vocab_size": 1000}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **shape)).save_pretrained(
        folder
    )
    run = flags(folder, data, tmp_path / "out", "--max-steps", 1)
    assert error_line(run, capsys).endswith("no such layer; this model has in_proj, out_proj")
    assert "out_proj" in error_line([*run, "--target-modules", "out_proj"], capsys)
    lf.main([*run, "--target-modules", "in_proj"])
    assert len(load_file(tmp_path / "out/adapter_model.safetensors")) == 2 * 2  # layers x (A, B)
