"""From what a user types (Hub id, directory, GGUF file, alias) to files on this disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mambify.errors import UnknownSourceError
from mambify.families.aliases import KNOWN, find_alias, installed_aliases


@dataclass(frozen=True)
class Source:
    """Where a model's files are: a directory, or one GGUF file in it.

    Attributes:
        name: what the user typed.
        directory: holds ``config.json`` and safetensors, unless ``gguf`` is set.
        gguf: the GGUF file's name, or ``None``.
        hub_id: where the model is on the Hub, where that is known.
    """

    name: str
    directory: Path
    gguf: str | None = None
    hub_id: str | None = None


def resolve(name: str | Path) -> Source:
    """Finds the files of a model; a Hub id is downloaded (config, safetensors, tokenizer and card only).

    Raises:
        UnknownSourceError: there is no such directory, file, alias or Hub repository.
        MissingDependencyError: the package that carries a model known by an alias is not installed.
        CheckpointError: a package declares an alias and lacks the model.
    """
    text, path = str(name), Path(name)
    if not text:
        raise UnknownSourceError("no model has an empty name: give a directory, a .gguf file, an alias or a Hub id")
    carried = find_alias(text) if path.name == text else None
    if carried is not None:
        hub_id = KNOWN[text].hub_id if text in KNOWN else None
        return _on_disk(text, carried, hub_id=hub_id)
    if path.exists():
        return _on_disk(text, path)
    return _from_hub(text)


def _on_disk(name: str, path: Path, *, hub_id: str | None = None) -> Source:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnknownSourceError(f"{name} is a file but not a .gguf: give a directory, a Hub id or a .gguf file")
        return Source(name, path.parent, path.name, hub_id)
    if not (path / "config.json").is_file():
        raise UnknownSourceError(f"{name} holds no config.json: it is not a model directory")
    return Source(name, path, hub_id=hub_id)


def _from_hub(repo_id: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    nothing = f"'{repo_id}' is no directory, no .gguf file, none of the aliases ({', '.join(installed_aliases())})"
    if repo_id.count("/") != 1:
        raise UnknownSourceError(f"{nothing}, and no Hub id (owner/name)")
    try:
        directory = snapshot_download(
            repo_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnknownSourceError(f"{nothing}, and the Hub did not give it: {reason}") from error
    return Source(repo_id, Path(directory), hub_id=repo_id)
