"""Fine-tune a small language model on your questions and answers with QLoRA on a 6 GB GPU.

Reads   --dataset: JSONL of instruction, input, output, or the folder prepare_dataset.py wrote
Writes  --output: the LoRA adapter, its tokenizer, training_log.jsonl, training_config.json

    python prepare_dataset.py --input data/raw_qa.csv --output data/prepared
  > python lora_finetune.py --dataset data/prepared --output output/tinyllama-k8s-qlora
    python evaluate.py --adapter output/tinyllama-k8s-qlora --val-data data/prepared/val.jsonl
"""

# ruff: noqa: E402
import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import signal
import sys
import textwrap
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel("ERROR")  # on import it asks for what none needs

import datasets
import filelock
import peft
import psutil
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from bitsandbytes.functional import dequantize_blockwise
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm, trange
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

# ---------------------------------------------------------------------------------------------
# Edit here, or pass the flag of the same name.
# data
DATASET = "data/sample_dataset.jsonl"  # JSONL file, or a folder with train.jsonl and val.jsonl
VAL_DATA = None  # JSONL measured after each epoch; None: val.jsonl of a --dataset folder
MAX_SEQ_LENGTH = 512  # tokens; longer rows are cut
# model
MODEL = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"  # Hugging Face name or local folder
LOAD_IN_4BIT = True  # NF4 weights: a quarter of the memory
PRECISION = "fp16"  # fp16, bf16 (GPUs from 2020 on) or fp32; the CPU always uses fp32
# lora
LORA_R = 16  # rank: capacity against memory
LORA_ALPHA = 32  # scale of the adapter is alpha / r
LORA_DROPOUT = 0.05  # 0 up to 1
TARGET_MODULES = ["q_proj", "v_proj"]  # linear layers that get an adapter
# training
EPOCHS = 3.0  # passes over the data
MAX_STEPS = -1  # optimizer steps instead of epochs, -1: off; 5 gives a quick look
LEARNING_RATE = 2e-4  # peak; cosine schedule down to 0
WARMUP_RATIO = 0.03  # share of the steps on which the rate rises
BATCH_SIZE = 4  # longest rows at once on each device; of shorter ones as many as take no more room
GRADIENT_ACCUMULATION_STEPS = 4  # times that: 4 x 4 = 16 rows a step
GRADIENT_CHECKPOINTING = True  # recompute activations: less memory, a third slower
AUTO_BATCH_SIZE = False  # all rows of a step at once, or as many as fit
GROUP_BY_LENGTH = False  # rows of like length in a step: a quarter less time, an unsteady loss
SEED = 42
# output
OUTPUT = "output/tinyllama-k8s-qlora"  # folder
LOGGING_STEPS = 1  # steps between log lines
RESUME = False  # go on from the checkpoint of a stopped run
OVERWRITE = False  # replace what an earlier run left in OUTPUT
# ---------------------------------------------------------------------------------------------

