"""What was built is told; without the kernel there is one warning and a clear error."""

import subprocess
import sys
import textwrap

from chainrule import native


def test_info_tells_what_was_built_and_chosen():
    facts = native.info()
    assert facts["available"] is True
    assert facts["instruction_set"] in facts["instruction_sets"]
    assert facts["instruction_sets"][-1] == "baseline"
    assert facts["threads"] >= 1
    assert native.available()


def test_without_the_kernel_one_warning_says_so():
    code = """
        import sys, warnings
        sys.modules["chainrule.native._kernel"] = None  # as where it was left out
        import jax.numpy as jnp
        from chainrule import native
        from chainrule.native import xla
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not native.available() and not native.available()
        assert len(caught) == 1 and "kernel is not installed" in str(caught[0].message), caught
        assert native.info() == {"available": False}
        assert xla.statistics([jnp.full(3, -2.0)]).tolist() == [[2.0, 4.0, 0.0, 2.0]]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
