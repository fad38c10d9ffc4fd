"""The run folder as a format: who names, reads and writes its files. No torch here."""
