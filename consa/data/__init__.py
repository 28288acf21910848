"""Text: documents, token sequences, questions about text, and the files of other projects."""
