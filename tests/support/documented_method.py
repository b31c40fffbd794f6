"""The method that .github/CONTRIBUTING.md shows, as classes."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

_DOCUMENT = Path(__file__).resolve().parents[2] / ".github/CONTRIBUTING.md"
(SOURCE,) = re.findall(r"^```python\n(.*?)^```$", _DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)

_module = types.ModuleType("tests.support.documented_method.source")
sys.modules[_module.__name__] = _module  # where pydantic looks up annotations
exec(compile(SOURCE, str(_DOCUMENT), "exec"), _module.__dict__)
Greedy = _module.Greedy
GreedyConfig = _module.GreedyConfig
