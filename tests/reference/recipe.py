"""The paper's way to run K-means, as settings."""

PAPER = {"init": "random_points", "over_relaxation": 1.0, "move_centroids": False}
