"""What evaluate.py says of a base model and its adapter is true, fits the screen and is safe to open."""

import collections
import contextlib
import html.parser
import io
import json
import logging
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import offline_model
import peft
import pytest
import scipy.stats
import torch
from conftest import largest_file, without_privileges
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import evaluate
import lora_finetune

ROOT = Path(evaluate.__file__).parent
ASKED = ["What is a Pod?", "Name a Service, please.", "Why?"]
THINGS = "Pod Service Node Ingress Secret Volume Job Probe Label Taint Quota Helm".split()
RECORDS = [
    {
        "instruction": f"What is a {thing}?",
        "input": "In one line." * (n % 3 == 0),
        "output": f"A {thing} is thing number {n} of a cluster." + " Really." * n,
    }
    for n, thing in enumerate(THINGS)
]
HELD_OUT = RECORDS[:8]
PAIRS = [line.split(" | ") for line in evaluate.EVERYDAY.splitlines()]
EVERYDAY = [{"instruction": question, "input": "", "output": answer} for question, answer in PAIRS]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HOSTILE = (
    "<script>window.pwned = 1</script><img src=http://evil.example/x.png onerror=window.pwned=2>"
    "</pre></div></details><svg onload=window.pwned=3><iframe src=https://evil.example/></iframe>"
    '"><b onmouseover="window.pwned=4">&lt;&amp;{{ 7 * 7 }}'
)
STEERING = "\x1b[2Ja\x1b]0;title\x07b\x9b1mc\rd\x08e\u202ef\u200bg\x00h\ti\x7f"
CODE = "Write\n```yaml\nkind: Pod\nspec:\n    - name: a\n\n      port: 80\n```\nand apply it."


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_prompts(path, prompts):
    path.write_text(json.dumps(prompts))
    return path


def strict(path):
    """The JSON of a file; NaN and Infinity, which are no JSON, fail."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def run(folder, *flags):
    """What evaluate.main writes and prints: data of the JSON, path of the page, text of the terminal."""
    output, printed = folder / "out/results.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        returned = evaluate.main([*map(str, flags), "--output", str(output)])
    page = output.with_suffix(".html")
    return SimpleNamespace(
        data=strict(output), page=page, out=printed.getvalue(), returned=returned
    )


def plain_model(base, adapter=None, in_4bit=True):
    """A base model, and an adapter on it, as plain transformers and peft load them."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantised = {"quantization_config": nf4} if in_4bit else {}
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, device_map={"": "cpu"}, **quantised
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a kernel that rounds to bfloat16
    return (peft.PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def plain_perplexity(model, tokenizer, records):
    """exp of the mean NLL over answer + </s>, one row at a time from all logits: (figure, tokens)."""
    total, count = 0.0, 0
    for record in records:
        question = record["instruction"] + ("\n\n" + record["input"] if record["input"] else "")
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        text = prompt + record["output"] + "</s>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0].double().log_softmax(-1)
        total -= logs[start - 1 : -1].gather(1, ids[0, start:, None]).sum().item()
        count += ids.shape[1] - start
    return math.exp(total / count), count


def plain_answer(model, tokenizer, question):
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    return tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def write_adapter(base, folder, strength=0.0, **changes):
    """A LoRA folder by peft alone: no training_config.json, no tokenizer, no log; without strength no effect."""
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**config)
    )
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_A" not in name:
            weight.data += strength * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def write_parrot(folder, answers, after=(), template="zephyr"):
    """Write a model that says what is wanted, and an adapter that makes it say something else.

    {token at the end of a prompt: tokens of the answer}; a token stated twice is said for ever.
    Embeddings are unit vectors, layers add nothing, and the head maps each token to its follower.
    """
    offline_model.write_tiny(folder / "base", template=template or "zephyr")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    if not template:  # the prompt is the question and no more
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(template, "</s>")
    follower = {}
    for question, answer in answers.items():
        chain = [question, *answer, end]
        follower |= dict(list(zip(chain, chain[1:]))[::-1])
    changed = {question: answer[0] for question, answer in dict(after).items()}
    follower |= {token: end for token in changed.values()}
    new = [token for token in [*follower, "z"] if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new)
    tokenizer.save_pretrained(folder / "base")
    id_of = tokenizer.convert_tokens_to_ids
    config = AutoModelForCausalLM.from_pretrained(folder / "base").config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 8192
    model = LlamaForCausalLM(config)
    embedding, head = model.get_input_embeddings().weight.data, model.lm_head.weight.data
    for weight in (embedding, head):
        weight.zero_()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    number = {token: n for n, token in enumerate(follower)}
    for token, n in number.items():
        embedding[id_of(token), n] = 1
        head[id_of(follower[token]), n] = 1
    model.save_pretrained(folder / "base")
    write_adapter(folder / "base", folder / "adapter", r=1, target_modules=["lm_head"])
    weights = load_file(folder / "adapter" / WEIGHTS)
    for name, weight in weights.items():
        weight *= "lora_" not in name  # peft saves the head too
        for question, token in changed.items():
            if "lora_A" in name:
                weight[0, number[question]] = 1
            if "lora_B" in name:
                weight[id_of(token), 0] = 10
    save_file(weights, folder / "adapter" / WEIGHTS, {"format": "pt"})
    return folder / "adapter"


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("val") / "val.jsonl", HELD_OUT)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("asked") / "prompts.json", ASKED)


