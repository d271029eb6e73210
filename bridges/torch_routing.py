"""Muon's routing of a torch model, by the modules that hold its parameters."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import optax
from torch import Tensor, nn

from chainrule.bridges.meant import Meant
from chainrule.bridges.param_group import Group
from chainrule.transforms import Routing
from chainrule.transforms._layers import named_like
from chainrule.transforms._selection import select
from chainrule.transforms.routing import WORDS, Route, RoutingPlan


def torch_routing(model: nn.Module) -> Routing:
    """A `Routing` that sends the embeddings and output layers of `model` to Adam, whatever they are called.

    Embeddings are modules whose class is `torch.nn.Embedding` or `EmbeddingBag` or has `Embedding` in its name, and
    what is tied to them. Output layers are what `get_output_embeddings()` (transformers) or `get_classifier()` (timm)
    returns, the only linear layer with as many outputs as the largest embedding has entries, and the last layer of a
    model that is a `torch.nn.Sequential`. Names and shapes tell the rest, as in `Routing`. Parameters are known by
    identity: the bridge may be made with `parameters()`, `named_parameters()` or groups of them.

    Args:
      model: the module whose parameters the bridge is made with.

    Returns:
      A `chainrule.transforms.Routing`; print its `plan(dict(model.named_parameters()))`.

    >>> import chainrule
    >>> model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 5, bias=False))
    >>> routing = torch_routing(model)
    >>> print(routing.plan(dict(model.named_parameters())))
    leaf      shape     route  reason
    0.weight  (100, 8)  adam   excluded
    1.weight  (8, 8)    muon   a matrix
    2.weight  (5, 8)    adam   excluded
    >>> optimizer = chainrule.TorchBridge(chainrule.chains.muon(routing=routing), model.parameters())
    """
    found = {p for name, p in model.named_parameters() if _is_named(name)}
    for module in [*_embeddings(model), *_outputs(model)]:
        found |= set(module.parameters(recurse=False))
    return Routing(exclude=found or None)


def _is_named(name: str) -> bool:
    return any(word in name.lower() for word in WORDS) or named_like(name) is not None


def _embeddings(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "Embedding" in type(module).__name__]


def _outputs(model: nn.Module) -> Iterator[nn.Module]:
    for getter in ("get_output_embeddings", "get_classifier"):
        output = getattr(model, getter, lambda: None)()
        if isinstance(output, nn.Module):
            yield from output.modules()
    sizes = [int(m.num_embeddings) for m in model.modules() if isinstance(m, _TABLES)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    sized = [m for m in linears if m.out_features == max(sizes, default=0)]
    if len(sized) == 1:
        yield sized[0]
    if isinstance(model, nn.Sequential):
        layers = [m for m in model.modules() if m._parameters]
        yield layers[-1] if layers else model


_TABLES = (nn.Embedding, nn.EmbeddingBag)


def routed(
    owner: str, params: Any, model: nn.Module | None, exclude: Any
) -> tuple[list[Any], Routing]:
    """Parameters by name, and where Muon sends them.

    Args:
      owner: how messages begin.
      params: a module, parameters, named parameters, or groups of either.
      model: what the parameters belong to: it tells their names, embeddings and output layers.
      exclude: what goes to Adam besides, as of `Routing`.

    Raises:
      ValueError: parameters have no names and nothing tells what they are, or are not those of the model.
    """
    if isinstance(params, nn.Module):
        model, params = params if model is None else model, params.named_parameters()
    groups = [_listed(entry) for entry in params]
    given = [
        p for entry in groups for p in (entry["params"] if isinstance(entry, dict) else [entry])
    ]
    named = all(isinstance(p, tuple) for p in given)
    if model is None:
        if not named and exclude is None:
            raise ValueError(
                f"{owner}: parameters without names do not tell embeddings and output layers, which go to Adam; give "
                "the model in their place, `model.named_parameters()`, `model=model` beside them, or `exclude=[]` to "
                "go by shapes alone"
            )
        return groups, Routing(exclude=exclude or None)
    by_name = dict(model.named_parameters())
    name_of = {p: name for name, p in by_name.items()}
    given = [p[1] if isinstance(p, tuple) else p for p in given]
    for p in given:
        if p not in name_of:
            shape = tuple(getattr(p, "shape", ()))
            raise ValueError(f"{owner}: a parameter of shape {shape} is not in `model`")
    chosen = select(owner, "exclude", exclude or None, by_name)
    known = torch_routing(model).exclude or set()
    excluded = {p for p in given if p in known or chosen[name_of[p]]}
    if not named:
        groups = [
            {**e, "params": [(name_of[p], p) for p in e["params"]]}
            if isinstance(e, dict)
            else (name_of[e], e)
            for e in groups
        ]
    return groups, Routing(exclude=excluded or None)


def _listed(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    params = entry["params"]
    return {**entry, "params": [params] if isinstance(params, Tensor) else list(params)}


def plan_of(routing: Routing, groups: Sequence[Group], meant: Meant) -> RoutingPlan:
    """Where each parameter of a bridge goes, and why; asked as its chain asks.

    Args:
      routing: the chain's.
      groups: the bridge's.
      meant: which parameters of the bridge the routing means.
    """
    routes: list[Route] = []
    for index, group in enumerate(groups):
        tree, where = group.tree, "" if len(groups) == 1 else f"group {index}, "
        inside = set(group.members if tree else ())
        if tree:
            keys = tree.labels if tree.named else list(map(str, range(len(tree.params))))
            found: list[RoutingPlan] = []

            def ask(params: Any, found: list[RoutingPlan] = found) -> tuple[()]:
                found.append(routing.plan(params))
                return ()

            asking = optax.GradientTransformation(ask, optax.identity().update)
            meant.told(asking, dict(zip(tree.params, keys, strict=True))).init(
                tree.described.params
            )
            routes += [
                r if tree.named else replace(r, path=where + r.path) for r in found[0].routes
            ]
        names = group.known.names or [f"{where}{i}" for i in range(len(group.known.params))]
        routes += [
            Route(name, tuple(p.shape), "none", "frozen; it joins with its first gradient")
            for name, p in zip(names, group.known.params, strict=True)
            if p not in inside
        ]
    return RoutingPlan(tuple(routes))
