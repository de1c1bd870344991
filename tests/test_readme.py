"""The recipes in README.md do what they say: their own text is run on a small adapter."""

import json
import re
from collections import namedtuple
from pathlib import Path

import gguf
import offline_model
import peft
import pytest
import torch
from conftest import llama_tokenizer
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import lora_finetune

README = Path(lora_finetune.__file__).with_name("README.md").read_text(encoding="utf-8")
QUESTION = "How do I list all Pods of a node?"
ANSWER = "Run kubectl get pods."
FOLDER = "output/tinyllama-k8s-qlora"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMS = ["zephyr", "chatml", "llama3", "qwen3", "mistral"]
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


def follow(recipe, folder, *edits):
    """Run a recipe of the README in this folder, edited: old, new, ...; return its variables."""
    names = {}
    code = blocks("python")[recipe]
    for old, new in zip(edits[::2], edits[1::2]):
        assert old in code
        code = code.replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, names)
    return names


def write_base(folder, form):
    """A tiny model whose tokenizer puts a BOS first, with settings that no answer should follow."""
    offline_model.write_tiny(folder, template=form)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "</s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data *= 20  # else no adapter could make it sure of an answer
    model.save_pretrained(folder)
    bent = {"eos_token_id": tokenizer.bos_token_id, "repetition_penalty": 9.0, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(bent))


def note_prompt(tokenizer, folder):
    """Write what training leaves of the prompt into training_config.json."""
    frame = lora_finetune.chat_frame(tokenizer)._asdict()
    del frame["special"]
    Path(folder, "training_config.json").write_text(json.dumps({"prompt": frame}))


def train(model, home, *flags):
    """Train an adapter on one record, on plain weights unless told otherwise, until it is sure."""
    record = {"instruction": QUESTION, "input": "", "output": ANSWER}
    (home / "data.jsonl").write_text(json.dumps(record) + "\n")
    options = {
        "--model": model,
        "--dataset": home / "data.jsonl",
        "--output": home / FOLDER,
        "--max-steps": 80,
        "--learning-rate": 0.002,
        "--lora-dropout": 0,
        "--batch-size": 1,
        "--gradient-accumulation-steps": 1,
    }
    for flag, value in options.items():
        flags += (flag, str(value))
    lora_finetune.main([*flags, "--target-modules", *LAYERS])


Home = namedtuple("Home", ["folder", "base", "tokenizer", "prompt", "end", "text", "asked"])


@pytest.fixture(scope="module", params=FORMS)
def home(request, tmp_path_factory):
    """A folder where an adapter was trained and all recipes were followed, and what training saw."""
    folder = tmp_path_factory.mktemp(request.param)
    base = folder / "base"
    write_base(base, request.param)
    train(base, folder, "--no-load-in-4bit")
    asked = follow(0, folder)
    follow(1, folder)
    follow(2, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt, end, text = as_trained(tokenizer)
    return Home(folder, base, tokenizer, prompt, end, text, asked)


def as_trained(tokenizer):
    """Ids of the prompt, the id that ends the answer, the text of both, as training has them."""
    frame = lora_finetune.chat_frame(tokenizer)
    record = {"instruction": QUESTION, "input": "", "output": ANSWER}
    row = lora_finetune.encode(record, tokenizer, frame, 512)
    text = frame.head + QUESTION + frame.tail + frame.blank + ANSWER + frame.end
    return row["input_ids"][: row["prompt_tokens"]], row["input_ids"][-1], text


def answer(model, prompt):
    """The ids of a greedy answer, in which only the model itself says where to stop."""
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=40)
    return ids[0, len(prompt) :].tolist()


def test_asking_asks_as_training_did_and_ends_with_the_turn(home):
    assert home.asked["inputs"]["input_ids"][0].tolist() == home.prompt
    answered = home.asked["answer"][0, len(home.prompt) :].tolist()
    assert home.tokenizer.decode(answered[:-1]).strip() == ANSWER
    assert answered[-1] == home.end


def test_asking_prints_the_answer(home, capsys):
    follow(0, home.folder)
    assert capsys.readouterr().out == ANSWER + "\n"


