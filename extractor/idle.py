"""What OpenMP's threads do between two operations; read when torch loads."""

from __future__ import annotations

# Sleep, so that writer threads get the cores, but spin .1 ms first: docs/design/model.md has the measurement.
IDLE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
