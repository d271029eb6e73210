"""Every public optimizer, wrapper, transform and schedule of optax 0.2.8, as cases.

A case's name is the public path of what it covers, with a variant in brackets. ``NAMED`` is the
list the README counts: the optimizers of optax and of ``optax.contrib``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

contrib = optax.contrib

LINE_SEARCH = ("value", "grad", "value_fn")


@dataclasses.dataclass(frozen=True)
class OptaxCase:
    """One gradient transformation to be run through a bridge.

    Attributes:
      name: public path, and a variant in brackets.
      make: builds the transformation.
      extra: the extra arguments of ``update`` at a step, as a function of the step index.
      batch: leading axis of per-example gradients, 0 for ordinary gradients.
      loss: the arguments by which ``update`` gets the loss (``value``, ``grad``) and traces it in
        JAX (``value_fn``, ``obj_fn``), so that a torch optimizer must refuse it; the lowering
        itself takes it, with a loss written in JAX.
      descends: gradients are those of the test's loss, not random: for methods that estimate
        curvature from differences of gradients.
      scalars: whether the transformation takes 0-d parameters.
      parameters: what the transformation takes for parameters, from a plain tree of them.
      bfloat16: why optax itself cannot run the case with bfloat16 parameters, or None.
    """

    name: str
    make: Callable[[], Any]
    extra: Callable[[int], dict[str, Any]] = lambda step: {}
    batch: int = 0
    loss: tuple[str, ...] = ()
    scalars: bool = True
    descends: bool = False
    bfloat16: str | None = None
    parameters: Callable[[Any], Any] = lambda params: params

    @property
    def public_name(self) -> str:
        """The name without its variant."""
        return self.name.partition("[")[0]


def _value(step: int) -> dict[str, Any]:
    return {"value": jnp.float32(2.0 * 0.8**step + 0.1)}


def _plateau_value(step: int) -> dict[str, Any]:
    return {"value": jnp.float32(1.0)}


def _every_third(step: Any, **extra: Any) -> Any:
    return step % 3 == 0


def _first_five(step: Any, **extra: Any) -> Any:
    return step < 5


def _matrix_labels(params: Any) -> Any:
    return jax.tree.map(lambda p: "matrix" if p.ndim >= 2 else "vector", params)


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim == 2, params)


IS_MATRIX: Any = _matrices  # optax annotates its mask arguments as trees only


def _core(name: str, *args: Any, **kwargs: Any) -> OptaxCase:
    make = getattr(optax, name)
    return OptaxCase(f"optax.{name}", lambda: make(*args, **kwargs))


def _contrib(name: str, *args: Any, **kwargs: Any) -> OptaxCase:
    make = getattr(contrib, name)
    return OptaxCase(f"optax.contrib.{name}", lambda: make(*args, **kwargs))


def _variant(name: str, make: Callable[[], Any], **fields: Any) -> OptaxCase:
    return OptaxCase(f"optax.{name}", make, **fields)


NAMED: tuple[OptaxCase, ...] = (
    _core("adabelief", 0.1),
    _core("adadelta", 1.0),
    _core("adafactor", 0.1, min_dim_size_to_factor=4),
    _core("adagrad", 0.1),
    _core("adam", 0.1),
    _core("adamax", 0.1),
    _core("adamaxw", 0.1),
    _core("adamw", 0.1),
    _core("adan", 0.1),
    _core("amsgrad", 0.1),
    _core("fromage", 0.1),
    _core("lamb", 0.1),
    _core("lars", 10.0, weight_decay=0.01),
    _variant("lbfgs", lambda: optax.lbfgs(memory_size=4), loss=LINE_SEARCH),
    _core("lion", 0.1),
    _core("nadam", 0.1),
    _core("nadamw", 0.1),
    _variant("noisy_sgd", lambda: optax.noisy_sgd(0.1, key=jax.random.key(3))),
    _core("novograd", 0.1),
    _core("optimistic_adam", 0.1, optimism=0.1),
    _core("optimistic_adam_v2", 0.1),
    _core("optimistic_gradient_descent", 0.1),
    _variant("polyak_sgd", lambda: optax.polyak_sgd(0.5), extra=_value),
    _core("radam", 0.1),
    _core("rmsprop", 0.1),
    _core("rprop", 0.1),
    _core("sgd", 0.1),
    _core("sign_sgd", 0.1),
    _core("signum", 0.1),
    _variant("sm3", lambda: optax.sm3(0.1), scalars=False),
    _core("yogi", 0.1),
    _contrib("acprop", 0.01),
    _contrib("ademamix", 0.1),
    _contrib("adopt", 0.1),
    _contrib("cocob", 1.0),
    _contrib("dadapt_adamw", 1.0, estim_lr0=1e-2),
    _contrib("dog", 1.0, init_step=("heuristic", 1e-1)),
    _contrib("dowg", 1.0),
    _variant(
        "contrib.dpsgd",
        lambda: contrib.dpsgd(0.1, l2_norm_clip=1.0, noise_multiplier=0.5, seed=1),
        batch=3,
    ),
    _contrib("galore", 0.1, rank=2, update_proj_gap=4),
    _contrib("madgrad", 0.1),
    _variant("contrib.momo", lambda: contrib.momo(1.0), extra=_value),
    _variant("contrib.momo_adam", lambda: contrib.momo_adam(0.1), extra=_value),
    _contrib("muon", 0.1),
    _contrib("prodigy", 1.0, estim_lr0=1e-2),
    _contrib("sam", optax.sgd(0.1), optax.sgd(0.05)),
    _contrib("schedule_free_adamw", 0.1, warmup_steps=4),
    _contrib("schedule_free_sgd", 0.1, warmup_steps=4),
    _contrib("simplified_ademamix", 0.01),
    _variant("contrib.sophia", lambda: contrib.sophia(0.1, update_interval=3), loss=("obj_fn",)),
)

VARIANTS: tuple[OptaxCase, ...] = (
    _variant("adafactor[momentum]", lambda: optax.adafactor(0.1, momentum=0.9, factored=False)),
    _variant("adam[nesterov]", lambda: optax.adam(0.1, nesterov=True, mu_dtype=jnp.bfloat16)),
    _variant("adamw[schedule]", lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 8))),
    _variant("contrib.adopt[nesterov]", lambda: contrib.adopt(0.1, nesterov=True)),
    _variant("contrib.muon[adaptive]", lambda: contrib.muon(0.1, adaptive=True, ns_steps=12)),
    _variant(
        "contrib.muon[spectral]",
        lambda: contrib.muon(0.1, preconditioning="spectral"),
        bfloat16="jnp.linalg.svd takes no bfloat16",
    ),
    _variant("contrib.muon[schatten]", lambda: contrib.muon(0.1, preconditioning="schatten")),
    _variant("contrib.muon[aol]", lambda: contrib.muon(0.1, preconditioning="aol")),
    _variant("contrib.prodigy[warmup]", lambda: contrib.prodigy(safeguard_warmup=True)),
    _variant(
        "lbfgs[no line search]",
        lambda: optax.lbfgs(0.1, memory_size=4, linesearch=None),
        descends=True,
    ),
    _variant(
        "lbfgs[backtracking]",
        lambda: optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(6, store_grad=True)),
        loss=LINE_SEARCH,
    ),
    _variant("polyak_sgd[sps+]", lambda: optax.polyak_sgd(0.5, variant="sps+"), extra=_value),
    _variant("rmsprop[centered]", lambda: optax.rmsprop(0.1, centered=True, momentum=0.9)),
    _variant("rmsprop[corrected]", lambda: optax.rmsprop(0.1, bias_correction=True)),
    _variant("sgd[nesterov]", lambda: optax.sgd(0.1, momentum=0.9, nesterov=True)),
    _variant("scale_by_lion[smooth]", lambda: optax.scale_by_lion(mode="smooth")),
)

WRAPPERS: tuple[OptaxCase, ...] = (
    _variant("apply_if_finite", lambda: optax.apply_if_finite(optax.adam(0.1), 2)),
    _variant("contrib.mechanize", lambda: contrib.mechanize(optax.adam(0.1), s_init=1e-2)),
    _variant(
        "contrib.reduce_on_plateau",
        lambda: optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=3, cooldown=1)),
        extra=_plateau_value,
    ),
    _variant(
        "contrib.schedule_free",
        lambda: contrib.schedule_free(optax.adam(0.1, b1=0.0), 0.1, b1=0.9),
    ),
    _variant(
        "contrib.split_real_and_imaginary",
        lambda: contrib.split_real_and_imaginary(optax.adam(0.1)),
    ),
    _variant("chain", lambda: optax.chain(optax.clip(0.5), optax.scale(-0.1))),
    _variant("named_chain", lambda: optax.named_chain(("a", optax.sgd(0.1, momentum=0.9)))),
    _variant(
        "conditionally_mask",
        lambda: optax.conditionally_mask(optax.sgd(0.1), _every_third),
    ),
    _variant(
        "conditionally_transform",
        lambda: optax.conditionally_transform(optax.adam(0.1), _first_five),
    ),
    _variant("flatten", lambda: optax.flatten(optax.adam(0.1))),
    _variant(
        "inject_hyperparams",
        lambda: optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
    ),
    _variant(
        "inject_hyperparams[schedule]",
        lambda: optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.01, 9)),
        bfloat16="optax keeps b2 in the parameters' dtype, where it is 1.0, and gives NaN",
    ),
    _variant(
        "inject_stateful_hyperparams",
        lambda: optax.inject_stateful_hyperparams(optax.rmsprop)(0.1),
    ),
    _variant("masked", lambda: optax.masked(optax.adam(0.1), IS_MATRIX)),
    _variant(
        "MultiSteps",
        lambda: optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(),
    ),
    _variant(
        "MultiSteps[skip]",
        lambda: optax.MultiSteps(
            optax.adam(0.1), 2, should_skip_update_fn=optax.transforms.skip_not_finite
        ).gradient_transformation(),
    ),
    _variant(
        "multi_transform",
        lambda: optax.multi_transform(
            {"matrix": optax.adam(0.1), "vector": optax.sgd(0.1)}, _matrix_labels
        ),
    ),
    _variant(
        "partition",
        lambda: optax.partition(
            {"matrix": optax.lion(0.1), "vector": optax.adam(0.1)}, _matrix_labels
        ),
    ),
    _variant(
        "transforms.selective_transform",
        lambda: optax.selective_transform(optax.adam(0.1), freeze_mask=IS_MATRIX),
    ),
)

TRANSFORMS: tuple[OptaxCase, ...] = (
    _core("adaptive_grad_clip", 0.1),
    _core("add_decayed_weights", 0.1),
    _variant("add_noise", lambda: optax.add_noise(0.1, 0.5, key=jax.random.key(7))),
    _core("apply_every", 3),
    _core("centralize"),
    _core("clip", 0.5),
    _core("clip_by_block_rms", 0.5),
    _core("clip_by_global_norm", 0.5),
    _core("ema", 0.9),
    _variant("freeze", lambda: optax.freeze(IS_MATRIX)),
    _core("identity"),
    _core("keep_params_nonnegative"),
    _variant(
        "measure_with_ema",
        lambda: optax.monitor({"ema": optax.measure_with_ema(optax.tree.norm, 0.9)}),
    ),
    _variant("monitor", lambda: optax.monitor({"norm": optax.tree.norm})),
    _core("normalize_by_update_norm"),
    _core("scale", 0.5),
    _core("scale_by_adadelta"),
    _core("scale_by_adam"),
    _core("scale_by_adamax"),
    _core("scale_by_adan"),
    _core("scale_by_amsgrad"),
    _variant(
        "scale_by_backtracking_linesearch",
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8)),
        loss=LINE_SEARCH,
    ),
    _core("scale_by_belief"),
    _core("scale_by_distance_over_gradients"),
    _core("scale_by_factored_rms", min_dim_size_to_factor=4),
    _variant(
        "scale_by_lbfgs",
        lambda: optax.chain(optax.scale_by_lbfgs(memory_size=4), optax.scale(-0.1)),
        descends=True,
    ),
    _core("scale_by_learning_rate", 0.1),
    _core("scale_by_lion"),
    _core("scale_by_novograd"),
    _core("scale_by_optimistic_gradient"),
    _core("scale_by_param_block_norm"),
    _core("scale_by_param_block_rms"),
    _variant("scale_by_polyak", lambda: optax.scale_by_polyak(), extra=_value),
    _core("scale_by_radam"),
    _core("scale_by_rms"),
    _core("scale_by_rprop", 0.1),
    _core("scale_by_rss"),
    _variant("scale_by_schedule", lambda: optax.scale_by_schedule(lambda n: 1.0 / (n + 1))),
    _core("scale_by_sign"),
    _variant("scale_by_sm3", lambda: optax.scale_by_sm3(), scalars=False),
    _core("scale_by_stddev"),
    _variant(
        "scale_by_trust_ratio", lambda: optax.chain(optax.scale_by_trust_ratio(), optax.scale(-0.1))
    ),
    _core("scale_by_yogi"),
    _variant(
        "scale_by_zoom_linesearch",
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(8)),
        loss=LINE_SEARCH,
    ),
    _core("set_to_zero"),
    _variant("snapshot", lambda: optax.snapshot("norm", optax.tree.norm)),
    _variant("stateless", lambda: optax.stateless(lambda u, p: jax.tree.map(jnp.tanh, u))),
    _variant("stateless_with_tree_map", lambda: optax.stateless_with_tree_map(lambda u, p: u / 2)),
    _core("trace", 0.9, nesterov=True),
    _core("zero_nans"),
    _variant(
        "transforms.per_example_global_norm_clip",
        lambda: optax.stateless(_clipped(optax.per_example_global_norm_clip)),
        batch=3,
    ),
    _variant(
        "transforms.per_example_layer_norm_clip",
        lambda: optax.stateless(_clipped(optax.per_example_layer_norm_clip)),
        batch=3,
    ),
    _variant(
        "contrib.differentially_private_aggregate",
        lambda: contrib.differentially_private_aggregate(1.0, 0.5, key=jax.random.key(5)),
        batch=3,
    ),
    _variant(
        "contrib.hutchinson_estimator_diag_hessian",
        lambda: contrib.hutchinson_estimator_diag_hessian(jax.random.PRNGKey(3)),
        loss=("obj_fn",),
    ),
    _contrib("normalize"),
    _contrib("scale_by_acprop"),
    _contrib("scale_by_ademamix"),
    _contrib("scale_by_adopt"),
    _contrib("scale_by_cocob"),
    _contrib("scale_by_galore", rank=2, update_proj_gap=3),
    _contrib("scale_by_madgrad", 0.1),
    _variant(
        "contrib.scale_by_muon",
        lambda: optax.masked(
            contrib.scale_by_muon(
                weight_dimension_numbers=lambda params: jax.tree.map(
                    lambda p: contrib.MuonDimensionNumbers(), params
                )
            ),
            IS_MATRIX,
        ),
    ),
    _contrib("scale_by_simplified_ademamix"),
)


def _clipped(clip: Callable[..., Any]) -> Callable[..., Any]:
    def update(updates: Any, params: Any) -> Any:
        leaves, tree = jax.tree.flatten(updates)
        return jax.tree.unflatten(tree, clip(leaves, 1.0)[0])

    return update


def _schedule(name: str, schedule: optax.Schedule) -> OptaxCase:
    return OptaxCase(f"optax.schedules.{name}", lambda: optax.sgd(schedule))


SCHEDULES: tuple[OptaxCase, ...] = (
    _schedule("constant_schedule", optax.constant_schedule(0.1)),
    _schedule("cosine_decay_schedule", optax.cosine_decay_schedule(0.1, 7, 0.1, 2.0)),
    _schedule("cosine_onecycle_schedule", optax.cosine_onecycle_schedule(10, 0.1)),
    _schedule("exponential_decay", optax.exponential_decay(0.1, 3, 0.5, 2, end_value=0.01)),
    _schedule("exponential_decay[staircase]", optax.exponential_decay(0.1, 3, 0.5, staircase=True)),
    _schedule(
        "join_schedules",
        optax.join_schedules([optax.linear_schedule(0.0, 0.1, 4), lambda n: 0.1 / (n + 1)], [4]),
    ),
    _schedule("linear_onecycle_schedule", optax.linear_onecycle_schedule(10, 0.1)),
    _schedule("linear_schedule", optax.linear_schedule(0.1, 0.0, 8)),
    _schedule(
        "piecewise_constant_schedule", optax.piecewise_constant_schedule(0.1, {3: 0.5, 6: 0.1})
    ),
    _schedule(
        "piecewise_interpolate_schedule",
        optax.piecewise_interpolate_schedule("linear", 0.1, {3: 0.5, 6: 0.1}),
    ),
    _schedule(
        "piecewise_interpolate_schedule[cosine]",
        optax.piecewise_interpolate_schedule("cosine", 0.1, {3: 0.5, 6: 0.1}),
    ),
    _schedule("polynomial_schedule", optax.polynomial_schedule(0.1, 0.0, 2.5, 8, 1)),
    _schedule(
        "sgdr_schedule",
        optax.sgdr_schedule(
            [
                {"init_value": 0.0, "peak_value": 0.1, "decay_steps": 5, "warmup_steps": 2},
                {"init_value": 0.0, "peak_value": 0.05, "decay_steps": 6, "warmup_steps": 2},
            ]
        ),
    ),
    _schedule("warmup_constant_schedule", optax.warmup_constant_schedule(0.0, 0.1, 4)),
    _schedule(
        "warmup_cosine_decay_schedule", optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 9, 0.01)
    ),
    _schedule(
        "warmup_exponential_decay_schedule",
        optax.warmup_exponential_decay_schedule(0.0, 0.1, 3, 2, 0.5),
    ),
)

# Works on pairs of parameters, which a torch optimizer does not have.
PAIRED: tuple[OptaxCase, ...] = (
    _variant(
        "lookahead",
        lambda: optax.lookahead(optax.adam(0.1), sync_period=3, slow_step_size=0.5),
        parameters=optax.LookaheadParams.init_synced,
    ),
)

ALL: tuple[OptaxCase, ...] = (*NAMED, *VARIANTS, *WRAPPERS, *TRANSFORMS, *SCHEDULES)
