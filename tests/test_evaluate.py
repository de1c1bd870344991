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
HELD_OUT_THINGS = ["Pod", "Service", "Node", "Ingress", "Secret", "Volume", "Job", "Probe"]
TRAINED_THINGS = ["Label", "Taint", "Quota", "Helm", "Role", "Zone", "Chart", "Image"]


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


HELD_OUT = records_of(HELD_OUT_THINGS)
TRAINED = records_of(TRAINED_THINGS)
PAIRS = evaluate.EVERYDAY
EVERYDAY = [{"instruction": question, "input": "", "output": answer} for question, answer in PAIRS]
WEIGHTS = "adapter_model.safetensors"
BASE = "base_model_name_or_path"
CONFIG = "adapter_config.json"
NOTED = "training_config.json"
HOSTILE = (
    "<script>window.pwned = 1</script><img src=http://evil.example/x.png onerror=window.pwned=2>"
    "</pre></div></details><svg onload=window.pwned=3><iframe src=https://evil.example/></iframe>"
    '"><b onmouseover="window.pwned=4">&lt;&amp;{{ 7 * 7 }}'
)
STEERING = "\x1b[2Ja\x1b]0;title\x07b\x9b1mc\rd\x08e\u202ef\u200bg\x00h\ti\x7f"
CODE = "Write\n```yaml\nkind: Pod\nspec:\n    - name: a\n\n      port: 80\n```\nand apply it."


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


def change(path, **values):
    """Set keys of a JSON file."""
    content = {}
    if path.exists():
        content = json.loads(path.read_text())
    write(path, content | values)


def copy(folder, new):
    return Path(shutil.copytree(folder, new))


