"""The three scripts keep one house style: options, constants, twins, manual, notebook cells."""

import argparse
import ast
import inspect
import json
import math
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import nbclient
import nbformat
import pytest
import torch
from conftest import README, ROOT, argv, read_json, read_jsonl, section, write_jsonl
from test_lora_finetune import ROWS, chat_text, error_line, files, logged
from test_lora_finetune import flags as run_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import lora_finetune
import prepare_dataset

SCRIPTS = {
    "prepare_dataset.py": prepare_dataset,
    "lora_finetune.py": lora_finetune,
    "evaluate.py": evaluate,
}
each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
OTHER_TOOLS = {  # flags that the manual mentions and that belong to other programs
    "--depth",  # git clone
    "--nproc-per-node",  # torchrun
    "--num-processes",  # accelerate launch
    "--base",  # convert_lora_to_gguf.py
    "--outfile",  # the same, and convert_hf_to_gguf.py
    "--weight-decay",  # an option that readers may add
}


def name_of(script):
    """The name of a script's file."""
    return Path(script.__file__).name


def source_of(script):
    """The text of a script."""
    return Path(script.__file__).read_text(encoding="utf-8")


def flag(name):
    """The flag of an option or of a constant."""
    return "--" + name.lower().replace("_", "-")


def defaults_of(script):
    """{option: default} of a script."""
    return vars(script.parse_args([]))


def constants_of(script):
    """{NAME: value} of the block between the rules under "Edit here"."""
    block = re.search(r"\n# -+\n(# Edit here.*?)\n# -+\n", source_of(script), re.DOTALL)
    constants = {}
    for node in ast.parse(block[1]).body:
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
            constants[name] = ast.literal_eval(node.value)
    return constants


def help_of(script, monkeypatch, capsys):
    """What --help shows, nothing of it wrapped."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code in (0, None)
    return capsys.readouterr().out


def usage_error(call, arguments, capsys):
    """The last line of what is said where argparse refuses the arguments of this call."""
    with pytest.raises(SystemExit) as end:
        call(arguments)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error:" in last
    return last


def shell(*arguments):
    """Run Python in the root of the repository."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of records to train on."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    write_jsonl(path, ROWS)
    return path


# ------------------------------------------------------------------------------- options

LOADS_NO_TORCH = """
import runpy
import sys

sys.argv = ["prepare_dataset.py", "--help"]
try:
    runpy.run_path("prepare_dataset.py", run_name="__main__")
except SystemExit as end:
    print(end.code, {"torch", "transformers"} & set(sys.modules))
"""


@each_script
def test_help_shows_the_docstring(script, monkeypatch, capsys):
    assert script.__doc__.strip() in help_of(script, monkeypatch, capsys)


@each_script
def test_help_shows_every_option_with_its_default(script, monkeypatch, capsys):
    shown = help_of(script, monkeypatch, capsys)
    _, _, options = shown.partition("options:")
    entries = re.split(r"\n(?=  -)", options)
    for option, default in defaults_of(script).items():
        own = [entry for entry in entries if re.match(rf"\s*{flag(option)}[ ,]", entry)]
        assert len(own) == 1
        assert f"(default: {default})" in " ".join(own[0].split())


@each_script
def test_every_constant_is_the_default_of_its_flag_and_the_other_way_round(script):
    constants = constants_of(script)
    defaults = defaults_of(script)
    assert constants == {option.upper(): default for option, default in defaults.items()}
    assert len(constants) <= 25


@each_script
def test_an_edited_constant_is_the_new_default(script, monkeypatch):
    monkeypatch.setattr(script, "OUTPUT", "elsewhere.json")
    assert script.parse_args([]).output == "elsewhere.json"


@each_script
@pytest.mark.parametrize("launcher", ["colab_kernel_launcher.py", "ipykernel_launcher.py"])
def test_what_the_kernel_was_started_with_is_ignored(script, launcher, monkeypatch):
    kernel = f"/usr/lib/python3/{launcher}"
    started_with = [kernel, "-f", "x.json", "--HistoryManager.hist_file=:memory:"]
    monkeypatch.setattr(sys, "argv", started_with)
    assert script.parse_args() == script.parse_args([])
    assert script.parse_args(["--output", "o.json"]).output == "o.json"