@pytest.fixture(scope="module")
def adapter(tiny, val, tmp_path_factory):
    """An adapter that lora_finetune.py trained on the tiny model, hard enough to change answers."""
    folder = tmp_path_factory.mktemp("trained")
    flags = "--max-steps 8 --learning-rate 0.02 --batch-size 6 --gradient-accumulation-steps 1"
    paths = ["--model", tiny, "--dataset", write_jsonl(folder / "data.jsonl", RECORDS)]
    paths += ["--val-data", val, "--output", folder / "a"]
    lora_finetune.main([*flags.split(), *map(str, paths)])
    return folder / "a"


@pytest.fixture(scope="module")
def flags(adapter, val, asked):
    """A whole evaluation: three questions and, before them, two that were held out."""
    paths = ["--adapter", adapter, "--val-data", val, "--prompts", asked]
    return [*paths, "--val-prompts", 2, "--max-new-tokens", 24]


@pytest.fixture(scope="module")
def results(flags, tmp_path_factory):
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
}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """Flags of an evaluation of which each answer is known, with hostile text wherever text can be."""
    folder = tmp_path_factory.mktemp("parrot")
    adapter = write_parrot(folder, ANSWERS, {"[two]": ["the second answer"]}, template=None)
    prompts = [f"{HOSTILE} {STEERING} say {question}" for question in ANSWERS]
    prompts = write_prompts(folder / '"><script>window.pwned = 5<!--.json', prompts)
    rows = [
        {"instruction": f"{HOSTILE} {STEERING}", "input": question, "output": reference}
        for question, reference in REFERENCES.items()
    ]
    paths = ["--adapter", adapter, "--val-data", write_jsonl(folder / "val.jsonl", rows)]
    return [*paths, "--prompts", prompts, "--no-load-in-4bit", "--max-new-tokens", 50]


@pytest.fixture(scope="module")
def said(parrot, tmp_path_factory):
    return run(tmp_path_factory.mktemp("said"), *parrot)