RANGES = {"epochs": (0.01, 1e4), "learning_rate": (1e-9, 1), "lora_alpha": (1e-3, 1e5)}
RANGES |= {"max_seq_length": (8, 2**20), "max_steps": (-1, 2**31), "seed": (0, 2**32 - 1)}
RANGES |= {"lora_dropout": (0, 0.99), "warmup_ratio": (0, 0.99)}  # of the other numbers: from 1
MAY_CHANGE = """dataset val_data output logging_steps resume overwrite gradient_checkpointing
auto_batch_size""".split()  # on --resume; of the dataset the content counts
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm
CHECKPOINT, LOG, ADAPTER = "checkpoint.pt", "training_log.jsonl", "adapter_model.safetensors"
NOT_FINITE = "error: loss or gradients not finite; lower --learning-rate, or --precision fp32"
LINE = """{step:>6} {epoch:>7.2f} {loss:>8.4f} {learning_rate:>9.2e} {grad_norm:>10.3f}
{tokens_per_second:>10,.0f} {memory_mib:>6,} {left:>10}""".replace("\n", " ")
OUTPUT_ADVICE = "end another run that writes there, free space, or choose another --output"
MODEL_ADVICE = (
    "pass a 16-bit model: its folder with config.json, tokenizer.json, model.safetensors or, online,"
    " its Hub name; if a newer transformers saved it, pip install -U transformers"
)
ALPACA_TEMPLATE = (  # for tokenizers that come without a chat template
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "### Instruction:\n{{ message['content'] }}\n\n### Response:\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
RANK = int(os.environ.get("RANK", 0))  # of this process, set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
HIDE_BARS = RANK > 0 or not (sys.stderr.isatty() or "ipykernel" in sys.modules)


def parse_args(argv=None):
    if argv is None and "kernel_launcher" in sys.argv[0]:
        argv = []  # pasted into a notebook cell: sys.argv is the kernel's, the constants above decide
    usage, raw = "%(prog)s [options]", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("lora_finetune.py", usage, __doc__, formatter_class=raw)
    parser.allow_abbrev = False
    switch, path = argparse.BooleanOptionalAction, os.path.expanduser

    def add(flag, default, help, **options):  # help set afterwards: Python 3.10 adds to a switch's
        action = parser.add_argument(flag, default=default, **options)
        action.help = f"{help} (default: %(default)s)"

    add("--dataset", DATASET, "JSONL, or folder of train.jsonl and val.jsonl", type=path)
    add("--val-data", VAL_DATA, "JSONL that is measured after each epoch", type=path)
    add("--max-seq-length", MAX_SEQ_LENGTH, "tokens of a row", type=int)
    add("--model", MODEL, "Hugging Face name or local folder", type=path)
    add("--load-in-4bit", LOAD_IN_4BIT, "NF4 weights", action=switch)
    add("--precision", PRECISION, "of numbers", choices=["fp16", "bf16", "fp32"])
    add("--lora-r", LORA_R, "rank", type=int)
    add("--lora-alpha", LORA_ALPHA, "scale x rank", type=float)
    add("--lora-dropout", LORA_DROPOUT, "share dropped", type=float)
    add("--target-modules", TARGET_MODULES, "linear layers to adapt", nargs="+")
    add("--epochs", EPOCHS, "passes over the data", type=float)
    add("--max-steps", MAX_STEPS, "instead of epochs; -1: off", type=int)
    add("--learning-rate", LEARNING_RATE, "at its peak", type=float)
    add("--warmup-ratio", WARMUP_RATIO, "share of the steps", type=float)
    add("--batch-size", BATCH_SIZE, "longest rows at once", type=int)
    add("--gradient-accumulation-steps", GRADIENT_ACCUMULATION_STEPS, "times that", type=int)
    add("--gradient-checkpointing", GRADIENT_CHECKPOINTING, "less memory, slower", action=switch)
    add("--auto-batch-size", AUTO_BATCH_SIZE, "as many rows as fit", action=switch)
    add("--group-by-length", GROUP_BY_LENGTH, "rows of like length a step", action=switch)
    add("--seed", SEED, "same seed, same run", type=int)
    add("--output", OUTPUT, "folder", type=path)
    add("--logging-steps", LOGGING_STEPS, "steps between log lines", type=int)
    add("--resume", RESUME, "go on with a stopped run", action=switch)
    add("--overwrite", OVERWRITE, "replace an earlier run", action=switch)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        low, high = RANGES.get(name, (1, 2**31))
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"argument --{name.replace('_', '-')}: must be from {low} to {high}")
    if args.max_steps == 0:
        parser.error("argument --max-steps: must be at least 1, or -1 for --epochs")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite drops it; choose one")
    return args


def say(line):
    """Print a line, of the first process alone; what a terminal can't show or would obey as "?"."""
    if RANK == 0:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        shown = "".join(letter if letter.isprintable() else "?" for letter in line)
        tqdm.write(shown.encode(encoding, "replace").decode(encoding))


@contextlib.contextmanager
def explained(what, advice, kind=Exception):
    """Within, an error of a library ends the program in one line: what failed, why, what helps."""
    try:
        yield
    except kind as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = textwrap.shorten(reason, 200)
        if "out of memory" in reason:
            advice = "lower --batch-size, close other programs or choose a smaller --model"
        sys.exit(f"error: {what}: {reason}; {advice}")


