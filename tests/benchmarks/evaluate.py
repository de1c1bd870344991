"""Time evaluate.py's answers beside prompt by prompt on two loaded models, the way most scripts do it.

python tests/benchmarks/evaluate.py ADAPTER_DIR [--max-new-tokens 64]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
folder, prompts, tokens = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
name = json.load(open(folder + "/adapter_config.json"))["base_model_name_or_path"]
gpu = torch.cuda.is_available()
dtype = torch.float16 if gpu else torch.float32
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=dtype)
tokenizer = AutoTokenizer.from_pretrained(folder)
for tuned in (False, True):
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4, dtype=dtype,
                                                 device_map={"": 0 if gpu else "cpu"})
    model = PeftModel.from_pretrained(model, folder) if tuned else model
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], return_tensors="pt",
                                               add_generation_prompt=True, return_dict=True).to(model.device)
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
"""

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("adapter")
parser.add_argument("--max-new-tokens", type=int, default=64)
args = parser.parse_args()
with tempfile.TemporaryDirectory() as folder:
    prompts = Path(folder, "prompts.json")
    prompts.write_text(
        json.dumps([f"Explain part {n} of a Kubernetes cluster." for n in range(1, 11)])
    )
    limit, output = str(args.max_new_tokens), str(Path(folder, "results.json"))
    script = [str(ROOT / "evaluate.py"), "--adapter", args.adapter, "--prompts", str(prompts)]
    script += ["--max-new-tokens", limit, "--batch-size", "10", "--output", output]
    seconds = {}
    for name, command in {
        "two loads, prompt by prompt": ["-c", PLAIN, args.adapter, str(prompts), limit],
        "evaluate.py": script,
    }.items():
        began = time.monotonic()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        seconds[name] = time.monotonic() - began
        print(f"{name:<28} {seconds[name]:7.1f} s")
    plain, ours = seconds.values()
    print(f"{'ratio':<28} {ours / plain:7.2f}")
