"""The package as it is installed: version, typing marker, what an import pulls in."""

import importlib.metadata
import importlib.resources
import importlib.util
import subprocess
import sys

import pytest

import chainrule


def imported_by(statement):
    code = f"import sys; {statement}; print(*sorted(m for m in sys.modules if '.' not in m))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_version_is_the_installed_one():
    assert chainrule.__version__ == importlib.metadata.version("chainrule")


def test_type_information_is_shipped():
    assert importlib.resources.files("chainrule").joinpath("py.typed").is_file()


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="TorchBridge needs torch")
def test_every_public_name_exists():
    for module in (chainrule, chainrule.chains, chainrule.transforms):
        names = set(module.__all__) - {"KerasBridge", "keras_optimizers"}  # tests/bridges/keras
        assert all(hasattr(module, name) for name in names), module.__name__


def test_the_core_imports_no_other_framework():
    assert imported_by("import chainrule").isdisjoint(
        {"torch", "keras", "tensorflow", "flax", "chex", "sklearn", "matplotlib", "rich"}
    )


@pytest.mark.parametrize(
    ("name", "extra"),
    [("TorchBridge", "torch"), ("torch_optimizers", "torch"), ("KerasBridge", "keras")],
)
def test_a_name_without_its_extra_says_what_to_install(name, extra):
    """In an interpreter where the framework cannot be found."""
    code = (
        f"import sys; sys.modules[{extra!r}] = None; import chainrule\n"
        f"try: chainrule.{name}\nexcept ModuleNotFoundError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert f'pip install "chainrule[{extra}]"' in result.stdout


def test_the_rooms_are_not_importable_on_their_own():
    code = "import importlib.util as u; print([n for n in ('transforms', 'bridges') if u.find_spec(n)])"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
