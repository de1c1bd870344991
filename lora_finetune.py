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
import gc
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import warnings
from datetime import timedelta
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

# on import it asks CPU users for a package that none needs
logging.getLogger("bitsandbytes").setLevel("ERROR")

import datasets
import peft
import psutil
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler

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
AUTO_BATCH_SIZE = False  # largest micro-batch that fits, same rows a step
COMPILE = False  # fuse kernels: half a minute or more at the start, for long runs on a GPU
SEED = 42
# output
OUTPUT = "output/tinyllama-k8s-qlora"  # folder
LOGGING_STEPS = 1  # steps between log lines
RESUME = False  # go on from the newest whole checkpoint
OVERWRITE = False  # replace what an earlier run left in OUTPUT
# ---------------------------------------------------------------------------------------------

DECISIVE = """max_seq_length model load_in_4bit lora_r lora_alpha lora_dropout target_modules epochs
max_steps learning_rate warmup_ratio batch_size gradient_accumulation_steps seed""".split()
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm
OUT_OF_MEMORY = (
    "error: out of memory at {} rows at once; in this order: a smaller --batch-size, "
    "--gradient-checkpointing, a smaller --max-seq-length, --load-in-4bit, a smaller --lora-r or "
    "fewer --target-modules, a smaller --model"
)
PID = "running.pid"  # number of the process that writes to the output folder
SEAL = "seal.json"  # written last into a checkpoint: its run and the SHA-256 of its files
ALPACA_TEMPLATE = (  # for tokenizers that come without a chat template
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "### Instruction:\n{{ message['content'] }}\n\n### Response:\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
RANK = int(os.environ.get("RANK", 0))  # of this process, set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
HIDE_BARS = RANK > 0 or not (sys.stderr.isatty() or "ipykernel" in sys.modules)


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
    parser = argparse.ArgumentParser("lora_finetune.py", allow_abbrev=False, **shown)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default=DATASET, help="JSONL file, or a folder with train.jsonl and val.jsonl")
    add("--val-data", default=VAL_DATA, help="JSONL that is measured after each epoch")
    add("--max-seq-length", type=number(int, 8), default=MAX_SEQ_LENGTH, help="tokens of a row")
    add = parser.add_argument_group("model").add_argument
    add("--model", default=MODEL, help="Hugging Face name or local folder")
    add("--load-in-4bit", action=switch, default=LOAD_IN_4BIT, help="NF4 weights")
    add("--precision", choices=["fp16", "bf16", "fp32"], default=PRECISION, help="of computation")
    add = parser.add_argument_group("lora").add_argument
    add("--lora-r", type=number(int, 1, 1024), default=LORA_R, help="rank")
    add("--lora-alpha", type=number(float, 1e-3, 1e5), default=LORA_ALPHA, help="scale x rank")
    add("--lora-dropout", type=number(float, 0, 0.99), default=LORA_DROPOUT, help="share dropped")
    add("--target-modules", nargs="+", default=TARGET_MODULES, help="linear layers to adapt")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(float, 0.01, 1e4), default=EPOCHS, help="passes over the data")
    add("--max-steps", type=number(int, -1), default=MAX_STEPS, help="instead of epochs; -1: off")
    add("--learning-rate", type=number(float, 1e-9, 1), default=LEARNING_RATE, help="at its peak")
    add("--warmup-ratio", type=number(float, 0, 1), default=WARMUP_RATIO, help="share of the steps")
    count, times = number(int, 1, 4096), GRADIENT_ACCUMULATION_STEPS
    add("--batch-size", type=count, default=BATCH_SIZE, help="longest rows at once")
    add("--gradient-accumulation-steps", type=count, default=times, help="times that is a step")
    add("--gradient-checkpointing", action=switch, default=GRADIENT_CHECKPOINTING, help="less VRAM")
    add("--auto-batch-size", action=switch, default=AUTO_BATCH_SIZE, help="largest that fits")
    add("--compile", action=switch, default=COMPILE, help="fuse kernels, for long runs on a GPU")
    add("--seed", type=number(int, 0, 2**32 - 1), default=SEED, help="same seed, same run")
    add = parser.add_argument_group("output").add_argument
    add("--output", default=OUTPUT, help="folder")
    add("--logging-steps", type=number(int, 1), default=LOGGING_STEPS, help="steps a log line")
    add("--resume", action=switch, default=RESUME, help="go on from the newest whole checkpoint")
    add("--overwrite", action=switch, default=OVERWRITE, help="replace an earlier run")
    args = parser.parse_args(argv)
    if args.max_steps == 0:
        parser.error("argument --max-steps: must be -1 (off) or at least 1")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite drops it; choose one")
    return args


