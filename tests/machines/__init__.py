"""Setup proved on other machines: fresh Debian roots, in which a new user's first commands are run."""
