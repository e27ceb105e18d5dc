"""`sdjax serve`: a model that people and programs share over HTTP."""
