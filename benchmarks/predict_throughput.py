"""How fast does `isotune predict` classify a file, beside transformers' text-classification pipeline?

    python benchmarks/predict_throughput.py
    python benchmarks/predict_throughput.py --geometry bert-base --documents 24 --batch_sizes 1 4

A file of real reviews becomes a file of predictions: rows are read, checked, tokenised and classified, and parts and
file are written, all within the measured time. The pipeline gets the texts in memory and writes nothing; its best size
of batch counts. Both classify the same reviews of up to 512 tokens in fp32, turn by turn in one process. Target: 1.5
times the pipeline's documents a second. The last line is JSON.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("ISOTUNE_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def main() -> None:
    """Rounds of both sides, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=96, help="reviews a round")
    parser.add_argument("--geometry", choices=("minilm", "bert-base"), default="minilm")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="of the pipeline")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of real data")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
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
