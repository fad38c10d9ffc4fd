"""Start jobs without a scheduler, on one host or several, with automatic restart. Needs no torch."""
