import pytest


@pytest.fixture
def compiled_anew(monkeypatch):
    """What was compiled, as in a process that has compiled nothing yet."""
    from chainrule.bridges.lowering.backends import compile  # needs torch

    monkeypatch.setattr(compile, "COMPILED", {})
    return compile.COMPILED
