"""The suite of comparisons: its cells, running and resuming it, what its results say, and its report."""
