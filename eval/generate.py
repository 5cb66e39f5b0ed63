"""What a run's model says: one answer with --prompt, exact match with --dataset_name, else a chat on the terminal.

python eval/generate.py --run_dir runs/opt350m_lora --prompt "What is a winglet?"
python eval/generate.py --run_dir runs/opt350m_lora --temperature 0.7 --top_p 0.9
python eval/generate.py --run_dir runs/demo --dataset_name builtin:pirate --dataset_split test
python eval/generate.py --model facebook/opt-350m --prompt "What is a winglet?"
"""

import argparse
import sys
from pathlib import Path

from isotune.cli import OneSentenceParser
from isotune.errors import UserError, run_script


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = OneSentenceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", metavar="RUN", help="the folder of a finished run")
    source.add_argument("--model", metavar="NAME", help="or any model: a folder or a Hub id")
    parser.add_argument("--prompt", metavar="TEXT", help="the question; without it a chat begins")
    parser.add_argument("--dataset_name", metavar="NAME", help="ask the first question of each of its conversations")
    parser.add_argument("--dataset_split", default="test", metavar="SPLIT", help="of that data set (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N only")
    parser.add_argument("--output_dir", metavar="DIR", help="where metrics.json goes (RUN/eval/NAME of the data set)")
    parser.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="longest answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="nucleus sampling (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (%(default)s)")
    given = parser.parse_args()
    if given.prompt is not None and given.dataset_name:
        raise UserError("--prompt and --dataset_name exclude each other: ask one question or those of a data set")
    return given


def main() -> None:
    """Load the model; answer, measure or chat."""
    given = arguments()
    # torch takes seconds to import: a mistake on the command line has been answered by now
    from isotune.evaluation import exact_match
    from isotune.evaluation.chat import run_chat
    from isotune.evaluation.generation import Decoding, answer, load_model_generator, load_run_generator

    decoding = Decoding(given.max_new_tokens, given.temperature, given.top_p, given.seed)
    asked = given.dataset_name and exact_match.questions(given.dataset_name, given.dataset_split, given.limit)
    generator = load_run_generator(given.run_dir) if given.run_dir else load_model_generator(given.model)
    if asked:
        answers = exact_match.ask(generator, asked, decoding)
        for example in answers[:3]:
            mark = "=" if example.match else "x"
            print(f"  {mark} {example.prompt}\n    answer     {example.text}\n    reference  {example.reference}")
        right = sum(a.match for a in answers)
        print(f"exact match {right} of {len(answers)} ({exact_match.exact_match(answers):.1%})")
        if given.run_dir or given.output_dir:
            name = Path(given.dataset_name.replace("builtin:", "")).stem
            folder = Path(given.output_dir or Path(given.run_dir) / "eval" / name)
            facts = {"dataset_name": given.dataset_name, "dataset_split": given.dataset_split}
            exact_match.write(answers, folder, facts)
            print(f"written to {folder}")
    elif given.prompt is None:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        run_chat(generator, decoding, name=given.run_dir or given.model)
    else:
        print(answer(generator, given.prompt, decoding))


if __name__ == "__main__":
    run_script(main)
