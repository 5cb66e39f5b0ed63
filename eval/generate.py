"""Generates with a model: completions of a data set with metrics, the answer to one --prompt, or a chat.

accelerate launch eval/generate.py --run_dir runs/demo --dataset_name builtin:pirate
accelerate launch eval/generate.py --run_dir runs/opt350m_lora --task eval/configs/guanaco.yaml
python eval/generate.py --run_dir runs/opt350m_lora --prompt "What is a winglet?"
python eval/generate.py --run_dir runs/opt350m_lora --interactive --temperature 0.7 --top_p 0.9
python eval/generate.py --model facebook/opt-350m --prompt "What is a winglet?"
python eval/generate.py --run_dir runs/opt350m_lora --lm_eval_tasks arc_easy,my_task.yaml
"""

import sys

from isotune.commands.trained.generate import generate, read_arguments
from isotune.io.errors import run_script


def main() -> None:
    """The command line, and what it asks for; `isotune eval` does the same."""
    generate(read_arguments(sys.argv[1:], prog="eval/generate.py", description=__doc__ or ""))


if __name__ == "__main__":
    run_script(main)
