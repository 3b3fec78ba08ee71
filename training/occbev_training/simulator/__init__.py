"""Simulated drives: a procedural street, its cameras and LiDAR, and the files they are written to."""
