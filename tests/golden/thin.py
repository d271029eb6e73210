"""Makes this folder's data from the full recordings: `python tests/golden/thin.py FULL_RECORDINGS_DIR`.

Keeps every variant, gradient and per-step log, and of the recorded parameters and updates the
first two steps, the last,
and a few between, so that the folder stays under 8 MB. A replay of the full recordings needs no
change in the tests: set
CHAINRULE_GOLDEN_DIR to their folder.
"""

import sys
import zipfile
from pathlib import Path

import numpy as np

KEEP = 4
WHOLE = {
    "cosmic_quant4.npz"
}  # its packed state is recorded after every step and compared step by step


def thin(source: Path, target: Path) -> None:
    with np.load(source, allow_pickle=False) as data:
        arrays = dict(data)
    if "rec_steps" in arrays and source.name not in WHOLE:
        rows = len(arrays["rec_steps"])
        kept = np.unique(
            np.r_[0, 1, np.linspace(2, rows - 1, min(KEEP, rows) - 2)].round().astype(int)
        )
        for name, value in arrays.items():
            parts = name.split("/")
            if name == "rec_steps" or (len(parts) == 3 and parts[1] in ("p", "u")):
                assert value.shape[0] == rows, name
                arrays[name] = value[kept]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as out:
        for name, value in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")  # without a date: the same file from run to run
            info.compress_type = zipfile.ZIP_LZMA
            with out.open(info, "w") as file:
                np.lib.format.write_array(file, np.asanyarray(value), allow_pickle=False)


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("*.npz")):
        thin(path, Path(__file__).parent / path.name)
