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
import tempfile
import textwrap
import time
import unicodedata
import warnings
from collections import namedtuple
from functools import partial
from importlib.metadata import version
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel("ERROR")  # on import it asks for an optional package

import jinja2
import numpy as np
import pandas as pd
import peft
import scipy.stats
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils.memory import clear_device_cache
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils import cached_file

# ---------------------------------------------------------------------------------------------
# Edit here, or pass the flag of the same name.
# model
MODEL = None  # Hugging Face name or local folder; None: what the adapter was trained on
ADAPTER = "output/tinyllama-k8s-qlora"  # folder of a LoRA adapter
LOAD_IN_4BIT = None  # NF4 weights; None: as in training
PRECISION = None  # fp16, bf16 or fp32; None: as in training; a CPU uses fp32 for fp16
# data
PROMPTS = None  # JSON list of questions; None: the ten below
VAL_DATA = None  # JSONL to measure perplexity on, unseen in training
VAL_PROMPTS = 5  # how many of its questions are asked, too
# generation
MAX_NEW_TOKENS = 256  # an answer is cut there
REPETITION_PENALTY = 1.0  # above 1, before and after: against answers that go round in circles
BATCH_SIZE = 8  # prompts at once: speed against memory
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
EVERYDAY = [  # of other fields: did it forget?
    (
        "What is the largest planet?",
        "The largest planet in our solar system is Jupiter.",
    ),
    (
        "What is the capital of France?",
        "The capital of France is Paris. It is known for the Eiffel Tower.",
    ),
    (
        "What is the opposite of hot?",
        'The opposite of "hot" is "cold".',
    ),
    (
        "Who was the first US president?",
        "The first president of the United States was George Washington.",
    ),
    (
        "What is the highest mountain?",
        "The highest mountain in the world is Mount Everest, in the Himalayas.",
    ),
    (
        "When does water boil?",
        "Water boils at 100 degrees Celsius or 212 degrees Fahrenheit at sea level.",
    ),
    (
        "How do vaccines work?",
        "Vaccines work by training the immune system to recognize and fight a disease.",
    ),
    (
        "How do bees make honey?",
        "Bees make honey from the nectar that they collect from flowers.",
    ),
    (
        "What causes the seasons?",
        "The seasons are caused by the tilt of the Earth's axis as it orbits the Sun.",
    ),
    (
        "Write a thank-you note.",
        "Dear [Name], I wanted to take a moment to thank you for your kindness.",
    ),
    (
        "How do I boil an egg?",
        "To boil an egg, follow these steps: 1. Fill a pot with enough water to cover the egg.",
    ),
    (
        'Translate "thank you" into French.',
        '"Thank you" in French is "merci".',
    ),
    (
        "Why is the sky blue?",
        "The sky appears blue because of a phenomenon called Rayleigh scattering.",
    ),
    (
        "How does a rainbow form?",
        "A rainbow forms when sunlight is refracted by water droplets in the air.",
    ),
    (
        "Why do we dream?",
        "Scientists are still not sure why we dream, but there are several theories.",
    ),
    (
        "Tell me a joke.",
        "Why did the scarecrow win an award? Because he was outstanding in his field!",
    ),
    (
        "Is a whale a fish?",
        "No, a whale is not a fish. Whales are mammals that live in the ocean.",
    ),
    (
        "Who is Sherlock Holmes?",
        "Sherlock Holmes is a fictional detective created by Sir Arthur Conan Doyle.",
    ),
    (
        "What do pandas eat?",
        "Pandas are herbivores that feed mainly on bamboo.",
    ),
    (
        "What is a mortgage?",
        "A mortgage is a type of loan that is used to finance the purchase of a home.",
    ),
]
VERDICTS = {
    "better": "Better: the right answers surprise the model less than before",
    "unclear": "No clear difference: it may be chance",
    "worse": "Worse: the right answers surprise the model more than before",
}
DAMAGE = {  # to what it knew before
    "better": "no damage seen",
    "unclear": "no damage seen",
    "worse": "it got worse at other things",
}
ALLOWED = {  # in adapter_config.json; with others "before" would not be the base, or "after" would be wrong
    "peft_type": ["LORA"],
    "init_lora_weights": [None, True, False, "gaussian", "eva", "orthogonal", "mica"],
    "bias": [None, "none"],
    "layer_replication": [None, []],
    "kasa_config": [None],
    "arrow_config": [None],
    "alora_invocation_tokens": [None, []],
}
FIGURES = (
    "perplexity {base:.2f} -> {finetuned:.2f} on {rows} rows, {rows_improved} of them better, "
    "x {ratio:.3f} ({interval})"
)
ANSWERS = (
    "{answers_changed} of {prompts} changed, {base_stopped} -> {finetuned_stopped} stopped by "
    "themselves, {mean_base_tokens:.0f} -> {mean_finetuned_tokens:.0f} tokens on average, "
    "{tokens_per_second:,.0f} tokens/s"
)
WIDE = (  # letters that take two columns of a terminal or none, or run from right to left
    "[\u0300-\u036f\u0590-\u1fff\u2300-\u23ff\u2600-\u27bf\u2b00-\U0010ffff]"
)
SIDES = {"base": "before", "finetuned": "after"}
MODEL_ADVICE = (
    "pass a 16-bit model: its folder with config.json, tokenizer.json, model.safetensors or, online,"
    " its Hub name; tokenizer.model in place of tokenizer.json needs `pip install sentencepiece"
    " protobuf`; if a newer transformers saved it, pip install -U transformers"
)
ALPACA_TEMPLATE = (  # for tokenizers that come without a chat template
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "### Instruction:\n{{ message['content'] }}\n\n### Response:\n"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
Frame = namedtuple("Frame", ["head", "tail", "blank", "end", "special"])  # see chat_frame
HIDE_BARS = not (sys.stderr.isatty() or "ipykernel" in sys.modules)


def parse_args(argv=None):
    if argv is None and "kernel_launcher" in sys.argv[0]:
        argv = []  # pasted into a notebook cell: sys.argv is the kernel's, the constants above decide
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction
    path = os.path.expanduser
    ranges = {}

    def add(flag, default, help, low=None, high=1_000_000, **options):
        """An option; a number has the type of low, or of its default, and a range from low to high."""
        number = default if low is None else low
        is_number = type(number) in [int, float]
        if is_number:
            options["type"] = type(number)
        kind = str
        if options.get("action") is switch:
            kind = bool
        if "nargs" in options:
            kind = list
        if not is_number and not isinstance(default, (kind, type(None))):
            parser.error(f"argument {flag}: {default!r}: must be a {kind.__name__}")
        choices = options.get("choices")
        if choices and default not in [None, *choices]:
            parser.error(f"argument {flag}: {default}: choose from {', '.join(choices)}")
        action = parser.add_argument(flag, default=default, **options)
        action.help = f"{help} (default: %(default)s)"  # not above: Python 3.10 adds to a switch's
        if low is not None:
            ranges[action.dest] = (low, high)

    add("--model", MODEL, "base model; None: what the adapter was trained on", type=path)
    add("--adapter", ADAPTER, "folder of a LoRA adapter", type=path)
    add("--load-in-4bit", LOAD_IN_4BIT, "None: as in training", action=switch)
    add("--precision", PRECISION, "None: as in training", choices=["fp16", "bf16", "fp32"])
    add("--prompts", PROMPTS, "JSON list of questions; None: ten built in", type=path)
    add("--val-data", VAL_DATA, "JSONL to measure perplexity on", type=path)
    add("--val-prompts", VAL_PROMPTS, "questions of it that are asked", low=0)
    add("--max-new-tokens", MAX_NEW_TOKENS, "an answer is cut there", low=1)
    add("--repetition-penalty", REPETITION_PENALTY, "on both sides; 1: none", low=0.1, high=10)
    add("--batch-size", BATCH_SIZE, "prompts at once", low=1)
    add("--output", OUTPUT, "JSON file; the page beside it ends in .html", type=path)

    args = parser.parse_args(argv)
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        is_number = type(value) in [int, type(low)]  # an edited constant may be anything
        if not is_number or not low <= value <= high:
            flag = "--" + name.replace("_", "-")
            kind = type(low).__name__
            parser.error(f"argument {flag}: must be from {low} to {high} ({kind})")
    return args


# The same in lora_finetune.py, letter for letter.
@contextlib.contextmanager
def explained(what, advice, kind=Exception):
    """Within, an error of a library ends the program in one line: what failed, why, what helps.

    Put it around the one call that fails so. TRACEBACK=1 in the environment shows the whole error.
    """
    try:
        yield
    except kind as error:
        if isinstance(error, NameError) or os.environ.get("TRACEBACK"):
            raise  # the first is a slip in this file, and no library's
        reason = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror  # without the path, which `what` names
        if "out of memory" in reason:
            advice = "lower --batch-size, close other programs or choose a smaller --model"
        sys.exit(f"error: {what}: {textwrap.shorten(reason, 200)}; {advice}")


def read_json(path, kind, advice):
    """The list or dict that a JSON file holds."""
    with explained(path, advice, (OSError, ValueError, RecursionError)):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, kind) or not value:
            raise ValueError(f"it holds no JSON {kind.__name__}, or an empty one")
    return value


