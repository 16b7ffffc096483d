"""The fast inner loops behind kmeans.py and weights.py, each with a plain reference beside it."""
