"""The scripts of bench/ import each other by bare name, as a program's own folder allows."""

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"

sys.path.insert(0, str(BENCH))
