"""`KerasBridge` against Keras' own optimizers: CPU time of `fit`, and of `apply` alone, on each backend.

    python benchmarks/speed/keras_step.py [--backend jax] [--case muon] [--rounds 7] [--quick]

A process for each backend, threads pinned. Contenders take turns; a ratio is the median over rounds of (ours / Keras'
in the same round), CPU time of the process, after each has compiled. Limits are the project's own targets.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

BACKENDS = ("jax", "torch", "tensorflow")
FIT = {
    "cnn": dict.fromkeys(BACKENDS, 1.10),
    "transformer": {"jax": 1.05, "torch": 0.80, "tensorflow": 1.00},
    "transformer, jit_compile": {"tensorflow": 1.10},
}
APPLY = {
    "adamw": {"jax": 1.10, "torch": 0.60, "tensorflow": 0.75},
    "adamw, compiled": {"torch": 0.30},
    "casmo": {"jax": 1.30},
    "muon": {"torch": 0.80},
    "muon, bfloat16": {"torch": 0.45},
    "lamb": {"torch": 0.75},
    "adafactor": {"torch": 0.80},
}


def cnn(keras):
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            *(
                layer
                for width in (32, 64, 128)
                for layer in (layers.Conv2D(width, 3, activation="relu"), layers.MaxPooling2D())
            ),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def transformer(keras, width=320, depth=8, words=1000, length=16):
    """About 10 million parameters."""
    layers = keras.layers
    given = layers.Input((length,), dtype="int32")
    x = layers.Embedding(words, width)(given)
    for _ in range(depth):
        h = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, width // 4)(h, h, use_causal_mask=True)
        h = layers.LayerNormalization()(x)
        x = x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(h))
    return keras.Model(given, layers.Dense(words)(x))


def data_for(name, numpy, batch, steps):
    random = numpy.random.default_rng(0)
    if name == "cnn":
        images = random.normal(size=(batch * steps, 32, 32, 3)).astype("float32")
        return images, random.integers(0, 10, batch * steps)
    tokens = random.integers(0, 1000, (batch * steps, 17))
    return tokens[:, :-1], tokens[:, 1:]


def turns(contenders, rounds):
    """CPU seconds of every contender in every round; each runs once before the first."""
    for run in contenders.values():
        run()
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return seconds


def report(backend, what, seconds, limit):
    ours, theirs = seconds["ours"], seconds["Keras"]
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    verdict = (
        "" if limit is None else f"  (limit {limit:.2f}{'' if ratio <= limit else ', EXCEEDED'})"
    )
    print(
        f"{backend:11}{what:32}{1e3 * min(ours):9.1f} ms{1e3 * min(theirs):9.1f} ms{ratio:7.2f}{verdict}",
        flush=True,
    )
    return limit is None or ratio <= limit


def fit_case(name, keras, numpy, optimizers, steps):
    kind, jit = name.partition(",")[0], ", jit" in name
    images, labels = data_for(kind, numpy, 8, steps)

    def runner(optimizer):
        keras.utils.set_random_seed(0)
        model = {"cnn": cnn, "transformer": transformer}[kind](keras)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        chosen = jit if keras.backend.backend() == "tensorflow" else "auto"
        model.compile(optimizer, loss=loss, jit_compile=chosen)
        return lambda: model.fit(images, labels, batch_size=8, verbose=0)

    return {side: runner(make()) for side, make in optimizers.items()}


def apply_case(keras, numpy, optimizers, calls):
    def runner(optimizer):
        variables = transformer(keras).trainable_variables
        random = numpy.random.default_rng(0)
        values = [random.normal(size=v.shape).astype("float32") / 50 for v in variables]
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        grads = [keras.ops.convert_to_tensor(v / 10) for v in values]
        optimizer.build(variables)
        if keras.backend.backend() == "jax":
            import jax

            # In the order of the arguments, as in Keras' trainer: JAX gives donated memory to results by their order.
            def reordered(state, grads, values):
                values, state = optimizer.stateless_apply(state, grads, values)
                return state, values

            step = jax.jit(reordered, donate_argnums=(0, 2))
            state = [[v.value for v in optimizer.variables], [v.value for v in variables]]

            def run():
                for _ in range(calls):
                    state[:] = step(state[0], grads, state[1])
                jax.block_until_ready(state)

            return run

        def run():
            for _ in range(calls):
                optimizer.apply(grads, variables)

        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            return tf.function(run, autograph=False)
        return run

    return {side: runner(make()) for side, make in optimizers.items()}


def pairs(keras, chainrule, optax):
    """What each case compares."""
    bridge, chains, theirs = chainrule.KerasBridge, chainrule.chains, keras.optimizers

    def own_muon():
        return theirs.Muon(1e-3)

    def matrices(params):
        """Keras' routing: attention's kernels, of three axes, go to Adam."""
        return {
            name: "muon" if p.ndim == 2 and "embedding" not in name else "adam"
            for name, p in params.items()
        }

    muon = {  # Keras' own defaults; its steps are in float32
        "weight_decay": 0.004,
        "scale": "rms",
        "scale_factor": 0.2,
        "routing": matrices,
        "adam_lr_ratio": 1.0,
        "adam_b2": 0.999,
        "adam_eps": 1e-7,
    }

    return {
        "adamw": {"ours": lambda: bridge(optax.adamw(1e-3)), "Keras": lambda: theirs.AdamW(1e-3)},
        "adamw, compiled": {
            "ours": lambda: bridge(optax.adamw(1e-3), compile=True),
            "Keras": lambda: theirs.AdamW(1e-3),
        },
        "casmo": {"ours": lambda: bridge(chains.casmo(1e-3)), "Keras": lambda: theirs.AdamW(1e-3)},
        "muon": {"ours": lambda: bridge(chains.muon(1e-3, **muon)), "Keras": own_muon},
        "muon, bfloat16": {
            "ours": lambda: bridge(chains.muon(1e-3, ns_dtype="bfloat16", **muon)),
            "Keras": own_muon,
        },
        "lamb": {"ours": lambda: bridge(optax.lamb(1e-3)), "Keras": lambda: theirs.Lamb(1e-3)},
        "adafactor": {
            "ours": lambda: bridge(optax.adafactor(1e-3)),
            "Keras": lambda: theirs.Adafactor(1e-3),
        },
    }


def measure(backend, case, rounds, steps, calls):
    import keras
    import numpy
    import optax

    import chainrule

    if backend == "torch":
        import torch

        torch.set_num_threads(1)
    assert keras.backend.backend() == backend
    compared, held = pairs(keras, chainrule, optax), True
    for name, limits in FIT.items():
        if backend in limits and case in f"fit, {name}":
            runs = fit_case(name, keras, numpy, compared["adamw"], steps)
            held &= report(backend, f"fit, {name}", turns(runs, rounds), limits[backend])
    for name, limits in APPLY.items():
        if backend in limits and case in f"apply, {name}":
            runs = apply_case(keras, numpy, compared[name], calls)
            held &= report(backend, f"apply, {name}", turns(runs, rounds), limits[backend])
    return held


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--quick", action="store_true", help="two rounds of two steps: does it run?"
    )
    args = parser.parse_args()
    if os.environ.get("KERAS_BACKEND") and args.backend == os.environ["KERAS_BACKEND"]:
        rounds, steps, calls = (2, 2, 1) if args.quick else (args.rounds, 30, 10)
        return 0 if measure(args.backend, args.case, rounds, steps, calls) else 1
    print(f"{'backend':11}{'case':32}{'ours':>12}{'Keras':>12}{'ratio':>7}", flush=True)
    failed = 0
    for backend in [args.backend] if args.backend else BACKENDS:
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "OMP_NUM_THREADS": "1",
            "TF_NUM_INTRAOP_THREADS": "1",
            "TF_NUM_INTEROP_THREADS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        }
        command = [sys.executable, __file__, "--backend", backend, "--case", args.case]
        command += ["--rounds", str(args.rounds), *(["--quick"] if args.quick else [])]
        failed |= subprocess.run(command, env=environment).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
