"""The only code that spends compute on a candidate: trainers, the worker process, data and noise."""
