"""Grade submitted notebooks.

``submissions`` finds and reads them, ``worker`` runs one in a separate process, ``remote`` lets the grader call the
functions in that process, ``encoding`` is what both say to each other, and ``grader`` marks and writes the tables.
"""
