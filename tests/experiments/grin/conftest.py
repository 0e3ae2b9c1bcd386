"""The study's scripts import `grin_study` from their own folder; so do these tests."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "experiments" / "grin"))
