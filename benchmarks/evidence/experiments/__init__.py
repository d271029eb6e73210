"""One file an experiment, `e<number>_<name>.py`, which defines `EXPERIMENT`; found by its name."""

import importlib
import pkgutil

from chainrule.evidence.experiment import Experiment


def names() -> dict[str, str]:
    """The module of every experiment by its id, in the order of their numbers."""
    modules = [m.name for m in pkgutil.iter_modules(__path__)]
    found = {m.partition("_")[0].upper(): f"{__name__}.{m}" for m in modules if m[0] == "e"}
    return dict(sorted(found.items(), key=lambda item: int(item[0][1:])))


def load(id: str) -> Experiment:
    """The experiment `id`, such as "E7"."""
    return importlib.import_module(names()[id]).EXPERIMENT
