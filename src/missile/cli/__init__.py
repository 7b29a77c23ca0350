"""The `missile` command: one module per verb."""

from __future__ import annotations

from missile.cli.app import main

__all__ = ["main"]
