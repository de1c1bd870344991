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
import tempfile
import textwrap
import time
import traceback
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
from safetensors.torch import load_file
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
BATCH_SIZE = 8  # prompts at once, half as many rows: speed against memory
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
EVERYDAY = """Why is the sky blue? | Air scatters blue light far more than it scatters red light.
How many days has a leap year? | A leap year has 366 days, as February has 29 of them.
What is the capital of France? | The capital of France is Paris, on the river Seine.
How do I boil an egg? | Put it into boiling water for seven to ten minutes, then cool it.
Translate "good morning" into Spanish. | "Good morning" is "buenos días" in Spanish.
Who wrote Hamlet? | Hamlet was written by William Shakespeare around the year 1600.
What is 15 percent of 80? | 15 percent of 80 is 12.
Why do leaves turn yellow in autumn? | The green chlorophyll breaks down, yellow pigments remain.
Give me three synonyms of "happy". | Glad, cheerful and joyful.
How can I fall asleep more easily? | Go to bed at a regular hour and keep the room dark.
What is photosynthesis? | Plants use sunlight to turn water and carbon dioxide into sugar.
Write a short thank-you note. | Thank you for watering my plants while I was away. So kind!
What should I do with a small burn? | Cool it under running water for twenty minutes.
Name the planets closest to the Sun. | Mercury, Venus, Earth and Mars are closest to the Sun.
What does a mortgage mean? | It is a loan for a house that the bank may sell if it is not repaid.
How does a bicycle stay upright? | Its rider steers into each fall, which brings it back up.
What is the opposite of "ancient"? | The opposite of "ancient" is "modern".
Who painted the Mona Lisa? | Leonardo da Vinci painted it in the early sixteenth century.
How much water should I drink a day? | About two litres are enough for most adults, more if hot.
Tell me a fact about whales. | The blue whale is the largest animal that has ever lived."""
ALPACA_TEMPLATE = (  # for tokenizers that come without a chat template
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "### Instruction:\n{{ message['content'] }}\n\n### Response:\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
ODD = ("R", "AL", "NSM")  # letters from right to left, and marks that take no column
TITLES = {"base": "before", "finetuned": "after", "reference": "right answer"}
HIDE_BARS = not (sys.stderr.isatty() or "ipykernel" in sys.modules)


def parse_args(argv=None):
    if argv is None and "kernel_launcher" in sys.argv[0]:
        argv = []  # pasted into a notebook cell: sys.argv is the kernel's, the constants above decide
    raw = argparse.RawDescriptionHelpFormatter
    shown = {"usage": "%(prog)s [options]", "description": __doc__, "formatter_class": raw}
    parser = argparse.ArgumentParser("evaluate.py", allow_abbrev=False, **shown)
    switch, path = argparse.BooleanOptionalAction, os.path.expanduser

    def add(flag, default, help, **options):
        # set afterwards: Python 3.10 would tell the default of a switch twice
        action = parser.add_argument(flag, default=default, **options)
        action.help = f"{help} (default: %(default)s)"

    add("--model", MODEL, "base model; None: what the adapter was trained on", type=path)
    add("--adapter", ADAPTER, "folder of a LoRA adapter", type=path)
    add("--load-in-4bit", LOAD_IN_4BIT, "None: as in training", action=switch)
    add("--precision", PRECISION, "None: as in training", choices=["fp16", "bf16", "fp32"])
    add("--prompts", PROMPTS, "JSON list of questions; None: ten built in", type=path)
    add("--val-data", VAL_DATA, "JSONL to measure perplexity on", type=path)
    add("--val-prompts", VAL_PROMPTS, "questions of it that are asked", type=int)
    add("--max-new-tokens", MAX_NEW_TOKENS, "an answer is cut there", type=int)
    add("--batch-size", BATCH_SIZE, "prompts at once, half as many rows", type=int)
    add("--output", OUTPUT, "JSON file; the page beside it ends in .html", type=path)
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
    except (OSError, ValueError, RecursionError) as error:
        sys.exit(f"error: {path}: {getattr(error, 'strerror', None) or error}; {what}")
    return value


def read_adapter(folder, given):
    """What to load, {"model", "precision", ...}: as it was trained, where no option is given."""
    what = "--adapter takes the folder that lora_finetune.py wrote"
    config = read_json(folder / "adapter_config.json", dict, what)
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").exists()
        reason = "pickles are not opened" if pickled else "no adapter in it, or an unfinished run"
        sys.exit(f"error: {folder}: {reason}; {what}")
    off = "a trained bias stays when the adapter is off, so there is no before"
    for key, right, reason in ("peft_type", "LORA", "it is no LoRA"), ("bias", "none", off):
        if config.get(key, right) != right:
            sys.exit(f"error: {folder}: its {key} is {config[key]!r}: {reason}; {what}")
    path = folder / "training_config.json"
    training = read_json(path, dict, what) if path.exists() else {}
    trained = {"model": config.get("base_model_name_or_path"), "base_fingerprint": None}
    trained |= {"precision": "fp16", "load_in_4bit": True, "max_seq_length": None}
    arguments = training.get("arguments")
    for source in arguments if isinstance(arguments, dict) else {}, training, given:
        trained |= {key: source[key] for key in trained if source.get(key) is not None}
    if not (trained["model"] and isinstance(trained["model"], str)):
        sys.exit(f"error: {folder} does not say its base; pass what it was trained on: --model")
    return trained if torch.cuda.is_available() else trained | {"precision": "fp32"}


def read_prompts(path):
    """Records without an answer: the questions of a JSON list of strings, or the ten built in."""
    form = 'it takes a list of questions, ["What is a Pod?", ...]'
    prompts = read_json(path, list, form) if path else QUESTIONS
    for number, prompt in enumerate(prompts, 1):
        text = prompt if isinstance(prompt, str) else ""
        if not text.strip() or text != text.encode(errors="ignore").decode():  # half a character
            sys.exit(f"error: {path}: item {number} is no question; {form}")
    records = [{"instruction": prompt.strip(), "input": "", "output": None} for prompt in prompts]
    return records or sys.exit(f"error: {path}: no question in it; {form}")


def check_output(output, read):
    """Refuse, before the work, an output that can't be written or would overwrite what is read."""
    for path in output, output.with_suffix(".html"):
        if output.suffix != ".json" or path.is_dir() or path.resolve() in map(Path.resolve, read):
            sys.exit(f"error: {path} is read here, or not for writing; --output takes a new .json")
    nearest = next(path for path in output.absolute().parents if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        sys.exit(f"error: can't write to {nearest}; choose another --output")


def to_record(line):
    """A line of JSONL as {"instruction", "input", "output"}, all str; else raises ValueError."""
    row = json.loads(line.decode("utf-8-sig"))
    if not isinstance(row, dict):
        raise ValueError("not an object")
    record = {key: row.get(key) for key in ("instruction", "input", "output")}
    record["input"] = record["input"] or ""
    for key, text in record.items():
        if not isinstance(text, str) or not (text.strip() or key == "input"):
            raise ValueError(f'"{key}" is {"missing" if text is None else "no text"}')
        record[key] = text.encode().decode().strip()  # a ValueError if half a character
    return record


def read_jsonl(path):
    """The records of a JSONL file; a line that is none ends the program."""
    advice, records, number = "prepare_dataset.py makes and mends such files", [], 0
    try:
        for line in Path(path).read_bytes().split(b"\n"):
            number += 1
            if line.strip():
                records.append(to_record(line))
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
    if "out of memory" in reason:
        advice = "close other programs or choose a smaller --model"
    elif "not currently imported" in reason or "does not recognize" in reason:
        advice = "if a newer transformers saved it, pip install -U transformers"
    elif not Path(name).exists():
        advice = "no such folder, and the Hub gave none; offline, pass a folder as --model"
    sys.exit(f"error: can't load the model {name} ({reason}); {advice}")


def chat_frame(tokenizer):
    """Return (head, tail, end, special ids) of the chat template around one question and answer.

    The prompt is head + question + tail, the response answer + end; end closes with the end-of-turn
    token. The template, an Alpaca-style one if there is none, is made to tell one day as today's.
    """
    if not tokenizer.chat_template:
        adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = "{{ bos_token }}" * adds_bos + ALPACA_TEMPLATE
    question, answer = "\ue000", "\ue001"  # private-use characters: no template contains them
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    as_text = partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = "{% macro strftime_now(form) %}01 Jan 2025{% endmacro %}" + template
        tokenizer.chat_template = template
        prompt, text = as_text(turns[:1], add_generation_prompt=True), as_text(turns)
        head, rest = text.split(question)
        tail, end = rest.split(answer)
        if not (head + question + tail).startswith(prompt):
            raise ValueError("it writes a prompt and its answer apart")
    except Exception as error:  # a template is a program, it may raise anything
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        sys.exit(f"error: the model's chat template fails ({reason}); choose another --model")
    special = {id: t.content for id, t in tokenizer.added_tokens_decoder.items() if t.special}
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
    typed = range(len(head), len(head + question)), range(start, len(text) - len(end))
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spell = partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    input_ids, labels = [], []
    for id, (left, right) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        plain = id in special and any(left in part for part in typed)
        ids = spell(text[left:right])["input_ids"] if plain else [id]
        input_ids += ids
        labels += ids if left >= start else [-100] * len(ids)
    row = {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}
    answer_tokens = len(row["labels"]) - row["labels"].count(-100)
    return row | {"length": len(input_ids), "answer_tokens": answer_tokens}


def load_base(name, device, precision, load_in_4bit):
    """Load a causal language model, its linear layers in doubly quantised NF4 if asked."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **nf4)
    options = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True}
    options |= {"quantization_config": nf4} if load_in_4bit else {}
    model, info = pretrained(AutoModelForCausalLM, name, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        sys.exit(f"error: {name} lacks weights, such as {missing}; download it again")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length, slowly
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            # one kernel for the RMSNorm of Llama and kin: a fifth of a step's time on a GPU
            norm = {"weight": module.weight, "eps": module.variance_epsilon}
            module.forward = partial(F.rms_norm, normalized_shape=module.weight.shape, **norm)
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


def load_pair(trained, folder):
    """Load the base and put the adapter on it, checking that the two belong together."""
    name, device = trained["model"], 0 if torch.cuda.is_available() else "cpu"
    base = load_base(name, device, trained["precision"], trained["load_in_4bit"])
    misfit = f"error: the adapter {folder} does not fit {name}; pass the --model it was trained on"
    if trained["base_fingerprint"] not in (None, fingerprint(base)):
        sys.exit(misfit)
    try:
        saved = load_file(folder / "adapter_model.safetensors")
        for key in saved:
            if key.endswith("embed_tokens.weight"):  # may hold tokens that were added
                base.resize_token_embeddings(len(saved[key]), mean_resizing=False)
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        others = saved.keys() ^ peft.get_peft_model_state_dict(model).keys()
        if any("lora_" in key for key in others):
            raise ValueError("its layers are others")
    except Exception as error:  # peft checks no config, so a wrong one may raise anything
        sys.exit(f"{misfit} ({textwrap.shorten(str(error), 200)})")
    return model


def encode_all(model, tokenizer, frame, asked, groups, trained, args):
    """Token ids of each prompt, as in training, and rows of each group; refuses what can't fit."""
    config = model.get_base_model().config.get_text_config()
    context = getattr(config, "max_position_embeddings", 2**20)
    rows = [encode(record | {"output": ""}, tokenizer, frame, 2**30) for record in asked]
    prompts = [row["input_ids"][: row["labels"].count(-100)] for row in rows]
    limit, ids, encoded = trained["max_seq_length"] or context, [*prompts], {}
    for name, records in groups.items():
        rows = [encode(record, tokenizer, frame, limit) for record in records]
        rows = [row for row in rows if row["answer_tokens"]]
        encoded[name] = sorted(rows, key=lambda row: -len(row["input_ids"]))
        ids += [row["input_ids"] for row in encoded[name]]
        if not encoded[name]:
            sys.exit(f"error: {args.val_data}: no answer within {limit} tokens; take shorter rows")
    longest, size = max(map(len, prompts)), len(model.get_input_embeddings().weight)
    if longest + args.max_new_tokens > context:
        room = f"{longest:,} tokens and {args.max_new_tokens:,} new ones, it reads {context:,}"
        where = f"{args.val_data}, {args.prompts or 'built in'}"
        sys.exit(f"error: a question ({where}): {room}; shorten it or --max-new-tokens")
    if max(map(max, ids)) >= size:
        lack = f"the tokenizer has tokens beyond the model's {size:,}"
        sys.exit(f"error: {lack}; pass the --model that the adapter was trained on")
    return prompts, encoded


def generate(model, tokenizer, frame, prompts, args, side):
    """Answer prompts (token ids) greedily: [{side: text, side_stopped: bool, side_tokens: int}]."""
    named = np.atleast_1d(model.generation_config.eos_token_id or []).tolist()
    end_of_turn = tokenizer(frame[2], add_special_tokens=False)["input_ids"][-1:]
    stops = {*named, *end_of_turn, tokenizer.eos_token_id} - {None}
    config = {"do_sample": False, "max_new_tokens": args.max_new_tokens, "pad_token_id": 0}
    config = GenerationConfig(eos_token_id=sorted(stops) or None, **config)
    starts, answers = range(0, len(prompts), args.batch_size), []
    for start in tqdm(starts, f"answers, {TITLES[side]}", disable=HIDE_BARS, leave=False):
        ids = [torch.tensor(prompt) for prompt in prompts[start : start + args.batch_size]]
        ids = pad_sequence(ids, True, -1, padding_side="left").to(model.device)
        inputs = {"input_ids": ids.clamp(0), "attention_mask": (ids >= 0).long()}
        output = model.generate(**inputs, generation_config=config)
        for new in output[:, ids.shape[1] :].tolist():
            end = next((n for n, id in enumerate(new) if id in stops), None)
            text = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
            tokens = len(new) if end is None else end + 1
            answer = {side: text, f"{side}_stopped": end is not None, f"{side}_tokens": tokens}
            answers.append(answer)
    return answers


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
    """Negative log-likelihood (nats) of each row's response, rows longest first: shape (rows,)."""
    # a prompt adds one token at a time, a row takes all of its own at once: so half as many
    parts = list(micro_batches(rows, batch_size * len(rows[0]["input_ids"]) // 2))
    nll = [nll_of(part) for part in tqdm(parts, title, disable=HIDE_BARS, leave=False)]
    tokens = torch.cat(nll).double().split([row["answer_tokens"] for row in rows])
    return np.array([part.sum().item() for part in tokens])


def compare(base, finetuned, tokens):
    """Perplexities, their ratio and its interval, from each row's NLL sums (nats) and token count.

    Perplexity is exp(sum of NLL / number of tokens): tokens count alike. The interval is a 95 %
    bootstrap over rows (Efron and Tibshirani 1993, bias-corrected and accelerated): rows are drawn
    anew with both their figures, which keeps the pairs.
    """

    def perplexity(nll, tokens, axis=-1):
        return np.exp(nll.sum(axis) / tokens.sum(axis))

    interval, difference = [math.nan], finetuned - base
    if len(tokens) > 1:
        drawn = {"paired": True, "batch": 100, "rng": np.random.default_rng(0)}
        found = scipy.stats.bootstrap((difference, tokens), perplexity, **drawn)
        interval = [float(end) for end in found.confidence_interval]
    return {
        "base": float(perplexity(base, tokens)),
        "finetuned": float(perplexity(finetuned, tokens)),
        "ratio": float(perplexity(difference, tokens)),
        "ratio_ci95": None if math.isnan(interval[0]) else interval,  # where all changed alike
        "tokens": int(tokens.sum()),
        "rows": len(tokens),
        "rows_improved": int((difference < 0).sum()),
    }


def run_both(model, tokenizer, frame, asked, prompts, groups, args):
    """With the adapter off and on: the answers, the seconds they took, figures of each group."""
    questions = ["\n\n".join(filter(None, [row["instruction"], row["input"]])) for row in asked]
    answers = [{"prompt": q, "reference": row["output"]} for q, row in zip(questions, asked)]
    base, nll, seconds = model.get_base_model(), {}, 0
    nll_of = partial(response_nll, base, find_head(base), tokenizer.eos_token_id or 0)
    dtype = base.get_input_embeddings().weight.dtype
    autocast = torch.autocast(base.device.type, dtype, dtype != torch.float32)
    for side, switch in ("base", model.disable_adapter()), ("finetuned", contextlib.nullcontext()):
        with torch.inference_mode(), autocast, switch:
            began = time.monotonic()
            new = generate(base, tokenizer, frame, prompts, args, side)
            seconds += time.monotonic() - began
            answers = [one | other for one, other in zip(answers, new, strict=True)]
            for name, rows in groups.items():
                title = f"{name}, {TITLES[side]}"
                nll[name, side] = row_nll(nll_of, rows, args.batch_size, title)
    figures = {}
    for name, rows in groups.items():
        tokens = np.array([row["answer_tokens"] for row in rows])
        figures[name] = compare(nll[name, "base"], nll[name, "finetuned"], tokens)
    return answers, seconds, figures


def judge(figures, kind, better, unclear, worse):
    """A comparison to quote, and that of three verdicts which fits where its interval lies."""
    low, high = figures["ratio_ci95"] or (0, math.inf)
    interval = f"95% interval {low:.3f} to {high:.3f}" if high < math.inf else "no interval"
    told = "perplexity {base:.2f} -> {finetuned:.2f} on {rows} {kind} rows, x {ratio:.3f} ({ends})"
    word = better if high < 1 else worse if low > 1 else unclear
    return told.format(kind=kind, ends=interval, **figures), word


def conclude(prompts, seconds, perplexity, general):
    """What people want to know: in sentences, a line each, and in numbers."""
    summary = {"verdict": "No verdict without --val-data: read the answers side by side"}
    if perplexity:
        better = "Better: the right answers surprise the model less than before"
        worse = "Worse: the right answers surprise the model more than before"
        unclear = "No clear difference: it may be chance"
        told, summary["verdict"] = judge(perplexity, "held-out", better, unclear, worse)
        summary["held out"] = told + ", {rows_improved} of {rows} better".format(**perplexity)
    fine, hurt = "no damage seen", "it got worse at other things"
    summary["elsewhere"] = ": ".join(judge(general, "everyday", fine, fine, hurt))
    changed = sum(prompt["base"] != prompt["finetuned"] for prompt in prompts)
    numbers, tokens = {"prompts": len(prompts), "answers_changed": changed}, 0
    for side in "base", "finetuned":
        numbers[f"{side}_stopped"] = sum(prompt[f"{side}_stopped"] for prompt in prompts)
        length = sum(prompt[f"{side}_tokens"] for prompt in prompts)
        numbers[f"{side}_mean_tokens"], tokens = length / len(prompts), tokens + length
    numbers["tokens_per_second"] = tokens / seconds
    summary["answers"] = (
        "{answers_changed} of {prompts} changed, {base_stopped} -> {finetuned_stopped} stopped by "
        "themselves, {base_mean_tokens:.0f} -> {finetuned_mean_tokens:.0f} tokens on average, "
        "{tokens_per_second:,.0f} tokens/s".format(**numbers)
    )
    if not changed:
        summary["WARNING"] = "no answer changed, the adapter has no effect. Was it trained enough?"
    return summary | numbers


def clip(prompt, tokenizer, limit):
    """A prompt of the results as it is shown, its reference cut where an answer would be."""
    ids = tokenizer(prompt["reference"] or "", add_special_tokens=False)["input_ids"]
    cut = {"reference": tokenizer.decode(ids[:limit]), "reference_stopped": False}
    return prompt | cut if len(ids) > limit else prompt


def read_log(path):
    """Points (step, loss) of a training log: of training, their running mean, of validation."""
    points = {"loss": {}, "eval_loss": {}}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(Exception):  # another tool's, or cut short: what fits is taken
            entry = json.loads(line)
            key = "loss" if "loss" in entry else "eval_loss"
            if 0 < entry["step"] < 1e9 and abs(entry[key]) < 1e9:
                points[key][entry["step"]] = entry[key]
    train, val = (sorted(found.items()) for found in points.values())
    losses, width = [loss for _, loss in train], len(train) // 10 + 1
    means = [np.mean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]
    mean = [(step, mean) for (step, _), mean in zip(train, means)]
    every = -(len(train) // 1000 + 1)  # from the last one back: a page stays small
    return {"train": train[::every], "mean": mean[::every], "val": val, "width": width}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Before and after fine-tuning</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --soft: light-dark(#57606a, #9da7b3);
  --line: light-dark(#d0d7de, #3d444d); --after: light-dark(#0a5cc2, #6cb0ff);
  --alarm: light-dark(#a40e26, #ff9a9a) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem;
  background: light-dark(#fff, #0d1117); overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h3 { margin: 2rem 0 .5rem; white-space: pre-wrap }
h4 { margin: 0 } .soft { color: var(--soft) } .cut { color: var(--alarm) }
pre { font: inherit; white-space: pre-wrap; margin: .4rem 0 }
code { font: .85em ui-monospace, monospace }
.pair { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)) }
.pair > div { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem }
.pair > :nth-child(3) { grid-column: 1 / -1 }
th { text-align: left; vertical-align: top; padding-right: 1rem; white-space: nowrap }
svg { overflow: visible } details { margin: 2rem 0 }
.chart { display: block; width: 100%; max-width: 44rem; stroke: var(--line); fill: none }
.chart path { stroke: var(--after); stroke-linecap: round; vector-effect: non-scaling-stroke }
.chart .dots { stroke: var(--alarm); stroke-width: 10 }
text { stroke: none; fill: var(--soft); font-size: 14px; text-anchor: end }
.start { text-anchor: start }
</style></head><body><main><h1>{{ summary.verdict }}.</h1><table>
{% for name, value in summary.items() if value is string and name != "verdict" %}
<tr><th scope="row">{{ name }}<td>{{ value|replace("->", "→") }}
{% set now = {"held out": perplexity, "elsewhere": general}[name] %}{% if now %}
{% set low, high = now.ratio_ci95 or (now.ratio, now.ratio) %}
{% set unit = 100 / [1, now.ratio, high]|max %}
<svg class="chart" height="34" role="img" aria-label="both perplexities as bars">
<rect width="{{ unit }}%" height="12" fill="var(--soft)" stroke="none"/>
<rect width="{{ unit * now.ratio }}%" y="16" height="12" fill="var(--after)" stroke="none"/>
<rect x="{{ unit * low }}%" width="{{ unit * (high - low) }}%" y="13" height="18"
 stroke="currentColor"/></svg>{% endif %}{% endfor %}</table>
<p class="soft">Perplexity: among how many equally likely words the model wavers at each word of
the right answer, so lower is better. Grey bar: before; blue: after; the box around its end: the
95% interval of the change.</p>{% if train %}{% set losses = (train + val)|map(attribute=1)|list %}
{% set low, high, last = losses|min, losses|max, (train + val)|map(attribute=0)|max %}
<h2>Loss while training</h2><svg class="chart" height="260" role="img" aria-label="loss curve">
{% for y, loss in ((30, high), (130, (low + high) / 2), (230, low)) %}
<line x1="12%" x2="99%" y1="{{ y }}" y2="{{ y }}"/>
<text x="11%" y="{{ y + 5 }}">{{ "%.2f" % loss }}</text>{% endfor %}
<text x="12%" y="14" class="start">loss, nats per token</text>
<text x="12%" y="252" class="start">step 0</text><text x="99%" y="252">step {{ last }}</text>
<svg x="12%" y="30" width="87%" height="200" preserveAspectRatio="none" role="img"
 aria-label="curve" viewBox="0 {{ -high }} {{ last }} {{ high - low or 1 }}">
<path d="M{% for step, loss in train %}{{ step }},{{ -loss }} {% endfor %}h0" opacity=".5"/>
<path d="M{% for step, loss in mean %}{{ step }},{{ -loss }} {% endfor %}h0" stroke-width="3"/>
<path d="{% for step, loss in val %}M{{ step }},{{ -loss }}h0{% endfor %}" class="dots"/></svg>
</svg><p class="soft">Pale: training loss of single steps, from {{ "%.3f" % train[-1][1] }} to
{{ "%.3f" % train[0][1] }}. Strong: mean of {{ width }} steps.
{% if val %}{% set best = val|min(attribute=1) %}Dots: validation loss, at last
{{ "%.3f" % val[-1][1] }}, lowest after step {{ best[0] }}: {{ "%.3f" % best[1] }}.{% endif %}</p>
{% endif %}<h2>Answers side by side</h2>
{% for result in prompts %}<h3 dir="auto">{{ result.prompt }}</h3><div class="pair">
{% for side, title in titles.items() if result[side] is not none %}<div><h4>{{ title|capitalize }}
{% if result[side + "_stopped"] is false %}
<span class="cut">cut at {{ settings.max_new_tokens }} tokens</span>{% endif %}</h4>
<pre dir="auto">{% for part in result[side].split("```") %}{% if loop.index is odd %}{{ part }}
{%- else %}<code>```{{ part }}{{ "" if loop.last else "```" }}</code>{% endif %}{% endfor %}</pre>
</div>{% endfor %}</div>{% endfor %}
<details><summary>Settings</summary><table>
{% for name, value in settings.items() if value is not none %}<tr><th scope="row">{{ name }}
<td>{{ value.items()|map("join", " ")|join(", ") if value is mapping else value }}
{% endfor %}</table></details></main></body></html>"""


def write_results(output, results, shown, log):
    """Write the results as strict JSON and, beside it, as a page; its template escapes texts."""
    held_out, val = results["perplexity"], log["val"]
    if held_out and val and abs(math.log(held_out["finetuned"]) - val[-1][1]) < 0.02:
        val = [(0, math.log(held_out["base"])), *val]  # the same rows: training skips the start
    page = jinja2.Template(PAGE, autoescape=True, trim_blocks=True)
    page = page.render(results | log | {"val": val, "prompts": shown, "titles": TITLES})
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    files = {output.with_suffix(".html"): page, output: text}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as aside:
            for path, text in files.items():
                Path(aside, path.name).write_text(text + "\n", encoding="utf-8")
            for path in files:
                os.replace(Path(aside, path.name), path)
    except (OSError, ValueError) as error:  # ValueError: a path that is no Unicode text
        sys.exit(f"error: can't write {output} ({error}); choose another --output")


def wrap(text, width, **options):
    """Wrap each line of a text; what would steer a terminal, or what it lacks, is shown as code."""
    encoding, lines = sys.stdout.encoding or "utf-8", []
    for line in text.expandtabs(4).splitlines():
        control = (unicodedata.category(c)[0] == "C" and c not in "\u200c\u200d" for c in line)
        shown = (ascii(c)[1:-1] if bad else c for c, bad in zip(line, control, strict=True))
        line = "".join(shown).encode(encoding, "backslashreplace").decode(encoding)
        lines += textwrap.wrap(line, width, break_on_hyphens=False, **options) or [""]
    return lines


def columns():
    """The width of the terminal, within reason."""
    return max(20, min(shutil.get_terminal_size().columns, 160))


def tell(label, text):
    """Print a labelled line, what does not fit the terminal on lines below its text."""
    lines = wrap(text, max(20, columns() - 12), break_long_words=False)
    print(f"{label:12}" + f"\n{'':12}".join(lines))


def print_side_by_side(prompts):
    """Print each prompt with its two answers in columns that fit the terminal, then the reference.

    They stand one below the other where it is narrow, or where letters may take two columns, none,
    or run from right to left.
    """
    for number, result in enumerate(prompts, 1):
        texts = {side: result[side] for side in TITLES if result[side] is not None}
        odd = any(
            unicodedata.east_asian_width(c) in "FW" or unicodedata.bidirectional(c) in ODD
            for c in "".join([result["prompt"], *texts.values()])
        )
        whole = columns() // 2 if odd else columns()
        width = whole if odd or whole < 60 else (whole - 3) // 2
        blocks = [wrap(f"[{number}/{len(prompts)}] {result['prompt']}", whole)]
        for side, text in texts.items():
            title = TITLES[side] + " (cut)" * (not result.get(f"{side}_stopped", True))
            size = whole if side == "reference" else width
            blocks.append([title, "-" * size, *wrap(text, size)])
        if width < whole:
            pairs = itertools.zip_longest(*blocks[1:3], fillvalue="")
            blocks[1:3] = [[f"{left:{width}} | {right}".rstrip() for left, right in pairs]]
        print("", *itertools.chain.from_iterable([*block, ""] for block in blocks), sep="\n")


def main(argv=None):
    args = parse_args(argv)
    free_memory()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # between the libraries, or of a bootstrap without spread
    if HIDE_BARS:
        transformers.logging.disable_progress_bar()

    folder, output = Path(args.adapter), Path(args.output)
    trained = read_adapter(folder, vars(args))
    held_out = read_jsonl(args.val_data) if args.val_data else []
    asked = held_out[: args.val_prompts] + read_prompts(args.prompts)
    everyday = [line.split(" | ") for line in EVERYDAY.splitlines()]
    files = [Path(path) for path in (args.prompts, args.val_data) if path]
    check_output(output, [*folder.glob("*.json"), *files])

    own_tokenizer = (folder / "tokenizer_config.json").exists()
    tokenizer = pretrained(AutoTokenizer, folder if own_tokenizer else trained["model"])
    frame = chat_frame(tokenizer)
    model = load_pair(trained, folder)
    groups = {"held out": held_out} if held_out else {}
    groups |= {"elsewhere": [{"instruction": q, "input": "", "output": a} for q, a in everyday]}
    prompts, groups = encode_all(model, tokenizer, frame, asked, groups, trained, args)
    tell("model", f"{trained['model']} in {trained['precision']}, before and after {folder}")
    tell("prompts", f"{len(asked)} <- {args.val_data or 'no rows'}, {args.prompts or 'built in'}")
    try:
        answers, seconds, figures = run_both(model, tokenizer, frame, asked, prompts, groups, args)
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory; lower --batch-size, then --max-new-tokens")
    if not math.isfinite(sum(found["base"] + found["finetuned"] for found in figures.values())):
        sys.exit(f"error: {folder}: no finite figures; train with a lower --learning-rate")
    perplexity, general = figures.get("held out"), figures["elsewhere"]
    results = {"summary": conclude(answers, seconds, perplexity, general), "prompts": answers}
    results |= {"perplexity": perplexity, "general": general}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: version(name) for name in "torch transformers peft bitsandbytes".split()}
    results["settings"] = vars(args) | trained | {"device": device, "versions": versions}
    shown = [clip(answer, tokenizer, args.max_new_tokens) for answer in answers]
    write_results(output, results, shown, read_log(folder / "training_log.jsonl"))
    print_side_by_side(shown)
    print()
    for name, text in results["summary"].items():
        if isinstance(text, str):
            tell(name, text)
    tell("saved", f"{output}\n{output.with_suffix('.html')}")
    return results["summary"] | {"perplexity": perplexity, "general": general}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing was written")
    except BrokenPipeError:  # the reader, such as head, has left; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
