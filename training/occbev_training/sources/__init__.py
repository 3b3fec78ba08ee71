"""Recordings from bags and nuScenes tables behind one interface."""
