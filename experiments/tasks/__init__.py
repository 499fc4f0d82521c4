"""Tasks with known answers: a long context, a question about it, and the answer's score."""
