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
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import ROOT, largest_file, llama_tokenizer, without_privileges
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import evaluate
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
    end_of_turn = END_OF_TURN.get(template, "</s>")
    end = whole.index(end_of_turn, len(prompt) + len(record["output"]))
    return prompt, whole[: end + len(end_of_turn)]


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
    if template == "llama3":  # whose template trims what is said
        record = {name: value.strip() for name, value in record.items()}
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
        if hasattr(module, "compute_dtype"):  # of a base that comes quantised
            module.compute_dtype = torch.float32
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


def assert_one_step_equals_reference(folder, rows, out, *more, template="zephyr", tolerance=1e-5):
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
    parts = [reference_nll(model, tokenizer, template, row) for row in rows]
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


def template_of(form):
    prompt, answer = (re.sub("{.}", "{{ m.content }}", part) for part in FORMS[form])
    turn = "{% if m.role == 'user' %}" + prompt + "{% else %}" + answer + "{% endif %}"
    return "{% for m in messages %}" + turn + "{% endfor %}"


@pytest.fixture(scope="module")
def vocabularies(tiny_models):
    """Two tokenizers that merge a blank with the letter after it."""
    letters = [chr(code) for code in range(33, 127)]
    merged = [("▁", "A"), ("▁", "P"), ("▁P", "o"), ("▁Po", "d"), ("▁", "▁"), ("▁▁", "▁▁")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    pieces += ["".join(pair) for pair in merged]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    over = AutoTokenizer.from_pretrained(tiny_models(template="chatml"))
    parts = json.loads(over.backend_tokenizer.to_str())
    for pair in ("Ċ", "Ġ"), (">", ">"):  # tokens that reach over the border of prompt and answer
        parts["model"]["vocab"]["".join(pair)] = len(over) + len(parts["model"]["merges"])
        parts["model"]["merges"].insert(0, list(pair))
    backend = Tokenizer.from_str(json.dumps(parts))
    over = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    return {
        "byte-level": AutoTokenizer.from_pretrained(tiny_models(template="chatml")),
        "byte-level, over the border": over,
        "SentencePiece": llama_tokenizer(vocab, merged, legacy=False),
    }


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "vocabulary", ["byte-level", "byte-level, over the border", "SentencePiece"]
)
def test_an_answer_is_learned_whole_after_the_ids_that_are_asked(
    vocabularies, vocabulary, form, answer
):
    tokenizer, record = vocabularies[vocabulary], {**RECORDS[0], "output": ANSWERS[answer]}
    tokenizer.chat_template = template_of(form)
    frame = lf.chat_frame(tokenizer)
    row = lf.encode(record, tokenizer, frame, 4096)
    read, learned = [row["input_ids"][part] for part in split_at(row["prompt_tokens"])]
    question = [{"role": "user", "content": record["instruction"]}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)
    assert read == asked["input_ids"]
    asked = evaluate.encode(record | {"output": ""}, tokenizer, frame, 4096)
    assert read == asked["input_ids"][: asked["prompt_tokens"]]
    assert row["labels"] == [-100] * len(read) + learned
    told = tokenizer.decode(learned)
    wanted = FORMS[form][1].replace("{a}", record["output"])
    if vocabulary == "SentencePiece":  # its decoder takes a blank away; it lacks <|im_end|>
        told = told.strip(" ").removesuffix("<|im_end|></s>") + "<|im_end|>" * (form == "chatml")
        wanted = wanted.strip(" ")
    assert told == wanted


def split_at(place):
    return slice(place), slice(place, None)


@pytest.mark.parametrize("form", ["mistral", "llama2", "vicuna"])
def test_one_step_learns_the_first_word_after_a_blank(tiny, tmp_path, form):
    folder = with_template(tmp_path / "model", tiny, lambda _: template_of(form))
    rows = [{**row, "output": "A Pod " * 3} for row in ROWS[:3]]
    assert_one_step_equals_reference(folder, rows, tmp_path / "out", template=form)


# the optimizer and the log -----------------------------------------------------------------------


