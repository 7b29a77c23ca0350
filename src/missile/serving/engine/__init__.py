"""The engine process: queues, batching and execution. It never parses what a client sent."""

from __future__ import annotations
