r"""Orthogonalises matrices: a quintic polynomial, applied a few times, brings singular values near one.

    X_0     = G / (|G|_F + eps)
    X_{k+1} = a X_k + b (X_k X_k^H) X_k + c (X_k X_k^H)^2 X_k
    u       = s(rows, columns) X_steps

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, and its
repository. Departure: float32 instead of bfloat16 by default, reached by the Gram matrix where that is
cheaper (`_gram_iteration`), and a zero matrix never meets eps.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from chainrule.transforms._checks import check_bounds, check_choice, check_params
from chainrule.transforms._gram_iteration import SCALINGS, iterate
from chainrule.transforms._matrix_axes import as_leaf, matrices_of, matrix_axes
from chainrule.transforms._numerics import abs_sq, root, up
from chainrule.transforms._polar_coefficients import COEFFICIENTS as COEFFICIENTS
from chainrule.transforms._polar_coefficients import PRECONDITIONING, STEPS, Triple
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._sharding import check_sharding, laid_out, lie_as, parts_of, whole
from chainrule.transforms._trees import path_name
from chainrule.transforms._words import checked_words

Axes = tuple[Sequence[int], Sequence[int]]


@checked_words
def newton_schulz(
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "keller_jordan",
    steps: int | None = None,
    *,
    preconditioning: str | None = None,
    eps: jax.typing.ArrayLike = 1e-7,
    eps_scope: str = "added",
    scale: str | None = "spectral",
    scale_factor: jax.typing.ArrayLike = 1.0,
    scale_axes: tuple[int, int] | str = "in_out",
    dims: str | Axes | Callable[[str, tuple[int, ...]], str | Axes] = "batched",
    dual_norm: bool = False,
    dtype: Any = None,
    gram: bool | str = "auto",
    sharding: NamedSharding | None = None,
) -> optax.GradientTransformation:
    r"""Replaces each matrix by a nearby one with orthonormal rows or columns, times a factor of its shape.

    $$X_{k+1} = a X_k + b (X_k X_k^H) X_k + c (X_k X_k^H)^2 X_k, \quad X_0 = G / (\|G\|_F + \epsilon)$$

    A zero matrix stays zero. A NaN or infinite entry makes its whole matrix NaN, finite ones whose squares
    overflow make it zero: put `zero_nonfinite` before it if gradients may hold any. Complex matrices work,
    with the conjugate transpose.

    Args:
      coefficients: a name in `COEFFICIENTS`, a triple (a, b, c), or one triple a step, the last of which is
        repeated. After five steps, singular values in [1e-3, 1] are off from one by at most 0.53
        (`"keller_jordan"`, `"dion"`), 0.15 (`"polar_express"`), 0.11 (`"cans"`), 0.98 (`"classical"`) and
        0.99 (`"cubic"`); after eight, by at most 0.32, 0.022, 1e-10, 1e-10, 0.85 and 0.975. Recommended:
        `"polar_express"`, which takes the default's time and comes nearer to one on every spectrum that `chainrule
        bench newton_schulz` has, in bfloat16 too. The default is what published runs of Muon use, and whether training
        gains by the difference is not shown. `"cans"` has no margin for rounding: float32 only.
      steps: number of steps, an integer in [1, 100); `None`: 4 for `"aol"`, else 5.
      preconditioning: what X_0 is divided by: `"frobenius"`, the Frobenius norm of G; `"schatten"`, its Schatten
        4-norm, nearer to the largest singular value; `"aol"`, each row (column of a tall G) by a number of its own,
        which brings singular values nearer to one another, and orthogonalises another matrix than G; `None`: `"aol"`
        for coefficients `"aol"`, else `"frobenius"`. As in optax.contrib.muon.
      eps: keeps the division by the norm finite, at least 0.
      eps_scope: `"added"`, divide by |G| + eps; `"clamped"`, by max(|G|, eps) (torch.optim.Muon).
      scale: s of the shape: `"spectral"`, sqrt(max(1, out / in)) (Jordan et al.); `"rms"`,
        sqrt(max(out, in)), which with `scale_factor=0.2` gives updates the RMS of AdamW's (Liu et al.);
        `None`, 1.
      scale_factor: multiplies s, positive (KerasOptimizers at 00a4bde: 0.2).
      scale_axes: what `out` and `in` are: `"in_out"`, the matrix's columns and rows (kernels of Flax
        and Keras; optax.contrib.muon); `"out_in"`, its rows and columns (torch.nn.Linear;
        torch.optim.Muon); or two axes (out, in) of the leaf as it is, before `dims`: (-2, -1) is
        KerasOptimizers.
      dims: how a leaf of more than two axes is read: `"batched"`, matrices in the last two axes, each
        by itself; `"hwio"`, one matrix (all axes but the last, last), so that an HWIO kernel is
        (kh kw in, out); `"oihw"`, one matrix (first axis, all the others), so that an OIHW kernel is
        (out, in kh kw) (KerasOptimizers does this to HWIO kernels); a pair of sequences of axes
        (rows, columns), the others batched; or a function from the leaf's slash-joined path and shape
        to one of these.
      dual_norm: multiply by the inner product of the matrix with its orthogonalisation, its dual norm
        (Bernstein & Newhouse; `adaptive` in optax.contrib.muon).
      dtype: dtype of the iteration, default the update's but float32 at least. Complex leaves stay
        complex64 at least.
      gram: `False`, form X in every step; `True`, keep the Gram matrix over all steps, which loses
        small singular values; `"auto"`, the cheapest sequence of steps that loses none.
      sharding: spreads the iteration over devices: matrices of one shape and dtype are stacked, and the stack's
        first axis lies as this says, such as `NamedSharding(mesh, PartitionSpec("data"))`, so that each device
        iterates on matrices of its own. `None`: each leaf by itself, as XLA partitions its products.

    Returns:
      A `optax.GradientTransformation`.

    Raises:
      ValueError: an argument outside its range; coefficients `"cans"` with a `dtype` of half precision; a leaf of fewer
        than two axes; axes that a leaf does not have.
      TypeError: a leaf that is not floating point or complex; `steps` that are no integer; `sharding` that has no mesh.

    >>> tx = newton_schulz(steps=10, coefficients="classical")
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> print(tx.update(g, tx.init(g))[0].round(3))
    [[ 1.  0.]
     [ 0. -1.]]

    References:
      Jordan et al., https://kellerjordan.github.io/posts/muon/
      Liu et al., "Muon is Scalable for LLM Training", https://arxiv.org/abs/2502.16982
      Amsel et al., "The Polar Express", https://arxiv.org/abs/2505.16932
      Grishina et al., "Accelerating Newton-Schulz Iteration" (CANS), https://arxiv.org/abs/2506.10935
      Boissin et al., "Turbo-Muon" (AOL), https://arxiv.org/abs/2512.04632
    """
    if steps is None:
        steps = STEPS.get(str(coefficients), 5)
    if preconditioning is None:
        preconditioning = PRECONDITIONING.get(str(coefficients), "frobenius")
    check_bounds("newton_schulz", steps=steps, eps=eps, scale_factor=scale_factor)
    check_choice("newton_schulz", "preconditioning", preconditioning, SCALINGS)
    check_choice("newton_schulz", "eps_scope", eps_scope, ("added", "clamped"))
    check_choice("newton_schulz", "scale", scale, ("spectral", "rms", None))
    check_choice("newton_schulz", "gram", gram, (False, True, "auto"))
    if isinstance(scale_axes, str):
        check_choice("newton_schulz", "scale_axes", scale_axes, ("in_out", "out_in"))
    if isinstance(dims, str):
        check_choice("newton_schulz", "dims", dims, ("batched", "hwio", "oihw"))
    if not hasattr(steps, "__index__"):
        raise TypeError(f"newton_schulz: `steps` must be an integer, got {steps!r}")
    if sharding is not None:
        check_sharding("newton_schulz", sharding)
    triples = _triples(coefficients, operator.index(steps))
    if coefficients == "cans" and dtype is not None and jnp.finfo(dtype).eps > 2**-20:
        raise ValueError(
            'newton_schulz: coefficients "cans" have no margin for rounding, and diverge in '
            f'{jnp.dtype(dtype).name}; use "polar_express", which have, or dtype=None'
        )

    def shape_factor(shape: tuple[int, ...], rows: int, cols: int) -> float:
        if scale is None:
            return 1.0
        if isinstance(scale_axes, str):
            out, in_ = (rows, cols) if scale_axes == "out_in" else (cols, rows)
        else:
            out, in_ = (shape[axis] for axis in scale_axes)
        return math.sqrt(max(1.0, out / max(in_, 1)) if scale == "spectral" else max(out, in_))

    def orthogonalized(matrices: jax.Array) -> jax.Array:
        x = matrices
        if dtype is not None:
            x = x.astype(jnp.promote_types(dtype, jnp.complex64) if jnp.iscomplexobj(x) else dtype)
        norm = root(jnp.sum(abs_sq(x), axis=(-2, -1), keepdims=True))
        divisor = norm + eps if eps_scope == "added" else jnp.maximum(norm, eps)
        x = x / jnp.where(norm == 0, 1, divisor).astype(x.dtype)
        x = up(iterate(x, triples, gram, preconditioning))
        return x * jnp.sum(matrices.conj() * x, axis=(-2, -1), keepdims=True) if dual_norm else x

    def new_leaves(paths: Sequence[Any], leaves: Sequence[jax.Array]) -> list[jax.Array]:
        axes = [
            matrix_axes(path_name(p), g.shape, dims) for p, g in zip(paths, leaves, strict=True)
        ]
        matrices = [matrices_of(whole(g), *a) for g, a in zip(leaves, axes, strict=True)]
        if sharding is None:
            found = list(map(orthogonalized, matrices))
        else:
            found = _in_stacks(orthogonalized, matrices, sharding)
        return [
            lie_as(g, as_leaf(x * (shape_factor(g.shape, *x.shape[-2:]) * scale_factor), g, *a))
            for g, a, x in zip(leaves, axes, found, strict=True)
        ]

    def init(params: Tree) -> optax.EmptyState:
        check_params("newton_schulz", params)
        jax.tree_util.tree_map_with_path(
            lambda path, p: matrix_axes(path_name(path), jnp.shape(p), dims), params
        )
        return optax.EmptyState()

    def update(
        updates: Tree, state: optax.EmptyState, params: Tree = None
    ) -> tuple[Tree, optax.EmptyState]:
        del params
        check_params("newton_schulz", updates)
        found, structure = jax.tree_util.tree_flatten_with_path(updates)
        paths, leaves = [path for path, _ in found], [leaf for _, leaf in found]
        return jax.tree.unflatten(structure, new_leaves(paths, leaves)), state

    return optax.GradientTransformation(*typed(init, update))


def _triples(coefficients: Any, steps: int) -> list[Triple]:
    """The coefficients of each step."""
    if isinstance(coefficients, str):
        check_choice("newton_schulz", "coefficients", coefficients, tuple(COEFFICIENTS))
        coefficients = COEFFICIENTS[coefficients]
    nested: list[Any] = list(coefficients)
    if nested and not isinstance(nested[0], (list, tuple)):
        nested = [nested]
    if not nested or any(len(triple) != 3 for triple in nested):
        raise ValueError(
            "newton_schulz: `coefficients` must be a name, three numbers or a sequence of three "
            f"numbers a step, got {coefficients!r}"
        )
    return [nested[min(step, len(nested) - 1)] for step in range(steps)]


def _in_stacks(
    f: Callable[[jax.Array], jax.Array], xs: Sequence[jax.Array], sharding: NamedSharding
) -> list[jax.Array]:
    """`f` of every array of matrices, those of one shape and dtype in a stack that lies as `sharding` says."""
    found: dict[int, jax.Array] = {}
    kinds = [(x.shape[-2:], x.dtype) for x in xs]
    for kind in dict.fromkeys(kinds):
        own = [i for i, other in enumerate(kinds) if other == kind]
        parts = [xs[i].reshape(-1, *kind[0]) for i in own]
        stack = jnp.concatenate(parts)
        # As many as the devices share evenly: a matrix of zeros stays one.
        missing = -len(stack) % parts_of(sharding)
        stack = jnp.pad(stack, ((0, missing), (0, 0), (0, 0)))
        # One gather of the results: left to itself XLA takes them apart one by one.
        made = laid_out(f(laid_out(stack, sharding)), NamedSharding(sharding.mesh, PartitionSpec()))
        made = jnp.split(made, list(itertools.accumulate(map(len, parts))))
        found |= {i: made[k].reshape(xs[i].shape) for k, i in enumerate(own)}
    return [found[i] for i in range(len(xs))]
