"""Training that may be killed at any moment, for `test_kills.py`: it saves every step and goes on from what it finds.

Every step writes a line "step digest" to the log, the digest of all that the next step starts from; so does the state
that a start finds, before its first step.
"""

import hashlib
import importlib
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SHAPES = {"w": (16, 8), "b": (8,), "scale": ()}


def gradient(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def digest(arrays: list[np.ndarray]) -> str:
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(array.tobytes())
    return whole.hexdigest()


Lines = Iterator[tuple[int, str]]


def in_torch(folder: pathlib.Path) -> Lines:
    """Checkpoints are files that appear whole: written under another name, then renamed."""
    import torch

    from chainrule import TorchBridge, chains

    torch.set_num_threads(1)
    torch.manual_seed(0)
    params = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    bridge = TorchBridge(chains.magma(chains.stam(0.01)), params.items())
    file, step = folder / "checkpoint.pt", 0

    def current() -> str:
        entries = [
            bridge.state[p][name] for p in params.values() for name in sorted(bridge.state[p])
        ]
        return digest([t.detach().numpy() for t in (*params.values(), *entries)])

    if file.exists():
        saved = torch.load(file, weights_only=True)
        step = saved["step"]
        for name, p in params.items():
            p.data.copy_(saved["params"][name])
        bridge.load_state_dict(saved["bridge"])
    yield step, current()
    while True:
        for name, value in gradient(step).items():
            params[name].grad = torch.from_numpy(np.asarray(value))
        bridge.step()
        step += 1
        values = {name: p.detach() for name, p in params.items()}
        unfinished = file.with_suffix(".unfinished")
        torch.save({"step": step, "params": values, "bridge": bridge.state_dict()}, unfinished)
        unfinished.replace(file)
        yield step, current()


def in_jax(folder: pathlib.Path) -> Lines:
    """Checkpoints are Orbax's."""
    import jax
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint as ocp

    from chainrule import chains

    tx = chains.magma(chains.stam(0.01))
    params: Any = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    state, step = tx.init(params), 0
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    manager = ocp.CheckpointManager(folder / "orbax", options=options)

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # Orbax saves plain trees: the leaves, in order.
    found = manager.latest_step()
    if found is not None:
        like = ocp.args.StandardRestore(jax.tree.leaves((params, state)))
        leaves = manager.restore(found, args=like)
        params, state = jax.tree.unflatten(jax.tree.structure((params, state)), leaves)
        step = found
    yield step, digest([np.asarray(x) for x in jax.tree.leaves((params, state))])
    while True:
        params, state = update(gradient(step), state, params)
        step += 1
        manager.save(step, args=ocp.args.StandardSave(jax.tree.leaves((params, state))))
        yield step, digest([np.asarray(x) for x in jax.tree.leaves((params, state))])


TRAINERS: dict[str, Callable[[pathlib.Path], Lines]] = {"torch": in_torch, "jax": in_jax}


def train(framework: str, folder: pathlib.Path, log: int, steps: float = math.inf) -> None:
    for step, found in TRAINERS[framework](folder):
        os.write(log, f"{step} {found}\n".encode())  # one write, so that a kill leaves whole lines
        if step >= steps:
            return


def serve(framework: str) -> None:
    """Forks a trainer for every line "folder log steps" on standard input; answers with its process, then its status.

    What takes long to import has been imported, and nothing has started a thread yet.
    """
    for module in {
        "torch": ["torch._dynamo", "chainrule.bridges.torch_optim"],
        "jax": ["orbax.checkpoint", "chainrule"],
    }[framework]:
        importlib.import_module(module)
    status = pathlib.Path("/proc/self/status").read_text()
    assert "Threads:\t1\n" in status, status
    for line in sys.stdin:
        folder, log, steps = line.split()
        child = os.fork()
        if child == 0:
            file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            train(framework, pathlib.Path(folder), file, float(steps))
            os._exit(0)
        print(child, flush=True)  # noqa: T201
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve(sys.argv[1])
