"""The leaf that carries a first moment *and* the gradient it was made from to the next link."""

from typing import Any, NoReturn

import jax

_REMEDY = (
    "the updates hold a momentum leaf of `adaptive_beta1`, which carries the adapted first moment "
    "and the raw gradient; only `chainrule.transforms.scale_by_adam` and "
    "`chainrule.transforms.scale_by_tensor_rms` read it, so put one of them directly after "
    "`adaptive_beta1` (optax's own scale_by_adam would apply a second, fixed b1)"
)


class _ExplainedInErrors(type):
    # JAX names the type where a jitted function meets a value it cannot take; its own TypeError
    # then has the remedy.
    def __str__(cls) -> str:
        return f"{cls.__name__}: {_REMEDY};"


class MomentumLeaf(metaclass=_ExplainedInErrors):
    """A first moment with its raw gradient and bias correction; one leaf of the updates, between two links.

    It is deliberately no pytree node: `jax.tree.map` in a transform that does not know it meets the
    object itself, and whatever is done to it raises `TypeError` naming the atoms that do.

    Attributes:
      mu: the first moment, in the shape of the parameter, float32 at least.
      grad: the gradient it was made from, same shape, in the gradient's dtype.
      correction: float32 scalar, 1 - prod(b1_i): the weight that `mu` has given to gradients.
      mean_square: scalar, the mean of the squared gradient where `adaptive_beta1` measured it, else
        `None`; not finite where the gradient as it came was not.
    """

    __slots__ = ("correction", "grad", "mean_square", "mu")

    def __init__(
        self,
        mu: jax.Array,
        grad: jax.Array,
        correction: jax.Array,
        mean_square: jax.Array | None = None,
    ):
        self.mu = mu
        self.grad = grad
        self.correction = correction
        self.mean_square = mean_square

    def __repr__(self) -> str:
        return f"MomentumLeaf(shape={self.mu.shape}, dtype={self.grad.dtype})"

    @property
    def __jax_array__(self) -> NoReturn:
        # A property: JAX looks the method up before anything else it does with an operand or a result of `jit`.
        raise TypeError(_REMEDY)

    def __getattr__(self, name: str) -> NoReturn:
        # Protocol look-ups (copy, pickle, NumPy) must see an absent attribute; array attributes get the remedy.
        raise (
            AttributeError(name)
            if name.startswith("_")
            else TypeError(f"`{name}` of a momentum leaf: {_REMEDY}")
        )


def _refuse(self: MomentumLeaf, *_: Any) -> NoReturn:
    raise TypeError(_REMEDY)


for _operator in ("add", "sub", "mul", "truediv", "pow", "matmul", "floordiv", "mod"):
    setattr(MomentumLeaf, f"__{_operator}__", _refuse)
    setattr(MomentumLeaf, f"__r{_operator}__", _refuse)
for _operator in ("neg", "abs", "lt", "le", "gt", "ge", "float", "bool", "array", "format"):
    setattr(MomentumLeaf, f"__{_operator}__", _refuse)
