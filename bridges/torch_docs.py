"""Docstrings of the named classes of torch: the chain's table and arguments, under torch's names."""

import inspect
import re
from collections.abc import Callable, Mapping

_OF_BRIDGE = {
    "params": "parameters, parameter groups, or `named_parameters()`.",
    "compile": 'run the step through Inductor instead of op by op; `"reduce-overhead"`: on CUDA as a CUDA graph too.',
    "engine": '`"torch"`, or `"xla"` for chains that hold a primitive without a lowering.',
    "rounding": 'None, round to nearest, or `"stochastic"`, for bfloat16 parameters.',
}
_ENTRY = re.compile(r"  (\w+): (.*)")


def _section(text: str, heading: str) -> list[str]:
    """The lines of a section of a docstring."""
    return text.partition(f"\n{heading}:\n")[2].partition("\n\n")[0].splitlines()


def _entries(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if match := _ENTRY.match(line):
            name = match[1]
            found[name] = match[2]
        else:
            found[name] += f"\n{line}"
    return found


def documented(
    own: str,
    chain: Callable[..., object],
    signature: inspect.Signature,
    told: Mapping[str, str],
    pairs: Mapping[tuple[str, str], str],
    names: Mapping[str, str],
) -> str:
    """The docstring of a class.

    Args:
      own: what the class says itself, and its examples.
      chain: the function that makes the chain.
      signature: of the class.
      told: what the class says of its own arguments.
      pairs: two arguments of the chain -> what the class calls the pair.
      names: an argument of the chain -> what the class calls it.
    """
    text, _, examples = inspect.cleandoc(own).partition("\n>>> ")
    of_chain = inspect.getdoc(chain) or ""
    args = _entries(_section(of_chain, "Args"))
    for (one, other), name in pairs.items():
        if one in args and other in args:
            args.setdefault(name, f"(`{one}`, `{other}`): {args[one]} {args[other]}")
    args = {names.get(name, name): meaning for name, meaning in args.items()}
    args |= {**_OF_BRIDGE, **told}
    table = "\n".join(line for line in of_chain.splitlines() if line.startswith("|"))
    listed = "\n".join(f"  {name}: {args[name]}" for name in signature.parameters)
    parts = [text.strip(), table, f"Args:\n{listed}"]
    return "\n\n".join([*parts, f">>> {examples.strip()}"] if examples else parts) + "\n"
