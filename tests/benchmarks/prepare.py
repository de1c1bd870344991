"""Time prepare_dataset.py on a million rows (500 MB) beside pandas.read_csv alone, each in its own process.

python tests/benchmarks/prepare.py [--rows 1000000]
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PANDAS = "import sys, pandas; pandas.read_csv(sys.argv[1], dtype=str, keep_default_na=False)"
PEAK = "import atexit, resource; atexit.register(lambda: print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)); "


def write_rows(path, count):
    """Write a CSV of about 500 bytes a row, a third of them with an input."""
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 10)))
        for _ in range(5000)
    ]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "input", "output"])
        for i in range(count):
            question, answer = (
                " ".join(rng.choices(words, k=12)),
                " ".join(rng.choices(words, k=60)),
            )
            writer.writerow([f"{i} {question}", "" if i % 3 else question, answer])


def measure(code, *args):
    """Run Python code in a process of its own: (seconds, peak MiB)."""
    began = time.monotonic()
    command = [sys.executable, "-c", PEAK + code, *map(str, args)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return time.monotonic() - began, int(output.split("PEAK")[1])


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--rows", type=int, default=1_000_000)
rows = parser.parse_args().rows
with tempfile.TemporaryDirectory() as folder:
    source = Path(folder, "rows.csv")
    write_rows(source, rows)
    alone = measure(PANDAS, source)
    ours = measure(
        "import sys, prepare_dataset; prepare_dataset.main(['--input', sys.argv[1], '--output', sys.argv[2]])",
        source,
        folder,
    )
    print(f"{rows:,} rows, {source.stat().st_size / 1e6:,.0f} MB")
    print(f"pandas.read_csv     {alone[0]:6.1f} s  {alone[1]:6,} MiB")
    print(f"prepare_dataset.py  {ours[0]:6.1f} s  {ours[1]:6,} MiB   x {ours[0] / alone[0]:.1f}")
