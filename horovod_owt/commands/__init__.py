"""The commands of `owt`. Their bodies import the heavy modules, so that --help is fast."""
