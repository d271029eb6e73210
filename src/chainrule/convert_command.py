"""`chainrule convert`: the state of an optimizer in a file, as that of another library's optimizer in another file.

    chainrule convert checkpoint.pt --key optimizer --from torch.adamw --to optax.adamw --params model.pt -o state.npz

A `.pt` file is one of `torch.save`; parameters are a state dict of a model. An `.npz` file holds the variables of Keras
as "0", "1", ..., or the leaves of a state of optax by their paths, `jax.tree_util.keystr(path, simple=True,
separator="/")`.
Nothing is written unless all fits; the file appears whole or not at all.
"""

import os
import pathlib
import pickle
import sys
import zipfile
from typing import Any

import jax
import numpy as np
import optax

from chainrule.bridges.hub import convert_state


class BadFile(ValueError):
    """A file that is not what it should be."""


def _read(path: pathlib.Path, key: str | None = None) -> Any:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as data:
                return dict(data)
        import torch

        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file") from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise BadFile(
            f"{path}: truncated, or no file of torch.save or numpy.savez ({reason})"
        ) from error
    for part in key.split(".") if key else ():
        if not isinstance(found, dict) or part not in found:
            known = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
            raise BadFile(f"{path}: no entry {part!r}; it has {known}")
        found = found[part]
    return found


def _paths(tree: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _tree(form: str, leaves: dict[str, Any], params: dict[str, Any]) -> Any:
    """A state of optax from its leaves by their paths."""
    make = getattr(optax.contrib if form == "optax.muon" else optax, form.partition(".")[2])
    more = {"momentum": 0.9} if form == "optax.sgd" else {}
    like = make(1e-3, **more).init({name: np.asarray(p) for name, p in params.items()})
    paths = _paths(like)
    if set(paths) != set(leaves):
        odd = sorted(set(paths) ^ set(leaves))[0]
        raise BadFile(f"the state is not that of {form}: {odd!r} is in one and not in the other")
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in paths])


def _write(path: pathlib.Path, state: Any, form: str) -> None:
    is_torch = form.partition(".")[0] in ("torch", "lion_pytorch")
    if path.suffix != (".pt" if is_torch else ".npz"):
        raise BadFile(
            f"{path}: a state of {form} is written to a .pt file if it is torch's, else to .npz"
        )
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        if is_torch:
            import torch

            torch.save(state, file)
        elif form.startswith("optax."):
            leaves = dict(zip(_paths(state), map(np.asarray, jax.tree.leaves(state)), strict=True))
            np.savez(file, **leaves)  # pyright: ignore[reportArgumentType]
        else:
            np.savez(file, **state)
    os.replace(part, path)


def main(
    checkpoint: pathlib.Path,
    from_: str,
    to: str,
    params: pathlib.Path,
    out: pathlib.Path,
    key: str | None,
    like: pathlib.Path | None,
    **numbers: Any,
) -> int:
    """Converts a file; returns the exit status."""
    try:
        named = _read(params)
        state = _read(checkpoint, key)
        if from_.startswith("optax."):
            state = _tree(from_, state, named)
        found = _read(like) if like else None
        new = convert_state(state, from_, to, named, like=found, **numbers)
        _write(out, new, to)
    except (TypeError, ValueError) as error:
        sys.stderr.write(f"chainrule convert: {error}\n")
        return 1
    sys.stdout.write(f"{out}: the state of {to} for {len(named)} parameters\n")
    return 0
