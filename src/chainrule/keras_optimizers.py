"""Optimizers of Keras by name: chains as classes, with the names and defaults of the repositories they come from.

    import chainrule.keras_optimizers as optimizers

    model.compile(optimizers.Muon(1e-3, exclude_layers=["head"]), loss="mse")
    model.compile(optimizers.Orthograd(optimizers.Grokfast(optimizers.Muon())), loss="mse")
    model.compile(optimizers.Grokfast(keras.optimizers.Adam(1e-3, weight_decay=0.01)), loss="mse")

Every class takes, beside its own, the arguments of `keras.optimizers.Optimizer` (`weight_decay`, `clipnorm`, `use_ema`,
`gradient_accumulation_steps`, ...) and `compile` (see `KerasBridge`). Weight decay is Keras' own: once, decoupled,
times the learning rate, and `exclude_from_weight_decay` works. The numbers of the chain are live, by its own names:
`optimizer.hyperparams["b2"] = 0.99`. All classes are saved in model files and go on bit for bit.

**Coming from KerasOptimizers.** `Adam`, `Nadam`, `Muon`, `Grokfast` (there `Grokfast_EMA`) and `Orthograd` keep its
argument names and defaults. What its code does and its sources do not is reached by an argument: `caution="mean"`,
`Nadam(nesterov="keras")`, `Muon(nesterov="raw", dims="oihw", scale_axes=[-2, -1], ns_dtype="bfloat16")`,
`Grokfast(start="zero")`. Gone are the second weight decay of `Muon` (give the sum), and wrappers under which the
optimizer inside stands at step 1, without its decay, schedule and clipping. docs/keras.md puts the calls side by side.
"""

from typing import Any, ClassVar

import keras

from chainrule.bridges.keras_named import Named, NamedAround
from chainrule.bridges.keras_optimizer import PACKAGE
from chainrule.bridges.keras_tiers import Retier
from chainrule.transforms import Routing
from chainrule.transforms.routing import RoutingPlan

__all__ = [
    "Adam",
    "Casmo",
    "CasmoSNR",
    "Cosmic",
    "Grokfast",
    "Magma",
    "Muon",
    "Nadam",
    "Orthograd",
    "Retier",
    "Stam",
    "StamLite",
]

_register = keras.saving.register_keras_serializable(PACKAGE)


def _caution(caution: Any) -> Any:
    """`True` is the normalizer of the cautious optimizers' authors; a name is that of `transforms.cautious`."""
    return ("clamped_mean" if caution else None) if isinstance(caution, bool) else caution


@_register
class Adam(Named):
    """Adam (AdamW), optionally cautious: `chainrule.chains.adam`.

    KerasOptimizers' defaults: `learning_rate=1e-3`, `beta_1=0.9`, `beta_2=0.995`, `epsilon=1e-8`, `weight_decay=0.004`.
    `caution`: `False`, `True` (C-AdamW) or a normalizer of `transforms.cautious` (`"mean"` is KerasOptimizers').

    >>> Adam(clipnorm=1.0).get_config()["beta_2"]
    0.995
    >>> Adam(b2=0.9)
    Traceback (most recent call last):
      ...
    TypeError: Adam: unexpected argument 'b2'; did you mean 'beta_2'?
    """

    chain_name = "adam"
    defaults: ClassVar[dict[str, Any]] = {"beta_2": 0.995, "weight_decay": 0.004, "caution": False}

    @classmethod
    def chain_arguments(cls, own: dict[str, Any]) -> dict[str, Any]:
        """The chain's arguments, by its own names."""
        return super().chain_arguments({**own, "caution": _caution(own["caution"])})


@_register
class Nadam(Adam):
    """NAdam, optionally cautious: `chainrule.chains.nadam`.

    Arguments of `Adam`, and `nesterov`: `True` (Dozat) or `"keras"`, KerasOptimizers' bias corrections.

    >>> Nadam(nesterov="keras").get_config()["nesterov"]
    'keras'
    """

    chain_name = "nadam"


