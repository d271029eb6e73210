"""What export refuses, by name."""


class CannotExport(ValueError):
    """A chain that no file of torch code can hold; the message names the link and says why."""


class Unlike(Exception):
    """Two parameters, or two lists of them, whose programs are not one program: what `generalise` meets on its way."""
