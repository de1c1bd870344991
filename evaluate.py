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
import shutil
import sys
import textwrap
import time
import unicodedata
import warnings
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
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError, safe_open
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
ALPACA_TEMPLATE = (  # for tokenizers that come without a chat template
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "### Instruction:\n{{ message['content'] }}\n\n### Response:\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
KEYS = ("base", "finetuned")  # of the two sides in all results
HIDE_BARS = not (sys.stderr.isatty() or "ipykernel" in sys.modules)


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of this kind from low up to high."""

    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def parse_args(argv=None):
    if argv is None and "kernel_launcher" in sys.argv[0]:
        argv = []  # pasted into a notebook cell: sys.argv is the kernel's, the constants above decide

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """The docstring as it stands, each option with its default."""

    shown = {"usage": "%(prog)s [options]", "description": __doc__, "formatter_class": Help}
    parser = argparse.ArgumentParser("evaluate.py", allow_abbrev=False, **shown)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("model").add_argument
    add("--model", default=MODEL, help="base model; None: what the adapter was trained on")
    add("--adapter", default=ADAPTER, help="folder of a LoRA adapter")
    add("--load-in-4bit", action=switch, default=LOAD_IN_4BIT, help="None: as in training")
    precisions = ["fp16", "bf16", "fp32"]
    add("--precision", choices=precisions, default=PRECISION, help="None: as in training")
    add = parser.add_argument_group("data").add_argument
    add("--prompts", default=PROMPTS, help="JSON list of questions; None: ten built in")
    add("--val-data", default=VAL_DATA, help="JSONL to measure perplexity on")
    add = parser.add_argument_group("generation").add_argument
    tokens, rows = number(int, 1, 2**20), number(int, 1, 4096)
    add("--max-new-tokens", type=tokens, default=MAX_NEW_TOKENS, help="an answer is cut there")
    add("--batch-size", type=rows, default=BATCH_SIZE, help="prompts at once, half as many rows")
    add = parser.add_argument_group("output").add_argument
    add("--output", default=OUTPUT, help="JSON file; the page beside it ends in .html")
    return parser.parse_args(argv)


def stop(message):
    """End with one line on stderr; of many processes, the first speaks for all."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # the launcher ends all when one has ended: the first must have spoken
        sys.exit(1)
    sys.exit(f"error: {message}")


def read_json(path, kind, what):
    """Read a JSON file that must hold a `kind`; ends the program with what is wrong."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        stop(f"{path}: no such file; {what}")
    except (OSError, ValueError, RecursionError) as error:
        stop(f"{path}: not readable as JSON ({error}); {what}")
    if not isinstance(value, kind):
        stop(f"{path}: not a JSON {'list' if kind is list else 'object'}; {what}")
    return value


def read_adapter(folder):
    """Return adapter_config.json and, where lora_finetune.py wrote one, training_config.json."""
    what = "--adapter takes the folder that lora_finetune.py wrote"
    config = read_json(folder / "adapter_config.json", dict, what)
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").exists()
        stop(f"{folder}: {'pickles are not opened' if pickled else 'no adapter in it'}; {what}")
    if config.get("peft_type") != "LORA":
        stop(f"{folder}: its peft_type is {config.get('peft_type')}, not LORA; {what}")
    path = folder / "training_config.json"
    training = read_json(path, dict, what) if path.exists() else {}
    return config, training if isinstance(training.get("arguments"), dict) else {}


def read_prompts(path):
    """Read the questions to ask: a JSON list of strings."""
    prompts = read_json(path, list, 'it takes a list of questions, ["What is a Pod?", ...]')
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) or not prompt.strip():
            stop(f"{path}: item {number} is not a question; each must be a text that is not empty")
        if prompt != prompt.encode(errors="ignore").decode():
            stop(f"{path}: item {number} holds half a character (a lone surrogate); write it anew")
    if not prompts:
        stop(f"{path}: the list is empty; write at least one question")
    return [prompt.strip() for prompt in prompts]


def read_jsonl(path):
    """Read the records of a JSONL file: a list of {"instruction", "input", "output"}, all str.

    Ends the program with file, line and what is wrong at the first line that is no such record.
    """
    advice = "prepare_dataset.py makes and mends such files"
    if not Path(path).is_file():
        stop(f"{path}: no such file; {advice}")
    records = []
    try:
        for number, line in enumerate(open(path, encoding="utf-8-sig"), 1):
            if not line.strip():
                continue
            row, record = json.loads(line), {}
            if not isinstance(row, dict):
                stop(f"{path}:{number}: not an object; {advice}")
            for field in ("instruction", "input", "output"):
                value = row.get(field)
                if value is None and field == "input":
                    value = ""
                if not isinstance(value, str):
                    wrong = "missing" if value is None else "not text"
                    stop(f'{path}:{number}: "{field}" is {wrong}; {advice}')
                if value != value.encode(errors="ignore").decode():
                    stop(f'{path}:{number}: "{field}" has half a character in it; {advice}')
                record[field] = value.strip()
                if not record[field] and field != "input":
                    stop(f'{path}:{number}: "{field}" is empty; {advice}')
            records.append(record)
    except UnicodeDecodeError:
        stop(f"{path}: not UTF-8 text; {advice}")
    except (ValueError, RecursionError) as error:
        stop(f"{path}:{number}: not valid JSON ({error}); {advice}")
    if not records:
        stop(f"{path}: no records in it; {advice}")
    return records


def check_target(output, inputs):
    """Refuse, before the work, an output that can't be written or would overwrite what is read."""
    if output.suffix != ".json":
        stop(f"--output {output}: takes a file that ends in .json")
    for path in output, output.with_suffix(".html"):
        if os.path.isdir(path):
            stop(f"{path} is a folder; choose another --output")
    if os.path.realpath(output) in map(os.path.realpath, inputs):
        stop(f"--output {output} is read here and would be overwritten; choose another")
    nearest = next(path for path in output.absolute().parents if os.path.exists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        stop(f"can't write to {nearest}; choose another --output")


def as_trained(args, adapter, trained):
    """Base model, precision, whether to load in 4 bits: what the flags say, else as in training."""
    name = args.model or adapter.get("base_model_name_or_path")
    if not (name and isinstance(name, str)):
        stop(f"{args.adapter} does not say what it was trained on; pass that as --model")
    precision = args.precision or trained.get("precision", "fp16")
    load_in_4bit = args.load_in_4bit
    if load_in_4bit is None:
        load_in_4bit = trained.get("load_in_4bit", True)
    return name, precision if torch.cuda.is_available() else "fp32", load_in_4bit


def pretrained(auto_class, name, **kwargs):
    """auto_class.from_pretrained(name), with what can go wrong said in one line."""
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **kwargs)
    except torch.OutOfMemoryError:
        stop(f"too little GPU memory for {name}; close other programs or choose a smaller --model")
    except ImportError as error:
        stop(f"{str(error).strip().splitlines()[0]}; pip install -r requirements.txt")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        hint = "--model takes a folder with config.json, tokenizer.json and model.safetensors"
        if not Path(name).is_dir():
            hint = "no such folder, and the Hub gave none; offline, pass a folder as --model"
        stop(f"can't load the model {name}: {str(error).strip().splitlines()[0]} ({hint})")


def user_message(record):
    """What the user says: the instruction, then, if there is one, a blank line and the input."""
    return "\n\n".join(part for part in (record["instruction"], record["input"]) if part)


def chat_frame(tokenizer):
    """Return (head, tail, end, special ids) of the chat template around one question and answer.

    The prompt is head + question + tail; the model is to write answer + end, where end closes with
    the end-of-turn token. A tokenizer without a template gets an Alpaca-style one, one without
    padding pads with its end-of-text token.
    """
    if not tokenizer.chat_template:
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        tokenizer.chat_template = "{{ bos_token }}" * adds_bos + ALPACA_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    question, answer = "\ue000", "\ue001"  # private-use characters: no template contains them
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        as_text = partial(tokenizer.apply_chat_template, tokenize=False)
        prompt, text = as_text(turns[:1], add_generation_prompt=True), as_text(turns)
        head, rest = text.split(question)
        tail, end = rest.split(answer)
    except Exception as error:  # a template is a program, it may raise anything
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        stop(f"the chat template of this model can't be used ({reason}); choose another --model")
    if not (head + question + tail).startswith(prompt):
        stop("the chat template writes its prompt and its answer apart; choose another --model")
    added = tokenizer.added_tokens_decoder.items()
    special = {id: token.content for id, token in added if token.special}
    ends = [end.index(token) + len(token) for token in special.values() if token in end]
    end = end[: min(ends)] if ends else end + (tokenizer.eos_token or "")
    return head, tail, end, set(special)


def encode(record, tokenizer, frame, max_length):
    """Turn a record into {"input_ids", "labels", "length" before the cut}.

    The labels are the ids of answer + end, and -100 before. The whole text is tokenized at once, as
    prompt and answer tokenized apart need not give the same ids; a token belongs to the answer if
    it starts there. A control token typed in a record (such as </s>) is spelled out as plain text.
    """
    head, tail, end, special = frame
    question, answer = user_message(record), record["output"]
    start = len(head) + len(question) + len(tail)
    text = head + question + tail + answer + end
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, labels = [], []
    for id, (left, right) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        ids = [id]
        typed = len(head) <= left < len(head) + len(question) or start <= left < start + len(answer)
        if id in special and typed:
            plain = partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
            ids = plain(text[left:right])["input_ids"]
        input_ids += ids
        labels += ids if left >= start else [-100] * len(ids)
    row = {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}
    return row | {"length": len(input_ids)}


def load_base(name, device, precision, load_in_4bit):
    """Load a causal language model, its linear layers in doubly quantised NF4 if asked."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model, info = pretrained(
        AutoModelForCausalLM,
        name,
        dtype=dtype,
        quantization_config=nf4 if load_in_4bit else None,
        device_map={"": device},
        use_safetensors=True,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        stop(f"{name} lacks weights, such as {sorted(info['missing_keys'])[0]}; download it again")
    # cuDNN attention plans anew for each length, which costs more than it gives
    torch.backends.cuda.enable_cudnn_sdp(False)
    table = model.get_input_embeddings()
    if table.weight is not model.get_output_embeddings().weight:
        # stays in host memory (of TinyLlama 125 MiB): few of its rows are needed at a time
        weight, look_up = table.weight.detach().cpu(), table.forward
        del table.weight  # as a parameter it would be moved with the model
        table.weight = weight

        def look_up_on_host(ids):
            rows = look_up(ids.cpu())
            return rows.pin_memory().to(device, non_blocking=True) if ids.is_cuda else rows

        table.forward = look_up_on_host
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # else the first evaluation repacks the weights in place, and nothing after it is right
            module.support_avx512bf16_for_cpu = False
            scales = module.weight.quant_state
            # quantised too: decoded once, not at each use (of TinyLlama 45 MiB for 4 % of the time)
            if scales.nested:
                scales.absmax = dequantize_blockwise(scales.absmax, scales.state2) + scales.offset
                scales.nested = False
    return model


def fingerprint(model):
    """A short name for the base weights: SHA-256 over its first 256 token embeddings as float16."""
    weight = model.get_input_embeddings().weight[:256].detach().half().cpu()
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16]


def load_model(name, folder, precision, load_in_4bit, expected):
    """Load the base and put the adapter on it, checking that the two belong together."""
    device = 0 if torch.cuda.is_available() else "cpu"
    base = load_base(name, device, precision, load_in_4bit)
    misfit = f"the adapter {folder} does not fit {name}; pass the --model it was trained on"
    if expected and fingerprint(base) != expected:
        stop(misfit)
    try:
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            saved = set(file.keys())
    except Exception as error:  # peft checks no config, so a wrong one may raise anything
        stop(f"{misfit} ({textwrap.shorten(str(error), 200)})")
    if saved != set(peft.get_peft_model_state_dict(model)):
        stop(misfit)
    return model


def encode_prompts(questions, tokenizer, frame, new_tokens, context, name):
    """Turn questions into token ids as in training; refuses one without room for its answer."""
    prompts = []
    for question in questions:
        row = encode({"instruction": question, "input": "", "output": ""}, tokenizer, frame, 2**30)
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        ids = [id for id, label in pairs if label == -100]
        if len(ids) + new_tokens > context:
            sizes = f"{len(ids):,} tokens and {new_tokens:,} new ones, {name} takes {context:,}"
            stop(f"the prompt {question[:40]!r} has {sizes}; shorten it or --max-new-tokens")
        prompts.append(ids)
    return prompts


def stop_tokens(model, tokenizer, frame):
    """Token ids that end an answer: end of text and of turn, by tokenizer, template and model."""
    end_of_turn = tokenizer(frame[2], add_special_tokens=False)["input_ids"][-1:]
    named = np.atleast_1d(model.generation_config.eos_token_id or []).tolist()
    return {tokenizer.eos_token_id, *end_of_turn, *named}


def check_finite(model, prompt, folder):
    """Refuse an adapter with which the model computes NaN or infinity."""
    probe = torch.tensor([prompt[-8:]], device=model.device)
    if not model(input_ids=probe).logits.isfinite().all():
        stop(f"the adapter {folder} gives no finite numbers; train with a lower --learning-rate")


@contextlib.contextmanager
def advice_on_memory():
    """End with advice where what is run within takes more memory than the GPU has."""
    try:
        yield
    except torch.OutOfMemoryError:
        stop("out of GPU memory; lower --batch-size, then shorten prompts or --max-new-tokens")


def generate(model, tokenizer, prompts, stops, args, title):
    """Answer prompts (token ids) greedily: list of {"text", "tokens", "stopped"}, and tokens/s."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
    )
    padding = {"padding_side": "left", "return_attention_mask": True, "return_tensors": "pt"}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers, began = {}, time.monotonic()
    batches = range(0, len(order), args.batch_size)
    for start in tqdm(batches, f"answers, {title}", disable=HIDE_BARS, leave=False):
        chosen = order[start : start + args.batch_size]
        inputs = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, **padding)
        output = model.generate(**inputs.to(model.device), generation_config=config)
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        for i, ids in zip(chosen, new, strict=True):
            end = next((n for n, id in enumerate(ids) if id in stops), None)
            text = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
            tokens = len(ids) if end is None else end + 1
            answers[i] = {"text": text, "tokens": tokens, "stopped": end is not None}
    seconds = time.monotonic() - began
    answers = [answers[i] for i in range(len(prompts))]
    return answers, sum(answer["tokens"] for answer in answers) / seconds


