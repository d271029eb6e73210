"""What a chain will cost on a model before anything is allocated: state by link, memory traffic, collectives."""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.bridges.step.function import as_transformation
from chainrule.bridges.step.slots import slots
from chainrule.models import Structs, structs_of
from chainrule.transforms._checks import check_choice
from chainrule.transforms._protocols import is_state

if TYPE_CHECKING:
    from chainrule.bridges.step.description import Description

DIMENSIONS = ("dp", "fsdp", "tp")


class Entry(NamedTuple):
    """A field of the state, of all parameters."""

    link: str
    """The transformation that keeps it, as its state is called."""
    field: str
    tensors: int
    bytes: int
    """Of all devices' one whole state."""
    bytes_here: int
    """On one device: the first, which has no less than the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The costs of a chain on a model; `str` and `rich.print` show them as tables.

    Attributes:
      parameters: how many numbers the model has.
      parameter_bytes: of the parameters on one device; gradients are as many.
      state: the fields of the state.
      mesh: dimension -> devices; empty: one device.
      read, written: bytes of memory that a step moves on one device, gradients and parameters among them.
      operations: floating-point operations of a step on one device.
      uncounted: functions whose operations are not counted (decompositions, sorts, control flow).
      collectives: (kind, bytes of the result, devices) of each collective of a step.
      sent: bytes that a device sends in a step, each collective on a ring.
      exact: whether traffic was counted in the program that the torch bridge compiles; without torch it is the least
        that any program moves, and of a mesh nothing is known.
      bandwidth, network: bytes a second, of memory and between devices; None: no time is told.
    """

    parameters: int
    parameter_bytes: int
    state: tuple[Entry, ...]
    mesh: Mapping[str, int]
    read: int
    written: int
    operations: int
    uncounted: tuple[str, ...]
    collectives: tuple[tuple[str, int, int], ...]
    sent: float
    exact: bool
    bandwidth: float | None
    network: float | None

    @property
    def state_bytes(self) -> int:
        """Of the whole state."""
        return sum(entry.bytes for entry in self.state)

    @property
    def state_bytes_here(self) -> int:
        """Of the state on one device."""
        return sum(entry.bytes_here for entry in self.state)

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.mesh.values())

    @property
    def seconds(self) -> float | None:
        """Of a step: memory and network one after the other; None without a bandwidth."""
        if self.bandwidth is None or (self.collectives and self.network is None):
            return None
        sent = self.sent / self.network if self.network else 0.0
        return (self.read + self.written) / self.bandwidth + sent

    def tables(self) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """Title, head and rows of each table, as text."""
        here = [] if not self.mesh else ["on a device"]
        rows = [
            (
                e.link,
                e.field,
                f"{e.tensors:,}",
                size_text(e.bytes),
                *[size_text(e.bytes_here) for _ in here],
            )
            for e in self.state
        ]
        total = (
            "total",
            "",
            "",
            size_text(self.state_bytes),
            *[size_text(self.state_bytes_here) for _ in here],
        )
        return [
            ("state", ("link", "field", "tensors", "bytes", *here), [*rows, total]),
            (self._title(), ("", ""), self._step()),
        ]

    def _title(self) -> str:
        mesh = ", ".join(f"{name}={n}" for name, n in self.mesh.items())
        return f"a step of one device of {mesh}" if mesh else "a step"

    def _step(self) -> list[tuple[str, ...]]:
        size = size_text(self.parameter_bytes)
        rows = [
            ("numbers in the model", f"{self.parameters:,}"),
            ("parameters; gradients", f"{size}; {size}"),
            (
                "read; written" if self.exact else "read; written, at least",
                f"{size_text(self.read)}; {size_text(self.written)}",
            ),
            (
                "operations",
                f"{self.operations:.3e}"
                + (f", without {', '.join(self.uncounted)}" if self.uncounted else ""),
            ),
        ]
        if self.mesh and self.exact:
            rows += [(f"{kind} over {n}", size_text(size)) for kind, size, n in self.collectives]
            rows.append(("collectives; sent", f"{len(self.collectives)}; {size_text(self.sent)}"))
        if self.seconds is not None:
            rows.append(("time", f"{1e3 * self.seconds:.3g} ms"))
        return rows

    def __str__(self) -> str:
        parts = []
        for title, head, rows in self.tables():
            shown = [head, *rows] if any(head) else rows
            widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
            lines = [
                "  " + "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip()
                for row in shown
            ]
            parts.append("\n".join([title, *lines]))
        return "\n\n".join(parts)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        tables = []
        for title, head, rows in self.tables():
            table = Table(title=title, title_justify="left", show_header=any(head))
            for i, column in enumerate(head):
                table.add_column(
                    column, justify="left" if (i < 2 and len(head) > 2) or not i else "right"
                )
            for row in rows:
                table.add_row(*row)
            tables.append(table)
        return Group(*tables)


