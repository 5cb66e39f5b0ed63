"""How fast does `isotune predict` classify a file, beside transformers' text-classification pipeline?

    python benchmarks/predict_throughput.py
    python benchmarks/predict_throughput.py --geometry bert-base --documents 24 --batch_sizes 1 4

A file of real reviews becomes a file of predictions: rows are read, checked, tokenised and classified, and parts and
file are written, all within the measured time. The pipeline gets the texts in memory and writes nothing; its best size
of batch counts. Both classify the same reviews of up to 512 tokens in fp32, turn by turn in one process. Target: 1.5
times the pipeline's documents a second. The last line is JSON.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from evaluation_sides.flags import parser_of_reviews, set_environment


def main() -> None:
    """Rounds of both sides, and the ratio."""
    given = parser_of_reviews(__doc__).parse_args()
    set_environment()
    from evaluation_sides import classification

    print(json.dumps({"benchmark": "predict_throughput", **classification.measure(given, by_predict)}))


def by_predict(classifier: Any, rows: list[dict[str, Any]]) -> Any:
    """Probabilities as the written file has them, [rows, classes]."""
    import numpy as np

    from isotune.data.sources.source import read_rows
    from isotune.evaluation.distributed_eval import Ranks
    from isotune.evaluation.prediction.predict import predict_source
    from isotune.evaluation.prediction.predictors import TextPredictor

    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "rows.jsonl"), Path(folder, "predictions.jsonl")
        source.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows), "utf-8")
        ranks = Ranks(0, 1, classifier.device)
        identity = {"model": classifier.name, "model_sha256": "random weights"}
        predict_source(read_rows(str(source)), TextPredictor(classifier), output, ranks, **identity)
        return np.array([json.loads(line)["probabilities"] for line in output.read_text("utf-8").splitlines()])


if __name__ == "__main__":
    main()