def find_data(args):
    """The training and the validation file (or None) that --dataset and --val-data name."""
    source, val_source = Path(args.dataset), args.val_data
    held_out = source / "val.jsonl"
    if not val_source and held_out.is_file() and held_out.stat().st_size:
        val_source = held_out
    return source / "train.jsonl" if source.is_dir() else source, val_source


def to_record(row):
    """A row of JSON as {"instruction", "input", "output"}, all str; else raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    record = {key: row.get(key) or "" for key in ("instruction", "input", "output")}
    for key, text in record.items():
        if not isinstance(text, str) or not (text.strip() or key == "input"):
            raise ValueError(f'"{key}" is {"no text" if text else "missing"}')
        record[key] = text.encode().decode().strip()  # a ValueError if half a character
    return record


def read_jsonl(path):
    """The records of a JSONL file; a line that is none ends the program."""
    records, advice = [], "prepare_dataset.py makes and mends such files"
    with explained(path, advice):
        lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        with explained(f"{path}:{number}", advice):
            if line.strip():
                records.append(to_record(json.loads(line.decode("utf-8-sig"))))
    return records or sys.exit(f"error: {path}: no records in it; {advice}")


@contextlib.contextmanager
def claimed(folder, args):
    """Within, the output folder is this run's alone; refuses one whose run no flag gives up."""
    unfinished = (folder / CHECKPOINT).exists()
    held = (folder / ADAPTER).exists() and not unfinished or unfinished and not args.resume
    if held and not args.overwrite:
        way = "an unfinished run; --resume" if unfinished else "a finished run; another --output"
        sys.exit(f"error: {folder} holds {way} keeps it, --overwrite drops it")
    lock = filelock.FileLock(folder / f".lock{RANK or ''}", timeout=0)
    with explained(f"can't write to {folder}", OUTPUT_ADVICE, OSError), lock:
        yield


def memory_mib():
    """Peak memory in MiB of this process on the GPU, or on a CPU what it holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return psutil.Process().memory_info().rss >> 20


def choose_device(args):
    """Return the device of this process and the precision it computes in, and say which."""
    if not torch.cuda.is_available():
        say(f"device      no GPU found by torch {torch.__version__}; training on the CPU in fp32")
        return "cpu", "fp32"
    device = int(os.environ.get("LOCAL_RANK", 0))  # one process uses one GPU, whatever is there
    torch.cuda.set_device(device)
    torch.cuda.reset_peak_memory_stats()
    name = torch.cuda.get_device_name()
    if args.precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        sys.exit(f"error: --precision bf16: {name} only emulates it, slowly; use fp16")
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    say(f"device      {name}, {free:.1f} of {total:.1f} GiB free; computing in {args.precision}")
    return device, args.precision


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
    with explained("the model's chat template fails", "choose another --model"):
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = "{% macro strftime_now(form) %}01 Jan 2025{% endmacro %}" + template
        tokenizer.chat_template = template
        prompt = tokenizer.apply_chat_template(
            turns[:1], tokenize=False, add_generation_prompt=True
        )
        head, rest = tokenizer.apply_chat_template(turns, tokenize=False).split(question)
        tail, end = rest.split(answer)
        if not (head + question + tail).startswith(prompt):
            raise ValueError("it writes a prompt and its answer apart")
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


def encode_rows(records, tokenizer, frame, max_length, path):
    """Encode records into a Dataset, see encode; say how many rows are kept, cut and dropped."""
    one = partial(encode, tokenizer=tokenizer, frame=frame, max_length=max_length)
    rows = datasets.Dataset.from_list(records)
    rows = rows.map(one, remove_columns=rows.column_names, new_fingerprint="encoded")
    lengths = rows.select_columns("length").to_pandas()["length"]
    kept = [i for i, count in enumerate(rows["answer_tokens"]) if count]
    cut, dropped = sum(lengths > max_length), len(rows) - len(kept)
    say(f"data        {len(kept):,} rows <- {path}; {cut:,} cut, {dropped:,} dropped, all prompt")
    sizes = "            tokens: median {50%:.0f}, p95 {95%:.0f}, max {max:.0f}"
    say(sizes.format(**lengths.describe([0.5, 0.95])) + " (--max-seq-length that cuts none)")
    if not kept:
        sys.exit(f"error: {path}: no answer within {max_length} tokens; raise --max-seq-length")
    return rows.select(kept)


def load_base(name, device, precision, load_in_4bit):
    """Load a causal language model, its linear layers in doubly quantised NF4 if asked."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **nf4)
    options = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True}
    options |= {"trust_remote_code": False, "output_loading_info": True}
    options |= {"quantization_config": nf4} if load_in_4bit else {}
    with explained(f"can't load the model {name}", MODEL_ADVICE):
        model, info = AutoModelForCausalLM.from_pretrained(name, **options)
        if info["missing_keys"]:
            raise ValueError(f"it lacks weights, such as {sorted(info['missing_keys'])[0]}")
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # sdpa leaves the cap out, in transformers < 5.22
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


