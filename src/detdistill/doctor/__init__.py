"""Checks of data, teacher, pair and method before a run: what is wrong, where, and what to do."""