def read_adapter(folder):
    """What adapter_config.json holds, of an adapter without which the model is its base again."""
    advice = "--adapter takes the folder that lora_finetune.py wrote"
    if (folder / "checkpoint.pt").exists():
        sys.exit(f"error: {folder}: its training was stopped; lora_finetune.py --resume ends it")
    for name in ["adapter_config.json", "adapter_model.safetensors"]:  # no pickled one is opened
        if not (folder / name).is_file():
            sys.exit(f"error: {folder}: no folder of an adapter, it lacks {name}; {advice}")
    config = read_json(folder / "adapter_config.json", dict, advice)
    for key, values in ALLOWED.items():
        value = config.get(key)
        if value not in values:
            what = f"no LoRA that leaves its base as it is, by its {key} {value}"
            sys.exit(f"error: {folder}: {what}; {advice}")
    return config


def settle(args, adapter, training):
    """The options, as the adapter was trained where they are None."""
    trained = {
        "precision": "fp16",
        "load_in_4bit": True,
        "max_seq_length": None,
    }
    trained.update(training.get("arguments") or {})
    trained["model"] = adapter.get("base_model_name_or_path")  # wins: people edit it there
    settings = vars(args) | {"max_seq_length": None}
    for key in ["model", "precision", "load_in_4bit", "max_seq_length"]:
        if settings[key] is None:
            settings[key] = trained[key]
    if not settings["model"] or not isinstance(settings["model"], str):
        sys.exit("error: adapter_config.json names no base; pass what it was trained on: --model")
    if settings["precision"] == "fp16" and not torch.cuda.is_available():
        settings["precision"] = "fp32"
    return settings


def find_model(name, beside):
    """The folder that a name stands for, here or seen from the folder `beside`, or a Hub name."""
    path = Path(name).expanduser()
    for place in [path, beside / path]:
        if place.is_dir():
            return str(place)
    if re.search(r"^[./~]|/.*/|\\", name):  # no Hub name
        sys.exit(f"error: no folder {name}; pass what the adapter was trained on: --model")
    with explained(f"no folder {name}, and no such model of the Hub", MODEL_ADVICE):
        cached_file(name, "config.json")
    return name


def check_output(output):
    """Refuse, before the work, an output that can't be written, or a file of something else."""
    advice = "choose another --output"
    marks = {  # of what this script wrote
        output: b'"summary"',
        output.with_suffix(".html"): b"<title>Before and after fine-tuning</title>",
    }
    if output.suffix != ".json":
        sys.exit(f"error: {output} is no .json; {advice}")
    with explained(f"can't write to {output.parent}", advice, OSError):
        for nearest in output.absolute().parents:
            if nearest.exists():
                break
        tempfile.TemporaryFile(dir=nearest).close()
        for path, mark in marks.items():
            if path.is_dir() or (path.is_file() and mark not in path.read_bytes()):
                sys.exit(f"error: {path} is not one of evaluate.py; {advice}")


