"""What a result looks like: a run folder's figures, charts, and the page over several runs."""
