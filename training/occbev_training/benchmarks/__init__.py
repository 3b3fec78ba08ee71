"""Speed of the parts of networks, each beside a plain baseline; modules have `run(options) -> Report`."""
