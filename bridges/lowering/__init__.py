"""JAX programs as torch programs: ``lower`` translates a jaxpr to a ``torch.fx`` graph."""

from chainrule.bridges.lowering.arrays import to_jax, to_torch, torch_dtype
from chainrule.bridges.lowering.errors import LoweringError, UnsupportedPrimitive
from chainrule.bridges.lowering.program import Lowered, lower, lower_jaxpr

__all__ = [
    "Lowered",
    "LoweringError",
    "UnsupportedPrimitive",
    "lower",
    "lower_jaxpr",
    "to_jax",
    "to_torch",
    "torch_dtype",
]
