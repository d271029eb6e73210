"""The classes of `chainrule.torch_optimizers` in the registries of others."""

import importlib
from collections.abc import Callable
from typing import Any

from chainrule.bridges.torch_named import CLASSES, Named


def register_timm() -> list[str]:
    """Registers the classes with timm: `timm.optim.create_optimizer_v2(model, opt="chainrule-stam")`.

    Returns:
      The names under which timm knows them.

    Raises:
      ImportError: timm is not installed.
    """
    factory = importlib.import_module("timm.optim")._optim_factory
    infos = [_timm_info(factory.OptimInfo, cls) for cls in CLASSES.values()]
    known = factory.default_registry.list_optimizers()
    for info in infos:
        if info.name not in known:
            factory.default_registry.register(info)
    return [info.name for info in infos]


def _timm_info(info: Callable[..., Any], cls: type[Named]) -> Any:
    arguments = cls.own()
    return info(
        name=f"chainrule-{cls.__name__.lower()}",  # timm takes what stands before a `_` for a wrapper's name
        opt_class=cls,
        description=(cls.__doc__ or "").partition("\n")[0],
        has_eps="eps" in arguments,
        has_betas="betas" in arguments,
    )
