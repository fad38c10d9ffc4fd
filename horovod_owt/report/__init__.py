"""`owt report` and `owt plot`: an HTML page about runs, and figures for papers. Needs no torch."""
