"""Jobs on a Slurm cluster: light enough for a login node, so without torch."""
