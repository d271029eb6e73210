"""The recorded variants that are not followed, each with its reason.

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

NOT_FOLLOWED = [
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
