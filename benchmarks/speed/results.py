"""Keeps the rows that a speed table printed, as JSON: README and the site's page of speeds are tested against them."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chainrule.evidence.store import processor


def row(name: str, ms: float, ratio: float | None = None, against: str = "") -> dict[str, Any]:
    """Milliseconds a step, and that over the time of `against` in the same rounds."""
    return {
        "name": name,
        "ms": round(ms, 3),
        "ratio": None if ratio is None else round(ratio, 3),
        "against": against,
    }


def keep(path: Path | None, table: str, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces `table` in the file at `path`, which a run of other tables may have made; without a path, nothing."""
    if path is None:
        return
    found = json.loads(path.read_text()) if path.exists() else {}
    found[table] = {
        "title": title,
        "processor": processor(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "optax", "torch")},
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
