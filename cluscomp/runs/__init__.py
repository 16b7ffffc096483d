"""One run: folders named by keys, re-use, the record."""
