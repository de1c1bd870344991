"""The recipes in README.md do what they say: their own text is run on a small adapter."""

import json
import math
import re
from collections import namedtuple

import gguf
import offline_model
import peft
import pytest
import torch
import transformers
from conftest import (
    LAYERS,
    README,
    argv,
    llama_tokenizer,
    llama_vocab,
    read_json,
    section,
    write_jsonl,
)
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

PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)  # a block of code
ASK, MERGE, CONVERT = PYTHON.findall(section("Use the adapter"))
QUESTION = "How do I list all Pods of a node?"
ANSWER = "Run kubectl get pods."
RECORD = {"instruction": QUESTION, "input": "", "output": ANSWER}
FOLDER = "output/tinyllama-k8s-qlora"
FORMS = [  # of the prompt
    "zephyr",
    "chatml",
    "llama3",
    "qwen3",
    "mistral",
]
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


def tokenizer_in(folder):
    """The tokenizer of a model, or of an adapter."""
    return AutoTokenizer.from_pretrained(folder)


def model_in(folder):
    """The model in this folder, its weights in 32 bits."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def follow(recipe, folder):
    """Run a recipe of the README in this folder; return its variables."""
    variables = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(recipe, variables)
    return variables


def write_base(folder, form):
    """A tiny model whose tokenizer puts a BOS first, with settings that no answer should follow."""
    offline_model.write_tiny(folder, template=form)
    tokenizer = tokenizer_in(folder)
    bos = tokenizer.bos_token_id
    tokenizer.eos_token = "</s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        special_tokens=[("<s>", bos)],
    )
    tokenizer.save_pretrained(folder)

    model = model_in(folder)
    model.lm_head.weight.data *= 20  # else no adapter could make it sure of an answer
    model.save_pretrained(folder)
    bent = {"eos_token_id": bos, "repetition_penalty": 9.0, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(bent))


def train(model, folder, **more):
    """Train an adapter on one record until it is sure of it."""
    write_jsonl(folder / "data.jsonl", [RECORD])
    arguments = argv(
        model=model,
        dataset=folder / "data.jsonl",
        output=folder / FOLDER,
        max_steps=80,
        learning_rate=0.002,
        lora_dropout=0,
        batch_size=1,
        gradient_accumulation_steps=1,
        target_modules=LAYERS,
        **more,
    )
    lora_finetune.main(arguments)


Seen = namedtuple("Seen", ["prompt", "blank", "end", "text"])


def seen_in_training(tokenizer):
    """The ids of the prompt, what begins and ends the answer (text, id), and the whole text."""
    frame = lora_finetune.chat_frame(tokenizer)
    row = lora_finetune.encode(RECORD, tokenizer, frame, 512)
    ids = row["input_ids"]
    prompt = ids[: row["prompt_tokens"]]
    asked = frame.head + QUESTION + frame.tail
    answered = frame.blank + ANSWER + frame.end
    return Seen(prompt, frame.blank, ids[-1], asked + answered)


def note_prompt(tokenizer, folder):
    """Write what training leaves of the prompt into training_config.json."""
    prompt = lora_finetune.chat_frame(tokenizer)._asdict()
    del prompt["special"]
    (folder / "training_config.json").write_text(json.dumps({"prompt": prompt}))


def blank_first(legacy):
    """A tokenizer of TinyLlama's or, legacy, Llama 2's kind."""
    vocab = llama_vocab("▁", "H", "o", "▁H", "▁Ho")
    return llama_tokenizer(vocab, [("▁", "H"), ("▁H", "o")], legacy)


def convert(tokenizer, folder):
    """Follow the third recipe with this tokenizer; no model is needed for it."""
    tokenizer.save_pretrained(folder / FOLDER)
    note_prompt(tokenizer, folder / FOLDER)
    (folder / "output/merged").mkdir()
    follow(CONVERT, folder)
    return tokenizer_in(folder / "output/ollama")


def check_answer(ids, tokenizer, seen):
    """These ids are the prompt, the answer that was learned, and the end of the turn."""
    size = len(seen.prompt)
    answer = ids[size:-1]
    assert ids[:size] == seen.prompt
    assert tokenizer.decode(answer) == seen.blank + ANSWER
    assert ids[-1] == seen.end


def check_merged(folder, tokenizer):
    """Asked as in training, the merged model answers as it learned to, and stops by itself."""
    seen = seen_in_training(tokenizer)
    prompt = torch.tensor([seen.prompt])
    ids = model_in(folder / "output/merged").generate(prompt, max_new_tokens=40)
    check_answer(ids[0].tolist(), tokenizer, seen)


def check_16_bits(folder):
    """All merged weights are in 16 bits."""
    weights = load_file(folder / "output/merged/model.safetensors")
    dtypes = [weight.dtype for weight in weights.values()]
    assert set(dtypes) == {torch.float16}


def by_template(tokenizer, **options):
    """What the chat template makes of a question, and of a question and its answer."""
    asked = [{"role": "user", "content": QUESTION}]
    answered = [*asked, {"role": "assistant", "content": ANSWER}]
    apply = tokenizer.apply_chat_template
    prompt = apply(asked, tokenize=False, add_generation_prompt=True, **options)
    whole = apply(answered, tokenize=False, **options)
    return prompt, whole


def for_ollama(folder):
    """TEMPLATE and parameters of the Modelfile in this folder."""
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    template = re.search(r'\nTEMPLATE """(.*?)"""\n', text, re.DOTALL)
    parameters = re.findall(r"\nPARAMETER (\w+) (.*)", text)
    return template[1], dict(parameters)


def open_turn(template):
    """A question as Ollama writes it: what follows the prompt is left for the model."""
    text = template.replace("{{ .Prompt }}", QUESTION)
    return text.partition("{{ if .Response }}")[0]


def whole_turn(template):
    """A question and its answer as Ollama writes them."""
    text = template.replace("{{ .Prompt }}", QUESTION)
    response = re.search(r"{{ if .Response }}(.*?){{ .Response }}{{ end }}", text)
    answered = response[1] + ANSWER
    return text.replace(response[0], answered)


# ------------------------------------------------------------------------------- all recipes

Home = namedtuple("Home", ["folder", "base", "tokenizer", "seen", "asked"])


@pytest.fixture(scope="module", params=FORMS)
def home(request, tmp_path_factory):
    """A folder where an adapter was trained and all recipes were followed."""
    folder = tmp_path_factory.mktemp(request.param)
    base = folder / "base"
    write_base(base, request.param)
    train(base, folder, load_in_4bit=False)
    asked = follow(ASK, folder)
    follow(MERGE, folder)
    follow(CONVERT, folder)
    tokenizer = tokenizer_in(base)
    seen = seen_in_training(tokenizer)
    return Home(folder, base, tokenizer, seen, asked)


def test_asking_asks_as_training_did_and_ends_with_the_turn(home):
    prompt = home.asked["inputs"]["input_ids"]
    assert prompt.tolist() == [home.seen.prompt]

    answer = home.asked["answer"]
    check_answer(answer[0].tolist(), home.tokenizer, home.seen)


def test_asking_prints_the_answer(home, capsys):
    follow(ASK, home.folder)
    assert capsys.readouterr().out == ANSWER + "\n"


def test_merged_model_is_base_and_adapter_in_one(home):
    folder = home.folder / "output/merged"
    merged = model_in(folder)
    adapted = peft.PeftModel.from_pretrained(model_in(home.base), home.folder / FOLDER)
    prompt = torch.tensor([home.seen.prompt])

    with torch.no_grad():
        after_merging = merged(prompt).logits
        after = adapted(prompt).logits
        with adapted.disable_adapter():
            before = adapted(prompt).logits

    learned = torch.dist(before, after, math.inf)  # the largest difference
    off = torch.dist(after_merging, after, math.inf)  # merged weights are rounded to 16 bits
    assert off < 0.05
    assert off < learned / 20
    assert not (folder / "adapter_config.json").exists()


def test_merged_folder_answers_and_stops_by_itself(home):
    check_merged(home.folder, home.tokenizer)


def test_merged_folder_holds_16_bit_weights_and_the_tokenizer_of_training(home):
    check_16_bits(home.folder)

    trained = tokenizer_in(home.folder / FOLDER)
    merged = tokenizer_in(home.folder / "output/merged")
    assert merged.chat_template == trained.chat_template
    assert merged.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_llama_cpp_finds_end_and_template_of_training_in_the_folder_to_convert(home):
    seen = home.seen
    folder = home.folder / "output/ollama"
    tokenizer = tokenizer_in(folder)
    found = gguf.SpecialVocab(folder)
    assert found.special_token_ids["eos"] == seen.end
    assert found.add_special_token["bos"] is False  # though the tokenizer adds one by itself
    assert found.chat_template == tokenizer.chat_template

    # newer releases of llama.cpp believe this file, not the config
    saved = read_json(folder / "tokenizer.json")
    assert "<s>" not in str(saved["post_processor"])

    prompt, whole = by_template(tokenizer)
    assert tokenizer(prompt)["input_ids"] == seen.prompt
    assert whole == seen.text

    tool = {"type": "function"}
    assert by_template(tokenizer, enable_thinking=True, tools=[tool]) == (prompt, whole)


def test_the_modelfile_asks_and_stops_as_training_did(home):
    seen = home.seen
    tokenizer = tokenizer_in(home.folder / "output/ollama")
    stop = f'"{tokenizer.eos_token}"'
    template, parameters = for_ollama(home.folder)
    asked = open_turn(template)
    assert tokenizer(asked)["input_ids"] == seen.prompt
    assert whole_turn(template) == seen.text
    assert tokenizer.eos_token_id == seen.end
    assert parameters == {"stop": stop, "temperature": "0"}


def test_the_modelfile_begins_with_the_file_that_was_converted(home):
    text = (home.folder / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./model.gguf\n")
    assert "--outfile model.gguf" in README


# ------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("legacy", [True, False])
def test_merging_leaves_the_tokenizer_as_it_is(legacy, tmp_path):
    """transformers 5 forgets whether a blank was put after every control token, as in Llama 2."""
    shape = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    base = LlamaForCausalLM(shape)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    tokenizer = blank_first(legacy)
    tokenizer.init_kwargs["legacy"] = legacy  # as lora_finetune.py saves it
    peft.get_peft_model(model, config).save_pretrained(tmp_path / FOLDER)
    base.generation_config.save_pretrained(tmp_path / FOLDER)
    tokenizer.save_pretrained(tmp_path / FOLDER)

    follow(MERGE, tmp_path)

    merged = tokenizer_in(tmp_path / "output/merged")
    for text in ["Ho", "<s>Ho", "</s>Ho Ho", " Ho"]:
        assert merged.tokenize(text) == tokenizer.tokenize(text)


def test_a_base_in_4_bits_is_merged_into_its_16_bit_original(able, tmp_path):
    base = tmp_path / "able-bnb-4bit"
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(able, quantization_config=nf4)
    model.save_pretrained(base)
    tokenizer = tokenizer_in(able)
    tokenizer.save_pretrained(base)
    train(base, tmp_path)

    assert "# model =" in MERGE
    assert "the original" in MERGE
    recipe = MERGE.replace("# model =", "model =").replace("the original", able)
    follow(recipe, tmp_path)

    check_16_bits(tmp_path)
    check_merged(tmp_path, tokenizer)


# ------------------------------------------------------------------------------- converting

SPOKEN = {  # templates over a SentencePiece vocabulary, where a blank is put before the text
    "text first": TINYLLAMA,
    "BOS first": offline_model.TEMPLATES["zephyr"].replace("{%", "{{ bos_token }}{%", 1),
    "blank before the answer": offline_model.TEMPLATES["mistral"],
    "control tokens": offline_model.TEMPLATES["chatml"],
}
Spoken = namedtuple("Spoken", ["folder", "tokenizer", "converted", "seen"])


@pytest.fixture(params=SPOKEN)
def spoken(request, tmp_path):
    """A folder where the third recipe was followed, with a tokenizer of TinyLlama's kind."""
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 reads such a folder by tokenizer.model, which is not here")
    tokenizer = blank_first(legacy=False)
    tokenizer.chat_template = SPOKEN[request.param]
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    seen = seen_in_training(tokenizer)
    converted = convert(tokenizer, tmp_path)
    return Spoken(tmp_path, tokenizer, converted, seen)


