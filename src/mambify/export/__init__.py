"""Models in the forms that other tools read, without this package and without remote code."""

from __future__ import annotations

from mambify.export.formats import FORMATS, Format
from mambify.export.gguf import export_gguf
from mambify.export.lint import Finding, lint
from mambify.export.result import Exported
from mambify.export.transformers import export_transformers
from mambify.hub import upload_directory

__all__ = ["FORMATS", "Exported", "Finding", "Format", "export_gguf", "export_transformers", "lint", "upload_directory"]
