"""Parameters that are DTensors: how they lie on their mesh, and their state beside them."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chainrule.bridges.lowering.arrays import physical_shape
from chainrule.bridges.lowering.layouts import Axes, Cut, Mesh, local_shape, spans, whole
from chainrule.bridges.lowering.passes.shard import Sharding


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor; does not import torch's distributed package."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """What this rank has of a tensor: the memory of it, for a DTensor."""
    if not is_distributed(tensor):
        return tensor
    with torch.no_grad():
        own = tensor.to_local()
    return own.wait() if hasattr(own, "wait") else own  # an asynchronous collective's result


def local_step(
    params: Sequence[Any], grads: Sequence[Any], leaves: Sequence[Any]
) -> tuple[list[Tensor], list[Any], list[Tensor]]:
    """What this rank has of parameters, gradients (None stays) and state: as `local`, and `gradient`, for each.

    A step calls it with hundreds of tensors, so it takes the short way: all have what they need at hand.
    """
    kind = sys.modules["torch.distributed.tensor"].DTensor
    own = [
        g._local_tensor
        if type(g) is type(p) is kind
        # The same object under `fully_shard`.
        and (g._spec is p._spec or g._spec.placements == p._spec.placements)
        and type(g._local_tensor) is Tensor
        else g
        if g is None
        else gradient(p, g)
        for p, g in zip(params, grads, strict=True)
    ]
    params, leaves = (
        [x._local_tensor if type(x) is kind else x for x in tensors] for tensors in (params, leaves)
    )
    return params, own, leaves


def gathered(tensor: Any) -> Tensor:
    """All of a tensor; for a DTensor every rank must call it."""
    if not is_distributed(tensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()


def laid_out(value: Any, like: Any) -> Any:
    """`value` as a tensor that lies as `like` does; where layouts differ every rank must call it."""
    if not is_distributed(like):
        return gathered(value)
    if is_distributed(value):
        if (value.device_mesh, value.placements) == (like.device_mesh, like.placements):
            return value
        value = gathered(value)
    axes, mesh = _layout(like, like.device_mesh)
    return _like(_part(value, axes, mesh), like)


def _part(value: Tensor, axes: Axes, mesh: Mesh) -> Tensor:
    for axis, (start, stop) in enumerate(spans(value.shape, axes, mesh.coordinate)):
        value = value.narrow(axis, start, stop - start)
    return value.contiguous()


def _like(own: Tensor, like: Any) -> Any:
    """A DTensor of the shape and layout of another."""
    return type(like.data).from_local(
        own,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


class Layouts(NamedTuple):
    """How the parameters of a group lie on a mesh of devices."""

    mesh: Mesh
    axes: tuple[Axes, ...]
    """Of every parameter."""

    @classmethod
    def of(cls, params: Sequence[Tensor], labels: Sequence[str]) -> "Layouts | None":
        """None if there are no DTensors.

        Raises:
          NotImplementedError: parameters on meshes that are no parts of one; a placement that gives no rank a block.
        """
        meshes = list(dict.fromkeys(p.device_mesh for p in params if is_distributed(p)))  # pyright: ignore
        if not meshes:
            return None
        common = _common(meshes)
        found = []
        for p, label in zip(params, labels, strict=True):
            axes = whole(p.ndim)
            if is_distributed(p):
                axes, mesh = _layout(p, common)
                if local_shape(p.shape, axes, mesh) != tuple(local(p).shape):
                    raise NotImplementedError(
                        f"TorchBridge: parameter {label} is placed as {p.placements}, "  # pyright: ignore
                        "which gives no rank one block of it; use Shard and Replicate"
                    )
            found.append(axes)
        return cls(_mesh(common), tuple(found))

    def of_step(self, alike: Sequence[int | None], inputs: Sequence[Any]) -> Sharding:
        """Of the flat inputs of a step: parameters, gradients, state, scalars, and what else is given.

        Args:
          alike: for every input from the state on the position of the parameter that it lies like, None: it is whole.
          inputs: of the step, in JAX.
        """
        leaves = inputs[2 * len(self.axes) :]
        axes = (*self.axes, *self.axes, *self._of(alike, leaves))
        return Sharding(self.mesh, axes, params=len(self.axes))

    def of_init(self, alike: Sequence[int | None], results: Sequence[Any]) -> Sharding:
        """Of the parameters, and of what `init` makes of them: the first leaves of the state."""
        lies = alike[: len(results)]
        return Sharding(self.mesh, self.axes, tuple(self._of(lies, results)))

    def _of(self, alike: Sequence[int | None], leaves: Sequence[Any]) -> list[Axes]:
        return [
            whole(len(physical_shape(leaf))) if i is None else self.axes[i]
            for i, leaf in zip(alike, leaves, strict=True)
        ]


def as_state(own: Tensor, like: Any) -> Any:
    """What this rank has of a leaf of the state, as a DTensor where it lies like one."""
    return _like(own, like) if is_distributed(like) else own


def gradient(param: Any, grad: Any) -> Any:
    """A gradient as this rank has it: in the layout of its parameter."""
    if is_distributed(param) and is_distributed(grad) and grad.placements != param.placements:
        with torch.no_grad():
            grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def _common(meshes: Sequence[Any]) -> Any:
    """The mesh of which all others are parts."""
    if len(meshes) == 1:
        return meshes[0]
    roots = {mesh._get_root_mesh() for mesh in meshes}
    names = list(meshes[0]._get_root_mesh().mesh_dim_names or ())
    used = {name for mesh in meshes for name in mesh.mesh_dim_names or ()}
    if len(roots) > 1 or not used:
        raise NotImplementedError(
            f"TorchBridge: the parameters of a group lie on {len(meshes)} device meshes that are no parts of one with "
            "named dimensions; make them by slicing one mesh, or give each mesh a group of its own"
        )
    (root,) = roots
    kept = tuple(name for name in names if name in used)
    return root if kept == tuple(names) else root[kept]


def _layout(tensor: Any, common: Any) -> tuple[Axes, Mesh]:
    """The axes of a DTensor on a mesh of which its own is a part."""
    own, mesh = tensor.device_mesh, _mesh(common)
    names = common.mesh_dim_names
    dims = range(own.ndim) if own == common else [names.index(n) for n in own.mesh_dim_names]
    splits: dict[int, list[tuple[int, int]]] = {}
    later: dict[int, list[tuple[int, int]]] = {}
    for dim, placement in zip(dims, tensor.placements, strict=True):
        if placement.is_replicate():
            continue
        if placement.is_partial():
            raise NotImplementedError(
                f"TorchBridge: a parameter of shape {tuple(tensor.shape)} is placed as {tensor.placements}, so no rank "
                "knows its value; redistribute it to Shard or Replicate"
            )
        # A strided shard (FSDP over tensor parallelism) was split after those that come later in the mesh.
        strided = hasattr(placement, "split_factor")
        (later if strided else splits).setdefault(placement.dim, []).append((dim, mesh.shape[dim]))
    axes = tuple(
        Cut(n, (*splits.get(i, ()), *reversed(later.get(i, []))))
        if i in splits or i in later
        else None
        for i, n in enumerate(tensor.shape)
    )
    return axes, mesh


def _mesh(mesh: Any) -> Mesh:
    """A mesh of devices as this rank sees it."""
    import torch.distributed as dist

    known = _MESHES.get(mesh)
    if known is None:
        lines = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        if mesh.ndim == 1:
            everyone = lines[0]
        elif mesh.size() == dist.get_world_size():
            everyone = dist.group.WORLD
        else:
            everyone = mesh._flatten().get_group()
        ranks: Any = mesh.mesh
        order = tuple(
            tuple(map(int, (ranks == rank).nonzero()[0]))
            for rank in dist.get_process_group_ranks(everyone)
        )
        names = tuple(group.group_name for group in (*lines, everyone))  # pyright: ignore
        known = Mesh(tuple(mesh.shape), tuple(mesh.get_coordinate()), order, names)
        _MESHES[mesh] = known
    return known


_MESHES: dict[Any, Mesh] = {}
