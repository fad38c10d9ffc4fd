"""The run folder: the only package that names, reads and writes its files. Needs no torch."""
