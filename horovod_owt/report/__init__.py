"""A page about runs, and figures for papers, made from the run folders alone. Needs no torch."""
