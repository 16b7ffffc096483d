"""Originals: where they come from, how they are opened block by block, and walked."""
