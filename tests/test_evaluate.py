"""What evaluate.py says of a base model and its adapter is true, and safe to open."""

import collections
import contextlib
import functools
import html.parser
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import offline_model
import peft
import pytest
import scipy.stats
import torch
from conftest import largest_file, without_privileges
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

import evaluate
import lora_finetune

ASKED = ["What is a Pod?", "Name a Service, please.", "Why?"]
SIDES = ["base", "finetuned"]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NOTED = "training_config.json"
LOG = "training_log.jsonl"
HOSTILE = (
    "<script>window.pwned = 1</script><img src=http://evil.example/x.png onerror=window.pwned=2>"
    "</pre></div></details><svg onload=window.pwned=3><iframe src=https://evil.example/></iframe>"
    '"><b onmouseover="window.pwned=4">&lt;&amp;{{ 7 * 7 }}'
)
STEERING = "\x1b[2Ja\x1b]0;title\x07b\x9b1mc\rd\x08e\u202ef\u200bg\x00h\ti\x7f"
CODE = "Write\n```yaml\nkind: Pod\nspec:\n    - name: a\n\n      port: 80\n```\nand apply it."
PICKLE = b"cos\nmkdir\n(S'exploded'\ntR."  # run, these two leave a trace
CODE_RUNS = b"open('exploded', 'w')"


# ---------------------------------------------------------------------------------------------
# Rows and files


def records_of(things):
    """Rows of one kind, some with an input, of several lengths."""
    records = []
    for n, thing in enumerate(things):
        output = f"A {thing} is thing number {n}." + " Really." * n
        given = ""
        if n % 3 == 0:
            given = "In one line."
        records.append({"instruction": f"What is a {thing}?", "input": given, "output": output})
    return records


HELD_OUT = records_of(["Pod", "Service", "Node", "Ingress", "Secret", "Volume", "Job", "Probe"])
TRAINED = records_of(["Label", "Taint", "Quota", "Helm", "Role", "Zone", "Chart", "Image"])
EVERYDAY = [
    {"instruction": question, "input": "", "output": answer}
    for question, answer in evaluate.EVERYDAY
]


def question_of(record):
    """What is asked: the instruction and, a blank line below, the input."""
    return f"{record['instruction']}\n\n{record['input']}".strip()


def write(path, value):
    """Write a value as JSON, or the values of a list as JSON Lines, by the name of the file."""
    values = [value]
    if path.suffix == ".jsonl":
        values = value
    lines = []
    for each in values:
        if not isinstance(each, bytes):
            each = json.dumps(each).encode()
        lines.append(each + b"\n")
    path.write_bytes(b"".join(lines))
    return path


def read(path):
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def change(path, **values):
    """Set keys of a JSON file."""
    content = {}
    if path.exists():
        content = read(path)
    content.update(values)
    write(path, content)


def copy(folder, new):
    """A copy of a folder: its path."""
    return Path(shutil.copytree(folder, new))


def contents(folder):
    """Each file under a folder, and what it holds."""
    held = {}
    for path in Path(folder).rglob("*"):
        if path.is_file():
            held[path] = path.read_bytes()
    return held


# ---------------------------------------------------------------------------------------------
# What evaluate.py writes and prints


class Page(html.parser.HTMLParser):
    """What a browser would build: tags with their attributes, and the text inside of each tag."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.tags = []  # (name, attributes), in order
        self.open = collections.Counter()  # how many of each are open
        self.inside = collections.defaultdict(str)  # name: text
        self.feed(self.source)
        self.names = {name for name, _ in self.tags}
        self.text = self.inside["main"]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open[tag] += 1

    def handle_endtag(self, tag):
        self.open[tag] -= 1

    def handle_data(self, data):
        for tag, depth in self.open.items():
            if depth > 0:
                self.inside[tag] += data

    def attributes_of(self, name):
        """The attributes of each tag of this name."""
        return [attributes for tag, attributes in self.tags if tag == name]

    def has_curve(self):
        """Whether it shows a loss curve."""
        labels = [attributes.get("aria-label", "") for _, attributes in self.tags]
        return any("loss" in label for label in labels)


def run(folder, *flags):
    """What evaluate.main writes, prints and returns."""
    output = folder / "out/results.json"
    arguments = [str(flag) for flag in flags]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        returned = evaluate.main([*arguments, "--output", str(output)])

    text = output.read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    return SimpleNamespace(
        data=data,
        summary=data["summary"],
        answers=data["prompts"],
        figures=data["perplexity"],
        general=data["general"],
        settings=data["settings"],
        page=Page(output.with_suffix(".html")),
        out=printed.getvalue(),
        returned=returned,
        flags=flags,
    )


def short(value):
    """A name of a test's case that is not too long."""
    return ascii(value)[:30]


def squeezed(text):
    """The text without its blanks and line ends."""
    return re.sub(r"\s", "", text)


def shows(out, text):
    """Whether the screen shows a text, wherever its lines are broken."""
    return squeezed(text) in squeezed(out)


def tells(text, *values):
    """Whether each of the values stands in the text, rounded to two places or more."""
    told = [float(figure) for figure in re.findall(r"\d+\.\d\d+", text)]
    for value in values:
        differences = [abs(figure - value) for figure in told]
        if min(differences, default=1) >= 0.006:
            return False
    return True


# ---------------------------------------------------------------------------------------------
# The same by plain transformers and peft


def plain_model(base, adapter=None, in_4bit=True):
    """A base model, and an adapter on it if one is given."""
    options = {"dtype": torch.float32, "device_map": {"": "cpu"}}
    if in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a kernel that rounds to bfloat16
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return model.eval()