def say(line=""):
    """Print a line, of the first process alone; what a terminal can't show or would obey as "?"."""
    if RANK == 0:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        shown = "".join(letter if letter.isprintable() else "?" for letter in line)
        tqdm.write(shown.encode(encoding, "replace").decode(encoding))


def stop(message):
    """End with one line on stderr; of many processes, the first speaks for all."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # the launcher ends all when one has ended: the first must have spoken
        sys.exit(1)
    sys.exit(f"error: {message}")


def find_data(args):
    """The training and the validation file (or None) that --dataset and --val-data name."""
    source, val_source = Path(args.dataset), args.val_data
    if source.is_dir():
        held_out, source = source / "val.jsonl", source / "train.jsonl"
        if held_out.is_file() and held_out.stat().st_size:
            val_source = val_source or held_out
    return source, val_source


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


def check_output(args):
    """The output folder; refuses one that can't be written or holds a run that no flag gives up."""
    folder = Path(args.output)
    unfinished = any(folder.glob("checkpoint-*"))
    finished = (folder / "adapter_model.safetensors").exists() and not unfinished
    if finished and not args.overwrite:
        stop(f"{folder} holds a finished run; choose another --output, or --overwrite it")
    if unfinished and not (args.resume or args.overwrite):
        stop(f"{folder} holds an unfinished run; --resume goes on with it, --overwrite drops it")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        stop(f"can't write to {nearest}; choose another --output")
    return folder


