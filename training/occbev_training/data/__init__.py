"""Recordings and labels to training batches."""
