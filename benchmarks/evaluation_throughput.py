"""How fast is an evaluation: classification and generation beside transformers' pipeline, and the bootstrap?

    python benchmarks/evaluation_throughput.py
    python benchmarks/evaluation_throughput.py --parts bootstrap
    python benchmarks/evaluation_throughput.py --parts classification --geometry bert-base --documents 40
    python benchmarks/evaluation_throughput.py --parts generation --prompts 16

Targets: 1.5 times the documents a second of the pipeline at its best batch size, on IMDb's lengths; 2 times the tokens
a second of the pipeline one prompt at a time, on mixed prompts; 10,000 resamples of 50,000 rows in 3 s.
`evaluation_sides/` measures the parts. The last line is JSON.
"""

import argparse
import json
from typing import Any

from evaluation_sides.flags import parser_of_reviews, set_environment

PARTS = ("classification", "generation", "bootstrap")


def main() -> None:
    """Measure the parts that were asked for."""
    parser = parser_of_reviews(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--prompts", type=int, default=24, help="questions of generation")
    parser.add_argument("--new_tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--batch_size", type=int, default=16, help="of generation")
    parser.add_argument("--layers", type=int, default=12, help="of generation's model; fewer for a quick look")
    given = parser.parse_args()
    set_environment()
    result: dict[str, Any] = {"benchmark": "evaluation_throughput"}
    for part in given.parts:
        result[part] = measure(part, given)
    print(json.dumps(result))


def measure(part: str, given: argparse.Namespace) -> dict[str, Any]:
    """A part's figures; its libraries are imported by then."""
    from evaluation_sides import bootstrap, classification, generation

    return {"classification": classification, "generation": generation, "bootstrap": bootstrap}[part].measure(given)


if __name__ == "__main__":
    main()