@pytest.mark.parametrize("system", ['Say "no".', "Grüße, ▁ 你好", "\\d{2}\t{{ .Prompt", "'"])
def test_the_system_text_is_written_as_it_stands(system, tiny, tmp_path):
    quoted = json.dumps(system, ensure_ascii=False)
    tokenizer = tokenizer_in(tiny)
    tokenizer.chat_template = "{{ " + quoted + " }}" + offline_model.TEMPLATES["zephyr"]
    seen = seen_in_training(tokenizer)

    converted = convert(tokenizer, tmp_path)

    assert system in seen.text
    assert by_template(converted)[1] == seen.text
    assert "\\u" not in converted.chat_template  # llama.cpp refuses such a template


def test_a_blank_before_the_text_only_is_told_to_llama_cpp(spoken):
    """Left alone, llama.cpp puts a blank after every control token too."""
    told = read_json(spoken.folder / "output/ollama/tokenizer_config.json")
    assert told["add_prefix_space"] is False

    template, _ = for_ollama(spoken.folder)
    by_ollama = open_turn(template)
    by_llama_cpp, _ = by_template(spoken.converted)
    as_told = spoken.tokenizer.backend_tokenizer
    as_told.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    for text in [by_ollama, by_llama_cpp]:
        assert as_told.encode(text, add_special_tokens=False).ids == spoken.seen.prompt


