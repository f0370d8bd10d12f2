"""``compress report`` must start at once."""

from __future__ import annotations

import subprocess
import sys


def test_report_imports_no_heavy_stack() -> None:
    """A fresh interpreter that imports every view has loaded neither torch nor transformers."""
    code = (
        "import sys\n"
        "from compressor.report import card, html, manifest, model, serve, terminal\n"
        "heavy = {'torch', 'transformers', 'compressed_tensors', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
