"""The compiled kernel over NumPy arrays and raw memory.

A call takes many tensors and works on them in place, in one parallel loop and without the GIL. It checks
everything it was given before it writes anything.

A role is a sequence with one entry a tensor: a C-contiguous NumPy array, or (pointer, length, dtype) for
memory the caller keeps alive; or such a sequence read once into `Buffers`. Parameters, gradients, updates
and moments are float32, bfloat16 or float16, each tensor as it likes; codes uint8; scales and magnitudes
float32. A number is for all tensors, or an array with one for each. `threads` 0 is the default:
CHAINRULE_NUM_THREADS, else the processors this process may run on; results do not depend on it.

The equations are in ``include/chainrule/tier_update.hpp`` and ``quant4.hpp``. With `updates` the step goes
there, to be added to the parameters, which are then only read (and not needed without weight decay); an
update may be its gradient's own memory. ``learning_rate=-1`` with `updates` gives the direction.

Raises:
    TypeError: something that is no buffer or has a dtype that is not supported.
    ValueError: memory that is not contiguous, misaligned, read-only where it is written, overlapping or of
        the wrong length; a number out of its range; a role missing or one too many.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Memory: TypeAlias = NDArray[Any] | tuple[int, int, str]

class Buffers:
    """Tensors read and checked once, for use in many calls."""

    def __init__(self, tensors: Sequence[Memory], name: str = "buffers") -> None: ...
    def __len__(self) -> int: ...

Role: TypeAlias = Buffers | Sequence[Memory]

def tier2(
    parameters: Role | None,
    gradients: Role,
    mu: Role,
    nu: Role | None,
    *,
    mu_long: Role | None = None,
    updates: Role | None = None,
    learning_rate: ArrayLike,
    weight_decay: ArrayLike = 0.0,
    b1: ArrayLike,
    b1_long: ArrayLike = 0.0,
    blend: ArrayLike = 1.0,
    b2: ArrayLike,
    eps: ArrayLike,
    mu_correction: ArrayLike = 1.0,
    nu_correction: ArrayLike = 1.0,
    denominator: Literal["root", "magnitude", "none"] = "root",
    threads: int = 0,
) -> None: ...
def tier2_quantized(
    parameters: Role | None,
    gradients: Role,
    mu_codes: Role,
    mu_scales: Role,
    nu: Role | None,
    *,
    mu_long_codes: Role | None = None,
    mu_long_scales: Role | None = None,
    updates: Role | None = None,
    block: ArrayLike,
    bits: Literal[4, 8] = 4,
    start: Literal["zero", "gradient"] = "zero",
    learning_rate: ArrayLike,
    weight_decay: ArrayLike = 0.0,
    b1: ArrayLike,
    b1_long: ArrayLike = 0.0,
    blend: ArrayLike = 1.0,
    b2: ArrayLike,
    eps: ArrayLike,
    mu_correction: ArrayLike = 1.0,
    nu_correction: ArrayLike = 1.0,
    denominator: Literal["root", "magnitude", "none"] = "root",
    threads: int = 0,
) -> None: ...
def tier1(
    parameters: Role | None,
    gradients: Role,
    magnitudes: Role,
    *,
    updates: Role | None = None,
    learning_rate: ArrayLike,
    weight_decay: ArrayLike = 0.0,
    decay: ArrayLike,
    scale_decay: bool = False,
    mean_magnitude: ArrayLike | None = None,
    threads: int = 0,
) -> None: ...
def tier0(
    parameters: Role | None,
    gradients: Role,
    *,
    updates: Role | None = None,
    learning_rate: ArrayLike,
    weight_decay: ArrayLike = 0.0,
    threads: int = 0,
) -> None: ...
def statistics(gradients: Role, *, threads: int = 0) -> NDArray[np.float64]:
    """(tensors, 4): mean abs(g), mean g**2, variance, max abs(g); 0 for an empty tensor."""

def sums(
    kind: str, xs: Role, ys: Role | None = None, *, c: float = 1.0, threads: int = 0
) -> NDArray[np.float32]:
    """(tensors, sums), as `chainrule.native.xla.sums` has them."""

def quantize(
    values: Role,
    codes: Role,
    scales: Role,
    *,
    block: ArrayLike,
    bits: Literal[4, 8] = 4,
    keys: NDArray[np.uint32] | None = None,
    threads: int = 0,
) -> None:
    """Writes codes and scales; `keys` (tensors, 2) rounds stochastically instead of to nearest."""

def dequantize(
    codes: Role,
    scales: Role,
    values: Role,
    *,
    block: ArrayLike,
    bits: Literal[4, 8] = 4,
    threads: int = 0,
) -> None:
    """Writes values."""

def info() -> dict[str, object]:
    """Compiler, instruction sets compiled in that run here, the one chosen, default threads."""

def xla_targets() -> dict[str, object]:
    """Name to capsule of each XLA FFI handler."""

def layout() -> dict[str, object]:
    """The names and orders that C++ and Python share: the columns of tables, denominators, kinds of sums."""

Place: TypeAlias = tuple[int, int, int, int]

class ScalarProgram:
    """Straight-line arithmetic on words of 32 bits: float32, int32, or truth values 0 and 1.

    Args:
        instructions: (operation, result, a, b, c): words[result] = operation(words[a], words[b], words[c]), with the
            names of `scalar_ops`; an operation of fewer operands ignores the others.
        loads: (word, tensor, offset, bytes): what `run` first reads; element `offset` of a tensor's memory, of 4
            bytes, or 1 for a truth value.
        stores: what it writes at the end, likewise.
        words: uint32, with the values of numbers; they are kept between runs.
        tensors: how many there are.

    Raises:
        ValueError: an unknown operation, or an index out of its range.
    """

    def __init__(
        self,
        instructions: Sequence[tuple[str, int, int, int, int]],
        loads: Sequence[Place],
        stores: Sequence[Place],
        words: NDArray[np.uint32],
        tensors: int,
    ) -> None: ...
    def run(self, pointers: Sequence[int]) -> None:
        """Runs on the memory of the tensors, which the caller vouches for.

        Raises:
            ValueError: another number of pointers, or one that is null; nothing has been written.
        """

def scalar_ops() -> list[str]:
    """The operations: torch's name and the type of the operands, f, i or b."""