def memory_mib():
    """Peak memory in MiB of this process on the GPU, or on a CPU what it holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return psutil.Process().memory_info().rss >> 20


def choose_device(args):
    """Return the device of this process and the precision it computes in, and say which."""
    if not torch.cuda.is_available():
        hint = ""
        if shutil.which("nvidia-smi"):
            hint = ": its driver is too old for this torch"
            if not torch.version.cuda:
                hint = ": this torch is for CPUs only"
            hint += ", see Troubleshooting in README.md"
        say(f"device      no GPU{hint}; training on {torch.get_num_threads()} CPU threads in fp32")
        return "cpu", "fp32"
    device = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(device)
    torch.cuda.reset_peak_memory_stats()
    name = torch.cuda.get_device_name(device)
    if args.precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        stop(f"--precision bf16: {name} only emulates it, slowly; use fp16")
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    say(f"device      {name}, {free:.1f} of {total:.1f} GiB free; computing in {args.precision}")
    return device, args.precision


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


def encode_rows(records, tokenizer, frame, max_length, path):
    """Encode records into a Dataset of input_ids and labels; say how many are kept and cut."""
    rows = datasets.Dataset.from_list(records).map(
        lambda record: encode(record, tokenizer, frame, max_length),
        remove_columns=list(records[0]),
        new_fingerprint="encoded",
    )
    lengths = sorted(rows["length"])
    kept = [i for i, labels in enumerate(rows["labels"]) if labels[-1] != -100]
    cut, dropped = sum(length > max_length for length in lengths), len(rows) - len(kept)
    median, p95 = lengths[len(lengths) // 2], lengths[len(lengths) * 95 // 100]
    shares = f"{cut:,} cut, {dropped:,} dropped (no answer left)"
    say(f"data        {len(kept):,} rows <- {path}; {shares}")
    sizes = f"median {median:,}, p95 {p95:,}, max {lengths[-1]:,}"
    say(f"            tokens: {sizes} (--max-seq-length that cuts none)")
    if not kept:
        stop(f"{path}: no answer begins within {max_length} tokens; raise --max-seq-length")
    return rows.select(kept).remove_columns("length")


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


def put_adapter(base, args):
    """Put a fresh LoRA adapter on a base, in float32; the base stays frozen."""
    linear = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in args.target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            stop(f"--target-modules {target}: no such layer; this model has {names}")
    transformers.set_seed(args.seed)
    lora = peft.LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.target_modules,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, lora)


def run_layer(layer, *inputs, **kwargs):
    """A decoder layer as its class computes it."""
    return type(layer).forward(layer, *inputs, **kwargs)


def checkpoint_layer(layer, *inputs, **kwargs):
    """Run a decoder layer that keeps only its input, in host memory; the backward pass reruns it.

    Compiled, the input stays on the GPU, and what the two runs share is computed once.
    """
    run = partial(checkpoint, run_layer, layer, *inputs, use_reentrant=False, **kwargs)
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return run()
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return run()


def adapted_linear(module, x):
    """W x + alpha / r B A dropout(x) (Hu et al. 2021), the sum within the last matrix product."""
    low_rank = module.lora_A["default"](module.lora_dropout["default"](x))
    up, scale = module.lora_B["default"].weight, module.scaling["default"]
    y = module.base_layer(x)
    return torch.addmm(y.flatten(0, -2), low_rank.flatten(0, -2), up.t(), alpha=scale).view_as(y)


def lean_norm(module, x):
    """The RMSNorm of Llama and kin: one kernel for eight."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def frozen_linear(module, x):
    """W x; taking W out of NF4 is an operation that a graph of both passes does once for both."""
    return F.linear(x, dequantize_4bit(module.weight, module.weight.quant_state), module.bias)


@cache
def with_forward(module_class, forward):
    """A subclass that computes by `forward`; one for all layers, so they share a compiled graph."""
    return type(module_class.__name__, (module_class,), {"forward": forward})


def make_lean(model, checkpointing, compiled):
    """Swap what the layers compute with for forms that take less memory and time; same results."""
    layer_pass = checkpoint_layer if checkpointing else run_layer
    if compiled:
        layer_pass = torch.compile(layer_pass, dynamic=True)
        # graphs differ by training, one row or more, first layer or later, lengths of 8n or not
        torch._dynamo.config.recompile_limit = 32
        torch._inductor.config.fallback_random = True  # its own dropout can't be recomputed
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.__class__ = with_forward(type(module), adapted_linear)
        elif hasattr(module, "variance_epsilon"):
            module.__class__ = with_forward(type(module), lean_norm)
        elif isinstance(module, GradientCheckpointingLayer):
            module.forward = partial(layer_pass, module)
        elif isinstance(module, Linear4bit) and compiled:
            module.__class__ = with_forward(type(module), frozen_linear)


