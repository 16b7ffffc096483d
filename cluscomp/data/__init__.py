"""Texts and examples, as token ids; and what of them was seen before."""

from cluscomp.data.texts import PydocText as PydocText
from cluscomp.data.texts import test_windows as test_windows
