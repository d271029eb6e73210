"""The named optimizers: each a chain of atoms, nothing else."""

from chainrule.chains.adam import adam, nadam
from chainrule.chains.stam import stam, stam_lite

__all__ = ["adam", "nadam", "stam", "stam_lite"]
