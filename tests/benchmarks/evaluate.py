"""Time evaluate.py beside the way most scripts do it, and print one table.

    python tests/benchmarks/evaluate.py ADAPTER_DIR ROWS.jsonl [--max-new-tokens 256] [--rows 1000]

answers: ten prompts, before and after; the plain way loads two models and asks prompt by prompt. Whole commands are timed.
perplexity: the base on the first --rows rows (repeated where the file has fewer); the plain way takes the model's own
loss on batches of eight, full logits and all. Timed without loading; the peak is of allocated GPU memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import functools, gc, json, math, sys, time, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
folder, path, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
name = json.loads(Path(folder, "adapter_config.json").read_text())["base_model_name_or_path"]
gpu = torch.cuda.is_available()
dtype = torch.float16 if gpu else torch.float32
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=dtype)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
def load():
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4, dtype=dtype,
                                                device_map={"": 0 if gpu else "cpu"})
"""
ANSWERS = (
    LOAD
    + """
for tuned in (False, True):
    model = PeftModel.from_pretrained(load(), folder) if tuned else load()
    for prompt in json.loads(Path(path).read_text()):
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", add_generation_prompt=True, return_dict=True)
        model.generate(**inputs.to(model.device), max_new_tokens=number, do_sample=False)
"""
)
ROWS = (
    LOAD
    + f"""
sys.path.insert(0, {str(ROOT)!r})
import evaluate
records = evaluate.read_jsonl(path)
frame = evaluate.chat_frame(tokenizer)
rows = [evaluate.encode(records[i % len(records)], tokenizer, frame, 512) for i in range(number)]
tokens = sum(label != -100 for row in rows for label in row["labels"])
def plain(rows):
    total = 0.0
    for start in range(0, len(rows), 8):
        batch = rows[start : start + 8]
        width = max(len(row["input_ids"]) for row in batch)
        def grid(key, value):
            padded = [row[key] + [value] * (width - len(row[key])) for row in batch]
            return torch.tensor(padded, device=model.device)
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
        labels = grid("labels", -100)
        output = model(input_ids=grid("input_ids", tokenizer.pad_token_id), labels=labels,
                       attention_mask=torch.tensor(mask, device=model.device))
        total += output.loss.item() * (labels[:, 1:] != -100).sum().item()
    return total
def ours(rows):
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    parts = evaluate.micro_batches(rows, 4 * len(rows[0]["input_ids"]))
    nll_of = functools.partial(evaluate.response_nll, model, evaluate.find_head(model), 0)
    return sum(nll_of(part).double().sum().item() for part in parts)
def ours_loaded():
    model = evaluate.load_base(name, 0 if gpu else "cpu", "fp16" if gpu else "fp32", True)
    evaluate.mend(model)
    return model
with torch.inference_mode():
    for way, loaded in ((plain, load), (ours, ours_loaded)):
        model = None  # the one before goes first
        gc.collect()
        model = loaded()
        way(rows[:16])  # warm
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        perplexity = math.exp(way(rows) / tokens)
        peak = torch.cuda.max_memory_allocated() >> 20 if gpu else 0
        print("RESULT", time.monotonic() - began, peak, perplexity)
"""
)


def run(*command):
    began = time.monotonic()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[-4:]} failed:\n{done.stderr[-2000:]}")
    return done.stdout, time.monotonic() - began


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("adapter")
parser.add_argument("data")
parser.add_argument("--max-new-tokens", type=int, default=256)
parser.add_argument("--rows", type=int, default=1000)
args = parser.parse_args()
print(f"{'':<28} {'plain s':>9} {'script s':>9} {'ratio':>6} {'plain MiB':>10} {'script MiB':>10}")
with tempfile.TemporaryDirectory() as folder:
    prompts, output = Path(folder, "prompts.json"), Path(folder, "results.json")
    questions = [f"Explain part {n} of a Kubernetes cluster." for n in range(1, 11)]
    prompts.write_text(json.dumps(questions))
    _, plain = run("-c", ANSWERS, args.adapter, prompts, args.max_new_tokens)
    flags = ["--adapter", args.adapter, "--prompts", prompts, "--batch-size", 10]
    flags += ["--max-new-tokens", args.max_new_tokens, "--output", output]
    _, ours = run(ROOT / "evaluate.py", *flags)
    title = f"10 answers of {args.max_new_tokens}, twice"
    print(f"{title:<28} {plain:>9.1f} {ours:>9.1f} {ours / plain:>6.2f}", flush=True)
text, _ = run("-c", ROWS, args.adapter, args.data, args.rows)
(plain, plain_mib, first), (ours, ours_mib, second) = (
    map(float, line.split()[1:]) for line in text.splitlines() if line.startswith("RESULT")
)
title = f"perplexity, {args.rows:,} rows"
print(
    f"{title:<28} {plain:>9.1f} {ours:>9.1f} {ours / plain:>6.2f} {plain_mib:>10,.0f} {ours_mib:>10,.0f}"
    f"   ({first:.3f} and {second:.3f})"
)
