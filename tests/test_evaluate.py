"""What evaluate.py says of a base model and its adapter is true, fits the screen and is safe to open."""

import functools
import html.parser
import json
import logging
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import offline_model
import peft
import pytest
import torch
from conftest import largest_file, without_privileges
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

import evaluate
import lora_finetune

ASKED = ["What is a Pod?", "Name a Service, please.", "Why?"]
THINGS = [
    "Pod",
    "Service",
    "Node",
    "Ingress",
    "Secret",
    "Volume",
    "Job",
    "Probe",
    "Label",
    "Taint",
    "Quota",
    "Helm",
]
RECORDS = [
    {
        "instruction": f"What is a {thing}?",
        "input": "In one line." * (n % 3 == 0),
        "output": f"A {thing} is thing number {n} of a cluster." + " Really." * n,
    }
    for n, thing in enumerate(THINGS)
]
HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<img src=http://evil.example/x.png onerror=window.pwned=2>",
    "</pre></div><svg onload=window.pwned=3>",
    "<iframe src=https://evil.example/></iframe>",
    '"><b onmouseover="window.pwned=4">&lt;&amp;',
]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def strict(path):
    """The JSON of a file; NaN and Infinity, which are no JSON, fail."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def run(tmp_path, *flags, output="out/results.json"):
    """evaluate.main on a folder of its own: (the JSON, the page's path)."""
    output = tmp_path / output
    evaluate.main([*map(str, flags), "--output", str(output)])
    return strict(output), output.with_suffix(".html")


def plain_nf4(folder):
    """A 4-bit base model as plain transformers loads it."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=nf4, device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a kernel that rounds to bfloat16
    return model.eval()


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


def write_chain(folder, template, answer):
    """Write a model that answers everything with the tokens of `answer`, end of turn, then z for ever.

    Embeddings are unit vectors, layers add nothing, and the head maps each token to the next of the chain.
    """
    offline_model.write_tiny(folder, template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token for token in answer if token not in tokenizer.get_vocab()])
    tokenizer.save_pretrained(folder)
    end = {"zephyr": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[template]
    chain = ["Ċ", *answer, end, "z"]  # Ċ is the line end, last in all the prompts
    ids = tokenizer.convert_tokens_to_ids(chain)
    assert len(set(ids)) == len(ids) and tokenizer.unk_token_id not in ids
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 4096
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for n, (id, following) in enumerate(zip(ids, [*ids[1:], ids[-1]])):
            model.get_input_embeddings().weight[id, n] = 1
            model.lm_head.weight[following, n] = 1
    model.save_pretrained(folder)
    return str(folder)


def write_adapter(base, folder, **changes):
    """A LoRA folder by peft alone: no training_config.json, no tokenizer, no log, lora_B zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    peft.get_peft_model(model, peft.LoraConfig(**config)).save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("val") / "val.jsonl", RECORDS[:8])


@pytest.fixture(scope="module")
def adapter(tiny, val, tmp_path_factory):
    """An adapter that lora_finetune.py trained on the tiny model, hard enough to change answers."""
    folder = tmp_path_factory.mktemp("trained")
    flags = "--max-steps 8 --learning-rate 0.02 --batch-size 6 --gradient-accumulation-steps 1"
    data = write_jsonl(folder / "data.jsonl", RECORDS)
    paths = ["--model", tiny, "--dataset", data, "--val-data", val, "--output", str(folder / "a")]
    lora_finetune.main([*flags.split(), *paths])
    return folder / "a"


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    path = tmp_path_factory.mktemp("asked") / "prompts.json"
    path.write_text(json.dumps(ASKED))
    return path


@pytest.fixture(scope="module")
def results(adapter, val, asked, tmp_path_factory):
    """One whole evaluation: (the JSON, the page)."""
    flags = ["--adapter", adapter, "--val-data", val, "--prompts", asked, "--max-new-tokens", 24]
    return run(tmp_path_factory.mktemp("results"), *flags)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page whose prompts, answers and settings are all hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    base = write_chain(folder / "base", "zephyr", HOSTILE)
    write_adapter(base, folder / "adapter")
    prompts = folder / '"><script>window.pwned = 5<!--.json'
    prompts.write_text(json.dumps([*HOSTILE, "x" * 3000, "How?"]))
    return run(folder, "--adapter", folder / "adapter", "--prompts", prompts)


