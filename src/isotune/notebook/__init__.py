"""Runs from Python, as in a notebook; each is the command of the same name, in processes of its own:

    run = isotune.classify("reviews.csv", model="distilbert-base-uncased")
    run = isotune.sft("chats.jsonl", model="facebook/opt-350m", tune="qlora", processes=2)
    run.evaluate(), run.predict(["..."]), run.compare(other), run.report()
    run = isotune.load("runs/reviews")

So a result does not depend on what else the notebook did, the notebook's process holds no device memory, and what
stops a command stops a run here: the stop button ends it with a checkpoint, and the same call goes on from there.
"""

from isotune.notebook.run import Run, classify, load, sft

__all__ = ["Run", "classify", "load", "sft"]
