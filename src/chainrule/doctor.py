"""`chainrule doctor`: what is installed, what the kernel runs on, and the command that mends what is missing."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import subprocess
import sys
import warnings

import jax

import chainrule
from chainrule import native
from chainrule.showing import columns

EXTRAS = ("torch", "keras", "demo", "evidence", "clients")
"""The extras that a user may want, in the order in which they are shown."""
_BASE = ("optax", "numpy", "scipy", "rich", "typer")
_BACKENDS = ("torch", "keras", "tensorflow", "tensorflow-cpu", "flax", "equinox")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def needed(extra: str) -> list[str]:
    """The distributions that an extra asks for, those of extras that it includes too.

    >>> needed("torch")
    ['torch']
    """
    found: list[str] = []
    for line in importlib.metadata.requires("chainrule") or []:
        match = re.match(rf"([\w.-]+)(?:\[([\w, -]+)\])?.*extra == ['\"]{extra}['\"]", line)
        if match and match[1] == "chainrule":
            found += [name for inner in match[2].split(",") for name in needed(inner.strip())]
        elif match:
            found.append(match[1])
    return found


def _versions() -> list[list[str]]:
    names = ["chainrule", "jax", "jaxlib", *_BASE, *_BACKENDS]
    known = [[name, version] for name in names if (version := _version(name)) is not None]
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    return [["python", platform.python_version()], ["system", system], *known]


def _kernel() -> list[list[str]]:
    known = native.info()
    if not known["available"]:
        return [["compiled", "no"]]
    sets = known["instruction_sets"]
    assert isinstance(sets, list)
    return [
        ["compiled", f"yes, by {known['compiler']}"],
        ["instruction set", f"{known['instruction_set']} (of {', '.join(map(str, sets))})"],
        ["threads", str(known["threads"])],
    ]


def _devices() -> list[list[str]]:
    rows = [["jax", ", ".join(sorted({f"{d.platform}: {d.device_kind}" for d in jax.devices()}))]]
    if importlib.util.find_spec("torch"):
        import torch

        kind = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
        rows.append(["torch", kind])
    if importlib.util.find_spec("keras"):
        rows.append(["keras", os.environ.get("KERAS_BACKEND", "backend of ~/.keras/keras.json")])
    return rows


def missing() -> list[tuple[str, str]]:
    """What is not there, and the command that mends it."""
    found = [
        (f"{extra}: no {', '.join(absent)}", f'pip install "chainrule[{extra}]"')
        for extra in EXTRAS
        if (absent := [name for name in needed(extra) if _version(name) is None])
    ]
    if not native.info()["available"]:
        mend = "pip install --force-reinstall --no-deps .   (in the source tree, with a C++17 compiler)"
        found.insert(0, ("the compiled kernel: chains run in XLA", mend))
    return found


def _works() -> str:
    """Whether a step in a fresh process does what it should."""
    code = (
        "import jax, jax.numpy as jnp, chainrule; tx = chainrule.chains.stam(0.1); p = jnp.ones(8); "
        "u, _ = jax.jit(tx.update)(p, tx.init(p), p); assert bool((u < 0).all()), u"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return "yes" if done.returncode == 0 else f"no: {done.stderr.strip().splitlines()[-1]}"


def report() -> tuple[str, bool]:
    """The text of the command, and whether the base works."""
    with warnings.catch_warnings():  # that the kernel is missing is said in the report
        warnings.simplefilter("ignore", RuntimeWarning)
        works = _works()
        absent = [[what, mend] for what, mend in missing()]
    blocks = [
        ("versions", columns(_versions())),
        ("kernel", columns(_kernel())),
        ("devices", columns(_devices())),
        ("a jitted step works", f"  {works}"),
        ("missing", columns(absent) if absent else "  nothing"),
    ]
    place = pathlib.Path(chainrule.__file__).parent
    text = "\n\n".join(f"{title}\n{rows}" for title, rows in blocks)
    return f"chainrule in {place}\n\n{text}", works == "yes"
