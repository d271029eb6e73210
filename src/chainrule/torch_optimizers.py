"""Optimizers of torch by name: chains as classes, with torch's names for arguments.

    from chainrule import torch_optimizers as optimizers

    optimizer = optimizers.Stam(model.parameters(), lr=3e-4, weight_decay=0.1)
    optimizer = optimizers.Muon(model)
    optimizer = optimizers.Grokfast(model.parameters(), lr=1e-3, base="Adam", lamb=5.0)

Arguments and defaults are the chain's (`chainrule.chains`); its learning rate is `lr`, its two decays are `betas`, and
all but these and `weight_decay` are given by name. Every class is a `TorchBridge`: its numbers are keys of the
parameter groups, set by hand, by a scheduler or group by group; it is pickled, copied, saved and resumed bit for bit.

A configuration file holds a class by its path and plain values:

    Trainer(..., optimizer_cls_and_kwargs=(optimizers.Stam, {"lr": 3e-4}))          # transformers
    optimizer: {class_path: chainrule.torch_optimizers.Stam, init_args: {lr: 3e-4}}  # LightningCLI
    optimizer: {_component_: chainrule.torch_optimizers.Stam, lr: 3e-4}              # torchtune
    chainrule.torch_optimizers.register_timm()                                       # timm: opt="chainrule-stam"

`chainrule.TorchWrap` puts links around an optimizer that exists already.
"""

import functools
import inspect
from typing import Any, ClassVar

import torch

from chainrule.bridges.registries import register_timm
from chainrule.bridges.torch_named import Named, NamedAround
from chainrule.bridges.torch_routing import plan_of, routed
from chainrule.transforms.routing import RoutingPlan

__all__ = [
    "Adam",
    "Casmo",
    "CasmoSNR",
    "Cosmic",
    "Grokfast",
    "Magma",
    "Muon",
    "NAdam",
    "Orthograd",
    "Stam",
    "StamLite",
    "register_timm",
]


class Adam(Named):
    """Adam with decoupled weight decay (AdamW), optionally cautious: `chainrule.chains.adam`.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = Adam([weight], lr=0.5, betas=(0.9, 0.99))
    >>> optimizer.param_groups[0]["betas"]
    (0.9, 0.99)
    >>> Adam([weight], learning_rate=0.5)
    Traceback (most recent call last):
      ...
    TypeError: Adam: no argument `learning_rate`; did you mean `lr`?
    """

    chain_name = "adam"


class NAdam(Named):
    """NAdam, Adam with Nesterov momentum, with decoupled weight decay: `chainrule.chains.nadam`.

    >>> NAdam([torch.nn.Parameter(torch.ones(2))], 1e-3, (0.9, 0.99)).param_groups[0]["b2"]
    0.99
    """

    chain_name = "nadam"


class Casmo(Named):
    """CASMO, Adam scaled by a confidence: `chainrule.chains.casmo`.

    >>> Casmo([torch.nn.Parameter(torch.ones(2))], c_min=0.2).param_groups[0]["c_min"]
    0.2
    """

    chain_name = "casmo"


class CasmoSNR(Named):
    """CASMO 0.4, trust in each tensor and focus on its entries: `chainrule.chains.casmo_snr`.

    >>> CasmoSNR([torch.nn.Parameter(torch.ones(2))]).param_groups[0]["robustness"]
    0.5
    """

    chain_name = "casmo_snr"


class Stam(Named):
    """STAM, Adam with a first-moment decay that follows the residual: `chainrule.chains.stam`.

    >>> Stam([torch.nn.Parameter(torch.ones(2))], betas=(0.95, 0.99)).param_groups[0]["b1_base"]
    0.95
    """

    chain_name = "stam"


class StamLite(Named):
    """STAMLite, with one second moment a tensor: `chainrule.chains.stam_lite`.

    >>> StamLite([torch.nn.Parameter(torch.ones(2))], b1_update_interval=10).param_groups[0]["weight_decay"]
    0.01
    """

    chain_name = "stam_lite"