def show_example(row, tokenizer):
    """Print one row as the model sees it, apart what it reads and what it learns to write."""
    written = [id for id in row["labels"] if id != -100]
    for title, ids in ("reads", row["input_ids"][: -len(written)]), ("learns to write", written):
        say(f"the model {title}:")
        for line in textwrap.wrap(textwrap.shorten(tokenizer.decode(ids), 400), 76):
            say("    " + line)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_whole(path, text):
    """Write a text file whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def find_checkpoint(folder, run):
    """The newest checkpoint in folder that is whole, or None; refuses one of another run."""
    step = {path: int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")}
    for path in sorted(step, key=step.get, reverse=True):
        try:
            seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
            if any(sha256(path / name) != digest for name, digest in seal["files"].items()):
                continue
        except (OSError, ValueError):
            continue  # cut short while it was written
        changed = [key for key, value in run.items() if seal["run"].get(key) != value]
        if changed:
            names = " and ".join(changed)
            stop(f"--resume: not the run of {path}, {names} changed; change back, or --overwrite")
        return path
    return None


def claim(folder):
    """Mark the output folder as this process's; refuses one that a living process writes to."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / PID
    with contextlib.suppress(FileNotFoundError, ValueError, psutil.Error):
        owner = psutil.Process(int(mark.read_text()))
        lives = owner.status() != psutil.STATUS_ZOMBIE and owner.pid != os.getpid()
        if lives and owner.create_time() < mark.stat().st_mtime:  # else its number was given anew
            stop(f"process {owner.pid} is writing to {folder}; end it or choose another --output")
    write_whole(mark, str(os.getpid()))


