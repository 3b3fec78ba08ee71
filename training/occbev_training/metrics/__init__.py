"""Detection and occupancy scores on numpy arrays; numba where present."""
