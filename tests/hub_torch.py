"""A run of a torch optimizer, which the tests of `convert_state` go on in and come from."""

from typing import Any, ClassVar

import numpy as np
import torch


class RunInTorch:
    """A run by the name of its optimizer, which subclasses list."""

    MAKE: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str, params: dict[str, np.ndarray]):
        self.params = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in params.items()}
        self.optimizer = self.MAKE[name](self.params.items())

    def step(self, grads: dict[str, np.ndarray]) -> None:
        with torch.enable_grad():
            for name, grad in grads.items():
                self.params[name].grad = torch.tensor(grad)
        self.optimizer.step()

    def values(self) -> dict[str, np.ndarray]:
        return {k: p.detach().numpy().copy() for k, p in self.params.items()}

    @property
    def state(self) -> Any:
        return self.optimizer.state_dict()

    @state.setter
    def state(self, new: Any) -> None:
        self.optimizer.load_state_dict(new)

    @property
    def like(self) -> Any:
        return self.optimizer
