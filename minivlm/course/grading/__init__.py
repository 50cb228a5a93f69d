"""Grade submitted notebooks.

``submissions`` finds and reads them, ``worker`` runs one in a separate process, ``remote`` lets the grader call the
functions in that process, ``encoding`` is what both say to each other, ``grader`` marks and writes the tables,
``report`` is what it found out, and ``pages`` shows that to students and teacher.
"""