# The same in lora_finetune.py, letter for letter.
def to_record(row):
    """A row of JSON as {"instruction", "input", "output"}, all str; else raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    record = {}
    for key in ["instruction", "input", "output"]:
        text = row.get(key) or ""
        if not isinstance(text, str):
            raise ValueError(f'"{key}" is no text')
        if not text.strip() and key != "input":
            raise ValueError(f'"{key}" is missing')
        record[key] = text.encode().decode()  # a ValueError if half a character
    return record


# The same in lora_finetune.py, letter for letter.
def read_jsonl(path):
    """The records of a JSONL file; a line that is none ends the program."""
    advice = "prepare_dataset.py makes and mends such files"
    with explained(path, advice, OSError):
        lines = Path(path).read_bytes().split(b"\n")
        if not Path(path).is_file():
            raise OSError("it can be read only once; write it into a file")

    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with explained(f"{path}:{number}", advice, (ValueError, RecursionError)):
            row = json.loads(line.decode("utf-8-sig"))
            records.append(to_record(row))
    if not records:
        sys.exit(f"error: {path}: no records in it; {advice}")
    return records


def read_prompts(path):
    """Records without an answer: the questions of a JSON list of strings, or the ten built in."""
    advice = 'it takes a list of questions, ["What is a Pod?", ...]'
    questions = QUESTIONS
    if path:
        questions = read_json(path, list, advice)
    records = []
    for number, question in enumerate(questions, 1):
        with explained(f"{path}: item {number}", advice, ValueError):
            record = to_record({"instruction": question, "output": "-"})
        records.append({**record, "output": None})
    return records


def folded(record):
    """A record's question and answer, for comparing: case and blanks do not count."""
    question = record["instruction"] + " " + record["input"]
    pair = []
    for text in [question, record["output"]]:
        text = unicodedata.normalize("NFKC", text).casefold()
        pair.append(" ".join(text.split()))
    return tuple(pair)


def count_seen(records, path, data):
    """What training saw of the records, in numbers, and why they are not held out, or "".

    data tells the file that was trained on, {"path", "sha256"}; another tool does not.
    """
    if not records:
        return {}, ""
    if not data:
        return {"note": "Not compared with the rows of training: none are noted"}, ""
    trained = []
    source = Path(data["path"])
    for file in [Path(path), source]:
        if not file.is_file():
            continue
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() == data["sha256"]:
            trained = read_jsonl(file)
    if not trained and not source.is_file():
        return {"note": f"Not compared with the rows of training: {source} is not here"}, ""
    if not trained:  # perhaps split anew, so that rows of val were trained on
        return {}, f"training may have seen these rows: {source} was changed since"

    known = {folded(record) for record in trained}
    questions = {question for question, _ in known}
    seen = {"rows_seen": 0, "questions_seen": 0}
    for record in records:
        row = folded(record)
        seen["rows_seen"] += row in known
        seen["questions_seen"] += row[0] in questions
    doubt = ""
    if seen["rows_seen"]:
        doubt = f"{seen['rows_seen']} of {len(records)} rows were trained on"
    elif seen["questions_seen"]:
        doubt = f"{seen['questions_seen']} of {len(records)} rows ask what training asked"
    return seen, doubt


