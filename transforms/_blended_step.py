"""The step of `scale_by_dual_ema` by the kernel's tier 2, on moments as arrays and in codes."""

import dataclasses
from typing import Any, TypeVar

import jax
import optax

from chainrule.transforms.quantized_state import Quantized

_State = TypeVar("_State", bound=Any)


def _format(x: Any) -> tuple[int, int] | None:
    return (x.bits, x.block) if isinstance(x, Quantized) else None


def blended_step(
    updates: optax.Updates, state: _State, numbers: dict[str, Any]
) -> tuple[optax.Updates, _State]:
    """The directions and the new moments, by one primitive for all tensors that are held alike.

    Args:
      updates: the gradients.
      state: the moments before this step; first moments may be in codes.
      numbers: arguments of `chainrule.native.xla.tier2`.
    """
    from chainrule.native import xla

    trees = {"updates": updates, "mu": state.mu, "mu_long": state.mu_long, "nu": state.nu}
    structure = jax.tree.structure(updates)  # tensors in codes are subtrees beside their gradients
    old = {name: structure.flatten_up_to(tree) for name, tree in trees.items() if tree is not None}
    new: dict[str, list[Any]] = {name: list(tensors) for name, tensors in old.items()}
    alike: dict[Any, list[int]] = {}
    for i, m in enumerate(old["mu"]):
        alike.setdefault(_format(m), []).append(i)
    for held, members in alike.items():
        given: dict[str, Any] = {name: [ts[i] for i in members] for name, ts in old.items()}
        gradients, nu = given.pop("updates"), given.pop("nu", None)
        if held is None:
            results = xla.tier2(gradients, nu=nu, **given, **numbers)._asdict()
        else:
            codes = {
                k: xla.Codes([q.codes for q in qs], [q.scale for q in qs])
                for k, qs in given.items()
            }
            bits, block = held
            step = xla.tier2_quantized(gradients, nu=nu, bits=bits, block=block, **codes, **numbers)
            results = step._asdict()
            for name, qs in given.items():
                pairs = zip(qs, *results[name], strict=True)
                results[name] = [dataclasses.replace(q, codes=c, scale=s) for q, c, s in pairs]
        for name in old:
            for i, tensor in zip(members, results[name], strict=True):
                new[name][i] = tensor
    after = {name: jax.tree.unflatten(structure, tensors) for name, tensors in new.items()}
    return after.pop("updates"), state._replace(**after)
