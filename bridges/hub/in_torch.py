"""State dicts of optimizers of torch, and of those that keep theirs as torch does (bitsandbytes)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from chainrule.bridges.hub.layouts import Shapes, plain
from chainrule.bridges.hub.quantities import FORMS, Form, Quantities, Values, product_of_decays
from chainrule.bridges.loading import check_layout
from chainrule.bridges.torch_moments import value_of

_CODES = (
    "__bnb_optimizer_quant_state__"  # under which bitsandbytes saves its moments, in codes or not
)
_CODED = ("qmap", "absmax", "new_max", "unorm_vec", "gnorm_vec")
WRITTEN = ("torch", "lion_pytorch")
"""Libraries whose state dicts are written, too."""
_CLASSES = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.Muon,
}


def names_in(state: Mapping[str, Any], source: Shapes | None, name: str) -> dict[Any, str]:
    """The key of every parameter in a state dict -> its name."""
    check_layout(state, f"convert_state: the state of {name}")
    found: dict[Any, str] = {}
    keys = [key for group in state["param_groups"] for key in group["params"]]
    for group in state["param_groups"]:
        names = group.get("param_names")
        found |= zip(group["params"], map(plain, names), strict=True) if names is not None else {}
    if found:
        return found
    if source is None:
        return {key: str(i) for i, key in enumerate(keys)}
    if len(source) != len(keys):
        raise ValueError(
            f"convert_state: the state of {name} has {len(keys)} parameters, `source` has {len(source)}"
        )
    return dict(zip(keys, source, strict=True))


def read(state: Mapping[str, Any], form: Form, name: str, source: Shapes | None) -> Quantities:
    """What a state dict says, by parameter."""
    names = names_in(state, source, name)
    values: dict[str, Values] = {quantity: {} for quantity in form.keys}
    counts: dict[str, int] = {}
    for key, label in names.items():
        entry = dict(state["state"].get(key) or {})
        entry |= entry.pop(_CODES, {})
        entry = _of_heavyball(entry, state, names) if name.startswith("heavyball.") else entry
        known = {*form.keys.values(), form.counts, form.product, "step"}
        for other in entry:
            if other not in known and not other.startswith(_CODED) and entry[other] is not None:
                raise ValueError(
                    f"convert_state: `{other}` of {name} (parameter {label}) has no equal elsewhere"
                )
        for quantity, field in form.keys.items():
            value = value_of(entry, field) if entry else None
            if value is not None:
                values[quantity][label] = _array(quantity, value)
            elif quantity not in form.optional:
                raise ValueError(
                    f"convert_state: the state of {name} has no `{field}` of parameter {label}; a parameter that "
                    "has made no step has no state"
                )
        if form.counts:
            counts[label] = int(entry.get(form.counts, 0))
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"convert_state: the parameters of {name} have made different numbers of steps, "
            f"{sorted(set(counts.values()))}; others keep one count for all"
        )
    group = state["param_groups"][0]
    numbers = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    rate = None if numbers.get("lr") is None else float(numbers["lr"])
    values = {quantity: of for quantity, of in values.items() if of}
    return Quantities(values, next(iter(counts.values()), None), rate, numbers)


def _of_heavyball(
    entry: dict[Any, Any], state: Mapping[str, Any], names: Mapping[Any, str]
) -> dict[str, Any]:
    """An entry of HeavyBall: one for each part of a parameter, averages over the weight that they have given to
    gradients, and the step count with the first parameter alone."""
    if not entry:
        return entry
    if set(entry) != {0}:
        raise ValueError(
            "convert_state: HeavyBall cut a parameter into parts, which has no equal elsewhere"
        )
    steps = [
        e[0]["step"] for e in (state["state"].get(key) for key in names) if e and "step" in e[0]
    ]
    group, count = state["param_groups"][0], int(steps[0])
    averages = zip(FORMS["heavyball.adamw"].keys.values(), group["betas"], strict=True)
    found = {field: entry[0][field] * (1 - b**count) for field, b in averages if field in entry[0]}
    return {"step": count, **found}


def _array(quantity: str, value: torch.Tensor) -> np.ndarray[Any, Any]:
    array = value.detach().cpu()
    array = (array if array.dtype == torch.float64 else array.float()).numpy()
    # torch's two averages of Adafactor keep the axis that was averaged.
    return array[..., 0] if quantity == "row" else array[..., 0, :] if quantity == "col" else array


def write(found: Quantities, form: Form, name: str, target: Shapes, like: Any) -> dict[str, Any]:
    """A state dict of torch."""
    if name.partition(".")[0] not in WRITTEN:
        raise ValueError(
            f"convert_state: nothing is written as {name}, whose codes lose digits; convert to torch.* and let its own "
            "optimizer take the state over"
        )
    groups = _groups(found, name, target, like)
    labels = names_in({"state": {}, "param_groups": groups}, target, "`like`")
    if set(labels.values()) != set(target):
        raise ValueError(
            f"convert_state: `like` has the parameters {list(labels.values())[:8]}, `params` has {list(target)[:8]}"
        )
    state: dict[Any, dict[str, Any]] = {}
    group_of = {key: group for group in groups for key in group["params"]}
    for key, label in labels.items():
        entry: dict[str, Any] = {}
        if form.counts:
            entry[form.counts] = torch.tensor(float(found.count or 0))
        if form.product:
            own = group_of[key]
            decays = float(own["betas"][0]), float(own["momentum_decay"])
            entry[form.product] = torch.tensor(product_of_decays(*decays, found.count or 0))
        for quantity, field in form.keys.items():
            array = found.values.get(quantity, {}).get(label)
            if array is not None:
                entry[field] = torch.from_numpy(np.array(_with_axis(quantity, array)))
            elif quantity not in form.optional:
                raise ValueError(
                    f"convert_state: {name} keeps `{field}` of {label!r}, which the state has not"
                )
        state[key] = entry
    return {"state": state, "param_groups": groups}


def _with_axis(quantity: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if quantity == "row":
        return array[..., None]
    return array[..., None, :] if quantity == "col" else array


def _groups(found: Quantities, name: str, target: Shapes, like: Any) -> list[dict[str, Any]]:
    if like is not None:
        like = like.state_dict() if hasattr(like, "state_dict") else like
        check_layout(like, "convert_state: `like`")
        return [dict(group) for group in like["param_groups"]]
    make = _CLASSES.get(name.partition(".")[2])
    if found.rate is None or make is None:
        raise ValueError(
            f"convert_state: a state dict of {name} holds hyperparameters, which this state does not say; give "
            "`like=optimizer` or `learning_rate`"
        )
    shapes = [torch.nn.Parameter(torch.zeros(s)) for s in target.values()]
    (defaults,) = make(shapes, lr=found.rate).state_dict()["param_groups"]
    known = {k: v for k, v in found.numbers.items() if k in defaults}
    return [{**defaults, **known, "lr": found.rate, "params": list(range(len(target)))}]
