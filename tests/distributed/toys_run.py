"""Toy runs one after the other in the same processes: ``python toys_run.py OPTIONS.json ...``."""

from __future__ import annotations

import sys
from pathlib import Path

import toy_run

for argument in sys.argv[1:]:
    toy_run.main(Path(argument))
