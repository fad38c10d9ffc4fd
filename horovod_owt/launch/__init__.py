"""Starts jobs without a scheduler: on one box, on hosts, and again after a failure. No torch here."""
