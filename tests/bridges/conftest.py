"""Prints how much of optax matches JAX, after the conformance tests of the bridges."""

import re
from collections import defaultdict
from typing import Any

from optax_cases import NAMED, PAIRED, SCHEDULES, TRANSFORMS, VARIANTS, WRAPPERS

GROUPS = {
    "named optimizers": NAMED,
    "variants": VARIANTS,
    "wrappers": (*WRAPPERS, *PAIRED),
    "transforms": TRANSFORMS,
    "schedules": SCHEDULES,
}
_TEST = re.compile(r"test_optax_conformance\.py::test_(float32|bfloat16)\[(.*)\]$")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ran: dict[str, set[str]] = defaultdict(set)
    passed: dict[str, set[str]] = defaultdict(set)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            match = _TEST.search(report.nodeid)
            if match and report.when == "call":
                ran[match[1]].add(match[2])
                if outcome == "passed":
                    passed[match[1]].add(match[2])
    if not ran:
        return
    terminalreporter.section("optax lowered to torch: cases that match JAX")
    for group, cases in GROUPS.items():
        names = {case.name for case in cases}
        counts = [
            f"{dtype} {len(passed[dtype] & names)} of {len(ran[dtype] & names)}"
            for dtype in ("float32", "bfloat16")
            if ran[dtype] & names
        ]
        if counts:
            terminalreporter.write_line(f"{group:17} {', '.join(counts)}")
    loss = ", ".join(case.name for case in NAMED if case.loss)
    terminalreporter.write_line(f"with a loss written in JAX only: {loss}")
