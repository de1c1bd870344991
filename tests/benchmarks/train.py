"""Time lora_finetune.py beside what users would pick instead, on the same rows, and print one table.

    python tests/benchmarks/train.py MODEL_DIR ROWS.jsonl [--steps 8] [--script-flags="--precision bf16"]

textbook: prepare_model_for_kbit_training and Trainer. trl, unsloth: their trainers at their defaults, where installed.
script: lora_finetune.py unchanged. Each runs in a process of its own with 16 rows a step (4 x 4), at most 512 tokens a row,
rank 16 on q_proj and v_proj. Printed are real tokens/s after the first two steps, the median step, all steps together (s) and,
on a GPU, the peak of allocated memory while training and the device-busy time a step (from a second run: tracing slows the host).
"""

import argparse
import importlib.util
import json
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}


def put_clock_on_trainer(trace):
    """Have every Trainer count tokens and time its steps; returns the figures, filled in while it trains."""
    import torch
    import transformers

    gpu = torch.cuda.is_available()
    figures = {"times": [], "tokens": [], "peak": None, "busy": None}

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            self.trace = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA] if gpu else None
            )
            if trace:
                self.trace.start()

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if gpu:
                torch.cuda.synchronize()
            figures["times"].append(time.perf_counter() - self.began)

        def on_train_end(self, *_, **__):
            if gpu:
                figures["peak"] = torch.cuda.max_memory_allocated() >> 20
            if trace:
                self.trace.stop()
                busy = sum(event.self_device_time_total for event in self.trace.key_averages())
                figures["busy"] = busy / 1e3 / len(figures["times"])

    plain = transformers.Trainer.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.add_callback(Clock())
        inner = self.data_collator

        def counting(rows):
            figures["tokens"].append(sum(len(row["input_ids"]) for row in rows))
            return inner(rows)

        self.data_collator = counting

    transformers.Trainer.__init__ = init
    return figures


