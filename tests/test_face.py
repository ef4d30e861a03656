"""The face: light to import, and every name is what it says."""

from __future__ import annotations

import subprocess
import sys
import types


def test_importing_expunge_loads_no_torch():
    code = "import sys, expunge; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules); print(expunge.__version__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_names_stay_functions_after_their_modules_are_imported():
    import expunge.records.audit
    import expunge.records.compare

    modules = {"requests", "forget_sets", "parts"}
    for name in [*expunge._FACE, *expunge._MODULES]:
        value = getattr(expunge, name)
        assert isinstance(value, types.ModuleType) == (name in modules), name
    from expunge.parts import layers, rewind

    assert callable(layers) and callable(rewind)
