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
import unicodedata
import warnings
from collections import namedtuple
from functools import partial
from importlib.metadata import version
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel("ERROR")  # on import it asks for what none needs

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
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

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
BATCH_SIZE = 8  # prompts at once: speed against memory
# output
OUTPUT = "output/eval_results.json"  # the page beside it ends in .html
# ---------------------------------------------------------------------------------------------

QUESTIONS = """What is the difference between a Deployment and a StatefulSet?
How do I find out why a Pod stays Pending?
Write a NetworkPolicy that denies all incoming traffic to a namespace.
What happens when a container exceeds its memory limit?
How do I roll back a Deployment to its previous revision?
Explain the difference between a liveness probe and a readiness probe.
How do I run a job every night at 02:00 in Kubernetes?
What does `terraform plan` do, and why should I read it before `terraform apply`?
How do I keep a Docker image small?
Explain what a Service of type ClusterIP does."""
EVERYDAY = """What is the largest planet? | The largest planet in our solar system is Jupiter.
What is the capital of France? | The capital of France is Paris. It is known for the Eiffel Tower.
What is the opposite of hot? | The opposite of "hot" is "cold".
Who was the first US president? | The first president of the United States was George Washington.
What is the highest mountain? | The highest mountain in the world is Mount Everest, in the Himalayas.
When does water boil? | Water boils at 100 degrees Celsius or 212 degrees Fahrenheit at sea level.
How do vaccines work? | Vaccines work by training the immune system to recognize and fight a disease.
How do bees make honey? | Bees make honey from the nectar that they collect from flowers.
What causes the seasons? | The seasons are caused by the tilt of the Earth's axis as it orbits the Sun.
Write a thank-you note. | Dear [Name], I wanted to take a moment to thank you for your kindness.
How do I boil an egg? | To boil an egg, follow these steps: 1. Fill a pot with enough water to cover the egg.
Translate "thank you" into French. | "Thank you" in French is "merci".
Why is the sky blue? | The sky appears blue because of a phenomenon called Rayleigh scattering.
How does a rainbow form? | A rainbow forms when sunlight is refracted by water droplets in the air.
Why do we dream? | Scientists are still not sure why we dream, but there are several theories.
Tell me a joke. | Why did the scarecrow win an award? Because he was outstanding in his field!
Is a whale a fish? | No, a whale is not a fish. Whales are mammals that live in the ocean.
Who is Sherlock Holmes? | Sherlock Holmes is a fictional detective created by Sir Arthur Conan Doyle.
What do pandas eat? | Pandas are herbivores that feed mainly on bamboo.
What is a mortgage? | A mortgage is a type of loan that is used to finance the purchase of a home."""
VERDICTS = """Better: the right answers surprise the model less than before
No clear difference: it may be chance
Worse: the right answers surprise the model more than before"""
MODEL_ADVICE = (
    "pass a 16-bit model: its folder with config.json, tokenizer.json, model.safetensors or, online,"
    " its Hub name; if a newer transformers saved it, pip install -U transformers"
)
ALPACA_TEMPLATE = (  # for tokenizers that come without a chat template
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "### Instruction:\n{{ message['content'] }}\n\n### Response:\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
Frame = namedtuple("Frame", ["head", "tail", "blank", "end", "special"])  # see chat_frame
ODD = ("R", "AL", "NSM")  # letters from right to left, and marks that take no column
TITLES = {"base": "before", "finetuned": "after", "reference": "right answer"}
HIDE_BARS = not (sys.stderr.isatty() or "ipykernel" in sys.modules)


def parse_args(argv=None):
    if argv is None and "kernel_launcher" in sys.argv[0]:
        argv = []  # pasted into a notebook cell: sys.argv is the kernel's, the constants above decide
    usage, raw = "%(prog)s [options]", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("evaluate.py", usage, __doc__, formatter_class=raw)
    parser.allow_abbrev = False
    switch, path = argparse.BooleanOptionalAction, os.path.expanduser

    def add(flag, default, help, **options):  # help set afterwards: Python 3.10 adds to a switch's
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
    add("--batch-size", BATCH_SIZE, "prompts at once", type=int)
    add("--output", OUTPUT, "JSON file; the page beside it ends in .html", type=path)
    args = parser.parse_args(argv)
    for name, low in ("val_prompts", 0), ("max_new_tokens", 1), ("batch_size", 1):
        if not low <= getattr(args, name) <= 2**20:
            parser.error(f"argument --{name.replace('_', '-')}: must be from {low} to {2**20}")
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
        reason = textwrap.shorten(reason, 200)
        if "out of memory" in reason:
            advice = "lower --batch-size, close other programs or choose a smaller --model"
        sys.exit(f"error: {what}: {reason}; {advice}")


def read_json(path, kind, advice):
    """The list or dict that a JSON file holds."""
    with explained(path, advice):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, kind):
            raise ValueError(f"it holds no JSON {kind.__name__}")
    return value