class Cosmic(Named):
    """COSMIC, with a state that is a budget: `chainrule.chains.cosmic`. Tensors move between tiers by themselves.

    >>> Cosmic([torch.nn.Parameter(torch.ones(2, 2))], preset="fast").param_groups[0]["b1"]
    0.8
    """

    chain_name = "cosmic"


class Muon(Named):
    """Muon on hidden matrices and convolutions, Adam on the rest: `chainrule.chains.muon`.

    Give it the model, or `model.named_parameters()`. Embeddings, output layers, biases and vectors go to Adam, known by
    their modules where there is a model, by names and shapes otherwise. `print(optimizer.plan())` accounts for every
    parameter, and the logger `chainrule.routing` says it once, at INFO. Kernels are read as torch lays them out:
    (out, in), and convolutions as (out, in kh kw).

    >>> layers = torch.nn.Embedding(9, 4), torch.nn.Conv1d(4, 4, 3, bias=False), torch.nn.Linear(4, 2)
    >>> model = torch.nn.Sequential(*layers)
    >>> print(Muon(model).plan())
    leaf      shape      route  reason
    0.weight  (9, 4)     adam   excluded
    1.weight  (4, 4, 3)  muon   matrices
    2.bias    (2,)       adam   excluded
    2.weight  (2, 4)     adam   excluded
    """

    chain_name = "muon"
    defaults: ClassVar[dict[str, Any]] = {"dims": "oihw", "scale_axes": "out_in"}
    left_out = frozenset(("routing",))
    added: ClassVar[dict[str, inspect.Parameter]] = {
        name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in {"model": torch.nn.Module | None, "exclude": Any}.items()
    }
    told: ClassVar[dict[str, str]] = {
        "params": "the model, `model.named_parameters()`, or groups of parameters.",
        "model": "tells the names of the parameters, embeddings and output layers, where `params` is not the model.",
        "exclude": "what goes to Adam besides: regular expressions, searched in the names. `[]` lets parameters "
        "without names and model go by their shapes.",
    }

    @classmethod
    def prepared(cls, params: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The parameters by name; the chain's arguments with its routing."""
        rest = dict(given)
        model, exclude = rest.pop("model", None), rest.pop("exclude", None)
        params, routing = routed(cls.__name__, params, model, exclude)
        return params, {**rest, "routing": routing}

    def plan(self) -> RoutingPlan:
        """Where each parameter goes, and why."""
        self._follow()
        chain = self._options.chain
        assert isinstance(chain, functools.partial) and self._options.meant is not None
        return plan_of(chain.keywords["routing"], self._groups, self._options.meant)

    def explain(self, passes: bool = False) -> str:
        """As `TorchBridge.explain`, and where each parameter goes."""
        return f"{super().explain(passes)}\n\n{self.plan()}"


class Grokfast(NamedAround):
    """Grokfast-EMA in front of another optimizer: `chainrule.chains.grokfast`.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = Grokfast([weight], 1e-3, base="Stam", base_arguments={"tau_decay": 0.9}, lamb=5.0)
    >>> [optimizer.param_groups[0][key] for key in ("lr", "lamb", "tau_decay")]
    [0.001, 5.0, 0.9]
    """

    chain_name = "grokfast"


class Orthograd(NamedAround):
    """OrthoGrad in front of another optimizer: `chainrule.chains.orthograd`.

    >>> Orthograd([torch.nn.Parameter(torch.ones(2))], weight_decay=0.1).param_groups[0]["weight_decay"]
    0.1
    """

    chain_name = "orthograd"


class Magma(NamedAround):
    """Magma around another optimizer, whose step is scaled by how well momentum and gradient agree, or dropped:
    `chainrule.chains.magma`. Weight decay is part of that step.

    >>> Magma([torch.nn.Parameter(torch.ones(2))], mask_prob=0.8).param_groups[0]["mask_prob"]
    0.8
    """

    chain_name = "magma"
