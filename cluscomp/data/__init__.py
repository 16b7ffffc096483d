"""Texts and examples, as token ids; and what of them was seen before."""