def test_llama_cpp_finds_tokens_that_the_sentencepiece_model_lacks(spoken):
    told = read_json(spoken.folder / "output/ollama/tokenizer_config.json")
    id = spoken.tokenizer.convert_tokens_to_ids("<|im_end|>")
    token = told["added_tokens_decoder"][str(id)]
    assert token["content"] == "<|im_end|>"
    assert token["special"] is True


# ------------------------------------------------------------------------------- without a GPU

CUTS = {  # as SmolLM2's own tokenizer cuts them; Ġ is a blank
    "a  0/3": ["a", "ĠĠ", "0", "/", "3"],
    "a  a": ["a", "Ġ", "Ġa"],
    "33 0": ["3", "3", "Ġ", "0"],
}
MERGES = [
    ("Ġ", "Ġ"),
    ("Ġ", "a"),
    ("Ġ", "0"),
    ("3", "3"),
]


@pytest.mark.parametrize("text", CUTS)
def test_the_offline_smollm2_reads_digits_one_by_one(text):
    pieces = ["a", "0", "3", "/", "Ġ", "ĠĠ", "Ġa", "Ġ0", "33"]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES))
    tokenizer.pre_tokenizer = offline_model.digits_apart()
    assert tokenizer.encode(text).tokens == CUTS[text]
