"""Plain slow versions: the truth some tests compare with."""
