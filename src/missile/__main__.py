"""`python -m missile`: the same as the `missile` command, for a checkout that is not installed."""

from __future__ import annotations

import sys

from missile.cli.app import main

sys.exit(main())