def test_the_rate_rises_evenly_then_falls_by_half_a_cosine(tiny, data, tmp_path):
    more = ["--max-steps", 10, "--warmup-ratio", 0.2, "--learning-rate", 0.01]
    lf.main(flags(tiny, data, tmp_path / "out", *more))
    falling = [0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert logged(tmp_path / "out", "learning_rate") == pytest.approx([0, 0.005, *falling])


def test_two_updates_are_those_of_adamw_without_decay(tiny, data, tmp_path, monkeypatch):
    """By hand: Loshchilov and Hutter 2019, betas 0.9 and 0.999, epsilon 1e-8."""
    seen = []

    def keep(number, weights):
        seen.append([(weight.detach().clone(), weight.grad.clone()) for weight in weights])

    watch(monkeypatch, step=keep)
    more = ["--max-steps", 3, "--learning-rate", 0.01, "--warmup-ratio", 0]
    lf.main(flags(tiny, data, tmp_path / "out", *more))
    rates = logged(tmp_path / "out", "learning_rate")
    for layer in zip(*seen):
        mean = square = torch.zeros_like(layer[0][0])
        for number in (1, 2):
            (weight, gradient), (after, _) = layer[number - 1 : number + 1]
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            change = mean / (1 - 0.9**number) / ((square / (1 - 0.999**number)).sqrt() + 1e-8)
            wanted = weight - rates[number - 1] * change
            assert torch.allclose(after, wanted, rtol=1e-5, atol=1e-8)


def test_a_log_line_tells_the_mean_of_its_steps(tiny, data, tmp_path):
    more = ["--max-steps", 7, "--learning-rate", 0.01]
    lf.main(flags(tiny, data, tmp_path / "each", *more))
    lf.main(flags(tiny, data, tmp_path / "out", *more, "--logging-steps", 5))
    each = logged(tmp_path / "each", "loss")
    assert logged(tmp_path / "out", "step") == [5, 7]
    means = [sum(each[:5]) / 5, sum(each[5:]) / 2]
    assert logged(tmp_path / "out", "loss") == pytest.approx(means)


def test_the_tokens_of_a_second_are_those_that_were_read(tiny, data, tmp_path, monkeypatch):
    clock = itertools.count(0, 0.5)  # each look at it half a second later
    monkeypatch.setattr(lf.time, "perf_counter", lambda: next(clock))
    lf.main(flags(tiny, data, tmp_path / "out", "--epochs", 2))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    texts = [chat_text(tokenizer, "zephyr", row)[1] for row in ROWS[:14]]
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert logged(tmp_path / "out", "tokens_per_second") == [2 * tokens, 2 * tokens]


def test_keep_best_saves_the_epoch_of_the_lowest_validation_loss(tiny, data, tmp_path, capsys):
    """Too high a rate: it gets better first, then worse."""
    more = ["--val-data", write_jsonl(tmp_path / "val.jsonl", RECORDS)]
    more += ["--learning-rate", 0.05, "--warmup-ratio", 0, "--epochs", 5]
    last = lf.main(flags(tiny, data, tmp_path / "last", *more))
    assert "lowest after epoch" in capsys.readouterr().out
    result = lf.main(flags(tiny, data, tmp_path / "best", *more, "--keep-best"))
    measured = logged(tmp_path / "best", "eval_loss")
    assert measured == logged(tmp_path / "last", "eval_loss")
    epoch = measured.index(min(measured[1:]))
    assert epoch < 5 and last["eval_loss"] == measured[-1]
    assert (result["eval_loss"], result["kept_epoch"]) == (measured[epoch], epoch)
    config = json.loads((tmp_path / "best/training_config.json").read_text(encoding="utf-8"))
    assert config["result"] == result

    model = peft.PeftModel.from_pretrained(reference_model(tiny), tmp_path / "best").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with torch.no_grad():
        parts = [reference_nll(model, tokenizer, "zephyr", row) for row in RECORDS]
    saved = sum(nll.item() for nll, _ in parts) / sum(count for _, count in parts)
    assert saved == pytest.approx(result["eval_loss"], rel=1e-5)


def test_a_run_that_keeps_its_best_keeps_it_when_stopped(tiny, data, tmp_path):
    val = write_jsonl(tmp_path / "val.jsonl", RECORDS)
    more = [*RUN, "--val-data", val, "--learning-rate", 0.05, "--keep-best"]
    lf.main(flags(tiny, data, tmp_path / "whole", *more))
    arguments = flags(tiny, data, tmp_path / "out", *more)
    stopped(arguments, 9)
    resumed(arguments)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_keep_best_needs_validation_rows(tiny, data, tmp_path, capsys):
    line = error_line(flags(tiny, data, tmp_path / "out", "--keep-best"), capsys)
    assert "--val-data" in line and not files(tmp_path / "out")


@pytest.mark.parametrize("asked, used", [("fp16", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")])
def test_a_cpu_computes_in_bf16_only_where_asked(tiny, data, tmp_path, capsys, asked, used):
    seen = set()
    with pytest.MonkeyPatch.context() as patch:
        embed = torch.nn.Embedding.forward

        def embedding(self, ids):
            seen.add(self.weight.dtype)
            return embed(self, ids)

        patch.setattr(torch.nn.Embedding, "forward", embedding)
        lf.main(flags(tiny, data, tmp_path / "out", "--max-steps", 2, "--precision", asked))
    assert seen == {{"fp32": torch.float32, "bf16": torch.bfloat16}[used]}
    assert f"training on the CPU in {used}" in capsys.readouterr().out
    weights = load_file(tmp_path / "out/adapter_model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert logged(tmp_path / "out", "loss")[0] == pytest.approx(5.89, abs=0.3)


@pytest.mark.parametrize("name, told", [("amx_bf16", 1), ("avx512_bf16", 1), ("avx2", 0)])
def test_a_cpu_that_knows_bf16_is_said_to(tiny, data, tmp_path, capsys, monkeypatch, name, told):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True}, raising=False)
    lf.main(flags(tiny, data, tmp_path / "out", "--max-steps", 1))
    assert capsys.readouterr().out.count("--precision bf16 is") == told


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
    os.kill(first.pid, signal.SIGSTOP)  # else it may end before the second has begun
    line = error_line([*arguments, "--overwrite"], capsys)
    os.kill(first.pid, signal.SIGCONT)
    assert first.is_alive() and "another run that writes there" in line and "--output" in line
    first.join()
    assert_same_run(tmp_path / "out", undisturbed)


def test_resume_goes_by_the_rows_of_a_step_not_by_how_they_are_cut(tiny, data, tmp_path):
    more = ["--max-steps", 12, "--lora-dropout", 0]
    lf.main(flags(tiny, data, tmp_path / "whole", *more, "--batch-size", 1))
    stopped(flags(tiny, data, tmp_path / "out", *more, "--batch-size", 1), 5)
    cut = ["--batch-size", 2, "--gradient-accumulation-steps", 2]
    assert resumed(flags(tiny, data, tmp_path / "out", *more, *cut)) == 7
    losses = logged(tmp_path / "out", "loss")
    assert losses == pytest.approx(logged(tmp_path / "whole", "loss"), rel=1e-5)


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


def test_a_run_that_gets_validation_rows_when_it_goes_on_comes_to_its_end(tiny, data, tmp_path):
    arguments = flags(tiny, data, tmp_path / "out", *RUN)
    stopped(arguments, 11)
    assert resumed([*arguments, "--val-data", data]) == 1
    assert len(logged(tmp_path / "out", "eval_loss")) == 1


def test_keep_best_goes_on_with_the_same_validation_rows_alone(tiny, data, tmp_path, capsys):
    arguments = flags(tiny, data, tmp_path / "out", *RUN, "--keep-best", "--val-data", data)
    stopped(arguments, 5)
    other = write_jsonl(tmp_path / "other.jsonl", RECORDS)
    assert "val_data" in error_line([*arguments, "--resume", "--val-data", other], capsys)


def test_overwrite_drops_the_checkpoint_of_a_stopped_run_at_once(tiny, data, unfinished, tmp_path):
    out = shutil.copytree(unfinished, tmp_path / "out")
    arguments = flags(tiny, data, out, *RUN)

    def killed(ids):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watch(patch, killed)
        lf.main([*arguments, "--overwrite"])
    assert resumed(arguments) == 12


def test_files_of_the_users_own_stay_as_they_are(tiny, data, tmp_path):
    (tmp_path / "README.md").write_text("my notes")
    lf.main(flags(tiny, data, tmp_path, "--max-steps", 1))
    assert (tmp_path / "README.md").read_text() == "my notes"


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
    return len(encoded(tiny, {**ROWS[3], "instruction": "Question 00?"})["input_ids"])


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


# models that people bring ------------------------------------------------------------------------


def write_with(folder, model, source):
    """A model folder with the tokenizer of another one."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def small(kind, source, **more):
    """The config of a tiny model of that kind with as many tokens as the source has."""
    shape = {"vocab_size": len(AutoTokenizer.from_pretrained(source)), "hidden_size": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return AutoConfig.for_model(kind, **shape | {"max_position_embeddings": 1024} | more)


SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SIGHT |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}


def write_seeing(folder, kind, text, vision, source):
    """A model of pictures and texts."""
    parts = {"text_config": small(text, source, **HEADS).to_dict()}
    parts["vision_config"] = AutoConfig.for_model(vision, **SIGHT).to_dict()
    config = AutoConfig.for_model(kind, **parts, **{"mm_tokens_per_image": 4})
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    return write_with(folder, model, source)


def test_a_model_of_pictures_and_texts_gets_adapters_where_texts_are_read(tiny, data, tmp_path):
    model = ["gemma3", "gemma3_text", "siglip_vision_model"]
    folder = write_seeing(tmp_path / "model", *model, tiny)
    lf.main(flags(folder, data, tmp_path / "out", "--max-steps", 2))
    names = load_file(tmp_path / "out/adapter_model.safetensors").keys()
    assert len(names) == 2 * 2 * 2 and not [name for name in names if "vision" in name]
    result = evaluate.main([*EVALUATE, "--adapter", str(tmp_path / "out")])
    assert math.isfinite(result["general"]["ratio"])


EVALUATE = ["--max-new-tokens", "2", "--no-load-in-4bit"]


def test_one_that_can_not_be_loaded_for_text_alone_is_named_as_that(tiny, data, tmp_path, capsys):
    folder = write_seeing(tmp_path / "model", "mistral3", "mistral", "pixtral", tiny)
    line = error_line(flags(folder, data, tmp_path / "out"), capsys)
    assert "mistral3" in line and "text alone" in line and "-U" not in line


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_encoder_is_no_causal_language_model(tiny, data, tmp_path, capsys, kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small(kind, tiny))
    folder = write_with(tmp_path / "model", model, tiny)
    line = error_line(flags(folder, data, tmp_path / "out", "--target-modules", "query"), capsys)
    assert "no causal language model" in line and not files(tmp_path / "out")


@pytest.mark.parametrize("switch", ["--load-in-4bit", "--no-load-in-4bit"])
def test_a_base_that_comes_quantised_is_trained_as_it_is(tiny, tmp_path, capsys, switch):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,  # of its maker: here fp32 counts
    )
    model = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=config)
    folder = write_with(tmp_path / "model-bnb-4bit", model, tiny)
    assert_one_step_equals_reference(folder, ROWS[:3], tmp_path / "out", switch)
    assert "merge the adapter into its 16-bit original" in capsys.readouterr().out


def test_a_model_that_fails_in_training_alone_is_told_so(tiny, data, tmp_path, capsys, monkeypatch):
    forward = transformers.LlamaForCausalLM.forward

    def failing(self, *args, **kwargs):
        if self.training:
            raise RuntimeError("result type Float can't be cast to unsigned char")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", failing)
    line = error_line(flags(tiny, data, tmp_path / "out"), capsys)
    assert "can't be trained on texts" in line and "--no-load-in-4bit" in line


def test_a_model_without_chat_template_is_told_whose_is_used(tiny_models, data, tmp_path, capsys):
    lf.main(flags(tiny_models(template="none"), data, tmp_path / "out", "--max-steps", 1))
    assert "no chat template: trained with that of Alpaca" in capsys.readouterr().out


def break_a_weight(name, value):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        weights[f"{name}.weight"][-1, 0] = value
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


def make_an_adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def lose_the_vocabulary(kind):
    def change(folder):
        damage(folder, "tokenizer.json", None)
        damage(folder, "tokenizer_config.json", {"tokenizer_class": kind})

    return change


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2200119864\n"
CAUSES = {  # what is wrong with the folder: the words that tell it
    "NaN in a layer": (break_a_weight("model.layers.0.mlp.up_proj", math.nan), "not finite"),
    "inf in a layer": (break_a_weight("model.layers.1.mlp.down_proj", math.inf), "not finite"),
    "NaN for a rare token": (break_a_weight("model.embed_tokens", math.nan), "not finite"),
    "NaN in the head": (break_a_weight("lm_head", math.nan), "not finite"),
    "an adapter": (make_an_adapter, "is an adapter", "base_model_name_or_path"),
    "a pointer": (("model.safetensors", POINTER), "model.safetensors", "git lfs pull"),
    "a pointer there": (("tokenizer.json", POINTER), "tokenizer.json", "git lfs pull"),
    "no vocabulary": (lose_the_vocabulary("LlamaTokenizer"), "tokenizer", "tokenizer.json"),
    "no vocabulary, GPT-2": (lose_the_vocabulary("GPT2Tokenizer"), "tokenizer", "tokenizer.json"),
}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("switch", ["--load-in-4bit", "--no-load-in-4bit"])
def test_what_is_wrong_with_a_model_is_named(tiny, data, tmp_path, capsys, cause, switch):
    model = shutil.copytree(tiny, tmp_path / "model")
    change, *words = CAUSES[cause]
    damage(model, *change) if isinstance(change, tuple) else change(model)
    line = error_line(flags(model, data, tmp_path / "out", switch), capsys)
    assert all(word in line for word in [str(model), *words])
    assert not files(tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["./model", "/no/model", "a/b/c", "~/no model", "a\\b", "D:/a", ".b"]
)
def test_a_path_that_is_no_folder_is_not_asked_of_the_hub(
    data, tmp_path, capsys, monkeypatch, name
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    line = error_line(flags(name, data, tmp_path / "out"), capsys)
    assert "no folder" in line


def test_a_run_in_a_thread_leaves_signals_alone(tiny, data, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = flags(tiny, data, tmp_path / "out", "--max-steps", 2)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(lf.main, run).result()["step"] == 2
    assert signal.getsignal(signal.SIGINT) == before


def test_what_another_launcher_left_in_the_environment_is_no_order(tmp_path):
    code = "import lora_finetune as lf; print(lf.RANK, lf.WORLD_SIZE)"
    left = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=os.environ | left, capture_output=True, text=True)
    assert found.stdout == "0 1\n", found.stderr


@pytest.mark.parametrize(
    "template, ends", [("chatml", {"<|im_end|>", "</s>"}), ("zephyr", {"</s>"})]
)
def test_generation_config_stops_at_the_end_of_a_turn_also_where_the_base_does_not(
    tiny_models, data, tmp_path, template, ends
):
    folder = shutil.copytree(tiny_models(template=template), tmp_path / "model")
    damage(folder, "tokenizer_config.json", {"eos_token": "</s>"})
    damage(folder, "*config.json", {"eos_token_id": 2})
    lf.main(flags(folder, data, tmp_path / "out", "--max-steps", 1))
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(tokenizer.convert_ids_to_tokens(config.eos_token_id)) == ends
    assert not config.do_sample


@pytest.mark.parametrize("flag, saved", [("64", "64"), ("7.5", "7.5")])
def test_alpha_is_whole_where_it_is(tiny, data, tmp_path, flag, saved):
    lf.main(flags(tiny, data, tmp_path / "out", "--max-steps", 1, "--lora-alpha", flag))
    text = (tmp_path / "out/adapter_config.json").read_text(encoding="utf-8")
    assert f'"lora_alpha": {saved},' in text


@pytest.mark.parametrize("slip", ["tokenize", "load_base", "micro_batches"])
def test_a_slip_in_the_script_is_not_told_as_something_else(
    tiny, data, tmp_path, monkeypatch, slip
):
    def misspelt(*args):
        raise NameError("name 'tokeniser' is not defined")

    monkeypatch.setattr(lf, slip, misspelt)
    with pytest.raises(NameError):
        lf.main(flags(tiny, data, tmp_path / "out", "--max-steps", 1))


def test_traceback_shows_the_whole_of_an_error(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(Exception, match="Unrecognized model"):
        lf.main(flags(tmp_path, data, tmp_path / "out"))
