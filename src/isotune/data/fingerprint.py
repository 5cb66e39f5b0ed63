"""Digests that name prepared data: equal parts give equal digests on every machine."""

import hashlib
import json
from typing import Any


def digest(*parts: Any) -> str:
    """Hexadecimal SHA-256 of parts that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
