"""The last steps of every run: the picture of its loss, its model card, and the upload that it was asked for."""

from pathlib import Path

from isotune.config import RunRecipe
from isotune.report.loss_curve import draw_loss_curve
from isotune.report.model_card import write_model_card
from isotune.run.finishing import FinishingStep
from isotune.run.hub import upload_model


def last_steps(recipe: RunRecipe) -> list[FinishingStep]:
    """Curve, card and, with `push_to_hub`, the upload of RUN/model; each says in a line where its result is.

    A failed upload is a UserError: the run is finished and saved by then, and the same command repeats the upload.
    """
    run, repository = Path(recipe.output_dir), recipe.hub_model_id if recipe.push_to_hub else None
    steps = [
        FinishingStep("loss_curve", lambda: print(f"loss curve  {draw_loss_curve(run)}")),
        FinishingStep("model_card", lambda: print(f"model card  {write_model_card(run, repository)}", flush=True)),
    ]
    if recipe.push_to_hub:
        upload = FinishingStep("upload", lambda: print(f"uploaded    {upload_model(recipe)['url']}"), is_outside=True)
        steps.append(upload)
    return steps
