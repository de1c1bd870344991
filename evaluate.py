"""Compare a base model with its fine-tuned self: answers side by side, perplexity with an interval.

Reads   --adapter: the folder lora_finetune.py wrote; --val-data and --prompts if given
Writes  --output: eval_results.json, and beside it eval_results.html, a page to look at

    python prepare_dataset.py --input data/raw_qa.csv --output data/prepared
    python lora_finetune.py --dataset data/prepared --output output/tinyllama-k8s-qlora
  > python evaluate.py --adapter output/tinyllama-k8s-qlora --val-data data/prepared/val.jsonl
"""

# ruff: noqa: E402
import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
import unicodedata
import warnings
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

# on import it asks CPU users for a package that none needs
logging.getLogger("bitsandbytes").setLevel("ERROR")

import jinja2
import numpy as np
import peft
import scipy.stats
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils.memory import clear_device_cache
from bitsandbytes.functional import dequantize_blockwise
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

# ---------------------------------------------------------------------------------------------
# Edit here, or pass the flag of the same name.
# model
MODEL = None  # Hugging Face name or local folder; None: what the adapter was trained on
ADAPTER = "output/tinyllama-k8s-qlora"  # folder of a LoRA adapter
LOAD_IN_4BIT = None  # NF4 weights; None: as in training
PRECISION = None  # fp16, bf16 or fp32; None: as in training; the CPU always uses fp32
# data
PROMPTS = None  # JSON list of questions; None: the ten below
VAL_DATA = None  # JSONL to measure perplexity on, unseen in training
VAL_PROMPTS = 5  # how many of its questions are asked, too
# generation
MAX_NEW_TOKENS = 256  # an answer is cut there
BATCH_SIZE = 8  # prompts at once, half as many rows; changes speed and memory, not the perplexity
# output
OUTPUT = "output/eval_results.json"  # the page beside it ends in .html
# ---------------------------------------------------------------------------------------------

