"""JAX programs as torch programs: ``lower`` translates a jaxpr to a ``torch.fx`` graph."""

from chainrule.bridges.lowering.convert import to_jax, to_torch, torch_dtype
from chainrule.bridges.lowering.errors import LoweringError, UnsupportedPrimitive
from chainrule.bridges.lowering.program import Lowered, lower

__all__ = [
    "Lowered",
    "LoweringError",
    "UnsupportedPrimitive",
    "lower",
    "to_jax",
    "to_torch",
    "torch_dtype",
]
