"""The optimizer class of an exported file, but for what `file` writes above it for each chain.

A file holds what is below the line of dashes in `runtime_lists`, its own functions, and what is below that line in
`runtime_compiled`, here and in `runtime_checks`; it imports torch and nothing else of others.
"""

# pyright: reportPrivateUsage=false, reportUnusedFunction=false
import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.bridges.export.runtime_checks import (
    _FLAGS,
    _GROUP_STATE,
    _LEAF_STATE,
    _LIVE,
    _READS_LOSS,
    _TORCH_KEYS,
    _check,
    _check_grad,
    _check_param,
    _fitting,
    _kind,
    _ordered,
    _pair,
    _saved_ids,
    _start,
    _step,
)
from chainrule.bridges.export.runtime_compiled import _DTYPE, _SHAPE, _inputs, _run
from chainrule.bridges.export.runtime_functions import _program
from chainrule.bridges.export.runtime_launches import _Again, _again, _are_plain, _Registers
from chainrule.bridges.export.runtime_lists import _Leaf

# ------------------------------------------------------------------------------------------------


class Exported(torch.optim.Optimizer):
    """DOCSTRING"""

    _filled: "dict[tuple[int, str], tuple[Any, Tensor]] | None" = None
    _compile: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compile": self._compile}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choose(self._compile)

    def _choose(self, compile: bool) -> None:
        """Whether steps are compiled."""
        self._compile = bool(compile)
        self._programs: dict[Any, Callable[[list[Tensor]], Any]] = {}
        self._known: dict[int, _Again] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with a state of its own; refused, it leaves the optimizer as it was."""
        params = param_group.get("params")
        if isinstance(params, Iterable) and not isinstance(params, (Tensor, set)):
            param_group["params"] = found = list(params)
            if len({id(p[1] if isinstance(p, tuple) else p) for p in found}) < len(found):
                raise ValueError(
                    f"{type(self).__name__}: a parameter appears twice in one parameter group"
                )
        given = set(param_group)
        super().add_param_group(param_group)
        group, added = self.param_groups[-1], False
        try:
            self._begin(group, given)
            added = True
        finally:
            if not added:
                self.param_groups.pop()

    def _begin(self, group: dict[str, Any], given: set[str]) -> None:
        owner = f"{type(self).__name__}: param group {len(self.param_groups) - 1}"
        if "b1" in _LIVE and "b2" in _LIVE:
            if "betas" in given and not given & {"b1", "b2"}:
                group["b1"], group["b2"] = _pair(group["betas"], owner)
            group["betas"] = (group["b1"], group["b2"])
        for key in _LIVE:
            _check(owner, key, group[key])
        for key, value in group.items():
            if key in _FLAGS and value:
                raise ValueError(f"{owner}: `{key}` cannot be {value!r}; {_FLAGS[key]}")
            known = key in _LIVE or key in _TORCH_KEYS or key in _FLAGS
            if not known and isinstance(value, (int, float, Tensor)):
                raise ValueError(f"{owner}: `{key}` is no hyperparameter; they are {sorted(_LIVE)}")
        members = [p for p in group["params"] if p.requires_grad] or list(group["params"])
        for p in group["params"]:
            _check_param(owner, p)
        if members:
            made: dict[str, Tensor] = {}
            leaves = [_Leaf(p, p, {}, _kind(owner, p)) for p in _ordered(group, members)]
            with torch.no_grad():
                _start(leaves, made)
            for leaf in leaves:
                self.state[leaf.param] = leaf.state
            self.state[members[0]].update(made)

    # ---- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient; all is checked before anything is written.

        Args:
          closure: evaluates the model, calls backward and returns the loss.

        Returns:
          What the closure returned, or None.

        Raises:
          RuntimeError: a gradient that is sparse or of another dtype.
          ValueError: a hyperparameter out of bounds; no closure where the chain reads the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if _READS_LOSS and loss is None:
            raise ValueError(
                f"{type(self).__name__}: reads the loss; call `step(closure)` with a closure that returns it"
            )
        ready = [
            (
                index,
                group,
                _again(self._known.get(index), group, self.state)
                or self._taking_part(index, group),
            )
            for index, group in enumerate(self.param_groups)
            if any(p.grad is not None for p in group["params"])
        ]
        rates = [self._rates(index, group) for index, group, _ in ready]
        runs: list[tuple[str, Callable[[], None]]] = []
        for (index, group, found), own in zip(ready, rates, strict=True):
            device = group["params"][0].device
            value = torch.as_tensor(0.0 if loss is None else loss, dtype=torch.float32)
            value = value.detach().reshape(()).to(device)
            if callable(found):
                run = functools.partial(found, [*own.values(), value])
            else:
                make = functools.partial(self._compiled, index, group)
                make = make if self._compile else functools.partial(functools.partial, _step)
                run = make(found, self._shared(index, group), own, value)
            runs.append((device.type, run))
        for device, run in runs:
            with torch.autocast(device, enabled=False):
                run()
        return loss

    def _compiled(
        self,
        index: int,
        group: dict[str, Any],
        leaves: Sequence[_Leaf],
        shared: dict[str, Tensor],
        rates: dict[str, Tensor],
        loss: Tensor,
    ) -> Callable[[], None]:
        """A step that is compiled once for each list of shapes and dtypes."""
        tensors = _inputs(leaves, shared, rates, loss)
        key = loss.device, *map(_SHAPE, tensors), *map(_DTYPE, tensors)
        if key not in self._programs:
            self._programs[key] = _program(type(self).__name__, leaves, shared, rates, loss)
        program, known = self._programs[key], self._known.pop(index, None)
        if known is not None:
            known.forget()
        if isinstance(program, _Registers) and _are_plain(leaves, tensors):
            self._known[index] = _Again(group, leaves, tensors[: -len(rates) - 1], program)
        return functools.partial(_run, program, tensors, len(leaves))

    def _taking_part(self, index: int, group: dict[str, Any]) -> list[_Leaf]:
        """The parameters of a group in a step. One without a gradient keeps its value and state, and counts as zero."""
        owner = f"{type(self).__name__}: param group {index}"
        members = [p for p in group["params"] if p.grad is not None or self.state.get(p)]
        leaves: list[_Leaf] = []
        for p in _ordered(group, members):
            kind, state = _kind(owner, p), self.state[p]
            _check_grad(owner, p)
            if not all(map(state.__contains__, _LEAF_STATE[kind])):
                leaf = _Leaf(p, p, {}, kind)  # it joins with its first gradient
                _start([leaf], {})
                state.update(leaf.state)
            if p.grad is not None:
                leaves.append(_Leaf(p, p.grad, state, kind))
            else:
                kept = {name: x.clone() for name, x in state.items()}
                leaves.append(_Leaf(p.clone(), torch.zeros_like(p), kept, kind))
        return leaves

    def _shared(self, index: int, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of all parameters of a group, which is kept with the first."""
        if not _GROUP_STATE:
            return {}
        for p in group["params"]:
            own = self.state.get(p, {})
            if all(name in own for name in _GROUP_STATE):
                return {name: own[name] for name in _GROUP_STATE}
        raise RuntimeError(
            f"{type(self).__name__}: param group {index} has no state {list(_GROUP_STATE)}; load a state dict"
        )

    def _rates(self, index: int, group: dict[str, Any]) -> dict[str, Tensor]:
        """The hyperparameters of a group as tensors."""
        owner = f"{type(self).__name__}: param group {index}"
        if self._filled is None:
            self._filled = {}
        if "b1" in _LIVE and "b2" in _LIVE:
            pair, _ = self._filled.get((index, "betas"), (group.get("betas"), None))
            if "betas" in group and group["betas"] != pair:
                group["b1"], group["b2"] = _pair(group["betas"], owner)
            group["betas"] = pair = (group["b1"], group["b2"])
            self._filled[index, "betas"] = pair, torch.empty(0)
        device, found = group["params"][0].device, {}
        for key, dtype in _LIVE.items():
            value = group[key]
            known, tensor = self._filled.get((index, key), (None, None))
            if (
                tensor is None
                or isinstance(value, Tensor)
                or value != known
                or tensor.device != device
            ):
                _check(owner, key, value)
                tensor = torch.as_tensor(value, dtype=dtype).detach().reshape(()).to(device)
                self._filled[index, key] = value, tensor
            found[key] = tensor
        return found

    # ---- saving and loading --------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies a state dict of this class, or of the bridge with the same chain; refused, it changes nothing."""
        state_dict = copy.copy(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        saved_groups = copy.deepcopy(state_dict["param_groups"])
        if len(saved_groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        state: dict[Tensor, dict[str, Tensor]] = {}
        groups: list[dict[str, Any]] = []
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            owner = f"{type(self).__name__}: param group {index} of the loaded state dict"
            for key in _LIVE:
                if key not in saved:
                    raise ValueError(
                        f"{owner} has no `{key}`, a hyperparameter; is it of another chain?"
                    )
                _check(owner, key, saved[key])
            ids = _saved_ids(owner, group, saved)
            entries = {
                p: state_dict["state"].get(k) or {}
                for k, p in zip(ids, group["params"], strict=True)
            }
            state |= self._loaded(owner, group, entries)
            names = {k: group[k] for k in ("params", "param_names") if k in group}
            if "param_names" not in names and isinstance(saved.get("param_names"), list):
                names["param_names"] = saved["param_names"]
            groups.append({**group, **saved, **names})
        for p, entry in state.items():
            self.state[p] = entry
        self.param_groups[:] = groups
        self._filled = None
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _loaded(
        self, owner: str, group: dict[str, Any], entries: dict[Tensor, dict[str, Any]]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """The state of a group from a saved one."""
        members = [p for p in group["params"] if entries[p]]
        leaves = [_Leaf(p, p, {}, _kind(owner, p)) for p in _ordered(group, members)]
        shared: dict[str, Tensor] = {}
        with torch.no_grad():
            if leaves:
                _start(leaves, shared)
        found: dict[Tensor, dict[str, Tensor]] = {}
        for leaf in leaves:
            entry = entries[leaf.param]
            for name in entry:
                if name not in leaf.state and name not in shared:
                    raise ValueError(
                        f"{owner}: state entry `{name}` is none of this chain's; is it of another chain?"
                    )
            found[leaf.param] = {
                name: _fitting(owner, name, entry.get(name), target)
                for name, target in leaf.state.items()
            }
        for name, target in shared.items():
            value = next((e[name] for e in entries.values() if name in e), None)
            found[members[0]][name] = _fitting(owner, name, value, target)
        return found
