"""The named optimizers: each a chain of atoms, nothing else."""

from chainrule.chains.adam import adam, nadam
from chainrule.chains.casmo import casmo, casmo_snr
from chainrule.chains.cosmic import cosmic
from chainrule.chains.grokfast import grokfast
from chainrule.chains.magma import magma
from chainrule.chains.muon import muon
from chainrule.chains.orthograd import orthograd
from chainrule.chains.stam import stam, stam_lite

__all__ = [
    "adam",
    "casmo",
    "casmo_snr",
    "cosmic",
    "grokfast",
    "magma",
    "muon",
    "nadam",
    "orthograd",
    "stam",
    "stam_lite",
]
