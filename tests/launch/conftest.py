"""Launchers of several machines, here as several launchers on this one."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "distributed"))  # toys and recipes that are run on several processes