def clear(folder, whole):
    """Remove what earlier runs gave up or a kill cut short, but the checkpoint to go on from."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".saving-*")]:
        if path != whole:
            shutil.rmtree(path)
    for path in [*folder.glob("adapter_model.safetensors"), *folder.glob(".training_*")]:
        path.unlink()


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


class ResponseTrainer(transformers.Trainer):
    """Trainer whose loss counts the response tokens only, each alike over the whole optimizer step.

    A batch is all rows of a step. It is worked off in micro-batches of `room` tokens: the room that
    --batch-size of the longest rows take, so short rows go more at once, in fewer passes.
    """

    head = at_once = room = None  # at_once: how many of the longest rows
    tokens = 0  # real ones seen, by all processes

    def _get_train_sampler(self, train_dataset=None):
        """Rows of like length in a step, in the same order however many processes share it."""
        rows = self.args.train_batch_size * WORLD_SIZE
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        self.room = self.at_once * max(lengths)
        whole = {"num_replicas": 1, "rank": 0, "seed": self.args.seed}
        return DistributedLengthGroupedSampler(rows, lengths=lengths, **whole)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Add up the micro-batches' gradients; out of memory, begin again with half the room."""
        torch.manual_seed(self.args.seed + self.state.global_step * WORLD_SIZE + RANK)  # of dropout
        loss, lengths = 0.0, inputs["lengths"]
        try:
            for part in micro_batches(lengths, self.room):
                corner = part, slice(lengths[part.start])
                rows = {key: inputs[key][corner] for key in ("input_ids", "labels")}
                last = part.stop >= len(lengths)
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    loss += super().training_step(model, rows, num_items_in_batch)
            self.tokens += sum(lengths) * WORLD_SIZE
            return loss
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        if len(rows["input_ids"]) == 1 or WORLD_SIZE > 1:
            sys.exit(OUT_OF_MEMORY.format(len(rows["input_ids"])))
        self.room = rows["input_ids"].numel() // 2
        say(f"out of memory: going on with {self.room:,} tokens at once, the same rows a step")
        model.zero_grad()
        clear_device_cache(garbage_collection=True)
        return self.training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean NLL over the response tokens of the whole step (a sum that Trainer adds up).

        All logits, (rows, length, vocabulary), would be the largest tensor of the step. So head and
        softmax run only where a label counts, 256 tokens at a time; each part's gradient is taken
        on the spot: `pull` carries it into the backward pass without changing the value.
        """
        hidden = model(input_ids=inputs["input_ids"], use_cache=False).logits
        states, targets = counted(hidden, inputs["labels"])
        total, gradients = 0.0, []
        for part, target in zip(states.detach().split(256), targets.split(256)):
            nll = token_nll(self.head, part.requires_grad_(), target).sum()
            gradients.append(torch.autograd.grad(nll * 1024, part)[0] / 1024)  # or fp16 underflows
            total += nll.detach()
        pull = (states * torch.cat(gradients)).sum()
        scale = WORLD_SIZE / num_items_in_batch  # processes are averaged, so times their number
        return (total + (pull - pull.detach())) * scale

    def evaluate(self, *args, **kwargs):
        """Log and return the validation loss: nats over all response tokens by their number."""
        rows = sorted(self.eval_dataset, key=lambda row: -len(row["input_ids"]))[RANK::WORLD_SIZE]
        parts = list(micro_batches([len(row["input_ids"]) for row in rows], self.room))
        total = torch.zeros(2, device=self.args.device)
        self.model.eval()
        with torch.no_grad():
            for part in tqdm(parts, "validation", disable=HIDE_BARS, leave=False, delay=2):
                batch = self._prepare_inputs(self.data_collator(rows[part]))
                hidden = self.model(input_ids=batch["input_ids"], use_cache=False).logits
                states, targets = counted(hidden, batch["labels"])
                total[0] += token_nll(self.head, states, targets).sum()
                total[1] += len(targets)
        nats, tokens = self.accelerator.reduce(total, "sum").tolist()
        self.log({"eval_loss": nats / tokens})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        return {"eval_loss": nats / tokens}


class TrainingLog(transformers.TrainerCallback):
    """What happens beside the steps: log lines, checks for NaN, sealed checkpoints, a stop."""

    def __init__(self, trainer, run, steps_per_epoch):
        self.trainer, self.run, self.steps_per_epoch = trainer, run, steps_per_epoch
        self.path = Path(trainer.args.output_dir) / "training_log.jsonl"
        self.stopping = False

    def ask_to_stop(self, signum, frame):
        self.stopping = True
        signal.signal(signum, signal.default_int_handler)  # a second Ctrl-C stops at once

    def on_train_begin(self, args, state, control, **kwargs):
        state.logging_steps = args.logging_steps  # else a checkpoint's would hold
        self.first, self.began = state.global_step, time.monotonic()
        self.clock, self.trainer.tokens = self.began, 0
        bounds = {"total": state.max_steps, "initial": self.first}
        self.bar = tqdm(**bounds, unit="step", disable=HIDE_BARS, leave=False)
        if RANK == 0:  # of an earlier run, keep what the checkpoint goes on from
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.first else []
            whole = [json.loads(line) for line in lines if line.endswith("}")]
            kept = [json.dumps(entry) + "\n" for entry in whole if entry["step"] <= self.first]
            write_whole(self.path, "".join(kept))
        say("  step   epoch     loss        lr  grad norm   tokens/s    MiB  time left")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        if self.trainer.eval_dataset is not None:
            # evaluated before the checkpoint of this step is written, so that a restart loses none
            epoch_ends = state.global_step % self.steps_per_epoch == 0
            control.should_evaluate = epoch_ends or state.global_step == state.max_steps
        if self.stopping:
            self.trainer.accelerator.set_trigger()
        if self.trainer.accelerator.check_trigger():  # any process was asked to stop
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        entry = {"step": state.global_step, "epoch": round(state.epoch, 4)}
        if "eval_loss" in logs:
            entry["eval_loss"] = loss = logs["eval_loss"]
            line = f"validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.3f}"
        elif "loss" in logs:
            now, done = time.monotonic(), state.global_step - self.first
            loss, rate, norm = (logs.get(key) for key in ("loss", "learning_rate", "grad_norm"))
            speed = self.trainer.tokens / (now - self.clock)
            left = (now - self.began) / done * (state.max_steps - state.global_step)
            left = str(timedelta(seconds=round(left)))
            entry |= {"loss": loss, "learning_rate": rate, "grad_norm": norm}
            entry |= {"tokens_per_second": round(speed, 1), "memory_mib": memory_mib()}
            line = f"{state.global_step:>6} {state.epoch:>7.2f} {loss:>8.4f} {rate:>9.2e}"
            line += f" {norm:>10.3f} {speed:>10,.0f} {entry['memory_mib']:>6,} {left:>10}"
        else:
            return
        say(line)
        if RANK == 0:
            finite = {key: value if math.isfinite(value) else None for key, value in entry.items()}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
        self.check_finite(loss)
        self.clock, self.trainer.tokens = time.monotonic(), 0

    def check_finite(self, loss=0.0):
        weights = [weight for weight in self.trainer.model.parameters() if weight.requires_grad]
        if not (math.isfinite(loss) and torch.nn.utils.get_total_norm(weights).isfinite()):
            causes = "lower --learning-rate, try --precision bf16 or fp32, look for odd rows"
            stop(f"loss or weights are no longer finite; {causes}. Earlier checkpoints stand")

    def on_save(self, args, state, control, **kwargs):
        self.check_finite()
        self.trainer.accelerator.wait_for_everyone()
        if RANK == 0:
            folder = self.path.parent / f"checkpoint-{state.global_step}"
            files = {path.name: sha256(path) for path in folder.iterdir() if path.name != SEAL}
            write_whole(folder / SEAL, json.dumps({"run": self.run, "files": files}))

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def make_trainer(args, precision, model, head, rows, val_rows, tokenizer, total):
    """The Trainer of a run of `total` steps; a batch is all rows of this process in a step."""
    pad_id = tokenizer.pad_token_id
    rows_per_step = args.batch_size * args.gradient_accumulation_steps
    # rows without a label make all steps whole, however many processes share them
    missing = -len(rows) % (rows_per_step * WORLD_SIZE)
    blanks = {"input_ids": [[pad_id]] * missing, "labels": [[-100]] * missing}
    blanks = datasets.Dataset.from_dict(blanks, features=rows.features)
    settings = transformers.TrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=rows_per_step,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(round(args.warmup_ratio * total), total - 1),  # the first at rate 0
        max_grad_norm=MAX_GRAD_NORM,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        save_steps=math.ceil(total / 10),
        save_total_limit=2,
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,  # it would show 0.0 for NaN
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        seed=args.seed,
    )
    settings._n_gpu = min(settings.n_gpu, 1)  # one process uses one GPU, whatever else is there
    trainer = ResponseTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.concatenate_datasets([rows, blanks]),
        eval_dataset=val_rows,
        data_collator=partial(collate, pad_id=pad_id),
    )
    trainer.head, trainer.model_accepts_loss_kwargs = head, True
    trainer.at_once = rows_per_step if args.auto_batch_size else args.batch_size
    return trainer


def train(trainer, log, checkpoint):
    """Train, from a checkpoint if given one; Ctrl-C and SIGTERM save first. Returns the state."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(log)
    signals = signal.SIGINT, signal.SIGTERM
    handlers = {signum: signal.signal(signum, log.ask_to_stop) for signum in signals}
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return trainer.state


