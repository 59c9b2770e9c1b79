"""Question-answer pairs about books, written by a model that sees a chunk at a time. Imports no torch."""
