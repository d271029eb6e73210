"""`flax.serialization` of states: how Flax saves and restores the classes in them that are no NamedTuples.

Flax keeps a table from exact type to two functions, and knows no other way in. This package does not import Flax; so
the types are entered at once where Flax is there already, else by whoever imports it, right after.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax.numpy as jnp

from chainrule.transforms._per_parameter import PerParameter
from chainrule.transforms.quantized_state import Quantized
from chainrule.transforms.tiered_state import Assignment

_MODULE = "flax.serialization"


def _dynamic(node: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]


def _register(flax: ModuleType) -> None:
    def saved(node: Any) -> dict[str, Any]:
        return {name: flax.to_state_dict(getattr(node, name)) for name in _dynamic(node)}

    def restored(target: Any, state: dict[str, Any]) -> Any:
        new = {}
        for name in _dynamic(target):
            old, new[name] = getattr(target, name), state[name]
            if jnp.shape(new[name]) != jnp.shape(old):
                raise ValueError(
                    f"{type(target).__name__}: `{name}` was saved with shape {jnp.shape(new[name])}, the target "
                    f"has shape {jnp.shape(old)}; make the target with the chain and the parameters of the state "
                    "that was saved"
                )
        return dataclasses.replace(target, **new)

    def saved_tiers(assignment: Assignment) -> dict[str, Any]:
        return {"tiers": flax.to_state_dict(assignment.tiers)}

    def restored_tiers(target: Assignment, state: dict[str, Any]) -> Assignment:
        tiers = tuple(state["tiers"][str(i)] for i in range(len(state["tiers"])))
        if tiers != target.tiers:
            raise ValueError(
                f"TieredState: saved with its tensors in tiers {tiers}, the target has them in {target.tiers}; make "
                f"the target with `chainrule.transforms.assign(tx.init(params), {tiers}, params)`"
            )
        return target

    flax.register_serialization_state(PerParameter, saved, restored)
    flax.register_serialization_state(Quantized, saved, restored)
    flax.register_serialization_state(Assignment, saved_tiers, restored_tiers)


class _Loader(importlib.abc.Loader):
    """The loader of a module, which also calls `then` with the module."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]):
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Has `_register` called when Flax is imported, and is gone then."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _MODULE:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self._imported)
                return spec
        return None

    def _imported(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        _register(module)


def register() -> None:
    """Enters the types now, or when `flax.serialization` is imported."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _AfterImport())
