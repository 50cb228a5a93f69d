"""Where files are: the package's own data, the embedded checkpoint, folders, and repositories on the hub.

Nothing is downloaded unless you pass a hub id. Also here: what every reader and writer of files does the same way.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# data/ is inside the package in a wheel, and beside it in a clone.
DATA = next((path for path in (_PACKAGE / "data", _PACKAGE.parent / "data") if path.is_dir()), _PACKAGE / "data")
EMBEDDED = DATA / "checkpoints" / "paligemma-emoji-112"

WEIGHT_FILES = ["model*.safetensors", "model.safetensors.index.json"]
JSON_FILES = ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"]
JSON_FILES += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
JSON_FILES += ["adapter_config.json"]  # so that a LoRA adapter can be recognized


def resolve(path: str | Path | None, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint, downloaded first if ``path`` is a hub id.

    Args:
        path: A folder, a hub id such as ``"google/paligemma-3b-pt-224"``, or ``None`` for the embedded checkpoint.
        revision: The hub commit, branch or tag. Ignored for a folder.
        weights: Whether to download the weights too, not just configuration and tokenizer.

    Raises:
        ValueError: If ``path`` is neither a folder nor a hub id.
        OSError: If the embedded checkpoint is missing, or the hub repository is gated, missing or unreachable.
    """
    if path is None:
        if not EMBEDDED.is_dir():
            raise FileNotFoundError(
                f"The embedded checkpoint is not at {EMBEDDED}: install minivlm from a clone of its repository with "
                "`pip install -e .`, or pass a folder or hub id."
            )
        return EMBEDDED
    if Path(path).is_dir():
        return Path(path)
    is_hub_id = isinstance(path, str) and re.fullmatch(r"(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*", path)
    if not is_hub_id or Path(path).exists():
        raise ValueError(f"{str(path)!r} is neither a folder nor a hub id ('owner/name'): check the spelling.")
    return _download(path, revision, JSON_FILES + WEIGHT_FILES if weights else JSON_FILES)


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub  # here because most runs never download

    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client raises errors of its own, of httpx and of the system
        reason = _explain_failed_download(repo, revision, error)
        raise OSError(f"{reason}. Or omit the path to use the embedded checkpoint.") from error


def _explain_failed_download(repo: str, revision: str | None, error: Exception) -> str:
    """Why the repository could not be downloaded, and what to do about it."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    causes = [error, error.__cause__]  # the client hides a 403 behind "not in the cache"
    status = {cause.response.status_code for cause in causes if isinstance(cause, errors.HfHubHTTPError)}
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no revision {revision!r}: use a branch, tag or commit listed there"
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        advice = "check the spelling or, if it is private, log in with `hf auth login`"
        return f"There is no folder {repo!r} here and no public repository {page}: {advice}"
    if isinstance(error, errors.GatedRepoError) or status & {401, 403}:
        advice = 'open that page, log in and click "Acknowledge license", then run `hf auth login` here and try again'
        return f"{page} is gated: {advice}"
    reason = (str(causes[1] or error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{page} could not be downloaded and is not in the local cache ({reason}): check the network and try again"


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError if the file contains anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of 5,000 digits
        raise ValueError(f"{path} is not valid JSON ({printable(error)}): {remedy(path)}.") from error
    if type(content) is not dict:
        raise ValueError(f"{path} contains JSON, but not a JSON object: {remedy(path)}.")
    return content


def remedy(path: Path) -> str:
    """What to do about a file that cannot be read. Without Git LFS, a clone has small pointers in place of files."""
    with open(path, "rb") as content:
        is_pointer = content.read(23) == b"version https://git-lfs"
    return "it is a Git LFS pointer, so run `git lfs pull`" if is_pointer else "download it again"


def printable(text: object, length: int = 200) -> str:
    """Text out of a file, for a message: on one line, not too long, and without control characters."""
    text = repr(str(text))[1:-1]
    return text if len(text) <= length else text[: length - 1] + "…"


def abbreviate(texts: list[str], separator: str = ", ", limit: int = 8) -> str:
    """The first few of a list of names or problems."""
    more = f" … and {len(texts) - limit} more" if len(texts) > limit else ""
    return separator.join(map(printable, texts[:limit])) + more


@contextlib.contextmanager
def write_atomically(target: Path) -> Iterator[Path]:
    """A path to write to, which then replaces ``target``. If that fails (OSError), or is killed, the old file stays."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, target)
    except Exception as error:  # safetensors and PIL raise errors of their own for a full disk
        raise OSError(f"{target} could not be saved ({printable(error)}).") from error
    finally:
        part.unlink(missing_ok=True)