# The same in lora_finetune.py, letter for letter.
def chat_frame(tokenizer):
    """Return the Frame that the chat template puts around one question and its answer.

    The prompt is head + question + tail, the response blank + answer + end; special holds the ids
    of control tokens. A blank before the answer is not the prompt's: the token that holds it often
    holds the answer's first letter too. end closes with the end-of-turn token.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = ALPACA_TEMPLATE
        if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
            tokenizer.chat_template = "{{ bos_token }}" + ALPACA_TEMPLATE

    question = "\ue000"  # these two are private-use characters: no template contains them
    answer = "\ue001"
    asked = [{"role": "user", "content": question}]
    answered = [*asked, {"role": "assistant", "content": answer}]
    with explained("the model's chat template fails", "choose another --model"):
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:  # it tells the date: from now on, always the same one
            template = "{% macro strftime_now(form) %}01 Jan 2025{% endmacro %}" + template
        tokenizer.chat_template = template
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
        head, rest = whole.split(question)
        tail, end = rest.split(answer)
        if not whole.startswith(prompt):
            raise ValueError("it writes a prompt and its answer apart")
    stripped = tail.rstrip(" ")
    blank = tail[len(stripped) :]

    special = set()
    stops = []  # where in `end` a control token is over: the first of them ends the turn
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special.add(id)
            if token.content in end:
                stops.append(end.index(token.content) + len(token.content))
    if stops:
        end = end[: min(stops)]
    else:
        end += tokenizer.eos_token or ""
    return Frame(head, stripped, blank, end, special)


# The same in lora_finetune.py, letter for letter.
def tokenize(text, typed, tokenizer, special):
    """The ids of a text; a control token within the ranges that a person typed is spelled out."""
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = []
    for id, (start, stop) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        if id in special and any(start in part for part in typed):
            part = text[start:stop]
            spelled = tokenizer(part, add_special_tokens=False, split_special_tokens=True)
            input_ids += spelled["input_ids"]
        else:
            input_ids.append(id)
    return input_ids


def check_frame(frame, trained, source):
    """Refuse another prompt than training used: it would measure what was never learned."""
    for part, now in frame._asdict().items():
        then = trained.get(part, now)
        if now != then:
            same = len(os.path.commonprefix([now, then]))
            shown = slice(same, same + 40)
            what = f"{part} of the prompt is {now[shown]!r}, in training it was {then[shown]!r}"
            advice = "put back chat_template.jinja as saved; chat_frame is the same in both scripts"
            sys.exit(f"error: {source}: the {what}; {advice}")


# The same in lora_finetune.py, letter for letter.
def encode(record, tokenizer, frame, max_length):
    """Turn a record into what response_nll reads: input_ids and labels, and three numbers.

    The labels are the ids of the response, and -100 before. Prompt and response are tokenized in
    one, as apart they need not give the same ids. But the prompt's ids are those of the prompt
    alone: these are what is asked later. Control tokens in a record (such as </s>) stay plain text.
    """
    question = record["instruction"]
    if record["input"]:
        question += "\n\n" + record["input"]
    prompt = frame.head + question + frame.tail
    response = frame.blank + record["output"] + frame.end
    text = prompt + response
    in_question = range(len(frame.head), len(frame.head + question))
    in_response = range(len(prompt), len(text) - len(frame.end))

    prompt_ids = tokenize(prompt, [in_question], tokenizer, frame.special)
    input_ids = tokenize(text, [in_question, in_response], tokenizer, frame.special)
    prompt_tokens = len(prompt_ids)
    if input_ids[:prompt_tokens] != prompt_ids:  # a token reaches over the border: apart, then
        typed = range(len(response) - len(frame.end))
        input_ids = prompt_ids + tokenize(response, [typed], tokenizer, frame.special)

    labels = [-100] * prompt_tokens + input_ids[prompt_tokens:]
    labels = labels[:max_length]
    shifted = labels[1:]  # the first token is never predicted
    return {
        "input_ids": input_ids[:max_length],
        "labels": labels,
        "length": len(input_ids),  # before the cut
        "prompt_tokens": prompt_tokens,  # before the cut
        "targets": len(shifted) - shifted.count(-100),  # how many tokens the loss counts
    }


# The same in lora_finetune.py, letter for letter.
def end_ids(model, tokenizer, frame):
    """The ids at which an answer ends: of the turn, of a text, and those that the base names."""
    ends = tokenizer(frame.end, add_special_tokens=False)["input_ids"][-1:]
    ends.append(tokenizer.eos_token_id)
    named = model.generation_config.eos_token_id
    if isinstance(named, int):
        named = [named]
    ends += named or []
    return sorted({id for id in ends if id is not None})


# The same in lora_finetune.py, letter for letter.
def load_base(name, device, precision, load_in_4bit):
    """Load a causal language model, its linear layers in NF4 if asked, or as they come quantised."""
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = dtypes[precision]
    options = {}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    with explained(f"can't load the model {name}", MODEL_ADVICE):
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        if info["missing_keys"]:
            raise ValueError(f"it lacks weights, such as {min(info['missing_keys'])}")
    return model


# The same in lora_finetune.py, letter for letter.
def mend(model):
    """Change, in place, what libraries do wrongly or slowly with some models."""
    # It plans anew for each length of the rows, slowly.
    torch.backends.cuda.enable_cudnn_sdp(False)

    # Gemma 2 caps its attention's scores; sdpa leaves the cap out, in transformers < 5.22.
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")

    for module in model.modules():
        # Else the first evaluation repacks the NF4 weights in place, and training goes wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

        # A base that comes quantised brings a format of its own, such as bf16 for older GPUs.
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = model.get_input_embeddings().weight.dtype

        # One kernel for the RMSNorm of Llama and kin: a fifth of a step's time on a GPU.
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(
                F.rms_norm,
                normalized_shape=module.weight.shape,
                weight=module.weight,
                eps=module.variance_epsilon,
            )


# The same in lora_finetune.py, letter for letter.
def find_head(model):
    """The head, where logits are head(hidden states) and no more; else None (Gemma 2, Granite)."""
    head = model.get_output_embeddings()
    if head is None:
        return None
    probe = torch.arange(8, device=model.device)[None]
    with torch.no_grad():
        logits = model(input_ids=probe, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=probe, use_cache=False)[0]
        if hidden.shape[-1] != head.weight.shape[-1]:
            return None
        hidden = hidden.to(head.weight.dtype)
        difference = head(hidden).float() - logits
    if difference.norm() < 1e-3 * logits.norm():
        return head
    return None


def load_pair(folder, settings, training):
    """Load the base and put the adapter on it, checking that the two belong together."""
    name = settings["model"]
    file = folder / "adapter_model.safetensors"
    with explained(f"{file} is damaged", "copy it anew, or run `git lfs pull` there"):
        saved = load_file(file)
    device = 0 if torch.cuda.is_available() else "cpu"
    base = load_base(name, device, settings["precision"], settings["load_in_4bit"])
    mend(base)
    with explained(f"adapter {folder} does not fit {name}", "pass the --model it was trained on"):
        weight = base.get_input_embeddings().weight[::100]
        norm = weight.double().norm().item()
        trained = training.get("embedding_norm", norm)
        if not math.isclose(norm, trained, rel_tol=1e-3):  # in bf16 a little else than in fp32
            raise ValueError("the base has other token embeddings")
        own = list(base.parameters())
        sums = [weight.sum(dtype=torch.float64) for weight in own]
        model = peft.PeftModel.from_pretrained(base, folder)
        others = saved.keys() ^ peft.get_peft_model_state_dict(model).keys()
        if any("lora_" in key for key in others):
            raise ValueError("its layers are others")
        if sums != [weight.sum(dtype=torch.float64) for weight in own]:
            raise ValueError("it changes weights of the base itself")
    return model.eval()


def encode_all(records, tokenizer, frame, limit, path):
    """Rows whose answer has room within `limit` tokens, longest first."""
    rows = []
    for record in records:
        row = encode(record, tokenizer, frame, limit)
        if row["targets"] > 0:
            rows.append(row)
    if not rows:
        sys.exit(f"error: {path}: no answer within {limit} tokens; take shorter rows")
    return sorted(rows, key=lambda row: -len(row["input_ids"]))


def check_room(base, prompts, rows, context, max_new_tokens):
    """Refuse what the model can't read: longer texts, or tokens that it lacks."""
    longest = max(map(len, prompts))
    if longest + max_new_tokens > context:
        room = f"of {longest:,} tokens and its answer are beyond the model's {context:,}"
        sys.exit(f"error: a question {room}; shorten it, --max-new-tokens or --val-prompts")
    texts = [*prompts, *(row["input_ids"] for row in rows)]
    largest = max(map(max, texts))
    if largest >= len(base.get_input_embeddings().weight):
        sys.exit("error: the model lacks tokens of the tokenizer; pass the --model of the training")