def plain_prompt(tokenizer, question):
    """A question as the chat template asks it."""
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def ids_of(tokenizer, text):
    """The token ids of a text as it stands."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def plain_perplexity(model, tokenizer, records):
    """exp of the mean NLL over answer + </s>, one row at a time: (figure, tokens)."""
    nll = 0.0
    tokens = 0
    for record in records:
        prompt = plain_prompt(tokenizer, question_of(record))
        start = len(ids_of(tokenizer, prompt))
        ids = ids_of(tokenizer, prompt + record["output"] + "</s>")
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        log_p = logits.double().log_softmax(-1)
        for position in range(start, len(ids)):
            nll -= log_p[position - 1, ids[position]].item()
            tokens += 1
    return math.exp(nll / tokens), tokens


def plain_answer(model, tokenizer, question, **options):
    """The greedy answer, of at most 24 tokens."""
    ids = ids_of(tokenizer, plain_prompt(tokenizer, question))
    output = model.generate(
        input_ids=torch.tensor([ids]),
        max_new_tokens=24,
        do_sample=False,
        **options,
    )
    answer = output[0].tolist()[len(ids) :]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------
# Adapters made by hand


def write_adapter(base, folder, strength=0.0, **changes):
    """A LoRA folder by peft alone: no other file; without strength it has no effect."""
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], **changes}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_A" not in name:
            weight.data += strength * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


END_OF_TURN = {"bare": "</s>", "zephyr": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}


def write_parrot(folder, answers, after=None, template="zephyr"):
    """Write a model that says what is wanted, and an adapter that changes some answers.

    answers is {token at the end of a prompt: tokens of the answer}; a token stated twice is said
    for ever. after is {token at the end of a prompt: token of the adapter's answer}.
    Embeddings are unit vectors, layers add nothing, and the head maps each token to its follower.
    In the template "bare" the prompt is the question and no more.
    """
    # what follows each token
    after = after or {}
    end = END_OF_TURN[template]
    follower = dict.fromkeys(after.values(), end)
    for token, answer in answers.items():
        for following in [*answer, end]:
            follower.setdefault(token, following)
            token = following

    # a tokenizer that knows them all
    base = folder / "base"
    if template == "bare":
        offline_model.write_tiny(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    else:
        offline_model.write_tiny(base, template=template)
        tokenizer = AutoTokenizer.from_pretrained(base)
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in follower if token not in known])
    tokenizer.save_pretrained(base)
    id_of = tokenizer.convert_tokens_to_ids

    # the base
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 8192
    for name, weight in model.named_parameters():
        if re.search("embed|lm_head|o_proj|down_proj", name):
            weight.data.zero_()
    embeddings = model.get_input_embeddings().weight.data
    head = model.lm_head.weight.data
    for n, token in enumerate(follower):
        embeddings[id_of(token), n] = 1
        head[id_of(follower[token]), n] = 1
    model.save_pretrained(base)

    # the adapter
    config = peft.LoraConfig(r=1, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    lora = model.get_output_embeddings()
    lora_a = lora.lora_A["default"].weight.data
    lora_b = lora.lora_B["default"].weight.data
    lora_a.zero_()
    for question, token in after.items():
        lora_a[0] += embeddings[id_of(question)]
        lora_b[id_of(token), 0] = 10
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter"


# ---------------------------------------------------------------------------------------------
# Adapters and evaluations that many tests look at


@pytest.fixture(scope="module")
def tokenizer(tiny):
    """The tokenizer of the tiny model."""
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """An adapter that changes answers, and beside it questions and held-out rows."""
    folder = tmp_path_factory.mktemp("home")
    write(folder / "asked.json", ASKED)
    write(folder / "data.jsonl", TRAINED)
    write(folder / "val.jsonl", HELD_OUT)

    flags = ["--model", tiny, "--output", folder / "adapter"]
    flags += ["--dataset", folder / "data.jsonl", "--val-data", folder / "val.jsonl"]
    flags += ["--max-steps", 8, "--learning-rate", 0.02]
    flags += ["--batch-size", 6, "--gradient-accumulation-steps", 1]
    lora_finetune.main([str(flag) for flag in flags])
    return folder / "adapter"


@pytest.fixture(scope="module")
def asked(adapter):
    """A file of three questions."""
    return adapter.parent / "asked.json"


@pytest.fixture(scope="module")
def val(adapter):
    """A file of the rows held out."""
    return adapter.parent / "val.jsonl"


@pytest.fixture(scope="module")
def plain_models(tiny, adapter):
    """The tiny model before and after, as plain transformers and peft load it."""
    return {"base": plain_model(tiny), "finetuned": plain_model(tiny, adapter)}


@pytest.fixture
def moved(adapter, tmp_path):
    """A copy of the adapter, to be changed."""
    return copy(adapter, tmp_path / "moved")


@pytest.fixture
def quick(adapter, asked, tmp_path):
    """A function: what an evaluation of three short answers, and of rows, gives."""

    def evaluated(*flags, adapter=adapter, rows=None, tokens=2):
        chosen = ["--adapter", adapter, "--prompts", asked, "--max-new-tokens", tokens]
        if rows:
            val = write(tmp_path / "v.jsonl", rows)
            chosen += ["--val-data", val, "--val-prompts", 0]
        return run(tmp_path, *chosen, *flags)

    return evaluated


@pytest.fixture
def refused(quick, tmp_path):
    """A function: the line in which a quick evaluation ends; it leaves no results."""

    def line(*flags, **options):
        with pytest.raises(SystemExit) as end:
            quick(*flags, **options)
        assert re.fullmatch("error: .*; .*", end.value.code)  # what happened, what to do
        assert not (tmp_path / "out").exists()
        return end.value.code

    return line


@pytest.fixture(scope="module")
def results(adapter, asked, val, tmp_path_factory):
    """A whole evaluation: three questions and, before them, two that were held out."""
    flags = ["--adapter", adapter, "--val-data", val, "--prompts", asked]
    flags += ["--val-prompts", 2, "--max-new-tokens", 24]
    return run(tmp_path_factory.mktemp("results"), *flags)


ANSWERS = {
    "[code]": CODE,
    "[long]": "x" * 300,
    "[wide]": "部署🚀" * 30,
    "[marks]": "e\u0301" * 100,
    "[vowels]": "के" * 100,
    "[steering]": STEERING,
    "[hostile]": HOSTILE,
    "[two]": "the first answer",
    "[endless]": "and",
}
REFERENCES = {  # of rows held out; the first five of them are asked
    "[code]": CODE,
    "[hostile]": HOSTILE,
    "[steering]": STEERING,
    "[long]": "Begin, " + "and so on, " * 200 + "and end.",
    "[wide]": "始" + "部署" * 400 + "終",
    "[two]": "not asked: the sixth row",
}
TIMES_SHOWN = 5 + 9 + 2 * 2 + 1  # HOSTILE: questions held out, others, answers, a reference


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """An evaluation of which each answer is known, with hostile text wherever text can be."""
    folder = tmp_path_factory.mktemp("parrot")
    answers = {question: [answer] for question, answer in ANSWERS.items()}
    answers["[endless]"] = ["and", "z", "z"]
    after = {"[two]": "the second answer"}
    adapter = write_parrot(folder, answers, after, template="bare")

    asked = [f"{HOSTILE} {STEERING} say {question}" for question in ANSWERS]
    prompts = write(folder / '"><script>window.pwned = 5<!--.json', asked)
    rows = []
    for question, reference in REFERENCES.items():
        row = {"instruction": f"{HOSTILE} {STEERING}", "input": question, "output": reference}
        rows.append(row)
    val = write(folder / "val.jsonl", rows)

    flags = ["--adapter", adapter, "--val-data", val, "--prompts", prompts]
    flags += ["--no-load-in-4bit", "--max-new-tokens", 50]
    return run(folder, *flags)


@pytest.fixture
def model_inputs(monkeypatch):
    """What the model is to answer from now on: (token ids, mask) of each prompt."""
    inputs = []
    generate = LlamaForCausalLM.generate

    def watch(self, input_ids, attention_mask):
        inputs.extend(zip(input_ids.tolist(), attention_mask.tolist(), strict=True))
        return generate(self, input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(LlamaForCausalLM, "generate", watch)
    return inputs


# ---------------------------------------------------------------------------------------------
# Answers and figures


@pytest.mark.parametrize("side", SIDES)
def test_figures_are_those_of_plain_peft(side, results, plain_models, tokenizer):
    model = plain_models[side]

    groups = [(results.figures, HELD_OUT), (results.general, EVERYDAY)]
    for figures, records in groups:
        figure, tokens = plain_perplexity(model, tokenizer, records)
        assert figures[side] == pytest.approx(figure, rel=1e-5)
        assert figures["tokens"] == tokens
        assert figures["rows"] == len(records)


@pytest.mark.parametrize("side", SIDES)
def test_answers_are_those_of_plain_peft(side, results, plain_models, tokenizer):
    model = plain_models[side]

    for answer in results.answers:
        assert answer[side] == plain_answer(model, tokenizer, answer["prompt"])
    assert results.summary["answers_changed"] == 5


FOREIGN = {
    "other layers": {"target_modules": ["q_proj", "down_proj"]},
    "all layers, other scale": {"target_modules": "all-linear", "use_rslora": True},
    "DoRA": {"use_dora": True},
    "biases of its own": {"lora_bias": True},
    "head": {"target_modules": ["v_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "a layer trained whole": {"modules_to_save": ["lm_head"]},
    "embeddings trained whole": {"modules_to_save": ["embed_tokens"]},
    "a few tokens": {"trainable_token_indices": [5, 6, 7]},
    "one layer": {"layers_to_transform": [1]},
    "ranks": {"rank_pattern": {"q_proj": 8}},
    "normal start": {"init_lora_weights": "gaussian"},
    "plain weights": {},
    "orthogonal start, plain weights": {"init_lora_weights": "orthogonal"},
    "DoRA, plain weights": {"use_dora": True},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_adapters_of_other_tools_have_plain_figures(kind, tiny, tokenizer, tmp_path, quick):
    folder = write_adapter(tiny, tmp_path / "adapter", strength=0.2, **FOREIGN[kind])
    written = {path.name for path in folder.iterdir()}
    assert written <= {"README.md", CONFIG, WEIGHTS}  # nothing tells how it was trained
    in_4bit = not kind.endswith("plain weights")
    flags = []
    if not in_4bit:
        flags = ["--no-load-in-4bit"]

    got = quick(*flags, adapter=folder, rows=HELD_OUT)

    assert len(got.answers) == 3
    assert got.settings["load_in_4bit"] == in_4bit
    sides = {"base": None, "finetuned": folder}
    for side, put_on in sides.items():
        model = plain_model(tiny, put_on, in_4bit)
        figure, _ = plain_perplexity(model, tokenizer, HELD_OUT)
        assert got.figures[side] == pytest.approx(figure, rel=1e-5)
    assert abs(got.figures["ratio"] - 1) > 1e-5
    assert "rows_seen" not in got.summary
    assert not got.page.has_curve()


ASKS_FOR = [  # in the base's generation_config.json
    {"num_beams": 3},
    {"no_repeat_ngram_size": 2},
    {"return_dict_in_generate": True, "output_scores": True},
    {"min_new_tokens": 10},
    {"bad_words_ids": [[n] for n in range(3, 200)]},
    {"suppress_tokens": list(range(3, 200))},
    {"max_time": 0.0001},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 3},
    {"do_sample": True, "temperature": 9.0},
    {"repetition_penalty": 1.8},
    {"stop_strings": ["a", "e"]},
    {"sequence_bias": [[[20], -10.0]]},
    {"num_return_sequences": 2, "num_beams": 2},
    {"forced_eos_token_id": 5},
]


@pytest.mark.parametrize("config", ASKS_FOR, ids=short)
def test_answers_are_greedy_whatever_the_base_asks_for(config, results, tiny, tmp_path, quick):
    base = copy(tiny, tmp_path / "base")
    change(base / "generation_config.json", **config)

    got = quick("--model", base, tokens=24)

    assert got.answers == results.answers[2:]


@pytest.mark.parametrize("side", SIDES)
def test_a_repetition_penalty_holds_for_both_sides_and_is_named(
    side, quick, results, plain_models, tokenizer
):
    got = quick("--repetition-penalty", 1.5, tokens=24)

    assert got.settings["repetition_penalty"] == 1.5
    assert "repetition penalty 1.5" in got.summary["answers"]
    assert "penalty" not in results.out
    model = plain_models[side]
    expected = []
    for answer in got.answers:
        question = answer["prompt"]
        expected.append(plain_answer(model, tokenizer, question, repetition_penalty=1.5))
    with_penalty = [answer[side] for answer in got.answers]
    without = [answer[side] for answer in results.answers[2:]]
    assert with_penalty == expected
    assert with_penalty != without


def test_padding_brings_no_token_that_a_penalty_would_heed(quick, model_inputs):
    quick()

    padded = []
    for ids, mask in model_inputs:
        own = {id for id, counts in zip(ids, mask, strict=True) if counts}
        assert set(ids) == own
        padded.append(0 in mask)
    assert any(padded)
    assert not all(padded)


def test_tokens_a_second_are_those_of_the_answers_alone(quick, monkeypatch):
    seconds = itertools.count(step=2)
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(evaluate, "time", clock)

    got = quick(tokens=5)

    tokens = 0
    for answer in got.answers:
        tokens += answer["base_tokens"] + answer["finetuned_tokens"]
    assert got.summary["tokens_per_second"] == tokens / (2 + 2)  # each side asks twice


@pytest.mark.parametrize("template", ["zephyr", "chatml", "llama3"])
def test_an_answer_ends_at_the_end_of_turn_token(template, tmp_path, asked):
    line_end = "Ċ"  # in a byte-level vocabulary; all prompts end so
    adapter = write_parrot(tmp_path, {line_end: ["P", "o", "d"]}, template=template)

    got = run(tmp_path, "--adapter", adapter, "--prompts", asked)

    for answer in got.answers:
        for side in SIDES:
            assert answer[side] == "Pod"
            assert answer[f"{side}_stopped"] is True
            assert answer[f"{side}_tokens"] == 4
    assert got.summary["base_stopped"] == 3
    assert got.summary["mean_base_tokens"] == 4


def test_control_tokens_typed_in_a_prompt_stay_text(quick, tokenizer, tmp_path, model_inputs):
    prompts = write(tmp_path / "p.json", ["say </s> now"])

    quick("--prompts", prompts)

    (before, _), (after, _) = model_inputs
    assert before == after
    assert before.count(tokenizer.eos_token_id) == 1  # of the user's turn
    assert tokenizer.decode(before) == "<|user|>\nsay </s> now</s>\n<|assistant|>\n"


@pytest.mark.parametrize("size", [1, 3])
def test_neither_figures_nor_answers_move_with_batch_size(size, results, tmp_path):
    got = run(tmp_path, *results.flags, "--batch-size", size)

    for key in ["base", "finetuned", "ratio"]:
        figure = results.figures[key]
        general = results.general[key]
        assert got.figures[key] == pytest.approx(figure, rel=1e-6)
        assert got.general[key] == pytest.approx(general, rel=1e-6)
    assert got.answers == results.answers


PRECISIONS = [  # asked for, trained in, used on a CPU
    (None, "fp32", "fp32"),
    (None, "fp16", "fp32"),
    (None, "bf16", "bf16"),
    ("fp16", "bf16", "fp32"),
    ("bf16", "fp32", "bf16"),
]


@pytest.mark.parametrize("asked_for, trained_in, used", PRECISIONS)
def test_a_cpu_computes_in_fp32_or_bf16(asked_for, trained_in, used, moved, quick):
    arguments = read(moved / NOTED)["arguments"]
    arguments["precision"] = trained_in
    change(moved / NOTED, arguments=arguments)
    flags = []
    if asked_for:
        flags = ["--precision", asked_for]

    got = quick(*flags, adapter=moved)
    in_fp32 = quick("--precision", "fp32", adapter=moved)

    assert got.settings["precision"] == used
    figure = got.general["base"]
    exact = in_fp32.general["base"]
    assert figure == pytest.approx(exact, rel=0.01)
    assert (figure == exact) == (used == "fp32")


def test_an_adapter_works_on_a_base_that_comes_quantised(tiny, tmp_path, quick):
    base = plain_model(tiny)
    base.save_pretrained(tmp_path / "base-bnb-4bit")

    got = quick("--model", tmp_path / "base-bnb-4bit")
    whole = quick("--no-load-in-4bit")

    for side in SIDES:
        assert got.general[side] == pytest.approx(whole.general[side], rel=0.02)


# ---------------------------------------------------------------------------------------------
# Ratio, interval and verdict


def test_compare_equals_figures_worked_out_by_hand():
    base = np.array([4.0, 6.0, 2.0])  # nats of three rows
    finetuned = np.array([2.0, 7.0, 1.0])
    tokens = np.array([2, 5, 1])

    figures = evaluate.compare(base, finetuned, tokens)

    assert figures["base"] == pytest.approx(math.exp(12 / 8))
    assert figures["finetuned"] == pytest.approx(math.exp(10 / 8))
    assert figures["ratio"] == pytest.approx(math.exp(-2 / 8))
    assert figures["tokens"] == 8
    assert figures["rows"] == 3
    assert figures["rows_improved"] == 2
    low, high = figures["ratio_ci95"]
    assert low <= figures["ratio"] <= high


@pytest.mark.parametrize("rows", [1, 5])
def test_one_row_or_rows_that_changed_alike_get_no_invented_interval(rows):
    base = np.full(rows, 4.0)
    finetuned = np.full(rows, 2.0)
    tokens = np.full(rows, 2)

    figures = evaluate.compare(base, finetuned, tokens)

    ratio = math.exp(-1)
    interval = figures["ratio_ci95"]
    assert figures["ratio"] == pytest.approx(ratio)
    assert interval is None or interval == pytest.approx([ratio, ratio])


def test_interval_covers_the_truth_near_its_nominal_rate(monkeypatch):
    fast = functools.partial(scipy.stats.bootstrap, n_resamples=800)
    monkeypatch.setattr(scipy.stats, "bootstrap", fast)
    random = np.random.default_rng(7)

    truth = math.exp(-0.1)  # the rows change by -0.1 nats a token on the whole
    covered = 0
    for _ in range(200):
        tokens = random.integers(5, 80, 40)
        base = tokens * random.gamma(4, 0.5, 40)
        finetuned = base + tokens * random.normal(-0.1, 0.3, 40)
        low, high = evaluate.compare(base, finetuned, tokens)["ratio_ci95"]
        assert low < high
        covered += low <= truth <= high
    assert 0.88 <= covered / 200 <= 0.99


VERDICTS = {  # another adapter than the trained one, rows, word
    "trained": (None, 8, "better"),
    "noise": ({"strength": 2, "target_modules": ["lm_head"]}, 8, "worse"),
    "chance": ({"strength": 0.5}, 4, "no clear difference"),
    "without effect": ({"strength": 0}, 8, "no clear difference"),
    "one row": (None, 1, "no clear difference"),
}


@pytest.fixture(scope="module", params=VERDICTS)
def judged(request, adapter, asked, tiny, tmp_path_factory):
    """One of VERDICTS, by its name, and its evaluation: (name, what run gives)."""
    changes, rows, _ = VERDICTS[request.param]
    folder = tmp_path_factory.mktemp("judged")
    if changes:
        adapter = write_adapter(tiny, folder / "adapter", **changes)
    val = write(folder / "val.jsonl", HELD_OUT[:rows])
    flags = ["--adapter", adapter, "--prompts", asked, "--val-data", val]
    return request.param, run(folder, *flags, "--max-new-tokens", 8)


def test_verdicts_claim_no_more_than_intervals(judged):
    name, got = judged
    verdict = got.summary["verdict"]

    words = ["better", "worse", "no clear difference"]
    told = [word for word in words if word in verdict.lower()]
    _, _, expected = VERDICTS[name]
    assert told == [expected]
    assert verdict in got.page.text
    assert shows(got.out, verdict)


def test_damage_elsewhere_is_told_where_the_interval_says_so(judged):
    _, got = judged
    general = got.general
    line = got.summary["elsewhere"]

    hurt = False
    if general["ratio_ci95"]:
        low, _ = general["ratio_ci95"]
        hurt = low > 1
    assert ("worse" in line) == hurt
    assert ("no damage" in line) == (not hurt)
    assert shows(got.out, "elsewhere" + line)
    figures = [general["base"], general["finetuned"], general["ratio"]]
    assert tells(line, *figures)
    assert tells(got.page.text, *figures)
    assert tells(got.page.text, got.figures["base"])


def test_an_adapter_without_effect_is_warned_of(judged):
    name, got = judged

    changed = got.summary["answers_changed"]
    ratios = {got.figures["ratio"], got.general["ratio"]}
    if name == "without effect":
        assert changed == 0
        assert ratios == {1}
        assert "WARNING" in got.out
    else:
        assert changed > 0
        assert ratios != {1}
        assert "WARNING" not in got.out


def test_five_rows_held_out_are_asked_or_as_many_as_there_are(judged):
    name, got = judged
    _, rows, _ = VERDICTS[name]

    assert len(got.answers) == min(rows, 5) + len(ASKED)


def shouted(record):
    """The same in capitals, with other blanks."""
    changed = {}
    for key, text in record.items():
        if text:
            changed[key] = f"  {text.upper()}\n".replace(" ", "  ")
    return changed


def joined(record):
    """The same with its input in the question."""
    return {"instruction": question_of(record), "output": record["output"]}


SHOUTED = [shouted(record) for record in TRAINED]
JOINED = [joined(record) for record in TRAINED]
ANSWERED = [{**record, "output": "Something else."} for record in TRAINED]
SEEN = {  # rows of --val-data, how many were trained on, of how many more the question was
    "none": (HELD_OUT, 0, 0),
    "all": (TRAINED, 8, 0),
    "in another order": (TRAINED[::-1], 8, 0),
    "a few": (TRAINED[2:5], 3, 0),
    "among others": ([*HELD_OUT, TRAINED[0]], 1, 0),
    "other blanks and case": (SHOUTED, 8, 0),
    "the input in the question": (JOINED, 8, 0),
    "other answers": ([*ANSWERED[:2], *HELD_OUT], 0, 2),
    "both": ([TRAINED[0], ANSWERED[1], *HELD_OUT], 1, 1),
}


@pytest.mark.parametrize("name", SEEN)
def test_rows_that_training_saw_get_no_verdict(name, quick):
    rows, known, asked_of = SEEN[name]

    got = quick(rows=rows)

    seen = known + asked_of
    assert got.summary["rows_seen"] == known
    assert got.summary["questions_seen"] == seen
    verdict = got.summary["verdict"]
    assert ("No verdict" in verdict) == (seen > 0)
    if known:
        assert f"{known} of {len(rows)} rows were trained on" in verdict
    assert verdict in got.page.text
    assert shows(got.out, verdict)


NOT_COMPARED = "Not compared with the rows of training"
TRAINED_FILE = [  # what became of it, rows of --val-data, words of the verdict, of the note
    ("gone", HELD_OUT, "Better", NOT_COMPARED),
    ("changed", HELD_OUT, "was changed since", ""),
    ("gone", TRAINED, "8 of 8 rows were trained on", ""),
    ("changed", TRAINED, "8 of 8 rows were trained on", ""),
]


@pytest.mark.parametrize("fate, rows, words, noted", TRAINED_FILE)
def test_what_became_of_the_file_trained_on_is_told(fate, rows, words, noted, moved, quick):
    path = moved / "away/data.jsonl"
    data = read(moved / NOTED)["data"]
    data["path"] = str(path)
    change(moved / NOTED, data=data)
    if fate == "changed":
        path.parent.mkdir()
        write(path, TRAINED[1:])

    got = quick(adapter=moved, rows=rows)

    note = got.summary.get("note", "")
    assert words in got.summary["verdict"]
    assert bool(note) == bool(noted)
    assert noted in note
    assert shows(got.out, note)


MEASURED = {  # loss noted by training, less the one here; rows, flags, words of the verdict
    "alike": (0.02, HELD_OUT, [], "Better"),
    "lower": (-0.05, HELD_OUT, [], "No verdict: the training measured"),
    "higher": (0.05, HELD_OUT, [], "No verdict: the training measured"),
    "higher, on other rows": (0.5, HELD_OUT[:7], [], "Better"),
    "higher, not in 4 bits": (0.5, HELD_OUT, ["--no-load-in-4bit"], "Better"),
}


@pytest.mark.parametrize("name", MEASURED)
def test_rows_that_training_measured_otherwise_get_no_verdict(name, results, moved, quick):
    difference, rows, flags, words = MEASURED[name]
    loss = math.log(results.figures["finetuned"])
    change(moved / NOTED, result={"eval_loss": loss + difference})

    got = quick(*flags, adapter=moved, rows=rows)

    assert words in got.summary["verdict"]


LONG = [{**record, "input": "word " * 400} for record in HELD_OUT]
NO_ROOM = {
    "one": ([LONG[0], *HELD_OUT[1:]], "1 of 8 rows left out: no room"),
    "most": ([HELD_OUT[0], *LONG[1:]], "7 of 8 rows left out"),
    "none": (HELD_OUT, ""),
}


@pytest.mark.parametrize("name", NO_ROOM)
def test_rows_without_room_for_an_answer_are_counted(name, quick):
    rows, words = NO_ROOM[name]

    got = quick(rows=rows)

    line = got.summary["val data"]
    assert words in line
    assert ("left out" in line) == bool(words)
    assert shows(got.out, words)
    assert words in got.page.text


# ---------------------------------------------------------------------------------------------
# Adapters, prompts and bases that do not belong together


CHANGES_ITS_BASE = [
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "not yet known"),
    ("layer_replication", [[0, 2], [1, 2]]),
    ("kasa_config", {"beta": 0.0001}),
    ("alora_invocation_tokens", [10, 11]),
    ("arrow_config", {"top_k": 1}),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("peft_type", "IA3"),
    ("peft_type", "ADALORA"),
    ("peft_type", "PROMPT_TUNING"),
]


@pytest.mark.parametrize("key, value", CHANGES_ITS_BASE)
def test_an_adapter_that_changes_its_base_is_refused(key, value, moved, refused):
    change(moved / CONFIG, **{key: value})

    line = refused(adapter=moved)
    assert re.search(f"no LoRA that .*base.* {key} .*; ", line)


@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens"])
def test_an_adapter_that_brings_weights_of_the_base_is_refused(name, moved, tiny, refused):
    base = AutoModelForCausalLM.from_pretrained(tiny)
    of_base = base.get_submodule(name).weight.data
    weights = load_file(moved / WEIGHTS)
    weights[f"base_model.model.{name}.weight"] = 3 * of_base
    save_file(weights, moved / WEIGHTS)

    assert "changes weights of the base itself" in refused(adapter=moved)


@pytest.mark.parametrize("part", ["head", "tail", "blank", "end"])
def test_another_prompt_than_that_of_training_is_refused(part, moved, refused):
    prompt = read(moved / NOTED)["prompt"]
    prompt[part] = "other" + prompt[part]
    change(moved / NOTED, prompt=prompt)

    line = refused(adapter=moved)
    assert re.search(f"{part} of the prompt .*other.*; put back", line)


def test_a_prompt_that_training_did_not_note_is_taken_as_it_is(moved, quick):
    noted = read(moved / NOTED)
    del noted["prompt"]
    write(moved / NOTED, noted)

    assert quick(adapter=moved).answers


def test_a_lost_chat_template_is_told(moved, refused):
    (moved / "chat_template.jinja").unlink()

    assert "head of the prompt is '### Instruction" in refused(adapter=moved)


BASES = [  # in adapter_config.json, where it lies, the folder to stand in
    ("base", "base", "."),
    ("./base", "base", "."),
    ("../base", "base", "elsewhere"),
    ("inner", "moved/inner", "elsewhere"),
]


@pytest.mark.parametrize("named, place, here", BASES)
def test_a_base_is_looked_for_here_and_beside_the_adapter(
    named, place, here, moved, tiny, tmp_path, quick, monkeypatch
):
    copy(tiny, tmp_path / place)
    change(moved / CONFIG, base_model_name_or_path=named)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / here)

    assert quick(adapter=moved).answers


NOWHERE = [  # in adapter_config.json, whether the Hub may have it
    ("./a", False),
    ("../a", False),
    ("/nowhere", False),
    ("~/nowhere", False),
    ("some/where/else", False),
    ("C:\\models\\a", False),
    ("nowhere", True),
    ("some/nowhere", True),
]


@pytest.mark.parametrize("name, of_hub", NOWHERE)
def test_a_base_that_is_no_folder_is_asked_of_the_hub_where_it_can_be_there(
    name, of_hub, moved, refused, monkeypatch
):
    hub = mock.Mock(side_effect=OSError("no connection"))
    monkeypatch.setattr(evaluate, "cached_file", hub)
    change(moved / CONFIG, base_model_name_or_path=name)

    line = refused(adapter=moved)
    assert line.startswith(f"error: no folder {name}")
    assert hub.called == of_hub


OTHER_SHAPES = [
    {"width": 32},
    {"layers": 3},
    {"seed": 1},  # the same shape, other weights
]


@pytest.mark.parametrize("shape", OTHER_SHAPES, ids=str)
def test_another_base_is_refused(shape, refused, tmp_path):
    other = tmp_path / "other"
    offline_model.write_tiny(other, **shape)

    line = refused("--model", other)
    assert re.search("fit.*; .*--model", line)


@pytest.mark.parametrize("shape", OTHER_SHAPES[:2], ids=str)
def test_another_base_is_refused_by_its_shape_where_nothing_was_noted(
    shape, tiny, refused, tmp_path
):
    other = tmp_path / "other"
    offline_model.write_tiny(other, **shape)
    folder = write_adapter(other, tmp_path / "adapter")

    line = refused("--model", tiny, adapter=folder)
    assert re.search("fit.*; .*--model", line)


def test_what_is_strange_beside_an_adapter_costs_no_result(moved, tiny, tmp_path, quick):
    """The base was moved, training_config.json is another tool's."""
    gone = str(tmp_path / "gone")
    change(moved / CONFIG, base_model_name_or_path=gone)
    write(moved / NOTED, {"lr": 1})
    question = "Was heißt „Größe“? 🚀"
    prompts = write(tmp_path / "p.json", [question])

    got = quick("--prompts", prompts, "--model", tiny, adapter=moved)

    assert got.settings["model"] == tiny
    assert got.settings["load_in_4bit"] is True
    assert got.page.has_curve()
    assert question.encode() in (tmp_path / "out/results.json").read_bytes()


def test_figures_beyond_all_numbers_are_not_blamed_on_the_output(tiny, tmp_path, refused):
    changes = {"strength": 1e4, "target_modules": ["lm_head"]}
    folder = write_adapter(tiny, tmp_path / "adapter", **changes)

    line = refused(adapter=folder, rows=HELD_OUT)
    assert "adapter" in line
    assert "--output" not in line


# ---------------------------------------------------------------------------------------------
# What is asked, and what is told of it


def test_without_files_ten_questions_are_asked_and_no_verdict_is_given(adapter, tmp_path):
    got = run(tmp_path, "--adapter", adapter, "--max-new-tokens", 1)

    questions = [answer["prompt"] for answer in got.answers]
    assert questions == evaluate.QUESTIONS
    assert len(set(questions)) == 10
    assert {answer["reference"] for answer in got.answers} == {None}
    assert got.figures is None
    assert got.general["rows"] == 20
    assert "--val-data" in got.summary["verdict"]


def test_no_question_built_in_is_in_the_data():
    folder = Path(evaluate.__file__).parent / "data"
    data = ""
    for name in ["sample_dataset.jsonl", "raw_qa.csv"]:
        data += (folder / name).read_text(encoding="utf-8").casefold()

    everyday = [record["instruction"] for record in EVERYDAY]
    for question in evaluate.QUESTIONS + everyday:
        assert question.casefold() not in data


OUR_FIELD = [
    "kube",
    "pod",
    "cluster",
    "docker",
    "container",
    "helm",
    "yaml",
    "deploy",
    "devops",
    "node",
    "server",
    "terraform",
    "linux",
]


def test_everyday_questions_are_of_other_fields():
    assert len(set(evaluate.EVERYDAY)) == 20
    for record in EVERYDAY:
        text = f"{record['instruction']} {record['output']}".casefold()
        for word in OUR_FIELD:
            assert not re.search(rf"\b{word}", text)


def test_held_out_questions_are_asked_first_and_their_references_shown(results):
    first = [question_of(record) for record in HELD_OUT[:2]]
    references = [record["output"] for record in HELD_OUT[:2]]

    assert [answer["prompt"] for answer in results.answers] == [*first, *ASKED]
    shown = [answer["reference"] for answer in results.answers]
    assert shown == [*references, None, None, None]
    for reference in references:
        assert reference in results.page.text
        assert reference in results.out


def test_a_reference_is_shown_whole(said):
    references = [answer["reference"] for answer in said.answers]
    first = list(REFERENCES.values())[:5]
    assert references == first + [None] * len(ANSWERS)

    for shown in [said.page.text, said.out]:
        assert "and so on" in shown
        assert "and end." in shown
        assert "始部署部署" in squeezed(shown)
        assert "終" in shown
        assert CODE in shown
        assert len(re.findall(r"\bcut\b", shown)) == 2  # the endless answers


def test_both_answers_are_shown_and_one_that_is_cut_is_said_to_be_cut(said):
    own = said.answers[5:]  # after five that were held out
    answers = dict(zip(ANSWERS, own, strict=True))
    endless = answers.pop("[endless]")

    for question, answer in answers.items():
        assert answer["base"] == ANSWERS[question].strip()
        assert answer["base_stopped"] is True
        assert answer["base_tokens"] == 2
    assert endless["base_stopped"] is False
    assert endless["base_tokens"] == 50
    assert said.summary["base_stopped"] == 13
    assert answers["[two]"]["finetuned"] == "the second answer"
    assert said.summary["answers_changed"] == 1
    assert "WARNING" not in said.out


def test_answers_stand_side_by_side(said):
    beside = r"^the first answer +\| the second answer$"
    assert re.search(beside, said.out, re.MULTILINE)
    assert re.search("the first answer.*the second answer", said.page.text, re.DOTALL)
    answers = 2 * 2  # to a row held out and to a question, before and after
    reference = 1
    assert said.page.inside["pre"].count(CODE) == answers + reference


TOP_KEYS = {"summary", "prompts", "perplexity", "general", "settings"}
ANSWER_KEYS = {
    "prompt",
    "reference",
    "base",
    "finetuned",
    "base_stopped",
    "finetuned_stopped",
    "base_tokens",
    "finetuned_tokens",
}
FIGURE_KEYS = {"base", "finetuned", "ratio", "ratio_ci95", "tokens", "rows", "rows_improved"}


def test_json_has_exactly_the_promised_keys(results):
    assert set(results.data) == TOP_KEYS
    for answer in results.answers:
        assert set(answer) == ANSWER_KEYS
    assert set(results.figures) == FIGURE_KEYS
    assert set(results.general) == FIGURE_KEYS
    assert results.summary.items() <= results.returned.items()
    written = sorted(os.listdir(results.page.path.parent))
    assert written == ["results.html", "results.json"]


def test_json_has_the_settings_as_resolved(results, tiny, adapter):
    settings = results.settings

    options = vars(evaluate.parse_args([]))
    assert set(options) <= set(settings)
    assert settings["model"] == tiny
    assert settings["adapter"] == str(adapter)
    assert settings["precision"] == "fp32"
    assert settings["load_in_4bit"] is True
    assert settings["device"] == "cpu"
    assert {"torch", "transformers", "peft"} <= set(settings["versions"])


@pytest.mark.parametrize("fault", ["full disk", "failed move"])
def test_a_failed_write_leaves_the_old_results(fault, quick, monkeypatch):
    folder = quick().page.path.parent
    old = contents(folder)
    disk = contextlib.nullcontext()
    if fault == "full disk":
        disk = largest_file(999)
    if fault == "failed move":
        monkeypatch.setattr(os, "replace", lambda *paths: os.rename("nowhere", "x"))

    with disk, pytest.raises(SystemExit, match="^error: .*(File too large|No such file).*; "):
        quick("--batch-size", 2)
    assert contents(folder) == old


# ---------------------------------------------------------------------------------------------
# Mistakes


@pytest.fixture
def desk(adapter, tiny, tmp_path, monkeypatch):
    """The folder to stand in: a good adapter `moved`, a model `base`, questions `p.json`."""
    monkeypatch.chdir(tmp_path)
    copy(adapter, "moved")
    copy(tiny, "base")
    write(Path("p.json"), ["<new>"])
    return tmp_path


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads a model fails: some mistakes are told before."""
    loaded = mock.Mock(side_effect=AssertionError("a model was loaded"))
    monkeypatch.setattr(evaluate, "load_base", loaded)


@pytest.fixture
def tells_mistake(desk, asked, capsys):
    """A function: flags must end in one line that names what is wrong, and change no file."""

    def check(flags, named):
        before = contents(desk)
        right = ["--adapter", "moved", "--prompts", str(asked), "--max-new-tokens", "1"]
        with pytest.raises(SystemExit) as end:
            evaluate.main([*right, "--output", "out/results.json", *flags.split()])

        line = end.value.code
        if line == 2:  # argparse has said it
            line = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch("(evaluate.py: )?error: .*(; | takes |argument).*", line)  # what to do
        assert named in line
        assert len(line) < 600
        assert contents(desk) == before
        assert not Path("out").exists()
        assert not Path("exploded").exists()

    return check


WRONG_FLAGS = [  # flags, named in the line
    ("--batch-size 0", "--batch-size"),
    ("--batch-size -1", "--batch-size"),
    ("--batch-size 1.5", "--batch-size"),
    ("--batch-size 99999999999999999999", "--batch-size"),
    ("--max-new-tokens 0", "--max-new-tokens"),
    ("--max-new-tokens nan", "--max-new-tokens"),
    ("--val-prompts -1", "--val-prompts"),
    ("--repetition-penalty 0", "--repetition-penalty"),
    ("--repetition-penalty nan", "--repetition-penalty"),
    ("--precision fp8", "--precision"),
    ("--temperature 1", "--temperature"),
    ("--adapter", "--adapter"),
    ("results", "results"),
    ("--adapter nowhere", "nowhere: no folder"),
    ("--adapter user/nowhere", "user/nowhere: no folder"),
    ("--prompts nowhere.json", "nowhere.json"),
    ("--val-data nowhere.jsonl", "nowhere.jsonl"),
    ("--output out/r.html", "out/r.html"),
    ("--output moved/adapter_config.json", "moved/adapter_config.json"),
]


@pytest.mark.parametrize("flags, named", WRONG_FLAGS)
def test_a_mistake_in_the_flags_ends_in_one_line(flags, named, tells_mistake, no_model):
    tells_mistake(flags, named)


GOOD_ROW = '{"instruction": "a", "output": "b"}'
WRONG_FILES = [  # flags, a file, what it holds, named in the line
    ("--prompts folder", "folder/x", "", "folder"),
    ("--val-data folder", "folder/x", "", "folder"),
    ("--output folder", "folder/x", "", "folder"),
    ("--adapter a.json", "a.json", "{}", "a.json: no folder"),
    ("--output f/r.json", "f", "", "f"),
    ("--output p.json --prompts p.json", "p.json", '["a"]', "p.json"),
    ("--output v.json --val-data v.json", "v.json", GOOD_ROW, "v.json"),
]


@pytest.mark.parametrize("flags, file, content, named", WRONG_FILES)
def test_a_mistake_in_the_choice_of_a_file_ends_in_one_line(
    flags, file, content, named, tells_mistake, no_model
):
    path = Path(file)
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")

    tells_mistake(flags, named)


WRONG_QUESTIONS = [  # content of the file, named in the line
    (b"{}", "p.json"),
    (b'"Why?"', "p.json"),
    (b"[]", "p.json"),
    (b'[["a"]]', "p.json"),
    (b'[{"prompt": "a"}]', "p.json"),
    (b"['a']", "p.json"),
    (b"", "p.json"),
    (b"null", "p.json"),
    (b"[" * 100_000, "p.json"),
    (b"\xff\x00", "p.json"),
    (b"[" + b"9" * 5000 + b"]", "p.json"),
    (b'["a", "\\ud800"]', "item 2"),
    (b'["a", null]', "item 2"),
    (b'["a", "  "]', "item 2"),
    (b'["a", 1]', "item 2"),
]


@pytest.mark.parametrize("content, named", WRONG_QUESTIONS, ids=short)
def test_a_mistake_in_the_questions_ends_in_one_line(content, named, tells_mistake, no_model):
    Path("p.json").write_bytes(content)

    tells_mistake("--prompts p.json", named)


WRONG_ROWS = [  # content of the file, named in the line
    (b"", "v.jsonl"),
    (b"\xff\x00", "v.jsonl"),
    (b'{"instruction": "a", "output": "b"}\n\n{', "v.jsonl:3"),
    (b'{"instruction": "a", "output": "b"}\n\n[]', "v.jsonl:3"),
    (b'{"instruction": "a"}', 'v.jsonl:1: "output"'),
    (b'{"instruction": 1}', "v.jsonl:1"),
    (b'{"instruction": "a", "output": "\\ud800"}', "v.jsonl:1"),
]


@pytest.mark.parametrize("content, named", WRONG_ROWS)
def test_a_mistake_in_the_rows_ends_in_one_line(content, named, tells_mistake, no_model):
    Path("v.jsonl").write_bytes(content)

    tells_mistake("--val-data v.jsonl", named)


BROKEN = [  # a file of the adapter, what it holds, named in the line
    (CONFIG, b"{", CONFIG),
    (CONFIG, b"[]", CONFIG),
    (CONFIG, b"\xff\xfe\x00", CONFIG),
    (NOTED, b"[]", f"moved/{NOTED}"),
    ("tokenizer.json", b"{", "moved"),
]


@pytest.mark.parametrize("file, content, named", BROKEN)
def test_a_broken_file_of_an_adapter_ends_in_one_line(
    file, content, named, tells_mistake, no_model
):
    Path("moved", file).write_bytes(content)

    tells_mistake("", named)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_lost_file_of_an_adapter_ends_in_one_line(file, tells_mistake, no_model):
    Path("moved", file).unlink()

    tells_mistake("", file)


BAD_TEMPLATES = [
    "''.__class__.__mro__[1].__subclasses__()",
    "lipsum.__globals__['os'].mkdir('exploded')",
    "range(10**9)|list",
    "'a' * 10**17",
    "raise_exception('no')",
]


@pytest.mark.parametrize("words", BAD_TEMPLATES)
def test_a_chat_template_that_fails_ends_in_one_line(words, tells_mistake, no_model):
    path = Path("moved/chat_template.jinja")
    template = path.read_text()
    path.write_text("{{ " + words + " }}" + template)

    tells_mistake("", "chat template")


def test_code_beside_a_tokenizer_is_not_run(tells_mistake, no_model):
    Path("moved/code.py").write_bytes(CODE_RUNS)
    code = {"AutoTokenizer": ["code.T", None]}
    change(Path("moved/tokenizer_config.json"), tokenizer_class="Own", auto_map=code)

    tells_mistake("", "moved")


def test_code_beside_a_base_is_not_run(tells_mistake):
    Path("base/code.py").write_bytes(CODE_RUNS)
    code = {"AutoConfig": "code.Config"}
    change(Path("base/config.json"), model_type="own", auto_map=code)

    tells_mistake("--model base", "base")


def test_a_pickled_adapter_is_not_opened(tells_mistake, no_model):
    Path("moved", WEIGHTS).unlink()
    Path("moved/adapter_model.bin").write_bytes(PICKLE)

    tells_mistake("", WEIGHTS)


def test_a_pickled_base_is_not_opened(tells_mistake):
    Path("base/model.safetensors").unlink()
    Path("base/pytorch_model.bin").write_bytes(PICKLE)

    tells_mistake("--model base", "base")


WRONG_CONFIGS = [  # in adapter_config.json, named in the line
    ("lora_alpha", math.nan, "finite"),
    ("target_modules", ["k_proj", "o_proj"], "does not fit"),
    ("target_modules", ["q_proj"], "does not fit"),
    ("target_modules", "(q_proj", "does not fit"),
    ("rank_pattern", [1], "does not fit"),
    ("base_model_name_or_path", "/nowhere/base", "no folder /nowhere/base"),
    ("base_model_name_or_path", None, "--model"),
    ("base_model_name_or_path", 5, "--model"),
]


@pytest.mark.parametrize("key, value, named", WRONG_CONFIGS)
def test_a_mistake_in_the_config_of_an_adapter_ends_in_one_line(key, value, named, tells_mistake):
    change(Path("moved", CONFIG), **{key: value})

    tells_mistake("", named)


@pytest.mark.parametrize("size", [5, 1000])
def test_weights_that_were_cut_end_in_one_line(size, tells_mistake):
    os.truncate(Path("moved", WEIGHTS), size)

    tells_mistake("", "moved")


def test_weights_that_are_no_numbers_end_in_one_line(tells_mistake):
    path = Path("moved", WEIGHTS)
    weights = load_file(path)
    for weight in weights.values():
        weight.fill_(math.nan)
    save_file(weights, path, {"format": "pt"})

    tells_mistake("", "finite")


def test_a_model_that_lacks_tokens_of_the_tokenizer_ends_in_one_line(tells_mistake):
    tokenizer = AutoTokenizer.from_pretrained("moved")
    tokenizer.add_tokens(["<new>"])  # asked in p.json
    tokenizer.save_pretrained("moved")

    tells_mistake("--prompts p.json", "tokens of the tokenizer")


def test_a_base_that_nobody_has_ends_in_one_line(tells_mistake):
    tells_mistake("--model nowhere/model", "nowhere/model")


def test_rows_that_are_all_too_long_end_in_one_line(tells_mistake):
    row = {"instruction": "why " * 2000, "output": "b"}
    write(Path("v.jsonl"), [row])

    tells_mistake("--val-data v.jsonl", "v.jsonl")


@pytest.mark.parametrize("question", ["Pod " * 75_000, "x" * 300_000], ids=short)
def test_a_question_beyond_the_model_ends_in_one_line(question, tells_mistake):
    write(Path("p.json"), [question])

    tells_mistake("--prompts p.json", "1,024")


def test_an_answer_beyond_the_model_ends_in_one_line(tells_mistake):
    tells_mistake("--max-new-tokens 3000", "1,024")


def test_a_read_only_folder_is_refused_before_a_model_is_loaded(adapter, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    flags = ["--adapter", adapter, "--model", "nowhere/model"]

    with pytest.raises(SystemExit, match=f"^error: .*{tmp_path}/out: .*; .*--output$"):
        without_privileges(lambda: run(tmp_path, *flags))


def test_out_of_gpu_memory_ends_in_one_line_of_advice(quick, tmp_path, monkeypatch):
    full = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(LlamaForCausalLM, "generate", full)

    line = "^error: 8 prompts at once: CUDA out of memory; lower --batch-size"
    with pytest.raises(SystemExit, match=line):
        quick()
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# The terminal


def columns_of(text):
    """How many columns of a terminal a text takes."""
    columns = 0
    for letter in text:
        if unicodedata.category(letter) not in ["Mn", "Me", "Cf"]:  # these join the one before
            columns += 1
        if unicodedata.east_asian_width(letter) in "FW":
            columns += 1
    return columns


@pytest.fixture(scope="module", params=[1, 60, 80, 121])
def screen(request, said, tmp_path_factory):
    """How wide a terminal is, and what is printed there for each question."""
    columns = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        out = run(tmp_path_factory.mktemp("screen"), *said.flags).out
    printed, _ = out.split("\nverdict ")
    _, *blocks = re.split(r"^\[(?=\d+/14\])", printed, flags=re.MULTILINE)
    return columns, blocks


def test_answers_fit_the_terminal(screen):
    columns, blocks = screen

    for block in blocks:
        for line in block.splitlines():
            assert columns_of(line) <= max(columns, 40)


def test_answers_side_by_side_stay_aligned(screen):
    _, blocks = screen

    for block in blocks:
        widths = set()
        for line in block.splitlines():
            left, bar, _ = line.partition(" | ")
            if bar:
                widths.add(columns_of(left))
        assert len(widths) <= 1


def test_an_answer_is_shown_whole_on_any_terminal(screen):
    _, blocks = screen
    own = blocks[5:]  # after five rows that were held out
    before = {}
    for question, block in zip(ANSWERS, own, strict=True):
        before[question] = re.sub(r" +\|.*", "", block)

    for question in ["[long]", "[wide]", "[marks]", "[vowels]"]:
        assert ANSWERS[question] in squeezed(before[question])
    for question in ["[code]", "[two]"]:
        assert ANSWERS[question] in before[question]


def test_what_would_steer_a_terminal_is_shown_and_not_sent(said):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e]", said.out)

    shown = re.findall(r"\S\[2Ja\S+?0;title", squeezed(said.out))
    assert len(shown) == TIMES_SHOWN


def test_piped_output_is_plain_in_any_encoding(said, tmp_path):
    flags = [str(flag) for flag in said.flags]
    command = [sys.executable, evaluate.__file__, *flags, "--output", tmp_path / "r.json"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}

    ended = subprocess.run(command, env=environment, capture_output=True, check=False)

    assert ended.returncode == 0
    assert (tmp_path / "r.html").exists()
    assert rb"\u90e8" in ended.stdout
    for stream in [ended.stdout, ended.stderr]:
        assert not re.search(rb"[^\n\x20-\x7e]", stream)


# ---------------------------------------------------------------------------------------------
# The page


def test_the_page_tells_the_verdict_then_what_it_means_then_the_answers(results):
    text = results.page.text

    verdict = text.index(results.summary["verdict"])
    meaning = text.index("lower is better")
    first_question = text.index(ASKED[0])
    assert verdict < meaning < first_question
    for answer in results.answers:
        assert answer["base"] in text
        assert answer["finetuned"] in text


def test_the_page_tells_all_figures_and_the_last_loss(results):
    text = results.page.text

    for key in ["base", "finetuned", "ratio"]:
        assert tells(text, results.figures[key])
        assert tells(text, results.general[key])
    log = Path(results.settings["adapter"], LOG).read_text()
    measured = re.findall(r'"eval_loss": (.*?)[,}]', log)
    assert tells(text, float(measured[-1]))


def test_the_page_tells_the_settings_when_asked(results):
    page = results.page

    (details,) = page.attributes_of("details")
    assert "open" not in details
    _, text = page.inside["details"].split("{", 1)
    settings = json.loads("{" + text)
    assert settings["versions"]["torch"] == version("torch")


def test_the_page_is_built_so_that_it_can_be_read_aloud(results):
    page = results.page
    assert {"main", "title", "details", "svg"} <= page.names
    (html,) = page.attributes_of("html")
    assert html["lang"] == "en"

    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    for above, below in zip(levels, levels[1:]):
        assert below - above <= 1
    headed = "".join(page.inside[f"h{level}"] for level in range(1, 7))
    for answer in results.answers:
        assert answer["prompt"] in headed

    assert page.has_curve()
    for _, attributes in page.tags:
        if attributes.get("role") == "img":
            assert attributes["aria-label"]
    for attributes in page.attributes_of("th"):
        assert "scope" in attributes


def losses(*values, key="loss", first=1):
    """Entries of a training log, step by step."""
    entries = []
    for step, value in enumerate(values, first):
        entries.append({"step": step, key: value})
    return entries


def drawing_of(page):
    """The source of all that is drawn on a page."""
    return "".join(re.findall("<svg.*?</svg>", page.source, re.DOTALL))


FALLING = [5 - n / 2500 for n in range(9_995)]
VALIDATION = losses(4.5, 3.25, 3.75, key="eval_loss", first=2)
LOGS = {  # entries of the log, figures and words that the page then tells
    "one step": (losses(2.5), [2.5], ["step 1"]),
    "many steps": (losses(*FALLING), [5, 1], ["step 9995"]),
    "lowest earlier": (
        losses(5.0, 4.0, 3.0) + VALIDATION,
        [5, 3, 3.75, 3.25],
        ["step 3", "lowest"],
    ),
}


@pytest.mark.parametrize("name", LOGS)
def test_the_curve_is_that_of_the_log(name, moved, quick):
    log, figures, words = LOGS[name]
    write(moved / LOG, log)

    page = quick(adapter=moved).page

    assert page.has_curve()
    assert tells(page.text, *figures)
    for word in words:
        assert word in page.text
    assert len(page.source) < 100_000
    assert not re.search(r"\b(nan|inf)\b", drawing_of(page))


OF_NO_USE = [  # lines of a log
    {"step": 1, "loss": "<b>"},
    {"step": 2, "loss": [1]},
    {"step": 3, "loss": 10**400},
    {"step": "<b>", "loss": 9.0},
    {"loss": 9},
    {"step": 1},
    [],
    7,
    b"[" * 100_000,
    b"\x00",
    b"\xff",
    b'{"step": 9, "lo',
]


@pytest.mark.parametrize("line", OF_NO_USE, ids=short)
def test_a_log_of_no_use_is_no_curve_and_costs_no_page(line, moved, quick):
    write(moved / LOG, [line])

    page = quick(adapter=moved).page

    assert not page.has_curve()
    assert len(page.source) < 100_000
    assert not re.search(r"\b(nan|inf)\b", drawing_of(page))


def points_of(page, name):
    """{step: loss} of a line of the loss curve; upwards is minus in a drawing."""
    (path,) = [path for path in page.attributes_of("path") if path.get("class") == name]
    points = {}
    for point in re.findall(r"[-.\d]+,[-.\d]+", path["d"]):
        x, y = point.split(",")
        points[float(x)] = -float(y)
    return points


TRAIN = [5.0 - 0.1 * n + (n % 3) for n in range(25)]
VAL = {0: 6.0, 10: 4.0, 25: 3.0}  # after which step, how much


@pytest.fixture
def curve(moved, quick):
    """The page with the curve of TRAIN and VAL."""
    log = losses(*TRAIN)
    for step, loss in VAL.items():
        log.append({"step": step, "eval_loss": loss})
    write(moved / LOG, log)
    return quick(adapter=moved).page


def test_the_curve_has_each_loss_and_its_running_mean(curve):
    single = dict(enumerate(TRAIN, 1))
    mean = {}
    for step in single:
        last = TRAIN[max(0, step - 3) : step]
        mean[step] = sum(last) / len(last)

    assert points_of(curve, "single") == pytest.approx(single)
    assert points_of(curve, "mean") == pytest.approx(mean)


def test_the_curve_has_a_round_dot_for_each_loss_of_validation(curve):
    drawn = [*TRAIN, *VAL.values()]
    high = max(drawn)
    height = high - min(drawn)

    dots = curve.attributes_of("circle")
    for dot, step in zip(dots, VAL, strict=True):
        x = float(dot["cx"].rstrip("%"))
        y = float(dot["cy"].rstrip("%"))
        assert x == pytest.approx(100 * step / 25)
        assert y == pytest.approx(100 * (high - VAL[step]) / height)


def sizes_of_bars(page):
    """Of each bar and box the numbers of its style, such as "left: 3%; right: 9%"."""
    sizes = []
    for attributes in page.attributes_of("div"):
        if re.match("bar |box", attributes.get("class", "")):
            found = re.findall(r"(\w+): ([-.\d]+)%", attributes["style"])
            sizes.append({side: float(percent) for side, percent in found})
    return sizes


@pytest.mark.parametrize("group, first", [("perplexity", 0), ("general", 3)])
def test_bars_and_their_box_are_as_long_as_the_figures(group, first, results):
    sizes = sizes_of_bars(results.page)
    assert len(sizes) == 6
    before, after, box = sizes[first : first + 3]

    figures = results.data[group]
    low, high = figures["ratio_ci95"]
    unit = before["width"]
    assert 0 < unit <= 100
    assert after["width"] == pytest.approx(unit * figures["ratio"])
    assert box["left"] == pytest.approx(unit * low)
    assert 100 - box["right"] == pytest.approx(min(100, unit * high))


def test_no_bar_is_longer_than_its_place(judged):
    _, got = judged

    for sizes in sizes_of_bars(got.page):
        assert 0 <= min(sizes.values())
        assert max(sizes.values()) <= 100


RUNS = {"script", "iframe", "img", "b", "link", "object", "base", "form"}
LOADS = {"src", "href", "srcset", "action", "data", "background", "poster", "xlink:href"}


def test_hostile_texts_are_shown_as_they_are(said):
    assert said.page.text.count(HOSTILE) == TIMES_SHOWN


@pytest.mark.parametrize("evaluation", ["said", "results"])
def test_hostile_texts_are_inert_on_the_page_which_refers_to_nothing_outside(evaluation, request):
    page = request.getfixturevalue(evaluation).page

    assert not page.names & RUNS
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in LOADS
            assert not name.startswith("on")
            assert "http" not in (value or "")
    assert not re.search(r"url\(|@import|https?:", page.inside["style"])


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, which logs what it loads."""
    selenium = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = selenium.Chrome(options, selenium.ChromeService(driver))
    yield browser
    browser.quit()


def set_screen(browser, width, scheme):
    """Make the screen so wide, and light or dark."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    preferred = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preferred]})


def loaded_for(browser, address):
    """Open an address: all addresses that are loaded for it."""
    browser.get_log("performance")  # what came before
    browser.get(address)
    addresses = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            addresses.append(message["params"]["request"]["url"])
    return addresses


OPEN_DETAILS = "document.querySelectorAll('details').forEach(each => each.open = true)"
OUTSIDE = """  // elements beyond the right edge
const elements = [...document.querySelectorAll("body *")];
const outside = elements.filter(each => each.getBoundingClientRect().right > innerWidth + 1);
return outside.map(each => each.outerHTML.slice(0, 80));
"""
SMALL = """  // texts of a drawing in small letters
function size(text) {
  return parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a;
}
const texts = [...document.querySelectorAll("svg text")];
return texts.filter(text => size(text) < 11).map(text => text.textContent);
"""
TEXTS = """  // all texts
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  if (walker.currentNode.data.trim()) found.push(walker.currentNode);
}
"""
FAINT = r"""  // those that have too little contrast (WCAG 2: 4.5)
function parts(colour) {  // red, green, blue, perhaps opacity
  return colour.match(/[\d.]+/g).map(Number);
}
function luminance(colour) {
  const weights = [0.2126, 0.7152, 0.0722];
  let sum = 0;
  for (let i = 0; i < 3; i++) {
    const part = parts(colour)[i] / 255;
    const linear = part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    sum += weights[i] * linear;
  }
  return sum;
}
function ground(element) {  // the colour behind it
  while (element) {
    const colour = getComputedStyle(element).backgroundColor;
    const opacity = parts(colour)[3] ?? 1;
    if (opacity > 0) return colour;
    element = element.parentElement;
  }
  return "rgb(255, 255, 255)";
}
function contrast(text) {
  const element = text.parentElement;
  const style = getComputedStyle(element);
  const ink = luminance(element.closest("svg") ? style.fill : style.color);
  const paper = luminance(ground(element));
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}
return found.filter(text => contrast(text) < 4.5).map(text => text.data);
"""
BROKEN = r"""  // numbers, and words of a table, that stand on two lines
const broken = [];
for (const text of found) {
  const element = text.parentElement;
  if (element.closest("pre, h2, h3, details")) continue;
  const kind = element.closest("table") ? /\S+/g : /\d[\d.,]*\d/g;
  for (const word of text.data.matchAll(kind)) {
    const range = document.createRange();
    range.setStart(text, word.index);
    range.setEnd(text, word.index + word[0].length);
    const lines = new Set([...range.getClientRects()].map(box => box.top));
    if (lines.size > 1) broken.push(word[0]);
  }
}
return broken;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("evaluation", ["results", "said"])
def test_in_a_browser_all_can_be_read_and_nothing_loads(
    evaluation, width, scheme, browser, request
):
    page = request.getfixturevalue(evaluation).page
    address = page.path.resolve().as_uri()
    set_screen(browser, width, scheme)

    assert loaded_for(browser, address) == [address]
    script = browser.execute_script
    script(OPEN_DETAILS)

    assert script("return innerWidth") == width
    assert script("return document.documentElement.scrollWidth") <= width
    assert script("return document.scripts.length") == 0
    assert script("return window.pwned") is None
    for faults in [OUTSIDE, SMALL, TEXTS + FAINT, TEXTS + BROKEN]:
        assert script(faults) == []


