"""Grade submitted notebooks: ``grader`` runs each one in a separate process, ``worker``."""
