"""Addresses without their secrets, for each file, tag, line and error message that names one."""

import os
import re

MASK = "***"
SECRETS = (
    "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN",
)  # fmt: skip
"""Environment variables whose values are secrets."""
SHORTEST = 6
"""Characters of a secret in the environment below which `redacted` doesn't look for it: a word could equal it."""

_SECRET_NAMES = "token|key|secret|passw|pwd|sig|credential|auth"
_PATTERNS = (
    (re.compile(r"(?<=://)[^\s/@:]*:(?!\d+/)[^\s@]*@"), f"{MASK}@"),  # a password may hold a slash
    (re.compile(r"(?<=://)[^\s/?#]*@"), f"{MASK}@"),
    (re.compile(rf"([?&;][^=&;\s#]*(?:{_SECRET_NAMES})[^=&;\s#]*=)[^&;\s#'\"]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), MASK),
)


def redacted(address: object) -> str:
    """Return an address, or a text that holds addresses, with *** for user:password, tokens and keys."""
    text = str(address)
    for pattern, mask in _PATTERNS:
        text = pattern.sub(mask, text)
    for name in SECRETS:
        if len(secret := os.environ.get(name, "")) >= SHORTEST:
            text = text.replace(secret, MASK)
    return text