def test_a_page_of_something_else_is_not_overwritten(quick, adapter, asked, tmp_path):
    page = tmp_path / "index.html"
    page.write_text("my page")
    flags = ["--adapter", adapter, "--prompts", asked]
    flags += ["--output", tmp_path / "index.json"]
    with pytest.raises(SystemExit, match="index.html is not one of evaluate.py; choose another"):
        evaluate.main([str(flag) for flag in flags])
    assert page.read_text() == "my page"


def test_an_own_page_is_replaced_though_its_json_is_gone(quick, tmp_path):
    quick()
    (tmp_path / "out/results.json").unlink()
    assert quick().data["summary"]["prompts"] == 3


def test_a_stopped_training_is_told_how_to_end(moved, refused):
    (moved / "checkpoint.pt").write_bytes(b"")
    assert "--resume ends it" in refused(adapter=moved)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 99])
def test_a_damaged_adapter_is_not_blamed_on_the_base(content, moved, refused):
    (moved / WEIGHTS).write_bytes(content)
    line = refused(adapter=moved)
    assert f"{WEIGHTS} is damaged" in line
    assert "git lfs pull" in line


def test_rows_that_can_not_be_compared_with_the_training_are_noted(moved, quick, tiny):
    (moved / NOTED).unlink()
    summary = quick("--model", tiny, adapter=moved, rows=TRAINED).data["summary"]
    assert "Not compared with the rows of training" in summary["note"]


def test_what_training_noted_by_halves_costs_no_result(moved, quick):
    noted = read(moved / NOTED)
    del noted["data"]
    del noted["arguments"]
    write(moved / NOTED, noted)

    assert quick(adapter=moved, rows=HELD_OUT).data["perplexity"]["rows"] == len(HELD_OUT)


def test_rows_that_go_while_answers_are_made_cost_no_result(quick, tmp_path, monkeypatch):
    measured = evaluate.run_both

    def and_then_gone(*args):
        (tmp_path / "v.jsonl").unlink()
        return measured(*args)

    monkeypatch.setattr(evaluate, "run_both", and_then_gone)
    assert quick(rows=HELD_OUT).data["perplexity"]["rows"] == len(HELD_OUT)
