"""The command line; Hydra ends here."""
