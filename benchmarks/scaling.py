"""The tables of docs/scaling.md: memory and communication of each chain on models and meshes, by `chainrule.plan`.

    python benchmarks/scaling.py            # prints them (minutes)
    python benchmarks/scaling.py --write    # and puts them into the page

Everything is counted in the programs that the torch bridge would run on the first device; nothing is allocated. Layers
of a model are alike, so programs of `FEW` and of twice as many are counted and the rest is added by the layer, but for
what Muon sends. At the end stands a check: llama-1b's whole program beside what is so added.
"""

import argparse
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import optax

import chainrule
from chainrule import chains
from chainrule.models import Structs, structs_of
from chainrule.planning import Plan, size_text

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "scaling.md"
MODELS = {"llama-1b": 16, "llama-8b": 32, "llama-70b": 80}
"""With their layers."""
DEVICES = (8, 64, 1024)
CHAINS: dict[str, Callable[[], Any]] = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "adam": chains.adam,
    "nadam": chains.nadam,
    "stam": chains.stam,
    "stam_lite": chains.stam_lite,
    "casmo": chains.casmo,
    "casmo_snr": chains.casmo_snr,
    "magma(adamw)": lambda: chains.magma(optax.adamw(1e-3)),
    "grokfast(adamw)": lambda: chains.grokfast(optax.adamw(1e-3)),
    "orthograd(adamw)": lambda: chains.orthograd(optax.adamw(1e-3)),
    "cosmic, lowest tier": chains.cosmic,
    "muon": chains.muon,
}
FEW = 2
OWNED = {"muon"}
"""Whose work is shared out by the tensor: what a device sends is no sum over layers, so the whole program is traced."""


def with_layers(model: str, count: int) -> Structs:
    """The parameters of a model with its first layers only."""

    def is_kept(name: str) -> bool:
        found = re.search(r"layers\.(\d+)\.", name)
        return found is None or int(found[1]) < count

    return {name: s for name, s in structs_of(model).items() if is_kept(name)}


@functools.cache
def counted(name: str, model: str, devices: int, layers: int) -> Plan:
    return chainrule.plan(CHAINS[name](), with_layers(model, layers), mesh=f"fsdp={devices}")


def whole(name: str, model: str, devices: int, of: Callable[[Plan], float]) -> float:
    """A number of the plan of all layers."""
    few, more = (of(counted(name, model, devices, n)) for n in (FEW, 2 * FEW))
    return few + (more - few) * (MODELS[model] - FEW) / FEW


def row(name: str, model: str) -> tuple[list[str], list[str]]:
    """A chain's cells of memory and of communication."""

    def sizes(of: Callable[[Plan], float]) -> list[float]:
        return [whole(name, model, n, of) for n in DEVICES]

    memory = [
        size_text(x)
        for x in (
            whole(name, model, DEVICES[0], lambda p: p.state_bytes),
            *sizes(lambda p: p.state_bytes_here),
        )
    ]
    kinds = [str(len(counted(name, model, n, FEW).collectives)) for n in DEVICES]
    calls = kinds[0] if len(set(kinds)) == 1 else ", ".join(kinds)
    print(f"{model} {name}: {memory}", flush=True)
    exact = [counted(name, model, n, MODELS[model]).sent for n in DEVICES] if name in OWNED else []
    sent = exact or sizes(lambda p: p.sent)
    return memory, [calls, *(size_text(x) if x else "0" for x in sent)]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(model: str) -> str:
    found = {name: row(name, model) for name in CHAINS}
    devices = [f"{n} devices" for n in DEVICES]
    numbers = whole("optax.adamw", model, DEVICES[0], lambda p: p.parameters)
    memory = table(["state", "whole", *devices], [[k, *m] for k, (m, _) in found.items()])
    sent = table(["sent a step", "collectives", *devices], [[k, *c] for k, (_, c) in found.items()])
    title = f"`{model}`, {numbers / 1e9:.2f}B parameters in float32, {size_text(4 * numbers)}"
    return f"{title}:\n\n{memory}\n\n{sent}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    for model in arguments.models:
        text = section(model)
        print(text, flush=True)
        if arguments.write:
            page = re.sub(
                rf"(?s)(<!-- {model} -->\n).*(<!-- end of {model} -->)",
                lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}",
                PAGE.read_text(),
            )
            PAGE.write_text(page)
    for name in ("stam", "casmo_snr"):
        exact = counted(name, "llama-1b", 8, MODELS["llama-1b"])
        for field in ("state_bytes_here", "sent"):
            added = whole(name, "llama-1b", 8, lambda p, field=field: getattr(p, field))
            print(
                f"llama-1b on 8, {name}, {field}: {getattr(exact, field):.6g}, by the layer {added:.6g}"
            )


if __name__ == "__main__":
    main()
