"""What ``mambify bench ops`` measures: each operation at the sizes of real layers."""

from __future__ import annotations

from mambify.bench.case import Shape
from mambify.bench.mixer_cases import MIXER_MAKERS
from mambify.bench.model_cases import MODEL_MAKERS

_8B = {"D": 4096, "F": 14_336, "V": 128_256}
SHAPES = {
    "cpu": (Shape("135M", 1, 512, 9, 3, 64, 576, 1536, 4096), Shape("1B", 1, 512, 32, 8, 64, 2048, 8192, 4096)),
    "cuda": (
        Shape("135M", 32, 512, 9, 3, 64, 576, 1536, 49_152),
        Shape("8B", 8, 2048, 32, 8, 128, **_8B),
        Shape("16k of 2k", 8, 2048, 32, 32, 128, **_8B),
        Shape("16k", 1, 16_384, 32, 32, 128, **_8B),
    ),
}

SCANS = ("ssd_scan", "selective_scan")
MAKERS = MIXER_MAKERS | MODEL_MAKERS