def counted(hidden, labels):
    """Hidden states, (tokens, size), that predict a label that counts; these labels, (tokens,)."""
    counts = labels[:, 1:] != -100  # position i predicts token i + 1
    return hidden[:, :-1][counts], labels[:, 1:][counts]


def token_nll(head, states, targets):
    """Negative log-likelihood in nats of each target, (tokens,), from 256 logit rows at a time."""
    nll = []
    for part, target in zip(states.split(256), targets.split(256)):
        logits = head(part.to(head.weight.dtype)).float()
        nll.append(F.cross_entropy(logits, target, reduction="none"))
    return torch.cat(nll)


def take_head(model):
    """Take off and return the head; the model's forward pass then ends in hidden states."""
    head = model.get_output_embeddings()
    probe = torch.arange(8, device=head.weight.device)[None]
    with torch.no_grad():
        logits = model(probe, use_cache=False).logits
        model.set_output_embeddings(torch.nn.Identity())
        alike = torch.allclose(head(model(probe, use_cache=False).logits), logits, atol=1e-3)
    if not alike:
        name = type(model).__name__
        stop(f"{name} changes its logits after the head: no support here; choose another --model")
    return head


def collate(rows, pad_id):
    """Sort rows, longest first, and pad them on the right, where causal attention never looks."""
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    lengths = [len(row["input_ids"]) for row in rows]
    padding = [lengths[0] - length for length in lengths]
    ids = [row["input_ids"] + [pad_id] * n for row, n in zip(rows, padding)]
    labels = [row["labels"] + [-100] * n for row, n in zip(rows, padding)]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "lengths": lengths}


