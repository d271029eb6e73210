"""How long `import chainrule` takes beside `import optax`, which it imports.

    python benchmarks/speed/import_time.py [--rounds 15] [--modules 12]

Each import is a process of its own; the two take turns. Times are of the import alone, without the interpreter's start,
and of modules whose bytecode lies in a cache, as when installed: with PYTHONDONTWRITEBYTECODE a checkout would be
compiled at each import, the packages beside it not. A table follows of what `import chainrule` spends longest on
beyond what optax had imported (`python -X importtime`).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping

NAMES = ("optax", "chainrule")
TARGET = 1.1


def python(*arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, env=environment
    )


def seconds(name: str, environment: Mapping[str, str]) -> float:
    code = f"import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"
    return float(python("-c", code, environment=environment).stdout)


def own_times(environment: Mapping[str, str]) -> list[tuple[int, int, str]]:
    """Microseconds of itself, and with what it imports, and name of each module that chainrule imports beside optax."""
    found = python(
        "-X", "importtime", "-c", "import optax; import chainrule", environment=environment
    )
    lines = found.stderr.splitlines()
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
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        rounds = [[seconds(name, environment) for name in NAMES] for _ in range(args.rounds + 1)]
        modules = sorted(own_times(environment), reverse=True)
    timed = rounds[1:]  # the first filled the cache
    optax, ours = map(statistics.median, zip(*timed, strict=True))
    ratio = statistics.median(b / a for a, b in timed)
    print(
        f"import optax {optax:.3f} s, import chainrule {ours:.3f} s: {ratio:.3f} (target {TARGET})"
    )
    print(f"{'ms itself':>10}{'ms in all':>10}  after optax")
    for own, whole, name in modules[: args.modules]:
        print(f"{own / 1e3:10.1f}{whole / 1e3:10.1f}  {name.rstrip()}")


if __name__ == "__main__":
    main()
