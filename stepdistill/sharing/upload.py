"""What speaks to the Hugging Face Hub; all else of a push is done without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepdistill.errors import UserError, first_line

if TYPE_CHECKING:
    from stepdistill.sharing.hub import HubFolder


def check_repo(repo: str, option: str = "--repo") -> None:
    """A repository's name is one that the Hub takes.

    Raises:
        UserError: it is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(
            f"{option} is {repo}, and must be OWNER/NAME: letters, digits, -, _ and . with at most 96 in the name"
        )


def check_token() -> None:
    """There is a token of the Hub, in its file or in HF_TOKEN.

    Raises:
        UserError: there is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            "no token of the Hugging Face Hub was found: run `hf auth login`, or set HF_TOKEN; --dry-run needs none"
        )


def upload(folder: HubFolder, *, private: bool) -> str:
    """Makes the repository where it is not there, and commits the files to it.

    Args:
        folder: what is pushed.
        private: whether a new repository is private; one that is there keeps what it is.

    Returns:
        The address of the repository.

    Raises:
        UserError: the Hub refuses, or is out of reach.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    files = [CommitOperationAdd(name, content) for name, content in folder.files.items()]
    try:
        made = api.create_repo(folder.repo, private=private, exist_ok=True)
        api.create_commit(folder.repo, files, commit_message="Student distilled with stepdistill")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{folder.repo} was not pushed: {first_line(error)}") from error
    return str(made)