def generate(model, tokenizer, prompts, ends, size, side):
    """Answer prompts (token ids), `size` at once: [{side: text, side_stopped, side_tokens}]."""
    answers = []
    starts = range(0, len(prompts), size)
    for start in tqdm(starts, f"answers, {SIDES[side]}", disable=HIDE_BARS, leave=False):
        end = start + size
        part = [torch.tensor(prompt) for prompt in prompts[start:end]]
        ids = pad_sequence(part, batch_first=True, padding_value=-1, padding_side="left")
        ids = ids.to(model.device)
        mask = ids >= 0
        last = ids[:, -1:]  # as padding: a penalty counts this token already
        ids = torch.where(mask, ids, last)
        output = model.generate(input_ids=ids, attention_mask=mask.long())

        for new in output[:, ids.shape[1] :].tolist():
            kept = list(itertools.takewhile(lambda id: id not in ends, new))
            stopped = len(kept) < len(new)
            text = tokenizer.decode(kept, skip_special_tokens=True).strip()
            answer = {
                side: text,
                f"{side}_stopped": stopped,
                f"{side}_tokens": len(kept) + stopped,
            }
            answers.append(answer)
    return answers


# The same in lora_finetune.py, letter for letter.
def response_nll(model, head, pad_id, rows):
    """Negative log-likelihood in nats of each target of the rows, (targets,), in their order.

    All logits, (rows, length, vocabulary), would be the largest tensor of a step. So the head runs
    only where a label counts, 16 million logits at a time, and again in the backward pass; without
    a head (see find_head) the model computes all. Causal attention never looks at right padding.
    """
    weight = model.get_input_embeddings().weight

    def padded(key, padding):
        tensors = [torch.tensor(row[key]) for row in rows]
        table = pad_sequence(tensors, batch_first=True, padding_value=padding)
        return table.to(weight.device)

    def part_nll(states, targets):
        logits = head(states) if head else states
        log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        return F.nll_loss(log_p, targets, reduction="none")

    input_ids = padded("input_ids", pad_id)
    targets = padded("labels", -100)[:, 1:]  # position i predicts token i + 1
    counts = targets != -100
    targets = targets[counts]
    network = model.base_model if head else model
    mixed = weight.dtype != torch.float32
    with torch.autocast(weight.device.type, weight.dtype, enabled=mixed):
        outputs = network(input_ids=input_ids, use_cache=False)
        states = outputs[0][:, :-1]  # hidden states, or without a head logits
        states = states[counts]
        size = 2**24 // len(weight)
        nll = []
        for part in zip(states.split(size), targets.split(size)):
            nll.append(checkpoint(part_nll, *part, use_reentrant=False))
        return torch.cat(nll)


