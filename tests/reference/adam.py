"""Adam's direction (Kingma & Ba 2015, algorithm 1) with Dozat's and Keras' look-ahead."""

import numpy as np

from reference.steps import Step, elementwise


def adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    nesterov: bool | str = False,
    debias: bool = True,
    debias_eps: float = 0.0,
    eps_scope: str = "corrected",
) -> Step:
    def tensor():
        mu = nu = np.zeros(())
        t = 0

        def step(g, _):
            nonlocal mu, nu, t
            t += 1
            mu = b1 * mu + (1 - b1) * g
            nu = b2 * nu + (1 - b2) * g * g
            c1, c2, ahead = (
                1 - b**n + debias_eps if debias else 1.0 for b, n in ((b1, t), (b2, t), (b1, t + 1))
            )
            first = {
                False: lambda: mu / c1,
                True: lambda: b1 * mu / ahead + (1 - b1) * g / c1,
                "keras": lambda: b1 * mu / c1 + (1 - b1) * g / c1,
            }[nesterov]()
            if eps_scope == "raw":
                return first * np.sqrt(c2) / (np.sqrt(nu + eps_root) + eps)
            return first / (np.sqrt(nu / c2 + eps_root) + eps)

        return step

    return elementwise(tensor)
