"""mitmdump -s addons/metaclaw.py: the MetaClaw addon.

This file only finds the package and lists its addons, since mitmproxy reloads nothing but this file.
"""

import sys
from pathlib import Path

try:
    import metaclaw_core  # noqa: F401 - only to see whether it is installed
except ImportError:  # run from a checkout: mitmproxy puts this folder on the path, not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metaclaw_core.proxy.addon import addons_for_script

addons = addons_for_script()
