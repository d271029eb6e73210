"""The named optimizers: each a chain of atoms, nothing else."""

from chainrule.chains.adam import adam
from chainrule.chains.stam import stam, stam_lite

__all__ = ["adam", "stam", "stam_lite"]
