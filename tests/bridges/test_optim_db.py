"""torch's own table of optimizers, `optim_db`: its inputs and its error inputs, through the bridge and exported files.

Every optimizer that optax has too is run beside torch's with each of its inputs, given in torch's own words: keyword
arguments become keys of the parameter group. What is run nowhere stands in `NOT_FOLLOWED` with its reason.
"""

import copy
import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax
import pytest
import torch
from hypothesis import settings
from torch import nn
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInput,
    optim_db,
)

from bounds import gamma, stepped
from chainrule import TorchBridge
from exported import exported

settings.load_profile("chainrule")  # torch's module has loaded one of its own

STEPS = 6


def live(chain: Callable[..., Any], **defaults: Any) -> Callable[..., Any]:
    """`chain` with torch's defaults, its arguments live, so that they are keys of the group."""
    return lambda **fixed: optax.inject_hyperparams(chain, static_args=tuple(fixed))(
        **{**defaults, **fixed}
    )


def coupled(weight_decay: Any, *links: Any, maximize: bool = False) -> Any:
    """What torch puts before an optimizer: the sign of the gradient, and decay that is added to it."""
    return optax.chain(
        optax.scale(-1.0 if maximize else 1.0), optax.add_decayed_weights(weight_decay), *links
    )


def _adam(learning_rate, b1, b2, eps, weight_decay, maximize=False):
    return coupled(weight_decay, optax.adam(learning_rate, b1, b2, eps), maximize=maximize)


def _adamw(learning_rate, b1, b2, eps, weight_decay, maximize=False):
    return coupled(
        0.0, optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay), maximize=maximize
    )


def _adamax(learning_rate, b1, b2, eps, weight_decay, maximize=False):
    return coupled(weight_decay, optax.adamax(learning_rate, b1, b2, eps), maximize=maximize)


def _radam(learning_rate, b1, b2, eps, weight_decay, decoupled_weight_decay=False, maximize=False):
    inside, outside = (0.0, weight_decay) if decoupled_weight_decay else (weight_decay, 0.0)
    return coupled(
        inside,
        optax.scale_by_radam(b1, b2, eps),
        optax.add_decayed_weights(outside),
        optax.scale_by_learning_rate(learning_rate),
        maximize=maximize,
    )


def _sgd(learning_rate, momentum, weight_decay, nesterov=False, maximize=False):
    return coupled(weight_decay, optax.sgd(learning_rate, momentum, nesterov), maximize=maximize)


def _rmsprop(learning_rate, alpha, eps, weight_decay, momentum, centered=False, maximize=False):
    return coupled(
        weight_decay,
        optax.rmsprop(
            learning_rate, alpha, eps, eps_in_sqrt=False, centered=centered, momentum=momentum
        ),
        maximize=maximize,
    )


def _adagrad(learning_rate, lr_decay, weight_decay, initial_accumulator_value=0.0, maximize=False):
    # torch adds 1e-10 to the root, which float32 does not see beside these gradients.
    return coupled(
        weight_decay,
        optax.scale_by_rss(initial_accumulator_value, eps=0.0),
        optax.scale_by_schedule(lambda count: 1 / (1 + count * lr_decay)),
        optax.scale_by_learning_rate(learning_rate),
        maximize=maximize,
    )


def _adadelta(learning_rate, rho, eps, weight_decay, maximize=False):
    return coupled(weight_decay, optax.adadelta(learning_rate, rho, eps), maximize=maximize)


ADAM = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
COUNTERPARTS: dict[str, Callable[..., Any]] = {
    "Adam": live(_adam, **ADAM),
    "AdamW": live(_adamw, **{**ADAM, "weight_decay": 1e-2}),
    "Adamax": live(_adamax, **{**ADAM, "learning_rate": 2e-3}),
    "RAdam": live(_radam, **ADAM),
    "SGD": live(_sgd, learning_rate=1e-3, momentum=0.0, weight_decay=0.0),
    "RMSprop": live(
        _rmsprop, learning_rate=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0
    ),
    "Adagrad": live(_adagrad, learning_rate=1e-2, lr_decay=0.0, weight_decay=0.0),
    "Adadelta": live(_adadelta, learning_rate=1.0, rho=0.9, eps=1e-6, weight_decay=0.0),
}
"""By torch's name a function from what cannot live in a group to the chain."""

FIXED = {
    "maximize", "nesterov", "centered", "initial_accumulator_value", "decoupled_weight_decay",
}  # fmt: skip

NOT_FOLLOWED = {
    "ASGD": "optax has no averaged SGD",
    "Adafactor": "torch's takes its rate from min(lr, 1 / sqrt(t)), optax's from a schedule",
    "LBFGS": "evaluates the closure many times in a step",
    "Muon": "runs in bfloat16; replayed in tests/golden/test_muon.py",
    "NAdam": "torch's momentum follows a schedule of its own, optax's is constant",
    "Rprop": "optax's moves by the step before",
    "SparseAdam": "sparse gradients",
    "amsgrad": "torch keeps the largest second moment, optax the largest corrected one",
    "dampening": "torch's first step is not damped, and optax.trace has no damping",
}


def inputs_of(info: Any) -> list[OptimizerInput]:
    return [
        given
        for given in info.optim_inputs_func(device="cpu")
        if not given.kwargs.keys() & NOT_FOLLOWED.keys()
    ]


