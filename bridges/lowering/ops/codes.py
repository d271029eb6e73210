"""Tensors in codes by the compiled kernel: what `chainrule.native.forms` has in JAX, bit for bit."""

import functools
from typing import Any

import torch
from torch import Tensor

from chainrule.native import _kernel
from chainrule.native.coding import Format, block_count, packed_size


@functools.cache
def kernel_format(held: Format) -> Any:
    """The format as the kernel takes it."""
    return _kernel.Format(*held)


def decode(codes: Tensor, scales: Tensor, shape: tuple[int, ...], held: Format) -> Tensor:
    """The float32 tensor that codes and scales stand for."""
    x = torch.empty(shape, dtype=torch.float32, device="cpu")
    decode_part(x, codes, scales, held, x.numel(), 0)
    return x


def encode(x: Tensor, key: Tensor | None, held: Format) -> list[Tensor]:
    """The codes and scales of a float32 tensor; with the two words of a key, stochastically."""
    codes = torch.empty((packed_size(x.numel(), held.bits),), dtype=torch.uint8, device="cpu")
    scales = torch.empty((block_count(x.numel(), held.block),), dtype=torch.float32, device="cpu")
    encode_part(x, codes, scales, key, held, x.numel(), 0)
    return [codes, scales]


def decode_part(
    x: Tensor, codes: Tensor, scales: Tensor, held: Format, size: int, begin: int
) -> None:
    """Writes into `x`, which is contiguous, what stands at `begin` in a tensor of `size` entries."""
    given = (codes.data_ptr(), scales.data_ptr(), size, x.data_ptr(), begin, begin + x.numel())
    kernel_format(held).decode(*given, torch.get_num_threads())


def encode_part(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    key: Tensor | None,
    held: Format,
    size: int,
    begin: int,
) -> None:
    """Writes the codes and scales of `x`, which stands at `begin`, a multiple of two blocks, in a tensor of `size`."""
    x = x.contiguous()
    words = 0 if key is None else key.data_ptr()
    given = (codes.data_ptr(), scales.data_ptr(), size, x.data_ptr(), words)
    kernel_format(held).encode(*given, begin, begin + x.numel(), torch.get_num_threads())