def test_merged_model_is_base_and_adapter_in_one(home):
    merged = home.folder / "output/merged"
    assert not (merged / "adapter_config.json").exists()
    one = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    two = AutoModelForCausalLM.from_pretrained(home.base, dtype=torch.float32)
    two = peft.PeftModel.from_pretrained(two, home.folder / FOLDER).eval()
    ids = torch.tensor([home.prompt])
    with torch.no_grad():
        merged_logits, logits = one(ids).logits, two(ids).logits
        with two.disable_adapter():
            base_logits = two(ids).logits
    learned = (base_logits - logits).abs().max()
    off = (merged_logits - logits).abs().max()  # the merged weights are rounded to 16 bits
    assert off < 0.05
    assert off < learned / 20


def test_merged_folder_answers_and_stops_by_itself(home):
    model = AutoModelForCausalLM.from_pretrained(home.folder / "output/merged", dtype=torch.float32)
    answered = answer(model, home.prompt)
    assert home.tokenizer.decode(answered[:-1]).strip() == ANSWER
    assert answered[-1] == home.end


def test_merged_folder_holds_16_bit_weights_and_the_tokenizer_of_training(home):
    weights = load_file(home.folder / "output/merged/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    trained = AutoTokenizer.from_pretrained(home.folder / FOLDER)
    merged = AutoTokenizer.from_pretrained(home.folder / "output/merged")
    assert merged.chat_template == trained.chat_template
    assert merged.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_llama_cpp_finds_end_and_template_of_training_in_the_folder_to_convert(home):
    found = gguf.SpecialVocab(home.folder / "output/ollama")
    assert found.special_token_ids["eos"] == home.end
    assert found.add_special_token["bos"] is False  # though the tokenizer adds one by itself
    # newer releases of llama.cpp believe this file, not the config
    saved = json.loads((home.folder / "output/ollama/tokenizer.json").read_text())
    assert "<s>" not in json.dumps(saved["post_processor"])
    tokenizer = AutoTokenizer.from_pretrained(home.folder / "output/ollama")
    assert found.chat_template == tokenizer.chat_template
    prompt, text = by_template(tokenizer)
    assert tokenizer(prompt)["input_ids"] == home.prompt
    assert text == home.text
    asked = by_template(tokenizer, enable_thinking=True, tools=[{"type": "function"}])
    assert asked == (prompt, text)


def by_template(tokenizer, **options):
    """What the chat template makes of a question, and of a question and its answer."""
    asked = [{"role": "user", "content": QUESTION}]
    answered = [*asked, {"role": "assistant", "content": ANSWER}]
    return (
        tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **options),
        tokenizer.apply_chat_template(answered, tokenize=False, **options),
    )


def for_ollama(folder):
    """TEMPLATE and parameters of the Modelfile in this folder."""
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./model.gguf\n") and "--outfile model.gguf" in README
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)[1]
    return template, dict(re.findall(r"^PARAMETER (\w+) (.*)$", text, re.MULTILINE))


def rendered(template, question, answer=None):
    """A turn as Ollama writes it: of the last one the answer is open, and what follows it cut."""
    text = template.replace("{{ .Prompt }}", question)
    if answer is None:
        return text.split("{{ if .Response }}")[0]
    blank = re.search(r"{{ if .Response }}(.*?){{ .Response }}{{ end }}", text)
    return text.replace(blank[0], blank[1] + answer)


def test_the_modelfile_asks_and_stops_as_training_did(home):
    template, parameters = for_ollama(home.folder)
    tokenizer = AutoTokenizer.from_pretrained(home.folder / "output/ollama")
    assert tokenizer(rendered(template, QUESTION))["input_ids"] == home.prompt
    assert rendered(template, QUESTION, ANSWER) == home.text
    assert parameters == {"stop": f'"{tokenizer.eos_token}"', "temperature": "0"}
    assert tokenizer.eos_token_id == home.end