def put_clock_on_loop(trace, pad_id, steps):
    """The same for a loop of its own: steps end where the optimizer has stepped, tokens are counted as they are embedded."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    gpu = torch.cuda.is_available()
    figures = {"times": [], "tokens": [], "peak": None, "busy": None}
    embedded, plain = [], torch.nn.Embedding.forward
    kinds = [torch.profiler.ProfilerActivity.CUDA] if gpu else None
    state = {"began": None, "trace": torch.profiler.profile(activities=kinds)}

    def count(ids):  # without the padding, which repeats the token that ends a row
        rows = ids.tolist()
        for row in rows:
            while row[-2:] == [pad_id, pad_id]:
                row.pop()
        return sum(map(len, rows))

    def embed(self, ids):
        if torch.is_grad_enabled():
            if state["began"] is None:
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                if trace:
                    state["trace"].start()
                state["began"] = time.perf_counter()
            embedded.append(ids)
        return plain(self, ids)

    def stepped(*_):
        if gpu:
            torch.cuda.synchronize()
        figures["times"].append(time.perf_counter() - state["began"])
        figures["tokens"].append(sum(map(count, embedded)))
        embedded.clear()
        if gpu:
            figures["peak"] = torch.cuda.max_memory_allocated() >> 20
        if trace and len(figures["times"]) == steps:
            state["trace"].stop()
            busy = sum(event.self_device_time_total for event in state["trace"].key_averages())
            figures["busy"] = busy / 1e3 / steps
        state["began"] = time.perf_counter()

    torch.nn.Embedding.forward = embed
    register_optimizer_step_post_hook(stepped)
    return figures


def train_peer(name, args, output):
    """Train with one of the peers, on the rows as their users would pass them."""
    if name == "unsloth":
        from unsloth import FastLanguageModel  # first: it changes transformers
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    gpu = torch.cuda.is_available()
    dtype = torch.float16 if gpu else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = []
    for line in open(args.rows, encoding="utf-8"):
        record = json.loads(line)
        question = "\n\n".join(filter(None, (record["instruction"], record["input"])))
        chat = [{"role": "user", "content": question}]
        chat.append({"role": "assistant", "content": record["output"]})
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        rows.append({"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"][:512]})
    common = {
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": args.steps,
        "learning_rate": 2e-4,
        "fp16": gpu,
        "use_cpu": not gpu,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    load = {
        "dtype": dtype,
        "device_map": {"": 0 if gpu else "cpu"},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    }
    if name == "textbook":
        model = AutoModelForCausalLM.from_pretrained(args.model, **load)
        kwargs = checkpointing["gradient_checkpointing_kwargs"]
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
        model = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))
        settings = transformers.TrainingArguments(**common, **checkpointing)
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = transformers.Trainer(model, settings, collator, Dataset.from_list(rows))
    else:
        from trl import SFTConfig, SFTTrainer

        if name == "trl":
            settings = SFTConfig(**common, **checkpointing, max_length=512, model_init_kwargs=load)
            lora = {"peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM")}
            model = args.model
        else:
            settings, lora = SFTConfig(**common, max_length=512), {}
            model, _ = FastLanguageModel.from_pretrained(
                args.model, max_seq_length=512, dtype=dtype, load_in_4bit=True
            )
            model = FastLanguageModel.get_peft_model(
                model, **LORA, bias="none", use_gradient_checkpointing="unsloth"
            )
        trainer = SFTTrainer(
            model,
            settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **lora,
        )
    trainer.train()


def run_one(name, args):
    """Train in this process with a clock on it, and print one line of JSON."""
    if name == "unsloth":
        import unsloth  # noqa: F401  first: it changes transformers
    if name == "script":
        from transformers import AutoTokenizer

        pad_id = AutoTokenizer.from_pretrained(args.model).eos_token_id or 0
        figures = put_clock_on_loop(args.trace, pad_id, args.steps)
    else:
        figures = put_clock_on_trainer(args.trace)
    with tempfile.TemporaryDirectory() as output:
        if name == "script":
            flags = ["--model", args.model, "--dataset", args.rows, "--output", output]
            flags += ["--max-steps", str(args.steps), *shlex.split(args.script_flags)]
            sys.argv = ["lora_finetune.py", *flags]
            runpy.run_path(str(ROOT / "lora_finetune.py"), run_name="__main__")
        else:
            train_peer(name, args, output)
    times, skip = figures["times"], 2 if args.steps > 4 else 0
    batches = 1 if name == "script" else 4  # collated a step
    tokens = figures["tokens"][skip * batches : args.steps * batches]
    figures |= {"speed": sum(tokens) / sum(times[skip:]), "all": sum(times)}
    figures["step"] = sorted(times)[len(times) // 2]
    print("RESULT " + json.dumps(figures))


def measure(name, *more):
    """Run this file anew for one implementation: its figures, or the last line of its error."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if "RESULT" in done.stdout:
        return json.loads(done.stdout.split("RESULT")[1].splitlines()[0])
    return (done.stderr.strip().splitlines() or ["no output"])[-1]


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("model")
parser.add_argument("rows")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--script-flags", default="")
parser.add_argument("--one", help=argparse.SUPPRESS)
parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
args = parser.parse_args()
if args.one:
    run_one(args.one, args)
    sys.exit()
print(
    f"{'':<10} {'tokens/s':>9} {'s a step':>9} {'all steps':>9} {'peak MiB':>9} {'busy ms a step':>15}",
    flush=True,
)
for name in ("textbook", "trl", "unsloth", "script"):
    if name in ("trl", "unsloth") and not importlib.util.find_spec(name):
        continue
    result = measure(name)
    if isinstance(result, str):
        print(f"{name:<10} failed: {result[:120]}", flush=True)
        continue
    busy = measure(name, "--trace")["busy"] if result["peak"] else None
    print(
        f"{name:<10} {result['speed']:>9,.0f} {result['step']:>9.2f} {result['all']:>9.1f} {result['peak'] or '':>9} "
        f"{round(busy, 1) if busy else '':>15}",
        flush=True,
    )