class Page(html.parser.HTMLParser):
    """What a browser would build: tags with their attributes, the text, and the text inside of a tag."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.inside = [], "", collections.defaultdict(str)
        self.open = collections.Counter()
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open[tag] += 1

    def handle_endtag(self, tag):
        self.open[tag] -= 1

    def handle_data(self, data):
        self.text += data if not self.open["style"] else ""
        for tag in +self.open:
            self.inside[tag] += data

    def curve(self):
        """What the loss curve is called, if there is one."""
        labels = (attributes.get("aria-label", "") for _, attributes in self.tags)
        return " ".join(label for label in labels if "loss" in label)

    def names(self):
        return {tag for tag, _ in self.tags}


def tells(text, *values):
    """Whether each of the values stands in the text, rounded to two places or more."""
    told = [float(figure) for figure in re.findall(r"\d+\.\d\d+", text)]
    return all(any(abs(figure - value) < 0.006 for figure in told) for value in values)


def squeezed(text):
    return re.sub(r"\s", "", text)


# ------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_answers_and_perplexities_are_those_of_plain_transformers_and_peft(
    side, results, tiny, adapter
):
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


FOREIGN = {
    "other layers": {"target_modules": ["q_proj", "down_proj"]},
    "all layers, other scale": {"target_modules": "all-linear", "use_rslora": True},
    "DoRA": {"use_dora": True},
    "head": {"target_modules": ["v_proj", "lm_head"]},
    "a layer trained whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_lora_folder_of_another_tool_has_the_figures_of_plain_peft(kind, tiny, tmp_path, val):
    folder = write_adapter(tiny, tmp_path / "adapter", 0.2, **FOREIGN[kind])
    assert {path.name for path in folder.iterdir()} <= {"README.md", CONFIG, WEIGHTS}
    prompts = write_prompts(tmp_path / "p.json", ["Why?"])
    flags = ["--adapter", folder, "--val-data", val, "--prompts", prompts, "--val-prompts", 0]
    got = run(tmp_path, *flags, "--max-new-tokens", 1)
    tokenizer, figures = AutoTokenizer.from_pretrained(tiny), got.data["perplexity"]
    base, _ = plain_perplexity(plain_model(tiny), tokenizer, HELD_OUT)
    finetuned, _ = plain_perplexity(plain_model(tiny, folder), tokenizer, HELD_OUT)
    assert figures["base"] == pytest.approx(base, rel=1e-5)
    assert figures["finetuned"] == pytest.approx(finetuned, rel=1e-5)
    assert abs(figures["ratio"] - 1) > 1e-3
    assert not Page(got.page).curve()  # no log


@pytest.mark.parametrize("size", [1, 3])
def test_neither_figures_nor_answers_move_with_batch_size(size, results, flags, tmp_path):
    other = run(tmp_path, *flags, "--batch-size", size).data
    for group in "perplexity", "general":
        for key in "base", "finetuned", "ratio":
            assert other[group][key] == pytest.approx(results.data[group][key], rel=1e-6)
    assert other["prompts"] == results.data["prompts"]


def test_without_4_bits_the_figures_are_those_of_the_plain_weights(flags, tiny, tmp_path):
    got = run(tmp_path, *flags, "--no-load-in-4bit", "--max-new-tokens", 1).data
    plain = plain_model(tiny, in_4bit=False)
    figure, _ = plain_perplexity(plain, AutoTokenizer.from_pretrained(tiny), HELD_OUT)
    assert got["perplexity"]["base"] == pytest.approx(figure, rel=1e-5)
    assert got["settings"]["load_in_4bit"] is False


def test_compare_equals_figures_worked_out_by_hand():
    base, finetuned = np.array([4.0, 6.0, 2.0]), np.array([2.0, 7.0, 1.0])
    figures = evaluate.compare(base, finetuned, np.array([2, 5, 1]))
    assert figures["base"] == pytest.approx(math.exp(12 / 8))
    assert figures["finetuned"] == pytest.approx(math.exp(10 / 8))
    assert figures["ratio"] == pytest.approx(math.exp(-2 / 8))
    assert (figures["tokens"], figures["rows"], figures["rows_improved"]) == (8, 3, 2)
    low, high = figures["ratio_ci95"]
    assert low <= figures["ratio"] <= high


@pytest.mark.parametrize("rows", [1, 5])
def test_one_row_or_rows_that_changed_alike_get_no_invented_interval(rows):
    figures = evaluate.compare(np.full(rows, 4.0), np.full(rows, 2.0), np.full(rows, 2))
    assert figures["ratio"] == pytest.approx(math.exp(-1))
    assert figures["ratio_ci95"] is None or np.allclose(figures["ratio_ci95"], math.exp(-1))


def test_interval_covers_the_truth_near_its_nominal_rate(monkeypatch):
    bootstrap = scipy.stats.bootstrap
    fast = {"n_resamples": 800}
    monkeypatch.setattr(scipy.stats, "bootstrap", lambda *a, **k: bootstrap(*a, **k | fast))
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


def noise(folder):
    base = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    write_adapter(base, folder, 2.0, target_modules=["lm_head"])


def without_effect(folder):
    weights = load_file(folder / WEIGHTS)
    zeros = {name: w * ("lora_A" in name) for name, w in weights.items()}
    save_file(zeros, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    "change, rows, word",
    [
        (lambda folder: None, 8, "better"),
        (noise, 8, "worse"),
        (without_effect, 8, "no clear difference"),
        (lambda folder: None, 1, "no clear difference"),
    ],
    ids=["as trained", "noise", "without effect", "one row"],
)
def test_verdicts_claim_no_more_than_the_intervals_show(
    change, rows, word, adapter, asked, tmp_path
):
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    change(moved)
    val = write_jsonl(tmp_path / "val.jsonl", HELD_OUT[:rows])
    flags = ["--adapter", moved, "--prompts", asked, "--val-prompts", 0, "--max-new-tokens", 8]
    got = run(tmp_path, *flags, "--val-data", val)
    verdict, text = got.data["summary"]["verdict"], Page(got.page).text
    words = [each for each in ("better", "worse", "no clear difference") if each in verdict.lower()]
    assert words == [word]
    assert verdict in text and squeezed(verdict) in squeezed(got.out)
    (line,) = re.findall(r"^elsewhere .*(?:\n {12}.*)*", got.out, re.MULTILINE)
    general = got.data["general"]
    hurt = bool(general["ratio_ci95"]) and general["ratio_ci95"][0] > 1
    assert ("worse" in squeezed(line), "nodamage" in squeezed(line)) == (hurt, not hurt)
    assert tells(line, general["base"], general["finetuned"], general["ratio"])
    assert tells(text, general["base"], general["finetuned"], got.data["perplexity"]["base"])
    assert ("WARNING" in got.out) == (change is without_effect)
    assert (got.data["summary"]["answers_changed"] == 0) == (change is without_effect)
    if change is without_effect:
        assert got.data["perplexity"]["ratio"] == general["ratio"] == 1
        assert got.data["perplexity"]["rows_improved"] == 0


# ------------------------------------------------------------------------------- questions and answers


def test_twenty_everyday_pairs_are_of_other_fields_and_not_in_the_data():
    assert len(set(map(tuple, PAIRS))) == len(PAIRS) == 20 and all(map(all, PAIRS))
    text = " ".join(question + answer for question, answer in PAIRS).casefold()
    ours = "kube pod cluster docker container helm yaml deploy devops node server terraform linux"
    assert not [word for word in ours.split() if re.search(rf"\b{word}", text)]
    assert not [question for question, _ in PAIRS if question.casefold() in our_data()]


def our_data():
    names = "sample_dataset.jsonl", "raw_qa.csv"
    return "".join((ROOT / "data" / n).read_text(encoding="utf-8") for n in names).casefold()


def test_ten_questions_are_built_in_and_none_stands_in_the_data(adapter, tmp_path):
    got = run(tmp_path, "--adapter", adapter, "--max-new-tokens", 1).data
    questions = {result["prompt"] for result in got["prompts"]}
    assert len(questions) == len(got["prompts"]) == 10
    assert not [question for question in questions if question.casefold() in our_data()]
    assert {result["reference"] for result in got["prompts"]} == {None}
    assert got["perplexity"] is None and "--val-data" in got["summary"]["verdict"]


def test_held_out_questions_are_asked_first_and_their_references_shown(results):
    prompts = results.data["prompts"]
    first = [f"{row['instruction']}\n\n{row['input']}".strip() for row in HELD_OUT[:2]]
    assert [result["prompt"] for result in prompts] == first + ASKED
    references = [row["output"] for row in HELD_OUT[:2]]
    assert [result["reference"] for result in prompts] == references + [None] * 3
    text = Page(results.page).text
    for reference in references:  # of which 24 tokens are shown
        assert reference[:24] in text and squeezed(reference[:24]) in squeezed(results.out)


@pytest.mark.parametrize("count, asked_rows", [(0, 0), (None, 5), (100, 8)])
def test_val_prompts_says_how_many_of_them(count, asked_rows, parrot, asked, val, tmp_path):
    flags = [*parrot[:2], "--val-data", val, "--prompts", asked, "--max-new-tokens", 1]
    got = run(tmp_path, *flags, *(["--val-prompts", count] if count is not None else []))
    assert [result["reference"] is None for result in got.data["prompts"]] == [
        *[False] * asked_rows,
        *[True] * 3,
    ]


def test_a_long_reference_is_cut_with_a_mark_and_whole_in_the_json(said):
    references = [result["reference"] for result in said.data["prompts"]]
    assert references == [*REFERENCES.values(), *[None] * len(ANSWERS)]
    text = Page(said.page).text
    for shown in text, said.out:
        assert "and so on" in shown and "and end." not in shown
        assert "始部署部署" in squeezed(shown) and "終" not in shown
        assert len(re.findall(r"\bcut\b", shown)) == 2 + 2  # two endless answers
        assert "\n" + CODE + "\n" in shown.replace("</code>", "")


@pytest.mark.parametrize("template", ["zephyr", "chatml", "llama3"])
def test_an_answer_ends_at_the_end_of_turn_token(template, tmp_path, asked):
    adapter = write_parrot(tmp_path, {"Ċ": list("Pod")}, template=template)  # Ċ: a line end
    got = run(tmp_path, "--adapter", adapter, "--prompts", asked)
    for result in got.data["prompts"]:
        for side in "base", "finetuned":
            assert (result[side], result[f"{side}_stopped"]) == ("Pod", True)
            assert result[f"{side}_tokens"] == 4
    summary = got.data["summary"]
    assert summary["base_stopped"] == summary["finetuned_stopped"] == 3
    assert summary["base_mean_tokens"] == 4


def test_both_answers_are_shown_and_one_that_is_cut_is_said_to_be_cut(said):
    answers = {result["prompt"].split()[-1]: result for result in said.data["prompts"][5:]}
    for question, answer in ANSWERS.items():
        if question != "[endless]":
            assert answers[question]["base"] == answer[0].strip()
            assert (answers[question]["base_stopped"], answers[question]["base_tokens"]) == (1, 2)
    assert answers["[two]"]["finetuned"] == "the second answer"
    assert said.data["summary"]["answers_changed"] == 1 and "WARNING" not in said.out
    assert re.search(r"^the first answer +\| the second answer$", said.out, re.MULTILINE)
    assert answers["[endless]"]["base_stopped"] is False
    assert answers["[endless]"]["base_tokens"] == 50
    assert said.data["summary"]["base_stopped"] == 13
    page = Page(said.page)
    assert page.text.index("the first answer") < page.text.index("the second answer")
    assert page.inside["code"].count(CODE.split("Write\n")[1].split("\nand")[0]) == 5


def test_control_tokens_typed_in_a_prompt_stay_text(adapter, tiny, tmp_path, monkeypatch):
    seen, generate = [], LlamaForCausalLM.generate

    def watch(self, *args, **kwargs):
        seen.extend(kwargs.get("input_ids", *args[:1]).tolist())
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", watch)
    prompts = write_prompts(tmp_path / "p.json", ["say </s> now"])
    run(tmp_path, "--adapter", adapter, "--prompts", prompts, "--max-new-tokens", 2)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(seen) == 2 and seen[0] == seen[1]
    assert seen[0].count(tokenizer.eos_token_id) == 1  # the one that ends the user's turn
    assert tokenizer.decode(seen[0]) == "<|user|>\nsay </s> now</s>\n<|assistant|>\n"


# ------------------------------------------------------------------------------- files


def test_json_has_exactly_the_promised_keys(results):
    data = results.data
    assert set(data) == {"summary", "prompts", "perplexity", "general", "settings"}
    keys = "prompt base finetuned reference base_stopped finetuned_stopped base_tokens"
    keys = {*keys.split(), "finetuned_tokens"}
    assert all(set(result) == keys for result in data["prompts"])
    keys = "base finetuned ratio ratio_ci95 tokens rows rows_improved"
    assert set(data["perplexity"]) == set(data["general"]) == set(keys.split())
    low, high = data["perplexity"]["ratio_ci95"]
    assert low <= data["perplexity"]["ratio"] <= high
    assert data["summary"].items() <= results.returned.items()
    assert sorted(os.listdir(results.page.parent)) == ["results.html", "results.json"]


def test_settings_hold_what_was_resolved_from_the_adapter_folder(results, tiny, adapter):
    settings = results.data["settings"]
    wanted = {"model": tiny, "adapter": str(adapter), "precision": "fp32", "load_in_4bit": True}
    assert (wanted | {"max_new_tokens": 24, "device": "cpu"}).items() <= settings.items()
    assert {"torch", "transformers", "peft"} <= set(settings["versions"])
    assert set(vars(evaluate.parse_args([]))) <= set(settings)


def test_what_is_strange_beside_an_adapter_costs_no_result(adapter, tiny, tmp_path):
    """The base was moved, training_config.json is another tool's, the log is damaged."""
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    config = json.loads((moved / CONFIG).read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / CONFIG).write_text(json.dumps(config))
    (moved / "training_config.json").write_text('{"arguments": ["--lr", "1"]}')
    odd = ['{"step": "a", "loss": "x"}', '{"step": 9, "loss": [1]}', '{"step": 9, "loss": NaN}']
    odd += ["[" * 100_000, "[]", "7", "\x00", '{"step": 9, "lo']
    with open(moved / "training_log.jsonl", "ab") as file:
        file.write("\n".join(odd).encode() + b"\xff")
    prompts = write_prompts(tmp_path / "p.json", ["Was heißt „Größe“? 🚀"])
    flags = ["--adapter", moved, "--prompts", prompts, "--max-new-tokens", 2, "--model", tiny]
    got = run(tmp_path, *flags)
    assert got.data["settings"]["model"] == tiny and got.data["settings"]["load_in_4bit"] is True
    assert "Was heißt „Größe“? 🚀".encode() in (tmp_path / "out/results.json").read_bytes()
    assert "nan" not in Page(got.page).source and Page(got.page).curve()