def read_adapter(folder, args):
    """What to load, {"model", "precision", ...}: as it was trained, where no option is given."""
    advice = "--adapter takes the folder that lora_finetune.py wrote"
    config = read_json(folder / "adapter_config.json", dict, advice)
    if not (folder / "adapter_model.safetensors").is_file():
        sys.exit(f"error: {folder}: no adapter in it, or a pickled one: not opened; {advice}")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        sys.exit(f"error: {folder}: no LoRA, or with trained biases, which stay on; {advice}")
    path = folder / "training_config.json"
    training = read_json(path, dict, advice) if path.exists() else {}
    model = {"model": config.get("base_model_name_or_path")}  # wins: people edit it there
    trained = {"model": None, "precision": "fp16", "load_in_4bit": True, "max_seq_length": None}
    with explained(path, advice):
        for source in training.get("arguments", {}), model, vars(args):
            trained |= {key: source[key] for key in trained if source.get(key) is not None}
    if not isinstance(trained["model"], str):
        sys.exit(f"error: {folder} does not say its base; pass what it was trained on: --model")
    trained["embedding_norm"] = training.get("embedding_norm")
    return trained if torch.cuda.is_available() else trained | {"precision": "fp32"}


def check_output(output, folder, *read):
    """Refuse, before the work, an output that can't be written or would overwrite what is read."""
    read = [*folder.glob("*.json"), *(Path(path) for path in read if path)]
    for path in output, output.with_suffix(".html"):
        if output.suffix != ".json" or path.is_dir() or path.resolve() in map(Path.resolve, read):
            sys.exit(f"error: {path} is read here, or not for writing; --output takes a new .json")
    nearest = next(path for path in output.absolute().parents if path.exists())
    with explained(f"can't write to {nearest}", "choose another --output"):
        tempfile.TemporaryFile(dir=nearest).close()


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


# The same in lora_finetune.py, letter for letter.
def check_folder(name):
    """End the program where a model's folder is not there, or holds something else than a model."""
    folder = Path(name)
    may_be_of_the_hub = name.count("/") <= 1 and "\\" not in name and name[0] not in "./~"
    if not folder.is_dir() and not may_be_of_the_hub:
        sys.exit(f"error: {name}: no folder; pass a model's folder or its Hub name")
    if (folder / "adapter_config.json").exists():
        advice = "pass the model that it was trained on, see base_model_name_or_path in it"
        sys.exit(f"error: {name} is an adapter, no model; {advice}")
    for path in folder.glob("*.safetensors"):
        if path.open("rb").read(19) == b"version https://git":
            sys.exit(f"error: {path} only says where the weights lie; run `git lfs pull` there")


def read_prompts(path):
    """Records without an answer: the questions of a JSON list of strings, or the ten built in."""
    advice = 'it takes a list of questions, ["What is a Pod?", ...]'
    prompts, records = read_json(path, list, advice) if path else QUESTIONS.splitlines(), []
    for number, prompt in enumerate(prompts, 1):
        with explained(f"{path}: item {number}", advice):
            records.append(to_record({"instruction": prompt, "output": "-"}) | {"output": None})
    return records or sys.exit(f"error: {path}: no question in it; {advice}")


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
def load_base(name, device, precision, load_in_4bit):
    """Load a causal language model, its linear layers in NF4 if asked and not quantised already."""
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = dtypes[precision]
    with explained(f"can't load the model {name}", MODEL_ADVICE):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        cause = f"a model of the kind {config.model_type} can't be loaded to write text alone"
        sys.exit(f"error: {name}: {cause}; choose another --model")

    options = {}
    if load_in_4bit and not hasattr(config, "quantization_config"):
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


