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
from unittest import mock

import nbclient
import nbformat
import pytest
import torch
from test_lora_finetune import ROWS, chat_text, error_line, files, logged, write_jsonl
from test_lora_finetune import flags as run_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import lora_finetune
import prepare_dataset

ROOT = Path(prepare_dataset.__file__).parent
SCRIPTS = {
    "prepare_dataset.py": prepare_dataset,
    "lora_finetune.py": lora_finetune,
    "evaluate.py": evaluate,
}
each_script = pytest.mark.parametrize("name", SCRIPTS)
OTHER_TOOLS = {  # flags that the manual mentions and that belong to other programs
    "--depth",  # git clone
    "--nproc-per-node",  # torchrun
    "--num-processes",  # accelerate launch
    "--base",  # convert_lora_to_gguf.py
    "--outfile",  # the same, and convert_hf_to_gguf.py
    "--weight-decay",  # an option that readers may add
}


def flag(constant):
    return "--" + constant.lower().replace("_", "-")


def constants(name):
    """{NAME: value} of the block between the rules under "Edit here"."""
    block = re.search(r"\n# -+\n(# Edit here.*?)\n# -+\n", (ROOT / name).read_text(), re.DOTALL)[1]
    lines = [node for node in ast.parse(block).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in lines}


def help_of(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")  # nothing is wrapped
    with pytest.raises(SystemExit) as end:
        SCRIPTS[name].main(["--help"])
    assert end.value.code in (0, None)
    return capsys.readouterr().out


# ------------------------------------------------------------------------------- options


@each_script
def test_help_shows_the_docstring(name, monkeypatch, capsys):
    assert SCRIPTS[name].__doc__.strip() in help_of(name, monkeypatch, capsys)


@each_script
def test_help_shows_every_option_with_its_default(name, monkeypatch, capsys):
    shown = help_of(name, monkeypatch, capsys).split("options:", 1)[-1]
    entries = re.split(r"\n(?=  -)", shown)
    for option, default in vars(SCRIPTS[name].parse_args([])).items():
        (entry,) = [e for e in entries if re.match(rf"\s*{flag(option)}[ ,]", e)]
        assert f"(default: {default})" in " ".join(entry.split())


@each_script
def test_every_constant_is_the_default_of_its_flag_and_the_other_way_round(name):
    assert constants(name) == {
        option.upper(): default for option, default in vars(SCRIPTS[name].parse_args([])).items()
    }
    assert len(constants(name)) <= 25


@each_script
def test_an_edited_constant_is_the_new_default(name, monkeypatch):
    monkeypatch.setattr(SCRIPTS[name], "OUTPUT", "elsewhere.json")
    assert SCRIPTS[name].parse_args([]).output == "elsewhere.json"


@each_script
@pytest.mark.parametrize("launcher", ["colab_kernel_launcher.py", "ipykernel_launcher.py"])
def test_what_the_kernel_was_started_with_is_ignored(name, launcher, monkeypatch):
    parse_args = SCRIPTS[name].parse_args
    argv = [f"/usr/lib/python3/{launcher}", "-f", "x.json", "--HistoryManager.hist_file=:memory:"]
    monkeypatch.setattr(sys, "argv", argv)
    assert parse_args() == parse_args([])
    assert parse_args(["--output", "o.json"]).output == "o.json"


@each_script
def test_flags_of_a_shell_are_heeded(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--output", "o.json"])
    assert SCRIPTS[name].parse_args().output == "o.json"
    monkeypatch.setattr(sys, "argv", [name, "-f", "x.json"])
    with pytest.raises(SystemExit) as end:
        SCRIPTS[name].parse_args()
    assert end.value.code == 2 and "error:" in capsys.readouterr().err


@each_script
def test_abbreviated_flags_are_refused(name, capsys):
    for option in vars(SCRIPTS[name].parse_args([])):
        with pytest.raises(SystemExit) as end:
            SCRIPTS[name].parse_args([flag(option)[:-1], "1"])
        assert end.value.code == 2 and "error:" in capsys.readouterr().err


@each_script
def test_importing_a_script_does_nothing(name):
    statements = ast.parse((ROOT / name).read_text()).body
    for node in statements[1:]:
        if ast.unparse(node).startswith("logging.getLogger("):  # in time before the imports
            continue
        assert not isinstance(node, (ast.Expr, ast.For, ast.While, ast.With, ast.Try))
    assert ast.unparse(statements[-1].test) == "__name__ == '__main__'"
    assert sum(isinstance(node, ast.If) for node in statements) == 1


@each_script
def test_help_is_all_that_the_terminal_shows(name):
    run = subprocess.run(
        [sys.executable, name, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(f"usage: {name}") and run.stderr == ""


def test_prepare_dataset_answers_from_the_shell_without_loading_torch():
    code = "import sys, runpy; sys.argv[1:] = ['--help']; sys.argv[0] = 'prepare_dataset.py'\n"
    code += "try: runpy.run_path('prepare_dataset.py', run_name='__main__')\n"
    code += (
        "except SystemExit as end: print(end.code, {'torch', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout.splitlines()[-1] == "0 set()" and not run.stderr


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
OPTIONS = """--lora-r 0|--lora-r -1|--lora-r 1.5|--lora-r 99999999999|--lora-r abc|--lora-r
--lora-alpha 0|--lora-alpha nan|--lora-alpha inf|--lora-alpha -3
--lora-dropout 1|--lora-dropout -0.1|--lora-dropout nan
--learning-rate nan|--learning-rate inf|--learning-rate 0|--learning-rate -1e-4
--learning-rate x
--epochs 0|--epochs nan|--epochs inf|--epochs -1|--epochs 1e99|--max-steps -2|--max-steps 1.5
--warmup-ratio -0.1|--warmup-ratio 1.1|--warmup-ratio nan
--batch-size 0|--batch-size -4|--batch-size 10000000000|--batch-size nan
--gradient-accumulation-steps 0|--gradient-accumulation-steps 10000000000
--max-seq-length 0|--max-seq-length -1|--max-steps 0
--seed -1|--seed 4294967296|--seed 0.5|--logging-steps 0|--logging-steps -1
--precision fp8|--target-modules|--load-in-8bit|--batch 4|--resume --overwrite"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("option", ["--dataset", "--val-data"])
def test_a_data_file_with_a_mistake_is_refused(tiny, data, tmp_path, capsys, kind, option):
    content, says = FILES[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    line = error_line(run_of(tiny, data, tmp_path / "out", option, path), capsys)
    assert says in line and str(path) in line and "prepare_dataset.py" in line
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("option", OPTIONS.replace("\n", "|").split("|"))
def test_an_option_of_training_out_of_range_is_refused(tiny, data, tmp_path, capsys, option):
    line = error_line(run_of(tiny, data, tmp_path / "out", *option.split()), capsys)
    assert option.split()[0] in line
    assert not os.listdir(tmp_path)


MISTAKES = """--dataset nowhere.jsonl|nowhere.jsonl: No such file
--dataset {tmp}/empty|empty/train.jsonl: No such file
--dataset {tmp}/file|file:1:
--val-data nowhere.jsonl|nowhere.jsonl: No such file
--val-data {tmp}/empty|empty: Is a directory
--dataset ""|train.jsonl: No such file
--model ""|can't load the model
--target-modules ""|--target-modules
--model nobody/no-such-model|nobody/no-such-model
--model ./no/such/folder|./no/such/folder
--model {tmp}/file|file
--model {tmp}/model.gguf|model.gguf: no folder
--target-modules query|query: no such layer
--target-modules q_proj x|x: no such layer
--target-modules proj|proj: no such layer
--target-modules norm|norm: no such layer
--target-modules lm_head|lm_head: no such layer
--output {tmp}/file|file
--output {tmp}/file/out|file/out
--max-seq-length 8|raise --max-seq-length
--max-seq-length 1025|reads 1024 tokens"""


@pytest.mark.parametrize("case", MISTAKES.splitlines())
def test_a_mistake_is_refused_in_one_line(tiny, data, tmp_path, capsys, monkeypatch, case):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    monkeypatch.chdir(tmp_path)
    more, says = case.replace("{tmp}", str(tmp_path)).split("|")
    more = [part.strip('"') for part in more.split(" ")]
    line = error_line(run_of(tiny, data, tmp_path / "out", *more), capsys)
    assert says in line
    assert files(tmp_path) == ["file", "model.gguf"]
    assert (tmp_path / "file").read_text() == "kept"


CONSTANTS = [  # a script, what someone writes at its top
    ("prepare_dataset.py", "VAL_SPLIT", None),
    ("prepare_dataset.py", "VAL_SPLIT", "a tenth"),
    ("prepare_dataset.py", "DELIMITER", "\t"),
    ("prepare_dataset.py", "SEED", "x"),
    ("lora_finetune.py", "PRECISION", "fp64"),
    ("lora_finetune.py", "EPOCHS", None),
    ("lora_finetune.py", "EPOCHS", "three"),
    ("lora_finetune.py", "LORA_R", 16.5),
    ("lora_finetune.py", "LORA_R", True),
    ("lora_finetune.py", "BATCH_SIZE", [4]),
    ("evaluate.py", "PRECISION", "half"),
    ("evaluate.py", "MAX_NEW_TOKENS", 0),
    ("evaluate.py", "MAX_NEW_TOKENS", 9.5),
    ("evaluate.py", "BATCH_SIZE", None),
]


@pytest.mark.parametrize("name, constant, value", CONSTANTS)
def test_a_constant_of_a_wrong_kind_is_told_by_its_flag(name, constant, value, monkeypatch, capsys):
    monkeypatch.setattr(SCRIPTS[name], constant, value)
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].main([])
    assert stopped.value.code == 2
    assert flag(constant.lower()) in capsys.readouterr().err.splitlines()[-1]


def test_whole_numbers_do_where_fractions_are_meant(monkeypatch):
    for constant, value in [("EPOCHS", 2), ("LEARNING_RATE", 1), ("LORA_ALPHA", 8)]:
        monkeypatch.setattr(lora_finetune, constant, value)
    args = lora_finetune.parse_args([])
    assert (args.epochs, args.learning_rate, args.lora_alpha) == (2, 1, 8)


# ------------------------------------------------------------------------------- house style


def functions(module):
    return {
        name: inspect.getsource(function)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
    }


def test_what_stands_in_two_scripts_is_the_same_letter_for_letter():
    one, other = functions(lora_finetune), functions(evaluate)
    twins = set(one) & set(other) - {"parse_args", "main"}
    for name in twins:
        assert one[name] == other[name], name
    assert {"read_jsonl", "chat_frame", "encode", "load_base"} <= twins


@pytest.mark.parametrize(
    "reason, advice",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "close other programs"),
        (ValueError("Tokenizer class X does not exist or is not currently imported."), "pip"),
        (OSError("We couldn't connect to the Hub"), "connect.*online, its Hub name"),
    ],
    ids=["memory", "newer", "offline"],
)
def test_a_model_that_does_not_load_is_told_with_its_reason_and_what_helps(
    reason, advice, monkeypatch, tmp_path
):
    failing = SimpleNamespace(from_pretrained=mock.Mock(side_effect=reason))
    monkeypatch.setattr(lora_finetune, "AutoConfig", failing)
    with pytest.raises(SystemExit, match=f"error: can't load the model Tiny/X: .*{advice}"):
        lora_finetune.main(["--model", "Tiny/X", "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["ALPACA_TEMPLATE", "MODEL_ADVICE"])
def test_both_scripts_hold_the_same_text(name):
    assert getattr(evaluate, name) == getattr(lora_finetune, name)


def test_each_script_names_the_next_ones_input(monkeypatch):
    assert lora_finetune.OUTPUT == evaluate.ADAPTER
    for module in SCRIPTS.values():
        commands = re.findall(r"python (\w+\.py) (.*)", module.__doc__)
        assert [script for script, _ in commands] == list(SCRIPTS)
        prepared, trained, compared = (
            SCRIPTS[script].parse_args(shlex.split(flags)) for script, flags in commands
        )
        assert trained.dataset == prepared.output == prepare_dataset.OUTPUT
        assert compared.adapter == trained.output
        assert compared.val_data == f"{prepared.output}/val.jsonl"


def test_requirements_name_exactly_the_eight_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    names = [re.match(r"[\w-]+", line)[0] for line in lines if line]
    wanted = "torch transformers peft accelerate bitsandbytes datasets scipy pandas"
    assert sorted(names) == sorted(wanted.split())


@each_script
def test_no_script_trusts_remote_code_or_unpickles(name):
    text = (ROOT / name).read_text()
    assert "trust_remote_code=True" not in text
    assert re.findall(r"torch\.load\((?!.*weights_only=True)", text) == []
    assert not re.search(r"^\s*(import|from) pickle", text, re.MULTILINE)


# ------------------------------------------------------------------------------- manual


def known_flags():
    """Every flag that a script takes, asked of argparse itself."""
    flags = set()
    add = argparse._ActionsContainer._add_action
    with pytest.MonkeyPatch.context() as patch:

        def watch(self, action):
            flags.update(action.option_strings)
            return add(self, action)

        patch.setattr(argparse._ActionsContainer, "_add_action", watch)
        for module in SCRIPTS.values():
            module.parse_args([])
    return flags


def test_every_flag_in_the_manual_exists():
    manual = (ROOT / "README.md").read_text(encoding="utf-8")
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", manual))
    assert len(mentioned) > 20
    assert mentioned - known_flags() - OTHER_TOOLS == set()


def test_every_option_stands_in_the_manual():
    manual = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, module in SCRIPTS.items():
        for option in vars(module.parse_args([])):
            ways = [flag(option), flag(option).replace("--", "--no-")]
            assert any(re.search(f"{way}(?![\\w-])", manual) for way in ways), (name, option)


def test_every_command_in_the_manual_is_understood(capsys):
    manual = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"python3? (\w+\.py)((?: [^\n`&]*)?)", manual)
    understood = set()
    for script, flags in commands:
        if script in SCRIPTS and "..." not in flags:
            SCRIPTS[script].parse_args(shlex.split(flags, comments=True))
            understood.add(script)
    assert understood == set(SCRIPTS)


def test_every_file_in_the_manual_exists():
    manual = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"\b(?:data|tests)/\w+\.(?:jsonl|csv|py|txt)", manual)):
        assert (ROOT / name).is_file(), name


# ------------------------------------------------------------------------------- notebook


ALIVE = """import gc, torch
gc.collect()
print("alive", sum(isinstance(thing, torch.nn.Parameter) for thing in gc.get_objects()))"""


def pasted(name, **changes):
    """The text of a script with constants edited, as in a cell."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for constant, value in changes.items():
        new = f"{constant} = {value!r}  "
        text, count = re.subn(rf"^{constant} = [^#\n]*", new, text, flags=re.MULTILINE)
        assert count == 1
    return text


def run_notebook(folder, *cells):
    """Run cells in a real kernel: of each what it printed, its error output, its error and its value."""
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=120, allow_errors=True, resources=resources)
    client.execute()
    seen = []
    for cell in notebook.cells:
        texts = {"stdout": "", "stderr": "", "error": "", "value": ""}
        for out in cell.outputs:
            texts[out.get("name", "")] = texts.get(out.get("name", ""), "") + out.get("text", "")
            if out.output_type == "error":
                texts["error"] = f"{out.ename}: {out.evalue}"
            if out.output_type == "execute_result":
                texts["value"] = out.data["text/plain"]
        seen.append(texts)
    return seen


def write_questions(folder):
    lines = ["question;answer"] + [f"What is {n} of a kind?;Number {n}." for n in range(24)]
    (folder / "mine.csv").write_text("\n".join(lines))


def test_pasted_into_cells_the_three_stages_run_one_after_another(tiny, tmp_path):
    write_questions(tmp_path)
    columns = ["instruction=question", "output=answer"]
    prepare = {"INPUT": "mine.csv", "OUTPUT": "prepared", "COLUMNS": columns, "VAL_SPLIT": 0.25}
    train = {"DATASET": "prepared", "MODEL": tiny, "OUTPUT": "adapter", "MAX_STEPS": 2}
    compare = {"ADAPTER": "adapter", "VAL_DATA": "prepared/val.jsonl", "MAX_NEW_TOKENS": 4}
    seen = run_notebook(
        tmp_path,
        pasted("prepare_dataset.py", **prepare),
        pasted("lora_finetune.py", **train, PRECISION="fp32", SEED=7),
        pasted("lora_finetune.py", **train, LEARNING_RATE=1e-2, OVERWRITE=True),
        ALIVE,
        pasted("evaluate.py", **compare, OUTPUT="results/eval.json"),
        'main(["--max-new-tokens", "2"])["prompts"]',
        ALIVE,
    )
    assert not any(cell["error"] for cell in seen)
    assert re.search(r"train +18 rows", seen[0]["stdout"])
    assert "saved" in seen[1]["stdout"] and "saved" in seen[2]["stdout"]
    assert seen[3]["stdout"] == seen[6]["stdout"] == "alive 0\n"  # the memory is given back
    assert int(seen[5]["value"]) >= 10
    results = json.loads((tmp_path / "results/eval.json").read_text(encoding="utf-8"))
    assert results["perplexity"]["rows"] == 6
    log = (tmp_path / "adapter/training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log if "grad_norm" in line] == [1, 2]


def test_in_a_notebook_the_scripts_run_by_magic_by_shell_and_by_main(tiny, tmp_path):
    write_questions(tmp_path)
    python, train = sys.executable, f"{ROOT}/lora_finetune.py"
    seen = run_notebook(
        tmp_path,
        f"!{python} {ROOT}/prepare_dataset.py --input mine.csv --output prepared "
        "--columns instruction=question output=answer\n_exit_code",
        f"!{python} {ROOT}/prepare_dataset.py --input none.csv\n_exit_code",
        f"%run {train} --max-steps 1 --dataset prepared --model {tiny} --output first",
        f"main(['--epochs', '1', '--dataset', 'prepared', '--model', '{tiny}', "
        "'--output', 'second'])['step']",
        ALIVE,
    )
    assert "next: python lora_finetune.py --dataset prepared" in seen[0]["stdout"]
    assert seen[0]["value"] == "0"
    assert seen[1]["stdout"].startswith("error: none.csv") and seen[1]["value"] == "1"
    assert len(seen[1]["stdout"].splitlines()) == 1
    assert "saved" in seen[2]["stdout"] and (tmp_path / "first/adapter_config.json").exists()
    assert seen[3]["value"] == "2" and (tmp_path / "second/adapter_config.json").exists()
    assert not any(cell["error"] for cell in seen)
    assert seen[4]["stdout"] == "alive 0\n"


def test_a_mistake_in_a_cell_ends_in_one_line_and_the_kernel_lives_on(tmp_path):
    seen = run_notebook(
        tmp_path,
        pasted("lora_finetune.py", DATASET="nowhere.jsonl"),
        "main(['--dataset', 'nowhere.csv'])",
        f"%run {ROOT}/evaluate.py --adapter nowhere",
        "6 * 7",
    )
    for cell, name in zip(seen, ("nowhere.jsonl", "nowhere.csv", "nowhere")):
        assert cell["error"].startswith(f"SystemExit: error: {name}")
        assert "\n" not in cell["error"] and "Traceback" not in cell["stderr"]
    assert seen[3]["value"] == "42"


# ------------------------------------------------------------------------------- changes people make

ASKED = '    asked = [{"role": "user", "content": question}]\n'
SYSTEM = '{"role": "system", "content": "Be brief."}'
CHANGES = {  # the wishes of the manual: what stands there, what is written instead
    "weight decay": ("weight_decay=0.0", "weight_decay=0.01"),
    "constant rate": ("    return peak * (1 + cosine) / 2\n", "    return peak\n"),
    "loss on the prompt": (
        "    labels = [-100] * prompt_tokens + input_ids[prompt_tokens:]\n",
        "    labels = list(input_ids)\n",
    ),
    "system prompt": (ASKED, ASKED.replace("[{", f"[{SYSTEM}, {{")),
    "TensorBoard": (
        "            log += new\n",
        "            log += new\n"
        '            for entry in new: writer.add_scalars("log", {**entry, "grad_norm": norm}, done)\n',
    ),
    "8 bits": ("            load_in_4bit=True,\n", "            load_in_8bit=True,\n"),
    "temperature": (
        "        do_sample=False,\n",
        "        do_sample=True,\n        temperature=0.7,\n        top_k=0,\n",
    ),
}


def edited(name, wish):
    """The script as a module, with the change of that wish."""
    text = (ROOT / name).read_text(encoding="utf-8")
    old, new = CHANGES[wish]
    assert text.count(old) == 1
    module = types.ModuleType(name.removesuffix(".py"))
    exec(compile(text.replace(old, new), name, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("wish", CHANGES)
def test_the_manual_says_what_to_write(wish):
    manual = (ROOT / "README.md").read_text(encoding="utf-8")
    section = manual.split("\n## Change the script\n")[1].split("\n## ")[0]
    old, new = CHANGES[wish]
    lines = [line.strip().rstrip(",") for line in new.removeprefix(old).splitlines()]
    assert ", ".join(lines) in section


def test_weight_decay_is_one_number(tiny, data, tmp_path, monkeypatch):
    seen = set()
    step = torch.optim.AdamW.step

    def adamw(self, *args, **kwargs):
        seen.add(self.param_groups[0]["weight_decay"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", adamw)
    run = run_of(tiny, data, tmp_path / "out", "--max-steps", 2)
    edited("lora_finetune.py", "weight decay").main(run)
    assert seen == {0.01}


def test_tensorboard_gets_what_the_log_has(tiny, data, tmp_path):
    module, seen = edited("lora_finetune.py", "TensorBoard"), []
    note = SimpleNamespace(add_scalars=lambda name, values, step: seen.append((step, values)))
    module.writer = note
    module.main(run_of(tiny, data, tmp_path / "out", "--epochs", 2, "--val-data", data))
    log = [json.loads(line) for line in open(tmp_path / "out/training_log.jsonl")][1:]
    for entry, (step, values) in zip(log, seen, strict=True):
        assert step == entry["step"] and entry.items() <= values.items()


def test_a_constant_rate_is_one_line(tiny, data, tmp_path):
    run = run_of(tiny, data, tmp_path / "out", "--max-steps", 4, "--warmup-ratio", 0.25)
    edited("lora_finetune.py", "constant rate").main(run)
    assert logged(tmp_path / "out", "learning_rate") == [0, 2e-4, 2e-4, 2e-4]


def test_the_prompt_is_learned_too_by_one_line(tiny, data, tmp_path):
    """Held against the model's own loss over whole texts."""
    run = run_of(tiny, data, tmp_path / "out", "--max-steps", 1)
    edited("lora_finetune.py", "loss on the prompt").main(run)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    nats, count = 0.0, 0
    for row in ROWS:
        text = "".join(chat_text(tokenizer, "zephyr", row)[1:])
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert logged(tmp_path / "out", "loss") == [pytest.approx(nats / count, rel=1e-5)]


def test_a_system_prompt_in_one_script_alone_is_noticed(tiny_models, data, tmp_path, capsys):
    chatml, out = tiny_models(template="chatml"), tmp_path / "out"
    edited("lora_finetune.py", "system prompt").main(run_of(chatml, data, out, "--max-steps", 1))
    assert "<|im_start|>system Be brief.<|im_end|>" in capsys.readouterr().out
    compare = ["--adapter", str(out), "--no-load-in-4bit", "--max-new-tokens", "2"]
    compare += ["--output", str(tmp_path / "r.json")]
    with pytest.raises(SystemExit, match="^error: .*head of the prompt"):
        evaluate.main(compare)
    assert edited("evaluate.py", "system prompt").main(compare)["prompts"] == 10


def test_a_loss_that_one_script_alone_counts_otherwise_gets_no_verdict(able, data, tmp_path):
    out = tmp_path / "out"
    held_out = write_jsonl(tmp_path / "val.jsonl", [{"instruction": "Who?", "output": "You."}])
    run = run_of(able, data, out, "--max-steps", 1, "--val-data", held_out)
    edited("lora_finetune.py", "loss on the prompt").main(run)
    compare = ["--adapter", str(out), "--val-data", str(held_out), "--max-new-tokens", "2"]
    compare += ["--output", str(tmp_path / "r.json")]
    both = edited("evaluate.py", "loss on the prompt").main(compare)
    loss = json.loads((out / "training_config.json").read_text())["result"]["eval_loss"]
    assert math.log(both["perplexity"]["finetuned"]) == pytest.approx(loss, rel=1e-5)
    assert not both["verdict"].startswith("No verdict")

    alone = evaluate.main(compare)["verdict"]
    assert alone.startswith(f"No verdict: the training measured {math.exp(loss):.2f} on these rows")
    # in other weights, or of other rows, another figure is no wonder
    otherwise = evaluate.main([*compare, "--load-in-4bit"])["verdict"]
    assert not otherwise.startswith("No verdict")
    write_jsonl(held_out, [{"instruction": "What?", "output": "You."}])
    assert not evaluate.main(compare)["verdict"].startswith("No verdict")


def test_an_option_needs_no_range_and_its_number_stays_a_number(monkeypatch):
    text = (ROOT / "lora_finetune.py").read_text(encoding="utf-8")
    line = '    add("--resume", RESUME'
    new = '    add("--weight-decay", 0.5, "pull to 0")\n    add("--pools", 3, "many")\n'
    assert text.count(line) == 1
    module = types.ModuleType("lora_finetune")
    exec(compile(text.replace(line, new + line), "x", "exec"), module.__dict__)
    args = module.parse_args(["--weight-decay", "1e9", "--pools", "-7"])
    assert (args.weight_decay, args.pools) == (1e9, -7)
    assert module.parse_args([]).weight_decay == 0.5
    with pytest.raises(SystemExit):
        module.parse_args(["--weight-decay", "much"])


def test_eight_bits_are_one_word(tiny, data, tmp_path, monkeypatch):
    import bitsandbytes

    module, used = edited("lora_finetune.py", "8 bits"), []
    monkeypatch.setitem(module.__dict__, "check_base", lambda *args: used.append(args[0]))
    run = run_of(tiny, data, tmp_path / "out", "--max-steps", 1, "--load-in-4bit")
    module.main(run)
    kinds = [type(layer) for layer in used[0].modules()]
    assert bitsandbytes.nn.Linear8bitLt in kinds and bitsandbytes.nn.Linear4bit not in kinds


def test_answers_are_drawn_at_a_temperature_by_two_lines(tiny, data, tmp_path):
    lora_finetune.main(run_of(tiny, data, tmp_path / "out", "--max-steps", 1))
    compare = ["--adapter", str(tmp_path / "out"), "--max-new-tokens", "8"]
    compare += ["--output", str(tmp_path / "r.json"), "--no-load-in-4bit"]
    answers = []
    for _ in range(2):
        edited("evaluate.py", "temperature").main(compare)
        results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
        answers.append([each["base"] for each in results["prompts"]])
    assert answers[0] != answers[1]
