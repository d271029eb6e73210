"""Each call of the kernel as a JAX primitive: a chain binds it and need not know where it will run.

What a primitive becomes is decided where the program is compiled:

    on one CPU device, with the kernel, in its dtypes   one foreign call, in place where the state is donated
    elsewhere, and on several devices                   its form in XLA (`forms`), which XLA partitions over devices
    in a bridge                                         what the bridge's rule for the primitive's name makes of it

The parameter `kernel` that each has is what the chain was asked for: ``"native"``, ``"xla"``, or ``"auto"``, where
each target takes what it is faster with. Derivatives are those of the form; under ``vmap`` a call runs once for each
entry, but `sums`, which stays one call.

``chainrule.native.xla`` has a function for each that checks its arguments.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from chainrule.native import FLOATS, _kernel, available, coding, forms

TIER2_NUMBERS = (
    *("learning_rate", "weight_decay", "b1", "b1_long", "blend", "b2", "eps"),
    *("mu_correction", "nu_correction"),
)
"""The first operands of a tier-2 step, each one number for all tensors or a vector with one for each."""

TIER1_NUMBERS = ("learning_rate", "weight_decay", "decay", "mean_magnitude")

DENOMINATORS = ("root", "magnitude", "none")

Result = tuple[tuple[int, ...], Any]
"""Shape and dtype."""

if _kernel is not None:
    for _name, _capsule in _kernel.xla_targets().items():
        jax.ffi.register_ffi_target(_name, _capsule, platform="cpu")
    _layout = _kernel.layout()
    assert _layout == {
        "tier2": TIER2_NUMBERS,
        "tier1": TIER1_NUMBERS,
        "denominators": DENOMINATORS,
        "sums": {kind: len(terms) for kind, terms in forms.SUMS.items()},
        "sums_of_one": forms.OF_ONE,
    }, f"the compiled kernel is of another version than the package: {_layout}"


class Operation(NamedTuple):
    """A primitive and its two forms, functions of the primitive's operands and parameters."""

    primitive: core.Primitive
    form: Callable[..., list[jax.Array]]
    in_kernel: Callable[..., list[jax.Array]]
    faster: Callable[[Sequence[Any]], bool]
    """Whether ``kernel="auto"`` is the kernel in jitted programs, from the avals of the operands."""

    def fits(self, avals: Sequence[Any], params: Mapping[str, Any]) -> bool:
        """Whether the kernel is there, is not ruled out, and has these dtypes and shapes."""
        floats = (a.dtype for a in avals if not jnp.issubdtype(a.dtype, jnp.integer))
        return (
            params["kernel"] != "xla"
            and all(str(dtype) in FLOATS for dtype in floats)
            and _pairs_are_alike(avals, params)
            and available()
        )

    def runs_in_kernel(self, avals: Sequence[Any], params: Mapping[str, Any]) -> bool:
        """Whether a jitted program on one CPU device makes the foreign call."""
        chosen = params["kernel"] == "native" or self.faster(avals)
        return chosen and self.fits(avals, params)


def _pairs_are_alike(avals: Sequence[Any], params: Mapping[str, Any]) -> bool:
    """Whether the tensors of `sums` over pairs, which may also be tensors and scalars, have the same shapes."""
    if params.get("kind", forms.OF_ONE[0]) in forms.OF_ONE:
        return True
    half = len(avals) // 2
    return all(
        x.shape == y.shape for x, y in zip(avals[1 : 1 + half], avals[1 + half :], strict=True)
    )


OPERATIONS: dict[str, Operation] = {}
"""Every operation by the name of its primitive."""


