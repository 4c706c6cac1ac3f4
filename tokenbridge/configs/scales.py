"""Declared recipes: which models, trained how, sampled how, at each scale. One place for every setting.

Commands, nox sessions, tables and tests read the same recipes.
"""

from __future__ import annotations

from tokenbridge.configs.small import SMALL
from tokenbridge.configs.tiny import TINY

SCALES = {scale.name: scale for scale in (TINY, SMALL)}