@each_script
def test_flags_of_a_shell_are_heeded(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name_of(script), "--output", "o.json"])
    assert script.parse_args().output == "o.json"

    monkeypatch.setattr(sys, "argv", [name_of(script), "-f", "x.json"])
    usage_error(script.parse_args, None, capsys)


@each_script
def test_abbreviated_flags_are_refused(script, capsys):
    for option in defaults_of(script):
        shorter = flag(option)[:-1]
        usage_error(script.parse_args, [shorter, "1"], capsys)


@each_script
def test_importing_a_script_does_nothing(script):
    _docstring, *statements = ast.parse(source_of(script)).body
    for node in statements:
        if ast.unparse(node).startswith("logging.getLogger("):  # in time before the imports
            continue
        assert not isinstance(node, (ast.Expr, ast.For, ast.While, ast.With, ast.Try))

    conditions = [node for node in statements if isinstance(node, ast.If)]
    assert conditions == statements[-1:]
    assert ast.unparse(conditions[0].test) == "__name__ == '__main__'"


@each_script
def test_help_is_all_that_the_terminal_shows(script):
    run = shell(name_of(script), "--help")
    assert run.returncode == 0
    assert run.stdout.startswith(f"usage: {name_of(script)}")
    assert run.stderr == ""


def test_prepare_dataset_answers_from_the_shell_without_loading_torch():
    run = shell("-c", LOADS_NO_TORCH)
    assert run.stdout.splitlines()[-1] == "0 set()"
    assert run.stderr == ""


# ------------------------------------------------------------------------------- mistakes

