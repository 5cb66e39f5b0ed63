"""isotune's own trainer, built by the functions that train/sft_opt.py calls."""

from argparse import Namespace
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from isotune.data.batch_schedule import collate
from isotune.data.documents import Documents, RunData
from isotune.distributed.launch import start_process
from isotune.run.run_dir import RunDir
from isotune.training.from_recipe import Start, build_model, build_trainer
from sft_sides.material import facts_of_training, geometry, rows_of_a_round, shipped_recipe
from sft_sides.process import Metronome


def run(metronome: Metronome, side: str, mode: str, given: Namespace, scratch: str) -> None:
    """Train until the metronome ends it."""
    recipe = shipped_recipe(mode, side, given, scratch)
    process = start_process(recipe)
    tokenizer, data, alone = rows_of_a_round(recipe, given)
    start, run_data = Start(recipe, process, RunDir(recipe), geometry(given), tokenizer), RunData(data, None)
    trainer = build_trainer(start, build_model(start, run_data), run_data)
    hold(trainer, metronome, data.documents, alone, given)
    trainer.train()


def hold(trainer: Any, metronome: Metronome, documents: Documents, alone: int, given: Namespace) -> None:
    """Let a trainer's steps wait for the metronome; `alone` is the document whose loss is told."""

    @torch.no_grad()
    def facts() -> dict[str, Any]:
        one = collate(documents, (alone,))
        inputs = send_to_device(one, trainer.args.device)
        model: Any = trainer.model_wrapped
        loss = model.eval()(**inputs, use_cache=False).loss.item() / len(one["targets"])
        steps = [trainer.plan.schedule.step(number) for number in range(given.steps_per_round)]
        return facts_of_training(loss, sum(s.input_tokens for s in steps), sum(s.supervised_tokens for s in steps))

    class Hold(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            metronome.beat(facts)

    trainer.add_callback(Hold())
