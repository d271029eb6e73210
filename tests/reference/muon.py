"""Muon (Jordan et al. 2024): momentum, orthogonalisation by its effect on singular values, and Adam for the rest."""

import math

import numpy as np

from reference.adam import adam
from reference.steps import Step, Tree, elementwise

COEFFICIENTS = {
    "keller_jordan": [(3.4445, -4.7750, 2.0315)] * 5,
    "dion": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "cubic": [(1.5, -0.5, 0.0)] * 5,
    "cans": [
        (8.47032880384807, -25.10807470666187, 18.62927559911801),
        (4.1828341832939415, -3.108701109889242, 0.5806066813500493),
        (3.9618572789616002, -2.9540637463593775, 0.5629761179538961),
        (3.2865862170279674, -2.464720134531287, 0.5073576938614553),
        (2.2737499944340436, -1.644660367908073, 0.4161909274978865),
    ],
    "aol": [
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        )
    ],
}


def ema_momentum(decay: float = 0.95, nesterov: str | None = "lerp", debias: bool = False) -> Step:
    def tensor():
        mu, t = np.zeros(()), 0

        def step(g, _):
            nonlocal mu, t
            t += 1
            mu = decay * mu + (1 - decay) * g
            now, ahead = (1 - decay**t, 1 - decay ** (t + 1)) if debias else (1.0, 1.0)
            return {
                None: mu / now,
                "lerp": (1 - decay) * g / now + decay * mu / ahead,
                "raw": g + decay * mu,
                "elementwise": (1 - mu) * g + decay * mu,
            }[nesterov]

        return step

    return elementwise(tensor)


def preconditioned(x: np.ndarray, how: str) -> np.ndarray:
    """Turbo-Muon's factor for each row, or the Schatten 4-norm."""
    if how == "aol" and x.shape[0] > x.shape[1]:
        return preconditioned(x.T, how).T
    if how == "aol":
        sums = np.abs(x @ x.conj().T).sum(axis=1, keepdims=True)
        return x / np.sqrt(np.where(sums == 0, 1, sums))
    fourth = np.sum(np.linalg.svd(x, compute_uv=False) ** 4) ** 0.25
    return x / fourth if fourth else x


def orthogonalized(
    g: np.ndarray,
    coefficients="keller_jordan",
    steps: int | None = None,
    eps: float = 1e-7,
    eps_scope: str = "added",
    preconditioning: str | None = None,
) -> np.ndarray:
    """The step's odd polynomial moves singular values and leaves singular vectors alone."""
    if isinstance(coefficients, str):
        triples = COEFFICIENTS[coefficients][:steps]
    else:
        triples = [coefficients] * (5 if steps is None else steps)
    norm = np.linalg.norm(g)
    if norm > 0:
        g = g / (norm + eps if eps_scope == "added" else max(norm, eps))
    preconditioning = preconditioning or ("aol" if coefficients == "aol" else "frobenius")
    if preconditioning != "frobenius":
        g = preconditioned(g, preconditioning)
    left, s, right = np.linalg.svd(g, full_matrices=False)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return left @ np.diag(s) @ right


def newton_schulz(
    coefficients="keller_jordan",
    steps: int | None = None,
    eps: float = 1e-7,
    eps_scope: str = "added",
    scale: str | None = "spectral",
    scale_factor: float = 1.0,
    scale_axes: tuple[int, int] | str = "in_out",
    dims: str = "batched",
    dual_norm: bool = False,
    gram: bool | str = "auto",
    preconditioning: str | None = None,
) -> Step:
    del gram  # how, not what

    def tensor(g: np.ndarray) -> np.ndarray:
        if dims != "batched":
            split = {"hwio": -1, "oihw": 1}[dims]
            matrix = g.reshape(math.prod(g.shape[:split]), math.prod(g.shape[split:]))
        else:
            matrix = g
        rows, cols = matrix.shape[-2:]
        out = np.empty_like(matrix)
        for index in np.ndindex(matrix.shape[:-2]):
            o = orthogonalized(matrix[index], coefficients, steps, eps, eps_scope, preconditioning)
            out[index] = o * np.sum(o * matrix[index]) if dual_norm else o
        n_out, n_in = {"in_out": (cols, rows), "out_in": (rows, cols)}.get(str(scale_axes), (0, 0))
        if not isinstance(scale_axes, str):
            n_out, n_in = g.shape[scale_axes[0]], g.shape[scale_axes[1]]
        factor = {
            "spectral": math.sqrt(max(1, n_out / n_in)),
            "rms": math.sqrt(max(n_out, n_in)),
            None: 1.0,
        }[scale]
        return (factor * scale_factor * out).reshape(g.shape)

    return lambda grads, _: {name: tensor(g) for name, g in grads.items()}


def muon_direction(
    beta: float = 0.95,
    nesterov: str | None = "lerp",
    debias: bool = False,
    ns_steps: int | None = None,
    adam_lr_ratio: float = 0.015,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-10,
    adam_weight_decay: float = 0.0,
    use_nadam: bool = False,
    **orthogonalisation,
) -> Step:
    """The direction before the decay and learning rate of all leaves."""
    momentum = ema_momentum(beta, nesterov, debias)
    orthogonalize = newton_schulz(steps=ns_steps, **orthogonalisation)
    rest = adam(adam_b1, adam_b2, adam_eps, nesterov=use_nadam)

    def step(grads: Tree, params: Tree) -> Tree:
        hidden = {
            name: g
            for name, g in grads.items()
            if g.ndim >= 2 and "bias" not in name.lower() and "embedding" not in name.lower()
        }
        others = {name: g for name, g in grads.items() if name not in hidden}
        directions = orthogonalize(momentum(hidden, params), params)
        for name, u in rest(others, params).items():
            directions[name] = adam_lr_ratio * (u + adam_weight_decay * params[name])
        return directions

    return step
