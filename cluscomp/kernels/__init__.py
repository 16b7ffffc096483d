"""The inner loops, many of them compiled, each with a plain reference beside it."""