def load_pair(trained, folder):
    """Load the base and put the adapter on it, checking that the two belong together."""
    name, device = trained["model"], 0 if torch.cuda.is_available() else "cpu"
    base = load_base(name, device, trained["precision"], trained["load_in_4bit"])
    mend(base)
    with explained(f"adapter {folder} does not fit {name}", "pass the --model it was trained on"):
        norm = base.get_input_embeddings().weight[::100].double().norm().item()
        if not math.isclose(norm, trained["embedding_norm"] or norm, rel_tol=1e-5):
            raise ValueError("the base has other token embeddings")
        saved = load_file(folder / "adapter_model.safetensors")
        for key in saved:
            if key.endswith("embed_tokens.weight"):  # may hold tokens that were added
                base.resize_token_embeddings(len(saved[key]), mean_resizing=False)
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        others = saved.keys() ^ peft.get_peft_model_state_dict(model).keys()
        if any("lora_" in key for key in others):
            raise ValueError("its layers are others")
    return model


def encode_all(base, tokenizer, frame, asked, groups, limit, args):
    """Token ids of each question, as in training, and rows of each group; all must fit the model."""
    context = getattr(base.config.get_text_config(), "max_position_embeddings", 2**20)
    limit, encoded = limit or context, {}
    for name, records in groups.items():
        rows = [encode(record, tokenizer, frame, limit) for record in records]
        rows = [row for row in rows if row["targets"]]
        encoded[name] = sorted(rows, key=lambda row: -len(row["input_ids"]))
        if not encoded[name]:
            where = f"{name}, {args.val_data}: no answer within {limit} tokens"
            sys.exit(f"error: {where}; take shorter rows")
    rows = [encode(record | {"output": ""}, tokenizer, frame, 2**30) for record in asked]
    prompts = [row["input_ids"][: row["prompt_tokens"]] for row in rows]
    longest, size = max(map(len, prompts)), len(base.get_input_embeddings().weight)
    if longest + args.max_new_tokens > context:
        room = f"of {longest:,} tokens and its answer are beyond the model's {context:,}"
        sys.exit(f"error: a question {room}; shorten it or --max-new-tokens")
    if max(max(row["input_ids"]) for row in itertools.chain(rows, *encoded.values())) >= size:
        lack = f"the tokenizer has tokens beyond the model's {size:,}"
        sys.exit(f"error: {lack}; pass the --model that the adapter was trained on")
    return prompts, encoded


def generate(model, tokenizer, frame, prompts, args, side):
    """Answer prompts (token ids) greedily: [{side: text, side_stopped: bool, side_tokens: int}]."""
    named = np.atleast_1d(model.generation_config.eos_token_id or []).tolist()
    end_of_turn = tokenizer(frame.end, add_special_tokens=False)["input_ids"][-1:]
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


def perplexity(nll, tokens, axis=-1):
    """exp(sum of NLL / number of tokens), of rows: each token counts alike."""
    return np.exp(nll.sum(axis) / tokens.sum(axis))


