"""The last steps of every run: the picture of its loss, its model card, and the upload that it was asked for."""

from pathlib import Path

from isotune.config import RunRecipe
from isotune.report.loss_curve import PICTURE, draw_loss_curve
from isotune.report.model_card import CARD, write_model_card
from isotune.run.finishing import UPLOAD_STEP, FinishingStep
from isotune.run.hub import upload_model


def last_steps(recipe: RunRecipe) -> list[FinishingStep]:
    """Curve, card and, with `push_to_hub`, the upload of RUN/model; each says in a line where its result is.

    A failed upload is a UserError: the run is finished and saved by then, and the same command repeats the upload.
    """
    run, repository = Path(recipe.output_dir), recipe.hub_model_id if recipe.push_to_hub else None

    def write_card() -> None:
        print(f"model card  {write_model_card(run, repository)}", flush=True)

    steps = [
        FinishingStep("loss_curve", lambda: print(f"loss curve  {draw_loss_curve(run)}"), run / PICTURE),
        FinishingStep("model_card", write_card, run / "model" / CARD),
    ]
    if recipe.push_to_hub:
        upload = FinishingStep(
            UPLOAD_STEP, lambda: print(f"uploaded    {upload_model(recipe)['url']}"), is_outside=True
        )
        steps.append(upload)
    return steps
