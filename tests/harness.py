"""Trees and runs for the tests of transformations."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bounds


def random_tree(shapes: Any, seed: int, dtype: Any = jnp.float32) -> Any:
    """Normal leaves in the given shapes; complex if `dtype` is."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        x = rng.normal(size=shape)
        return jnp.asarray(
            x + 1j * rng.normal(size=shape) if jnp.issubdtype(dtype, jnp.complexfloating) else x,
            dtype,
        )

    return jax.tree.map(leaf, shapes, is_leaf=lambda node: isinstance(node, tuple))


def flat(tree: Any) -> dict[str, np.ndarray]:
    """The leaves by path."""
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflat(leaves: Mapping[str, np.ndarray], like: Any) -> Any:
    """The tree of `like` from its leaves by path."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in flat(like)])


def run(
    tx: optax.GradientTransformation, params: Any, grads: list[Any], state: Any = None, **extra: Any
):
    """Updates of every step and the last state; the parameters move by the updates, if they can."""
    state = tx.init(params) if state is None else state
    seen = []
    for g in grads:
        updates, state = tx.update(g, state, params, **extra)
        params = optax.apply_updates(params, updates)
        seen.append(updates)
    return seen, state


def signature_of(tree: Any) -> Any:
    """Structure, shapes, dtypes and weak types: what decides whether `jit` compiles again."""

    def aval(x):
        return (
            jax.typeof(x)
            if not isinstance(x, jax.ShapeDtypeStruct)
            else (x.shape, x.dtype, x.weak_type)
        )

    leaves, structure = jax.tree.flatten(tree)
    return structure, [aval(x) for x in leaves]


def compiled_once(f: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit(f)`, of which a second trace is an error."""
    chex.clear_trace_counter()  # it counts by the place in the source, of all tests
    return jax.jit(chex.assert_max_traces(f, n=1))


def assert_close(actual: Any, expected: Any, rtol: float = bounds.stepped(12)) -> None:
    """Leaf by leaf, within `rtol` of the largest finite entry of the expected leaf."""
    a, e = flat(actual), flat(expected)
    assert a.keys() == e.keys()
    for path in e:
        x, y = np.asarray(a[path]), np.asarray(e[path])
        kind = np.complex128 if np.iscomplexobj(y) else np.float64
        if not (np.issubdtype(x.dtype, np.inexact) or x.dtype == jnp.bfloat16):
            np.testing.assert_array_equal(x, y, err_msg=path)
            continue
        x, y = x.astype(kind), y.astype(kind)
        scale = np.max(np.abs(y), initial=0.0, where=np.isfinite(y))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale, err_msg=path)


def assert_identical(actual: Any, expected: Any) -> None:
    """Same structure, dtypes and bits."""
    chex.assert_trees_all_equal(actual, expected, strict=True)
