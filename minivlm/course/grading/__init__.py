"""Grading of returned notebooks: ``grader`` runs each in a process of its own, which is ``worker``."""
