"""The first line of a run: torch takes seconds to import, and until then nothing else would show that it started."""

import os
import sys


def say_loading() -> None:
    """One line on the first process of this machine, unless torch is there already."""
    if "torch" not in sys.modules and os.environ.get("LOCAL_RANK", "0") == "0":
        print("loading     torch and transformers ...", flush=True)