def run(folder, *flags):
    """What evaluate.main writes and prints: data of the JSON, path of the page, the text."""
    output, printed = folder / "out/results.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        returned = evaluate.main([*map(str, flags), "--output", str(output)])
    data = json.loads(output.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    page = output.with_suffix(".html")
    return SimpleNamespace(
        data=data, page=page, out=printed.getvalue(), returned=returned, flags=flags
    )


def plain_model(base, adapter=None, in_4bit=True):
    """A base model, and an adapter on it, as plain transformers and peft load them."""
    nf4 = {"bnb_4bit_quant_type": "nf4"}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **nf4)
    options = {"quantization_config": nf4} if in_4bit else {}
    options |= {"dtype": torch.float32, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a kernel that rounds to bfloat16
    return (peft.PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def plain_perplexity(model, tokenizer, records):
    """exp of the mean NLL over answer + </s>, one row at a time: (figure, tokens)."""
    total, count = 0.0, 0
    for record in records:
        prompt = plain_prompt(tokenizer, f"{record['instruction']}\n\n{record['input']}".strip())
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        text = prompt + record["output"] + "</s>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0].double().log_softmax(-1)
        total -= logs[start - 1 : -1].gather(1, ids[0, start:, None]).sum().item()
        count += ids.shape[1] - start
    return math.exp(total / count), count


def plain_prompt(tokenizer, question):
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def plain_answer(model, tokenizer, question, **options):
    prompt = plain_prompt(tokenizer, question)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=24, do_sample=False, **options)
    new = new[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def write_adapter(base, folder, strength=0.0, **changes):
    """A LoRA folder by peft alone: no other file; without strength it has no effect."""
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_A" not in name:
            weight.data += strength * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def write_parrot(folder, answers, after=(), template="zephyr"):
    """Write a model that says what is wanted, and an adapter that changes some answers.

    {token at the end of a prompt: tokens of the answer}; a token stated twice is said for ever.
    Embeddings are unit vectors, layers add nothing, and the head maps each token to its follower.
    """
    base, after = folder / "base", dict(after)
    offline_model.write_tiny(base, template=template or "zephyr")
    tokenizer = AutoTokenizer.from_pretrained(base)
    if not template:  # the prompt is the question and no more
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(template, "</s>")
    follower = dict.fromkeys(after.values(), end)
    for question, answer in answers.items():
        follower |= dict(reversed(list(zip([question, *answer], [*answer, end]))))
    tokenizer.add_tokens([token for token in follower if token not in tokenizer.get_vocab()])
    tokenizer.save_pretrained(base)
    number, id_of = {token: n for n, token in enumerate(follower)}, tokenizer.convert_tokens_to_ids
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 8192
    for name, weight in model.named_parameters():
        weight.data *= not re.search("embed|lm_head|o_proj|down_proj", name)
    for token, n in number.items():
        model.get_input_embeddings().weight.data[id_of(token), n] = 1
        model.lm_head.weight.data[id_of(follower[token]), n] = 1
    model.save_pretrained(base)
    config = peft.LoraConfig(r=1, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    head = model.get_output_embeddings()
    head.lora_A["default"].weight.data.zero_()
    for question, token in after.items():
        head.lora_A["default"].weight.data[0, number[question]] = 1
        head.lora_B["default"].weight.data[id_of(token), 0] = 10
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter"


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """An adapter that changes answers, and beside it questions and held-out rows."""
    folder = tmp_path_factory.mktemp("home")
    write(folder / "asked.json", ASKED)
    write(folder / "data.jsonl", TRAINED)
    write(folder / "val.jsonl", HELD_OUT)
    paths = ["--model", tiny, "--dataset", folder / "data.jsonl", "--output", folder / "adapter"]
    flags = ["--max-steps", 8, "--learning-rate", 0.02, "--batch-size", 6]
    flags += ["--gradient-accumulation-steps", 1, "--val-data", folder / "val.jsonl"]
    lora_finetune.main([*map(str, [*paths, *flags])])
    return folder / "adapter"


@pytest.fixture(scope="module")
def asked(adapter):
    return adapter.parent / "asked.json"


@pytest.fixture
def quick(adapter, asked, tmp_path):
    """A function: what an evaluation of three short answers gives."""

    def evaluated(*flags, adapter=adapter, tokens=2):
        few = ["--prompts", asked, "--max-new-tokens", tokens, "--val-prompts", 0]
        return run(tmp_path, "--adapter", adapter, *few, *flags)

    return evaluated


@pytest.fixture(scope="module")
def results(adapter, asked, tmp_path_factory):
    """A whole evaluation: three questions and, before them, two that were held out."""
    flags = ["--adapter", adapter, "--val-data", adapter.parent / "val.jsonl", "--prompts", asked]
    flags += ["--val-prompts", 2, "--max-new-tokens", 24]
    return run(tmp_path_factory.mktemp("results"), *flags)


ANSWERS = {
    "[code]": [CODE],
    "[long]": ["x" * 300],
    "[wide]": ["部署🚀" * 30],
    "[marks]": ["e\u0301" * 100],
    "[vowels]": ["के" * 100],
    "[steering]": [STEERING],
    "[hostile]": [HOSTILE],
    "[endless]": ["and", "z", "z"],
    "[two]": ["the first answer"],
}
REFERENCES = {
    "[code]": CODE,
    "[hostile]": HOSTILE,
    "[steering]": STEERING,
    "[long]": "Begin, " + "and so on, " * 200 + "and end.",
    "[wide]": "始" + "部署" * 400 + "終",
    "[two]": "not asked: the sixth row",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """An evaluation of which each answer is known, with hostile text wherever text can be."""
    folder = tmp_path_factory.mktemp("parrot")
    adapter = write_parrot(folder, ANSWERS, {"[two]": "the second answer"}, template=None)
    prompts = [f"{HOSTILE} {STEERING} say {question}" for question in ANSWERS]
    prompts = write(folder / '"><script>window.pwned = 5<!--.json', prompts)
    rows = [
        {"instruction": f"{HOSTILE} {STEERING}", "input": question, "output": reference}
        for question, reference in REFERENCES.items()
    ]
    paths = ["--adapter", adapter, "--val-data", write(folder / "val.jsonl", rows)]
    flags = ["--prompts", prompts, "--no-load-in-4bit", "--max-new-tokens", 50]
    return run(folder, *paths, *flags)


class Page(html.parser.HTMLParser):
    """What a browser would build: tags with their attributes, and the text inside of a tag."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open = [], collections.Counter()
        self.inside, self.source = collections.defaultdict(str), path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text, self.names = self.inside["main"], set(dict(self.tags))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open[tag] += 1

    def handle_endtag(self, tag):
        self.open[tag] -= 1

    def handle_data(self, data):
        for tag in +self.open:
            self.inside[tag] += data

    def curve(self):
        """What the loss curve is called, if there is one."""
        labels = (attributes.get("aria-label", "") for _, attributes in self.tags)
        return " ".join(label for label in labels if "loss" in label)


def tells(text, *values):
    """Whether each of the values stands in the text, rounded to two places or more."""
    told = [float(figure) for figure in re.findall(r"\d+\.\d\d+", text)]
    return all(any(abs(figure - value) < 0.006 for figure in told) for value in values)


def squeezed(text):
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_answers_and_figures_are_those_of_plain_peft(side, results, tiny, adapter):
    model = plain_model(tiny, adapter if side == "finetuned" else None)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for group, records in ("perplexity", HELD_OUT), ("general", EVERYDAY):
        figure, tokens = plain_perplexity(model, tokenizer, records)
        assert results.data[group][side] == pytest.approx(figure, rel=1e-5)
        assert results.data[group]["tokens"] == tokens
        assert results.data[group]["rows"] == len(records)
    for result in results.data["prompts"]:
        assert result[side] == plain_answer(model, tokenizer, result["prompt"])
    assert results.data["summary"]["answers_changed"] == 5


FOREIGN = [
    ("other layers", {"target_modules": ["q_proj", "down_proj"]}),
    ("all layers, other scale", {"target_modules": "all-linear", "use_rslora": True}),
    ("DoRA", {"use_dora": True}),
    ("biases of its own", {"lora_bias": True}),
    ("head", {"target_modules": ["v_proj", "lm_head"]}),
    ("embeddings", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("a layer trained whole", {"modules_to_save": ["lm_head"]}),
    ("embeddings trained whole", {"modules_to_save": ["embed_tokens"]}),
    ("a few tokens", {"trainable_token_indices": [5, 6, 7]}),
    ("one layer", {"layers_to_transform": [1]}),
    ("ranks", {"rank_pattern": {"q_proj": 8}}),
    ("normal start", {"init_lora_weights": "gaussian"}),
    ("plain weights", {}),
    ("orthogonal start, plain weights", {"init_lora_weights": "orthogonal"}),
    ("DoRA, plain weights", {"use_dora": True}),
]


@pytest.mark.parametrize("kind, config", FOREIGN, ids=[kind for kind, _ in FOREIGN])
def test_adapters_of_other_tools_have_plain_figures(kind, config, tiny, tmp_path, quick, adapter):
    folder = write_adapter(tiny, tmp_path / "adapter", 0.2, **config)
    assert {path.name for path in folder.iterdir()} <= {"README.md", CONFIG, WEIGHTS}
    flags = ["--val-data", adapter.parent / "val.jsonl"]
    in_4bit = "plain weights" not in kind
    if not in_4bit:
        flags.append("--no-load-in-4bit")
    got = quick(*flags, adapter=folder)
    assert len(got.data["prompts"]) == 3
    assert got.data["settings"]["load_in_4bit"] == in_4bit
    for side, put_on in ("base", None), ("finetuned", folder):
        model = plain_model(tiny, put_on, in_4bit)
        figure, _ = plain_perplexity(model, AutoTokenizer.from_pretrained(tiny), HELD_OUT)
        assert got.data["perplexity"][side] == pytest.approx(figure, rel=1e-5)
    assert abs(got.data["perplexity"]["ratio"] - 1) > 1e-5
    assert "rows_seen" not in got.data["summary"]  # nothing tells
    assert not Page(got.page).curve()  # no log


CHANGES_ITS_BASE = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "corda"},
    {"init_lora_weights": "loftq"},
    {"init_lora_weights": "lora_ga"},
    {"init_lora_weights": "not yet known"},
    {"layer_replication": [[0, 2], [1, 2]]},
    {"kasa_config": {"beta": 0.0001}},
    {"alora_invocation_tokens": [10, 11]},
    {"arrow_config": {"top_k": 1}},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"peft_type": "IA3"},
    {"peft_type": "ADALORA"},
    {"peft_type": "PROMPT_TUNING"},
]


@pytest.mark.parametrize("config", CHANGES_ITS_BASE, ids=str)
def test_an_adapter_that_changes_its_base_is_refused(config, adapter, tmp_path, quick):
    folder = copy(adapter, tmp_path / "adapter")
    change(folder / CONFIG, **config)
    (key,) = config
    with pytest.raises(SystemExit, match=f"^error: .*no LoRA that .*base.* {key} .*; .*") as end:
        quick(adapter=folder)
    assert "\n" not in end.value.code


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


@pytest.mark.parametrize("config", ASKS_FOR, ids=lambda config: "-".join(config))
def test_answers_are_greedy_whatever_the_base_asks_for(config, results, tiny, tmp_path, quick):
    base = copy(tiny, tmp_path / "base")
    change(base / "generation_config.json", **config)
    got = quick("--model", base, tokens=24)
    assert got.data["prompts"] == results.data["prompts"][2:]


def test_a_repetition_penalty_holds_for_both_sides_and_is_named(quick, results, tiny, adapter):
    got = quick("--repetition-penalty", 1.5, tokens=24)
    assert got.data["settings"]["repetition_penalty"] == 1.5
    assert "repetition penalty 1.5" in got.data["summary"]["answers"]
    assert "penalty" not in results.out
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for side, put_on in ("base", None), ("finetuned", adapter):
        model = plain_model(tiny, put_on)
        for answer in got.data["prompts"]:
            told = plain_answer(model, tokenizer, answer["prompt"], repetition_penalty=1.5)
            assert answer[side] == told
        before = [answer[side] for answer in results.data["prompts"][2:]]
        assert before != [answer[side] for answer in got.data["prompts"]]


def test_padding_brings_no_token_that_a_penalty_would_heed(quick, monkeypatch):
    generate = LlamaForCausalLM.generate
    padded = []

    def watch(self, input_ids, attention_mask):
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            own = {id for id, counts in zip(ids, mask, strict=True) if counts}
            assert set(ids) == own
            padded.append(0 in mask)
        return generate(self, input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(LlamaForCausalLM, "generate", watch)
    quick()
    assert any(padded) and not all(padded)


def test_tokens_a_second_are_those_of_the_answers_alone(quick, monkeypatch):
    seconds = itertools.count(step=2)
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(evaluate, "time", clock)
    got = quick(tokens=5).data
    tokens = sum(answer["base_tokens"] + answer["finetuned_tokens"] for answer in got["prompts"])
    assert got["summary"]["tokens_per_second"] == tokens / (2 + 2)


def shouted(record):
    return {key: f"  {text.upper()}\n".replace(" ", "  ") for key, text in record.items() if text}


def other_answer(record):
    return record | {"output": "Something else."}


def joined(record):
    question = f"{record['instruction']}\n\n{record['input']}".strip()
    return {"instruction": question, "output": record["output"]}


SEEN = [  # rows of --val-data, how many were trained on, of how many more the question was
    ("none", HELD_OUT, 0, 0),
    ("all", TRAINED, 8, 0),
    ("in another order", TRAINED[::-1], 8, 0),
    ("a few", TRAINED[2:5], 3, 0),
    ("among others", HELD_OUT + TRAINED[:1], 1, 0),
    ("other blanks and case", [shouted(record) for record in TRAINED], 8, 0),
    ("the input in the question", [joined(record) for record in TRAINED], 8, 0),
    ("other answers", [other_answer(record) for record in TRAINED[:2]] + HELD_OUT, 0, 2),
    ("both", [TRAINED[0], other_answer(TRAINED[1]), *HELD_OUT], 1, 1),
]


@pytest.mark.parametrize("name, rows, known, asked_of", SEEN, ids=[case[0] for case in SEEN])
def test_rows_that_training_saw_get_no_verdict(name, rows, known, asked_of, quick, tmp_path):
    got = quick("--val-data", write(tmp_path / "v.jsonl", rows))
    summary = got.data["summary"]
    assert summary["rows_seen"] == known
    assert summary["questions_seen"] == known + asked_of
    verdict = summary["verdict"]
    assert ("No verdict" in verdict) == (known + asked_of > 0)
    if known:
        assert f"{known} of {len(rows)} rows were trained on" in verdict
    assert verdict in Page(got.page).text and squeezed(verdict) in squeezed(got.out)


TRAINED_FILE = [  # what became of it, rows of --val-data, words of the verdict
    ("gone", HELD_OUT, "Better"),
    ("changed", HELD_OUT, "was changed since"),
    ("gone", TRAINED, "8 of 8 rows were trained on"),
    ("changed", TRAINED, "8 of 8 rows were trained on"),
]


@pytest.mark.parametrize("fate, rows, words", TRAINED_FILE)
def test_what_became_of_the_file_trained_on_is_told(fate, rows, words, adapter, tmp_path, quick):
    folder = copy(adapter, tmp_path / "adapter")
    data = json.loads((folder / NOTED).read_text())["data"]
    path = tmp_path / "away/data.jsonl"
    change(folder / NOTED, data=data | {"path": str(path)})
    if fate == "changed":
        path.parent.mkdir()
        write(path, TRAINED[1:])
    got = quick("--val-data", write(tmp_path / "v.jsonl", rows), adapter=folder)
    summary = got.data["summary"]
    assert words in summary["verdict"]
    unchecked = fate == "gone" and rows == HELD_OUT
    assert ("Not compared with the rows of training" in summary.get("note", "")) == unchecked
    assert squeezed(summary.get("note", "")) in squeezed(got.out)


LONG_INPUT = {"input": "word " * 400}
NO_ROOM = [
    ("one", [HELD_OUT[0] | LONG_INPUT, *HELD_OUT[1:]], "1 of 8 rows left out: no room"),
    ("most", [HELD_OUT[0], *[row | LONG_INPUT for row in HELD_OUT[1:]]], "7 of 8 rows left out"),
    ("none", HELD_OUT, ""),
]


@pytest.mark.parametrize("name, rows, words", NO_ROOM, ids=[case[0] for case in NO_ROOM])
def test_rows_without_room_for_an_answer_are_counted(name, rows, words, quick, tmp_path):
    got = quick("--val-data", write(tmp_path / "v.jsonl", rows))
    line = got.data["summary"]["val data"]
    assert words in line and ("left out" in line) == bool(words)
    assert squeezed(words) in squeezed(got.out) and words in Page(got.page).text


@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens"])
def test_an_adapter_that_brings_weights_of_the_base_is_refused(name, adapter, tmp_path, quick):
    folder = copy(adapter, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(json.loads((folder / CONFIG).read_text())[BASE])
    weights[f"base_model.model.{name}.weight"] = 3 * base.get_submodule(name).weight.data
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(SystemExit, match="^error: .*changes weights of the base itself"):
        quick(adapter=folder)


PARTS = ["head", "tail", "blank", "end"]


@pytest.mark.parametrize("part", [*PARTS, "nothing", "no key"])
def test_another_prompt_than_that_of_training_is_refused(part, adapter, tiny, tmp_path, quick):
    frame = evaluate.chat_frame(AutoTokenizer.from_pretrained(tiny))._asdict()
    prompt = {name: frame[name] for name in PARTS}
    folder = copy(adapter, tmp_path / "adapter")
    noted = json.loads((folder / NOTED).read_text())
    noted.pop("prompt", None)
    write(folder / NOTED, noted)
    if part == "no key":
        assert quick(adapter=folder)
        return
    if part in PARTS:
        prompt[part] = "other" + prompt[part]
    change(folder / NOTED, prompt=prompt)
    if part == "nothing":
        assert quick(adapter=folder)
        return
    with pytest.raises(SystemExit, match=f"^error: .*{part} of the prompt .*other.*; put back"):
        quick(adapter=folder)


def test_a_lost_chat_template_is_told(adapter, tiny, tmp_path, quick):
    folder = copy(adapter, tmp_path / "adapter")
    frame = evaluate.chat_frame(AutoTokenizer.from_pretrained(tiny))._asdict()
    change(folder / NOTED, prompt={name: frame[name] for name in PARTS})
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="^error: .*head of the prompt is '### Instruction"):
        quick(adapter=folder)


BASES = [  # in adapter_config.json, where it lies, the folder to stand in
    ("base", "base", "."),
    ("./base", "base", "."),
    ("../base", "base", "elsewhere"),
    ("inner", "adapter/inner", "elsewhere"),
]


@pytest.mark.parametrize("named, place, here", BASES)
def test_a_base_is_looked_for_here_and_beside_the_adapter(
    named, place, here, adapter, tiny, tmp_path, quick, monkeypatch
):
    folder = copy(adapter, tmp_path / "adapter")
    copy(tiny, tmp_path / place)
    change(folder / CONFIG, base_model_name_or_path=named)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / here)
    assert quick(adapter=folder).data["prompts"]


NOWHERE = ["./a", "../a", "/nowhere", "~/nowhere", "some/where/else", "C:\\models\\a"]


@pytest.mark.parametrize("name", [*NOWHERE, "nowhere", "some/nowhere"])
def test_a_base_that_is_no_folder_is_asked_of_the_hub_where_it_can_be_there(
    name, adapter, tmp_path, quick, monkeypatch
):
    hub = mock.Mock(side_effect=OSError("no connection"))
    monkeypatch.setattr(evaluate, "cached_file", hub)
    folder = copy(adapter, tmp_path / "adapter")
    change(folder / CONFIG, base_model_name_or_path=name)
    with pytest.raises(SystemExit, match=f"^error: no folder {re.escape(name)}.*; "):
        quick(adapter=folder)
    assert hub.called == (name not in NOWHERE)


PRECISIONS = [  # asked for, trained in, used on a CPU
    (None, "fp32", "fp32"),
    (None, "fp16", "fp32"),
    (None, "bf16", "bf16"),
    ("fp16", "bf16", "fp32"),
    ("bf16", "fp32", "bf16"),
]


@pytest.mark.parametrize("asked_for, trained_in, used", PRECISIONS)
def test_a_cpu_computes_in_fp32_or_bf16(asked_for, trained_in, used, adapter, tmp_path, quick):
    folder = copy(adapter, tmp_path / "adapter")
    arguments = json.loads((folder / NOTED).read_text())["arguments"]
    change(folder / NOTED, arguments=arguments | {"precision": trained_in})
    flags = []
    if asked_for:
        flags = ["--precision", asked_for]
    got = quick(*flags, adapter=folder)
    assert got.data["settings"]["precision"] == used
    exact = quick("--precision", "fp32", adapter=folder).data["general"]["base"]
    assert got.data["general"]["base"] == pytest.approx(exact, rel=0.01)
    assert (got.data["general"]["base"] == exact) == (used == "fp32")


def test_an_adapter_works_on_a_base_that_comes_quantised(tiny, tmp_path, quick, adapter):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=nf4, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "base-bnb-4bit")
    got = quick("--model", tmp_path / "base-bnb-4bit").data["general"]
    whole = quick("--no-load-in-4bit").data["general"]
    for side in "base", "finetuned":
        assert got[side] == pytest.approx(whole[side], rel=0.02)


@pytest.mark.parametrize("size", [1, 3])
def test_neither_figures_nor_answers_move_with_batch_size(size, results, tmp_path):
    other = run(tmp_path, *results.flags, "--batch-size", size).data
    for group in "perplexity", "general":
        for key in "base", "finetuned", "ratio":
            assert other[group][key] == pytest.approx(results.data[group][key], rel=1e-6)
    assert other["prompts"] == results.data["prompts"]


def test_compare_equals_figures_worked_out_by_hand():
    base, finetuned = np.array([4.0, 6.0, 2.0]), np.array([2.0, 7.0, 1.0])
    figures = evaluate.compare(base, finetuned, np.array([2, 5, 1]))
    assert figures["base"] == pytest.approx(math.exp(12 / 8))
    assert figures["finetuned"] == pytest.approx(math.exp(10 / 8))
    assert figures["ratio"] == pytest.approx(math.exp(-2 / 8))
    assert (figures["tokens"], figures["rows"], figures["rows_improved"]) == (8, 3, 2)
    low, high = figures["ratio_ci95"]
    assert low <= figures["ratio"] <= high


def test_one_row_or_rows_that_changed_alike_get_no_invented_interval():
    for rows in 1, 5:
        figures = evaluate.compare(np.full(rows, 4.0), np.full(rows, 2.0), np.full(rows, 2))
        assert figures["ratio"] == pytest.approx(math.exp(-1))
        assert figures["ratio_ci95"] is None or np.allclose(figures["ratio_ci95"], math.exp(-1))


def test_interval_covers_the_truth_near_its_nominal_rate(monkeypatch):
    fast = functools.partial(scipy.stats.bootstrap, n_resamples=800)
    monkeypatch.setattr(scipy.stats, "bootstrap", fast)
    random = np.random.default_rng(7)
    # rows of 5 to 79 tokens (mean 42) change by -0.1 nats a token on the whole, rows differ
    truth, covered = math.exp(-0.1), 0
    for _ in range(200):
        tokens = random.integers(5, 80, 40)
        base = tokens * random.gamma(4, 0.5, 40)
        finetuned = base + tokens * random.normal(-0.1, 0.3, 40)
        low, high = evaluate.compare(base, finetuned, tokens)["ratio_ci95"]
        assert low < high
        covered += low <= truth <= high
    assert 0.88 <= covered / 200 <= 0.99


VERDICTS = {  # what is changed of the trained adapter, rows, word
    "trained": (None, 8, "better"),
    "noise": ({"strength": 2, "target_modules": ["lm_head"]}, 8, "worse"),
    "chance": ({"strength": 0.5}, 4, "no clear difference"),
    "without effect": ({"strength": 0}, 8, "no clear difference"),
    "one row": (None, 1, "no clear difference"),
}


@pytest.mark.parametrize("changes, rows, word", VERDICTS.values(), ids=VERDICTS)
def test_verdicts_claim_no_more_than_intervals(changes, rows, word, adapter, tiny, tmp_path):
    folder = write_adapter(tiny, tmp_path / "adapter", **changes) if changes else adapter
    val = write(tmp_path / "val.jsonl", HELD_OUT[:rows])
    flags = ["--adapter", folder, "--prompts", adapter.parent / "asked.json"]
    got = run(tmp_path, *flags, "--val-data", val, "--max-new-tokens", 8)
    assert len(got.data["prompts"]) == 3 + min(rows, 5)  # the default of --val-prompts
    summary, text = got.data["summary"], Page(got.page).text
    words = "better", "worse", "no clear difference"
    assert [each for each in words if each in summary["verdict"].lower()] == [word]
    assert summary["verdict"] in text and squeezed(summary["verdict"]) in squeezed(got.out)
    (line,) = re.findall(r"^elsewhere .*(?:\n {12}.*)*", got.out, re.MULTILINE)
    general, held_out = got.data["general"], got.data["perplexity"]
    hurt = bool(general["ratio_ci95"]) and general["ratio_ci95"][0] > 1
    assert ("worse" in squeezed(line), "nodamage" in squeezed(line)) == (hurt, not hurt)
    assert tells(line, general["base"], general["finetuned"], general["ratio"])
    assert tells(text, general["base"], general["finetuned"], held_out["base"])
    without_effect = changes == {"strength": 0}
    assert ("WARNING" in got.out) == (summary["answers_changed"] == 0) == without_effect
    assert (held_out["ratio"] == general["ratio"] == 1) == without_effect


def test_questions_built_in_are_not_in_the_data_and_everyday_ones_of_other_fields(
    adapter, tmp_path
):
    got = run(tmp_path, "--adapter", adapter, "--max-new-tokens", 1).data
    questions = {result["prompt"] for result in got["prompts"]}
    assert len(questions) == len(got["prompts"]) == 10
    assert {result["reference"] for result in got["prompts"]} == {None}
    assert got["perplexity"] is None and "--val-data" in got["summary"]["verdict"]
    assert len(set(map(tuple, PAIRS))) == len(PAIRS) == got["general"]["rows"] == 20
    everyday = " ".join(question + answer for question, answer in PAIRS).casefold()
    ours = "kube pod cluster docker container helm yaml deploy devops node server terraform linux"
    assert not [word for word in ours.split() if re.search(rf"\b{word}", everyday)]
    data = Path(evaluate.__file__).parent / "data"
    data = [(data / name).read_text("utf-8") for name in ("sample_dataset.jsonl", "raw_qa.csv")]
    data = "".join(data).casefold()
    assert not [
        each for each in questions | {question for question, _ in PAIRS} if each.casefold() in data
    ]


def test_held_out_questions_are_asked_first_and_their_references_shown(results):
    prompts = results.data["prompts"]
    first = [f"{row['instruction']}\n\n{row['input']}".strip() for row in HELD_OUT[:2]]
    assert [result["prompt"] for result in prompts] == first + ASKED
    references = [row["output"] for row in HELD_OUT[:2]]
    assert [result["reference"] for result in prompts] == references + [None] * 3
    for reference in references:
        assert reference in Page(results.page).text and reference in results.out


def test_a_reference_is_shown_whole(said):
    references = [result["reference"] for result in said.data["prompts"]]
    assert references == [*list(REFERENCES.values())[:5], *[None] * len(ANSWERS)]
    for shown in Page(said.page).text, said.out:
        assert "and so on" in shown and "and end." in shown
        assert "始部署部署" in squeezed(shown) and "終" in shown
        assert len(re.findall(r"\bcut\b", shown)) == 2  # the endless answers
        assert CODE in shown


@pytest.mark.parametrize("template", ["zephyr", "chatml", "llama3"])
def test_an_answer_ends_at_the_end_of_turn_token(template, tmp_path, asked):
    adapter = write_parrot(tmp_path, {"Ċ": list("Pod")}, template=template)  # Ċ: a line end
    got = run(tmp_path, "--adapter", adapter, "--prompts", asked)
    sides = {"base": "Pod", "base_stopped": True, "base_tokens": 4}
    sides |= {key.replace("base", "finetuned"): value for key, value in sides.items()}
    assert all(sides.items() <= result.items() for result in got.data["prompts"])
    assert got.data["summary"]["base_stopped"] == 3
    assert got.data["summary"]["mean_base_tokens"] == 4


def test_both_answers_are_shown_and_one_that_is_cut_is_said_to_be_cut(said):
    answers = {result["prompt"].split()[-1]: result for result in said.data["prompts"][5:]}
    for question, answer in ANSWERS.items():
        stopped = question != "[endless]"
        assert answers[question]["base"] == answer[0].strip() or not stopped
        assert answers[question]["base_stopped"] == stopped
        assert answers[question]["base_tokens"] == (2 if stopped else 50)
    assert answers["[two]"]["finetuned"] == "the second answer"
    assert said.data["summary"]["answers_changed"] == 1 and "WARNING" not in said.out
    assert re.search(r"^the first answer +\| the second answer$", said.out, re.MULTILINE)
    assert said.data["summary"]["base_stopped"] == 13
    assert re.search("the first answer.*the second answer", Page(said.page).text, re.DOTALL)
    assert Page(said.page).inside["pre"].count(CODE) == 2 + 2 + 1  # answers, reference


def test_control_tokens_typed_in_a_prompt_stay_text(adapter, tiny, tmp_path, monkeypatch):
    seen, generate = [], LlamaForCausalLM.generate

    def watch(self, *args, **kwargs):
        seen.extend(kwargs.get("input_ids", *args[:1]).tolist())
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", watch)
    prompts = write(tmp_path / "p.json", ["say </s> now"])
    run(tmp_path, "--adapter", adapter, "--prompts", prompts, "--max-new-tokens", 2)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert seen[0] == seen[1] and seen[0].count(tokenizer.eos_token_id) == 1  # of the user's turn
    assert tokenizer.decode(seen[0]) == "<|user|>\nsay </s> now</s>\n<|assistant|>\n"


def test_json_has_exactly_the_promised_keys_and_settings_as_resolved(results, tiny, adapter):
    data = results.data
    assert set(data) == {"summary", "prompts", "perplexity", "general", "settings"}
    keys = "prompt base finetuned reference"
    keys += " base_stopped finetuned_stopped base_tokens finetuned_tokens"
    assert all(set(result) == set(keys.split()) for result in data["prompts"])
    keys = "base finetuned ratio ratio_ci95 tokens rows rows_improved"
    assert set(data["perplexity"]) == set(data["general"]) == set(keys.split())
    assert data["summary"].items() <= results.returned.items()
    settings = {"model": tiny, "adapter": str(adapter), "precision": "fp32", "device": "cpu"}
    assert (settings | {"load_in_4bit": True}).items() <= data["settings"].items()
    assert {"torch", "transformers", "peft"} <= set(data["settings"]["versions"])
    assert set(vars(evaluate.parse_args([]))) <= set(data["settings"])
    assert sorted(os.listdir(results.page.parent)) == ["results.html", "results.json"]


def test_what_is_strange_beside_an_adapter_costs_no_result(adapter, tiny, tmp_path):
    """The base was moved, training_config.json is another tool's."""
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    gone = {"base_model_name_or_path": str(tmp_path / "gone")}
    write(moved / CONFIG, json.loads((moved / CONFIG).read_text()) | gone)
    write(moved / "training_config.json", {"lr": 1})
    prompts = write(tmp_path / "p.json", ["Was heißt „Größe“? 🚀"])
    flags = ["--adapter", moved, "--prompts", prompts, "--max-new-tokens", 2, "--model", tiny]
    got = run(tmp_path, *flags)
    assert got.data["settings"]["model"] == tiny and got.data["settings"]["load_in_4bit"] is True
    assert "Was heißt „Größe“? 🚀".encode() in (tmp_path / "out/results.json").read_bytes()
    assert Page(got.page).curve()


def test_figures_beyond_all_numbers_are_not_blamed_on_the_output(tiny, tmp_path, adapter, asked):
    folder = write_adapter(tiny, tmp_path / "adapter", 1e4, target_modules=["lm_head"])
    flags = ["--adapter", folder, "--val-data", adapter.parent / "val.jsonl", "--prompts", asked]
    with pytest.raises(SystemExit, match="^error: .*adapter(?!.*--output).*; "):
        run(tmp_path, *flags, "--max-new-tokens", 2)


@pytest.mark.parametrize("fault", ["full disk", "failed move"])
def test_a_failed_write_leaves_the_old_results(fault, said, asked, tmp_path, monkeypatch):
    flags = [*said.flags[:2], "--prompts", asked, "--max-new-tokens", 1]
    page = run(tmp_path, *flags).page
    old = {path: path.read_bytes() for path in page.parent.iterdir()}

    if fault == "failed move":
        monkeypatch.setattr(os, "replace", lambda *paths: os.rename("nowhere", "x"))
    disk = largest_file(999) if fault == "full disk" else contextlib.nullcontext()
    with disk, pytest.raises(SystemExit, match="^error: .*(File too large|No such file).*; "):
        run(tmp_path, *flags, "--batch-size", 2)
    assert {path: path.read_bytes() for path in page.parent.iterdir()} == old


def template(words):
    """Put something at the start of a chat template."""

    def put(path):
        path.write_text("{{ %s }}" % words + path.read_text())

    return put


def own_tokenizer(path):
    change(path, tokenizer_class="Own", auto_map={"AutoTokenizer": ["code.T", None]})
    (path.parent / "code.py").write_bytes(CODE_RUNS)


def own_model(path):
    change(path, model_type="own", auto_map={"AutoConfig": "code.Config"})
    (path.parent / "code.py").write_bytes(CODE_RUNS)


def pickled(path):
    path.unlink()
    (path.parent / "pytorch_model.bin").write_bytes(PICKLE)
    (path.parent / "adapter_model.bin").write_bytes(PICKLE)


def not_finite(path):
    weights = load_file(path)
    save_file({name: w * math.nan for name, w in weights.items()}, path, {"format": "pt"})


def more_tokens(path):
    tokenizer = AutoTokenizer.from_pretrained(path.parent)
    tokenizer.add_tokens(["<new>"])  # the model got none
    tokenizer.save_pretrained(path.parent)


def shortened(path):
    os.truncate(path, 1000)


PICKLE = b"cos\nmkdir\n(S'exploded'\ntR."  # these two leave a trace
CODE_RUNS = b"open('exploded', 'w')"
GOOD = '{"instruction": "a", "output": "b"}\n'
HALF = GOOD.replace("b", "\\ud800")
LONG = GOOD.replace("a", "why " * 2000)
C = f"moved/{CONFIG}"
W = f"moved/{WEIGHTS}"
T = f"moved/{NOTED}"
CHAT = "moved/chat_template.jinja"
P = "--prompts p.json"
V = "--val-data v.jsonl"
EARLY = [  # told before a model is loaded; "moved" is a copy of a good adapter
    # flags, a file, what is put in it, named in the line
    ("--batch-size 0", None, None, "--batch-size"),
    ("--batch-size -1", None, None, "--batch-size"),
    ("--batch-size 1.5", None, None, "--batch-size"),
    ("--batch-size 99999999999999999999", None, None, "--batch-size"),
    ("--max-new-tokens 0", None, None, "--max-new-tokens"),
    ("--max-new-tokens nan", None, None, "--max-new-tokens"),
    ("--val-prompts -1", None, None, "--val-prompts"),
    ("--repetition-penalty 0", None, None, "--repetition-penalty"),
    ("--repetition-penalty nan", None, None, "--repetition-penalty"),
    ("--precision fp8", None, None, "--precision"),
    ("--temperature 1", None, None, "--temperature"),
    ("--adapter", None, None, "--adapter"),
    ("results", None, None, "results"),
    ("--adapter nowhere", None, None, "nowhere: no folder"),
    ("--adapter user/nowhere", None, None, "user/nowhere: no folder"),
    ("--prompts nowhere.json", None, None, "nowhere.json"),
    ("--val-data nowhere.jsonl", None, None, "nowhere.jsonl"),
    ("--output out/r.html", None, None, "out/r.html"),
    (f"--output {C}", None, None, C),
    ("--prompts folder", "folder/x", "", "folder"),
    ("--val-data folder", "folder/x", "", "folder"),
    ("--output folder", "folder/x", "", "folder"),
    ("--adapter a.json", "a.json", "{}", "a.json: no folder"),
    ("", C, "{", CONFIG),
    ("", C, "[]", CONFIG),
    ("", C, b"\xff\xfe\x00", CONFIG),
    ("", C, None, CONFIG),
    ("", W, None, WEIGHTS),
    ("", W, pickled, WEIGHTS),
    ("", T, "[]", T),
    ("", "moved/tokenizer.json", "{", "moved"),
    ("", "moved/tokenizer_config.json", own_tokenizer, "moved"),
    ("", CHAT, template("''.__class__.__mro__[1].__subclasses__()"), "chat template"),
    ("", CHAT, template("lipsum.__globals__['os'].mkdir('exploded')"), "chat template"),
    ("", CHAT, template("range(10**9)|list"), "chat template"),
    ("", CHAT, template("'a' * 10**17"), "chat template"),
    ("", CHAT, template("raise_exception('no')"), "chat template"),
    (P, "p.json", "{}", "p.json"),
    (P, "p.json", '"Why?"', "p.json"),
    (P, "p.json", "[]", "p.json"),
    (P, "p.json", '[["a"]]', "p.json"),
    (P, "p.json", '[{"prompt": "a"}]', "p.json"),
    (P, "p.json", "['a']", "p.json"),
    (P, "p.json", "", "p.json"),
    (P, "p.json", "null", "p.json"),
    (P, "p.json", "[" * 100_000, "p.json"),
    (P, "p.json", b"\xff\x00", "p.json"),
    (P, "p.json", f"[{'9' * 5000}]", "p.json"),
    (P, "p.json", '["a", "\\ud800"]', "item 2"),
    (P, "p.json", '["a", null]', "item 2"),
    (P, "p.json", '["a", "  "]', "item 2"),
    (P, "p.json", '["a", 1]', "item 2"),
    (V, "v.jsonl", "", "v.jsonl"),
    (V, "v.jsonl", b"\xff\x00", "v.jsonl"),
    (V, "v.jsonl", GOOD + "\n{", "v.jsonl:3"),
    (V, "v.jsonl", GOOD + "\n[]", "v.jsonl:3"),
    (V, "v.jsonl", '{"instruction": "a"}', 'v.jsonl:1: "output"'),
    (V, "v.jsonl", '{"instruction": 1}', "v.jsonl:1"),
    (V, "v.jsonl", HALF, "v.jsonl:1"),
    ("--output f/r.json", "f", "", "f"),
    ("--output p.json --prompts p.json", "p.json", '["a"]', "p.json"),
    ("--output v.json --val-data v.json", "v.json", GOOD, "v.json"),
]
LATE = [
    ("", W, shortened, "moved"),
    ("", W, "hello", "moved"),
    ("", W, not_finite, "finite"),
    ("", C, {"lora_alpha": math.nan}, "finite"),
    ("", C, {"target_modules": ["k_proj", "o_proj"]}, "does not fit"),
    ("", C, {"target_modules": ["q_proj"]}, "does not fit"),
    ("", C, {"target_modules": "(q_proj"}, "does not fit"),
    ("", C, {"rank_pattern": [1]}, "does not fit"),
    ("--model nowhere/model", None, None, "nowhere/model"),
    ("", C, {"base_model_name_or_path": "/nowhere/base"}, "no folder /nowhere/base"),
    ("", C, {"base_model_name_or_path": None}, "--model"),
    ("", C, {"base_model_name_or_path": 5}, "--model"),
    ("--model base", "base/model.safetensors", pickled, "base"),
    ("--model base", "base/config.json", own_model, "base"),
    (P, "moved/tokenizer.json", more_tokens, "tokens of the tokenizer"),
    (V, "v.jsonl", LONG, "v.jsonl"),
    (P, "p.json", f'["{"Pod " * 75000}"]', "1,024"),
    (P, "p.json", f'["{"x" * 300000}"]', "1,024"),
    ("--max-new-tokens 3000", None, None, "1,024"),
]


def identify(case):
    """A name for a case that is not too long."""
    flags, path, content, named = case
    return f"{flags} {path} {str(content)[:20]!a} {named}"


@pytest.mark.parametrize("case", [*EARLY, *LATE], ids=identify)
def test_a_mistake_ends_in_one_line(case, adapter, tiny, asked, tmp_path, capsys, monkeypatch):
    flags, path, content, named = case
    monkeypatch.chdir(tmp_path)
    copy(adapter, "moved")
    copy(tiny, "base")
    write(Path("p.json"), ["<new>"])
    if path:
        path = Path(path)
        path.parent.mkdir(exist_ok=True)
    if callable(content):
        content(path)
    elif isinstance(content, dict):
        change(path, **content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif path:
        path.unlink()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    right = ["--adapter", "moved", "--prompts", str(asked), "--max-new-tokens", "1"]
    if case in EARLY:
        monkeypatch.setattr(evaluate, "load_base", mock.Mock(side_effect=AssertionError("loaded")))
    with pytest.raises(SystemExit) as end:
        evaluate.main([*right, "--output", "out/results.json", *flags.split()])
    told = [end.value.code]
    if end.value.code == 2:  # argparse has said it
        told = capsys.readouterr().err.splitlines()[-1:]
    assert re.fullmatch("(evaluate.py: )?error: .*(; | takes |argument).*", told[0])  # what to do
    assert named in told[0] and len(told[0]) < 600
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert after == before
    assert not Path("out").exists() and not Path("exploded").exists()


@pytest.mark.parametrize("other", [{"seed": 1}, {"width": 32}, {"layers": 3}], ids=str)
@pytest.mark.parametrize("trained_here", [True, False])
def test_another_base_is_refused(other, trained_here, adapter, tiny, tmp_path, asked):
    base = tmp_path / "other"
    offline_model.write_tiny(base, **other)
    if not trained_here:  # the folder of another tool tells only layers and shapes
        adapter = write_adapter(base, tmp_path / "adapter")
        base = tiny if "seed" not in other else pytest.skip("nothing tells")
    with pytest.raises(SystemExit, match="^error: .*fit.*; .*--model.*$") as end:
        run(tmp_path, "--adapter", adapter, "--prompts", asked, "--model", base)
    assert "\n" not in end.value.code and not (tmp_path / "out").exists()


def test_a_read_only_folder_is_refused_before_a_model_is_loaded(adapter, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    flags = ["--adapter", adapter, "--model", "nowhere/model"]
    with pytest.raises(SystemExit, match=f"^error: .*{tmp_path}/out: .*; .*--output$"):
        without_privileges(lambda: run(tmp_path, *flags))


def test_out_of_gpu_memory_ends_in_one_line_of_advice(adapter, asked, tmp_path, monkeypatch):
    full = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(LlamaForCausalLM, "generate", full)
    with pytest.raises(
        SystemExit, match="^error: 8 prompts at once: CUDA out of memory; lower --batch-size"
    ):
        run(tmp_path, "--adapter", adapter, "--prompts", asked)
    assert not (tmp_path / "out").exists()


def columns_of(text):
    """How many columns of a terminal a text takes."""
    marks = sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "FW" for c in text)


@pytest.mark.parametrize("columns", [1, 60, 80, 121])
def test_answers_fit_the_terminal_and_stay_aligned(columns, said, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = said.out if columns == 80 else run(tmp_path, *said.flags).out
    blocks = re.split(r"^\[(?=\d+/14\])", out, flags=re.MULTILINE)[1:]
    blocks[-1] = re.split(r"\n.*No clear", blocks[-1])[0]  # the verdict
    shown = dict(zip(ANSWERS, blocks[5:], strict=True))
    for block in blocks:
        lines = block.splitlines()
        assert max(map(columns_of, lines)) <= max(columns, 40)
        assert len({columns_of(line.split(" | ")[0]) for line in lines if " | " in line}) <= 1
    for question in "[long]", "[wide]", "[marks]", "[vowels]":
        text = squeezed(re.sub(r" \| .*", "", shown[question]))
        assert ANSWERS[question][0] in text
    for question in "[code]", "[two]":
        lines = [re.split(r" +\|", line)[0] for line in shown[question].splitlines()]
        assert columns == 1 or ANSWERS[question][0] in "\n".join(lines)


def test_what_would_steer_a_terminal_is_shown_and_not_sent(said):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e]", said.out)
    assert len(re.findall(r"\S\[2Ja\S+?0;title", squeezed(said.out))) == 5 + 9 + 4 + 1


def test_piped_output_is_plain_in_any_encoding(said, tmp_path):
    command = [
        sys.executable,
        evaluate.__file__,
        *map(str, said.flags),
        "--output",
        tmp_path / "r.json",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert run.returncode == 0 and (tmp_path / "r.html").exists()
    assert not re.search(rb"[^\n\x20-\x7e]", run.stdout) and rb"\u90e8" in run.stdout
    assert not re.search(rb"[^\n\x20-\x7e]", run.stderr)


def test_the_page_tells_verdict_figures_and_settings_in_words_and_in_order(results):
    page, data = Page(results.page), results.data
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(below - above <= 1 for above, below in zip(headings, headings[1:]))
    headed = "".join(page.inside[f"h{level}"] for level in range(1, 7))
    assert all(result["prompt"] in headed for result in data["prompts"])
    assert {"main", "title", "details", "svg"} <= page.names
    assert dict(page.tags)["html"]["lang"] == "en" and "open" not in dict(page.tags)["details"]
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert page.curve() and all(a["aria-label"] for _, a in page.tags if a.get("role") == "img")
    verdict = page.text.index(data["summary"]["verdict"])
    assert verdict < page.text.index("lower is better") < page.text.index(ASKED[0])
    for result in data["prompts"]:
        assert result["base"] in page.text and result["finetuned"] in page.text
    settings = page.inside["details"]
    settings = settings[settings.index("{") :]
    assert json.loads(settings)["versions"]["torch"] == version("torch")
    figures = data["perplexity"], data["general"]
    assert tells(page.text, *(f[side] for f in figures for side in ("base", "finetuned", "ratio")))
    log = Path(data["settings"]["adapter"], "training_log.jsonl").read_text()
    assert tells(page.text, float(re.findall(r'"eval_loss": (.*?)[,}]', log)[-1]))


def losses(*values, key="loss", first=1):
    return [{"step": step, key: value} for step, value in enumerate(values, first)]


ODD = [*losses("<b>", [1], 10**400), {"step": "<b>", "loss": 9.0}, {"loss": 9}, {"step": 1}]
ODD += [[], 7, b"[" * 100_000, b"\x00", b"\xff", b'{"step": 9, "lo']
LOWEST = losses(5.0, 4.0, 3.0) + losses(4.5, 3.25, 3.75, key="eval_loss", first=2)
LOGS = (
    {  # entries of the log, figures and words that the page then tells
        "one step": (losses(2.5), [2.5], ["step 1"]),
        "many steps": (losses(*(5 - n / 2500 for n in range(10_000))), [5, 1], ["step 10000"]),
        "lowest earlier": (LOWEST, [5, 3, 3.75, 3.25], ["step 3", "lowest"]),
    }
    | {f"of no use: {str(line)[:30]}": ([line], [], []) for line in ODD}
)


@pytest.mark.parametrize("name", LOGS)
def test_the_curve_is_that_of_the_log(name, said, asked, tmp_path):
    log, figures, words = LOGS[name]
    moved = Path(shutil.copytree(said.flags[1], tmp_path / "moved"))
    write(moved / "training_log.jsonl", log)
    flags = ["--adapter", moved, "--prompts", asked, "--max-new-tokens", 1, "--no-load-in-4bit"]
    page = Page(run(tmp_path, *flags).page)
    assert bool(page.curve()) == bool(figures)
    assert tells(page.text, *figures) and len(page.source) < 100_000
    assert all(word in page.text for word in words)
    svg = "".join(re.findall("<svg.*?</svg>", page.source, re.DOTALL))
    assert not re.search(r"\b(nan|inf)\b", svg)


def percents(style):
    """The numbers of a style such as "left: 3.2%; right: 10%"."""
    return {name: float(value) for name, value in re.findall(r"(\w+): ([-.\de]+)%", style)}


def test_bars_and_their_box_are_as_long_as_the_figures(results):
    page = Page(results.page)
    shown = [attributes for tag, attributes in page.tags if tag == "div"]
    bars = [each for each in shown if each.get("class", "").startswith(("bar ", "box"))]
    styles = [percents(each["style"]) for each in bars]
    for group, (before, after, box) in zip(
        ["perplexity", "general"], [styles[:3], styles[3:]], strict=True
    ):
        figures = results.data[group]
        low, high = figures["ratio_ci95"]
        unit = before["width"]
        assert 0 < unit <= 100
        assert after["width"] == pytest.approx(unit * figures["ratio"])
        assert box["left"] == pytest.approx(unit * low)
        assert 100 - box["right"] == pytest.approx(min(100, unit * high))


def drawn(page, name):
    """The points of a path of the page."""
    (path,) = [a["d"] for tag, a in page.tags if tag == "path" and a["class"] == name]
    return [tuple(map(float, point.split(","))) for point in re.findall("[-.\\d]+,[-.\\d]+", path)]


def test_the_curve_has_each_loss_its_running_mean_and_round_dots(said, asked, tmp_path):
    moved = copy(said.flags[1], tmp_path / "moved")
    train = [5.0 - 0.1 * n + (n % 3) for n in range(25)]
    val = [{"step": step, "eval_loss": loss} for step, loss in [(0, 6.0), (10, 4.0), (25, 3.0)]]
    write(moved / "training_log.jsonl", losses(*train) + val)
    flags = ["--adapter", moved, "--prompts", asked, "--max-new-tokens", 1, "--no-load-in-4bit"]
    page = Page(run(tmp_path, *flags).page)
    single = {step: -y for step, y in drawn(page, "single")}
    assert single == pytest.approx(dict(enumerate(train, 1)))
    for step, y in drawn(page, "mean"):
        window = train[max(0, int(step) - 3) : int(step)]
        assert -y == pytest.approx(sum(window) / len(window))
    dots = [(a["cx"], a["cy"]) for tag, a in page.tags if tag == "circle"]
    low, high = min(train + [3.0]), max(train + [6.0])
    for (x, y), (step, loss) in zip(dots, [(0, 6.0), (10, 4.0), (25, 3.0)], strict=True):
        assert float(x[:-1]) == pytest.approx(100 * step / 25)
        assert float(y[:-1]) == pytest.approx(100 * (high - loss) / (high - low))


def test_hostile_texts_are_inert_on_the_page_which_refers_to_nothing_outside(said, results):
    assert Page(said.page).text.count(HOSTILE) == 5 + 9 + 4 + 1  # questions, answers, reference
    loading = "src href srcset action data background poster xlink:href".split()
    for page in Page(said.page), Page(results.page):
        assert not page.names & set("script iframe img b link object base form".split())
        for _, attributes in page.tags:
            assert not [name for name in attributes if name in loading or name.startswith("on")]
            assert "http" not in "".join(filter(None, attributes.values()))
        assert not re.search(r"url\(|@import|https?:", page.inside["style"])


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in "headless=new no-sandbox disable-gpu disable-dev-shm-usage".split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = selenium.Chrome(options, selenium.ChromeService(driver))
    yield browser
    browser.quit()


TEXTS = """const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) if (walker.currentNode.data.trim()) found.push(walker.currentNode);"""
FAINT = """const parts = colour => colour.match(/[\\d.]+/g).map(Number);
const luminance = colour => parts(colour).slice(0, 3).map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const ground = e => { while (e && (parts(getComputedStyle(e).backgroundColor)[3] ?? 1) == 0)
  e = e.parentElement; return e ? getComputedStyle(e).backgroundColor : 'rgb(255, 255, 255)' };
return found.filter(text => { const e = text.parentElement, style = getComputedStyle(e);
  const ink = luminance(e.closest('svg') ? style.fill : style.color), paper = luminance(ground(e));
  return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05) < 4.5 }).map(t => t.data)"""
BROKEN = """return found.filter(t => !t.parentElement.closest('pre, h2, h3, details')).flatMap(t =>
  [...t.data.matchAll(t.parentElement.closest('table') ? /\\S+/g : /\\d[\\d.,]*\\d/g)].filter(m => {
    const r = document.createRange(); r.setStart(t, m.index); r.setEnd(t, m.index + m[0].length);
    return new Set([...r.getClientRects()].map(b => b.top)).size > 1 }).map(m => m[0]))"""
OUTSIDE = """return [...document.querySelectorAll('body *')].filter(e =>
  e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
SMALL = """return [...document.querySelectorAll('svg text')].filter(e =>
  parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a < 11).map(e => e.textContent)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_all_can_be_read_and_nothing_loads(browser, results, said, width, scheme):
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    for page in results.page, said.page:
        browser.get_log("performance")
        browser.get(page.resolve().as_uri())
        sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        sent = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        assert [params["request"]["url"] for params in sent] == [page.resolve().as_uri()]
        script = browser.execute_script
        script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert script("return document.documentElement.scrollWidth") <= width
        ran = "return [innerWidth, document.scripts.length, window.pwned]"
        assert script(ran) == [width, 0, None]
        for fault in OUTSIDE, TEXTS + FAINT, TEXTS + BROKEN, SMALL:
            assert script(fault) == []