# The same in lora_finetune.py, letter for letter.
def micro_batches(rows, room):
    """Cut rows, longest first, into lists that with their padding take at most `room` tokens."""
    while rows:
        size = max(1, room // len(rows[0]["input_ids"]))
        yield rows[:size]
        rows = rows[size:]


def measure(nll_of, rows, size):
    """The NLL in nats of each row's answer, all its tokens together."""
    longest = len(rows[0]["input_ids"])
    room = size * longest // 2  # half as many as prompts: all tokens at once
    parts = list(micro_batches(rows, room))
    nats = []
    for part in tqdm(parts, "perplexity", disable=HIDE_BARS, leave=False):
        nats.append(nll_of(part))
    nats = torch.cat(nats).double().cpu()

    targets = [row["targets"] for row in rows]
    sums = [of_row.sum().item() for of_row in nats.split(targets)]
    return np.array(sums)


def perplexity(nll, tokens, axis=-1):
    """exp(sum of NLL / number of tokens), of rows: each token counts alike."""
    return np.exp(nll.sum(axis) / tokens.sum(axis))


def compare(base, finetuned, tokens):
    """Perplexities, their ratio and its interval, from each row's NLL sums (nats) and token count.

    The interval is a 95 % bootstrap (bias-corrected and accelerated, Efron and Tibshirani 1993):
    rows are drawn anew with both their figures, which keeps the pairs.
    """
    difference = finetuned - base
    interval = None
    if len(tokens) > 1:
        drawn = scipy.stats.bootstrap(
            (difference, tokens),
            perplexity,
            paired=True,
            batch=100,
            rng=np.random.default_rng(0),
        )
        ends = [float(end) for end in drawn.confidence_interval]
        if np.isfinite(ends).all():  # not where all rows changed alike
            interval = ends
    return {
        "base": float(perplexity(base, tokens)),
        "finetuned": float(perplexity(finetuned, tokens)),
        "ratio": float(perplexity(difference, tokens)),
        "ratio_ci95": interval,
        "tokens": int(tokens.sum()),
        "rows": len(tokens),
        "rows_improved": int((difference < 0).sum()),
    }


def run_both(model, tokenizer, ends, asked, prompts, rows, args):
    """With the adapter off and on: pairs of answers, their seconds, and figures of each group."""
    base = model.get_base_model()
    nll_of = partial(response_nll, base, find_head(base), tokenizer.eos_token_id or 0)
    base.generation_config = GenerationConfig(  # greedy; what the base's own asks for is left out
        do_sample=False,
        max_new_tokens=args.max_new_tokens,
        repetition_penalty=args.repetition_penalty,
        eos_token_id=ends or None,
        pad_token_id=0,
    )
    dtype = base.get_input_embeddings().weight.dtype
    mixed = dtype != torch.float32
    autocast = torch.autocast(base.device.type, dtype, enabled=mixed)
    switches = {
        "base": model.disable_adapter(),
        "finetuned": contextlib.nullcontext(),
    }

    pairs = []
    for record in asked:
        question = f"{record['instruction']}\n\n{record['input']}".strip()
        pairs.append({"prompt": question, "reference": record["output"]})
    seconds = 0.0
    nats = {}
    for side, switch in switches.items():
        with torch.inference_mode(), autocast, switch:
            began = time.monotonic()
            answers = generate(base, tokenizer, prompts, ends, args.batch_size, side)
            seconds += time.monotonic() - began
            for pair, answer in zip(pairs, answers, strict=True):
                pair.update(answer)
            for name, group in rows.items():
                nats[name, side] = measure(nll_of, group, args.batch_size)

    figures = {}
    for name, group in rows.items():
        tokens = np.array([row["targets"] for row in group])
        figures[name] = compare(nats[name, "base"], nats[name, "finetuned"], tokens)
    return pairs, seconds, figures


def judge(figures):
    """What the figures of a group say: a key of VERDICTS, by where the interval lies, and in words."""
    verdict = "unclear"
    interval = "no interval"
    if figures["ratio_ci95"]:
        low, high = figures["ratio_ci95"]
        interval = f"95% interval {low:.3f} to {high:.3f}"
        if high < 1:
            verdict = "better"
        if low > 1:
            verdict = "worse"
    return verdict, FIGURES.format(interval=interval, **figures)


def conclude_answers(pairs, seconds, penalty):
    """How many answers changed and stopped, and how long they are: in a sentence and in numbers."""
    changed = sum(pair["base"] != pair["finetuned"] for pair in pairs)
    numbers = {"prompts": len(pairs), "answers_changed": changed}
    tokens = 0
    for side in SIDES:
        written = sum(pair[f"{side}_tokens"] for pair in pairs)
        tokens += written
        numbers[f"mean_{side}_tokens"] = written / len(pairs)
        numbers[f"{side}_stopped"] = sum(pair[f"{side}_stopped"] for pair in pairs)
    numbers["tokens_per_second"] = tokens / seconds

    numbers["answers"] = ANSWERS.format(**numbers)
    if penalty != 1:
        numbers["answers"] += f", repetition penalty {penalty:g}"
    if not changed:
        numbers["WARNING"] = "no answer changed. Was the adapter trained enough?"
    return numbers


def doubt_figures(figures, val_sha256, training, settings):
    """Why figures can't be trusted, where training measured the same file otherwise, or ""."""
    result = training.get("result") or {}
    loss = result.get("eval_loss")
    data = training.get("data") or {}
    if loss is None or val_sha256 != data.get("val_sha256"):
        return ""
    trained = training.get("arguments") or {}
    if settings["load_in_4bit"] != trained.get("load_in_4bit"):
        return ""
    difference = math.log(figures["finetuned"]) - loss
    if abs(difference) < 0.03:  # as between two devices
        return ""
    then = f"the training measured {math.exp(loss):.2f} on these rows"
    return f"{then}, so the base or one of the two scripts has changed"


def conclude(figures, records, doubt, limit):
    """What the figures say, in sentences."""
    summary = {"verdict": "No verdict without --val-data: read the answers side by side"}
    if records:
        verdict, told = judge(figures["val data"])
        summary["verdict"] = VERDICTS[verdict]
        if doubt:
            summary["verdict"] = f"No verdict: {doubt}"
        summary["val data"] = told
        left_out = len(records) - figures["val data"]["rows"]
        if left_out:
            cause = f"{left_out} of {len(records)} rows left out: no room for an answer"
            summary["val data"] += f"; {cause} within {limit} tokens"

    verdict, told = judge(figures["elsewhere"])
    summary["elsewhere"] = f"{told}: {DAMAGE[verdict]}"
    return summary


def read_log(path):
    """The losses of a training log, each with its step, for the curve; {} where there is none."""
    try:
        log = pd.read_json(path, lines=True)
        log = log.astype({"step": int}).set_index("step")
        log = log.reindex(columns=["loss", "eval_loss"]).astype(float)
    except (OSError, ValueError, KeyError, TypeError):  # or it is another tool's
        return {}
    train = log["loss"].dropna()
    val = log["eval_loss"].dropna()
    width = len(train) // 10 + 1
    mean = train.rolling(width, min_periods=1).mean()
    every = len(train) // 1000 + 1  # not all: a page stays small
    return {
        "train": list(train[::-every].items()),  # backwards, so that the last one is among them
        "mean": list(mean[::-every].items()),
        "val": list(val.items()),
        "width": width,
    }


def draw_bars(figures):
    """Both perplexities, and the interval of the second one, in percent of the bars' width."""
    scale = 96 / max(1, figures["ratio"])
    low, high = figures["ratio_ci95"] or (0, 0)
    return {
        "before": scale,
        "after": scale * figures["ratio"],
        "low": scale * low,
        "high": min(100, scale * high),
    }


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Before and after fine-tuning</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  :root {
    color-scheme: light dark;
    --paper: light-dark(#f6f8fa, #0d1117);
    --card: light-dark(#ffffff, #161b22);
    --line: light-dark(#d0d7de, #3d444d);
    --soft: light-dark(#57606a, #9da7b3);
    --before: light-dark(#8c959f, #768390);
    --after: light-dark(#0a5cc2, #6cb0ff);
    --alarm: light-dark(#a40e26, #ff9a9a);
  }
  body {
    max-width: 72rem;
    margin: auto;
    padding: 1rem;
    background: var(--paper);
    font: 16px/1.5 system-ui, sans-serif;
    overflow-wrap: anywhere;
  }
  h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0 1.2rem; }
  h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
  h3 { font-size: 1rem; margin: 2rem 0 .6rem; white-space: pre-wrap; }
  .label { margin: 0; color: var(--soft); font-size: .85rem; }
  p { margin: .5rem 0; }
  pre { margin: .4rem 0 0; font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap; }
  .soft { color: var(--soft); font-size: .9rem; }
  .figure { margin: .2rem 0; font-size: 1.6rem; font-weight: 600; }
  .alarm { color: var(--alarm); }
  .card {
    min-width: 0;
    padding: .8rem 1rem;
    border: 1px solid var(--line);
    border-radius: 8px;
    background: var(--card);
  }
  .pair {
    display: grid;
    grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
    gap: .8rem;
  }
  .whole { grid-column: 1 / -1; }

  .bars { position: relative; margin: .8rem 0; padding: 6px 0; }
  .bar { height: 14px; border-radius: 2px; }
  .before { background: var(--before); }
  .after { margin-top: 6px; background: var(--after); }
  .box {
    position: absolute;
    bottom: 2px;
    height: 20px;
    border: 2px solid;
    border-radius: 3px;
  }

  .chart { display: grid; grid-template-columns: auto 1fr; gap: .3rem .6rem; }
  .chart .low { align-self: end; }
  .chart .plot { grid-area: 1 / 2 / 3 / 3; height: 220px; }
  .chart .steps { grid-column: 2; display: flex; justify-content: space-between; }
  svg { display: block; width: 100%; height: 100%; overflow: visible; }
  path { fill: none; stroke: var(--after); vector-effect: non-scaling-stroke; }
  path { stroke-linecap: round; stroke-linejoin: round; }
  .single { opacity: .45; }
  .mean { stroke-width: 3; }
  circle { fill: var(--alarm); stroke: var(--card); stroke-width: 2; }
</style>
</head>
<body>
<main>
  <h1>{{ summary.verdict }}.</h1>
  {% if summary.note %}
  <p class="soft">{{ summary.note }}.</p>
  {% endif %}

  <div class="pair">
  {% for name, told in summary.items() if bars[name] %}
    {% set bar = bars[name] %}
    {% set now = {"val data": perplexity, "elsewhere": general}[name] %}
    <section class="card">
      <h2 class="label">{{ name | capitalize }}</h2>
      <p class="figure">{{ "%.2f → %.2f" | format(now.base, now.finetuned) }}</p>
      <div class="bars" role="img" aria-label="both perplexities as bars">
        <div class="bar before" style="width: {{ bar.before }}%"></div>
        <div class="bar after" style="width: {{ bar.after }}%"></div>
        {% if bar.high %}
        <div class="box" style="left: {{ bar.low }}%; right: {{ 100 - bar.high }}%"></div>
        {% endif %}
      </div>
      <p class="soft">{{ told | replace("->", "→") | capitalize }}.</p>
    </section>
  {% endfor %}
  </div>
  <p class="soft">
    Perplexity: among how many equally likely words the model wavers at each word of the right
    answer, so lower is better. Grey bar: before; blue bar: after; the box around its end: the 95%
    interval of the change.
  </p>

  {% if curve.train %}
  {% set points = curve.train + curve.val %}
  {% set last = points | map(attribute=0) | max %}
  {% set low = points | map(attribute=1) | min %}
  {% set high = points | map(attribute=1) | max %}
  {% set height = high - low or 1 %}
  <h2>Loss while training</h2>
  <p class="soft">
    Nats per token. Pale: training loss of single steps. Strong: its running mean,
    {{ curve.width }} wide.
    {% if curve.val %}
    {% set best = curve.val | min(attribute=1) %}
    Dots: validation loss, at last {{ "%.3f" | format(curve.val[-1][1]) }}, lowest after
    step {{ best[0] }}: {{ "%.3f" | format(best[1]) }}.
    {% endif %}
  </p>
  <div class="card chart soft">
    <span>{{ "%.2f" | format(high) }}</span>
    <span class="low">{{ "%.2f" | format(low) }}</span>
    <div class="plot">
      <svg role="img" aria-label="loss curve">
        <svg viewBox="0 {{ -high }} {{ last }} {{ height }}" preserveAspectRatio="none">
          <path class="single" d="M{% for step, loss in curve.train %}{{ step }},{{ -loss }} {% endfor %}h0"/>
          <path class="mean" d="M{% for step, loss in curve.mean %}{{ step }},{{ -loss }} {% endfor %}h0"/>
        </svg>
        {% for step, loss in curve.val %}
        <circle cx="{{ 100 * step / last }}%" cy="{{ 100 * (high - loss) / height }}%" r="6"/>
        {% endfor %}
      </svg>
    </div>
    <div class="steps"><span>step 0</span><span>step {{ last }}</span></div>
  </div>
  {% endif %}

  <h2>Answers side by side</h2>
  <p class="soft">{{ summary.answers | replace("->", "→") | capitalize }}.</p>
  {% if summary.WARNING %}
  <p class="alarm"><strong>Warning: {{ summary.WARNING }}</strong></p>
  {% endif %}
  {% for each in prompts %}
  <h3 dir="auto">{{ each.prompt }}</h3>
  <div class="pair">
    {% for side, title in sides.items() %}
    <div class="card">
      <h4 class="label">
        {{ title | capitalize }}
        {% if not each[side + "_stopped"] %}
        <span class="alarm">cut at {{ settings.max_new_tokens }} tokens</span>
        {% endif %}
      </h4>
      {% if each[side] %}
      <pre dir="auto">{{ each[side] }}</pre>
      {% else %}
      <p class="soft">(no text)</p>
      {% endif %}
    </div>
    {% endfor %}
    {% if each.reference is not none %}
    <div class="card whole">
      <h4 class="label">Right answer</h4>
      <pre dir="auto">{{ each.reference }}</pre>
    </div>
    {% endif %}
  </div>
  {% endfor %}

  <h2>Settings</h2>
  <details>
    <summary>Options, versions, device</summary>
    <pre>{{ dumps(settings, indent=2, ensure_ascii=False, default=str) }}</pre>
  </details>
</main>
</body>
</html>"""


def write_results(output, results, figures, curve):
    """Write the results as strict JSON and, beside it, as a page: both, or none."""
    bars = {name: draw_bars(group) for name, group in figures.items()}
    template = jinja2.Template(
        PAGE,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = template.render(results, bars=bars, curve=curve, sides=SIDES, dumps=json.dumps)
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    files = {output.with_suffix(".html"): page, output: text}
    with explained(f"can't write {output}", "choose another --output", OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as aside:
            for path, text in files.items():
                Path(aside, path.name).write_text(text + "\n", encoding="utf-8")
            for path in files:
                os.replace(Path(aside, path.name), path)


def plain(text):
    """Text for the terminal: what would steer it, or what it lacks, is shown as code."""
    for letter in set(text):
        steers = unicodedata.category(letter)[0] == "C"
        if steers and letter not in "\u200c\u200d":  # these two join letters
            text = text.replace(letter, ascii(letter)[1:-1])
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def wrap(text, width):
    """The lines of a column of text."""
    lines = []
    for line in text.expandtabs(4).splitlines():
        parts = textwrap.wrap(plain(line), width, break_on_hyphens=False)
        lines += parts or [""]
    return lines


def tell(name, text):
    """Print a line of the summary, what goes beyond 80 columns below its text."""
    lines = textwrap.wrap(
        plain(text),
        width=68,
        break_long_words=False,
        break_on_hyphens=False,
    )
    print(f"{name:12}" + f"\n{'':12}".join(lines))


def print_pairs(pairs):
    """Print each prompt with its two answers in columns that fit the terminal, then the right one.

    They stand one below the other where it is narrow, or where letters are no columns (WIDE).
    """
    columns = max(40, min(shutil.get_terminal_size().columns, 160))
    for number, pair in enumerate(pairs, 1):
        whole = width = columns
        if re.search(WIDE, str(pair)):
            whole = width = columns // 2
        elif columns >= 60:
            width = (columns - 3) // 2

        blocks = []
        for side, title in SIDES.items():
            if not pair[f"{side}_stopped"]:
                title += " (cut)"
            lines = wrap(pair[side] or "(no text)", width)
            blocks.append([title, "-" * width, *lines])
        if width < whole:
            rows = itertools.zip_longest(*blocks, fillvalue="")
            blocks = [[f"{left:{width}} | {right}".rstrip() for left, right in rows]]
        if pair["reference"]:
            lines = wrap(pair["reference"], whole)
            blocks.append(["right answer", "-" * whole, *lines])
        print(*wrap(f"[{number}/{len(pairs)}] {pair['prompt']}", whole), "", sep="\n")
        for block in blocks:
            print(*block, "", sep="\n")


def main(argv=None):
    args = parse_args(argv)
    clear_device_cache(garbage_collection=True)  # in a notebook: what an earlier cell has left
    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel("ERROR")  # offline it reports every retry
    warnings.simplefilter("ignore")  # between the libraries, or of a bootstrap without spread
    if HIDE_BARS:
        transformers.logging.disable_progress_bar()

    folder = Path(args.adapter)
    output = Path(args.output)
    adapter = read_adapter(folder)
    training = {}
    noted = folder / "training_config.json"
    if noted.exists():
        training = read_json(noted, dict, "restore it, or remove it")
    if "embedding_norm" not in training:
        training = {}  # another tool's
    settings = settle(args, adapter, training)
    asked = read_prompts(args.prompts)
    check_output(output)
    records = []
    if args.val_data:
        records = read_jsonl(args.val_data)
        content = Path(args.val_data).read_bytes()
        val_sha256 = hashlib.sha256(content).hexdigest()
        asked = records[: args.val_prompts] + asked
    seen, doubt = count_seen(records, args.val_data, training.get("data"))

    settings["model"] = find_model(settings["model"], folder)
    source = settings["model"]
    if (folder / "tokenizer_config.json").exists():
        source = folder
    with explained(f"can't load the tokenizer of {source}", MODEL_ADVICE):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if not tokenizer.chat_template:
        tell("template", "none in the tokenizer: asked with that of Alpaca")
    frame = chat_frame(tokenizer)
    check_frame(frame, training.get("prompt", {}), source)
    model = load_pair(folder, settings, training)
    base = model.get_base_model()

    context = getattr(base.config.get_text_config(), "max_position_embeddings", 2**20)
    limit = settings["max_seq_length"] or context
    everyday = []
    for question, answer in EVERYDAY:
        everyday.append({"instruction": question, "input": "", "output": answer})
    rows = {"elsewhere": encode_all(everyday, tokenizer, frame, limit, "built in")}
    if records:
        rows["val data"] = encode_all(records, tokenizer, frame, limit, args.val_data)
    prompts = []
    for record in asked:
        row = encode({**record, "output": ""}, tokenizer, frame, None)
        prompts.append(row["input_ids"][: row["prompt_tokens"]])
    check_room(base, prompts, itertools.chain(*rows.values()), context, args.max_new_tokens)
    tell("model", f"{settings['model']} in {settings['precision']}, with {folder} off and on")

    ends = end_ids(base, tokenizer, frame)
    with explained(f"{args.batch_size} prompts at once", "", torch.OutOfMemoryError):
        pairs, seconds, figures = run_both(model, tokenizer, ends, asked, prompts, rows, args)
    for each in figures.values():
        if not math.isfinite(each["base"] + each["finetuned"]):
            advice = "pass --precision fp32, or train with a lower --learning-rate"
            sys.exit(f"error: {folder}: no finite figures; {advice}")

    if records and not doubt:
        doubt = doubt_figures(figures["val data"], val_sha256, training, settings)
    summary = conclude(figures, records, doubt, limit)
    summary.update(seen)
    summary.update(conclude_answers(pairs, seconds, args.repetition_penalty))
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    libraries = ["torch", "transformers", "peft", "bitsandbytes"]
    versions = {name: version(name) for name in libraries}
    results = {
        "summary": summary,
        "prompts": pairs,
        "perplexity": figures.get("val data"),
        "general": figures["elsewhere"],
        "settings": {**settings, "device": device, "versions": versions},
    }
    curve = read_log(folder / "training_log.jsonl")
    write_results(output, results, figures, curve)
    print_pairs(pairs)
    for name, text in summary.items():
        if isinstance(text, str):
            tell(name, text)
    tell("saved", f"{output} and {output.with_suffix('.html')}")
    return {**summary, "perplexity": results["perplexity"], "general": results["general"]}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; stopped")
    except BrokenPipeError:  # the reader, such as head, has left
        os._exit(1)