QUESTIONS = [
    "What is the difference between a Deployment and a StatefulSet?",
    "How do I find out why a Pod stays Pending?",
    "Write a NetworkPolicy that denies all incoming traffic to a namespace.",
    "What happens when a container exceeds its memory limit?",
    "How do I roll back a Deployment to its previous revision?",
    "Explain the difference between a liveness probe and a readiness probe.",
    "How do I run a job every night at 02:00 in Kubernetes?",
    "What does `terraform plan` do, and why should I read it before `terraform apply`?",
    "How do I keep a Docker image small?",
    "Explain what a Service of type ClusterIP does.",
]
EVERYDAY = """Why is the sky blue? | Air scatters blue light more than red, so it reaches us from all sides.
How many days has a leap year? | A leap year has 366 days, with the 29th of February as the extra day.
What is the capital of France? | The capital of France is Paris.
How do I boil an egg? | Put it into boiling water for seven to ten minutes, then cool it under cold water.
Translate "good morning" into Spanish. | "Good morning" is "buenos días" in Spanish.
Who wrote Hamlet? | Hamlet was written by William Shakespeare around the year 1600.
What is 15 percent of 80? | 15 percent of 80 is 12.
Why do leaves turn yellow in autumn? | The green chlorophyll breaks down and yellow pigments remain.
Give me three synonyms of "happy". | Glad, cheerful and joyful.
How can I fall asleep more easily? | Go to bed at a regular hour, keep the room dark and avoid screens.
What is photosynthesis? | Plants use sunlight to turn water and carbon dioxide into sugar and oxygen.
Write a short thank-you note to a neighbour. | Thank you for watering my plants while I was away. It was very kind!
What should I do with a small burn? | Cool it under running water for twenty minutes and cover it loosely.
Name the planets closest to the Sun. | Mercury, Venus, Earth and Mars are the four planets closest to the Sun.
What does a mortgage mean? | It is a loan for a house that the bank may sell if the loan is not repaid.
How does a bicycle stay upright? | Its rider steers into each fall, which brings the wheels back under the weight.
What is the opposite of "ancient"? | The opposite of "ancient" is "modern".
Who painted the Mona Lisa? | Leonardo da Vinci painted the Mona Lisa in the early sixteenth century.
How much water should I drink a day? | About two litres a day is enough for most adults, more when it is hot.
Tell me a fact about whales. | The blue whale is the largest animal that has ever lived on Earth."""
ALPACA_TEMPLATE = (  # for tokenizers that come without a chat template
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "### Instruction:\n{{ message['content'] }}\n\n### Response:\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
KEYS = ("base", "finetuned")  # of the two sides in all results
HIDE_BARS = not (sys.stderr.isatty() or "ipykernel" in sys.modules)


def parse_args(argv=None):
    if argv is None and "kernel_launcher" in sys.argv[0]:
        argv = []  # pasted into a notebook cell: sys.argv is the kernel's, the constants above decide
    raw = argparse.RawDescriptionHelpFormatter
    shown = {"usage": "%(prog)s [options]", "description": __doc__, "formatter_class": raw}
    parser = argparse.ArgumentParser("evaluate.py", allow_abbrev=False, **shown)
    switch, path = argparse.BooleanOptionalAction, os.path.expanduser

    def add(flag, help, **options):
        parser.add_argument(flag, **options).help = f"{help} (default: %(default)s)"

    add("--model", "base model; None: what the adapter was trained on", default=MODEL, type=path)
    add("--adapter", "folder of a LoRA adapter", default=ADAPTER, type=path)
    add("--load-in-4bit", "None: as in training", default=LOAD_IN_4BIT, action=switch)
    precisions = ["fp16", "bf16", "fp32"]
    add("--precision", "None: as in training", default=PRECISION, choices=precisions)
    add("--prompts", "JSON list of questions; None: ten built in", default=PROMPTS, type=path)
    add("--val-data", "JSONL to measure perplexity on", default=VAL_DATA, type=path)
    add("--val-prompts", "questions of it that are asked", default=VAL_PROMPTS, type=int)
    add("--max-new-tokens", "an answer is cut there", default=MAX_NEW_TOKENS, type=int)
    add("--batch-size", "prompts at once, half as many rows", default=BATCH_SIZE, type=int)
    add("--output", "JSON file; the page beside it ends in .html", default=OUTPUT, type=path)
    args = parser.parse_args(argv)
    for name, low in ("val_prompts", 0), ("max_new_tokens", 1), ("batch_size", 1):
        if not low <= getattr(args, name) <= 2**20:
            parser.error(f"argument --{name.replace('_', '-')}: must be from {low} to {2**20}")
    return args


def free_memory():
    """In a notebook: free the memory of earlier cells, also of one that failed."""
    error = getattr(sys, "last_value", None)
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    clear_device_cache(garbage_collection=True)


def read_json(path, kind, what):
    """Read a JSON file that must hold a `kind`; ends the program with what is wrong."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, kind):
            raise ValueError(f"not a JSON {'list' if kind is list else 'object'}")
    except OSError as error:
        sys.exit(f"error: {path}: {error.strerror}; {what}")
    except (ValueError, RecursionError) as error:
        sys.exit(f"error: {path}: {error}; {what}")
    return value


def read_adapter(folder):
    """Return adapter_config.json and, where lora_finetune.py wrote one, training_config.json."""
    what = "--adapter takes the folder that lora_finetune.py wrote"
    config = read_json(folder / "adapter_config.json", dict, what)
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").exists()
        reason = "pickles are not opened" if pickled else "no adapter in it, or an unfinished run"
        sys.exit(f"error: {folder}: {reason}; {what}")
    for key, right in ("peft_type", "LORA"), ("bias", "none"):  # a bias stays on without adapter
        if config.get(key, right) != right:
            sys.exit(f"error: {folder}: its {key} is {config[key]!r}, only {right!r} works; {what}")
    path = folder / "training_config.json"
    training = read_json(path, dict, what) if path.exists() else {}
    return config, training if isinstance(training.get("arguments"), dict) else {}


def read_prompts(path):
    """Read the questions to ask, a JSON list of strings, as records without an answer."""
    form = 'it takes a list of questions, ["What is a Pod?", ...]'
    prompts = read_json(path, list, form) if path else QUESTIONS
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) or not prompt.strip():
            sys.exit(f"error: {path}: item {number} is not a question; {form}")
        if prompt != prompt.encode(errors="ignore").decode():
            sys.exit(f"error: {path}: item {number} holds half a character; {form}")
    records = [{"instruction": prompt.strip(), "input": "", "output": None} for prompt in prompts]
    return records or sys.exit(f"error: {path}: no question in it; {form}")


def check_target(output, inputs):
    """Refuse, before the work, an output that can't be written or would overwrite what is read."""
    if output.suffix != ".json":
        sys.exit(f"error: --output {output}: takes a file that ends in .json")
    for path in output, output.with_suffix(".html"):
        if path.is_dir() or path.resolve() in [Path(read).resolve() for read in inputs]:
            sys.exit(f"error: {path} is a folder, or read here; choose another --output")
    nearest = next(path for path in output.absolute().parents if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        sys.exit(f"error: can't write to {nearest}; choose another --output")


def as_trained(args, adapter, trained):
    """Base model, precision, whether to load in 4 bits: what the flags say, else as in training."""
    name = args.model or adapter.get("base_model_name_or_path")
    if not (name and isinstance(name, str)):
        sys.exit(
            f"error: {args.adapter} does not say its base; pass what it was trained on: --model"
        )
    precision = args.precision or trained.get("precision", "fp16")
    in_4bit = trained.get("load_in_4bit", True) if args.load_in_4bit is None else args.load_in_4bit
    return name, precision if torch.cuda.is_available() else "fp32", in_4bit


def everyday():
    """The rows of EVERYDAY as records."""
    pairs = [line.split(" | ") for line in EVERYDAY.splitlines()]
    return [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]


def read_jsonl(path):
    """Records of a JSONL file, [{"instruction", "input", "output"}], all str; a bad line ends all."""
    advice, records, number = "prepare_dataset.py makes and mends such files", [], 0
    try:
        for line in open(path, encoding="utf-8-sig"):
            number += 1
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            record = {key: row.get(key) for key in ("instruction", "input", "output")}
            record["input"] = record["input"] or ""
            for key, text in record.items():
                if not isinstance(text, str) or not (text.strip() or key == "input"):
                    raise ValueError(f'"{key}" is {"missing" if text is None else "no text"}')
                record[key] = text.encode().decode().strip()  # a ValueError if half a character
            records.append(record)
    except OSError as error:
        sys.exit(f"error: {path}: {error.strerror}; {advice}")
    except (ValueError, RecursionError) as error:
        sys.exit(f"error: {path}:{number}: {error}; {advice}")
    return records or sys.exit(f"error: {path}: no records in it; {advice}")


def pretrained(auto_class, name, **kwargs):
    """auto_class.from_pretrained(name), with what can go wrong said in one line."""
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:  # what people pass as a model may raise anything
        reason = textwrap.shorten(str(error) or type(error).__name__, 200)
    advice = "pass the folder of a 16-bit model: config.json, tokenizer.json, model.safetensors"
    if not Path(name).exists():
        advice = "no such folder, and the Hub gave none; offline, pass a folder as --model"
    elif "not currently imported" in reason or "does not recognize" in reason:
        advice = "if a newer transformers saved it, pip install -U transformers"
    sys.exit(f"error: can't load the model {name} ({reason}); {advice}")


def chat_frame(tokenizer):
    """Return (head, tail, end, special ids) of the chat template around one question and answer.

    The prompt is head + question + tail; the model is to write answer + end, where end closes with
    the end-of-turn token. A tokenizer without a template gets an Alpaca-style one. One that tells
    today's date tells a fixed one from here on: training, --resume and evaluation must agree.
    """
    if not tokenizer.chat_template:
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        tokenizer.chat_template = "{{ bos_token }}" * adds_bos + ALPACA_TEMPLATE
    question, answer = "\ue000", "\ue001"  # private-use characters: no template contains them
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        today, fixed = r"""strftime_now\(\s*["'](.*?)["']\s*\)""", date(2025, 1, 1)
        template = tokenizer.get_chat_template()
        template = re.sub(today, lambda call: json.dumps(fixed.strftime(call[1])), template)
        tokenizer.chat_template = template
        as_text = partial(tokenizer.apply_chat_template, tokenize=False)
        prompt, text = as_text(turns[:1], add_generation_prompt=True), as_text(turns)
        head, rest = text.split(question)
        tail, end = rest.split(answer)
        if not (head + question + tail).startswith(prompt):
            raise ValueError("it writes a prompt and its answer apart")
    except Exception as error:  # a template is a program, it may raise anything
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        sys.exit(f"error: the model's chat template fails ({reason}); choose another --model")
    added = tokenizer.added_tokens_decoder.items()
    special = {id: token.content for id, token in added if token.special}
    ends = [end.index(token) + len(token) for token in special.values() if token in end]
    end = end[: min(ends)] if ends else end + (tokenizer.eos_token or "")
    return head, tail, end, set(special)


def encode(record, tokenizer, frame, max_length):
    """Turn a record into {"input_ids", "labels", "length" before the cut, "answer_tokens"}.

    The labels are the ids of answer + end, and -100 before. The whole text is tokenized at once, as
    prompt and answer tokenized apart need not give the same ids; a token belongs to the answer if
    it starts there. A control token typed in a record (such as </s>) is spelled out as plain text.
    """
    head, tail, end, special = frame
    question = "\n\n".join(part for part in (record["instruction"], record["input"]) if part)
    start = len(head) + len(question) + len(tail)
    text = head + question + tail + record["output"] + end
    typed = {*range(len(head), len(head + question)), *range(start, len(text) - len(end))}
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, labels = [], []
    for id, (left, right) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        ids = [id]
        if id in special and left in typed:
            plain = {"add_special_tokens": False, "split_special_tokens": True}
            ids = tokenizer(text[left:right], **plain)["input_ids"]
        input_ids += ids
        labels += ids if left >= start else [-100] * len(ids)
    row = {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}
    answer_tokens = len(row["labels"]) - row["labels"].count(-100)
    return row | {"length": len(input_ids), "answer_tokens": answer_tokens}


def lean_norm(norm, x):
    """The RMSNorm of Llama and kin as one kernel: a fifth of a step's time on a GPU."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def load_base(name, device, precision, load_in_4bit):
    """Load a causal language model, its linear layers in doubly quantised NF4 if asked."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **nf4)
    options = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True}
    options |= {"quantization_config": nf4 if load_in_4bit else None, "output_loading_info": True}
    model, info = pretrained(AutoModelForCausalLM, name, **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        sys.exit(f"error: {name} lacks weights, such as {missing}; download it again")
    # cuDNN attention plans anew for each length, which costs more than it gives
    torch.backends.cuda.enable_cudnn_sdp(False)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(lean_norm, module)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else the first evaluation repacks the NF4 weights in place, and training goes wrong
            module.support_avx512bf16_for_cpu = False
        scales = getattr(getattr(module, "weight", None), "quant_state", None)
        if scales and scales.nested:  # quantised too: decoded here once, not at each use
            scales.absmax = dequantize_blockwise(scales.absmax, scales.state2) + scales.offset
            scales.nested = False
    return model


def fingerprint(model):
    """A short name for the base weights: SHA-256 over its first 256 token embeddings as float16."""
    weight = model.get_input_embeddings().weight[:256].detach().half().cpu()
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16]


def find_head(model):
    """The head, where logits are head(hidden states) and no more; else None (Gemma 2, Granite)."""
    head, probe = model.get_output_embeddings(), torch.arange(8, device=model.device)[None]
    with torch.no_grad():
        logits = model(input_ids=probe, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=probe, use_cache=False)[0]
        if head is None or hidden.shape[-1] != head.weight.shape[-1]:
            return None
        difference = head(hidden.to(head.weight.dtype)).float() - logits
    return head if difference.norm() < 1e-3 * logits.norm() else None


def load_model(name, folder, precision, load_in_4bit, expected):
    """Load the base and put the adapter on it, checking that the two belong together."""
    device = 0 if torch.cuda.is_available() else "cpu"
    base = load_base(name, device, precision, load_in_4bit)
    misfit = f"error: the adapter {folder} does not fit {name}; pass the --model it was trained on"
    if expected and fingerprint(base) != expected:
        sys.exit(misfit)
    try:
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            saved = {key for key in file.keys() if "lora_" in key}
        wanted = {key for key in peft.get_peft_model_state_dict(model) if "lora_" in key}
        if saved != wanted:
            raise ValueError("its layers are others")
        probe = torch.arange(8, device=base.device)[None]
        finite = base(input_ids=probe).logits.isfinite().all()
    except Exception as error:  # peft checks no config, so a wrong one may raise anything
        sys.exit(f"{misfit} ({textwrap.shorten(str(error), 200)})")
    if not finite:
        sys.exit(f"error: {folder} gives no finite numbers; train with a lower --learning-rate")
    return model


def encode_rows(records, tokenizer, frame, longest):
    """Encode records, see encode; those without any of their answer are left out."""
    rows = [encode(record, tokenizer, frame, longest) for record in records]
    return [row for row in rows if row["answer_tokens"]]


def check_ids(base, rows):
    """Refuse token ids that the base has no embedding for."""
    size = len(base.get_input_embeddings().weight)
    if max(map(max, rows)) >= size:
        reason = f"the tokenizer has tokens beyond the model's {size:,}"
        sys.exit(f"error: {reason}; pass the --model that the adapter was trained on")


def encode_prompts(records, tokenizer, frame, new_tokens, context):
    """Token ids of each record's prompt, as in training; refuses one without room for an answer."""
    prompts = []
    for record in records:
        row = encode(record | {"output": ""}, tokenizer, frame, 2**30)
        ids = row["input_ids"][: len(row["input_ids"]) - row["answer_tokens"]]
        if len(ids) + new_tokens > context:
            sizes = f"{len(ids):,} tokens and {new_tokens:,} new ones, the model reads {context:,}"
            question = textwrap.shorten(record["instruction"], 50)
            sys.exit(f"error: prompt {question!r}: {sizes}; shorten it or --max-new-tokens")
        prompts.append(ids)
    return prompts


def generate(model, tokenizer, frame, prompts, args, title):
    """Answer prompts (token ids) greedily: list of {"text", "tokens", "stopped"}, and tokens/s."""
    named = np.atleast_1d(model.generation_config.eos_token_id or []).tolist()
    end_of_turn = tokenizer(frame[2], add_special_tokens=False)["input_ids"][-1:]
    stops = {*named, *end_of_turn, tokenizer.eos_token_id} - {None}
    options = {"do_sample": False, "max_new_tokens": args.max_new_tokens}
    config = GenerationConfig(eos_token_id=sorted(stops), pad_token_id=min(stops), **options)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers, began = {}, time.monotonic()
    for start in tqdm(range(0, len(order), args.batch_size), title, disable=HIDE_BARS, leave=False):
        chosen = order[start : start + args.batch_size]
        ids = [torch.tensor(prompts[i]) for i in chosen]
        mask = [torch.ones_like(prompt) for prompt in ids]
        ids = pad_sequence(ids, True, min(stops), padding_side="left").to(model.device)
        mask = pad_sequence(mask, True, padding_side="left").to(model.device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for i, new in zip(chosen, output[:, ids.shape[1] :].tolist(), strict=True):
            end = next((n for n, id in enumerate(new) if id in stops), None)
            text = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
            tokens = len(new) if end is None else end + 1
            answers[i] = {"text": text, "tokens": tokens, "stopped": end is not None}
    speed = sum(answer["tokens"] for answer in answers.values()) / (time.monotonic() - began)
    return [answers[i] for i in range(len(prompts))], speed


def response_nll(model, head, pad_id, rows):
    """Negative log-likelihood in nats of each response token of the rows, (tokens,), in their order.

    All logits, (rows, length, vocabulary), would be the largest tensor of a step. So the head runs
    only where a label counts, 256 tokens at a time, and again in the backward pass. Without a head
    (see find_head) the model computes all of them. Rows are padded on the right, where causal
    attention never looks.
    """
    weight = model.get_input_embeddings().weight
    input_ids, labels = (
        pad_sequence([torch.tensor(row[key]) for row in rows], True, padding).to(weight.device)
        for key, padding in (("input_ids", pad_id), ("labels", -100))
    )
    counts = labels[:, 1:] != -100  # position i predicts token i + 1
    targets = labels[:, 1:][counts]

    def part_nll(states, targets):
        logits = head(states) if head else states
        return F.cross_entropy(logits.float(), targets, reduction="none")

    with torch.autocast(weight.device.type, weight.dtype, weight.dtype != torch.float32):
        outputs = (model.base_model if head else model)(input_ids=input_ids, use_cache=False)
        parts = zip(outputs[0][:, :-1][counts].split(256), targets.split(256))
        return torch.cat([checkpoint(part_nll, *part, use_reentrant=False) for part in parts])


def micro_batches(rows, room):
    """Cut rows, longest first, into lists that with their padding take at most `room` tokens."""
    while rows:
        size = max(1, room // len(rows[0]["input_ids"]))
        yield rows[:size]
        rows = rows[size:]


def row_nll(nll_of, rows, batch_size, title):
    """Sum of the negative log-likelihoods (nats) of each row's response tokens: shape (rows,)."""
    sums = np.zeros(len(rows))
    numbered = [row | {"number": number} for number, row in enumerate(rows)]
    numbered.sort(key=lambda row: -len(row["input_ids"]))
    # a prompt adds one token at a time, a row takes all of its own at once: so half as many
    parts = list(micro_batches(numbered, batch_size * len(numbered[0]["input_ids"]) // 2))
    for part in tqdm(parts, title, disable=HIDE_BARS, leave=False):
        nll = nll_of(part).double().split([row["answer_tokens"] for row in part])
        sums[[row["number"] for row in part]] = [tokens.sum().item() for tokens in nll]
    return sums


def compare(base, finetuned, tokens):
    """Perplexities, their ratio and its interval, from each row's NLL sums (nats) and token count.

    Perplexity is exp(sum of NLL / number of tokens): tokens count alike. The interval is a 95 %
    bootstrap over rows (Efron and Tibshirani 1993, bias-corrected and accelerated): rows are drawn
    anew with both their figures, which keeps the pairs.
    """

    def ratio(difference, tokens, axis=-1):
        return np.exp(difference.sum(axis) / tokens.sum(axis))

    difference, interval = finetuned - base, None
    if len(tokens) > 1:
        drawn = {"paired": True, "batch": 100, "rng": np.random.default_rng(0)}
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = scipy.stats.bootstrap((difference, tokens), ratio, **drawn).confidence_interval
        if not math.isnan(found.low):  # nan where all rows changed alike
            interval = [float(found.low), float(found.high)]
    return {
        "base": float(np.exp(base.sum() / tokens.sum())),
        "finetuned": float(np.exp(finetuned.sum() / tokens.sum())),
        "ratio": float(ratio(difference, tokens)),
        "ratio_ci95": interval,
        "tokens": int(tokens.sum()),
        "rows": len(tokens),
        "rows_improved": int((difference < 0).sum()),
    }


def measure(model, nll_of, rows, batch_size, title):
    """Compare one model on encoded rows, its adapter off and on, see compare; None without rows."""
    if not rows:
        return None
    with model.disable_adapter():
        before = row_nll(nll_of, rows, batch_size, f"{title}, before")
    after = row_nll(nll_of, rows, batch_size, f"{title}, after")
    return compare(before, after, np.array([row["answer_tokens"] for row in rows]))


def verdict(figures, better, unclear, worse):
    """A comparison in one sentence that a person can quote, by where its interval lies."""
    low, high = figures["ratio_ci95"] or (-math.inf, math.inf)
    interval = f"95 % interval {low:.3f} to {high:.3f}" if high < math.inf else "no interval"
    change = "perplexity {base:.2f} -> {finetuned:.2f} on {rows} rows, x {ratio:.3f} ({interval})"
    word = better if high < 1 else worse if low > 1 else unclear
    return word.format(change.format(interval=interval, **figures), **figures)


def summarize(records, answers, speed, perplexity, general):
    """What eval_results.json holds but its settings: summary, prompts, perplexity, general."""
    prompts = []
    for record, *pair in zip(records, *map(answers.get, KEYS), strict=True):
        sides = dict(zip(KEYS, pair, strict=True))
        question = "\n\n".join(filter(None, [record["instruction"], record["input"]]))
        prompt = {"prompt": question} | {key: side["text"] for key, side in sides.items()}
        prompt["reference"] = record["output"]
        for what in ("stopped", "tokens"):
            prompt |= {f"{key}_{what}": side[what] for key, side in sides.items()}
        prompts.append(prompt)
    improved = "{}, {rows_improved} of {rows} rows improved."
    words = f"Better: {improved}", f"No clear difference: {improved}", f"Worse: {improved}"
    summary = {"verdict": "No --val-data, so no perplexity: read the answers side by side."}
    if perplexity:
        summary["verdict"] = verdict(perplexity, *words)
    unhurt = "{}: no damage seen"
    summary["elsewhere"] = verdict(general, unhurt, unhurt, "{}: it got worse at other things")
    summary["prompts"] = len(prompts)
    summary["answers_changed"] = sum(prompt["base"] != prompt["finetuned"] for prompt in prompts)
    for key in KEYS:
        summary[f"{key}_stopped"] = sum(prompt[f"{key}_stopped"] for prompt in prompts)
        total = sum(prompt[f"{key}_tokens"] for prompt in prompts)
        summary[f"{key}_mean_tokens"] = total / len(prompts)
    summary["tokens_per_second"] = speed
    figures = {"perplexity": perplexity, "general": general}
    return {"summary": summary, "prompts": prompts} | figures


def read_log(path):
    """The points (step, loss) of training and of validation in a training log, if there is one."""
    points = {"loss": {}, "eval_loss": {}}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            entry = json.loads(line)
            for key in points.keys() & entry.keys():
                if abs(entry[key]) < 1e9 and 0 < entry["step"] < 1e9:
                    points[key][entry["step"]] = entry[key]
    return [sorted(found.items()) for found in points.values()]


def curve(train, val):
    """The loss curve as SVG: single steps pale, their running mean strong, points for validation."""
    if not train:
        return ""
    low, high = (pick(loss for _, loss in [*train, *val]) for pick in (min, max))
    last = max(step for step, _ in [*train, *val])

    def place(point):
        x, y = 90 + 600 * point[0] / last, 20 + 200 * (high - point[1]) / (high - low or 1)
        return f"{x:.1f},{y:.1f}"

    width = max(1, len(train) // 10)
    means = [
        np.mean([loss for _, loss in train[max(0, i - width) : i + 1]]) for i in range(len(train))
    ]
    thin = slice(
        None, None, -(len(train) // 1000 + 1)
    )  # from the last one back: a page stays small
    steps = " ".join(map(place, train[thin]))
    mean = " ".join(place((step, mean)) for (step, _), mean in [*zip(train, means)][thin])
    dots = "".join(f"M{place(point)}h0" for point in val)  # round ends of lines without length
    told = f"from {train[0][1]:.3f} to {train[-1][1]:.3f}"
    best = min(val, key=lambda point: point[1], default=None)
    lowest = f"; lowest after step {best[0]}: {best[1]:.3f}" if best and best != val[-1] else ""
    told += f"; dots: validation loss, at last {val[-1][1]:.3f}{lowest}" if val else ""
    return f"""<h2>Loss while training</h2>
<svg viewBox="0 0 700 275" role="img" aria-label="training loss {told}" font-size="14"
 fill="var(--soft)"><path d="M90 20V220H690" fill="none" stroke="var(--line)"/>
<text x="82" y="28" text-anchor="end">{high:.3f}</text><text x="82" y="224" text-anchor="end">{low:.3f}</text>
<text x="82" y="124" text-anchor="end">nats / token</text><text x="90" y="244">step 0</text>
<text x="690" y="244" text-anchor="end">step {last}</text>
<g fill="none" stroke-linecap="round"><polyline points="{steps}" stroke="var(--after)" opacity=".35"/>
<polyline points="{mean}" stroke="var(--after)" stroke-width="3"/>
<path d="{dots}" stroke="var(--alarm)" stroke-width="10"/></g></svg>
<p class="soft">Pale: training loss of each step, {told}. Strong: its running mean over {width + 1} steps.</p>"""


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Before and after fine-tuning</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #fff;
  --tint: #f6f8fa; --after: #0a5cc2; --alarm: #a40e26 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b3; --line: #30363d;
  --paper: #0d1117; --tint: #161b22; --after: #6cb0ff; --alarm: #ff9a9a } }
body { overflow-wrap: anywhere; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 70rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem } .verdict { font-size: 1.2rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; white-space: pre-wrap } h4 { font-size: .9rem; margin: 0 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } .soft { color: var(--soft) }
.pair > div { background: var(--tint); border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem .8rem; min-width: 0 } .cut { color: var(--alarm) }
.pair > .reference { grid-column: 1 / -1; background: none }
pre { font: inherit; white-space: pre-wrap; margin: .4rem 0 }
code { font: .85em ui-monospace, monospace; word-break: break-all }
table, svg { width: 100%; max-width: 44rem } table { border-collapse: collapse }
td, th { border-bottom: 1px solid var(--line); text-align: left; padding: .3rem 0; vertical-align: top }
td:not(:first-child), thead th:not(:first-child) { text-align: right; white-space: nowrap; padding-left: .8rem }
.bar { display: block; height: .4rem; background: var(--soft) } .after { background: var(--after) }
details th { white-space: nowrap } details td:not(:first-child) { text-align: left; white-space: normal }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr } svg { font-size: 24px } }
@media print { .pair { break-inside: avoid } h2, h3 { break-after: avoid } }
</style></head><body><main>
<h1>Before and after fine-tuning</h1><p class="verdict">{{ summary.verdict }}</p>
<p class="soft">Perplexity is how much the right answers surprise the model: lower is better.</p>
<table><thead><tr><th scope=col>Measure<th scope=col>Before<th scope=col>After</thead><tbody>
{% for name, figures in (("Perplexity", perplexity), ("Perplexity elsewhere, everyday rows", general)) if figures %}
<tr><th scope=row>{{ name }}{% for key in keys %}<td>{{ "%.3f" % figures[key] }}
<span class="bar {{ "after" if key == "finetuned" }}" style="width:
{{- "%.1f" % (100 * figures[key] / [figures.base, figures.finetuned]|max) }}%"></span>{% endfor %}{% endfor %}
<tr><th scope=row>Answers that stopped by themselves
{% for key in keys %}<td>{{ summary[key + "_stopped"] }} of {{ summary.prompts }}{% endfor %}
<tr><th scope=row>Mean length of an answer, tokens
{% for key in keys %}<td>{{ "%.0f" % summary[key + "_mean_tokens"] }}{% endfor %}
</tbody></table><p class="soft">Elsewhere: {{ summary.elsewhere }}.</p>
{{ curve|safe }}<h2>Answers side by side</h2>
{% for result in prompts %}
<h3>{{ result.prompt }}</h3><div class="pair">{% for key in keys + ("reference",) if result[key] is not none %}
<div{% if key == "reference" %} class="reference"{% endif %}>
<h4>{{ {"base": "Before", "finetuned": "After", "reference": "Right answer, never trained on"}[key] }}
{% if result[key + "_stopped"] is false %}<span class="cut">did not stop, cut</span>{% endif %}</h4>
<pre>{% for part in result[key].split("```") %}{% if loop.index is odd %}{{ part }}{% else %}
<code>```{{ part }}{{ "" if loop.last else "```" }}</code>{% endif %}{% endfor %}</pre></div>
{% endfor %}</div>{% endfor %}
<details><summary>Settings</summary><table><tbody>
{% for name, value in settings.items() if value is not none %}
<tr><th scope=row>{{ name }}<td>{{ value.items()|map("join", " ")|join(", ") if value is mapping else value }}
{% endfor %}
</tbody></table></details></main></body></html>"""


def write_results(output, results, log):
    """Write the results as strict JSON and, beside it, as a page whose template escapes all texts."""
    train, val = log
    if results["perplexity"] and val:  # what training did not measure: the start
        val = [(0, math.log(results["perplexity"]["base"])), *val]
    page = jinja2.Template(PAGE, autoescape=True, trim_blocks=True)
    files = {output.with_suffix(".html"): page.render(results, keys=KEYS, curve=curve(train, val))}
    try:
        files[output] = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
        output.parent.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.with_name(f".{path.name}").write_text(text + "\n", encoding="utf-8")
        for path in files:
            os.replace(path.with_name(f".{path.name}"), path)
    except (OSError, ValueError) as error:  # ValueError: NaN, or a path that is no Unicode text
        sys.exit(f"error: can't write {output} ({error}); choose another --output")


def wrap(text, width):
    """Wrap each line of a text, cut where it must; what would steer a terminal is shown instead."""
    encoding, lines = sys.stdout.encoding or "utf-8", []
    for line in text.splitlines():
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        line = "".join(shown).encode(encoding, "backslashreplace").decode(encoding)
        lines += textwrap.wrap(line, width, break_on_hyphens=False) or [""]
    return lines


def print_side_by_side(results, longest):
    """Print each prompt with its two answers in columns that fit the terminal, then the reference.

    Where a text has characters of two columns or none, the answers stand one below the other.
    """
    columns = max(20, min(shutil.get_terminal_size().columns, 160))
    for number, result in enumerate(results, 1):
        print("", *wrap(f"[{number}/{len(results)}] {result['prompt']}", columns), sep="\n")
        text = result["base"] + result["finetuned"]
        odd = any(unicodedata.east_asian_width(c) in "FW" or unicodedata.combining(c) for c in text)
        width, sides = columns // 2 if odd else (columns - 3) // 2, []
        for name, key in zip(("before", "after"), KEYS, strict=True):
            title = name if result[f"{key}_stopped"] else f"{name} (cut)"
            sides.append([title, "-" * width, *wrap(result[key].expandtabs(4), width)])
        if odd:
            print(*sides[0], "", *sides[1], sep="\n")
        else:
            for left, right in itertools.zip_longest(*sides, fillvalue=""):
                print(f"{left:{width}} | {right}".rstrip())
        if reference := result["reference"]:
            cut = textwrap.shorten(reference, longest, placeholder=" [...]")
            print("", *wrap(f"right answer: {cut}", columns // 2 if odd else columns), sep="\n")


def print_summary(summary):
    """Print what a person can quote, with a warning where the adapter changed no answer."""
    if not summary["answers_changed"]:
        print("\nWARNING: no answer changed, the adapter has no effect. Was it trained enough?")
    print(
        "",
        *wrap(summary["verdict"], 78),
        *wrap(f"elsewhere   {summary['elsewhere']}", 78),
        sep="\n",
    )
    print(
        "answers     {answers_changed} of {prompts} changed; "
        "{base_stopped} -> {finetuned_stopped} stopped by themselves\n"
        "length      {base_mean_tokens:.0f} -> {finetuned_mean_tokens:.0f} tokens on average, "
        "at {tokens_per_second:,.0f} tokens/s".format(**summary)
    )


@contextlib.contextmanager
def advice_on_memory():
    """End with advice where what is run within takes more memory than the GPU has."""
    try:
        yield
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory; lower --batch-size, then --max-new-tokens")


def main(argv=None):
    args = parse_args(argv)
    free_memory()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries
    if HIDE_BARS:
        transformers.logging.disable_progress_bar()

    folder, output = Path(args.adapter), Path(args.output)
    adapter, training = read_adapter(folder)
    records = read_jsonl(args.val_data) if args.val_data else []
    asked = records[: args.val_prompts] + read_prompts(args.prompts)
    read = [args.prompts or folder, args.val_data or folder, *folder.glob("*.json")]
    check_target(output, read)
    trained = training.get("arguments", {})
    name, precision, in_4bit = as_trained(args, adapter, trained)
    own_tokenizer = (folder / "tokenizer_config.json").exists()
    tokenizer = pretrained(AutoTokenizer, folder if own_tokenizer else name)
    frame = chat_frame(tokenizer)
    model = load_model(name, folder, precision, in_4bit, training.get("base_fingerprint"))
    base = model.get_base_model()
    context = getattr(base.config.get_text_config(), "max_position_embeddings", 2**20)
    longest = trained.get("max_seq_length") or context
    prompts = encode_prompts(asked, tokenizer, frame, args.max_new_tokens, context)
    groups = {"held out": records, "elsewhere": everyday()}
    rows = {title: encode_rows(group, tokenizer, frame, longest) for title, group in groups.items()}
    if records and not rows["held out"]:
        sys.exit(f"error: {args.val_data}: no answer within {longest} tokens")
    check_ids(base, [*prompts, *(row["input_ids"] for group in rows.values() for row in group)])
    print(f"model       {name} in {precision} on {base.device.type}, before and after {folder}")
    print(f"prompts     {len(asked)} <- {args.prompts or 'built in'}, {args.val_data or 'no rows'}")

    nll_of = partial(response_nll, base, find_head(base), tokenizer.eos_token_id or 0)
    dtype = base.get_input_embeddings().weight.dtype
    autocast = torch.autocast(base.device.type, dtype, precision != "fp32")
    with advice_on_memory(), torch.inference_mode():
        with autocast, model.disable_adapter():
            before, _ = generate(base, tokenizer, frame, prompts, args, "answers, before")
        with autocast:
            after, speed = generate(base, tokenizer, frame, prompts, args, "answers, after")
        figures = [measure(model, nll_of, rows[title], args.batch_size, title) for title in rows]

    results = summarize(asked, {"base": before, "finetuned": after}, speed, *figures)
    packages = "torch transformers peft bitsandbytes scipy".split()
    results["settings"] = vars(args) | {
        "model": name,
        "precision": precision,
        "load_in_4bit": in_4bit,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {package: version(package) for package in packages},
    }
    write_results(output, results, read_log(folder / "training_log.jsonl"))
    print_side_by_side(results["prompts"], 4 * args.max_new_tokens)
    print_summary(results["summary"])
    print(f"saved       {output}\npage        {output.with_suffix('.html')}")
    return results["summary"] | {"perplexity": figures[0], "general": figures[1]}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing was written")
    except BrokenPipeError:  # the reader, such as head, has left; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
