"""The recipes in README.md do what they say: their own text is run on a small adapter."""

import json
import re
from pathlib import Path

import gguf
import offline_model
import peft
import pytest
import torch
from conftest import llama_tokenizer
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_finetune

README = Path(lora_finetune.__file__).with_name("README.md").read_text(encoding="utf-8")
QUESTION = "How do I list all Pods of a node?"
# chat_template in the tokenizer_config.json of TinyLlama-1.1B-Chat-v1.0
TINYLLAMA = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""


def blocks(language):
    """The code blocks of this language in the section on using the adapter."""
    section = README.split("\n## Use the adapter\n")[1].split("\n## ")[0]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return [text for named, text in fenced if named == language]


@pytest.fixture(scope="module")
def home(able, tmp_path_factory):
    """A folder that holds output/tinyllama-k8s-qlora, trained on plain weights until it answers well."""
    folder = tmp_path_factory.mktemp("home")
    record = {"instruction": QUESTION, "input": "", "output": "Run kubectl get pods."}
    (folder / "data.jsonl").write_text(json.dumps(record) + "\n")
    flags = (
        "--no-load-in-4bit --max-steps 80 --learning-rate 0.002 --lora-dropout 0 --target-modules"
    )
    flags += " q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    flags += " --batch-size 1 --gradient-accumulation-steps 1"
    paths = ["--model", able, "--dataset", str(folder / "data.jsonl")]
    output = str(folder / "output/tinyllama-k8s-qlora")
    lora_finetune.main([*flags.split(), *paths, "--output", output])
    return folder


@pytest.fixture(scope="module")
def merged(home):
    """What the second recipe leaves: output/merged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        exec(blocks("python")[1], {})
    return home / "output/merged"


def answer(model, tokenizer):
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_asking_a_question_prints_the_answer_that_was_trained(home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    exec(blocks("python")[0], {})
    assert capsys.readouterr().out == "Run kubectl get pods.\n"


def test_merged_model_is_base_and_adapter_in_one(home, merged, able):
    assert not (merged / "adapter_config.json").exists()
    one = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    two = AutoModelForCausalLM.from_pretrained(able, dtype=torch.float32)
    two = peft.PeftModel.from_pretrained(two, home / "output/tinyllama-k8s-qlora").eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer(f"<|user|>\n{QUESTION}</s>\n<|assistant|>\nRun", return_tensors="pt")
    with torch.no_grad():
        merged_logits, logits = one(**ids).logits, two(**ids).logits
        with two.disable_adapter():
            base_logits = two(**ids).logits
    off = (merged_logits - logits).abs().max()  # the merged weights are rounded to 16 bits
    assert off < 0.05 and off < (base_logits - logits).abs().max() / 20
    assert answer(one, tokenizer) == answer(two, tokenizer) == "Run kubectl get pods."
    with two.disable_adapter():
        assert answer(two, tokenizer) != "Run kubectl get pods."


def test_merged_folder_holds_16_bit_weights_and_the_template(merged, home):
    weights = load_file(merged / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    trained = AutoTokenizer.from_pretrained(home / "output/tinyllama-k8s-qlora")
    assert AutoTokenizer.from_pretrained(merged).chat_template == trained.chat_template


def for_ollama(tokenizer, folder, monkeypatch):
    """Run the third recipe on this tokenizer; return TEMPLATE and stop of the Modelfile it writes."""
    tokenizer.save_pretrained(folder / "output/tinyllama-k8s-qlora")
    monkeypatch.chdir(folder)
    exec(blocks("python")[2], {})
    text = Path("Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./model.gguf\n") and "--outfile model.gguf" in README
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)[1]
    return template, re.search(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)[1]


def trained_row(tokenizer):
    """Ids of the prompt, and of the token that ends the answer, as training has them."""
    frame = lora_finetune.chat_frame(tokenizer)
    record = {"instruction": QUESTION, "input": "", "output": "With kubectl."}
    row = lora_finetune.encode(record, tokenizer, frame, 512)
    prompt = [id for id, label in zip(row["input_ids"], row["labels"]) if label == -100]
    return prompt, row["labels"][-1]


TEMPLATES = {
    "zephyr": offline_model.TEMPLATES["zephyr"],
    "TinyLlama's own": TINYLLAMA,
    "begins with BOS": offline_model.TEMPLATES["zephyr"].replace("{%", "{{ bos_token }}{%", 1),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_modelfile_gives_the_prompt_and_the_stop_of_training(
    template, tiny, tmp_path, monkeypatch
):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = template
    prompt, last = trained_row(tokenizer)
    text, stop = for_ollama(tokenizer, tmp_path, monkeypatch)
    assert text.replace("{{ .Prompt }}", QUESTION) == tokenizer.decode(prompt)
    assert tokenizer.convert_tokens_to_ids(stop) == last


@pytest.mark.parametrize("template", [TINYLLAMA, TEMPLATES["begins with BOS"]], ids=["text", "BOS"])
def test_a_blank_before_the_text_only_is_told_to_llama_cpp(template, tmp_path, monkeypatch):
    """As TinyLlama's tokenizer has it. Left alone, llama.cpp puts a blank after every </s> too."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = llama_tokenizer(vocab, [], legacy=False)
    tokenizer.chat_template = template
    prompt, _ = trained_row(tokenizer)
    text, _ = for_ollama(tokenizer, tmp_path, monkeypatch)
    config = json.loads(Path("output/merged/tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is False
    plain = tokenizer.backend_tokenizer
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    ids = plain.encode(text.replace("{{ .Prompt }}", QUESTION), add_special_tokens=False).ids
    assert ids == prompt


def test_llama_cpp_finds_template_and_end_token_in_the_merged_folder(merged):
    found = gguf.SpecialVocab(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert found.chat_template == tokenizer.chat_template
    assert found.special_token_ids["eos"] == tokenizer.eos_token_id


def test_llama_cpp_puts_no_bos_first(tiny, tmp_path, monkeypatch):
    """Though the tokenizer adds one by itself, as that of TinyLlama does."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for_ollama(tokenizer, tmp_path, monkeypatch)
    assert gguf.SpecialVocab("output/tinyllama-k8s-qlora").add_special_token["bos"] is True
    assert gguf.SpecialVocab("output/merged").add_special_token["bos"] is False
    # newer releases of llama.cpp believe this file, not the config
    saved = json.loads(Path("output/merged/tokenizer.json").read_text())
    assert "<s>" not in json.dumps(saved["post_processor"])


CUTS = {  # as SmolLM2's own tokenizer cuts them; Ġ is a blank
    "a  0/3": ["a", "ĠĠ", "0", "/", "3"],
    "a  a": ["a", "Ġ", "Ġa"],
    "33 0": ["3", "3", "Ġ", "0"],
}


@pytest.mark.parametrize("text", CUTS)
def test_the_offline_smollm2_reads_digits_one_by_one(text):
    pieces = ["a", "0", "3", "/", "Ġ", "ĠĠ", "Ġa", "Ġ0", "33"]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    merges = [("Ġ", "Ġ"), ("Ġ", "a"), ("Ġ", "0"), ("3", "3")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = offline_model.digits_apart()
    assert tokenizer.encode(text).tokens == CUTS[text]
