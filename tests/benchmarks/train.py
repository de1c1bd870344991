"""Time lora_finetune.py beside the textbook QLoRA recipe (and TRL where installed) on the same rows.

    python tests/benchmarks/train.py MODEL_DIR ROWS.jsonl [--steps 8] [--script-flags "--auto-batch-size"]

Each runs in a process of its own, with batch 4 x 4 and the defaults of the script; printed are tokens/s
after the first two steps (padding not counted), the median step and, on a GPU, the peak of allocated memory.
"""

import argparse
import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_one(name, args):
    """Train in this process with a clock on Trainer, and print one line of JSON."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer

    gpu = torch.cuda.is_available()
    times, tokens = [], []
    plain_step, plain_init = Trainer.training_step, Trainer.__init__

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            tokens.append(0)
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - self.began)

    def step(self, model, inputs, *rest, **kwargs):
        pad = tokenizer.pad_token_id
        tokens[-1] += int((inputs["input_ids"] != pad).sum())
        return plain_step(self, model, inputs, *rest, **kwargs)

    def init(self, *rest, **kwargs):
        plain_init(self, *rest, **kwargs)
        self.add_callback(Clock())

    Trainer.training_step, Trainer.__init__ = step, init
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as output:
        if name == "script":
            flags = ["--model", args.model, "--dataset", args.rows, "--output", output]
            flags += ["--max-steps", str(args.steps), *shlex.split(args.script_flags)]
            sys.argv = ["lora_finetune.py", *flags]
            runpy.run_path(str(ROOT / "lora_finetune.py"), run_name="__main__")
        else:
            from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

            dtype = torch.float16 if gpu else torch.float32
            nf4 = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            model = AutoModelForCausalLM.from_pretrained(
                args.model,
                quantization_config=nf4,
                dtype=dtype,
                device_map={"": 0 if gpu else "cpu"},
            )
            kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
            model = prepare_model_for_kbit_training(model, **kwargs)
            lora = LoraConfig(
                r=16,
                lora_alpha=32,
                lora_dropout=0.05,
                target_modules=["q_proj", "v_proj"],
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, lora)
            rows = []
            for line in open(args.rows, encoding="utf-8"):
                record = json.loads(line)
                question = "\n\n".join(filter(None, (record["instruction"], record["input"])))
                chat = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": record["output"]},
                ]
                text = tokenizer.apply_chat_template(chat, tokenize=False)
                rows.append(
                    tokenizer(text, add_special_tokens=False, truncation=True, max_length=512)[
                        "input_ids"
                    ]
                )

            def collate(batch):
                longest = max(map(len, batch))
                grid = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in batch]
                mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch]
                labels = [ids + [-100] * (longest - len(ids)) for ids in batch]
                names = ("input_ids", "attention_mask", "labels")
                return dict(zip(names, map(torch.tensor, (grid, mask, labels)), strict=True))

            settings = transformers.TrainingArguments(
                output,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=4,
                max_steps=args.steps,
                learning_rate=2e-4,
                fp16=gpu,
                use_cpu=not gpu,
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                disable_tqdm=True,
            )
            Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate).train()
    skip = 2 if len(times) > 4 else 0
    print(
        "RESULT "
        + json.dumps(
            {
                "tokens_s": sum(tokens[skip:]) / sum(times[skip:]),
                "step_s": sorted(times)[len(times) // 2],
                "peak_mib": torch.cuda.max_memory_allocated() >> 20 if gpu else None,
            }
        )
    )


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("model")
parser.add_argument("rows")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--script-flags", default="")
parser.add_argument("--one", help=argparse.SUPPRESS)
args = parser.parse_args()
if args.one:
    run_one(args.one, args)
else:
    print(f"{'':<10} {'tokens/s':>9} {'s a step':>9} {'peak MiB':>9}")
    for name in ("textbook", "script"):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if "RESULT" not in done.stdout:
            sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
        result = json.loads(done.stdout.split("RESULT")[1])
        print(
            f"{name:<10} {result['tokens_s']:>9,.0f} {result['step_s']:>9.2f} {result['peak_mib'] or '':>9}"
        )
