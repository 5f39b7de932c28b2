"""Text to distil on: sampled from the teacher or read from files, packed into blocks, checked for overlap."""

from __future__ import annotations

from mambify.data.documents import Document, read_documents
from mambify.data.manifest import Manifest
from mambify.data.overlap import Overlap, check_disjoint
from mambify.data.packing import PackedDataset, pack
from mambify.data.synthesize import synthesize

__all__ = [
    "Document",
    "Manifest",
    "Overlap",
    "PackedDataset",
    "check_disjoint",
    "pack",
    "read_documents",
    "synthesize",
]