FOLLOWED = [info for info in optim_db if info.optim_cls.__name__ in COUNTERPARTS]
INPUTS = [
    pytest.param(info.optim_cls, given.kwargs, id=f"{info.optim_cls.__name__}-{given.desc}")
    for info in FOLLOWED
    for given in inputs_of(info)
]


def bridge_of(name: str, params: Any, **kwargs: Any) -> TorchBridge:
    """The counterpart of a torch optimizer, made with torch's keyword arguments."""
    fixed, keys = apart(kwargs)
    return TorchBridge(COUNTERPARTS[name](**fixed), params, **keys)


def file_of(name: str, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """The same of an exported file's class."""
    fixed, keys = apart(kwargs)
    return class_of(name, tuple(sorted(fixed.items())))(params, **keys)


def apart(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a chain is made with, and the keys of a group."""
    fixed = {key: value for key, value in kwargs.items() if key in FIXED}
    return fixed, {key: value for key, value in kwargs.items() if key not in fixed}


@functools.cache
def class_of(name: str, fixed: tuple[tuple[str, Any], ...]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return exported(COUNTERPARTS[name](**dict(fixed)), Path(folder), parts=False)


MAKERS = pytest.mark.parametrize("made_by", [bridge_of, file_of])


def leaves() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (3,), ())]


def detached(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach() for p in params]


def step(optimizer: torch.optim.Optimizer, index: int) -> None:
    generator = torch.Generator().manual_seed(index)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_every_optimizer_of_torch_is_followed_or_not_for_a_reason() -> None:
    names = {info.optim_cls.__name__ for info in optim_db}
    assert names <= COUNTERPARTS.keys() | NOT_FOLLOWED.keys()
    assert not COUNTERPARTS.keys() & NOT_FOLLOWED.keys()


@MAKERS
@pytest.mark.parametrize(("torch_class", "kwargs"), INPUTS)
def test_torchs_inputs_go_torchs_way(
    torch_class: Any, kwargs: dict[str, Any], made_by: Callable[..., torch.optim.Optimizer]
) -> None:
    """Also from a state dict in the middle, to the bit."""
    ours, theirs = leaves(), leaves()
    reference = torch_class(theirs, **kwargs)
    optimizer = made_by(torch_class.__name__, ours, **kwargs)
    start = leaves()
    for index in range(STEPS // 2):
        step(optimizer, index)
        step(reference, index)
    resumed_params = copy.deepcopy(ours)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = made_by(torch_class.__name__, resumed_params, **kwargs)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for index in range(STEPS // 2, STEPS):
        for each in (optimizer, reference, resumed):
            step(each, index)
    for p, q, r, first in zip(*map(detached, (ours, theirs, resumed_params, start)), strict=True):
        assert p.equal(r)
        # Each step's update is rounded on both sides, and so is the parameter that takes it.
        path, size = STEPS * float((q - first).abs().max()), float(q.abs().max())
        allowed = 2 * stepped(STEPS) * path + gamma(2 * STEPS) * size
        assert float((p - q).abs().max()) <= allowed


# ---- errors --------------------------------------------------------------------------------

# What torch's error becomes here, by its message; and what it is no error for.
OURS: dict[str, tuple[type[Exception], str]] = {
    "params argument given to the optimizer": (TypeError, "params argument given to the optimizer"),
    "a parameter group with duplicate parameters": (ValueError, "a parameter appears twice"),
    "some parameters appear in more than one": (ValueError, "some parameters appear in more than"),
    "Tensor lr must be 1-element": (ValueError, "lr"),
    "Some param names are missing": (ValueError, "Some param names are missing"),
    "cannot add param group with names": (ValueError, "cannot add param group with names"),
    "Invalid beta parameter at index 0: 1.0": (ValueError, r"`b1` must be in \[0, 1\), got 1.0"),
    "Invalid beta parameter at index 1: 1.0": (ValueError, r"`b2` must be in \[0, 1\), got 1.0"),
    "Invalid weight_decay value": (ValueError, r"`weight_decay` must be in \[0, inf\), got -"),
}
NO_ERROR_HERE = {
    "Invalid rho value": "optax has no bounds for `rho`",
    "Invalid lr_decay value": "optax has no such argument",
    "Invalid momentum value": "optax has no bounds for `momentum`",
    "foreach=True": "one way to run",
    "betas must be either both floats or both Tensors": "each is a value of its own",
}


def errors_of(info: Any) -> list[ErrorOptimizerInput]:
    return [
        error
        for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
        if not any(message in error.error_regex for message in NO_ERROR_HERE)
    ]


ERRORS = [
    pytest.param(
        info.optim_cls.__name__,
        error,
        id=f"{info.optim_cls.__name__}-{error.optimizer_error_input.desc}",
    )
    for info in FOLLOWED
    for error in errors_of(info)
]


@MAKERS
@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_torchs_errors_are_errors(
    name: str, error: ErrorOptimizerInput, made_by: Callable[..., torch.optim.Optimizer]
) -> None:
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    (expected,) = [ours for theirs, ours in OURS.items() if theirs in error.error_regex]
    given = error.optimizer_error_input
    params = leaves() if given.params is None else given.params
    with pytest.raises(expected[0], match=expected[1]):
        made_by(name, params, **given.kwargs)
