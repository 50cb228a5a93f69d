"""Where files are: the package's own data, the embedded checkpoint, folders, and repositories on the hub.

Nothing is downloaded unless a hub id was asked for.
"""

import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# A wheel holds data/ inside the package; in a clone it is beside the package.
DATA = next((path for path in (_PACKAGE / "data", _PACKAGE.parent / "data") if path.is_dir()), _PACKAGE / "data")
EMBEDDED = DATA / "checkpoints" / "paligemma-emoji-112"

WEIGHT_FILES = ["model*.safetensors", "model.safetensors.index.json"]
JSON_FILES = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
]


def resolve(path: str | Path | None, revision: str | None = None, weights: bool = True) -> Path:
    """The folder that ``path`` means, downloaded first where it is a hub id.

    Args:
        path: a folder; a hub id such as ``"google/paligemma-3b-pt-224"``; or ``None`` for the embedded checkpoint.
        revision: the hub commit, branch or tag to pin. A folder has none.
        weights: fetch the weights too, not just configuration and tokenizer.

    Raises:
        ValueError: ``path`` is neither a folder nor a hub id.
        OSError: the embedded checkpoint is missing, or the hub repository is gated, absent or out of reach.
    """
    if path is None:
        if not EMBEDDED.is_dir():
            raise FileNotFoundError(
                f"The embedded checkpoint is not at {EMBEDDED}: install minivlm from a clone of its repository with "
                "`pip install -e .`, or name a folder or hub id."
            )
        return EMBEDDED
    if Path(path).is_dir():
        return Path(path)
    if (
        not isinstance(path, str)
        or not re.fullmatch(r"(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*", path)
        or Path(path).exists()
    ):
        raise ValueError(f"{str(path)!r} is neither a folder nor a hub id ('owner/name'): check the spelling.")
    return _download(path, revision, JSON_FILES + WEIGHT_FILES if weights else JSON_FILES)


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub  # here, not above: most runs never download

    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's
        reason = _why_no_download(repo, revision, error)
        raise OSError(f"{reason}; the embedded checkpoint works meanwhile: leave the path out.") from error


def _why_no_download(repo: str, revision: str | None, error: Exception) -> str:
    """What stands between us and the repository, and what to do about it."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    causes = [error, error.__cause__]  # the hub's client hides a 403 behind "not in the cache"
    status = {cause.response.status_code for cause in causes if isinstance(cause, errors.HfHubHTTPError)}
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no revision {revision!r}: choose a branch, tag or commit listed there"
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return (
            f"There is no folder {repo!r} here and no public repository {page}: check the spelling, or, if it is "
            "private, log in with `hf auth login`"
        )
    if isinstance(error, errors.GatedRepoError) or status & {401, 403}:
        return (
            f'{page} is gated: open that page, log in and click "Acknowledge license", then run `hf auth login` here'
            " and try again"
        )
    reason = (str(causes[1] or error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{page} could not be fetched and is not in the local cache ({reason}): check the network and try again"
