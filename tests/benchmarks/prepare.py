"""Time prepare_dataset.py on a million rows (500 MB) beside pandas.read_csv.

They run by turns, each in its own process; --beside adds another prepare_dataset.py.

    python tests/benchmarks/prepare.py
    python tests/benchmarks/prepare.py --rows 100000 --rounds 3 --form list --beside OTHER.py
"""

import argparse
import csv
import json
import os
import random
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from statistics import median

SCRIPT = Path(__file__).resolve().parents[2] / "prepare_dataset.py"
PANDAS = "import sys, pandas; pandas.read_csv(sys.argv[1], dtype=str, keep_default_na=False)"
FIELDS = ["instruction", "input", "output"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Run = namedtuple("Run", ["wall", "cpu", "peak"])  # seconds, seconds, MiB


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--form", choices=["csv", "lines", "list"], default="csv")
    parser.add_argument("--beside", help="another prepare_dataset.py, to be run by turns with ours")
    return parser.parse_args()


def make_words(rng):
    """5,000 words of 2 to 9 letters."""
    words = []
    for _ in range(5000):
        letters = rng.choices(LETTERS, k=rng.randrange(2, 10))
        words.append("".join(letters))
    return words


def make_rows(count):
    """Yield rows of about 500 bytes, a third of them with an input."""
    rng = random.Random(0)
    words = make_words(rng)
    for i in range(count):
        question = " ".join(rng.choices(words, k=12))
        answer = " ".join(rng.choices(words, k=60))
        about = question
        if i % 3:
            about = ""
        yield [f"{i} {question}", about, answer]


def write_csv(path, rows):
    """Write a table with a header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(FIELDS)
        table.writerows(rows)  # one by one: what is held here would count as a child's peak


def write_lines(path, rows):
    """Write one JSON object a line."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            record = dict(zip(FIELDS, row))
            file.write(json.dumps(record) + "\n")


def write_list(path, rows):
    """Write a JSON list in one line."""
    separator = "["
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            record = dict(zip(FIELDS, row))
            file.write(separator + json.dumps(record))
            separator = ", "
        file.write("]")


def measure(command):
    """Run Python in a process of its own, what it prints thrown away."""
    began = time.monotonic()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, *map(str, command)],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, used = os.wait4(child, 0)
    wall = time.monotonic() - began
    assert status == 0, command
    return Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss >> 10)


def report(name, runs, of_pandas):
    """Print the medians of a command, and of its processor time against pandas' round by round."""
    wall = median(run.wall for run in runs)
    cpu = median(run.cpu for run in runs)
    peak = median(run.peak for run in runs)
    ratio = median(own.cpu / base.cpu for own, base in zip(runs, of_pandas))
    print(f"{wall:6.1f} s  {cpu:6.1f} s cpu  x {ratio:4.1f}  {peak:6,.0f} MiB  {name}")


def main():
    args = parse_args()
    write = {"csv": write_csv, "lines": write_lines, "list": write_list}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "rows.csv")
        source = Path(folder, f"rows.{args.form}")
        write_csv(table, make_rows(args.rows))
        if args.form != "csv":
            write[args.form](source, make_rows(args.rows))

        commands = {"pandas.read_csv": ["-c", PANDAS, table]}
        for script in [SCRIPT, args.beside]:
            if script:
                commands[str(script)] = [script, "--input", source, "--output", folder]
        runs = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                runs[name].append(measure(command))

        size = source.stat().st_size / 1e6
        print(f"{args.rows:,} rows, {args.form}, {size:,.0f} MB; median of rounds")
        for name, own in runs.items():
            report(name, own, runs["pandas.read_csv"])


if __name__ == "__main__":
    main()
