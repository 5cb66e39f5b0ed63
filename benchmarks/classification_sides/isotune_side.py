"""isotune's own trainer, built by the functions that train/imdb.py calls, on the documents of a round."""

from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from sft_sides.process import Metronome
from transformers import TrainerCallback

from classification_sides.material import DOCUMENTS_PER_STEP, facts_of_training, geometry, material
from isotune.data.batch_schedule import StepSchedule, collate
from isotune.data.documents import Rows, RunData
from isotune.distributed.launch import start_process
from isotune.run.run_dir import RunDir
from isotune.training.from_recipe import Start, build_model, build_trainer


def run(metronome: Metronome, side: str, mode: str, given: Namespace, scratch: str) -> None:
    """Train until the metronome ends it."""
    shared = material(mode, side, given, scratch)
    recipe, process = shared.recipe, start_process(shared.recipe)
    rows = Rows(torch.tensor(shared.mixed).numpy(), torch.arange(len(shared.mixed) + 1).numpy())
    data = RunData(replace(shared.prepared, rows=rows), None)
    config = geometry(recipe, shared.tokenizer, given)
    start = Start(recipe, process, RunDir(recipe), config, shared.tokenizer)
    trainer = build_trainer(start, build_model(start, data), data)
    # every pass over the documents in the same order, as on the other sides
    in_order = StepSchedule(
        data.train.documents, rows, global_batch_size=DOCUMENTS_PER_STEP,
        microbatch_tokens=recipe.forward_tokens("microbatch_tokens"), seed=recipe.seed, shuffle=False,
    )  # fmt: skip
    trainer.plan = replace(trainer.plan, schedule=in_order)

    @torch.no_grad()
    def facts() -> dict[str, Any]:
        first, documents = trainer.plan.schedule.step(0), data.train.documents
        model: Any = trainer.model_wrapped
        model.eval()
        passes: list[Any] = [collate(documents, microbatch.documents) for microbatch in first.microbatches]
        loss = sum(float(model(**send_to_device(one, trainer.args.device), use_cache=False).loss) for one in passes)
        tokens = int(documents.lengths[shared.mixed].sum())
        return facts_of_training(loss / DOCUMENTS_PER_STEP, len(shared.mixed), tokens, tokens, 0.0)

    class Hold(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            metronome.beat(facts)

    trainer.add_callback(Hold())
    trainer.train()