def size_text(count: float) -> str:
    """Bytes for a reader, in powers of 1000.

    >>> size_text(12), size_text(1_236_000_000)
    ('12 B', '1.24 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def mesh_of(mesh: str | Mapping[str, int] | None) -> dict[str, int]:
    """The dimensions of a mesh.

    >>> mesh_of("dp=2,tp=4"), mesh_of(None)
    ({'dp': 2, 'tp': 4}, {})
    """
    if mesh is None:
        return {}
    if isinstance(mesh, str):
        pairs = [re.fullmatch(r"(\w+)=(\d+)", part.strip()) for part in mesh.split(",")]
        if not all(pairs):
            raise ValueError(
                f'plan: `mesh` must be like "dp=2,fsdp=8" or "fsdp=8,tp=4", got {mesh!r}'
            )
        mesh = {pair[1]: int(pair[2]) for pair in pairs if pair}
    for name, size in mesh.items():
        check_choice("plan", "mesh", name, DIMENSIONS)
        if size < 1:
            raise ValueError(f"plan: `mesh` has {name}={size}, expected at least 1")
    return dict(mesh)


def plan(
    chain: optax.GradientTransformation | Any,
    params: Any,
    *,
    mesh: str | Mapping[str, int] | None = None,
    dtype: Any = None,
    bandwidth: float | None = None,
    network: float | None = None,
) -> Plan:
    """The memory, traffic and collectives of a chain on a model, from its real programs; nothing is allocated.

    Bytes of the state are those that `init` would allocate. Traffic and operations of a step are counted in the program
    that `TorchBridge(compile=True)` would run on a CPU, where torch is installed; else they are the least that any
    program moves, and the operations of the traced update. On a mesh that program is what the bridge's sharding makes
    of it, for the first device, so that collectives are those that it would call.

    Args:
      chain: a gradient transformation, or a function without arguments that makes one.
      params: a name in `chainrule.models.MODELS` (`"gpt2-small"`, `"llama-8b"`); the path of a state dict; a torch
        model; or a pytree of arrays, `jax.ShapeDtypeStruct`s or shapes.
      mesh: `"fsdp=8"`, `"dp=2,tp=4"` or a mapping: `dp`, every device has all of a parameter; `fsdp`, parameters are
        cut along their first axis, as `fully_shard` does; `tp`, matrices are cut along their last.
      dtype: of the parameters and gradients, default their own.
      bandwidth: of memory, bytes a second; with it the plan tells a time.
      network: bytes a second that a device sends, likewise for the collectives.

    Returns:
      A `Plan`.

    Raises:
      ValueError: no such model or file, or a mesh that is none.

    >>> import chainrule
    >>> found = chainrule.plan(chainrule.chains.adam(), {"w": (1000, 1000), "b": (1000,)})
    >>> found.parameters, [(e.field, e.bytes) for e in found.state if e.link == "scale_by_adam"]
    (1001000, [('count', 4), ('mu', 4004000), ('nu', 4004000)])
    """
    for name, rate in (("bandwidth", bandwidth), ("network", network)):
        if rate is not None and not rate > 0:
            raise ValueError(f"plan: `{name}` must be greater than 0, got {rate:g}")
    sizes = mesh_of(mesh)
    structs = structs_of(params, dtype)
    chain = as_transformation(chain)
    numbers = sum(math.prod(s.shape) for s in structs.values())
    state = jax.eval_shape(chain.init, structs)
    owners = [slot.owner for slot in slots(state, structs, chain.init)]
    names = sorted(structs)
    share = {name: _share(structs[name].shape, sizes) for name in names}

    def here(leaf: Any, owner: int | None) -> int:
        alike = owner is not None and structs[names[owner]].shape == leaf.shape
        return (
            share[names[owner]] * _itemsize(leaf) if alike and owner is not None else _bytes(leaf)
        )

    entries: dict[tuple[str, str], list[tuple[int, int]]] = {}
    fields = _fields(state)
    for (link, field, leaf), owner in zip(fields, owners, strict=True):
        entries.setdefault((link, field), []).append((_bytes(leaf), here(leaf, owner)))
    rows = [
        Entry(*key, len(found), *(sum(column) for column in zip(*found, strict=True)))
        for key, found in entries.items()
    ]
    local = sum(share[name] * _itemsize(structs[name]) for name in names)
    moved = _moved(chain, structs, sizes, sum(r.bytes_here for r in rows), local)
    return Plan(
        parameters=numbers,
        parameter_bytes=local,
        state=tuple(rows),
        mesh=sizes,
        bandwidth=bandwidth,
        network=network,
        **moved,
    )


def _itemsize(leaf: Any) -> int:
    return (
        jax.eval_shape(jax.random.key_data, leaf).dtype.itemsize
        if _is_key(leaf)
        else leaf.dtype.itemsize
    )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _bytes(leaf: Any) -> int:
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return math.prod(data.shape) * data.dtype.itemsize


def _cuts(shape: tuple[int, ...], mesh: Mapping[str, int]) -> dict[int, list[int]]:
    """Axis -> the dimensions of the mesh, by position, over which it is cut."""
    found: dict[int, list[int]] = {}
    for position, name in enumerate(mesh):
        if name == "fsdp" and shape:
            found.setdefault(0, []).append(position)
        if name == "tp" and len(shape) > 1:
            found.setdefault(len(shape) - 1, []).append(position)
    return found


def _share(shape: tuple[int, ...], mesh: Mapping[str, int]) -> int:
    """How many entries the first device has."""
    local, sizes = list(shape), list(mesh.values())
    for axis, positions in _cuts(shape, mesh).items():
        for position in positions:
            local[axis] = -(-local[axis] // sizes[position])
    return math.prod(local)


def _fields(state: Any, link: str = "", field: str = "") -> list[tuple[str, str, Any]]:
    """Link and field of every leaf, in the order of `jax.tree.leaves`."""
    if is_state(state):
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(state).__name__.removesuffix("State")).lower()
        children: list[Any] = list(state._asdict().items())
        return [found for key, child in children for found in _fields(child, name, str(key))]
    inner = jax.tree.leaves(state, is_leaf=lambda node: node is not state and is_state(node))
    return [
        found
        for node in inner
        for found in (_fields(node, link, field) if is_state(node) else [(link, field, node)])
    ]


def _moved(
    chain: optax.GradientTransformation,
    structs: Structs,
    mesh: Mapping[str, int],
    state: int,
    local: int,
) -> dict[str, Any]:
    """What a step moves and computes, by the names of a plan's attributes."""
    from chainrule.bridges.step.description import describe

    described = describe(chain, structs)
    if importlib.util.find_spec("torch") is not None:
        from chainrule.bridges.traffic import of_step

        cuts = [_cuts(structs[name].shape, mesh) for name in sorted(structs)]
        found = of_step(described, tuple(mesh.values()), cuts)
        return {
            "read": found.read,
            "written": found.written,
            "operations": found.operations,
            "uncounted": found.uncounted,
            "collectives": tuple((c.kind, c.bytes, c.devices) for c in found.collectives),
            "sent": sum(c.sent for c in found.collectives),
            "exact": True,
        }
    return _least(described, state, local)


def _least(described: "Description", state: int, local: int) -> dict[str, Any]:
    from chainrule.native.operations import operations_of

    uncounted: set[str] = set()
    jaxpr = described.trace(True).jaxpr.jaxpr
    return {
        "read": 2 * local + state,
        "written": local + state,
        "operations": operations_of(jaxpr, uncounted),
        "uncounted": tuple(sorted(uncounted)),
        "collectives": (),
        "sent": 0.0,
        "exact": False,
    }