def _operation(
    name: str,
    results: Callable[..., list[Result]],
    form: Callable[..., list[jax.Array]],
    in_kernel: Callable[..., list[jax.Array]],
    faster: Callable[[Sequence[Any]], bool] = lambda avals: False,
    batch: Callable[..., Any] | None = None,
) -> core.Primitive:
    """Makes a primitive.

    Args:
      name: of the foreign call.
      results: shapes and dtypes of the results, from avals and parameters.
      form: what it computes, in JAX.
      in_kernel: the same by the foreign call.
      faster: see `Operation`.
      batch: the batching rule; default one call after the other.
    """
    primitive = core.Primitive(name)
    primitive.multiple_results = True
    operation = OPERATIONS[name] = Operation(primitive, form, in_kernel, faster)

    def abstract(*avals, **params):
        if not all(a.sharding.mesh.empty for a in avals):
            # On a mesh a result's type tells what it varies over, and the form knows.
            return jax.make_jaxpr(functools.partial(form, **params))(*avals).out_avals
        return [ShapedArray(shape, jnp.dtype(dtype)) for shape, dtype in results(*avals, **params)]

    def jvp(primals, tangents, **params):
        tangents = tuple(ad.instantiate_zeros(t) for t in tangents)
        return jax.jvp(functools.partial(form, **params), primals, tangents)

    def one_by_one(operands, axes, **params):
        moved = [
            x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(operands, axes, strict=True)
        ]
        mapped = [x for x, a in zip(moved, axes, strict=True) if a is not None]

        def one(entries):
            entry = iter(entries)
            own = [x if a is None else next(entry) for x, a in zip(moved, axes, strict=True)]
            return primitive.bind(*own, **params)

        results = jax.lax.map(one, mapped)
        return results, [0] * len(results)

    def on_cpu(ctx, *operands, **params):
        # A program that is exported runs where the kernel may not be.
        exported = ctx.module_context.lowering_parameters.for_export
        here = on_one_device(ctx) and not exported
        fits = here and operation.runs_in_kernel(ctx.avals_in, params)
        return mlir.lower_fun(in_kernel if fits else form)(ctx, *operands, **params)

    def compiled(*operands, **params):
        with jax.disable_jit(False):  # else `bind` would come back here for ever
            return _jitted(primitive, **params)(*operands)

    primitive.def_impl(compiled)
    primitive.def_abstract_eval(abstract)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch or one_by_one
    mlir.register_lowering(primitive, mlir.lower_fun(form))
    mlir.register_lowering(primitive, on_cpu, platform="cpu")
    return primitive


def in_front(operands: Sequence[Any], axes: Sequence[int | None]) -> list[jax.Array]:
    """The operands of a batching rule, all with the mapped axis first."""
    (size,) = {x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None}
    return [
        jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
        for x, a in zip(operands, axes, strict=True)
    ]


@functools.cache
def _jitted(primitive: core.Primitive, **params: Any) -> Callable[..., Any]:
    return jax.jit(lambda *operands: primitive.bind(*operands, **params))


