"""`overnight doctor`: everything that a night will need, tried now; one small file for each kind of look."""
