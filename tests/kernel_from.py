"""A plugin of pytest: `CHAINRULE_KERNEL` is the compiled kernel that the tests run on, not the installed one.

`python -m pytest -p kernel_from ...` with `tests` on the path; see `native/sanitize.sh`.
"""

import importlib.util
import os
import sys

NAME = "chainrule.native._kernel"

file = os.environ.get("CHAINRULE_KERNEL")  # absent where doctests are looked for here
if file is not None:
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module  # where `from chainrule.native import _kernel` looks first


def pytest_report_header() -> str:
    return f"kernel: {file}"