GOOD = json.dumps(ROWS[0]).encode() + b"\n"
FILES = {  # content of the data file, what the line must say
    "empty": (b"", "no records"),
    "blank lines": (b"\n \n\n", "no records"),
    "binary": (bytes(range(256)) * 9, ":1: "),
    "latin-1 in line 2": (GOOD + '{"instruction": "é"}'.encode("latin-1"), ":2: "),
    "broken at line 3": (GOOD + b"\n" + GOOD[:-9], ":3: "),
    "csv": (b"instruction,input,output\na,b,c\n", ":1: "),
    "a list in line 2": (GOOD + b"[1, 2]\n", ":2: not an object"),
    "a whole JSON list": (b"[\n" + GOOD + b"]\n", ":1: "),
    "a number": (b'{"instruction": "a", "output": 3}', ':1: "output" is no'),
    "a list as input": (b'{"instruction": "a", "input": [3], "output": "b"}', ':1: "input" is no'),
    "no output": (GOOD + b'{"instruction": "a"}', ':2: "output" is missing'),
    "null": (b'{"instruction": null, "output": "b"}', ':1: "instruction" is missing'),
    "blank output": (b'{"instruction": "a", "output": " \\n"}', ':1: "output" is'),
    "half a character": (GOOD + b'{"instruction": "a", "output": "\\ud800"}', ":2: "),
    "a number too long": (b'{"instruction": ' + b"9" * 5000 + b"}", ":1: "),
    "nested too deep": (b"[" * 100_000, ":1: "),
}
OUT_OF_RANGE = {  # options of training, values that each refuses
    "--lora-r": ["0", "-1", "1.5", "99999999999", "abc", ""],
    "--lora-alpha": ["0", "nan", "inf", "-3"],
    "--lora-dropout": ["1", "-0.1", "nan"],
    "--learning-rate": ["nan", "inf", "0", "-1e-4", "x"],
    "--epochs": ["0", "nan", "inf", "-1", "1e99"],
    "--max-steps": ["-2", "1.5", "0"],
    "--warmup-ratio": ["-0.1", "1.1", "nan"],
    "--batch-size": ["0", "-4", "10000000000", "nan"],
    "--gradient-accumulation-steps": ["0", "10000000000"],
    "--max-seq-length": ["0", "-1"],
    "--seed": ["-1", "4294967296", "0.5"],
    "--logging-steps": ["0", "-1"],
    "--precision": ["fp8"],
    "--target-modules": [""],
    "--load-in-8bit": [""],
    "--batch": ["4"],
    "--resume": ["--overwrite"],
}
REFUSED = [f"{option} {value}" for option, values in OUT_OF_RANGE.items() for value in values]
MISTAKES = [  # flags of training, what the line must say
    ("--dataset nowhere.jsonl", "nowhere.jsonl: No such file"),
    ("--dataset {tmp}/empty", "empty/train.jsonl: No such file"),
    ("--dataset {tmp}/file", "file:1:"),
    ("--val-data nowhere.jsonl", "nowhere.jsonl: No such file"),
    ("--val-data {tmp}/empty", "empty: Is a directory"),
    ("--dataset ''", "train.jsonl: No such file"),
    ("--model ''", "can't load the model"),
    ("--target-modules ''", "--target-modules"),
    ("--model nobody/no-such-model", "nobody/no-such-model"),
    ("--model ./no/such/folder", "./no/such/folder"),
    ("--model {tmp}/file", "file"),
    ("--model {tmp}/model.gguf", "model.gguf: no folder"),
    ("--target-modules query", "query: no such layer"),
    ("--target-modules q_proj x", "x: no such layer"),
    ("--target-modules proj", "proj: no such layer"),
    ("--target-modules norm", "norm: no such layer"),
    ("--target-modules lm_head", "lm_head: no such layer"),
    ("--output {tmp}/file", "file"),
    ("--output {tmp}/file/out", "file/out"),
    ("--max-seq-length 8", "raise --max-seq-length"),
    ("--max-seq-length 1025", "reads 1024 tokens"),
]
CONSTANTS = [  # a script, what someone writes at its top
    ("prepare_dataset.py", "VAL_SPLIT", None),
    ("prepare_dataset.py", "VAL_SPLIT", "a tenth"),
    ("prepare_dataset.py", "DELIMITER", "\t"),
    ("prepare_dataset.py", "SEED", "x"),
    ("prepare_dataset.py", "STRICT", "False"),
    ("prepare_dataset.py", "COLUMNS", "output=answer"),
    ("lora_finetune.py", "PRECISION", "fp64"),
    ("lora_finetune.py", "EPOCHS", None),
    ("lora_finetune.py", "EPOCHS", "three"),
    ("lora_finetune.py", "LORA_R", 16.5),
    ("lora_finetune.py", "LORA_R", True),
    ("lora_finetune.py", "BATCH_SIZE", [4]),
    ("lora_finetune.py", "OVERWRITE", "no"),
    ("lora_finetune.py", "TARGET_MODULES", "q_proj"),
    ("lora_finetune.py", "OUTPUT", Path("output/mine")),
    ("evaluate.py", "PRECISION", "half"),
    ("evaluate.py", "MAX_NEW_TOKENS", 0),
    ("evaluate.py", "MAX_NEW_TOKENS", 9.5),
    ("evaluate.py", "BATCH_SIZE", None),
    ("evaluate.py", "LOAD_IN_4BIT", "False"),
    ("evaluate.py", "PROMPTS", ["What is a Pod?"]),
]
UNLOADABLE = {  # why a model does not load, what must be advised
    "memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "close other programs"),
    "newer": (ValueError("Tokenizer class X does not exist or is not currently imported."), "pip"),
    "offline": (OSError("We couldn't connect to the Hub"), "connect.*online, its Hub name"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("option", ["--dataset", "--val-data"])
def test_a_data_file_with_a_mistake_is_refused(tiny, data, tmp_path, capsys, kind, option):
    content, says = FILES[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)

    line = error_line(run_of(tiny, data, tmp_path / "out", option, path), capsys)

    for part in [says, str(path), "prepare_dataset.py"]:
        assert part in line
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("flags", REFUSED)
def test_an_option_of_training_out_of_range_is_refused(tiny, data, tmp_path, capsys, flags):
    option, *value = flags.split()
    line = error_line(run_of(tiny, data, tmp_path / "out", option, *value), capsys)
    assert option in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flags, says", MISTAKES)
def test_a_mistake_is_refused_in_one_line(tiny, data, tmp_path, capsys, monkeypatch, flags, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    monkeypatch.chdir(tmp_path)
    more = shlex.split(flags.format(tmp=tmp_path))

    line = error_line(run_of(tiny, data, tmp_path / "out", *more), capsys)

    assert says in line
    assert files(tmp_path) == ["file", "model.gguf"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name, constant, value", CONSTANTS)
def test_a_constant_of_a_wrong_kind_is_told_by_its_flag(name, constant, value, monkeypatch, capsys):
    script = SCRIPTS[name]
    monkeypatch.setattr(script, constant, value)
    assert flag(constant) in usage_error(script.main, [], capsys)


def test_a_tilde_stands_for_the_home_folder_in_all_three(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "OUTPUT", "~/mine")
        assert script.parse_args([]).output == "/home/me/mine"


def test_whole_numbers_do_where_fractions_are_meant(monkeypatch):
    monkeypatch.setattr(lora_finetune, "EPOCHS", 2)
    monkeypatch.setattr(lora_finetune, "LEARNING_RATE", 1)
    monkeypatch.setattr(lora_finetune, "LORA_ALPHA", 8)
    args = lora_finetune.parse_args([])
    assert args.epochs == 2
    assert args.learning_rate == 1
    assert args.lora_alpha == 8


@pytest.mark.parametrize("error, advice", UNLOADABLE.values(), ids=UNLOADABLE)
def test_a_model_that_does_not_load_is_told_with_its_reason_and_what_helps(
    error, advice, monkeypatch, tmp_path
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(lora_finetune.AutoConfig, "from_pretrained", fail)
    with pytest.raises(SystemExit, match=f"error: can't load the model Tiny/X: .*{advice}"):
        lora_finetune.main(argv(model="Tiny/X", output=tmp_path / "out"))


# ------------------------------------------------------------------------------- house style

PACKAGES = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "scipy",
    "pandas",
}


def functions(script):
    """{name: source} of the functions that a script defines."""
    sources = {}
    for name, function in inspect.getmembers(script, inspect.isfunction):
        if function.__module__ == script.__name__:
            sources[name] = inspect.getsource(function)
    return sources


def test_what_stands_in_two_scripts_is_the_same_letter_for_letter():
    of_training = functions(lora_finetune)
    of_evaluation = functions(evaluate)
    twins = of_training.keys() & of_evaluation.keys()
    twins -= {"parse_args", "main"}
    assert {"read_jsonl", "chat_frame", "encode", "load_base"} <= twins
    for name in twins:
        assert of_training[name] == of_evaluation[name], name


@pytest.mark.parametrize("name", ["ALPACA_TEMPLATE", "MODEL_ADVICE"])
def test_both_scripts_hold_the_same_text(name):
    assert getattr(evaluate, name) == getattr(lora_finetune, name)


@each_script
def test_each_script_names_the_next_ones_input(script):
    commands = re.findall(r"python (\w+\.py) (.*)", script.__doc__)
    assert [name for name, _ in commands] == list(SCRIPTS)

    parsed = []
    for name, flags in commands:
        args = SCRIPTS[name].parse_args(shlex.split(flags))
        parsed.append(args)
    prepared, trained, compared = parsed
    assert prepared.output == prepare_dataset.OUTPUT
    assert trained.dataset == prepared.output
    assert compared.adapter == trained.output
    assert compared.val_data == f"{prepared.output}/val.jsonl"
    assert evaluate.ADAPTER == lora_finetune.OUTPUT


def test_requirements_name_exactly_the_eight_packages():
    text = (ROOT / "requirements.txt").read_text()
    names = re.findall(r"^ *([\w-]+)", text, re.MULTILINE)  # comments begin otherwise
    assert len(names) == 8
    assert set(names) == PACKAGES


@each_script
def test_no_script_trusts_remote_code_or_unpickles(script):
    text = source_of(script)
    assert "trust_remote_code=True" not in text
    assert re.findall(r"torch\.load\((?!.*weights_only=True)", text) == []
    assert not re.search(r"^\s*(import|from) pickle", text, re.MULTILINE)


# ------------------------------------------------------------------------------- manual


def known_flags():
    """Every flag that a script takes, asked of argparse itself."""
    flags = set()
    add_argument = argparse.ArgumentParser.add_argument

    def watched(parser, *names, **options):
        action = add_argument(parser, *names, **options)
        flags.update(action.option_strings)
        return action

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "add_argument", watched)
        for script in SCRIPTS.values():
            script.parse_args([])
    return flags


def test_every_flag_in_the_manual_exists():
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README))
    assert len(mentioned) > 20
    assert mentioned - known_flags() - OTHER_TOOLS == set()


@each_script
def test_every_option_stands_in_the_manual(script):
    for option in defaults_of(script):
        name = flag(option).removeprefix("--")
        assert re.search(rf"--(no-)?{name}(?![\w-])", README), name


def test_every_command_in_the_manual_is_understood():
    one_a_line = README.replace("\\\n", " ")
    commands = re.findall(r"python3? (\w+\.py)((?: [^\n`&]*)?)", one_a_line)
    understood = set()
    for name, flags in commands:
        if name in SCRIPTS and "..." not in flags:
            SCRIPTS[name].parse_args(shlex.split(flags, comments=True))
            understood.add(name)
    assert understood == set(SCRIPTS)


def test_every_file_in_the_manual_exists():
    for name in re.findall(r"\b(?:data|tests)/\w+\.(?:jsonl|csv|py|txt)", README):
        assert (ROOT / name).is_file(), name


# ------------------------------------------------------------------------------- notebook

ALIVE = """import gc, torch
gc.collect()
print("alive", sum(isinstance(thing, torch.nn.Parameter) for thing in gc.get_objects()))"""


def pasted(script, **changes):
    """The text of a script with constants edited, as in a cell."""
    text = source_of(script)
    for constant, value in changes.items():
        line = f"{constant} = {value!r}  "
        text, count = re.subn(rf"^{constant} = [^#\n]*", line, text, flags=re.MULTILINE)
        assert count == 1
    return text


def run_notebook(folder, *cells):
    """Run cells in a real kernel: what each printed, its error output, its error and its value."""
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(
        notebook,
        timeout=120,
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()

    seen = []
    for cell in notebook.cells:
        texts = {"stdout": "", "stderr": "", "error": "", "value": ""}
        for output in cell.outputs:
            if output.output_type == "stream":
                texts[output.name] += output.text
            if output.output_type == "error":
                texts["error"] = f"{output.ename}: {output.evalue}"
            if output.output_type == "execute_result":
                texts["value"] = output.data["text/plain"]
        seen.append(texts)
    return seen


def write_questions(folder):
    """Write a table of 24 questions under names that need --columns."""
    lines = ["question;answer"]
    for n in range(24):
        lines.append(f"What is {n} of a kind?;Number {n}.")
    (folder / "mine.csv").write_text("\n".join(lines))


def test_pasted_into_cells_the_three_stages_run_one_after_another(tiny, tmp_path):
    write_questions(tmp_path)
    prepare = {
        "INPUT": "mine.csv",
        "OUTPUT": "prepared",
        "COLUMNS": ["instruction=question", "output=answer"],
        "VAL_SPLIT": 0.25,
    }
    train = {
        "DATASET": "prepared",
        "MODEL": tiny,
        "OUTPUT": "adapter",
        "MAX_STEPS": 2,
    }
    compare = {
        "ADAPTER": "adapter",
        "VAL_DATA": "prepared/val.jsonl",
        "MAX_NEW_TOKENS": 4,
        "OUTPUT": "results/eval.json",
    }

    seen = run_notebook(
        tmp_path,
        pasted(prepare_dataset, **prepare),
        pasted(lora_finetune, **train, PRECISION="fp32", SEED=7),
        pasted(lora_finetune, **train, LEARNING_RATE=1e-2, OVERWRITE=True),
        ALIVE,
        pasted(evaluate, **compare),
        'main(["--max-new-tokens", "2"])["prompts"]',
        ALIVE,
    )

    assert not any(cell["error"] for cell in seen)
    prepared, trained, trained_anew, alive, _, asked, alive_at_last = seen
    assert re.search(r"train +18 rows", prepared["stdout"])
    assert "saved" in trained["stdout"]
    assert "saved" in trained_anew["stdout"]
    assert alive["stdout"] == "alive 0\n"  # the memory is given back
    assert alive_at_last["stdout"] == "alive 0\n"
    assert int(asked["value"]) >= 10

    results = read_json(tmp_path / "results/eval.json")
    log = read_jsonl(tmp_path / "adapter/training_log.jsonl")
    assert results["perplexity"]["rows"] == 6
    assert [entry["step"] for entry in log if "grad_norm" in entry] == [1, 2]


def test_in_a_notebook_the_scripts_run_by_magic_by_shell_and_by_main(tiny, tmp_path):
    write_questions(tmp_path)
    prepare = f"!{sys.executable} {ROOT}/prepare_dataset.py"
    columns = "--columns instruction=question output=answer"
    by_magic = argv(max_steps=1, dataset="prepared", model=tiny, output="first")
    by_main = argv(epochs=1, dataset="prepared", model=tiny, output="second")

    prepared, refused, first, second, alive = run_notebook(
        tmp_path,
        f"{prepare} --input mine.csv --output prepared {columns}\n_exit_code",
        f"{prepare} --input none.csv\n_exit_code",
        f"%run {ROOT}/lora_finetune.py {shlex.join(by_magic)}",
        f"main({by_main})['step']",
        ALIVE,
    )

    for cell in [prepared, refused, first, second, alive]:
        assert not cell["error"]
    assert "next: python lora_finetune.py --dataset prepared" in prepared["stdout"]
    assert prepared["value"] == "0"
    assert refused["stdout"].startswith("error: none.csv")
    assert len(refused["stdout"].splitlines()) == 1
    assert refused["value"] == "1"
    assert "saved" in first["stdout"]
    assert (tmp_path / "first/adapter_config.json").exists()
    assert second["value"] == "2"
    assert (tmp_path / "second/adapter_config.json").exists()
    assert alive["stdout"] == "alive 0\n"


def test_a_mistake_in_a_cell_ends_in_one_line_and_the_kernel_lives_on(tmp_path):
    *refused, alive = run_notebook(
        tmp_path,
        pasted(lora_finetune, DATASET="nowhere.jsonl"),
        "main(['--dataset', 'nowhere.csv'])",
        f"%run {ROOT}/evaluate.py --adapter nowhere",
        "6 * 7",
    )

    for cell, name in zip(refused, ["nowhere.jsonl", "nowhere.csv", "nowhere"], strict=True):
        assert cell["error"].startswith(f"SystemExit: error: {name}")
        assert "\n" not in cell["error"]
        assert "Traceback" not in cell["stderr"]
    assert alive["value"] == "42"


# ------------------------------------------------------------------------------- changes

CHANGES = {  # the wishes of the manual: what stands there, what is written instead
    "weight decay": (
        "weight_decay=0.0",
        "weight_decay=0.01",
    ),
    "constant rate": (
        "    return peak * (1 + cosine) / 2\n",
        "    return peak\n",
    ),
    "loss on the prompt": (
        "    labels = [-100] * prompt_tokens + input_ids[prompt_tokens:]\n",
        "    labels = list(input_ids)\n",
    ),
    "system prompt": (
        '    asked = [{"role": "user", "content": question}]\n',
        '    asked = [{"role": "system", "content": "Be brief."}, '
        '{"role": "user", "content": question}]\n',
    ),
    "TensorBoard": (
        "            log += new\n",
        "            log += new\n"
        '            for entry in new: writer.add_scalars("log", '
        '{**entry, "grad_norm": norm}, done)\n',
    ),
    "8 bits": (
        "            load_in_4bit=True,\n",
        "            load_in_8bit=True,\n",
    ),
    "temperature": (
        "        do_sample=False,\n",
        "        do_sample=True,\n        temperature=0.7,\n        top_k=0,\n",
    ),
}
OTHERWISE = {  # how an evaluation may differ from what training measured
    "weights": {"load_in_4bit": True},
    "rows": {"val_data": "other.jsonl"},
}
TWO_OPTIONS = """
    add("--weight-decay", 0.5, "pull to 0")
    add("--pools", 3, "many")
"""


def edited(script, old, new):
    """A script as a module of its own, with one place of it changed."""
    text = source_of(script)
    assert text.count(old) == 1
    module = types.ModuleType(script.__name__)
    code = compile(text.replace(old, new), name_of(script), "exec")
    exec(code, module.__dict__)
    return module


def changed(script, wish):
    """A script as a module of its own, with the change of that wish."""
    old, new = CHANGES[wish]
    return edited(script, old, new)


@pytest.mark.parametrize("wish", CHANGES)
def test_the_manual_says_what_to_write(wish):
    old, new = CHANGES[wish]
    added = new.removeprefix(old)
    lines = [line.strip().rstrip(",") for line in added.splitlines()]
    assert ", ".join(lines) in section("Change the script")


def test_weight_decay_is_one_number(tiny, data, tmp_path, monkeypatch):
    seen = set()
    step = torch.optim.AdamW.step

    def watched(optimizer, *args, **kwargs):
        seen.add(optimizer.param_groups[0]["weight_decay"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run = run_of(tiny, data, tmp_path / "out", "--max-steps", 2)
    changed(lora_finetune, "weight decay").main(run)
    assert seen == {0.01}


def test_tensorboard_gets_what_the_log_has(tiny, data, tmp_path):
    written = []

    def add_scalars(name, values, step):
        written.append((step, values))

    module = changed(lora_finetune, "TensorBoard")
    module.writer = SimpleNamespace(add_scalars=add_scalars)
    module.main(run_of(tiny, data, tmp_path / "out", "--epochs", 2, "--val-data", data))

    before, *log = read_jsonl(tmp_path / "out/training_log.jsonl")
    assert before["step"] == 0
    for entry, (step, values) in zip(log, written, strict=True):
        assert step == entry["step"]
        assert entry.items() <= values.items()


def test_a_constant_rate_is_one_line(tiny, data, tmp_path):
    run = run_of(tiny, data, tmp_path / "out", "--max-steps", 4, "--warmup-ratio", 0.25)
    changed(lora_finetune, "constant rate").main(run)
    assert logged(tmp_path / "out", "learning_rate") == [0, 2e-4, 2e-4, 2e-4]


def test_the_prompt_is_learned_too_by_one_line(tiny, data, tmp_path):
    """Held against the model's own loss over whole texts."""
    run = run_of(tiny, data, tmp_path / "out", "--max-steps", 1)
    changed(lora_finetune, "loss on the prompt").main(run)

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    nats = 0.0
    count = 0
    for row in ROWS:
        _, text = chat_text(tokenizer, "zephyr", row)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        predicted = ids.shape[1] - 1
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        nats += loss * predicted
        count += predicted
    assert logged(tmp_path / "out", "loss") == [pytest.approx(nats / count, rel=1e-5)]


def test_a_system_prompt_in_one_script_alone_is_noticed(tiny_models, data, tmp_path, capsys):
    out = tmp_path / "out"
    run = run_of(tiny_models(template="chatml"), data, out, "--max-steps", 1)
    compare = argv(
        adapter=out,
        load_in_4bit=False,
        max_new_tokens=2,
        output=tmp_path / "results.json",
    )

    changed(lora_finetune, "system prompt").main(run)
    assert "<|im_start|>system Be brief.<|im_end|>" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="^error: .*head of the prompt"):
        evaluate.main(compare)
    assert changed(evaluate, "system prompt").main(compare)["prompts"] == 10


@pytest.fixture(scope="module")
def whole_texts(able, data, tmp_path_factory):
    """A folder with an adapter whose training alone counts the loss on the prompt, too."""
    folder = tmp_path_factory.mktemp("whole_texts")
    write_jsonl(folder / "val.jsonl", [{"instruction": "Who?", "output": "You."}])
    write_jsonl(folder / "other.jsonl", [{"instruction": "What?", "output": "You."}])
    held_out = folder / "val.jsonl"
    run = run_of(able, data, folder / "out", "--max-steps", 1, "--val-data", held_out)
    changed(lora_finetune, "loss on the prompt").main(run)
    return folder


def evaluated(folder, script, val_data="val.jsonl", **more):
    """What a script returns that evaluates the adapter in this folder."""
    compare = argv(
        adapter=folder / "out",
        val_data=folder / val_data,
        max_new_tokens=2,
        output=folder / "results.json",
        **more,
    )
    return script.main(compare)


def test_a_loss_that_both_scripts_count_otherwise_gets_a_verdict(whole_texts):
    config = read_json(whole_texts / "out/training_config.json")
    both = evaluated(whole_texts, changed(evaluate, "loss on the prompt"))
    loss = math.log(both["perplexity"]["finetuned"])
    assert loss == pytest.approx(config["result"]["eval_loss"], rel=1e-5)
    assert not both["verdict"].startswith("No verdict")


def test_a_loss_that_one_script_alone_counts_otherwise_gets_no_verdict(whole_texts):
    config = read_json(whole_texts / "out/training_config.json")
    measured = math.exp(config["result"]["eval_loss"])
    verdict = evaluated(whole_texts, evaluate)["verdict"]
    assert verdict.startswith(f"No verdict: the training measured {measured:.2f} on these rows")


@pytest.mark.parametrize("other", OTHERWISE.values(), ids=OTHERWISE)
def test_in_other_weights_or_of_other_rows_another_figure_is_no_wonder(whole_texts, other):
    verdict = evaluated(whole_texts, evaluate, **other)["verdict"]
    assert not verdict.startswith("No verdict")


def test_an_option_needs_no_range_and_its_number_stays_a_number():
    line = '    add("--resume", RESUME'
    module = edited(lora_finetune, line, TWO_OPTIONS + line)
    args = module.parse_args(["--weight-decay", "1e9", "--pools", "-7"])
    assert args.weight_decay == 1e9
    assert args.pools == -7
    assert module.parse_args([]).weight_decay == 0.5
    with pytest.raises(SystemExit):
        module.parse_args(["--weight-decay", "much"])


def test_eight_bits_are_one_word(tiny, data, tmp_path):
    bases = []

    def note(base, name):
        bases.append(base)

    module = changed(lora_finetune, "8 bits")
    module.check_base = note
    module.main(run_of(tiny, data, tmp_path / "out", "--max-steps", 1, "--load-in-4bit"))

    kinds = [type(layer) for layer in bases[0].modules()]
    assert bitsandbytes.nn.Linear8bitLt in kinds
    assert bitsandbytes.nn.Linear4bit not in kinds


def test_answers_are_drawn_at_a_temperature_by_two_lines(tiny, data, tmp_path):
    lora_finetune.main(run_of(tiny, data, tmp_path / "out", "--max-steps", 1))
    module = changed(evaluate, "temperature")
    compare = argv(
        adapter=tmp_path / "out",
        load_in_4bit=False,
        max_new_tokens=8,
        output=tmp_path / "results.json",
    )

    answers = []
    for _ in range(2):
        module.main(compare)
        pairs = read_json(tmp_path / "results.json")["prompts"]
        answers.append([pair["base"] for pair in pairs])
    assert answers[0] != answers[1]
