"""RUN/model on the Hugging Face Hub: only after it is safely saved, so that nothing is lost when the Hub cannot be had.

RUN/upload.json says what was uploaded; without it the same command, given again, tries the upload alone. A token is
used and never told: not in a sentence, not in a file.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from isotune.config import RunRecipe
from isotune.data.sources.hub import first_line, hub_answers
from isotune.io.errors import UserError
from isotune.io.files import replace_file

RECORD = "upload.json"


@dataclass(frozen=True)
class Uploaded:
    """Where a model is on the Hub."""

    repository: str
    url: str


def upload_record(run: Path) -> Uploaded | None:
    """What RUN/upload.json says; None where nothing was uploaded yet."""
    try:
        said = json.loads((run / RECORD).read_text("utf-8"))
        return Uploaded(said["repository"], said["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def upload_model(run: Path, *, repository: str, private: bool | None, token: str | None) -> Uploaded:
    """Upload RUN/model through huggingface_hub, into a repository that is made where there is none.

    Args:
        run: RUN.
        repository: `NAME`, which goes to the token's owner, or `OWNER/NAME`.
        private: of a new repository; None is the owner's default.
        token: None takes the one that the user has logged in with, or HF_TOKEN.

    Raises:
        UserError: no token, no network, or the Hub refuses; the run stays as it is.
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
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=made.repo_id, folder_path=run / "model", commit_message="The final model of an isotune run"
        )
    except HFValidationError as error:
        raise UserError(f"hub_model_id {repository!r} names no repository: {_told(error, token)}; {again}") from None
    except Exception as error:  # whatever transport and Hub raise, their classes differ between versions
        raise UserError(f"push_to_hub to {repository} failed: {_told(error, token)}; {again}") from None
    uploaded = Uploaded(made.repo_id, str(made))
    record = {"repository": uploaded.repository, "url": uploaded.url, "commit": done.oid}
    replace_file(run / RECORD, json.dumps(record, indent=2) + "\n")
    return uploaded


def upload_run(recipe: RunRecipe) -> Uploaded:
    """`upload_model` as the recipe of a finished run says."""
    return upload_model(
        Path(recipe.output_dir),
        repository=recipe.hub_model_id,
        private=recipe.hub_private_repo,
        token=recipe.hub_token,
    )


def is_first_process() -> bool:
    """Whether this is the process that uploads, as the launcher says before processes have met."""
    return os.environ.get("RANK", "0") == "0"


def _told(error: Exception, token: str) -> str:
    return first_line(error).replace(token, "***").rstrip(".")
