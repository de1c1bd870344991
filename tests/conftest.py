"""Shared by all tests: the scripts are imported from the repository root, models are made once."""

import contextlib
import ctypes
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


def llama_tokenizer(vocab, merges, legacy):
    """Llama's tokenizer over a few pieces; transformers 4 makes it from SentencePiece's model."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        return LlamaTokenizerFast(vocab=vocab, merges=merges, legacy=legacy)
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(blanks)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return LlamaTokenizerFast(tokenizer_object=backend, legacy=legacy, **named)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A function (architecture, template) -> folder of a tiny random model, each made once."""
    made = {}

    def model(architecture="llama", template="zephyr"):
        key = architecture, template
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp("-".join(key)))
            offline_model.write_tiny(made[key], architecture, template)
        return made[key]

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
    """Return what call() returns, run in a thread that has no rights over files but its user's, root or not."""

    def give_up():
        linux3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
        if ctypes.CDLL(None).capset(linux3, (ctypes.c_uint32 * 6)()):  # of this thread alone
            pytest.skip("no capset on this system")

    with ThreadPoolExecutor(1) as thread:
        if os.geteuid() == 0:
            thread.submit(give_up).result()
        return thread.submit(call).result()


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond so many bytes, which fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def no_notebook(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