@_register
class Muon(Named):
    """Muon on hidden matrices, Adam or NAdam on the rest: `chainrule.chains.muon`.

    Variables go to Muon or Adam by their paths: vectors, biases, embeddings and output layers that their names tell to
    Adam, and layers that `exclude_layers` matches (name the model's last one); other matrices and kernels to Muon.
    `print(optimizer.plan())` accounts for every variable. Convolution kernels (height, width, in, out) are
    orthogonalised as (height width in, out).

    Args:
      learning_rate: of both.
      adam_lr_ratio: what it is multiplied by for Adam.
      weight_decay: decoupled, times the learning rate, of every variable.
      use_nadam: NAdam for the rest; `"keras"`: with KerasOptimizers' bias corrections.
      exclude_layers: regular expressions, searched in the paths; each must match one.
      exclude_embeddings: whether names that tell an embedding or an output layer send it to Adam.
      caution: as of `Adam`.
      nesterov: `True`, `False`, or `"raw"` or `"elementwise"`, KerasOptimizers' forms.
      adam_beta_1, adam_beta_2, epsilon: Adam's.
      muon_beta: decay of Muon's momentum.
      muon_a, muon_b, muon_c, ns_steps: the Newton-Schulz polynomial, and how often it is applied.
      dims, scale, scale_factor, scale_axes, ns_dtype: as of `chains.muon`.

    >>> optimizer = Muon(exclude_layers=["head"])
    >>> names = {"hidden": (4, 4), "head": (4, 2)}
    >>> optimizer.build([keras.Variable(keras.ops.ones(shape), name=name) for name, shape in names.items()])
    >>> print(optimizer.plan())
    leaf    shape   route  reason
    head    (4, 2)  adam   excluded
    hidden  (4, 4)  muon   a matrix
    """

    chain_name = "muon"
    defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-3,
        "adam_lr_ratio": 1.0,
        "weight_decay": 0.004,
        "use_nadam": True,
        "exclude_layers": (),
        "exclude_embeddings": True,
        "caution": True,
        "nesterov": True,
        "adam_beta_1": 0.9,
        "adam_beta_2": 0.995,
        "muon_beta": 0.95,
        "muon_a": 3.4445,
        "muon_b": -4.775,
        "muon_c": 2.0315,
        "ns_steps": 5,
        "epsilon": 1e-8,
        "dims": "hwio",
        "scale_factor": 0.2,
    }
    left_out = frozenset(
        ("beta", "coefficients", "routing", "adam_b1", "adam_b2", "adam_eps", "adam_weight_decay")
    )

    @classmethod
    def chain_arguments(cls, own: dict[str, Any]) -> dict[str, Any]:
        """The chain's arguments, by its own names."""
        given = dict(own)
        nesterov = given.pop("nesterov")
        return {
            "beta": given.pop("muon_beta"),
            "nesterov": ("lerp" if nesterov else None) if isinstance(nesterov, bool) else nesterov,
            "coefficients": [given.pop(f"muon_{letter}") for letter in "abc"],
            "caution": _caution(given.pop("caution")),
            "routing": {"factory": "chainrule.transforms:Routing", "arguments": _routing(given)},
            "adam_b1": given.pop("adam_beta_1"),
            "adam_b2": given.pop("adam_beta_2"),
            "adam_eps": given.pop("epsilon"),
            **given,
        }

    def plan(self) -> RoutingPlan:
        """Where each variable goes, and why."""
        parts = self._ready("plan")
        routing = Routing(**_routing(dict(parts.own)))
        return routing.plan(dict(zip(parts.flat.names, parts.flat.structs, strict=True)))

    def explain(self) -> str:
        """What the chain became in Keras, and where each variable goes."""
        return f"{super().explain()}\n{self.plan()}"


def _routing(own: dict[str, Any]) -> dict[str, Any]:
    """Takes the arguments of Muon's routing out of its others."""
    exclude, embeddings = own.pop("exclude_layers"), own.pop("exclude_embeddings")
    exclude = list(exclude) if isinstance(exclude, (list, tuple)) else exclude
    return {"exclude": exclude or None, "words": None if embeddings else ["bias"]}


@_register
class Casmo(Named):
    """CASMO, Adam scaled by a confidence: `chainrule.chains.casmo`, with its arguments and defaults.

    >>> Casmo(3e-4, granularity="parameter").get_config()["granularity"]
    'parameter'
    """

    chain_name = "casmo"


@_register
class CasmoSNR(Named):
    """CASMO 0.4, trust in each tensor and focus on its entries: `chainrule.chains.casmo_snr`.

    >>> CasmoSNR(robustness=1.0).get_config()["robustness"]
    1.0
    """

    chain_name = "casmo_snr"


@_register
class Stam(Named):
    """STAM, Adam with a first-moment decay that follows the residual: `chainrule.chains.stam`.

    >>> Stam(beta_1=0.8)
    Traceback (most recent call last):
      ...
    TypeError: Stam: unexpected argument 'beta_1'; did you mean 'b1_base'?
    """

    chain_name = "stam"


@_register
class StamLite(Named):
    """STAMLite, with one second moment a tensor: `chainrule.chains.stam_lite`.

    >>> StamLite(b1_update_interval=10).get_config()["b1_update_interval"]
    10
    """

    chain_name = "stam_lite"


@_register
class Cosmic(Named):
    """COSMIC: `chainrule.chains.cosmic`. Under `fit` tensors move between tiers by the callback `Retier(x, y)`.

    >>> Cosmic(gate_tier_max=1).get_config()["gate_tier_max"]
    1
    """

    chain_name = "cosmic"


@_register
class Grokfast(NamedAround):
    """Grokfast-EMA in front of any optimizer of Keras: g + lamb ema, ema = alpha ema + (1 - alpha) g.

    KerasOptimizers' defaults, `alpha=0.99` and `lamb=5.0` (the authors' are 0.98 and 2.0). `start`: `"first"`, the
    average starts at the first gradient, or `"zero"` (KerasOptimizers).

    >>> optimizer = Grokfast(keras.optimizers.Adam(0.5))
    >>> optimizer.learning_rate = 0.1
    >>> round(float(optimizer.optimizer.learning_rate), 3)
    0.1
    """

    chain_name = "grokfast"
    defaults: ClassVar[dict[str, Any]] = {"alpha": 0.99, "lamb": 5.0}


@_register
class Orthograd(NamedAround):
    """OrthoGrad in front of any optimizer of Keras: gradients orthogonal to the weights, as long as before.

    >>> Orthograd("sgd").get_config()["rtol"]
    1e-06
    """

    chain_name = "orthograd"


@_register
class Magma(NamedAround):
    """Magma around any optimizer of Keras: its step, scaled by how well momentum and gradient agree, or dropped.

    The momentum is an average of its own, as in Magma 0.1.1; `KerasBridge(chainrule.chains.magma(...))` shares that of
    a chain. The whole step of the optimizer inside is scaled, with its weight decay.

    >>> Magma(Adam(), mask_prob=0.8).get_config()["mask_prob"]
    0.8
    """

    _after = True
    chain_name = "magma"
    left_out = frozenset(("moment",))

    @classmethod
    def chain_arguments(cls, own: dict[str, Any]) -> dict[str, Any]:
        """The chain's arguments, by its own names."""
        return {**super().chain_arguments(own), "moment": "own"}
