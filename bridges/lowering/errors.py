"""What the lowering refuses, by name."""


class LoweringError(Exception):
    """A function cannot be lowered to torch; the message says why and what to do."""


class UnsupportedPrimitive(LoweringError):
    """A jaxpr holds a primitive, or a form of one, that has no lowering.

    Attributes:
      primitive: the primitive's name.
      link: the optax link the equation came from, or an empty string.
      source: ``file:line`` of the equation, or an empty string.
    """

    def __init__(self, primitive: str, link: str = "", source: str = "", detail: str = ""):
        self.primitive, self.link, self.source = primitive, link, source
        where = f" in {link}" if link else ""
        where += f" ({source})" if source else ""
        what = f": {detail}" if detail else ""
        super().__init__(
            f"primitive `{primitive}`{where} has no lowering to torch{what}; "
            'run the chain with engine="xla"'
        )