ELEMENT_PLACES: tuple[int, int, int, int]
"""How many tensors, rooms, numbers and sums a program of elements may have."""

ElementPlace: TypeAlias = tuple[int, int]
"""0, a tensor; 1, a room for a tile; 2, a number; 3, a sum; and which of them."""

class ElementProgram:
    """Straight-line arithmetic element by element on float32 tensors (``include/chainrule/elements.hpp``).

    Args:
        steps: (operation, result, operands), with the names of `element_ops`, or `"sum"`, of everything into a sum.
        rows: for each leaf its number of elements, its tensors among all, and the words that are its numbers.
        words: of a `ScalarProgram`, which are read at every run.
        tensors: how many there are.
        sums: where each run writes the sums of each row, one row after the other.

    Raises:
        ValueError: an unknown operation, an index out of its range, or sums that are no whole number for each row.
    """

    def __init__(
        self,
        steps: Sequence[tuple[str, ElementPlace, Sequence[ElementPlace]]],
        rows: Sequence[tuple[int, Sequence[int], Sequence[int]]],
        words: NDArray[np.uint32],
        tensors: int,
        sums: NDArray[np.float32] = ...,
    ) -> None: ...
    def run(self, pointers: Sequence[int], threads: int = 1) -> None:
        """Runs on the memory of the tensors, which the caller vouches for; results do not depend on `threads`.

        Raises:
            ValueError: another number of pointers, or of threads than 1 to 1024; nothing has been written.
        """

def element_ops() -> list[str]:
    """The operations of `ElementProgram`."""

class Launches:
    """Calls of one compiled function without a result, each with arguments of 64 bits.

    Args:
        function: its address, which the caller vouches for, as for the memory of the tensors.
        rows: the arguments of each call, at most 64: the address of tensor i, or `numbers[i - tensors]`.
        numbers: that do not change.
        tensors: how many there are.

    Raises:
        ValueError: an index out of its range, or a row that is too long.
    """

    def __init__(
        self, function: int, rows: Sequence[Sequence[int]], numbers: Sequence[int], tensors: int
    ) -> None: ...
    def run(self, pointers: Sequence[int], threads: int = 1) -> None:
        """Makes the calls, without the GIL, at most so many at a time.

        Raises:
            ValueError: another number of pointers, or of threads than 1 to 1024; nothing has been called.
        """

def add_loops(key: str, addresses: Sequence[int]) -> None:
    """Names compiled loops, whose addresses the caller vouches for, for the foreign call `chainrule_loops`.

    Raises:
        ValueError: a null address.
    """

class Format:
    """How tensors are held in codes; ``include/chainrule/coding.hpp`` has the equations.

    Its methods take addresses, which the caller vouches for, and the entries of a tensor of `size` from `begin`, a
    multiple of two blocks, to `end`.

    Raises:
        ValueError: `bits` other than 4 and 8, a block below 1, or threads beyond 1 to 1024.
    """

    def __init__(self, bits: int, block: int, logarithmic: bool) -> None: ...
    def decode(
        self,
        codes: int,
        scales: int,
        size: int,
        values: int,
        begin: int,
        end: int,
        threads: int = 1,
    ) -> None:
        """Writes float32 values."""
    def encode(
        self,
        codes: int,
        scales: int,
        size: int,
        values: int,
        key: int,
        begin: int,
        end: int,
        threads: int = 1,
    ) -> None:
        """Writes codes and scales; `key` is 0, or the address of two words in int64, to round stochastically."""

CodedPlace: TypeAlias = tuple[int, int, int]
"""0 and the position of a number; 1, the position of a tensor and the bytes of its element, 0 for a scalar; 2 and the
number of a room for a tile; 3: the length of a tile."""

Coded: TypeAlias = tuple[Format, CodedPlace, int, int, int]
"""Format, values, and the positions of codes, scales and a key, or -1."""

class CodedLaunches:
    """`Launches` tile by tile, between decoding and encoding: a row is (size, arguments, decoded, encoded).

    In the place of a function may stand an `ElementProgram` of as many rows, whose tensors are the arguments.

    Raises:
        ValueError: an index out of its range, a row that is too long or unlike the program's, or blocks that do not
            divide each other.
    """

    def __init__(
        self,
        function: int | ElementProgram,
        rows: Sequence[tuple[int, Sequence[CodedPlace], Sequence[Coded], Sequence[Coded]]],
        numbers: Sequence[int],
        tensors: int,
    ) -> None: ...
    def run(self, pointers: Sequence[int], threads: int = 1) -> None:
        """As of `Launches`; results do not depend on `threads`."""

def threefry2x32(
    words: Sequence[int], steps: Sequence[int], first: int, second: int, count: int
) -> None:
    """Threefry-2x32 on uint32 words in int64, which the caller vouches for.

    Args:
        words: addresses of the two words of the key and the two of the counter.
        steps: of each of them, 1, or 0 where one word is for all.
        first: address of `count` words that it writes.
        second: of the others.
        count: how many blocks.
    """
