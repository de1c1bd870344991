"""Shared by all tests: the scripts are imported from the repository root, models are made once."""

import contextlib
import ctypes
import json
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # first, else Hugging Face's own `evaluate` package may be found
sys.path.insert(1, str(ROOT / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small matrices gain nothing from more threads

import offline_model  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizerFast  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
LAYERS = [  # that an adapter can be put on
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]


def argv(**options):
    """A command line: argv(max_steps=2, load_in_4bit=False, target_modules=["up", "down"])."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is True:
            words.append(f"--{flag}")
        elif value is False:
            words.append(f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *value]
        else:
            words += [f"--{flag}", str(value)]
    return words


def section(title):
    """The text below a heading of README.md."""
    below = README.partition(f"\n## {title}\n")[2]
    return below.partition("\n## ")[0]


def read_json(path):
    """What a JSON file holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path):
    """The objects of a JSONL file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_jsonl(path, records):
    """Write records, a line of JSON each; returns the path."""
    lines = [json.dumps(record) + "\n" for record in records]
    Path(path).write_text("".join(lines), encoding="utf-8")
    return str(path)


def llama_vocab(*pieces):
    """{piece: id} of a tokenizer of Llama's kind: control tokens, all bytes, then these pieces."""
    in_order = ["<unk>", "<s>", "</s>"]
    in_order += [f"<0x{byte:02X}>" for byte in range(256)]
    in_order += pieces
    return {piece: id for id, piece in enumerate(in_order)}


def llama_tokenizer(vocab, merges, legacy):
    """Llama's tokenizer over a few pieces; transformers 4 makes it from SentencePiece's model."""
    major = int(transformers.__version__.partition(".")[0])
    if major >= 5:
        return LlamaTokenizerFast(vocab=vocab, merges=merges, legacy=legacy)

    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(bpe)
    if legacy:
        blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(blanks)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    parts = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(content=" ", left=1),
    ]
    backend.decoder = decoders.Sequence(parts)
    return LlamaTokenizerFast(
        tokenizer_object=backend,
        legacy=legacy,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A function (architecture, template) -> folder of a tiny random model, each made once."""
    made = {}

    def model(architecture="llama", template="zephyr"):
        name = f"{architecture}-{template}"
        if name not in made:
            folder = str(tmp_path_factory.mktemp(name))
            offline_model.write_tiny(folder, architecture, template)
            made[name] = folder
        return made[name]

    return model


@pytest.fixture(scope="session")
def tiny(tiny_models):
    """Folder of the tiny Llama with TinyLlama's chat template."""
    return tiny_models()


@pytest.fixture(scope="session")
def able(tiny, tmp_path_factory):
    """The tiny model with a larger head, or no adapter could make it sure of an answer."""
    folder = tmp_path_factory.mktemp("able")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.lm_head.weight.data *= 20
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


def without_privileges(call):
    """Return what call() returns, run with the rights over files of a plain user."""

    def give_up():
        """Drop all capabilities of this thread alone."""
        version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
        none = (ctypes.c_uint32 * 6)()
        failed = ctypes.CDLL(None).capset(version_3, none)
        if failed:
            pytest.skip("no capset on this system")

    with ThreadPoolExecutor(1) as thread:
        if os.geteuid() == 0:
            thread.submit(give_up).result()
        return thread.submit(call).result()


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond so many bytes, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def width_of_the_terminal(monkeypatch):
    """What is printed is as wide as on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
