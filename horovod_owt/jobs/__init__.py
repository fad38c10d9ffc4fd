"""Jobs as values: what launchers and schedulers are to be told. No torch here: it runs on login nodes."""
