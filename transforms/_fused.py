"""A chain and its step in one pass over memory: what is element-wise in it as one call of generated C++.

XLA on the CPU makes a loop for each result: AdamW's step reads and writes ten tensors where seven are enough.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.core import Tracer

from chainrule.transforms._protocols import Tree

Step = Callable[..., tuple[Tree, Tree]]


def fused(tx: optax.GradientTransformation) -> Step:
    r"""The step of a chain, update and addition, whose element-wise part is one pass over memory on the CPU.

    $$(p, s, g) \mapsto (p + u, s'), \quad (u, s') = \mathrm{update}(g, s, p)$$

    For use inside `jax.jit` with parameters and state donated, which are then written in place. (JAX pairs what is
    donated with results of the same type in order: a function that takes them in another order than it returns them
    gets copies.) The step is traced; what makes the new parameters and state element by element becomes one foreign
    call of C++ that is generated and compiled for it (half a second, once for each chain), which reads and writes each
    tensor once. Counts, schedules, sums over tensors, products of matrices, functions such as `exp` and whatever else
    has no loop stay XLA's. Numbers differ from those of `tx.update` under `jit` by rounding alone.

    XLA computes the whole step on other platforms, on several devices, in `jax.export`, under `vmap` and in
    derivatives, and where the compiled kernel or a C++ compiler (`CXX`, or `c++`) is missing, which a warning says.
    Outside `jax.jit` the step runs operation by operation, as optax does.

    Args:
      tx: any gradient transformation; its state stays what `tx.init` makes.

    Returns:
      A function of the parameters, the state, the gradients and the extra arguments of `tx.update`, by name, which
      returns the new parameters and the new state.

    Raises:
      RuntimeError: when the step is compiled, if the C++ compiler fails.

    >>> tx = optax.adamw(1e-3)
    >>> params = {"w": jax.numpy.ones((8, 4))}
    >>> step = jax.jit(fused(tx), donate_argnums=(0, 1))
    >>> params, state = step(params, tx.init(params), {"w": jax.numpy.ones((8, 4))})
    >>> round(float(params["w"][0, 0]), 6)
    0.999
    """
    tx = optax.with_extra_args_support(tx)

    def step(params: Tree, state: Tree, grads: Tree, **extra: Any) -> tuple[Tree, Tree]:
        def plain(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
            updates, new = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), new

        given = (params, state, grads)
        if not any(isinstance(x, Tracer) for x in jax.tree.leaves(given)):
            return plain(*given)
        # Its imports take a tenth of optax's own time.
        from chainrule.transforms._fused_step import run, updated

        closed, shape = jax.make_jaxpr(plain, return_shape=True)(*given)
        is_alike = jax.tree.structure(shape) == jax.tree.structure(given[:2])
        new = run(closed, jax.tree.leaves(given), updated(closed.jaxpr) if is_alike else {})
        return jax.tree.unflatten(jax.tree.structure(shape), new)

    return step
