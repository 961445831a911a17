"""Ranks import the cases by name, as these tests do."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, *(Path(__file__).parents[1] / name for name in ("models", "integrations"))):
    sys.path.insert(0, str(folder))
