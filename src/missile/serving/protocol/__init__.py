"""The Open Inference Protocol, version 2, over REST and gRPC, with the extensions that Triton's clients rely on."""

from __future__ import annotations