def on_one_device(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether a call sees whole arrays: XLA would gather the operands of a foreign call that are sharded."""
    axes = ctx.module_context.axis_context
    if isinstance(axes, mlir.ShardingContext):
        return axes.num_devices == 1
    # Inside `shard_map` over every axis of the mesh, arrays are the device's own.
    return isinstance(axes, mlir.SPMDAxisContext) and axes.manual_axes == {*axes.mesh.axis_names}


def _call(
    name: str,
    results: Sequence[Result],
    operands: Sequence[jax.Array],
    aliases: dict[int, int],
    **attributes: Any,
) -> list[jax.Array]:
    """A foreign call; `aliases` maps operand to result."""
    structs = [jax.ShapeDtypeStruct(*result) for result in results]
    return list(
        jax.ffi.ffi_call(name, structs, input_output_aliases=aliases)(*operands, **attributes)
    )


def _like(arrays: Sequence[Any]) -> list[Result]:
    return [(a.shape, a.dtype) for a in arrays]


def _columns(numbers: Sequence[jax.Array], tensors: int) -> list[jax.Array]:
    """A vector with an entry for each tensor, from each of some numbers."""
    return [jnp.broadcast_to(x, (tensors,)) for x in numbers]


# ---- sums and statistics ---------------------------------------------------------------------


def _sums_results(c, *tensors, kind, **_) -> list[Result]:
    n = len(tensors) if kind in forms.OF_ONE else len(tensors) // 2
    return [((*c.shape, n), forms.sum_dtype(tensors))] * len(forms.SUMS[kind])


def _sums_form(c, *tensors, kind, batch, kernel) -> list[jax.Array]:
    if batch:
        inner = functools.partial(_sums_form, kind=kind, batch=batch - 1, kernel=kernel)
        return jax.vmap(inner)(c, *tensors)
    if kind in forms.OF_ONE:
        return forms.sums(kind, c, tensors, tensors)
    n = len(tensors) // 2
    return forms.sums(kind, c, tensors[:n], tensors[n:])


def _sums_in_kernel(c, *tensors, kind, **_) -> list[jax.Array]:
    ((shape, dtype), *others) = _sums_results(c, *tensors, kind=kind)
    (table,) = _call(
        "chainrule_sums", [((*shape, 1 + len(others)), dtype)], [c, *tensors], {}, kind=kind
    )
    return [table[..., k] for k in range(1 + len(others))]


def _sums_batch(operands, axes, *, batch, **params):
    results = sums.bind(*in_front(operands, axes), batch=batch + 1, **params)
    return results, [0] * len(results)


sums = _operation(
    "chainrule_sums",
    _sums_results,
    _sums_form,
    _sums_in_kernel,
    faster=lambda avals: (
        True
    ),  # one pass over all tensors, where XLA makes one for each sum of each
    batch=_sums_batch,
)
"""Operands c, each x, and each y if the kind is of pairs, all behind `batch` axes that ``vmap`` gave them; parameters
`kind` and `batch`. Results: each sum of all tensors as a vector."""


def _statistics_results(*gradients, **_) -> list[Result]:
    return [((len(gradients),), jnp.float32)] * 4


def _statistics_in_kernel(*gradients, **_) -> list[jax.Array]:
    (table,) = _call("chainrule_statistics", [((len(gradients), 4), jnp.float32)], gradients, {})
    return [table[:, k] for k in range(4)]


statistics = _operation(
    "chainrule_statistics",
    _statistics_results,
    lambda *gradients, kernel: forms.statistics(gradients),
    _statistics_in_kernel,
)
"""Operands: the gradients. Results: mean abs(g), mean g^2, variance and max abs(g), each of all tensors as a vector."""


# ---- codes -----------------------------------------------------------------------------------


def _quantize_results(keys, *values, block, bits, **_) -> list[Result]:
    codes = [((coding.packed_size(x.size, bits),), jnp.uint8) for x in values]
    return codes + [((coding.block_count(x.size, block),), jnp.float32) for x in values]


def _words(key: jax.Array, x: jax.Array) -> jax.Array:
    """32 random bits for each entry of a tensor."""
    return jax.random.bits(jax.random.wrap_key_data(key, impl="threefry2x32"), x.shape, "uint32")


def _quantize_form(keys, *values, block, bits, stochastic, kernel) -> list[jax.Array]:
    held = coding.Format(bits, block)
    drawn = [_words(k, x) if stochastic else None for k, x in zip(keys, values, strict=True)]
    pairs = [coding.encode(x, held, words) for x, words in zip(values, drawn, strict=True)]
    return [c for c, _ in pairs] + [s for _, s in pairs]


def _quantize_in_kernel(keys, *values, block, bits, stochastic, **_) -> list[jax.Array]:
    results = _quantize_results(keys, *values, block=block, bits=bits)
    attributes = {"block": np.int64(block), "bits": np.int32(bits), "stochastic": stochastic}
    return _call("chainrule_quantize", results, [keys, *values], {}, **attributes)


quantize = _operation("chainrule_quantize", _quantize_results, _quantize_form, _quantize_in_kernel)
"""Operands: (tensors, 2) uint32 keys, read if `stochastic`, and the values. Results: the codes, then the scales."""


def _dequantize_results(*operands, like, **_) -> list[Result]:
    return list(like)


def _dequantize_form(*operands, like, block, bits, kernel) -> list[jax.Array]:
    pairs = zip(operands[: len(like)], operands[len(like) :], like, strict=True)
    held = coding.Format(bits, block)
    return [coding.decode(c, s, shape, held).astype(dtype) for c, s, (shape, dtype) in pairs]


def _dequantize_in_kernel(*operands, like, block, bits, **_) -> list[jax.Array]:
    attributes = {"block": np.int64(block), "bits": np.int32(bits)}
    return _call("chainrule_dequantize", like, operands, {}, **attributes)


dequantize = _operation(
    "chainrule_dequantize", _dequantize_results, _dequantize_form, _dequantize_in_kernel
)
"""Operands: the codes, then the scales. Results: tensors of the shapes and dtypes in `like`."""


def _encode_form(x, *keys, held, kernel) -> list[jax.Array]:
    return list(coding.encode(x, held, *(_words(key, x) for key in keys)))


def _encode_results(x, *_, held, **__) -> list[Result]:
    codes = ((coding.packed_size(x.size, held.bits),), jnp.uint8)
    return [codes, ((coding.block_count(x.size, held.block),), jnp.float32)]


encode = _operation("chainrule_encode", _encode_results, _encode_form, _encode_form)
"""Operands: a float32 tensor and, to round stochastically, a uint32 key (2,); parameter `held`, a `coding.Format`.
Results: codes and scales. In a bridge the kernel does it beside what is computed; XLA fuses the form."""


def _decode_form(codes, scales, *, shape, held, kernel) -> list[jax.Array]:
    return [coding.decode(codes, scales, shape, held)]


decode = _operation(
    "chainrule_decode", lambda *_, shape, **__: [(shape, jnp.float32)], _decode_form, _decode_form
)
"""Operands: codes and scales; parameters `shape` and `held`. Result: the float32 tensor."""


# ---- steps -----------------------------------------------------------------------------------


class Step(NamedTuple):
    """The operands of a tier-2 step by what they are."""

    numbers: dict[str, Any]
    roles: dict[str, Sequence[Any]]
    """`gradients`, the state (`mu`, or `mu_codes` and `mu_scales`, ..., `nu`), and `parameters`; a list each."""

    @property
    def state(self) -> dict[str, Sequence[Any]]:
        return {k: v for k, v in self.roles.items() if k not in ("gradients", "parameters")}


def step_of(roles: Sequence[str], operands: Sequence[Any]) -> Step:
    """Sorts the operands of a tier-2 step: its numbers, then each role with all tensors."""
    count = len(TIER2_NUMBERS)
    tensors = operands[count:]
    n = len(tensors) // len(roles)
    return Step(
        dict(zip(TIER2_NUMBERS, operands, strict=False)),
        {role: tensors[k * n : (k + 1) * n] for k, role in enumerate(roles)},
    )


def _tier2_results(*operands, roles, **_) -> list[Result]:
    step = step_of(roles, operands)
    return _like([x for role in (step.roles["gradients"], *step.state.values()) for x in role])


def _tier2_form(*operands, roles, denominator, block, bits, start, **_) -> list[jax.Array]:
    step = step_of(roles, operands)
    results: dict[str, list[jax.Array]] = {role: [] for role in ("gradients", *step.state)}
    for i, g in enumerate(step.roles["gradients"]):
        given = {role: tensors[i] for role, tensors in step.roles.items()}
        moments = {
            name: _moment(name, given, g, block, bits, start) for name in ("mu", "mu_long", "nu")
        }
        numbers = {name: x[i] if x.ndim else x for name, x in step.numbers.items()}
        mu, mu_long, nu = moments.values()
        update, *new = forms.tier2(
            g, mu, mu_long, nu, given.get("parameters"), denominator, numbers
        )
        results["gradients"].append(update.astype(g.dtype))
        present = [name for name, moment in moments.items() if moment is not None]
        for name, moment in zip(present, new, strict=True):
            if name in given:
                results[name].append(moment.astype(given[name].dtype))
            else:
                codes, scales = coding.encode(moment, coding.Format(bits, block))
                results[f"{name}_codes"].append(codes)
                results[f"{name}_scales"].append(scales)
    return [x for role in results.values() for x in role]


def _moment(
    name: str, given: dict[str, Any], g: jax.Array, block: int, bits: int, start: str
) -> Any:
    """A moment of one tensor before the step, decoded; None if there is none."""
    if f"{name}_codes" not in given:
        return given.get(name)
    scales = given[f"{name}_scales"]
    moment = coding.decode(given[f"{name}_codes"], scales, g.shape, coding.Format(bits, block))
    if start == "gradient":
        fresh = coding.spread(scales == 0, g.size, block).reshape(g.shape)
        moment = jnp.where(fresh, forms.up(g), moment)
    return moment


def _tier2_in_kernel(
    *operands, roles, denominator, block, bits, start, in_place, **_
) -> list[jax.Array]:
    step = step_of(roles, operands)
    n = len(step.roles["gradients"])
    table = jnp.stack(_columns(list(step.numbers.values()), n), axis=1)
    tensors = [x for role in step.roles.values() for x in role]
    attributes: dict[str, Any] = {
        "denominator": denominator,
        "has_long": "mu_long" in roles or "mu_long_codes" in roles,
        "has_parameters": "parameters" in roles,
    }
    name = "chainrule_tier2"
    if "mu_codes" in roles:
        name = "chainrule_tier2_quantized"
        attributes |= {
            "block": np.int64(block),
            "bits": np.int32(bits),
            "start_at_gradient": start == "gradient",
        }
    # Operands and results go by the same roles, up to the parameters, which are only read.
    first = 0 if in_place else n
    aliases = {1 + i: i for i in range(first, n * (1 + len(step.state)))}
    return _call(
        name, _tier2_results(*operands, roles=roles), [table, *tensors], aliases, **attributes
    )


def _holds_codes(avals: Sequence[Any]) -> bool:
    return any(a.dtype == jnp.uint8 for a in avals)


tier2 = _operation(
    "chainrule_tier2", _tier2_results, _tier2_form, _tier2_in_kernel, faster=_holds_codes
)
"""Operands as `step_of` sorts them. Results: the updates, then each role of the state. With float32 state XLA's own
step is as fast on the CPU, and XLA donates it; with state in codes the kernel takes a fifth of its time."""


def _tier1_form(*operands, scale_decay, has_parameters, **_) -> list[jax.Array]:
    k = len(TIER1_NUMBERS)
    magnitudes, tensors = operands[k], operands[k + 1 :]
    n = len(magnitudes)
    numbers: dict[str, jax.Array] = dict(zip(TIER1_NUMBERS, _columns(operands[:k], n), strict=True))
    parameters = tensors[n:] if has_parameters else [None] * n
    updates, new = forms.tier1(tensors[:n], magnitudes, parameters, numbers, scale_decay)
    return [new, *updates]


def _tier1_in_kernel(*operands, scale_decay, has_parameters, in_place, **_) -> list[jax.Array]:
    k = len(TIER1_NUMBERS)
    magnitudes, tensors = operands[k], operands[k + 1 :]
    n = len(magnitudes)
    table = jnp.stack(_columns(operands[:k], n), axis=1)
    return _call(
        "chainrule_tier1",
        _tier1_results(*operands),
        [table, magnitudes, *tensors],
        {2 + i: 1 + i for i in range(n)} if in_place else {},
        scale_decay=scale_decay,
        has_parameters=has_parameters,
    )


def _tier1_results(*operands, **_) -> list[Result]:
    k = len(TIER1_NUMBERS)
    return _like(operands[k : k + 1 + operands[k].shape[0]])


tier1 = _operation("chainrule_tier1", _tier1_results, _tier1_form, _tier1_in_kernel)
"""Operands: the numbers, the magnitudes, the gradients, and the parameters if `has_parameters`. Results: the new
magnitudes, then the updates."""


# ---- layouts ---------------------------------------------------------------------------------

alike = core.Primitive("chainrule_alike")
"""Operands x and another of its shape; the result is x, on the devices where that is. No call of the kernel, but a
primitive, so that programs are the same on one device and on eight, and whoever reads them knows what is meant."""


def _chosen(x: jax.Array, like: jax.Array) -> jax.Array:
    """A choice between `x` and `x`, which XLA lays out as what decides; the barrier keeps it from being folded."""
    one, other = jax.lax.optimization_barrier((like == like, x))
    return jax.lax.select(one, x, other)


def _alike_abstract(x: ShapedArray, like: ShapedArray) -> ShapedArray:
    if x.sharding.mesh.empty:
        return x
    # On a mesh a result's type tells what it varies over, and the form knows.
    (out,) = jax.make_jaxpr(_chosen)(x, like).out_avals
    return out


def _alike_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    return alike.bind(*primals), tangents[0]


def _alike_batch(operands: Sequence[Any], axes: Sequence[int | None]) -> tuple[jax.Array, int]:
    return alike.bind(*in_front(operands, axes)), 0


def _alike_lowered(ctx: mlir.LoweringRuleContext, x: Any, like: Any) -> Sequence[Any]:
    if on_one_device(ctx):
        return [x]
    return mlir.lower_fun(_chosen, multiple_results=False)(ctx, x, like)


alike.def_impl(lambda x, like: jax.device_put(x, jnp.asarray(like).sharding))
alike.def_abstract_eval(_alike_abstract)
ad.primitive_jvps[alike] = _alike_jvp
batching.primitive_batchers[alike] = _alike_batch
mlir.register_lowering(alike, _alike_lowered)
