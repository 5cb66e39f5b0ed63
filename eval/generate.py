"""What a run's model says: one answer with --prompt, else a small chat on the terminal.

python eval/generate.py --run_dir runs/opt350m_lora --prompt "What is a winglet?"
python eval/generate.py --run_dir runs/opt350m_lora --temperature 0.7 --top_p 0.9
python eval/generate.py --model facebook/opt-350m --prompt "What is a winglet?"
"""

import argparse
import sys

from isotune.cli import OneSentenceParser
from isotune.errors import run_script


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = OneSentenceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", metavar="RUN", help="the folder of a finished run")
    source.add_argument("--model", metavar="NAME", help="or any model: a folder or a Hub id")
    parser.add_argument("--prompt", metavar="TEXT", help="the question; without it a chat begins")
    parser.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="longest answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="nucleus sampling (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Load the model, answer."""
    given = arguments()
    # torch takes seconds to import: a mistake on the command line has been answered by now
    from isotune.evaluation.chat import run_chat
    from isotune.evaluation.generation import Decoding, answer, load_model_generator, load_run_generator

    decoding = Decoding(given.max_new_tokens, given.temperature, given.top_p, given.seed)
    generator = load_run_generator(given.run_dir) if given.run_dir else load_model_generator(given.model)
    if given.prompt is None:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        run_chat(generator, decoding, name=given.run_dir or given.model)
    else:
        print(answer(generator, given.prompt, decoding))


if __name__ == "__main__":
    run_script(main)
