"""occbev_training: the offline loop of occbev, from recordings to an exported network."""

__version__ = "0.1.0"
