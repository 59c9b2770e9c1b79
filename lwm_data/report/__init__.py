"""What a dataset, or a run of question answering, holds, as one HTML page that needs nothing but itself."""
