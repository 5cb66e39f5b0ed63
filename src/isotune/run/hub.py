"""Upload of RUN/model to the Hugging Face Hub, after it is saved and verified, so that a failed upload loses nothing.

RUN/upload.json records the upload. Without it the same command, given again, only tries the upload. A token never
appears in a message or a file.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from isotune.config import RunRecipe
from isotune.data.sources.hub import hub_answers
from isotune.io.errors import UserError, first_line
from isotune.io.files import replace_file

RECORD = "upload.json"


@dataclass(frozen=True)
class Uploaded:
    """The repository of an uploaded model."""

    repository: str
    url: str


def upload_record(run: Path) -> Uploaded | None:
    """Read RUN/upload.json; None where nothing was uploaded yet."""
    try:
        record = json.loads((run / RECORD).read_text("utf-8"))
        return Uploaded(record["repository"], record["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def upload_model(run: Path, *, repository: str, private: bool | None, token: str | None) -> Uploaded:
    """Upload RUN/model to `OWNER/NAME`, or `NAME` of the token's owner; the repository is created where there is none.

    Where `private` is None the owner's default decides, where `token` is None that of `hf auth login` or HF_TOKEN.
    Without token or network, or where the Hub refuses, it raises UserError, and the run does not change.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError

    token = token or get_token()
    again = f"the model is saved in {run / 'model'}, and the same command tries the upload alone again"
    if not token:
        raise UserError(f"push_to_hub has no token: log in with `hf auth login` or set HF_TOKEN; {again}")
    if constants.HF_HUB_OFFLINE or not hub_answers():
        raise UserError(f"push_to_hub cannot reach the Hugging Face Hub; {again}")
    api = HfApi(endpoint=constants.ENDPOINT, token=token)

    def reason(error: Exception) -> str:
        return first_line(error).replace(token, "***").rstrip(".")

    try:
        created = api.create_repo(repository, private=private, exist_ok=True)
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
    replace_file(run / RECORD, json.dumps(record, indent=2) + "\n")
    return Uploaded(created.repo_id, str(created))


def upload_run(recipe: RunRecipe) -> Uploaded:
    """`upload_model` with the hub keys of the recipe of a finished run."""
    run, private, token = Path(recipe.output_dir), recipe.hub_private_repo, recipe.hub_token
    return upload_model(run, repository=recipe.hub_model_id, private=private, token=token)


def is_first_process() -> bool:
    """Whether this is global rank 0, by the launcher's RANK: it can be asked before the process group exists."""
    return os.environ.get("RANK", "0") == "0"
