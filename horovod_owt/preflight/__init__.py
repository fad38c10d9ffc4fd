"""What can be known before a job waits in a queue: each check says what it saw, wanted, and the fix."""
