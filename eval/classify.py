"""Evaluates a classifier: metrics with 95% intervals, predictions, plots and the most confident errors.

accelerate launch eval/classify.py --run_dir runs/imdb_distilbert
accelerate launch eval/classify.py --run_dir runs/imdb_distilbert --task eval/configs/imdb.yaml
accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 4 eval/classify.py --run_dir runs/yelp_bert
accelerate launch eval/classify.py --model textattack/bert-base-uncased-imdb --task eval/configs/imdb.yaml
"""

import sys

from isotune.commands.trained.evaluate_classifier import evaluate_classifier, read_arguments
from isotune.io.errors import run_script


def main() -> None:
    """The command line, and what it asks for; `isotune eval` does the same."""
    evaluate_classifier(read_arguments(sys.argv[1:], prog="eval/classify.py", description=__doc__ or ""))


if __name__ == "__main__":
    run_script(main)
