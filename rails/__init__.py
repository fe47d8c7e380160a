"""The menu of knobs and the rails: pure functions, text in, verdict out."""
