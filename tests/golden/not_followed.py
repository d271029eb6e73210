"""The recorded variants and single calls that are not followed, each with its reason.

Reasons are bugs that nobody can want and that therefore have no argument; the corrected behaviour
has a test of its own. Names are matched with `fnmatch`. `test_complete.py` fails if a variant is
neither followed nor listed here, and if a row matches nothing.
"""

from fnmatch import fnmatch
from typing import NamedTuple


class NotFollowed(NamedTuple):
    file: str
    variant: str
    reason: str


_INTERVAL = (
    "quantised only every n-th step and held in full between: the state changes its format every "
    "step and the memory is never saved"
)

_DENORMAL = "XLA takes denormal numbers for zero, so that the scale of such a block is 1"

NOT_FOLLOWED = [
    NotFollowed("cosmic_primitives", "pack/denorm", _DENORMAL),
    NotFollowed("cosmic_primitives", "blocks*/denorm", _DENORMAL),
    NotFollowed(
        "cosmic_primitives",
        "BUG_blocks5_odd/*",
        "blocks of odd length overwrite half a byte of their neighbour; here they may have any length",
    ),
    NotFollowed(
        "cosmic_primitives",
        "BUG_zero_point16/*",
        "the binding loses the zero points, so that what is unpacked is off by each block's offset",
    ),
    NotFollowed("cosmic_quant4", "interval3_tiers", _INTERVAL),
    NotFollowed("cosmic_presets", "memory_quant4", _INTERVAL),
    NotFollowed(
        "stamlite_edge",
        "overflow",
        "one square that overflows sets the tensor's mean square to infinity, and the tensor never moves again",
    ),
]


def reason_not_to_follow(file: str, variant: str) -> str | None:
    for row in NOT_FOLLOWED:
        if fnmatch(file, row.file) and fnmatch(variant, row.variant):
            return row.reason
    return None