class Elements(html.parser.HTMLParser):
    """What a browser would build: tags, attributes, text, styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(Path(page).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


# ------------------------------------------------------------------------------- figures


def test_base_answers_are_those_of_the_base_model_without_peft(results, tiny):
    model, tokenizer = plain_nf4(tiny), AutoTokenizer.from_pretrained(tiny)
    for question, result in zip(ASKED, results[0]["prompts"], strict=True):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
        answer = tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert result["base"] == answer.strip()
        assert result["prompt"] == question


def test_base_perplexity_is_that_of_the_base_model_without_peft(results, tiny):
    figure, tokens = plain_perplexity(
        plain_nf4(tiny), AutoTokenizer.from_pretrained(tiny), RECORDS[:8]
    )
    assert results[0]["perplexity"]["base"] == pytest.approx(figure, rel=1e-5)
    assert results[0]["perplexity"]["tokens"] == tokens
    assert results[0]["perplexity"]["rows"] == 8


def test_finetuned_perplexity_is_that_of_the_adapter_put_on_by_plain_peft(results, tiny, adapter):
    model = peft.PeftModel.from_pretrained(plain_nf4(tiny), adapter).eval()
    figure, _ = plain_perplexity(model, AutoTokenizer.from_pretrained(tiny), RECORDS[:8])
    assert results[0]["perplexity"]["finetuned"] == pytest.approx(figure, rel=1e-5)
    assert results[0]["perplexity"]["finetuned"] < 0.9 * results[0]["perplexity"]["base"]


@pytest.mark.parametrize("size", [1, 3])
def test_neither_perplexity_nor_answers_move_with_batch_size(
    results, adapter, val, asked, tmp_path, size
):
    flags = ["--adapter", adapter, "--val-data", val, "--prompts", asked, "--max-new-tokens", 24]
    other, _ = run(tmp_path, *flags, "--batch-size", size)
    for key in ("base", "finetuned", "ratio"):
        assert other["perplexity"][key] == pytest.approx(results[0]["perplexity"][key], rel=1e-6)
    assert other["prompts"] == results[0]["prompts"]


def test_an_unquantised_base_has_other_figures_and_says_so(results, adapter, val, asked, tmp_path):
    flags = ["--adapter", adapter, "--val-data", val, "--prompts", asked, "--max-new-tokens", 1]
    other, _ = run(tmp_path, *flags, "--no-load-in-4bit")
    assert other["settings"]["load_in_4bit"] is False
    assert other["perplexity"]["base"] != results[0]["perplexity"]["base"]


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
    one = evaluate.compare(np.array([4.0]), np.array([2.0]), np.array([2]))
    assert one["ratio"] == pytest.approx(math.exp(-1)) and one["ratio_ci95"] is None
    same = evaluate.compare(np.array([4.0] * 5), np.array([2.0] * 5), np.array([2] * 5))
    assert same["ratio"] == pytest.approx(math.exp(-1))
    assert same["ratio_ci95"] is None or np.allclose(same["ratio_ci95"], math.exp(-1))


def test_interval_covers_the_truth_near_its_nominal_rate(monkeypatch):
    fast = functools.partial(evaluate.scipy.stats.bootstrap, n_resamples=800)
    monkeypatch.setattr(evaluate.scipy.stats, "bootstrap", fast)
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


def test_verdict_says_better_only_where_the_whole_interval_is_below_one():
    figures = evaluate.compare(np.array([4.0, 6.0]), np.array([2.0, 3.0]), np.array([2, 5]))
    for interval, word in [([0.5, 0.9], "better"), ([1.1, 1.3], "worse")]:
        assert word in evaluate.verdict(figures | {"ratio_ci95": interval}).lower()
    for interval in [0.9, 1.1], None:  # none: a single row, or rows that changed alike
        unclear = evaluate.verdict(figures | {"ratio_ci95": interval}).lower()
        assert "better" not in unclear and "worse" not in unclear
    assert "no interval" in unclear and "inf" not in unclear


# ------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("template", ["zephyr", "chatml", "llama3"])
def test_an_answer_ends_at_the_end_of_turn_token(tmp_path, asked, template):
    base = write_chain(tmp_path / "base", template, list("Pod"))
    write_adapter(base, tmp_path / "adapter")
    results, _ = run(tmp_path, "--adapter", tmp_path / "adapter", "--prompts", asked)
    for result in results["prompts"]:
        assert (result["base"], result["finetuned"]) == ("Pod", "Pod")
        assert (result["base_stopped"], result["finetuned_stopped"]) == (True, True)
        assert (result["base_tokens"], result["finetuned_tokens"]) == (4, 4)
    assert results["summary"]["base_stopped"] == results["summary"]["finetuned_stopped"] == 3
    assert results["summary"]["base_mean_tokens"] == 4


def test_an_answer_that_is_cut_is_said_to_be_cut(tmp_path, asked, capsys):
    base = write_chain(tmp_path / "base", "zephyr", list("Pod"))
    write_adapter(base, tmp_path / "adapter")
    flags = ["--adapter", tmp_path / "adapter", "--prompts", asked, "--max-new-tokens", 2]
    results, page = run(tmp_path, *flags)
    for result in results["prompts"]:
        assert (result["base"], result["base_stopped"], result["base_tokens"]) == ("Po", False, 2)
    assert results["summary"]["base_stopped"] == 0
    assert "cut" in capsys.readouterr().out and "did not stop" in page.read_text()


def test_an_adapter_without_effect_is_loudly_said_to_have_none(tiny, tmp_path, asked, capsys, val):
    write_adapter(tiny, tmp_path / "adapter")
    flags = ["--adapter", tmp_path / "adapter", "--prompts", asked, "--max-new-tokens", 8]
    results, _ = run(tmp_path, *flags, "--val-data", val)
    assert "WARNING" in capsys.readouterr().out
    assert results["summary"]["answers_changed"] == 0
    assert results["perplexity"]["ratio"] == 1 and results["perplexity"]["rows_improved"] == 0
    assert "no clear difference" in results["summary"]["verdict"].lower()


def test_an_adapter_with_effect_is_not_warned_of(adapter, asked, tmp_path, capsys):
    results, _ = run(tmp_path, "--adapter", adapter, "--prompts", asked, "--max-new-tokens", 12)
    assert "WARNING" not in capsys.readouterr().out
    assert results["summary"]["answers_changed"] == 3


def test_control_tokens_typed_in_a_prompt_stay_text(tmp_path, tiny):
    write_adapter(tiny, tmp_path / "adapter")
    prompts = tmp_path / "prompts.json"
    seen = []
    generate = evaluate.generate

    def watch(model, tokenizer, ids, *rest):
        seen.extend(ids)
        return generate(model, tokenizer, ids, *rest)

    prompts.write_text(json.dumps(["say </s> now"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "generate", watch)
        run(
            tmp_path, "--adapter", tmp_path / "adapter", "--prompts", prompts, "--max-new-tokens", 2
        )
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert seen[0].count(tokenizer.eos_token_id) == 1  # the one that ends the user's turn
    assert tokenizer.decode(seen[0]) == "<|user|>\nsay </s> now</s>\n<|assistant|>\n"


def test_ten_questions_are_built_in_and_none_stands_in_the_data(adapter, tmp_path):
    results, _ = run(tmp_path, "--adapter", adapter, "--max-new-tokens", 1)
    questions = [result["prompt"] for result in results["prompts"]]
    assert len(set(questions)) == 10
    root = Path(evaluate.__file__).parent
    data = "".join(
        (root / "data" / name).read_text(encoding="utf-8").casefold()
        for name in ("sample_dataset.jsonl", "raw_qa.csv")
    )
    assert not [question for question in questions if question.casefold() in data]


# ------------------------------------------------------------------------------- files


def test_json_has_exactly_the_promised_keys(results):
    data, _ = results
    assert list(data) == ["summary", "prompts", "perplexity", "settings"]
    keys = "prompt base finetuned base_stopped finetuned_stopped base_tokens finetuned_tokens"
    assert len(data["prompts"]) == 3
    assert all(set(result) == set(keys.split()) for result in data["prompts"])
    keys = "base finetuned ratio ratio_ci95 tokens rows rows_improved"
    assert set(data["perplexity"]) == set(keys.split())
    low, high = data["perplexity"]["ratio_ci95"]
    assert low <= data["perplexity"]["ratio"] <= high


def test_settings_hold_what_was_resolved_from_the_adapter_folder(results, tiny, adapter):
    settings = results[0]["settings"]
    assert settings["model"] == tiny and settings["adapter"] == str(adapter)
    assert settings["precision"] == "fp32" and settings["load_in_4bit"] is True
    assert settings["max_new_tokens"] == 24 and settings["device"] == "cpu"
    assert {"torch", "transformers", "peft"} <= set(settings["versions"])
    assert set(vars(evaluate.parse_args([]))) <= set(settings)


def test_perplexity_is_null_without_val_data(adapter, asked, tmp_path):
    data, _ = run(tmp_path, "--adapter", adapter, "--prompts", asked, "--max-new-tokens", 2)
    assert data["perplexity"] is None
    assert "--val-data" in data["summary"]["verdict"]


def test_json_is_utf8_and_not_escaped(tmp_path, adapter):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["Was heißt „Größe“? 🚀"]))
    run(tmp_path, "--adapter", adapter, "--prompts", prompts, "--max-new-tokens", 2)
    assert "Was heißt „Größe“? 🚀".encode() in (tmp_path / "out/results.json").read_bytes()


def test_main_returns_the_summary_and_leaves_two_files_only(adapter, asked, tmp_path):
    flags = ["--adapter", str(adapter), "--prompts", str(asked), "--max-new-tokens", "2"]
    got = evaluate.main([*flags, "--output", str(tmp_path / "new" / "e.json")])
    written = strict(tmp_path / "new" / "e.json")
    assert got["prompts"] == 3
    assert {key: got[key] for key in written["summary"]} == written["summary"]
    assert sorted(os.listdir(tmp_path / "new")) == ["e.html", "e.json"]


def test_a_lora_folder_of_another_tool_works(tiny, tmp_path, val, asked):
    folder = write_adapter(tiny, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: torch.full_like(weight, 0.05) for name, weight in weights.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    assert not (folder / "training_config.json").exists()
    assert not (folder / "tokenizer_config.json").exists()
    flags = ["--adapter", folder, "--val-data", val, "--prompts", asked, "--max-new-tokens", 8]
    results, page = run(tmp_path, *flags)
    assert results["perplexity"]["ratio"] != 1
    assert "svg" not in Elements(page).tags  # no log, no curve


def test_a_folder_moved_away_from_its_base_takes_the_model_option(adapter, tiny, tmp_path, asked):
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    flags = ["--adapter", moved, "--prompts", asked, "--max-new-tokens", 2]
    results, _ = run(tmp_path, *flags, "--model", tiny)
    assert results["settings"]["model"] == tiny


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 9, "lo',
        '{"step": "a", "loss": "x"}',
        '{"step": 9, "loss": [1]}',
        '{"step": 9, "loss": NaN}',
        "[" * 100_000,
        "[]",
        "7",
    ],
    ids=lambda line: line[:20],
)
def test_a_damaged_training_log_costs_no_result(adapter, tmp_path, asked, line):
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    with open(moved / "training_log.jsonl", "a") as file:
        file.write(line)
    flags = ["--adapter", moved, "--prompts", asked, "--max-new-tokens", 2]
    results, page = run(tmp_path, *flags)
    assert len(results["prompts"]) == 3
    assert "nan" not in page.read_text() and "polyline" in Elements(page).tags


def test_a_training_config_of_another_tool_is_left_out(adapter, tmp_path, asked):
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    (moved / "training_config.json").write_text('{"arguments": ["--lr", "1"]}')
    flags = ["--adapter", moved, "--prompts", asked, "--max-new-tokens", 2]
    results, _ = run(tmp_path, *flags)
    assert results["settings"]["load_in_4bit"] is True


def test_an_adapter_that_has_blown_up_gives_strict_json_or_one_line(tiny, tmp_path, asked, val):
    folder = write_adapter(tiny, tmp_path / "adapter", target_modules=["down_proj", "o_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    for fill in (1e18, math.nan):
        blown = {name: torch.full_like(weight, fill) for name, weight in weights.items()}
        save_file(blown, folder / "adapter_model.safetensors", {"format": "pt"})
        flags = ["--adapter", folder, "--val-data", val, "--prompts", asked, "--max-new-tokens", 2]
        try:
            run(tmp_path, *flags)
        except SystemExit as end:
            assert str(end.code).startswith("error:")


# ------------------------------------------------------------------------------- mistakes


def other_shape(tiny, folder):
    config = LlamaConfig(**AutoModelForCausalLM.from_pretrained(tiny).config.to_dict())
    config.hidden_size, config.head_dim = 128, 32
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def other_weights(tiny, folder):
    offline_model.write_tiny(folder, seed=1)
    return folder


@pytest.mark.parametrize("other", [other_shape, other_weights])
def test_a_base_that_the_adapter_was_not_trained_on_is_refused(
    other, adapter, tiny, tmp_path, asked
):
    model = str(other(tiny, tmp_path / "other"))
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--adapter", adapter, "--prompts", asked, "--model", model)
    assert end.value.code.startswith("error:") and "fit" in end.value.code
    assert "--model" in end.value.code and "\n" not in end.value.code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", ["shape", "layers", "architecture"])
def test_a_foreign_adapter_of_another_model_is_refused(
    other, tiny, tiny_models, tmp_path, asked, capsys
):
    if other == "shape":
        base = str(other_shape(tiny, tmp_path / "other"))
    elif other == "layers":
        config = AutoModelForCausalLM.from_pretrained(tiny).config
        config.num_hidden_layers = 3
        base = str(tmp_path / "other")
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    else:
        base = tiny_models("phi")
    modules = ["dense"] if other == "architecture" else ["q_proj"]
    folder = write_adapter(base, tmp_path / "adapter", target_modules=modules)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--adapter", folder, "--prompts", asked, "--model", tiny)
    assert end.value.code.startswith("error:") and "--model" in end.value.code
    assert "\n" not in end.value.code and not (tmp_path / "out").exists()


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickled_adapter_is_refused_unopened(adapter, tmp_path, asked):
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    (moved / "adapter_model.safetensors").unlink()
    (moved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--adapter", moved, "--prompts", asked)
    assert end.value.code.startswith("error:") and "pickled" in end.value.code
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out").exists()


def test_a_pickled_base_is_refused_unopened(adapter, tiny, tmp_path, asked):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--adapter", adapter, "--prompts", asked, "--model", base)
    assert end.value.code.startswith("error:") and str(base) in end.value.code
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out").exists()


PROMPTS = [
    "{}",
    '"What is a Pod?"',
    "[]",
    "[1]",
    '["a", null]',
    '[""]',
    '["a", "  "]',
    '[["a"]]',
    '[{"prompt": "a"}]',
    "['a']",
    "",
    "null",
    "[" * 100_000,
]


@pytest.mark.parametrize("text", PROMPTS, ids=lambda text: text[:20])
def test_prompts_of_a_wrong_shape_are_refused(text, adapter, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(text)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--adapter", adapter, "--prompts", prompts)
    assert end.value.code.startswith(f"error: {prompts}") and "\n" not in end.value.code
    assert not (tmp_path / "out").exists()


def edited(name, change):
    """A mistake that copies the adapter folder and changes one of its files."""

    def make(folder, adapter):
        moved = Path(shutil.copytree(adapter, folder / "moved"))
        change(moved / name)
        return ["--adapter", moved]

    return make


def written(flag, name, content):
    """A mistake that stands in a file which a flag names."""

    def make(folder, adapter):
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return [flag, path]

    return make


def flags(*texts):
    return lambda folder, adapter: texts


def overwriting(flag, name, content):
    """A mistake that names one file as what is read and as --output."""

    def make(folder, adapter):
        return [*written(flag, name, content)(folder, adapter), "--output", name]

    return make


def page_is_a_folder(folder, adapter):
    (folder / "r.html").mkdir()
    return ["--output", "r.json"]


def more_tokens(folder, adapter):
    """The tokenizer got a padding token, the model did not."""
    moved = Path(shutil.copytree(adapter, folder / "moved"))
    tokenizer = AutoTokenizer.from_pretrained(moved)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(moved)
    return ["--adapter", moved]


def code_in_the_base(folder, adapter):
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = Path(shutil.copytree(base, folder / "base"))
    changes = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (base / "code.py").write_text("open('exploded', 'w')")
    return ["--model", base]


def config(**changes):
    def change(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edited("adapter_config.json", change)


def text(content):
    return lambda path: path.write_text(content)


def not_finite(path):
    weights = load_file(path)
    weights = {name: torch.full_like(weight, math.nan) for name, weight in weights.items()}
    save_file(weights, path, {"format": "pt"})


def code_in_the_tokenizer(path):
    changes = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (path.parent / "code.py").write_text("open('exploded', 'w')")


def template(words):
    return edited("chat_template.jinja", lambda p: p.write_text(words + p.read_text()))


GOOD = '{"instruction": "a", "output": "b"}\n'
LONG = json.dumps({"instruction": "why " * 2000, "output": "b"})
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MISTAKES = {  # what was done wrong, what the error must name
    "batch size 0": (flags("--batch-size", "0"), "--batch-size"),
    "batch size -1": (flags("--batch-size", "-1"), "--batch-size"),
    "batch size 1.5": (flags("--batch-size", "1.5"), "--batch-size"),
    "batch size huge": (flags("--batch-size", "9" * 20), "--batch-size"),
    "no new tokens": (flags("--max-new-tokens", "0"), "--max-new-tokens"),
    "new tokens nan": (flags("--max-new-tokens", "nan"), "--max-new-tokens"),
    "precision fp8": (flags("--precision", "fp8"), "--precision"),
    "unknown flag": (flags("--temperature", "1"), "--temperature"),
    "flag without value": (flags("--adapter"), "--adapter"),
    "stray word": (flags("results"), "results"),
    "no adapter": (flags("--adapter", "nowhere"), "nowhere"),
    "adapter is a file": (written("--adapter", "a.json", "{}"), "a.json"),
    "config not JSON": (edited(CONFIG, text("{")), CONFIG),
    "config a list": (edited(CONFIG, text("[]")), CONFIG),
    "config not text": (edited(CONFIG, lambda p: p.write_bytes(b"\xff\xfe\x00")), CONFIG),
    "no config": (edited(CONFIG, Path.unlink), CONFIG),
    "no weights": (edited(WEIGHTS, Path.unlink), "no adapter"),
    "weights cut": (edited(WEIGHTS, lambda p: os.truncate(p, 1000)), "moved"),
    "weights not safetensors": (edited(WEIGHTS, text("hello")), "moved"),
    "peft type": (config(peft_type="IA3"), "IA3"),
    "peft type missing": (config(peft_type=None), "LORA"),
    "base gone": (config(base_model_name_or_path="/nowhere/base"), "/nowhere/base"),
    "base unknown": (config(base_model_name_or_path=None), "--model"),
    "config of the run": (edited("training_config.json", text("[]")), "training_config.json"),
    "tokenizer": (edited("tokenizer.json", text("{")), "moved"),
    "model nowhere": (flags("--model", "nowhere/model"), "nowhere/model"),
    "prompts nowhere": (flags("--prompts", "nowhere.json"), "nowhere.json"),
    "prompts a folder": (flags("--prompts", "."), "."),
    "prompts binary": (written("--prompts", "p.json", b"\xff\x00"), "p.json"),
    "val nowhere": (flags("--val-data", "nowhere.jsonl"), "nowhere.jsonl"),
    "val a folder": (flags("--val-data", "."), "."),
    "val empty": (written("--val-data", "v.jsonl", ""), "v.jsonl"),
    "val binary": (written("--val-data", "v.jsonl", b"\xff\x00"), "v.jsonl"),
    "val broken": (written("--val-data", "v.jsonl", GOOD + "\n{"), "v.jsonl:3"),
    "val a list": (written("--val-data", "v.jsonl", GOOD + "[]"), "v.jsonl:2"),
    "val no output": (written("--val-data", "v.jsonl", '{"instruction": "a"}'), '"output"'),
    "val number": (written("--val-data", "v.jsonl", '{"instruction": 1}'), '"instruction"'),
    "val half a character": (
        written("--val-data", "v.jsonl", GOOD.replace('"b"', '"\\ud800"')),
        '"output" has half',
    ),
    "val too long": (written("--val-data", "v.jsonl", LONG), "v.jsonl"),
    "output a folder": (flags("--output", "."), "--output"),
    "output no json": (flags("--output", "out/results.html"), "--output"),
    "output under a file": (written("--output", "f", ""), "f"),
    "output is the prompts": (overwriting("--prompts", "p.json", '["a"]'), "--output p.json"),
    "output is the val data": (overwriting("--val-data", "v.json", GOOD), "--output v.json"),
    "output is the config": (
        lambda *at: [*edited(CONFIG, Path.touch)(*at), "--output", f"moved/{CONFIG}"],
        "--output moved/adapter_config.json",
    ),
    "page is a folder": (page_is_a_folder, "r.html"),
    "base a number": (config(base_model_name_or_path=5), "--model"),
    "layers of another run": (config(target_modules=["k_proj", "o_proj"]), "does not fit"),
    "one layer too few": (config(target_modules=["q_proj"]), "does not fit"),
    "layers no pattern": (config(target_modules="(q_proj"), "does not fit"),
    "ranks a list": (config(rank_pattern=[1]), "does not fit"),
    "weights not finite": (edited(WEIGHTS, not_finite), "finite"),
    "scale not finite": (config(lora_alpha=math.nan), "finite"),
    "tokenizer has more tokens": (more_tokens, "tokenizer"),
    "code in the base": (code_in_the_base, "base"),
    "code in the tokenizer": (edited("tokenizer_config.json", code_in_the_tokenizer), "moved"),
    "template of classes": (
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "chat template",
    ),
    "template of modules": (
        template("{{ lipsum.__globals__['os'].system('touch exploded') }}"),
        "chat template",
    ),
    "template counts for long": (
        template("{% for x in range(10**9) %}{% endfor %}"),
        "Range too big",
    ),
    "template fills the memory": (template("{{ 'a' * 10**17 }}"), "MemoryError"),
    "template refuses": (template("{{ raise_exception('system first') }}"), "system first"),
    "prompt half a character": (written("--prompts", "p.json", '["a", "\\ud800"]'), "item 2"),
    "prompts a long number": (written("--prompts", "p.json", f"[{'9' * 5000}]"), "p.json"),
    "prompt too long": (written("--prompts", "p.json", f'["{"Pod " * 75000}"]'), "1,024"),
    "prompt a long word": (written("--prompts", "p.json", f'["{"x" * 300000}"]'), "1,024"),
    "new tokens beyond the context": (flags("--max-new-tokens", "3000"), "1,024"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_it(
    name, adapter, asked, tmp_path, capsys, monkeypatch
):
    make, named = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    wrong = [str(part) for part in make(tmp_path, adapter)]
    if name == "output under a file":
        wrong[-1] += "/results.json"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    right = ["--adapter", str(adapter), "--prompts", str(asked), "--max-new-tokens", "1"]
    with pytest.raises(SystemExit) as end:
        evaluate.main([*right, "--output", "out/results.json", *wrong])
    message = end.value.code
    if message == 2:
        lines = capsys.readouterr().err.splitlines()
        message = lines[-1][lines[-1].index("error:") :]
    assert message.startswith("error:") and named in message and "\n" not in message
    assert len(message) < 500
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before and not (tmp_path / "out").exists()


def test_an_output_that_can_not_be_written_is_told_before_a_model_is_loaded(adapter, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["--adapter", adapter, "--model", "nowhere/model"]
    with pytest.raises(SystemExit, match="^error: can't write to .*file; choose another --output"):
        run(tmp_path, *flags, output="file/e.json")


def test_out_of_gpu_memory_ends_in_one_line_of_advice(adapter, asked, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(evaluate, "generate", full)
    with pytest.raises(SystemExit, match="^error: out of GPU memory; lower --batch-size"):
        run(tmp_path, "--adapter", adapter, "--prompts", asked)
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_old_results(adapter, asked, tmp_path, monkeypatch):
    flags = ["--adapter", adapter, "--prompts", asked, "--max-new-tokens", 1]
    _, page = run(tmp_path, *flags)
    old = {path: path.read_bytes() for path in page.parent.iterdir()}

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.os, "replace", full)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, *flags, "--batch-size", 2)
    assert end.value.code.startswith("error:") and "No space left" in end.value.code
    assert {path: path.read_bytes() for path in page.parent.iterdir()} == old


def test_a_full_disk_leaves_the_old_results(adapter, asked, tmp_path, capsys):  # stdout: no file
    flags = ["--adapter", adapter, "--prompts", asked, "--max-new-tokens", 1]
    _, page = run(tmp_path, *flags)
    old = {path: path.read_bytes() for path in page.parent.iterdir()}
    with largest_file(999), pytest.raises(SystemExit, match="^error: .*File too large"):
        run(tmp_path, *flags, "--batch-size", 2)
    assert {path: path.read_bytes() for path in page.parent.iterdir()} == old


def test_a_read_only_folder_is_refused_before_a_model_is_loaded(adapter, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    flags = ["--adapter", adapter, "--model", "nowhere/model"]
    told = f"^error: can't write to {tmp_path}/locked; choose another --output$"
    with pytest.raises(SystemExit, match=told):
        without_privileges(lambda: run(tmp_path, *flags, output="locked/new/e.json"))


# ------------------------------------------------------------------------------- terminal


def test_wrap_keeps_the_lines_of_a_code_block():
    code = ["```yaml", "apiVersion: v1", "spec:", "    - name: a", "", "      port: 80", "```"]
    got = evaluate.wrap("\n".join(["Write", *code, "and apply it."]), 30)
    assert got == ["Write", *code, "and apply it."]


def test_wrap_cuts_long_code_and_wraps_prose_at_words():
    line = "    kubectl get pods --all-namespaces --output wide"
    got = evaluate.wrap(f"```\n{line}\n```", 20)
    assert "".join(got[1:-1]) == line and max(map(len, got)) <= 20
    prose = "one two three four five six seven eight nine ten"
    got = evaluate.wrap(prose, 20)
    assert " ".join(got) == prose and max(map(len, got)) <= 20
    assert max(map(len, evaluate.wrap("x" * 100, 20))) <= 20


@pytest.mark.parametrize("columns", [80, 60, 120])
def test_side_by_side_fits_the_terminal(columns, adapter, tmp_path, capsys, monkeypatch, val):
    monkeypatch.setenv("COLUMNS", str(columns))
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["What is a Pod? " * 20, "y" * 300]))
    flags = ["--adapter", adapter, "--prompts", prompts, "--max-new-tokens", 60]
    run(tmp_path, *flags, "--val-data", val)
    lines = capsys.readouterr().out.splitlines()
    pairs = [line for line in lines if " | " in line]
    assert len(pairs) > 4 and len({line.index(" | ") for line in pairs if line}) == 1
    sides = [n for n, line in enumerate(lines) if line.startswith("[1/2]") or " | " in line]
    assert max(len(line) for line in lines[sides[0] : sides[-1] + 1]) <= columns


def test_wide_characters_take_two_columns_and_marks_none():
    assert evaluate.wrap("部署" * 5, 8) == ["部署部署"] * 2 + ["部署"]
    assert evaluate.wrap("部署" * 5, 7) == ["部署部", "署部署", "部署部", "署"]
    assert evaluate.wrap("e\u0301" * 8, 8) == ["e\u0301" * 8]
    assert evaluate.wrap("ok 🚀🚀 ok", 7) == ["ok 🚀🚀", "ok"]
    assert evaluate.wrap("```\n" + "部" * 5, 4) == ["```", "部部", "部部", "部"]


def side_by_side(capsys, base, finetuned, prompt="?"):
    sides = {"base": base, "finetuned": finetuned, "base_stopped": True, "finetuned_stopped": True}
    evaluate.print_side_by_side([{"prompt": prompt} | sides])
    return capsys.readouterr().out


def test_columns_stay_aligned_beside_wide_characters(capsys):
    rows = side_by_side(capsys, "部署e\u0301🚀", "right").splitlines()
    assert rows[2] == "before".ljust(38) + " | after"
    assert rows[4] == "部署e\u0301🚀" + " " * 31 + " | right"


def test_what_would_steer_a_terminal_is_shown_and_not_sent(capsys):
    answer = "\x1b[2Ja\x1b]0;title\x07b\x9b1mc\rd\x08e\u202ef\u200bg\x00h\ti\x7f"
    out = side_by_side(capsys, answer, f"```\n{answer}\n```", f"why {answer}")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e]", out)
    assert "\ufffd[2Ja\ufffd]0;title\ufffdb\ufffd1mc" in out and "d\ufffdefg\ufffdh" in out


@pytest.mark.parametrize("columns", ["1", "20", "1000"])
def test_a_very_narrow_or_wide_terminal_is_no_trouble(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert "smallest" in side_by_side(capsys, "the\nsmallest\nunit", "x" * 30 + " 部署")


def test_piped_output_is_plain_in_any_encoding(adapter, asked, tmp_path):
    flags = ["--adapter", adapter, "--prompts", asked, "--max-new-tokens", "24"]
    run = subprocess.run(
        [sys.executable, evaluate.__file__, *flags, "--output", tmp_path / "r.json"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    answers = " ".join(result["base"] for result in strict(tmp_path / "r.json")["prompts"])
    assert run.returncode == 0 and not answers.isascii()
    assert not re.search(rb"[^\n\x20-\x7e]", run.stdout) and b"?" in run.stdout
    assert not re.search(rb"[^\n\x20-\x7e]", run.stderr)


# ------------------------------------------------------------------------------- page


def page_of(folder, answer, log=()):
    """A page with this answer on both sides: its elements and its text."""
    sides = {"base": answer, "finetuned": answer, "base_stopped": True, "finetuned_stopped": False}
    summary = {"verdict": "Better", "prompts": 1, "base_stopped": 1, "finetuned_stopped": 0}
    summary |= {"base_mean_tokens": 3.4, "finetuned_mean_tokens": 5.6}
    settings = {"model": "m", "prompts": None, "versions": {"torch": "2.13", "peft": "0.21"}}
    results = {"summary": summary, "perplexity": None, "settings": settings}
    evaluate.write_page(folder / "p.html", results | {"prompts": [{"prompt": "?"} | sides]}, log)
    return Elements(folder / "p.html"), (folder / "p.html").read_text(encoding="utf-8")


def test_headings_step_down_one_level_at_a_time_and_columns_have_scopes(results):
    elements = Elements(results[1])
    levels = [int(tag[1]) for tag in elements.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and levels.count(3) == 3
    assert all(below - above <= 1 for above, below in zip(levels, levels[1:]))
    assert elements.attributes.count(("scope", "col")) == 3
    assert elements.tags.count("th") == len(
        [1 for name, _ in elements.attributes if name == "scope"]
    )


def test_fenced_code_is_set_as_code_also_where_it_was_cut(tmp_path):
    answer = "Run\n\n```bash\nls <a> `b`\n```\n\nthen\n\n```\ncut"
    elements, page = page_of(tmp_path, answer)
    code = re.findall(r"<code>(.*?)</code>", page, re.DOTALL)
    assert code[:2] == ["```bash\nls &lt;a&gt; `b`\n```", "```\ncut"] and len(code) == 4
    assert elements.text.count(answer) == 2


def test_settings_are_told_in_words(tmp_path):
    _, page = page_of(tmp_path, "a")
    body = page.split("</style>")[1]
    assert "torch 2.13, peft 0.21" in body and "None" not in body and "{" not in body


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out_from_their_ground(scheme):
    colours = dict(re.findall(r"--(\w+): (#\w+)", evaluate.PAGE.split("@media (prefers")[0]))
    if scheme == "dark":
        colours = dict(re.findall(r"--(\w+): (#\w+)", evaluate.PAGE.split("@media (prefers")[1]))

    def luminance(name):
        digits = colours[name][1:]
        pairs = (
            [digits[i : i + 2] for i in (0, 2, 4)] if len(digits) == 6 else [c * 2 for c in digits]
        )
        parts = [int(pair, 16) / 255 for pair in pairs]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ink in ("ink", "soft", "after", "alarm"):
        for ground in ("paper", "tint"):
            dark, light = sorted([luminance(ink), luminance(ground)])
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def losses(*values, key="loss", first=1):
    return [{"step": step, key: value} for step, value in enumerate(values, first)]


def coordinates(svg):
    points = re.search(r'points="(.*?)"', svg)[1].split()
    return sorted({tuple(map(float, point.split(","))) for point in points})


def test_a_run_of_one_step_has_a_curve_that_can_be_seen():
    svg = evaluate.curve(losses(2.5))
    assert svg.count("step 1<") == 2 and coordinates(svg) == [(90, 20)]
    assert len(re.search(r'points="(.*?)"', svg)[1].split()) == 2  # a lone point is not drawn


def test_a_long_curve_stays_small_and_ends_where_training_ended():
    svg = evaluate.curve(losses(*(5 - step / 2500 for step in range(10_000))))
    assert len(svg) < 25_000 and len(coordinates(svg)) > 500
    assert coordinates(svg)[0][0] < 91 and coordinates(svg)[-1] == (690, 220)
    assert "from 5.000 to 1.000" in svg and "step 10000<" in svg


def test_what_is_no_step_or_loss_is_left_out_of_the_curve(tmp_path):
    odd = losses(None, math.nan, math.inf, "<b>", [1], 10**400, first=3)
    odd += losses(None, math.nan, key="eval_loss") + [{"step": "<b>", "loss": 9.0}, {"loss": 9.0}]
    write_jsonl(tmp_path / "log", losses(4.0, 3.0) + odd)
    good = evaluate.curve(losses(4.0, 3.0))
    assert evaluate.curve(evaluate.read_log(tmp_path / "log")) == good
    write_jsonl(tmp_path / "log", odd)
    assert evaluate.curve(evaluate.read_log(tmp_path / "log")) == evaluate.curve([]) == ""


def test_a_log_with_steps_twice_or_out_of_order_gives_one_line():
    again = losses(5.0, 4.0, 3.9, 3.8) + losses(3.0, 2.0, first=3) + losses(9.0, 4.5)
    assert evaluate.curve(again) == evaluate.curve(losses(9.0, 4.5, 3.0, 2.0))


def test_hostile_prompts_and_answers_are_inert_on_the_page(hostile):
    results, page = hostile
    assert results["prompts"][0]["base"] == "".join(HOSTILE)  # the answers are hostile indeed
    elements = Elements(page)
    harmless = "html head meta title style body h1 h2 h3 p div span pre table thead tbody tr th td"
    harmless += " footer h4 code svg g path text polyline"
    assert set(elements.tags) <= set(harmless.split())
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    assert all(text in elements.text for text in HOSTILE)
    assert elements.text.count("".join(HOSTILE)) >= 2 * len(results["prompts"])


def test_the_page_refers_to_nothing_outside_itself(results, hostile):
    for _, page in (results, hostile):
        elements = Elements(page)
        loading = {"src", "href", "srcset", "action", "data", "background", "poster", "xlink:href"}
        assert not loading & {name for name, _ in elements.attributes}
        style = re.findall(r"<style>(.*?)</style>", page.read_text(encoding="utf-8"), re.DOTALL)
        assert not re.search(r"url\(|@import|https?:", "".join(style))
        assert not [value for _, value in elements.attributes if "http" in (value or "")]


def test_the_page_shows_verdict_figures_curve_and_answers(results):
    data, page = results
    elements = Elements(page)
    assert data["summary"]["verdict"] in elements.text
    assert f"{data['perplexity']['base']:.3f}" in elements.text
    assert f"{data['perplexity']['finetuned']:.3f}" in elements.text
    assert "polyline" in elements.tags
    log = (Path(data["settings"]["adapter"]) / "training_log.jsonl").read_text().splitlines()
    losses = [entry["eval_loss"] for entry in map(json.loads, log) if "eval_loss" in entry]
    assert f"validation loss, at last {losses[-1]:.3f}" in elements.text
    for result in data["prompts"]:
        assert result["base"] in elements.text and result["finetuned"] in elements.text


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


def open_page(browser, page, width):
    """Open a page on a screen of that width: the addresses that were asked for."""
    browser.get_log("performance")
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(Path(page).resolve().as_uri())
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_scrolls_sideways_loads_or_runs(browser, results, hostile, width):
    shots = os.environ.get("SCREENSHOTS")
    for name, (_, page) in {"shot": results, "hostile": hostile}.items():
        asked = open_page(browser, page, width)
        assert asked == [page.resolve().as_uri()]  # the page and nothing else
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        assert browser.execute_script("return innerWidth") == width
        assert browser.execute_script("return window.pwned") is None
        assert browser.execute_script("return document.scripts.length") == 0
        assert not browser.execute_script(
            "return [...document.querySelectorAll('body *')].filter(e => "
            "e.getBoundingClientRect().right > innerWidth + 1).length"
        )
        if shots:
            browser.save_screenshot(str(Path(shots) / f"{name}{width}.png"))


def test_figures_on_a_telephone_are_not_broken_in_two(browser, results):
    open_page(browser, results[1], 390)
    broken = browser.execute_script(
        "return [...document.querySelectorAll('thead th, tbody td')]"
        ".filter(e => !e.closest('footer')).map(e => {const r = document.createRange(); "
        "r.selectNodeContents(e); return [e.textContent, r.getClientRects().length]})"
        ".filter(([text, lines]) => lines > 1 && !text.includes(' '))"
    )
    assert broken == []
    heights = (
        "return [...document.querySelectorAll('footer th')].map(e => {const r = "
        "document.createRange(); r.selectNodeContents(e); return r.getBoundingClientRect().height})"
    )
    assert max(browser.execute_script(heights)) < 30  # one line each
    size = (
        "return [...document.querySelectorAll('svg text')].map(e => "
        "parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)"
    )
    assert min(browser.execute_script(size)) > 11
