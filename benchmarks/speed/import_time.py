"""How long `import chainrule` takes beside `import optax`, which it imports.

    python benchmarks/speed/import_time.py [--rounds 15] [--modules 12]

Each import is a process of its own; the two take turns. Times are of the import alone, without the interpreter's start.
A table follows of what `import chainrule` spends longest on beyond what optax had imported (`python -X importtime`).
"""

import argparse
import statistics
import subprocess
import sys

NAMES = ("optax", "chainrule")
TARGET = 1.1


def seconds(name: str) -> float:
    code = f"import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(found.stdout)


def own_times() -> list[tuple[int, int, str]]:
    """Microseconds of itself, and with what it imports, and name of each module that chainrule imports beside optax."""
    command = [sys.executable, "-X", "importtime", "-c", "import optax; import chainrule"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    rows = [line.removeprefix("import time:").split("|") for line in lines if "|" in line][1:]
    modules = [(int(own), int(whole), name) for own, whole, name in rows]
    after = next(i for i, (_, _, name) in enumerate(modules) if name.strip() == "optax")
    return modules[after + 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds counted (default 15)")
    parser.add_argument("--modules", type=int, default=12, help="rows of the table (default 12)")
    args = parser.parse_args()
    rounds = [[seconds(name) for name in NAMES] for _ in range(args.rounds + 1)][1:]
    optax, ours = map(statistics.median, zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    print(
        f"import optax {optax:.3f} s, import chainrule {ours:.3f} s: {ratio:.3f} (target {TARGET})"
    )
    print(f"{'ms itself':>10}{'ms in all':>10}  after optax")
    for own, whole, name in sorted(own_times(), reverse=True)[: args.modules]:
        print(f"{own / 1e3:10.1f}{whole / 1e3:10.1f}  {name.rstrip()}")


if __name__ == "__main__":
    main()
