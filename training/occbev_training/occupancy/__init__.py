"""Sweeps to evidence to three-state occupancy labels."""
