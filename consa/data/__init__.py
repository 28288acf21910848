"""Data: documents, token sequences, retrieval questions, and files of other projects."""
