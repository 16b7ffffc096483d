"""Codes, codebooks and bits for a weight: tensors only, no model, no settings, no file."""
