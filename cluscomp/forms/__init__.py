"""How a weight is STORED. One file a form; stored.py holds what all forms share, layers.py their kinds by name."""