def put_adapter(base, tokenizer, rows, args):
    """Put a fresh LoRA adapter, in float32, on a base that fits rows and options; it stays frozen."""
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if context and args.max_seq_length > context:
        sys.exit(f"error: --max-seq-length is too large; this model reads {context} tokens")
    size = len(base.get_input_embeddings().weight)
    if len(tokenizer) > size and max(map(max, rows["input_ids"])) >= size:
        sys.exit(f"error: {args.model} lacks tokens of its tokenizer; take the one it came with")
    kinds, head = (torch.nn.Linear, Conv1D), base.get_output_embeddings()
    linear = [name for name, m in base.named_modules() if isinstance(m, kinds) and m is not head]
    layers = {name.rpartition(".")[2] for name in linear}
    if lacking := sorted(set(args.target_modules) - layers):
        names = f"no such layer; this model has {', '.join(sorted(layers))}"
        sys.exit(f"error: --target-modules {', '.join(lacking)}: {names}")
    torch.manual_seed(args.seed)
    lora = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    lora = peft.LoraConfig(target_modules=args.target_modules, task_type="CAUSAL_LM", **lora)
    if args.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    with explained("--target-modules", "choose other layers"):
        model = peft.get_peft_model(base, lora).train()
    say(f"model       {args.model}, {memory_mib():,} MiB")
    say(f"adapter     {model.get_nb_trainable_parameters()[0]:,} parameters are trained")
    return model


def show_example(row, tokenizer):
    """Print one row as the model sees it, apart what it reads and what it learns to write."""
    read = len(row["input_ids"]) - row["answer_tokens"]
    for title, part in ("reads", slice(read)), ("learns to write", slice(read, None)):
        text = textwrap.shorten(tokenizer.decode(row["input_ids"][part]), 400)
        for line in [f"the model {title}:", *textwrap.wrap(text, 76)]:
            say(line)


def response_nll(model, head, pad_id, rows):
    """Negative log-likelihood in nats of each response token of the rows, (tokens,), in their order.

    All logits, (rows, length, vocabulary), would be the largest tensor of a step. So the head runs
    only where a label counts, 16 million logits at a time, and again in the backward pass; without
    a head (see find_head) the model computes all. Causal attention never looks at right padding.
    """
    weight = model.get_input_embeddings().weight
    input_ids, labels = (
        pad_sequence([torch.tensor(row[key]) for row in rows], True, padding).to(weight.device)
        for key, padding in (("input_ids", pad_id), ("labels", -100))
    )
    counts, targets = labels[:, 1:] != -100, labels[:, 1:]  # position i predicts token i + 1

    def part_nll(states, targets):
        logp = F.log_softmax(head(states) if head else states, dim=-1, dtype=torch.float32)
        return F.nll_loss(logp, targets, reduction="none")

    with torch.autocast(weight.device.type, weight.dtype, weight.dtype != torch.float32):
        outputs = (model.base_model if head else model)(input_ids=input_ids, use_cache=False)
        states, size = outputs[0][:, :-1][counts], 2**24 // len(weight)
        parts = zip(states.split(size), targets[counts].split(size))
        return torch.cat([checkpoint(part_nll, *part, use_reentrant=False) for part in parts])


