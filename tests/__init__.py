"""Tests, and what has to be set before any of them imports torch."""

import os

# OpenMP's threads spin while they wait. Where the cores are shared, a spinning thread keeps the one that it waits for
# from running: an op of one millisecond then takes twenty.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
