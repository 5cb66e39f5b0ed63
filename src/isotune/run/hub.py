"""Upload of RUN/model to the Hugging Face Hub, after it is saved and verified, so that a failed upload loses nothing.

RUN/upload.json records the upload. Without it the same command, given again, only tries the upload. A token never
appears in a message or a file.
"""

import json
from pathlib import Path

from isotune.config import RunRecipe
from isotune.data.sources.hub import hub_answers
from isotune.io.errors import UserError, first_line
from isotune.io.files import replace_file

UPLOAD = "upload.json"


def upload_model(recipe: RunRecipe) -> dict[str, str]:
    """Upload RUN/model to `OWNER/NAME`, or `NAME` of the token's owner; the repository is created where there is none.

    The owner's default decides whether it is private where the recipe does not say so, and the token may be that of
    `hf auth login` or HF_TOKEN. Returns the record. Without token or network, or where the Hub refuses, it raises
    UserError, and the run does not change.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError

    run, repository = Path(recipe.output_dir), recipe.hub_model_id
    token = recipe.hub_token or get_token()
    again = f"the model is saved in {run / 'model'}, and the same command tries the upload alone again"
    if not token:
        raise UserError(f"push_to_hub has no token: log in with `hf auth login` or set HF_TOKEN; {again}")
    if constants.HF_HUB_OFFLINE or not hub_answers():
        raise UserError(f"push_to_hub cannot reach the Hugging Face Hub; {again}")
    api = HfApi(endpoint=constants.ENDPOINT, token=token)

    def reason(error: Exception) -> str:
        return first_line(error).replace(token, "***").rstrip(".")

    try:
        created = api.create_repo(repository, private=recipe.hub_private_repo, exist_ok=True)
        commit = api.upload_folder(
            repo_id=created.repo_id, folder_path=run / "model", commit_message="The final model of an isotune run"
        )
    except HFValidationError as error:
        raise UserError(
            f"hub_model_id {repository!r} is not a valid repository name: {reason(error)}; {again}"
        ) from None
    except Exception as error:  # the classes that transport and Hub raise differ between versions
        raise UserError(f"push_to_hub to {repository} failed: {reason(error)}; {again}") from None
    record = {"repository": created.repo_id, "url": str(created), "commit": commit.oid}
    replace_file(run / UPLOAD, json.dumps(record, indent=2) + "\n")
    return record
