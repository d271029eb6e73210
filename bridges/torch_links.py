"""The links that `TorchWrap` puts before and after an optimizer of torch: bridges whose chains write something else.

before: gradients, parameters -> gradients
after:  parameters before and after a step, gradients, the optimizer's moments -> parameters
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from torch import Tensor

from chainrule.bridges.checks import quick_reads
from chainrule.bridges.group_tree import Options
from chainrule.bridges.grouped_optimizer import GroupedOptimizer
from chainrule.bridges.meant import Meant
from chainrule.bridges.step.function import Assigning, as_transformation
from chainrule.bridges.torch_optim import Steps, TorchBridge
from chainrule.transforms._numerics import up

PARAM, OLD = "param", "old"
"""What the chains are given besides: the parameters; what they were before the step."""


def filtering(chain: Any) -> Assigning:
    """A chain that writes the updates it makes of gradients, which go into memory like the parameters'."""
    inner = optax.with_extra_args_support(as_transformation(chain))

    def update(grads: Any, state: Any, params: Any, *, param: Any, **extra: Any) -> Any:
        del params
        updates, state = inner.update(grads, state, param, **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), updates, grads), state

    return Assigning(inner.init, update)


def changing(chain: Any) -> Assigning:
    """A chain whose updates are the change that a step has made, and which writes the parameters.

    Where it leaves a change alone the parameter stays as the step made it, to the bit.
    """
    inner = optax.with_extra_args_support(as_transformation(chain))

    def update(grads: Any, state: Any, params: Any, *, old: Any, **extra: Any) -> Any:
        del grads
        moved = jax.tree.map(lambda new, before: up(new) - up(before), params, old)
        updates, state = inner.update(moved, state, old, **extra)

        def written(new: jax.Array, before: jax.Array, change: jax.Array, u: jax.Array) -> Any:
            return jnp.where(u == change, new, (up(before) + u).astype(new.dtype))

        return jax.tree.map(written, params, old, moved, updates), state

    return Assigning(inner.init, update)


class Links(TorchBridge):
    """A bridge over the parameters of another optimizer, whose chain is `filtering` or `changing`."""

    def __init__(
        self,
        kind: Callable[[Any], Assigning],
        chain: Any,
        params: Iterable[Any],
        given: Iterable[str],
        options: Mapping[str, Any],
    ):
        meant = Meant()
        made, engine = functools.partial(kind, chain), options["engine"]
        own = Options(made, options["compile"], engine, None, meant, tuple(sorted(given)))
        GroupedOptimizer.__init__(self, own, params, {})
        meant.check(p for group in self.param_groups for p in group["params"])

    def params_of(self, steps: Steps) -> list[Tensor]:
        """The parameters with a gradient in the groups that take part."""
        with quick_reads():
            trees = [self._tree(index) for index, _ in steps]
            return [p for tree in trees for p in tree.params if p.grad is not None]

    def carry_out(
        self,
        steps: Steps,
        memory: Sequence[Tensor],
        given: Callable[[str, list[Tensor], list[bool]], list[Tensor]],
    ) -> None:
        """Runs the steps.

        Args:
          steps: what `_ready` returned.
          memory: for each of `params_of` what it was before the optimizer's step, if the chain changes that; else what
            to write in its place.
          given: what the chain is given by another name for parameters, of which those have a gradient; one tensor
            for `"count"`.
        """
        left = iter(memory)
        for index, step in steps:
            tree = self._tree(index)
            params = tree.params
            with quick_reads():
                there = [p.grad is not None for p in params]
            own = [next(left) if has else p for p, has in zip(params, there, strict=True)]
            if OLD not in tree.described.given:
                step.inputs[: len(own)] = own
            for i, has in enumerate(there):
                if not has:  # its own memory may be among what the chain is given
                    step.inputs[i] = params[i].detach().clone()
            reads = tree.described.reads()
            for name in tree.described.given:
                if name == OLD:
                    found = own
                elif name == PARAM or name not in reads:
                    found = params[:1] if name == "count" else params
                else:
                    found = given(name, params, there)
                step.inputs.extend(found)
        self._finish(steps)

    def mirror(self, groups: list[dict[str, Any]]) -> None:
        """Follows the groups of the optimizer inside."""
        own = self.param_groups
        del own[len(groups) :]
        for mine, theirs in zip(own, groups, strict=False):
            mine["params"] = theirs["params"]
        for theirs in groups[len(own) :]:
            self.add_param_group({"params": named(theirs)})
        self._follow()


def named(group: Mapping[str, Any]) -> list[Any]:
    """The parameters of a group, with their names if it has some."""
    names = group.get("param_names")
    return list(group["params"] if names is None else zip(names, group["params"], strict=True))


def buffers(params: Sequence[Tensor], known: dict[Tensor, Tensor]) -> list[Tensor]:
    """Memory like each of the parameters; that in `known` is used again where it fits."""
    found: list[Tensor] = []
    for p in params:
        kept = known.get(p)
        kind = p.shape, p.dtype, p.device
        if kept is None or (kept.shape, kept.dtype, kept.device) != kind:
            kept = known[p] = torch.empty_like(p, requires_grad=False)
        found.append(kept)
    return found