def rows_of_step(step, lengths, rows_per_step, seed, grouped):
    """Indices of the rows of a step, longest first: a pure function, so resuming needs no state."""
    steps = math.ceil(len(lengths) / rows_per_step)
    epoch, position = divmod(step, steps)
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(len(lengths), generator=generator)
    if grouped:  # of 50 steps each, so that epochs differ; the steps are shuffled
        pools = order.split(50 * rows_per_step)
        order = torch.cat([pool[lengths[pool].argsort(descending=True)] for pool in pools])
        position = torch.randperm(steps, generator=generator)[position]
    rows = order.tensor_split(steps)[position]  # evenly: no step of a few rows at the end
    return rows[lengths[rows].argsort(descending=True, stable=True)].tolist()


def micro_batches(rows, room):
    """Cut rows, longest first, into lists that with their padding take at most `room` tokens."""
    while rows:
        size = max(1, room // len(rows[0]["input_ids"]))
        yield rows[:size]
        rows = rows[size:]


def add_gradients(nll_of, rows, room, seed, scaler, optimizer):
    """Run this process' share of a step forward and backward; returns it of the loss, and `room`."""
    tokens, loss = sum(row["answer_tokens"] for row in rows), 0.0
    torch.manual_seed(seed)  # of dropout, so that --resume and a second try repeat it
    try:
        for part in micro_batches(rows[RANK::WORLD_SIZE], room):
            nll = nll_of(part).sum() / tokens
            scaler.scale(nll).backward()
            loss += nll.detach()
        return float(loss), room
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    if room <= len(rows[0]["input_ids"]):
        advice = "--gradient-checkpointing, a smaller --max-seq-length, --load-in-4bit, --model"
        sys.exit(f"error: out of memory with one row at once; in this order: {advice}")
    say(f"out of memory: going on with {room // 2:,} tokens at once, the same rows a step")
    optimizer.zero_grad(set_to_none=False)
    clear_device_cache(garbage_collection=True)
    return add_gradients(nll_of, rows, room // 2, seed, scaler, optimizer)


def add_up(figures, weights=()):
    """Sum numbers, then gradients, over all processes; ends this one where another has ended."""
    if WORLD_SIZE == 1:
        return figures
    total = torch.tensor(figures, dtype=torch.float64)
    try:
        torch.distributed.all_reduce(total)  # on the CPU: it sees at once that a process is gone
    except RuntimeError:
        sys.exit(1)  # the other one has said why
    for weight in weights:  # LoRA's are a few MB: no wrapper around the model
        torch.distributed.all_reduce(weight.grad)
    return total.tolist()


def learning_rate(step, total, warmup_ratio, peak):
    """Linear warmup, then half a cosine down to 0."""
    warmup = min(round(warmup_ratio * total), total - 1)
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def validate(model, nll_of, rows, room):
    """The validation loss: nats over all response tokens by their number."""
    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))[RANK::WORLD_SIZE]
    parts, nats = list(micro_batches(ordered, room)), 0.0
    model.eval()
    with torch.no_grad():
        for part in tqdm(parts, "validation", disable=HIDE_BARS, leave=False, delay=1):
            nats += nll_of(part).double().sum().item()
    model.train()
    nats, tokens = add_up([nats, sum(row["answer_tokens"] for row in ordered)])
    loss = nats / tokens
    say(f"validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.3f}")
    return loss if math.isfinite(loss) else sys.exit(NOT_FINITE)


def save_checkpoint(path, state, model, optimizer, scaler):
    """Write all that a resumed run needs, whole or not at all."""
    state |= {"adapter": peft.get_peft_model_state_dict(model)}
    state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    with explained(f"can't write to {path}", OUTPUT_ADVICE):
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)


