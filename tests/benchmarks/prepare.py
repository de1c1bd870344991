"""Time prepare_dataset.py on a million rows (500 MB) beside pandas.read_csv, by turns, each in its own process.

python tests/benchmarks/prepare.py [--rows 1000000] [--rounds 3] [--form csv] [--beside OTHER/prepare_dataset.py]
"""

import argparse
import csv
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "prepare_dataset.py"
PANDAS = "import sys, pandas; pandas.read_csv(sys.argv[1], dtype=str, keep_default_na=False)"
FIELDS = ["instruction", "input", "output"]


def parse_args():
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=look)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--form", choices=["csv", "lines", "list"], default="csv")
    parser.add_argument("--beside", help="another prepare_dataset.py, to be run by turns with ours")
    return parser.parse_args()


def make_rows(count):
    """Yield rows of about 500 bytes, a third of them with an input."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randrange(2, 10))) for _ in range(5000)]
    for i in range(count):
        question, answer = " ".join(rng.choices(words, k=12)), " ".join(rng.choices(words, k=60))
        yield [f"{i} {question}", "" if i % 3 else question, answer]


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([FIELDS, *rows])


def write_json(path, rows, form):
    """Write one object a line, or a list of them in one line."""
    start, between, end = ("[", ", ", "]") if form == "list" else ("", "\n", "\n")
    texts = (json.dumps(dict(zip(FIELDS, row)), ensure_ascii=False) for row in rows)
    with open(path, "w", encoding="utf-8") as file:
        file.write(start + next(texts))
        file.writelines(between + text for text in texts)
        file.write(end)


def measure(command):
    """Run a command: (seconds, seconds of processor time, peak MiB)."""
    began = time.monotonic()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, *map(str, command)],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, used = os.wait4(child, 0)
    assert status == 0, command
    return time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss >> 10


args = parse_args()
with tempfile.TemporaryDirectory() as folder:
    table, source = Path(folder, "rows.csv"), Path(folder, f"rows.{args.form}")
    write_csv(table, make_rows(args.rows))
    if args.form != "csv":
        write_json(source, make_rows(args.rows), args.form)
    commands = {"pandas.read_csv": ["-c", PANDAS, table]}
    for script in filter(None, (SCRIPT, args.beside)):
        commands[str(script)] = [script, "--input", source, "--output", folder]
    runs = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            runs[name].append(measure(command))
    print(
        f"{args.rows:,} rows, {args.form}, {source.stat().st_size / 1e6:,.0f} MB; median of rounds"
    )
    for name, figures in runs.items():
        wall, cpu, peak = map(statistics.median, zip(*figures))
        ratio = statistics.median(
            own[1] / base[1] for own, base in zip(figures, runs["pandas.read_csv"])
        )
        print(f"{wall:6.1f} s  {cpu:6.1f} s cpu  x {ratio:4.1f}  {peak:6,.0f} MiB  {name}")
