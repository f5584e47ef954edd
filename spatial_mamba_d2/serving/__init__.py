"""Models behind a network connection: a server that answers with JSON, and a web demo."""
