"""The networks, as named parts that a builder joins."""
