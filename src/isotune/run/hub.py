"""The Hugging Face Hub at a run's two ends: the commits that it reads, and the upload of RUN/model.

RUN/model is uploaded after it is saved and verified, so that a failed upload loses nothing. RUN/upload.json records the
upload. Without it the same command, given again, only tries the upload. A token never appears in a message or a file.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from isotune.config import RunRecipe
from isotune.data.sources.hub import is_hub_id, open_as_recorded, open_at, open_repository, opened_repositories
from isotune.data.sources.hub_access import Kind, go_offline, hub_answers, is_offline
from isotune.data.sources.source import PREFIX
from isotune.io.errors import UserError, first_line
from isotune.io.files import replace_file
from isotune.io.folders import expanded
from isotune.io.formats import format_of
from isotune.io.reading import read_text
from isotune.io.run_files import UPLOAD, or_empty, read_environment, read_upload
from isotune.run.identity import MIXTURES

CARD = "README.md"


@dataclass(frozen=True)
class OpenedHub:
    """What one rank has found out of the Hub, for all others."""

    repositories: list[tuple[Kind, str, str | None, str, str]]
    is_offline: bool

    def adopt(self) -> None:
        """Open the same repositories at the same commits, and ask the Hub nothing where it does not answer."""
        open_at(self.repositories)
        if self.is_offline:
            go_offline()


def open_hub(recipe: RunRecipe) -> OpenedHub:
    """Open every repository that a recipe names at its commit of now; the other ranks adopt it.

    A run that goes on, or goes on from another one, keeps the commits that this began with, which its environment.json
    records. UserError where there is no such repository, or it cannot be reached.
    """
    model = recipe.model_name_or_path
    named: list[tuple[Kind, str, str | None, str | None]] = [
        ("model", model, recipe.model_revision, "model_name_or_path")
    ]
    if recipe.dataset_mixture is None:
        named.append(("dataset", recipe.dataset_name, recipe.dataset_revision, "dataset_name"))
    for key in MIXTURES:
        for entry in recipe.values[key] or ():
            named.append(("dataset", entry["dataset_name"], entry.get("dataset_revision"), key))
    if (tokenizer := recipe.tokenizer_name_or_path) not in (None, model):
        named.append(("model", tokenizer, None, "tokenizer_name_or_path"))
    if recipe.eval_dataset_name is not None and recipe.eval_dataset_mixture is None:
        named.append(("dataset", recipe.eval_dataset_name, recipe.eval_dataset_revision, "eval_dataset_name"))
    named = [entry for entry in named if _is_on_hub(entry[1])]
    if recipe.run_to_go_on_with is not None:
        keep_commits(recipe, recipe.run_to_go_on_with)
    for kind, name, revision, key in named:
        open_repository(kind, name, revision, key=key)
    return OpenedHub(opened_repositories(), is_offline("model"))


def keep_commits(recipe: RunRecipe, run: Path) -> None:
    """Open what a recipe names at the commits that the run in `run` began with."""
    keys = ("model_name_or_path", "tokenizer_name_or_path", "dataset_name", "eval_dataset_name")
    names = {recipe.values[key]: None for key in keys if recipe.values[key]}
    names |= {entry["dataset_name"]: None for mixture in MIXTURES for entry in recipe.values[mixture] or ()}
    open_as_recorded(or_empty(read_environment, run), names)


def _is_on_hub(name: str) -> bool:
    is_elsewhere = name.startswith(PREFIX) or expanded(name).exists() or format_of(name) is not None
    return not is_elsewhere and is_hub_id(name)


def upload_model(recipe: RunRecipe) -> dict[str, str]:
    """Upload RUN/model to `OWNER/NAME`, or `NAME` of the token's owner; the repository is created where there is none.

    The owner's default decides whether it is private where the recipe does not say so, and the token is that of
    HF_TOKEN, of the file HF_TOKEN_PATH, or of `hf auth login`. Returns the record. Without token or network, or where
    the Hub refuses, it raises UserError, and the run does not change.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError

    run, repository = Path(recipe.output_dir), recipe.hub_model_id
    token = get_token()
    again = f"the model is saved in {run / 'model'}, and {recipe.again} tries the upload alone again"
    if not token:
        raise UserError(f"push_to_hub has no token: log in with `hf auth login` or set HF_TOKEN; {again}")
    if constants.HF_HUB_OFFLINE or not hub_answers():
        raise UserError(f"push_to_hub cannot reach the Hugging Face Hub; {again}")
    api = HfApi(endpoint=constants.ENDPOINT, token=token)

    def reason(error: Exception) -> str:
        return first_line(error).replace(token, "***").rstrip(".")

    try:
        created = api.create_repo(repository, private=recipe.hub_private_repo, exist_ok=True)
        for name in (repository, or_empty(read_upload, run).get("repository")):
            _name_in_card(run / "model" / CARD, name, created.repo_id)
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


def _name_in_card(card: Path, before: str | None, created: str) -> None:
    """Let the card's code load OWNER/NAME in place of NAME, whose owner the Hub alone knows, or of an earlier place."""
    if before in (None, created) or not card.is_file():
        return
    text = read_text(card)
    named = text.replace(f'from_pretrained("{before}"', f'from_pretrained("{created}"')
    if named != text:
        replace_file(card, named)
