"""What an optimizer's state says, whatever library keeps it: named quantities of named parameters.

| family | quantities |
|---|---|
| adam | mu, nu: averages of g and g^2 |
| adamax | mu; norm: decayed maximum of abs(g) |
| lion | mu |
| sgd | trace: the decayed sum of g |
| rmsprop | nu; mu if centered; trace, of g / sqrt(nu), if there is momentum |
| adafactor | row, col: averages of g^2 over the last axis and the one before; full, where it is not factored |
| muon | mu; nu of what goes to Adam |

All start at zero, and `count` is the number of steps made, 0 before the first.
"""

import dataclasses
from typing import Any

import numpy as np

Values = dict[str, np.ndarray[Any, Any]]
"""By parameter."""


@dataclasses.dataclass
class Quantities:
    """A state.

    Attributes:
      values: quantity -> parameter -> array, in the parameter's layout.
      count: the number of steps; None: the library keeps none.
      rate: the learning rate, where the state says it.
      numbers: other hyperparameters that the state says, under torch's names.
    """

    values: dict[str, Values]
    count: int | None
    rate: float | None = None
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


@dataclasses.dataclass(frozen=True)
class Form:
    """How a library keeps the state of an optimizer.

    Attributes:
      family: what it is a state of.
      keys: quantity -> its name there.
      counts: the name of the step count; None: there is none.
      optional: quantities that it keeps only if asked to.
      scaled: quantity -> what it is there: the quantity times "rate", "-rate", or 1 / (1 - "momentum").
      product: the name of the product of NAdam's decays, which the count and the hyperparameters say.
    """

    family: str
    keys: dict[str, str]
    counts: str | None = None
    optional: frozenset[str] = frozenset()
    scaled: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    product: str | None = None


_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq"}
_RMS = frozenset(("mu", "trace"))
_TORCH_RMS = {"nu": "square_avg", "trace": "momentum_buffer", "mu": "grad_avg"}
_FACTORED = frozenset(("row", "col", "full"))
_TWO, _ONE = {"mu": "state1", "nu": "state2"}, {"mu": "state1"}

FORMS: dict[str, Form] = {
    **dict.fromkeys(("torch.adam", "torch.adamw", "torch.radam"), Form("adam", _ADAM, "step")),
    "torch.nadam": Form("adam", _ADAM, "step", product="mu_product"),
    "torch.adamax": Form("adamax", {"mu": "exp_avg", "norm": "exp_inf"}, "step"),
    "torch.sgd": Form("sgd", {"trace": "momentum_buffer"}),
    "torch.rmsprop": Form("rmsprop", _TORCH_RMS, "step", _RMS),
    "torch.adafactor": Form(
        "adafactor", {"row": "row_var", "col": "col_var", "full": "variance"}, "step", _FACTORED
    ),
    "torch.muon": Form("muon", {"mu": "momentum_buffer"}),
    **dict.fromkeys(("bitsandbytes.adam", "bitsandbytes.adamw"), Form("adam", _TWO, "step")),
    **dict.fromkeys(("bitsandbytes.adam8bit", "bitsandbytes.adamw8bit"), Form("adam", _TWO, "step")),
    **dict.fromkeys(("bitsandbytes.lion", "bitsandbytes.lion8bit"), Form("lion", _ONE, "step")),
    "lion_pytorch.lion": Form("lion", {"mu": "exp_avg"}),
    **dict.fromkeys(
        (f"optax.{name}" for name in ("adam", "adamw", "nadam", "nadamw", "radam")),
        Form("adam", {"mu": "mu", "nu": "nu"}, "count"),
    ),
    "heavyball.adamw": Form(
        "adam", {"mu": "update_by_adam_exp_avg_0", "nu": "update_by_adam_exp_avg_sq_0"}, "step"
    ),
    "optax.adamax": Form("adamax", {"mu": "mu", "norm": "nu"}, "count"),
    "optax.lion": Form("lion", {"mu": "mu"}, "count"),
    "optax.sgd": Form("sgd", {"trace": "trace"}),
    "optax.rmsprop": Form(
        "rmsprop", {"nu": "nu", "trace": "trace", "mu": "mu"}, None, _RMS, {"trace": "-rate"}
    ),
    "optax.adafactor": Form(
        "adafactor", {"row": "v_row", "col": "v_col", "full": "v"}, "count", _FACTORED
    ),
    "optax.muon": Form("muon", {"mu": "mu", "nu": "nu"}, "count", frozenset(("nu",))),
    **dict.fromkeys(
        ("keras.adam", "keras.adamw"), Form("adam", {"mu": "momentum", "nu": "velocity"}, "iteration")
    ),
    "keras.nadam": Form(
        "adam", {"mu": "momentum", "nu": "velocity"}, "iteration", product="u_product"
    ),
    "keras.adamax": Form("adamax", {"mu": "momentum", "norm": "norm"}, "iteration"),
    "keras.lion": Form("lion", {"mu": "momentum"}, "iteration"),
    "keras.sgd": Form("sgd", {"trace": "momentum"}, "iteration", scaled={"trace": "-rate"}),
    "keras.rmsprop": Form(
        "rmsprop",
        {"nu": "velocity", "trace": "momentum", "mu": "average_gradient"},
        "iteration",
        _RMS,
        {"trace": "rate"},
    ),
    "keras.adafactor": Form(
        "adafactor", {"row": "row", "col": "col", "full": "velocity"}, "iteration", _FACTORED
    ),
    "keras.muon": Form(
        "muon", {"mu": "momentum", "nu": "velocity"}, "iteration", frozenset(("nu",)), {"mu": "momentum"}
    ),
}  # fmt: skip
"""library.optimizer -> how it keeps its state."""


def factors(name: str, form: Form, rate: float | None, momentum: float | None) -> dict[str, float]:
    """What the quantities are multiplied by in a form.

    Raises:
      ValueError: a number is needed that nobody says.
    """
    found: dict[str, float] = {}
    for quantity, by in form.scaled.items():
        if by == "momentum" and momentum is None:
            raise ValueError(
                f"convert_state: {name} keeps a sum where others keep an average, (1 - momentum) of it; give `momentum`"
            )
        if by != "momentum" and rate is None:
            raise ValueError(
                f"convert_state: {name} keeps its {form.keys[quantity]} times the learning rate; give `learning_rate`"
            )
        sizes = {"rate": rate, "-rate": -(rate or 0.0), "momentum": 1 / (1 - (momentum or 0.0))}
        found[quantity] = sizes[by] or 0.0
        if found[quantity] == 0:
            raise ValueError(
                f"convert_state: {name} keeps its {form.keys[quantity]} times the learning rate, which is 0, so that "
                "it says nothing; give the `learning_rate` that it was made with"
            )
    return found


def product_of_decays(b1: float, decay: float, count: int) -> float:
    """What the decays of NAdam's first moment multiply to, b1 (1 - 0.96^(decay t) / 2) at step t.

    >>> product_of_decays(0.5, 0.0, 2)
    0.0625
    """
    steps = np.arange(1, count + 1)
    return float(np.prod(b1 * (1 - 0.5 * 0.96 ** (decay * steps))))