def read_checkpoint(path, run):
    """The state of the stopped run to go on with, {} to start at step 1; refuses another run's."""
    if not path.exists():
        say(f"resume      no {path} to go on from: starting at step 1")
        return {}
    with explained(f"{path} is damaged", "--overwrite starts anew"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        changed = [name for name in run if state["run"].get(name) != run[name]]
    if changed:
        names = f"{' and '.join(changed)} changed; change back, or --overwrite"
        sys.exit(f"error: --resume: not the run of {path}, {names}")
    return state


def train(args, run, model, nll_of, rows, val_rows, folder, state):
    """The training loop, each part of a step in the order it happens; returns the log, and the steps done."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    scaler = torch.amp.GradScaler(enabled=run["precision"] == "fp16")
    for weight in weights:
        weight.grad = torch.zeros_like(weight)  # a process may have no row in a step
    first, log, losses = state.get("step", 0), state.get("log", []), state.get("losses", [])
    if state:
        peft.set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    total, rows_per_step, epoch_steps = run["steps"], run["rows_per_step"], run["epoch_steps"]
    lengths = torch.tensor(rows["length"]).clamp(max=args.max_seq_length)
    at_once = rows_per_step // WORLD_SIZE if args.auto_batch_size else args.batch_size
    room = at_once * lengths.max().item()  # tokens of a micro-batch
    done, seen, clock, began, asked = first, 0, time.monotonic(), time.monotonic(), []
    with contextlib.ExitStack() as undo:
        for signum in (signal.SIGINT, signal.SIGTERM):  # heeded when the step is done
            before = signal.signal(signum, lambda *signum: asked.append(signum))
            undo.callback(signal.signal, signum, before)
        path = folder / LOG if RANK == 0 else os.devnull
        file = undo.enter_context(open(path, "w", buffering=1, encoding="utf-8"))
        file.writelines(json.dumps(entry) + "\n" for entry in log)
        for step in trange(first, total, leave=False, disable=HIDE_BARS):
            chosen = rows_of_step(step, lengths, rows_per_step, args.seed, args.group_by_length)
            batch, seed = [rows[i] for i in chosen], args.seed + step * WORLD_SIZE + RANK
            loss, room = add_gradients(nll_of, batch, room, seed, scaler, optimizer)
            loss, stopping = add_up([loss, len(asked)], weights)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM).item()
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                sys.exit(NOT_FINITE)  # of the norm: in fp16 the scaler leaves such a step out
            lr = learning_rate(step, total, args.warmup_ratio, args.learning_rate)
            optimizer.param_groups[0]["lr"] = lr
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=False)
            done, losses, seen = step + 1, [*losses, loss], seen + lengths[chosen].sum().item()
            ends, at = done == total, {"step": done, "epoch": round(done / epoch_steps, 4)}
            new = []
            if ends or done % args.logging_steps == 0:
                now, mean = time.monotonic(), sum(losses) / len(losses)
                left = tqdm.format_interval((now - began) / (done - first) * (total - done))
                entry = {"loss": mean, "learning_rate": lr, "grad_norm": norm}
                entry |= {"tokens_per_second": seen // (now - clock), "memory_mib": memory_mib()}
                say(LINE.format(**at | entry, left=left))
                new += [at | entry | {"grad_norm": norm if math.isfinite(norm) else None}]
                losses, seen, clock = [], 0, now
            if val_rows and (ends or done % epoch_steps == 0):
                new += [at | {"eval_loss": validate(model, nll_of, val_rows, room)}]
                clock = time.monotonic()
            log += new
            file.writelines(json.dumps(entry) + "\n" for entry in new)
            if RANK == 0 and (ends or stopping or done % math.ceil(total / 10) == 0):
                state = {"run": run, "step": done, "log": log, "losses": losses}
                save_checkpoint(folder / CHECKPOINT, state, model, optimizer, scaler)
            if stopping:
                break
    return log, done


def save_adapter(model, tokenizer, folder):
    """Write adapter and tokenizer, and read the adapter back: is all there, finite and trained?"""
    if hasattr(tokenizer, "legacy"):  # transformers forgets it; blanks would then be split anew
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    with explained(f"can't write to {folder}", OUTPUT_ADVICE):
        model.save_pretrained(folder, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a model card without content
    saved = load_file(folder / ADAPTER)
    whole = saved.keys() == peft.get_peft_model_state_dict(model).keys()
    finite = all(weight.isfinite().all() for weight in saved.values())
    trained = any(weight.any() for name, weight in saved.items() if "lora_B" in name)
    if not (whole and finite and trained):
        sys.exit(f"error: the adapter read back from {folder} is broken or untrained")
    size = sum(weight.nbytes for weight in saved.values())
    say(f"saved       adapter of {len(saved)} tensors, {size / 1e6:.1f} MB -> {folder}")


def plan(args, precision, rows, source):
    """What makes this run what it is, checked on --resume: options, steps, the data's SHA-256."""
    run = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    run |= {"precision": precision, "dataset": hashlib.sha256(source.read_bytes()).hexdigest()}
    run["rows_per_step"] = args.batch_size * args.gradient_accumulation_steps * WORLD_SIZE
    run["epoch_steps"] = math.ceil(rows / run["rows_per_step"])
    run["steps"] = math.ceil(args.epochs * run["epoch_steps"])
    run |= {"steps": args.max_steps} if args.max_steps > 0 else {}
    form = "training    {steps:,} steps of up to {rows_per_step} rows, {epoch_steps:,} an epoch"
    say(form.format(**run))
    return run


def write_config(folder, args, run, base, source, rows, result):
    """Write training_config.json: what was asked, what it was done with, and what came of it."""
    packages = "torch transformers peft accelerate bitsandbytes datasets".split()
    config = {"arguments": vars(args) | {"precision": run["precision"]}, "result": result}
    config["data"] = {"path": str(source), "sha256": run["dataset"], "rows": rows}
    config["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    config["versions"] = {package: version(package) for package in packages}
    weight = base.get_input_embeddings().weight[::100]  # tells one base from another of its shape
    config["embedding_norm"] = weight.double().norm().item()
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "training_config.json").write_text(text + "\n", encoding="utf-8")


def summarize(log):
    """The last of each figure of the run; says where the validation loss was lower before."""
    result = {}
    for entry in log:
        result |= entry
    measured = [(entry["eval_loss"], entry["epoch"]) for entry in log if "eval_loss" in entry]
    if measured and min(measured)[0] < result["eval_loss"]:
        where = "lowest after epoch {1:g}: {0:.3f}; try fewer --epochs".format(*min(measured))
        say(f"validation  {where}")
    return result


def main(argv=None):
    args = parse_args(argv)
    clear_device_cache(garbage_collection=True)  # in a notebook: what an earlier cell has left
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries
    if HIDE_BARS:
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()

    source, val_source = find_data(args)
    records, val_records = read_jsonl(source), val_source and read_jsonl(val_source)
    folder, limit = Path(args.output), args.max_seq_length
    with claimed(folder, args):
        device, precision = choose_device(args)
        if WORLD_SIZE > 1:
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            torch.distributed.init_process_group(backend)
        with explained(f"can't load the model {args.model}", MODEL_ADVICE):
            tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        frame = chat_frame(tokenizer)
        rows = encode_rows(records, tokenizer, frame, limit, source)
        val_rows = val_records and encode_rows(val_records, tokenizer, frame, limit, val_source)
        run = plan(args, precision, len(rows), source)
        state = read_checkpoint(folder / CHECKPOINT, run) if args.resume else {}

        base = load_base(args.model, device, precision, args.load_in_4bit)
        nll_of = partial(response_nll, base, find_head(base), tokenizer.eos_token_id or 0)
        model = put_adapter(base, tokenizer, rows, args)
        show_example(rows[0], tokenizer)

        config = partial(write_config, folder, args, run, base, source, len(rows))
        if RANK == 0:
            (folder / ADAPTER).unlink(missing_ok=True)  # that of an overwritten run
            config(result=None)
        say("  step   epoch     loss        lr  grad norm   tokens/s    MiB  time left")
        log, done = train(args, run, model, nll_of, rows, val_rows, folder, state)
        if WORLD_SIZE > 1:
            torch.distributed.destroy_process_group()
        if done < run["steps"]:
            end = f"stopped after step {done} of {run['steps']}; --resume goes on with it"
            sys.exit(end if RANK == 0 else 1)
        result = summarize(log)
        if RANK == 0:
            save_adapter(model, tokenizer, folder)
            config(result=result)
            (folder / CHECKPOINT).unlink()
    say(f"next: python evaluate.py --adapter {folder} --val-data {val_source or 'FILE.jsonl'}")
    return result


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing new was saved, a checkpoint written before stands")
    except SystemExit:
        if RANK > 0:  # the launcher ends all when one has ended: the first process speaks first
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        raise
