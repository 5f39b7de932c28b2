"""``python -m mambify``: the command line."""

from __future__ import annotations

import sys

from mambify.cli.main import main

sys.exit(main())