def blank_first(legacy):
    """A tokenizer of TinyLlama's or, legacy, Llama 2's kind."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "H", "o", "▁H", "▁Ho"]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    return llama_tokenizer(vocab, [("▁", "H"), ("▁H", "o")], legacy)


def prepare(tokenizer, folder):
    """Follow the third recipe with this tokenizer; no model is needed for it."""
    tokenizer.save_pretrained(folder / FOLDER)
    note_prompt(tokenizer, folder / FOLDER)
    (folder / "output/merged").mkdir()
    follow(2, folder)
    return AutoTokenizer.from_pretrained(folder / "output/ollama")


@pytest.mark.parametrize("system", ['Say "no".', "Grüße, ▁ 你好", "\\d{2}\t{{ .Prompt", "'"])
def test_the_system_text_is_written_as_it_stands(system, tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    quoted = json.dumps(system, ensure_ascii=False)
    tokenizer.chat_template = "{{ " + quoted + " }}" + offline_model.TEMPLATES["zephyr"]
    text = as_trained(tokenizer)[2]
    turns = prepare(tokenizer, tmp_path)
    assert system in text and by_template(turns)[1] == text
    assert "\\u" not in turns.chat_template  # llama.cpp refuses such a template


@pytest.mark.parametrize("legacy", [True, False])
def test_merging_leaves_the_tokenizer_as_it_is(legacy, tmp_path):
    """transformers 5 forgets whether a blank was put after every control token, as Llama 2 has it."""
    tokenizer = blank_first(legacy)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=300, **small))
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / FOLDER)
    base.generation_config.save_pretrained(tmp_path / FOLDER)
    tokenizer.init_kwargs["legacy"] = legacy  # as lora_finetune.py saves it
    tokenizer.save_pretrained(tmp_path / FOLDER)
    follow(1, tmp_path)
    merged = AutoTokenizer.from_pretrained(tmp_path / "output/merged")
    for text in ["Ho", "<s>Ho", "</s>Ho Ho", " Ho"]:
        assert merged.tokenize(text) == tokenizer.tokenize(text)


def test_a_base_in_4_bits_is_merged_into_its_16_bit_original(able, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        able, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    model.save_pretrained(tmp_path / "able-bnb-4bit")
    AutoTokenizer.from_pretrained(able).save_pretrained(tmp_path / "able-bnb-4bit")
    train(tmp_path / "able-bnb-4bit", tmp_path)
    follow(1, tmp_path, "# model =", "model =", "the original", able)
    weights = load_file(tmp_path / "output/merged/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output/merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(able)
    prompt, end, _ = as_trained(tokenizer)
    answered = answer(model, prompt)
    assert tokenizer.decode(answered[:-1]) == ANSWER and answered[-1] == end


SPOKEN = {  # templates over a SentencePiece vocabulary, where a blank is put before the text
    "text first": TINYLLAMA,
    "BOS first": offline_model.TEMPLATES["zephyr"].replace("{%", "{{ bos_token }}{%", 1),
    "blank before the answer": offline_model.TEMPLATES["mistral"],
    "control tokens": offline_model.TEMPLATES["chatml"],
}


@pytest.fixture(params=SPOKEN)
def sentencepiece(request, tmp_path):
    """A folder where the third recipe was followed, a tokenizer of TinyLlama's kind, its prompt."""
    tokenizer = blank_first(legacy=False)
    tokenizer.chat_template = SPOKEN[request.param]
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tmp_path, tokenizer, prepare(tokenizer, tmp_path), as_trained(tokenizer)[0]


def test_a_blank_before_the_text_only_is_told_to_llama_cpp(sentencepiece):
    """Left alone, llama.cpp puts a blank after every control token too."""
    folder, tokenizer, turns, prompt = sentencepiece
    config = json.loads((folder / "output/ollama/tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is False
    plain = tokenizer.backend_tokenizer  # from here on as llama.cpp is told
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    by_ollama = rendered(for_ollama(folder)[0], QUESTION)
    by_llama_cpp = by_template(turns)[0]
    for text in [by_ollama, by_llama_cpp]:
        assert plain.encode(text, add_special_tokens=False).ids == prompt


def test_llama_cpp_finds_tokens_that_the_sentencepiece_model_lacks(sentencepiece):
    folder, tokenizer, *_ = sentencepiece
    config = json.loads((folder / "output/ollama/tokenizer_config.json").read_text())
    told = config["added_tokens_decoder"]
    id = str(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert told[id]["content"] == "<|im_end|>" and told[id]["special"] is True


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
