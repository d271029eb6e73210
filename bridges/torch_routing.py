"""Muon's routing of a torch model, by the modules that hold its parameters."""

from collections.abc import Iterator

from torch import nn

from chainrule.transforms import Routing
from chainrule.transforms._layers import named_like
from chainrule.transforms.routing import WORDS


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