def test_figures_beyond_all_numbers_give_strict_json_or_one_line_about_the_adapter(
    tiny, tmp_path, asked, val
):
    folder = write_adapter(tiny, tmp_path / "adapter", 1e4, target_modules=["lm_head"])
    flags = ["--adapter", folder, "--val-data", val, "--prompts", asked, "--max-new-tokens", 2]
    try:
        run(tmp_path, *flags)
    except SystemExit as end:
        assert re.match("error: .*adapter.*; .*$", end.code) and "--output" not in end.code


@pytest.mark.parametrize("fault", ["full disk", "failed move"])
def test_a_failed_write_leaves_the_old_results_and_nothing_else(
    fault, parrot, asked, tmp_path, monkeypatch
):
    flags = [*parrot[:2], "--prompts", asked, "--max-new-tokens", 1]
    page = run(tmp_path, *flags).page
    old = {path: path.read_bytes() for path in page.parent.iterdir()}

    def full(source, target):
        raise OSError(28, "No space left on device")

    if fault == "failed move":
        monkeypatch.setattr(os, "replace", full)
    disk = largest_file(999) if fault == "full disk" else contextlib.nullcontext()
    with disk, pytest.raises(SystemExit, match="^error: .*(File too large|No space left).*; "):
        run(tmp_path, *flags, "--batch-size", 2)
    assert {path: path.read_bytes() for path in page.parent.iterdir()} == old


