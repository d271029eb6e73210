"""XLA's padding, slicing, gathering and scattering."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad(x: Tensor, value: Tensor | float, config: Sequence[tuple[int, int, int]]) -> Tensor:
    """Pad each axis by (low, high, interior) elements of ``value``; negative ones cut."""
    spread = [n + max(n - 1, 0) * inner for n, (_, _, inner) in zip(x.shape, config, strict=True)]
    sizes = [n + max(lo, 0) + max(hi, 0) for n, (lo, hi, _) in zip(spread, config, strict=True)]
    fill = value.to(x.dtype) if isinstance(value, Tensor) else value
    out = torch.zeros(sizes, dtype=x.dtype, device=x.device) + fill
    if x.numel():
        inside = tuple(
            slice(max(lo, 0), max(lo, 0) + n, inner + 1)
            for n, (lo, _, inner) in zip(spread, config, strict=True)
        )
        out[inside] = x
    cut = tuple(
        slice(max(-lo, 0), n - max(-hi, 0)) for n, (lo, hi, _) in zip(sizes, config, strict=True)
    )
    return out[cut].to(x.dtype)


def first(x: Tensor) -> Tensor:
    """The first element, in as many dimensions; also of a tensor that is given flat."""
    return x[(slice(0, 1),) * x.ndim]


def unbind(x: Tensor) -> tuple[Tensor, ...]:
    """The entries of a copy of a vector."""
    return x.clone().unbind()


def _clamped(start: Tensor | int, high: int) -> Tensor | int:
    if isinstance(start, Tensor):
        return torch.clamp(start.to(torch.int64), 0, high)
    return min(max(start, 0), high)


def _window(
    shape: Sequence[int], starts: Sequence[Tensor | int], sizes: Sequence[int], device: torch.device
) -> tuple[Tensor, ...]:
    """Index tensors of the window of ``sizes`` at ``starts``, pushed inside ``shape``."""
    index = []
    for d, (n, start, size) in enumerate(zip(shape, starts, sizes, strict=True)):
        along = torch.arange(size, device=device) + _clamped(start, n - size)
        index.append(along.reshape([-1 if e == d else 1 for e in range(len(shape))]))
    return tuple(index)


def dynamic_slice(x: Tensor, starts: Sequence[Tensor | int], sizes: Sequence[int]) -> Tensor:
    """The window of ``sizes`` at ``starts``, moved inside ``x`` where it sticks out."""
    for d, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if size == x.shape[d]:
            continue
        at = _clamped(start, x.shape[d] - size)
        if isinstance(at, Tensor):
            x = torch.index_select(x, d, torch.arange(size, device=x.device) + at)
        else:
            x = x.narrow(d, at, size)
    return x


def dynamic_update_slice(x: Tensor, update: Tensor, starts: Sequence[Tensor | int]) -> Tensor:
    """``x`` with ``update`` written at ``starts``, moved inside where it sticks out."""
    if x.ndim == 0:
        return torch.clone(update)
    index = _window(x.shape, starts, update.shape, x.device)
    return torch.index_put(x, index, update)


def _addresses(
    shape: Sequence[int],
    indices: Tensor,
    window: Sequence[int],
    index_map: Sequence[int],
    batching: Sequence[tuple[int, int]],
    collapsed: Sequence[int],
    clip: bool,
) -> tuple[Tensor, Tensor]:
    """Flat addresses of every window element, batch axes first, and which windows fit.

    ``batching`` pairs an operand axis with the axis of ``indices`` that walks along it.
    """
    batch = indices.shape[:-1]
    axes = [d for d in range(len(shape)) if d not in collapsed]
    starts: dict[int, Tensor] = {d: indices[..., i].long() for i, d in enumerate(index_map)}
    for operand_axis, index_axis in batching:
        walk = torch.arange(batch[index_axis], device=indices.device)
        starts[operand_axis] = walk.reshape(
            [-1 if i == index_axis else 1 for i in range(len(batch))]
        )
    fits = torch.ones(batch, dtype=torch.bool, device=indices.device)
    flat = torch.zeros(batch, dtype=torch.int64, device=indices.device)
    flat = flat.reshape([*batch, *[1] * len(axes)])
    stride = 1
    for d in reversed(range(len(shape))):
        start = starts.get(d)
        if start is not None:
            last = shape[d] - window[d]
            if not clip:
                fits = fits & (start >= 0) & (start <= last)
            start = torch.clamp(start, 0, last)
            flat = flat + (start * stride).reshape([*start.shape, *[1] * len(axes)])
        if d in axes:
            along = torch.arange(window[d], device=indices.device) * stride
            flat = flat + along.reshape([-1 if a == d else 1 for a in axes])
        stride *= shape[d]
    return flat, fits.reshape([*batch, *[1] * len(axes)])


def gather(
    x: Tensor,
    indices: Tensor,
    window: Sequence[int],
    offset_dims: Sequence[int],
    collapsed: Sequence[int],
    index_map: Sequence[int],
    batching: Sequence[tuple[int, int]],
    clip: bool,
    fill: float | int | bool,
) -> Tensor:
    """XLA's gather; windows that stick out are moved inside, or read ``fill``."""
    flat, fits = _addresses(x.shape, indices, window, index_map, batching, collapsed, clip)
    values = torch.take(x, flat) if x.numel() else x.new_full(flat.shape, fill)
    if not clip:
        values = torch.where(fits, values, torch.full_like(values, fill))
    batch = iter(range(indices.ndim - 1))
    offset = iter(range(indices.ndim - 1, values.ndim))
    order = [next(offset) if d in offset_dims else next(batch) for d in range(values.ndim)]
    return values.permute(order)


def scatter(
    x: Tensor,
    indices: Tensor,
    updates: Tensor,
    reduce: str,
    window_dims: Sequence[int],
    inserted: Sequence[int],
    index_map: Sequence[int],
    batching: Sequence[tuple[int, int]],
    clip: bool,
) -> Tensor:
    """XLA's scatter (``reduce`` in set, sum, prod, amin, amax); windows that stick out are dropped."""
    batch_dims = [d for d in range(updates.ndim) if d not in window_dims]
    sizes = iter(updates.shape[d] for d in window_dims)
    window = [1 if d in inserted else next(sizes) for d in range(x.ndim)]
    flat, fits = _addresses(x.shape, indices, window, index_map, batching, inserted, clip)
    values = updates.permute([*batch_dims, *window_dims])
    # One spare element at the end takes what is dropped.
    address = torch.where(fits, flat, x.numel()).expand(values.shape).reshape(-1)
    buffer = torch.cat([x.reshape(-1), x.new_zeros(1)])
    if reduce == "set":
        buffer = torch.scatter(buffer, 0, address, values.reshape(-1))
    elif reduce == "sum":
        buffer = torch.index_add(buffer, 0, address, values.reshape(-1))
    else:
        buffer = torch.scatter_reduce(buffer, 0, address, values.reshape(-1), reduce)
    return buffer[:-1].reshape(x.shape)
