"""Step time of `TorchWrap` against its base and one more pass over the parameters.

    python benchmarks/speed/wrap_step.py                 # both lists
    python benchmarks/speed/wrap_step.py small --rounds 5

The yardstick is what the links cannot do without: the base's step, a copy of the parameters before it, and one pass
after it that reads parameters, copies and gradients and writes the parameters (`torch._foreach_lerp_`, the blend of the
original Magma). Contenders take turns in one process; a ratio is the median over rounds.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from shapes import LISTS
from torch_step import RATE, Contender, show_steps

from chainrule import TorchWrap
from chainrule import transforms as ct

Params = list[torch.nn.Parameter]
YARDSTICK = "base and pass"


class Blended(torch.optim.AdamW):
    """A base whose step is followed by the one pass."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = self.param_groups[0]["params"]
        if not hasattr(self, "old"):
            self.old = [torch.empty_like(p) for p in params]
        torch._foreach_copy_(self.old, params)  # pyright: ignore[reportPrivateImportUsage]
        super().step()
        torch._foreach_lerp_(params, self.old, 0.5)  # pyright: ignore[reportPrivateImportUsage]


def base(params: Params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=RATE, fused=True)


def around(make: Callable[[], dict[str, Any]], compile: bool) -> Callable[[Params], Any]:
    return lambda params: TorchWrap(base(params), **make(), compile=compile)


LINKS: dict[str, Callable[[], dict[str, Any]]] = {
    "after: magma": lambda: {"after": ct.momentum_alignment_mask()},
    "after: cautious": lambda: {"after": ct.cautious(negated=True)},
    "before: grokfast": lambda: {"before": ct.grokfast_ema()},
}


def contenders() -> list[Contender]:
    """The yardstick, the base alone, and every link, compiled and eager."""
    found = [
        Contender(YARDSTICK, lambda p: Blended(p, lr=RATE, fused=True), YARDSTICK),
        Contender("base", base, YARDSTICK),
    ]
    for name, make in LINKS.items():
        for compile in (True, False):
            label = f"{name}, {'compiled' if compile else 'eager'}"
            found.append(
                Contender(label, around(make, compile), YARDSTICK, 1.1 if compile else None)
            )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lists", nargs="*", help="of gpt and small; default both")
    parser.add_argument("--rounds", type=int, default=15, help="rounds counted (default 15)")
    parser.add_argument("--json", type=Path, help="also keep the rows there")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    for listed in args.lists or ("gpt", "small"):
        inner = 20 if listed == "small" else 1
        table = f"around-adamw-{listed}"
        show_steps(table, LISTS[listed], contenders(), inner, args.rounds, args.json)


if __name__ == "__main__":
    main()
