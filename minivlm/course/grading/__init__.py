"""Grade submitted notebooks.

``submissions`` finds and reads them, ``worker`` runs one in a separate process, ``remote`` lets the grader call the
functions in that process, ``encoding`` is what both say to each other, and ``grader`` marks. ``report`` is what it
found out, ``shards`` puts reports from several machines together, ``tables`` writes them for the teacher's records, and
``pages`` and ``discuss`` show them to students and teacher.
"""
