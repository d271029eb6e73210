"""The one table: what every supported JAX primitive becomes in torch.

A rule is ``rule(builder, eqn, *operands)``. It emits fx nodes and returns the value, or the
sequence of values, of the equation's outputs. A primitive that is not here raises
``UnsupportedPrimitive``.
"""

from chainrule.bridges.lowering.builder import Rule
from chainrule.bridges.lowering.rules.control import CONTROL
from chainrule.bridges.lowering.rules.elementwise import ELEMENTWISE
from chainrule.bridges.lowering.rules.kernel import KERNEL
from chainrule.bridges.lowering.rules.numeric import NUMERIC
from chainrule.bridges.lowering.rules.structural import STRUCTURAL

TABLE: dict[str, Rule] = {**ELEMENTWISE, **STRUCTURAL, **NUMERIC, **CONTROL, **KERNEL}
