"""The vocabulary of a campaign and its memory: records, errors, hashing, prompts, and the SQL store."""
