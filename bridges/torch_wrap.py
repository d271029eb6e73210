"""TorchWrap: links around an optimizer of torch that exists already, whatever it is."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from chainrule.bridges import loading
from chainrule.bridges.checks import autocast_off
from chainrule.bridges.lowering.executor import write
from chainrule.bridges.torch_links import OLD, PARAM, Links, buffers, changing, filtering
from chainrule.bridges.torch_moments import moments_of, value_of
from chainrule.bridges.wrapped import check_base, groups_of, of_base, part_of, prefixed
from chainrule.transforms._checks import check_choice

_NAMES = ("mu", "nu", "trace", "count")


class TorchWrap(torch.optim.Optimizer):
    r"""Puts links around an optimizer of torch: on the gradients that it gets, or on the change that it makes.

    $$g'_t = \mathrm{before}(g_t), \qquad p_t = p_{t-1} + \mathrm{after}(\mathrm{base}(p_{t-1}, g'_t) - p_{t-1})$$

    `base` stays what it was: its groups are this optimizer's, so that schedulers and changes of `lr` act on it, and its
    state is this optimizer's `state`. After a step every `grad` is the gradient that was there before. The numbers of
    the links are keys of `wrap.before.param_groups` and `wrap.after.param_groups`.

    *What the links see.* `before` gets the gradients. `after` gets the change of the parameters for updates, the raw
    gradient as `grad`, and as `mu`, `nu`, `trace` and `count` what the base keeps: `exp_avg`, `exp_avg_sq`,
    `momentum_buffer`, `step` of torch's optimizers, and the corresponding ones of bitsandbytes and torchao, decoded. A
    change points downhill, so write `cautious(negated=True)`. For a base without a momentum give
    `moment="own"` or `source="own"` to the link.

    *Missing gradients.* As in `TorchBridge`; the base skips what has none.

    Args:
      base: an optimizer.
      before: a chain for the gradients, ours or optax's (Grokfast, OrthoGrad, clipping), or a function without
        arguments that makes it, which a pickle needs.
      after: a chain for the change of the parameters, likewise.
      params: `named_parameters()`, where links choose parameters by name and the base was made without names.
      moments: name of a moment -> key of the base's state, for a base that is not known; a name with None is not given.
      compile: run the links through Inductor instead of op by op.
      engine: `"torch"` or `"xla"`, as of `TorchBridge`.

    Raises:
      TypeError: `base` is no optimizer.
      ValueError: neither `before` nor `after`; `compile` other than False and True; a base that evaluates the model
        within its step; a name that is none.

    >>> from chainrule import transforms as ct
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> base = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0)
    >>> optimizer = TorchWrap(base, after=ct.momentum_alignment_mask(mask_prob=1.0))
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([ 0.5189, -1.5189])
    >>> optimizer.param_groups[0]["lr"], optimizer.metrics()["after"]["mask_rate"]
    (0.5, tensor(1.))
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        before: Any = None,
        after: Any = None,
        params: Iterable[tuple[str, Tensor]] | None = None,
        *,
        moments: Mapping[str, str | None] | None = None,
        compile: bool = False,
        engine: str = "torch",
    ):
        check_base(base, before, after)
        # No graph holds the base's step.
        check_choice("TorchWrap", "compile", compile, (False, True))
        groups = groups_of(base, params)
        known = {**moments_of(base), **(moments or {})}
        known = {name: key for name, key in known.items() if key is not None}
        for name in known.keys() - set(_NAMES):
            raise ValueError(f"TorchWrap: `moments` has {', '.join(_NAMES)}, got {name!r}")
        options = {"compile": compile, "engine": engine}
        made = {"base": base, "before": None, "after": None, "_moments": known}
        if before is not None:
            made["before"] = Links(filtering, before, groups(), [PARAM], options)
        if after is not None:
            made["after"] = Links(changing, after, groups(), [OLD, *known], options)
        self.__setstate__(made)

    base: torch.optim.Optimizer
    """The optimizer inside."""
    before: Links | None
    """The bridge that runs the links on gradients."""
    after: Links | None
    """The bridge that runs the links on the change."""
    _moments: dict[str, str]
    _memory: tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_memory": ({}, {})})

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("base", "before", "after", "_moments")}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    # ---- what is the base's ----------------------------------------------------------------

    param_groups = of_base("param_groups")
    state = of_base("state")
    defaults = of_base("defaults")

    @property
    def _links(self) -> dict[str, Links]:
        roles = {"before": self.before, "after": self.after}
        return {role: links for role, links in roles.items() if links is not None}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base and to the links.

        Args:
          param_group: as the base takes it.
        """
        self.base.add_param_group(param_group)
        added = False
        try:
            for links in self._links.values():
                links.mirror(self.param_groups)
            added = True
        finally:
            if not added:
                self.param_groups.pop()
                for links in self._links.values():
                    links.mirror(self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As that of the base."""
        self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the base between the links.

        Args:
          closure: evaluates the model, calls backward and returns the loss. It is called once, before the links.

        Returns:
          What the closure returned, or None.

        Raises:
          RuntimeError: a gradient that is sparse, or a state of the links that is not what it was; nothing has been
            written then. The base does not keep a moment under the key that is known of it: the parameters are put
            back.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for links in self._links.values():
            links.mirror(self.param_groups)
        with autocast_off(p for group in self.param_groups for p in group["params"]):
            ready = {role: links._ready(loss) for role, links in self._links.items()}
            grads = self._filter(ready["before"]) if self.before else {}
            try:
                old = self._kept(ready["after"]) if self.after else []
                self.base.step()
            finally:
                for p, grad in grads.items():
                    p.grad = grad
            if self.after:
                self._change(ready["after"], old)
        return loss

    def _filter(self, ready: Any) -> dict[Tensor, Tensor | None]:
        """Gives every parameter its filtered gradient; returns those that it had."""
        assert self.before is not None
        params = self.before.params_of(ready)
        memory = buffers(params, self._memory[0])
        self.before.carry_out(ready, memory, self._given)
        grads = {p: p.grad for p in params}
        for p, grad in zip(params, memory, strict=True):
            p.grad = grad
        return grads

    def _kept(self, ready: Any) -> list[Tensor]:
        """The parameters before the step of the base."""
        assert self.after is not None
        params = self.after.params_of(ready)
        memory = buffers(params, self._memory[1])
        write(memory, params)
        return memory

    def _change(self, ready: Any, old: list[Tensor]) -> None:
        assert self.after is not None
        done = False
        try:
            self.after.carry_out(ready, old, self._given)
            done = True
        finally:
            if not done:
                write(self.after.params_of(ready), old)

    def _given(self, name: str, params: list[Tensor], there: list[bool]) -> list[Tensor]:
        """What the base keeps of parameters by the name of a moment; zeros for those without a gradient."""
        if name == "count":
            return [self._count(params[0])]
        state = self.state
        return [
            self._moment(name, p, state.get(p, {})) if has else torch.zeros_like(p)
            for p, has in zip(params, there, strict=True)
        ]

    def _moment(self, name: str, p: Tensor, entry: Mapping[str, Any]) -> Tensor:
        value = value_of(entry, self._moments[name])
        if not isinstance(value, Tensor) or value.shape != p.shape:
            shape = tuple(getattr(value, "shape", ()))
            found = "none" if value is None else f"one of shape {shape}"
            raise RuntimeError(
                f"TorchWrap: `{self._moments[name]}` of {type(self.base).__name__}, which is {name!r} of the links, "
                f"must have the parameter's shape {tuple(p.shape)}, got {found}; say where it is with `moments={{"
                f"{name!r}: ...}}`, or None for nowhere"
            )
        return value if value.dtype == p.dtype else value.to(p.dtype)

    def _count(self, p: Tensor) -> Tensor:
        kept = (self.state.get(q, {}) for q in self._beside(p))
        steps = (value_of(entry, self._moments["count"]) for entry in kept)
        found = next((step for step in steps if step is not None), 0)
        return torch.as_tensor(found, device=p.device).to(torch.int32).reshape(())

    def _beside(self, p: Tensor) -> list[Tensor]:
        """The parameters of its group, itself first."""
        groups = [group["params"] for group in self.param_groups]
        return [p, *next(params for params in groups if any(q is p for q in params))]

    def state_dict(self) -> dict[str, Any]:
        """That of the base, with the links' entries beside its own under `before.` and `after.`."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        found = dict(self.base.state_dict())
        found["state"] = {key: dict(entry) for key, entry in found["state"].items()}
        found["param_groups"] = [dict(group) for group in found["param_groups"]]
        for role, links in self._links.items():
            own = links.state_dict()
            for key, entry in own["state"].items():
                found["state"].setdefault(key, {}).update(prefixed(role, entry))
            for group, ours in zip(found["param_groups"], own["param_groups"], strict=True):
                group.update(prefixed(role, ours))
        for hook in self._optimizer_state_dict_post_hooks.values():
            found = hook(self, found) or found
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned; going on equals not having stopped.

        Args:
          state_dict: of a `TorchWrap` with the same links around the same optimizer. That of an optimizer alone goes
            into `wrap.base`.

        Raises:
          TypeError: it is no dict.
          ValueError: it is incomplete, or of others; this optimizer and its links are unchanged.
        """
        state_dict = copy.copy(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        loading.check_layout(state_dict, "TorchWrap: the loaded state dict")
        before = {role: copy.deepcopy(links.state_dict()) for role, links in self._links.items()}
        done = False
        try:
            for role, links in self._links.items():
                links.load_state_dict(part_of(state_dict, role))
            self.base.load_state_dict(part_of(state_dict, None))
            done = True
        finally:
            if not done:
                for role, links in self._links.items():
                    links.load_state_dict(before[role])
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def metrics(self) -> dict[str, Any]:
        """What the links know of the run, by `"before"` and `"after"`: `TorchBridge.metrics` of each."""
        return {role: links.metrics() for role, links in self._links.items()}

    def explain(self, passes: bool = False) -> str:
        """What the links became: `TorchBridge.explain` of each."""
        parts = [f"{role}\n{links.explain(passes)}" for role, links in self._links.items()]
        return "\n\n".join([f"around {type(self.base).__name__}", *parts])
