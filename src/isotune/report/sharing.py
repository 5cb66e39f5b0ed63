"""What makes a saved model fit to be given away, as the last thing that a run does: its card, and its upload."""

from isotune.config import RunRecipe
from isotune.report.model_card import write_model_card
from isotune.run.hub import upload_run


def share(recipe: RunRecipe) -> None:
    """Write the card of a finished run and, where `push_to_hub` says so, upload RUN/model; says where they are.

    Called on the main process only.

    Raises:
        UserError: the upload failed; the run is done and saved, and the same command tries the upload alone again.
    """
    card = write_model_card(recipe.output_dir, recipe.hub_model_id if recipe.push_to_hub else None)
    print(f"model card  {card}", flush=True)
    if recipe.push_to_hub:
        print(f"uploaded    {upload_run(recipe).url}", flush=True)
