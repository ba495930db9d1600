"""A repository whose `finetune.py` has a fault of `faults.py`, which the environment names."""

import os
import sys
from pathlib import Path

from tests.helpers.launch import ROOT

FAULT = "TEST_FAULT"
SCRIPT = f"""
import os, sys
sys.path[0] = {str(ROOT)!r}
import finetune
from tests.helpers import faults
if "--only" not in sys.argv:
    getattr(faults, os.environ[{FAULT!r}])()
sys.exit(finetune.main())
"""


def held_tree(folder: Path) -> Path:
    """Make it in an empty folder."""
    folder.mkdir()
    (folder / "finetune.py").write_text(SCRIPT)
    os.symlink(ROOT / "scripts", folder / "scripts")
    os.symlink(sys.prefix, folder / ".venv")
    return folder