def save_adapter(model, tokenizer, folder):
    """Write adapter and tokenizer into folder, after the adapter was read back and found right."""
    expected = peft.get_peft_model_state_dict(model)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
        model.save_pretrained(aside, save_embedding_layers=False)
        if hasattr(tokenizer, "legacy"):  # transformers forgets it; blanks would then be split anew
            tokenizer.init_kwargs["legacy"] = tokenizer.legacy
        tokenizer.save_pretrained(aside)
        saved = load_file(Path(aside, "adapter_model.safetensors"))
        finite = all(weight.isfinite().all() for weight in saved.values())
        trained = any(weight.any() for name, weight in saved.items() if "lora_B" in name)
        if saved.keys() != expected.keys() or not finite or not trained:
            stop(f"the adapter read back from {folder} is broken or untrained; nothing was saved")
        for path in sorted(Path(aside).iterdir()):
            if path.name != "README.md":  # a model card without content
                os.replace(path, folder / path.name)
    size = sum(weight.nbytes for weight in saved.values())
    print(f"saved       adapter of {len(saved)} tensors, {size / 1e6:.1f} MB -> {folder}")


def write_config(args, precision, run, model, rows, source, result):
    """Write training_config.json: what was asked, what it was done with, and what came of it."""
    packages = "torch transformers peft accelerate bitsandbytes datasets".split()
    config = {
        "arguments": vars(args) | {"precision": precision},
        "base_fingerprint": fingerprint(model),
        "data": {"path": str(source), "sha256": run["dataset"], "rows": rows},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in packages},
        "result": result,
    }
    config = json.dumps(config, indent=2, ensure_ascii=False)
    write_whole(Path(args.output, "training_config.json"), config + "\n")


