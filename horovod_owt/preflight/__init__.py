"""Checks to run before a job is queued; each reports what it saw, what it wanted, and the fix."""