# ------------------------------------------------------------------------------- mistakes


class Bomb:
    """Unpickling this makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


PICKLE = pickle.dumps(Bomb())
GOOD = '{"instruction": "a", "output": "b"}\n'


def not_finite(path):
    weights = load_file(path)
    nan = {name: torch.full_like(weight, math.nan) for name, weight in weights.items()}
    save_file(nan, path, {"format": "pt"})


def more_tokens(path):
    tokenizer = AutoTokenizer.from_pretrained(path.parent)
    tokenizer.add_tokens(["<new>"])  # the model got none
    tokenizer.save_pretrained(path.parent)


def template(words):
    return {"moved/chat_template.jinja": lambda path: path.write_text(words + path.read_text())}


def config(**changes):
    return {f"moved/{CONFIG}": changes}


# fmt: off
# what the error must name, the flags, the files that are written (None: deleted; a dict: changed keys)
EARLY = [  # told before a model is loaded; "moved" is a copy of a good adapter
    *[("--batch-size", f"--batch-size {value}", {}) for value in ["0", "-1", "1.5", "9" * 20]],
    *[("--max-new-tokens", f"--max-new-tokens {value}", {}) for value in ["0", "nan"]],
    ("--val-prompts", "--val-prompts -1", {}),
    ("--precision", "--precision fp8", {}),
    ("--temperature", "--temperature 1", {}),
    ("--adapter", "--adapter", {}),
    ("results", "results", {}),
    ("nowhere", "--adapter nowhere", {}),
    ("a.json", "--adapter a.json", {"a.json": "{}"}),
    *[(CONFIG, "", {f"moved/{CONFIG}": text}) for text in ["{", "[]", b"\xff\xfe\x00", None]],
    ("no adapter", "", {f"moved/{WEIGHTS}": None}),
    ("pickle", "", {f"moved/{WEIGHTS}": None, "moved/adapter_model.bin": PICKLE}),
    ("IA3", "", config(peft_type="IA3")),
    ("LORA", "", config(peft_type=None)),
    *[("bias", "", config(bias=bias)) for bias in ["all", "lora_only"]],
    ("training_config.json", "", {"moved/training_config.json": "[]"}),
    ("moved", "", {"moved/tokenizer.json": "{"}),
    ("moved", "", {"moved/tokenizer_config.json": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.T", None]}}, "moved/code.py": "open('exploded', 'w')"}),
    ("chat template", "", template("{{ ''.__class__.__mro__[1].__subclasses__() }}")),
    ("chat template", "", template("{{ lipsum.__globals__['os'].system('touch exploded') }}")),
    ("Range too big", "", template("{% for x in range(10**9) %}{% endfor %}")),
    ("MemoryError", "", template("{{ 'a' * 10**17 }}")),
    ("system first", "", template("{{ raise_exception('system first') }}")),
    ("nowhere.json", "--prompts nowhere.json", {}),
    ("folder", "--prompts folder", {"folder/x": ""}),
    *[
        ("p.json", "--prompts p.json", {"p.json": text})
        for text in ["{}", '"Why?"', "[]", "[1]", '["a", null]', '["a", "  "]', '[["a"]]', '[{"prompt": "a"}]', "['a']", "", "null", "[" * 100_000, b"\xff\x00", f"[{'9' * 5000}]"]
    ],
    ("item 2", "--prompts p.json", {"p.json": '["a", "\\ud800"]'}),
    ("nowhere.jsonl", "--val-data nowhere.jsonl", {}),
    ("folder", "--val-data folder", {"folder/x": ""}),
    *[
        (named, "--val-data v.jsonl", {"v.jsonl": text})
        for named, text in [
            ("v.jsonl", ""),
            ("v.jsonl", b"\xff\x00"),
            ("v.jsonl:3", GOOD + "\n{"),
            ("v.jsonl:2", GOOD + "[]"),
            ('v.jsonl:1: "output"', '{"instruction": "a"}'),
            ('v.jsonl:1: "instruction"', '{"instruction": 1}'),
            ("v.jsonl:1", GOOD.replace('"b"', '"\\ud800"')),
        ]
    ],
    ("folder", "--output folder", {"folder/x": ""}),
    ("results.html", "--output out/results.html", {}),
    ("f", "--output f/results.json", {"f": ""}),
    ("p.json", "--output p.json --prompts p.json", {"p.json": '["a"]'}),
    ("v.json", "--output v.json --val-data v.json", {"v.json": GOOD}),
    (f"moved/{CONFIG}", f"--output moved/{CONFIG}", {}),
    ("r.html", "--output r.json", {"r.html/x": ""}),
]
FOREIGN_TOOL = {"moved/training_config.json": None}
LATE = [
    ("moved", "", {f"moved/{WEIGHTS}": lambda path: os.truncate(path, 1000)}),
    ("moved", "", {f"moved/{WEIGHTS}": "hello"}),
    ("/nowhere/base", "", config(base_model_name_or_path="/nowhere/base") | FOREIGN_TOOL),
    ("nowhere/model", "--model nowhere/model", {}),
    *[("--model", "", config(base_model_name_or_path=base) | FOREIGN_TOOL) for base in [None, 5]],
    *[("does not fit", "", config(target_modules=m)) for m in [["k_proj", "o_proj"], ["q_proj"], "(q_proj"]],
    ("does not fit", "", config(rank_pattern=[1])),
    ("finite", "", {f"moved/{WEIGHTS}": not_finite}),
    ("finite", "", config(lora_alpha=math.nan)),
    ("tokenizer", "--prompts p.json", {"p.json": '["<new>"]', "moved/tokenizer.json": more_tokens}),
    ("base", "--model base", {"base/model.safetensors": None, "base/pytorch_model.bin": PICKLE}),
    ("base", "--model base", {"base/config.json": {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}, "base/code.py": "open('exploded', 'w')"}),
    ("v.jsonl", "--val-data v.jsonl", {"v.jsonl": json.dumps({"instruction": "why " * 2000, "output": "b"})}),
    ("1,024", "--prompts p.json", {"p.json": f'["{"Pod " * 75000}"]'}),
    ("1,024", "--prompts p.json", {"p.json": f'["{"x" * 300000}"]'}),
    ("1,024", "--max-new-tokens 3000", {}),
]


# fmt: on


@pytest.mark.parametrize("case", [*EARLY, *LATE], ids=lambda case: f"{case[1]} {[*case[2]]}")
def test_a_mistake_ends_in_one_line_that_names_it_and_writes_nothing(
    case, adapter, tiny, asked, tmp_path, capsys, monkeypatch
):
    named, wrong, files = case
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, "moved")
    shutil.copytree(tiny, "base")
    for path, content in files.items():
        path = Path(path)
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.unlink()
        elif isinstance(content, dict):
            path.write_text(json.dumps(json.loads(path.read_text()) | content))
        elif callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    right = ["--adapter", "moved", "--prompts", str(asked), "--max-new-tokens", "1"]
    right += ["--model", "nowhere/model"] if case in EARLY else []
    with pytest.raises(SystemExit) as end:
        evaluate.main([*right, "--output", "out/results.json", *wrong.split()])
    message = end.value.code
    if message == 2:
        lines = capsys.readouterr().err.splitlines()
        message = lines[-1][lines[-1].index("error:") :]
    else:
        assert re.search("; | takes ", message)  # what to do
    assert message.startswith("error:") and named in message and "\n" not in message
    assert len(message) < 500
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before and not Path("out").exists() and not Path("exploded").exists()


def shape(tiny, folder, **changes):
    config = LlamaConfig(**AutoModelForCausalLM.from_pretrained(tiny).config.to_dict() | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)


OTHERS = {
    "shape": lambda tiny, folder: shape(tiny, folder, hidden_size=128, head_dim=32),
    "layers": lambda tiny, folder: shape(tiny, folder, num_hidden_layers=3),
    "weights": lambda tiny, folder: offline_model.write_tiny(folder, seed=1),
    "architecture": lambda tiny, folder: offline_model.write_tiny(folder, "phi"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("trained_here", [True, False])
def test_a_base_that_the_adapter_was_not_trained_on_is_refused(
    other, trained_here, adapter, tiny, tmp_path, asked
):
    OTHERS[other](tiny, tmp_path / "other")
    if not trained_here:
        if other == "weights":
            pytest.skip("nothing in the folder of another tool tells")
        modules = ["dense"] if other == "architecture" else ["q_proj"]
        adapter = write_adapter(tmp_path / "other", tmp_path / "adapter", target_modules=modules)
    base = tmp_path / "other" if trained_here else tiny
    with pytest.raises(SystemExit, match="^error: .*fit.*; .*--model.*$") as end:
        run(tmp_path, "--adapter", adapter, "--prompts", asked, "--model", base)
    assert "\n" not in end.value.code and not (tmp_path / "out").exists()


def test_a_read_only_folder_is_refused_before_a_model_is_loaded(adapter, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    flags = ["--adapter", adapter, "--model", "nowhere/model"]
    with pytest.raises(SystemExit, match=f"^error: .*{tmp_path}/out; .*--output$"):
        without_privileges(lambda: run(tmp_path, *flags))


def test_out_of_gpu_memory_ends_in_one_line_of_advice(adapter, asked, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LlamaForCausalLM, "generate", full)
    with pytest.raises(SystemExit, match="^error: out of GPU memory; lower --batch-size"):
        run(tmp_path, "--adapter", adapter, "--prompts", asked)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- terminal


def columns_of(text):
    """How many columns of a terminal a text takes."""
    marks = sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "FW" for c in text)


@pytest.mark.parametrize("columns", [1, 60, 80, 121])
def test_answers_fit_the_terminal_and_stay_aligned(columns, said, parrot, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = said.out if columns == 80 else run(tmp_path, *parrot).out
    blocks = re.split(r"^\[(?=\d+/14\])", out, flags=re.MULTILINE)[1:]
    blocks[-1] = blocks[-1].split("\n\n")[0]
    shown = dict(zip(ANSWERS, blocks[len(REFERENCES) :], strict=True))
    for block in blocks:
        lines = block.splitlines()
        assert max(map(columns_of, lines)) <= max(columns, 40)
        bars = {columns_of(line.split(" | ")[0].ljust(0)) for line in lines if " | " in line}
        assert len(bars) <= 1
    for question in "[long]", "[wide]", "[marks]", "[vowels]":
        text = squeezed(re.sub(r" \| .*", "", shown[question]))
        assert ANSWERS[question][0] in text
    for question in "[code]", "[two]":
        lines = [re.split(r" +\|", line)[0] for line in shown[question].splitlines()]
        if columns > 20:
            assert "\n".join(ANSWERS[question][0].splitlines()) in "\n".join(lines)


def test_what_would_steer_a_terminal_is_shown_and_not_sent(said):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e]", said.out)
    assert len(re.findall(r"\S\[2Ja\S+?0;title", squeezed(said.out))) == 5 + 9 + 4 + 1


def test_piped_output_is_plain_in_any_encoding(parrot, tmp_path):
    run = subprocess.run(
        [sys.executable, evaluate.__file__, *map(str, parrot), "--output", tmp_path / "r.json"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0 and strict(tmp_path / "r.json")["prompts"][4]["reference"]
    assert not re.search(rb"[^\n\x20-\x7e]", run.stdout) and rb"\u90e8" in run.stdout
    assert not re.search(rb"[^\n\x20-\x7e]", run.stderr)


# ------------------------------------------------------------------------------- page


def test_the_page_tells_verdict_figures_and_settings_in_words_and_in_order(results):
    page, data = Page(results.page), results.data
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(below - above <= 1 for above, below in zip(headings, headings[1:]))
    headed = "".join(page.inside[f"h{level}"] for level in range(1, 7))
    assert all(result["prompt"] in headed for result in data["prompts"])
    assert {"main", "title", "details", "svg"} <= page.names()
    assert dict(page.tags)["html"]["lang"] == "en" and "open" not in dict(page.tags)["details"]
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert page.curve() and all(a["aria-label"] for _, a in page.tags if a.get("role") == "img")
    verdict = page.text.index(data["summary"]["verdict"])
    assert verdict < page.text.index("lower is better") < page.text.index(ASKED[0])
    for result in data["prompts"]:
        assert result["base"] in page.text and result["finetuned"] in page.text
    settings = page.inside["details"]
    assert f"torch {torch.__version__}" in settings and "None" not in settings
    assert "{" not in settings
    figures = data["perplexity"], data["general"]
    assert tells(page.text, *(f[side] for f in figures for side in ("base", "finetuned", "ratio")))
    log = (Path(data["settings"]["adapter"]) / "training_log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in log]
    assert tells(page.text, *(entry["eval_loss"] for entry in log if "eval_loss" in entry))


def losses(*values, key="loss", first=1, every=1):
    return [{"step": first + n * every, key: value} for n, value in enumerate(values)]


LOGS = {  # entries of the log, figures and words that the page then tells, points at least
    "one step": (losses(2.5), [2.5], ["step 1"]),
    "many steps": (losses(*(5 - n / 2500 for n in range(10_000))), [5, 1], ["step 10000"]),
    "steps twice": (losses(5.0, 4.0, 9.0) + losses(3.0, 2.0, first=3), [5, 2], ["step 4"]),
    "lowest earlier": (
        losses(5.0, 4.0, 3.0, 2.0) + losses(4.5, 3.25, 3.75, key="eval_loss", first=2),
        [5, 2, 3.75, 3.25],
        ["step 3", "lowest"],
    ),
    "nothing of use": (
        losses(None, "<b>", [1], 10**400, math.inf) + [{"step": "<b>", "loss": 9.0}, {"loss": 9}],
        [],
        [],
    ),
}


@pytest.mark.parametrize("name", LOGS)
def test_the_curve_is_that_of_the_log(name, parrot, asked, tmp_path):
    log, figures, words = LOGS[name]
    moved = Path(shutil.copytree(parrot[1], tmp_path / "moved"))
    write_jsonl(moved / "training_log.jsonl", log)
    flags = ["--adapter", moved, "--prompts", asked, "--max-new-tokens", 1, "--no-load-in-4bit"]
    page = Page(run(tmp_path, *flags).page)
    assert bool(page.curve()) == bool(figures)
    assert tells(page.text, *figures) and len(page.source) < 100_000
    assert all(word in page.text for word in words)
    svg = "".join(re.findall("<svg.*?</svg>", page.source, re.DOTALL))
    assert not re.search(r"\b(nan|inf)\b", svg)


def test_hostile_texts_are_inert_on_the_page_which_refers_to_nothing_outside(said, results):
    page = Page(said.page)
    assert page.text.count(HOSTILE) >= 5 + 9 + 2 + 2 + 1  # questions, answers, reference
    for page in page, Page(results.page):
        loading = {"src", "href", "srcset", "action", "data", "background", "poster", "xlink:href"}
        assert not page.names() & {"script", "iframe", "img", "b", "link", "object", "base", "form"}
        for _, attributes in page.tags:
            assert not loading & set(attributes)
            assert not [name for name in attributes if name.startswith("on")]
            assert "http" not in "".join(filter(None, attributes.values()))
        assert not re.search(r"url\(|@import|https?:", page.inside["style"])


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium: apt-get install chromium chromium-driver")
    logging.getLogger("selenium").setLevel(logging.ERROR)
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = selenium.Chrome(options, selenium.ChromeService(driver))
    yield browser
    browser.quit()


TEXTS = """
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) if (walker.currentNode.data.trim()) found.push(walker.currentNode);
"""
FAINT = """
const parts = colour => colour.match(/[\\d.]+/g).map(Number);
const luminance = colour => parts(colour).slice(0, 3).map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const ground = e => { while (e && (parts(getComputedStyle(e).backgroundColor)[3] ?? 1) == 0)
  e = e.parentElement; return e ? getComputedStyle(e).backgroundColor : 'rgb(255, 255, 255)' };