def main(argv=None):
    args = parse_args(argv)
    if failed := getattr(sys, "last_value", None):  # in a notebook: a failed cell's frames are kept
        failed.__context__ = failed.__cause__ = sys.last_traceback.tb_next = None
    clear_device_cache(garbage_collection=True)  # in a notebook: what an earlier cell left
    gc.freeze()  # a million objects of the libraries, which every collection would walk through
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries
    if HIDE_BARS:
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()

    source, val_source = find_data(args)
    records, val_records = read_jsonl(source), read_jsonl(val_source) if val_source else None
    folder = check_output(args)
    device, precision = choose_device(args)
    tokenizer = pretrained(AutoTokenizer, args.model)
    frame, limit = chat_frame(tokenizer), args.max_seq_length
    rows = encode_rows(records, tokenizer, frame, limit, source)
    val_rows = val_records and encode_rows(val_records, tokenizer, frame, limit, val_source)
    rows_per_step = args.batch_size * args.gradient_accumulation_steps * WORLD_SIZE
    per_epoch = math.ceil(len(rows) / rows_per_step)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.epochs * per_epoch)
    run = {name: getattr(args, name) for name in DECISIVE}
    run |= {"precision": precision, "dataset": sha256(source)}

    base = load_base(args.model, device, precision, args.load_in_4bit)
    head = take_head(base)
    model = put_adapter(base, args)
    make_lean(model, args.gradient_checkpointing, args.compile)
    say(f"model       {args.model}, {memory_mib():,} MiB")
    say(f"adapter     {model.get_nb_trainable_parameters()[0]:,} parameters are trained")
    say(f"training    {total:,} steps of {rows_per_step} rows ({per_epoch:,} steps an epoch)")
    show_example(rows[0], tokenizer)

    try:
        whole = find_checkpoint(folder, run) if args.resume else None
        if RANK == 0:
            claim(folder)
            clear(folder, whole)
        trainer = make_trainer(args, precision, model, head, rows, val_rows, tokenizer, total)
        state = train(trainer, TrainingLog(trainer, run, per_epoch), whole)
        if RANK == 0 and state.global_step == total:
            save_adapter(model, tokenizer, folder)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = textwrap.shorten(str(error), 150)
        stop(f"--compile does not work here ({reason}); leave it out, or install a C++ compiler")
    except (OSError, SafetensorError, RuntimeError) as error:
        unwritten = "inline_container", "iostream"  # how torch.save says that a disk is full
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in unwritten):
            raise
        stop(f"can't write to {folder} ({str(error)[:80]}); free space, then --resume goes on")
    if state.global_step < total:
        done = f"stopped after step {state.global_step} of {total}"
        sys.exit(f"{done}; the same command with --resume goes on")

    result = {"steps": total, "memory_mib": memory_mib()}
    for entry in state.log_history:  # the last of each stays
        result |= {key: entry[key] for key in ("loss", "eval_loss") if key in entry}
    if RANK == 0:
        write_config(args, precision, run, model, len(rows), source, result)
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        (folder / PID).unlink(missing_ok=True)
    say(f"next: python evaluate.py --adapter {folder} --val-data {val_source or 'FILE.jsonl'}")
    return result


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing new was saved, checkpoints written before stand")
