"""What a run's directory says of the student that came out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mambify.io import read_json
from mambify.provenance import Provenance

_OF_THE_CALL_ONLY = ("command",)


def provenance_of(run: Path, stages: Sequence[Mapping[str, Any]]) -> Provenance:
    """The recipe and the environment that ``run`` recorded, with the summaries of its stages.

    Where the run lies and how it was called is nobody's concern who loads the student: that is left out.
    """
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    del recipe["output"]
    recorded = run / "environment.json"  # the one file that a run killed as it opened may lack
    environment = read_json(recorded) if recorded.is_file() else {}
    kept = {key: value for key, value in environment.items() if key not in _OF_THE_CALL_ONLY}
    return Provenance(recipe=recipe, stages=tuple(stages), environment=kept)
