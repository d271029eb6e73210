"""What compiled steps of the torch bridge read and write, stage by stage, in passes over the parameters.

    python benchmarks/speed/traffic.py                             # AdamW, stam, casmo, magma on the large list
    python benchmarks/speed/traffic.py "chains.lamb()" --list small

Nothing is run: the bytes are counted in the program that is compiled. The last column is what a step takes beside
AdamW's, which reads four tensors and writes three, if memory is all that limits it.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent))
from shapes import LISTS

from chainrule.bridges.step.description import describe
from chainrule.bridges.traffic import of_step
from chainrule.expression import chain_of

CHAINS = (
    "optax.adamw(1e-3)",
    "chains.stam(1e-3)",
    "chains.casmo(1e-3)",
    "chains.magma(optax.adamw(1e-3))",
)
ADAMW = 7
LEAST = 0.01
"""Stages that move less than so many passes are left out: they compute scalars."""


def show(text: str, listed: str) -> None:
    structs = {
        f"{i:03}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(LISTS[listed])
    }
    size = sum(4 * s.size for s in structs.values())
    found = of_step(describe(chain_of(text), structs), (), [{} for _ in structs])
    *stages, copied, kernel = found.stages
    rows = [(f"stage {i}", pair) for i, pair in enumerate(stages)]
    for name, (read, written) in (*rows, ("copies", copied), ("kernel", kernel)):
        if read + written >= LEAST * size:
            print(f"  {name:34}{read / size:8.2f}{written / size:9.2f}")
    total = (found.read + found.written) / size
    print(
        f"{text:36}{found.read / size:8.2f}{found.written / size:9.2f}{total:9.2f}{total / ADAMW:9.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chains", nargs="*", default=CHAINS)
    parser.add_argument("--list", choices=LISTS, default="gpt")
    args = parser.parse_args()
    print(f"{args.list:36}{'read':>8}{'written':>9}{'passes':>9}{'/ AdamW':>9}")
    for text in args.chains:
        show(text, args.list)


if __name__ == "__main__":
    main()
