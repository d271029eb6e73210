"""The option `--every N`: of the recordings' tests one in N, counted in each file."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="of the tests in each file one in N")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = config.getoption("--every", 1)
    if every == 1:
        return
    kept: list[pytest.Item] = []
    seen: dict[str, int] = {}
    for item in items:
        file = item.nodeid.partition("::")[0]
        number = seen[file] = seen.get(file, -1) + 1
        if number % every == 0:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
