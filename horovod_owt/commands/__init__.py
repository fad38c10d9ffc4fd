"""The commands of `owt`. Their bodies import the heavy machinery, so that --help answers at once."""
