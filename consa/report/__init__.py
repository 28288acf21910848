"""What a result looks like: figures."""
