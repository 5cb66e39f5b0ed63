"""Callbacks that give a script of one's own what the runs of `isotune` have: their folder, their model, their report.

    from isotune import Trainer
    from isotune.callbacks import FinalModel, Report, RunFolder

    trainer = Trainer(model, args, ..., callbacks=[RunFolder("runs/mine"), FinalModel(), Report()])
    trainer.train()

`isotune runs`, `isotune report` and `isotune.load` read the folder as that of any run.
"""

from isotune.callbacks.finishing import FinalModel, Report
from isotune.callbacks.run_folder import RunFolder

__all__ = ["FinalModel", "Report", "RunFolder"]