return found.filter(text => { const e = text.parentElement, style = getComputedStyle(e);
  const ink = luminance(e.closest('svg') ? style.fill : style.color), paper = luminance(ground(e));
  return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05) < 4.5 }).map(t => t.data)
"""
BROKEN = """
return found.filter(t => !t.parentElement.closest('pre, h2, h3, details')).flatMap(t =>
  [...t.data.matchAll(t.parentElement.closest('table') ? /\\S+/g : /\\d[\\d.,]*\\d/g)].filter(m => {
    const r = document.createRange(); r.setStart(t, m.index); r.setEnd(t, m.index + m[0].length);
    return new Set([...r.getClientRects()].map(b => b.top)).size > 1 }).map(m => m[0]))
"""
OUTSIDE = """return [...document.querySelectorAll('body *')].filter(e =>
  e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
SMALL = """return [...document.querySelectorAll('svg text')].filter(e =>
  parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a < 11).map(e => e.textContent)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_all_can_be_read_and_nothing_scrolls_sideways_loads_or_runs(
    browser, results, said, width, scheme
):
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    for page in results.page, said.page:
        browser.get_log("performance")
        browser.get(page.resolve().as_uri())
        messages = [json.loads(entry["message"]) for entry in browser.get_log("performance")]
        messages = [entry["message"] for entry in messages]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert [m["request"]["url"] for m in sent] == [page.resolve().as_uri()]
        script = browser.execute_script
        script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert script("return document.documentElement.scrollWidth") <= width
        assert script("return [innerWidth, document.scripts.length]") == [width, 0]
        assert script("return window.pwned") is None
        for fault in OUTSIDE, TEXTS + FAINT, TEXTS + BROKEN, SMALL:
            assert script(fault) == []
        if shots := os.environ.get("SCREENSHOTS"):
            name = f"{page.parent.parent.name}{width}{scheme['value']}.png"
            browser.save_screenshot(str(Path(shots) / name))