def micro_batches(lengths, room):
    """Slices of rows, longest first, of at most `room` tokens with their padding, or one row."""
    start = 0
    while start < len(lengths):
        part = slice(start, start + max(1, room // lengths[start]))
        yield part
        start = part.stop


def row_nll(model, head, rows, batch_size, pad_id, title):
    """Sum of the negative log-likelihoods (nats) of each row's response tokens: shape (rows,)."""
    sums = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    lengths = [len(rows[i]["input_ids"]) for i in order]
    # a prompt adds one token at a time, a row takes all of its own at once: so half as many
    parts = list(micro_batches(lengths, batch_size * lengths[0] // 2))
    for part in tqdm(parts, f"perplexity, {title}", disable=HIDE_BARS, leave=False):
        batch = collate([rows[i] for i in order[part]], pad_id)
        input_ids, labels = batch["input_ids"].to(model.device), batch["labels"].to(model.device)
        hidden = model(input_ids=input_ids, use_cache=False).logits
        nll = token_nll(head, *counted(hidden, labels)).double()
        counts = (labels[:, 1:] != -100).sum(1).tolist()
        sums[order[part]] = [row.sum().item() for row in nll.split(counts)]
    return sums


def compare(base, finetuned, tokens):
    """Perplexities, their ratio and its interval, from each row's NLL sums (nats) and token count.

    Perplexity is exp(sum of NLL / number of tokens): tokens count alike. The interval is a 95 %
    bootstrap over rows (Efron and Tibshirani 1993, bias-corrected and accelerated): rows are drawn
    anew with both their figures, which keeps the pairs.
    """

    def ratio(difference, tokens, axis=-1):
        return np.exp(difference.sum(axis) / tokens.sum(axis))

    difference = finetuned - base
    interval = None
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


def measure_perplexity(model, rows, batch_size, pad_id):
    """Compare one model on encoded rows, its adapter off and on; takes the model's head off."""
    tokens = np.array([sum(label != -100 for label in row["labels"]) for row in rows])
    with model.disable_adapter():
        head = take_head(model.get_base_model())
        before = row_nll(model, head, rows, batch_size, pad_id, "before")
    return compare(before, row_nll(model, head, rows, batch_size, pad_id, "after"), tokens)


def verdict(perplexity):
    """The result in one sentence that a person can quote."""
    if perplexity is None:
        return "No --val-data, so no perplexity: read the answers side by side."
    low, high = perplexity["ratio_ci95"] or (-math.inf, math.inf)
    word = "Better" if high < 1 else "Worse" if low > 1 else "No clear difference"
    interval = f"95 % interval {low:.3f} to {high:.3f}" if high < math.inf else "no interval"
    return (
        "{word}: perplexity {base:.2f} -> {finetuned:.2f} on {rows} rows, "
        "x {ratio:.3f} ({interval}), {rows_improved} of {rows} rows improved."
    ).format(word=word, interval=interval, **perplexity)


def summarize(questions, answers, speed, perplexity):
    """What eval_results.json holds but its settings, from the sides' answers and perplexities."""
    prompts = []
    for question, *pair in zip(questions, *map(answers.get, KEYS), strict=True):
        sides = dict(zip(KEYS, pair, strict=True))
        prompt = {"prompt": question} | {key: side["text"] for key, side in sides.items()}
        for what in ("stopped", "tokens"):
            prompt |= {f"{key}_{what}": side[what] for key, side in sides.items()}
        prompts.append(prompt)

    def total(key, what):
        return sum(answer[what] for answer in answers[key])

    summary = {"verdict": verdict(perplexity), "prompts": len(questions)}
    summary["answers_changed"] = sum(prompt["base"] != prompt["finetuned"] for prompt in prompts)
    summary |= {f"{key}_stopped": total(key, "stopped") for key in KEYS}
    summary |= {f"{key}_mean_tokens": total(key, "tokens") / len(prompts) for key in KEYS}
    summary["tokens_per_second"] = speed
    return {"summary": summary, "prompts": prompts, "perplexity": perplexity}


def read_log(path):
    """The finite numbers of the whole entries of a training log, none where there is no log."""
    entries = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            entry = json.loads(line).items()
            entries.append({k: v for k, v in entry if isinstance(v, float | int) and abs(v) < 1e9})
    return [entry for entry in entries if "step" in entry]


def curve(log):
    """The loss curve of training_log.jsonl as SVG: a line for training, points for validation."""
    train, val = (
        sorted({entry["step"]: entry[key] for entry in log if key in entry}.items())
        for key in ("loss", "eval_loss")
    )
    if not train:
        return ""
    steps, losses = zip(*train, *val, strict=True)
    low, high, last = min(losses), max(losses), max(steps)

    def place(point):
        x = 90 + 600 * (point[0] - 1) / max(last - 1, 1)
        return f"{x:.1f},{20 + 200 * (high - point[1]) / (high - low or 1):.1f}"

    shown = train[:: -(len(train) // 1000 + 1)]  # from the last one back: a page stays small
    line = " ".join(map(place, [train[-1], *shown]))
    dots = "".join(f"M{place(point)}h0" for point in val)  # round ends of lines without length
    ends = f"from {train[0][1]:.3f} to {train[-1][1]:.3f}"
    measured = f"; dots: validation loss, at last {val[-1][1]:.3f}" if val else ""
    return f"""<h2>Loss while training</h2>
<svg viewBox="0 0 700 260" role="img" aria-label="loss {ends} in {last} steps" font-size="14"
 fill="var(--soft)"><path d="M90 20V220H690" fill="none" stroke="var(--line)"/>
<text x="82" y="28" text-anchor="end">{high:.3f}</text><text x="82" y="224" text-anchor="end">{low:.3f}</text>
<text x="90" y="246">step 1</text><text x="690" y="246" text-anchor="end">step {last}</text>
<g fill="none" stroke-linecap="round"><polyline points="{line}" stroke="var(--after)" stroke-width="2"/>
<path d="{dots}" stroke="var(--alarm)" stroke-width="10"/></g></svg>
<p class="soft">Line: training loss, {ends}{measured} (nats a token). Single steps vary with their rows.</p>"""


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
pre { font: inherit; white-space: pre-wrap; margin: .4rem 0 }
code { font: .85em ui-monospace, monospace; word-break: break-all }
table, svg { width: 100%; max-width: 44rem } table { border-collapse: collapse }
td, th { border-bottom: 1px solid var(--line); text-align: left; padding: .3rem 0; vertical-align: top }
td:not(:first-child), thead th:not(:first-child) { text-align: right; white-space: nowrap; padding-left: .8rem }
footer { font-size: .85rem } footer th { white-space: nowrap }
footer td:not(:first-child) { text-align: left; white-space: normal }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr } svg { font-size: 24px } }
@media print { .pair { break-inside: avoid } h2, h3 { break-after: avoid } }
</style></head><body>
<h1>Before and after fine-tuning</h1><p class="verdict">{{ summary.verdict }}</p>
<table><thead><tr><th scope=col>Measure<th scope=col>Before<th scope=col>After</thead><tbody>
{% if perplexity %}<tr><th scope=row>Perplexity
{% for key in keys %}<td>{{ "%.3f" % perplexity[key] }}{% endfor %}{% endif %}
<tr><th scope=row>Answers that stopped by themselves
{% for key in keys %}<td>{{ summary[key + "_stopped"] }} of {{ summary.prompts }}{% endfor %}
<tr><th scope=row>Mean length of an answer, tokens
{% for key in keys %}<td>{{ "%.0f" % summary[key + "_mean_tokens"] }}{% endfor %}
</tbody></table>{{ curve|safe }}<h2>Answers side by side</h2>
{% for result in prompts %}
<h3>{{ result.prompt }}</h3><div class="pair">{% for key in keys %}<div>
<h4>{{ "Before" if loop.first else "After" }}
{% if not result[key + "_stopped"] %}<span class="cut">did not stop, cut</span>{% endif %}</h4>
<pre>{% for part in result[key].split("```") %}{% if loop.index is odd %}{{ part }}{% else %}
<code>```{{ part }}{{ "" if loop.last else "```" }}</code>{% endif %}{% endfor %}</pre></div>
{% endfor %}</div>{% endfor %}
<footer><h2>Settings</h2><table><tbody>
{% for name, value in settings.items() if value is not none %}
<tr><th scope=row>{{ name }}<td>{{ value.items()|map("join", " ")|join(", ") if value is mapping else value }}
{% endfor %}
</tbody></table></footer></body></html>"""


def write_whole(path, text):
    """Write a text file whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_page(path, results, log):
    """Write the results as one self-contained HTML page; the template escapes every text."""
    page = jinja2.Template(PAGE, autoescape=True, trim_blocks=True)
    write_whole(path, page.render(results, keys=KEYS, curve=curve(log)) + "\n")


def write_results(output, results, log):
    """Write the results as strict JSON and, beside it, as a page."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
        write_whole(output, text + "\n")
        write_page(output.with_suffix(".html"), results, log)
    except (OSError, ValueError) as error:  # ValueError: a path that is no Unicode text
        stop(f"can't write {output} ({getattr(error, 'strerror', error)}); choose another --output")


def cells(text):
    """How many columns of a terminal a text takes: wide characters two, combining marks none."""
    marks = sum(unicodedata.category(c) in ("Mn", "Me") for c in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "FW" for c in text)


def wrap(text, width):
    """Wrap prose at words, cut code at the width; nothing that steers the terminal gets through."""
    lines, code, encoding = [], False, sys.stdout.encoding or "utf-8"
    safe = {"Cc": "\ufffd", "Cf": ""}  # control characters; marks without a width, such as bidi
    for line in text.splitlines():
        line = "".join(safe.get(unicodedata.category(c), c) for c in line.expandtabs(4))
        line = line.encode(encoding, "replace").decode(encoding)
        code ^= (fence := line.lstrip().startswith("```"))
        prose = not (code or fence)
        while cells(line) > width:
            end = sum(size <= width for size in itertools.accumulate(map(cells, line)))
            blank = max(line.rfind(" ", 0, end + 1), 0)
            end = blank if prose and line[:blank].strip() else end
            lines.append(line[:end])
            line = line[end:].lstrip() if prose else line[end:]
        lines.append(line)
    return lines


def print_side_by_side(results):
    """Print each prompt with its two answers in two columns that fit the terminal."""
    columns = max(20, min(shutil.get_terminal_size().columns, 160))
    width = (columns - 3) // 2
    for number, result in enumerate(results, 1):
        print("", *wrap(f"[{number}/{len(results)}] {result['prompt']}", columns), sep="\n")
        sides = []
        for name, key in zip(("before", "after"), KEYS, strict=True):
            title = name if result[f"{key}_stopped"] else f"{name} (cut)"
            sides.append([title, "-" * width, *wrap(result[key], width)])
        for left, right in itertools.zip_longest(*sides, fillvalue=""):
            print(f"{left}{' ' * (width - cells(left))} | {right}".rstrip())


def print_summary(summary):
    """Print what a person can quote, with a warning where the adapter changed no answer."""
    if not summary["answers_changed"]:
        print("\nWARNING: no answer changed, the adapter has no effect. Was it trained enough?")
    print("", *wrap(summary["verdict"], 78), sep="\n")
    print(
        "answers     {answers_changed} of {prompts} changed; "
        "{base_stopped} -> {finetuned_stopped} stopped by themselves\n"
        "length      {base_mean_tokens:.0f} -> {finetuned_mean_tokens:.0f} tokens on average, "
        "at {tokens_per_second:,.0f} tokens/s".format(**summary)
    )


def main(argv=None):
    args = parse_args(argv)
    if failed := getattr(sys, "last_value", None):  # in a notebook: a failed cell's frames are kept
        failed.__context__ = failed.__cause__ = sys.last_traceback.tb_next = None
    clear_device_cache(garbage_collection=True)  # in a notebook: what an earlier cell left
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries
    if HIDE_BARS:
        transformers.logging.disable_progress_bar()

    folder, output = Path(args.adapter), Path(args.output)
    adapter, training = read_adapter(folder)
    trained = training.get("arguments", {})
    questions = read_prompts(args.prompts) if args.prompts else QUESTIONS
    records = read_jsonl(args.val_data) if args.val_data else []
    read = [args.prompts or "", args.val_data or "", *folder.glob("*config.json")]
    check_target(output, [*read, folder / "tokenizer.json"])
    name, precision, load_in_4bit = as_trained(args, adapter, trained)

    own_tokenizer = (folder / "tokenizer_config.json").exists()
    tokenizer = pretrained(AutoTokenizer, folder if own_tokenizer else name)
    frame = chat_frame(tokenizer)
    model = load_model(name, folder, precision, load_in_4bit, training.get("base_fingerprint"))
    base = model.get_base_model()
    context = getattr(base.config.get_text_config(), "max_position_embeddings", 2**20)
    longest = trained.get("max_seq_length") or context

    prompts = encode_prompts(questions, tokenizer, frame, args.max_new_tokens, context, name)
    rows = [encode(record, tokenizer, frame, longest) for record in records]
    rows = [row for row in rows if row["labels"][-1] != -100]
    if records and not rows:
        stop(f"{args.val_data}: no row has any of its answer within {longest} tokens")
    print(f"model       {name} in {precision} on {model.device.type}, before and after {folder}")
    print(f"prompts     {len(prompts)} <- {args.prompts or 'built in'}")
    if rows:
        print(f"data        {len(rows):,} of {len(records):,} rows <- {args.val_data}")
    pad = tokenizer.pad_token_id
    last = max(itertools.chain([pad], *prompts, *(row["input_ids"] for row in rows)))
    table = base.get_input_embeddings().weight
    if last >= len(table):
        stop(f"the tokenizer of {folder} has tokens that {name} lacks; pass the right --model")
    stops = stop_tokens(base, tokenizer, frame)
    with (
        advice_on_memory(),
        torch.inference_mode(),
        torch.autocast(model.device.type, enabled=precision != "fp32", dtype=table.dtype),
    ):
        check_finite(model, prompts[0], folder)
        with model.disable_adapter():
            before, _ = generate(model, tokenizer, prompts, stops, args, "before")
        after, speed = generate(model, tokenizer, prompts, stops, args, "after")
        perplexity = measure_perplexity(model, rows, args.batch_size, pad) if rows else None

    results = summarize(questions, {"base": before, "finetuned": after}, speed, perplexity)
    packages = "torch transformers peft bitsandbytes scipy".split()
    results["settings"] = vars(args) | {
        "model": name,
        "precision": precision,
        "load_in_4bit": load_in_4bit,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {package: version(package) for package in packages},
    }
    write_results(output, results, read_log(folder / "training_log.jsonl"))
    print_side_by_side(results["prompts"])
    print_summary(results["summary"])
    print(f"saved       {output}\npage        {output.with_suffix('.html')}")
    return results["summary"] | {"perplexity": perplexity}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing was written")
    except BrokenPipeError:  # the reader, such as head, has left; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
