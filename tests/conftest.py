"""Shared by all tests: the scripts are imported from the repository root, models are made once."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # first, else Hugging Face's own `evaluate` package may be found
sys.path.insert(1, str(ROOT / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import offline_model  # noqa: E402


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


@pytest.fixture(autouse=True)
def no_notebook(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
