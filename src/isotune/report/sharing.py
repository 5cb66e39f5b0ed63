"""The last part of a run: write the model card and upload the model to the Hub."""

from isotune.config import RunRecipe
from isotune.report.model_card import write_model_card
from isotune.run.hub import upload_run


def share(recipe: RunRecipe) -> None:
    """Write the model card of a finished run, upload RUN/model with `push_to_hub`, and print where they are.

    Call it on the main process only.

    Raises:
        UserError: the upload failed. The run is finished and saved; the same command repeats the upload alone.
    """
    card = write_model_card(recipe.output_dir, recipe.hub_model_id if recipe.push_to_hub else None)
    print(f"model card  {card}", flush=True)
    if recipe.push_to_hub:
        print(f"uploaded    {upload_run(recipe).url}", flush=True)
