"""How good a classifier is: every metric with its 95% interval, every prediction, pictures and the worst errors.

accelerate launch eval/classify.py --run_dir runs/imdb_distilbert
accelerate launch eval/classify.py --run_dir runs/imdb_distilbert --task eval/configs/imdb.yaml
accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 4 eval/classify.py --run_dir runs/yelp
accelerate launch eval/classify.py --model textattack/bert-base-uncased-imdb --task eval/configs/imdb.yaml
"""

import argparse
from pathlib import Path
from typing import Any

from isotune.io.argument_parser import OneSentenceParser
from isotune.io.errors import UserError, run_script


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = OneSentenceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", metavar="RUN", help="the folder of a finished run")
    source.add_argument("--model", metavar="NAME", help="or any classifier: a folder or a Hub id")
    data = parser.add_argument_group("data (of a run, what it was evaluated on where nothing is said)")
    data.add_argument("--task", metavar="FILE", help="a task file, as in eval/configs; flags win over it")
    data.add_argument("--dataset_name", metavar="NAME", help="a Hub id, folder, file or builtin:NAME")
    data.add_argument("--dataset_split", metavar="SPLIT", help="of that data set (test)")
    data.add_argument("--dataset_text_field", metavar="COLUMN", help="holds the texts (text)")
    data.add_argument("--dataset_label_field", metavar="COLUMN", help="holds the classes (label)")
    data.add_argument("--ordinal", action="store_true", default=None, help="measure too how far off a class is")
    data.add_argument("--max_seq_length", type=int, metavar="N", help="tokens of a text (the run's own, or 512)")
    data.add_argument("--limit", type=int, metavar="N", help="the first N rows only")
    how = parser.add_argument_group("how (none of these changes a metric beyond rounding)")
    how.add_argument("--batch_tokens", type=int, metavar="N", help="of one forward pass (4096 on a CPU, else 65536)")
    how.add_argument("--batch_size", type=int, metavar="N", help="texts of one forward pass at most")
    how.add_argument("--bf16", action="store_true", help="faster where the device has it; metrics move by its rounding")
    behind = "behind the intervals; a share of rows that is 0 or 1 has the exact one (%(default)s)"
    how.add_argument("--resamples", type=int, default=2000, metavar="N", help=behind)
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the resamples (%(default)s)")
    out = parser.add_argument_group("output")
    out.add_argument("--output_dir", metavar="DIR", help="where the files go (RUN/eval/NAME; runs/MODEL/eval/NAME)")
    out.add_argument(
        "--attention_ids", nargs="*", metavar="ID", help="rows whose attention is drawn (three short ones)"
    )
    out.add_argument("--no_pictures", action="store_true", help="numbers only")
    given = parser.parse_args()
    for name in ("limit", "batch_tokens", "batch_size", "resamples", "max_seq_length"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name} is {getattr(given, name)}: it is at least 1")
    return given


def main() -> None:
    """Model, rows, predictions on all processes; scores, files and pictures on one."""
    given = arguments()
    from isotune.evaluation.classification.tasks import FLAGS, read_task

    flags = {name: getattr(given, name) for name in FLAGS}
    task = read_task(given.task, flags) if given.task or given.dataset_name or given.model else None
    # torch takes seconds to import: a mistake on the command line has been answered by now
    import torch

    from isotune.evaluation.classification.attention_plots import chosen_rows, draw_attention
    from isotune.evaluation.classification.examples import print_examples, write_examples
    from isotune.evaluation.classification.models import load_model_classifier, load_run_classifier, task_of_run
    from isotune.evaluation.classification.plots import draw_pictures
    from isotune.evaluation.classification.result import evaluate_rows, print_scores, read_task_rows, write_evaluation
    from isotune.evaluation.distributed_eval import start_ranks
    from isotune.report.loss_curve import draw_loss_curve
    from isotune.run.metrics_reader import METRICS

    ranks = start_ranks()
    dtype = torch.bfloat16 if given.bf16 else torch.float32
    load, name = (load_run_classifier, given.run_dir) if given.run_dir else (load_model_classifier, given.model)
    classifier = load(name, ranks.device, dtype)
    held_out = None
    if task is None:
        task, held_out = task_of_run(classifier, flags)
    rows = read_task_rows(task, classifier, ranks, given.limit, held_out)
    done = evaluate_rows(
        classifier,
        rows,
        task,
        ranks,
        batch_tokens=given.batch_tokens,
        batch_size=given.batch_size,
        resamples=given.resamples,
        seed=given.seed,
    )
    if done is None:
        return
    pictured = chosen_rows(done, given.attention_ids)
    home = Path(given.run_dir or Path("runs") / Path(given.model).name)
    folder = Path(given.output_dir or home / "eval" / task.name)
    settings: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "resamples": given.resamples}
    folder.mkdir(parents=True, exist_ok=True)
    write_examples(done.examples, folder)
    if not given.no_pictures:
        draw_pictures(done, folder)
        draw_attention(classifier, done, folder, pictured)
        if given.run_dir and (home / METRICS).is_file():
            print(f"loss curve  {draw_loss_curve(home)}")
    write_evaluation(done, folder, classifier, task, settings)
    print("most confident errors first:")
    print_examples(done.examples)
    print_scores(done)
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main)