def compare(base, finetuned, tokens):
    """Perplexities, their ratio and its interval, from each row's NLL sums (nats) and token count.

    The interval is a 95 % bootstrap (bias-corrected and accelerated, Efron and Tibshirani 1993):
    rows are drawn anew with both their figures, which keeps the pairs.
    """
    difference, interval = finetuned - base, [math.nan]
    if len(tokens) > 1:
        drawn = {"paired": True, "batch": 100, "rng": np.random.default_rng(0)}
        found = scipy.stats.bootstrap((difference, tokens), perplexity, **drawn)
        interval = [float(end) for end in found.confidence_interval]
    return {
        "base": float(perplexity(base, tokens)),
        "finetuned": float(perplexity(finetuned, tokens)),
        "ratio": float(perplexity(difference, tokens)),
        "ratio_ci95": interval if np.isfinite(interval).all() else None,  # where all changed alike
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
            for name, rows in groups.items():  # half as many as prompts: all tokens at once
                parts = list(micro_batches(rows, args.batch_size * len(rows[0]["input_ids"]) // 2))
                bar = tqdm(parts, f"{name}, {TITLES[side]}", disable=HIDE_BARS, leave=False)
                nats = torch.cat([nll_of(part) for part in bar]).double().cpu()
                nats = nats.split([row["targets"] for row in rows])
                nll[name, side] = np.array([row.sum().item() for row in nats])
    tokens = {name: np.array([row["targets"] for row in groups[name]]) for name in groups}
    figures = {n: compare(nll[n, "base"], nll[n, "finetuned"], tokens[n]) for n in groups}
    return answers, seconds, figures


def judge(figures, kind):
    """A comparison to quote, and which of the three VERDICTS fits where its interval lies."""
    low, high = figures["ratio_ci95"] or (0, math.inf)
    ends = " to ".join(f"{end:.3f}" if end < 1000 else ">1000" for end in (low, high))
    interval = f"95% interval {ends}" if high < math.inf else "no interval"
    told = "perplexity {base:.2f} -> {finetuned:.2f} on {rows} {kind} rows, x {ratio:.3f} ({ends})"
    place = 0 if high < 1 else 2 if low > 1 else 1
    return told.format(kind=kind, ends=interval, **figures), place


def conclude(answers, seconds, figures):
    """What people want to know: in sentences, a line each, and in numbers."""
    summary = {"verdict": "No verdict without --val-data: read the answers side by side"}
    if "held out" in figures:
        told, place = judge(figures["held out"], "held-out")
        summary["held out"] = told + ", {rows_improved} of {rows} better".format(
            **figures["held out"]
        )
        summary["verdict"] = VERDICTS.splitlines()[place]
    told, place = judge(figures["elsewhere"], "everyday")
    verdict = "it got worse at other things" if place == 2 else "no damage seen"
    summary["elsewhere"] = f"{told}: {verdict}"
    table = pd.DataFrame(answers)
    tokens = table[["base_tokens", "finetuned_tokens"]]
    changed = int((table["base"] != table["finetuned"]).sum())
    numbers = {"prompts": len(answers), "answers_changed": changed}
    numbers |= table[["base_stopped", "finetuned_stopped"]].sum().to_dict()
    numbers |= tokens.mean().add_prefix("mean_").to_dict()
    numbers["tokens_per_second"] = tokens.to_numpy().sum().item() / seconds
    summary["answers"] = (
        "{answers_changed} of {prompts} changed, {base_stopped} -> {finetuned_stopped} stopped by "
        "themselves, {mean_base_tokens:.0f} -> {mean_finetuned_tokens:.0f} tokens on average, "
        "{tokens_per_second:,.0f} tokens/s".format(**numbers)
    )
    if not changed:
        summary["WARNING"] = "no answer changed, the adapter has no effect. Was it trained enough?"
    return summary | numbers


def clip(answer, tokenizer, limit):
    """An answer as it is shown: its reference is cut where an answer would be."""
    ids = tokenizer(answer["reference"] or "", add_special_tokens=False)["input_ids"]
    cut = {"reference": tokenizer.decode(ids[:limit]), "reference_stopped": False}
    return answer | cut if len(ids) > limit else answer


def read_log(path):
    """Points (step, loss) of a training log: of training, their running mean, of validation."""
    try:
        log = pd.read_json(path, lines=True).astype({"step": int}).set_index("step")
        log = log.reindex(columns=["loss", "eval_loss"]).astype(float)
    except Exception:  # there is none, or another tool's: the page goes without
        return {}
    train, val = log["loss"].dropna(), log["eval_loss"].dropna()
    width, every = len(train) // 10 + 1, len(train) // 1000 + 1  # not all: a page stays small
    mean = train.rolling(width, min_periods=1).mean()
    points = {"train": train[::-every], "mean": mean[::-every], "val": val}  # the last one first
    return {name: list(found.items()) for name, found in points.items()} | {"width": width}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Before and after fine-tuning</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --soft: light-dark(#57606a, #9da7b3);
  --line: light-dark(#d0d7de, #3d444d); --after: light-dark(#0a5cc2, #6cb0ff);
  --alarm: light-dark(#a40e26, #ff9a9a) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: auto; padding: 1rem;
  background: canvas; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h3, h4 { margin: 0 } pre, h3 { white-space: pre-wrap }
pre { font: .85rem/1.5 ui-monospace, monospace; margin: .4rem 0 }
th { text-align: left; vertical-align: top; padding-right: 1rem; white-space: nowrap }
svg { display: block; width: 100%; fill: none; stroke-linecap: round }
.chart { display: grid; grid-template-columns: auto 1fr auto; gap: 0 .5rem; max-width: 44rem }
.chart svg { grid-area: 1 / 2 / 3 / 4; overflow: visible; outline: 1px solid var(--line) }
.chart :nth-child(3) { align-self: end } .soft { color: var(--soft) } .cut { color: var(--alarm) }
path { stroke: var(--after); vector-effect: non-scaling-stroke }
.dots { stroke: var(--alarm); stroke-width: 10 }
.pair { display: grid; gap: 1rem; margin: .5rem 0 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)) }
.pair > div { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem }
.pair > :nth-child(3) { grid-column: 1 / -1 }
</style></head><body><main><h1>{{ summary.verdict }}.</h1><table>
{% for name, value in summary.items() if value is string and name != "verdict" %}
<tr><th scope="row">{{ name }}<td>{{ value|replace("->", "→") }}
{% set now = {"held out": perplexity, "elsewhere": general}[name] %}{% if now %}
{% set low, high = now.ratio_ci95 or (0, 0) %}{% set top = [1, now.ratio]|max * 1.1 %}
{% set unit = 99 / top %}
<svg height="34" role="img" aria-label="both perplexities as bars">
<rect width="{{ unit }}%" height="12" fill="var(--soft)"/>
<rect width="{{ unit * now.ratio }}%" y="16" height="12" fill="var(--after)"/>
<rect x="{{ unit * low }}%" width="{{ unit * ([high, top]|min - low) }}%" y="13" height="18"
 stroke="currentColor"/></svg>{% endif %}{% endfor %}</table>
<p class="soft">Perplexity: among how many equally likely words the model wavers at each word of
the right answer, so lower is better. Grey bar: before; blue: after; the box around its end: the
95% interval of the change.</p>{% if train %}{% set points = train + val %}
{% set low, high = points|map(attribute=1)|min, points|map(attribute=1)|max %}
{% set last = points|map(attribute=0)|max %}<h2>Loss while training</h2>
<p class="soft">Nats per token. Pale: training loss of single steps. Strong: its running mean,
{{ width }} wide.{% if val %} {% set best = val|min(attribute=1) %}Dots: validation loss, at last
{{ "%.3f" % val[-1][1] }}, lowest after step {{ best[0] }}: {{ "%.3f" % best[1] }}.{% endif %}</p>
<div class="chart soft"><span>{{ "%.2f" % high }}</span>
<svg height="200" preserveAspectRatio="none" role="img" aria-label="loss curve"
 viewBox="0 {{ -high }} {{ last }} {{ high - low or 1 }}">
<path d="M{% for step, loss in train %}{{ step }},{{ -loss }} {% endfor %}h0" opacity=".5"/>
<path d="M{% for step, loss in mean %}{{ step }},{{ -loss }} {% endfor %}h0" stroke-width="3"/>
<path d="{% for step, loss in val %}M{{ step }},{{ -loss }}h0{% endfor %}" class="dots"/></svg>
<span>{{ "%.2f" % low }}</span><span></span><span>step 0</span><span>step {{ last }}</span></div>
{% endif %}<h2>Answers side by side</h2>
{% for result in prompts %}<h3 dir="auto">{{ result.prompt }}</h3><div class="pair">
{% for side, title in titles.items() if result[side] is not none %}<div><h4>{{ title|capitalize }}
{% if result[side + "_stopped"] is false %}
<span class="cut">cut at {{ settings.max_new_tokens }} tokens</span>{% endif %}</h4>
<pre dir="auto">{{ result[side] }}</pre></div>{% endfor %}</div>{% endfor %}
<details><summary>Settings</summary><pre>{{ settings|tojson(2) }}</pre></details>
</main></body></html>"""


def write_results(output, results, shown, log):
    """Write the results as strict JSON and, beside it, as a page; its template escapes texts."""
    page = jinja2.Template(PAGE, autoescape=True, trim_blocks=True)
    page = page.render(results | log | {"prompts": shown, "titles": TITLES})
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    files = {output.with_suffix(".html"): page, output: text}
    with explained(f"can't write {output}", "choose another --output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as aside:
            for path, text in files.items():
                Path(aside, path.name).write_text(text + "\n", encoding="utf-8")
            for path in files:
                os.replace(Path(aside, path.name), path)


def plain(text):
    """Text for the terminal: what would steer it, or what it lacks, is shown as code."""
    steering = {c for c in text if unicodedata.category(c)[0] == "C"} - set("\u200c\u200d")
    text = text.translate({ord(c): ascii(c)[1:-1] for c in steering})
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def wrap(text, width):
    """The lines of a column of text."""
    lines = map(plain, text.expandtabs(4).splitlines())
    split = partial(textwrap.wrap, width=width, break_on_hyphens=False)
    return [part for line in lines for part in split(line) or [""]]


def tell(line):
    """Print a line, what does not fit the terminal below its text."""
    columns = max(40, shutil.get_terminal_size().columns)
    whole = {"break_long_words": False, "break_on_hyphens": False}
    print(textwrap.fill(plain(line), columns, subsequent_indent=" " * 12, **whole))


def print_side_by_side(prompts):
    """Print each prompt with its two answers in columns that fit the terminal, then the reference.

    They stand one below the other where it is narrow, or where letters may take two columns, none,
    or run from right to left.
    """
    columns = max(40, min(shutil.get_terminal_size().columns, 160))
    for number, result in enumerate(prompts, 1):
        texts = {side: result[side] for side in TITLES if result[side] is not None}
        odd = any(
            unicodedata.east_asian_width(c) in "FW" or unicodedata.bidirectional(c) in ODD
            for c in "".join([result["prompt"], *texts.values()])
        )
        whole = columns // 2 if odd else columns
        width = whole if odd or columns < 60 else (whole - 3) // 2
        blocks = []
        for side, text in texts.items():
            title = TITLES[side] + " (cut)" * (not result.get(f"{side}_stopped", True))
            size = whole if side == "reference" else width
            blocks.append([title, "-" * size, *wrap(text, size)])
        if width < whole:
            pairs = itertools.zip_longest(*blocks[:2], fillvalue="")
            blocks[:2] = [[f"{left:{width}} | {right}".rstrip() for left, right in pairs]]
        blocks.insert(0, wrap(f"[{number}/{len(prompts)}] {result['prompt']}", whole))
        print(*("\n".join(block) + "\n" for block in blocks), sep="\n")


def main(argv=None):
    args = parse_args(argv)
    clear_device_cache(garbage_collection=True)  # in a notebook: what an earlier cell has left
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # between the libraries, or of a bootstrap without spread
    if HIDE_BARS:
        transformers.logging.disable_progress_bar()

    folder, output = Path(args.adapter), Path(args.output)
    trained = read_adapter(folder, args)
    held_out = read_jsonl(args.val_data) if args.val_data else []
    asked = held_out[: args.val_prompts] + read_prompts(args.prompts)
    check_output(output, folder, args.prompts, args.val_data)

    source = folder if (folder / "tokenizer_config.json").exists() else trained["model"]
    with explained(f"can't load the model {source}", MODEL_ADVICE):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    frame = chat_frame(tokenizer)
    model = load_pair(trained, folder)
    pairs = [line.split(" | ") for line in EVERYDAY.splitlines()]
    groups = {"held out": held_out} if held_out else {}
    groups["elsewhere"] = [{"instruction": q, "input": "", "output": a} for q, a in pairs]
    base, max_length = model.get_base_model(), trained["max_seq_length"]
    prompts, groups = encode_all(base, tokenizer, frame, asked, groups, max_length, args)
    tell(f"model       {trained['model']} in {trained['precision']}, with {folder} off and on")
    tell(f"prompts     {len(asked)} <- {args.val_data or 'no rows'}, {args.prompts or 'built in'}")
    with explained(f"{args.batch_size} prompts at once", "", torch.OutOfMemoryError):
        answers, seconds, figures = run_both(model, tokenizer, frame, asked, prompts, groups, args)
    if not math.isfinite(sum(each["base"] + each["finetuned"] for each in figures.values())):
        sys.exit(f"error: {folder}: no finite figures; train with a lower --learning-rate")

    results = {"summary": conclude(answers, seconds, figures), "prompts": answers}
    results |= {"perplexity": figures.get("held out"), "general": figures["elsewhere"]}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: version(name) for name in "torch transformers peft bitsandbytes".split()}
    results["settings"] = vars(args) | trained | {"device": device, "versions": versions}
    shown = [clip(answer, tokenizer, args.max_new_tokens) for answer in answers]
    write_results(output, results, shown, read_log(folder / "training_log.jsonl"))
    print_side_by_side(shown)
    for name, text in results["summary"].items():
        if isinstance(text, str):
            tell(f"{name:12}{text}")
    tell(f"saved       {output} and {output.with_suffix('.html')}")
    return results["summary"] | {key: results[key] for key in ("perplexity", "general")}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing was written")
    except BrokenPipeError:  # the reader, such as head, has left; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
