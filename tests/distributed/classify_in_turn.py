"""Runs eval/classify.py several times in the processes of one launch: each argument is one command line, as JSON."""

import json
import runpy
import sys

from accelerate import PartialState

for line in sys.argv[1:]:
    PartialState._reset_state()
    sys.argv = ["eval/classify.py", *json.loads(line)]
    try:
        runpy.run_path("eval/classify.py", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
