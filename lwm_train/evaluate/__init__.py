"""What a trained model can do: held-out loss beside n-gram models, needle retrieval."""
