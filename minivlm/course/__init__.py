"""Everything that teaches: the table of chapters, the exercises, grading, and figures."""
