"""The clean-up rules: what a user expects of a graph optimizer, and nothing that changes a number."""
