"""Jobs on a Slurm cluster: scripts, submission, status, and the batch process. Needs no torch."""
