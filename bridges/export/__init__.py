"""A chain as a file of torch code: `export`.

examples      the chain's programs for lists of example parameters, as graphs
generalise    what these have in common, as one program for any list (`generic`, `expressions`)
kinds         which parameters have one program
functions     the program as functions, a kind and a stage each
text, render  as Python
newton_schulz its steps in torch, for matrices of any sides
runtime       the optimizer class, whose source the file gets (`runtime_lists`, `_checks`, `_compiled`)
interface     its docstring, constructor and hyperparameters
file          all of it
"""

from chainrule.bridges.export.errors import CannotExport
from chainrule.bridges.export.file import export

__all__ = ["CannotExport", "export"]
