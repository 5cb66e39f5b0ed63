"""Runs a user's script as it stands, or with the one import changed.

python tests/distributed/changed_import.py stock|isotune SCRIPT ARGUMENTS...
"""

import re
import sys
from pathlib import Path

which, file = sys.argv[1], Path(sys.argv[2])
sys.argv = sys.argv[2:]
source = file.read_text(encoding="utf-8")
if which == "isotune":
    source, changed = re.subn(
        r"^from (?:transformers|trl) (import (?:SFT)?Trainer)\b", r"from isotune \1", source, flags=re.M
    )
    assert changed == 1, "the script imports its trainer in a line of its own"
exec(compile(source, str(file), "exec"), {"__name__": "__main__"})
