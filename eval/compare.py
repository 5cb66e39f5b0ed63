"""Tests whether evaluated runs differ on the same rows; the same as `isotune compare`.

python eval/compare.py runs/demo-base runs/demo
python eval/compare.py runs/bert runs/distilbert runs/albert --all_pairs --name test
python eval/compare.py --help
"""

import sys

from isotune.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
