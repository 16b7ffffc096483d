"""Checkpoints as the files of other libraries; each format says what is lost, and refuses what it cannot hold."""
