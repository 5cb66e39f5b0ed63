"""What became of the conversations of a source, as the table that preparation prints.

read, kept            rows of the source; `read` is `kept` plus all of `dropped`
truncated, split      kept rows that were longer than max_seq_length
dropped               rows by the reason for which they are not trained on
documents             what is trained on; more than `kept` where rows were split
pieces_dropped        pieces of split rows that held no supervised token
turns_cut             turns after the last answer of a conversation, left out
tokens, supervised_tokens    of the documents
straddling_tokens     supervised tokens that also cover a character outside their answer
special_texts         conversations in which the eos token is written out, encoded as ordinary text
whole_lengths         quantiles of the tokens of a conversation before anything was cut
rows, row_capacity    how many rows there are, and the tokens that each may hold
packing               whether rows hold more than one document
packing_efficiency    the share of all rows' capacity that tokens fill
"""

from typing import Any

from isotune.data.counts_table import CountsTable, count_lines, lengths_line


def conversations_table(
    source: str, counts: dict[str, Any], *, rows: int, row_capacity: int, packing: bool
) -> CountsTable:
    """The table of prepared conversations; `counts` are those of the documents, the same for every packing and seed."""
    tokens, supervised = counts["tokens"], counts["supervised_tokens"]
    efficiency = tokens / (rows * row_capacity)
    dropped: dict[str, int] = counts["dropped"]
    lines = [
        *count_lines([("documents read", counts["read"]), ("  kept", counts["kept"])], keep_zeros=True),
        *count_lines([("  truncated", counts["truncated"]), ("  split", counts["split"])]),
        *count_lines((f"  dropped: {reason}", number) for reason, number in dropped.items()),
        *count_lines(
            [
                ("pieces after splitting", counts["documents"] if counts["split"] else 0),
                ("  dropped: no supervised token", counts["pieces_dropped"]),
                ("turns after the last answer, left out", counts["turns_cut"]),
                ("tokens across an answer's edge", counts["straddling_tokens"]),
                ("texts with the eos token written out", counts["special_texts"]),
            ]
        ),
        ("tokens", f"{tokens:,}"),
        ("  supervised", f"{supervised:,} ({supervised / tokens:.1%})"),
        (f"rows of {row_capacity:,} tokens", f"{rows:,}"),
        ("  filled" if packing else "  filled (not packed)", f"{efficiency:.2%}"),
        lengths_line(counts["whole_lengths"]),
    ]
    of_rows = {"rows": rows, "row_capacity": row_capacity, "packing": packing, "packing_efficiency": efficiency}
    return CountsTable(source, {**counts, **of_rows}, tuple(lines))
